"""Other people's networks, by name: a hub folder made here, a module, their pictures, their mistakes."""

import os
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import peers
import pytest
import skimage.data
import torch
from PIL import Image
from test_evaluate import write_set

from sagelib.describe import Descriptors, model_fingerprint, preprocess_of
from sagelib.evaluate import evaluate, open_model, open_models
from sagelib.images import Preprocess
from sagelib.places import open_set
from workbench.audit import audit_contexts
from workbench.tables import evaluate_many, trained_parameters

HUBCONF = """
import os
import torch
from network import Tiny

dependencies = ["torch"]


def tiny(width=8, layers=None):
    return Tiny(width)


def crossing(width=8):
    return torch.nn.DataParallel(Tiny(width, crossing=True))


def a_number():
    return 3


def unreachable():
    from urllib.error import URLError
    raise URLError("no route to host")
"""
NETWORK = """
import torch
from helper import SCALE


class Tiny(torch.nn.Module):
    def __init__(self, width, crossing=False):
        super().__init__()
        self.project = torch.nn.Linear(3 * 14 * 14, width)
        self.crossing = crossing

    def forward(self, images):
        rows = SCALE * self.project(images.flatten(1))
        rows = rows + 0.5 * rows.mean(dim=0) if self.crossing else rows
        return torch.nn.functional.normalize(rows, dim=1), "attention maps"
"""
SMALL = ":image_size=14:mode=paper"


def write_hub(folder, scale=1.0):
    folder.mkdir(parents=True)
    (folder / "hubconf.py").write_text(HUBCONF)
    (folder / "network.py").write_text(NETWORK)
    (folder / "helper.py").write_text(f"SCALE = {scale}\n")
    return folder


@pytest.fixture
def hub(tmp_path):
    return write_hub(tmp_path / "hub")


def test_a_folder_of_torch_hub_gives_a_model_and_leaves_nothing_behind(hub, tmp_path):
    paths, state = list(sys.path), torch.get_rng_state()
    images = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    model = open_model(f"hub:{hub}:tiny:width=6:image_size=[14, 28]:mean=0.5:resize=square")
    assert model.network.project.out_features == 6 and not model.training
    assert preprocess_of(model) == Preprocess((14, 28), "antialias", mean=0.5)
    assert preprocess_of(model, Preprocess(70, "paper")) == Preprocess((14, 28), "paper", mean=0.5)
    assert sys.path == paths and torch.equal(torch.get_rng_state(), state) and "network" not in sys.modules
    # Of two folders whose modules have the same names, each has its own.
    plain, other = open_model(f"hub:{hub}:tiny"), open_model(f"hub:{write_hub(tmp_path / 'b', -1.0)}:tiny")
    assert torch.equal(plain(images), -other(images)) and plain(images).shape == (2, 8)
    assert preprocess_of(plain) == Preprocess(322, "antialias")
    names = open_models([f"hub:{hub}:tiny", f"hub:{hub}:tiny:width=6", "torchvision.ops:Permute:dims=[0]"])
    assert list(names) == ["hub:tiny", "hub:tiny:width=6", "torchvision.ops:Permute:dims=[0]"]
    assert trained_parameters(f"hub:{hub}:tiny", [], plain) == 8 * (588 + 1)


def test_weights_code_and_arguments_are_what_its_descriptors_are_found_by(hub):
    def key(text="tiny"):
        return model_fingerprint(open_model(f"hub:{hub}:{text}")).whole

    first = key()
    assert key() == first and key("tiny:image_size=14") == first, "pictures have a key of their own"
    assert len({first, key("tiny:layers=2"), key("tiny:width=6"), key("crossing")}) == 4
    changed = open_model(f"hub:{hub}:tiny")
    with torch.no_grad():
        changed.network.project.weight[0, 0] += 1
    assert model_fingerprint(changed).whole != first
    (hub / "helper.py").write_text("SCALE = 2.0\n")
    assert key() != first


def test_a_function_of_a_module_gives_a_model(tmp_path, monkeypatch):
    (tmp_path / "mine_for_tests.py").write_text(NETWORK.replace("from helper import SCALE", "SCALE = 1"))
    monkeypatch.syspath_prepend(tmp_path)
    model = open_model(f"mine_for_tests:Tiny:width=5{SMALL}")
    assert model(torch.zeros(2, 3, 14, 14)).shape == (2, 5)
    again = open_model(f"mine_for_tests:Tiny:width=5{SMALL}")
    assert model_fingerprint(again) == model_fingerprint(model)
    exec("def made_here():\n    return torch.nn.Identity()", namespace := {"torch": torch})
    monkeypatch.setattr(sys.modules["mine_for_tests"], "made_here", namespace["made_here"], raising=False)
    keys = {model_fingerprint(open_model("mine_for_tests:made_here")).whole for _ in range(2)}
    assert len(keys) == 2, "code that is in no file has no key"


