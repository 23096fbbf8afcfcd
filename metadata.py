"""Metadata of a satellite image, as a caption or as a table row (paper, Section 4.2, supplement B and E).

In this order: the paper's 15 fields -> one value checked and printed -> a record as a caption -> a record
as a row of table features -> the byte-pair tokenizer that turns captions into integers.

    python metadata.py        # the poster's record: its caption, its 207 tokens and its table features

A record is a plain dict {field name: value}. A value that is absent, empty, not finite, of the wrong kind
or out of range is *missing*: left out of the caption, a missing-value token in the table, for that field of
that sample alone. It is never replaced by zero.

Letters used everywhere: B local batch, G global batch, F metadata fields, L text tokens, N patches,
D width, E joint dimension, H heads, C classes; n is the number of samples of a split.
"""

import gzip
import html
import math
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import ftfy
import numpy as np
import regex



class BadInput(ValueError):
    """What the user gave cannot be used. The message is one line: what, where, which value, what would be right."""


# -----------------------------------------------------------------------------------------------------
# The fields (paper, Table S2; formats as printed on the poster)


@dataclass(frozen=True)
class Field:
    """One metadata field: what it is called, which values it takes, how it is printed."""

    name: str
    kind: str  # "number", "timestamp" or "category"
    unit: str = ""
    style: str = "%s"  # printf style of one number
    parts: tuple[str, ...] = ()  # names of a list's components; empty for a single value
    low: float = -math.inf  # numbers outside [low, high] are malformed, hence missing
    high: float = math.inf


FIELDS = {
    field.name: field
    for field in (
        Field("gsd", "number", "m per pixel", "%.4f", ("x", "y"), low=1e-6),
        Field("multispectral_gsd", "number", "m per pixel", "%.4f", low=1e-6),
        Field("pixel_size", "number", "degrees per pixel", "%.2e", ("x", "y")),
        Field("timestamp", "timestamp", "UTC, ISO 8601"),
        # NOTE[PAPER] Table 1 lists latitude first, the poster prints [longitude, latitude]: the poster's order.
        Field("location", "number", "degrees", "%.6f", ("longitude", "latitude"), low=-180, high=180),
        Field("utm_zone", "category", "zone and latitude band"),
        Field("country_code", "category", "ISO 3166 alpha-3"),
        Field("cloud_cover", "number", "percent", "%.0f", low=0, high=100),
        Field("scan_direction", "category"),
        Field("wavelengths", "number", "nm", "%.0f", ("red", "green", "blue"), low=0),
        Field("target_azimuth_angle", "number", "degrees", "%.2f", low=-360, high=360),
        Field("sun_azimuth_angle", "number", "degrees", "%.2f", low=-360, high=360),
        Field("sun_elevation_angle", "number", "degrees", "%.2f", low=-90, high=90),
        Field("off_nadir_angle", "number", "degrees", "%.2f", low=-90, high=90),
        Field("sensor_platform", "category"),
    )
}
DEFAULT_FIELDS = "gsd,timestamp,location"  # Section 4.1, in this order
TIME_PARTS = ("year", "month", "day", "hour", "weekday")  # supplement B


def parse_fields(names: str) -> tuple[Field, ...]:
    """"gsd,location" -> those fields in that order; "all" -> the paper's 15. BadInput on unknown or repeated names."""
    if names == "all":
        return tuple(FIELDS.values())
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in FIELDS]
    if unknown or not chosen:
        what = f"unknown field {unknown[0]!r}" if unknown else "no field given"
        raise BadInput(f"--fields: {what}; choose from {', '.join(FIELDS)}, or 'all'")
    if len(set(chosen)) < len(chosen):
        raise BadInput(f"--fields: {names!r} names a field twice")
    return tuple(FIELDS[name] for name in chosen)


# -----------------------------------------------------------------------------------------------------
# One value


