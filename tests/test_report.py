"""`xt report`: what it reads, what it says, what it refuses."""

import copy
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
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
from xt_models.report.answers import whole_images
from xt_models.report.page import README_MARKS
from xt_models.report.records import keep_newest

pytest.importorskip("matplotlib")
MACHINE = {"schema": 1, "cpu": "Test CPU", "cores": 2, "torch": "2.15.0", "commit": "0123456789"}
ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "bench" / "results" / "amd-epyc-family26-2-cores"


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


def attention(length, ours, exact, error=0.2, **more):
    """A bench with an approximation and two exact forms."""
    times = {"ours": ours, "sdpa": exact, "sdpa math": 3 * exact}
    info = {
        "op": "hyper_attention", "variant": "all keys", "batch": 1, "heads": 12, "head_dim": 64,
        "seconds": {form: spread(time) for form, time in times.items()},
        "ratio": {form: spread(time / ours) for form, time in times.items() if form != "ours"},
        "error": {"ours": error, "sdpa": 0.0, "sdpa math": 2e-7}, "memory": {"ours": 2**20},
    }  # fmt: skip
    return kernel(length, ours, exact, **info | more)


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


def page(results, tmp_path, name="out"):
    """The Markdown of a report."""
    make_report(results, tmp_path / name)
    return (tmp_path / name / "report.md").read_text()


def section(text, title):
    """The part of a page below one heading, up to the next of its level."""
    return re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text, re.M | re.S)[2]


def test_the_page_opens_with_contents_and_the_answer(results, tmp_path):
    text = page(results, tmp_path)
    titles = re.findall(r"^## (.*)$", text, re.M)
    assert titles[:2] == ["Should I use it, and what will it cost?", "In short"]
    assert re.findall(r"^\* \[(.*?)\]\(#", text, re.M) == titles
    assert text.index("Should I use it") < text.index("## ")
    answer = section(text, "Whole images")
    assert (
        "**Naive Swin, window grown cannot run at 2,048 px: out of memory (limit 20 GiB); "
        in answer
    )
    assert "| 512 px a side | 2 s, 3.25 regions/s, 200 MiB | not measured | 2 s, 3.25" in answer
    assert "| not measured | out of memory (limit 20 GiB) | not measured | [" in answer
    assert "2 cores of Test CPU, torch 2.15.0, commit 0123456" in text


@pytest.mark.parametrize(
    ("naive", "told"),
    [
        (1.0, "Naive Swin, window kept is faster than xT at 512 px"),
        (1.9, None),  # 1.71 to 2.09 touches 1.8 to 2.2
        (4.0, None),
    ],
)
def test_the_answer_claims_what_rows_hold(tmp_path, naive, told):
    file = write(
        tmp_path / "i.json", image("xt xl", 512), image("xt xl", 1024),
        image("naive", 512, seconds=spread(naive), memory=100 * 2**20),
    )  # fmt: skip
    answer = section(page(file, tmp_path), "Whole images")
    assert ("faster than xT at" in answer) == bool(told) and (told or "") in answer
    kind = {1.0: "Faster than xT", 1.9: "Within the spread of xT", 4.0: "Slower than xT"}[naive]
    wanted = f"{kind}: at 512 px x {naive / 2:.2f} of its time and x 0.50 of its memory. "
    assert wanted + "Not measured at 1,024 px." in answer
    assert "cannot run" not in answer


def test_one_run_decides_nothing(tmp_path):
    once = spread(0.1, rounds=1)
    file = write(tmp_path / "i.json", image("xt xl", 512), image("naive", 512, seconds=once))
    answer = section(page(file, tmp_path), "Whole images")
    assert "faster than xT" not in answer and "Too few runs to tell: at 512 px x 0.05" in answer
    assert "100 ms (100 ms" not in page(file, tmp_path) and "n = 1)" not in page(file, tmp_path)


def test_the_table_is_of_the_sizes_of_xt(tmp_path):
    alone = image("naive", 256)
    file = write(tmp_path / "i.json", alone, image("naive", 512), image("xt xl", 512))
    answer = section(page(file, tmp_path), "Whole images")
    assert "| 512 px a side | " in answer and "256 px" not in answer
    answer = section(page(write(tmp_path / "i.json", alone), tmp_path), "Whole images")
    assert "| 256 px a side | not measured | 2 s" in answer


def test_the_table_is_of_the_encoder_with_naive_rows(tmp_path):
    file = write(
        tmp_path / "i.json", image("xt xl", 512), image("naive", 512),
        image("xt xl", 512, encoder="other", regions_per_s=99.0),
    )  # fmt: skip
    encoder, sizes = whole_images(read_record(file).rows)
    assert encoder == "tiny" and sizes[512]["xt xl"].per_s == 3.25
    matrix = section(page(file, tmp_path), "Inference")
    assert "| other | 512 px a side | 2 s, 99.00 regions/s" in matrix


