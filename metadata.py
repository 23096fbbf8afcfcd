"""Metadata of a satellite image, as a caption or as a table row (paper, Section 4.2, supplement B and E).

In this order: the paper's 15 fields -> fields of one's own -> one value checked and printed -> a record as a
caption -> a record as a row of table features -> the byte-pair tokenizer that turns captions into integers.

    python metadata.py        # the poster's record: its caption, its 207 tokens and its table features

A record is a plain dict {field name: value}. A value that is absent, empty, not finite, of the wrong kind
or out of range is *missing*: left out of the caption, a missing-value token in the table, for that field of
that sample alone. It is never replaced by zero.

Letters used everywhere: B local batch, G global batch, F metadata fields, L text tokens, N patches,
D width, E joint dimension, H heads, C classes; n is the number of samples of a split.
"""

import dataclasses
import gzip
import html
import json
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


def parse_fields(names: str, own: dict[str, Field] | None = None) -> tuple[Field, ...]:
    """ "gsd,location" -> those fields in that order; "all" -> the data's own, or without any the paper's 15.

    own: fields that the data define (`fields.json`). BadInput on unknown or repeated names."""
    known = FIELDS | (own or {})
    if names == "all":
        return tuple((own or FIELDS).values())
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        what = f"unknown field {unknown[0]!r}" if unknown else "no field given"
        raise BadInput(f"--fields: {what}; choose from {', '.join(known)}, or 'all'")
    if len(set(chosen)) < len(chosen):
        raise BadInput(f"--fields: {names!r} names a field twice")
    return tuple(known[name] for name in chosen)


# -----------------------------------------------------------------------------------------------------
# Fields of one's own: columns of any table, their kinds inferred from their values

ALIASES = {  # names of the SpatioTemporal Asset Catalog (STAC) -> the paper's
    "datetime": "timestamp", "eo:cloud_cover": "cloud_cover", "view:off_nadir": "off_nadir_angle",
    "view:azimuth": "target_azimuth_angle", "view:sun_azimuth": "sun_azimuth_angle",
    "view:sun_elevation": "sun_elevation_angle", "platform": "sensor_platform",
}  # fmt: skip
COORDINATES = (("longitude", "latitude"), ("lon", "lat"), ("lng", "lat"), ("long", "lat"))
BLANKS = {"", "-", "?", "n/a", "nan", "null", "none"}  # what tables write for nothing; NA is Namibia
RESERVED = ("file_name", "area", "label", "split")  # columns that are not metadata
KINDS = ("number", "category", "timestamp", "location", "list", "skip")


def is_metadata(column: str) -> bool:
    return column not in RESERVED and not column.startswith("label_") and not column.endswith("_inferred")


def canonical(row: dict) -> dict:
    """A table's row with its blanks left out, lists out of their text, two coordinates as one `location`, STAC's
    names replaced by the paper's. A row that has nothing of this comes back as it is."""
    record = {}
    for name, value in row.items():
        if value is None:
            continue
        if isinstance(value, bool) and name not in FIELDS:
            value = str(value).lower()
        if isinstance(value, str):
            if value.strip().lower() in ({""} if name.startswith("label") else BLANKS) and name != "file_name":
                continue  # though a class may be called "none"
            if value.startswith("[") and value.endswith("]"):
                try:
                    value = json.loads(value)
                except ValueError:
                    pass
        record[ALIASES.get(name, name)] = value
    if "location" not in record:
        lower = {name.lower(): name for name in row}
        for pair in COORDINATES:
            if all(part in lower for part in pair):
                place = [record.pop(lower[part], None) for part in pair]
                record |= {"location": place} if None not in place else {}
                break
    return record


def infer_field(name: str, values: list) -> tuple[Field | None, str]:
    """What a column is, from its values (None and blanks left out) -> (the field, a remark for the reader).

    A column is what nine tenths of its values are; the rest are then malformed, hence missing. A column of
    single-use text is an identifier, of which nothing can be learned: None."""
    if name in FIELDS:
        return FIELDS[name], "as in the paper"
    values = [v for v in values if str(v).strip().lower() != "na"] or values
    parsed = {
        "number": [parse_number(v, Field(name, "number")) for v in values],
        "timestamp": [None if re.fullmatch(r"\d{1,7}", str(v).strip()) else parse_timestamp(v) for v in values],
        "list": [v if isinstance(v, list) and len(v) == len(values[0]) and numeric(v) else None for v in values]
        if values and isinstance(values[0], list) else [],
    }  # fmt: skip
    for kind in ("timestamp", "list", "number"):  # 20150921 is a date before it is a number, 2015 is a number
        good = [v for v in parsed[kind] if v is not None]
        if good and len(good) >= 0.9 * len(values):
            odd = len(values) - len(good)
            remark = f"{odd} of {len(values)} values are none, hence missing" if odd else ""
            return field_of_kind(name, kind, good), remark
    different = len({str(v) for v in values})
    if not values or (different > 20 and different > 0.5 * len(values)):
        return None, f"left out: {different} different values in {len(values)} rows"
    return field_of_kind(name, "category", values), f"{different} values"


