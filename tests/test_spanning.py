"""Spanning objects: the ceiling is a theorem, the runs reproducible, the command whole."""

import re

import pytest
import torch

from xt_models import host
from xt_models.cli import main
from xt_models.train import shoreline, spanning, table
from xt_models.train.curve import Point

BOUNDED = [name for name, row in spanning.ROWS.items() if row.ceiling is not None]
MIDDLE = slice(spanning.REGION, -spanning.REGION)


def layout_of(fours=16, seed=0):
    return spanning.draw(fours, torch.Generator().manual_seed(seed))


def model_of(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return spanning.build(spanning.ROWS[name])


def iou(boxes, others):
    """Pairs, one by one, `[N]`."""
    low, high = boxes[:, :2].maximum(others[:, :2]), boxes[:, 2:].minimum(others[:, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = ((each[:, 2:] - each[:, :2]).prod(-1) for each in (boxes, others))
    return common / (sum(areas) - common)


def test_an_object_fills_its_box_and_spans_three_regions(monkeypatch):
    monkeypatch.setattr(spanning, "REGION", 0)  # no haze: [0:-0] is empty
    monkeypatch.setattr(shoreline, "SPECKLE", 0)
    layout = layout_of(50)
    for image, box in zip(spanning.render(layout)[:, 0], layout.box, strict=True):
        low, high = torch.nonzero(image).aminmax(dim=0)
        found = torch.tensor([low[1], low[0], high[1] + 1, high[0] + 1])
        assert (found - box).abs().max() <= 1
    height, width = (layout.box[:, i + 2] - layout.box[:, i] for i in (1, 0))
    assert min(height.min(), width.min()) > 2 * 32 and set(layout.kind.tolist()) == {0, 1}
    assert layout.falls.float().mean() == 0.5


def test_the_middle_rows_are_the_same_in_all_four_and_hold_nothing():
    layout = layout_of()
    images = spanning.render(layout).view(16, 4, 128, 256)
    middle = images[:, :, MIDDLE]
    assert torch.equal(middle, middle[:, :1].expand_as(middle))
    assert abs(middle.std() - shoreline.SPECKLE) < 0.01 and middle.abs().max() < 0.6
    for i in range(4):
        for j in range(i):
            differs = (images[:, i] != images[:, j]).any(-1)
            assert differs[:, :32].any(1).all() and differs[:, -32:].any(1).all()


def test_no_box_of_the_top_or_the_bottom_row_is_right():
    """Every box of whole pixels in the scene with its centre there, all its width."""
    layout = layout_of(500)
    start, stop = torch.triu_indices(129, 129, 1)
    outer = (start + stop < 64) | (start + stop >= 192)
    start, stop = start[outer], stop[outer]
    top, bottom = layout.box[:, 1::2].unique(dim=0).unbind(1)
    assert len(top) == 100
    common = stop.minimum(bottom[:, None]) - start.maximum(top[:, None])
    union = stop.maximum(bottom[:, None]) - start.minimum(top[:, None])
    assert 0.45 < (common / union).max() < 0.5


def test_no_box_is_right_for_an_object_and_its_mirror_image():
    layout = layout_of(200)
    one, other = layout.box[::2], layout.box[1::2]
    assert torch.equal(one[:, 0], 256 - other[:, 2]) and torch.equal(one[:, 1::2], other[:, 1::2])
    assert (one[:, 2] + 8 <= other[:, 0]).all() and one.min() >= 4
    low, high = one.minimum(other), one.maximum(other)
    for cut in range(5):  # boxes that share themselves between the two
        share = cut / 4
        both = torch.cat([low[:, :2] * (1 - share) + one[:, :2] * share, high[:, 2:]], 1)
        assert torch.minimum(iou(both, one), iou(both, other)).max() < 0.5


def test_the_ceiling_is_reached_by_one_side_and_passed_by_no_blind_score():
    layout = layout_of(spanning.TEST_FOURS)
    generator = torch.Generator().manual_seed(1)

    def blind(scores, sides):
        """The same boxes in all four: one of each class, at one of the two sides."""
        sets = layout.box.view(-1, 4, 4)[torch.arange(spanning.TEST_FOURS), sides]
        return [
            {"boxes": box.expand(2, 4), "labels": torch.arange(2), "scores": score.expand(2)}
            for box, score in zip(sets, scores, strict=True)
            for _ in range(4)
        ]

    falling = torch.linspace(1, 0, spanning.TEST_FOURS)
    zeros = torch.zeros(spanning.TEST_FOURS, dtype=torch.int64)
    best = spanning.ap50(blind(falling, zeros), layout)
    assert spanning.CHANCE - 1.5 < best <= spanning.CHANCE
    assert spanning.ap50(blind(torch.ones(spanning.TEST_FOURS), zeros), layout) <= spanning.CHANCE
    for _ in range(5):
        scores = torch.rand(spanning.TEST_FOURS, generator=generator)
        sides = torch.randint(2, scores.shape, generator=generator)
        assert spanning.ap50(blind(scores, sides), layout) <= spanning.CHANCE
    truth = [each | {"scores": torch.ones(1)} for each in spanning.boxes(layout)]
    assert spanning.ap50(truth, layout) == pytest.approx(100)


def test_the_ceiling_is_the_sum_of_its_precisions():
    # One four: recall 1/2 at most, with precision 1 at best; 51 of 101 recalls.
    assert spanning.ceiling(1) == pytest.approx(100 * 51 / 101)
    # Two: precision 1 up to a recall of 1/4, then 2/5.
    assert spanning.ceiling(2) == pytest.approx(100 * (26 + 25 * 2 / 5) / 101)
    assert spanning.ceiling(10_000) == pytest.approx(100 * (1 + 50 / 4) / 101, abs=0.01)


@pytest.mark.parametrize("name", spanning.ROWS)
def test_only_the_rows_without_a_ceiling_tell_the_four_apart_in_the_middle(name):
    model = model_of(name).eval().double()
    with torch.inference_mode():
        out = model(spanning.render(layout_of(2)).double()).heads["boxes"]
    assert [len(out.groups), out.groups[9].row, out.groups[9].col] == [32, 1, 1]
    for raw in out.raw.values():
        middle = raw.view(2, 4, 4, 8, *raw.shape[1:])[:, :, 1:3].flatten(3)
        spread = (middle - middle[:, :1]).abs().amax((0, 2, 3))
        if name in BOUNDED:
            assert spread.max() < 1e-12
        else:
            assert spread[1:].min() > 1e-9


def test_a_box_counts_in_the_region_of_its_centre():
    layout = layout_of(1)
    found = spanning.predict(model_of("region-only"), layout)
    head = model_of("region-only").heads["boxes"]
    out = model_of("region-only").eval()(spanning.render(layout)).heads["boxes"]
    assert len(found) == 4 and all(len(each["boxes"]) > 0 for each in found)
    for i, group in enumerate(out.groups):
        raw = {name: value[i : i + 1] for name, value in out.raw.items()}
        boxes = head.candidates(raw, group, out.grid)["boxes"]
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 // 32
        assert torch.equal(centre, torch.tensor([group.col, group.row]).expand_as(centre))


def test_the_map_is_the_inside_of_the_boxes():
    layout = layout_of(3)
    found = spanning.inside(layout)
    x, y = torch.meshgrid(torch.arange(8, 256, 16), torch.arange(8, 128, 16), indexing="xy")
    for map_, kind, (left, top, right, bottom) in zip(found, layout.kind, layout.box, strict=True):
        assert torch.equal(map_[kind], (x > left) & (x < right) & (y > top) & (y < bottom))
        assert not map_[1 - kind].any()


def test_the_same_seed_gives_the_same_run(monkeypatch):
    monkeypatch.setattr(spanning, "TEST_FOURS", 1)
    before = torch.get_rng_state()
    runs = [list(spanning.train("xl-through", seed, 2)) for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]


def test_the_command_trains_as_long_as_the_function():
    command = main.commands["train"].commands["spanning"]
    assert {o.name: o.default for o in command.params}["steps"] == spanning.STEPS


def test_a_table_holds_the_ceiling_and_the_settings():
    run = table.Run("no-memory", 0, [Point(1, 1.0, 7.0)], 1.0)
    record = table._summary("spanning", ["no-memory"], [run], 1, 1, 1)
    assert record["rows"]["no-memory"]["ap50s"] == [7.0]
    assert record["rows"]["no-memory"]["ceiling"] == spanning.CHANCE
    assert record["settings"]["test_images"] == 128 and record["settings"]["encoder"]
    head, _, row = table.format_table(record).splitlines()
    assert head.split(" | ")[1].strip() == "ap50, seeds 0"
    assert re.fullmatch(r"\| `no-memory` \| 7\.0 +\| 7\.0 +\| 15\.2 +\| 1 +\| context .* \|", row)


def test_pycocotools_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(host, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"spanning: pycocotools must be installed: .*\[train\]"):
        spanning.check()