def test_each_form_tells_its_own_batch(tmp_path):
    forms = {"xt xl": 16, "naive": 1}
    alike = [image(form, 512, batch=16, threads=2) for form in forms]
    unlike = [image(form, 512, batch=batch, threads=2) for form, batch in forms.items()]
    told = section(page(write(tmp_path / "i.json", *alike), tmp_path), "Whole images")
    assert "All rows: cpu, float32, batch 16, 2 threads." in told
    told = section(page(write(tmp_path / "i.json", *unlike), tmp_path), "Whole images")
    assert (
        "xT (context xl): cpu, float32, batch 16, 2 threads. naive Swin, window kept: cpu," in told
    )
    assert "All rows" not in told


def test_exact_attention_is_told_to_be_used_where_it_is_faster(tmp_path):
    file = write(
        tmp_path / "a.json", attention(1024, 0.002, 0.001), attention(4096, 0.01, 0.04),
        attention(16_384, 0.04, 0.64),
    )  # fmt: skip
    answer = section(page(file, tmp_path), "Attention")
    assert "| all keys | 4,096 tokens | 40 ms (sdpa) | 10 ms (0.2) |" in answer
    assert (
        "**all keys: use exact below 4,096 tokens**, and at any length where an error of" in answer
    )
    assert "ours takes x 0.25 of its time" in answer and "not measured." not in answer
    assert "All rows: cpu, float32, batch 1, 12 heads of 64." in answer
    slow = write(tmp_path / "slow.json", attention(1024, 0.002, 0.001))
    answer = section(page(slow, tmp_path), "Attention")
    assert "**all keys: use exact** at every measured length, up to 1,024 tokens." in answer


def test_your_image_is_computed_from_the_slowest_and_the_fastest_row(tmp_path):
    file = write(
        tmp_path / "i.json", image("xt xl", 512, regions_per_s=4.0),
        image("xt xl", 1024, regions_per_s=2.0, memory=300 * 2**20),
    )  # fmt: skip
    row = next(r for r in section(page(file, tmp_path), "Your image").splitlines() if "`tiny`" in r)
    # 64 regions of 256 px, all beyond what was measured; the largest peak.
    assert "| 16 s to 32 s* |" in row and "| up to 300 MiB |" in row and "[1] [2]" in row


def test_an_approximation_never_stands_without_its_error(tmp_path):
    file = write(tmp_path / "a.json", attention(4096, 0.0123, 0.04, error=0.27))
    readme = tmp_path / "README.md"
    readme.write_text("".join(README_MARKS))
    make_report(file, tmp_path / "out", readme=readme)
    for text in ((tmp_path / "out" / "report.md").read_text(), readme.read_text()):
        lines = [line for line in text.splitlines() if "12.3 ms" in line]
        assert len(lines) >= 2 and all("0.27" in line for line in lines), lines


def test_floors_are_of_the_form_that_they_bound(tmp_path):
    """A number alone is the work of the first form; an exact form beside it has another."""
    one = attention(4096, 0.01, 0.04, floor=0.005, over_floor=2.0, flops=1e9)
    floors = {"ours": 0.005, "sdpa": 0.032}
    each = attention(1024, 0.01, 0.04, floor=floors, flops={"ours": 1e9, "sdpa": 8e9})
    record = read_record(write(tmp_path / "a.json", one, each))
    found = {(row.size, row.form): row.over_floor for row in record.rows}
    assert found == {
        (4096, "ours"): 2.0, (4096, "sdpa"): None, (4096, "sdpa math"): None,
        (1024, "ours"): 2.0, (1024, "sdpa"): 1.25, (1024, "sdpa math"): None,
    }  # fmt: skip


def test_out_of_memory_of_a_form_is_a_result(tmp_path):
    bench = attention(4096, 0.01, 0.04, out_of_memory={"sdpa math": 20 * 2**30})
    for key in ("seconds", "ratio", "error"):
        del bench["extra_info"][key]["sdpa math"]
    rows = section(page(write(tmp_path / "a.json", bench), tmp_path), "hyper_attention")
    assert "| all keys | 4,096 tokens | sdpa math | out of memory (limit 20 GiB) |" in rows


def test_absent_forms_are_told_with_their_benches(tmp_path):
    there, gone = attention(1024, 0.01, 0.04, absent={}), attention(4096, 0.01, 0.04)
    gone["extra_info"]["absent"] = {"sdpa efficient": "no backend\nhere"}
    text = page(write(tmp_path / "a.json", there, gone), tmp_path)
    missing = section(text, "Not measured, not shown")
    assert missing.strip() == (
        "* hyper_attention: sdpa efficient (at all keys, 4,096 tokens): no backend here"
    )


