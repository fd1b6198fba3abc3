"""Measures of predictions: accuracy, mean average precision, COCO's, and those of xView3-SAR."""

from __future__ import annotations

from .boxes import coco_map
from .labels import multi_label_map, top_k_accuracy
from .xview3 import xview3_scores

__all__ = ["coco_map", "multi_label_map", "top_k_accuracy", "xview3_scores"]
