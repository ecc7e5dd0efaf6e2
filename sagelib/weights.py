"""The released checkpoints, read into :class:`~sagelib.model.SAGE`, and the model written for other runtimes.

Every name of a checkpoint is either mapped, or on the list of names that are dropped because nothing uses them;
anything else, and anything missing, is an error that names it.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from sagelib.backbone import ViTBackbone, read_checkpoint
from sagelib.model import SAGE
from sagelib.runs import atomic_path

__all__ = ["DROPPED", "RENAMED", "export_onnx", "load_authors_checkpoint"]

# Width and depth of the transformer -> its name here.
_BACKBONES = {
    (384, 12): "vit_small_patch14_dinov2",
    (768, 12): "vit_base_patch14_dinov2",
    (1024, 24): "vit_large_patch14_dinov2",
}

# Their name -> ours; patterns of whole names, the groups are kept.
RENAMED = (
    (r"backbone\.model\.(cls_token|pos_embed)", r"backbone.vit.\1"),
    (r"backbone\.model\.(patch_embed\.proj|norm)\.(weight|bias)", r"backbone.vit.\1.\2"),
    (
        r"backbone\.model\.(blocks\.\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)",
        r"backbone.vit.\1.\2.\3",
    ),
    (r"backbone\.model\.(blocks\.\d+)\.(ls1|ls2)\.gamma", r"backbone.vit.\1.\2.gamma"),
    (r"backbone\.gpn_norms\.(\d+)\.projection\.([03])\.(weight|bias)", r"backbone.dpn.\1.projection.\2.\3"),
    (
        r"aggregator\.soft_weighting\.predictor\.([02])\.(weight|bias)",
        r"aggregator.weighting.predictor.\1.\2",
    ),
    (r"aggregator\.token_features\.([02])\.(weight|bias)", r"aggregator.token.\1.\2"),
    (r"aggregator\.cluster_features\.([03])\.(weight|bias)", r"aggregator.reduction.\1.\2"),
    (r"aggregator\.score\.([03])\.(weight|bias)", r"aggregator.probe.\1.\2"),
    (r"aggregator\.gpn\.projection\.([03])\.(weight|bias)", r"aggregator.post_dpn.projection.\1.\2"),
    (
        r"encoder\.(layers\.\d+)\.(self_attn\.in_proj_weight|self_attn\.in_proj_bias|self_attn\.out_proj\.weight|"
        r"self_attn\.out_proj\.bias|linear1\.weight|linear1\.bias|linear2\.weight|linear2\.bias|norm1\.weight|"
        r"norm1\.bias|norm2\.weight|norm2\.bias)",
        r"head.\1.\2",
    ),
)
# Registered by the authors, used by nothing.
DROPPED = (
    r"backbone\.model\.mask_token",
    r"aggregator\.single_branch\.[03]\.(weight|bias)",
)


def load_authors_checkpoint(path: str | Path) -> SAGE:
    """The model of a released checkpoint, in evaluation mode, equal to the authors' own.

    Size of the backbone, widths of the aggregator and presence of the head are read off the shapes. The number of
    attention heads leaves no trace in a checkpoint; it is taken as the released model's, 16. Its ``preprocessing`` is
    the released evaluation's: 322 pixels, mode "paper".

    Parameters
    ----------
    path : path
        A file of ``torch.save({"model_state_dict": ...})``; names may start with ``module.``. It is read with
        ``weights_only=True``: nothing in it is executed.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not such a checkpoint, or a name or shape in it does not fit; the message lists them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        held = (
            ", ".join(map(str, list(checkpoint)[:5]))
            if isinstance(checkpoint, dict)
            else type(checkpoint).__name__
        )
        raise ValueError(f"{path} is no released checkpoint: it has no 'model_state_dict' but {held}")
    theirs = {name.removeprefix("module."): tensor for name, tensor in checkpoint["model_state_dict"].items()}
    ours, unknown = rename(theirs)

    with torch.device("meta"):
        model = SAGE(**_recognise(ours, path))
    own = model.state_dict()
    missing = sorted(own.keys() - ours.keys())
    left = sorted(unknown + [name for name in ours if name not in own])
    # A 1x1 convolution over the map of patches is a linear layer here.
    ours = {k: v.flatten(1) if v.ndim == 4 and "aggregator" in k else v for k, v in ours.items()}
    shapes = [
        f"{k} (expected {tuple(own[k].shape)}, got {tuple(ours[k].shape)})"
        for k in own.keys() & ours.keys()
        if own[k].shape != ours[k].shape
    ]
    wrong = (("missing", missing), ("left over", left), ("of another shape", sorted(shapes)))
    if any(names for _, names in wrong):
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong if names)
        raise ValueError(f"{path} does not fit {model.backbone.name}: {told}")
    model.load_state_dict({k: v.float() for k, v in ours.items()}, strict=True, assign=True)
    # Saved again, only the trained part needs to be kept: the rest is the hub's.
    model._hub_mixin_config = {**model.config, "pretrained": True}
    return model.eval()