def parse_number(value: object, field: Field) -> float | None:
    """A finite float inside the field's range, or None. Numbers written as strings are accepted (CSV has no others)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and field.low <= number <= field.high else None


def parse_numbers(value: object, field: Field) -> list[float] | None:
    """All components of a number field, or None when any of them is missing or malformed."""
    if field.parts == ("x", "y") and not isinstance(value, (list, tuple)):
        value = [value, value]  # square pixels given as one number
    values = value if field.parts else [value]
    if not isinstance(values, (list, tuple)) or len(values) != max(1, len(field.parts)):
        return None
    numbers = [parse_number(v, field) for v in values]
    if field.name == "location" and numbers[1] is not None and abs(numbers[1]) > 90:
        return None
    return None if None in numbers else numbers


TIMESTAMP = re.compile(
    r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?)?)?", re.ASCII
)


def parse_timestamp(value: object) -> list[float] | None:
    """An ISO 8601 string -> [year, month, day, hour, weekday] in UTC, or None when it is not a date.

    A date may stop early ("2004-10" is a month): the parts it does not give are NaN. Monday is weekday 0.
    """
    match = TIMESTAMP.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(g) if g else None for g in match.groups()[:6])
    try:
        first = (1 if part is None else part for part in (month, day))
        moment = datetime(year, *first, hour or 0, minute or 0, 59 if second == 60 else second or 0)  # leap second
        zone = match.group(7)
        if zone and zone != "Z":
            offset = timedelta(hours=int(zone[1:3]), minutes=int(zone[-2:]))
            if int(zone[1:3]) > 23 or int(zone[-2:]) > 59:
                return None
            moment -= offset if zone[0] == "+" else -offset
    except (ValueError, OverflowError):
        return None
    known = [True, month is not None, day is not None, hour is not None, day is not None]
    parts = [moment.year, moment.month, moment.day, moment.hour, moment.weekday()]
    return [float(p) if k else math.nan for p, k in zip(parts, known)]


def parse_category(value: object) -> str | None:
    """A category as text, or None. Integers are accepted; lone surrogates (broken UTF-16) are not."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    text = str(value).strip()
    return text if text and not any("\ud800" <= c <= "\udfff" for c in text) else None


# -----------------------------------------------------------------------------------------------------
# A record as a caption (supplement B, "Textual metadata encoders")


def format_value(value: object, field: Field) -> str | None:
    """The value as the poster prints it, or None when it is missing or malformed."""
    if field.kind == "number":
        numbers = parse_numbers(value, field)
        if numbers is None:
            return None
        printed = ", ".join(field.style % number for number in numbers)
        return f"[{printed}]" if field.parts else printed
    if field.kind == "timestamp":
        return value.strip() if parse_timestamp(value) else None  # the raw string, as on the poster
    return parse_category(value)


def caption(record: dict, fields: tuple[Field, ...]) -> str:
    """"key1: value1, ..., keyn: valuen" over the fields that the record has."""
    printed = ((field.name, format_value(record.get(field.name), field)) for field in fields)
    return ", ".join(f"{name}: {text}" for name, text in printed if text is not None)


# -----------------------------------------------------------------------------------------------------
# A record as table features (supplement B, "Tabular metadata encoders")


def number_columns(fields: tuple[Field, ...]) -> list[str]:
    """Names of the numerical features: one for each component, five for the timestamp."""
    parts = {"number": lambda f: f.parts, "timestamp": lambda f: TIME_PARTS, "category": lambda f: None}
    names = [(f.name, parts[f.kind](f)) for f in fields]
    return [f"{name}_{p}" if p else name for name, ps in names if ps is not None for p in (ps or [""])]


def table_row(record: dict, fields: tuple[Field, ...]) -> tuple[list[float], list[str | None]]:
    """A record -> (raw numbers with NaN for missing ones, categories with None for missing ones)."""
    numbers, categories = [], []
    for field in fields:
        value = record.get(field.name)
        if field.kind == "category":
            categories.append(parse_category(value))
        elif field.kind == "timestamp":
            # NOTE[PAPER] month, day, hour and weekday are numbers here; whether the paper embeds them is unstated.
            numbers += parse_timestamp(value) or [math.nan] * len(TIME_PARTS)
        else:
            numbers += parse_numbers(value, field) or [math.nan] * max(1, len(field.parts))
    return numbers, categories


MISSING, UNKNOWN = 0, 1  # the first two rows of every category embedding


@dataclass(frozen=True)
class TableSchema:
    """How raw table features become the encoder's input; fitted on the training split, kept in the checkpoint."""

    numbers: list[str]  # names of the numerical features
    mean: list[float]
    std: list[float]
    categories: dict[str, list[str]]  # field name -> the values seen in training, sorted

    @staticmethod
    def fit(fields: tuple[Field, ...], numbers: np.ndarray, categories: list[list[str | None]]) -> "TableSchema":
        """numbers [n, F_num] with NaN where missing; categories: one list of n values for each category field."""
        known = ~np.isnan(numbers)
        count = np.maximum(known.sum(0), 1)
        mean = np.where(known, numbers, 0).sum(0) / count
        std = np.sqrt((np.where(known, numbers - mean, 0) ** 2).sum(0) / count)
        std = np.where(std > 1e-9 * np.maximum(np.abs(mean), 1), std, 1)  # a constant column stays 0, not noise
        names = [f.name for f in fields if f.kind == "category"]
        values = [sorted({v for v in column if v is not None}) for column in categories]
        return TableSchema(number_columns(fields), mean.tolist(), std.tolist(), dict(zip(names, values)))

    def encode(self, numbers: np.ndarray, categories: list[list[str | None]]) -> tuple[np.ndarray, np.ndarray]:
        """-> float32 [n, F_num] standardised, NaN where missing; int64 [n, F_cat]: MISSING, UNKNOWN, then 2, 3, ..."""
        scaled = ((numbers - np.array(self.mean)) / np.array(self.std)).astype(np.float32)
        encoded = np.empty((len(numbers), len(self.categories)), np.int64)
        for column, (seen, values) in enumerate(zip(self.categories.values(), categories)):
            code = {value: i + 2 for i, value in enumerate(seen)} | {None: MISSING}
            encoded[:, column] = [code.get(value, UNKNOWN) for value in values]
        return scaled, encoded