def test_the_paper_stands_beside_the_same_encoder(tmp_path):
    wrong = image("xt xl", 512, encoder="hiera_large", regions_per_s=99.0)
    file = write(tmp_path / "i.json", wrong)
    released = r"\| Swin-T \| XL \| 512/256 \| 80.00 \| 0.17 GB \| "
    assert re.search(released + "not measured", page(file, tmp_path))
    tiny = {"encoder": "swinv2_tiny"}
    training = {"mode": "training", "memory": 800 * 2**20, "regions_per_s": 1.625}
    right = [
        image("xt xl", 512, **tiny), image("xt xl", 512, mode="training", **tiny),
        image("naive, window grown", 512, **tiny, **training),
    ]  # fmt: skip
    text = page(write(tmp_path / "i.json", wrong, *right), tmp_path)
    assert re.search(released + r"3.25 \| 200 MiB \| cpu, float32 \| \[", text)
    assert "| 786,432 | 786,432 |" in text
    # 6.02 / 0.49 GB and 29.53 / 12.77 minutes in the paper.
    assert "| 512 | 12.3 | 2.3 | 4.0 |  | 2.0 | swinv2_tiny, cpu, float32 | [" in text
    assert "| 1024 | 12.4 | 3.8 | not measured | not measured |" in text
    less = image("xt xl, recomputed", 512, mode="training", **tiny, memory=100 * 2**20)
    text = page(write(tmp_path / "i.json", wrong, *right, less), tmp_path)
    assert "| 512 | 12.3 | 2.3 | 4.0 | 8.0 | 2.0 | swinv2_tiny, cpu, float32 | [" in text
    lost = image("naive, window grown", 1024, "out of memory", mode="training", **tiny)
    ours = image("xt xl", 1024, mode="training", **tiny)
    text = page(write(tmp_path / "i.json", lost, ours), tmp_path)
    told = "out of memory (limit 20 GiB); xT 200 MiB |  |  | swinv2_tiny, cpu, float32"
    assert f"| 1024 | 12.4 | 3.8 | {told} | [" in text
    # Another dtype is another measurement: nothing is put beside it.
    right[1]["extra_info"]["dtype"] = "bfloat16"
    text = page(write(tmp_path / "i.json", *right), tmp_path)
    assert "| 512 | 12.3 | 2.3 | not measured |" in text


def test_every_number_names_its_source(results, tmp_path):
    text = page(results, tmp_path)
    listed = re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(
        ["k.json, bench/b.py::test_op[1024]", "k.json, bench/b.py::test_op[4096]"]
        + [f"i.json, bench/i.py::test[{mode}-{form}-{side}]"
           for form in ("xt xl", "naive, window grown")
           for mode, side in (("inference", 512), ("inference", 2048), ("training", 512))]
    )  # fmt: skip
    numbered = [line for line in text.splitlines() if re.match(r"\|.*(MiB| ms| s\b)", line)]
    assert len(numbered) > 10 and all(re.search(r"\[\d+\] \|$", line) for line in numbered)
    row = next(line for line in text.splitlines() if "| eager |" in line and "4,096" in line)
    assert listed[int(re.search(r"\[(\d+)\]", row)[1]) - 1].endswith("test_op[4096]")
    assert "6 ms (5.4 ms to 6.6 ms, n = 9)" in row and "x 1.50 (1.35 to 1.65, n = 9)" in row
    # Twice the floor for ours, thrice for what takes 1.5 times as long.
    assert "| 3.0 |" in row


def test_commands_are_those_of_the_records(tmp_path):
    typed = "pytest bench/ --benchmark-only --full"
    told = MACHINE | {"command": typed, "dirty": True}
    write(tmp_path / "in" / "told.json", kernel(1, 1.0, 1.0), machine=told)
    write(tmp_path / "in" / "old.json", kernel(2, 1.0, 1.0))
    origins = section(page(tmp_path / "in", tmp_path), "Where the numbers come from")
    assert f"| told.json | `{typed}` | 2 cores of Test CPU" in origins
    assert re.search(r"told.json .* commit 0123456 \+ changes \|", origins)
    assert re.search(r"old.json \| command not recorded \| .* commit 0123456 \|", origins)


def test_the_newer_row_wins(tmp_path):
    for name, day, time in (("a", "2026-02-01", 2.0), ("b", "2026-01-01", 1.0)):
        file = write(tmp_path / "in" / f"{name}.json", kernel(1, time, time))
        file.write_text(json.dumps(json.loads(file.read_text()) | {"datetime": day}))
    records, _ = read_folder(tmp_path / "in")
    assert keep_newest(records) == ["b.json: some_op (forward): measured again in a.json"]
    assert [len(record.rows) for record in records] == [2, 0]
    missing = section(page(tmp_path / "in", tmp_path), "Not measured, not shown")
    assert "measured again in a.json" in missing


