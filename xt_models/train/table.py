"""Rows times seeds of a training task, in processes of one thread each, written as a table.

A folder of results holds `curves.csv` (row, seed, step, loss, score), `curves.png`, and
`table.json`: for each row its scores, their mean, and the half width of the 95 % interval of that
mean, t(0.975, n - 1) s / sqrt(n) over n seeds (Student 1908; none for one seed); the same for
further scores that the last points of the curves hold, by name, under "more".

A task is a module of this folder: NAME; ROWS by name, dataclasses with a title and a ceiling;
METRIC and METRICS, what its score in percent is called; STEPS and BATCH; CEILING, label and height
of the line in the picture; `check()` for what it needs; `settings(...)` for the record; and
`train(row, seed, steps, on_steps=...)`, which yields a `Point` now and then and may take more
options. Where it takes `save`, a folder, it leaves the model there.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import xt_kernels

from ..host import cpu_name, need, num_cpus
from ..output import OutputFolder
from .curve import Point


class Run(NamedTuple):
    """The curve of one row and seed, and the seconds of wall time that it took."""

    row: str
    seed: int
    points: list[Point]
    seconds: float


def find_task(name: str) -> Any:
    """The module of a task, such as "cue-digits"."""
    return import_module("." + name.replace("-", "_"), __package__)


def write_table(
    out: str | Path,
    name: str,
    rows: Sequence[str],
    *,
    seeds: int = 3,
    steps: int | None = None,
    jobs: int = 1,
    save: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
    command: str = "",
    on_steps: Callable[[int], object] = lambda steps: None,
    on_run: Callable[[Run], object] = lambda run: None,
) -> dict[str, Any]:
    """Trains `rows` of the task `name` with seeds 0 .. seeds - 1 and fills the folder `out`;
    returns table.json.

    rows: names of the task's ROWS. steps: batches a run, None for the task's own number. jobs: runs
        at a time, each one process with one thread; results do not depend on it. save: keep the
        models, in `<row>-<seed>/`. options: further ones of the task's `train`. command: what was
        typed, for the record. on_steps, on_run: called with the steps just done, and with each run
        as it ends.

    `out` appears when it is complete. Raises ValueError for an unknown row, a number below one or a
    missing package, and as `OutputFolder` does, before any work; RuntimeError if a process dies.
    """
    task = find_task(name)
    steps = task.STEPS if steps is None else steps
    for row in rows:
        check_row(name, row)
    for option, number in (("rows", len(rows)), ("seeds", seeds), ("steps", steps), ("jobs", jobs)):
        if number < 1:
            raise ValueError(f"{name}: {option} must be at least 1, got {number}.")
    task.check()
    need(name, "matplotlib", "matplotlib", "train")
    need(name, "scipy", "scipy", "train")
    rows = list(dict.fromkeys(rows))
    with OutputFolder(out) as folder:
        assert folder is not None
        tasks = [(row, seed) for seed in range(seeds) for row in rows]
        runs = _run_all(
            name, tasks, steps, jobs, folder if save else None, options, on_steps, on_run
        )
        table = _summary(name, rows, runs, seeds, steps, jobs, options, command)
        runs.sort(key=lambda run: rows.index(run.row))
        _write_curves(folder / "curves.csv", task.METRIC, runs)
        (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n")
        _draw(folder / "curves.png", task, rows, runs)
    return table


def check_row(name: str, row: str) -> None:
    """Raises ValueError unless `row` is one of the task `name`."""
    rows = find_task(name).ROWS
    if row not in rows:
        raise ValueError(f"{name}: rows must be among {', '.join(rows)}, got {row!r}.")


def format_table(table: dict[str, Any]) -> str:
    """The table in Markdown, scores in percent: of each row those of all seeds, their mean with its
    95 % interval, the ceiling and the seconds of a run."""
    task, seeds = find_task(table["task"]), ", ".join(map(str, table["settings"]["seeds"]))
    more = list(next(iter(table["rows"].values())).get("more", ()))
    heads = [cell for score in (task.METRIC, *more) for cell in (f"{score}, seeds {seeds}", "mean")]
    lines = [("row", *heads, "ceiling", "s a run", "what it is")]
    for name, row in table["rows"].items():
        seconds = sum(row["seconds"]) / len(row["seconds"])
        lines.append((
            f"`{name}`",
            *(c for score in (row, *(row.get("more") or {}).values()) for c in _cells(score, task)),
            "" if row["ceiling"] is None else f"{row['ceiling']:.1f}",
            f"{seconds:.0f}",
            row["title"],
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines
    ]
    return "\n".join([rows[0], f"| {' | '.join('-' * width for width in widths)} |", *rows[1:]])


def _cells(score: dict[str, Any], task: Any) -> tuple[str, str]:
    """All seeds; mean and half width."""
    half = score["half_width_95"]
    interval = "" if half is None else f" ± {half:.1f}"
    return ", ".join(f"{x:.1f}" for x in score[task.METRICS]), f"{score['mean']:.1f}{interval}"


def _run_all(
    name: str,
    tasks: list[tuple[str, int]],
    steps: int,
    jobs: int,
    models: Path | None,
    options: Mapping[str, Any],
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
                more = dict(options)
                if models is not None:
                    more["save"] = models / f"{row}-{seed}"
                process = context.Process(
                    target=_work, args=(there, name, row, seed, steps, more), daemon=True
                )
                # The parent answers Ctrl-C and ends its workers, which are born deaf to it. A
                # tracker that starts lets SIGINT through again: it has to be there before.
                resource_tracker.ensure_running()
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
                        f"{name}: the process of {row}, seed {seed}, ended with exit code "
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


def _work(
    connection: Connection, name: str, row: str, seed: int, steps: int, options: dict[str, Any]
) -> None:
    """One run: sends an int for steps done, a Point of the curve, at the end seconds as a float."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        for point in find_task(name).train(row, seed, steps, on_steps=connection.send, **options):
            connection.send(point)
        connection.send(time.perf_counter() - start)
    except Exception as error:
        connection.send(error)


