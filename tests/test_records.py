"""The committed records of small tasks reach their targets, and the pages in docs show them."""

import csv
import json
from pathlib import Path

import pytest

from xt_models.train import megapixel_digits, shoreline, spanning
from xt_models.train.table import _commit, format_table

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "bench" / "results" / "amd-epyc-family26-2-cores"
PAPER = ROOT / "xt_models" / "assets" / "paper"
TASKS = (shoreline, spanning, megapixel_digits)
CONTEXT = ("whole", "xl-stop", "xl-through")


def record_of(task):
    return json.loads((FOLDER / f"{task.NAME.replace('-', '_')}.json").read_text())


def scores(task, row):
    found = record_of(task)["rows"][row]
    return [found[task.METRICS], *(more[task.METRICS] for more in found.get("more", {}).values())]


@pytest.mark.parametrize("task", TASKS)
def test_a_record_is_of_the_rows_settings_and_seeds_of_today(task):
    record = record_of(task)
    assert list(record["rows"]) == list(task.ROWS) and record["settings"]["seeds"] == [0, 1, 2]
    assert record["settings"]["steps"] == task.STEPS
    today = task.settings()
    assert {k: v for k, v in record["settings"].items() if k in today}.items() <= today.items()
    for name, row in record["rows"].items():
        assert len(row[task.METRICS]) == 3 and row["ceiling"] == task.ROWS[name].ceiling


@pytest.mark.parametrize("task", TASKS)
def test_no_seed_passes_a_proven_ceiling(task):
    for name, row in task.ROWS.items():
        for seeds in scores(task, name):
            assert row.ceiling is None or max(seeds) <= row.ceiling + 1e-6, name


def test_shoreline_without_context_is_at_chance_and_with_it_thirty_points_above():
    (blind,) = scores(shoreline, "region-only")
    assert all(abs(score - shoreline.CHANCE) <= 3 for score in blind)
    for name in CONTEXT:
        assert min(scores(shoreline, name)[0]) >= shoreline.CHANCE + 30, name


def test_spanning_with_context_passes_the_ceiling_with_every_seed():
    for name in CONTEXT:
        assert min(scores(spanning, name)[0]) > spanning.CHANCE, name


def test_megapixel_digits_with_context_are_above_the_others_with_every_seed():
    names = ("downsampled", "region-only", "xl-through")
    for small, blind, seeing in zip(*(scores(megapixel_digits, n) for n in names), strict=True):
        for seed in range(3):
            assert seeing[seed] > max(small[seed], blind[seed])


def test_the_models_in_the_package_are_thirty_points_apart():
    table = json.loads((ROOT / "xt_models/assets/shoreline/table.json").read_text())
    blind, seeing = (table["rows"][name]["f1s"] for name in ("region-only", "xl-through"))
    assert table["settings"]["seeds"] == [0] and seeing[0] >= blind[0] + 30


@pytest.mark.parametrize("task", TASKS)
def test_a_page_shows_the_record_as_the_command_prints_it(task):
    page = (ROOT / "docs" / f"{task.NAME.replace('-', '_')}.md").read_text()
    assert format_table(record_of(task)) in page


def test_a_page_shows_the_papers_values():
    page = (ROOT / "docs" / "shoreline.md").read_text()
    for row in csv.DictReader((PAPER / "table3_xview3.csv").open()):
        name = f"{row['model']}{', XL' * bool(row['context'])}"
        assert f"| {name} | {row['size']} | {row['shore']} | {row['agg']} |" in page
    for row in csv.DictReader((PAPER / "table5_ablations.csv").open()):
        assert f"| {row['ablation']} | {row['model']} | {row['setting']} | {row['top1']} |" in page
    for row in csv.DictReader((PAPER / "table6_locality.csv").open()):
        assert f"| {row['size']}, windows of {row['window']} | {row['top1']} |" in page
    page = (ROOT / "docs" / "megapixel_digits.md").read_text()
    for row in csv.DictReader((PAPER / "table2_inaturalist.csv").open()):
        if row["top1"] and not row["size"].startswith("256/"):
            name = ", ".join(filter(None, (row["model"], row["context"])))
            assert f"| {name} | {row['size']} | {row['top1']} |" in page


def test_a_record_names_its_commit_in_a_checkout_and_none_outside(monkeypatch, tmp_path):
    found = _commit()
    if (ROOT / ".git").exists():
        assert len(found["commit"]) == 40 and isinstance(found["dirty"], bool)
    monkeypatch.setattr("xt_models.train.table.__file__", str(tmp_path / "table.py"))
    assert _commit() == {}
