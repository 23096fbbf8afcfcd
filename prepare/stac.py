"""A folder of STAC items (SpatioTemporal Asset Catalog, JSON) -> rows of a table."""

import json
import os
from collections import Counter
from pathlib import Path

from prepare.sources import list_files
from prepare.tables import Row, printable

IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".jp2", ".webp", ".bmp", ".gif", ".ppm", ".pgm")


def points(coordinates: list) -> list[list[float]]:
    """All points of a geometry, however deep its parts are."""
    if coordinates and isinstance(coordinates[0], (int, float)):
        return [coordinates]
    return [point for part in coordinates for point in points(part)]


def centre(item: dict) -> list[float] | None:
    """Longitude and latitude of the middle of the geometry, else of the box.

    A box whose west is larger than its east crosses the 180th meridian (RFC 7946, 5.2). A geometry
    there has parts on both sides of it, or one part that seems to go around the Earth."""
    geometry, box = item.get("geometry") or {}, item.get("bbox")
    parts = [part.get("coordinates") for part in geometry.get("geometries", [geometry])]
    if geometry.get("type") == "MultiPolygon":
        parts = geometry["coordinates"]
    spans, latitudes = [], []
    for corners in [points(part) for part in parts if part]:
        longitudes = [point[0] for point in corners]
        if 180 < max(longitudes) - min(longitudes) < 360:
            longitudes = [longitude % 360 for longitude in longitudes]
        spans.append((min(longitudes), max(longitudes)))
        latitudes += [point[1] for point in corners]
    if not spans and box:
        west, south = box[:2]
        east, north = box[len(box) // 2 : len(box) // 2 + 2]  # with heights there are six numbers
        spans, latitudes = [(west, east + 360 * (west > east))], [south, north]
    if not spans:
        return None
    turned = [(west + 360 * (west < 0), east + 360 * (west < 0)) for west, east in spans]
    west, east = min(extent(spans), extent(turned), key=lambda both: both[1] - both[0])
    longitude = (west + east) / 2
    longitude -= 360 * (longitude > 180)
    return [round(longitude, 9), round((min(latitudes) + max(latitudes)) / 2, 9)]


def extent(spans: list[tuple[float, float]]) -> tuple[float, float]:
    return min(west for west, _ in spans), max(east for _, east in spans)


def band_names(asset: dict) -> set[str]:
    """What an asset's bands are: red, green, blue, nir, ..."""
    names = set()
    for band in [*asset.get("eo:bands", []), *asset.get("bands", [])]:
        names |= {band.get("common_name"), band.get("eo:common_name"), band.get("name")}
    return names


def rank(key: str, asset: dict, data_alone: bool) -> int:
    """How well an asset stands for its item, 0 best; from 7 on only where nothing else is there."""
    roles = asset.get("roles") or []
    if "visual" in roles or key == "visual":
        return 0
    if {"thumbnail", "metadata"} & {key, *roles} or "preview" in key:
        return 7
    if "data" in roles and {"red", "green", "blue"} <= band_names(asset):
        return 2
    if data_alone and "data" in roles:
        return 3
    if "overview" in roles or key == "overview":
        return 4
    return 5 if not roles else 6


def choose_asset(item: dict, path: Path, wanted: str) -> tuple[str, dict, Path] | None:
    """-> the asset that shows the item (its key, itself, its file), or the image beside the item's
    file that has its name; None when none of them is here."""
    assets, found = item.get("assets") or {}, []
    data = [key for key, asset in assets.items() if "data" in (asset.get("roles") or [])]
    for key, asset in assets.items():
        file = Path(os.path.abspath(path.parent / str(asset.get("href"))))
        if file.suffix.lower() in IMAGES and file.is_file() and wanted in ("", key):
            found.append((rank(key, asset, len(data) == 1), key, asset, file))
    for suffix in IMAGES:
        for name in (path.stem + suffix, path.stem + suffix.upper()):
            if not wanted and path.with_name(name).is_file():
                found.append((1, "beside its item", {}, path.with_name(name)))
    if not found:
        return None
    _, key, asset, file = min(found, key=lambda one: one[0])
    return key, asset, file


def item_row(item: dict, path: Path, wanted: str, chosen: Counter) -> Row:
    asset = choose_asset(item, path, wanted)
    if asset is None:
        hrefs = [str(a.get("href")) for a in (item.get("assets") or {}).values()]
        what = f"no image of it is here; its assets: {printable(', '.join(hrefs) or 'none')}"
        return Row(str(path), {}, f"{path}: {what}")
    key, about, file = asset
    chosen[key] += 1
    values = {**item["properties"], "file_name": os.path.abspath(file)}
    place = centre(item)
    if place:
        values["location"] = place
    if about.get("gsd"):
        values["gsd"] = about["gsd"]  # of this asset: bands of one item differ
    return Row(str(path), values)


def read_items(folder: Path, wanted: str = "") -> list[Row]:
    """A row for each item, its image under "file_name". wanted: the asset's key (default: by role).

    Items of a FeatureCollection, as searches give them, count one by one; catalogs are passed."""
    rows, chosen = [], Counter()
    for path in list_files(folder, ".json", ".geojson"):
        try:
            content = json.loads(path.read_bytes())
            for item in content.get("features", [content]):
                if item.get("type") == "Feature":
                    rows.append(item_row(item, path, wanted, chosen))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            rows.append(Row(str(path), {}, f"{path}: not a STAC item"))
    for key, count in chosen.most_common():
        print(f"asset {printable(key)}: {count:,}")
    return rows
