"""How the benches measure: a wrong answer, a limit of memory, memory in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import measure

BENCH = Path(measure.__file__).parent


class Benchmark:
    """What `compare` uses of pytest-benchmark's fixture."""

    disabled, name = False, "test_it"

    def __init__(self):
        self.extra_info = {}

    def __call__(self, run):
        run()

    def pedantic(self, run, **_):
        run()


@pytest.fixture
def no_memory_pass(monkeypatch):
    monkeypatch.setenv("XT_BENCH_MEMORY", "off")


def test_spread():
    found = measure.spread([float(i) for i in range(101)])
    assert found == {"median": 50.0, "p20": 20.0, "p80": 80.0, "rounds": 101}
    assert measure.spread([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0, "rounds": 1}


def test_what_is_noted(no_memory_pass):
    benchmark, calls = Benchmark(), []

    def form(name):
        def run():
            calls.append(name)
            return torch.ones(4)

        return run

    measure.compare(
        benchmark, form("ours"), {"one": form("one"), "two": form("two")}, 2**20, flops=1e3,
        units=(4, "things"), absent={"three": "not here"}, rounds=5, variant="x", length=8,
    )  # fmt: skip
    info = benchmark.extra_info
    assert info["schema"] == measure.SCHEMA and info["absent"] == {"three": "not here"}
    assert set(info["seconds"]) == {"ours", "one", "two"} and set(info["ratio"]) == {"one", "two"}
    assert info["seconds"]["ours"]["rounds"] == 5 and info["length"] == 8
    assert (info["op"], info["variant"]) == ("test_it", "x")
    median = info["seconds"]["ours"]["median"]
    assert info["units_per_s"] == {"what": "things", "value": 4 / median}
    assert info["over_floor"] == median / info["floor"] and "memory" not in info
    # In turns: after the checks and a warm-up, each form once a round.
    turns = [calls[i : i + 3] for i in range(6, 21, 3)]
    assert turns == [["ours", "one", "two"]] * 5


def test_a_wrong_answer_fails(no_memory_pass):
    right, wrong = torch.ones(4), torch.ones(4)
    wrong[3] = 1.1
    for benchmark in (Benchmark(), Benchmark()):
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            measure.compare(benchmark, lambda: wrong, {"one": lambda: right})
        assert "seconds" not in benchmark.extra_info
    with pytest.raises(AssertionError, match="Tensor-likes"):
        measure.compare(Benchmark(), lambda: [right, wrong], lambda: [right, right])


def test_the_error_of_an_approximation_is_bounded(no_memory_pass):
    truth = torch.ones(4)
    forms = {"rough": lambda: truth * 1.5}
    benchmark = Benchmark()
    measure.compare(
        benchmark, lambda: truth * 1.01, forms, truth=truth, max_error={"ours": 0.02}, rounds=3
    )
    assert benchmark.extra_info["error"] == pytest.approx({"ours": 0.01, "rough": 0.5}, rel=1e-4)
    for bound in ({"ours": 0.001}, {"ours": 0.02, "rough": 0.4}, {}):
        with pytest.raises(AssertionError):
            measure.compare(Benchmark(), lambda: truth * 1.01, forms, truth=truth, max_error=bound)


CHILD = """
import json, sys
import numpy as np
size = int(sys.argv[2])
if size < 0:
    raise ValueError("no such size")
if size == 7:
    import time; time.sleep(60)
kept = np.ones(size << 20, dtype=np.uint8)
print("noise")
print(json.dumps({"sum": int(kept[-1])}))
"""


def test_children(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def run(size, limit=600, timeout=60.0):
        return measure.run_child(script, {"size": size}, limit << 20, timeout)

    assert run(10) == {"outcome": "measured", "sum": 1}
    lost = run(2000)
    assert lost["outcome"] == "out of memory" and lost["limit"] == 600 << 20 and lost["told"]
    assert run(7, timeout=1.0) == {"outcome": "out of time", "timeout": 1.0}
    with pytest.raises(RuntimeError, match=r"child.py --size -1: ValueError: no such size"):
        run(-1)


BENCHES = """
import torch
from measure import compare

def test_weight(benchmark):
    def take(mebibytes):
        return torch.ones(mebibytes << 18)[:1].clone()
    compare(benchmark, lambda: take(32), {"double": lambda: take(64)}, rounds=3)

def test_wrong(benchmark):
    compare(benchmark, lambda: torch.zeros(1), lambda: torch.ones(1))
"""


def test_memory_is_that_of_a_fresh_process(tmp_path):
    for file in ("conftest.py", "measure.py", "inputs.py"):
        (tmp_path / file).write_text((BENCH / file).read_text())
    (tmp_path / "bench_some.py").write_text(BENCHES)
    out = tmp_path / "out.json"
    plain = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    plain += [f"--rootdir={tmp_path}", "-o", "python_files=bench_*.py"]
    # A worker's own variables would tell the child that benches are off.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*plain, str(tmp_path), "--benchmark-only", f"--benchmark-json={out}"],
        capture_output=True, text=True, env=clean | {"XT_BENCH_MEMORY": ""},
    )  # fmt: skip
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout
    data = json.loads(out.read_text())
    (bench,) = data["benchmarks"]
    memory = {name: size / 2**20 for name, size in bench["extra_info"]["memory"].items()}
    assert 30 < memory["ours"] < 40 and 60 < memory["double"] < 72, memory
    assert data["machine_info"]["schema"] == 1 and data["machine_info"]["cores"] >= 1
