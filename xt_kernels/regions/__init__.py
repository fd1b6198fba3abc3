"""Region extraction and stitching."""

from .api import extract_regions, stitch_regions
from .grid import Placement, RegionGrid
from .reference import sincos_position

__all__ = ["Placement", "RegionGrid", "extract_regions", "sincos_position", "stitch_regions"]
