"""Shoreline vessels: the chance level is a theorem, the runs reproducible, the command whole."""

import csv
import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from click.testing import CliRunner

import xt_models as xm
from xt_models.cli import main
from xt_models.train import ablate_shoreline, shoreline, table
from xt_models.train.curve import Point

BOUNDED = [name for name, row in shoreline.ROWS.items() if row.ceiling is not None]


def layout_of(scenes=16, seed=0):
    return shoreline.draw(scenes, torch.Generator().manual_seed(seed))


def model_of(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return shoreline.build(shoreline.ROWS[name])


def region_of(cells):
    return cells // (shoreline.REGION // shoreline.CELL)


def test_dots_keep_away_from_the_coast():
    layout = layout_of(200)
    away = (region_of(layout.dots) - layout.coast[:, None]).abs()
    assert away.min() == 1 and (away.amax(-1) >= 2).all()
    cells = layout.dots[..., 0] * 8 + layout.dots[..., 1]
    assert all(len(set(row)) == 6 for row in cells.tolist())
    assert len(layout.coast.unique(dim=0)) == 4
    assert len(region_of(layout.dots).flatten(0, 1).unique(dim=0)) == 12  # all but the middle


def test_every_scene_comes_four_times_and_differs_in_the_coasts_region_alone():
    layout = layout_of()
    images = shoreline.render(layout).view(16, 4, 4, 32, 4, 32).transpose(3, 4)
    coast = layout.coast[::4]
    assert layout.bay.tolist() == [0, 1, 2, 3] * 16
    for i in range(1, 4):
        differs = (images[:, i] != images[:, 0]).flatten(3).any(-1)  # [16, 4, 4]
        assert torch.equal(torch.nonzero(differs)[:, 1:], coast)
    assert shoreline.render(layout).std(0).amax() > 0.5


def test_each_dot_is_a_vessel_in_one_of_the_four():
    layout = layout_of()
    vessels, sea = shoreline.target(layout).view(16, 4, 2, 8, 8).unbind(2)
    dots = torch.zeros(16, 8, 8, dtype=torch.int64)
    scene = torch.arange(16)[:, None]
    dots[scene, layout.dots[::4, :, 0], layout.dots[::4, :, 1]] = 1
    assert torch.equal(vessels.sum(1), dots)
    assert (sea.sum(1) == 1).all()
    north_west = layout.dots < (layout.coast * 2 + 1)[:, None]
    is_vessel = vessels.flatten(0, 1)[torch.arange(64)[:, None], *layout.dots.unbind(-1)]
    assert torch.equal(is_vessel[::4], north_west.all(-1)[::4])  # by the definition, bay NW


def test_the_chance_level_is_reached_by_every_dot_and_passed_by_no_blind_score():
    layout = layout_of(64)
    true = shoreline.target(layout)[:, 0]
    dots = true.view(64, 4, 8, 8).any(1).repeat_interleave(4, 0)
    assert shoreline.f1(dots, true) == pytest.approx(shoreline.CHANCE)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):  # scores that know the dots, one for all four
        scores = torch.rand(64, 8, 8, generator=generator) + dots[::4]
        scores = scores.repeat_interleave(4, 0)
        best = shoreline.f1(scores >= shoreline.best_threshold(scores, true), true)
        assert best <= shoreline.CHANCE + 1e-4
    assert shoreline.f1(true, true) == 100 and shoreline.f1(~true, true) == 0


def test_the_best_threshold_is_the_best_one():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (40,), generator=generator).float()
    true = torch.rand(40, generator=generator) < 0.2 + 0.1 * scores
    found = shoreline.best_threshold(scores, true)
    every = [shoreline.f1(scores >= t, true) for t in scores.unique()]
    assert shoreline.f1(scores >= found, true) == max(every)


@pytest.mark.parametrize("name", shoreline.ROWS)
def test_only_the_rows_without_a_ceiling_see_the_coast(name):
    layout, row = layout_of(2), shoreline.ROWS[name]
    model = model_of(name).eval().double()
    with torch.inference_mode():
        logits = shoreline.logits(model, row, shoreline.render(layout).double())
    assert logits.shape == (8, 2, 8, 8)
    scene = torch.arange(8)[:, None]
    at_dots = logits[scene, :, layout.dots[..., 0], layout.dots[..., 1]].view(2, 4, -1, 2)
    spread = (at_dots - at_dots[:, :1]).abs().amax((0, 1, 3))
    if name in BOUNDED:
        assert spread.max() < 1e-12
    else:
        assert spread.min() > 1e-9


