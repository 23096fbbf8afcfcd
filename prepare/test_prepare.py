"""Tests of prepare/: loop, tables, own data, check, the papers' datasets, weights, pictures.

    pytest -q prepare
"""

import argparse
import base64
import csv
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import unicodedata
import zipfile
from pathlib import Path, PosixPath

import numpy as np
import pytest
import regex
import torch
from PIL import Image

import data
import evaluate
import metadata
import model
from data import choose_fields, errors_in_one_line, read_dataset
from metadata import FIELDS, POSTER, BadInput, TableReader, TextReader, caption, parse_fields
from prepare import (
    check, demo, eurosat, fields, fmow, own, scenes, show, so2sat, sources, weights, wilds,
)  # fmt: skip
from prepare.bands import eight_bit_image, read_pixels, three_bands
from prepare.loop import Sample, in_order, prepare
from prepare.rows import deal
from prepare.sources import encode
from prepare.stac import centre, rank, read_items
from prepare.tables import Row, printable, read_table
from prepare.values import degrees, parse_date, plain_list, plain_value


def own_images(folder: Path, *names: str, size: tuple[int, int] = (16, 16)) -> Path:
    """Images, each of another gray -> their folder."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (3 * i % 256, 9, 9)).save(folder / name)
    return folder


def own_rows(folder: Path) -> dict[str, list[dict]]:
    """Both splits of a prepared dataset, and its quarantine."""
    found = {}
    for name in ("train/metadata", "test/metadata", "quarantine"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        found[name.split("/")[0]] = [json.loads(line) for line in lines]
    return found


def run_own(*argv) -> dict[str, list[dict]]:
    """prepare.own TABLE IMAGES DIR ... -> what it wrote."""
    own.main([*map(str, argv), "--jobs", "0"])
    return own_rows(Path(argv[2]))


def one_line(main, *argv) -> str:
    """The one line with which a program refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, argv)))
    line = str(stopped.value)
    assert line.startswith("error: ") and "\n" not in line
    assert "0x" not in line and "Error" not in line
    return line


def table_of(folder: Path, n: int = 24, name: str = "table.csv", **columns) -> list[Path]:
    """A table of n images, the last four for the test split; columns: i -> cell -> TABLE IMAGES"""
    own_images(folder / "images", *[f"{i}.png" for i in range(n)])
    rows = []
    for i in range(n):
        row = {"file_name": f"{i}.png", "split": "test" if i >= n - 4 else "train"}
        rows.append(row | {column: cell(i) for column, cell in columns.items()})
    if name.endswith(".csv"):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / name, folder / "images"]


# --------------------------------------------------------------------------------------------------
# loop


def make_sample(i: int, wrong: dict = {}) -> object:
    """Item i as its file; what `wrong` has for it is done instead."""
    if i in wrong:
        yield from wrong[i]()
        return
    split = "test" if i % 4 == 3 else "train"
    yield Sample(split, {"file_name": f"{i % 3}/{i}.png"}, b"%d" % i)


def raising(error: Exception) -> object:
    def work():
        raise error
        yield

    return work


def yielding(*made) -> object:
    return lambda: iter(made)


def test_items_become_a_dataset(tmp_path, capsys):
    """Nothing is written outside; problems are alike at each run, no exceptions' own texts."""
    names = ("../../x.png", "/etc/x.png", "", "a/../../b.png", "x" * 300, 5)
    records = [{}, *({"file_name": name} for name in names)]
    wrong = {i: yielding(Sample("train", record, b"!")) for i, record in enumerate(records)}
    wrong[7] = raising(KeyError("band"))
    wrong[8] = raising(FileNotFoundError(2, "No such file or directory", "a.jpg"))
    wrong[9] = raising(BadInput("b.jpg: too dark"))
    wrong[10] = yielding("clouds")
    wrong[11] = yielding(Sample("train", {"file_name": "nan.png", "gsd": math.nan}, b"!"))
    before = sorted(tmp_path.rglob("*"))
    for jobs, name in ((0, "a"), (2, "b")):
        make = functools.partial(make_sample, wrong=wrong)
        prepare(tmp_path / name, list(range(24)), lambda i: make(i), jobs)
    out = capsys.readouterr().out
    assert "9 train images" in out and "3 test images" in out and "left out: clouds" in out
    trees = []
    for name in ("a", "b"):
        files = [p for p in sorted((tmp_path / name).rglob("*")) if p.is_file()]
        trees.append({p.relative_to(tmp_path / name): p.read_bytes() for p in files})
    assert trees[0] == trees[1] and len(trees[0]) == 12 + 4
    assert len((tmp_path / "a/journal.jsonl").read_text().splitlines()) == 1
    assert sorted(tmp_path.glob("*")) == [*before, tmp_path / "a", tmp_path / "b"]
    problems = [entry["problem"] for entry in own_rows(tmp_path / "a")["quarantine"]]
    assert len(problems) == 11 and all("names no file in the dataset" in p for p in problems[:7])
    assert problems[8:10] == ["a.jpg: no such file or directory", "b.jpg: too dark"]
    assert "band" not in problems[7] and "test_prepare.py" in problems[7]


def prepare_slowly(folder: Path, items: list) -> None:
    def make(i: int):
        time.sleep(0.004)
        yield from make_sample(i)

    os.setsid()  # a group of its own, so that the kill reaches its workers, too
    prepare(folder, items, make, 1)


def test_a_killed_preparation_goes_on(tmp_path):
    """Killed after some items, it ends in the same bytes; items that are others are refused."""
    folder, journal = tmp_path / "out", tmp_path / "out.unfinished/journal.jsonl"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=prepare_slowly, args=(folder, list(range(300))))
    process.start()
    while not journal.exists() or journal.read_bytes().count(b"\n") < 41:
        assert process.is_alive()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    with open(journal, "ab") as file:
        file.write(b'{"item": "299", "ro\0\0\n{"item": "298", "rows": []}\n')  # torn, and more
    done = journal.read_bytes().count(b"\n") - 3  # less the first line and these two
    assert 40 <= done < 300
    with pytest.raises(BadInput, match="begun with another table, other files or other options"):
        prepare(folder, list(range(1, 300)), make_sample, 0)
    made = []

    def make(i: int):
        made.append(i)
        yield from make_sample(i)

    prepare(folder, list(range(300)), make, 0)
    assert made == list(range(done, 300)), "what was done is not done again"
    prepare(tmp_path / "undisturbed", list(range(300)), make_sample, 0)
    names = ("train/metadata.jsonl", "test/metadata.jsonl", "quarantine.jsonl", "train/0/297.png")
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_finished_dataset(tmp_path, capsys):
    """Killed at its end, the same command ends well; another is told that the folder exists."""
    for _ in range(2):
        prepare(tmp_path / "out", [0, 1, 2, 3], make_sample, 0)
        with open(tmp_path / "out/journal.jsonl", "a") as journal:
            journal.write("more")  # as after a kill between the last two steps
    assert "exists, made of the same" in capsys.readouterr().out
    for items in ([0, 1, 2, 3, 4], [0, 1, 2, 5]):
        with pytest.raises(BadInput, match="out: exists; remove it first"):
            prepare(tmp_path / "out", items, make_sample, 0)
    with pytest.raises(BadInput, match="no train image came of it; a: dark"):
        prepare(tmp_path / "none", [3, 4], functools.partial(
            make_sample, wrong={4: raising(BadInput("a: dark"))}), 0)  # fmt: skip
    with pytest.raises(BadInput, match="--jobs -3"):
        prepare(tmp_path / "x", [0], make_sample, -3)


def test_a_full_disk_and_a_killed_worker(tmp_path):
    """One line each, and what is done is kept."""
    (tmp_path / "full.unfinished/train/0").mkdir(parents=True)
    os.symlink("/dev/full", tmp_path / "full.unfinished/train/0/0.png")
    with pytest.raises(BadInput, match="no space left on device; what is done is kept"):
        prepare(tmp_path / "full", [0, 3], make_sample, 0)
    die = {2: lambda: os.kill(os.getpid(), signal.SIGKILL)}
    with pytest.raises(BadInput, match="^a process was killed.*kept.*fewer --jobs"):
        prepare(tmp_path / "out", [0, 3, 2], functools.partial(make_sample, wrong=die), 1)
    assert list(in_order([3, 1, 2], str, 2)) == ["3", "1", "2"]


def start_without_room() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    with pytest.raises(BadInput, match=r"cannot start \(too many open files\): see to /dev/shm"):
        list(in_order([3, 1, 2], str, 2))
    os._exit(7)


def test_processes_that_cannot_start():
    child = multiprocessing.get_context("fork").Process(target=start_without_room)
    child.start()
    child.join()
    assert child.exitcode == 7


# --------------------------------------------------------------------------------------------------
# values

DATES = {
    "2015-09-21T15:30:08.5Z": "2015-09-21T15:30:08.5Z", "2015-09": "2015-09", "2015": "2015",
    "2015-09-21 15:30": "2015-09-21 15:30", "2017-06-01T10:10:32+0000": "2017-06-01T10:10:32+0000",
    "2019:05:01 13:49:23": "2019-05-01T13:49:23", "20170601T101031Z": "2017-06-01T10:10:31Z",
    "2020-12-01 23:25:58.745232+02": "2020-12-01T23:25:58.745232+02:00",
    "20150921": "2015-09-21", 20150921: "2015-09-21", "20150921.0": "2015-09-21",
    1442849408000: "2015-09-21T15:30:08Z", 1442849408: "2015-09-21T15:30:08Z",
    "1442849408000.0": "2015-09-21T15:30:08Z",
    "2015/09/21 10:11:12 UTC": "2015-09-21T10:11:12Z", "2015/9/1 9:30": "2015-09-01T09:30:00",
    "9/21/2015 3:30:08 PM": "2015-09-21T15:30:08", "21/9/2015 12:05 am": "2015-09-21T00:05:00",
    "21 Sep 2015": "2015-09-21", "September 21, 2015 10:00": "2015-09-21T10:00:00",
    "20170601_101031": "2017-06-01T10:10:31", "20170601101031": "2017-06-01T10:10:31",
    "2015.9.21 1:02:03.5 +0200": "2015-09-21T01:02:03.500000+02:00", "05.05.2015": "2015-05-05",
    "9/21/2015 25:00": None,
    "03/04/2015": None, "31/31/2015": None, "2015-13-01": None, "page 1\nof 2": None, "abc": None,
    201509211530: "2015-09-21T15:30:00", 2015092115: None, 1042849408: "2003-01-18T00:23:28Z",
    "123456": None, True: None, 12.5: None, "next week 5": None, "1 Smarch 2015": None,
}  # fmt: skip


@pytest.mark.parametrize("value", DATES)
def test_dates_of_other_programs(value):
    """ISO 8601 comes back as it is; others only where they can be one day."""
    assert parse_date(value) == DATES[value]
    if DATES[value]:
        assert metadata.parse_timestamp(DATES[value])


def test_dates_as_the_user_says():
    assert parse_date("03/04/2015", "day-first") == "2015-04-03"
    assert parse_date("03/04/2015 10:00", "month-first") == "2015-03-04T10:00:00"
    assert parse_date("03.04.15", "%d.%m.%y") == "2015-04-03", "its hour is not known"
    assert parse_date("2015-09-21", "%d.%m.%y") is None
    assert parse_date("15h03.04.15", "%Hh%d.%m.%y") == "2015-04-03T15:00:00"


def test_degrees_and_lists():
    for text, expected in {
        "41°24'12.2\"N": 41.403389, "2°10'26.5\"W": -2.174028, "12.2S": -12.2, "26.5 E": 26.5,
        "N 41 24 12.2": 41.403389, "E26°30′": 26.5, "-12.5": -12.5, "41.5 30 N": None,
        "N 12 S": None, "12 70 N": None, "W": None, "": None, "north": None,
        "0,5": 0.5, "-12,25": -12.25, "1,234": None,
    }.items():  # fmt: skip
        assert degrees(text) == expected, text
    for text in ("[0.50 0.40]", "(0.5, 0.4)", "{0.5,0.4}", "array([0.5, 0.4])", "POINT (0.5 0.4)"):
        assert plain_list(text) == [0.5, 0.4], text
    for text in ("[]", "[a b]", "0.5 0.4", [], "POLYGON ((1 2, 3 4))", None):
        assert plain_list(text) is None, text


