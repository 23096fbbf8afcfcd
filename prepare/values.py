"""One value in the forms of other programs -> as metadata.py reads it.

Dates of cameras, databases and spreadsheets become ISO 8601, degrees and minutes degrees, lists as
NumPy, tuples, WKT and PostgreSQL print them lists. Only what can mean one thing alone is read.
"""

import re
from datetime import datetime, timezone

from data import class_name
from metadata import Field, format_value, parse_number, parse_timestamp

ZONE = r"(Z|[+-]\d\d(?::?\d\d)?)?"  # PostgreSQL writes +02
ISO = re.compile(
    r"\d{4}(-\d\d(-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?)?)?", re.ASCII
)
CLOCK = re.compile(r"[T ,]+(\d\d?):(\d\d)(:\d\d(?:\.\d+)?)? ?([AP]M)? ?" + ZONE, re.I)
COMPACT = re.compile(r"(\d{8})[T ]?(\d\d)(\d\d)(\d\d(?:\.\d+)?)?" + ZONE)
LIST = re.compile(r"(?:SRID=\d+;)?(?:POINT|array)?\s*[\[({](.*)[\])}]", re.S)
DEGREES = re.compile(r"([NSEW]?)\s*(-?)([\d.\s°º˚'’′\"”″:]+)([NSEW]?)")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def parse_day(text: str, dates: str) -> str | None:
    """A day as people write it -> 2015-09-21, or None where it may be two days."""
    year_first = re.fullmatch(r"(\d{4})([-/.: ])(\d\d?)\2(\d\d?)|(\d{4})(\d\d)(\d\d)", text)
    year_last = re.fullmatch(r"(\d\d?)([-/. ])(\d\d?)\2(\d{4})", text)
    words = re.fullmatch(r"(\d\d?)[-/. ]*([a-z]{3,9})[-/., ]*(\d{4})", text, re.I)
    month_word = re.fullmatch(r"([a-z]{3,9})[-/. ]*(\d\d?),? +(\d{4})", text, re.I)
    if year_first:
        year, month, day = [int(n) for n in year_first.groups() if n and n.isdigit()]
    elif year_last:
        day, month, year = int(year_last[1]), int(year_last[3]), int(year_last[4])
        if dates == "month-first" or (not dates and month > 12):
            day, month = month, day
        elif not dates and day <= 12 and day != month:
            return None
    elif words or month_word:
        day, name, year = words.groups() if words else (month_word[2], month_word[1], month_word[3])
        if name[:3].lower() not in MONTHS:
            return None
        month = MONTHS.index(name[:3].lower()) + 1
    else:
        return None
    return f"{int(year)}-{month:02d}-{int(day):02d}"


def parse_date(value: object, dates: str = "") -> str | None:
    """A date as cameras, databases and people write it -> ISO 8601, or None. What is in ISO 8601
    comes back as it is: the poster prints it raw.

    dates: "day-first" or "month-first" for 03/04/2015, or a format of strptime."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    text = re.sub(r"^(\d{8,})\.0$", r"\1", str(value).strip())  # pandas, where others are missing
    try:
        if "%" in dates:
            moment = datetime.strptime(text, dates)
            hours = re.search("%[HIcXT]", dates)  # else the hour is unknown, not 0
            return moment.isoformat() if hours else moment.date().isoformat()
        if re.fullmatch(r"\d{9,10}|\d{12,13}", text):  # since 1970
            seconds = int(text) / (1000 if len(text) > 10 else 1)
            iso = datetime.fromtimestamp(seconds, timezone.utc).isoformat()
            return iso.replace("+00:00", "Z")
    except ValueError:
        return None
    if ISO.fullmatch(text):
        return text if parse_timestamp(text) else None
    text = re.sub(r"^(mon|tue|wed|thu|fri|sat|sun)[a-z]*,? +", "", text, flags=re.I)
    text = re.sub(r" ?(UTC|GMT)$", "Z", text)
    compact = COMPACT.fullmatch(text)
    if compact:
        day, hour, minute, second, zone = compact.groups()
        text = f"{day}T{hour}:{minute}{':' + second if second else ''}{zone or ''}"
    clock = CLOCK.search(text)
    if clock and clock.end() < len(text):
        return None
    day = parse_day(text[: clock.start()] if clock else text, dates)
    if day and clock:
        hour, minute, second, half, zone = clock.groups()
        hour = int(hour) % 12 + 12 * (half.upper() == "PM") if half else int(hour)
        zone = f"{zone}:00" if zone and len(zone) == 3 else zone or ""
        day = f"{day}T{hour:02d}:{minute}{second or ''}{zone}"
    return day if day and parse_timestamp(day) else None


def plain_number(value: object) -> int | float | None:
    """A number, also out of its text, which CSV writes; 0,5 is one, 1,234 may be another."""
    comma = re.fullmatch(r"\s*([-+]?\d+),(\d+)\s*", value) if isinstance(value, str) else None
    if comma and (len(comma[2]) != 3 or int(comma[1]) == 0):
        value = f"{comma[1]}.{comma[2]}"
    number = parse_number(value, Field("", "number"))
    if number is not None and re.fullmatch(r"[-+]?\d{1,15}", str(value).strip()):
        return int(value)
    return number


def plain_list(value: object) -> list | None:
    """Numbers out of [0.5, 0.4], [0.5 0.4], (0.5, 0.4), {0.5,0.4}, POINT (0.5 0.4)."""
    if isinstance(value, str):
        inner = LIST.fullmatch(value.strip())
        value = re.split(r"[\s,;]+", inner[1].strip()) if inner else None
    if not isinstance(value, (list, tuple)) or not value:
        return None
    numbers = [plain_number(v) for v in value]
    return None if None in numbers else numbers


def degrees(value: object) -> float | None:
    """12.5, "12.5 S", 41°24'12.2"N, "N 41 24 12.2" -> degrees; south and west are negative."""
    number = plain_number(value)
    shape = DEGREES.fullmatch(str(value).strip().upper())
    if number is not None or not shape:
        return number
    before, sign, text, after = shape.groups()
    parts = [float(part) for part in re.findall(r"\d+(?:\.\d+)?", text)]
    if not 1 <= len(parts) <= 3 or max(parts[1:], default=0) >= 60 or sum(parts[:-1]) % 1:
        return None
    number = sum(part / 60**i for i, part in enumerate(parts))
    return round(-number if sign or before + after in ("S", "W") else number, 6)


def plain_value(value: object, field: Field, dates: str = "") -> object:
    """A value as metadata.py reads it, or None where it cannot be read."""
    if field.kind == "timestamp":
        plain = parse_date(value, dates)
    elif field.kind == "category":
        plain = None if isinstance(value, (list, dict)) else class_name(value, field.name)
        plain = plain.lower() if plain in ("True", "TRUE", "False", "FALSE") else plain
    elif field.parts == ("longitude", "latitude"):
        pair = value if isinstance(value, list) else plain_list(value) or ()
        plain = [degrees(v) for v in pair]
        if len(plain) == 2 and None not in plain and 180 < plain[0] <= 360:
            plain[0] = round(plain[0] - 360, 9)
    elif field.parts:
        plain = plain_list(value) or plain_number(value)
    else:
        plain = plain_number(value)
    return None if plain is None or format_value(plain, field) is None else plain
