"""Models that see very large images: regions, stitched tokens, context, head; streamed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context_encoder import ContextEncoder, Memory, XLContextEncoder
    from .mamba import MambaContextEncoder, MambaMixer
    from .model import XT, XTConfig, XTOutput
    from .planning import plan
    from .receptive_field import context_length, effective_receptive_field, visible_chunks
    from .registry import create_model, list_models
    from .source import open_image
    from .streaming import stream, stream_chunks

_HOME = {
    "ContextEncoder": "context_encoder",
    "MambaContextEncoder": "mamba",
    "MambaMixer": "mamba",
    "Memory": "context_encoder",
    "XLContextEncoder": "context_encoder",
    "XT": "model",
    "XTConfig": "model",
    "XTOutput": "model",
    "context_length": "receptive_field",
    "create_model": "registry",
    "effective_receptive_field": "receptive_field",
    "list_models": "registry",
    "open_image": "source",
    "plan": "planning",
    "stream": "streaming",
    "stream_chunks": "streaming",
    "visible_chunks": "receptive_field",
}

__all__ = [
    "XT",
    "ContextEncoder",
    "MambaContextEncoder",
    "MambaMixer",
    "Memory",
    "XLContextEncoder",
    "XTConfig",
    "XTOutput",
    "context_length",
    "create_model",
    "effective_receptive_field",
    "list_models",
    "open_image",
    "plan",
    "stream",
    "stream_chunks",
    "visible_chunks",
]


def __getattr__(name: str) -> Any:
    # Rooms load on first use: torch and timm take seconds, `xt --help` has half of one.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
