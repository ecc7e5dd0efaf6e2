"""The released checkpoints, read into :class:`~sagelib.model.SAGE`; no name is left over or missing."""

import re
from pathlib import Path

import torch
from torch import Tensor

from sagelib.backbone import PLAIN_DINOV2, check_state, read_checkpoint
from sagelib.model import SAGE

_BACKBONES = dict(zip([(384, 12), (768, 12), (1024, 24)], PLAIN_DINOV2, strict=False))  # by width, depth

# Their name -> ours; patterns of whole names. What they get wrong does not fit the model.
RENAMED = (
    (r"backbone\.model\.(.*)", r"backbone.vit.\1"),
    (r"backbone\.gpn_norms\.(\d+\.projection\.[03]\..*)", r"backbone.dpn.\1"),
    (r"aggregator\.soft_weighting\.(predictor\.[02]\..*)", r"aggregator.weighting.\1"),
    (r"aggregator\.token_features\.([02]\..*)", r"aggregator.token.\1"),
    (r"aggregator\.cluster_features\.([03]\..*)", r"aggregator.reduction.\1"),
    (r"aggregator\.score\.([03]\..*)", r"aggregator.probe.\1"),
    (r"aggregator\.gpn\.(projection\.[03]\..*)", r"aggregator.post_dpn.\1"),
    (r"encoder\.(layers\..*)", r"head.\1"),
)
DROPPED = (r"backbone\.model\.mask_token", r"aggregator\.single_branch\.[03]\.(weight|bias)")  # unused


def load_authors_checkpoint(path: str | Path) -> SAGE:
    """The model of a released checkpoint, in evaluation mode, equal to the authors' own.

    Size of the backbone, widths of the aggregator and presence of the head are read off the shapes. The
    number of attention heads leaves no trace in a checkpoint; it is taken as the released model's, 16. Its
    ``preprocessing`` is the released evaluation's: 322 pixels, mode "paper".
    The file is of ``torch.save({"model_state_dict": ...})``; names may start with ``module.``. Nothing in it
    is executed. What is no such file, or does not fit, is a ValueError that lists what is wrong.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("model_state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no released checkpoint: it has no 'model_state_dict'")
    state = rename({name.removeprefix("module."): tensor for name, tensor in state.items()})
    # A 1x1 convolution over the map of patches is a linear layer here.
    state = {k: v.flatten(1) if v.ndim == 4 and "aggregator" in k else v for k, v in state.items()}
    with torch.device("meta"):
        model = SAGE(**_recognise(state, path))
    check_state(model.state_dict(), state, f"{path} does not fit {model.backbone.name}")
    model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    # Saved again, only the trained part needs to be kept: the rest is the hub's.
    model._set_config(pretrained=True)
    return model.eval()


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names to ours, without what they never use; an unknown name stays as it is."""
    state = {n: tensor for n, tensor in state.items() if not any(re.fullmatch(p, n) for p in DROPPED)}
    for pattern, to in RENAMED:
        state = {re.sub(rf"\A{pattern}\Z", to, name): tensor for name, tensor in state.items()}
    return state


def _recognise(state: dict[str, Tensor], path: str | Path) -> dict:
    """The arguments of SAGE that a checkpoint's shapes ask for."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"{path} is no released checkpoint: it has nothing for {name}")
        return tuple(state[name].shape)

    def numbered(pattern: str) -> int:
        return len({m[1] for m in (re.match(pattern, name) for name in state) if m})

    width, depth = shape("backbone.vit.cls_token")[-1], numbered(r"backbone\.vit\.blocks\.(\d+)\.")
    name = _BACKBONES.get((width, depth))
    if name is None:
        sizes = "; ".join(f"{w} wide, {d} blocks ({name})" for (w, d), name in _BACKBONES.items())
        raise ValueError(f"{path} holds a backbone {width} wide of {depth} blocks; known are {sizes}")
    layers, head = numbered(r"head\.layers\.(\d+)\."), None
    if layers:
        width, ffn = (shape(f"head.layers.0.{name}.weight")[0] for name in ("norm1", "linear1"))
        head = {"layers": layers, "segment_width": width, "ffn": ffn}
    layers_of = {"channels": "reduction.3", "probes": "probe.3", "token_dim": "token.2", "hidden": "token.0"}
    options = {"backbone": name, "pretrained": False, "interact": bool(layers), "interact_options": head}
    options["adapter_blocks"] = max(1, numbered(r"backbone\.dpn\.(\d+)\."))
    options["aggregator_options"] = {k: shape(f"aggregator.{at}.weight")[0] for k, at in layers_of.items()}
    return options | {"preprocessing": {"image_size": 322, "mode": "paper"}}
