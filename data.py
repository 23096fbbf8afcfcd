"""The one dataset format, how it is read, and what happens to a batch of images (Section 4.1-4.2, supplement A, B).

In this order: numbered randomness -> a split read into arrays -> fields -> loading images -> augmentation on the
device -> areas, places, varied records -> the embedded demo data -> preparing a dataset -> fMoW -> downstream
datasets -> one's own -> check and show.

    python data.py demo data/demo        # cut 64 px images with metadata and labels out of the maps in demo/
    python data.py fmow SOURCE DIR       # and eurosat, resisc45, ucmerced, so2sat, optimal31, fgsc23
    python data.py own TABLE IMAGES DIR  # any CSV, JSON lines or STAC items, and their images
    python data.py check DIR             # everything that may be wrong with a dataset
    python data.py show DIR              # pictures: samples with captions, distributions

A dataset is a folder with train/ and test/, each holding images and a metadata.jsonl (the Hugging Face
ImageFolder convention), one JSON object a line:

    {"file_name": "000001.jpg", "gsd": [3010.2, 3010.2], "timestamp": "2004-10", "location": [12.5, 41.9],
     "area": "a17", "label_climate": "Csa"}

file_name is relative to the split's folder. Metadata fields go by the names in metadata.FIELDS and may be
absent. `area` (optional) is shared by images of the same place. `label` or `label_<name>` (optional) are classes.
"""

import argparse
import cmath
import contextlib
import csv
import dataclasses
import errno
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import textwrap
import zipfile
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metadata import (
    DEFAULT_FIELDS, FIELDS, KINDS, VOCABULARY_SIZE, BadInput, Categories, Field, TableSchema, Tokenizer, canonical,
    caption, field_of_kind, format_value, infer_field, is_metadata, iso_timestamp, number_columns, parse_fields,
    parse_number, parse_numbers, parse_timestamp, table_row,
)  # fmt: skip

# -----------------------------------------------------------------------------------------------------
# Randomness as a function of what it is for: (seed, epoch, sample, view, slot) -> a number. No generator
# whose state would have to be saved, and nothing depends on workers, processes or batch size.


def hashed(*keys: int | np.ndarray) -> np.ndarray:
    """Integer keys, broadcast together -> 64 random bits (the finaliser of SplitMix64, once a key)."""
    bits = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            bits = bits + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """As `hashed`, but float64 in [0, 1)."""
    return (hashed(*keys) >> np.uint64(11)) * 2.0**-53


# -----------------------------------------------------------------------------------------------------
# A split, read into arrays: once, then kept beside the data and mapped, so that processes and workers share them


class Ragged:
    """n rows of different lengths in two arrays instead of n Python objects: nobody copies what all may share."""

    def __init__(self, values: np.ndarray, ends: np.ndarray):
        self.values, self.ends = values, ends  # row i is values[ends[i] : ends[i + 1]]

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int):
        return self.values[self.ends[i] : self.ends[i + 1]]


class Strings(Ragged):
    """n strings, as bytes."""

    def __getitem__(self, i: int) -> str:
        return super().__getitem__(i).tobytes().decode()


class Coder:
    """Collects categorical values, met one after another, into Categories."""

    def __init__(self, missing: int = 0):
        self.seen, self.codes = {}, array("i", [-1]) * missing

    def add(self, value: str | None) -> None:
        self.codes.append(-1 if value is None else self.seen.setdefault(value, len(self.seen)))

    def done(self) -> Categories:
        return Categories(list(self.seen), np.asarray(self.codes))


@dataclass
class Table:
    """The metadata of n records, field by field, not yet standardised."""

    tokens: Ragged  # the captions, start and end included; no rows when not asked for
    numbers: np.ndarray  # [n, F_num] raw table features, NaN where missing
    categories: list[Categories]  # of each categorical field


tokenizer = functools.cache(Tokenizer)


def tabulate(
    records: Iterable[dict], fields: tuple[Field, ...], captions: bool, orders: Iterable[list[Field]] | None = None
) -> Table:
    """Records -> their table, and their captions in tokens if asked for, each with its own order of fields if given."""
    tokens, ends, numbers = array("H"), array("q", [0]), array("d")
    coders = [Coder() for field in fields if field.kind == "category"]
    for record, order in zip(records, orders or itertools.repeat(fields)):
        if captions:
            tokens.extend(tokenizer()(caption(record, order)))
            ends.append(len(tokens))
        row, categories = table_row(record, fields)
        numbers.extend(row)
        for coder, value in zip(coders, categories):
            coder.add(value)
    columns = len(number_columns(fields))
    numbers = np.asarray(numbers).reshape(-1, columns) if columns else np.empty((len(coders[0].codes), 0))
    return Table(Ragged(np.asarray(tokens), np.asarray(ends)), numbers, [coder.done() for coder in coders])


@dataclass
class Split:
    """One split of a dataset: everything a row needs, as arrays."""

    folder: Path
    source: Path  # its metadata.jsonl or .csv
    names: Strings  # file names, relative to the folder
    lines: Strings  # each row as JSON: the lines of metadata.jsonl itself, or what became of metadata.csv
    labels: dict[str, Categories]
    table: Table

    def __len__(self) -> int:
        return len(self.names)

    def record(self, i: int) -> dict:
        """Row i, its names and blanks put in order."""
        line = self.lines[i].partition("\n")[0]  # blank lines may follow
        return canonical(json.loads(line.removeprefix("\ufeff")))  # a mark that some editors put before the first


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as a dict; of two values for one key, Python would silently take the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"a key comes twice among {[key for key, _ in pairs]}")
    return record


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")  # though Python reads NaN and Infinity


LONGEST_LINE = 2**20  # bytes; a record has some hundreds


def read_record(line: bytes, where: str) -> dict:
    """One line of metadata.jsonl -> its record. BadInput names the file and the line."""
    if len(line) > LONGEST_LINE:
        raise BadInput(f"{where}: a line of more than {LONGEST_LINE:,} bytes; one record a line")
    try:
        record = json.loads(line, object_pairs_hook=unique, parse_constant=refuse)
        if b"\\u" in line or not line.isascii():
            json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no text: UnicodeEncodeError
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadInput(f"{where}: not a JSON object")
    return record


def is_label(column: str) -> bool:
    return column == "label" or column.startswith("label_")


def checked(record: dict, where: str) -> dict:
    """A record that names its image, inside the folder, else BadInput."""
    name = record.get("file_name")
    if not isinstance(name, str) or not name:
        raise BadInput(f'{where}: no "file_name"; each line is {{"file_name": "image.jpg", ...}}')
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise BadInput(f"{where}: file_name {name!r} leaves the data folder")
    return canonical(record)


def read_rows(path: Path) -> Iterator[tuple[str, int, dict | BadInput]]:
    """JSON lines, or CSV with comma, semicolon or tab -> (file and line, where the line starts in bytes or -1, its
    record, or what is wrong with it)."""
    if path.suffix in (".csv", ".tsv"):
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count), strict=True)
            while True:
                try:
                    row = next(reader, None)
                    problem = BadInput(f"{path}, line {reader.line_num}: more values than columns")
                except csv.Error as error:
                    row, problem = {None: ""}, BadInput(f"{path}, line {reader.line_num}: not CSV ({error})")
                if row is None:
                    return
                row = problem if None in row else {k: v for k, v in row.items() if k and v is not None}
                yield f"{path}, line {reader.line_num}", -1, row
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            where, rest = f"{path}, line {number}", line
            while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):  # the end of a line that is too long
                rest = file.readline(LONGEST_LINE + 1)
                offset += len(rest)
            if line.strip():
                try:
                    row = read_record(line, where)
                except BadInput as error:
                    row = error
                yield where, offset, row
            offset += len(line)


def progress(things: Iterable, text: str, total: int | None = None, done: int = 0) -> Iterable:
    """The same things, counted on screen once it takes long."""
    from tqdm import tqdm

    return tqdm(things, text, total, initial=done, delay=3, mininterval=1)


def metadata_file(folder: Path) -> Path:
    """folder/metadata.jsonl, or .csv; BadInput when there is neither."""
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return folder / name
    raise BadInput(
        f"{folder / 'metadata.jsonl'}: no such file; a dataset is a folder with train/ and test/, each with a "
        "metadata.jsonl (or .csv); `python data.py own` makes one of any table and its images"
    )


def cache_folder(folder: Path) -> Path:
    """folder/.cache, or where that cannot be written one in the system's temporary folder."""
    cache = folder / ".cache"
    with contextlib.suppress(OSError):
        cache.mkdir(exist_ok=True)
    if not cache.is_dir() or not os.access(cache, os.W_OK):
        cache = Path(tempfile.gettempdir()) / f"satmip-{os.getuid()}"
        cache.mkdir(mode=0o700, exist_ok=True)
    return cache


def is_whole(cache: Path) -> bool:
    """Whether the file is there and has its end, where torch.save lists what it wrote."""
    return cache.is_file() and zipfile.is_zipfile(cache)


def read_split(folder: Path, fields: tuple[Field, ...], captions: bool = False) -> Split:
    """Read folder/metadata.jsonl or .csv. BadInput names what is wrong: the file, the line that cannot be read or
    lacks a file_name, the image that does not exist.

    What was read is kept under a name that holds what it depends on: the file's size and time, the fields, this code;
    and mapped into memory, copy-on-write, so that torch may wrap it."""
    path = metadata_file(folder)
    stat, ours = path.stat(), [Path(__file__).with_name(n) for n in ("data.py", "metadata.py")]
    code = [file.read_bytes() for file in ours]
    depends = repr((str(path.resolve()), stat.st_size, stat.st_mtime_ns, fields, captions, code))
    prefix, digest = (hashlib.sha256(text.encode()).hexdigest() for text in (str(path.resolve()), depends))
    prefix, root = f"{folder.name}-{prefix[:8]}", cache_folder(folder.parent)
    cache = root / f"{prefix}-{digest[:20]}"
    if not is_whole(cache):
        built = build_split(path, fields, captions)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=root) as unfinished:
            with open(f"{unfinished}/split", "wb") as file:  # opened here: a full disk is then an OSError
                torch.save(built, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, cache)  # another process may have been faster
        newest = max(file.stat().st_mtime_ns for file in (path, *ours))
        for old in root.glob(f"{prefix}-*"):  # of an earlier state of the file or the code, not of other fields
            with contextlib.suppress(OSError):  # another process may be removing it
                if old.stat().st_mtime_ns < newest:
                    old.unlink()
    kept = torch.load(cache, mmap=True, weights_only=True)
    name_ends, names, line_ends, lines, token_ends, tokens, numbers = (values.numpy() for values in kept["arrays"])
    lines = Strings(lines if len(lines) else np.memmap(path, np.uint8, "r"), line_ends)
    columns = [Categories(values, codes.numpy()) for values, codes in kept["columns"]]
    labels, categories = dict(zip(kept["labels"], columns)), columns[len(kept["labels"]) :]
    table = Table(Ragged(tokens, token_ends), numbers, categories)
    return Split(folder, path, Strings(names, name_ends), lines, labels, table)


def build_split(path: Path, fields: tuple[Field, ...], captions: bool) -> dict:
    """Read the metadata file from its beginning to its end -> what read_split keeps of it."""
    names, ends, lines, starts, labels = bytearray(), array("q", [0]), bytearray(), array("q"), {}
    with open(path, "rb") as file:
        total = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))

    def records() -> Iterator[dict]:
        for where, offset, row in progress(read_rows(path), f"reading {path}", total):
            if isinstance(row, BadInput):
                raise row
            record = checked(row, where)
            name = record["file_name"]
            if not os.path.isfile(os.path.join(path.parent, name)):
                raise BadInput(f"{path.parent / name}: no such image ({where})")
            for key in filter(is_label, record):
                labels.setdefault(key, Coder(missing=len(starts)))
            for key, coder in labels.items():
                value = record.get(key)
                coder.add(None if value is None else str(value))
            names.extend(name.encode())
            ends.append(len(names))
            starts.append(len(lines) if offset < 0 else offset)
            lines.extend(json.dumps(row).encode() if offset < 0 else b"")
            yield record

    table = tabulate(records(), fields, captions)
    if not starts:
        raise BadInput(f"{path}: no rows")
    starts.append(len(lines) or path.stat().st_size)
    arrays = (
        ends, np.frombuffer(names, np.uint8), starts, np.frombuffer(lines, np.uint8),
        table.tokens.ends, table.tokens.values, table.numbers,
    )  # fmt: skip
    columns = [coder.done() for coder in labels.values()] + table.categories
    return {
        "arrays": [torch.from_numpy(np.asarray(values)) for values in arrays], "labels": list(labels),
        "columns": [(column.values, torch.from_numpy(column.codes)) for column in columns],
    }  # fmt: skip


def test_folder(folder: Path) -> Path:
    """folder/test, or folder/validation where a dataset has no other."""
    return next((folder / n for n in ("test", "validation") if (folder / n).is_dir()), folder / "test")


def read_dataset(folder: str | Path, fields: tuple[Field, ...], captions: bool = False) -> tuple[Split, Split]:
    """-> (train, test); what can be wrong is said at read_split"""
    folder = Path(folder)
    return read_split(folder / "train", fields, captions), read_split(test_folder(folder), fields, captions)


