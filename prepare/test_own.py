"""Tests of prepare/: loop, values, tables, stac, bands, fields, own, check."""

import base64
import csv
import functools
import json
import math
import multiprocessing
import os
import signal
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metadata
from data import choose_fields, read_dataset
from metadata import FIELDS, BadInput, TableReader, TextReader, caption
from prepare import check, fields, own
from prepare.bands import eight_bit_image, read_pixels, three_bands
from prepare.loop import Sample, encode, in_order, prepare
from prepare.stac import centre, rank, read_items
from prepare.tables import printable, read_table
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
    assert sorted(tmp_path.glob("*")) == [*before, tmp_path / "a", tmp_path / "b"]
    problems = [entry["problem"] for entry in own_rows(tmp_path / "a")["quarantine"]]
    assert len(problems) == 11 and all("names no file in the dataset" in p for p in problems[:7])
    assert problems[8:10] == ["a.jpg: no such file or directory", "b.jpg: too dark"]
    assert "band" not in problems[7] and "test_own.py" in problems[7]


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
        file.write(b'{"item": "299", "ro')  # torn
    done = journal.read_bytes().count(b"\n") - 1  # less its first line
    assert 40 <= done < 300
    with pytest.raises(BadInput, match="begun with another table or other files; remove it"):
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
        (tmp_path / "out/journal.jsonl").touch()  # as after a kill between the last two steps
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
    with pytest.raises(BadInput, match="^a process was killed.*fewer --jobs.*kept"):
        prepare(tmp_path / "out", [0, 3, 2], functools.partial(make_sample, wrong=die), 1)
    assert list(in_order([3, 1, 2], str, 2)) == ["3", "1", "2"]


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
    "2015-09-21 10:11:12 UTC": "2015-09-21T10:11:12Z", "2015/9/1 9:30": "2015-09-01T09:30",
    "9/21/2015 3:30:08 PM": "2015-09-21T15:30:08", "21/9/2015 12:05 am": "2015-09-21T00:05",
    "21 Sep 2015": "2015-09-21", "September 21, 2015 10:00": "2015-09-21T10:00",
    "Mon, 21 Sep 2015 15:30:08 GMT": "2015-09-21T15:30:08Z", "05.05.2015": "2015-05-05",
    "03/04/2015": None, "31/31/2015": None, "2015-13-01": None, "page 1\nof 2": None, "abc": None,
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
    assert parse_date("03/04/2015 10:00", "month-first") == "2015-03-04T10:00"
    assert parse_date("03.04.15", "%d.%m.%y") == "2015-04-03", "its hour is not known"
    assert parse_date("15h03.04.15", "%Hh%d.%m.%y") == "2015-04-03T15:00:00"


def test_degrees_and_lists():
    for text, expected in {
        "41°24'12.2\"N": 41.403389, "2°10'26.5\"W": -2.174028, "12.2S": -12.2, "26.5 E": 26.5,
        "N 41 24 12.2": 41.403389, "E26°30′": 26.5, "-12.5": -12.5, "41.5 30 N": None,
        "12 70 N": None, "W": None, "": None, "north": None,
        "0,5": 0.5, "-12,25": -12.25, "1,234": None,
    }.items():  # fmt: skip
        assert degrees(text) == expected, text
    for text in ("[0.50 0.40]", "(0.5, 0.4)", "{0.5,0.4}", "POINT (0.5 0.4)", [0.5, "0.4"]):
        assert plain_list(text) == [0.5, 0.4], text
    for text in ("[]", "[a b]", "0.5 0.4", [], "POLYGON ((1 2, 3 4))", None):
        assert plain_list(text) is None, text


def test_values_become_what_metadata_reads():
    place, gsd = FIELDS["location"], FIELDS["gsd"]
    assert plain_value([200, 10], place) == [-160, 10] and plain_value([20, 100], place) is None
    assert plain_value("0.5", gsd) == 0.5 and plain_value("[0.5 0.4]", gsd) == [0.5, 0.4]
    category = metadata.Field("site", "category")
    found = [plain_value(v, category) for v in (1.0, "1.0", "1", 1, True, ["a"], {"a": 1}, "1.5")]
    assert found == ["1", "1", "1", "1", "true", None, None, "1.5"]


# --------------------------------------------------------------------------------------------------
# tables


