"""Tables: read from CSV or JSON, printed in columns."""

import csv
import io
import json
from pathlib import Path
from typing import Iterator, NamedTuple

from metadata import BadInput

LONGEST_CELL = 1 << 20  # characters: a coastline as text has 150,000


class Row(NamedTuple):
    """A row of a table, as it was written."""

    where: str  # file and line
    values: dict
    problem: str = ""  # why it cannot be used

    def __str__(self) -> str:
        return self.where


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, else BadInput with the line."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
        bad = content.find(b"\0")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad < 0:
        return text
    line = content.count(b"\n", 0, bad) + 1
    raise BadInput(f'{path}, line {line}: not UTF-8; save the table as "CSV UTF-8"')


def read_csv(path: Path) -> Iterator[Row]:
    """Comma, semicolon or tab, as the header has it; a first line "sep=;" says it, too."""
    csv.field_size_limit(LONGEST_CELL)
    lines = list(io.StringIO(read_text(path), newline=""))
    skipped = 1 if lines and lines[0].lower().startswith("sep=") else 0
    header = lines[skipped] if len(lines) > skipped else ""
    delimiter = lines[0].strip()[4:] or "\t" if skipped else max(",;\t", key=header.count)
    reader = csv.reader(lines[skipped:], delimiter=delimiter, strict=True)
    names, cells = None, []
    while cells is not None:
        where = f"{path}, line {reader.line_num + skipped + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            what = "a quotation mark within a cell, or after one"
            if "end of data" in str(error):
                what = "a quotation mark that is never closed"
            if "limit" in str(error):
                what = f"a cell of more than {LONGEST_CELL:,} characters, or an open quotation mark"
            raise BadInput(f"{where}: {what}") from None
        if names is None:
            names = cells or []
            for name in names:
                if name and names.count(name) > 1:
                    raise BadInput(f"{where}: two columns are called {name!r}")
        elif cells:
            for cell in cells:  # a stray quotation mark makes a cell of all rows up to the next
                inner = cell.splitlines()[1:]
                if inner and all(x.count(delimiter) == len(names) - 1 for x in inner[:-1] or inner):
                    what = f"a cell of {len(inner) + 1} lines that look like rows"
                    raise BadInput(f"{where}: {what}; is there a stray quotation mark?")
            more = f"{where}: {len(cells)} values, more than the {len(names)} columns"
            values = {name: cell for name, cell in zip(names, cells) if name}
            yield Row(where, values, more if len(cells) > len(names) else "")


def read_object(text: str, where: str) -> dict:
    """A JSON object; a key that comes twice is refused."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise BadInput(f"{where}: {twice!r} comes twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except BadInput:
        raise
    except (ValueError, RecursionError):
        raise BadInput(f"{where}: not JSON; a table is CSV, JSON lines or a JSON array") from None
    if not isinstance(found, dict):
        raise BadInput(f"{where}: not a JSON object")
    return found


def read_table(path: Path) -> list[Row]:
    """CSV, JSON lines or an array of JSON objects, whatever the file's name is."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; a table is CSV, JSON lines or a STAC folder")
    text, rows = read_text(path), []
    if text.lstrip().startswith("["):
        for i, entry in enumerate(read_object(f'{{"rows": {text}}}', str(path))["rows"], 1):
            values, problem = entry, ""
            if not isinstance(entry, dict):
                values, problem = {}, f"{path}, entry {i}: not a JSON object"
            rows.append(Row(f"{path}, entry {i}", values, problem))
    elif text.lstrip().startswith("{"):
        for i, line in enumerate(text.split("\n"), 1):
            where, values, problem = f"{path}, line {i}", {}, ""
            try:
                values = read_object(line, where) if line.strip() else {}
            except BadInput as error:
                problem = str(error)
            if values or problem:
                rows.append(Row(where, values, problem))
    else:
        rows = list(read_csv(path))
    if not any(row.values for row in rows):
        raise BadInput(rows[0].problem if rows else f"{path}: no rows")
    return rows


def printable(value: object, longest: int = 60) -> str:
    """A value for the screen: on one line, without what would steer the terminal."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."


def in_columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as a table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return "\n".join(lines)
