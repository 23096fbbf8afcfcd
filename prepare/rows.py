"""Rows of one's own data: which image, which class, which split."""

import argparse
import hashlib
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from metadata import BadInput
from prepare.fields import ALIASES, is_label
from prepare.sources import list_files
from prepare.stac import IMAGES, read_items
from prepare.tables import Row, printable, read_table

BLANKS = {"", "-", "?", "n/a", "nan", "null", "none"}  # NA is Namibia
LISTED = re.compile(r"\[.*\]|\{.*\}|\(['\"].*\)", re.S)  # as programs print several values
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
VALIDATION = ("val", "valid", "validation", "dev")  # the test split of a table that has no other


class Item(NamedTuple):
    """A row, and where it goes."""

    row: Row
    split: str  # train, test, or why it is left out

    def __str__(self) -> str:
        return self.row.where


def read_rows(args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Rows of the table, of STAC items, or of images alone, blanks left out; and their columns."""
    if not args.images.is_dir():
        raise BadInput(f"{args.images}: no such folder")
    if not args.table.is_dir():
        rows = read_table(args.table)
    elif next(args.table.rglob("*.json"), None) or next(args.table.rglob("*.geojson"), None):
        rows = read_items(args.table, args.asset)
    else:
        for table in [*args.table.glob("*.csv"), *args.table.glob("*.jsonl")]:
            raise BadInput(f"{args.table}: holds {table.name}; give that as TABLE, this as IMAGES")
        print(f"{args.table}: no table and no STAC items in it: images alone, without metadata")
        paths = list_files(args.table, *IMAGES, *map(str.upper, IMAGES))
        rows = [Row(str(path), {"file_name": os.path.abspath(path)}) for path in paths]
    kept, columns = [], list(dict.fromkeys(name for row in rows for name in row.values))
    for row in rows:
        values = {k: v for k, v in row.values.items() if not is_blank(v, is_label(k))}
        kept.append(row._replace(values=values))
    used = {name for row in kept for name in row.values}
    if not used:
        why = rows[0].problem if rows else "no STAC item"
        raise BadInput(f"{args.table}: no row can be used; {why or 'all are empty'}")
    return kept, [name for name in columns if name in used]


def is_blank(value: object, label: bool) -> bool:
    if value is None or isinstance(value, str):
        text = (value or "").strip().lower()
        return not text or (text in BLANKS and not label)  # a class may be called "none"
    try:
        return value == [] or not json.dumps(value, allow_nan=False)
    except ValueError:  # NaN is no JSON
        return True


def find_image(name: object, args: argparse.Namespace) -> tuple[Path, str]:
    """-> an image's file, and what it is called in the dataset; FileNotFoundError.

    Names are tried under IMAGES, then beside the table, in either Unicode form, with either slash.
    """
    name = name if isinstance(name, str) else ""
    forms = [name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)]
    inside = False
    for root in (args.images, args.table if args.table.is_dir() else args.table.parent):
        root = Path(os.path.abspath(root))
        for form in dict.fromkeys([*forms, name.replace("\\", "/")]):
            path = Path(os.path.normpath(root / form))
            if name and path.is_relative_to(root):
                inside = True
                if os.path.isfile(path):
                    return path, unicodedata.normalize("NFC", path.relative_to(root).as_posix())
    what = f"no such image under {args.images}" if inside else f"is no file under {args.images}"
    raise BadInput(f"{args.path_column} {printable(name)!r}: {what}")


def path_column(rows: list[Row], names: list[str], args: argparse.Namespace) -> str:
    """The first column whose values are images' files."""
    for name in names:
        for row in rows[:1000]:
            try:
                find_image(row.values.get(name), args)
                return name
            except (BadInput, OSError, ValueError):
                continue
    columns = f"the columns are {printable(', '.join(names), 300)}; --path-column says which"
    raise BadInput(f"no column names files under {args.images}; {columns}")


def column_called(name: str, option: str, names: list[str]) -> str:
    """The table's column of that name, or of the field that it becomes."""
    for column in names:
        if name in (column, ALIASES.get(column)):
            return column
    there = printable(", ".join(names), 300)
    raise BadInput(f"{option} {name}: no column {name!r}; there are {there}")


def check_labels(rows: list[Row], labels: dict[str, str]) -> None:
    """One class an image: a list of them, also as text, ends in one line."""
    for row in rows:
        for name in labels:
            value = row.values.get(name)
            text = value.strip() if isinstance(value, str) else ""
            if isinstance(value, (list, dict)) or LISTED.fullmatch(text):
                parts = ", ".join(map(str, value)) if not text else text[1:-1].replace("'", "")
                what = f"{name}: a list of classes ({printable(parts)})"
                raise BadInput(f"{what}; scores need one class an image ({row.where})")


def deal(rows: list[Row], args: argparse.Namespace) -> list[Item]:
    """Each row with its split: as its column says, else drawn, whole areas, towards the share."""
    told = [str(row.values.get(args.split_column, "")).strip().lower() for row in rows]
    sides = dict(SPLITS)
    if not {"test", "testing"} & set(told):
        sides |= dict.fromkeys(VALIDATION, "test")
    groups = {}
    for i, (row, said) in enumerate(zip(rows, told)):
        if not said:
            names = row.values.get(args.area), row.values.get(args.path_column)
            key = str(names[0] or names[1])
            rank = hashlib.sha256(f"{args.seed} {key}".encode("utf-8", "replace")).digest()
            groups.setdefault((rank, key), []).append(i)
    drawn, test = sum(map(len, groups.values())), set()
    wanted = args.test_share * drawn
    for _, group in sorted(groups.items()):
        if abs(len(test) + len(group) - wanted) < abs(len(test) - wanted):
            test.update(group)
    if groups and not test:
        test.update(min(groups.values(), key=len))
    if groups:
        share = f"{len(test):,} of {drawn:,} images ({len(test) / drawn:.0%})"
        print(f"no column {args.split_column}: {share} drawn for the test split, seed {args.seed}")
        if abs(len(test) - wanted) > 0.25 * wanted + 1:
            print(f"  {args.test_share:.0%} were asked for: the {len(groups)} areas are too large")
    items = []
    for i, (row, said) in enumerate(zip(rows, told)):
        drawn_side = "test" if i in test else "train"
        items.append(Item(row, sides.get(said, f"rows of split {said!r}") if said else drawn_side))
    for side in ("train", "test"):
        if not any(item.split == side for item in items):
            found = f"{args.split_column} says {', '.join(sorted(set(told)))}"
            why = "all images are of one area" if groups else found
            raise BadInput(f"no row for {side}: {why}")
    return items