def rename(theirs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The authors' names to ours: the renamed tensors, and the names that are neither mapped nor dropped."""
    ours, unknown = {}, []
    for name, tensor in theirs.items():
        new = next((re.sub(p, to, name) for p, to in RENAMED if re.fullmatch(p, name)), None)
        if new is not None:
            ours[new] = tensor
        elif not any(re.fullmatch(pattern, name) for pattern in DROPPED):
            unknown.append(name)
    return ours, unknown


def _recognise(ours: dict[str, Tensor], path: Path) -> dict:
    """The arguments of SAGE that a checkpoint's shapes ask for."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in ours:
            raise ValueError(f"{path} is no released checkpoint: it has nothing for {name}")
        return tuple(ours[name].shape)

    def numbered(pattern: str) -> int:
        return len({m.group(1) for m in (re.match(pattern, name) for name in ours) if m})

    width, depth = shape("backbone.vit.cls_token")[-1], numbered(r"backbone\.vit\.blocks\.(\d+)\.")
    if (width, depth) not in _BACKBONES:
        known = "; ".join(f"{w} wide, {d} blocks ({name})" for (w, d), name in _BACKBONES.items())
        raise ValueError(f"{path} holds a backbone {width} wide of {depth} blocks; known are {known}")
    layers = numbered(r"head\.layers\.(\d+)\.")
    head = {}
    if layers:
        head = {
            "segment_width": shape("head.layers.0.norm1.weight")[0],
            "layers": layers,
            "ffn": shape("head.layers.0.linear1.weight")[0],
        }
    return {
        "backbone": _BACKBONES[width, depth],
        "pretrained": False,
        "position": "dinov2",
        "adapter_blocks": max(1, numbered(r"backbone\.dpn\.(\d+)\.")),
        "aggregator_options": {
            "channels": shape("aggregator.reduction.3.weight")[0],
            "probes": shape("aggregator.probe.3.weight")[0],
            "token_dim": shape("aggregator.token.2.weight")[0],
            "hidden": shape("aggregator.token.0.weight")[0],
        },
        "interact": bool(layers),
        "preprocessing": {"image_size": 322, "mode": "paper"},
        "interact_options": head or None,
    }


class _PerImage(nn.Module):
    """The model without its head; the position embeddings of one grid become a constant."""

    def __init__(self, model: SAGE, grid: tuple[int, int]):
        super().__init__()
        self.model = model
        if isinstance(model.backbone, ViTBackbone):
            table = model.backbone.position_embedding(grid)
            model.backbone.position_embedding = lambda _: table
        else:
            model.backbone.shapes(grid)  # remembered

    def forward(self, images: Tensor) -> Tensor:
        return self.model.embed(images)


def export_onnx(model: SAGE, path: str | Path, *, image_size: int | tuple[int, int] = 322) -> Path:
    """Write the per-image model, without the head, as an ONNX file: images (B, 3, H, W) to descriptors (B, D).

    The batch is free, the image size fixed. Needs the optional packages ``onnx`` and ``onnxscript``.

    Parameters
    ----------
    model : SAGE
    path : path
        The file to write.
    image_size : int or (height, width)
        In pixels; multiples of the patch.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    grid = model.backbone.grid((height, width))
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX export needs two more packages: pip install 'sagelib[onnx]'") from error
    device = next(model.parameters()).device
    images = torch.zeros(2, 3, height, width, device=device)
    was_training = model.training
    wrapper = _PerImage(model, grid).eval()
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                wrapper,
                (images,),
                dynamo=True,
                input_names=["images"],
                output_names=["descriptors"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=4096)}},
                verbose=False,
            )
    finally:
        vars(model.backbone).pop("position_embedding", None)
        model.train(was_training)
    with atomic_path(path) as temporary:
        program.save(str(temporary), external_data=False)
    return Path(path)
