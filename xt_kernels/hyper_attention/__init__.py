"""Approximate attention over very long sequences; see `hyper_attention`."""

from .api import hyper_attention, make_plan
from .describe import Description
from .explain import Explanation, explain
from .module import HyperAttention
from .plan import Plan

__all__ = [
    "Description",
    "Explanation",
    "HyperAttention",
    "Plan",
    "explain",
    "hyper_attention",
    "make_plan",
]
