"""Kernels for vision models on very large images. Tensor in, tensor out; CPU and CUDA."""

from .hyper_attention import HyperAttention, Plan, explain, hyper_attention, make_plan
from .regions import RegionGrid, extract_regions, sincos_position, stitch_regions
from .xl_attention import xl_attention

__version__ = "0.1.0"

__all__ = [
    "HyperAttention",
    "Plan",
    "RegionGrid",
    "explain",
    "extract_regions",
    "hyper_attention",
    "make_plan",
    "sincos_position",
    "stitch_regions",
    "xl_attention",
]
