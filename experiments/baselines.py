"""What needs no training: colour histograms, the location alone, the raw metadata ("Identity").

    python -m experiments.baselines data/demo --output baselines.jsonl
    python -m experiments.tables baselines.jsonl

The untrained network is evaluate.py --random.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from evaluate import labelled, score_features
from experiments.common import Splits, location, unit_sphere
from experiments.results import SCORED, append
from experiments.tables import general_tables
from metadata import BadInput, TableReader

BINS = 16


def histograms(split: data.Split, size: int, workers: int) -> Tensor:
    """Colour histograms [n, 3 BINS]: square roots of shares, whose cosine compares distributions
    (Bhattacharyya)."""
    found = []
    for batch in data.load(split, size, list(torch.arange(len(split)).split(512)), workers):
        levels = batch.images.flatten(2).long() // (256 // BINS)  # [B, 3, h w]
        ones = torch.ones(()).expand_as(levels)
        counts = torch.zeros(len(levels), 3, BINS).scatter_add_(2, levels, ones)
        found.append((counts / counts.sum(dim=2, keepdim=True)).sqrt().flatten(1))
    return torch.cat(found)


def places(split: data.Split) -> Tensor:
    """Points of the unit sphere [n, 3], whose cosine falls with distance; no place: zero."""
    return unit_sphere([location(record) for record in split]).float()


def identity(splits: Splits, fields: str, folder: Path) -> list[Tensor]:
    """Table features as they are.

    NOTE[PAPER] nothing is said of missing values and categories: a missing number is the mean (0),
    a category is one-hot, all zero when missing or new.
    """
    reader, found = TableReader.fit(splits[0], data.choose_fields(folder, fields)), []
    for split in splits:
        numbers, codes = reader(list(split))
        columns = [numbers.nan_to_num(0.0)]
        for j, values in enumerate(reader.categories):
            columns.append(F.one_hot(codes[:, j], len(values) + 2)[:, 2:].float())
        found.append(torch.cat(columns, dim=1))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("data", type=Path, nargs="+", help="prepared datasets")
    parser.add_argument("--fields", default="", help="of Identity (default: those of train.py)")
    parser.add_argument("--image-size", type=int, default=64, help="of the histograms in px (64)")
    parser.add_argument("--output", type=Path, help="append one JSON line a result to this file")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode images")
    args = parser.parse_args(argv)
    with data.errors_in_one_line():
        found = []
        for folder in args.data:
            splits = data.read_dataset(folder)
            features = {
                "histograms": [histograms(s, args.image_size, args.workers) for s in splits],
                "location": [places(split) for split in splits],
                "identity": identity(splits, args.fields, folder),
            }  # fmt: skip
            for label in data.label_names(splits[0]):
                classes, y = labelled(label, splits)
                for name, pair in features.items():
                    if not classes or not pair[1].any():  # no test image has any metadata
                        continue
                    about = {"method": name, "data": str(folder), "label": label}
                    about["features"] = "metadata" if name != "histograms" else "image"
                    for protocol in SCORED[:2]:
                        rows = score_features(protocol, pair, y, len(classes))
                        found += [about | row for row in rows]
        if not found:
            raise BadInput(f"{args.data[0]}: no label to score")
        append(args.output, found)
        print(general_tables(found, "paper"))


if __name__ == "__main__":
    main()
