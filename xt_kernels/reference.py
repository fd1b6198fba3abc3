"""The definition of each op, in dense eager PyTorch under the op's own name and signature."""

from .regions.reference import extract_regions, sincos_position, stitch_regions

__all__ = ["extract_regions", "sincos_position", "stitch_regions", "xl_attention"]
