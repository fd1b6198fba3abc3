"""Measures of class scores."""

from __future__ import annotations

import numpy as np
import torch

from xt_kernels._checks import fail


def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int = 1) -> float:
    """Share of images, in [0, 1], whose label is among the k best classes.

    scores: `[N, classes]`, logits too. labels: `[N]`, integers. Of equal scores the class with the
    lower number counts first.
    Raises ValueError for other shapes, no image, or a label out of range.
    """
    if scores.dim() != 2 or not len(scores):
        fail("top_k_accuracy", "scores", "be [N, classes], N at least 1", list(scores.shape))
    if list(labels.shape) != [len(scores)]:
        fail("top_k_accuracy", "labels", f"be [N] = [{len(scores)}]", list(labels.shape))
    classes = scores.shape[1]
    if not 1 <= k <= classes:
        fail("top_k_accuracy", "k", f"be in 1..{classes}", k)
    bad = (labels < 0) | (labels >= classes)
    if bad.any():
        fail("top_k_accuracy", "labels", f"be in [0, {classes})", int(labels[bad][0]))
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return float((best == labels[:, None]).any(1).double().mean())


def multi_label_map(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean over the classes of the average precision, in [0, 1].

    scores: `[N, classes]`. targets: `[N, classes]`, 1 or 0.

    The average precision of a class is the mean, over its positive images, of the precision down to
    their score; images of equal score stand together. Classes without a positive image are left
    out. Raises ValueError for other shapes or values, or where no class has a positive image.
    """
    if scores.dim() != 2 or scores.shape != targets.shape:
        rule = f"be [N, classes] = {list(scores.shape)}"
        fail("multi_label_map", "targets", rule, list(targets.shape))
    wanted = targets.cpu().numpy().astype(float)
    if not np.isin(wanted, (0, 1)).all():
        fail("multi_label_map", "targets", "be 1 or 0", float(wanted[~np.isin(wanted, (0, 1))][0]))
    values = []
    for score, is_positive in zip(scores.double().cpu().numpy().T, wanted.T == 1, strict=True):
        if not is_positive.any():
            continue
        seen = score[None] >= score[is_positive][:, None]  # [positives, N]
        values.append(((seen & is_positive).sum(1) / seen.sum(1)).mean())
    if not values:
        fail("multi_label_map", "targets", "have a positive image in at least one class", "none")
    return float(np.mean(values))
