"""Kernels for vision models on very large images. Tensor in, tensor out; CPU and CUDA."""

from .regions import RegionGrid, extract_regions, sincos_position, stitch_regions
from .selective_scan import selective_scan
from .xl_attention import xl_attention

__version__ = "0.1.0"

__all__ = [
    "RegionGrid",
    "extract_regions",
    "selective_scan",
    "sincos_position",
    "stitch_regions",
    "xl_attention",
]
