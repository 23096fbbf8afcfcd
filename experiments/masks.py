"""Pairs of an image and its mask, for experiments.segment: PNG masks, buildings as polygons."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

import data
from metadata import BadInput

NONE = 255  # pixels without a class
FINE = 5  # rows and columns that a pixel has while polygons are drawn; odd: one is its centre's


class Pair(NamedTuple):
    image: Path
    mask: Path  # PNG, or GeoJSON of buildings


def find_pairs(source: Path, masks: Path | None) -> list[list[Pair]]:
    """Those of a prepared dataset's two splits, or of one folder, each with a mask."""
    lists = []
    if masks is None:
        found = {path.stem.removeprefix("Geo_"): path for path in source.rglob("Geo_*.geojson")}
        images = sorted(source.rglob("3band_*.tif"))
        lists.append([Pair(path, found.get(path.stem.removeprefix("3band_"))) for path in images])
    elif (source / "train").is_dir():
        for split in data.read_dataset(source):
            names = [Path(name) for name in split.columns("file_name")[0]]
            folder = masks / split.folder.name
            lists.append([Pair(split.folder / n, folder / n.with_suffix(".png")) for n in names])
    else:
        images = sorted(path for path in source.iterdir() if path.is_file())
        lists.append([Pair(path, masks / f"{path.stem}.png") for path in images])
    both = [[pair for pair in pairs if pair.mask and pair.mask.is_file()] for pairs in lists]
    lone = sum(map(len, lists)) - sum(map(len, both))
    if lone:
        print(f"{source}: {lone:,} images have no mask and are left out")
    return both


def choose(lists: list[list[Pair]], wanted: list[int]) -> list[list[Pair]]:
    """Random training and test images, the same ones always, so that runs compare. A single list is
    split, in the same share if it is short; fewer images are some of more."""
    drawn = []
    for pairs in lists:
        drawn.append([pairs[i] for i in data.uniform(0, np.arange(len(pairs))).argsort()])
    if len(drawn) == 1:
        total = min(sum(wanted), len(drawn[0]))
        first = total * wanted[0] // sum(wanted)
        drawn = [drawn[0][:first], drawn[0][first:total]]
    return [pairs[:count] for pairs, count in zip(drawn, wanted)]


def polygons(path: Path) -> list[list[np.ndarray]]:
    """Rings [n, 2] of each polygon, the outer one first; none in a file without features.

    Points and lines have no area and are left out; so is a height, a point's third number."""
    found = []
    try:
        for feature in json.loads(path.read_bytes() or "{}").get("features") or ():
            shape = feature["geometry"] or {"type": None}
            places = shape.get("coordinates")
            for rings in {"Polygon": [places], "MultiPolygon": places}.get(shape["type"], ()):
                found.append([np.array([point[:2] for point in ring], float) for ring in rings])
                for ring in found[-1]:
                    if ring.ndim != 2 or len(ring) < 3 or not np.isfinite(ring).all():
                        raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path}: not GeoJSON whose features are polygons") from None
    return [rings for rings in found if rings]


def draw(outlines: list[list[np.ndarray]], width: int, height: int) -> np.ndarray:
    """uint8 [h, w]: 1 where a pixel's centre lies in a polygon, given in columns and rows.

    Pillow colours each pixel that an outline touches, so it draws FINE times larger, and only the
    pixels' centres are taken."""
    mask = np.zeros((height, width), np.uint8)
    for rings in outlines:
        first, last = np.floor(rings[0].min(0)), np.ceil(rings[0].max(0))
        x0, y0, x1, y1 = np.clip([*first, *last], 0, [width, height] * 2).astype(int).tolist()
        if x0 >= x1 or y0 >= y1:
            continue
        canvas = Image.new("L", (FINE * (x1 - x0), FINE * (y1 - y0)))
        for i, ring in enumerate(rings):  # the holes after what they are in
            points = np.floor(FINE * (ring - (x0, y0))).ravel().tolist()
            ImageDraw.Draw(canvas).polygon(points, fill=int(i == 0))
        mask[y0:y1, x0:x1] |= np.asarray(canvas)[FINE // 2 :: FINE, FINE // 2 :: FINE]
    return mask


def buildings(image: Image.Image, pair: Pair) -> np.ndarray:
    """The polygons in pixels, by the TIFF's own tags: x grows with columns, y falls with rows."""
    tags, size = getattr(image, "tag_v2", {}), np.array(image.size)
    scale, tie = np.array(tags.get(33550, ()))[:2], np.array(tags.get(33922, ()))
    if len(scale) < 2 or len(tie) < 6 or not scale.all():
        raise BadInput(f"{pair.image}: no geotags (ModelPixelScale, ModelTiepoint)")
    outlines = []
    for rings in polygons(pair.mask):
        outlines.append([tie[:2] + (ring - tie[3:5]) / scale * (1, -1) for ring in rings])
    near = [(abs(rings[0].mean(0)) < 3 * size).all() for rings in outlines]
    if outlines and not any(near):
        raise BadInput(f"{pair.mask}: no polygon near {pair.image}; other coordinates than its?")
    return draw(outlines, *image.size)


def read_pair(pair: Pair, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """-> the image uint8 [h, w, 3], its classes uint8 [h, w], NONE where a pixel has none."""
    image = data.open_image(pair.image, pair.image)
    if pair.mask.suffix == ".geojson":
        return np.asarray(image.convert("RGB")), buildings(image, pair)
    mask = data.open_image(pair.mask, pair.mask)
    if mask.mode not in ("P", "L", "1"):
        raise BadInput(f"{pair.mask}: {mask.mode} pixels; wanted palette or gray values, classes")
    if mask.size != image.size:
        sizes = "{} x {} px, its image has {} x {}".format(*mask.size, *image.size)
        raise BadInput(f"{pair.mask}: {sizes}")
    mask = np.asarray(mask).astype(np.uint8)
    beyond = mask[(mask >= classes) & (mask != NONE)]
    if len(beyond):
        wanted = f"--classes {classes} are 0 to {classes - 1}, and {NONE} where there is none"
        raise BadInput(f"{pair.mask}: a pixel of class {beyond.max()}; {wanted}")
    return np.asarray(image.convert("RGB")), mask