def numeric(values: list) -> bool:
    return all(parse_number(v, Field("", "number")) is not None for v in values)


def field_of_kind(name: str, kind: str, values: list) -> Field | None:
    """A field of a kind that is known; `values` tell how to print it and how many components it has."""
    if kind == "location":
        return dataclasses.replace(FIELDS["location"], name=name)
    if kind in ("number", "list"):
        numbers = [float(x) for v in values for x in (v if isinstance(v, list) else [v]) if numeric([x])]
        style = "%.0f" if all(x.is_integer() for x in numbers) else "%.6g"
        longest = max((len(v) for v in values if isinstance(v, list)), default=0)
        return Field(
            name, "number", style=style, parts=tuple(map(str, range(1, longest + 1))) if kind == "list" else ()
        )
    return None if kind == "skip" else Field(name, kind)


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
    if field.parts == ("longitude", "latitude") and numbers[1] is not None and abs(numbers[1]) > 90:
        return None
    return None if None in numbers else numbers


TIMESTAMP = re.compile(
    r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?)?)?", re.ASCII
)


CLOCK = re.compile(r"(?s)(.*?)(?:[T ,]+(\d\d?:\d\d(?::\d\d(?:\.\d+)?)?|\d{6}(?=Z)) ?(Z|[+-]\d\d:?\d\d)?)?", re.ASCII)
DATES = ("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%Y%m%d", "%d %b %Y", "%d-%b-%Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y")


def iso_timestamp(value: object, day_first: bool | None = None) -> str | None:
    """A date as people write it -> ISO 8601, or None. An ISO string comes back as it is: the poster prints it raw.

    day_first: how to read 03/04/2015. None: not at all, as it may be either; 21/04/2015 can only be April."""
    text = value.strip() if isinstance(value, str) else ""
    if TIMESTAMP.fullmatch(text) or not any(c.isdigit() for c in text):
        return text or None
    date, clock, zone = CLOCK.fullmatch(text).groups()
    numbers = re.fullmatch(r"(\d\d?)[/.-](\d\d?)[/.-](\d{4})", date, re.ASCII)
    if numbers:
        first, second, year = map(int, numbers.groups())
        if day_first is None and first != second and max(first, second) <= 12:
            return None
        day, month = (first, second) if (second <= 12 if day_first is None else day_first) else (second, first)
        parsed = f"{year}-{month:02d}-{day:02d}"
    else:
        for style in DATES if not re.fullmatch(r"\d{1,7}", date) else ():  # strptime takes 123456 for a day of 1234
            try:
                parsed = datetime.strptime(date, style).strftime("%Y-%m-%d")
                break
            except ValueError:
                continue
        else:
            return None
    if clock and ":" not in clock:
        clock = f"{clock[:2]}:{clock[2:4]}:{clock[4:]}"
    return f"{parsed}T{'0' * (clock[1] == ':')}{clock}{zone or ''}" if clock else parsed