def _summary(
    name: str,
    rows: Sequence[str],
    runs: list[Run],
    seeds: int,
    steps: int,
    jobs: int,
    options: Mapping[str, Any] = MappingProxyType({}),
    command: str = "",
) -> dict[str, Any]:
    task = find_task(name)
    table: dict[str, Any] = {}
    for row in rows:
        mine = [run for run in runs if run.row == row]
        last = [run.points[-1] for run in mine]
        table[row] = {
            "title": task.ROWS[row].title,
            **_interval(task.METRICS, [point.score for point in last]),
            "more": {
                name: _interval(task.METRICS, [point.more[name] for point in last])
                for name in last[0].more
            },
            "ceiling": task.ROWS[row].ceiling,
            "seconds": [run.seconds for run in mine],
            "settings": asdict(task.ROWS[row]),
        }
    return {
        "task": name,
        **({"command": command} if command else {}),
        "rows": table,
        "settings": {"seeds": list(range(seeds)), "steps": steps, **task.settings(**options)},
        "machine": {"cpu": cpu_name(), "cores": num_cpus(), "jobs": jobs, "threads_a_run": 1},
        "versions": {
            "xt_kernels": xt_kernels.__version__,
            "torch": torch.__version__,
            "timm": version("timm"),
            **_version("scikit-learn"),
            "python": platform.python_version(),
            **_commit(),
        },
    }


def _version(package: str) -> dict[str, str]:
    """Of a package that not every task needs, where it is installed."""
    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}


def _commit() -> dict[str, Any]:
    """That of the checkout that the package is in, and whether files of it were changed since;
    nothing where it is in none."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not one that only holds an installation
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _interval(name: str, scores: list[float]) -> dict[str, Any]:
    """Scores under `name`, their mean, and the half width of its 95 % interval."""
    from scipy.stats import t as student

    values = torch.tensor(scores, dtype=torch.float64)
    half = None
    if len(scores) > 1:
        factor = float(student.ppf(0.975, len(scores) - 1))
        half = factor * values.std().item() / len(scores) ** 0.5
    return {name: scores, "mean": values.mean().item(), "half_width_95": half}


def _write_curves(path: Path, metric: str, runs: list[Run]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "step", "loss", metric])
        for run in runs:
            writer.writerows([run.row, run.seed, *point[:3]] for point in run.points)


def _draw(path: Path, task: Any, rows: Sequence[str], runs: list[Run]) -> None:
    """Mean score of each row over training, a band from the worst to the best seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(rows):
        curves = [[p.score for p in run.points] for run in runs if run.row == name]
        steps = next([p.step for p in run.points] for run in runs if run.row == name)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        low, high = ([f(v) for v in zip(*curves, strict=True)] for f in (min, max))
        axes.plot(steps, mean, color=f"C{i}", marker=".", label=task.ROWS[name].title)
        axes.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    label, height = task.CEILING
    axes.axhline(height, color="grey", linestyle="--", linewidth=1)
    axes.text(0.99, height + 1, label, ha="right", color="grey", fontsize=8,
              transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set(xlabel=f"training steps ({task.BATCH} images each)", ylabel=f"test {task.METRIC}, %",
             ylim=(0, 100))  # fmt: skip
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
