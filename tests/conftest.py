"""Fixtures shared by the tests: the photographs of ``SAGE_DATA`` where they are, and a small town rendered
once."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

# A busy machine is no failure: properties are judged by what they find, not by how long they took.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@register_model
def vit_test_patch14(
    pretrained=False, *, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options
):
    """A small transformer of DINOv2's kind with random weights: 12 blocks, 192 wide, patches of 14 pixels."""
    sizes = {"patch_size": 14, "embed_dim": 192, "depth": 12, "num_heads": 3, "init_values": 0.1}
    return VisionTransformer(**{"img_size": 224, **sizes, **options})


@pytest.fixture(scope="session")
def sage_data() -> Path:
    """The folder of real data sets named by ``SAGE_DATA``; the test skips, and says so, where there is
    none."""
    folder = os.environ.get("SAGE_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SAGE_DATA names no folder of real photographs: tests on them are left out")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def small_town(tmp_path_factory) -> Path:
    """A town of a few streets in the folder layout of the field, rendered once a session at 56 x 56
    pixels."""
    from townscape.folder import write_town

    return write_town(
        tmp_path_factory.mktemp("town") / "small",
        train_seeds=(1000,),
        val_seeds=(1100,),
        test_seeds=(1110,),
        images_per_town=48,
        size=56,
        progress=False,
    )
