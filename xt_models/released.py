"""The paper's released classification checkpoints, read as data and kept as our models.

A released file is `{"epoch", "state_dict", ...}` with keys behind `module.`. `encoder.model` is
timm's SwinV2 without a final norm; `decoder` is one of three:

    plain   mean of the last map -> linear (C, 4C) -> GELU -> LayerNorm -> linear
    hyper   input_proj(map) + position, class token last -> causal layers -> LayerNorm, linear
    mamba   the same with layers norm(x) + mixer(norm(x)), layers 0 and 2 from last to first
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch

from .checkpoint import check_state
from .model import XT, XTConfig
from .output import OutputFolder
from .registry import CONTEXT_DEFAULTS, ENCODERS

SIZES = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}
"""SwinV2 by (width of stage 0, blocks of stage 2)."""

CONTEXTS = ("plain", "hyper", "mamba")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

NAMES = [
    (r"encoder\.(model\..+)", r"region_encoder.\1"),
    (r"decoder\.cls_token", "class_token"),
    (r"decoder\.(input_proj\..+)", r"\1"),
    (r"decoder\.cls\.(.+)", r"head.\1"),
    (r"decoder\.layers\.(\d+)\.attn\.(.+)", r"context.layers.\1.mixer.\2"),
    (r"decoder\.layers\.(\d+)\.input_layernorm\.(.+)", r"context.layers.\1.norm1.\2"),
    (r"decoder\.layers\.(\d+)\.post_attention_layernorm\.(.+)", r"context.layers.\1.norm2.\2"),
    (r"decoder\.layers\.(\d+)\.mlp\.(\w+)_proj\.(.+)", r"context.layers.\1.mlp.\2.\3"),
    (r"decoder\.layers\.(\d+)\.((?:mixer|norm)\..+)", r"context.layers.\1.\2"),
    (r"decoder\.layers\.(\d+\.\w+)", r"head.\1"),
]
"""Released names and ours; the first pattern that fits a whole name counts."""

TABLES = ("relative_coords_table", "relative_position_index", "attn_mask", "k_bias")
"""Tables that follow from the window sizes; older versions of timm stored them."""


class Converted(NamedTuple):
    """What was converted: size of the SwinV2, context, classes, parameters, and the file's entries
    beside the weights, which are left behind.
    """

    size: str
    context: str
    num_classes: int
    parameters: int
    left_behind: list[str]


def released_config(size: str, context: str = "hyper", num_classes: int = 284) -> XTConfig:
    """The config of a released model. size: "tiny", "small", "base" or "large". context: "plain",
    "hyper" or "mamba".
    """
    for option, value, known in (("size", size, SIZES.values()), ("context", context, CONTEXTS)):
        if value not in known:
            raise ValueError(
                f"released_config: {option} must be one of {', '.join(known)}, got {value!r}."
            )
    encoder, region = ENCODERS[f"swinv2_{size}"]
    settings: dict[str, Any] = {"encoder": encoder, "region": region, "num_classes": num_classes}
    if context == "plain":
        return XTConfig(context=None, **settings)
    if context == "mamba":
        settings |= {"depth": 4, "mamba_form": "released"}
    return XTConfig(context=context, **CONTEXT_DEFAULTS["hyper"] | settings)


def convert_checkpoint(file: str | Path, out: str | Path) -> Converted:
    """Reads a released checkpoint and writes the folder `out` for `XT.from_pretrained`.

    The file is unpickled with `weights_only=True`: nothing in it runs. Weights are kept as fp32.

    Raises ValueError, before `out` is made, for a file that is none, that would run code, that
    holds tensors which are not dense floating-point ones or not finite, or another architecture;
    and as `OutputFolder` does.
    """
    file = Path(file)
    with OutputFolder(out) as folder:
        assert folder is not None
        payload = _load(file)
        state, left_behind = _weights(payload, file)
        size, context, num_classes = _recognise(state, file)
        with torch.random.fork_rng(devices=[]):
            model = XT(released_config(size, context, num_classes))
        state = _without_tables(state, dict(model.named_buffers()), file)
        check_state(state, model.state_dict(), str(file))
        for name, tensor in state.items():
            if not tensor.float().isfinite().all():
                raise ValueError(
                    f"{file} must hold weights finite in fp32, found others in {name}."
                )
        model.load_state_dict(state)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        origin = (
            f"Converted from `{file.name}` (SHA-256 `{digest}`), a checkpoint of the paper's "
            f"released code: SwinV2 {size}, context {context}."
        )
        model.save_pretrained(folder, model_card_kwargs={"origin": origin})
    parameters = sum(p.numel() for p in model.parameters())
    return Converted(size, context, num_classes, parameters, left_behind)


def _load(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"Checkpoint {file} does not exist.")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {named[1]}" if named else "its pickle has others"
        raise ValueError(
            f"{file} must hold tensors and plain values only, but {what}; nothing of it was run."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        line = (str(error).splitlines() or ["no message"])[0]
        raise ValueError(
            f"{file} must be a whole file of torch.save ({type(error).__name__}: {line})."
        ) from None


def _weights(payload: Any, file: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a checkpoint by their released names, and the names of its other entries."""
    left_behind: list[str] = []
    if isinstance(payload, Mapping) and "state_dict" in payload:
        left_behind = sorted(map(str, set(payload) - {"state_dict"}))
        payload = payload["state_dict"]
    if not isinstance(payload, Mapping) or not payload:
        raise ValueError(f"{file} must hold a state dict, found {type(payload).__name__}.")
    state: dict[str, torch.Tensor] = {}
    for name, value in payload.items():
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(f"{file}: {name} must be a tensor, found {type(value).__name__}.")
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.is_nested:
            what = f"{value.layout}".removeprefix("torch.")
            raise ValueError(
                f"{file}: {name} must be a dense tensor with its values in the file, "
                f"found {what}, {value.dtype} on {value.device}."
            )
        is_table = str(name).endswith(TABLES)
        if value.dtype not in DTYPES and not is_table:
            raise ValueError(f"{file}: {name} must hold real numbers, found {value.dtype}.")
        plain_name = str(name).removeprefix("module.")
        if plain_name in state:
            raise ValueError(f"{file} must hold one tensor a weight, found two of {plain_name}.")
        state[plain_name] = value.detach()
    return state, left_behind


