"""Checks of targets: one sentence for what a loss cannot learn from."""

from __future__ import annotations

import torch

from xt_kernels._checks import fail


def check_labels(op: str, target: torch.Tensor, classes: int, ignore: int | None = None) -> None:
    """Integers in [0, classes), or `ignore`."""
    if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype == torch.bool:
        fail(op, "target", "hold integers, the numbers of classes", target.dtype)
    bad = (target < 0) | (target >= classes)
    if ignore is not None:
        bad &= target != ignore
    if bad.any():
        also = "" if ignore is None else f", or {ignore} for pixels to ignore"
        fail(op, "target", f"hold labels in [0, {classes}){also}", int(target[bad][0]))


def check_same_shape(op: str, target: torch.Tensor, layout: str, shape: list[int]) -> None:
    """`target` has the shape `shape` of what was predicted."""
    if list(target.shape) != shape:
        fail(op, "target", f"be {layout} = {shape}", list(target.shape))


def check_shares(op: str, target: torch.Tensor) -> None:
    """bool, or numbers in [0, 1]."""
    if target.dtype != torch.bool and not bool(((target >= 0) & (target <= 1)).all()):
        bad = target[~((target >= 0) & (target <= 1))]
        fail(op, "target", "hold numbers in [0, 1]", float(bad[0]))


def check_boxes(
    op: str, target: dict[str, torch.Tensor], classes: int, size: tuple[int, int]
) -> None:
    """boxes `[N, 4]` (left, top, right, bottom), pixels, inside an image of `size` (height, width),
    none empty; labels `[N]`, integers in [0, classes)."""
    missing = [name for name in ("boxes", "labels") if name not in target]
    if missing:
        fail(op, "target", "hold boxes and labels", f"none called {missing[0]}")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        fail(op, "boxes", "be [N, 4] (left, top, right, bottom)", list(boxes.shape))
    if list(labels.shape) != [len(boxes)]:
        fail(op, "labels", f"be [N] = [{len(boxes)}] to match boxes", list(labels.shape))
    check_labels(op, labels, classes)
    left, top, right, bottom = boxes.unbind(1)
    empty = ~((right > left) & (bottom > top))  # NaN is empty
    if empty.any():
        fail(op, "boxes", "have a width and a height above zero", boxes[empty][0].tolist())
    height, width = size
    out = (left < 0) | (top < 0) | (right > width) | (bottom > height)
    if out.any():
        rule = f"lie inside the image, {height} x {width} px"
        fail(op, "boxes", rule, boxes[out][0].tolist())
