"""WILDS-FMoW: whole images of 224 px with place and date, a small stand-in for fMoW-RGB.

    python -m prepare.wilds SOURCE DIR

SOURCE holds rgb_metadata.csv and images/. It has no ground sample distance, and whole images in
place of the crops that the paper learns from.
"""

import functools
import io
from pathlib import Path
from typing import Iterator

from data import errors_in_one_line, open_image
from metadata import FIELDS, BadInput, parse_numbers
from prepare.loop import Sample, arguments, prepare
from prepare.sources import COUNTRIES, list_files
from prepare.tables import read_table

COLUMNS = ("split", "img_filename", "category", "timestamp", "lat", "lon")
SPLITS = {"train": "train", "val": "test"}  # as in the paper; "test" and "seq" are the challenge's


def make(number: int, folder: Path, rows: list[dict[str, str]]) -> Iterator[Sample | str]:
    """The number of a row, which is also its image's -> its sample."""
    row, path = rows[number], folder / "images" / f"rgb_img_{number}.png"
    if row["category"] == "false_detection":
        yield "false detections"
        return
    content = path.read_bytes()
    open_image(io.BytesIO(content), path)
    location = parse_numbers([row["lon"], row["lat"]], FIELDS["location"])
    if location is None:
        raise BadInput(f"row {number + 1}: lon {row['lon']}, lat {row['lat']} are not degrees")
    name = row["img_filename"].removesuffix(".jpg").removesuffix("_rgb")
    record = {
        "file_name": path.name, "timestamp": row["timestamp"], "location": location,
        "country_code": COUNTRIES.get(row.get("country_code"), row.get("country_code")),
        "cloud_cover": row.get("cloud_cover"), "label": row["category"],
        "area": f"{row['split']}/{name.rpartition('_')[0]}",  # numbered anew in each
    }  # fmt: skip
    yield Sample(SPLITS[row["split"]], record, content)


def main(argv: list[str] | None = None) -> None:
    args = arguments("Prepare WILDS-FMoW.").parse_args(argv)
    with errors_in_one_line():
        table = list_files(args.source, "rgb_metadata.csv")[0]
        rows = [row.values for row in read_table(table)]
        for name in COLUMNS:
            if name not in rows[0]:
                raise BadInput(f"{table}: no column {name}; is it WILDS' table?")
        print("WILDS-FMoW: no ground sample distance; whole images in place of crops")
        items = [i for i, row in enumerate(rows) if row.get("split") in SPLITS]
        one = functools.partial(make, folder=table.parent, rows=rows)
        prepare(args.folder, items, one, args.jobs)


if __name__ == "__main__":
    main()
