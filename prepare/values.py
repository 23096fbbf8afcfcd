"""One value in the forms of other programs -> as metadata.py reads it.

Dates as cameras, databases and spreadsheets write them become ISO 8601, degrees and minutes decimal
degrees, lists as NumPy, Python, WKT and PostgreSQL print them lists. Only what can mean one thing
alone is read. A time without a zone is taken for UTC.
"""

import contextlib
import re
import unicodedata
from datetime import datetime, timezone

from data import class_name
from metadata import Field, format_value, parse_number, parse_timestamp

ISO = re.compile(r"\d{4}(-\d\d(-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?)?)?")
BASIC = re.compile(r"(\d{8})(?:\D?(\d{4}\S*))?")  # Sentinel-2's 20170601T101031
DAYS = ("%Y-%m-%d", "%d-%b-%Y", "%d-%B-%Y", "%b-%d-%Y", "%B-%d-%Y")
ORDERS = {"day-first": ("%d-%m-%Y",), "month-first": ("%m-%d-%Y",), "": ("%d-%m-%Y", "%m-%d-%Y")}
CLOCK = re.compile(r"[T ,]+(\d\d?)(:\d\d[\d:.]*) ?([AP]M)? ?(Z|[+-][\d:]+)?$", re.I)
LIST = re.compile(r"(?:POINT|array|tensor)?\s*[\[({]+(.*?)[\])}]+", re.S)
DEGREES = re.compile(r"([NSEW]?)\s*(-?)([\d.\s°º˚'’′\"”″:]+)([NSEW]?)")


def parse_day(text: str, dates: str) -> str | None:
    """A day as people write it -> 2015-09-21, or None where it may be two days."""
    text, days = re.sub("[-/.:, ]+", "-", text), set()
    for form in DAYS + ORDERS[dates]:
        with contextlib.suppress(ValueError):
            days.add(datetime.strptime(text, form).date().isoformat())
    return days.pop() if len(days) == 1 else None


def parse_date(value: object, dates: str = "") -> str | None:
    """A date as cameras, databases and people write it -> ISO 8601, or None. What is in ISO 8601
    comes back as it is: the poster prints it raw.

    dates: "day-first" or "month-first" for 03/04/2015, or a format of strptime."""
    text = re.sub(r"^(\d{4}|\d{8,})\.0$", r"\1", str(value).strip())  # pandas, beside gaps
    text = re.sub(r" ?(UTC|GMT)$", "Z", text)
    timed, basic, clock = True, BASIC.fullmatch(text), CLOCK.search(text)
    try:
        if "%" in dates:
            moment, timed = datetime.strptime(text, dates), re.search("%[HIcXT]", dates)
        elif ISO.fullmatch(text):
            return text if parse_timestamp(text) else None
        elif re.fullmatch(r"\d{9}|(?!19|20)(\d{10}|\d{12})|\d{13}", text):
            # Seconds or milliseconds since 1970; 2015092115 may be an hour of 2015
            seconds = int(text) / (1000 if len(text) > 10 else 1)
            moment = datetime.fromtimestamp(seconds, timezone.utc)
        elif basic:
            timed = basic[2]
            moment = datetime.fromisoformat(f"{basic[1]}T{timed or '00'}")
        elif clock:
            day, (hour, rest, half, zone) = text[: clock.start()], clock.groups("")
            hour = int(hour) % 12 + 12 * (half.upper() == "PM") if half else int(hour)
            text = f"{parse_day(day, dates)}T{hour:02d}{rest}{zone}"
            moment = datetime.fromisoformat(text)
        else:
            return parse_day(text, dates)
    except ValueError:
        return None
    return moment.isoformat().replace("+00:00", "Z") if timed else moment.date().isoformat()


def plain_number(value: object) -> int | float | None:
    """A number, also out of its text, which CSV writes; 0,5 is one, 1,234 may be another."""
    comma = re.fullmatch(r"\s*([-+]?\d+),(\d+)\s*", value) if isinstance(value, str) else None
    if comma and (len(comma[2]) != 3 or int(comma[1]) == 0):
        value = f"{comma[1]}.{comma[2]}"
    number = parse_number(value, Field("", "number"))
    whole = number is not None and re.fullmatch(r"[-+]?\d{1,15}", str(value).strip())
    return int(value) if whole else number


def plain_list(value: object) -> list | None:
    """Numbers out of [0.5, 0.4], [0.5 0.4], (0.5, 0.4), {0.5,0.4}, POINT (0.5 0.4)."""
    if isinstance(value, str):
        inner = LIST.fullmatch(value.strip())
        value = re.split(r"[\s,;]+", inner[1].strip()) if inner else None
    if not isinstance(value, (list, tuple)) or not value:
        return None
    numbers = [plain_number(v) for v in value]
    return None if None in numbers else numbers


def several(value: object) -> bool:
    """A list or an object, also as its text; "(other)" and "[other]" are names."""
    shape = re.compile(r"[\[({]['\"].*|[\[{].*[,:].*[\]}]", re.S)
    return isinstance(value, (list, dict)) or bool(shape.fullmatch(str(value).strip()))


def degrees(value: object, letters: str = "NSEW") -> float | None:
    """12.5, "12.5 S", 41°24'12.2"N, "N 41 24 12.2" -> degrees; south and west are negative."""
    number = plain_number(value)
    shape = DEGREES.fullmatch(str(value).strip().upper())
    if number is not None or not shape:
        return number
    before, sign, text, after = shape.groups()
    parts = [float(part) for part in re.findall(r"\d+(?:\.\d+)?", text)]
    wrong = before + after not in ("", *letters)  # a latitude where longitudes are
    if wrong or not 1 <= len(parts) <= 3 or max(parts[1:], default=0) >= 60 or sum(parts[:-1]) % 1:
        return None
    number = sum(part / 60**i for i, part in enumerate(parts))
    return round(-number if sign or before + after in ("S", "W") else number, 6)


def plain_place(value: object) -> list[float] | None:
    """Longitude and latitude; longitudes from 180 to 360 become -180 to 0."""
    pair = value if isinstance(value, list) else plain_list(value) or ()
    if len(pair) != 2:
        return None
    place = [degrees(pair[0], "EW"), degrees(pair[1], "NS")]
    if None not in place and 180 < place[0] <= 360:
        place[0] = round(place[0] - 360, 9)
    return place


def plain_class(value: object, where: str) -> str | None:
    """A category, class or area: one, however it is written (1.0, TRUE, letters in parts)."""
    name = class_name(unicodedata.normalize("NFC", str(value).strip()), where)
    return name.lower() if name in ("True", "TRUE", "False", "FALSE") else name


def plain_value(value: object, field: Field, dates: str = "") -> object:
    """A value as metadata.py reads it, or None where it cannot be read."""
    if field.kind == "timestamp":
        plain = parse_date(value, dates)
    elif field.kind == "category":
        plain = None if value is None or several(value) else plain_class(value, field.name)
    elif field.parts == ("longitude", "latitude"):
        plain = plain_place(value)
    elif field.parts:
        plain = plain_list(value) or plain_number(value)
    else:
        plain = plain_number(value)
    return None if format_value(plain, field) is None else plain
