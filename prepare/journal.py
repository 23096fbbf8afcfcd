"""What is done of a preparation, and what of: loop.py writes a line for each item."""

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import BinaryIO, Callable

from metadata import BadInput

JOURNAL = "journal.jsonl"  # what the rows depend on, then a line for each item that is done
PREPARED = "prepared.json"  # stays in the dataset: the journal's first line


def depends_on(items: list, make: Callable, files: dict[str, str]) -> bytes:
    """All that the rows depend on, as the journal's first line: the options that `make` was given
    (a functools.partial), and a hash of the items and all else, by their repr."""
    options, rest = {}, hashlib.sha256(repr(files).encode())
    for name, value in getattr(make, "keywords", {}).items():
        if isinstance(value, argparse.Namespace):
            options |= {k: str(v) for k, v in vars(value).items() if k not in ("jobs", "folder")}
        else:
            rest.update(repr((name, value)).encode())
    for item in items:
        rest.update(repr(item).encode())
    return json.dumps({"options": options, "sha256": rest.hexdigest()}).encode() + b"\n"


def resume(journal: BinaryIO, source: bytes, folder: Path) -> int:
    """-> how many items are done; a line that a kill has torn is cut off."""
    journal.seek(0)
    lines = [line for line in journal if line.endswith(b"\n")]
    journal.truncate(sum(map(len, lines)))
    if not lines:
        journal.write(source)
    elif lines[0] != source:
        begun, what = json.loads(lines[0])["options"], "another table or other files"
        for name, value in json.loads(source)["options"].items():
            if begun.get(name) != value:
                what = f"{name} {begun.get(name)}, not {value}"
        raise BadInput(f"{folder}: begun with {what}; remove it to start anew")
    return max(0, len(lines) - 1)


def finish(folder: Path, source: bytes) -> str:
    """The journal -> metadata.jsonl of both splits and quarantine.jsonl; -> a report."""
    counts, rows, first = Counter(), {"train": [], "test": []}, ""
    with open(folder / JOURNAL) as journal, open(folder / "quarantine.jsonl", "w") as quarantine:
        next(journal)
        for entry in map(json.loads, journal):
            for split, line in entry.get("rows", ()):
                rows[split].append(line + "\n")
            if entry["problem"]:
                quarantine.write(json.dumps(entry) + "\n")
                counts["items in quarantine.jsonl"] += 1
            counts.update(f"left out: {why}" for why in entry.get("left_out", ()))
            first = first or entry["problem"]
    for split, lines in rows.items():
        if not lines:
            (folder / JOURNAL).unlink()  # the next start makes all anew
            raise BadInput(f"{folder}: no {split} image came of it; {first or 'nothing failed'}")
        (folder / split / "metadata.jsonl").write_text("".join(lines))
    (folder / PREPARED).write_bytes(source)
    report = [f"{len(lines):,} {split} images" for split, lines in rows.items()]
    return "\n".join(report + [f"{n:,} {what}" for what, n in counts.items()])
