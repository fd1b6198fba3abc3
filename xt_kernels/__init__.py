"""Kernels for vision models on very large images. Tensor in, tensor out; CPU and CUDA."""

from .hyper_attention import HyperAttention, Plan, explain, hyper_attention, make_plan
from .regions import RegionGrid, extract_regions, sincos_position, stitch_regions
from .selective_scan import selective_scan
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
    "selective_scan",
    "sincos_position",
    "stitch_regions",
    "xl_attention",
]
