"""What frozen features are worth: kNN and linear probe on image, metadata or both (Section 4.2, supplement C, D).

    python evaluate.py --checkpoint runs/demo-satmips/checkpoint.pt --protocol knn --modality image
    python evaluate.py --checkpoint RUN/checkpoint.pt --data DIR --protocol linear --modality both --output out.jsonl
    python evaluate.py --table runs/*/results.jsonl

In this order: checkpoint -> features -> kNN -> linear probe -> scores -> tables -> pictures -> main. The features are
the CLS outputs of the backbones, before the projections. Fitted on the train split, scored on the test split.
"""

import argparse
import json
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from metadata import FIELDS, BadInput, TableSchema, parse_fields, parse_numbers
from model import ModelConfig, SatMIP

KS = (1, 5, 20, 100)  # supplement C
TEMPERATURE = 0.07  # NOTE[PAPER] "following standard practice": the value of all three works it cites

# -----------------------------------------------------------------------------------------------------
# A model and its way of reading metadata, from a checkpoint


class Pretrained:
    """A model with all it needs to read a dataset as in training: fields, schema, context, image size."""

    def __init__(self, model: SatMIP, fields: str, schema: TableSchema | None, device: torch.device):
        self.model, self.fields, self.schema, self.device = model, parse_fields(fields), schema, device
        self.encoder = model.config.metadata_encoder

    def metadata(self, table: data.Table) -> data.Metadata:
        return data.Metadata(table, self.encoder, self.schema, self.model.config.context)


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of train.py, whole, nothing unpickled. BadInput when there is none or it is something else."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; give the checkpoint.pt of a run folder")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save writes a checksum of every part, torch.load checks none
            damaged = archive.testzip()
        if damaged:
            raise BadInput(f"{path}: damaged (the checksum of {damaged} is wrong)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except BadInput:
        raise
    except pickle.UnpicklingError:
        raise BadInput(f"{path}: not a checkpoint of train.py (or one that holds code, which is never run)") from None
    except Exception as error:  # zip and pickle each raise their own for a torn or foreign file
        raise BadInput(f"{path}: torn, or not a checkpoint of train.py ({type(error).__name__})") from None
    needed = ("model", "model_config", "fields", "schema", "config", "step")
    missing = [key for key in needed if not isinstance(state, dict) or key not in state]
    if missing:
        raise BadInput(f"{path}: not a checkpoint of train.py (it has no {missing[0]!r})")
    return state


def load_weights(model: SatMIP, weights: dict[str, Tensor], path: Path) -> None:
    """Strict: BadInput names the first tensor that is missing, unexpected or of another shape."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        have, want = (tuple(d[name].shape) if name in d else "nothing" for d in (weights, own))
        if have != want:
            raise BadInput(f"{path}: {name} has shape {have}, the model wants {want}")
    model.load_state_dict(weights)


def load_pretrained(path: Path, device: torch.device) -> tuple[Pretrained, dict]:
    """-> the model of a checkpoint, ready for evaluation, and the checkpoint itself."""
    state = read_checkpoint(path)
    model = SatMIP(ModelConfig(**state["model_config"]))
    load_weights(model, state["model"], path)
    schema = TableSchema(**state["schema"]) if state["schema"] else None
    return Pretrained(model.to(device).eval(), state["fields"], schema, device), state


# -----------------------------------------------------------------------------------------------------
# Features


@torch.no_grad()
def extract(
    pretrained: Pretrained, split: data.Split, statistics: tuple[list[float], list[float]], modality: str,
    size: int, workers: int, batch: int = 512,
) -> dict[str, Tensor]:  # fmt: skip
    """CLS features of all rows in order, those that `modality` needs: {"image": [n, D], "metadata": [n, D_metadata]}"""
    model, device = pretrained.model, pretrained.device
    model.eval()
    features = {}
    # bf16 on a GPU as in training (supplement C: "mixed precision"); float32 on a CPU, where bf16 is slower
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        if modality != "metadata":
            rows = [
                model.image_encoder(data.standardise(data.plain(images.to(device, non_blocking=True)), *statistics))
                for images, _ in data.load(split, size, data.in_order(len(split), batch), workers)
            ]
            features["image"] = torch.cat(rows).float()
        if modality != "image":
            metadata = pretrained.metadata(split.table)
            batches = (metadata.batch(rows, device) for rows in data.in_order(len(split), batch))
            features["metadata"] = torch.cat([model.metadata_encoder(*b) for b in batches]).float()
    return features


def join(features: dict[str, Tensor]) -> Tensor:
    """Image and metadata features side by side, [n, D + D_metadata] (Section 4.4).

    NOTE[PAPER] the paper fits the probe alone on these; kNN's cosine weighs each modality by its squared length,
    which is near its width.
    """
    return torch.cat([features["image"], features["metadata"]], dim=1)


def histograms(split: data.Split, size: int, workers: int, bins: int = 16) -> Tensor:
    """Colour histograms [n, 3 bins]: square roots of shares, whose cosine compares distributions (Bhattacharyya)."""
    rows = []
    for images, _ in data.load(split, size, data.in_order(len(split), 512), workers):
        cell = torch.arange(len(images))[:, None, None] * 3 + torch.arange(3)  # one histogram an image and channel
        codes = (images.flatten(1, 2) // (256 // bins)).long() + bins * cell
        counts = torch.bincount(codes.flatten(), minlength=3 * bins * len(images)).view(len(images), -1).float()
        rows.append((counts / counts.sum(1, keepdim=True)).sqrt())
    return torch.cat(rows)


def locations(split: data.Split) -> Tensor | None:
    """Places as points of the unit sphere [n, 3], whose cosine falls with distance. A row without a place is the
    zero vector, equally far from all; None if no row has one."""
    table = data.tabulate(map(split.record, range(len(split))), parse_fields("location"), captions=False)
    longitude, latitude = np.radians(table.numbers.T)
    points = np.stack([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], 1)
    return None if np.isnan(points).all() else torch.from_numpy(points).nan_to_num().float()


# -----------------------------------------------------------------------------------------------------
# Weighted k nearest neighbours (supplement C; Wu et al., 2018)


@torch.no_grad()
def knn(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, classes: int, ks: tuple[int, ...] = KS,
    temperature: float = TEMPERATURE, chunk: int = 1024,
) -> Tensor:  # fmt: skip
    """Predicted class [len(ks), m] of queries [m, D] from a bank [n, D] with labels [n] in 0 .. classes - 1.

    A neighbour of cosine s votes for its class with weight exp(s / temperature). One pass in chunks serves every k:
    the votes of the first k neighbours are among those of the first max(ks). ValueError when a k exceeds n.
    """
    if max(ks) > len(bank):
        raise ValueError(f"k = {max(ks)} neighbours asked of a bank of {len(bank)} samples")
    bank = F.normalize(bank.float(), dim=1)
    predictions = []
    for part in queries.split(chunk):
        similarity, index = (F.normalize(part.float(), dim=1) @ bank.T).topk(max(ks), dim=1)  # [chunk, max k], sorted
        weight, label = (similarity / temperature).exp(), bank_labels[index]
        votes = torch.zeros(len(part), classes, device=bank.device)
        rows, done = [], 0
        for k in sorted(ks):
            votes.scatter_add_(1, label[:, done:k], weight[:, done:k])
            rows.append(votes.argmax(1))
            done = k
        predictions.append(torch.stack([rows[sorted(ks).index(k)] for k in ks]))
    return torch.cat(predictions, dim=1)


# -----------------------------------------------------------------------------------------------------
# Linear probe (supplement D)


def linear_probe(x: Tensor, y: Tensor, classes: int, iterations: int = 200) -> tuple[Tensor, Tensor, float]:
    """Logistic regression of y [n] on x [n, D] -> weight [C, D], bias [C], final loss.

    Minimises the mean cross-entropy without regularisation, from zero, by L-BFGS (history 10, strong-Wolfe line
    search, at most 200 iterations, fewer once no entry of the gradient exceeds 1e-5). Give it standardised features:
    otherwise 200 iterations are far from the optimum.
    """
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, max_eval=iterations * 5 // 4, history_size=10,
        tolerance_grad=1e-5, tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, y)
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        return weight.detach(), bias.detach(), F.cross_entropy(x @ weight.T + bias, y).item()


# -----------------------------------------------------------------------------------------------------
# Scores


def accuracy(predicted: Tensor, true: Tensor) -> float:
    """Share of equal entries; both [n]."""
    assert predicted.shape == true.shape
    return (predicted == true).double().mean().item()


def macro_f1(predicted: Tensor, true: Tensor, classes: int) -> float:
    """Mean F1 over the classes that occur among predictions or truths, each counted alike."""
    hits = torch.bincount(true[predicted == true], minlength=classes).double()
    total = torch.bincount(predicted, minlength=classes) + torch.bincount(true, minlength=classes)
    return (2 * hits[total > 0] / total[total > 0]).mean().item()


def score(protocol: str, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], classes: int) -> list[dict]:
    """Fit on train, score on test: x = (train [n, D], test [m, D]), y = labels, -1 where there is none.

    -> one result for the probe, one for every k for kNN; each says its whole protocol.
    """
    (x, test_x), (y, test_y) = ((a[b >= 0] for a, b in zip(x, y)), (b[b >= 0] for b in y))
    y, test_y = y.to(x.device), test_y.to(x.device)
    if protocol == "knn":
        ks = tuple(k for k in KS if k <= len(x))
        predictions = knn(x, y, test_x, classes, ks)
        settings = [{"k": k, "temperature": TEMPERATURE, "similarity": "cosine"} for k in ks]
    else:
        mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
        x, test_x = (x - mean) / std, (test_x - mean) / std
        weight, bias, loss = linear_probe(x, y, classes)
        predictions = (test_x @ weight.T + bias).argmax(1)[None]
        settings = [{"solver": "L-BFGS", "iterations": 200, "regularisation": 0, "scaling": "standard", "loss": loss}]
    size = {"train": len(x), "test": len(test_x), "classes": classes, "dimensions": x.shape[1]}
    return [
        {"protocol": protocol, **s, "accuracy": accuracy(p, test_y), "macro_f1": macro_f1(p, test_y, classes), **size}
        for p, s in zip(predictions, settings)
    ]


def score_all(
    features: dict[str, tuple[Tensor, Tensor]], splits: tuple[data.Split, data.Split],
    labels: list[str], protocols: list[str],
) -> list[dict]:  # fmt: skip
    """Every named feature pair (train, test) x label x protocol -> results with "features" and "label" added."""
    results = []
    for label in labels:
        classes, y = data.class_ids(label, *splits)
        for name, x in features.items():
            for protocol in protocols:
                results += [{"features": name, "label": label, **r} for r in score(protocol, x, tuple(y), len(classes))]
    return results


def label_names(splits: tuple[data.Split, data.Split]) -> list[str]:
    """The labels that both splits have, sorted: only those can be scored."""
    names = set(splits[0].labels) & set(splits[1].labels)
    return sorted(n for n in names if all(any(v is not None for v in split.labels[n]) for split in splits))


def format_table(results: list[dict], k: int = 20, metric: str = "accuracy") -> str:
    """Markdown: a row for each kind of features, a column for each label and protocol, percent.

    Results that differ in the seed alone become one cell, mean ± sample standard deviation. Of the kNN results one k
    is shown; NOTE[PAPER] 20, fixed beforehand, where the paper reports each dataset's best.
    """
    cells = {}  # (row, column) -> {seed: percent}
    for r in results:
        if r.get("k", k) == k:
            protocol = f"kNN k={k}" if r["protocol"] == "knn" else r["protocol"]
            column = f"{r['label'].removeprefix('label_')} {protocol}"
            cells.setdefault((r["features"], column), {})[r.get("seed")] = 100 * r[metric]
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))

    def show(values: dict) -> str:
        numbers = torch.tensor(list(values.values()), dtype=torch.float64)
        spread = f" ± {numbers.std():.1f}" if len(numbers) > 1 else ""
        return f"{numbers.mean():.1f}{spread}" if len(numbers) else "-"

    lines = [[f"{metric} (%)", *columns], *([row, *(show(cells.get((row, c), {})) for c in columns)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


# -----------------------------------------------------------------------------------------------------
# Pictures


def canvas(rows: int, columns: int, width: float, height: float, **keywords):
    """-> a figure and its [rows, columns] axes, without ticks; drawn to a file, never to a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **keywords)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def picture_neighbours(
    features: tuple[Tensor, Tensor], splits: tuple[data.Split, data.Split], label: str, path: Path
) -> None:
    """Some labelled test images, each with its nearest training images; a green frame where the label agrees."""
    train, test = splits
    labelled = [i for i, value in enumerate(test.labels[label]) if value is not None]
    chosen = labelled[:: max(1, len(labelled) // 6)][:6]
    bank, queries = (F.normalize(x, dim=1) for x in (features[0], features[1][chosen]))
    nearest = (queries @ bank.T).topk(min(7, len(train))).indices.tolist()
    figure, axes = canvas(len(chosen), 1 + len(nearest[0]), 10, 1.45 * len(chosen))
    for row, query, found in zip(axes, chosen, nearest):
        truth = test.labels[label][query]
        for axis, split, i in zip(row, [test] + [train] * len(found), [query, *found]):
            name = split.labels.get(label, [None] * len(split))[i]
            colour = {None: "silver", truth: "tab:green"}.get(name, "tab:red") if split is train else "black"
            axis.imshow(data.load_image(split.folder / split.names[i], 96))
            axis.set_title(name or "no label", fontsize=8, pad=2)
            axis.spines[:].set(color=colour, linewidth=3)
    name = label.removeprefix("label_")
    figure.suptitle(f"Test images (black frame) and their nearest training images, with their {name}", fontsize=10)
    figure.savefig(path, dpi=100)


@torch.no_grad()
def picture_places(
    pretrained: Pretrained, test: data.Split, statistics: tuple[list[float], list[float]], size: int, path: Path
) -> None:
    """Where on Earth the model places some test images: each image's embedding is compared with that of its own
    metadata, the location replaced by every place of a grid. A star marks the true place."""
    model, device, step = pretrained.model, pretrained.device, 3  # degrees
    longitudes, latitudes = np.arange(-180 + step / 2, 180, step), np.arange(75 - step / 2, -60, -step)
    places = [[float(x), float(y)] for y in latitudes for x in longitudes]
    rows = range(0, len(test), max(1, len(test) // 40))
    truths = {i: parse_numbers(test.record(i).get("location"), FIELDS["location"]) for i in rows}
    located = [i for i, truth in truths.items() if truth is not None]
    if not located:
        return
    chosen = located[:: max(1, len(located) // 6)][:6]
    figure, axes = canvas(len(chosen), 2, 10, 2.3 * len(chosen), width_ratios=(1, 2.7))
    earth = data.Image.open(data.MAPS / "bluemarble-2004-07.jpg").resize((1080, 540))
    for (left, right), i in zip(axes, chosen):
        record, image = test.record(i), data.load_image(test.folder / test.names[i], size)
        records = ({**record, "location": place} for place in places)
        metadata = pretrained.metadata(data.tabulate(records, pretrained.fields, pretrained.encoder == "text"))
        batches = (metadata.batch(rows, device) for rows in data.in_order(len(places), 512))
        gallery = torch.cat([model.metadata_projection(model.metadata_encoder(*batch)) for batch in batches])
        pixels = data.standardise(data.plain(torch.from_numpy(image.copy())[None].to(device)), *statistics)
        query = model.image_projection(model.image_encoder(pixels))
        posterior = (F.cosine_similarity(query, gallery) * model.logit_scale.exp()).softmax(0)
        share = (posterior / posterior.max()).view(len(latitudes), -1).cpu().numpy()
        left.imshow(image)
        inferred = " (month inferred)" if record.get("timestamp_inferred") else ""
        left.set_title(f"{record.get('timestamp', 'no date')}{inferred}", fontsize=8)
        right.imshow(earth, extent=(-180, 180, -90, 90), alpha=0.6)
        right.imshow(share, alpha=share**0.5, extent=(-180, 180, -60, 75), cmap="autumn", interpolation="bilinear")
        right.plot(*truths[i], "*", color="cyan", markersize=12, markeredgecolor="black")
        right.set(xlim=(-180, 180), ylim=(-60, 75))
    figure.suptitle("Where the model places test images, their other metadata given (star: the truth)", fontsize=10)
    figure.savefig(path, dpi=100)


# -----------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> list[dict]:
    """The command: read, extract, score, print, write."""
    pretrained, state = load_pretrained(args.checkpoint, torch.device(args.device))
    config = pretrained.model.config
    if args.modality != "image" and pretrained.encoder == "none":
        method = state["config"]["method"]
        raise BadInput(f"{args.checkpoint}: {method} has no metadata encoder; use --modality image")
    folder = args.data or Path(state["config"]["data"])
    size = args.image_size or config.image_size
    if size % config.patch_size:
        raise BadInput(f"--image-size {size}: not a multiple of the patch size {config.patch_size}")
    splits = data.read_dataset(folder, pretrained.fields, captions=pretrained.encoder == "text")
    labels = label_names(splits)
    if not labels or args.label not in (None, *labels):
        train, test = (", ".join(sorted(split.labels)) or "none" for split in splits)
        what = f"no label {args.label}" if args.label else "no label"
        raise BadInput(f"{folder}: {what} in both splits; train has: {train}; test has: {test}")
    labels = [args.label] if args.label else labels
    statistics = data.channel_statistics(splits[0], size, args.workers)
    features = [extract(pretrained, split, statistics, args.modality, size, args.workers) for split in splits]
    named = {args.modality: tuple(join(f) if args.modality == "both" else f[args.modality] for f in features)}
    if args.modality != "image":
        points = tuple(map(locations, splits))
        named |= {"location only": points} if points[0] is not None and points[1] is not None else {}
    results = score_all(named, splits, labels, [args.protocol])
    common = {
        "checkpoint": str(args.checkpoint), "step": state["step"], "method": state["config"]["method"],
        "seed": state["config"]["seed"], "metadata_encoder": pretrained.encoder, "fields": state["fields"],
        "data": str(folder), "image_size": size,
    }  # fmt: skip
    for k in dict.fromkeys(r.get("k") for r in results):
        for metric in ("accuracy", "macro_f1"):
            print(format_table(results, k, metric) + "\n")
    if args.output:
        with open(args.output, "a") as file:
            file.writelines(json.dumps({**common, **r}) + "\n" for r in results)
    return results


def read_results(paths: list[Path]) -> list[dict]:
    """The lines of results files. BadInput names a file that is not there or a line that is no result."""
    results = []
    for path in paths:
        if not path.is_file():
            raise BadInput(f"{path}: no such file; give results.jsonl files of run folders")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                results.append(json.loads(line))
                results[-1]["features"], results[-1]["label"], results[-1]["protocol"], results[-1]["accuracy"]
            except (ValueError, KeyError, TypeError):
                raise BadInput(f"{path}, line {number}: not a result of train.py or evaluate.py") from None
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="kNN or linear probe on frozen features of a checkpoint of train.py.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="RUN/checkpoint.pt")
    what.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print these results as one table, no more")
    parser.add_argument("--data", type=Path, help="prepared dataset; default: the one of the checkpoint's training")
    parser.add_argument("--protocol", choices=("knn", "linear"), default="knn")
    parser.add_argument("--modality", choices=("image", "metadata", "both"), default="image")
    parser.add_argument("--label", help="one label of the dataset; default: all of them")
    parser.add_argument("--image-size", type=int, help="px; default: as in training; positions are interpolated")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="append one JSON line per result to this file")
    args = parser.parse_args(argv)
    try:
        if args.table:
            print(format_table(read_results(args.table)))
        else:
            evaluate(args)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
