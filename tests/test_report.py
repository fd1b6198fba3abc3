"""`xt report`: what it reads, what it says, what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from xt_models.report import (
    RecordError,
    compare_records,
    make_report,
    read_folder,
    read_record,
    write_readme,
)
from xt_models.report.page import README_MARKS

pytest.importorskip("matplotlib")
MACHINE = {"schema": 1, "cpu": "Test CPU", "cores": 2, "torch": "2.15.0", "commit": "0123456789"}
ROOT = Path(__file__).parent.parent


def spread(median, width=0.1, rounds=9):
    low, high = median * (1 - width), median * (1 + width)
    return {"median": median, "p20": low, "p80": high, "rounds": rounds}


def kernel(length, ours, eager, **more):
    info = {
        "schema": 1, "device": "cpu", "dtype": "float32", "first": "ours", "op": "some_op",
        "variant": "forward", "length": length, "absent": {"flash-attn": "not installed"},
        "seconds": {"ours": spread(ours), "eager": spread(eager)},
        "ratio": {"eager": spread(eager / ours)}, "memory": {"ours": 2**20, "eager": 2**22},
        "floor": ours / 2, "over_floor": 2.0, "units_per_s": {"what": "tokens", "value": 5.0},
    }  # fmt: skip
    return {"fullname": f"bench/b.py::test_op[{length}]", "extra_info": info | more}


def image(form, side, outcome="measured", **more):
    info = {
        "schema": 1, "device": "cpu", "dtype": "float32", "encoder": "tiny", "mode": "inference",
        "form": form, "side": side, "limit": 20 * 2**30, "outcome": outcome,
    }  # fmt: skip
    if outcome == "measured":
        info |= {"seconds": spread(2.0), "memory": 200 * 2**20, "regions_per_s": 3.25}
    info |= more
    name = f"bench/i.py::test[{info['mode']}-{form}-{side}]"
    return {"fullname": name, "extra_info": info}


def write(path, *benches, machine=MACHINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": list(benches)}))
    return path


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    write(folder / "k.json", kernel(1024, 0.001, 0.0025), kernel(4096, 0.004, 0.006))
    write(
        folder / "i.json", image("xt xl", 512), image("naive, window grown", 512),
        image("xt xl", 2048), image("naive, window grown", 2048, "out of memory"),
        image("xt xl", 512, mode="training"),
        image("naive, window grown", 512, mode="training", memory=800 * 2**20, regions_per_s=1.625),
    )  # fmt: skip
    return folder


# What it says


def test_pages(results, tmp_path):
    told = make_report(results, tmp_path / "out")
    assert told == [f"wrote {tmp_path}/out/report.md, {tmp_path}/out/report.html"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| ours 1 ms / 4 ms; eager x 2.50 / x 1.50 |" in text
    assert "2,048 px a side | xt xl 3.25 regions/s in 200 MiB; naive, window grown out of" in text
    assert "out of memory (20.00 GiB)" in text and "flash-attn: not installed" in text
    assert "2 cores of Test CPU, torch 2.15.0, commit 0123456" in text
    # Released by the authors; one row of it has its like among ours.
    assert re.search(
        r"\| Swin-T \| XL \| 512/256 \| 80.00 \| 0.17 GB \| 3.25 \| 200 MiB \| \[", text
    )
    assert "| 786,432 | 786,432 |" in text
    # 6.02 / 0.49 GB and 29.53 / 12.77 minutes in the paper.
    assert "| 512 | 12.3 | 2.3 | 4.0 | 2.0 | [" in text
    assert "| 1024 | 12.4 | 3.8 | not measured | not measured | not measured |" in text


def test_every_number_names_its_source(results, tmp_path):
    make_report(results, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    listed = re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(
        ["k.json, bench/b.py::test_op[1024]", "k.json, bench/b.py::test_op[4096]"]
        + [f"i.json, bench/i.py::test[{mode}-{form}-{side}]"
           for form in ("xt xl", "naive, window grown")
           for mode, side in (("inference", 512), ("inference", 2048), ("training", 512))]
    )  # fmt: skip
    for section in re.findall(r"^## (?:some_op|image)\n(.*?)(?=^## )", text, re.M | re.S):
        rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
        assert rows and all(re.search(r"\[\d+\] \|$", row) for row in rows)
    row = next(line for line in text.splitlines() if "| eager |" in line and "4,096" in line)
    assert listed[int(re.search(r"\[(\d+)\]", row)[1]) - 1].endswith("test_op[4096]")
    assert "6 ms (5.4 ms to 6.6 ms, n = 9)" in row and "1.50 (1.35 to 1.65)" in row
    # Twice the floor for ours, thrice for what takes 1.5 times as long.
    assert "| 3.0 |" in row


def test_the_page_is_one_file(results, tmp_path):
    make_report(results, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    found = {"svg": 0, "table": 0}
    open_tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag in found:
                found[tag] += 1
            if tag in ("table", "tr", "td", "th", "ul", "ol", "li", "svg", "figure", "body"):
                open_tags.append(tag)
            for name, value in attrs:
                # Fragments and names of XML are no requests.
                if name in ("src", "href", "xlink:href"):
                    assert value.startswith("#"), (tag, value)

        def handle_endtag(self, tag):
            if open_tags and tag in (*found, "tr", "td", "th", "ul", "ol", "li", "figure", "body"):
                assert open_tags.pop() == tag

    Reader().feed(page)
    assert not open_tags and found["table"] >= 5 and found["svg"] >= 4
    assert page.count("commit 0123456") >= 2 + found["svg"]
    assert "<script" not in page and "url(http" not in page


def test_plots_name_the_machine_and_repeat(results, tmp_path):
    for name in ("one", "two"):
        make_report(results, tmp_path / name)
    files = sorted((tmp_path / "one" / "plots").iterdir())
    assert [f.name for f in files] == [
        "i-image-memory.svg", "i-image-time.svg", "k-some_op-floor.svg", "k-some_op-memory.svg",
        "k-some_op-time.svg",
    ]  # fmt: skip
    for file in files:
        assert "commit 0123456" in file.read_text()
        assert file.read_bytes() == (tmp_path / "two" / "plots" / file.name).read_bytes()
    assert "naive, window grown: out of memory" in files[1].read_text()


def test_scripts_and_gpu_runs_are_read(tmp_path):
    committed = ROOT / "bench" / "results" / "amd-epyc-family26-2-cores"
    for name in ("memory_scaling_jpeg.json", "gradient_memory.json"):
        shutil.copy(committed / name, tmp_path)
    info = kernel(1024, 0.001, 0.002)
    gpu = {
        "environment": {
            "gpu": "Test GPU",
            "driver": "1.2",
            "torch": "2.11.0",
            "commit": "abcdef12",
        },
        "steps": {
            "tests test_x.py": {"test_x.py::test": {"outcome": "passed"}},
            "benches bench_kernels.py": {
                "bench_kernels.py::test_op": {"numbers": {"extra": info["extra_info"]}}
            },
        },
    }
    (tmp_path / "gpu.json").write_text(json.dumps(gpu))
    records, refused = read_folder(tmp_path)
    assert not refused and [len(r.rows) for r in records] == [2, 3, 4]
    assert records[0].where == "Test GPU, driver 1.2, torch 2.11.0, commit abcdef1"
    assert [row.size for row in records[2].rows][-1] == 29_000 * 25_000
    make_report(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    first = json.loads((committed / "memory_scaling_jpeg.json").read_text())["rows"][0]
    peak = f"stream {first['above_model'] / 2**20:.0f} MiB"
    assert f"convnext_atto, xl, jpeg | 17 / 67 / 268 / 725 Mpx | {peak}" in text


def test_readme_table(results, tmp_path):
    readme = tmp_path / "README.md"
    begin, end = README_MARKS
    readme.write_text(f"before\n{begin}old\n{end}after\n")
    records, _ = read_folder(results)
    write_readme(records, readme)
    once = readme.read_text()
    assert once.startswith(f"before\n{begin}") and once.endswith(f"{end}after\n")
    assert "old" not in once and "eager x 2.50 / x 1.50" in once and "commit 0123456" in once
    write_readme(records, readme)
    assert readme.read_text() == once
    readme.write_text("no marks")
    with pytest.raises(RecordError, match=r"README.md must hold the lines <!-- made by"):
        write_readme(records, readme)


def test_records_of_scripts(tmp_path):
    """Scores of a small task, errors at equal keys, and a training step with one form left out."""
    folder = tmp_path / "results"
    folder.mkdir()
    facts = {"cpu": "AMD", "cores": 2, "commit": "0123456789"}
    row = {"title": "no context", "f1s": [40.0, 39.0], "mean": 39.5, "half_width_95": 1.5,
           "ceiling": 40.0, "seconds": [1.0, 2.0]}  # fmt: skip
    task = {"task": "vessels", "rows": {"alone": row}, "machine": facts, "versions": {}}
    forms = {"published": (8.0, 1.0), "tile": (2.0, 0.25), "lsh": (6.0, 0.5)}
    errors = {
        "machine": facts, "shape": [1, 2, 1024, 64], "seeds": 3,
        "rows": [{"input": "Gaussian", "form": form, "error": error, "time_ratio": time}
                 for form, (error, time) in forms.items()],
    }  # fmt: skip
    step = facts | {
        "what": "forward, loss and backward of one image; peak resident memory of it",
        "command": "python step.py", "encoder": "tiny", "size": 2048, "region": 512,
        "processor_seconds": {"context": [3.0, 3.2], "none": [2.0, 2.0]}, "ratios": [1.5, 1.6],
        "peaks": {"context": 2**30},
    }  # fmt: skip
    for name, data in (("task", task), ("errors", errors), ("step", step)):
        (folder / f"{name}.json").write_text(json.dumps(data))
    make_report(folder, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| vessels, no context | 40.0, 39.0 | 39.5 ± 1.5 | 40.0 |" in text
    assert "| published 1, at best; Gaussian 0.25 (tile) |" in text
    assert "| Gaussian | 1,024 tokens | lsh | 0.50 (0.50 to 0.50) | 6 |" in text
    assert "| 2,048 px a side | xl | 3.1 s (3.04 s to 3.16 s, n = 2) | 1.55" in text
    assert "nothing recomputed" not in text and "not shown" not in text


# Two records


def test_verdicts_respect_the_spread(tmp_path):
    old = write(
        tmp_path / "old.json", kernel(1, 1.0, 1.0), kernel(2, 1.0, 1.0), kernel(3, 1.0, 1.0),
        image("xt xl", 512), image("naive", 512),
    )  # fmt: skip
    new = write(
        tmp_path / "new.json", kernel(1, 1.15, 0.5), kernel(2, 1.3, 1.0), kernel(4, 1.0, 1.0),
        image("xt xl", 512, "out of memory"),
        image("naive", 512, memory=300 * 2**20, seconds=spread(1.0, rounds=1)),
    )  # fmt: skip
    verdicts, alone = compare_records(read_record(old), read_record(new))
    found = {(v.new.form, v.new.size): v.verdict for v in verdicts}
    assert found == {
        ("ours", 1): "same time within spread and drift",  # 0.9 to 1.1 and 1.035 to 1.265
        ("eager", 1): "2.00 times as fast",
        ("ours", 2): "1.30 times as slow",  # 1.17 is above 1.1
        ("eager", 2): "same time within spread and drift",
        ("xt xl", 512): "measured before, out of memory now",
        ("naive", 512): "too few runs to tell a change of time from chance; "
                        "more memory (+100.0 MiB)",
    }  # fmt: skip
    assert next(v for v in verdicts if v.new.form == "eager").change == 0.5
    assert sorted(alone) == [
        f"only in {name}.json: some_op, forward, length {size}, {form}"
        for name, size in (("new", 4), ("old", 3)) for form in ("eager", "ours")
    ]  # fmt: skip


def test_a_drifting_machine_hides_small_changes(tmp_path):
    """The machine was up to 1.25 times as slow at some time of the first run."""
    steady = [kernel(n, 1.0, 1.0, yardstick=0.002) for n in (1, 2)]
    drifting = [*steady, kernel(3, 1.0, 1.0, yardstick=0.0025)]
    new = write(tmp_path / "new.json", kernel(1, 0.75, 0.25, yardstick=0.002))
    told = []
    for benches in (steady, drifting):
        old = read_record(write(tmp_path / f"old{len(told)}.json", *benches))
        verdicts, _ = compare_records(old, read_record(new))
        told.append({v.new.form: v.verdict for v in verdicts})
    assert told[0] == {"ours": "1.33 times as fast", "eager": "4.00 times as fast"}
    hidden = "same time within spread and drift"
    assert told[1] == {"ours": hidden, "eager": "4.00 times as fast"}
    assert old.drift == (1.0, 1.25) and old.where.endswith("drift 1.00 to 1.25")


def test_a_record_is_the_same_as_itself(results, tmp_path):
    told = make_report(results / "k.json", tmp_path / "out", against=results / "k.json")
    assert told[0] == "4 of 4 rows: same time within spread and drift"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## k.json and k.json" in text and "Before: 2 cores" in text


# What it refuses


def test_refusals(results, tmp_path):
    empty = tmp_path / "empty"
    with pytest.raises(RecordError, match="empty must be a folder with results, and is not there"):
        read_folder(empty)
    empty.mkdir()
    with pytest.raises(RecordError, match=r"holds no JSON; make one with `pytest bench/"):
        read_folder(empty)
    (empty / "bad.json").write_text("{")
    with pytest.raises(RecordError, match=r"holds nothing to show: report: bad.json is no JSON"):
        read_folder(empty)
    with pytest.raises(RecordError, match=r"none.json is not there"):
        read_record(tmp_path / "none.json")
    write(results / "old.json", kernel(1, 1.0, 1.0, schema=0))
    write(results / "half.json", {"fullname": "x", "extra_info": {"schema": 1, "op": "y"}})
    (results / "other.json").write_text('{"what": "a list"}')
    records, refused = read_folder(results)
    assert [r.path.name for r in records] == ["i.json", "k.json"]
    assert refused == [
        "report: half.json is incomplete (KeyError: 'device').",
        "report: old.json must be of version 1 of the benches, got 0: run them again with "
        "`pytest bench/ --benchmark-only --benchmark-json=old.json`.",
        "report: other.json is no record of a bench.",
    ]
    told = make_report(results, tmp_path / "out")
    assert [line.partition(": ")[0] for line in told[:-1]] == ["not shown"] * 3
    assert "old.json must be of version" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(RecordError, match="RESULTS must be one file to be judged"):
        make_report(results, tmp_path / "out", against=results / "k.json")


def test_command(results, tmp_path):
    from click.testing import CliRunner

    from xt_models.cli import main

    done = CliRunner().invoke(main, ["report", str(results), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0 and "report.html" in done.output, done.output
    done = CliRunner().invoke(main, ["report", "nowhere", "-o", str(tmp_path / "out")])
    assert done.exit_code == 1 and "nowhere must be a folder with results" in done.output


def test_matplotlib_is_asked_for_late():
    code = "import sys, xt_models.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
