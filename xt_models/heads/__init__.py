"""Task heads: one trunk, any number of them."""

from __future__ import annotations

from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from torch import nn

from .base import Group, GroupHead, Head, Trunk, run_head
from .classification import ClassificationHead, PlainHead

__all__ = [
    "KINDS",
    "ClassificationHead",
    "Group",
    "GroupHead",
    "Head",
    "PlainHead",
    "Trunk",
    "build_head",
    "run_head",
]

KINDS = {
    "classification": ("classification", "classification"),
    "dense": ("dense", "DenseHead"),
    "segmentation": ("segmentation", "SegmentationHead"),
    "fcos": ("detection", "FcosHead"),
    "detr": ("detection", "DetrHead"),
    "xview3": ("xview3", "XView3Head"),
}
"""Kind of head -> module and callable that builds it: `callable(trunk, **options)`."""


RESERVED = ("embedding", "journal", "preview", "run", "tokens")
"""Names of files that a run writes besides those of heads."""


def build_head(name: str, options: dict[str, Any], trunk: Trunk) -> nn.Module:
    """A head from plain values: `{"kind": ..., **options}`.

    Raises ValueError for an unknown kind or option, ImportError with the extra to install.
    """
    where = f"heads[{name!r}]"
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name) or name in RESERVED:
        raise ValueError(
            f"XTConfig: names of heads must be identifiers other than {', '.join(RESERVED)} and "
            f"attributes of a module, got {name!r}."
        )
    if not isinstance(options, dict) or options.get("kind") not in KINDS:
        got = options.get("kind") if isinstance(options, dict) else options
        raise ValueError(f"XTConfig: {where} must have a kind of {', '.join(KINDS)}, got {got!r}.")
    options = dict(options)
    module, attribute = KINDS[options.pop("kind")]
    build = getattr(import_module(f".{module}", __name__), attribute)
    known = {n: p for n, p in signature(build).parameters.items() if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(set(options) - set(known))
    missing = [n for n, p in known.items() if p.default is Parameter.empty and n not in options]
    if unknown or missing:
        said = f"has unknown option {unknown[0]}" if unknown else f"lacks option {missing[0]}"
        raise ValueError(f"XTConfig: {where} {said}; it takes {', '.join(known)}.")
    head: nn.Module = build(trunk, **options)
    return head
