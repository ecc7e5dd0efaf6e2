"""With anchors a descriptor is a function of its image alone, from the pixels to the file."""

import numpy as np
import pytest
import torch

from sagelib.describe import choose_anchors, describe, own_anchors
from sagelib.evaluate import evaluate
from sagelib.images import Preprocess, load_image
from sagelib.model import SAGE
from sagelib.places import open_set
from workbench.audit import audit_contexts
from workbench.grids import rerank_in_context

PREPROCESS = Preprocess(56)
OPTIONS = {"preprocess": PREPROCESS, "dtype": "float32", "device": "cpu", "progress": False}


def model_with(**head) -> SAGE:
    torch.manual_seed(0)
    model = SAGE(
        "vit_test_patch14",
        pretrained=False,
        adapter_blocks=1,
        aggregator_options={"channels": 16, "probes": 8, "token_dim": 32, "hidden": 32},
        interact_options={"segment_width": 32, "heads": 4, "layers": 2, "ffn": 32, **head},
    )
    return model.eval()


@pytest.fixture(scope="module")
def test_set(small_town):
    return open_set(small_town.parent, small_town.name)


@pytest.fixture(scope="module")
def images(test_set) -> torch.Tensor:
    return torch.stack([PREPROCESS(load_image(path)) for path in test_set.queries.path[:9]])


@torch.no_grad()
@pytest.mark.parametrize("head", [{"stored_anchors": 5}, {"learned_anchors": 5}], ids=["stored", "learned"])
def test_permuting_and_splitting_batches_changes_nothing(head, images):
    model = model_with(**head)
    if "stored_anchors" in head:
        model.set_anchors(model.embed(images[4:9].flip(-1)))
    whole = model(images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(images[order]), whole[order], rtol=0, atol=1e-5)
    for size in (1, 2, 4):
        parts = torch.cat([model(part) for part in images.split(size)])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    # Over the batch, as published, all of this changes it: the test can fail.
    batch = model.interact(model.embed(images))
    parts = torch.cat([model.interact(model.embed(part)) for part in images.split(2)])
    assert (parts - batch).abs().max() > 1e-3
    assert not torch.allclose(whole, batch, atol=1e-3)


def test_files_of_descriptors_do_not_depend_on_batches_or_on_other_pictures(test_set, tmp_path):
    model = model_with()
    base = describe(model, test_set.database, tmp_path / "base", **OPTIONS)
    for method in ("sample", "kmeans"):
        options = {**OPTIONS, "context": "anchors", "anchors": choose_anchors(base, 6, method)}
        places = test_set.queries
        whole = describe(model, places, tmp_path / f"whole-{method}", batch_size=16, **options).values
        small = describe(model, places, tmp_path / f"small-{method}", batch_size=3, **options).values
        np.testing.assert_allclose(small, whole, rtol=0, atol=1e-5)
        rows = np.random.default_rng(0).permutation(len(places))[:11]
        some = describe(model, places[rows], tmp_path / f"some-{method}", batch_size=4, **options).values
        np.testing.assert_allclose(some, whole[rows], rtol=0, atol=1e-5)


def test_a_second_stage_is_a_function_of_the_query_and_the_data_base():
    model = model_with()
    rng = np.random.default_rng(0)
    database, queries = (rng.normal(size=(n, model.width)).astype(np.float32) for n in (20, 6))
    indices = np.argsort(((queries[:, None] - database) ** 2).sum(-1), axis=1)[:, :10]
    whole = rerank_in_context(model, database, queries, indices, 8, device="cpu")
    np.testing.assert_array_equal(np.sort(whole[:, :8]), np.sort(indices[:, :8]))
    np.testing.assert_array_equal(whole[:, 8:], indices[:, 8:])
    assert (whole != indices).any()
    for row in range(6):  # one query at a time, and by hand
        part = slice(row, row + 1)
        alone = rerank_in_context(model, database, queries[part], indices[part], 8, device="cpu")
        np.testing.assert_array_equal(alone, whole[part])
        anchors = torch.from_numpy(database[indices[row, :8]])
        with torch.no_grad():
            query = model.interact(torch.from_numpy(queries[part]), anchors)
            distances = torch.stack([(model.interact(a[None], anchors) - query).norm() for a in anchors])
        np.testing.assert_array_equal(indices[row, :8][np.argsort(distances.numpy())], whole[row, :8])
    short = np.where(np.arange(10) < 3, indices, -1)  # three references in all
    again = rerank_in_context(model, database, queries, short, 8, device="cpu")
    assert (again[:, 3:] == -1).all() and (np.sort(again[:, :3]) == np.sort(indices[:, :3])).all()
    for m in (0, 11):
        with pytest.raises(ValueError, match=f"rerank must be a whole number from 1 to 10, got {m}"):
            rerank_in_context(model, database, queries, indices, m, device="cpu")


def test_an_audit_shows_it_beside_the_contexts_that_are_not_so(test_set, tmp_path):
    model = model_with()
    base = describe(model, test_set.database, tmp_path / "base", **OPTIONS)
    model.set_anchors(torch.from_numpy(choose_anchors(base, 6)))
    contexts = ("anchors", "sorted-4", "shuffled-4")
    audit = audit_contexts(model, test_set, tmp_path, contexts=contexts, shuffles=2, **OPTIONS)
    alone = evaluate(model, test_set, tmp_path / "alone", context="anchors", **OPTIONS)
    np.testing.assert_array_equal(audit.ranks["anchors"], alone.per_query_rank)
    assert any((audit.ranks[key] != alone.per_query_rank).any() for key in audit.ranks if key != "anchors")


def test_anchors_travel_with_a_saved_model(images, tmp_path):
    model = model_with(stored_anchors=5)
    with torch.no_grad():
        model.set_anchors(model.embed(images[:5]))
        expected = model(images)
        model.save_pretrained(tmp_path / "model")
        again = SAGE.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(again(images), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(own_anchors(again), own_anchors(model))