def test_the_page_is_one_file(results, tmp_path):
    make_report(results, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    found = {"svg": 0, "table": 0, "details": 0}
    open_tags, targets, names = [], set(), set()
    nested = ("tr", "td", "th", "ul", "ol", "li", "figure", "body", "div", "summary")

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag in found:
                found[tag] += 1
            if tag in (*found, *nested):
                open_tags.append(tag)
            names.update(value for name, value in attrs if name == "id")
            for name, value in attrs:
                # Fragments and names of XML are no requests.
                if name in ("src", "href", "xlink:href"):
                    assert value.startswith("#"), (tag, value)
                    if tag == "a":
                        targets.add(value[1:])

        def handle_endtag(self, tag):
            if tag in (*found, *nested):
                assert open_tags.pop() == tag

    Reader().feed(text)
    assert not open_tags and found["table"] >= 5 and found["svg"] >= 4 and found["details"] >= 3
    assert "s1" in targets and targets <= names
    assert text.count("commit 0123456") >= 2 + found["svg"]
    assert "<script" not in text and "url(http" not in text and "viewport" in text


def test_plots_name_the_machine_and_repeat(results, tmp_path):
    for name in ("one", "two"):
        make_report(results, tmp_path / name)
    files = {f.name: f for f in (tmp_path / "one" / "plots").iterdir()}
    assert sorted(files) == [
        "i-image-memory.svg", "i-image-time.svg", "k-some_op-floor.svg", "k-some_op-memory.svg",
        "k-some_op-time.svg", "memory-by-image.svg",
    ]  # fmt: skip
    text = (tmp_path / "one" / "report.md").read_text()
    assert sorted(re.findall(r"\]\(plots/(.*?)\)", text)) == sorted(files)
    for name, file in files.items():
        assert "commit 0123456" in file.read_text()
        assert file.read_bytes() == (tmp_path / "two" / "plots" / name).read_bytes()
    lost = "naive, window grown: out of memory at 20 GiB"
    assert lost in files["i-image-time.svg"].read_text()


def test_plots_of_an_older_report_go_and_other_files_stay(results, tmp_path):
    make_report(results, tmp_path / "out")
    (tmp_path / "out" / "plots" / "mine.svg").write_text("<svg/>")
    make_report(results / "k.json", tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out" / "plots").iterdir()) == [
        "k-some_op-floor.svg", "k-some_op-memory.svg", "k-some_op-time.svg", "mine.svg",
    ]  # fmt: skip


def heights(file):
    """What is drawn higher has a smaller y: of text and of marks, in the order of the file."""
    text = file.read_text()
    marks = [float(y) for y in re.findall(r'<use xlink:href="#m[^"]*" x="[^"]*" y="([^"]*)"', text)]
    return text, marks


def test_out_of_memory_is_drawn_at_its_limit(tmp_path):
    """One plot: ours flat, naive growing, and its end far above all that was measured."""
    rows = [
        {"form": "ours", "height": side, "width": side, "outcome": "measured", "seconds": 1.0,
         "above_model": 2**28, "regions_per_s": 4.0, "regions": 4}
        for side in (512, 1024, 2048)
    ] + [
        {"form": "naive, window grown", "height": 512, "width": 512, "outcome": "measured",
         "seconds": 1.0, "above_model": 2**29, "regions_per_s": 4.0},
        {"form": "naive, window grown", "height": 1024, "width": 1024,
         "outcome": "out of memory", "limit": 20 * 2**30},
    ]  # fmt: skip
    data = MACHINE | {"compression": "jpeg", "encoder": "tiny", "context": "xl", "rows": rows}
    (tmp_path / "m.json").write_text(json.dumps(data))
    text = page(tmp_path / "m.json", tmp_path)
    assert "out of memory (limit 20 GiB)" in section(text, "Memory as images grow")
    drawn, marks = heights(tmp_path / "out" / "plots" / "memory-by-image.svg")
    assert "naive, window grown: out of memory at 20 GiB" in drawn
    line = re.search(r"stroke-dasharray: 3.7[^\n]*", drawn)
    assert line, "a dashed line leads to the end"
    # The cross, at 20 GiB: its distance to 512 MiB is over five times that of 512 to 256 MiB.
    ys = sorted(set(marks))
    path = re.search(
        r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n" [^>]*dasharray: 3.7', drawn
    )
    start, end = float(path[2]), float(path[4])
    flat = max(y for y in ys if y > start)
    assert (start - end) / (flat - start) > 2 and end > 0


def test_in_short_shows_where_forms_end(tmp_path):
    """Ours with the naive forms of its encoder, not a longer record of another encoder."""

    def row(form, side, **more):
        measured = {"outcome": "measured", "seconds": 1.0, "above_model": 2**28}
        there = {"height": side, "width": side, "regions_per_s": 4.0, "encoder": "tiny"}
        return measured | there | {"form": form} | more

    sides = [512 * 2**step for step in range(6)]
    rows = [row("ours", side) for side in sides] + [row("naive", 512)]
    rows += [row("naive", side, outcome="out of memory", limit=2**34) for side in sides[3:5]]
    rows += [row("ours", side + 1, encoder="other") for side in range(9)]
    data = MACHINE | {"compression": "jpeg", "encoder": "tiny", "context": "xl", "rows": rows}
    (tmp_path / "m.json").write_text(json.dumps(data))
    short = section(page(tmp_path / "m.json", tmp_path), "In short")
    assert "| memory scaling, tiny, xl, jpeg | 0.262 / 16.8 / 268 Mpx | ours 256 MiB / 256" in short
    assert "; naive 256 MiB / out of memory / - |" in short


def test_dtypes_are_not_mixed_in_a_line(tmp_path):
    """In short has the dtype of most rows; a plot has a line for each."""
    wide = [kernel(n, 1.0, 2.0) for n in (1024, 4096)]
    narrow = [kernel(n, 0.001, 0.004, dtype="bfloat16") for n in (1024, 4096)]
    other = kernel(64, 1.0, 3.0)
    page_ = page(write(tmp_path / "a.json", *narrow, *wide, other), tmp_path)
    line = "| some_op, forward | 64 / 1,024 / 4,096 tokens | ours 1 s / 1 s / 1 s; eager"
    assert line in section(page_, "In short")
    drawn = (tmp_path / "out" / "plots" / "a-some_op-time.svg").read_text()
    assert "forward, bfloat16: ours" in drawn and "forward, float32: ours" in drawn
    short = section(page(write(tmp_path / "a.json", *narrow), tmp_path, "narrow"), "In short")
    assert "| some_op, forward | 1,024 / 4,096 tokens | ours 1 ms / 1 ms" in short


def test_in_short_is_of_the_usual_encoder(tmp_path):
    """Also where another one has more rows of that kind of work."""
    file = write(
        tmp_path / "k.json", image("xt xl", 512), image("xt xl", 1024),
        kernel(16, 0.2, 0.3, op="a page", variant="other, xl"),
        kernel(64, 0.7, 0.8, op="a page", variant="other, xl"),
        kernel(16, 0.5, 0.6, op="a page", variant="tiny, xl"),
    )  # fmt: skip
    short = section(page(file, tmp_path), "In short")
    assert "| a page, tiny, xl | " in short and "other, xl" not in short


def test_roofline(tmp_path):
    """A point for each form with bytes and operations, under the ceilings of the record."""
    work = {"bytes": 10**9, "flops": 10**10, "floor": 0.5}
    copy = {"bytes": 10**10, "floor": 1.0}
    file = write(
        tmp_path / "a.json", kernel(1, 1.0, 2.0, **work), kernel(2, 2.0, 3.0, **copy),
    )  # fmt: skip
    assert "![Operations a second" in section(page(file, tmp_path), "Kernels")
    drawn = (tmp_path / "out" / "plots" / "a-roofline.svg").read_text()
    assert "copy 10 GB/s" in drawn and "matrix product 20 GFLOP/s" in drawn
    # Twice: a point and its like in the legend.
    assert "some_op: ours" in drawn and "some_op: eager" in drawn
    page(write(tmp_path / "a.json", kernel(1, 1.0, 2.0)), tmp_path, "none")
    assert not (tmp_path / "none" / "plots" / "a-roofline.svg").exists()


def test_scripts_and_gpu_runs_are_read(tmp_path):
    for name in ("memory_scaling_jpeg.json", "gradient_memory.json"):
        shutil.copy(COMMITTED / name, tmp_path)
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
    assert not refused and [len(r.rows) for r in records][:2] == [2, 3]
    assert records[0].where == "Test GPU, driver 1.2, torch 2.11.0, commit abcdef1"
    assert [row.size for row in records[2].rows][-1] == 29_000 * 25_000
    assert records[2].command.startswith("python bench/memory_scaling.py")


def test_readme_table(results, tmp_path):
    readme = tmp_path / "README.md"
    begin, end = README_MARKS
    readme.write_text(f"before\n{begin}old\n{end}after\n")
    records, _ = read_folder(results)
    write_readme(records, readme)
    once = readme.read_text()
    assert once.startswith(f"before\n{begin}") and once.endswith(f"{end}after\n")
    assert "old" not in once and "| ours 1 ms / 4 ms; eager x 2.50 / x 1.50 | r2 |" in once
    assert "* r2: command not recorded, 2 cores of Test CPU, torch 2.15.0, commit 0123456" in once
    write_readme(records, readme)
    assert readme.read_text() == once
    readme.write_text("no marks")
    with pytest.raises(RecordError, match=r"README.md must hold the lines <!-- made by"):
        write_readme(records, readme)


def test_the_committed_report_and_readme_are_of_the_committed_results(tmp_path):
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)
    make_report(COMMITTED, tmp_path / "out", readme=readme)
    again = "run `xt report {0} -o {0}/report --readme README.md`".format(
        COMMITTED.relative_to(ROOT)
    )
    assert readme.read_text() == (ROOT / "README.md").read_text(), again
    made, kept = tmp_path / "out", COMMITTED / "report"
    for folder in (made, kept):
        names = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
        assert names == {str(f.relative_to(made)) for f in made.rglob("*") if f.is_file()}, again
    # Plots depend on the version of matplotlib, in the page too.
    assert (made / "report.md").read_text() == (kept / "report.md").read_text(), again
    pages = [re.sub(r"<svg.*?</svg>", "", (folder / "report.html").read_text(), flags=re.S)
             for folder in (made, kept)]  # fmt: skip
    assert pages[0] == pages[1], again