def test_overlapping_windows_keep_the_cells_of_their_region():
    """Each cell depends on the pixels of its window, and on no others."""
    model, row = model_of("overlap").eval(), shoreline.ROWS["overlap"]
    images = torch.zeros(1, 1, 128, 128, requires_grad=True)
    shoreline.logits(model, row, images)[0, :, 2, 5].sum().backward()
    rows, cols = torch.nonzero(images.grad[0, 0]).aminmax(dim=0)
    assert rows.tolist() >= [16, 48] and cols.tolist() <= [79, 111]
    assert rows[0] < 32 and cols[1] > 96  # the margin is seen


def test_the_same_seed_gives_the_same_run(monkeypatch):
    monkeypatch.setattr(shoreline, "VALIDATION_SCENES", 4)
    monkeypatch.setattr(shoreline, "TEST_SCENES", 4)
    before = torch.get_rng_state()
    runs = [list(shoreline.train("xl-through", seed, 2)) for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("name", ablate_shoreline.ROWS)
def test_the_rows_of_the_ablations_give_the_same_map(name):
    row = ablate_shoreline.ROWS[name]
    model = shoreline.build(row)
    with torch.inference_mode():
        found = shoreline.logits(model.eval(), row, shoreline.render(layout_of(1)))
    assert found.shape == (4, 2, 8, 8)
    regions = model.grid(128, 128).num_regions
    assert regions == {"one-region": 1, "half": 4}.get(name, 16)


def test_the_ablations_of_depth_are_what_they_say():
    sizes = [
        sum(p.numel() for p in shoreline.build(ablate_shoreline.ROWS[name]).parameters())
        for name in ablate_shoreline.ABLATIONS["depth"]
    ]
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0]) > 0


def test_the_ablations_train_and_are_a_command(tmp_path):
    words = ["ablate", "depth", "--task", "shoreline", "--rows", "depth-1", "--seeds", "1",
             "--steps", "1", "-o", str(tmp_path / "out")]  # fmt: skip
    result = CliRunner().invoke(main, ["train", *words])
    assert result.exit_code == 0, result.output
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table["rows"]) == ["depth-1"] and table["settings"]["steps"] == 1
    words[1] = "resolution"
    result = CliRunner().invoke(main, ["train", *words[:-1], str(tmp_path / "two")])
    assert result.exit_code == 2 and "of shoreline are encoder, depth, locality" in result.output


def test_a_package_that_a_task_does_not_need_may_be_missing(monkeypatch):
    def version(package):
        if package == "scikit-learn":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(table, "version", version)
    run = table.Run("whole", 0, [Point(1, 1.0, 7.0)], 1.0)
    record = table._summary("shoreline", ["whole"], [run], 1, 1, 1)
    assert record["versions"]["timm"] == "1.0" and "scikit-learn" not in record["versions"]


def test_the_command_leaves_a_table_curves_and_models(tmp_path):
    out = tmp_path / "out"
    words = ["-o", out, "--steps", 3, "--seeds", 1, "--rows", "region-only", "--save"]
    result = CliRunner().invoke(main, ["train", "shoreline", *map(str, words)])
    assert result.exit_code == 0, result.output
    names = ["curves.csv", "curves.png", "region-only-0", "table.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    record = json.loads((out / "table.json").read_text())
    rows = list(csv.DictReader((out / "curves.csv").open()))
    assert record["rows"]["region-only"]["f1s"] == [float(rows[-1]["f1"])]
    assert record["rows"]["region-only"]["ceiling"] == 40 and record["settings"]["steps"] == 3
    # The saved model's threshold is zero, and its F1 that of the table.
    model = xm.XT.from_pretrained(out / "region-only-0")
    test = shoreline.draw(shoreline.TEST_SCENES, torch.Generator().manual_seed(shoreline.TEST_SEED))
    scores = shoreline.scores(model, shoreline.ROWS["region-only"], test)
    found = shoreline.f1(scores >= 0, shoreline.target(test)[:, 0])
    assert found == pytest.approx(float(rows[-1]["f1"]), abs=0.3)
    assert "xt train shoreline --rows region-only" in (out / "region-only-0/README.md").read_text()