def read_fields(folder: Path) -> dict[str, Field]:
    """The fields that folder/fields.json defines, none without that file: {"name": {"kind": "number", "unit": "m"}}."""
    path, fields = folder / "fields.json", {}
    if path.is_file():
        try:
            for name, options in json.loads(path.read_text()).items():
                field = fields[name] = Field(name, **{**options, "parts": tuple(options.get("parts", ()))})
                if field.kind not in ("number", "timestamp", "category"):
                    raise ValueError(f"{name}: kind {field.kind!r} is not number, timestamp or category")
                field.style % field.low, field.style % field.high  # TypeError, ValueError: no numbers, no style of one
        except (ValueError, TypeError, AttributeError) as error:
            what = "not an object of fields, each with its kind, and of unit, style, parts, low, high what it needs"
            raise BadInput(f"{path}: {what} ({error})") from None
    return fields


SAMPLE = 100_000  # rows from which fields are inferred


def infer_fields(rows: Iterable[dict], kinds: dict[str, str]) -> tuple[dict[str, Field], str]:
    """Fields of all columns that are metadata, by the first SAMPLE rows -> (fields by name, a table of them to print).

    kinds: what the user says a column is, which is not questioned."""
    columns, count = {}, 0
    for count, row in enumerate(itertools.islice(rows, SAMPLE), 1):
        for name, value in row.items():
            if is_metadata(name) and value is not None:
                columns.setdefault(name, []).append(value)
    unknown = [name for name, kind in kinds.items() if name not in columns and kind != "skip"]
    if unknown:
        raise BadInput(f"--types: no column {unknown[0]!r}; there are {', '.join(columns)}")
    found = {
        name: (field_of_kind(name, kinds[name], values), "as you say") if name in kinds else infer_field(name, values)
        for name, values in columns.items()
    }
    lines = [("column", "kind", "filled", "example", "remark")]
    for name, (field, remark) in found.items():
        kind = "-" if field is None else f"list of {len(field.parts)}" if field.parts else field.kind
        example = next((format_value(v, field) for v in columns[name] if field and format_value(v, field)), "")
        lines.append((name, kind, f"{len(columns[name]) / count:.0%}", example[:40], remark))
    return {name: field for name, (field, _) in found.items() if field}, columns_of_text(lines)


def columns_of_text(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def save_fields(folder: Path, fields: dict[str, Field]) -> None:
    """Write folder/fields.json, of each field what differs from a plain one."""
    plain = {f.name: f.default for f in dataclasses.fields(Field)}
    chosen = {
        n: {k: v for k, v in dataclasses.asdict(f).items() if k != "name" and v != plain[k]} for n, f in fields.items()
    }
    (folder / "fields.json").write_text(json.dumps(chosen, indent=2) + "\n")


def choose_fields(folder: Path, names: str) -> tuple[Field, ...]:
    """What --fields means for a dataset. No names: the paper's three, or all that the dataset's fields.json lists. A
    column that nobody defined is inferred from the train split's values, and what it is taken for is printed."""
    own = read_fields(folder)
    names = names or ("all" if own else DEFAULT_FIELDS)
    asked = {name.strip() for name in names.split(",")} - FIELDS.keys() - own.keys() - {"all", ""}
    if asked:
        rows = (r for _, _, r in read_rows(metadata_file(folder / "train")) if isinstance(r, dict))
        inferred, table = infer_fields(map(canonical, rows), {})
        print(f"columns of {folder / 'train'}, by their values (a fields.json beside it can say otherwise):\n{table}")
        own = {name: field for name, field in inferred.items() if name not in FIELDS} | own
    return parse_fields(names, own)


def columns_of(table: Table, fields: tuple[Field, ...]) -> Iterator[tuple[Field, np.ndarray | Categories]]:
    """-> each field with its categories, or with its numbers [columns, n], NaN where missing."""
    numbers, categories = iter(table.numbers.T), iter(table.categories)
    for field in fields:
        count = len(number_columns((field,)))
        yield field, np.stack([next(numbers) for _ in range(count)]) if count else next(categories)


def missing_rates(table: Table, fields: tuple[Field, ...]) -> dict[str, float]:
    """Share of the rows in which each field is missing altogether."""
    return {
        field.name: float((column.codes < 0 if field.kind == "category" else np.isnan(column).all(0)).mean())
        for field, column in columns_of(table, fields)
    }


def class_ids(name: str, *splits: Split) -> tuple[list[str], list[Tensor]]:
    """-> the classes of that label in any split, sorted (0, 1, ... if they are integers), and ids [n] of each
    split, -1 where a row has no label."""
    nothing = lambda split: Categories([], np.full(len(split), -1))  # noqa: E731
    columns = [split.labels.get(name) or nothing(split) for split in splits]
    classes = sorted({value for column in columns for value in column.values})
    if all(value.isdecimal() for value in classes):
        classes.sort(key=int)
    code = {value: i for i, value in enumerate(classes)}
    return classes, [torch.tensor([*map(code.get, c.values), -1])[torch.from_numpy(c.codes).long()] for c in columns]


class Metadata:
    """The metadata of n rows as the encoder takes it: encoded once, then only indexed."""

    def __init__(self, table: Table, encoder: str, schema: TableSchema | list[int] | None, context: int | None = None):
        """encoder: "text", "table" or "none". schema: of the table, or the token ids that training captions hold.
        context: most tokens of a caption.

        Some 95 of the vocabulary's 49,408 tokens are ever met. Only they have a row in the encoder's embedding, and
        all others one together: a row that no caption reaches would cost its share of every step for nothing."""
        self.encoder, self.tokens, self.longest = encoder, table.tokens, 0
        if encoder == "text":
            self.row = np.full(VOCABULARY_SIZE, len(schema))
            self.row[schema] = np.arange(len(schema))
            longest = int(np.diff(table.tokens.ends).max())
            self.longest = min(longest, context or longest)
        elif encoder == "table":
            self.arrays = tuple(map(torch.from_numpy, schema.encode(table.numbers, table.categories)))

    def batch(self, rows: Tensor, step: int = 0) -> tuple[Tensor, ...]:
        """Rows [B] -> what the metadata encoder's forward takes: (numbers [B, F_num], categories [B, F_cat]), or
        (embedding rows [B, L], lengths [B]) with L the longest caption of the batch; () without an encoder. A caption
        that is too long loses its last words, never its end token."""
        if self.encoder == "none":
            return ()
        if self.encoder == "table":
            return tuple(values[rows] for values in self.arrays)
        starts, ends = self.tokens.ends[rows.numpy()], self.tokens.ends[rows.numpy() + 1]
        lengths = np.minimum(ends - starts, self.longest)
        at = np.arange(lengths.max())
        inside = at < lengths[:, None]
        ids = self.tokens.values[np.where(inside, starts[:, None] + at, 0)]
        ids[np.arange(len(ids)), lengths - 1] = self.tokens.values[ends - 1]
        return torch.from_numpy(np.where(inside, self.row[ids], 0)), torch.from_numpy(lengths)


# -----------------------------------------------------------------------------------------------------
# Loading images: workers decode, nothing else


MAX_PIXELS = 500_000_000  # satellite images are large (fMoW has 20,000 px sides); still no bomb
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would only warn, up to twice its value
ATTEMPTS = 10  # at a row in place of one that cannot be read
MODES = ("RGB", "RGBA", "L", "LA", "P", "CMYK", "1")  # 8 bits a channel: what convert("RGB") reads right


def open_image(file: Path | io.BytesIO, path: Path, size: int | None = None) -> Image.Image:
    """An image, decoded; a JPEG without the detail that a reduction to `size` would drop. BadInput names the path."""
    try:
        image = Image.open(file)
        named = Image.registered_extensions().get(path.suffix.lower(), image.format)
        if image.format != named and image.format != "MPO":  # a camera's JPEG with a preview behind it
            raise BadInput(f"{path}: holds {image.format}, its name says {named}; rename it")
        if image.width * image.height > MAX_PIXELS:
            raise BadInput(f"{path}: {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        stored = [tile[3] if isinstance(tile[3], str) else str(tile[3] and tile[3][0]) for tile in image.tile]
        if image.mode not in MODES or any(";16" in mode for mode in stored):  # Pillow would cut 16 bits to 8 in silence
            raise BadInput(
                f"{path}: mode {image.mode}, more than 8 bits a channel; "
                "`python data.py own TABLE IMAGES DIR --range LOW HIGH` makes 8 bits of them"
            )
        if size:
            image.draft("RGB", (size, size))
        image.load()
        return image
    except BadInput:
        raise
    except Exception as error:  # Pillow raises what its decoders raise: OSError, SyntaxError, struct.error, ...
        raise BadInput(f"{path}: cannot be read as an image ({error})") from None


def load_image(path: Path, size: int) -> np.ndarray:
    """-> uint8 [size, size, 3]; an image of another size is resized, aspect not kept. BadInput names the path."""
    with open_image(path, path, size) as image:
        image = image.convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image)


class Loaded(NamedTuple):
    """A batch as the workers hand it over."""

    images: Tensor | None  # uint8 [B, size, size, 3], with temporal pairs [2 B, ...]: those of their partners behind
    rows: Tensor  # [B]
    metadata: tuple[Tensor, ...]  # what the encoder takes, () where none was asked for


class Images(torch.utils.data.Dataset):
    """Asked for a step, gives its batch, and {file name: why it cannot be read}.

    With `replace`, a row that cannot be read gives way to another, drawn by its number alone, so that every run on
    these files sees the same; its own number then stands in `rows`. Without, the images are None.
    """

    def __init__(self, split: Split, size: int, order, metadata: Metadata | None, partners, replace: bool):
        self.folder, self.names, self.size, self.replace = split.folder, split.names, size, replace
        self.order, self.metadata, self.partners = order, metadata, partners

    def __getitem__(self, step: int) -> tuple[Loaded, dict[str, str]]:
        rows, faults = self.order[step].clone(), {}
        B = len(rows)
        images = np.empty(((2 if self.partners else 1) * B, self.size, self.size, 3), np.uint8)
        for i, wanted in enumerate(rows.tolist()):
            for attempt in range(ATTEMPTS if self.replace else 1):
                row = int(hashed(wanted, attempt) % np.uint64(len(self.names))) if attempt else wanted
                try:
                    images[i], rows[i] = load_image(self.folder / self.names[row], self.size), row
                    break
                except BadInput as error:  # passed on: an exception would arrive wrapped in the worker's traceback
                    faults[self.names[row]] = str(error)
            else:
                return Loaded(None, rows, ()), faults
        for i, row in enumerate(self.partners(rows, step).tolist() if self.partners else ()):
            try:
                images[B + i] = load_image(self.folder / self.names[row], self.size)
            except BadInput as error:  # then the image is its own partner
                images[B + i], faults[self.names[row]] = images[i], str(error)
        metadata = self.metadata.batch(rows, step) if self.metadata else ()
        return Loaded(torch.from_numpy(images), rows, metadata), faults


class Order:
    """Rows [B] of each step, for one process of `world`: a function of the seed and the step.

    Every epoch is a new permutation of all n rows, cut into global batches of G; what is left over is dropped.
    """

    def __init__(self, n: int, batch: int, seed: int, rank: int = 0, world: int = 1):
        self.n, self.batch, self.seed, self.rank, self.world, self.epoch = n, batch, seed, rank, world, None

    def __getitem__(self, step: int) -> Tensor:
        per_epoch, local = self.n // self.batch, self.batch // self.world
        epoch, first = step // per_epoch, step % per_epoch * self.batch + self.rank * local
        if epoch != self.epoch:
            self.epoch = epoch
            self.permutation = np.argsort(hashed(self.seed, epoch, np.arange(self.n)), kind="stable")
        return torch.from_numpy(self.permutation[first : first + local])


def outlast_signals(worker: int) -> None:
    """A scheduler and Ctrl-C signal the workers too, but the main process still needs them, to end well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # a minute to live, whoever wants the end


def processes(workers: int) -> dict:
    """DataLoader's options for that many. Forked, they share what this process has in memory; Python 3.14 would by
    default send each a copy."""
    return {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}


def load(
    split: Split, size: int, order: Order | list[Tensor], workers: int, faults: dict[str, str] | None = None,
    steps: range | None = None, metadata: Metadata | None = None, partners: Callable | None = None,
) -> Iterator[Loaded]:  # fmt: skip
    """Batches of the given steps (default: all of a list), prepared ahead by worker processes. An image that cannot
    be read is a BadInput that names it; but given `faults`, it is noted there and another row takes its place."""
    loader = torch.utils.data.DataLoader(
        Images(split, size, order, metadata, partners, faults is not None), sampler=steps or range(len(order)),
        batch_size=None, pin_memory=torch.cuda.is_available(), worker_init_fn=outlast_signals, **processes(workers),
    )  # fmt: skip
    for batch, found in loader:
        if batch.images is None:
            others = f" (nor can {len(found) - 1} in its place)" if len(found) > 1 else ""
            raise BadInput(next(iter(found.values())) + others)
        if found:
            faults |= found
        yield batch


def in_order(n: int, batch: int) -> list[Tensor]:
    """All rows once, in order, in batches: the order of evaluation."""
    return list(torch.arange(n).split(batch))


def channel_statistics(split: Split, size: int, workers: int, most: int = 10_000) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, in 0..1, over the split (supplement A); over `most` evenly spaced images
    of a larger one, which settles three digits."""
    rows = torch.arange(0, len(split), max(1, len(split) // most))
    total, squares, pixels = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for images, *_ in load(split, size, list(rows.split(256)), workers, faults={}):
        flat = images.view(-1, 3).double() / 255
        total, squares, pixels = total + flat.sum(0), squares + flat.square().sum(0), pixels + len(flat)
    mean = total / pixels
    return mean.tolist(), (squares / pixels - mean**2).clamp(min=1e-6).sqrt().tolist()


# -----------------------------------------------------------------------------------------------------
# Augmentation, on the device (supplement B): a batch as a whole on a GPU, view by view on a CPU. The parameters and
# colours are the same code; only cropping and blurring have two ways.


@dataclass(frozen=True)
class Policy:
    """Ranges and probabilities of supplement B.

    NOTE[PAPER] jitter strengths and blur sigma are not given: SLIP's (0.4, 0.4, 0.4, 0.1) and [0.1, 2].
    """

    scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that the crop keeps
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    turn: float = 0.75  # by 90, 180 or 270 degrees
    jitter: float = 0.8
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    gray: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)


POLICIES = {
    "strong": Policy(),
    "crop": Policy((0.5, 1.0), horizontal_flip=0, vertical_flip=0, turn=0, jitter=0, gray=0, blur=0),  # Table 6
}
ORDERS = np.array(list(itertools.permutations(range(4))))  # of brightness, contrast, saturation, hue
TRIES = 10  # at a crop that fits, as torchvision's RandomResizedCrop


class Draws(NamedTuple):
    """The random parameters of B views, as numpy arrays: drawn on the host, so that the device never waits."""

    box: np.ndarray  # [B, 4] top, left, height, width in pixels
    flip: np.ndarray  # [B, 2] rows, columns
    transpose: np.ndarray  # [B] after the flips; together with them this makes every quarter turn
    factors: np.ndarray  # [B, 4] brightness, contrast, saturation (1 = as is), hue (0 = as is)
    order: np.ndarray  # [B, 4] which of the four comes first, second, ...
    gray: np.ndarray  # [B]
    sigma: np.ndarray  # [B] in pixels, 0 = not blurred


def draw(policy: Policy, side: int, seed: int, epoch: int, rows: np.ndarray, view: int) -> Draws:
    """Parameters for one view of each row [B] of side x side images, the distributions being torchvision's."""
    u = uniform(seed, epoch, rows[:, None], view, np.arange(2 * TRIES + 15)[None])
    tries, u = u[:, : 2 * TRIES].reshape(-1, 2, TRIES), u[:, 2 * TRIES :]
    area = side**2 * (policy.scale[0] + tries[:, 0] * (policy.scale[1] - policy.scale[0]))
    low, high = np.log(policy.ratio)
    ratio = np.exp(low + tries[:, 1] * (high - low))
    height, width = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))  # [B, TRIES]
    fits = (height <= side) & (width <= side)
    first = np.where(fits.any(1), fits.argmax(1), -1)[:, None]
    # When none fits, torchvision takes the whole image (of a square one, whose own ratio is inside the range).
    height, width = (np.where(first[:, 0] < 0, side, np.take_along_axis(x, first, 1)[:, 0]) for x in (height, width))
    top, left = np.floor(u[:, 0] * (side - height + 1)), np.floor(u[:, 1] * (side - width + 1))
    turns = np.where(u[:, 4] < policy.turn, 1 + np.floor(3 * u[:, 5]), 0)  # quarter turns, counter-clockwise
    rows_flipped = (u[:, 2] < policy.vertical_flip) ^ np.isin(turns, (2, 3))
    columns_flipped = (u[:, 3] < policy.horizontal_flip) ^ np.isin(turns, (1, 2))
    jittered = (u[:, 6] < policy.jitter)[:, None]
    factors = np.array([1, 1, 1, 0]) + jittered * np.array(policy.strengths) * (2 * u[:, 7:11] - 1)
    sigma = np.where(u[:, 13] < policy.blur, policy.sigma[0] + u[:, 14] * (policy.sigma[1] - policy.sigma[0]), 0)
    return Draws(
        np.stack([top, left, height, width], 1), np.stack([rows_flipped, columns_flipped], 1), turns % 2 == 1,
        factors, ORDERS[np.floor(24 * u[:, 11]).astype(int)], u[:, 12] < policy.gray, sigma,
    )  # fmt: skip


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32)).to(device, non_blocking=True)


