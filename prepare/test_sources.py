"""Tests of the scripts that read the papers' datasets, make the embedded one, read others' weights
and draw, in that order."""

import argparse
import io
import itertools
import json
import math
import os
import shutil
import sys
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
from metadata import POSTER, caption, parse_fields
from prepare import demo, eurosat, fmow, scenes, show, so2sat, sources, weights, wilds


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
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != "prepared.json")
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
    add_view(source, f"{zoo}1", fmow_json((3, PORT, "zoo"), gsd=math.nan))
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
    assert poster["label"] == "airport" and poster["area"] == "airport_0"
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
    assert "gsd" not in rows["zoo/zoo_1/zoo_3/zoo_1_1_rgb.jpg"], "it was not a number"
    bad = {Path(q["item"]).stem: q["problem"] for q in quarantine}
    assert sorted(bad) == ["zoo_1_0_rgb", "zoo_1_2_rgb", "zoo_1_3_rgb"]
    assert "zoo_1_2_rgb.json: not a JSON object" in bad["zoo_1_2_rgb"]
    out = capsys.readouterr().out
    for part in (
        "2 left out: false detections, boxes of 2 px", "1 left out: boxes outside the image",
        "1 left out: locations, which no ground-truth JSON tells", "3 items in quarantine.jsonl",
        "train: 6 images of 3 classes (Table S1: 363,572 of 62)",
    ):  # fmt: skip
        assert part in out, part


def test_fmow_switches(fmow_tree, tmp_path):
    """--rescale gsd is the supplement's word, --crop box has no context, --no-location goes without
    ground truth, which may lie elsewhere (--groundtruth)."""
    source = shutil.copytree(fmow_tree, tmp_path / "source")
    (source / "groundtruth").rename(tmp_path / "elsewhere")
    line = refused_by(fmow, source, tmp_path / "out")
    assert "groundtruth: no folder; unpack it, or give --no-location" in line
    options = ("--rescale=gsd", "--crop=box", "--no-location", "--size=100")
    rows, _, _ = run_source(fmow, *options, source, tmp_path / "out")
    row = next(r for r in rows if r["file_name"].endswith("airport_0_0_rgb.jpg"))
    assert far(row["gsd"], [POSTER_JSON["gsd"] * 3.61, POSTER_JSON["gsd"] * 3.12]) < 1e-9
    assert "location" not in row
    assert row["multispectral_gsd"] == POSTER_JSON["multi_resolution_dbl"]
    sides = ["mean_pixel_width", "mean_pixel_height"]
    assert row["pixel_size"] == [POSTER_JSON[side] for side in sides]
    assert Image.open(tmp_path / "out/train" / row["file_name"]).size == (100, 100)
    given = f"--groundtruth={tmp_path / 'elsewhere'}"
    rows, _, _ = run_source(fmow, given, source, tmp_path / "given")
    assert far(rows[1]["location"], [10.09, 40.30]) < 1e-9
    assert "--size 0" in refused_by(fmow, source, tmp_path / "none", "--size", "0")


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
    row = {"location": [72.0, -3.5], "area": "airport_hangar_0", "label": "airport_hangar"}
    row |= {"country_code": "XKX", "timestamp": "2015-03-02T10:00:00Z"}
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
    assert "train: 3 images of 1 classes (Table S1:" in capsys.readouterr().out


def test_optimal31_and_fgsc23(tmp_path):
    """Half of each class, the same for the same seed, or the lists where they are; FGSC's own
    train/ and test/."""
    source = tmp_path / "optimal"
    write_classes(source / "Images", {"airplane": 6, "zoo": 4}, ".jpg", "{kind}({i})")
    argv = ("optimal31", source)
    rows = [run_source(scenes, f"--seed={i // 2}", *argv, tmp_path / f"o{i}") for i in range(3)]
    for train_rows, test_rows, _ in rows:
        for part in (train_rows, test_rows):
            assert sorted(r["label"] for r in part) == ["airplane"] * 3 + ["zoo"] * 2
    assert rows[0] == rows[1] != rows[2]
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
    assert "choose from resisc45, " in refused_by(scenes, "optimal", source, tmp_path / "x")


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


