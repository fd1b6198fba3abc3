"""JSON of the benches -> records: one reader for each kind of file, told apart by its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .fields import Field, RecordError
from .records import Absent, Entry, Record, Row, Score, Shape, Spread

SCHEMA = 1  # of bench/measure.py
SCALING = "memory scaling"
ERRORS = "hyper_attention, error at 512 keys a query"
_AXES = ("length", "regions", "side", "chunks")
_METRICS = {"accuracies": "accuracy", "f1s": "F1", "ap50s": "AP50"}
_OUTCOMES = ("measured", "out of memory", "out of time")
_HEAD = ("cpu", "cores", "gpu", "driver", "python", "torch", "triton", "commit", "dirty", "command")


def read_folder(folder: Path) -> tuple[list[Record], list[str]]:
    """(records of all JSON files in `folder`, why others are left out).

    Raises RecordError if there is no folder, no JSON in it, or none that can be read.
    """
    if not folder.is_dir():
        raise RecordError(f"report: {folder} must be a folder with results, and is not there.")
    records, refused = [], []
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise RecordError(
            f"report: {folder} holds no JSON; make one with "
            f"`pytest bench/ --benchmark-only --benchmark-json={folder}/bench.json`."
        )
    for path in paths:
        try:
            records.append(read_record(path))
        except RecordError as error:
            refused.append(str(error))
    if not records:
        raise RecordError(f"report: {folder} holds nothing to show: {' '.join(refused)}")
    return records, refused


def read_record(path: Path) -> Record:
    """The record in one JSON file. Raises RecordError if it is none, of another version, holds
    nothing, or breaks a rule.
    """
    data = Field.read(path)
    data.mapping()
    if "benchmarks" in data:
        record = _from_pytest(path, data)
    elif "steps" in data and "environment" in data:
        record = _from_gpu_run(path, data)
    else:
        readers = {
            "work": _from_script, "task": _from_task, "seeds": _from_errors, "peaks": _from_step,
            "compression": _from_scaling, "depth": _from_gradient,
        }  # fmt: skip
        reader = next((read for key, read in readers.items() if key in data), None)
        if reader is None:
            raise RecordError(f"report: {path.name} is no record of a bench.")
        machine = _machine(data["machine"] if "machine" in data else data)
        if "versions" in data:
            machine = data["versions"].mapping() | machine
        command = machine.get("command") or data["command"].text("")
        record = Record(path, machine, command, data["made"].text(""))
        reader(record, data)
    if not (record.rows or record.scores or record.entries):
        raise RecordError(f"report: {path.name} holds no bench: nothing was measured.")
    return record


def _machine(facts: Field) -> dict[str, Any]:
    return {name: value for name in _HEAD if (value := facts.mapping().get(name)) is not None}


def _version(item: Field, file: str) -> None:
    found = item["schema"].value
    if found != SCHEMA:
        raise RecordError(
            f"report: {file} must be of version {SCHEMA} of the benches, got "
            f"{'none' if found is None else found}: run them again."
        )


# Benches


def _from_pytest(path: Path, data: Field) -> Record:
    machine = _machine(data["machine_info"])
    if "commit_info" in data and "dirty" in data["commit_info"]:
        machine.setdefault("dirty", data["commit_info"]["dirty"].value)
    record = Record(path, machine, machine.get("command", ""), data["datetime"].text(""))
    for bench in data["benchmarks"] if data["benchmarks"].value else ():
        _add_bench(record, bench["fullname"].text(), bench["extra_info"])
    return record


def _from_gpu_run(path: Path, data: Field) -> Record:
    machine = _machine(data["environment"])
    record = Record(path, machine, machine.get("command", ""), data["made"].text(""))
    for step, items in data["steps"].items():
        for name, item in items.items() if step.startswith("benches") else ():
            if "numbers" in item:
                _add_bench(record, name, item["numbers"]["extra"])
    return record


def _add_bench(record: Record, name: str, info: Field) -> None:
    """The rows of one bench: an image in a process of its own, or forms that took turns."""
    info = Field(info.mapping(), info.file, name)
    _version(info, record.path.name)
    rows = list(_forms(info, record.path) if "first" in info else _image(info, record.path))
    record.rows.extend(rows)
    if "absent" in info:
        place = _place(rows[0])
        record.absent.extend(
            Absent(form, " ".join(why.text().split()), rows[0].op, place)
            for form, why in (info["absent"].items() if info["absent"].value else ())
        )


def _place(row: Row) -> str:
    size = f"{row.size:,.0f} {'tokens' if row.axis == 'length' else row.axis}" if row.axis else ""
    return ", ".join(part for part in (row.variant, size) if part)


def _shape(info: Field) -> Shape:
    counts = {
        key: info[key].whole(1) if key in info else None
        for key in ("batch", "heads", "head_dim", "threads")
    }
    return Shape(info["device"].text(), info["dtype"].text(), **counts)


def _image(info: Field, path: Path) -> Iterator[Row]:
    outcome = info["outcome"].one_of(*_OUTCOMES)
    encoder, mode, form = (info[key].text() for key in ("encoder", "mode", "form"))
    measured = outcome == "measured"
    context = info["context"].text("") or (form.removeprefix("xt ") if "xt " in form else "none")
    yield Row(
        "image", f"{encoder}, {mode}", "side", info["side"].whole(1), form, "",
        f"{path.name}, {info.place}", _shape(info), outcome,
        seconds=Spread.read(info["seconds"]) if measured else None,
        memory=info["memory"].whole(1) if measured else None,
        limit=info["limit"].whole(1) if "limit" in info else None,
        per_s=info["regions_per_s"].positive() if measured else None, unit="regions",
        yardstick=info["yardstick"].positive() if "yardstick" in info else None,
        encoder=encoder, context=context, mode=mode,
        region=info["region"].whole(1) if "region" in info else None,
        cold=info["warm"].value is False,
    )  # fmt: skip


def _forms(info: Field, path: Path) -> Iterator[Row]:
    axis = next((axis for axis in _AXES if axis in info), "")
    first = info["first"].text()
    spreads = {form: Spread.read(item) for form, item in info["seconds"].items()}
    if first not in spreads:
        raise info["first"].broken(f"one of the forms that were timed, {', '.join(spreads)}")
    common = Row(
        info["op"].text(), info["variant"].text(""), axis, info[axis].whole() if axis else 0, first,
        first, f"{path.name}, {info.place}", _shape(info),
        yardstick=info["yardstick"].positive() if "yardstick" in info else None,
    )  # fmt: skip
    unit, per_s = "", 0.0
    if "units_per_s" in info:
        unit = info["units_per_s"]["what"].text()
        per_s = info["units_per_s"]["value"].positive()

    def of_form(key: str, form: str) -> float | None:
        """A number of one form, from an object of forms."""
        return info[key][form].number(0) if key in info and form in info[key] else None

    def work(key: str, form: str) -> float | None:
        """The same, or one number of all the forms that are as exact as the first."""
        if key in info and not isinstance(info[key].value, dict):
            exact = [(of_form("error", name) or 0) < 1e-2 for name in (form, first)]
            return info[key].positive() if exact[0] == exact[1] else None
        return of_form(key, form)

    num_bytes = info["bytes"].positive() if "bytes" in info else None
    for form, seconds in spreads.items():
        memory = of_form("memory", form)
        yield replace(
            common, form=form, seconds=seconds,
            ratio=None if form == first else Spread.read(info["ratio"][form]),
            memory=None if memory is None else int(memory), error=of_form("error", form), unit=unit,
            per_s=per_s * spreads[first].median / seconds.median if unit else None,
            floor=work("floor", form), num_bytes=num_bytes, flops=work("flops", form),
        )  # fmt: skip
    lost = info["out_of_memory"]
    for form, limit in lost.items() if lost.value else ():
        yield replace(common, form=form, outcome="out of memory", limit=limit.whole(1))


# Scripts


def _from_scaling(record: Record, data: Field) -> None:
    for item in data["rows"]:
        row = {key: item if key in item else data for key in ("encoder", "context", "limit")}
        encoder, form = row["encoder"]["encoder"].text(), item["form"].text("ours")
        context = row["context"]["context"].text("none") if form == "ours" else "none"
        height, width = item["height"].whole(1), item["width"].whole(1)
        outcome = item["outcome"].text("measured")
        parts = [encoder, context, data["compression"].text()] if form == "ours" else [encoder]
        measured = outcome == "measured"
        seconds = item["seconds"].positive() if measured else None
        shown = Row(
            SCALING, ", ".join(parts), "pixels", height * width, form, "",
            f"{record.path.name}, {', '.join(parts)}, {form}, {height} x {width}",
            Shape(item["device"].text("cpu"), data["dtype"].text(""),
                  data["batch"].whole(1) if "batch" in data else None),
            outcome, seconds=None if seconds is None else Spread(seconds, seconds, seconds, 1),
            memory=item["above_model"].whole(1) if measured else None,
            limit=row["limit"]["limit"].whole(1) if "limit" in row["limit"] else None,
            per_s=item["regions_per_s"].positive() if measured else None, unit="regions",
            encoder=encoder, context=context, mode="inference",
        )  # fmt: skip
        record.rows.append(shown)


def _from_gradient(record: Record, data: Field) -> None:
    tokens, dim, depth = (data[key].whole(1) for key in ("tokens", "dim", "depth"))
    for item in data["rows"]:
        form, chunks = item["gradient"].text(), item["chunks"].whole(1)
        shown = Row(
            "gradient memory", f"{tokens:,} tokens, width {dim}, depth {depth}", "chunks", chunks,
            form, "", f"{record.path.name}, {form} {chunks}", Shape("cpu"),
            memory=item["rest"].whole(1),
        )  # fmt: skip
        record.rows.append(shown)


def _from_step(record: Record, data: Field) -> None:
    encoder, region = data["encoder"].text(), data["region"].whole(1)
    first, times, peaks = "without context", data["processor_seconds"], data["peaks"]
    forms = {"none": first, "context": "xl", "kept": "xl, nothing recomputed"}
    for key, form in forms.items():
        if key not in times and key not in peaks:
            continue
        seconds = Spread.of([t.positive() for t in times[key]]) if key in times else None
        both = key == "context" and seconds is not None
        shown = Row(
            "training step", f"{encoder}, regions of {region} px", "side", data["size"].whole(1),
            form, first, f"{record.path.name}, {form}",
            Shape("cpu", threads=data["threads"].whole(1) if "threads" in data else None),
            seconds=seconds,
            ratio=Spread.of([ratio.positive() for ratio in data["ratios"]]) if both else None,
            memory=peaks[key].whole(1) if key in peaks else None,
            encoder=encoder, context="none" if key == "none" else "xl", mode="training",
        )  # fmt: skip
        record.rows.append(shown)


def _from_errors(record: Record, data: Field) -> None:
    sizes = [item.whole(1) for item in data["shape"]]
    if len(sizes) != 4:
        raise data["shape"].broken("[batch, heads, tokens, head dim]")
    batch, heads, length, head_dim = sizes
    for item in data["rows"]:
        form, inputs = item["form"].text(), item["input"].text()
        ratio = None if form == "published" else Spread.of([item["time_ratio"].positive()])
        shown = Row(
            ERRORS, inputs, "length", length, form, "published",
            f"{record.path.name}, {inputs}, {form}",
            Shape("cpu", data["dtype"].text(""), batch, heads, head_dim), ratio=ratio,
            error=item["error"].number(0),
        )  # fmt: skip
        record.rows.append(shown)


def _from_task(record: Record, data: Field) -> None:
    task = data["task"].text()
    # Ablations share their rows: the command tells which one this is.
    if which := re.search(r"\btrain ablate (\w+)", data["command"].text("")):
        task = " on ".join([f"ablate {which[1]}", *task.split("-")[1:]])
    for name, item in data["rows"].items():
        more = item["more"].items() if item["more"].value else ()
        for at, result in (("", item), *more):
            key = next((key for key in _METRICS if key in result), None)
            if key is None:
                raise result.broken(f"an object with {' or '.join(_METRICS)}")
            shown = Score(
                task, item["title"].text(), at, _METRICS[key],
                result[key].numbers(), result["mean"].number(), result["half_width_95"].number(0),
                item["ceiling"].number() if "ceiling" in item else None,
                ", ".join(part for part in (record.path.name, name, at) if part),
            )  # fmt: skip
            record.scores.append(shown)


def _from_script(record: Record, data: Field) -> None:
    _version(data, record.path.name)
    for item in data["rows"]:
        form, size = item["form"].text(""), item["size"].value
        size = f"{size:,}" if isinstance(size, (int, float)) else item["size"].text("")
        low, high = (item[key].number() if key in item else None for key in ("p20", "p80"))
        shown = Entry(
            data["title"].text(), form, size, item["value"].number(), item["unit"].text(""),
            None if low == high else low, None if low == high else high, item["note"].text(""),
            ", ".join(part for part in (record.path.name, form, size) if part),
        )  # fmt: skip
        record.entries.append(shown)