def parse_timestamp(value: object) -> list[float] | None:
    """A date -> [year, month, day, hour, weekday] in UTC, or None when it is none.

    A date may stop early ("2004-10" is a month): the parts it does not give are NaN. Monday is weekday 0.
    """
    match = TIMESTAMP.fullmatch(iso_timestamp(value) or "")
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
    """A category as text, or None. Whole numbers are accepted; lone surrogates (broken UTF-16) are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
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
        return iso_timestamp(value) if parse_timestamp(value) else None
    return parse_category(value)


def rounded(fields: tuple[Field, ...], digits: int) -> tuple[Field, ...]:
    """The fields printed with at most that many decimals (--digits)."""

    def fewer(style: re.Match) -> str:
        decimals, kind = int(style[1]), style[2]
        return f"%.{digits}f" if kind == "g" else f"%.{min(digits, decimals)}{kind}"  # g counts digits, not decimals

    return tuple(dataclasses.replace(f, style=re.sub(r"^%\.(\d+)([efg])$", fewer, f.style)) for f in fields)


def caption(record: dict, fields: tuple[Field, ...]) -> str:
    """ "key1: value1, ..., keyn: valuen" over the fields that the record has."""
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


def periods(fields: tuple[Field, ...]) -> list[int]:
    """Of each numerical feature its period; 0 for none, -1 for the latitude that follows a longitude."""
    found = []
    for field in fields:
        if field.kind == "timestamp":
            found += [{"month": 12, "hour": 24, "weekday": 7}.get(part, 0) for part in TIME_PARTS]
        elif field.parts == ("longitude", "latitude"):
            found += [360, -1]
        elif field.kind == "number":
            angle = field.name.endswith("azimuth_angle")
            found += [360 if angle else 0] * max(1, len(field.parts))
    return found


def cyclic_features(numbers: np.ndarray, periods: list[int]) -> np.ndarray:
    """Features [n, F_num] without a jump (--cyclic-features): what has a period as sine and cosine, longitude and
    latitude as a point of the unit sphere, all else as it is."""
    columns = []
    for x, period in zip(numbers.T, periods, strict=True):
        if period > 0:
            angle = 2 * np.pi * x / period
            columns += [np.sin(angle), np.cos(angle)]
        elif period < 0:
            columns[-2:] = [column * np.cos(np.radians(x)) for column in columns[-2:]] + [np.sin(np.radians(x))]
        else:
            columns.append(x)
    return np.stack(columns, 1) if columns else numbers


MISSING, UNKNOWN = 0, 1  # the first two rows of every category embedding


@dataclass
class Categories:
    """n categorical values: the different ones, and which of them each row has."""

    values: list[str]
    codes: np.ndarray  # int32 [n], -1 where missing

    def __getitem__(self, i: int) -> str | None:
        return None if self.codes[i] < 0 else self.values[self.codes[i]]


@dataclass(frozen=True)
class TableSchema:
    """How raw table features become the encoder's input; fitted on the training split, kept in the checkpoint."""

    numbers: list[str]  # names of the raw numerical features
    mean: list[float]  # of the features that the encoder takes
    std: list[float]
    categories: dict[str, list[str]]  # field name -> the values seen in training, sorted
    periods: list[int] | None = None  # of the raw features, when the encoder takes cyclic_features of them

    @staticmethod
    def fit(
        fields: tuple[Field, ...], numbers: np.ndarray, categories: list[Categories], cyclic: bool = False
    ) -> "TableSchema":
        """numbers [n, F_num] with NaN where missing; categories: those of each category field."""
        numbers = cyclic_features(numbers, periods(fields)) if cyclic else numbers
        known = ~np.isnan(numbers)
        count = np.maximum(known.sum(0), 1)
        mean = np.where(known, numbers, 0).sum(0) / count
        std = np.sqrt((np.where(known, numbers - mean, 0) ** 2).sum(0) / count)
        std = np.where(std > 1e-9 * np.maximum(np.abs(mean), 1), std, 1)  # a constant column stays 0, not noise
        names = [f.name for f in fields if f.kind == "category"]
        values = [sorted(column.values) for column in categories]
        repeat = periods(fields) if cyclic else None
        return TableSchema(number_columns(fields), mean.tolist(), std.tolist(), dict(zip(names, values)), repeat)

    def encode(self, numbers: np.ndarray, categories: list[Categories]) -> tuple[np.ndarray, np.ndarray]:
        """-> float32 [n, F_num] standardised, NaN where missing; int64 [n, F_cat]: MISSING, UNKNOWN, then 2, 3, ..."""
        numbers = cyclic_features(numbers, self.periods) if self.periods else numbers
        scaled = ((numbers - np.array(self.mean)) / np.array(self.std)).astype(np.float32)
        encoded = np.empty((len(numbers), len(self.categories)), np.int64)
        for i, (seen, column) in enumerate(zip(self.categories.values(), categories)):
            code = {value: j + 2 for j, value in enumerate(seen)}
            encoded[:, i] = np.array([*(code.get(value, UNKNOWN) for value in column.values), MISSING])[column.codes]
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
    """Text -> CLIP's token ids. `encode` gives the bare ids; calling it adds start and end."""

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

    def __call__(self, text: str) -> list[int]:
        """A caption as the encoder reads it: its ids between the start and the end token."""
        return [self.start, *self.encode(text), self.end]


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
