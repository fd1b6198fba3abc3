"""COCO's average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xt_kernels._checks import fail

NAMES = ("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large")
"""Over IoU 0.50 to 0.95; at 0.50; at 0.75; of objects below 32**2 px, below 96**2, and above."""


def coco_map(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    *,
    max_boxes: int = 100,
) -> dict[str, float]:
    """COCO's measures of boxes, each in [0, 1], NaN where there is no such object.

    predictions: one dict an image: boxes `[N, 4]` (left, top, right, bottom) in pixels, scores
        `[N]`, labels `[N]`.
    targets: the same without scores; `is_crowd` `[N]` marks boxes that need not be found.
    max_boxes: of each class in an image, the best ones, that count (COCO: 100).

    Raises ValueError for lists of other lengths, no object, one of no size or boxes that are not
    finite; ImportError without pycocotools.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("coco_map needs pycocotools: pip install 'xt-kernels[det]'.") from error
    if len(predictions) != len(targets):
        fail("coco_map", "predictions", f"be one dict an image = {len(targets)}", len(predictions))
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image, (prediction, target) in enumerate(zip(predictions, targets, strict=True), 1):
        boxes = _xywh(target, ("labels", "is_crowd"), "targets", image - 1)
        if any(not (width > 0 and height > 0) for *_, width, height in boxes):
            rule = f"have boxes of a width and a height above zero, image {image - 1}"
            fail("coco_map", "targets", rule, np.asarray(target["boxes"]).tolist())
        crowd = target.get("is_crowd", np.zeros(len(boxes)))
        for box, label, is_crowd in zip(boxes, target["labels"], crowd, strict=True):
            truth.append(
                {"id": len(truth) + 1, "image_id": image, "category_id": int(label), "bbox": box,
                 "area": box[2] * box[3], "iscrowd": int(is_crowd)}
            )  # fmt: skip
        found_boxes = _xywh(prediction, ("labels", "scores"), "predictions", image - 1)
        rows = found_boxes, prediction["labels"], prediction["scores"]
        for box, label, score in zip(*rows, strict=True):
            found.append(
                {"image_id": image, "category_id": int(label), "bbox": box, "score": float(score)}
            )
    if not truth:
        fail("coco_map", "targets", "hold at least one box", "none")
    labels = {a["category_id"] for a in [*truth, *found]}
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(1, len(targets) + 1)],
            "categories": [{"id": label} for label in sorted(labels)],
            "annotations": truth,
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(found) if found else COCO(), "bbox")
        judge.params.imgIds = sorted(coco.imgs)
        judge.params.catIds = sorted(coco.cats)
        judge.params.maxDets = [max_boxes]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][..., 0]  # [IoU, recall, class, area], -1: no object
    cuts = [
        precision[:, :, :, 0],
        precision[0, :, :, 0],
        precision[5, :, :, 0],
        *(precision[:, :, :, area] for area in (1, 2, 3)),
    ]
    means = [float(cut[cut > -1].mean()) if (cut > -1).any() else float("nan") for cut in cuts]
    return dict(zip(NAMES, means, strict=True))


def _xywh(
    objects: Mapping[str, Any], columns: Sequence[str], what: str, image: int
) -> list[list[float]]:
    """Boxes (left, top, width, height) of an image, whose columns are as long."""
    corners = np.asarray(objects["boxes"]).astype(np.float64).reshape(-1, 4)
    for name in columns:
        if name in objects and len(objects[name]) != len(corners):
            rule = f"have one of {name} a box = {len(corners)}, image {image}"
            fail("coco_map", what, rule, len(objects[name]))
    if not np.isfinite(corners).all():
        fail("coco_map", what, f"have finite boxes, image {image}", corners.tolist())
    corners[:, 2:] -= corners[:, :2]
    rows: list[list[float]] = corners.tolist()
    return rows
