"""Vessels in radar scenes, the form of xView3-SAR: a UNet with four maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from xt_kernels._checks import fail

from .base import Trunk
from .segmentation import SegmentationHead

VESSEL, FISHING, CENTRE, LENGTH = range(4)
"""The maps: scores in [0, 1], and of the last the length in metres."""

SIGMA, RADIUS = 2.0, 4.0
"""Pixels: of the Gaussian around a centre, and of the disc in which the other maps learn."""

LENGTH_SCALE = 100.0
"""Metres that the map of lengths has for a logit of softplus 1."""

Points = dict[str, torch.Tensor]
"""Objects of one image, `[N]` each: row, col in pixels; is_vessel, is_fishing (as a target 1, 0, or
-1 where unknown; as a prediction a score); length_m, metres, NaN where unknown; score of what was
predicted."""


class XView3Head(SegmentationHead):
    """A UNet decoder with four maps, `[B, 4, ..]` in the order vessel, fishing, centre, length.

    Centres learn a Gaussian of 2 px by the focal loss of "Objects as Points" (Zhou et al. 2019,
    equation 1), the other maps in discs of 4 px around objects where their answer is known: vessel
    and fishing by binary cross-entropy, length by its relative error, the measure of xView3-SAR
    (Paolo et al. 2022). The loss is their sum.

    threshold: score from which a maximum of the map of centres counts as an object.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        decoder: str = "unet",
        decoder_channels: Sequence[int] | int | None = None,
        output_stride: int = 1,
        group: int | None = 1,
        threshold: float = 0.3,
    ) -> None:
        super().__init__(
            trunk,
            classes=4,
            decoder=decoder,
            decoder_channels=decoder_channels,
            loss="bce",
            output_stride=output_stride,
            group=group,
        )
        if not 0 <= threshold < 1:
            fail("XView3Head", "threshold", "be in [0, 1)", threshold)
        self.threshold = threshold
        with torch.no_grad():  # centres are rare: start at a score of 0.01
            bias = self.decode.maps[0].bias
            bias[CENTRE] = -4.6

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        """Maps `[B, 4, h, w]`, float32: three scores in [0, 1] and the length in metres."""
        output = output.float()
        scores, length = output[:, :LENGTH].sigmoid(), F.softplus(output[:, LENGTH:])
        return torch.cat([scores, length * LENGTH_SCALE], 1)

    def points(self, maps: torch.Tensor, rows: tuple[int, int] | None = None) -> Points:
        """The objects of one image in its predicted maps `[4, h, w]`, row by row: cells of the map
        of centres that are above the threshold and the largest of the 5 x 5 around them.

        rows: (first, last + 1) of those whose objects to give; the others are seen beside them.
        """
        first, last = rows or (0, maps.shape[1])
        centre = maps[CENTRE].float().nan_to_num(0.0)
        largest = F.max_pool2d(centre[None], 5, 1, 2)[0]
        is_peak = (centre == largest) & (centre >= self.threshold) & (centre > 0)
        row, col = is_peak[first:last].nonzero().unbind(1)
        at = maps[:, row + first, col].float()
        pixel = self.output_stride
        return {
            "row": (row + first) * pixel + (pixel - 1) / 2,
            "col": col * pixel + (pixel - 1) / 2,
            "is_vessel": at[VESSEL],
            "is_fishing": at[FISHING],
            "length_m": at[LENGTH],
            "score": at[CENTRE],
        }

    def loss(self, output: torch.Tensor, target: list[Points]) -> torch.Tensor:
        """target: one dict an image, of `Points` without a score."""
        if len(target) != len(output):
            rule = f"be a list of one dict an image = {len(output)}"
            fail("XView3Head", "target", rule, len(target))
        output = output.float()
        height, width = output.shape[2:]
        heat, near, known = [], [], []
        for points in target:
            self._check(points, height, width)
            a, b, c = self._targets(points, height, width, output.device)
            heat.append(a)
            near.append(b)
            known.append(c)
        disc, answers = torch.stack(near), torch.stack(known)  # [B, h, w], [B, h, w, 3]
        total = _focal(output[:, CENTRE], torch.stack(heat))
        for i, channel in enumerate((VESSEL, FISHING, LENGTH)):
            answer = answers[..., i]
            cells = disc & answer.isfinite()
            ours, answer = output[:, channel][cells], answer[cells]
            if channel == LENGTH:
                errors = (F.softplus(ours) * LENGTH_SCALE - answer).abs() / answer
            else:
                errors = F.binary_cross_entropy_with_logits(ours, answer, reduction="none")
            total = total + errors.sum() / max(len(answer), 1)
        return total

    def _check(self, points: Points, height: int, width: int) -> None:
        names = ("row", "col", "is_vessel", "is_fishing", "length_m")
        missing = [name for name in names if name not in points]
        if missing:
            fail("XView3Head", "target", f"hold {', '.join(names)}", f"none called {missing[0]}")
        count = len(points["row"])
        for name in names:
            if list(points[name].shape) != [count]:
                fail("XView3Head", name, f"be [N] = [{count}]", list(points[name].shape))
        for name, size in (("row", height), ("col", width)):
            value, limit = points[name], size * self.output_stride
            bad = ~((value >= 0) & (value < limit))
            if bad.any():
                fail(
                    "XView3Head", name, f"lie inside the image, [0, {limit})", value[bad][0].item()
                )
        for name in ("is_vessel", "is_fishing"):
            bad = (points[name] != 0) & (points[name] != 1) & (points[name] != -1)
            if bad.any():
                fail(
                    "XView3Head", name, "be 1, 0, or -1 where unknown", points[name][bad][0].item()
                )
        length = points["length_m"]
        bad = ~(length > 0) & ~length.isnan()
        if bad.any():
            fail("XView3Head", "length_m", "be above zero, or NaN", length[bad][0].item())

    def _targets(
        self, points: Points, height: int, width: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(heat `[h, w]`, 1 at the cell of a centre; whether a cell lies in a disc; the answers of
        the nearest object `[h, w, 3]`, NaN where unknown)."""
        heat = torch.zeros(height, width, device=device)
        nearest = torch.full((height, width), torch.inf, device=device)
        answers = torch.full((height, width, 3), torch.nan, device=device)
        reach = -int(-max(3 * SIGMA, RADIUS) // self.output_stride)
        cells = torch.arange(-reach, reach + 1, device=device)
        for row, col, *answer in zip(
            *(points[n].tolist() for n in ("row", "col", "is_vessel", "is_fishing", "length_m")),
            strict=True,
        ):
            y, x = int(row / self.output_stride), int(col / self.output_stride)
            ys, xs = cells + y, cells + x
            ys, xs = ys[(ys >= 0) & (ys < height)], xs[(xs >= 0) & (xs < width)]
            part = slice(int(ys[0]), int(ys[-1]) + 1), slice(int(xs[0]), int(xs[-1]) + 1)
            squared = ((ys - y)[:, None] ** 2 + (xs - x)[None] ** 2) * self.output_stride**2
            heat[part] = heat[part].maximum(torch.exp(-squared / (2 * SIGMA**2)))
            closer = squared < nearest[part]
            nearest[part] = torch.where(closer, squared.float(), nearest[part])
            known = [torch.nan if value < 0 else value for value in answer]  # NaN < 0 is false
            answers[part][closer] = answers.new_tensor(known)
        return heat, nearest <= RADIUS**2, answers


def _focal(logits: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Sum over the cells for each centre (heat 1), with alpha 2 and beta 4."""
    score = logits.sigmoid()
    is_centre = heat == 1
    found = (1 - score) ** 2 * F.logsigmoid(logits)
    elsewhere = (1 - heat) ** 4 * score**2 * F.logsigmoid(-logits)
    return -torch.where(is_centre, found, elsewhere).sum() / is_centre.sum().clamp(min=1)
