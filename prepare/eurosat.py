"""EuroSAT (supplement A, Section 4.4): Sentinel-2 images of 64 px in ten classes.

    python -m prepare.eurosat SOURCE DIR

SOURCE holds the 13-band GeoTIFFs (EuroSATallBands; pip install tifffile), which know their GSD and
place, or else the JPEGs, which do not; and torchgeo's lists eurosat-train.txt and eurosat-test.txt.
"""

import cmath
import math
from pathlib import Path
from typing import Iterator

from data import errors_in_one_line
from metadata import BadInput
from prepare import scenes
from prepare.loop import Sample, arguments
from prepare.sources import REFLECTANCE, eight_bits, encode, list_files, need


def utm_to_degrees(x: float, y: float, zone: int, north: bool) -> list[float]:
    """UTM metres on WGS 84 -> [longitude, latitude], by Krueger's series to third order (below a
    millimetre)."""
    n = 1 / (2 * 298.257223563 - 1)  # third flattening
    radius = 6378137 / (1 + n) * (1 + n**2 / 4 + n**4 / 64)
    xi, eta = (y - (0 if north else 1e7)) / (0.9996 * radius), (x - 5e5) / (0.9996 * radius)
    beta = n / 2 - 2 * n**2 / 3 + 37 * n**3 / 96, n**2 / 48 + n**3 / 15, 17 * n**3 / 480
    z = complex(xi, eta)
    z -= sum(b * cmath.sin(2 * (j + 1) * z) for j, b in enumerate(beta))
    chi = math.asin(math.sin(z.real) / math.cosh(z.imag))
    delta = 2 * n - 2 * n**2 / 3 - 2 * n**3, 7 * n**2 / 3 - 8 * n**3 / 5, 56 * n**3 / 15
    latitude = chi + sum(d * math.sin(2 * (j + 1) * chi) for j, d in enumerate(delta))
    longitude = math.radians(6 * zone - 183) + math.atan2(math.sinh(z.imag), math.cos(z.real))
    return [math.degrees(longitude), math.degrees(latitude)]


def make(path: Path, splits: dict[Path, str]) -> Iterator[Sample]:
    """A 13-band GeoTIFF in UTM -> RGB (bands 4, 3, 2), gsd and place of its centre."""
    tifffile = need("tifffile")
    try:
        with tifffile.TiffFile(path) as file:
            pixels, tags = file.asarray(), file.pages[0].geotiff_tags
    except Exception:  # tifffile's parsers raise ValueError, struct.error, KeyError, ...
        raise BadInput(f"{path}: damaged, or compressed (pip install imagecodecs)") from None
    if pixels.ndim != 3 or pixels.shape[2] != 13:
        raise BadInput(f"{path}: shape {pixels.shape}, not 13 bands")
    names = ("ModelPixelScale", "ModelTiepoint", "ProjectedCSTypeGeoKey")
    scale, tie, code = (tags.get(name) for name in names)
    if not scale or not tie or not 32601 <= int(code or 0) <= 32760:
        raise BadInput(f"{path}: georeference of EPSG {code}, not UTM (32601 to 32760)")
    x = tie[3] + (pixels.shape[1] / 2 - tie[0]) * scale[0]
    y = tie[4] - (pixels.shape[0] / 2 - tie[1]) * scale[1]
    label = path.parent.name
    record = {
        "file_name": f"{label}/{path.stem}.png", "label": label, "gsd": list(map(float, scale[:2])),
        "location": utm_to_degrees(x, y, int(code) % 100, north=int(code) < 32700),
    }  # fmt: skip
    rgb = eight_bits(pixels[..., [3, 2, 1]], 0, 1e4 * REFLECTANCE)
    yield Sample(splits[path], record, encode(rgb))


def main(argv: list[str] | None = None) -> None:
    args = arguments("Prepare EuroSAT.").parse_args(argv)
    with errors_in_one_line():
        paths = list_files(args.source, ".tif", ".jpg")
        if any(path.suffix == ".tif" for path in paths):
            need("tifffile")
            scenes.run("eurosat", ".tif", args, make)
        else:
            print("EuroSAT from JPEGs: no GSD, no place; the GeoTIFFs (EuroSATallBands) have both")
            scenes.run("eurosat", ".jpg", args)


if __name__ == "__main__":
    main()
