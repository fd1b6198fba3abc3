"""How the benches measure: a wrong answer, a limit of memory, memory in a process of its own."""

import json
import os
import re
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
    # In turns: after the check, which warms up, each form once a round, in more than one order.
    turns = [calls[i : i + 3] for i in range(3, 18, 3)]
    assert [sorted(turn) for turn in turns] == [["one", "ours", "two"]] * 5
    assert len({tuple(turn) for turn in turns}) > 1
    again = calls[3:18]
    calls.clear()
    measure.compare(
        Benchmark(), form("ours"), {"one": form("one"), "two": form("two")}, 2**20, rounds=5
    )
    assert calls[3:18] == again


def test_a_wrong_answer_fails(no_memory_pass):
    right, wrong = torch.ones(4), torch.ones(4)
    wrong[3] = 1.1
    for benchmark in (Benchmark(), Benchmark()):
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            measure.compare(benchmark, lambda: wrong, {"one": lambda: right})
        assert "seconds" not in benchmark.extra_info
    with pytest.raises(AssertionError, match="Tensor-likes"):
        measure.compare(Benchmark(), lambda: [right, wrong], lambda: [right, right])


def test_answers_of_another_shape_or_dtype():
    with pytest.raises(AssertionError, match=r"shapes \(4, 9\) and \(6, 9\)"):
        measure.agree(torch.ones(4, 9), torch.ones(6, 9))
    # Few rows at a time: what differs in the last is seen.
    ours, other = torch.ones(3, 2**25), torch.ones(3, 2**25)
    other[2, -1] = 1.1
    with pytest.raises(AssertionError, match="Tensor-likes"):
        measure.agree(ours, other)
    low = torch.ones(4, dtype=torch.bfloat16)
    measure.agree(low, low * 1.0078125)
    with pytest.raises(AssertionError, match="Tensor-likes"):
        measure.agree(torch.zeros(4), torch.full((4,), 1e-3))
    # What large values leave over has their rounding.
    large = torch.full((99,), 100.0)
    ours, other, wrong = (torch.cat([large, torch.tensor([x])]) for x in (3e-4, 5e-4, 3e-3))
    measure.agree(ours, other)
    with pytest.raises(AssertionError, match="Tensor-likes"):
        measure.agree(ours, wrong)
    with pytest.raises(AssertionError, match="Tensor-likes"):
        measure.agree(ours / 100, other / 100 + 1e-4)


def test_the_error_of_an_approximation_is_bounded(no_memory_pass):
    truth = torch.ones(4)
    forms = {"rough": lambda: truth * 1.5, "exact": lambda: truth}

    def run(**bounds):
        benchmark = Benchmark()
        measure.compare(
            benchmark, lambda: truth * 1.01, forms, truth="exact", max_error=bounds, rounds=3
        )
        return benchmark.extra_info

    found = run(ours=0.02)["error"]
    assert found == pytest.approx({"ours": 0.01, "rough": 0.5, "exact": 0.0}, rel=1e-4)
    for bound in ({"ours": 0.001}, {"ours": 0.02, "rough": 0.4}, {}, {"rough": 0.6}):
        with pytest.raises(AssertionError):
            run(**bound)


