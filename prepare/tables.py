"""Tables: read from CSV or JSON, printed in columns."""

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Iterator, NamedTuple

from metadata import BadInput

WAYS = (
    'a table is CSV, JSON lines or a JSON array (pandas: to_json(orient="records"); '
    "GeoJSON: save it as CSV)"
)
LONGEST_CELL = 1 << 20  # characters: a coastline as text has 150,000
IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".jp2", ".webp", ".bmp", ".gif", ".ppm", ".pgm")


class Row(NamedTuple):
    """A row of a table."""

    where: str  # file and line
    values: dict
    problem: str = ""  # why it cannot be used
    split: str = ""  # train, test, or why it is left out

    def __str__(self) -> str:
        return self.where


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, line ends as \\n."""
    content = path.read_bytes().replace(b"\0", b"\xff")  # zeros: UTF-16 without its mark
    try:
        return re.sub("\r\n?", "\n", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInput(f'{path}, line {line}: not UTF-8; save it as "CSV UTF-8"') from None


def read_csv(path: Path) -> Iterator[Row]:
    """Comma, semicolon or tab, as the header has it; a first line "sep=;" says it, too."""
    csv.field_size_limit(LONGEST_CELL)
    lines = [line + "\n" for line in read_text(path).split("\n")]
    delimiter, skipped = max(",;\t", key=lines[0].count), 0
    if re.match("sep=.", lines[0], re.I):
        delimiter, skipped = lines[0][4], 1
    reader = csv.reader(lines[skipped:], delimiter=delimiter, strict=True, skipinitialspace=True)
    names, where = [], f"{path}, line {skipped + 1}"
    try:
        for cells in reader:
            if not names:
                names = [name.strip() for name in cells]
                for name in names:
                    if name and names.count(name) > 1:
                        raise BadInput(f"{where}: two columns are called {name!r}")
                    if name.lower().endswith(IMAGES):
                        raise BadInput(f"{where}: {name}, an image; wanted are names of columns")
            elif any(cells):
                for cell in cells:  # a stray quotation mark joins all rows up to the next one
                    lines_in_cell = len(cell.splitlines())
                    if lines_in_cell > 1 and any(ending in cell.lower() for ending in IMAGES):
                        what = f"a cell of {lines_in_cell} lines with names of images"
                        raise BadInput(f"{where}: {what}; is there a stray quotation mark?")
                if len(cells) != len(names):
                    raise BadInput(f"{where}: {len(cells)} cells for {len(names)} columns")
                yield Row(where, {name: cell for name, cell in zip(names, cells) if name})
            where = f"{path}, line {skipped + reader.line_num + 1}"
    except csv.Error as error:
        what = f"a quotation mark within a cell, or a cell of more than {LONGEST_CELL:,} characters"
        if "end of data" in str(error):
            what = "a quotation mark that is never closed"
        raise BadInput(f"{where}: {what}") from None


def load_json(text: str, where: str) -> object:
    """JSON without a key that comes twice, and without half characters, which cannot be written."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        names = Counter(name for name, _ in pairs)
        if len(names) < len(pairs):
            raise BadInput(f"{where}: {names.most_common(1)[0][0]!r} comes twice")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=unique)
        json.dumps(found, ensure_ascii=False).encode()
        return found
    except BadInput:
        raise
    except UnicodeEncodeError:
        raise BadInput(f"{where}: half a character (\\ud800 to \\udfff alone)") from None
    except (ValueError, RecursionError):
        raise BadInput(f"{where}: not JSON; {WAYS}") from None


def read_table(path: Path) -> list[Row]:
    """CSV, JSON lines or an array of JSON objects, whatever the file's name is."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; {WAYS}")
    text, rows = read_text(path), []
    if text.lstrip().startswith("["):
        for i, entry in enumerate(load_json(text, str(path)), 1):
            rows.append(Row(f"{path}, entry {i}", entry))
    elif text.lstrip().startswith("{"):
        for i, line in enumerate(text.split("\n"), 1):
            where = f"{path}, line {i}"
            if line.strip():
                rows.append(Row(where, load_json(line, where)))
        if len(rows) == 1:
            raise BadInput(f"{path}: one JSON object; {WAYS}")
    else:
        rows = list(read_csv(path))
    for row in rows:
        if not isinstance(row.values, dict):
            raise BadInput(f"{row}: not a JSON object")
    if not rows:
        raise BadInput(f"{path}: no rows")
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
