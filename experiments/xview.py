"""xView as it is distributed -> chips with their boxes, for experiments.detect.

The distribution is train_images/*.tif, xView_train.geojson and xview_class_labels.txt (Lam et al.,
2018). Boxes of an image that does not exist (1395.tif), types that mean nothing (75 and 82) and
boxes that are in the file twice are dropped and counted; boxes that leave their image are clipped.
"""

import contextlib
import functools
import json
import math
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Iterator

import numpy as np

import data
from metadata import BadInput
from prepare.loop import Sample, prepare
from prepare.sources import encode, list_files

TEST_SHARE = 146 / 846  # of the images
OVERLAP = 0.25  # NOTE[PAPER] of two chips: the area they share, as a part of a chip's area
SEED = 0  # NOTE[PAPER] one split, and the same chips for all runs

# --------------------------------------------------------------------------------------------------
# xView as it is distributed


def read_classes(path: Path) -> dict[str, str]:
    """type_id -> name, in the file's order, from lines "11:Fixed-wing Aircraft"."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; xView's list of classes, lines of type_id:name")
    classes = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(.+?)\s*", line)
        if line.strip() and not found:
            raise BadInput(f"{path}, line {number}: {line!r:.60} is not type_id:name")
        if found:
            classes[found[1]] = found[2]
    if not classes:
        raise BadInput(f"{path}: no class; wanted lines of type_id:name")
    return classes


def essentials(parsed: dict):
    """What is kept of a JSON object while its file is read: of a feature, three properties. So
    the file of 600,000 features never has all of them in memory."""
    if "bounds_imcoords" in parsed:
        return parsed.get("image_id"), parsed.get("type_id"), parsed["bounds_imcoords"]
    if "coordinates" in parsed:
        return None
    if isinstance(parsed.get("properties"), tuple):
        return parsed["properties"]
    return parsed


def parse_box(text: str) -> tuple[float, ...] | None:
    """ "x1,y1,x2,y2", in pixels."""
    with contextlib.suppress(ValueError):
        box = tuple(map(float, str(text).split(",")))
        if len(box) == 4 and all(map(math.isfinite, box)):
            return box
    return None


def read_boxes(path: Path, classes: list[str], images: set[str]) -> dict[str, list[tuple]]:
    """Image name -> (class, x1, y1, x2, y2) of its boxes. Prints what it drops, and why."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; the boxes of xView's training images")
    try:
        with open(path, encoding="utf-8") as file:
            features = json.load(file, object_hook=essentials)["features"]
        features = [f for f in features if isinstance(f, tuple)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadInput(f"{path}: not GeoJSON, or cut off; wanted xView's features") from None
    if not features:
        raise BadInput(f"{path}: no features with bounds_imcoords, as xView's have")
    index = {name: i for i, name in enumerate(classes)}
    boxes, dropped = {}, Counter()
    for image, kind, bounds in features:
        box, image, kind = parse_box(bounds), str(image), str(kind)
        if image not in images:
            dropped[f"there is no image {image}"] += 1
        elif kind not in index:
            dropped[f"type_id {kind} is no class"] += 1
        elif box is None:
            dropped["bounds_imcoords are not four numbers"] += 1
        elif (index[kind], *box) in boxes.setdefault(image, {}):
            dropped["twice in the file"] += 1
        else:
            boxes[image][(index[kind], *box)] = True
    for reason, count in dropped.most_common(9):
        print(f"{path.name}: {count:,} boxes dropped: {reason}")
    if len(dropped) > 9:
        print(f"{path.name}: {dropped.total():,} boxes dropped in all")
    if not any(boxes.values()):
        raise BadInput(f"{path}: no box of a known class in any image of train_images")
    return {image: list(found) for image, found in boxes.items()}


# --------------------------------------------------------------------------------------------------
# Chips


def place_chips(width: int, height: int, size: int, count: int, key: int) -> np.ndarray:
    """Random corners (x, y) [n, 2] of up to `count` chips that overlap by less than OVERLAP;
    fewer where 100 draws a chip find no more room."""
    draws = np.arange(100 * count)
    room = np.array([width - size + 1, height - size + 1])
    places = (data.uniform(SEED, key, draws[:, None], np.arange(2)) * room).astype(int)
    kept = np.empty((0, 2), int)
    for place in places:
        shared = (size - abs(kept - place)).clip(0).prod(axis=1)
        if (shared < OVERLAP * size**2).all():
            kept = np.append(kept, [place], axis=0)
        if len(kept) == count:
            break
    return kept


def inside(boxes: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    """(class, x1, y1, x2, y2) [n, 5] -> those parts that lie in the window, in its coordinates.
    NOTE[PAPER] boxes across a chip's border are cut there; what is thinner than 1 px is dropped."""
    corners = (boxes[:, 1:] - [x, y, x, y]).clip(0, [width, height, width, height])
    left = (corners[:, 2:] - corners[:, :2] >= 1).all(axis=1)
    return np.concatenate([boxes[:, :1], corners], axis=1)[left]


def cut(path: Path, boxes: dict, tests: list[str], size: int) -> Iterator[Sample | str]:
    """The chips of an image, as prepare.loop makes datasets of them."""
    image = data.open_image(path, path).convert("RGB")
    if min(image.size) < size:
        raise BadInput(f"{path}: {image.width} x {image.height} px, smaller than a chip of {size}")
    found = np.array(boxes.get(path.name, ()), float).reshape(-1, 5)
    whole = inside(found, 0, 0, *image.size)
    yield from ["boxes of which nothing lies in their image"] * (len(found) - len(whole))
    split = "train"
    if path.name in tests:
        split = "test"
    key = zlib.crc32(path.name.encode())
    for i, (x, y) in enumerate(place_chips(*image.size, size, 100, key).tolist()):
        parts = inside(whole, x, y, size, size)
        record = {"file_name": f"{path.stem}/{i}.jpg", "boxes": parts[:, 1:].tolist()}
        record["classes"] = parts[:, 0].astype(int).tolist()
        yield Sample(split, record, encode(image.crop((x, y, x + size, y + size)), "JPEG"))


def make_chips(source: Path, folder: Path, classes: list[str], size: int, jobs: int):
    """-> the dataset of chips, train and test."""
    paths = list_files(source, ".tif", under=("train_images",))
    names = [path.name for path in paths]
    boxes = read_boxes(source / "xView_train.geojson", classes, set(names))
    count = max(1, round(TEST_SHARE * len(names)))
    order = data.uniform(SEED, np.arange(len(names))).argsort()
    tests = [names[i] for i in order[:count]]
    print(f"{len(names) - count:,} training and {count:,} test images")
    prepare(folder, paths, functools.partial(cut, boxes=boxes, tests=tests, size=size), jobs)
    problems = (folder / "quarantine.jsonl").read_text().splitlines()
    if problems:
        what = f"{json.loads(problems[0])['problem']} ({len(problems)} such)"
        raise BadInput(f"{what}; mend it, remove {folder}, start again")
    splits = data.read_dataset(folder)
    chips = sum(map(len, splits))
    print(f"{chips / len(names):.1f} chips an image fitted, of 100")
    return splits
