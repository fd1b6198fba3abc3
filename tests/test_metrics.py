"""Measures against cases worked out by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from xt_models.metrics import coco_map, multi_label_map, top_k_accuracy, xview3_scores


def test_top_k():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2]])
    labels = torch.tensor([1, 2, 0, 1])
    assert top_k_accuracy(scores, labels) == 0.25
    # The third image's two equal scores: class 0 stands before class 2.
    assert top_k_accuracy(scores, labels, k=2) == 1.0
    assert top_k_accuracy(scores, torch.tensor([1, 2, 2, 1]), k=2) == 0.75


def test_multi_label_map():
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.2, 0.3], [0.7, 0.3, 0.3]])
    targets = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    # Class 0: precisions 1 and 2/3 at its two images; class 1: 1/2; class 2 has none.
    assert multi_label_map(scores, targets) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)


def test_multi_label_map_equals_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    scores, targets = rng.integers(0, 6, (50, 4)) / 5, rng.integers(0, 2, (50, 4))
    ours = multi_label_map(torch.from_numpy(scores), torch.from_numpy(targets))
    assert ours == pytest.approx(average_precision_score(targets, scores, average="macro"))


def boxes(*rows):
    """(left, top, right, bottom, label[, score])"""
    out = {
        "boxes": torch.tensor([row[:4] for row in rows]).view(-1, 4).float(),
        "labels": torch.tensor([row[4] for row in rows]),
    }
    if rows and len(rows[0]) > 5:
        out["scores"] = torch.tensor([row[5] for row in rows])
    return out


def test_coco_of_a_perfect_and_of_no_prediction():
    target = [boxes((0, 0, 20, 20, 0), (50, 50, 200, 250, 1)), boxes((10, 10, 60, 60, 1))]
    perfect = [
        boxes((0, 0, 20, 20, 0, 0.9), (50, 50, 200, 250, 1, 0.8)),
        boxes((10, 10, 60, 60, 1, 0.7)),
    ]
    assert list(coco_map(perfect, target).values()) == pytest.approx([1] * 6)
    nothing = [{"boxes": np.zeros((0, 4)), "labels": [], "scores": []}] * 2
    assert set(coco_map(nothing, target).values()) == {0.0}


def test_coco_map_counts_so_many_boxes_of_each_class():
    """The best box of class 0 is wrong and its second is right; class 1 has one, which is right."""
    target = [{"boxes": [[0, 0, 50, 50], [60, 0, 90, 50]], "labels": [0, 1]}]
    boxes = [[0, 60, 50, 99], [0, 0, 50, 50], [60, 0, 90, 50]]
    found = [{"boxes": boxes, "labels": [0, 0, 1], "scores": [0.9, 0.8, 0.1]}]
    scores = [coco_map(found, target, max_boxes=number)["mAP50"] for number in (1, 2, 100)]
    assert scores == pytest.approx([0.5, 0.75, 0.75])


def test_coco_by_hand():
    """One class, two large objects in two images. A prediction of IoU 0.7 (score 0.9) and one of
    nothing (0.8); the other object is not found. At IoU 0.50 to 0.70 recall reaches 1/2 at a
    precision of 1: 51 of the 101 recalls. So mAP50 is 51/101, mAP75 0, mAP 5/10 of 51/101."""
    target = [boxes((0, 0, 100, 100, 0)), boxes((0, 0, 100, 100, 0))]
    found = [boxes((0, 0, 100, 70, 0, 0.9)), boxes((200, 200, 300, 300, 0, 0.8))]
    scores = coco_map(found, target)
    assert scores["mAP50"] == pytest.approx(51 / 101)
    assert scores["mAP75"] == 0
    # 0.70 as COCO's linspace has it is 0.7 to rounding: the IoU of 0.7 passes it.
    assert scores["mAP"] == pytest.approx(5 / 10 * 51 / 101)
    assert scores["mAP_large"] == scores["mAP"]
    assert math.isnan(scores["mAP_small"]) and math.isnan(scores["mAP_medium"])


def test_coco_sizes_and_crowds():
    target = [boxes((0, 0, 31, 31, 0), (100, 0, 195, 95, 0), (200, 200, 297, 297, 0))]
    found = [boxes((0, 0, 31, 31, 0, 0.9), (100, 0, 195, 95, 0, 0.8))]
    scores = coco_map(found, target)
    by_size = [scores[f"mAP_{size}"] for size in ("small", "medium", "large")]
    assert by_size == pytest.approx([1, 1, 0])
    target[0]["is_crowd"] = torch.tensor([0, 0, 1])
    assert coco_map(found, target)["mAP"] == pytest.approx(1)


def objects(*rows):
    """(row, col, is_vessel, is_fishing, length_m)"""
    names = ("row", "col", "is_vessel", "is_fishing", "length_m")
    return {name: np.array([r[i] for r in rows], dtype=float) for i, name in enumerate(names)}


NAN = float("nan")


def test_xview3_by_hand():
    """Scene one: three objects, four predictions; scene two: one object, not found.

    Matched: (100, 100) at 50 m, (200, 200) exactly, not (300, 300), 200 m off, which is not below
    200 m. So 2 true, 2 false, 2 missed: F1 0.5.
    Vessels: of the two matched, one vessel called vessel, one non-vessel called vessel: F1 2/3.
    Fishing: of the vessels matched, one, fishing and called so: F1 1.
    Length: 80 m for 100 m, the other unknown: 0.8.
    Shore: a coast along row 0, objects up to row 200, predictions up to row 220: both matched, the
    prediction at row 10 is false: tp 2, fp 1, fn 0: F1 0.8.
    """
    truth = [
        objects((100, 100, 1, 1, 100), (200, 200, 0, -1, NAN), (300, 300, 1, 0, 50)),
        objects((500, 500, 1, 1, 30)),
    ]
    found = [
        objects((103, 104, 1, 0.9, 80), (200, 200, 0.7, 0, 10), (320, 300, 1, 0, 50),
                (10, 900, 1, 0, 5)),
        objects(),
    ]  # fmt: skip
    coast = np.stack([np.zeros(1001), np.arange(1001)], 1)
    scores = xview3_scores(found, truth, [coast, coast])
    assert scores["detection_f1"] == scores["precision"] == scores["recall"] == 0.5
    assert scores["vessel_f1"] == pytest.approx(2 / 3)
    assert scores["fishing_f1"] == 1
    assert scores["length"] == pytest.approx(0.8)
    assert scores["shore_f1"] == pytest.approx(0.8)
    assert scores["aggregate"] == pytest.approx(0.5 * (1 + 0.8 + 2 / 3 + 1 + 0.8) / 5)
    assert xview3_scores(found, truth)["shore_f1"] == 0


def test_xview3_matches_as_many_as_can_be():
    """Taken greedily, or by distance without a limit, one pair would be lost."""
    truth = [objects((0, 0, -1, -1, NAN), (0, 15, -1, -1, NAN))]
    found = [objects((0, 14, 0, 0, 0), (0, 33, 0, 0, 0))]
    # 14 (140 m) and 18 (180 m) are below 20 px, as are 1 alone and 33 not.
    assert xview3_scores(found, truth)["detection_f1"] == 1
    far = [objects((0, 15, 0, 0, 0), (0, 500, 0, 0, 0))]
    assert xview3_scores(far, truth)["detection_f1"] == 0.5


def test_xview3_leaves_labels_of_low_confidence_out():
    truth = [objects((0, 0, 1, 0, 10), (100, 100, 1, 0, 10)) | {"is_low": [False, True]}]
    found = [objects((0, 0, 1, 0, 10), (100, 101, 1, 0, 10))]
    assert xview3_scores(found, truth)["detection_f1"] == 1
    assert xview3_scores([objects((0, 0, 1, 0, 10))], truth)["detection_f1"] == 1


def test_xview3_uses_the_distance_to_the_shore_that_a_label_has():
    truth = [objects((0, 0, 1, 0, 10), (100, 100, 1, 0, 10)) | {"shore_km": [2.0, 2.1]}]
    found = [objects((100, 100, 1, 0, 10))]
    shore = [[(100.0, 320.0)]]  # 2.2 km from the prediction
    assert xview3_scores(found, truth, shore)["shore_f1"] == 0
    found = [objects((0, 5, 1, 0, 10))]
    assert xview3_scores(found, truth, [[(0.0, 5.0)]])["shore_f1"] == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: top_k_accuracy(torch.zeros(0, 3), torch.zeros(0)), "N at least 1"),
        (lambda: top_k_accuracy(torch.zeros(2, 3), torch.tensor([0, 3])), r"in \[0, 3\), got 3"),
        (lambda: top_k_accuracy(torch.zeros(2, 3), torch.tensor([0])), r"be \[N\] = \[2\]"),
        (lambda: top_k_accuracy(torch.zeros(1, 3), torch.tensor([0]), 4), r"in 1..3, got 4"),
        (lambda: multi_label_map(torch.zeros(2, 3), torch.zeros(2, 3)), "a positive image"),
        (lambda: multi_label_map(torch.zeros(2, 3), torch.zeros(2, 2)), r"= \[2, 3\], got"),
        (lambda: multi_label_map(torch.zeros(1, 1), torch.full((1, 1), 0.5)), "1 or 0, got 0.5"),
        (lambda: coco_map([], [boxes()]), "one dict an image = 1, got 0"),
        (lambda: coco_map([boxes() | {"scores": []}], [boxes()]), "at least one box"),
        (
            lambda: coco_map([boxes() | {"scores": []}], [boxes((5, 5, 5, 9, 0))]),
            r"a width and a height above zero, image 0, got \[\[5",
        ),
        (
            lambda: coco_map([boxes((0, 0, 9, 9, 0)) | {"scores": []}], [boxes((0, 0, 9, 9, 0))]),
            "predictions must have one of scores a box = 1, image 0, got 0",
        ),
        (
            lambda: coco_map([boxes((0, 0, NAN, 9, 0, 1))], [boxes((0, 0, 9, 9, 0))]),
            "predictions must have finite boxes, image 0",
        ),
        (
            lambda: xview3_scores([objects((0, 0, 1, 0, NAN))], [objects((0, 0, 1, 0, 9))]),
            "predictions must have a finite length_m, scene 0, got nan",
        ),
        (
            lambda: xview3_scores([objects() | {"row": [1.0]}], [objects()]),
            r"predictions must have col \[N\] = \[1\], scene 0, got \[0\]",
        ),
        (lambda: xview3_scores([], [objects()]), "one dict a scene = 1, got 0"),
        (lambda: xview3_scores([objects()], [objects()], []), "one array a scene = 1, got 0"),
    ],
)
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