def task():
    row = {"title": "no context", "f1s": [40.0, 39.0], "mean": 39.5, "half_width_95": 1.5,
           "ceiling": 40.0, "seconds": [1.0, 2.0]}  # fmt: skip
    context = row | {"title": "all of it", "f1s": [99.0, 99.0], "mean": 99.0, "half_width_95": 1.0}
    rows = {"alone": row, "whole": context | {"ceiling": None}}
    facts = {"cpu": "AMD", "cores": 2}
    return {"task": "vessels", "rows": rows, "machine": facts, "versions": {}}


def plans():
    forms = {"published": (8.0, 1.0), "tile": (2.0, 0.25), "lsh": (6.0, 0.5)}
    rows = [{"input": "Gaussian", "form": form, "error": error, "time_ratio": time}
            for form, (error, time) in forms.items()]  # fmt: skip
    return {"machine": MACHINE, "shape": [1, 2, 1024, 64], "seeds": 3, "rows": rows}


def step():
    return MACHINE | {
        "what": "forward, loss and backward of one image; peak resident memory of it",
        "command": "python step.py", "encoder": "tiny", "size": 2048, "region": 512,
        "processor_seconds": {"context": [3.0, 3.2], "none": [2.0]}, "ratios": [1.5, 1.6],
        "peaks": {"context": 2**30},
    }  # fmt: skip