def test_values_become_what_metadata_reads():
    place, gsd = FIELDS["location"], FIELDS["gsd"]
    assert plain_value([200, 10], place) == [-160, 10] and plain_value([20, 100], place) is None
    assert plain_value(["1 E", "2 S"], place) == [1, -2]
    assert plain_value(["1 N", "2 E"], place) is None
    assert plain_value("0.5", gsd) == 0.5 and plain_value("[0.5 0.4]", gsd) == [0.5, 0.4]
    category = metadata.Field("site", "category")
    given = (1.0, "1.0", "1", 1, True, "TRUE", ["a"], {"a": 1}, "1.5", "Ho\u0308fen", None)
    found = [plain_value(value, category) for value in given]
    assert found == ["1"] * 4 + ["true", "true", None, None, "1.5", "Höfen", None]
    for text in ("['a', 'b']", "['a' 'b']", "('a', 'b')", "{'a': 1}", "[1, 2]", '["a"]'):
        assert plain_value(text, category) is None, text
    assert plain_value("[other]", category) == "[other]" and plain_value("(b, c)", category)


# --------------------------------------------------------------------------------------------------
# tables


def test_tables_by_any_name(tmp_path):
    """Comma, semicolon, tab, Excel's first line, JSON; blank names and lines are passed over."""
    written = {
        "UPPER.CSV": "a,b\n1,x\n\n2,y\n", "tabs.txt": "a\tb\n1\tx\n2\ty\n",
        "excel.csv": "sep=;\na;b\r\n1;x\r\n2;y\r\n", "index.csv": "\ufeff,a,b\n0,1,x\n1,2,y\n",
        "lines.jsonl": '{"a": "1", "b": "x"}\n\n{"a": "2", "b": "y"}',
        "array.json": '[{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]',
        "quoted.csv": 'a,b\n"1",x\n2,"y"\n', "blanks.csv": 'a , b\n1, x\n2, "y"\n,\n',
    }  # fmt: skip
    for name, text in written.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        rows = [row.values for row in read_table(tmp_path / name)]
        assert rows == [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}], name


@pytest.mark.parametrize("content, needle", [
    ("a,b\nx,Häfen\n".encode("latin-1"), "t, line 2: not UTF-8"),
    ("a,b\nx,y\n".encode("utf-16"), "t, line 1: not UTF-8"),
    (b'a,b,c\n1,2,3\n4,"5,6\n7,8,9\n', "t, line 3: a quotation mark that is never closed"),
    (b'a,b,c\n1.png,"2,3\n4.png,5",6\n', "t, line 2: a cell of 2 lines with names of images"),
    (b'a,b,c\n1.PNG,2,"3\n4.PNG,5,6\n7.PNG,8,9"\n', "t, line 2: a cell of 3 lines with names of"),
    (b"a,b,c\n1,2,3\n4,5\n", "t, line 3: 2 cells for 3 columns"),
    (b"a,b\n1,2\n4,5,6\n", "t, line 3: 3 cells for 2 columns"),
    (b'a,b\n1,"2"3\n', "t, line 2: a quotation mark within a cell"),
    ("a,b\n1,2\n".encode("utf-16-le"), "t, line 1: not UTF-8"),
    (b"0.png,2\n1.png,3\n", "t, line 1: 0.png, an image; wanted are names of columns"),
    (b"gsd, gsd \n1,2\n", "two columns are called 'gsd'"), (b"", "t: no rows"),
    (b"a,b\n1," + b"x" * 2**20 + b"x\n", "or a cell of more than 1,048,576 characters"),
    (b'{"a": 1, "a": 2}', "t, line 1: 'a' comes twice"), (b"[1]", "t, entry 1: not a JSON object"),
    (b"{a: 1}", "t, line 1: not JSON; a table is CSV"),
    (b'{"a": 1}\n{"a": "\\ud83d"}', "t, line 2: half a character"),
    (b'{"a": {"0": 1, "1": 2}, "b": {"0": 3, "1": 4}}', 't: one JSON object; a table is CSV'),
    (b'{"type": "FeatureCollection", "features": []}', "GeoJSON: save it as CSV"),
    (b'{\n "type": "FeatureCollection",\n "features": []\n}', "GeoJSON: save it as CSV"),
])  # fmt: skip
def test_tables_that_would_be_read_wrong(content, needle, tmp_path):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(BadInput) as refused:
        read_table(tmp_path / "t")
    assert needle in str(refused.value) and "\n" not in str(refused.value)


def test_long_cells_and_cells_of_several_lines(tmp_path):
    coast = "POLYGON ((" + "10.000001 50.000001, " * 8000 + "))"
    text = f'a,b\n1,"{coast}"\n"two\nlines, yes",z\n'
    (tmp_path / "t.csv").write_text(text)
    rows = read_table(tmp_path / "t.csv")
    assert rows[0].values["b"] == coast and rows[1].values == {"a": "two\nlines, yes", "b": "z"}
    assert printable("a\n\x1b[31m" + "b" * 90) == "a\\x0a\\x1b[31m" + "b" * 44 + "..."


# --------------------------------------------------------------------------------------------------
# stac


def ring(west: float, south: float, east: float, north: float) -> list:
    return [[[west, south], [east, south], [east, north], [west, north], [west, south]]]


def test_centres_across_the_180th_meridian():
    """The middle of the parts; a box whose west is larger than its east crosses (RFC 7946, 5.2)."""

    def of(*parts, box=None) -> list[float]:
        if not parts:
            return centre({"bbox": box, "geometry": None})
        coordinates = [ring(*part) for part in parts] if len(parts) > 1 else ring(*parts[0])
        kind = "MultiPolygon" if len(parts) > 1 else "Polygon"
        return centre({"bbox": box, "geometry": {"type": kind, "coordinates": coordinates}})

    assert of(box=[178.6, -17.3, -179.4, -16.3]) == [179.6, -16.8]
    assert of(box=[179.0, -15.0, 0.0, -178.0, -13.0, 500.0]) == [-179.5, -14.0]
    assert of(box=[12.0, 41.0, 13.0, 42.0]) == [12.5, 41.5]
    assert of(box=[100, 0, 50, 10]) == [-105, 5] and of(box=[-170, 0, 170, 10]) == [0, 5]
    around = [-180, -17, 180, -16]
    assert of((178, -17, 180, -16), (-180, -17, -179, -16), box=around) == [179.5, -16.5]
    assert of((179.5, -17, -179.5, -16)) == [180, -16.5]
    assert of((20, 59.99, 20.02, 60)) == [20.01, 59.995]
    assert of((-1, 50, 0, 52), (0, 50, 3, 51)) == [1, 51] and of((-180, -90, 180, 90)) == [0, 0]
    assert centre({"geometry": {"type": "Point", "coordinates": [5, 6, 100]}}) == [5, 6]
    assert centre({"geometry": None}) is None and of(box=[1, 2, 3]) is None


def test_which_asset_is_the_image(tmp_path, capsys):
    """By role and key, however they are ordered; the asset's own gsd; what is taken is told."""
    rgb = [{"name": f"B0{i}", "common_name": c} for i, c in ((4, "red"), (3, "green"), (2, "blue"))]
    order = [
        {"roles": ["visual"]}, {"roles": ["data"], "eo:bands": rgb}, {"roles": ["overview"]},
        {"roles": []}, {"roles": ["data", "reflectance"]}, {"roles": ["thumbnail"]},
    ]  # fmt: skip
    ranks = [rank("key", asset, False) for asset in order]
    assert ranks == sorted(ranks) and len(set(ranks)) == 6
    assert rank("Thumbnail", {}, False) == rank("quicklook", {"bands": None}, False) == 7
    assert rank("key", {"roles": ["data"]}, True) < rank("key", {"roles": ["overview"]}, False)
    names = ("a/AOT.png", "a/preview.jpg", "a/TCI a.png", "b/thumb.png", "c.png", "d/B04.png")
    own_images(tmp_path, *names)
    data, thumbnail = {"href": "./AOT.png", "roles": ["data"]}, {"roles": ["thumbnail"]}
    far = {"href": "https://x/y.tif"}
    items = {
        "a/a": {"aot": data, "thumbnail": thumbnail | {"href": "preview.jpg"},
                "visual": {"href": "./TCI%20a.png", "gsd": 10}},
        "b/b": {"thumbnail": thumbnail | {"href": "thumb.png"}, "visual": far},
        "c": {}, "e": {"visual": far},
        "d/d": {"B04": {"href": f"file://{tmp_path}/d/B04.png", "roles": ["data"]}},
    }  # fmt: skip
    for name, assets in items.items():
        about = {"datetime": "2017-12-01T14:00:00Z", "gsd": 60, "instruments": ["msi"]}
        item = {"type": "Feature", "bbox": [1, 2, 3, 4], "assets": assets, "properties": about}
        (tmp_path / f"{name}.json").write_text(json.dumps(item))
    (tmp_path / "catalog.json").write_text('{"type": "Catalog"}')
    (tmp_path / "broken.json").write_text('{"type": "Feature"}')
    (tmp_path / "._a.json").write_text("macOS")
    found = run_own(tmp_path, tmp_path, tmp_path / "out", "--test-share", 0.5)
    rows = {row["file_name"]: row for row in found["train"] + found["test"]}
    assert rows.keys() == {"a/TCI a.png", "b/thumb.png", "c.png", "d/B04.png"}
    assert rows["a/TCI a.png"] == {
        "file_name": "a/TCI a.png", "timestamp": "2017-12-01T14:00:00Z", "gsd": 10,
        "location": [2, 3],
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "asset visual: 1" in out and "asset thumbnail: 1" in out and "macOS" in out
    assert "datetime -> timestamp" in out and "left out; 1 different" in out
    assert choose_fields(tmp_path / "out", "all") == tuple(
        FIELDS[name] for name in ("timestamp", "gsd", "location"))  # fmt: skip
    problems = [entry["problem"] for entry in found["quarantine"]]
    assert problems == [
        f"{tmp_path}/broken.json: no image file of it is here; its assets: none",
        f"{tmp_path}/e.json: no image file of it is here; its assets: visual (https://x/y.tif)",
    ]
    line = one_line(own.main, tmp_path, tmp_path, tmp_path / "x", "--asset", "nope")
    assert "no image file of nope is here; its assets: aot (./AOT.png), thumbnail (pre" in line
    bad_points = json.dumps(item | {"geometry": {"coordinates": ["x"]}, "assets": items["a/a"]})
    for wrong in ("{", "[1]", '{"features": 5}', bad_points.replace("./", "a/")):
        (tmp_path / "broken.json").write_text(wrong)
        assert any("broken.json: not a STAC item" in row.problem for row in read_items(tmp_path))


# --------------------------------------------------------------------------------------------------
# bands

JP2 = """
AAAADGpQICANCocKAAAAFGZ0eXBqcDIgAAAAAGpwMiAAAAAtanAyaAAAABZpaGRyAAAAIAAAACAAAw8HAAAAAAAPY29scgEA
AAAAABAAAAGBanAyY/9P/1EALwAAAAAAIAAAACAAAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAAAw8BAQ8BAQ8BAf9SAAwAAAAB
AAUEBAAB/1wAE0CAiIiQiIiQiIiQiIiQiIiQ/2QAJQABQ3JlYXRlZCBieSBPcGVuSlBFRyB2ZXJzaW9uIDIuNS4z/5AACgAA
AAAA+gAB/5PP/DAMCdB/z/wwDAnQf8/8MAwJ0IPAfyBAAAWgP5AgAAXAP2AoB+wEAAUABcA/YFAM9vj736AfsCgLN/5978Af
mCQB+YIADPb4+ws3/n3AH5gwIhh3xNI9oA/MGAN+YYt/G8APwBoAfgDAIhh3xNI3A35hi38XwA/AKDahhTkYEFo8I0+gB+AU
PaYu1lrUsWirj8AH2hMAH2hQNqGFORgQWd1pPaYu1lrUsVhsf8AH2hYAX6fHMrmOqAYKmaGgA+0MAJ2sKV1L2K0AwVqHH8AD
6guAB9QWX6fHMrmOqAYKmZ+drCldS9itAMFahf/Z"""  # red, green, blue of 16 bits, 3100 in the corner


def test_deep_images_are_read_right(tmp_path):
    """Bands first, last or one a page, four bands, LZW, 16 bits; never noise, never black."""
    tifffile = pytest.importorskip("tifffile", reason="tifffile is optional")
    y, x = np.mgrid[0:40, 0:40]
    bands = np.stack([x * 70, y * 70, (x + y) * 35]).astype(np.uint16)
    path, last = tmp_path / "a.tif", np.moveaxis(bands, 0, 2)
    four = {"photometric": "minisblack", "planarconfig": "contig"}
    for pixels, options in (
        (bands, {"planarconfig": "separate", "photometric": "rgb"}),
        (last, {"photometric": "rgb"}), (bands, {"photometric": "minisblack"}),
        (np.concatenate([last, last[..., :1]], 2), four),
        (last.astype(np.float32), {"photometric": "rgb"}),
        (last.astype(np.int16), {"photometric": "rgb"}),
    ):  # fmt: skip
        tifffile.imwrite(path, pixels, **options)
        image = np.asarray(eight_bit_image(path, [0, 3000]))
        assert np.array_equal(image, np.rint(last * (255 / 3000)).clip(0, 255)), options
        with pytest.raises(BadInput, match="a.tif: .*--range"):
            eight_bit_image(path, None)
    image = Image.fromarray((np.arange(1600).reshape(40, 40)).astype(np.uint16))
    for name, options in (("b.tif", {"compression": "tiff_lzw"}), ("b.png", {})):
        image.save(tmp_path / name, **options)
        assert eight_bit_image(tmp_path / name, [0, 1600]).getpixel((20, 10)) == (67, 67, 67)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 4), np.uint8)
    tifffile.imwrite(path, pixels, **four | {"extrasamples": [0] * 3})
    assert np.array_equal(np.asarray(eight_bit_image(path, None)), pixels[..., :3])