def test_tables_by_any_name(tmp_path):
    """Comma, semicolon, tab, Excel's first line, JSON; blank names and lines are passed over."""
    written = {
        "UPPER.CSV": "a,b\n1,x\n\n2,y\n", "tabs.txt": "a\tb\n1\tx\n2\ty\n",
        "excel.csv": "sep=;\na;b\r\n1;x\r\n2;y\r\n", "index.csv": "\ufeff,a,b\n0,1,x\n1,2,y\n",
        "lines.jsonl": '{"a": "1", "b": "x"}\n\n{"a": "2", "b": "y"}',
        "array.json": '[{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]',
        "quoted.csv": 'a,b\n"1",x\n2,"y"\n',
    }  # fmt: skip
    for name, text in written.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        rows = [row.values for row in read_table(tmp_path / name)]
        assert rows == [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}], name


@pytest.mark.parametrize("content, needle", [
    ("a,b\nx,Häfen\n".encode("latin-1"), "t, line 2: not UTF-8"),
    ("a,b\nx,y\n".encode("utf-16"), "t, line 1: not UTF-8"), (b"a,b\0\n", "t, line 1: not UTF-8"),
    (b'a,b,c\n1,2,3\n4,"5,6\n7,8,9\n', "t, line 3: a quotation mark that is never closed"),
    (b'a,b,c\n1,"2,3\n4,5,6\n7,8"\n', "t, line 2: a cell of 3 lines that look like rows"),
    (b'a,b\n1,"2"3\n', "t, line 2: a quotation mark within a cell"),
    (b"gsd,a,gsd\n1,2,3\n", "two columns are called 'gsd'"), (b"", "t: no rows"),
    (b"a,b\n1," + b"x" * 2**20 + b"x\n", "t, line 2: a cell of more than"),
    (b'{"a": 1, "a": 2}', "t, line 1: 'a' comes twice"), (b"[1]", "t, entry 1: not a JSON object"),
    (b"{a: 1}", "t, line 1: not JSON; a table is CSV"),
])  # fmt: skip
def test_tables_that_would_be_read_wrong(content, needle, tmp_path):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(BadInput) as refused:
        read_table(tmp_path / "t")
    assert needle in str(refused.value) and "\n" not in str(refused.value)


def test_long_cells_and_wrong_rows(tmp_path):
    coast = "POLYGON ((" + "10.000001 50.000001, " * 8000 + "))"
    text = f'a,b\n1,"{coast}"\n2,y,3\n"two\nlines",z\n'
    (tmp_path / "t.csv").write_text(text)
    rows = read_table(tmp_path / "t.csv")
    assert rows[0].values["b"] == coast and rows[2].values == {"a": "two\nlines", "b": "z"}
    assert rows[1].problem == f"{tmp_path}/t.csv, line 3: 3 values, more than the 2 columns"
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
    assert centre({"geometry": None}) is None


