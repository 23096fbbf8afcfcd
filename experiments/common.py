"""What the scripts that ask a run something share: its model, its features, places on the Earth."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import data
from evaluate import Pretrained, autocast, extract, labelled, load_pretrained, read_checkpoint
from metadata import FIELDS, POSTER, BadInput, parse_numbers, survey

EARTH_RADIUS = 6371.0  # km
Splits = tuple[data.Split, data.Split]
Features = tuple[dict[str, Tensor], dict[str, Tensor]]  # of the two splits, as evaluate.extract's

# --------------------------------------------------------------------------------------------------
# Commands


def devices() -> list[str]:
    """What --device may be on this machine; the last one is the default."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *["cuda"][: len(gpus)]]


def arguments(text: str, output: bool = True) -> argparse.ArgumentParser:
    """RUN ... --data --output --workers --device, which all scripts on runs take."""
    parser = argparse.ArgumentParser(description=text.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run, or its checkpoint.pt")
    parser.add_argument("--data", type=Path, help="dataset (default: the training's)")
    if output:
        parser.add_argument("--output", type=Path, help="append a JSON line a result to this file")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode images")
    parser.add_argument("--device", choices=devices(), default=devices()[-1])
    return parser


def open_run(run: Path, args: argparse.Namespace) -> tuple[Pretrained, Splits]:
    """A run's model and the dataset to ask it about; `about` names both."""
    path = run / "checkpoint.pt" if run.is_dir() else run
    if args.workers < 0:
        raise BadInput(f"--workers {args.workers}: 0 or more")
    p = load_pretrained(path, torch.device(args.device))
    if not args.data and "data" not in p.about:
        raise BadInput(f"{path} names no dataset; give one with --data")
    p.about["data"] = str(args.data or p.about["data"])
    splits = data.read_dataset(p.about["data"])
    if p.statistics is None and not args.data:
        p.statistics = read_checkpoint(path)["statistics"]
    p.statistics = p.statistics or data.channel_statistics(splits[0], p.image_size, args.workers)
    return p, splits


def needs_metadata(p: Pretrained, splits: Splits) -> None:
    if p.reader is None:
        raise BadInput(f"{p.about.get('checkpoint')}: {p.about.get('method')} reads no metadata")
    found = survey(splits[1], p.reader.fields).readable
    if not any(found.values()):
        raise BadInput(f"{splits[1].path}: {', '.join(found)} missing in every row")


def scored_labels(splits: Splits) -> dict[str, tuple[list[str], list[Tensor]]]:
    """Label -> its classes and the ids of both splits, of the labels that both splits have."""
    found = {name: labelled(name, splits) for name in data.label_names(splits[0])}
    found = {name: of_label for name, of_label in found.items() if of_label[0]}
    if not found:
        raise BadInput(f"{splits[0].path}: no label to score")
    return found


def both_features(p: Pretrained, splits: Splits, workers: int) -> Features:
    return extract(p, splits[0], workers), extract(p, splits[1], workers)


# --------------------------------------------------------------------------------------------------
# Runs


class Rows(torch.utils.data.Subset):
    """Some rows of a split, used as a split."""

    @property
    def folder(self) -> Path:
        return self.dataset.folder


def spread(rows: list[int], most: int) -> list[int]:
    """At most that many of the rows, evenly spaced."""
    step = max(1, -(-len(rows) // most))
    return rows[::step]


@torch.no_grad()
def metadata_features(p: Pretrained, records: list[dict]) -> Tensor:
    """CLS outputs of the metadata encoder [n, D_metadata]."""
    found = []
    for i in range(0, len(records), 512):
        metadata = [x.to(p.device) for x in p.reader(records[i : i + 512])]
        with autocast(p.device):
            found.append(p.model.metadata_encoder(*metadata).float())
    return torch.cat(found)


@torch.no_grad()
def embed(p: Pretrained, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLS outputs -> unit vectors [n, E] of the joint space (Section 3.1)."""
    project = {"image": p.model.image_projection, "metadata": p.model.metadata_projection}
    return {name: F.normalize(project[name](x), dim=1) for name, x in features.items()}


# --------------------------------------------------------------------------------------------------
# Places


def location(record: dict) -> list[float] | None:
    """[longitude, latitude], None where the record has none that can be read."""
    return parse_numbers(record.get("location"), FIELDS["location"])


def unit_sphere(places: list[list[float] | None]) -> Tensor:
    """Longitude, latitude in degrees -> points [n, 3], float64; no place is the zero vector."""
    degrees = torch.tensor([place or [0.0, 0.0] for place in places], dtype=torch.float64)
    longitude, latitude = degrees.deg2rad().unbind(1)
    x, y = latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin()
    known = torch.tensor([place is not None for place in places])
    return torch.stack([x, y, latitude.sin()], dim=1) * known[:, None]


def great_circle(a: Tensor, b: Tensor) -> Tensor:
    """km between points of the unit sphere [..., 3]; by the chord, as the cosine loses metres."""
    return 2 * EARTH_RADIUS * ((a - b).norm(dim=-1) / 2).clamp(max=1).asin()


def nearest_km(places: Tensor, others: Tensor) -> Tensor:
    """km from each place [m, 3] to the nearest of the others [n, 3]."""
    found = []
    for part in places.split(max(1, 2**25 // len(others))):
        found.append(great_circle(part, others[(part @ others.T).argmax(dim=1)]))
    return torch.cat(found)


# --------------------------------------------------------------------------------------------------
# Synthetic data


def write_synthetic(folder: Path, size: int, rows: int) -> None:
    """64 JPEG files for all rows; records are the poster's at other scales, times and places."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for i in range(64):
            image = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((size, size))
            image.save(folder / split / f"{i}.jpg", quality=90)
        with open(folder / split / "metadata.jsonl", "w") as file:
            for i in range(rows):
                record = POSTER | {"file_name": f"{i % 64}.jpg", "gsd": rng.random(2).tolist()}
                record["location"] = rng.uniform((-180, -60), (180, 75)).tolist()
                record["timestamp"] = f"20{10 + i % 8}-{1 + i % 12:02d}-{1 + i % 28:02d}T12:30:08Z"
                file.write(json.dumps(record) + "\n")