def test_deep_netpbm_and_jpeg_2000_are_read_right(tmp_path):
    """As the file has them: Pillow scales their values to 8 or 16 bits."""
    values = np.arange(48).reshape(4, 4, 3) * 60
    for kind, pixels in (("6", values), ("5", values[..., :1])):
        header = f"P{kind}\n# of 12 bits\n4 4\n4095\n".encode()
        (tmp_path / "a.ppm").write_bytes(header + pixels.astype(">u2").tobytes())
        image = np.asarray(eight_bit_image(tmp_path / "a.ppm", [0, 3000]))
        assert np.array_equal(image, np.rint(pixels * (255 / 3000)).repeat(3 // pixels.shape[2], 2))
    with pytest.raises(BadInput, match="a.ppm: 12 bits.*--range"):
        eight_bit_image(tmp_path / "a.ppm", None)
    codecs = pytest.importorskip("imagecodecs", reason="imagecodecs is optional")
    (tmp_path / "a.jp2").write_bytes(base64.b64decode(JP2))
    pixels = eight_bit_image(tmp_path / "a.jp2", [0, 3100])
    assert pixels.getpixel((31, 31)) == (255, 255, 255)
    assert pixels.getpixel((31, 0)) in ((255, 0, 127), (255, 0, 128))
    for name, encoded in (
        ("b.jp2", codecs.jpeg2k_encode(values[..., 0].astype(np.uint16), bitspersample=12)),
        ("b.png", codecs.png_encode(values.astype(np.uint16))),
    ):
        (tmp_path / name).write_bytes(encoded)
        found = np.asarray(eight_bit_image(tmp_path / name, [0, 3000]))
        assert np.array_equal(found[..., 0], np.rint(values[..., 0] * (255 / 3000)))


def test_images_that_cannot_be_read_right_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.jp2").write_bytes(base64.b64decode(JP2))
    with pytest.raises(BadInput, match="a.jp2: 16 bits.*--range"):
        eight_bit_image(tmp_path / "a.jp2", None)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(BadInput, match="a.jp2: a deep JPEG 2000.*pip install imagecodecs"):
        eight_bit_image(tmp_path / "a.jp2", [0, 3100])
    for content in (b"no image", b"II*\0 no image"):
        (tmp_path / "b.tif").write_bytes(content)
        for read in (read_pixels, lambda path: eight_bit_image(path, None)):
            with pytest.raises(BadInput, match="b.tif: (damaged|a TIFF that Pillow)"):
                read(tmp_path / "b.tif")
    with pytest.raises(BadInput, match="wanted are 1 to 4 bands"):
        three_bands(np.zeros((5, 5, 13)), tmp_path, 0, 1)
    pages = [Image.new("L", (8, 8), i) for i in range(3)]
    pages[0].save(tmp_path / "c.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(BadInput, match="c.tif: 3 pages; --range 0 255 reads them as bands"):
        eight_bit_image(tmp_path / "c.tif", None)
    pytest.importorskip("tifffile", reason="tifffile is optional")
    assert eight_bit_image(tmp_path / "c.tif", [0, 255]).getpixel((0, 0)) == (0, 1, 2)


# --------------------------------------------------------------------------------------------------
# fields


def test_kinds_of_columns():
    """What a column is taken for, by nine tenths of its values."""
    columns = {
        "height": (["1.5", 2, "3e3"], "number"), "count": ([1, 2, 3], "number"),
        "bands": ([[1, 2.5], "[3 4]"], "list"), "site": (["a", "b", "7"], "category"),
        "acquired": (["20150921", "2015-09-22", 20150923], "timestamp"),
        "year": ([2015, 2016], "number"), "lengths": ([[1], [1, 2]], "list"),
        "id": ([f"x{i}" for i in range(50)], "skip"), "mixed": ([1] * 95 + ["bad"] * 5, "number"),
        "half": ([1, "bad"] * 5, "category"), "several": ([["a"], ["b"]], "skip"),
        "text of several": (["['a', 'b']", "['a']"] * 5, "skip"),
        "stamp": ([1442849408000, 1442849409000], "number"),
        "Unnamed: 0": (list(range(40)), "skip"), "every other": ([*range(0, 80, 2)], "skip"),
        "constant": ([7] * 40, "number"), "squares": ([i**2 for i in range(40)], "number"),
    }  # fmt: skip
    for name, (values, kind) in columns.items():
        assert fields.kind_of(values) == kind, name
    assert fields.field_for("n", ["1", 2.0]).style == "%.0f"
    assert fields.field_for("n", [[1, 2.5], "[3 4]"] * 9 + [[1, 2, 3]]).parts == ("1", "2")


def test_the_table_of_fields_counts_what_can_be_read(tmp_path, capsys):
    """Of every column, the paper's included; an example of what cannot be read is printed."""
    argv = table_of(
        tmp_path, gsd=lambda i: "wide" if i % 4 == 0 else 0.5 + i, timestamp=lambda i: f"day {i}",
        seen=lambda i: f"0{1 + i % 9}/04/2015", us=lambda i: f"9/{1 + i}/2015",
        slope=lambda i: "n/a" if i % 2 else i, note=lambda i: f"text {i}",
    )  # fmt: skip
    rows = run_own(*argv, tmp_path / "out")["train"]
    out = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "gsd list of 2 75% [1.5000, 1.5000] cannot be read: wide" in out
    assert "timestamp - 0% left out; cannot be read: day 0" in out
    assert "slope number 50% 0" in out
    assert "note - 0% left out; 24 different values, as text 0" in out
    for name in ("seen ", "us "):
        assert any(line.startswith(name) and "--dates day-first or" in line for line in out)
    assert rows[1] == {"file_name": "1.png", "gsd": 1.5, "seen": "02/04/2015"}
    assert rows[2]["slope"] == 2 and choose_fields(tmp_path / "out", "")[0].name == "gsd"


# --------------------------------------------------------------------------------------------------
# own


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
@pytest.mark.parametrize("column, values, expected", [
    ("acquired", [20150901, 20150902], "2015-09-01"),
    ("timestamp", [1442849408000] * 2, "2015-09-21T15:30:08Z"),
    ("gsd", ["[0.50 0.40]"] * 2, [0.5, 0.4]), ("gsd", [10.0, 0.5], 10.0), ("site", [1, 1.0], "1"),
    ("timestamp", [2015.0] * 2, "2015"),
    ("location", ["(12.5, 41.5)"] * 2, [12.5, 41.5]),
    ("exif", ["2019:05:01 13:49:23"] * 2, "2019-05-01T13:49:23"),
])  # fmt: skip
def test_the_same_value_means_the_same(name, column, values, expected, tmp_path):
    argv = table_of(tmp_path, 24, name, **{column: lambda i: values[i % 2]})
    options = ["--types", "site=category"] if column == "site" else []
    row = run_own(*argv, tmp_path / "out", *options)["train"][0]
    assert row == {"file_name": "0.png", column: expected}
    assert list(choose_fields(tmp_path / "out", ""))[0].name == column


def test_places_in_two_columns(tmp_path):
    cells = {
        "LAT": lambda i: f"41°24'{12.2 + i:04.1f}\"N",
        "Lon": lambda i: f"2°10'{26.5 + i:04.1f}\"W",
    }
    rows = run_own(*table_of(tmp_path, **cells), tmp_path / "out")
    assert rows["train"][0]["location"] == [-2.174028, 41.403389]
    skipped = run_own(*table_of(tmp_path, **cells), tmp_path / "x", "--types", "LAT=skip")
    assert set(skipped["train"][0]) == {"file_name"}


def test_of_two_columns_of_one_field_either_can_be_left_out(tmp_path):
    cells = {"platform": lambda i: "s2a", "sensor_platform": lambda i: "MSI"}
    cells["night"] = lambda i: i > 3
    argv = [*table_of(tmp_path, **cells), tmp_path / "out"]
    rows = run_own(*argv, "--types", "sensor_platform=skip")["train"]
    assert rows[4] == {"file_name": "4.png", "sensor_platform": "s2a", "night": "true"}
    argv[2] = tmp_path / "x"
    assert run_own(*argv, "--types", "platform=skip")["train"][0]["sensor_platform"] == "MSI"
    places = {"lon": lambda i: i, "lat": lambda i: "0,5", "location": lambda i: "Rome"}
    argv = [*table_of(tmp_path, **places), tmp_path / "y", "--types", "location=skip"]
    assert run_own(*argv)["train"][1] == {"file_name": "1.png", "location": [1, 0.5]}
    argv = [*table_of(tmp_path, lon=places["lon"], lat=places["lon"]), tmp_path / "z", *argv[3:]]
    assert set(run_own(*argv)["train"][0]) == {"file_name"}


@pytest.mark.parametrize("columns, needle", [
    ({"timestamp": 1, "datetime": 2}, "columns timestamp and datetime mean timestamp"),
    ({"platform": 1, "sensor_platform": 2}, "columns platform and sensor_platform mean"),
    ({"labels": ["a", "b"]}, "labels: a list of classes (['a', 'b']); scores need one class an i"),
    ({"labels": "['a', 'b']"}, "line 1: labels: a list of classes (['a', 'b'])"),
    ({"labels": {"a": 1}}, "labels: a list of classes"),
    ({"Label": 1, "label": 2}, "--label: Label and label differ in capitals alone"),
])  # fmt: skip
def test_tables_that_own_refuses(columns, needle, tmp_path):
    cells = {name: lambda i, value=value: value for name, value in columns.items()}
    argv = [*table_of(tmp_path, name="table.jsonl", **cells), tmp_path / "out"]
    options = ["--label", "labels"] if "labels" in columns else []
    assert needle in one_line(own.main, *argv, *options)
    assert not list(tmp_path.glob("out*")), "it is told before anything is prepared"


def test_wrong_options_of_own(tmp_path):
    cells = {"platform": lambda i: "ab"[i % 2], "place": lambda i: "x"}
    argv = [*table_of(tmp_path, **cells), tmp_path / "out"]
    for options, needle in {
        "--range 3000 0": "--range 3000 0", "--range nan 1": "--range", "--size 0": "--size 0",
        "--test-share -1": "--test-share", "--test-share 1": "--test-share",
        "--dates dayfirst": "--dates dayfirst: day-first, month-first",
        "--label kind": "no column 'kind'",
        "--types id=skip": "no column 'id'; there are file_name, split, platform",
        "--types platform=text": "a kind is one of", "--path-column q": "no column 'q'",
        "--split-column place": "no row for train: place says x", "--area none": "no column 'none'",
        "--split-column platform --area place": "no row for train: platform says a, b",
        "--types split=skip": "--types split: names images, areas or splits",
    }.items():  # fmt: skip
        assert needle in one_line(own.main, *argv, *options.split()), options
    (tmp_path / "none").mkdir()
    assert "no column names files under" in one_line(own.main, argv[0], tmp_path / "none", argv[2])
    assert "no such file" in one_line(own.main, tmp_path / "x.csv", *argv[1:])
    assert "no such folder" in one_line(own.main, argv[0], tmp_path / "x", argv[2])
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"no image")
    assert "0.png: damaged, or no image" in one_line(own.main, *argv)
    assert not (tmp_path / "out.unfinished").exists()


def test_names_are_found_where_people_have_them(tmp_path):
    """Beside the table, in either Unicode form, with backslashes; never outside of the folders."""
    name = unicodedata.normalize("NFD", "Zürich.png")
    own_images(tmp_path / "own/images", name, *[f"b/{i}.png" for i in range(6)])
    own_images(tmp_path, "outside.png")
    paths = ["images/Zürich.png", "b\\0.png", "b/1.png", "images/b/2.png", "b/3.png"]
    paths += [str(tmp_path / "own/images/b/4.png"), "../outside.png", "/etc/hostname", "b/none.png"]
    rows = [f"{path},{'test' if i > 4 else 'train'}" for i, path in enumerate(paths)]
    (tmp_path / "own/t.csv").write_text("file,split\n" + "\n".join(rows) + "\n", encoding="utf-8")
    found = run_own(tmp_path / "own/t.csv", tmp_path / "own/images", tmp_path / "out")
    names = [row["file_name"] for row in found["train"]]
    assert names == ["images/Zürich.png", "b/0.png", "b/1.png", "images/b/2.png", "b/3.png"]
    assert found["test"] == [{"file_name": "b/4.png"}]
    assert [q["problem"].partition(": ")[0] for q in found["quarantine"]] == [
        f"{tmp_path}/own/t.csv, line {i}" for i in (8, 9, 10)]  # fmt: skip
    assert "file '../outside.png': no such file under" in found["quarantine"][0]["problem"]


def test_dates_option_serves_every_column(tmp_path):
    """A day and a month that may change places, in a column of the user's own."""
    argv = table_of(tmp_path, seen=lambda i: f"0{1 + i % 9}/04/2015")
    rows = run_own(*argv, tmp_path / "out", "--dates", "month-first")["train"]
    assert [row["seen"] for row in rows[:2]] == ["2015-01-04", "2015-02-04"]
    rows = run_own(*argv, tmp_path / "more", "--dates", "day-first")["train"]
    assert rows[1]["seen"] == "2015-04-02"


def test_several_classes_in_a_cell_are_refused(tmp_path):
    """As pandas writes a tuple; a name in brackets stays a class."""
    argv = table_of(tmp_path, kind=lambda i: "('a', 'b')" if i == 3 else "(other)")
    assert "kind" in one_line(own.main, *argv, tmp_path / "out", "--label", "kind", "--jobs", 0)


def test_images_of_one_feature_collection_are_dealt_one_by_one():
    """They share the file that they come from, not their fate."""
    options = argparse.Namespace(
        area="area", path_column="name", split_column="split", test_share=0.2, seed=0, place=()
    )
    rows = [Row("items.json", {"name": f"{i}.png"}) for i in range(20)]
    sides = [item.split for item in deal(rows, options)]
    assert sides.count("test") == 4 and sides.count("train") == 16


def test_a_place_is_in_one_split(tmp_path):
    """Several dates of a place, without a column that says so; all of one place are dealt, too."""
    places = {"lon": lambda i: i // 4, "lat": lambda i: 40}
    argv = table_of(tmp_path, 80, **places)
    argv[0].write_text(argv[0].read_text().replace("file_name,split", "file_name,fold"))
    options = ["--types", "fold=skip"]
    rows = run_own(*argv, tmp_path / "out", *options)
    found = [{tuple(row["location"]) for row in rows[split]} for split in ("train", "test")]
    assert len(rows["test"]) == 16 and not found[0] & found[1]
    argv = table_of(tmp_path, 80, lon=places["lat"], lat=places["lat"])
    argv[0].write_text(argv[0].read_text().replace("file_name,split", "file_name,fold"))
    assert len(run_own(*argv, tmp_path / "one", *options)["test"]) == 16


def test_of_two_columns_with_files_one_has_to_be_named(tmp_path):
    argv = table_of(tmp_path, mask=lambda i: f"{i}.png")
    line = one_line(own.main, *argv, tmp_path / "out")
    assert "file_name, mask name files; --path-column says which" in line
    rows = run_own(*argv, tmp_path / "out", "--path-column", "file_name", "--types", "mask=skip")
    assert rows["train"][0] == {"file_name": "0.png"}


def test_labels_areas_and_splits(tmp_path, capsys):
    """Names of the table and of the fields; whole areas, dealt towards the share; it is told."""
    cells = {"platform": lambda i: "ab"[i % 2], "site": lambda i: i // 5, "kind": lambda i: i % 3}
    argv = table_of(tmp_path, 60, **cells)
    options = ["--label", "sensor_platform,kind", "--area", "site", "--split-column"]
    rows = run_own(*argv, tmp_path / "a", *options, "split", "--types", "kind=skip")
    assert rows["train"][1] == {
        "file_name": "1.png", "label_platform": "b", "label_kind": "1", "area": "0"
    }  # fmt: skip
    text = argv[0].read_text().replace("file_name,split", "file_name,fold")
    argv[0].write_text(text)
    rows = run_own(*argv, tmp_path / "b", *options[:4], "--types", "fold=skip")
    assert (len(rows["train"]), len(rows["test"])) in ((45, 15), (50, 10))
    assert not {r["area"] for r in rows["train"]} & {r["area"] for r in rows["test"]}
    assert "drawn for the test split, seed 0" in capsys.readouterr().out
    again = run_own(*argv, tmp_path / "c", *options[:4], "--types", "fold=skip", "--seed", "1")
    assert {r["area"] for r in rows["test"]} != {r["area"] for r in again["test"]}
    half = run_own(*argv, tmp_path / "d", "--area", "platform", "--types", "fold=skip")
    assert len(half["test"]) == 30 and "(20% asked for, of 2 areas)" in capsys.readouterr().out
    text = text.replace("train", "val").replace("test", "train").replace("fold", "Split")
    text = text.replace("kind", "Label").replace("site", "Area")
    argv[0].write_text(text)
    rows = run_own(*argv, tmp_path / "e")
    assert (len(rows["train"]), len(rows["test"])) == (4, 56), "a table without test has val for it"
    assert rows["test"][1].items() >= {"label": "1", "area": "0"}.items()
    argv = table_of(tmp_path, 60, "table.jsonl", area=lambda i: (0, 1.0, 1, 2, "2", 3)[i // 10])
    argv[0].write_text(argv[0].read_text().replace('"split"', '"fold"'))
    rows = run_own(*argv, tmp_path / "f")
    assert len({row["area"] for row in rows["train"]} | {rows["test"][0]["area"]}) == 4
    assert len({row["area"] for row in rows["test"]}) == 1, "0 is an area, 1.0 is 1"


def test_a_class_that_only_the_test_split_has(tmp_path, capsys):
    labels = ["", "nan", "n/a"] + [1] * 17 + [1.0] * 3 + ["none"]
    argv = table_of(tmp_path, label=lambda i: labels[i])
    rows = run_own(*argv, tmp_path / "out")
    assert [row["label"] for row in rows["test"]] == ["1", "1", "1", "none"]
    assert "label" not in rows["train"][2] and rows["train"][3]["label"] == "1"
    out = capsys.readouterr().out
    assert "label: no training image of none, which the test split has" in out
    assert "label: 3 of 24 rows have no class" in out


def test_the_ground_sample_distance_follows_the_image(tmp_path, capsys):
    """--size: x by width before / width after, y by height, as in fMoW's crops (supplement A)."""
    table, images = table_of(
        tmp_path, 8, "table.jsonl", gsd=lambda i: 0.5, multispectral_gsd=lambda i: 2.0,
        pixel_size=lambda i: [4e-6, 5e-6], off_nadir_angle=lambda i: 12.5,
    )  # fmt: skip
    own_images(images, "1.png", size=(400, 300))
    rows = run_own(table, images, tmp_path / "out", "--size", 100)["train"]
    assert rows[0]["gsd"] == 0.5 and rows[1] == {
        "file_name": "1.png", "gsd": [2.0, 2.0], "multispectral_gsd": 8.0,
        "pixel_size": pytest.approx([1.6e-5, 2e-5]), "off_nadir_angle": 12.5,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "--size 100 changes gsd, pixel_size, multispectral_gsd of each image" in out
    assert Image.open(tmp_path / "out/train/1.png").size == (100, 75)
    assert (tmp_path / "out/train/0.png").read_bytes() == (images / "0.png").read_bytes()


def test_images_alone(tmp_path, capsys):
    """A folder without a table: names alone. A table in it is not passed over."""
    own_images(tmp_path / "images", *[f"{i}.png" for i in range(9)], "a.JPG")
    own.main([str(tmp_path / "images"), str(tmp_path / "out"), "--jobs", "0"])
    rows = own_rows(tmp_path / "out")
    assert len(rows["train"]) == 8 and set(rows["train"][0]) == {"file_name"}
    assert "images alone, without metadata" in capsys.readouterr().out
    (tmp_path / "images/t.csv").write_text("file,gsd\n0.png,1\n")
    argv = tmp_path / "images", tmp_path / "x"
    assert "holds t.csv; give that as TABLE" in one_line(own.main, *argv)
    (tmp_path / "images/via.json").write_text('{"shapes": []}')
    assert "no STAC item" in one_line(own.main, *argv)


def test_another_table_is_refused_when_going_on(tmp_path):
    argv = [*table_of(tmp_path, gsd=lambda i: i + 1), tmp_path / "out"]
    run_own(*argv)
    (tmp_path / "out").rename(tmp_path / "out.unfinished")
    assert "begun with another table, other files or other options" in one_line(
        own.main, *argv, "--size", 8)  # fmt: skip
    argv[0].write_text(argv[0].read_text().replace("5.png,train,6", "5.png,train,7"))
    assert "begun with another table" in one_line(own.main, *argv, "--jobs", 1)


def test_ones_own_columns_are_learned_from(tmp_path):
    """A table of columns nobody has heard of, a third of it blank -> what text and table encoders
    take; a blank is missing in its own row alone."""
    dates = ("2015-09-{:02d}", "{:02d} Sep 2015", "201509{:02d}")
    cells = {
        "elevation": lambda i: "" if i % 3 == 0 else 10.5 * i,
        "soil": lambda i: ["clay", "sand", ""][i % 3],
        "acquired": lambda i: dates[i % 3].format(1 + i),
        "bands": lambda i: f"[{i}, {i % 7}]",
        "note": lambda i: f"text {i}",
        "kind": lambda i: i % 2,
    }
    run_own(*table_of(tmp_path, **cells), tmp_path / "out", "--label", "kind")
    chosen, (train, _) = choose_fields(tmp_path / "out", ""), read_dataset(tmp_path / "out")
    assert {f.name: (f.kind, len(f.parts)) for f in chosen} == {
        "elevation": ("number", 0), "soil": ("category", 0), "acquired": ("timestamp", 0),
        "bands": ("number", 2),
    }  # fmt: skip
    text = "elevation: 10.5, soil: sand, acquired: 2015-09-02, bands: [1, 1]"
    assert caption(train[1], chosen) == text
    assert caption(train[3], chosen) == "soil: clay, acquired: 2015-09-04, bands: [3, 3]"
    numbers, categories = TableReader.fit(train, chosen)(list(train))
    assert torch.isnan(numbers[:, 0]).tolist() == [i % 3 == 0 for i in range(20)]
    assert categories[:, 0].tolist() == [(2, 3, 0)[i % 3] for i in range(20)]
    assert len(TextReader.fit(train, chosen)(list(train))[0]) == 20


# --------------------------------------------------------------------------------------------------
# check


def plant(folder: Path) -> dict[str, str]:
    """A dataset with every fault that check knows -> problem: what its example says."""
    rows = {"train": [], "test": []}
    for split, n in (("train", 30), ("test", 8)):
        for i in range(n):
            rng = np.random.default_rng(len(split) * 100 + i)
            image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
            (folder / split).mkdir(parents=True, exist_ok=True)
            (folder / split / f"{i}.png").write_bytes(encode(image))
            rows[split].append({
                "file_name": f"{i}.png", "gsd": 0.5 + i, "timestamp": f"2004-12-{i + 1:02d}",
                "location": [5.0 + i / 10, 50.0], "wavelengths": [661, 545, 480],
                "area": f"{split}{i}", "label": "ab"[i % 2],
            })  # fmt: skip
    train, test = rows["train"], rows["test"]
    train[1]["timestamp"], train[2]["location"], train[3]["gsd"] = "sometime", [41.9, 112.5], "wide"
    train[4]["location"], train[11]["area"], test[3]["area"] = [200.0, 5.0], "shared", "shared"
    test[5]["label"], train[7]["label"] = "c", ""
    pages = [Image.new("L", (8, 8), i) for i in range(3)]
    pages[0].save(folder / "train/pages.tif", save_all=True, append_images=pages[1:])
    pages[0].resize((16, 16)).save(folder / "test/overview.tif", save_all=True, append_images=pages)
    train.append({"file_name": "pages.tif", "label": "a"})
    test.append({"file_name": "overview.tif", "label": "a"})
    (folder / "train/extra.jpg").write_bytes((folder / "train/12.png").read_bytes())
    os.truncate(folder / "train/13.png", 60)
    (folder / "train/14.png").unlink()
    (folder / "train/22.png").write_bytes((folder / "train/20.png").read_bytes())
    (folder / "test/1.png").write_bytes((folder / "train/23.png").read_bytes())
    train.append(dict(train[15]))
    for split in rows:
        text = "".join(json.dumps(row) + "\n" for row in rows[split])
        (folder / split / "metadata.jsonl").write_text(text + "not a line\n" * (split == "train"))
    names = ("gsd", "timestamp", "location", "wavelengths")
    (folder / "fields.json").write_text(fields.fields_json(FIELDS[name] for name in names))
    return {
        "timestamp: not timestamp (UTC, ISO 8601)": "line 2: 'sometime'",
        "gsd: not x, y (m per pixel)": "line 4: 'wide'",
        "location: not longitude, latitude (degrees)": "line 3: [41.9, 112.5]",
        "image without a row": "extra.jpg", "row without its image": "14.png",
        "unreadable image": "13.png", "image twice": "22.png is 20.png",
        "image in train and test": "23.png, 1.png", "file_name twice": "line 32: 15.png",
        "unreadable line": "row 33", "area in train and test": "shared",
        "bands in pages, the first alone is read": "pages.tif",
    }  # fmt: skip


def test_check_finds_every_planted_fault(tmp_path, capsys):
    """Each fault with its place, nothing else; the exit status says whether training can start."""
    planted = plant(tmp_path)
    for jobs in ("0", "2"):
        with pytest.raises(SystemExit, match="1"):
            check.main([str(tmp_path), "--jobs", jobs])
        found = dict(check.check(tmp_path, 0))
    problems = {problem: example for (_, problem), (_, example) in found.items()}
    assert problems.keys() == planted.keys()
    assert [p for p in planted if planted[p] not in problems[p]] == []
    capsys.readouterr()
    for split in ("train", "test"):  # the same without the line, so that labels can be compared
        path = tmp_path / split / "metadata.jsonl"
        path.write_text(path.read_text().replace("not a line\n", ""))
        path.write_text(path.read_text().replace("14.png", "\\u0000"))  # no file has such a name
    found = check.check(tmp_path, 0)
    assert found["train", "row without its image"][0] == 1
    assert found["both", "label: test classes that training lacks"] == (1, "c")
    out = capsys.readouterr().out
    assert "label: 2 classes, 1 images without\n    15 (b) to 16 (a) images each" in out
    assert "gsd 94%" in out


def test_check_of_sound_and_of_poor_datasets(tmp_path, capsys):
    """Status 0 where training can start; whole numbers are one class; equal metadata are told."""
    argv = table_of(tmp_path, gsd=lambda i: i % 2 + 0.5, label=lambda i: i % 2 + 1)
    run_own(*argv, tmp_path / "out")
    path = tmp_path / "out/test/metadata.jsonl"
    rows = [json.loads(line) | {"label": 1.0} for line in path.read_text().splitlines()]
    rows[0]["area"] = ["a", 1]  # as Partners and average_areas, check takes it as text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="0"):
        check.main([str(tmp_path / "out"), "--jobs", "0"])
    out = capsys.readouterr().out
    assert "no problem found" in out and "label: 1 classes, 0 images without" in out
    assert "    4 (1) to 4 (1) images" in out
    assert "20 rows (100%) share their metadata with another row" in out
    (tmp_path / "out/fields.json").unlink()
    for split in ("train", "test"):
        path = tmp_path / "out" / split / "metadata.jsonl"
        path.write_text(path.read_text().replace('"gsd"', '"other"'))
    with pytest.raises(SystemExit, match="0"):
        check.main([str(tmp_path / "out"), "--jobs", "0"])
    assert "only simclr and moco can train" in capsys.readouterr().out
    (tmp_path / "out/train/metadata.jsonl").write_text("")
    assert "no rows" in one_line(check.main, tmp_path / "out")
    assert "no such folder" in one_line(check.main, tmp_path / "none")


def test_too_little_memory_is_told_in_a_line():
    with pytest.raises(SystemExit, match="memory.*; fewer --workers, smaller"):
        with errors_in_one_line():
            np.asarray(torch.empty(2**60, dtype=torch.uint8))


def test_a_terminal_without_some_letters(tmp_path, monkeypatch):
    """Its encoding is ASCII, as with LC_ALL=C: classes are printed with escapes."""
    argv = table_of(tmp_path, label=lambda i: ["Höfen", "a"][i % 2])
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_own(*argv, tmp_path / "out")
    with pytest.raises(SystemExit, match="0"):
        check.main([str(tmp_path / "out"), "--jobs", "0"])
    terminal.flush()
    assert rb"(H\xf6fen)" in terminal.buffer.getvalue()


def test_check_of_a_metadata_csv(tmp_path):
    """A stray quotation mark is told, and a metadata.csv that nobody reads."""
    for split in ("train", "test"):
        own_images(tmp_path / split, *[f"{i}.png" for i in range(4)])
        (tmp_path / split / "metadata.csv").write_text(
            'file_name,gsd,label\n0.png,1,"a\n1.png,2,b\n2.png,3,b"\n3.png,4,b\n')
    assert "row 1: missing or extra cell, stray quote" in one_line(check.main, tmp_path)
    for split in ("train", "test"):
        lines = [json.dumps({"file_name": f"{i}.png", "gsd": i + 1}) for i in range(4)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    found = check.check(tmp_path, 0)
    assert ("train", "metadata.csv is not read, metadata.jsonl is") in found


def json_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_source(script, *argv) -> tuple[list[dict], list[dict], list[dict]]:
    """Run a script with --jobs 0 -> train rows, test rows, quarantine of the folder given last."""
    script.main([*map(str, argv), "--jobs", "0"])
    folder = Path([a for a in map(str, argv) if not a.startswith("-")][-1])
    names = ("train/metadata.jsonl", "test/metadata.jsonl", "quarantine.jsonl")
    return tuple(json_rows(folder / name) for name in names)


def refused_by(script, *argv) -> str:
    """The one line with which a script ends, exit status 1."""
    with pytest.raises(SystemExit) as stopped:
        script.main(list(map(str, argv)))
    line = stopped.value.code
    assert isinstance(line, str) and regex.fullmatch(r"error: [^\n]+", line)
    assert not regex.search(r"0x[0-9a-f]{6}|\w+Error", line), line
    return line


def far(a, b) -> float:
    """Largest absolute difference."""
    a, b = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (a, b))
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Of all files but the journal's remains, whose first line names the source."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != "journal.jsonl")
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


# --------------------------------------------------------------------------------------------------
# The embedded data


def test_a_cut_averages_the_map_under_each_pixel():
    """A constant map gives its value; one linear in latitude the value there; noise the mean of
    many samples."""
    steps = np.arange(64) - 31.5
    grid = demo.local_grid(20, 40, 50, steps)
    assert (demo.cut(np.full((90, 180, 3), 77, np.uint8), grid, 50) == 77).all()
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 512, 3))
    expected = ((90 - grid[1]) / 180 * 256 - 0.5)[..., None]
    assert abs(demo.cut(ramp, grid, 50) - expected).max() <= 1
    noise = np.random.default_rng(0).integers(0, 256, (360, 720, 3), np.uint8)
    offsets = np.arange(-99.5, 100) / 200
    for longitude, latitude, gsd in ((20, 40, 80), (179, -65, 120), (-100, 0, 200)):
        grid, high = demo.local_grid(longitude, latitude, gsd, steps), gsd / demo.DEGREE
        out = demo.cut(noise, grid, gsd)
        for i, j in ((0, 0), (10, 50), (31, 32), (63, 63)):
            x, y = grid[0][i, j], grid[1][i, j]
            wide = high / math.cos(math.radians(y))
            points = np.meshgrid(x + offsets * wide, y + offsets * high)
            mean = [demo.lookup(noise[..., c], points).mean() for c in range(3)]
            assert far(out[i, j], mean) <= 1


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    demo.main([str(folder), "--train", "60", "--test", "12", "--jobs", "0"])
    return folder


@pytest.fixture(scope="module")
def demo_areas() -> demo.Areas:
    return demo.Areas(0)


def test_demo_is_the_same_each_time(demo_folder, tmp_path):
    """The same bytes on two processes; nothing else is left; an existing folder is not touched."""
    argv = [str(tmp_path / "again"), "--train", "60", "--test", "12", "--jobs", "2"]
    demo.main(argv)
    first, second = file_bytes(demo_folder), file_bytes(tmp_path / "again")
    assert first == second and len(first) == 60 + 12 + 4
    assert list(demo_folder.parent.iterdir()) == [demo_folder]
    assert "exists" in refused_by(demo, *argv)
    assert "one image or more" in refused_by(demo, tmp_path / "none", "--test", "0")


def test_demo_records(demo_folder):
    """Scale, place, month and area for each; October is marked inferred; coarse areas have three
    months. As precise as its fields.json prints them, in 31 to 38 tokens."""
    fine, coarse, lengths = {}, {}, set()
    fields = data.choose_fields(demo_folder, "")
    records = [record for split in data.read_dataset(demo_folder) for record in split]
    for r in records:
        assert r.get("timestamp_inferred", False) == (r["timestamp"] == "2004-10")
        places = fine if r["gsd"] < 12_001 else coarse
        places.setdefault(r["area"], []).append(r["timestamp"])
        longitude, latitude = r["location"]
        place = f"location: [{longitude:.1f}, {latitude:.1f}]"
        assert caption(r, fields) == f"gsd: {r['gsd']}, timestamp: {r['timestamp']}, {place}"
        assert r["gsd"] == round(r["gsd"])
        assert longitude == round(longitude, 1) and latitude == round(latitude, 1)
        lengths.add(len(metadata.default_tokenizer()(caption(r, fields))))
    assert set(map(tuple, fine.values())) == {("2004-10",)}
    assert 31 <= min(lengths) <= max(lengths) <= 38
    assert all(len(set(months)) == len(months) <= 3 for months in coarse.values())
    assert 3 in map(len, coarse.values())
    assert {Image.open(path).size for path in demo_folder.rglob("*.jpg")} == {(64, 64)}


def test_no_training_crop_shows_a_held_out_block(demo_folder, demo_areas):
    """Not a pixel, not even where a block's corner only just enters; test crops are centred in
    one."""
    rows = [("train", area) for area in (56636, 74994) if list(demo_areas.crops(area))]
    for split in data.read_dataset(demo_folder):
        rows += [(split.folder.name, int(record["area"][1:])) for record in split]
    for split, area in rows:
        grid = demo.local_grid(*demo_areas.place(area), np.arange(64) - 31.5)
        held_out = demo_areas.held_out(*grid)
        assert held_out[31, 31] if split == "test" else not held_out.any(), area


# --------------------------------------------------------------------------------------------------
# fMoW


def wkt_box(west: float, south: float, east: float, north: float) -> str:
    corners = ((west, north), (east, north), (east, south), (west, south), (west, north))
    return f"POLYGON (({', '.join(f'{x} {y}' for x, y in corners)}))"


# The poster's record, by hand. The image has 900 columns and 1000 rows, its box is 361 wide and 312
# high at (200, 16). 361 of 1000 rows is 0.361, hence 0.3 of the width is added: 54 px on each side.
# 312 of 900 columns is 0.347: 46 px. The top is clipped: 0. So the crop is 146 .. 615 by 0 .. 374,
# and 224 px stand for 469 and 374.
POSTER_BOX, POSTER_CROP = [200, 16, 361, 312], (146, 0, 615, 374)
POSTER_JSON = {
    "gsd": 11.4546 * 224 / 469, "multi_resolution_dbl": 41.1896 * 224 / ((469 + 374) / 2),
    "mean_pixel_width": 1.03e-4 * 224 / 469, "mean_pixel_height": 8.23e-5 * 224 / 374,
    "img_width": 900, "img_height": 1000, "timestamp": "2015-09-21T15:30:08Z", "utm": "18M",
    "country_code": "PER", "cloud_cover": 14, "scan_direction": "Reverse",
    "approximate_wavelengths": [661, 545, 477], "target_azimuth_dbl": 39.12,
    "sun_azimuth_dbl": 77.28, "sun_elevation_dbl": 70.44, "off_nadir_angle_dbl": 27.70,
    "sensor_platform_name": "GEOEYE01",
}  # fmt: skip
POSTER_AOI = wkt_box(-73.320776, -3.795814, -73.300776, -3.775814)
PORT, PORT_AOI = [40, 60, 100, 80], wkt_box(10.04, 40.26, 10.14, 40.34)


def fmow_json(*boxes, **changes) -> dict:
    entries = [{"ID": i, "box": b, "category": c, "visible": "True"} for i, b, c in boxes]
    return {**POSTER_JSON, "bounding_boxes": entries, **changes}


def add_view(source: Path, stem: str, meta: dict, aoi: str = "", size=(300, 400)) -> None:
    """An image of the official release, its msrgb twin and its JSON; aoi: with ground truth."""
    path = source / f"{stem}_rgb.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(stem) + int(stem[-1]))
    pixels = rng.integers(0, 255, (size[1] // 20, size[0] // 20, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
    for kind in ("rgb", "msrgb"):
        twin = path.with_name(path.name.replace("rgb", kind))
        twin.write_bytes(path.read_bytes())
        twin.with_suffix(".json").write_text(json.dumps(meta))
    if aoi:
        boxes = meta["bounding_boxes"]
        first = boxes[0] if isinstance(boxes, list) else boxes
        truth = {**meta, "raw_location": wkt_box(10, 40, 10.3, 40.4)}
        truth["bounding_boxes"] = [{**first, "ID": -1, "raw_location": aoi}, first]
        path = source / "groundtruth" / f"{stem}_rgb.json".replace("val/", "val_gt/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(truth))


@pytest.fixture(scope="module")
def fmow_tree(tmp_path_factory) -> Path:
    """The official release in small, with everything odd that the real one has."""
    source = tmp_path_factory.mktemp("fmow") / "fmow-rgb"
    airport, zoo = "train/airport/airport_0/airport_0_", "train/zoo/zoo_1/zoo_1_"
    add_view(source, f"{airport}0", fmow_json((7, POSTER_BOX, "airport")), POSTER_AOI, (900, 1000))
    add_view(source, f"{airport}1", fmow_json((7, PORT, "airport")), PORT_AOI)
    both = fmow_json((8, PORT, "port"), (9, [200, 300, 50, 60], "port"), country_code="KO-")
    add_view(source, "train/port/port_3/port_3_0", both, PORT_AOI)
    bare = {"ID": 8, "box": PORT, "category": "port", "visible": "True"}  # not in a list
    single = fmow_json(country_code="CA-", utm=None, bounding_boxes=bare)
    add_view(source, "train/port/port_3/port_3_1", single, POSTER_AOI)
    odd = fmow_json((1, [5, 5, 2, 40], "port"), (2, [350, 5, 40, 40], "port"))
    add_view(source, "train/port/port_4/port_4_0", odd)
    add_view(source, f"{zoo}0", fmow_json((3, PORT, "zoo")), POSTER_AOI)
    os.truncate(source / f"{zoo}0_rgb.jpg", 700)
    add_view(source, f"{zoo}1", fmow_json((3, PORT, "zoo"), gsd=math.nan, cloud_cover=math.inf))
    add_view(source, f"{zoo}2", fmow_json((3, PORT, "zoo")))
    (source / f"{zoo}2_rgb.json").write_text("{")
    (source / f"{zoo}3_rgb.json").write_text(json.dumps(fmow_json((3, PORT, "zoo"))))
    for i in range(2):
        boxes = [(20 + i, PORT, "airport")] + [(90, [1, 1, 30, 30], "false_detection")] * (i == 0)
        add_view(source, f"val/airport/airport_{i}/airport_{i}_0", fmow_json(*boxes), PORT_AOI)
    return source


def opencv_resize(crop: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, slowly: pixel centres, four neighbours, the border repeated. [size, size, 3]"""
    at = []
    for length in crop.shape[:2]:
        where = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        low = np.floor(where).astype(int)
        at.append((low, np.minimum(low + 1, length - 1), where % 1))
    (top, bottom, v), (left, right, u) = at
    u, v = u[None, :, None], v[:, None, None]
    above = (1 - u) * crop[top][:, left] + u * crop[top][:, right]
    below = (1 - u) * crop[bottom][:, left] + u * crop[bottom][:, right]
    return (1 - v) * above + v * below


def test_fmow(fmow_tree, tmp_path, capsys):
    """The official release: crops, GSD, location, caption of the poster; what is left out or
    quarantined, and why."""
    train_rows, test_rows, quarantine = run_source(fmow, fmow_tree, tmp_path / "out")
    rows = {row["file_name"]: row for row in train_rows}
    poster, every = rows["airport/airport_0/airport_7/airport_0_0_rgb.jpg"], parse_fields("all")
    assert caption(poster, every) == caption(POSTER, every)
    assert poster["label"] == "airport" and poster["area"] == "train/airport_0"
    image = Image.open(fmow_tree / "train/airport/airport_0/airport_0_0_rgb.jpg")
    expected = opencv_resize(np.asarray(image.crop(POSTER_CROP), np.float64), 224)
    buffer = io.BytesIO()
    Image.fromarray(np.floor(expected + 1e-6).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    found = np.asarray(Image.open(tmp_path / "out/train" / poster["file_name"]), np.float64)
    assert abs(found - np.asarray(Image.open(buffer))).mean() < 0.01, "but for JPEG's last bit"
    names = ("port_8/port_3_0", "port_9/port_3_0", "port_8/port_3_1")
    first, second, third = (rows[f"port/port_3/{name}_rgb.jpg"] for name in names)
    assert far(first["location"], [10.09, 40.30]) < 1e-9 and first["country_code"] == "XKX"
    by_bounds = [10 + 0.3 * 225 / 300, 40.4 - 0.4 * 330 / 400]  # another box than that of ID -1
    assert far(second["location"], by_bounds) < 1e-9
    assert "country_code" not in third and "utm_zone" not in third
    assert len(train_rows) == 6 and len(test_rows) == 2
    assert not any("msrgb" in name for name in rows)
    assert not {"gsd", "cloud_cover"} & rows["zoo/zoo_1/zoo_3/zoo_1_1_rgb.jpg"].keys(), "no numbers"
    bad = {Path(q["item"]).stem: q["problem"] for q in quarantine}
    assert sorted(bad) == ["zoo_1_0_rgb", "zoo_1_2_rgb", "zoo_1_3_rgb"]
    assert "zoo_1_2_rgb.json: not a JSON object" in bad["zoo_1_2_rgb"]
    out = capsys.readouterr().out
    for part in (
        "2 left out: false detections, boxes of 2 px", "1 left out: boxes outside the image",
        "1 left out: locations, which no ground-truth JSON tells", "3 items in quarantine.jsonl",
        "6 train images\n2 test images", "Table S1 of the paper: 363,572 + 53,043 images of 62",
    ):  # fmt: skip
        assert part in out, part


def test_fmow_switches(fmow_tree, tmp_path):
    """--rescale gsd is the supplement's word, --no-location goes without ground truth, which may
    lie elsewhere (--groundtruth)."""
    source = shutil.copytree(fmow_tree, tmp_path / "source")
    (source / "groundtruth").rename(tmp_path / "elsewhere")
    line = refused_by(fmow, source, tmp_path / "out")
    assert "groundtruth: no folder; unpack it, or give --no-location" in line
    options = ("--rescale=gsd", "--no-location")
    rows, _, _ = run_source(fmow, *options, source, tmp_path / "out")
    row = next(r for r in rows if r["file_name"].endswith("airport_0_0_rgb.jpg"))
    assert far(row["gsd"], POSTER["gsd"][:1] + [POSTER_JSON["gsd"] * 374 / 224]) < 1e-9
    assert "location" not in row
    assert row["multispectral_gsd"] == POSTER_JSON["multi_resolution_dbl"]
    sides = ["mean_pixel_width", "mean_pixel_height"]
    assert row["pixel_size"] == [POSTER_JSON[side] for side in sides]
    given = f"--groundtruth={tmp_path / 'elsewhere'}"
    rows, _, _ = run_source(fmow, given, source, tmp_path / "given")
    assert far(rows[1]["location"], [10.09, 40.30]) < 1e-9


CONTEXT_CROPS = {  # box, (columns, rows) -> crop, worked by hand from the baseline's table
    "half": ([0, 0, 500, 500], (1000, 1000), (0, 0, 537, 537)),
    "just below": ([200, 200, 499, 400], (1000, 1000), (151, 160, 748, 640)),
    "small": ([500, 500, 99, 100], (1000, 1000), (401, 450, 698, 650)),
    "swapped": ([100, 100, 300, 90], (400, 1000), (55, 78, 400, 212)),
}


@pytest.mark.parametrize("what", CONTEXT_CROPS)
def test_context_crop(what):
    """The context table, floors, clipping, and the slip of the baseline: width against rows, height
    against columns."""
    box, (columns, rows), expected = CONTEXT_CROPS[what]
    assert fmow.context_crop(box, columns, rows) == expected


def test_fmow_ready_cropped(fmow_tree, tmp_path):
    """The cropped copy: images byte for byte, GSD and location as from the original."""
    run_source(fmow, fmow_tree, tmp_path / "original")
    cropped = tmp_path / "cropped"
    for split, ours in (("train", "train"), ("val", "test")):
        for row in json_rows(tmp_path / "original" / ours / "metadata.jsonl"):
            path = cropped / split / row["file_name"]
            *folders, _, name = row["file_name"].split("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "original" / ours / row["file_name"], path)
            original = fmow_tree / split / Path(*folders) / name
            meta = json.loads(original.with_suffix(".json").read_text())
            meta["img_width"], meta["img_height"] = Image.open(original).size
            path.with_suffix(".json").write_text(json.dumps(meta))
    shutil.copytree(fmow_tree / "groundtruth", cropped / "groundtruth")
    assert run_source(fmow, cropped, tmp_path / "copied")[2] == []
    expected, found = file_bytes(tmp_path / "original"), file_bytes(tmp_path / "copied")
    assert expected.keys() == found.keys()
    assert all(found[name] == expected[name] for name in found if name.endswith(".jpg"))
    for split in ("train", "test"):
        pair = [json_rows(tmp_path / n / split / "metadata.jsonl") for n in ("original", "copied")]
        assert sorted(pair[0], key=str) == sorted(pair[1], key=str)


def small_fmow(source: Path, **changes) -> None:
    """Two images a split, each with a place of its own."""
    meta = fmow_json((7, [20, 20, 40, 30], "zoo"), raw_location=wkt_box(10, 40, 11, 41), **changes)
    for split, i in itertools.product(("train", "val"), range(2)):
        add_view(source, f"{split}/zoo/zoo_{i}/zoo_{i}_0", meta, size=(100, 80))


def test_files_of_macos_and_a_first_json_that_is_broken(tmp_path, capsys):
    """They do not stop the rest: ._* are skipped and counted, the broken one is quarantined."""
    small_fmow(tmp_path / "in")
    for path in list((tmp_path / "in").rglob("*_rgb.*")):
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07Mac OS X" + bytes(99))
    (tmp_path / "in/train/zoo/zoo_0/zoo_0_0_rgb.json").write_text("")
    train_rows, test_rows, bad = run_source(fmow, tmp_path / "in", tmp_path / "out")
    assert len(train_rows) == 1 and len(test_rows) == 2
    assert [Path(q["item"]).name for q in bad] == ["zoo_0_0_rgb.json"]
    assert "4 files ._* skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "truth", [b"", b'{"raw_location": "POL', b"[1]", b'{"bounding_boxes": [{"ID": 1, "box": [1]}]}']
)
def test_damaged_ground_truth_is_told(truth, tmp_path):
    """Its image is quarantined under the name of the ground-truth file, the others are prepared."""
    small_fmow(tmp_path / "in")
    path = tmp_path / "in/groundtruth/train/zoo/zoo_0/zoo_0_0_rgb.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(truth)
    rows, _, bad = run_source(fmow, tmp_path / "in", tmp_path / "out")
    assert len(rows) == 1 and [q["problem"].startswith(str(path)) for q in bad] == [True]


def test_a_category_cannot_climb_out_of_the_folder(tmp_path):
    """Nothing is written outside; its item is quarantined, the others are prepared."""
    small_fmow(tmp_path / "in")
    meta = fmow_json((7, [20, 20, 40, 30], "../../../../escaped"))
    (tmp_path / "in/train/zoo/zoo_0/zoo_0_0_rgb.json").write_text(json.dumps(meta))
    rows, _, bad = run_source(fmow, "--no-location", tmp_path / "in", tmp_path / "a/b/out")
    assert len(rows) == 1 and "../../../../escaped" in bad[0]["problem"]
    assert not [p for p in tmp_path.rglob("*escaped*")]


PLACES = {  # polygon -> centre of the box [20, 20, 40, 30] in 100 x 80 px
    wkt_box(10, 40, 11, 41): [10.4, 41 - 35 / 80],
    wkt_box(179.99, -16.8, 180.01, -16.7): [179.998, -16.74375],
    "POLYGON ((179.99 -16.8, -179.99 -16.8, -179.99 -16.7, 179.99 -16.7))": [179.998, -16.74375],
    "POLYGON ((179 1, -178 1, -178 2, 179 2, 179 1))": [-179.8, 1.5625],
}


@pytest.mark.parametrize("polygon", PLACES)
def test_polygons_across_the_antimeridian(polygon):
    truth = {"raw_location": polygon, "bounding_boxes": []}
    assert far(fmow.centre([20, 20, 40, 30], 100, 80, truth), PLACES[polygon]) < 1e-9


# --------------------------------------------------------------------------------------------------
# WILDS-FMoW, EuroSAT, scenes, So2Sat


def test_wilds(tmp_path, capsys):
    """Place and date from its table, no GSD, areas from the names of the original files."""
    (tmp_path / "wilds/images").mkdir(parents=True)
    lines = ["split,img_filename,category,country_code,cloud_cover,timestamp,lat,lon"]
    for i, split in enumerate(("train", "seq", "train", "val", "test", "train")):
        Image.new("RGB", (64, 64), (i, 9, 9)).save(tmp_path / f"wilds/images/rgb_img_{i}.png")
        kind, place = "false_detection" if i == 5 else "airport_hangar", f"-3.5,{70 + i}"
        name = f"airport_hangar_0_{i}_rgb.jpg"
        lines.append(f"{split},{name},{kind},KO-,{i},2015-0{i + 1}-02T10:00:00Z,{place}")
    table = tmp_path / "wilds/rgb_metadata.csv"
    table.write_text("\n".join(lines) + "\n")
    train_rows, test_rows, bad = run_source(wilds, tmp_path / "wilds", tmp_path / "out")
    assert [r["file_name"] for r in train_rows] == ["rgb_img_0.png", "rgb_img_2.png"]
    row = {"location": [72.0, -3.5], "area": "train/airport_hangar_0"}
    row |= {"label": "airport_hangar", "country_code": "XKX", "timestamp": "2015-03-02T10:00:00Z"}
    assert train_rows[1].items() >= row.items() and len(test_rows) == 1 and bad == []
    out = capsys.readouterr().out
    assert "no ground sample distance" in out and "1 left out: false detections" in out
    table.write_text(table.read_text().replace("timestamp", "date"))
    assert "rgb_metadata.csv: no column timestamp" in refused_by(wilds, tmp_path / "wilds", "x")


def write_classes(folder: Path, classes: dict[str, int], suffix: str, name: str) -> list[str]:
    """n images for each class, named by the pattern -> their names."""
    names, rng = [], np.random.default_rng(0)
    for kind, n in classes.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(1, n + 1):
            names.append(name.format(kind=kind, i=i) + suffix)
            pixels = rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / kind / names[-1])
    return names


LAYOUTS = {  # script, arguments, folder of the classes, suffix, pattern, its lists, train, test
    "resisc45": (scenes, ["resisc45"], "NWPU-RESISC45", ".jpg", "{kind}_{i:03d}", "resisc45", 3, 2),
    "ucmerced": (
        scenes, ["ucmerced"], "UCMerced_LandUse/Images", ".tif", "{kind}{i:02d}", "uc_merced", 3, 3,
    ),
    "eurosat": (eurosat, [], "2750", ".jpg", "{kind}_{i}", "eurosat", 3, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_class_folders_with_split_lists(name, tmp_path, capsys):
    """They follow their lists, by base name; UC Merced's val joins test, its TIFF become PNG."""
    script, argv, folder, suffix, pattern, prefix, train_count, test_count = LAYOUTS[name]
    source, out = tmp_path / "in", tmp_path / "out"
    names = write_classes(source / folder, {"a b": 3, "forest": 3}, suffix, pattern)
    assert f"{prefix}-train.txt" in refused_by(script, *argv, source, out)
    for part, listed in {"train": names[:3], "val": names[3:4], "test": names[4:]}.items():
        text = "\n".join(listed)
        if name == "eurosat":
            text = "\r\n".join(listed) + "\r\n"  # as saved on Windows
        (source / f"{prefix}-{part}.txt").write_text(text)
    train_rows, test_rows, bad = run_source(script, *argv, source, out)
    assert (len(train_rows), len(test_rows), bad) == (train_count, test_count, [])
    assert {r["label"] for r in train_rows} == {"a b"} and {*test_rows[0]} == {"file_name", "label"}
    first, original = out / "train" / train_rows[0]["file_name"], source / folder / "a b" / names[0]
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(original)))
    if suffix == ".jpg":
        assert first.read_bytes() == original.read_bytes()
    else:
        assert first.suffix == ".png"
    out = capsys.readouterr().out
    assert f"{train_count} train images" in out and "Table S1 of the paper: 1" in out


def test_optimal31_and_fgsc23(tmp_path, capsys):
    """Optimal-31 needs its lists, wherever they are; FGSC-23 has its own train/ and test/."""
    source = tmp_path / "optimal"
    write_classes(source / "Images", {"airplane": 6, "zoo": 4}, ".jpg", "{kind}({i})")
    argv = ("optimal31", source)
    assert "no split list optimal31-train.txt" in refused_by(scenes, *argv, tmp_path / "none")
    (source / "optimal31-train.txt").write_text("airplane(1).jpg")
    (source / "optimal31-test.txt").write_text("airplane(2).jpg\nzoo(1).jpg")
    train_rows, test_rows, _ = run_source(scenes, *argv, tmp_path / "lists")
    assert [r["file_name"] for r in train_rows] == ["airplane/airplane(1).jpg"]
    assert [r["file_name"] for r in test_rows] == ["airplane/airplane(2).jpg", "zoo/zoo(1).jpg"]
    write_classes(tmp_path / "fgsc/train", {"0": 2, "10": 2}, ".jpg", "{kind}_{i}")
    write_classes(tmp_path / "fgsc/test", {"0": 1, "2": 1}, ".jpg", "{kind}_{i}")
    train_rows, test_rows, _ = run_source(scenes, "fgsc23", tmp_path / "fgsc", tmp_path / "out")
    assert [r["label"] for r in train_rows] == ["0", "0", "10", "10"]
    assert [r["label"] for r in test_rows] == ["0", "2"]
    with pytest.raises(SystemExit):
        scenes.main(["optimal", str(source), str(tmp_path / "x")])
    assert regex.search("optimal.*choose from .?resisc45", capsys.readouterr().err)


def test_utm():
    """Against published coordinates (the CN Tower, to a metre), the axes, both hemispheres, and the
    meridian's length from the equator to 45 degrees north on WGS 84, 4,984,944.378 m."""
    to_degrees = eurosat.utm_to_degrees
    assert far(to_degrees(630084, 4833438, 17, True), [-79.387139, 43.642567]) < 1.5e-5
    assert far(to_degrees(500000, 0, 32, True), [9, 0]) < 1e-12
    north, south = to_degrees(3e5, 4e6, 10, True), to_degrees(3e5, 1e7 - 4e6, 10, False)
    assert far(north, [south[0], -south[1]]) < 1e-12
    assert far(to_degrees(500000, 0.9996 * 4984944.378, 31, True), [3, 45]) < 1e-8


def test_eurosat_from_geotiffs(tmp_path):
    """Bands 4, 3, 2 at 2750 to 255, GSD and place of the centre out of the georeference; a file
    without one and a damaged one are quarantined."""
    tifffile = pytest.importorskip("tifffile")
    folder = tmp_path / "eurosat/ds/tif/Forest"
    folder.mkdir(parents=True)
    bands = (np.arange(13) * 250 + np.zeros((64, 64, 1))).astype(np.uint16)
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32617)
    tie = (0, 0, 0, 629764.0, 4833758.0, 0)
    tags = [(33550, "d", 3, (10.0, 10.0, 0.0)), (33922, "d", 6, tie), (34735, "H", 16, keys)]
    for i in (1, 2, 3, 4):
        options = dict(photometric="minisblack", planarconfig="contig", extratags=tags[i == 3 :])
        tifffile.imwrite(folder / f"Forest_{i}.tif", bands, **options)
    os.truncate(folder / "Forest_4.tif", 3000)
    (tmp_path / "eurosat/eurosat-train.txt").write_text("Forest_1.jpg\nForest_3.jpg\nForest_4.jpg")
    (tmp_path / "eurosat/eurosat-test.txt").write_text("Forest_2.jpg")
    (row,), _, bad = run_source(eurosat, tmp_path / "eurosat", tmp_path / "out")
    assert row["gsd"] == [10.0, 10.0] and far(row["location"], [-79.387139, 43.642567]) < 1.5e-5
    pixels = np.asarray(Image.open(tmp_path / "out/train" / row["file_name"]))
    assert pixels.shape == (64, 64, 3)
    assert pixels[5, 5].tolist() == [round(v * 250 * 255 / 2750) for v in (3, 2, 1)]
    assert ["georeference" in bad[0]["problem"], "damaged" in bad[1]["problem"]] == [True, True]


def test_so2sat(tmp_path):
    """Bands 4, 3, 2 of sen2 and the name of the local climate zone, from the two HDF5 files."""
    h5py = pytest.importorskip("h5py")
    (tmp_path / "in/culture_10").mkdir(parents=True)
    for name, n in (("training", 3), ("testing", 2)):
        with h5py.File(tmp_path / f"in/culture_10/{name}.h5", "w") as file:
            file["sen2"] = np.arange(10) * 0.05 + np.zeros((n, 32, 32, 1))
            file["label"] = np.eye(17)[[16, 0, 2][:n]]
    train_rows, test_rows, _ = run_source(so2sat, tmp_path / "in", tmp_path / "out")
    labels = [r["label"] for r in train_rows]
    assert labels == ["water", "compact high-rise", "compact low-rise"] and len(test_rows) == 2
    pixel = np.asarray(Image.open(tmp_path / "out/train" / train_rows[0]["file_name"]))[3, 3]
    assert pixel.tolist() == [round(v * 255 / 0.275) for v in (0.1, 0.05, 0)]
    shutil.copytree(tmp_path / "in/culture_10", tmp_path / "in/block")
    line = refused_by(so2sat, tmp_path / "in", tmp_path / "x")
    assert "block/training.h5" in line and "give the folder of one, culture_10's" in line
    shutil.rmtree(tmp_path / "in/block")
    path = tmp_path / "in/culture_10/testing.h5"
    path.unlink()  # HDF5 knows an open file again by its inode
    path.write_bytes(b"half")
    assert "testing.h5: not So2Sat's HDF5" in refused_by(so2sat, tmp_path / "in", tmp_path / "x")


@pytest.mark.parametrize("script, package", [(eurosat, "tifffile"), (so2sat, "h5py")])
def test_optional_packages_are_asked_for(script, package, tmp_path, monkeypatch):
    """One line that says what to install."""
    (tmp_path / "Forest_1.tif").touch()
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in refused_by(script, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("script, name", [(fmow, "train-images.tar.gz"), (wilds, "wilds.zip")])
def test_archives_are_to_be_unpacked(script, name, tmp_path):
    (tmp_path / name).touch()
    assert f"unpack {name} first" in refused_by(script, tmp_path, tmp_path / "out")


def test_links_are_followed_once(tmp_path):
    """A class folder may lie on another disk; a link to a folder above ends nothing."""
    (tmp_path / "disk/a").mkdir(parents=True)
    (tmp_path / "disk/a/1.jpg").touch()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").symlink_to(tmp_path / "disk/a")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    assert sources.list_files(tmp_path / "in", ".jpg") == [tmp_path / "in/a/1.jpg"]


# --------------------------------------------------------------------------------------------------
# Others' weights


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter and statistic random, so that none hides behind being 0 or 1."""
    torch.manual_seed(0)
    for value in (*module.parameters(), *module.buffers()):
        if value.is_floating_point():
            torch.nn.init.uniform_(value, 0.1, 0.3)
    return module.eval()


@pytest.fixture(scope="module")
def vit() -> model.ViT:
    return scrambled(model.ViT(32, 16, *model.VITS["vit_micro"]))


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    return scrambled(model.build_image_encoder("resnet50", 32, 16))


# Source -> where its authors put the tensors, under which prefix, and what else the file holds
VIT_FILES = {
    "slip": ("state_dict", "module.visual.", {"module.logit_scale": torch.ones(())}),
    "clip": ("state_dict", "module.visual.", {"module.image_projection": torch.ones(2, 2)}),
    "mocov3": ("state_dict", "module.base_encoder.", {"module.momentum_encoder.x": torch.ones(1)}),
    "dino": ("teacher", "backbone.", {"head.mlp.0.weight": torch.ones(2)}),
    "deit": ("model", "", {"head.bias": torch.ones(2)}),
    "timm": (None, "", {"head.weight": torch.ones(2, 2)}),
    "mae": ("model", "", {"mask_token": torch.ones(1)}),
    "satmae": ("model", "_orig_mod.module.", {"decoder_blocks.0.norm1.bias": torch.ones(1)}),
    "satmaepp": ("model", "module._orig_mod.", {"proj_up_conv.weight": torch.ones(1)}),
    "scalemae": ("model", "", {"fpn.bias": torch.ones(1), "decoder_norm.bias": torch.ones(1)}),
}
RESNET_FILES = {
    "mocov2": ("state_dict", "module.encoder_q.", {"module.queue": torch.ones(2, 2)}),
    "ssl4eo": ("state_dict", "module.encoder_q.", {"module.encoder_q.fc.0.bias": torch.ones(2)}),
    "torchvision": (None, "", {"fc.weight": torch.ones(2, 2)}),
    "timm": (None, "", {"fc.bias": torch.ones(2)}),
}
BESIDE = {  # as the authors' own training scripts left it there
    "epoch": 3, "best_acc1": np.float64(61.5), "loss": np.float32(0.5), "lr": np.int64(3),
    "args": argparse.Namespace(lr=0.1, output_dir=PosixPath("/runs/1")),
}  # fmt: skip


def authors_file(path: Path, layout: tuple, tensors: dict) -> Path:
    """As written in 2021, when NumPy's modules were named otherwise."""
    key, prefix, others = layout
    content = {prefix + name: value for name, value in tensors.items()} | others
    buffer = io.BytesIO()
    torch.save({key: content, **BESIDE} if key else content, buffer)
    with zipfile.ZipFile(buffer) as new, zipfile.ZipFile(path, "w") as old:
        for name in new.namelist():
            part = new.read(name)
            if name.endswith("data.pkl"):
                part = part.replace(b"cnumpy._core.", b"cnumpy.core.")
            old.writestr(name, part)
    return path


def converted(source: str, path: Path, *options) -> evaluate.Pretrained:
    out = path.parent / "out/ours.pt"
    weights.main([source, str(path), str(out), *map(str, options)])
    return evaluate.load_pretrained(out, torch.device("cpu"))


@pytest.mark.parametrize("source", VIT_FILES)
def test_vits_of_others(source, vit, tmp_path, capsys):
    """Every tensor where it belongs, from files with options, NumPy scalars and paths beside them;
    positions of another size are resampled."""
    tensors = dict(vit.state_dict())
    if source == "satmaepp":
        tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].flip(1)
    path = authors_file(tmp_path / "x.pt", VIT_FILES[source], tensors)
    p = converted(source, path, "--image-size", 32)
    ours = p.model.image_encoder.state_dict()
    wanted = vit.state_dict()
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())
    assert (p.image_size, p.about["method"], p.about["vit"]) == (32, source, "vit_micro")
    assert "loaded 54 tensors as vit_micro(128, 4, 4)" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["ours.pt"]
    if source == "mae":
        larger = converted(source, path, "--image-size", 64).model.image_encoder
        resampled = model.resample_positions(vit.pos_embed, 4, 4)
        assert far(larger.pos_embed.detach(), resampled.detach()) < 1e-6


@pytest.mark.parametrize("source", RESNET_FILES)
def test_resnets_of_others(source, resnet, tmp_path):
    """ResNet-50 in the layouts of MoCo-v2 (Ayush et al.), SSL4EO-S12, torchvision and timm; older
    files do not count batches."""
    tensors = resnet.state_dict()
    if source == "torchvision":
        tensors = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    path = authors_file(tmp_path / "x.pt", RESNET_FILES[source], tensors)
    p = converted(source, path, "--image-size", 32)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(p.model.image_encoder(images), resnet(images))
    if source == "mocov2":  # a run of that method starts from it, and so do its keys
        config = model.ModelConfig(32, 16, "resnet50", image_image="moco", queue=8)
        moco = model.SatMIP(config)
        evaluate.load_image_encoder(moco, tmp_path / "out/ours.pt")
        for encoder in (moco.image_encoder, moco.key_encoder.encoder):
            assert torch.equal(encoder.layer4[2].bn3.running_var, resnet.layer4[2].bn3.running_var)


def test_satmaepp_answers_rgb_as_its_authors_network_answers_bgr(vit, tmp_path):
    """They standardise blue, green, red with statistics in the order red, green, blue."""
    path = authors_file(tmp_path / "x.pt", VIT_FILES["satmaepp"], vit.state_dict())
    p = converted("satmaepp", path, "--image-size", 32)
    rgb = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v)[:, None, None] for v in weights.FMOW)
    with torch.no_grad():
        theirs = vit((rgb.flip(1) - mean) / std)
        ours = p.model.image_encoder(data.standardise(rgb, *p.statistics))
    assert far(ours, theirs) < 1e-4  # 0.25 with the statistics left in order


def test_standardisation_is_the_sources_or_what_is_said(vit, tmp_path, capsys):
    """timm's weights were trained with several: the one in use is printed."""
    path = authors_file(tmp_path / "x.pt", VIT_FILES["timm"], vit.state_dict())
    argv = ("timm", path, "--image-size", 32)
    assert converted(*argv).statistics == ([0.5] * 3, [0.5] * 3)
    assert "standardised by mean [0.5, 0.5, 0.5]" in capsys.readouterr().out
    given = converted(*argv, "--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225)
    assert given.statistics == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    line = refused_by(weights, *argv[:2], tmp_path / "o.pt", "--std", 0, 1, 1)
    assert "--std [0.0, 1.0, 1.0]" in line


def test_usual_heads(tmp_path, capsys):
    """A ViT-S has 12 heads in SLIP and MoCo-v3, 6 in timm, DINO and DeiT, in equal tensors."""
    tensors = model.ViT(32, 16, 384, 12, 6).state_dict()
    for source, name in (("slip", "vit_small"), ("dino", "vit_small_6")):
        path = authors_file(tmp_path / "x.pt", VIT_FILES[source], tensors)
        assert converted(source, path, "--image-size", 32).model.config.vit == name


class Malice:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_wrong_weights_of_others(vit, resnet, tmp_path):
    """Another source, a missing or misshapen tensor, another architecture, a torn file, code: one
    line that names it, nothing written, no code run."""
    path, out = tmp_path / "x.pt", tmp_path / "out.pt"
    state, layout = vit.state_dict(), VIT_FILES["timm"]
    argv = ("timm", path, out, "--image-size", 32)
    for changes, needle in (
        ({"norm.weight": torch.ones(64)}, r"norm.weight: \(64,\), wanted \(128,\)"),
        ({"blocks.0.ls1.gamma": torch.ones(128)}, "more than ours: blocks.0.ls1.gamma"),
        ({"norm_pre.weight": torch.ones(128)}, "more than ours: norm_pre.weight"),
        ({"pos_embed": torch.ones(1, 6, 128)}, "pos_embed is for 6 tokens"),
        ({"pos_embed": torch.ones(1, 1, 128)}, "pos_embed is for 1 tokens"),
        ({"cls_token": torch.tensor(1.0)}, "cls_token: missing or of another shape"),
        ({"patch_embed.proj.weight": torch.ones(128, 3, 0, 0)}, "weight: missing or of another"),
        ({"blocks.x.a": torch.ones(1)}, "a ViT of width 128 and 5 layers: not among"),
        ({"patch_embed.proj.weight": torch.ones(128)}, "patch_embed.proj.weight: missing or of"),
    ):
        authors_file(path, layout, state | changes)
        assert regex.search(needle, refused_by(weights, *argv))
    pooled = {name: value for name, value in state.items() if not name.startswith("norm.")}
    authors_file(path, layout, pooled)  # a fine-tuned MAE, which averages tokens
    assert "norm.weight: nothing, wanted (128,)" in refused_by(weights, *argv)
    assert "no visual.cls_token" in refused_by(weights, "slip", *argv[1:])
    tiny = {k: v for k, v in state.items() if not k.startswith("blocks.3.")}
    authors_file(path, layout, tiny)
    assert "a ViT of width 128 and 3 layers: not among" in refused_by(weights, *argv)
    for std in (0, "nan", 58.4):
        assert "numbers from 0 to 1" in refused_by(weights, *argv, "--std", std, 1, 1)
    assert "--image-size 0: not a multiple" in refused_by(weights, *argv[:-1], 0)
    assert "--image-size 40: not a multiple of their patch, 16" in refused_by(
        weights, *argv[:-1], 40)  # fmt: skip
    names = ("visual.class_embedding", "visual.conv1.weight")
    torch.save({"state_dict": dict.fromkeys(names, torch.ones(2))}, path)
    assert "OpenAI's CLIP, another network than ours" in refused_by(weights, "clip", *argv[1:])
    bands = {"conv1.weight": torch.ones(64, 13, 7, 7)}
    authors_file(path, RESNET_FILES["ssl4eo"], resnet.state_dict() | bands)
    line = refused_by(weights, "ssl4eo", path, out)
    assert "conv1.weight: (64, 13, 7, 7), wanted (64, 3, 7, 7)" in line
    torch.save({"model": state, "args": Malice(tmp_path / "marker")}, path)
    assert "holds io.open, which is no plain value" in refused_by(weights, *argv)
    torch.save({"model": state, "args": np.random.default_rng}, path)
    assert "default_rng, which is no plain value" in refused_by(weights, *argv)
    torch.save({"model": 5}, path)
    assert "it holds no tensors" in refused_by(weights, *argv)
    authors_file(path, layout, state)
    os.truncate(path, 1000)
    assert "damaged" in refused_by(weights, *argv)
    line = refused_by(weights, "timm", tmp_path / "none.pt", out)
    assert "none.pt: no such file; nothing is downloaded" in line
    assert not out.exists() and not (tmp_path / "marker").exists()


# --------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_of_a_dataset(demo_folder, tmp_path, capsys):
    """Both are drawn, of one's own fields, too; none of them is an error."""
    own, bare = tmp_path / "own", tmp_path / "bare"
    for split, folder in itertools.product(("train", "test"), (own, bare)):
        own_images(folder / split, "a.png", "b.png")
        rows = [{"file_name": "a.png"}, {"file_name": "b.png"}]
        if folder == own:
            rows[0] |= {"seen": "2015-09", "height": 3, "soil": "clay"}
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / split / "metadata.jsonl").write_text(text)
    kinds = {"seen": "timestamp", "height": "number", "soil": "category"}
    text = json.dumps({name: {"kind": kind} for name, kind in kinds.items()})
    (own / "fields.json").write_text(text)
    for folder in (demo_folder, own, bare):
        show.main([str(folder), str(tmp_path / folder.name / "pictures")])
    out = capsys.readouterr().out
    for folder, pictures in ((demo_folder, 2), (own, 2), (bare, 1)):
        folder = tmp_path / folder.name / "pictures"
        for name in ("samples.png", "distributions.png")[:pictures]:
            assert f"wrote {folder / name}" in out
            assert min(Image.open(folder / name).size) > 900
        assert len(list(folder.iterdir())) == pictures
    assert "no field can be read, so distributions.png is not drawn" in out
    train, _ = read_dataset(own)
    columns = [show.columns_of(train, field) for field in choose_fields(own, "")]
    assert {title: values[0] for title, values in columns[0].items()} == pytest.approx(
        {"seen, year": 2015, "seen, month": 9, "seen, weekday": np.nan}, nan_ok=True
    )
    assert columns[1:] == [{"height": [[3], None]}, {"soil": ["clay", None]}]
