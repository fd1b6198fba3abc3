"""The definition of each op, in dense eager PyTorch under the op's own name and signature."""

from .hyper_attention.reference import hyper_attention
from .regions.reference import extract_regions, sincos_position, stitch_regions
from .selective_scan.reference import selective_scan
from .xl_attention.reference import xl_attention

__all__ = [
    "extract_regions",
    "hyper_attention",
    "selective_scan",
    "sincos_position",
    "stitch_regions",
    "xl_attention",
]