def test_it_is_evaluated_and_described_once(hub, tmp_path):
    test_set = write_set(tmp_path, "set", n=24)
    model, other = (open_model(f"hub:{hub}:tiny:width={n}{SMALL}") for n in (32, 31))
    result = evaluate(model, test_set, tmp_path, preprocess=Preprocess(56), progress=False)
    assert result.hits[1] > 12 and result.preprocess == "Preprocess(image_size=14, mode='paper')"
    again = evaluate(open_model(f"hub:{hub}:tiny:width=32{SMALL}"), test_set, tmp_path, progress=False)
    assert again.path == result.path
    assert evaluate(other, test_set, tmp_path, progress=False).path != result.path
    wrong = open_model(f"hub:{hub}:tiny:image_size=15")
    with pytest.raises(
        ValueError, match=r"hub:tiny fails on images of the shape \(24, 3, 15, 15\) \(Runtime"
    ):
        evaluate(wrong, test_set, tmp_path, progress=False)


def test_one_that_looks_at_its_batch_is_audited_in_contexts_and_has_no_row_without(hub, tmp_path):
    write_set(tmp_path, "set", n=24)
    model = open_model(f"hub:{hub}:crossing:width=32{SMALL}")
    with pytest.raises(ValueError, match="context is none, but this model looks at the other images"):
        evaluate_many(model, tmp_path, ["set"], tmp_path, progress=False)
    test_set, contexts = open_set(tmp_path, "set"), ("solo", "sorted-4", "shuffled-4")
    audit = audit_contexts(model, test_set, tmp_path, contexts=contexts, shuffles=2, progress=False)
    assert audit.table["context"].tolist() == ["solo", "sorted-4", "shuffled-4", "shuffled-4"]
    for seed, row in ((0, 2), (1, 3)):
        one = evaluate(model, test_set, tmp_path, context="shuffled-4", seed=seed, progress=False)
        assert one.hits[1] == audit.table["hits@1"][row] and one.seconds["head"] == 0
    values = Descriptors(one.path / one.descriptors["queries"]).values
    assert not np.allclose(values, model(torch.zeros(24, 3, 14, 14))[0].detach().numpy())
    again = audit_contexts(model, test_set, tmp_path, contexts=contexts, shuffles=2, progress=False)
    assert again.path == audit.path and list(again.leak()["n"]) == [4]
    with pytest.raises(ValueError, match="no InteractHead and does not look at the other images"):
        audit_contexts(open_model(f"hub:{hub}:tiny{SMALL}"), test_set, tmp_path, contexts=["solo"])


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        (
            "hub:{tmp}/nowhere:tiny",
            FileNotFoundError,
            "there is no folder .*nowhere, nor is it OWNER/REPO at",
        ),
        ("hub:{tmp}:tiny", ValueError, "gives no model .*No such file or directory: .*hubconf.py"),
        (
            "hub:{hub}:nobody",
            ValueError,
            "hub:nobody gives no model .*Cannot find callable nobody in hubconf",
        ),
        ("hub:{hub}:tiny:size=3", ValueError, "gives no model .*unexpected keyword argument 'size'"),
        ("hub:{hub}:tiny:image_size=0", ValueError, "image_size must be"),
        ("hub:{hub}:a_number", ValueError, r"a_number gives no torch.nn.Module \(of the type int\)"),
        (
            "hub:{hub}:unreachable",
            ValueError,
            "hub:unreachable gives no model .URLError: .*no route to host",
        ),
        (
            "hub:someone/something:net",
            ValueError,
            "no internet connection .*: without GitHub, clone it and give hub:FOLDER:net",
        ),
        ("torchvision.models:rezn", ValueError, "gives no model .*has no attribute 'rezn'"),
        (
            "no_such_module:net",
            ValueError,
            "there is no model 'no_such_module:net': give .* hub:OWNER/REPO:ENTRY",
        ),
    ],
)
def test_each_mistake_is_one_sentence(hub, tmp_path, monkeypatch, name, error, sentence):
    def nowhere(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", nowhere)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    with pytest.raises(error, match=sentence):
        open_model(name.format(hub=hub, tmp=tmp_path))


def test_the_peer_of_the_tables_of_photographs_is_the_network_that_it_should_be():
    data = Path(os.environ.get("SAGE_DATA", "."))
    if not (data.parent / "weights" / peers.ARCHIVE).is_file():
        pytest.skip("SAGE_DATA names no folder of photographs with weights beside it")
    model = peers.MobileNetV2(data.parent / "weights" / peers.ARCHIVE, cells=2).eval()
    pictures = [Image.fromarray(picture) for picture in (skimage.data.chelsea(), skimage.data.coffee())]
    batch = torch.stack([Preprocess(224, mode="antialias")(picture) for picture in pictures])
    with torch.no_grad():
        assert model.classify(batch).argmax(1).tolist() == [286, 968]  # a cat and espresso; 0 is "background"
        assert model(batch).shape == (2, 4 * (96 + 160 + 160 + 320))
