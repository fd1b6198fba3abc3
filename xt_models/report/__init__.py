"""`xt report`: pages that people decide from, made from nothing but the JSON of the benches."""

from __future__ import annotations

from pathlib import Path

from .compare import compare_records
from .fields import RecordError
from .formats import read_folder, read_record
from .page import write_readme, write_report
from .records import keep_newest
from .tables import verdict_lines

__all__ = [
    "RecordError",
    "compare_records",
    "make_report",
    "read_folder",
    "read_record",
    "write_readme",
    "write_report",
]


def make_report(
    results: Path, out: Path, *, against: Path | None = None, readme: Path | None = None
) -> list[str]:
    """Makes the pages in `out` and returns what to tell of them.

    results: a JSON file of the benches, or a folder of them. against: an older JSON file; `results`
    must then be one file, and is judged against it row by row. readme: a file whose numbers between
    two marks are replaced. Raises RecordError for what cannot be read.
    """
    refused: list[str] = []
    if results.is_file():
        records = [read_record(results)]
    elif against is not None:
        raise RecordError(f"report: RESULTS must be one file to be judged, got {results}.")
    else:
        records, refused = read_folder(results)
        refused += keep_newest(records)
    old = None if against is None else read_record(against)
    files = write_report(records, out, refused, old)
    if readme is not None:
        write_readme(records, readme)
    told = [] if old is None else verdict_lines(old, records[0])
    told += [f"not shown: {reason}" for reason in refused]
    return [*told, f"wrote {', '.join(str(file) for file in files[:2])}"]