def script():
    rows = [
        {"form": "ours", "size": 32_768, "value": 0.49, "unit": "s", "p20": 0.48, "p80": 0.5},
        {"form": "exact", "size": "32k", "value": 16.8, "unit": "s", "note": "once"},
    ]
    machine = MACHINE | {"command": "python bench/hyper_speed.py"}
    return {"schema": 1, "work": "speed", "title": "Long", "machine": machine, "rows": rows}


@pytest.mark.parametrize(
    "name, told",
    [("ablate", "ablate depth"), ("ablate-shoreline", "ablate depth on shoreline")],
)
def test_an_ablation_is_told_from_another_of_the_same_rows(name, told, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    record = task() | {"task": name, "command": "xt train ablate depth -o depth --steps 2000"}
    (folder / "depth.json").write_text(json.dumps(record))
    make_report(folder, tmp_path / "out")
    assert f"| {told}, no context | F1 |" in (tmp_path / "out" / "report.md").read_text()


def test_records_of_scripts(tmp_path):
    """Scores of a small task, errors at equal keys, a training step with one form left out, and
    what a script measured.
    """
    folder = tmp_path / "results"
    folder.mkdir()
    for make in (task, plans, step, script):
        (folder / f"{make.__name__}.json").write_text(json.dumps(make()))
    readme = tmp_path / "README.md"
    readme.write_text("".join(README_MARKS))
    make_report(folder, tmp_path / "out", readme=readme)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| vessels, no context | F1 | 40.0, 39.0 | 39.5 ± 1.5 | 40.0 |" in text
    listed = re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)
    cited = re.search(r"^\* Gaussian: 0.25, tile \[(\d+)\] \[(\d+)\]$", text, re.MULTILINE)
    assert [listed[int(n) - 1] for n in cited.groups()] == [
        "plans.json, Gaussian, tile", "plans.json, Gaussian, published",
    ]  # fmt: skip
    assert "| Gaussian | 1,024 tokens | lsh | x 0.50 | 6 |" in text
    assert "| 2,048 px a side | xl | 3.1 s (3.04 s to 3.16 s, n = 2) | x 1.55" in text
    assert "| 2,048 px a side | without context | 2 s | " in text
    assert "nothing recomputed" not in text and "not shown" not in text
    assert "| Long | ours | 32,768 | 0.49 s (0.48 to 0.5) |  | [" in text
    assert "| Long | exact | 32k | 16.8 s | once | [" in text
    short = readme.read_text()
    assert "| Long | ours 32,768 0.49 s; exact 32k 16.8 s (once) | r" in short
    shared = "| vessels, F1 in percent, 2 seeds | without context at most 39.5 (no context; "
    shared += "highest possible 40.0); all of it 99.0 ± 1.0 | r"
    assert shared in short
    assert ": `python bench/hyper_speed.py`, 2 cores" in short
    assert re.search(r"r\d: command not recorded, 2 cores of AMD, no commit recorded", short)


def test_what_is_missing_beside_a_row_is_no_failure(tmp_path):
    """Plans without the published one, attention without exact, only rows that ran out."""
    data = plans()
    data["rows"] = data["rows"][1:]
    (tmp_path / "plans.json").write_text(json.dumps(data))
    alone = attention(1, 1.0, 1.0)["extra_info"]
    alone |= {key: {"ours": alone[key]["ours"]} for key in ("seconds", "error")} | {"ratio": {}}
    lost = image("naive", 512, "out of memory")
    write(tmp_path / "b.json", {"fullname": "t", "extra_info": alone}, lost)
    text = page(tmp_path, tmp_path)
    assert "### Attention" not in text and "| tile | x 0.25 | 2 |" in text
    assert "| 512 px a side | not measured | out of memory (limit 20 GiB) |" in text


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
        ("ours", 1): "same time within the spread",  # 0.9 to 1.1 and 1.035 to 1.265
        ("eager", 1): "2.00 times as fast",
        ("ours", 2): "1.30 times as slow",  # 1.17 is above 1.1
        ("eager", 2): "same time within the spread",
        ("xt xl", 512): "measured before, out of memory now",
        ("naive", 512): "too few runs to tell a change of time from chance; "
                        "more memory (+100.0 MiB)",
    }  # fmt: skip
    assert next(v for v in verdicts if v.new.form == "eager").change == 0.5
    assert sorted(alone) == [
        f"only in {name}.json: some_op, forward, length {size}, {form}"
        for name, size in (("new", 4), ("old", 3)) for form in ("eager", "ours")
    ]  # fmt: skip


