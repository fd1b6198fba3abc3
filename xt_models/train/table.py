"""Rows times seeds of a training task, in processes of one thread each, written as a table.

A folder of results holds `curves.csv` (row, seed, step, loss, accuracy), `curves.png`, and
`table.json`: for each row its accuracies, their mean, and the half width of the 95 % interval of
that mean, t(0.975, n - 1) s / sqrt(n) over n seeds (Student 1908; none for one seed).
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import platform
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

import xt_kernels

from ..host import cpu_name, num_cpus
from ..output import OutputFolder
from . import cue_digits
from .cue_digits import ALL_ROWS, Point


class Run(NamedTuple):
    """The curve of one row and seed, and the seconds of wall time that it took."""

    row: str
    seed: int
    points: list[Point]
    seconds: float


def write_table(
    out: str | Path,
    rows: Sequence[str],
    *,
    seeds: int = 3,
    steps: int = cue_digits.STEPS,
    jobs: int = 1,
    on_steps: Callable[[int], object] = lambda steps: None,
    on_run: Callable[[Run], object] = lambda run: None,
) -> dict[str, Any]:
    """Trains `rows` with seeds 0 .. seeds - 1 and fills the folder `out`; returns table.json.

    rows: names of `cue_digits.ALL_ROWS`. steps: batches of 64 images. jobs: runs at a time, each
        one process with one thread; results do not depend on it. on_steps, on_run: called with the
        steps just done, and with each run as it ends.

    `out` appears when it is complete. Raises ValueError for an unknown row, a number below one or a
    missing package, and as `OutputFolder` does, before any work; RuntimeError if a process dies.
    """
    for name in rows:
        check_row(name)
    for option, number in (("rows", len(rows)), ("seeds", seeds), ("steps", steps), ("jobs", jobs)):
        if number < 1:
            raise ValueError(f"cue-digits: {option} must be at least 1, got {number}.")
    cue_digits.need("sklearn", "scikit-learn", "it holds the digits")
    cue_digits.need("matplotlib", "matplotlib", "it draws the curves")
    rows = list(dict.fromkeys(rows))
    with OutputFolder(out) as folder:
        assert folder is not None
        tasks = [(row, seed) for seed in range(seeds) for row in rows]
        runs = _run_all(tasks, steps, jobs, on_steps, on_run)
        table = _summary(rows, runs, seeds, steps, jobs)
        runs.sort(key=lambda run: rows.index(run.row))
        _write_curves(folder / "curves.csv", runs)
        (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n")
        _draw(folder / "curves.png", rows, runs)
    return table


def check_row(name: str) -> None:
    """Raises ValueError unless `name` is a row."""
    if name not in ALL_ROWS:
        raise ValueError(f"cue-digits: rows must be among {', '.join(ALL_ROWS)}, got {name!r}.")


def format_table(table: dict[str, Any]) -> str:
    """The table as text, accuracies in percent."""
    lines = [("row", "accuracy", "95 %", "ceiling", "s a run", "")]
    for name, row in table["rows"].items():
        half, ceiling = row["half_width_95"], row["ceiling"]
        lines.append((
            name,
            f"{row['mean']:.1f}",
            "" if half is None else f"+- {half:.1f}",
            "" if ceiling is None else f"{ceiling:.1f}",
            f"{sum(row['seconds']) / len(row['seconds']):.0f}",
            row["title"],
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 5) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _run_all(
    tasks: list[tuple[str, int]],
    steps: int,
    jobs: int,
    on_steps: Callable[[int], object],
    on_run: Callable[[Run], object],
) -> list[Run]:
    """The runs of `tasks`, in their order, `jobs` at a time."""
    context = multiprocessing.get_context("spawn")  # a fork after torch's threads may hang
    waiting, done = list(reversed(tasks)), {}
    live: dict[Connection, tuple[SpawnProcess, str, int, list[Point]]] = {}
    try:
        while waiting or live:
            while waiting and len(live) < jobs:
                row, seed = waiting.pop()
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(there, row, seed, steps), daemon=True)
                # The parent answers Ctrl-C and ends its workers, which are born deaf to it.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    process.start()
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                there.close()  # the worker's end alone is left: its death reads as end of file
                live[here] = process, row, seed, []
            for connection in wait(list(live)):
                assert isinstance(connection, Connection)
                process, row, seed, points = live[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    process.join()
                    raise RuntimeError(
                        f"cue-digits: the process of {row}, seed {seed}, ended with exit code "
                        f"{process.exitcode} before its result."
                    ) from None
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, Point):
                    points.append(message)
                elif isinstance(message, int):
                    on_steps(message)
                else:
                    done[row, seed] = Run(row, seed, points, message)
                    del live[connection]
                    connection.close()
                    process.join()
                    on_run(done[row, seed])
    finally:
        for process, *_ in live.values():
            process.terminate()
            process.join()
    return [done[task] for task in tasks]


def _work(connection: Connection, row: str, seed: int, steps: int) -> None:
    """One run: sends an int for steps done, a Point of the curve, at the end seconds as a float."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        for point in cue_digits.train(row, seed, steps, on_steps=connection.send):
            connection.send(point)
        connection.send(time.perf_counter() - start)
    except Exception as error:
        connection.send(error)