def _recognise(state: Mapping[str, torch.Tensor], file: Path) -> tuple[str, str, int]:
    """(size, context, classes) of released weights, from names and shapes."""
    patches = state.get("encoder.model.patch_embed.proj.weight")
    blocks = {re.match(r"encoder\.model\.layers_2\.blocks\.(\d+)\.", name) for name in state}
    depth = len({match[1] for match in blocks if match})
    size = SIZES.get((0 if patches is None else len(patches), depth))
    last = {
        "plain": "decoder.layers.3.bias",
        "hyper": "decoder.layers.0.attn.qkv.weight",
        "mamba": "decoder.layers.0.mixer.A_log",
    }
    context = next((kind for kind, name in last.items() if name in state), None)
    classes = state.get("decoder.layers.3.bias" if context == "plain" else "decoder.cls.1.bias")
    if size is None or context is None or classes is None or classes.dim() != 1:
        raise ValueError(
            f"{file} must be a released xT classification checkpoint (SwinV2 tiny, small, base or "
            f"large; plain, hyper or mamba), found {len(state)} tensors such as "
            f"{', '.join(sorted(state)[:3])}."
        )
    return size, context, len(classes)


def _without_tables(
    state: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], file: Path
) -> dict[str, torch.Tensor]:
    """The weights by our names. Stored tables must equal those that the model computes: others
    tell of another window."""
    weights = {}
    for name, tensor in state.items():
        ours = next((re.sub(old, new, name) for old, new in NAMES if re.fullmatch(old, name)), name)
        if not name.endswith(TABLES):
            if ours in weights:
                raise ValueError(f"{file} must hold one tensor a weight, found two of {ours}.")
            weights[ours] = tensor
            continue
        table = buffers.get(ours)
        if (
            table is None
            or table.shape != tensor.shape
            or not torch.allclose(table.double(), tensor.double(), atol=1e-5)
        ):
            raise ValueError(
                f"{file}: {name} must be the table of a released window size, found another."
            )
    return weights