@pytest.mark.parametrize("wrong", ["out", "grad", None])
def test_each_part_of_an_answer_has_its_bound(no_memory_pass, wrong):
    exact = torch.ones(4), torch.ones(4) * 2

    def ours():
        factors = [1.3 if part == wrong else 1.1 for part in ("out", "grad")]
        if wrong is None:
            factors[1] = torch.nan
        return tuple(part * factor for part, factor in zip(exact, factors, strict=True))

    benchmark = Benchmark()
    options = {"truth": "exact", "parts": ("out", "grad"), "rounds": 3}
    bounds = {"ours": {"out": 0.2, "grad": 0.2}}
    with pytest.raises(AssertionError, match=r"ours: errors \{'" + (wrong or "grad")):
        measure.compare(benchmark, ours, {"exact": lambda: exact}, max_error=bounds, **options)
    with pytest.raises(AssertionError, match="every part needs a bound"):
        partial = {"ours": {"out": 9.0}}
        measure.compare(benchmark, ours, {"exact": lambda: exact}, max_error=partial, **options)
    bounds = {"ours": {"out": 0.4, "grad": 0.4}}
    if wrong is not None:
        measure.compare(benchmark, ours, {"exact": lambda: exact}, max_error=bounds, **options)
        info = benchmark.extra_info
        assert info["errors"]["ours"][wrong] == pytest.approx(0.3, rel=1e-4)
        assert info["error"]["ours"] == info["errors"]["ours"]["out"]


def test_a_floor_for_each_form(no_memory_pass):
    benchmark = Benchmark()
    measure.compare(
        benchmark, lambda: torch.ones(4), {"all": lambda: torch.ones(4)},
        flops={"ours": 1e9, "all": 8e9, "absent": 1.0}, rounds=3,
    )  # fmt: skip
    info = benchmark.extra_info
    assert info["flops"] == {"ours": 1e9, "all": 8e9}
    assert info["floor"]["all"] == pytest.approx(8 * info["floor"]["ours"])
    assert info["over_floor"] == info["seconds"]["ours"]["median"] / info["floor"]["ours"]


def test_commands_are_told_as_typed(monkeypatch, tmp_path):
    def told(*words):
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        return measure.command()

    root = measure.ROOT
    out = root / "bench" / "results" / "a b.json"
    script = root / "bench" / "x.py"
    assert told(script, "--out", out) == "python bench/x.py --out 'bench/results/a b.json'"
    monkeypatch.chdir(root / "bench")
    assert told("x.py", "--n=3") == "python bench/x.py --n=3"
    bench = [f"--benchmark-json={root}/o.json", "-k", "xl or hyper"]
    expected = "pytest bench --benchmark-json=o.json -k 'xl or hyper'"
    assert told("/somewhere/bin/pytest", "bench", *bench) == expected
    assert told("/lib/pytest/__main__.py", "bench") == "python -m pytest bench"


def test_what_a_program_prints():
    assert measure._tell("printf", "one\\ntwo") == "one"
    assert measure._tell("true", none="") == "" and measure._tell("false") == "unknown"
    assert measure._tell("no-such-program") == "unknown"


def test_a_record_has_one_head(tmp_path):
    out = tmp_path / "new" / "record.json"
    measure.write_record(
        out, {"work": "w", "rows": [measure.script_row("f", "9", [1.0, 3.0], "s")]}
    )
    record = json.loads(out.read_text())
    assert record["schema"] == 1 and record["rows"][0]["value"] == 2.0
    head = {"cpu", "cores", "threads", "torch", "triton", "python", "commit", "dirty", "command"}
    assert head <= set(record["machine"]) and isinstance(record["machine"]["dirty"], bool)
    measure.write_record(None, {})