def _summary(
    rows: Sequence[str], runs: list[Run], seeds: int, steps: int, jobs: int
) -> dict[str, Any]:
    from scipy.stats import t as student

    table: dict[str, Any] = {}
    for name in rows:
        mine = [run for run in runs if run.row == name]
        accuracies = torch.tensor([run.points[-1].accuracy for run in mine], dtype=torch.float64)
        half = None
        if seeds > 1:
            factor = float(student.ppf(0.975, seeds - 1))
            half = factor * accuracies.std().item() / seeds**0.5
        table[name] = {
            "title": ALL_ROWS[name].title,
            "accuracies": accuracies.tolist(),
            "mean": accuracies.mean().item(),
            "half_width_95": half,
            "ceiling": ALL_ROWS[name].ceiling,
            "seconds": [run.seconds for run in mine],
            "settings": asdict(ALL_ROWS[name]),
        }
    return {
        "task": "cue-digits",
        "rows": table,
        "settings": {
            "seeds": list(range(seeds)),
            "steps": steps,
            "batch": cue_digits.BATCH,
            "learning_rate": cue_digits.LEARNING_RATE,
            "warm_up": cue_digits.WARM_UP,
            "clip": cue_digits.CLIP,
            "dim": cue_digits.DIM,
            "depth": cue_digits.DEPTH,
            "heads": cue_digits.HEADS,
            "test_images": 2000 * cue_digits.TEST_COPIES,
        },
        "machine": {"cpu": cpu_name(), "cores": num_cpus(), "jobs": jobs, "threads_a_run": 1},
        "versions": {
            "xt_kernels": xt_kernels.__version__,
            "torch": torch.__version__,
            "scikit-learn": version("scikit-learn"),
            "python": platform.python_version(),
        },
    }


def _write_curves(path: Path, runs: list[Run]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "step", "loss", "accuracy"])
        for run in runs:
            writer.writerows([run.row, run.seed, *point] for point in run.points)


def _draw(path: Path, rows: Sequence[str], runs: list[Run]) -> None:
    """Mean accuracy of each row over training, a band from the worst to the best seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(rows):
        curves = [[p.accuracy for p in run.points] for run in runs if run.row == name]
        steps = next([p.step for p in run.points] for run in runs if run.row == name)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        low, high = ([f(v) for v in zip(*curves, strict=True)] for f in (min, max))
        axes.plot(steps, mean, color=f"C{i}", marker=".", label=ALL_ROWS[name].title)
        axes.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    ceiling = ALL_ROWS["bag"].ceiling
    assert ceiling is not None
    axes.axhline(ceiling, color="grey", linestyle="--", linewidth=1)
    label = f"ceiling of a bag of regions, {ceiling:.0f} %"
    axes.text(0.99, ceiling + 1, label, ha="right", color="grey", fontsize=8,
              transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set(xlabel="training steps (64 images each)", ylabel="test accuracy, %", ylim=(0, 100))
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