def test_each_bench_has_its_own_pace(tmp_path):
    """The yardstick of one bench says nothing of another; a bench without one takes the middle of
    the others, and is judged by the whole of their range. On another machine only the yardstick
    counts; on the same one what slowed down with it and what did not are both no change.
    """
    old = [kernel(n, 1.0, 1.0, yardstick=0.002) for n in (1, 2, 3)] + [image("xt xl", 512)]
    new = [
        kernel(1, 1.3, 1.0, yardstick=0.0026), kernel(2, 1.0, 1.3, yardstick=0.002),
        kernel(3, 1.0, 1.0, yardstick=0.002), image("xt xl", 512, seconds=spread(3.0)),
    ]  # fmt: skip
    files = [write(tmp_path / "old.json", *old), write(tmp_path / "new.json", *new)]
    before, after = map(read_record, files)
    verdicts, _ = compare_records(before, after)
    same = "same time within the spread"
    found = {(v.new.size, v.new.form): v.verdict for v in verdicts}
    assert found.pop((1, "eager")) == same
    elsewhere = replace(after, machine={**after.machine, "cpu": "another"})
    verdicts, _ = compare_records(before, elsewhere)
    there = {(v.new.size, v.new.form): v.verdict for v in verdicts}
    assert there.pop((1, "eager")) == "1.30 times as fast"
    assert there == found == {
        (1, "ours"): same,
        (2, "ours"): same, (2, "eager"): "1.30 times as slow", (3, "ours"): same,
        (3, "eager"): same, (512, "xt xl"): same,  # 2.7 at the fastest, 2.08 at the slowest pace
    }  # fmt: skip
    steady = [*new[1:3], new[3]]
    verdicts, _ = compare_records(
        read_record(files[0]), read_record(write(tmp_path / "new.json", *steady))
    )
    assert verdicts[-1].verdict == "1.50 times as slow"


def test_what_code_that_did_not_change_does_is_no_change(tmp_path):
    """Eleven rows of PyTorch's own forms are measured again, three far slower: so slow may ours
    be by chance, too; under other versions of torch they say nothing.
    """
    old = write(tmp_path / "old.json", *(kernel(n, 1.0, 1.0) for n in range(1, 12)))
    times = [1.0] * 8 + [1.4] * 3
    new = [kernel(n, 1.3, time) for n, time in enumerate(times, 1)]
    records = [read_record(old), read_record(write(tmp_path / "new.json", *new))]

    def slower(after):
        return {v.new.size for v in compare_records(records[0], after)[0]
                if v.new.form == "ours" and "times as slow" in v.verdict}  # fmt: skip

    assert slower(records[1]) == set()
    other = replace(records[1], machine={**records[1].machine, "torch": "another"})
    assert slower(other) == set(range(1, 12))


def scaled(data, factor, forms):
    """A copy of a record in which the times of some forms are multiplied."""
    data = copy.deepcopy(data)
    for bench in data["benchmarks"]:
        info = bench["extra_info"]
        times = info.get("seconds")  # none where memory was not enough
        times = times if "first" in info else {info["form"]: times}
        for form, spread in times.items():
            if isinstance(spread, dict) and forms(form):
                spread |= {key: spread[key] * factor for key in ("median", "p20", "p80")}
        if "yardstick" in info and forms("yardstick"):
            info["yardstick"] *= factor
    return data


@pytest.mark.parametrize("slower", [1.55, 1 / 1.55])
def test_a_change_of_half_is_found_in_the_committed_record(tmp_path, slower):
    """Of ours, in nine of ten rows; the same record, and a slower machine, change nothing."""
    data = json.loads((COMMITTED / "bench.json").read_text())
    old = read_record(COMMITTED / "bench.json")

    def verdicts(factor, forms):
        (tmp_path / "bench.json").write_text(json.dumps(scaled(data, factor, forms)))
        found, alone = compare_records(old, read_record(tmp_path / "bench.json"))
        assert not alone
        return [v for v in found if v.new.seconds and v.new.seconds.known]

    ours = [v for v in verdicts(slower, lambda form: form == "ours") if v.new.form == "ours"]
    changed = [v for v in ours if "times as" in v.verdict]
    assert len(ours) > 20 and len(changed) >= 0.9 * len(ours)
    for factor in (1.0, 1.3):
        assert not [v for v in verdicts(factor, lambda form: True) if "times as" in v.verdict]