def run_script(script, *options):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, str(measure.ROOT / script), *map(str, options)],
        capture_output=True, text=True, env=clean,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "options", "forms"),
    [
        ("bench/hyper_speed.py", ["--length", 512, "--heads", 1, "--rounds", 2], 5),
        ("bench/engine_overhead.py", ["--side", 512, "--rounds", 2], 4),
        ("scripts/kill_stress.py", ["--kills", 1], 2),
        ("bench/gradient_memory.py", ["--chunks", "2", "--tokens", 64, "--depth", 1], 1),
        ("bench/train_step.py", ["--encoder", "convnext_atto", "--size", 128, "--region", 64,
                                 "--rounds", 1, "--memory", "context"], 0),
        ("bench/memory_scaling.py", ["--sizes", "256x512", "--scratch", "."], 1),
        ("bench/hyper_error.py", ["--length", 1024, "--heads", 1, "--seeds", 1], 108),
    ],
)  # fmt: skip
def test_scripts_write_records(tmp_path, monkeypatch, script, options, forms):
    monkeypatch.chdir(tmp_path)
    done = run_script(script, *options, "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["machine"]["command"].startswith(f"python {script} --")
    assert record["schema"] == 1 and len(record.get("rows", [])) == forms
    if "work" in record:
        keys = {"form", "size", "value", "unit", "p20", "p80", "note"}
        assert record["title"] and all(set(row) == keys for row in record["rows"])
    else:
        assert all(row.get("outcome", "measured") == "measured" for row in record.get("rows", []))


def test_memory_scaling_tells_where_a_form_ends(tmp_path):
    out = tmp_path / "out.json"
    options = ["--sizes", "512", "--encoder", "swinv2_tiny", "--forms", "grown"]
    done = run_script("bench/memory_scaling.py", *options, "--limit-gib", 0.9, "--out", out)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["form"] == "naive, window grown" and row["outcome"] == "out of memory"
    assert row["limit"] == int(0.9 * 2**30) and "512 x 512" in done.stdout
    for bad, told in {
        ("--forms", "theirs"): "forms must be of ours, naive, grown, got 'theirs'",
        ("--forms", "naive"): "take --encoder swinv2_..., got convnext_atto",
        ("--sizes", "512,12y"): "a size must be HxW or H in pixels, got '12y'",
    }.items():
        done = run_script("bench/memory_scaling.py", *bad)
        assert done.returncode == 2 and told in done.stderr


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
from measure import Backward, compare

def test_weight(benchmark):
    def take(mebibytes):
        return torch.ones(mebibytes << 18)[:1].clone()
    compare(benchmark, lambda: take(32), {"double": lambda: take(64)}, rounds=3)

def test_wrong(benchmark):
    compare(benchmark, lambda: torch.zeros(1), lambda: torch.ones(1))

def test_large(benchmark):
    def take(mebibytes):
        return torch.ones(mebibytes << 18)[:1].clone()
    compare(benchmark, lambda: take(32), {"huge": lambda: take(1 << 16)}, rounds=3)

def test_graph(benchmark):
    start = torch.ones(8 << 18, requires_grad=True)
    grad = torch.ones_like(start)
    def deep():
        found = start
        for _ in range(8):
            found = found.sigmoid()
        return found
    compare(benchmark, Backward(deep, [start], grad), Backward(deep, [start], grad), rounds=3)
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
    assert done.returncode == 1 and "1 failed, 3 passed" in done.stdout, done.stdout
    data = json.loads(out.read_text())
    infos = {bench["name"]: bench["extra_info"] for bench in data["benchmarks"]}
    memory = {name: size / 2**20 for name, size in infos["test_weight"]["memory"].items()}
    assert 30 < memory["ours"] < 40 and 60 < memory["double"] < 72, memory
    # 64 GiB are more than a process may take: a result, with its limit.
    lost = infos["test_large"]
    assert list(lost["seconds"]) == ["ours"] and set(lost["memory"]) == {"ours"}
    assert 0 < lost["out_of_memory"]["huge"] <= measure.LIMIT
    # Eight results of 8 MiB that the graph keeps.
    graph = infos["test_graph"]
    assert graph["memory_of"] == "forward and backward" and graph["memory"]["ours"] > 60 * 2**20
    assert data["machine_info"]["schema"] == 1 and data["machine_info"]["cores"] >= 1
    assert "--benchmark-only" in data["machine_info"]["command"]


def test_a_filter_that_matches_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-q", "-k", "nosuch", "-p", "no:cacheprovider"],
        capture_output=True, text=True, cwd=measure.ROOT,
    )  # fmt: skip
    assert done.returncode == 4
    assert re.search(r"no bench matches -k nosuch; there are: .*test_image, .*test_xl", done.stderr)
