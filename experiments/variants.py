"""A prepared dataset with other metadata or fewer training images: controls of a study.

    python -m experiments.variants shuffled data/demo data/demo-shuffled

    shuffled   each training image has the metadata of another: SatMIPS must lose its gain
    coarse     training images of at least --gsd metres a pixel (19,000): to start from (Table 4)
    fine       training images below that
    rounded    numbers without decimals in captions (fields.json)

Images are linked, not copied; the test split keeps its rows, so that scores compare.

    python -m experiments.variants masks data/demo data/demo-masks

    masks      no dataset, but for each image of the demo data its land cover in 17 classes, a PNG
               cut out of the map in demo/ (experiments.segment learns them)
"""

import argparse
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

import data
from metadata import FIELDS, BadInput, parse_numbers
from prepare.demo import PIXELS, Areas, local_grid, lookup
from prepare.fields import fields_json
from prepare.loop import progress

KINDS = ("shuffled", "coarse", "fine", "rounded")
NOT_SHUFFLED = ("file_name", "label", "area", "split")  # they belong to the image


def scale(record: dict) -> float:
    """Metres a pixel, the mean of x and y; not a number where unknown."""
    return float(np.mean(parse_numbers(record.get("gsd"), FIELDS["gsd"]) or [np.nan]))


def shuffle(records: list[dict], seed: int) -> list[dict]:
    """Metadata dealt out anew; labels, which serve evaluation alone, stay with their images."""
    order = np.argsort(data.uniform(seed, np.arange(len(records))))
    shuffled = []
    for record, other in zip(records, order):
        own = {k: v for k, v in record.items() if k.startswith(NOT_SHUFFLED)}
        theirs = {k: v for k, v in records[other].items() if not k.startswith(NOT_SHUFFLED)}
        shuffled.append(own | theirs)
    return shuffled


def choose(kind: str, records: list[dict], limit: float, seed: int) -> list[dict]:
    """The training rows of a variant."""
    if kind == "shuffled":
        return shuffle(records, seed)
    if kind == "coarse":
        return [record for record in records if scale(record) >= limit]
    if kind == "fine":
        return [record for record in records if scale(record) < limit]
    return records


def make(kind: str, source: Path, folder: Path, limit: float = 19_000, seed: int = 0) -> None:
    """Written beside and renamed."""
    if folder.exists():
        raise BadInput(f"{folder}: exists; remove it first, or choose another folder")
    unfinished = folder.with_name(folder.name + ".unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    train, test = data.read_dataset(source)
    rows = choose(kind, list(train), limit, seed)
    if not rows:
        raise BadInput(f"{source}: no training image is {kind} by --gsd {limit:g}")
    for name, split, records in (("train", train, rows), ("test", test, list(test))):
        target = unfinished / name
        target.mkdir(parents=True)
        os.symlink(split.folder.resolve(), target / "images")
        with open(target / "metadata.jsonl", "w") as file:
            for record in records:
                linked = record | {"file_name": f"images/{record['file_name']}"}
                file.write(json.dumps(linked) + "\n")
    if kind == "rounded":
        fields = data.choose_fields(source, "")
        styled = [replace(f, style="%.0f") if f.kind == "number" else f for f in fields]
        (unfinished / "fields.json").write_text(fields_json(styled))
    elif (source / "fields.json").is_file():
        shutil.copy(source / "fields.json", unfinished)
    unfinished.rename(folder)
    print(f"{folder}: {len(rows):,} training images, {kind}")


def land_cover(areas: Areas, record: dict, path: Path) -> np.ndarray:
    """uint8 [64, 64] IGBP classes at the pixels' centres, on the grid of the image's own pixels.

    A record's place is rounded, to two pixels and more; its area's number gives the exact one."""
    number, exact = str(record.get("area"))[1:], {}
    if number.isdecimal():
        longitude, latitude, gsd = areas.place(int(number))
        exact = {"gsd": round(1000 * gsd), "location": [round(longitude, 1), round(latitude, 1)]}
    if not exact or any(record.get(key) != value for key, value in exact.items()):
        what = f"{record.get('file_name')} is no image of prepare.demo with --seed {areas.seed}"
        raise BadInput(f"{path}: {what}")
    steps = np.arange(PIXELS) - (PIXELS - 1) / 2
    return lookup(areas.land_cover, local_grid(longitude, latitude, gsd, steps))


def make_masks(areas: Areas, source: Path, folder: Path) -> None:
    """Written beside and renamed."""
    if folder.exists():
        raise BadInput(f"{folder}: exists; remove it first, or choose another folder")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split in data.read_dataset(source):
        for record in progress(split, f"cutting {split.folder.name}", len(split)):
            mask = Image.fromarray(land_cover(areas, record, split.path))
            path = (unfinished / split.folder.name / record["file_name"]).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            mask.save(path)
    unfinished.rename(folder)
    print(f"{folder}: land cover, of {source}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("kind", choices=(*KINDS, "masks"), help="what is changed")
    parser.add_argument("source", type=Path, help="a prepared dataset")
    parser.add_argument("folder", type=Path, help="where to write the variant; must not exist")
    parser.add_argument("--gsd", type=float, default=19_000, help="limit of coarse and fine in m")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffling; masks: the demo's")
    args = parser.parse_args(argv)
    with data.errors_in_one_line():
        if args.kind == "masks":
            make_masks(Areas(args.seed), args.source, args.folder)
        else:
            make(args.kind, args.source, args.folder, args.gsd, args.seed)


if __name__ == "__main__":
    main()