@pytest.mark.parametrize("script, name", [(fmow, "train-images.tar.gz"), (so2sat, "So2Sat.zip")])
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
    positions of another size are resampled, Scale-MAE's are computed."""
    tensors = dict(vit.state_dict())
    if source == "satmaepp":
        tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].flip(1)
    path = authors_file(tmp_path / "x.pt", VIT_FILES[source], tensors)
    p = converted(source, path, "--image-size", 32, "--heads", 4, "--position-scale", 2.5)
    ours = p.model.image_encoder.state_dict()
    wanted = vit.state_dict()
    if source == "scalemae":
        wanted["pos_embed"] = weights.sincos_positions(128, 2, 2.5)
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())
    assert (p.image_size, p.about["method"], p.about["vit"]) == (32, source, "vit_micro")
    assert "loaded 54 tensors as vit_micro(128, 4, 4)" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["ours.pt"]
    if source == "mae":
        larger = converted(source, path, "--image-size", 64, "--heads", 4).model.image_encoder
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
    p = converted("satmaepp", path, "--image-size", 32, "--heads", 4)
    rgb = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v)[:, None, None] for v in weights.FMOW)
    with torch.no_grad():
        theirs = vit((rgb.flip(1) - mean) / std)
        ours = p.model.image_encoder(data.standardise(rgb, *p.statistics))
    assert far(ours, theirs) < 1e-4  # 0.25 with the statistics left in order


def test_standardisation_is_the_sources_or_what_is_said(vit, tmp_path, capsys):
    """timm's weights were trained with several: the one in use is printed."""
    path = authors_file(tmp_path / "x.pt", VIT_FILES["timm"], vit.state_dict())
    argv = ("timm", path, "--image-size", 32, "--heads", 4)
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


def test_sincos_positions_equal_a_slow_transcription():
    """MAE's table, element by element; scaled as in Scale-MAE's Equation 2."""
    for scale in (1.0, 2.5):
        found = weights.sincos_positions(16, 3, scale)[0]
        assert found[0].abs().max() == 0
        for row, column in itertools.product(range(3), range(3)):
            expected = []
            for at, wave in itertools.product((column, row), (math.sin, math.cos)):
                expected += [wave(scale * at / 10000 ** (i / 4)) for i in range(4)]
            assert far(found[1 + 3 * row + column], expected) < 1e-6


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
    argv = ("timm", path, out, "--image-size", 32, "--heads", 4)
    for changes, needle in (
        ({"norm.weight": torch.ones(64)}, r"norm.weight: \(64,\), wanted \(128,\)"),
        ({"blocks.0.ls1.gamma": torch.ones(128)}, "more than ours: blocks.0.ls1.gamma"),
        ({"norm_pre.weight": torch.ones(128)}, "more than ours: norm_pre.weight"),
        ({"pos_embed": torch.ones(1, 6, 128)}, "pos_embed is for 6 tokens"),
        ({"patch_embed.proj.weight": torch.ones(128)}, "patch_embed.proj.weight: missing or of"),
    ):
        authors_file(path, layout, state | changes)
        assert regex.search(needle, refused_by(weights, *argv))
    pooled = {name: value for name, value in state.items() if not name.startswith("norm.")}
    authors_file(path, layout, pooled)  # a fine-tuned MAE, which averages tokens
    assert "norm.weight: nothing, wanted (128,)" in refused_by(weights, *argv)
    assert "no visual.cls_token" in refused_by(weights, "slip", *argv[1:])
    assert "2 heads (--heads)" in refused_by(weights, *argv[:-2])
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
    assert "no such file" in refused_by(weights, "timm", tmp_path / "none.pt", out).lower()
    assert not out.exists() and not (tmp_path / "marker").exists()


# --------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_of_a_dataset(demo_folder, tmp_path, capsys):
    """Both are drawn, whatever is missing, and it says where they are."""
    show.main([str(demo_folder), str(tmp_path / "demo")])
    for split in ("train", "test"):  # without any metadata
        (tmp_path / "bare" / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "bare" / split / "a.png")
        (tmp_path / "bare" / split / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    show.main([str(tmp_path / "bare"), str(tmp_path / "bare-pictures")])
    out = capsys.readouterr().out
    for folder in (tmp_path / "demo", tmp_path / "bare-pictures"):
        for name in ("samples.png", "distributions.png"):
            assert f"wrote {folder / name}" in out
            assert min(Image.open(folder / name).size) > 900
        assert len(list(folder.iterdir())) == 2
