"""Rows of one's own data: which image, which class, which split."""

import argparse
import contextlib
import hashlib
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Iterable

from metadata import BadInput
from prepare.fields import ALIASES, is_label
from prepare.sources import list_files
from prepare.stac import read_items
from prepare.tables import IMAGES, Row, printable, read_table
from prepare.values import plain_class, several

BLANKS = {"-", "?", "n/a", "nan", "null", "none", "[]"}  # NA is Namibia


def is_blank(value: object, label: bool) -> bool:
    """Whether a table's cell is empty; a class may be called "none"."""
    text = str(value).strip().lower()
    if label and text == "none":
        return value is None
    return value is None or value != value or not text or text in BLANKS


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
    columns = dict.fromkeys(name for row in rows for name in row.values)
    for i, row in enumerate(rows):
        values = {k: v for k, v in row.values.items() if not is_blank(v, is_label(k))}
        rows[i] = row._replace(values=values)
    usable = [row for row in rows if row.values and not row.problem]
    if not usable:
        why = rows[0].problem if rows else "no STAC item"
        raise BadInput(f"{args.table}: no row can be used; {why or 'all are empty'}")
    filled = {name for row in usable for name in row.values}
    return rows, [name for name in columns if name in filled]


def find_image(name: object, args: argparse.Namespace) -> tuple[Path, str]:
    """-> an image's file, and what it is called in the dataset.

    Names are tried under IMAGES, then beside the table, in either Unicode form, with either slash.
    """
    text = name if isinstance(name, str) else ""
    forms = [text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))]
    for root in (args.images, args.table if args.table.is_dir() else args.table.parent):
        root = Path(os.path.abspath(root))
        for form in [*forms, text.replace("\\", "/")]:
            path = Path(os.path.normpath(root / form))
            if path.is_relative_to(root) and os.path.isfile(path):
                return path, unicodedata.normalize("NFC", path.relative_to(root).as_posix())
    what = f"no such file under {args.images} or beside the table"
    raise BadInput(f"{args.path_column} {printable(name)!r}: {what}")


def path_column(rows: list[Row], names: list[str], args: argparse.Namespace) -> str:
    """The one column whose values are images' files."""
    found = []
    for name in names:
        for row in rows[:1000]:
            with contextlib.suppress(BadInput):
                find_image(row.values.get(name), args)
                found.append(name)
                break
    if len(found) > 1:
        raise BadInput(f"{', '.join(found)} name files; --path-column says which are the images")
    if found:
        return found[0]
    columns = f"the columns are {printable(', '.join(names), 300)}; --path-column says which"
    raise BadInput(f"no column names files under {args.images}; {columns}")


def column_called(name: str, option: str, names: list[str]) -> str:
    """The table's column of that name, in capitals or not, or of the field that it becomes."""
    for column in sorted(names, key=name.__ne__):
        if name in (column, column.lower(), ALIASES.get(column)):
            return column
    raise BadInput(f"{option}: no column {name!r}; there are {printable(', '.join(names), 300)}")


def check_labels(rows: list[Row], labels: Iterable[str]) -> None:
    """One class an image; rows without one are counted."""
    rows = [row for row in rows if not row.problem]
    for name in labels:
        for row in rows:
            if several(row.values.get(name)):
                what = f"a list of classes ({printable(row.values[name])})"
                raise BadInput(f"{row}: {name}: {what}; scores need one class an image")
        blank = sum(name not in row.values for row in rows)
        if blank:
            print(f"{name}: {blank:,} of {len(rows):,} rows have no class; scores pass over them")


def area_of(row: Row, args: argparse.Namespace) -> str:
    """What must not be in both splits: its area, else its place, else the image itself."""
    place = [str(row.values[name]) for name in args.place if name in row.values]
    if place and args.area not in row.values:
        return " ".join(place)
    return str(plain_class(row.values.get(args.area, row.values.get(args.path_column)), str(row)))


def draw_areas(rows: list[Row], args: argparse.Namespace) -> set[str]:
    """Areas for the test split, drawn towards the share of images."""
    sizes, ranks = Counter(area_of(row, args) for row in rows), {}
    for area in sizes:
        text = f"{args.seed} {area}".encode("utf-8", "replace")
        ranks[area] = hashlib.sha256(text).digest()
    test, count, wanted = set(), 0, args.test_share * len(rows)
    for area in sorted(sizes, key=ranks.get):
        if abs(count + sizes[area] - wanted) < abs(count - wanted):
            test.add(area)
            count += sizes[area]
    test = test or {min(sizes, key=sizes.get)}
    count = sum(sizes[area] for area in test)
    share = f"{count:,} of {len(rows):,} images ({count / len(rows):.0%})"
    asked = f"{args.test_share:.0%} asked for, of {len(sizes):,} areas"
    print(f"no {args.split_column}: {share} drawn for the test split, seed {args.seed} ({asked})")
    return test


def deal(rows: list[Row], args: argparse.Namespace) -> list[Row]:
    """Each row with its split: as its column says, else drawn; "" where it has a problem."""
    said = [str(row.values.get(args.split_column, "")).strip().lower() for row in rows]
    test_names = {"test", "testing"} & set(said) or {"val", "valid", "validation", "dev"}
    undealt = [row for row, name in zip(rows, said) if not name and not row.problem]
    test_areas, dealt = draw_areas(undealt, args) if undealt else (), []
    for row, name in zip(rows, said):
        split = f"rows of split {name!r}"
        if name in test_names or (not name and area_of(row, args) in test_areas):
            split = "test"
        elif name in ("", "train", "training"):
            split = "train"
        dealt.append(row._replace(split="" if row.problem else split))
    for split in ("train", "test"):
        if not any(row.split == split for row in dealt):
            found = ", ".join(sorted(set(said)))
            why = f"{args.split_column} says {found}" if found else "all images are of one area"
            raise BadInput(f"no row for {split}: {why}")
    return dealt
