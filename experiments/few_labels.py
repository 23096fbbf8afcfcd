"""kNN with few labels, where methods separate: random subsets of the training labels.

    python -m experiments.few_labels runs/a runs/b --output few.jsonl --histograms --random
    python -m experiments.tables few.jsonl

Subset s of n labels holds the same images for every run, so that differences between runs are
paired. Rows that are in the output are not made again: started again, it goes on where it stopped.
"""

import statistics

import torch
from torch import Tensor

import data
from evaluate import Pretrained, extract, knn, score, with_random_weights
from experiments.baselines import histograms
from experiments.common import Splits, arguments, open_run, scored_labels
from experiments.results import append, class_name, missing, model_name, percent
from metadata import BadInput

COUNTS = ((50, 1), (200, 1), (600, 5), (2000, 5), (0, 20))  # labels and k; 0: all of them


def subset(known: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the rows with a label, the same for every run; subsets are nested."""
    order = torch.from_numpy(data.uniform(seed, known.numpy())).argsort()
    return known[order[:count]]


def few_labels(x: Tensor, test_x: Tensor, y: list[Tensor], classes: int, count: int, k: int,
               subsets: int) -> dict:  # fmt: skip
    """Mean scores over the subsets, and their deviation."""
    known, found = (y[0] >= 0).nonzero()[:, 0], []
    asked = y[1] >= 0
    for seed in range(subsets if count < len(known) else 1):
        rows = subset(known, count, seed)
        labels = y[0][rows].to(x.device)
        votes = knn(x[rows], labels, test_x[asked], classes, (k,))[0]
        found.append(score(votes, y[1][asked], None))
    accuracies = [r["accuracy"] for r in found]
    deviation = statistics.stdev(accuracies) if len(found) > 1 else 0.0
    f1 = statistics.mean(r["macro_f1"] for r in found)
    result = {"accuracy": statistics.mean(accuracies), "macro_f1": f1, "test": found[0]["test"]}
    return result | {"deviation": deviation, "subsets": len(found)}


def wanted_rows(about: dict, sizes: dict[str, int], subsets: int) -> list[dict]:
    """What there is to score of a model; sizes: label -> number of labelled training images."""
    rows = []
    for label, size in sizes.items():
        for count, k in COUNTS:
            row = {"method": about["method"], "data": about["data"], "label": label, "k": k}
            row |= {"protocol": "few-labels", "labelled": count or size, "asked": subsets}
            row |= {name: about[name] for name in ("checkpoint", "step") if name in about}
            if k <= row["labelled"] <= size:
                rows.append(row)
    return rows


def describe(row: dict) -> str:
    seed = f", seed {row['seed']}" if "seed" in row else ""
    what = f"{model_name(row)}{seed}, {class_name(row['label'])}, {row['labelled']:,} labels"
    score = f"{percent(row['accuracy'])} % ± {percent(row['deviation'])}"
    return f"{what}, k={row['k']}: {score} over {row['subsets']} subsets"


def models(p: Pretrained, args) -> list[tuple[dict, Pretrained | None]]:
    """What results say of each model, and the model; None stands for colour histograms."""
    found = [(p.about, p)]
    if args.random:
        random = with_random_weights(p)
        name = f"untrained {p.about.get('vit')}, seed {p.about.get('seed')}"
        found.append((random.about | {"checkpoint": name, "step": 0}, random))
    if args.histograms:
        found.append(({"method": "histograms", "data": p.about["data"]}, None))
    return found


def image_features(model: Pretrained | None, splits: Splits, size: int, workers: int):
    if model is None:
        return [histograms(split, size, workers) for split in splits]
    return [extract(model, split, workers)["image"] for split in splits]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--subsets", type=int, default=20, help="for each number of labels (20)")
    parser.add_argument("--random", action="store_true", help="also the untrained network")
    parser.add_argument("--histograms", action="store_true", help="also colour histograms")
    args = parser.parse_args(argv)
    with data.errors_in_one_line():
        if args.subsets < 1:
            raise BadInput(f"--subsets {args.subsets}: at least 1")
        for run in args.run:
            p, splits = open_run(run, args)
            labels = scored_labels(splits)
            sizes = {label: int((y[0] >= 0).sum()) for label, (_, y) in labels.items()}
            for about, model in models(p, args):
                rows = wanted_rows(about, sizes, args.subsets)
                if not rows:
                    found = ", ".join(f"{class_name(name)} {n}" for name, n in sizes.items())
                    what = f"fewer than {COUNTS[0][0]} training images with a label ({found})"
                    raise BadInput(f"{splits[0].path}: {what}")
                rows, wanted = missing(rows, args.output), len(rows)
                name = f"{model_name(about | {'features': 'image'})}, {about.get('checkpoint', '')}"
                print(f"{name.rstrip(', ')}: {len(rows)} of {wanted} to score")
                if not rows:
                    continue
                features = image_features(model, splits, p.image_size, args.workers)
                for row in rows:
                    classes, y = labels[row["label"]]
                    options = (len(classes), row["labelled"], row["k"], args.subsets)
                    row = about | {"features": "image"} | row
                    row |= few_labels(*features, y, *options)
                    append(args.output, [row])
                    print(describe(row), flush=True)


if __name__ == "__main__":
    main()
