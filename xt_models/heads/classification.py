"""Classification from one embedding an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from xt_kernels._checks import fail

from ._targets import check_labels, check_same_shape, check_shares
from .base import Trunk


class Classifier(nn.Sequential):
    """Embedding `[B, C]` -> logits `[B, classes]`.

    multi_label: classes do not exclude one another: sigmoid and binary cross-entropy in the place
        of softmax and cross-entropy.
    """

    def __init__(self, *layers: nn.Module, multi_label: bool = False) -> None:
        super().__init__(*layers)
        self.multi_label = multi_label

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        """Scores in [0, 1], `[B, classes]`, float32."""
        return output.float().sigmoid() if self.multi_label else output.float().softmax(1)

    def loss(
        self, output: torch.Tensor, target: torch.Tensor, *, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Mean cross-entropy.

        target: labels `[B]`, integers, or shares `[B, classes]` in [0, 1] (of mixup, or of
        multi-label, which takes nothing else).
        """
        name, classes = type(self).__name__, output.shape[1]
        if target.dim() == 2 or self.multi_label:
            check_same_shape(name, target, "[B, classes]", list(output.shape))
            check_shares(name, target)
            target = target.to(output.dtype)
        else:
            if list(target.shape) != [len(output)]:
                fail(name, "target", f"be [B] = [{len(output)}]", list(target.shape))
            check_labels(name, target, classes)
            target = target.long()
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(output, target)
        return F.cross_entropy(output, target, label_smoothing=label_smoothing)


class ClassificationHead(Classifier):
    """LayerNorm and linear: embedding `[B, C]` of a context encoder -> logits `[B, classes]`."""

    def __init__(self, dim: int, num_classes: int, *, multi_label: bool = False) -> None:
        super().__init__(
            nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, num_classes), multi_label=multi_label
        )


class PlainHead(Classifier):
    """The released head without context: linear (C, 4C), GELU, LayerNorm, linear."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.LayerNorm(4 * dim),
            nn.Linear(4 * dim, num_classes),
        )


def classification(trunk: Trunk, *, classes: int, multi_label: bool = False) -> ClassificationHead:
    """A further classification head, beside the one of `XTConfig.num_classes`."""
    if classes < 1:
        fail("classification", "classes", "be at least 1", classes)
    return ClassificationHead(trunk.embedding_dim, classes, multi_label=multi_label)
