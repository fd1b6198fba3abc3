"""Exact attention over a memory and the current tokens."""

from .api import xl_attention

__all__ = ["xl_attention"]
