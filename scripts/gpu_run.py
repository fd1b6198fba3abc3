"""Prove and measure the kernels on a CUDA machine with one command that needs nobody to watch it.

    python scripts/gpu_run.py --minutes 9    # on a GPU
    python scripts/gpu_run.py --dry          # the same walk, tiny, through Triton's interpreter

Steps: the kernel tests on the GPU; each tuning config alone, on outputs filled with NaN; the
shipped config 250 times over, compared bit by bit; the benches of kernels, then of whole images
and of streaming. Needs torch, Triton, timm, pytest and pytest-benchmark, nothing else; what needs
zarr or imagecodecs is noted as skipped where they are not.

Work is done in child processes that note each finished item at once, and the JSON in --out is
replaced after each of them, so a run that is cut off keeps what it has. Started again with the same
--out, commit, GPU and versions, it goes on where it stopped. A child that crashes (an illegal
address kills the CUDA context) loses one item, not the run.

Exit status: 0 all passed, 1 something failed, 2 nothing failed but the time ran out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("tests", "configs", "repeats", "benches")


# What runs in the child processes. Each writes one JSON line per item, when it starts and when it
# ends.


class Notes:
    """Items noted in a file as they start and end; one that only started took the child down."""

    def __init__(self, path: Path, skip: set[str]) -> None:
        self.file = path.open("a")
        self.skip = skip

    def write(self, name: str, outcome: str, seconds: float = 0.0, **more: Any) -> None:
        row = {"name": name, "outcome": outcome, "seconds": round(seconds, 3), **more}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    @contextlib.contextmanager
    def item(self, name: str) -> Iterator[dict[str, Any]]:
        """Note the item; an exception in the body makes it failed."""
        more: dict[str, Any] = {}
        self.write(name, "started")
        start = time.perf_counter()
        try:
            yield more
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self.write(name, "failed", time.perf_counter() - start, message=text[:2000])
            if "CUDA error" in text or "illegal memory access" in text:
                # The context is lost: the parent starts the rest in a new child.
                os._exit(70)
        else:
            self.write(name, "passed", time.perf_counter() - start, **more)


class PytestNotes:
    """A pytest plugin that notes tests, leaving out those that an earlier child finished."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.notes.skip]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.notes.write(nodeid, "started")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            message = ""
            if report.skipped and isinstance(report.longrepr, tuple):
                message = str(report.longrepr[2])
            elif report.failed:
                message = str(report.longrepr)[-2000:]
            self.notes.write(report.nodeid, report.outcome, report.duration, message=message)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.notes.write(report.nodeid, "failed", message=str(report.longrepr)[-2000:])


def finish(status: int) -> None:
    """Tell the parent of what no test reports: a bad option, a broken conftest."""
    if status not in (0, 1, 5):  # passed, some failed, nothing to run
        sys.exit(int(status))


def pytest_arguments(file: Path) -> list[str]:
    """One file, without this project's own options, whose plugins may be missing."""
    plain = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]
    return [*plain, f"--rootdir={file.parent}", str(file)]


def child_tests(notes: Notes, file: Path, dry: bool) -> None:
    """Run one test file: all of it, or only the tests marked gpu if it is no kernel test."""
    import pytest

    arguments = pytest_arguments(file)
    if not is_kernel_test(file) or (dry and file.name != "test_testing.py"):
        arguments += ["-m", "gpu"]
    finish(pytest.main(arguments, plugins=[PytestNotes(notes)]))


def child_benches(notes: Notes, file: Path, dry: bool) -> None:
    """Run one file of benches; pytest-benchmark's numbers go into the notes.

    Dry, those of models run one small case without numbers.
    """
    import pytest

    class Numbers(PytestNotes):
        def pytest_runtest_logreport(self, report: Any) -> None:
            pass

        def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
            if call.when != "call" and call.excinfo is None:
                return
            fixture = getattr(item, "funcargs", {}).get("benchmark")
            statistics = getattr(getattr(fixture, "stats", None), "stats", None)
            numbers = {}
            if statistics is not None:
                names = ("min", "median", "mean", "stddev", "rounds")
                numbers = {name: getattr(statistics, name) for name in names}
                numbers["extra"] = dict(getattr(fixture, "extra_info", {}))
            if call.excinfo is None:
                self.notes.write(item.nodeid, "passed", call.duration, numbers=numbers)
            else:
                skipped = call.excinfo.errisinstance(pytest.skip.Exception)
                outcome = "skipped" if skipped else "failed"
                self.notes.write(
                    item.nodeid, outcome, call.duration, message=str(call.excinfo.value)
                )

    arguments = pytest_arguments(file)
    if not dry:
        arguments.append("--benchmark-only")
    elif file.stem != "bench_kernels":
        arguments.append("--benchmark-disable")
    else:
        arguments += ["--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
        os.environ["XT_BENCH_MEMORY"] = "off"  # on a CPU a process for each bench
    finish(pytest.main(arguments, plugins=[Numbers(notes)]))


def child_cases(notes: Notes, file: Path, dry: bool, repeats: bool) -> None:
    """Each config of each case alone on poisoned outputs, or the shipped config again and again."""
    import torch

    from xt_kernels.testing import honest_interpreter, poisoned_empty

    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)

    def launch(case: Any, config: Any, seed: int) -> list[torch.Tensor]:
        checks = honest_interpreter(shuffle_seed=seed) if dry else contextlib.nullcontext()
        with checks, poisoned_empty():
            outputs = list(case.run(config))
        if not dry:
            torch.cuda.synchronize()
        return outputs

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8)

    for case in module.gpu_cases("cpu" if dry else "cuda", full=not dry):
        if repeats:
            name = f"{file.stem}:{case.name}"
            count = min(case.repeats, 3) if dry else case.repeats
            if name in notes.skip or not count:
                continue
            with notes.item(name) as more:
                first = launch(case, None, 0)
                for i in range(count):
                    for place, (one, two) in enumerate(
                        zip(first, launch(case, None, i + 1), strict=True)
                    ):
                        if not torch.equal(bits(one), bits(two)):
                            wrong = int((bits(one) != bits(two)).sum())
                            raise AssertionError(
                                f"repeat {i + 1}, output {place}: {wrong} bytes differ"
                            )
                more["repeats"] = count
            continue
        expected = None
        for config in [None, *case.configs]:
            name = f"{file.stem}:{case.name}:{'shipped' if config is None else config}"
            if name in notes.skip:
                continue
            with notes.item(name):
                if expected is None:
                    expected = case.expected()
                case.check(launch(case, config, 0), expected)


