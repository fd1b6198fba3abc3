"""The definition of each op, in dense eager PyTorch under the op's own name and signature."""

from .hyper_attention.reference import hyper_attention
from .regions.reference import extract_regions, sincos_position, stitch_regions
from .xl_attention.reference import xl_attention

__all__ = [
    "extract_regions",
    "hyper_attention",
    "sincos_position",
    "stitch_regions",
    "xl_attention",
]