def crop_each(images: Tensor, draws: Draws, size: int) -> Tensor:
    """uint8 [B, h, w, 3] -> float32 [B, 3, size, size] in 0..1: crop, flips, quarter turn. For a CPU: four times as
    fast there as crop_all, and the same but for a rounding to 8 bits."""
    views = torch.empty(len(images), 3, size, size)
    parameters = zip(images, draws.box.astype(int).tolist(), draws.flip.tolist(), draws.transpose.tolist())
    for i, (image, (top, left, height, width), flips, transposed) in enumerate(parameters):
        x = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
        x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)[0]
        x = x.flip([axis for axis, flipped in zip((1, 2), flips) if flipped]) if any(flips) else x
        views[i] = x.transpose(1, 2) if transposed else x
    return views.div_(255)


def resampling(start: Tensor, length: Tensor, flip: Tensor, source: int, target: int) -> Tensor:
    """[B] each -> [B, target, source]: row i holds what every source pixel gives to output pixel i.

    A triangle as wide as the reduction and never narrower than a pixel: Pillow's and torchvision's antialiased
    bilinear resize of the crop alone, whose pixels outside have weight 0.
    """
    scale = (length / target)[:, None, None]
    out = torch.arange(target, device=start.device).expand(len(start), -1)
    out = torch.where(flip[:, None], target - 1 - out, out)[:, :, None]
    pixel = torch.arange(source, device=start.device) - start[:, None, None]  # [B, 1, source]
    weight = (1 - ((out + 0.5) * scale - (pixel + 0.5)).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel >= 0) & (pixel < length[:, None, None]))
    return weight / weight.sum(2, keepdim=True)


def crop_all(images: Tensor, draws: Draws, size: int) -> Tensor:
    """As crop_each, for a GPU: one product of matrices down, one across, the flips in them."""
    B, h, w, _ = images.shape
    top, left, height, width = on_device(draws.box, images.device).unbind(1)
    flip = on_device(draws.flip, images.device) > 0
    x = resampling(top, height, flip[:, 0], h, size) @ images.reshape(B, h, w * 3).float().div_(255)
    x = x.view(B, size, w, 3).permute(0, 3, 1, 2).reshape(B, 3 * size, w)
    x = (x @ resampling(left, width, flip[:, 1], w, size).transpose(1, 2)).view(B, 3, size, size)
    return torch.where(on_device(draws.transpose, x.device)[:, None, None, None] > 0, x.transpose(2, 3), x)


LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision


def luma(x: Tensor) -> Tensor:
    """[B, 3, h, w] -> [B, 1, h, w]"""
    return LUMA[0] * x[:, :1] + LUMA[1] * x[:, 1:2] + LUMA[2] * x[:, 2:]


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """RGB [B, 3, h, w] in 0..1, shift [B] as a share of the colour circle: -> RGB with the hue turned.

    Without torch.where, which takes a CPU ten times as long as other operations."""
    r, g, b = x.unbind(1)
    low, high = torch.minimum(g, b), torch.maximum(g, b)
    value, middle = torch.maximum(r, high), torch.minimum(r, high)
    chroma = value - torch.minimum(middle, low)
    bluer, redless = (b - g).sign().clamp(min=0), (high - r).sign().clamp(min=0)
    # The hue in sixths of the circle: red is 0, green 2, blue 4. Mirrored where blue exceeds green, counted from green
    # or blue where red is not the largest.
    start = -6 * bluer
    start = start + redless * (-2 - 2 * start)
    hue = ((middle - low) / chroma.clamp(min=1e-9) + start).abs() + 6 * shift[:, None, None]
    hue = hue - 6 * (hue / 6).floor()
    away = 3 - (hue - 3).abs(), (hue - 2).abs(), (hue - 4).abs()  # from red, green, blue: full up to 1, gone from 2 on
    return torch.stack([value - chroma * (distance - 1).clamp(0, 1) for distance in away], 1)


def on_some(x: Tensor, which: np.ndarray, change: Callable[[Tensor, Tensor], Tensor], by: np.ndarray) -> Tensor:
    """Samples x [B, 3, h, w], those of them in `which` [B] changed by their parameters `by` [B]."""
    at = torch.from_numpy(np.flatnonzero(which)).to(x.device, non_blocking=True)
    by = on_device(by[which], x.device)
    if len(at) == len(x):
        return change(x, by)
    return x.index_copy(0, at, change(x[at], by)) if len(at) else x


def recolour(x: Tensor, draws: Draws) -> Tensor:
    """float32 [B, 3, h, w] in 0..1, changed in place: colour jitter in each sample's own order, then grayscale."""

    # Brightness, contrast, saturation and grayscale are all  x <- p x + q luma(x) + r mean(luma(x)).
    def blend(x: Tensor, p: np.ndarray, q: np.ndarray, r: np.ndarray) -> Tensor:
        weights = on_device(np.stack([p, q, r]), x.device)[:, :, None, None, None]
        if not q.any() and not r.any():
            return x.mul_(weights[0]).clamp_(0, 1)
        gray = luma(x)
        mixed = weights[1] * gray + weights[2] * gray.mean((2, 3), keepdim=True)
        return x.mul_(weights[0]).add_(mixed).clamp_(0, 1)

    if (draws.factors != [1, 1, 1, 0]).any():
        for operation, f in zip(draws.order.T, np.take_along_axis(draws.factors, draws.order, 1).T):  # [B] each
            if (operation < 3).any():
                p = np.where(operation == 3, 1, f)
                x = blend(x, p, (1 - p) * (operation == 2), (1 - p) * (operation == 1))
            x = on_some(x, (operation == 3) & (f != 0), shift_hue, f)
    return blend(x, ~draws.gray, draws.gray, 0 * draws.gray) if draws.gray.any() else x


def blur_along(x: Tensor, sigma: Tensor, axis: int, reach: int) -> Tensor:
    """x [B, c, side, side] blurred along axis 2 or 3, sigma [B] in pixels, by adding up shifted copies; the borders are
    mirrored, as in torchvision's gaussian_blur.

    NOTE[PAPER] kernel size not given: SimCLR's tenth of the side, made odd (23 at 224 px), so a reach of side // 20."""
    distance = torch.arange(-reach, reach + 1, device=x.device) / sigma[:, None]
    distance = distance.masked_fill(distance.abs() > 5, math.inf)  # a weight below 4e-6; so a CPU may reach less far
    weights = torch.softmax(-0.5 * distance.square(), 1).T[..., None, None, None]
    side, borders = x.shape[axis], [0, 0, reach, reach] if axis == 2 else [reach, reach, 0, 0]
    x = torch.nn.functional.pad(x, borders, mode="reflect")
    blurred = weights[0] * x.narrow(axis, 0, side)
    for k in range(1, len(weights)):
        blurred.addcmul_(x.narrow(axis, k, side), weights[k])
    return blurred


