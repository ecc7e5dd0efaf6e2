"""Images: the preprocessings against plain arithmetic, augmentation by (seed, epoch, index) alone."""

import make_sets
import numpy as np
import pytest
import torch
from PIL import Image

from sagelib.images import IMAGENET_MEAN, IMAGENET_STD, Preprocess, TrainTransform, load_image, loader
from sagelib.places import Places, open_set


def picture(seed=0, size=(61, 43), low=0, high=256):
    pixels = np.random.default_rng(seed).integers(low, high, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalised(image) -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float64) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


@pytest.mark.parametrize("size", [28, (14, 42), (70, 98)])
def test_the_papers_preprocessing(size):
    height, width = (size, size) if isinstance(size, int) else size
    got = Preprocess(size)(picture())
    assert got.dtype == torch.float32 and got.shape == (3, height, width)
    # Four neighbours, pixel centres at half integers, no antialias.
    source = torch.nn.functional.interpolate(normalised(picture())[None], (height, width), mode="bilinear")
    torch.testing.assert_close(got.double(), source[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("how", "width", "height"),
    [
        ({"resize": "short"}, 57, 40),  # of 61 x 43
        ({"resize": "long"}, 40, 28),
        ({"resize": "short", "multiple": 14}, 56, 42),
        ({"resize": "long", "multiple": 15}, 45, 30),
        ({"resize": "long", "multiple": 100}, 100, 100),
    ],
)
def test_the_aspect_is_kept(how, width, height, turned):
    source = picture().transpose(Image.Transpose.ROTATE_90) if turned else picture()
    sides = (width, height) if turned else (height, width)
    got = Preprocess(40, "antialias", **how)(source)
    torch.testing.assert_close(got, Preprocess(sides, "antialias")(source), atol=0, rtol=0)


def test_colours_are_normalised_as_asked_and_the_repr_says_what_is_not_as_usual():
    usual = Preprocess(28)
    other = Preprocess(28, mean=0.5, std=[0.5, 0.25, 1])
    pixels = usual(picture()) * torch.tensor(IMAGENET_STD)[:, None, None]
    pixels += torch.tensor(IMAGENET_MEAN)[:, None, None]
    expected = (pixels - 0.5) / torch.tensor([0.5, 0.25, 1.0])[:, None, None]
    torch.testing.assert_close(other(picture()), expected, atol=1e-5, rtol=0)
    assert repr(usual) == "Preprocess(image_size=28, mode='paper')"
    for made in (other, Preprocess([28, 42]), Preprocess(40, "antialias", resize="long", multiple=14)):
        assert eval(repr(made)) == made and len({made, usual}) == 2


def test_antialias_averages_what_shrinks():
    # Antialiased bilinear is a triangle filter: the mean stays the picture's, the spread shrinks.
    source = picture(size=(112, 112))
    plain, smooth = Preprocess(14)(source), Preprocess(14, "antialias")(source)
    assert smooth.std() < 0.5 * plain.std()
    mean = normalised(source).mean((1, 2)).float()
    torch.testing.assert_close(smooth.mean((1, 2)), mean, atol=0.02, rtol=0)
    flat = Image.new("RGB", (50, 40), (10, 200, 30))
    torch.testing.assert_close(Preprocess(14)(flat), Preprocess(14, "antialias")(flat), atol=1e-5, rtol=0)


def test_autocontrast_stretches_each_channel():
    dark = picture(low=3, high=40)
    pixels = np.asarray(dark, dtype=np.float64)
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    stretched = np.floor((pixels - low) * 255 / (high - low) + 1e-9)
    expected = Preprocess((43, 61), "antialias")(Image.fromarray(stretched.astype(np.uint8)))
    got = Preprocess((43, 61), "autocontrast")(dark)
    torch.testing.assert_close(got, expected, atol=1.01 / 255 / min(IMAGENET_STD), rtol=0)  # one grey level
    assert got.std() > 3 * Preprocess((43, 61))(dark).std()


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (Preprocess, {"mode": "papers"}),
        (Preprocess, {"resize": "crop"}),
        (Preprocess, {"image_size": "224"}),
        (Preprocess, {"image_size": (224, 322), "resize": "short"}),
        (Preprocess, {"multiple": 0}),
        (Preprocess, {"mean": (0.5, 0.5)}),
        (Preprocess, {"std": 0}),
        *(
            (made, {"image_size": size})
            for made in (Preprocess, TrainTransform)
            for size in (0, (3, 4, 5), (224, 0))
        ),
        (TrainTransform, {"randaugment": 0}),
        (TrainTransform, {"crop": 1.5}),
    ],
)
def test_values_out_of_range(made, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        made(**wrong)
    with pytest.raises(ValueError, match="epoch must be a whole number of at least 0, got -1"):
        TrainTransform().set_epoch(-1)


def test_pictures_are_rgb_and_upright(tmp_path):
    grey = tmp_path / "grey.png"
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(grey)
    assert load_image(grey).mode == "RGB" and load_image(str(grey)).size == (4, 3)
    tall = Image.new("RGB", (4, 2), (255, 0, 0))
    tall.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    tall.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (0, 0, 255)


def test_pictures_that_do_not_decode(tmp_path):
    whole = make_sets.write_picture(tmp_path / "whole.jpg", 0, (64, 64)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("cut.jpg", "text.jpg"):
        with pytest.raises(
            ValueError, match=rf"{name}: this picture does not decode \(.*\); replace or remove"
        ):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg: there is no such picture"):
        load_image(tmp_path / "none.jpg")


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    transform = TrainTransform(28, seed=1)
    base = transform(picture(), 5)
    assert base.shape == (3, 28, 28) and base.dtype == torch.float32
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 (the global state must not matter)
    transform(picture(), 6)
    assert torch.equal(transform(picture(), 5), base)
    assert torch.equal(TrainTransform(28, seed=1)(picture(), 5), base)
    # Another index, epoch or seed: another draw (a few may agree by chance, all of them cannot).
    assert any(not torch.equal(transform(picture(), i), base) for i in range(6, 12))
    assert any(not torch.equal(TrainTransform(28, seed=s)(picture(), 5), base) for s in range(2, 8))
    epochs = []
    for epoch in range(6):
        transform.set_epoch(epoch)
        epochs.append(transform(picture(), 5))
    assert torch.equal(epochs[0], base) and any(not torch.equal(e, base) for e in epochs)
    state = torch.get_rng_state()
    transform(picture(), 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_augmentation_is_a_resize():
    transform = TrainTransform((28, 42), randaugment=None)
    source = Image.new("RGB", (100, 80), (10, 200, 30))
    torch.testing.assert_close(transform(source, 0), Preprocess((28, 42))(source), atol=1e-5, rtol=0)
    assert torch.equal(transform(picture(), 0), transform(picture(), 1))


def test_a_window_shows_a_part_of_the_picture():
    # The red channel tells the column, the green one the row: a window shows a range of each.
    column, row = np.meshgrid(np.arange(200), np.arange(120))
    ramp = Image.fromarray(np.stack([column, row, 0 * row], -1).astype(np.uint8))
    transform, shares = TrainTransform(56, randaugment=None, crop=0.25, seed=2), []
    for index in range(40):
        x = transform(ramp, index)
        red, green = (255 * (x[c] * IMAGENET_STD[c] + IMAGENET_MEAN[c]) for c in (0, 1))
        spans = [(v.max() - v.min()).item() / most for v, most in ((red, 200), (green, 120))]
        shares.append(spans[0] * spans[1])
        assert torch.equal(x, transform(ramp, index))
    assert 0.2 < min(shares) < 0.4 and 0.8 < max(shares) <= 1.01


def test_dark_pictures_are_stretched_as_in_the_preprocessing_of_that_name():
    dark = Image.fromarray((np.asarray(picture()) // 4).astype(np.uint8)).resize((56, 56))
    transform = TrainTransform(56, randaugment=None, autocontrast=True)
    torch.testing.assert_close(transform(dark, 0), Preprocess(56, "autocontrast")(dark), atol=1e-5, rtol=0)


@pytest.fixture
def six(tmp_path):
    return Places.build([make_sets.write_picture(tmp_path / f"{i}.png", i) for i in range(6)])


def test_the_loader_keeps_order_and_draws_nothing_from_the_global_generator(six):
    preprocess, state = Preprocess(14), torch.get_rng_state()
    composed = list(loader(six, preprocess, batches=[[5, 0, 5, 1], [2]]))
    assert [indices.tolist() for _, indices in composed] == [[5, 0, 5, 1], [2]]
    images, indices = (torch.cat(parts) for parts in zip(*composed, strict=True))
    for image, i in zip(images, indices, strict=True):
        assert torch.equal(image, preprocess(load_image(six.path[i])))
    assert torch.equal(torch.get_rng_state(), state)
    plain = list(loader(six, lambda image: torch.tensor(image.size), batches=[[2]]))  # any function will do
    assert plain[0][0].tolist() == [[32, 24]]


def test_workers_change_nothing_and_see_the_epoch(six):
    transform = TrainTransform(14, seed=4)
    alone, helped = (loader(six, transform, batches=[[0, 1, 2], [3, 4, 5]], workers=w) for w in (0, 2))
    seen = []
    for epoch in (0, 1):
        transform.set_epoch(epoch)
        images = torch.cat([images for images, _ in alone])
        by_workers = torch.cat([images for images, _ in helped])  # the same workers in both epochs
        assert torch.equal(by_workers, images)
        seen.append(images)
    assert not torch.equal(*seen)


def test_a_broken_picture_is_named_by_the_loader(six):
    with open(six.path[3], "wb") as stream:
        stream.write(b"broken")
    for workers in (0, 2):
        with pytest.raises(ValueError) as caught:
            list(loader(six, Preprocess(14), batches=[[0, 1], [2, 3]], workers=workers))
        sentence = str(caught.value)  # one sentence, though a worker process found it
        assert sentence.startswith(six.path[3] + ": this picture does not decode") and "\n" not in sentence


def test_real_photographs(sage_data):
    streets = open_set(sage_data, "sf-streets")
    rows = [list(range(16))]
    images, indices = next(iter(loader(streets.queries, Preprocess(56, "autocontrast"), batches=rows)))
    dark, _ = next(iter(loader(streets.queries, Preprocess(56), batches=rows)))
    assert images.shape == (16, 3, 56, 56) and indices.tolist() == list(range(16))
    assert images.std() > dark.std()  # the queries are night photographs


@pytest.mark.parametrize("dtype, top", [("uint16", 65535), ("int32", 65535), ("float32", 1.0)])
def test_grey_of_more_than_8_bits_keeps_its_levels(tmp_path, dtype, top):
    values = np.tile(np.arange(256) / 255 * top, (8, 1)).astype(dtype)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert (np.asarray(load_image(tmp_path / "x.tif"))[0, :, 0] == np.arange(256)).all()
    Image.fromarray(-np.ones((4, 4), np.float32)).save(tmp_path / "y.tif")
    with pytest.raises(ValueError, match="y.tif.*not all from 0"):
        load_image(tmp_path / "y.tif")


def test_an_open_picture_is_turned_upright_as_its_file_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").crop((0, 0, 40, 90)).save(tmp_path / "p.jpg", exif=exif)
    assert load_image(Image.open(tmp_path / "p.jpg")).tobytes() == load_image(tmp_path / "p.jpg").tobytes()
    assert load_image(tmp_path / "p.jpg").size == (90, 40)
