"""The xView3 form: what its maps learn, and how objects are read from them."""

import math

import pytest
import torch

from xt_models.heads.base import Trunk
from xt_models.heads.xview3 import CENTRE, FISHING, LENGTH, VESSEL, XView3Head

NAN = float("nan")


def head(output_stride=1, **options):
    trunk, blocks = Trunk(16, 16, 8, (4, 8), (2, 4)), 3 - int(math.log2(output_stride))
    return XView3Head(trunk, output_stride=output_stride, decoder_channels=[8] * blocks, **options)


def points(*rows):
    names = ("row", "col", "is_vessel", "is_fishing", "length_m")
    return {n: torch.tensor([row[i] for row in rows]).float() for i, n in enumerate(names)}


def test_the_loss_by_its_definition():
    """Cell by cell, with plain arithmetic."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 20, 24, generator=generator)
    objects = [(5, 6, 1, 0, 50.0), (8, 9, 0, -1, NAN), (18, 20, -1, 1, 200.0)]
    heat, wrong = 0.0, {VESSEL: [], FISHING: [], LENGTH: []}
    for y in range(20):
        for x in range(24):
            squared = [(y - o[0]) ** 2 + (x - o[1]) ** 2 for o in objects]
            target = max((math.exp(-s / 8) for s in squared if s <= 72), default=0.0)
            p = float(logits[0, CENTRE, y, x].sigmoid())
            if 0 in squared:
                heat -= (1 - p) ** 2 * math.log(p)
            else:
                heat -= (1 - target) ** 4 * p**2 * math.log(1 - p)
            if min(squared) > 16:
                continue
            answers = objects[squared.index(min(squared))][2:]
            for channel, answer in zip((VESSEL, FISHING), answers[:2], strict=True):
                if answer >= 0:
                    q = float(logits[0, channel, y, x].sigmoid())
                    wrong[channel].append(-math.log(q if answer else 1 - q))
            if answers[2] == answers[2]:
                length = 100 * math.log1p(math.exp(float(logits[0, LENGTH, y, x])))
                wrong[LENGTH].append(abs(length - answers[2]) / answers[2])
    expected = heat / 3 + sum(sum(errors) / len(errors) for errors in wrong.values())
    assert head().loss(logits, [points(*objects)]).item() == pytest.approx(expected, rel=1e-3)


def test_images_without_objects_learn_that():
    logits = torch.zeros(2, 4, 8, 8, requires_grad=True)
    loss = head(threshold=0.5).loss(logits, [points((2, 2, 1, 0, 10)), points()])
    loss.backward()
    assert loss.isfinite() and (logits.grad[1, CENTRE] > 0).all()
    assert (logits.grad[1, :CENTRE] == 0).all()


def test_a_wider_stride_places_objects_in_its_cells():
    maps = torch.full((1, 4, 8, 8), -8.0)
    maps[0, CENTRE, 3, 5] = 8.0
    right = head(4).loss(maps, [points((14, 22, -1, -1, NAN))])
    assert right < 0.01 < head(4).loss(maps, [points((14, 26, -1, -1, NAN))])
    found = head(4).points(head(4).predict(maps)[0])
    assert (found["row"].tolist(), found["col"].tolist()) == ([13.5], [21.5])


def test_points_are_maxima_above_the_threshold():
    maps = torch.zeros(4, 12, 12)
    maps[CENTRE, 0, 0] = 0.9  # at the corner
    maps[CENTRE, 4, 5], maps[CENTRE, 5, 7] = 0.8, 0.7  # one object
    maps[CENTRE, 10, 2] = 0.2  # below the threshold
    maps[CENTRE, 11, 11] = 0.5
    maps[VESSEL, 4, 5], maps[FISHING, 4, 5], maps[LENGTH, 4, 5] = 0.75, 0.25, 42.0
    found = head(threshold=0.3).points(maps)
    assert found["row"].tolist() == [0, 4, 11] and found["col"].tolist() == [0, 5, 11]
    assert found["score"].tolist() == pytest.approx([0.9, 0.8, 0.5])
    assert [found[n][1] for n in ("is_vessel", "is_fishing", "length_m")] == [0.75, 0.25, 42]


def test_points_of_bands_are_those_of_the_whole():
    maps = torch.rand(4, 40, 30, generator=torch.Generator().manual_seed(0))
    ours = head(threshold=0.5)
    whole = ours.points(maps)
    for step in (7, 8, 40):
        parts = []
        for top in range(0, 40, step):
            first, last = max(top - 2, 0), min(top + step + 2, 40)
            band = ours.points(maps[:, first:last], (top - first, min(top + step, 40) - first))
            parts.append(band | {"row": band["row"] + first})
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value)
    assert len(whole["row"]) > 30


def loss_of(*rows, images=1):
    return head().loss(torch.zeros(images, 4, 8, 8), [points(*rows)])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: loss_of((8, 2, 1, 0, 10)), r"row must lie inside the image, \[0, 8\), got 8.0"),
        (lambda: loss_of((1, -1, 1, 0, 10)), r"col must lie inside the image, \[0, 8\), got -1.0"),
        (lambda: loss_of((1, NAN, 1, 0, 10)), "col must lie inside the image"),
        (lambda: loss_of((1, 1, 2, 0, 10)), "is_vessel must be 1, 0, or -1 where unknown, got 2.0"),
        (lambda: loss_of((1, 1, 1, NAN, 10)), "is_fishing must be 1, 0, or -1 where unknown"),
        (lambda: loss_of((1, 1, 1, 0, 0)), "length_m must be above zero, or NaN, got 0.0"),
        (lambda: loss_of((1, 1, 1, 0, 10), images=2), "one dict an image = 2, got 1"),
        (
            lambda: head().loss(torch.zeros(1, 4, 8, 8), [{"row": torch.zeros(1)}]),
            "none called col",
        ),
        (
            lambda: head().loss(
                torch.zeros(1, 4, 8, 8), [points((1, 1, 1, 0, 9)) | {"col": torch.zeros(2)}]
            ),
            r"col must be \[N\] = \[1\], got \[2\]",
        ),
        (lambda: head(threshold=1.0), r"threshold must be in \[0, 1\), got 1.0"),
    ],
)
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