# -----------------------------------------------------------------------------------------------------
# The tokenizer: CLIP's byte-pair encoding, written from the algorithm (Sennrich et al., 2016)

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_SIZE = 49408
# Words of letters, single digits, runs of other characters; the English clitics are split off first.
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def byte_characters() -> list[str]:
    """A visible character for each byte, in vocabulary order: printable Latin-1 stands for itself, the other
    68 bytes for the characters from U+0100 on. The merges file is written in these characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in printable + others], table


class Tokenizer:
    """Text -> CLIP's token ids. `encode` gives the bare ids; calling it adds start and end and pads a batch."""

    def __init__(self, path: Path = VOCABULARY):
        """path: the gzipped merges, one "left right" a line after a header. FileNotFoundError names the path."""
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : VOCABULARY_SIZE - 2 * 256 - 2 + 1]
        merges = [tuple(line.split()) for line in lines]
        characters, self.byte_table = byte_characters()
        symbols = characters + [c + "</w>" for c in characters] + ["".join(m) for m in merges] + [SOT, EOT]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.rank = {merge: i for i, merge in enumerate(merges)}
        self.start, self.end = self.ids[SOT], self.ids[EOT]
        self.words = {SOT: [self.start], EOT: [self.end]}  # word -> ids, filled as words are met

    def merge(self, word: str) -> list[int]:
        """One word -> ids: start from bytes, join the adjacent pair of lowest rank until no pair is in the table."""
        symbols = [self.byte_table[b] for b in word.encode("utf-8", "replace")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            best = min(zip(symbols, symbols[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            joined, i = [], 0
            while i < len(symbols):
                if tuple(symbols[i : i + 2]) == best:
                    joined.append(symbols[i] + symbols[i + 1])
                    i += 2
                else:
                    joined.append(symbols[i])
                    i += 1
            symbols = joined
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, text: str) -> list[int]:
        """Repair broken Unicode and HTML entities, lower-case, split into words, merge. No start, no end token."""
        if not (text.isascii() and text.isprintable()) or "&" in text:  # nothing of this can change plain ASCII
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        ids = []
        for word in WORD.findall(" ".join(text.split()).lower()):
            if word not in self.words:
                self.words[word] = self.merge(word)
            ids += self.words[word]
        return ids

    def __call__(self, texts: list[str], context: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """n texts -> (uint16 ids [n, L], int64 lengths [n]), L the longest caption or `context` if that is less.

        Padded with 0, which is also the id of "!": the lengths say what is padding. A caption that is too long
        loses its last words, never its end token.
        """
        rows = [[self.start, *self.encode(text), self.end] for text in texts]
        longest = max(map(len, rows), default=2)
        context = min(longest, context or longest)
        lengths = np.array([min(len(row), context) for row in rows], np.int64)
        ids = np.zeros((len(rows), context), np.uint16)  # int16 would not hold 49,407
        for out, row in zip(ids, rows):
            out[: min(len(row), context)] = row if len(row) <= context else [*row[: context - 1], self.end]
        return ids, lengths


POSTER = {  # the record printed on the poster; fMoW, Iquitos, Peru
    "gsd": [11.4546, 9.1344], "multispectral_gsd": 41.1896, "pixel_size": [1.03e-04, 8.23e-05],
    "timestamp": "2015-09-21T15:30:08Z", "location": [-73.310776, -3.785814], "utm_zone": "18M",
    "country_code": "PER", "cloud_cover": 14, "scan_direction": "Reverse", "wavelengths": [661, 545, 477],
    "target_azimuth_angle": 39.12, "sun_azimuth_angle": 77.28, "sun_elevation_angle": 70.44,
    "off_nadir_angle": 27.70, "sensor_platform": "GEOEYE01",
}  # fmt: skip

if __name__ == "__main__":
    for fields in (parse_fields(DEFAULT_FIELDS), parse_fields("all")):
        text = caption(POSTER, fields)
        print(f"{text}\n  {len(Tokenizer().encode(text))} tokens, start and end not counted")
    numbers, categories = table_row(POSTER, fields)
    print(dict(zip(number_columns(fields), numbers)))
    print(dict(zip([f.name for f in fields if f.kind == "category"], categories)))
