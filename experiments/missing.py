"""What the probe on image and metadata loses when test images lack fields.

    python -m experiments.missing runs/satmips --output missing.jsonl

Fitted once, on the training rows as they are. Test rows lose each field with some probability, or
one field everywhere; beside it the image alone, which needs none.
"""

import numpy as np
import torch

import data
from evaluate import Pretrained, linear_probe, modality, score
from experiments.common import (
    Features, arguments, both_features, metadata_features, needs_metadata, open_run, scored_labels,
)  # fmt: skip
from experiments.results import append, class_name, markdown, model_name, percent

SHARES = (0.25, 0.5, 0.75)


def masks(names: list[str], rows: int) -> dict[str, np.ndarray]:
    """What is missing -> bool [rows, fields], True where a value is taken away."""
    draws = data.uniform(0, np.arange(rows)[:, None], np.arange(len(names)))
    found = {"nothing": draws < 0}
    for share in SHARES:
        found[f"{share:.0%} of all values"] = draws < share
    for j, name in enumerate(names):
        found[name] = np.zeros((rows, len(names)), bool)
        found[name][:, j] = True
    found["all fields"] = draws < 1
    return found


def without_fields(p: Pretrained, test: data.Split) -> dict[str, torch.Tensor]:
    """What is missing -> the test rows' metadata features [m, D]."""
    names, features = [field.name for field in p.reader.fields], {}
    for what, mask in masks(names, len(test)).items():
        records = []
        for record, lost in zip(test, mask):
            gone = {name for name, missing in zip(names, lost) if missing}
            records.append({key: value for key, value in record.items() if key not in gone})
        features[what] = metadata_features(p, records)
    return features


def missing(p: Pretrained, features: Features, label: str, classes: list, y: list, changed) -> list:
    """Scores of one label for each of `changed`, and of the image alone."""
    (train, test), known = features, (y[0] >= 0).to(p.device)
    labels, about = y[0].to(p.device)[known], {"label": label, "protocol": "missing"}
    # All test rows at once, so that the probe is fitted once
    tests = [torch.cat([test["image"], metadata], dim=1) for metadata in changed.values()]
    both = linear_probe(modality(train, "both")[known], labels, torch.cat(tests), len(classes))
    image = linear_probe(train["image"][known], labels, test["image"], len(classes))
    results = []
    for what, probabilities in zip(changed, both.chunk(len(changed))):
        result = about | {"features": "both", "missing": what}
        results.append(result | score(probabilities, y[1], None))
    result = about | {"features": "image", "missing": "image alone"}
    return [*results, result | score(image, y[1], None)]


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    with data.errors_in_one_line():
        for run in args.run:
            p, splits = open_run(run, args)
            needs_metadata(p, splits)
            labels = scored_labels(splits)
            features = both_features(p, splits, args.workers)
            changed, cells = without_fields(p, splits[1]), {}
            for label, (classes, y) in labels.items():
                found = missing(p, features, label, classes, y, changed)
                append(args.output, [p.about | r for r in found])
                for r in found:
                    cells.setdefault(r["missing"], []).append(percent(r["accuracy"]))
            names = [class_name(label) for label in labels]
            header = f"{model_name(p.about | {'features': 'both'})}, accuracy (%) without"
            lines = [[header, *names], *([what, *found] for what, found in cells.items())]
            print(f"{run}\n{markdown(lines)}")


if __name__ == "__main__":
    main()