def end_with_parent(parent: int) -> None:
    """A killed parent must not leave a child behind that holds the GPU."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(71)


def child(arguments: argparse.Namespace) -> None:
    notes = Notes(Path(arguments.notes), set(json.loads(os.environ.get("XT_GPU_RUN_SKIP", "[]"))))
    file = Path(arguments.file)
    sys.path[:0] = [str(ROOT), str(file.parent)]
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    if arguments.child == "tests":
        child_tests(notes, file, arguments.dry)
    elif arguments.child == "benches":
        child_benches(notes, file, arguments.dry)
    else:
        child_cases(notes, file, arguments.dry, arguments.child == "repeats")


# The parent: knows the plan, the clock and the JSON.


def is_kernel_test(file: Path) -> bool:
    """Whether a test file belongs to an op of xt_kernels, or to its testing tools."""
    op = file.stem.removeprefix("test_")
    return op == "testing" or (ROOT / "xt_kernels" / op).is_dir()


def plan(tests: Path, bench: Path, only: list[str]) -> list[tuple[str, Path]]:
    """(step, file) in the order in which they run."""
    files = sorted(tests.glob("test_*.py"))
    texts = {file: file.read_text() for file in files}
    marked = [f for f in files if is_kernel_test(f) or re.search(r"mark\.gpu\b", texts[f])]
    cases = [f for f in files if re.search(r"^def gpu_cases\(", texts[f], re.MULTILINE)]
    order = ("bench_kernels.py", "bench_images.py", "bench_models.py")
    benches = [bench / name for name in order if (bench / name).exists()]
    steps = {"tests": marked, "configs": cases, "repeats": cases, "benches": benches}
    return [(step, file) for step in STEPS if step in only for file in steps[step]]


def environment(dry: bool, commit: str) -> dict[str, Any]:
    """What the numbers belong to."""
    import torch
    import triton

    def output(*command: str) -> str:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    if not commit:
        commit = output("git", "rev-parse", "HEAD") or "unknown"
    dirty = output("git", "status", "--porcelain", "--untracked-files=no") != ""
    gpu = "none (interpreter)" if dry else torch.cuda.get_device_name()
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split(
        "\n"
    )[0]
    return {
        "gpu": gpu,
        "driver": "" if dry else driver,
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
        "command": shlex.join(["python", "scripts/gpu_run.py", *sys.argv[1:]]),
    }


class Record:
    """The JSON: items by step, replaced on disk as a whole so that no reader sees half of it."""

    def __init__(self, path: Path, about: dict[str, Any], minutes: float, fresh: bool) -> None:
        self.path = path
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.data: dict[str, Any] = {"environment": about, "made": now, "steps": {}}
        if path.exists() and not fresh:
            with contextlib.suppress(ValueError, KeyError):
                old = json.loads(path.read_text())
                # Another command, such as one with more minutes, goes on with the same work.
                if old["environment"] | {"command": about["command"]} == about:
                    self.data = old | {"environment": about}
        self.data["minutes"] = minutes
        self.data["complete"] = False

    def items(self, step: str, file: Path) -> dict[str, Any]:
        result: dict[str, Any] = self.data["steps"].setdefault(f"{step} {file.name}", {})
        return result

    def outcomes(self) -> list[str]:
        return [item["outcome"] for items in self.data["steps"].values() for item in items.values()]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(temporary, self.path)


def run_step(step: str, file: Path, record: Record, dry: bool, deadline: float) -> bool:
    """Run one file's step in as many children as it takes; False once the time is over."""
    items = record.items(step, file)
    # Failures are tried again on a second start; what passed or was skipped is not.
    done = {name for name, item in items.items() if item["outcome"] in ("passed", "skipped")}
    while True:
        if time.monotonic() >= deadline:
            return False
        notes = record.path.with_suffix(".notes")
        notes.unlink(missing_ok=True)
        command = [
            sys.executable,
            __file__,
            "--child",
            step,
            "--file",
            str(file),
            "--notes",
            str(notes),
        ]
        # Benches refuse to run below a worker of pytest-xdist, as in this script's own test.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        variables = {
            **inherited,
            "XT_GPU_RUN_SKIP": json.dumps(sorted(done)),
            "PYTHONUNBUFFERED": "1",
        }
        if dry:
            command.append("--dry")
            variables.update(TRITON_INTERPRET="1", XT_BENCH_DRY="1", OMP_NUM_THREADS="1")
        log = record.path.with_suffix(".log")
        with log.open("a") as output:
            process = subprocess.Popen(
                command,
                env=variables,
                cwd=ROOT,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            last = ""
            seen = 0
            while True:
                ended = process.poll() is not None
                lines = notes.read_text().split("\n")[:-1] if notes.exists() else []
                for line in lines[seen:]:
                    row = json.loads(line)
                    last = row["name"] if row["outcome"] == "started" else ""
                    items[row.pop("name")] = row
                if len(lines) > seen:
                    seen = len(lines)
                    record.write()
                if ended:
                    break
                if time.monotonic() >= deadline:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    if last:
                        items[last] = {"outcome": "out of time"}
                    record.write()
                    return False
                time.sleep(0.1)
        notes.unlink(missing_ok=True)
        if last:
            items[last] = {
                "outcome": "failed",
                "message": f"the process died ({process.returncode})",
            }
        elif process.returncode not in (0, 70):
            name = f"{file.stem} ({step})"
            items[name] = {
                "outcome": "failed",
                "message": f"status {process.returncode}, see {log.name}",
            }
        record.write()
        finished = set(items) - done
        if not (last or process.returncode == 70) or not finished:
            return True
        done |= finished


def table(record: Record) -> str:
    """Step by step: how many passed, failed and so on, then each failure and each bench."""
    kinds = ("passed", "failed", "skipped", "out of time")
    lines = [" ".join([f"{'step':40}", *(f"{kind:>11}" for kind in kinds), f"{'seconds':>9}"])]
    failures, benches = [], []
    for step, items in record.data["steps"].items():
        counts = [sum(i["outcome"] == kind for i in items.values()) for kind in kinds]
        seconds = sum(item.get("seconds", 0) for item in items.values())
        lines.append(" ".join([f"{step:40}", *(f"{n:11}" for n in counts), f"{seconds:9.1f}"]))
        for name, item in items.items():
            if item["outcome"] == "failed":
                failures.append(f"FAILED {name}: {item.get('message', '').strip()[-300:]}")
            if item.get("numbers"):
                benches.append(f"{item['numbers']['median'] * 1e3:12.4f} ms  {name}")
    return "\n".join([*lines, *benches, *failures])


def main() -> int:
    """Parse, walk the plan, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget (default: 9)")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON (default: bench/results/<gpu>-<commit>.json)",
    )
    parser.add_argument("--dry", action="store_true", help="tiny, interpreted, without a GPU")
    parser.add_argument("--fresh", action="store_true", help="forget what --out already holds")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, comma separated")
    parser.add_argument(
        "--tests", type=Path, default=ROOT / "tests", help="folder of the test files"
    )
    parser.add_argument("--bench", type=Path, default=ROOT / "bench", help="... of the benches")
    parser.add_argument("--commit", default="", help="where git cannot tell")
    for hidden in ("--child", "--file", "--notes"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return 0

    start = time.monotonic()
    only = arguments.only.split(",")
    if not set(only) <= set(STEPS):
        parser.error(f"--only takes {', '.join(STEPS)}")
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry runs the interpreter instead")
    about = environment(arguments.dry, arguments.commit)
    name = re.sub(r"\W+", "-", f"{about['gpu']}-{about['commit'][:12]}").strip("-").lower()
    home = Path(tempfile.gettempdir()) if arguments.dry else ROOT / "bench" / "results"
    out = arguments.out or home / f"{name}.json"
    record = Record(out.resolve(), about, arguments.minutes, arguments.fresh)
    record.write()
    deadline = start + arguments.minutes * 60
    in_time = True
    for step, file in plan(arguments.tests.resolve(), arguments.bench.resolve(), only):
        in_time = in_time and run_step(step, file, record, arguments.dry, deadline)
    record.data["complete"] = in_time
    record.data["seconds"] = round(time.monotonic() - start, 1)
    record.write()
    print(table(record))
    state = "complete" if in_time else "OUT OF TIME"
    print(f"{state} after {record.data['seconds']} s: {record.path}")
    if "failed" in record.outcomes():
        return 1
    return 0 if in_time else 2


if __name__ == "__main__":
    sys.exit(main())
