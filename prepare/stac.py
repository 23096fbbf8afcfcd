"""A folder of STAC items (SpatioTemporal Asset Catalog, JSON) -> rows of a table."""

import os
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

from prepare.sources import list_files
from prepare.tables import IMAGES, Row, load_json, printable, read_text


def points(coordinates: list) -> list[list[float]]:
    """All points of a geometry, however deep its parts are."""
    if coordinates and isinstance(coordinates[0], (int, float)):
        return [coordinates]
    return [point for part in coordinates for point in points(part)]


def centre(item: dict) -> list[float] | None:
    """Longitude and latitude of the middle of the geometry, else of the box.

    A box whose west is larger than its east crosses the 180th meridian (RFC 7946, 5.2). A geometry
    there has points near both ends: it is narrower with longitudes from 0 to 360."""
    geometry, box = item.get("geometry") or {}, item.get("bbox")
    parts = geometry.get("geometries", [geometry])
    corners = points([part.get("coordinates") or [] for part in parts])
    if corners:
        longitudes = [point[0] for point in corners]
        latitudes = [point[1] for point in corners]
        turned = [longitude % 360 for longitude in longitudes]
        wide = max(longitudes) - min(longitudes) > 180
        if wide and 0 < max(turned) - min(turned) < 180:  # 0: all the Earth, -180 to 180
            longitudes = turned
    elif len(box or ()) in (4, 6):
        west, south = box[:2]
        east, north = box[len(box) // 2 : len(box) // 2 + 2]  # with heights there are six numbers
        longitudes, latitudes = [west, east + 360 * (west > east)], [south, north]
    else:
        return None
    longitude = (min(longitudes) + max(longitudes)) / 2
    longitude -= 360 * (longitude > 180)
    return [round(longitude, 9), round((min(latitudes) + max(latitudes)) / 2, 9)]


def rank(key: str, asset: dict, data_alone: bool) -> int:
    """How well an asset stands for its item, 0 best; 7 is a last resort."""
    roles, bands = {key.lower(), *(asset.get("roles") or [])}, set()
    for band in [*(asset.get("eo:bands") or []), *(asset.get("bands") or [])]:
        bands |= {band.get("common_name"), band.get("eo:common_name"), band.get("name")}
    if "visual" in roles:
        return 0
    if {"thumbnail", "metadata"} & roles or re.search("preview|thumb|quick|browse", key, re.I):
        return 7
    if "data" in roles and {"red", "green", "blue"} <= bands:
        return 2
    if "data" in roles and data_alone:
        return 3
    if "overview" in roles:
        return 4
    return 5 if len(roles) == 1 else 6


def choose_asset(item: dict, path: Path, wanted: str) -> tuple[str, dict, Path] | None:
    """-> the asset that shows the item (its key, itself, its file), or the image beside the item's
    file that has its name; None when none of them is here."""
    assets, found = item.get("assets") or {}, []
    data_alone = sum("data" in (asset.get("roles") or []) for asset in assets.values()) == 1
    for key, asset in assets.items():
        href = str(asset.get("href")).removeprefix("file://")
        for name in (href, unquote(href)):  # %20 is a blank
            file = Path(os.path.abspath(path.parent / name))
            if file.suffix.lower() in IMAGES and file.is_file() and wanted in ("", key):
                found.append((rank(key, asset, data_alone), key, asset, file))
    for suffix in IMAGES:
        for file in (path.with_suffix(suffix), path.with_suffix(suffix.upper())):
            if not wanted and file.is_file():
                found.append((1, "beside its item", {}, file))
    if not found:
        return None
    return min(found, key=lambda one: one[0])[1:]


def item_row(item: dict, path: Path, wanted: str, chosen: Counter) -> Row:
    asset = choose_asset(item, path, wanted)
    if asset is None:
        assets = (item.get("assets") or {}).items()
        there = ", ".join(f"{key} ({about.get('href')})" for key, about in assets) or "none"
        what = f"no image file of {wanted or 'it'} is here; its assets: {there}"
        return Row(str(path), {}, f"{path}: {printable(what, 300)}")
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
            content = load_json(read_text(path), str(path))
            for item in content.get("features", [content]):
                if item.get("type") == "Feature":
                    rows.append(item_row(item, path, wanted, chosen))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            rows.append(Row(str(path), {}, f"{path}: not a STAC item"))
    for key, count in chosen.most_common():
        print(f"asset {printable(key)}: {count:,}")
    return rows
