"""Scores by distance to the nearest training image: does metadata help only near to it?

    python -m experiments.leakage runs/satmips --output leakage.jsonl

A linear probe on image, metadata and both, and kNN (k = 20) on the location alone, scored on test
images in groups of equal size, from the nearest to the farthest. A gain of both over image that is
there only near to training images is the neighbourhood's, not the place's.
"""


import data
from evaluate import Pretrained, knn, linear_probe, modality
from experiments.common import (
    Features, Splits, arguments, both_features, location, nearest_km, open_run, scored_labels,
    unit_sphere,
)  # fmt: skip
from experiments.results import append, class_name, markdown, model_name, percent
from metadata import BadInput


def leakage(p: Pretrained, splits: Splits, features: Features, label: str, bins: int) -> list[dict]:
    """Accuracy of each kind of features in each group of test images with a label and a place."""
    points = [unit_sphere([location(record) for record in split]) for split in splits]
    placed = [x.norm(dim=1) > 0.5 for x in points]
    if not all(x.any() for x in placed):
        raise BadInput(f"{splits[0].folder.parent}: no location in a split; distances need it")
    classes, (y, test_y) = data.class_ids(label, *splits)
    known, asked = y >= 0, (test_y >= 0) & placed[1]
    km = nearest_km(points[1][asked], points[0][placed[0]])
    right = {}
    for name in ("image", "metadata", "both") if p.reader else ("image",):
        x, test_x = (modality(f, name) for f in features)
        labels = y[known].to(p.device)
        found = linear_probe(x[known], labels, test_x[asked], len(classes))
        right[name] = found.argmax(dim=1).cpu() == test_y[asked]
    near = known & placed[0]
    bank, k = points[0][near].float(), min(20, int(near.sum()))
    votes = knn(bank, y[near], points[1][asked].float(), len(classes), (k,))
    right["location alone"] = votes[0].argmax(dim=1) == test_y[asked]
    results = []
    for part in km.argsort().tensor_split(bins):
        if len(part):
            limits = {"from_km": km[part].min().item(), "to_km": km[part].max().item()}
            for name, hits in right.items():
                result = {"features": name, "label": label, "protocol": "leakage", **limits}
                share = hits[part].double().mean().item()
                results.append(result | {"accuracy": share, "test": len(part)})
    return results


def span(r: dict) -> str:
    digits = int(r["to_km"] < 10)
    return f"{r['from_km']:,.{digits}f} to {r['to_km']:,.{digits}f} km"


def table(results: list[dict]) -> str:
    kinds, groups = list(dict.fromkeys(r["features"] for r in results)), {}
    for r in results:
        name = f"{model_name(r | {'features': 'both'})}, {class_name(r['label'])}"
        key = (name, r["from_km"], r["to_km"], span(r), f"{r['test']:,}")
        groups.setdefault(key, {})[r["features"]] = r["accuracy"]
    lines = [["accuracy (%)", "to the nearest training image", "test images", *kinds]]
    gain = "both" in kinds
    lines[0] += ["gain of both over image"] * gain
    for key, cells in groups.items():
        line = [key[0], *key[3:], *(percent(cells[kind]) for kind in kinds)]
        if gain:
            line.append(f"{100 * (cells['both'] - cells['image']):+.1f}")
        lines.append(line)
    return markdown(lines)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--bins", type=int, default=4, help="groups of test images (4)")
    args = parser.parse_args(argv)
    with data.errors_in_one_line():
        if args.bins < 1:
            raise BadInput(f"--bins {args.bins}: at least 1")
        for run in args.run:
            p, splits = open_run(run, args)
            features, found = both_features(p, splits, args.workers), []
            for label in scored_labels(splits):
                found += [p.about | r for r in leakage(p, splits, features, label, args.bins)]
            append(args.output, found)
            print(f"{run}\n{table(found)}")


if __name__ == "__main__":
    main()