def blur_each(x: Tensor, sigma: Tensor) -> Tensor:
    """x [B, 3, side, side], sigma [B] -> blurred. For a CPU."""
    reach = min(x.shape[2] // 20, math.ceil(5 * sigma.max()))
    return blur_along(blur_along(x, sigma, 2, reach), sigma, 3, reach)


def blur_all(x: Tensor, sigma: Tensor) -> Tensor:
    """As blur_each, for a GPU: products with the matrix that blurs columns, which is the unit matrix blurred."""
    B, side = len(x), x.shape[2]
    weights = blur_along(torch.eye(side, device=x.device).expand(B, 1, side, side), sigma, 2, side // 20)
    return weights @ x @ weights.transpose(2, 3)


def augment(images: Tensor, draws: Draws, size: int, each: bool | None = None) -> Tensor:
    """uint8 [B, h, w, 3] -> float32 [B, 3, size, size] in 0..1: crop, flips and quarter turn, colour jitter,
    grayscale, blur, each sample with its own parameters.

    each: the way that suits a CPU, the default there: by pieces that stay in the cache, large views one by one, so
    that only what was drawn for them is done."""
    each = images.device.type == "cpu" if each is None else each
    piece = max(1, 100_000 // size**2) if each else len(images)
    if len(images) > piece:
        pieces = [slice(i, i + piece) for i in range(0, len(images), piece)]
        return torch.cat([augment(images[p], Draws(*(d[p] for d in draws)), size, each) for p in pieces])
    x = recolour((crop_each if each else crop_all)(images, draws, size), draws)
    return on_some(x, draws.sigma > 0, blur_each if each else blur_all, draws.sigma)


def plain(images: Tensor) -> Tensor:
    """uint8 [B, h, w, 3] -> float32 [B, 3, h, w] in 0..1, nothing random: what evaluation sees."""
    return images.permute(0, 3, 1, 2).float() / 255


def standardise(x: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Per-channel standardisation of x [..., 3, h, w], in place, with the training statistics (supplement A)."""
    mean, std = (on_device(np.array(v), x.device)[:, None, None] for v in (mean, std))
    return x.sub_(mean).div_(std)


# -----------------------------------------------------------------------------------------------------
# What the place and the date of an image, and its view, say of others (Ayush et al., 2021; and beyond the paper)


PARTNER, VARIATION = 3, 4  # what a random number of a row is for; 0 to 2 are its views


def areas_and_dates(folder: Path) -> Table:
    """Of each training row its area and its date, as two categories, and its place [n, 2], NaN where missing."""
    columns = Field("area", "category"), Field("timestamp", "category"), FIELDS["location"]
    return read_split(folder / "train", columns).table


class Partners:
    """Temporal positives (TP): for each row another date of its area, each alike likely; itself when there is none.

    NOTE[PAPER] Ayush et al. write that the image itself is among the candidates; their code draws another if it can.
    """

    def __init__(self, areas: np.ndarray, dates: np.ndarray, seed: int, per_epoch: int):
        """areas, dates: codes [n], -1 where unknown; rows of one date in one area are no partners."""
        self.seed, self.per_epoch = seed, per_epoch
        areas, dates = (np.where(x < 0, x.max() + 1 + np.arange(len(x)), x) for x in (areas, dates))  # unknown: its own
        self.rows = np.lexsort((np.arange(len(areas)), dates, areas))  # an area's rows side by side, date by date
        self.place = np.argsort(self.rows)
        areas, dates = areas[self.rows], dates[self.rows]
        new = np.r_[True, areas[1:] != areas[:-1]]
        self.area = self.bounds(new)
        self.date = self.bounds(new | np.r_[True, dates[1:] != dates[:-1]])
        self.some = int((np.diff(self.area, axis=0) > np.diff(self.date, axis=0)).sum())  # rows that have partners

    @staticmethod
    def bounds(new: np.ndarray) -> np.ndarray:
        """Where a group begins [n] -> the first and one past the last of each one's group [2, n]."""
        starts, group = np.append(np.flatnonzero(new), len(new)), np.cumsum(new) - 1
        return np.stack([starts[group], starts[group + 1]])

    def __call__(self, rows: Tensor, step: int) -> Tensor:
        """rows [B] -> their partners' [B] in this epoch."""
        at = self.place[rows.numpy()]
        (first, last), (same, other) = self.area[:, at], self.date[:, at]
        count = last - first - (other - same)
        drawn = uniform(self.seed, step // self.per_epoch, rows.numpy(), PARTNER)
        drawn = first + np.floor(drawn * count).astype(int)
        drawn = np.where(drawn < same, drawn, drawn + other - same)  # past those of its own date
        return torch.from_numpy(np.where(count, self.rows[np.where(count, drawn, at)], rows.numpy()))


def nearest_centre(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """points [n, 2], centres [C, 2] -> the nearest one's number [n], -1 for a point that is not known."""
    parts = np.array_split(points, 1 + len(points) // 10_000)
    found = np.concatenate([np.square(part[:, None] - centres).sum(2).argmin(1) for part in parts])
    return np.where(np.isnan(points).any(1), -1, found)


def cluster_places(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """k-means of points [n, 2] in degrees, as in Ayush et al., begun by k-means++ -> centres [min(k, different), 2]."""
    points = np.unique(points[~np.isnan(points).any(1)], axis=0)
    if not len(points):
        return points
    rng, centres = np.random.default_rng(seed), points[:1]
    while len(centres) < min(k, len(points)):
        distance = np.square(points - centres[nearest_centre(points, centres)]).sum(1)
        centres = np.vstack([centres, points[rng.choice(len(points), p=distance / distance.sum())]])
    for _ in range(100):
        group = nearest_centre(points, centres)
        sums = np.stack([np.bincount(group, column, len(centres)) for column in points.T], 1)
        count = np.bincount(group, minlength=len(centres))[:, None]
        before, centres = centres, np.where(count, sums / np.maximum(count, 1), centres)
        if np.array_equal(before, centres):
            break
    return centres


def area_places(table: Table) -> np.ndarray:
    """Of `areas_and_dates`, each row's place [n, 2]: its area's first one that is known, so that an area has one place;
    its own without an area."""
    codes, points = table.categories[0].codes, table.numbers
    codes = np.where(codes < 0, codes.max(initial=-1) + 1 + np.arange(len(codes)), codes)
    of_area = np.full((codes.max() + 1, 2), np.nan)
    known = np.flatnonzero(~np.isnan(points).any(1))[::-1]  # the first is written last
    of_area[codes[known]] = points[known]
    return of_area[codes]


SCALES = ("gsd", "multispectral_gsd", "pixel_size")
AZIMUTHS = ("target_azimuth_angle", "sun_azimuth_angle")  # degrees clockwise from up


def follow_view(
    record: dict, fields: tuple[Field, ...], box: np.ndarray, flip: np.ndarray, transpose: bool, side: int
) -> dict:
    """The record of a view instead of its image's (--consistent-metadata): scales follow the crop, azimuths the flips
    and turns. box, flip, transpose: one sample's Draws; side: of the image in px."""
    record, turned = dict(record), -1 if transpose else 1
    scale = np.array([box[3], box[2]])[::turned] / side  # of x and y
    for field in fields:
        numbers = parse_numbers(record.get(field.name), field) if field.name in SCALES + AZIMUTHS else None
        if numbers and field.name in AZIMUTHS:
            angle = 180 - numbers[0] if flip[0] else numbers[0]
            angle = -angle if flip[1] else angle
            record[field.name] = (270 - angle if transpose else angle) % 360
        elif numbers and len(numbers) == 2:
            record[field.name] = (numbers[::turned] * scale).tolist()
        elif numbers:
            record[field.name] = numbers[0] * float(scale.mean())
    return record


@dataclass(frozen=True)
class Variation:
    """How a training record is varied before it is read as always."""

    consistent: Policy | None = None  # scales and azimuths follow the first view, drawn by this policy
    dropout: float = 0.0  # each field is missing with this probability
    shuffle: bool = False  # a caption names its fields in any order


class VariedMetadata(Metadata):
    """Metadata of training rows, varied anew in each epoch: a function of seed, epoch and row."""

    def __init__(
        self, split: Split, fields: tuple[Field, ...], encoder: str, schema, variation: Variation, seed: int,
        side: int, per_epoch: int,
    ):  # fmt: skip
        super().__init__(split.table, encoder, schema)
        self.longest += 2 * len(fields)  # a comma may become a token of its own, an angle gain two digits
        self.split, self.fields, self.schema, self.variation = split, fields, schema, variation
        self.seed, self.side, self.per_epoch = seed, side, per_epoch

    def batch(self, rows: Tensor, step: int = 0) -> tuple[Tensor, ...]:
        vary, epoch, F = self.variation, step // self.per_epoch, len(self.fields)
        records = [self.split.record(row) for row in rows.tolist()]
        if vary.consistent:
            draws = draw(vary.consistent, self.side, self.seed, epoch, rows.numpy(), 0)
            geometry = zip(records, draws.box, draws.flip, draws.transpose)
            records = [follow_view(record, self.fields, *drawn, self.side) for record, *drawn in geometry]
        chance = uniform(self.seed, epoch, rows.numpy()[:, None], VARIATION, np.arange(2 * F))
        order = chance[:, F:].argsort(1) if vary.shuffle else np.arange(F)[None].repeat(len(rows), 0)
        kept = [[self.fields[j] for j in js if chance[i, j] >= vary.dropout] for i, js in enumerate(order)]
        records = [{f.name: r[f.name] for f in fields if f.name in r} for r, fields in zip(records, kept)]
        table = tabulate(records, self.fields, self.encoder == "text", kept if vary.shuffle else None)
        return Metadata(table, self.encoder, self.schema, self.longest).batch(torch.arange(len(rows)))


# -----------------------------------------------------------------------------------------------------
# The embedded data: real places, months and scales out of NASA's maps (demo/README.md)

MAPS = Path(__file__).with_name("demo")
MONTHS = ("01", "03", "05", "07", "08", "10")
FINE = "10"  # the one month whose map is fine: 2.7 km a pixel, the others have 19.5 km
EARTH_RADIUS, DEGREE = 6371.0, 111.195  # km; km in a degree of latitude
CLIMATES = (
    "Af Am As Aw BSh BSk BWh BWk Cfa Cfb Cfc Csa Csb Csc Cwa Cwb Cwc "
    "Dfa Dfb Dfc Dfd Dsa Dsb Dsc Dsd Dwa Dwb Dwc Dwd EF ET Ocean"
).split()
LAND_COVERS = (
    "water;evergreen needleleaf forest;evergreen broadleaf forest;deciduous needleleaf forest;"
    "deciduous broadleaf forest;mixed forest;closed shrubland;open shrubland;woody savanna;savanna;grassland;"
    "permanent wetland;cropland;urban;cropland/natural mosaic;snow and ice;barren"
).split(";")
PIXELS = 64


class DemoAreas(torch.utils.data.Dataset):
    """Candidate places, numbered: asked for the i-th hundred, gives their crops as (split, record, JPEG bytes).

    What keeps the task honest (each trap is measured in demo/README.md):
      - whole 10-degree blocks are held out, and no training crop shows a pixel of a held-out block;
      - every crop is averaged from its map's native pixels, never magnified, so blur does not tell the scale;
      - only October exists below 19.5 km: a fine area has October alone, a coarse one has three months drawn
        from the six, at scales drawn alike for all. Scale therefore does tell October among fine crops.
    """

    def __init__(self, seed: int):
        self.seed = seed
        with ThreadPoolExecutor() as pool:
            read = lambda name: np.asarray(Image.open(MAPS / name))  # noqa: E731
            names = [f"bluemarble-2004-{m}.jpg" for m in MONTHS] + ["climate-koppen.png", "landcover-2019-igbp.png"]
            *maps, self.climate, self.land_cover = pool.map(read, names)
        self.maps = dict(zip(MONTHS, maps))

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, hundred: int) -> list[tuple[str, dict, bytes]]:
        return [crop for area in range(100 * hundred, 100 * hundred + 100) for crop in self.crops(area)]

    def held_out(self, longitude: np.ndarray, latitude: np.ndarray) -> np.ndarray:
        """Whether a place lies in a test block: one 10-degree block in six."""
        column, row = np.floor((longitude % 360) / 10), np.floor((latitude + 90) / 10)
        return uniform(self.seed, 1, column, row) < 1 / 6

    def crops(self, area: int) -> Iterator[tuple[str, dict, bytes]]:
        u = uniform(self.seed, 2, area, np.arange(12))
        longitude, latitude = 360 * u[0] - 180, math.degrees(math.asin(1.9 * u[1] - 0.95))  # up to 72 degrees
        fine = u[2] < 0.8
        low, high = (3.0, 12.0) if fine else (20.0, 26.0)
        gsd = low * (high / low) ** u[3]  # km a pixel
        outline = local_grid(longitude, latitude, gsd, np.linspace(-PIXELS / 2, PIXELS / 2, 10))  # cheap; most end here
        split = "test" if self.held_out(longitude, latitude) else "train"
        ocean = lookup(self.climate, outline) == len(CLIMATES)
        if ocean.mean() > 0.4 or (split == "train" and self.held_out(*outline).any()):
            return
        grid = local_grid(longitude, latitude, gsd, np.arange(PIXELS) - (PIXELS - 1) / 2)
        if split == "train" and self.held_out(*grid).any():  # a corner of a block, between the outline's points
            return
        place = [round(longitude, 6), round(latitude, 6)]
        record = {"gsd": [round(1000 * gsd, 4)] * 2, "location": place, "area": f"a{area}"}
        inside = tuple(axis[2::4, 2::4] for axis in grid)
        climate, cover = lookup(self.climate, inside), lookup(self.land_cover, inside).ravel()
        climate = climate[(climate > 0) & (climate < len(CLIMATES))] - 1  # of the land
        for key, values, names in (("climate", climate, CLIMATES), ("land_cover", cover, LAND_COVERS)):
            count = np.bincount(values, minlength=1)
            if count.max() > 0.5 * len(values):  # else the crop shows several classes, none of which is "the" label
                record[f"label_{key}"] = names[count.argmax()]
        for month in [FINE] if fine else sorted(np.array(MONTHS)[np.argsort(u[4:10])[:3]]):
            inferred = {"timestamp_inferred": True} if month == FINE else {}
            buffer = io.BytesIO()
            Image.fromarray(cut(self.maps[month], grid, gsd)).save(buffer, "JPEG", quality=95)
            yield split, {"timestamp": f"2004-{month}", **inferred, **record}, buffer.getvalue()


def local_grid(longitude: float, latitude: float, gsd: float, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes [k, k] of an azimuthal-equidistant grid around a place; steps [k] in pixels of gsd."""
    x, y = np.meshgrid(steps * gsd, -steps * gsd)
    distance = np.hypot(x, y) + 1e-9
    c, phi = distance / EARTH_RADIUS, math.radians(latitude)
    sine, cosine = np.sin(c), np.cos(c)
    away = np.arctan2(x * sine, distance * math.cos(phi) * cosine - y * math.sin(phi) * sine)
    north = np.arcsin(cosine * math.sin(phi) + y / distance * sine * math.cos(phi))
    return longitude + np.degrees(away), np.degrees(north)


def lookup(world: np.ndarray, grid: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Class of a plate-carree map at each point of a grid."""
    rows, columns = world.shape
    column = np.floor((grid[0] + 180) / 360 * columns).astype(int) % columns
    return world[np.clip(np.floor((90 - grid[1]) / 180 * rows).astype(int), 0, rows - 1), column]


def cut(world: np.ndarray, grid: tuple[np.ndarray, np.ndarray], gsd: float) -> np.ndarray:
    """uint8 [64, 64, 3]: the mean of the map over each pixel's footprint, exact for fractions of map pixels.

    The footprint is taken as a rectangle along the map's axes, gsd high and gsd / cos(latitude) wide. Its sum is a
    difference of the map's integral at its corners; the integral is linear between map pixels.
    """
    rows, columns, _ = world.shape
    half = gsd / DEGREE / 2
    wide = half / np.cos(np.radians(grid[1]))
    left, right = ((grid[0] + side * wide + 180) / 360 * columns for side in (-1, 1))
    top, bottom = (np.clip((90 - grid[1] - side * half) / 180 * rows, 0, rows) for side in (1, -1))
    x0, y0 = math.floor(left.min()), math.floor(top.min())
    width, height = math.ceil(right.max()) - x0, math.ceil(bottom.max()) - y0
    patch = world[y0 : y0 + height].take(np.arange(x0, x0 + width), axis=1, mode="wrap").transpose(2, 0, 1)
    integral = np.zeros((3, height + 1, width + 1))
    integral[:, 1:, 1:] = patch.cumsum(2, dtype=np.int32).cumsum(1, dtype=np.int32)
    x = np.concatenate([right, right, left, left])  # four corners, below one another
    y = np.concatenate([bottom, top, bottom, top])
    corners = np.stack([2 * (x - x0) / width - 1, 2 * (y - y0) / height - 1], -1)  # grid_sample's -1 .. 1
    integral, corners = torch.from_numpy(integral)[None], torch.from_numpy(corners)[None]
    at = torch.nn.functional.grid_sample(integral, corners, align_corners=True)
    a, b, c, d = at[0].numpy().reshape(3, 4, PIXELS, PIXELS).transpose(1, 2, 3, 0)
    return np.rint((a - b - c + d) / ((bottom - top) * (right - left))[..., None]).clip(0, 255).astype(np.uint8)


def prepare_demo(folder: Path, train: int = 20_000, test: int = 4_000, seed: int = 0) -> None:
    """Cut the embedded data into `folder`. Written beside it and moved there when complete: never half a dataset."""
    if folder.exists():
        raise BadInput(f"{folder}: exists; remove it first, or choose another folder")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    areas = torch.utils.data.DataLoader(
        DemoAreas(seed), batch_size=None, collate_fn=lambda crops: crops, **processes(len(os.sched_getaffinity(0)))
    )
    wanted, lines = {"train": train, "test": test}, {"train": [], "test": []}

    def numbered() -> Iterator[tuple[str, int, dict, bytes]]:
        for split, record, jpeg in itertools.chain.from_iterable(areas):
            number = len(lines[split])
            if number < wanted[split]:
                yield split, number, record, jpeg
            elif all(len(lines[s]) == wanted[s] for s in wanted):
                return

    for split in wanted:
        (unfinished / split).mkdir(parents=True)
    for split, number, record, jpeg in progress(numbered(), f"cutting images into {folder}", train + test):
        record = {"file_name": f"{number:06d}.jpg", **record}
        (unfinished / split / record["file_name"]).write_bytes(jpeg)
        lines[split].append(json.dumps(record) + "\n")
    for split in wanted:
        (unfinished / split / "metadata.jsonl").write_text("".join(lines[split]))
    shutil.copy(MAPS / "README.md", unfinished / "CREDITS.md")
    unfinished.rename(folder)


# -----------------------------------------------------------------------------------------------------
# Preparing a dataset: any number of items over all cores, resumable after a kill, nothing lost to a bad file


class Sample(NamedTuple):
    """One image of a prepared dataset."""

    split: str
    record: dict  # its line of metadata.jsonl
    image: bytes  # its file


class Item(NamedTuple):
    """A piece of a source."""

    key: str  # unique, and its place in the order
    make: Callable[[], Iterable[Sample | str]]  # samples, and reasons why something was left out


JOURNAL = "journal.jsonl"  # a line for each item done: what it became


class Preparing(torch.utils.data.IterableDataset):
    """Each worker walks all items and makes its share of those that are not done: a stream (an archive) is read by
    every worker, which costs less than handing its contents from process to process."""

    def __init__(self, items: Callable[[], Iterable[Item]], done: set[str], folder: Path):
        self.items, self.done, self.folder = items, done, folder

    def __iter__(self) -> Iterator[str]:
        worker = torch.utils.data.get_worker_info()
        try:
            for i, item in enumerate(self.items()):
                if i % worker.num_workers == worker.id and item.key not in self.done:
                    yield self.work(item)
        except BadInput as error:  # the source itself, such as a torn archive; as a line, not as a worker's traceback
            yield json.dumps({"stop": str(error)})

    def work(self, item: Item) -> str:
        """Write the item's images -> its line of the journal."""
        entry = {"key": item.key, "rows": [], "left_out": [], "bad": None}
        try:
            for made in list(item.make()):  # all of it, before anything is written
                if isinstance(made, str):
                    entry["left_out"].append(made)
                else:
                    path = self.folder / made.split / made.record["file_name"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(made.image)
                    entry["rows"].append([made.split, json.dumps(made.record, allow_nan=False)])
        except Exception as error:  # a source has faults that nobody has thought of: each is named, none stops the rest
            why = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            entry = {"stop": why} if full else entry | {"rows": [], "bad": why}
        return json.dumps(entry)


def prepare(
    items: Callable[[], Iterable[Item]], total: int, folder: Path, options: dict, jobs: int, fields: dict[str, Field]
) -> str:  # fmt: skip
    """Make all items into a dataset -> a report. `options` are those that the result depends on.

    Works in folder.unfinished; a kill at any moment costs the images in hand, and the next start goes on. The result
    does not depend on kills, nor on the number of jobs."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    if (folder / JOURNAL).exists():  # killed after the last step but one
        (folder / JOURNAL).unlink()
        return f"{folder} had been finished"
    if folder.exists():
        raise BadInput(f"{folder}: exists; remove it first, or choose another folder")
    unfinished.mkdir(parents=True, exist_ok=True)
    journal, done, whole = unfinished / JOURNAL, set(), 0
    journal.touch()
    with open(journal, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # torn by a kill
                break
            entry, whole = json.loads(line), whole + len(line)
            if "key" in entry:  # what could not be read is tried again: it may have been the disk, or half a copy
                done.update([entry["key"]] if entry["bad"] is None else [])
            elif entry != options:
                raise BadInput(f"{unfinished}: begun with other options ({entry}); remove it to start anew")
    os.truncate(journal, whole)
    loader = torch.utils.data.DataLoader(Preparing(items, done, unfinished), batch_size=None, **processes(jobs))
    with open(journal, "a") as file:
        if not whole:
            file.write(json.dumps(options) + "\n")
        try:
            for line in progress(loader, f"preparing {folder}", total, len(done)):
                if line.startswith('{"stop"'):
                    raise BadInput(f"{json.loads(line)['stop']}; what is done is kept, start again to go on")
                file.write(line + "\n")
                file.flush()
        except RuntimeError as error:  # of DataLoader, when the system has killed a worker
            raise BadInput(f"a process ended ({error}); what is done is kept, fewer --jobs need less memory") from None
    counts = write_metadata(unfinished)
    if fields:
        save_fields(unfinished, fields)
    if not counts["train"]:
        why = (unfinished / "quarantine.jsonl").read_text().split("\n")[0]
        raise BadInput(f"{folder}: no training image came of it; the first that was refused: {why or 'there was none'}")
    unfinished.rename(folder)
    (folder / JOURNAL).unlink()
    left_out = ", ".join(f"{n:,} {why}" for why, n in counts.items() if why not in ("train", "test", "bad") and n)
    return f"left out: {left_out or 'nothing'}; unreadable, see quarantine.jsonl: {counts['bad']:,}"


def write_metadata(folder: Path) -> Counter:
    """The journal, in the order of its keys -> train/ and test/metadata.jsonl and quarantine.jsonl; -> counts."""
    places, counts = {}, Counter()
    with contextlib.ExitStack() as stack:
        names = {"train": "train/metadata.jsonl", "test": "test/metadata.jsonl", "bad": "quarantine.jsonl"}
        for split in ("train", "test"):
            (folder / split).mkdir(exist_ok=True)
        out = {key: stack.enter_context(open(folder / name, "w")) for key, name in names.items()}
        file = stack.enter_context(open(folder / JOURNAL, "rb"))
        offset = len(file.readline())
        for line in file:
            places[json.loads(line)["key"]] = offset  # of one tried again the last line
            offset += len(line)
        for key, offset in sorted(places.items()):
            file.seek(offset)
            entry = json.loads(file.readline())
            bad = [["bad", json.dumps({"item": key, "problem": entry["bad"]})]] * (entry["bad"] is not None)
            for kind, line in entry["rows"] + bad:
                out[kind].write(line + "\n")
                counts[kind] += 1
            counts.update(entry["left_out"])
    return counts


def eight_bits(values: np.ndarray, white: float) -> Image.Image:
    """[h, w, 3], 0 and below becoming black, `white` and above white."""
    return Image.fromarray(np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str) -> bytes:
    """kind: "JPEG" at quality 95, or "PNG"."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def members(path: Path, suffix: str | tuple[str, ...]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Files with that end in a folder or a tar archive -> (name inside it, how to read it before going on)."""
    if path.is_dir():
        walked = set()
        for folder, folders, files in os.walk(path, followlinks=True):
            if os.path.realpath(folder) in walked:  # a link to where it comes from
                folders.clear()
                continue
            walked.add(os.path.realpath(folder))
            folders.sort()
            for name in sorted(file for file in files if file.endswith(suffix)):
                full = Path(folder, name)
                yield str(full.relative_to(path)), full.read_bytes
    else:
        try:
            with tarfile.open(path, "r|*") as archive:
                for member in archive:
                    if member.isfile() and member.name.endswith(suffix):
                        yield member.name.removeprefix("./"), archive.extractfile(member).read
        except (tarfile.TarError, EOFError, OSError) as error:
            raise BadInput(f"{path}: cannot be read as a tar archive ({error})") from None


# -----------------------------------------------------------------------------------------------------
# fMoW-RGB (supplement A)

CONTEXT = ((0.5, 0.15), (0.4, 0.2), (0.3, 0.3), (0.2, 0.5), (0.1, 1.0), (-math.inf, 2.0))
FMOW_KEYS = {  # as the JSON calls them; gsd, multispectral_gsd, pixel_size and location depend on the crop
    "timestamp": "timestamp", "utm_zone": "utm", "country_code": "country_code", "cloud_cover": "cloud_cover",
    "scan_direction": "scan_direction", "wavelengths": "approximate_wavelengths",
    "target_azimuth_angle": "target_azimuth_dbl", "sun_azimuth_angle": "sun_azimuth_dbl",
    "sun_elevation_angle": "sun_elevation_dbl", "off_nadir_angle": "off_nadir_angle_dbl",
    "sensor_platform": "sensor_platform_name",
}  # fmt: skip
# NOTE[PAPER] two codes are no countries: Kosovo's gets the code in use, the Caspian Sea lies in none.
COUNTRIES = {"KO-": "XKX", "CA-": None}
STEM = re.compile(r"(?:.*/)?(train|val)(?:_gt)?/(.+_rgb)\.(?:json|jpg)")  # leaves _msrgb out
Box = tuple[int, int, int, int]


def context_crop(box: Box, columns: int, rows: int) -> Box:
    """x, y, width, height of a box in an image -> left, top, right, bottom of its crop with context.

    The rule of fMoW's own baseline, which the published crops follow, with its slip: the width is compared with the
    image's number of rows and the height with its number of columns."""
    x, y, w, h = box
    more = lambda length, share: math.floor(length * next(m for r, m in CONTEXT if share >= r) / 2)  # noqa: E731
    wide, high = more(w, w / rows), more(h, h / columns)
    return max(0, x - wide), max(0, y - high), min(columns, x + w + wide), min(rows, y + h + high)


def boxes(meta: dict) -> list[dict]:
    """The bounding boxes of an image: some files hold a bare one instead of a list."""
    found = meta.get("bounding_boxes", [])
    return [found] if isinstance(found, dict) else found


def bounds(polygon: str) -> list[float]:
    """WKT polygon "POLYGON ((lon lat, ...))" -> west, south, east, north."""
    points = np.array(re.findall(r"([-+.\deE]+) ([-+.\deE]+)", polygon), float)
    return [*points.min(0), *points.max(0)]


def place_of(meta: dict) -> np.ndarray | None:
    """Ground-truth JSON -> [12]: the box of the area of interest (ID -1), its bounds, those of the image; NaN where
    unknown. None when there is no location at all, as in the JSON beside the images."""
    aoi = next((box for box in boxes(meta) if box.get("ID") == -1 and box.get("raw_location")), None)
    if aoi is None and not meta.get("raw_location"):
        return None
    nothing = [math.nan] * 4
    known = [*aoi["box"], *bounds(aoi["raw_location"])] if aoi else nothing * 2
    return np.array(known + (bounds(meta["raw_location"]) if meta.get("raw_location") else nothing), np.float64)


def centre_of(box: Box, columns: int, rows: int, place: np.ndarray | None) -> list[float] | None:
    """Longitude and latitude of a box's centre: that of the area-of-interest polygon when the box is its box, else
    from the bounds of the whole image."""
    if place is None:
        return None
    if np.abs(place[:4] - box).max() <= 2:
        west, south, east, north = place[4:8]
        return [(west + east) / 2, (south + north) / 2]
    west, south, east, north = place[8:]
    x, y = (box[0] + box[2] / 2) / columns, (box[1] + box[3] / 2) / rows
    return None if math.isnan(west) else [west + x * (east - west), north - y * (north - south)]


def fmow_record(meta: dict, sx: float, sy: float, centre: list[float] | None, rescale: str) -> dict:
    """Metadata of a crop that was made sx times smaller in x and sy times in y.

    NOTE[PAPER] supplement A changes gsd and location alone; the poster's own numbers show multispectral_gsd and
    pixel_size changed as well (41.1896 is 4.001 times the mean of its gsd): rescale "all", or "gsd" for the former."""
    meta = {k: v for k, v in meta.items() if not (isinstance(v, float) and not math.isfinite(v))}
    measures = ("gsd", "multi_resolution_dbl", "mean_pixel_width", "mean_pixel_height")
    gsd, wide, width, height = map(meta.get, measures)
    mx, my = (sx, sy) if rescale == "all" else (1, 1)
    record = {
        "gsd": [gsd * sx, gsd * sy] if gsd else None,
        "multispectral_gsd": wide * (mx + my) / 2 if wide else None,
        "pixel_size": [width * mx, height * my] if width and height else None,
        "location": centre,
        **{name: meta.get(key) for name, key in FMOW_KEYS.items()},
    }
    record["country_code"] = COUNTRIES.get(record["country_code"], record["country_code"])
    return {name: record[name] for name in FIELDS if record[name] is not None}


class Fmow:
    """fMoW-RGB as people have it: the official release (train/ and val/, location in groundtruth.tar.bz2), or the
    ready-cropped copy of the paper's first author (folders or {train,val}-{images,metadata}.tar.gz)."""

    def __init__(self, options: argparse.Namespace):
        self.source, self.options, self.places, self.sidecars = options.source, options, {}, None
        source, groundtruth = options.source, options.groundtruth
        archives = [source / f"{split}-{what}.tar.gz" for what in ("metadata", "images") for split in ("train", "val")]
        found = [source / n for n in ("groundtruth.tar.bz2", "groundtruth") if (source / n).exists()]
        if archives[2].is_file():
            missing = [str(archive) for archive in archives if not archive.is_file()]
            if missing:
                raise BadInput(f"{missing[0]}: no such file; an archive of images goes with one of metadata")
            read = (self.read(members(path, "_rgb.json"), str(path), self.slim) for path in archives[:2])
            self.sidecars = dict(itertools.chain.from_iterable(read))
            self.archives = archives[2:]
        else:
            folders = [source / split for split in ("train", "val") if (source / split).is_dir()]
            if len(folders) < 2:
                what = "no train/ and val/, no train-images.tar.gz, no rgb_metadata.csv; see the README"
                raise BadInput(f"{source}: {what}")
            stems = (f"{f.name}/{n}" for f in folders for n, _ in members(f, "_rgb.json"))
            self.stems = [stem.removesuffix(".json") for stem in progress(stems, f"listing {source}")]
        if groundtruth or found:
            path = groundtruth or found[0]
            self.places = dict(self.read(members(path, "_rgb.json"), str(path), place_of))
        elif not options.no_location and not self.located():
            raise BadInput(
                f"{source / 'groundtruth.tar.bz2'}: no such file; the JSON beside the images has no location. Give "
                "--groundtruth FILE (an archive or a folder), or go without by --no-location"
            )

    def read(self, files: Iterable, name: str, keep: Callable[[dict], object]) -> Iterator[tuple[str, object]]:
        """JSON files -> (stem such as train/zoo/zoo_1/zoo_1_0_rgb, what `keep` takes of each)."""
        for path, content in progress(files, f"reading {name}"):
            stem = STEM.fullmatch(path)
            try:
                kept = keep(json.loads(content())) if stem else None
            except (ValueError, KeyError, TypeError, IndexError):
                continue  # its image is quarantined, or has no place
            if kept is not None:
                yield f"{stem[1]}/{stem[2]}", kept

    def slim(self, meta: dict) -> dict:
        """Of a sidecar only what is used, since all of them are held in memory."""
        used = ("gsd", "multi_resolution_dbl", "mean_pixel_width", "mean_pixel_height", "img_width", "img_height",
                "bounding_boxes", "raw_location", *FMOW_KEYS.values())  # fmt: skip
        return {key: meta[key] for key in used if key in meta}

    def located(self) -> bool:
        """Whether the first sidecar has a location of its own."""
        stems = iter(self.stems if self.sidecars is None else self.sidecars)
        return any(place_of(self.sidecar(stem)) is not None for stem in itertools.islice(stems, 1))

    def sidecar(self, stem: str) -> dict:
        if self.sidecars is None:
            return json.loads((self.source / f"{stem}.json").read_bytes())
        if stem not in self.sidecars:
            raise BadInput(f"{stem}: no JSON of that name")
        return self.sidecars[stem]

    def found(self) -> tuple[Callable[[], Iterable[Item]], int]:
        if self.sidecars is None:
            return lambda: (Item(s, functools.partial(self.image, s)) for s in self.stems), len(self.stems)
        return self.archived, len(self.sidecars)

    def archived(self) -> Iterator[Item]:
        for archive in self.archives:
            for name, read in members(archive, "_rgb.jpg"):
                stem = STEM.fullmatch(name)
                key = f"{stem[1]}/{stem[2]}" if stem else name
                yield Item(key, functools.partial(self.image, key, read))

    def image(self, stem: str, read: Callable[[], bytes] | None = None) -> Iterator[Sample | str]:
        """One image -> a sample for each of its boxes."""
        split, *folders, name = stem.split("/")
        meta = self.sidecar(stem)
        content = read() if read else (self.source / f"{stem}.jpg").read_bytes()
        ready = len(folders) == 3  # class/class_area/class_box: already cropped, one box
        image = open_image(io.BytesIO(content), Path(f"{stem}.jpg"))
        columns, rows = (meta["img_width"], meta["img_height"]) if ready else image.size
        place = self.places.get("/".join([split, *folders[:2], name]))
        place = place_of(meta) if place is None else place
        for entry in boxes(meta):
            x, y, w, h = box = tuple(int(v) for v in entry["box"])
            if entry["ID"] == -1 or (ready and folders[2].rpartition("_")[2] != str(entry["ID"])):
                continue  # -1 is the area of interest once more, in ground-truth files
            if entry["category"] == "false_detection" or w <= 2 or h <= 2:
                yield "false detections" if entry["category"] == "false_detection" else "boxes of 2 px or less"
                continue
            left, top, right, bottom = context_crop(box, columns, rows)
            if self.options.crop == "box":
                left, top, right, bottom = max(0, x), max(0, y), min(columns, x + w), min(rows, y + h)
            if right <= left or bottom <= top:
                yield "boxes outside the image"
                continue
            size = self.options.size
            centre = None if self.options.no_location else centre_of(box, columns, rows, place)
            record = fmow_record(meta, (right - left) / size, (bottom - top) / size, centre, self.options.rescale)
            file_name = "/".join([*folders[:2], f"{entry['category']}_{entry['ID']}", f"{name}.jpg"])
            record = {"file_name": file_name, **record, "label": entry["category"], "area": folders[1]}
            crop = image.convert("RGB") if ready else image.crop((left, top, right, bottom)).convert("RGB")
            # The bilinear resize of the baseline's OpenCV: four neighbours, no smoothing before. Pillow cuts off where
            # OpenCV rounds: half a gray level of 255, which the standardisation takes away.
            if ready and crop.size == (size, size):
                crop.load()
                data = content
            else:
                extent, bilinear = (0, 0, *crop.size), Image.Resampling.BILINEAR
                data = encode(crop.transform((size, size), Image.Transform.EXTENT, extent, bilinear), "JPEG")
            yield Sample("train" if split == "train" else "test", record, data)


def wilds(source: Path) -> tuple[Callable[[], Iterable[Item]], int]:
    """WILDS-FMoW: rgb_metadata.csv and images/."""
    print("WILDS-FMoW: it has no ground sample distance, and whole images in place of crops")

    def items() -> Iterator[Item]:
        for i, (_, _, row) in enumerate(read_rows(source / "rgb_metadata.csv")):
            if isinstance(row, BadInput) or row.get("split") in ("train", "val"):
                yield Item(f"{i:07d}", functools.partial(make, i, row))

    def make(i: int, row: dict | BadInput) -> Iterator[Sample | str]:
        if isinstance(row, BadInput):
            raise row
        if row["category"] == "false_detection":
            yield "false detections"
            return
        path = source / "images" / f"rgb_img_{i}.png"
        country = COUNTRIES.get(row.get("country_code"), row.get("country_code"))
        record = {
            "file_name": path.name, "timestamp": row["timestamp"], "location": [float(row["lon"]), float(row["lat"])],
            "country_code": country, "cloud_cover": row.get("cloud_cover"), "label": row["category"],
            "area": row["img_filename"].removesuffix(".jpg").removesuffix("_rgb").rpartition("_")[0],
        }  # fmt: skip
        yield Sample("train" if row["split"] == "train" else "test", record, checked_image(path)[1])

    return items, sum(1 for _ in items())


def checked_image(path: Path) -> tuple[Image.Image, bytes]:
    """-> an image, decoded, and its file as it is; BadInput else."""
    content = path.read_bytes()
    return open_image(io.BytesIO(content), path), content


# -----------------------------------------------------------------------------------------------------
# The datasets of the downstream tasks (supplement A, Table S1)


@dataclass(frozen=True)
class Known:
    """What is known of a dataset: numbers of images and classes (Table S1), its files, its split lists."""

    train: int
    test: int
    classes: int
    suffixes: tuple[str, ...] = ()  # of its images, the preferred one first; their folders are the classes
    lists: tuple[str, ...] = ()  # files that name the images of the training split, then of the test split


KNOWN = {
    "fmow": Known(363_572, 53_043, 62),
    "resisc45": Known(18_900, 6_300, 45, (".jpg",), ("resisc45-train.txt", "resisc45-test.txt")),
    "optimal31": Known(930, 930, 31, (".jpg",), ("optimal31-train.txt", "optimal31-test.txt")),
    "ucmerced": Known(  # supplement A joins validation and test
        1_260, 840, 21, (".tif",), ("uc_merced-train.txt", "uc_merced-val.txt", "uc_merced-test.txt")
    ),
    "fgsc23": Known(3_256, 824, 23, (".jpg",)),
    "eurosat": Known(16_200, 5_400, 10, (".tif", ".jpg"), ("eurosat-train.txt", "eurosat-test.txt")),
    "so2sat": Known(352_366, 48_307, 17),
}
# NOTE[PAPER] range of Sentinel-2's 16 bits: reflectance 0 to 0.275, which EuroSAT's own JPEGs map to 0 to 255.
REFLECTANCE = 0.275
LOCAL_CLIMATE_ZONES = (
    "compact high-rise;compact mid-rise;compact low-rise;open high-rise;open mid-rise;open low-rise;"
    "lightweight low-rise;large low-rise;sparsely built;heavy industry;dense trees;scattered trees;bush, scrub;"
    "low plants;bare rock or paved;bare soil or sand;water"
).split(";")


def split_images(source: Path, name: str, paths: list[Path], seed: int) -> dict[Path, str | None]:
    """Each image's split: by its folder where the dataset has no lists, else by them, None when in neither."""
    lists = [next(source.rglob(file), None) for file in KNOWN[name].lists]
    if not lists:
        return {path: path.parent.parent.name for path in paths}
    if None not in lists:
        stems = [{PurePosixPath(line.strip()).stem for line in file.read_text().splitlines()} for file in lists]
        split = dict.fromkeys(stems[0], "train") | dict.fromkeys(set().union(*stems[1:]), "test")
        return {path: split.get(path.stem) for path in paths}
    if name != "optimal31":
        wanted = ", ".join(KNOWN[name].lists)
        raise BadInput(f"{source}: no split lists ({wanted}); torchgeo's documentation says where they are")
    print("Optimal-31 without its lists: a random half of each class is the training split")
    chance = lambda path: hashlib.sha256(f"{seed} {path.stem}".encode()).digest()  # noqa: E731
    halves = {}
    for _, group in itertools.groupby(paths, lambda path: path.parent):
        group = sorted(group, key=chance)
        halves |= {path: "train" if i < len(group) // 2 else "test" for i, path in enumerate(group)}
    return halves


def class_folders(source: Path, name: str, seed: int) -> tuple[Callable[[], Iterable[Item]], int]:
    """A dataset whose images lie in a folder for each class (FGSC-23: under train/ and test/)."""
    suffixes = KNOWN[name].suffixes
    found = {suffix: sorted(progress(source.rglob(f"*{suffix}"), f"listing {source}")) for suffix in suffixes}
    suffix = next((suffix for suffix in suffixes if found[suffix]), None)
    if suffix is None:
        raise BadInput(f"{source}: no {' or '.join(suffixes)} in it; see the README for the layout of {name}")
    geotiff = name == "eurosat" and suffix == ".tif"
    if geotiff:
        need("tifffile", "EuroSAT's GeoTIFFs")
    elif name == "eurosat":
        print("EuroSAT from JPEGs: without GSD and location; the 13-band GeoTIFFs (EuroSATallBands) have them")
    split_of = split_images(source, name, found[suffix], seed)
    chosen = [path for path in found[suffix] if split_of[path] in ("train", "test")]

    def make(path: Path) -> Iterator[Sample]:
        image, record = read_geotiff(path) if geotiff else (checked_image(path)[0].convert("RGB"), {})
        content, ending = (path.read_bytes(), ".jpg") if suffix == ".jpg" else (encode(image, "PNG"), ".png")
        kind = path.parent.name
        yield Sample(split_of[path], {"file_name": f"{kind}/{path.stem}{ending}", "label": kind, **record}, content)

    items = lambda: (Item(str(p.relative_to(source)), functools.partial(make, p)) for p in chosen)  # noqa: E731
    return items, len(chosen)


def need(package: str, what: str):
    """An optional package. BadInput says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise BadInput(f"{what} need the package {package}: pip install {package}") from None


def read_geotiff(path: Path) -> tuple[Image.Image, dict]:
    """A 13-band Sentinel-2 GeoTIFF in UTM -> RGB (bands 4, 3, 2), and the gsd and location of its centre."""
    with need("tifffile", "EuroSAT's GeoTIFFs").TiffFile(path) as file:
        pixels, tags = file.asarray(), file.pages[0].geotiff_tags
    if pixels.ndim != 3 or pixels.shape[2] != 13:
        raise BadInput(f"{path}: shape {pixels.shape}, not 13 bands")
    scale, tie, code = (tags.get(k) for k in ("ModelPixelScale", "ModelTiepoint", "ProjectedCSTypeGeoKey"))
    if not scale or not tie or not 32601 <= int(code or 0) <= 32760:
        raise BadInput(f"{path}: no UTM georeference (EPSG {code})")
    height, width = pixels.shape[:2]
    x, y = tie[3] + (width / 2 - tie[0]) * scale[0], tie[4] - (height / 2 - tie[1]) * scale[1]
    place = utm_to_degrees(x, y, int(code) % 100, north=int(code) < 32700)
    rgb = eight_bits(pixels[..., [3, 2, 1]], 1e4 * REFLECTANCE)
    return rgb, {"gsd": [float(scale[0]), float(scale[1])], "location": place}


def utm_to_degrees(x: float, y: float, zone: int, north: bool) -> list[float]:
    """UTM metres on WGS 84 -> [longitude, latitude], by Krueger's series to third order (below a millimetre)."""
    n = 1 / (2 * 298.257223563 - 1)  # third flattening
    radius = 6378137 / (1 + n) * (1 + n**2 / 4 + n**4 / 64)
    xi, eta = (y - (0 if north else 1e7)) / (0.9996 * radius), (x - 5e5) / (0.9996 * radius)
    beta = (n / 2 - 2 * n**2 / 3 + 37 * n**3 / 96, n**2 / 48 + n**3 / 15, 17 * n**3 / 480)
    z = complex(xi, eta)
    z -= sum(b * cmath.sin(2 * (j + 1) * z) for j, b in enumerate(beta))
    chi = math.asin(math.sin(z.real) / math.cosh(z.imag))
    delta = (2 * n - 2 * n**2 / 3 - 2 * n**3, 7 * n**2 / 3 - 8 * n**3 / 5, 56 * n**3 / 15)
    latitude = chi + sum(d * math.sin(2 * (j + 1) * chi) for j, d in enumerate(delta))
    longitude = math.radians(6 * zone - 183) + math.atan2(math.sinh(z.imag), math.cos(z.real))
    return [math.degrees(longitude), math.degrees(latitude)]


def so2sat(source: Path) -> tuple[Callable[[], Iterable[Item]], int]:
    """So2Sat LCZ42: training.h5 and testing.h5; of its Sentinel-2 bands (B2, B3, B4, ...) the RGB."""
    h5py = need("h5py", "So2Sat's files")
    paths = {split: next(source.rglob(f"{split}ing.h5"), None) for split in ("train", "test")}
    if None in paths.values():
        raise BadInput(f"{source}: no training.h5 and testing.h5 in it; So2Sat's culture_10 folder has them")
    sizes = {}
    for split, path in paths.items():
        with h5py.File(path) as file:  # opened again by each worker, see below
            sizes[split] = len(file["label"])

    def items() -> Iterator[Item]:
        for split, path in paths.items():
            file = h5py.File(path)
            for i in range(sizes[split]):
                yield Item(f"{split}/{i:06d}", functools.partial(make, file, split, i))

    def make(file, split: str, i: int) -> Iterator[Sample]:
        rgb = eight_bits(file["sen2"][i][..., [2, 1, 0]], REFLECTANCE)
        label = LOCAL_CLIMATE_ZONES[int(file["label"][i].argmax())]
        record = {"file_name": f"{i // 1000:03d}/{i:06d}.png", "label": label}
        yield Sample(split, record, encode(rgb, "PNG"))

    return items, sum(sizes.values())


# -----------------------------------------------------------------------------------------------------
# One's own images and table

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
VALIDATION = ("val", "validation", "dev")


def stac_rows(folder: Path) -> Iterator[tuple[str, int, dict | BadInput]]:
    """STAC items (one JSON each) in a folder -> rows as read_rows gives them: properties, place, and the image, which
    is the file of the same name beside the item, else its first asset that is there."""
    for name, read in members(folder, ".json"):
        try:
            item = json.loads(read())
            if item.get("type") != "Feature":
                continue
            row = dict(item["properties"])
            if item.get("bbox"):
                dimensions = len(item["bbox"]) // 2  # 3 with heights
                west, south, east, north = item["bbox"][:2] + item["bbox"][dimensions : dimensions + 2]
                row["location"] = [(west + east) / 2, (south + north) / 2]
            assets = [str(PurePosixPath(name).parent / a["href"]) for a in item.get("assets", {}).values()]
            beside = [name.removesuffix(".json") + suffix for suffix in IMAGE_SUFFIXES]
            images = [p for p in beside + assets if p.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(folder / p)]
            if not images:
                raise ValueError("no image beside it")
            row = {"file_name": os.path.normpath(images[0]), **row}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            row = BadInput(f"{folder / name}: not a STAC item with an image ({type(error).__name__}: {error})")
        yield str(folder / name), -1, row


def column_of_paths(rows: list[dict], images: Path, asked: str | None) -> str:
    """The column that names the images: the one asked for, else the first whose values are files under `images`."""
    columns = dict.fromkeys(name for row in rows for name in row)
    good = [asked] if asked in columns else [] if asked else [
        name for name in columns
        if any(isinstance(row.get(name), str) and row[name] and os.path.isfile(images / row[name]) for row in rows)
    ]  # fmt: skip
    if not good:
        what = f"no column {asked!r}" if asked else f"no column holds names of files under {images}"
        raise BadInput(f"{what}; the columns are {', '.join(columns)}; --path-column says which")
    return good[0]


def as_eight_bits(path: Path, limits: list[float] | None, size: int | None) -> tuple[bytes, str]:
    """An image file -> (a file that load_image reads right, its suffix): the same bytes when it can be. limits: the
    values that become 0 and 255. size: a longer side is reduced to it."""
    if limits is None:
        image, content = checked_image(path)
        if image.format in ("JPEG", "PNG") and (size is None or max(image.size) <= size):
            return content, path.suffix
        image = image.convert("RGB")
    else:
        image = eight_bits(read_array(path) - limits[0], limits[1] - limits[0])
    if size and max(image.size) > size:
        scale = size / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    return encode(image, "PNG"), ".png"


def read_array(path: Path) -> np.ndarray:
    """Pixels of any depth as float64 [h, w, 3]; gray becomes three equal bands, of four the first three are taken."""
    if path.suffix.lower() in (".tif", ".tiff"):
        pixels = need("tifffile", "TIFFs with --range").imread(path)
    elif path.suffix.lower() == ".png":
        from torchvision.io import ImageReadMode, decode_png, read_file

        pixels = decode_png(read_file(str(path)), ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    else:
        pixels = np.asarray(Image.open(path))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] > 4:
        raise BadInput(f"{path}: shape {pixels.shape}; --range needs 1 to 4 bands, the first three being RGB")
    return (pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, 2)).astype(np.float64)


def own(args: argparse.Namespace) -> tuple[Callable[[], Iterable[Item]], int, dict[str, Field]]:
    """A table and its images -> items, their number, the fields that its columns became (printed)."""
    if not args.images.is_dir():
        raise BadInput(f"{args.images}: no such folder")
    rows = functools.partial(stac_rows if args.table.is_dir() else read_rows, args.table)

    def clean(row: dict) -> dict:
        """Names and blanks in order, dates as the user said they are meant."""
        if args.dates:
            iso = lambda v: iso_timestamp(v, args.dates == "day-first") or v if isinstance(v, str) else v  # noqa: E731
            row = {name: iso(value) for name, value in row.items()}
        return canonical(row)

    sample = list(itertools.islice((row for _, _, row in rows() if isinstance(row, dict)), SAMPLE))
    path_column = column_of_paths(sample[:20], args.images, args.path_column)
    sample = [clean(row) for row in sample]
    area, told, total, present, sides = args.area or "area", args.split_column or "split", 0, {}, set()
    for total, (_, _, row) in enumerate(rows(), 1):  # all: a table may be sorted by what the sample is to tell
        row = canonical(row) if isinstance(row, dict) else {}
        present |= dict.fromkeys(row)
        sides.add(str(row.get(told)).lower())
    labels = [name for name in args.label.split(",") if name]
    for name in (*labels, args.area, args.split_column):
        if name and name not in present:
            raise BadInput(f"no column {name!r} in {args.table}; there are {', '.join(present)}")
    labels = {name: "label" if len(labels) == 1 else f"label_{name}" for name in labels}
    labels = labels or {name: name for name in present if is_label(name)}
    kinds = dict(part.partition("=")[::2] for part in args.types.split(",") if part)
    for name, kind in kinds.items():
        if kind not in KINDS:
            raise BadInput(f"--types {name}={kind}: a kind is one of {', '.join(KINDS)}")
    kinds |= {name: "skip" for name in (*labels, path_column, area, told)}
    fields, table = infer_fields(sample, kinds)
    print(f"columns of {args.table}, by their values (--types COLUMN=KIND,... says otherwise):\n{table}")
    sides = SPLITS if sides & {"test", "testing"} else SPLITS | {name: "test" for name in VALIDATION}
    root = Path(os.path.normpath(args.images))

    def make(where: str, row: dict | BadInput) -> Iterator[Sample | str]:
        if isinstance(row, BadInput):
            raise row
        name = row.get(path_column)
        if not isinstance(name, str) or not name:
            raise BadInput(f"{where}: no {path_column}")
        path = Path(os.path.normpath(root / name))
        if not path.is_relative_to(root):
            raise BadInput(f"{where}: {path_column} {name!r} leaves {root}")
        if not os.path.isfile(path):
            raise BadInput(f"{where}: {path}: no such image")
        record = clean(row)
        if told in record and str(record[told]).lower() not in sides:
            yield f"rows of split {record[told]!r}"
            return
        place = str(record.get(area, ""))
        chance = hashlib.sha256(f"{args.seed} {place or name}".encode()).digest()  # an area is never divided
        split = "test" if int.from_bytes(chance[:4]) < args.test_share * 2**32 else "train"
        split = sides[str(record[told]).lower()] if told in record else split
        content, suffix = as_eight_bits(path, args.range, args.size)
        kept = {name: record[name] for name in fields if name in record} | ({"area": place} if place else {})
        kept |= {new: str(record[old]) for old, new in labels.items() if old in record}
        file_name = f"{path.relative_to(root).as_posix()}{'' if suffix == path.suffix else suffix}"
        yield Sample(split, {"file_name": file_name, **kept}, content)

    def items() -> Iterator[Item]:
        for number, (where, _, row) in enumerate(rows()):
            yield Item(f"{number:09d}", functools.partial(make, where, row))

    return items, total, fields


# -----------------------------------------------------------------------------------------------------
# What a dataset holds: a report after preparing it, faults, pictures

PAPER_RANGES = {  # Table 1 and S1: lowest, median, highest of fMoW's training split; of categories, how many
    "gsd x": ("0.08", "0.76", "23.13"), "gsd y": ("0.06", "0.60", "22.35"),
    "timestamp": ("2002-01-28 07:04:18", "2015-08-06 10:08:02", "2017-07-12 08:25:25"),
    "location longitude": ("-179.8810", "7.0395", "179.0439"), "location latitude": ("-54.9320", "37.9951", "71.6118"),
    "country_code": ("207 different",), "utm_zone": ("400 different",),
}  # fmt: skip


def describe(name: str, folder: Path, workers: int) -> str:
    """Counts, ranges and channel statistics of a prepared dataset, beside the paper's where it gives them."""
    fields = tuple((read_fields(folder) or FIELDS).values())
    filled = [f for f in (folder / "train", folder / "test") if metadata_file(f).stat().st_size]
    splits, known, lines = [read_split(f, fields) for f in filled], KNOWN.get(name), []
    for split, expected in zip(splits, (known.train, known.test) if known else (None, None)):
        classes = [f"{len(c.values)} {label.removeprefix('label_')}s" for label, c in split.labels.items()]
        beside = f" (paper: {expected:,}; {known.classes} classes)" if known else ""
        lines.append(f"{split.folder.name}: {len(split):,} images, {', '.join(classes) or 'no label'}{beside}")
    train, found = splits[0], {}
    by_time = lambda date: (*np.nan_to_num(parse_timestamp(date)), date)  # noqa: E731
    three = lambda values: [values[i] for i in (0, len(values) // 2, -1)] if len(values) else []  # noqa: E731
    for field, column in columns_of(train.table, fields):
        if field.kind == "category":
            found[field.name] = [f"{len(column.values)} different"] * (len(column.values) > 0)
        elif field.kind == "number":
            for part, values in zip(field.parts or ("",), column):
                spread = three(np.sort(values[~np.isnan(values)]))
                found[f"{field.name} {part}".strip()] = [field.style % value for value in spread]
        elif not np.isnan(column).all():
            dates = (train.record(i).get(field.name) for i in range(len(train)))
            found[field.name] = three(sorted(filter(parse_timestamp, dates), key=by_time))
    rows = [("train" + " (and the paper's)" * (name == "fmow"), "lowest", "median", "highest")]
    for key, values in found.items():
        if values:
            paper = (*(PAPER_RANGES.get(key, ()) if name == "fmow" else ()), "", "", "")
            rows.append((key, *[f"{a} ({b})" if b else a for a, b in zip([*values, "", ""][:3], paper)]))
    lines += [columns_of_text(rows)] if len(rows) > 1 else []
    mean, std = (" ".join(f"{v:.4f}" for v in values) for values in channel_statistics(train, 224, workers))
    return "\n".join([*lines, f"channels: mean {mean}, deviation {std} (0 to 1)"])


def fingerprint(path: Path) -> tuple[bytes, str]:
    """A file's image decoded, to see whether it can be: -> (fingerprint of its bytes, what is wrong or "")."""
    try:
        return hashlib.sha256(checked_image(path)[1]).digest(), ""
    except BadInput as error:
        return b"", str(error)


@dataclass
class Finding:
    """One kind of fault in one split: where it was met first, how often, whether training cannot start with it."""

    split: str
    problem: str
    first: str
    stops: bool
    count: int = 0


def find(findings: dict, split: str, problem: str, example: str, stops: bool = False) -> None:
    findings.setdefault((split, problem), Finding(split, problem, example, stops)).count += 1


def fault_of(value: object, field: Field) -> str:
    """Why a value that is there counts as missing."""
    if field.kind == "timestamp":
        return "no date"
    values = value if isinstance(value, list) else [value]
    numbers = [parse_number(v, Field("", "number")) for v in values]
    if field.kind == "category" or None in numbers or len(numbers) not in (1, len(field.parts)):
        return "malformed"
    if len(numbers) == 2 and "latitude" in field.parts and abs(numbers[0]) <= 90 < abs(numbers[1]) <= 180:
        return "latitude and longitude swapped"
    return "out of range"


def check_split(folder: Path, fields: dict[str, Field], workers: int, findings: dict) -> tuple[dict, set, dict]:
    """Add the faults of one split to `findings` -> (its counts, its areas, the name of each image's fingerprint)."""
    add = functools.partial(find, findings, folder.name)
    seen, areas, labels, lengths, prints = {}, set(), {}, [], {}
    missing, values = Counter(), {name: set() for name in fields}
    try:
        rows = progress(read_rows(metadata_file(folder)), f"reading {folder}")
    except BadInput as error:
        add("no metadata", str(error), stops=True)
        rows = []
    for where, _, row in rows:
        try:
            if isinstance(row, BadInput):
                raise row
            record = checked(row, where)
        except BadInput as error:
            add("unreadable line", str(error), stops=True)
            continue
        name = record["file_name"]
        if name in seen:
            add("file_name twice", f"{where}: {name}, as in {seen[name]}")
        seen.setdefault(name, where)
        for field in fields.values():
            value = record.get(field.name)
            text = None if value is None else format_value(value, field)
            if text is None:
                missing[field.name] += 1
            elif len(values[field.name]) < 2:
                values[field.name].add(text)
            if value is not None and text is None:
                add(f"{field.name}: {fault_of(value, field)}", f"{where}: {value!r}")
        place = parse_numbers(record.get("location"), FIELDS["location"])
        zone = re.match(r"(\d\d?)[A-Z]$", str(record.get("utm_zone")))
        if place and zone and (int(zone[1]) - 1 - (place[0] + 180) // 6) % 60 not in (0, 1, 59):
            add("location outside its utm_zone", f"{where}: {place} is not in {zone[0]}")
        for key in filter(is_label, record):
            labels.setdefault(key, Counter())[str(record[key])] += 1
        if "area" in record:
            areas.add(str(record["area"]))
        lengths.append(len(tokenizer()(caption(record, tuple(fields.values())))))
    for name, _ in members(folder, (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES))) if folder.is_dir() else ():
        if name not in seen:
            add("image without a row", name)
    present = [name for name in seen if os.path.isfile(folder / name)]
    for name in seen.keys() - set(present):
        add("row without its image", f"{seen[name]}: {name}", stops=True)
    loader = torch.utils.data.DataLoader(
        [folder / name for name in present], batch_size=None, collate_fn=fingerprint, **processes(workers)
    )
    for name, (found, problem) in zip(present, progress(loader, f"decoding {folder}")):
        if problem:
            add("unreadable image", problem, stops=True)
        elif prints.setdefault(found, name) != name:
            add("image twice", f"{name} is {prints[found]}")
    count = len(lengths)
    if not count:
        add("no rows", str(folder), stops=True)
    for name, different in values.items():
        if len(different) == 1 and count - missing[name] > 1:
            add(f"{name}: constant", f"always {next(iter(different))}")
    rates = {name: missing[name] / max(1, count) for name in fields}
    tokens = {"shortest": min(lengths), "longest": max(lengths)} if lengths else {}
    return {"images": count, "fields": rates, "labels": labels, "tokens": tokens}, areas, prints


def check(folder: Path, workers: int, as_json: bool) -> bool:
    """Look at every line and every image, print what is wrong -> whether training can start."""
    findings, folders, fields = {}, {"train": folder / "train", "test": test_folder(folder)}, {}
    try:
        rows = (row for _, _, row in read_rows(metadata_file(folders["train"])) if isinstance(row, dict))
        fields = read_fields(folder) or infer_fields(map(canonical, rows), {})[0]
    except BadInput as error:
        find(findings, "train", "no fields", str(error), stops=True)
    (train, *ours), (test, *theirs) = (check_split(f, fields, workers, findings) for f in folders.values())
    for area in sorted(ours[0] & theirs[0]):
        find(findings, "both", "area in train and test", area)
    for shared in ours[1].keys() & theirs[1].keys():
        find(findings, "both", "image in train and test", f"{ours[1][shared]}, {theirs[1][shared]}")
    problems = [dataclasses.asdict(finding) for finding in findings.values()]
    fine, summaries = not any(problem["stops"] for problem in problems), {"train": train, "test": test}
    if as_json:
        print(json.dumps({"can_train": fine, "problems": problems, **summaries}))
        return fine
    for split, summary in summaries.items():
        missing = ", ".join(f"{name} {rate:.0%}" for name, rate in summary["fields"].items()) or "there are no fields"
        tokens = " to ".join(map(str, summary["tokens"].values()))
        print(f"{split}: {summary['images']:,} images; missing: {missing}; caption: {tokens} tokens")
        for label, classes in summary["labels"].items():
            ranked = classes.most_common()
            (most, many), (least, few) = ranked[0], ranked[-1]
            print(f"  {label}: {len(classes)} classes, {few:,} ({least}) to {many:,} ({most}) images")
    lines = [("split", "problem", "count", "training", "the first")]
    for p in problems:
        lines.append((p["split"], p["problem"], f"{p['count']:,}", "stops" if p["stops"] else "runs", p["first"][:150]))
    print(columns_of_text(lines) if problems else "no problem found")
    return fine


def canvas(rows: int, columns: int, width: float, height: float, **keywords):
    """-> a figure and its [rows, columns] axes, without ticks; drawn to a file, never to a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **keywords)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def show(folder: Path, names: str, output: Path) -> list[Path]:
    """Draw some training images with their captions and token counts (Table S3), and how GSD, time and place are
    distributed (Figures S1 to S3) -> the two pictures."""
    from matplotlib.ticker import MaxNLocator

    fields = choose_fields(folder, names)
    split = read_split(folder / "train", fields)
    figure, axes = canvas(3, 4, 14, 11)
    for axis, i in zip(axes.flat, range(0, len(split), max(1, len(split) // 12))):
        text = caption(split.record(i), fields)
        axis.imshow(load_image(split.folder / split.names[i], 224))
        axis.set_title(textwrap.fill(f"{text} [{len(tokenizer()(text))} tokens]", 52), fontsize=7, loc="left")
    figure.suptitle(f"{folder}: training images, their captions, tokens with start and end", fontsize=11)
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "samples.png", dpi=110)
    figure, axes = canvas(2, 2, 14, 9)
    gsd, when, place = (
        read_split(folder / "train", (FIELDS[n],)).table.numbers for n in ("gsd", "timestamp", "location")
    )
    gsd = gsd[~np.isnan(gsd[:, 0])]
    if len(gsd):
        edges = np.geomspace(gsd.min(), gsd.max() * 1.001, 60)
        axes[0, 0].hist([gsd[:, 0], gsd[:, 1]], edges, histtype="step", label=["x", "y"])
        axes[0, 0].legend()
        axes[0, 0].set_xscale("log")
    axes[0, 0].set_title("GSD (m per pixel)")
    for axis, column, title in ((axes[0, 1], 1, "month"), (axes[1, 0], 0, "year")):
        known, counts = np.unique(when[~np.isnan(when[:, column]), column], return_counts=True)
        axis.bar(known, counts)
        axis.set_title(title)
    for axis in axes.flat[:3]:
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel("images")
    for axis in (axes[0, 1], axes[1, 0]):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    earth = Image.open(MAPS / "bluemarble-2004-07.jpg").resize((1080, 540))
    axes[1, 1].imshow(earth, extent=(-180, 180, -90, 90), alpha=0.5)
    axes[1, 1].scatter(place[:, 0], place[:, 1], s=2, color="tab:red", alpha=0.4)
    axes[1, 1].set(xlim=(-180, 180), ylim=(-90, 90), title="location")
    figure.savefig(output / "distributions.png", dpi=110)
    return [output / "samples.png", output / "distributions.png"]


# -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description="Prepare datasets, look for their faults, show what they hold.")
    commands = main.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="cut the embedded data out of the maps in demo/ (about a minute)")
    demo.add_argument("folder", type=Path, help="where to write it; must not exist")
    demo.add_argument("--train", type=int, default=20_000, help="training images")
    demo.add_argument("--test", type=int, default=4_000, help="test images")
    demo.add_argument("--seed", type=int, default=0, help="of places, scales, months and held-out blocks")
    preparing = {name: commands.add_parser(name, help=f"prepare {name}") for name in KNOWN}
    for command in preparing.values():
        command.add_argument("source", type=Path, help="the dataset as it was distributed, unpacked")
    preparing["own"] = commands.add_parser("own", help="prepare one's own images and a table about them")
    preparing["own"].add_argument("table", type=Path, help="CSV, TSV, JSON lines, or a folder of STAC items")
    preparing["own"].add_argument("images", type=Path, help="the folder that the table's paths start from")
    for command in preparing.values():
        command.add_argument("folder", type=Path, help="where to write the prepared dataset; must not exist")
        command.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
        command.add_argument("--seed", type=int, default=0, help="of a random split, where one is needed")
    fmow = preparing["fmow"]
    fmow.add_argument("--groundtruth", type=Path, help="groundtruth.tar.bz2 or its folder; default: in SOURCE")
    fmow.add_argument("--no-location", action="store_true", help="go without the ground truth, hence without location")
    fmow.add_argument("--crop", choices=("baseline", "box"), default="baseline", help="with context, or the box alone")
    fmow.add_argument("--size", type=int, default=224, help="side of a crop in px")
    fmow.add_argument("--rescale", choices=("all", "gsd"), default="all", help="what changes with the crop's size")
    mine = preparing["own"]
    mine.add_argument("--path-column", help="column that names the image; default: found")
    mine.add_argument("--label", default="", help="column of classes, or several separated by commas; default: label")
    mine.add_argument("--area", default="", help="column that names a place seen more than once; default: area")
    mine.add_argument("--split-column", default="", help="column that says train or test; default: split, or at random")
    mine.add_argument("--test-share", type=float, default=0.2, help="of a random split, whole areas")
    mine.add_argument("--types", default="", help=f"COLUMN=KIND,... with KIND one of {', '.join(KINDS)}")
    mine.add_argument("--dates", choices=("day-first", "month-first"), help="how to read 03/04/2015")
    mine.add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="pixel values to become 0 and 255")
    mine.add_argument("--size", type=int, help="reduce larger images to this longer side in px")
    checking = commands.add_parser("check", help="look for everything that can be wrong with a dataset")
    checking.add_argument("--json", action="store_true", help="print one JSON object in place of a table")
    showing = commands.add_parser("show", help="draw samples with captions, and distributions")
    showing.add_argument("--fields", default="", help="metadata fields, comma-separated, or 'all'")
    showing.add_argument("--output", type=Path, default=Path("."), help="folder of the pictures")
    for command in (checking, showing):
        command.add_argument("folder", type=Path, help="a prepared dataset, or a Hugging Face ImageFolder")
    checking.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    return main


def run(args: argparse.Namespace) -> None:
    if args.command == "demo":
        prepare_demo(args.folder, args.train, args.test, args.seed)
    elif args.command == "check":
        sys.exit(0 if check(args.folder, max(1, args.jobs), args.json) else 1)
    elif args.command == "show":
        print("drawn: " + ", ".join(map(str, show(args.folder, args.fields, args.output))))
    else:
        source = args.table if args.command == "own" else args.source
        if not source.exists():
            raise BadInput(f"{source}: no such file or folder")
        fields = {}
        if args.command == "own":
            items, total, fields = own(args)
        elif args.command == "fmow":
            items, total = wilds(source) if (source / "rgb_metadata.csv").is_file() else Fmow(args).found()
        elif args.command == "so2sat":
            items, total = so2sat(source)
        else:
            items, total = class_folders(source, args.command, args.seed)
        options = {name: str(value) for name, value in vars(args).items() if name != "jobs"}
        report = prepare(items, total, args.folder, options, max(1, args.jobs), fields)
        print(f"{describe(args.command, args.folder, args.jobs)}\n{report}")


@contextlib.contextmanager
def errors_in_one_line(*kinds: type[Exception]) -> Iterator[None]:
    """What a user can mend ends each program with one line and status 1."""
    try:
        yield
    except (BadInput, OSError, *kinds) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"error: a worker was killed, perhaps for want of memory; try fewer ({error})")


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        run(parser().parse_args(argv))


if __name__ == "__main__":
    main()