def test_a_record_is_the_same_as_itself(results, tmp_path):
    told = make_report(results / "k.json", tmp_path / "out", against=results / "k.json")
    assert told[0] == "4 of 4 rows: same time within the spread"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## What changed from k.json to k.json" in text and "Before: 2 cores" in text


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
    write(results / "none.json")
    (results / "other.json").write_text('{"what": "a list"}')
    records, refused = read_folder(results)
    assert [r.path.name for r in records] == ["i.json", "k.json"]
    assert refused == [
        "report: half.json: x.outcome must be one of measured, out of memory, out of time, got "
        "null.",
        "report: none.json holds no bench: nothing was measured.",
        "report: old.json must be of version 1 of the benches, got 0: run them again.",
        "report: other.json is no record of a bench.",
    ]
    told = make_report(results, tmp_path / "out")
    assert [line.partition(": ")[0] for line in told[:-1]] == ["not shown"] * 4
    assert "old.json must be of version" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(RecordError, match="RESULTS must be one file to be judged"):
        make_report(results, tmp_path / "out", against=results / "k.json")


def at(data, *keys):
    for key in keys:
        data = data[key]
    return data


BENCH = ("benchmarks", 0, "extra_info")


@pytest.mark.parametrize(
    ("make", "keys", "value", "told"),
    [
        (task, ("rows", "alone", "f1s"), None, "rows.alone must be an object with accuracies"),
        (task, ("rows", "alone", "f1s"), [], "rows.alone.f1s must be a list that holds something"),
        (task, ("rows",), {}, "rows must be an object that holds something, got {}"),
        (step, ("ratios",), [], "ratios must be a list that holds something, got []"),
        (step, ("ratios",), ["a"], 'ratios[0] must be a number, got "a"'),
        (step, ("peaks", "context"), 1.5, "peaks.context must be a whole number, got 1.5"),
        (plans, ("shape",), [1, 2], "shape must be [batch, heads, tokens, head dim], got"),
        (plans, ("rows", 0, "error"), -1, "rows[0].error must be a number of at least 0, got -1"),
        (script, ("rows", 1, "value"), "fast", 'rows[1].value must be a number, got "fast"'),
        (script, ("schema",), 2, "must be of version 1 of the benches, got 2"),
        (script, ("rows",), [], "rows must be a list that holds something"),
        (None, ("machine_info",), 3, "machine_info must be an object, got 3"),
        (None, ("benchmarks", 0, "fullname"), None, "fullname must be a text, got null"),
        (None, (*BENCH, "seconds", "ours", "median"), 0,
         "test_op[1].seconds.ours.median must be a number above 0, got 0"),
        (None, (*BENCH, "seconds", "ours", "p20"), float("nan"), "p20 must be a number, got NaN"),
        (None, (*BENCH, "seconds"), [], "test_op[1].seconds must be an object"),
        (None, (*BENCH, "ratio"), {}, "test_op[1].ratio.eager must be an object, got null"),
        (None, (*BENCH, "first"), "mine", "first must be one of the forms that were timed, ours"),
        (None, (*BENCH, "length"), "long", 'length must be a number of at least 0, got "long"'),
        (None, (*BENCH, "absent"), ["flash"], "absent must be an object"),
        (None, (*BENCH, "floor"), 0, "floor must be a number above 0, got 0"),
        (image, (*BENCH, "memory"), 0, "memory must be a number of at least 1, got 0"),
        (image, (*BENCH, "outcome"), "fine", 'outcome must be one of measured, out of memory'),
        (image, (*BENCH, "seconds"), 10, "seconds must be an object, got 10"),
    ],
)  # fmt: skip
def test_malformed_records_name_file_key_and_rule(tmp_path, make, keys, value, told):
    file = tmp_path / "r.json"
    if make is None:
        write(file, kernel(1, 1.0, 1.0))
    elif make is image:
        write(file, image("xt xl", 512))
    else:
        file.write_text(json.dumps(make()))
    data = json.loads(file.read_text())
    at(data, *keys[:-1])[keys[-1]] = value
    file.write_text(json.dumps(data))
    with pytest.raises(RecordError, match=f"report: r.json.*{re.escape(told)}"):
        read_record(file)


@pytest.mark.parametrize("name", sorted(file.name for file in COMMITTED.glob("*.json")))
def test_no_missing_key_crashes(tmp_path, name):
    """Each key of the first bench or row of each committed record, left out: read, or refused."""
    data = json.loads((COMMITTED / name).read_text())
    if "benchmarks" in data:
        data["benchmarks"] = data["benchmarks"][-1:]
    elif isinstance(data.get("rows"), dict):
        data["rows"] = dict([next(iter(data["rows"].items()))])
    elif "rows" in data:
        data["rows"] = data["rows"][:2]
    file = tmp_path / name

    def walk(item, path=()):
        if isinstance(item, dict):
            for key in item:
                yield (*path, key)
                yield from walk(item[key], (*path, key))
        elif isinstance(item, list) and item:
            yield from walk(item[0], (*path, 0))

    refused = 0
    for path in walk(data):
        for value in ("gone", None, 0, [], {}):
            broken = copy.deepcopy(data)
            if value == "gone":
                del at(broken, *path[:-1])[path[-1]]
            else:
                at(broken, *path[:-1])[path[-1]] = value
            file.write_text(json.dumps(broken))
            try:
                read_record(file)
            except RecordError as error:
                refused += 1
                assert name in str(error)
    assert refused > 10


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