def test_which_asset_is_the_image(tmp_path, capsys):
    """By role and key, however they are ordered; the asset's own gsd; what is taken is told."""
    rgb = [{"name": f"B0{i}", "common_name": c} for i, c in ((4, "red"), (3, "green"), (2, "blue"))]
    order = [
        {"roles": ["visual"]}, {"roles": ["data"], "eo:bands": rgb}, {"roles": ["overview"]},
        {"roles": []}, {"roles": ["data", "reflectance"]}, {"roles": ["thumbnail"]},
    ]  # fmt: skip
    ranks = [rank("key", asset, False) for asset in order]
    assert ranks == sorted(ranks) and len(set(ranks)) == 6
    assert rank("key", {"roles": ["data"]}, True) < rank("key", {"roles": ["overview"]}, False)
    names = ("a/AOT.png", "a/preview.jpg", "a/TCI.png", "b/thumb.png", "c.png", "d/B04.png")
    own_images(tmp_path, *names)
    data, thumbnail = {"href": "./AOT.png", "roles": ["data"]}, {"roles": ["thumbnail"]}
    far = {"href": "https://x/y.tif"}
    items = {
        "a/a": {"aot": data, "thumbnail": thumbnail | {"href": "preview.jpg"},
                "visual": {"href": "./TCI.png", "gsd": 10}},
        "b/b": {"thumbnail": thumbnail | {"href": "thumb.png"}, "visual": far},
        "c": {}, "d/d": {"B04": {"href": "B04.png", "roles": ["data"]}}, "e": {"visual": far},
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
    assert rows.keys() == {"a/TCI.png", "b/thumb.png", "c.png", "d/B04.png"}
    assert rows["a/TCI.png"] == {
        "file_name": "a/TCI.png", "timestamp": "2017-12-01T14:00:00Z", "gsd": 10, "location": [2, 3]
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "asset visual: 1" in out and "asset thumbnail: 1" in out and "macOS" in out
    assert "datetime -> timestamp" in out and "left out: 1 different" in out
    assert choose_fields(tmp_path / "out", "all") == tuple(
        FIELDS[name] for name in ("timestamp", "gsd", "location"))  # fmt: skip
    problems = [entry["problem"] for entry in found["quarantine"]]
    assert problems == [
        f"{tmp_path}/broken.json: no image of it is here; its assets: none",
        f"{tmp_path}/e.json: no image of it is here; its assets: https://x/y.tif",
    ]
    for wrong in ("{", "[1]", '{"features": 5}'):
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


def test_images_that_cannot_be_read_right_are_refused(tmp_path):
    (tmp_path / "a.jp2").write_bytes(base64.b64decode(JP2))
    for limits, needle in ((None, "a.jp2: 16 bits"), ([0, 3100], "a.jp2: JPEG2000 of 16 bits")):
        with pytest.raises(BadInput, match=needle):
            eight_bit_image(tmp_path / "a.jp2", limits)
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
        "year": ([2015, 2016], "number"),
        "id": ([f"x{i}" for i in range(50)], "skip"), "mixed": ([1] * 95 + ["bad"] * 5, "number"),
        "half": ([1, "bad"] * 5, "category"), "several": ([["a"], ["b"]], "skip"),
        "stamp": ([1442849408000, 1442849409000], "number"),
    }  # fmt: skip
    for name, (values, kind) in columns.items():
        assert fields.kind_of(values) == kind, name
    assert fields.field_of("n", "number", ["1", 2.0]).style == "%.0f"
    assert fields.field_of("n", "list", [[1, 2.5], "[3 4]"]).parts == ("1", "2")


def test_the_table_of_fields_counts_what_can_be_read(tmp_path, capsys):
    """Of every column, the paper's included; an example of what cannot be read is printed."""
    argv = table_of(
        tmp_path, gsd=lambda i: "wide" if i % 4 == 0 else 0.5 + i, timestamp=lambda i: f"day {i}",
        seen=lambda i: f"0{1 + i % 9}/04/2015", slope=lambda i: "n/a" if i % 2 else i,
    )  # fmt: skip
    rows = run_own(*argv, tmp_path / "out")["train"]
    out = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "gsd list of 2 75% [1.5000, 1.5000] cannot be read: wide" in out
    assert "timestamp - 0% left out, as no value can be read: day 0" in out
    assert "slope number 50% 0" in out
    assert any(line.startswith("seen ") and "--dates day-first or" in line for line in out)
    assert rows[1] == {"file_name": "1.png", "gsd": 1.5, "seen": "02/04/2015"}
    assert rows[2]["slope"] == 2 and choose_fields(tmp_path / "out", "")[0].name == "gsd"


def test_fields_of_a_dataset_that_is_there(tmp_path, capsys):
    """python -m prepare.fields: as its rows are, since nothing converts them any more."""
    cells = {"site": lambda i: "ab"[i % 2], "height": lambda i: i, "day": lambda i: "2015-09-21"}
    argv = table_of(tmp_path, **cells)
    run_own(*argv, tmp_path / "out", "--types", "day=skip")
    fields.main([str(tmp_path / "out"), "--types", "height=category"])
    chosen = {f.name: f.kind for f in choose_fields(tmp_path / "out", "")}
    assert chosen == {"site": "category", "height": "category"}
    for types, needle in (("hight=number", "no column 'hight'"), ("site=text", "a kind is one of")):
        assert needle in one_line(fields.main, tmp_path / "out", "--types", types)


# --------------------------------------------------------------------------------------------------
# own


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
@pytest.mark.parametrize("column, values, expected", [
    ("acquired", [20150901, 20150902], "2015-09-01"),
    ("timestamp", [1442849408000] * 2, "2015-09-21T15:30:08Z"),
    ("gsd", ["[0.50 0.40]"] * 2, [0.5, 0.4]), ("gsd", [10.0, 0.5], 10.0), ("site", [1, 1.0], "1"),
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
    skipped = run_own(*table_of(tmp_path, **cells), tmp_path / "x", "--types", "LAT=skip,Lon=skip")
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
    ({"labels": ["a", "b"]}, "labels: a list of classes (a, b); scores need one class an image"),
    ({"labels": "['a', 'b']"}, "labels: a list of classes (a, b)"),
    ({"labels": {"a": 1}}, "labels: a list of classes"),
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
        "--label kind": "no column 'kind'",
        "--types id=skip": "no column 'id'; there are file_name, split, platform",
        "--types platform=text": "a kind is one of", "--path-column q": "no column 'q'",
        "--split-column place": "no row for train: place says x", "--area none": "no column 'none'",
        "--split-column platform --area place": "no row for train: platform says a, b",
    }.items():  # fmt: skip
        assert needle in one_line(own.main, *argv, *options.split()), options
    (tmp_path / "none").mkdir()
    assert "no column names files under" in one_line(own.main, argv[0], tmp_path / "none", argv[2])
    assert "no such file" in one_line(own.main, tmp_path / "x.csv", *argv[1:])
    assert "no such folder" in one_line(own.main, argv[0], tmp_path / "x", argv[2])
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"no image")
    assert "damaged, or no image" in one_line(own.main, *argv)
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
    assert "is no file under" in found["quarantine"][0]["problem"]
    assert "no such image" in found["quarantine"][2]["problem"]


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
    assert len(half["test"]) == 30 and "20% were asked for" in capsys.readouterr().out
    text = text.replace("train", "val").replace("test", "train").replace("fold", "split")
    argv[0].write_text(text)
    rows = run_own(*argv, tmp_path / "e")
    assert (len(rows["train"]), len(rows["test"])) == (4, 56), "a table without test has val for it"


def test_a_class_that_only_the_test_split_has(tmp_path, capsys):
    argv = table_of(tmp_path, label=lambda i: "none" if i == 23 else 1 if i < 20 else 1.0)
    rows = run_own(*argv, tmp_path / "out")
    assert [row["label"] for row in rows["test"]] == ["1", "1", "1", "none"]
    assert "label: no training image of none, which the test split has" in capsys.readouterr().out


def test_the_ground_sample_distance_follows_the_image(tmp_path):
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
    unfinished = (tmp_path / "out").rename(tmp_path / "out.unfinished")
    (unfinished / "journal.jsonl").write_bytes((unfinished / "prepared.json").read_bytes())
    assert "begun with size None, not 8" in one_line(own.main, *argv, "--size", 8)
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
    train[10] |= {"utm_zone": "18M", "location": [10.0, 50.0]}
    test[5]["label"] = "c"
    (folder / "train/extra.jpg").write_bytes((folder / "train/12.png").read_bytes())
    os.truncate(folder / "train/13.png", 60)
    (folder / "train/14.png").unlink()
    (folder / "train/22.png").write_bytes((folder / "train/20.png").read_bytes())
    (folder / "test/1.png").write_bytes((folder / "train/23.png").read_bytes())
    train.append(dict(train[15]))
    for split in rows:
        text = "".join(json.dumps(row) + "\n" for row in rows[split])
        (folder / split / "metadata.jsonl").write_text(text + "not a line\n" * (split == "train"))
    names = ("gsd", "timestamp", "location", "utm_zone", "wavelengths")
    (folder / "fields.json").write_text(fields.fields_json(FIELDS[name] for name in names))
    return {
        "timestamp: not a date in ISO 8601": "sometime", "gsd: malformed": "'wide'",
        "location: latitude and longitude swapped": "112.5", "location: out of range": "200.0",
        "location outside its utm_zone": "line 11: [10.0, 50.0]",
        "image without a row": "extra.jpg", "row without its image": "14.png",
        "unreadable image": "13.png", "image twice": "22.png is 20.png",
        "image in train and test": "23.png, 1.png", "file_name twice": "line 31: 15.png",
        "unreadable line": "row 32", "area in train and test": "shared",
        "wavelengths: constant": "661",
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
    found = check.check(tmp_path, 0)
    assert found["both", "label: test classes that training lacks"] == (1, "c")
    out = capsys.readouterr().out
    assert "label: 2 classes, 15 (a) to 16 (b) images" in out and "gsd 97%" in out


def test_check_of_sound_and_of_poor_datasets(tmp_path, capsys):
    """Status 0 where training can start; whole numbers are one class; equal metadata are told."""
    argv = table_of(tmp_path, gsd=lambda i: i % 2 + 0.5, label=lambda i: i % 2 + 1)
    run_own(*argv, tmp_path / "out")
    path = tmp_path / "out/test/metadata.jsonl"
    rows = [json.loads(line) | {"label": 1.0} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="0"):
        check.main([str(tmp_path / "out"), "--jobs", "0"])
    out = capsys.readouterr().out
    assert "no problem found" in out and "label: 1 classes, 4 (1) to 4 (1) images" in out
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


def test_check_of_a_metadata_csv(tmp_path):
    """A stray quotation mark is told, and a metadata.csv that nobody reads."""
    for split in ("train", "test"):
        own_images(tmp_path / split, *[f"{i}.png" for i in range(4)])
        (tmp_path / split / "metadata.csv").write_text(
            'file_name,gsd,label\n0.png,1,"a\n1.png,2,b\n2.png,3,b"\n3.png,4,b\n')
    assert "line 2: a cell of 3 lines that look like rows" in one_line(check.main, tmp_path)
    for split in ("train", "test"):
        lines = [json.dumps({"file_name": f"{i}.png", "gsd": i + 1}) for i in range(4)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    found = check.check(tmp_path, 0)
    assert ("train", "metadata.csv is not read, metadata.jsonl is") in found
