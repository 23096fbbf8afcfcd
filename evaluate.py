"""What a pretrained encoder is worth: every protocol of the paper and some of its open questions (Section 4.2-4.7,
supplement C, D, G).

    python evaluate.py --checkpoint runs/demo-satmips/checkpoint.pt --protocol knn --modality image
    python evaluate.py --checkpoint runs/*/checkpoint.pt --protocol linear --modality image both --output results.jsonl
    python evaluate.py --weights slip_small_100ep.pt --source slip --data DIR
    python evaluate.py table results.jsonl --paper 5
    python evaluate.py plot time results.jsonl --output figure3.png
    python evaluate.py export runs/demo-satmips/checkpoint.pt OUT --data DIR

In this order: checkpoint -> features -> kNN -> linear probe -> fine-tuning -> scores -> retrieval and questions ->
missing fields and leakage -> pictures -> tables and plots of results -> export -> report -> commands. The features are
the CLS outputs of the backbones, before the projections. Fitted on the train split, scored on the test split.
"""

import argparse
import contextlib
import copy
import csv
import io
import itertools
import json
import math
import pickle
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from metadata import DEFAULT_FIELDS, FIELDS, TIME_PARTS, BadInput, Field, TableSchema, parse_category, parse_fields
from metadata import parse_numbers, parse_timestamp
from model import SOURCES, VITS, ModelConfig, SatMIP, WrongWeights, describe_encoder, load_encoder, parameter_groups
from model import read_encoder

KS = (1, 5, 20, 100)  # supplement C
K = 20  # NOTE[PAPER] of these where one is shown on data that the paper has not: fixed beforehand, not the best
SETTINGS = ("epochs", "fields", "loss_weight", "augment", "decouple_views", "vit", "init")  # ablated in the paper
# Options of train.py that do not make another model, or have a place of their own in results
UNSAID = (*SETTINGS, "method", "seed", "metadata_encoder", "data", "output", "workers", "eval_every", "log_every",
          "save_every", "keep", "max_bad", "micro_batch", "checkpoint_blocks", "compile", "benchmark",
          "benchmark_rounds")  # fmt: skip
PAPER_TABLES = Path(__file__).with_name("pictures") / "paper_tables.csv"  # the numbers that the paper printed
Splits = tuple[data.Split, data.Split]  # train and test
Statistics = tuple[list[float], list[float]]  # mean and standard deviation of each channel
TEMPERATURE = 0.07  # NOTE[PAPER] "following standard practice": the value of all three works it cites

# -----------------------------------------------------------------------------------------------------
# A model and its way of reading metadata, from a checkpoint


class Pretrained:
    """A model with all it needs to read a dataset as in training: fields, schema, context, image size."""

    def __init__(
        self, model: SatMIP, fields: tuple[Field, ...], schema: TableSchema | list | None, device: torch.device
    ):
        self.model, self.fields, self.schema, self.device = model, fields, schema, device
        self.encoder = model.config.metadata_encoder
        self.statistics = None  # channel mean and std, where the weights have their own; else the dataset's
        self.size = model.config.image_size
        self.about = {}  # what results say of the model: where it is from, how it was trained

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
    try:
        model = SatMIP(ModelConfig(**state["model_config"]))
        schema = TableSchema(**state["schema"]) if isinstance(state["schema"], dict) else state["schema"]
        fields = tuple(Field(**{**field, "parts": tuple(field["parts"])}) for field in state["fields"])
    except TypeError as error:
        raise BadInput(f"{path}: made by another version of this program ({error})") from None
    load_weights(model, state["model"], path)
    pretrained = Pretrained(model.to(device).eval(), fields, schema, device)
    config, log = state["config"], path.with_name("log.jsonl")
    pretrained.about = {
        "checkpoint": str(path), "step": state["step"], "method": config["method"], "seed": config["seed"],
        "data": config["data"],  # of the training; evaluation on another says so
        "metadata_encoder": pretrained.encoder, **{name: config[name] for name in SETTINGS if name in config},
        "settings": {name: value for name, value in config.items() if name not in UNSAID},
    }  # fmt: skip
    if log.is_file():  # of the run: what it cost
        with contextlib.suppress(ValueError):  # a torn line ends what it says
            epochs = [json.loads(line) for line in log.read_text().splitlines()]
            # others tell of skipped steps, or are of later than this checkpoint
            epochs = [entry for entry in epochs if "seconds" in entry and entry["step"] <= state["step"]]
            pretrained.about["seconds"] = sum(epoch["seconds"] for epoch in epochs)
            pretrained.about["epochs_logged"] = len(epochs)
            pretrained.about["memory"] = max((epoch["memory"] for epoch in epochs), default=0)
    return pretrained, state


def untrained(pretrained: Pretrained) -> Pretrained:
    """The network with random weights, as training without --init starts: the baseline "Random" (Table 2)."""
    torch.manual_seed(pretrained.about.get("seed") or 0)
    model = SatMIP(pretrained.model.config).to(pretrained.device).eval()
    fresh = copy.copy(pretrained)
    fresh.model = model
    return fresh


def load_foreign(path: Path, name: str, heads: int | None, scale: float, size: int, device: torch.device) -> Pretrained:
    """The image encoder of another work, ready for evaluation at `size` px with its own channel statistics."""
    tensors, heads, _ = read_encoder(path, name, heads)
    width, patch = tensors["cls_token"].shape[-1], tensors.get("patch_embed.proj.weight", torch.empty(1)).shape[-1]
    layers = 1 + max((int(key.split(".")[1]) for key in tensors if re.match(r"blocks\.\d+\.", key)), default=-1)
    vit = next((vit for vit, shape in VITS.items() if shape == (width, layers, heads)), None)
    if vit is None:
        known = ", ".join(f"{vit} {shape}" for vit, shape in VITS.items())
        raise BadInput(f"{path}: width {width}, {layers} layers, {heads} heads; known: {known}; --heads sets the heads")
    if size % patch:
        raise BadInput(f"--image-size {size}: not a multiple of the patch size {patch}")
    model = SatMIP(ModelConfig(image_size=size, patch_size=patch, vit=vit))
    print(load_encoder(model.image_encoder, path, name, heads, scale))
    pretrained = Pretrained(model.to(device).eval(), parse_fields(DEFAULT_FIELDS), None, device)
    if name != "satmip":  # NOTE[DIFF] supplement A takes the dataset's for all; others' weights know their own
        pretrained.statistics = list(SOURCES[name].mean), list(SOURCES[name].std)
    pretrained.about = {"checkpoint": str(path), "method": name, "metadata_encoder": "none", "vit": vit, "heads": heads}
    return pretrained


# -----------------------------------------------------------------------------------------------------
# Features


def mixed(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, or fp16 where that would be emulated (supplement C: "mixed precision"); float32 on a CPU, where
    bf16 is slower."""
    kind = half_precision() if device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, kind, enabled=device.type == "cuda")


def half_precision() -> torch.dtype:
    """What this GPU computes fast."""
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@torch.no_grad()
def image_features(
    pretrained: Pretrained, split: data.Split, statistics: Statistics, size: int, workers: int, batch: int = 512,
    start: int = 0,
) -> Iterator[Tensor]:  # fmt: skip
    """CLS features [B, D] of the images from row `start` on, batch by batch."""
    device = pretrained.device
    for images, *_ in data.load(split, size, data.in_order(len(split), batch)[start // batch :], workers):
        with mixed(device):
            x = data.standardise(data.plain(images.to(device, non_blocking=True)), *statistics)
            features = pretrained.model.image_encoder(x)
        yield features.float()


@torch.no_grad()
def metadata_features(pretrained: Pretrained, table: data.Table, batch: int = 512, start: int = 0) -> Iterator[Tensor]:
    """CLS features [B, D_metadata] of the table's rows from `start` on, batch by batch."""
    metadata, n = pretrained.metadata(table), len(table.numbers)
    for rows in data.in_order(n, batch)[start // batch :]:
        with mixed(pretrained.device):
            inputs = [x.to(pretrained.device) for x in metadata.batch(rows)]
            features = pretrained.model.metadata_encoder(*inputs)
        yield features.float()


def features_of(pretrained: Pretrained, records: Iterable[dict]) -> Tensor:
    """CLS features [n, D_metadata] of records as they come."""
    table = data.tabulate(records, pretrained.fields, pretrained.encoder == "text")
    return torch.cat(list(metadata_features(pretrained, table)))


def extract(
    pretrained: Pretrained, split: data.Split, statistics: Statistics, modality: str, size: int, workers: int,
    batch: int = 512,
) -> dict[str, Tensor]:  # fmt: skip
    """CLS features of all rows in order, those that `modality` needs: {"image": [n, D], "metadata": [n, D_metadata]}"""
    pretrained.model.eval()
    features = {}
    if modality != "metadata":
        features["image"] = torch.cat(list(image_features(pretrained, split, statistics, size, workers, batch)))
    if modality != "image":
        features["metadata"] = torch.cat(list(metadata_features(pretrained, split.table, batch)))
    return features


def join(features: dict[str, Tensor]) -> Tensor:
    """Image and metadata features side by side, [n, D + D_metadata] (Section 4.4).

    NOTE[PAPER] the paper fits the probe alone on these; kNN's cosine weighs each modality by its squared length,
    which is near its width.
    """
    return torch.cat([features["image"], features["metadata"]], dim=1)


def identity(splits: Splits, fields: tuple[Field, ...]) -> tuple[Tensor, Tensor]:
    """The baseline "Identity" of metadata alone: the table features of (train, test) as they are, [n, F].

    NOTE[PAPER] "standardised raw fields" leaves open what is missing and what is a category: a missing number is the
    mean (0), a category is one-hot, and all zero when missing or never seen in training.
    """
    train = splits[0].table
    schema = TableSchema.fit(fields, train.numbers, train.categories)
    rows = []
    for split in splits:
        numbers, codes = map(torch.from_numpy, schema.encode(split.table.numbers, split.table.categories))
        widths = [len(values) + 2 for values in schema.categories.values()]
        onehot = [F.one_hot(code, width)[:, 2:].float() for code, width in zip(codes.unbind(1), widths)]
        rows.append(torch.cat([numbers.nan_to_num(0.0).float(), *onehot], dim=1))
    return tuple(rows)


def column(split: data.Split, key: str) -> list:
    """What each record of the split says under that key, None where it says nothing."""
    return [split.record(i).get(key) for i in range(len(split))]


def histograms(split: data.Split, size: int, workers: int, bins: int = 16) -> Tensor:
    """Colour histograms [n, 3 bins]: square roots of shares, whose cosine compares distributions (Bhattacharyya)."""
    rows = []
    for images, *_ in data.load(split, size, data.in_order(len(split), 512), workers):
        cell = torch.arange(len(images))[:, None, None] * 3 + torch.arange(3)  # one histogram an image and channel
        codes = (images.flatten(1, 2) // (256 // bins)).long() + bins * cell
        counts = torch.bincount(codes.flatten(), minlength=3 * bins * len(images)).view(len(images), -1).float()
        rows.append((counts / counts.sum(1, keepdim=True)).sqrt())
    return torch.cat(rows)


def locations(split: data.Split) -> Tensor | None:
    """Places as points of the unit sphere [n, 3], whose cosine falls with distance. A row without a place is the
    zero vector, equally far from all; None if no row has one."""
    table = data.read_split(split.folder, (FIELDS["location"],)).table
    points = unit_sphere(table.numbers)
    return None if points.isnan().all() else points.nan_to_num().float()


def unit_sphere(places: np.ndarray) -> Tensor:
    """Longitudes and latitudes in degrees [n, 2] -> points of the unit sphere [n, 3], float64."""
    longitude, latitude = np.radians(places.T)
    points = [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)]
    return torch.from_numpy(np.stack(points, 1))


def great_circle(a: Tensor, b: Tensor) -> Tensor:
    """km between points of the unit sphere [..., 3]; by the chord, which keeps metres where the cosine loses them."""
    return 2 * data.EARTH_RADIUS * ((a - b).norm(dim=-1) / 2).clamp(max=1).asin()


# -----------------------------------------------------------------------------------------------------
# Weighted k nearest neighbours (supplement C; Wu et al., 2018)


def top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [m, n], sorted, and their columns, as topk finds them; faster where n is large.

    Columns are dealt into n / 16 groups. The k largest lie in the k groups of the largest maxima: no others are sorted.
    Of equal values any may come first.
    """
    m, n = similarity.shape
    groups = n // 16
    if groups < k:
        return similarity.topk(k, dim=1)
    numbers = torch.arange(n, device=similarity.device)
    dealt, rest = numbers[: 16 * groups].view(16, groups), numbers[16 * groups :].expand(m, -1)
    leading = similarity[:, : 16 * groups].view(m, 16, groups).amax(1).topk(k, dim=1).indices
    index = torch.cat([dealt.T[leading].flatten(1), rest], dim=1)  # [m, 16 k and the rest]
    values, order = similarity.gather(1, index).topk(k, dim=1)
    return values, index.gather(1, order)


@torch.no_grad()
def knn(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, classes: int, ks: tuple[int, ...] = KS,
    temperature: float = TEMPERATURE, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Shares of the votes [len(ks), m, C] for queries [m, D] from a bank [n, D] with labels [n] in 0 .. C - 1.

    A neighbour of cosine s votes for its class with weight exp(s / temperature). One pass in chunks of queries (by
    default of at most 2^26 similarities, 256 MiB) serves every k: the votes of the first k neighbours are among those
    of the first max(ks). ValueError when a k exceeds n.

    NOTE[DIFF] supplement C: similarities in mixed precision. fp16's step next to 1 is 5e-4, at which all places within
    200 km are equally near; in float32 fMoW takes a GPU about a second, which the features cost many times over.
    """
    if max(ks) > len(bank):
        raise ValueError(f"k = {max(ks)} neighbours asked of a bank of {len(bank)} samples")
    bank = F.normalize(bank.float(), dim=1)
    shares = torch.empty(len(ks), len(queries), classes, device=bank.device)
    chunk = chunk or min(512, max(1, 2**26 // len(bank)))
    buffer = bank.new_empty(min(chunk, len(queries)), len(bank))  # once: fresh memory costs a CPU a third more
    for start in range(0, len(queries), chunk):
        part = F.normalize(queries[start : start + chunk].float(), dim=1)
        similarity, index = top(torch.mm(part, bank.T, out=buffer[: len(part)]), max(ks))  # [chunk, max k], sorted
        weight, label = (similarity / temperature).exp(), bank_labels[index]
        votes, done = torch.zeros(len(part), classes, device=bank.device), 0
        for k in sorted(ks):
            votes.scatter_add_(1, label[:, done:k], weight[:, done:k])
            shares[ks.index(k), start : start + chunk] = votes / votes.sum(1, keepdim=True)
            done = k
    return shares


# -----------------------------------------------------------------------------------------------------
# Linear probe (supplement D)


def linear_probe(x: Tensor, y: Tensor, classes: int, iterations: int = 200) -> tuple[Tensor, Tensor, float]:
    """Logistic regression of y [n] on x [n, D] -> weight [C, D], bias [C], final loss.

    Minimises the mean cross-entropy without regularisation, from zero, by L-BFGS (history 10, strong-Wolfe line
    search, at most 200 iterations, fewer once no entry of the gradient exceeds 1e-5). Give it standardised features:
    otherwise 200 iterations are far from the optimum.
    """
    columns = torch.cat([x.T, x.new_ones(1, len(x))])  # [D + 1, n]: in this layout both products are fastest on a CPU
    weight = x.new_zeros(classes, len(columns), requires_grad=True)  # the bias is the last column
    solver = torch.optim.LBFGS(
        [weight], max_iter=iterations, max_eval=iterations * 5 // 4, history_size=10,
        tolerance_grad=1e-5, tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip
    objective = lambda: F.cross_entropy((weight @ columns)[None], y[None])  # noqa: E731

    def closure() -> Tensor:
        solver.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        return weight[:, :-1], weight[:, -1], objective().item()


def linear_classifier(x: Tensor, y: Tensor, classes: int) -> tuple[Callable[[Tensor], Tensor], float]:
    """The probe on features standardised by those of training -> (features [m, D] -> probabilities [m, C], loss)."""
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    weight, bias, loss = linear_probe((x - mean) / std, y, classes)
    return lambda test: ((test - mean) / std @ weight.T + bias).softmax(1), loss


# -----------------------------------------------------------------------------------------------------
# Fine-tuning end to end (the second protocol of Ayush et al., 2021)


def finetune(
    pretrained: Pretrained, splits: Splits, statistics: Statistics,
    y: list[Tensor], classes: int, epochs: int, rate: float, augment: str, workers: int, batch: int = 64,
) -> Tensor:  # fmt: skip
    """Train the image encoder and a linear head on the labelled train images -> probabilities of the test's [m, C].

    NOTE[PAPER] no recipe is given for a ViT: AdamW with weight decay 0.05, warm-up over a tenth and a cosine to 0,
    label smoothing 0.1, a head that starts at 0 so that its first gradients do not spoil the encoder.
    """
    device, size, seed = pretrained.device, pretrained.size, pretrained.about.get("seed") or 0
    encoder = copy.deepcopy(pretrained.model.image_encoder)
    head = nn.Linear(encoder.width, classes)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    network = nn.Sequential(encoder, head).to(device).train()
    known = (y[0] >= 0).nonzero()[:, 0]
    batch = min(batch, len(known))
    steps = epochs * (len(known) // batch)
    optimizer = torch.optim.AdamW(parameter_groups(network, 0.05), rate)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and half_precision() == torch.float16)
    warmup = max(1, steps // 10)
    share = lambda step: min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    order = data.Order(len(known), batch, seed)
    order = [known[order[step]] for step in range(steps)]
    for step, (images, rows, _) in enumerate(data.load(splits[0], size, order, workers)):
        epoch = step // (len(known) // batch)
        draws = data.draw(data.POLICIES[augment], size, seed, epoch, rows.numpy(), 0)
        x = data.standardise(data.augment(images.to(device, non_blocking=True), draws, size), *statistics)
        with mixed(device):
            logits = network(x)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(logits.float(), y[0][rows].to(device), label_smoothing=0.1)).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    tuned = copy.copy(pretrained)
    tuned.model = nn.Module()
    tuned.model.image_encoder = network.eval()
    return torch.cat(list(image_features(tuned, splits[1], statistics, size, workers))).softmax(1)


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


def intervals(predicted: Tensor, true: Tensor, classes: int, draws: int = 1000, seed: int = 0) -> dict[str, list]:
    """95 % bootstrap intervals of accuracy and macro-F1 over the test samples, [low, high] each.

    Drawing n samples with replacement draws the cells of the confusion matrix from a multinomial: same distribution,
    without touching a sample, and independent of their order.
    """
    cells, counts = torch.stack([predicted, true]).cpu().unique(dim=1, return_counts=True)
    n, (guess, truth) = int(counts.sum()), cells.numpy()
    drawn = np.random.default_rng(seed).multinomial(n, counts.numpy() / n, draws)  # [draws, cells]
    onehot = np.eye(classes)
    right = drawn * (guess == truth)
    hits, total = right @ onehot[truth], drawn @ onehot[guess] + drawn @ onehot[truth]  # [draws, C]
    f1 = (2 * hits / np.maximum(total, 1)).sum(1) / (total > 0).sum(1)
    limits = lambda values: np.quantile(values, (0.025, 0.975)).tolist()  # noqa: E731
    return {"accuracy_interval": limits(right.sum(1) / n), "macro_f1_interval": limits(f1)}


def average_areas(probabilities: Tensor, true: Tensor, areas: list[str | None]) -> tuple[Tensor, Tensor]:
    """Mean probabilities [a, C] over the images of an area (Ayush et al., 2021, "temporal"), and its label [a].

    probabilities [m, C], true [m], areas of m names; an image without one is an area of its own. BadInput names an
    area whose images have different labels: its answer could not be right.
    """
    numbers = {}
    index = torch.tensor([numbers.setdefault(i if a is None else str(a), len(numbers)) for i, a in enumerate(areas)])
    index = index.to(true.device)
    labels = torch.empty(len(numbers), dtype=true.dtype, device=true.device).scatter_(0, index, true)
    different = (labels[index] != true).nonzero()
    if len(different):
        raise BadInput(f"--average-areas: images of area {areas[int(different[0])]!r} have different labels")
    sums = torch.zeros(len(numbers), probabilities.shape[1], device=true.device).index_add_(0, index, probabilities)
    return sums / torch.bincount(index)[:, None], labels


def judge(probabilities: Tensor, true: Tensor, classes: int, areas: list[str | None] | None = None) -> dict:
    """All that is stored of predictions [m, C] for labels [m]; with areas [m], of their averages."""
    if areas is not None:
        probabilities, true = average_areas(probabilities, true, areas)
    predicted = probabilities.argmax(1)
    return {
        "accuracy": accuracy(predicted, true), "macro_f1": macro_f1(predicted, true, classes),
        **intervals(predicted, true, classes), "averaged": "area" if areas is not None else "none", "test": len(true),
    }  # fmt: skip


def score(
    protocol: str, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], classes: int,
    areas: list[str | None] | None = None,
) -> list[dict]:  # fmt: skip
    """Fit on train, score on test: x = (train [n, D], test [m, D]), y = labels, -1 where there is none; areas of the
    test rows if their predictions shall be averaged.

    -> one result for the probe, one for every k for kNN; each says its whole protocol.
    """
    if areas is not None:
        areas = list(itertools.compress(areas, (y[1] >= 0).tolist()))
    (x, test_x), (y, test_y) = ((a[b >= 0] for a, b in zip(x, y)), (b[b >= 0] for b in y))
    y, test_y = y.to(x.device), test_y.to(x.device)
    if protocol == "knn":
        ks = tuple(k for k in KS if k <= len(x))
        probabilities = knn(x, y, test_x, classes, ks)
        settings = [{"k": k, "temperature": TEMPERATURE, "similarity": "cosine"} for k in ks]
    else:
        classify, loss = linear_classifier(x, y, classes)
        probabilities = classify(test_x)[None]
        settings = [{"solver": "L-BFGS", "iterations": 200, "regularisation": 0, "scaling": "standard", "loss": loss}]
    size = {"train": len(x), "classes": classes, "dimensions": x.shape[1]}
    return [
        {"protocol": protocol, **s, **judge(p, test_y, classes, areas), **size} for p, s in zip(probabilities, settings)
    ]


def score_all(
    features: dict[str, tuple[Tensor, Tensor]], splits: Splits, labels: list[str], protocols: list[str],
    areas: list[str | None] | None = None,
) -> list[dict]:  # fmt: skip
    """Every named feature pair (train, test) x label x protocol -> results with "features" and "label" added."""
    results = []
    for label in labels:
        classes, y = data.class_ids(label, *splits)
        for name, x in features.items():
            for protocol in protocols:
                scores = score(protocol, x, tuple(y), len(classes), areas)
                results += [{"features": name, "label": label, **r} for r in scores]
    return results


def label_names(splits: Splits) -> list[str]:
    """The labels that both splits have, sorted: only those can be scored."""
    names = set(splits[0].labels) & set(splits[1].labels)
    return sorted(n for n in names if all((split.labels[n].codes >= 0).any() for split in splits))


# -----------------------------------------------------------------------------------------------------
# Between the modalities: retrieval, and questions to an image


@torch.no_grad()
def embed(pretrained: Pretrained, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLS features -> unit vectors [n, E] of the joint space (Section 3.1), for the modalities that are there."""
    project = {name: getattr(pretrained.model, f"{name}_projection") for name in features}
    return {name: F.normalize(project[name](x), dim=1) for name, x in features.items()}


def ranks(queries: Tensor, gallery: Tensor, chunk: int | None = None) -> Tensor:
    """Rank [n], from 1, of gallery row i among all n for query i; both [n, E] unit vectors. In chunks of queries.

    Of equal similarities (images that share their metadata) half are counted before: the mean over their orders.
    """
    found, chunk = [], chunk or max(1, 2**26 // len(gallery))
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ gallery.T
        own = similarity.diagonal(start)[:, None]
        found.append(1 + (similarity > own).sum(1) + ((similarity == own).sum(1) - 1) / 2)
    return torch.cat(found)


def retrieval(embeddings: dict[str, Tensor]) -> list[dict]:
    """Image to metadata and back: recall at 1, 5, 10 (share of rank at most that) and median rank."""
    results = []
    for query, gallery in (("image", "metadata"), ("metadata", "image")):
        rank = ranks(embeddings[query], embeddings[gallery])
        recall = {f"recall_{k}": (rank <= k).double().mean().item() for k in (1, 5, 10)}
        result = {"features": f"{query} to {gallery}", "label": "own", "protocol": "retrieval", **recall}
        results.append(result | {"median_rank": rank.median().item(), "test": len(rank)})
    return results


def time_part(value: object, part: str) -> int | None:
    """Of a timestamp; None when it does not say."""
    number = (parse_timestamp(value) or [np.nan] * len(TIME_PARTS))[TIME_PARTS.index(part)]
    return None if np.isnan(number) else int(number)


def octave(value: object) -> float | None:
    """The power of two next to a ground sample distance, the mean of x and y."""
    numbers = parse_numbers(value, FIELDS["gsd"])
    return numbers and 2.0 ** round(np.log2(np.mean(numbers)))


QUESTIONS = {  # name -> (field, its value -> the answer, None when unknown)
    "month": ("timestamp", lambda value: time_part(value, "month")),
    "hour": ("timestamp", lambda value: time_part(value, "hour")),
    "gsd": ("gsd", octave),
    "country": ("country_code", parse_category),
    "place": ("location", lambda value: (place := parse_numbers(value, FIELDS["location"])) and tuple(place)),
}


def ask(
    pretrained: Pretrained, splits: Splits, images: Tensor, most: int = 4096
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """What test images [m, E] answer on each question: posterior over a gallery that varies one field alone.

    The gallery is the field's values of `most` training rows, all else missing; similarities times the model's scale
    give, by softmax, the posterior of each row, and the rows of one answer add up. So the prior is that of training.
    The likeliest answer is scored; a place by its great-circle distance. -> results, and of each question as arrays
    the file names "<question>.ids" [a], the answers ".classes" [C] ([C, 2] for places) and ".probabilities" [a, C].
    """
    results, posteriors = [], {}
    for name, (field, answer) in QUESTIONS.items():
        if field not in {f.name for f in pretrained.fields}:
            continue
        values, truths = (column(split, field) for split in splits)
        values = [value for value in values if answer(value) is not None]
        values = values[:: max(1, -(-len(values) // most))]
        truths = {i: answer(value) for i, value in enumerate(truths) if answer(value) is not None}
        if not values or not truths:
            continue
        gallery = embed(pretrained, {"metadata": features_of(pretrained, ({field: v} for v in values))})["metadata"]
        scale, answers = pretrained.model.logit_scale.detach().exp(), list(map(answer, values))
        classes = sorted(set(answers))
        number = {a: i for i, a in enumerate(classes)}
        codes = torch.tensor([number[a] for a in answers], device=gallery.device)
        sums = torch.zeros(len(truths), len(classes), device=gallery.device)
        for part, x in zip(sums.split(1024), images[list(truths)].split(1024)):
            part.index_add_(1, codes, (scale * x @ gallery.T).softmax(1))
        guessed, result = [classes[i] for i in sums.argmax(1).tolist()], {}
        if name == "place":
            drawn = [answers[i] for i in data.hashed(0, np.arange(len(truths))) % len(answers)]  # any training place
            true, *places = (unit_sphere(np.array(p)) for p in (list(truths.values()), guessed, drawn))
            for key, place in zip(("median_km", "chance_km"), places):
                result[key] = great_circle(place, true).median().item()
        else:
            common = [classes[int(torch.bincount(codes).argmax())]] * len(truths)  # the commonest answer
            for key, said in (("accuracy", guessed), ("chance", common)):
                result[key] = float(np.mean([a == b for a, b in zip(said, truths.values())]))
            result["classes"] = len(classes)
        results.append({"features": "image", "label": name, "protocol": "ask", **result, "test": len(truths)})
        arrays = ([splits[1].names[i] for i in truths], classes, sums.cpu().numpy())
        for key, array in zip(("ids", "classes", "probabilities"), arrays):
            posteriors[f"{name}.{key}"] = np.array(array)
    return results, posteriors


# -----------------------------------------------------------------------------------------------------
# How metadata helps: without some fields, and near to or far from the training samples


def missing_fields(
    pretrained: Pretrained, splits: Splits, features: tuple[dict, dict], labels: list[str]
) -> list[dict]:
    """Accuracy of the probe on image and metadata when test rows lose fields: each with some probability, or one
    field everywhere. Fitted once, on complete training rows."""
    train, test = features
    fields, n = pretrained.fields, len(splits[1])
    draws = data.uniform(0, np.arange(n)[:, None], np.arange(len(fields)))
    masks = {("share", share): draws < share for share in (0, 0.25, 0.5, 0.75, 1)}
    masks |= {("without", f.name): np.arange(len(fields))[None].repeat(n, 0) == i for i, f in enumerate(fields)}
    records, changed = [splits[1].record(i) for i in range(n)], {}
    for key, mask in masks.items():
        lost = ({fields[j].name for j in np.flatnonzero(row)} for row in mask)
        kept = ({k: v for k, v in record.items() if k not in names} for record, names in zip(records, lost))
        changed[key] = features_of(pretrained, kept)
    results = []
    for label in labels:
        classes, (y, test_y) = data.class_ids(label, *splits)
        known, test_known, device = y >= 0, test_y >= 0, train["image"].device
        classify, _ = linear_classifier(join(train)[known], y[known].to(device), len(classes))
        for (kind, value), metadata in changed.items():
            x = join({"image": test["image"], "metadata": metadata})
            scores = judge(classify(x[test_known]), test_y[test_known].to(device), len(classes))
            what = {"blanked": value} if kind == "share" else {"without": value}
            results.append({"features": "both", "label": label, "protocol": "missing", **what, **scores})
    return results


def leakage(splits: Splits, features: tuple[dict, dict], labels: list[str], bins: int = 4) -> list[dict]:
    """The gain of image and metadata over the image (probe), by distance of a test image to the nearest training
    image, in `bins` of equally many; beside it the place alone (kNN). A gain only near the training is leakage."""
    points = [locations(split) for split in splits]
    if any(p is None for p in points):
        raise BadInput(f"{splits[1].folder}: no record has a location; the leakage report is by distance")
    train, test = (p.double() for p in points)
    train = train[train.norm(dim=1) > 0.5]  # without a place: the zero vector
    nearest = [train[(part @ train.T).argmax(1)] for part in test.split(max(1, 2**26 // max(1, len(train))))]
    km = torch.where(test.norm(dim=1) > 0.5, great_circle(test, torch.cat(nearest)), torch.nan)
    results = []
    for label in labels:
        classes, (y, test_y) = data.class_ids(label, *splits)
        known, asked, device = y >= 0, (test_y >= 0) & ~km.isnan(), features[0]["image"].device
        right = {}
        for name in ("image", "both"):
            x, test_x = (join(f) if name == "both" else f["image"] for f in features)
            classify, _ = linear_classifier(x[known], y[known].to(device), len(classes))
            right[name] = classify(test_x[asked]).argmax(1).cpu() == test_y[asked]
        votes = knn(points[0][known], y[known], points[1][asked], len(classes), (min(20, int(known.sum())),))
        right["location_only"] = votes[0].argmax(1) == test_y[asked]
        for part in km[asked].argsort().tensor_split(bins):
            if len(part):
                shares = {name: hit[part].double().mean().item() for name, hit in right.items()}
                span = {"from_km": km[asked][part].min().item(), "to_km": km[asked][part].max().item()}
                gain = {"gain": shares["both"] - shares["image"], "test": len(part)}
                results.append({"features": "both", "label": label, "protocol": "leakage", **span, **shares, **gain})
    return results


# -----------------------------------------------------------------------------------------------------
# Pictures


def picture_neighbours(features: tuple[Tensor, Tensor], splits: Splits, label: str, path: Path) -> None:
    """Some labelled test images, each with its nearest training images; a green frame where the label agrees."""
    train, test = splits
    labelled = np.flatnonzero(test.labels[label].codes >= 0).tolist()
    chosen = labelled[:: max(1, len(labelled) // 6)][:6]
    bank, queries = (F.normalize(x, dim=1) for x in (features[0], features[1][chosen]))
    nearest = (queries @ bank.T).topk(min(7, len(train))).indices.tolist()
    columns = 1 + len(nearest[0])
    figure, ((axis,),) = data.canvas(1, 1, 1.25 * columns, 1.45 * len(chosen))  # one for all: axes take their time
    for y, (query, found) in enumerate(zip(chosen, nearest)):
        truth = test.labels[label][query]
        for x, (split, i) in enumerate([(test, query), *((train, i) for i in found)]):
            name, box = split.labels[label][i], (x, x + 0.88, 1.16 * y + 0.88, 1.16 * y)  # left, right, bottom, top
            colour = {None: "silver", truth: "tab:green"}.get(name, "tab:red") if split is train else "black"
            axis.imshow(data.load_image(split.folder / split.names[i], 96), extent=box)
            axis.plot(*np.take(box, [[0, 1, 1, 0, 0], [2, 2, 3, 3, 2]]), color=colour, linewidth=3)
            axis.text(x + 0.44, box[3] - 0.04, name or "no label", fontsize=8, ha="center")
    axis.set(xlim=(-0.05, columns), ylim=(1.16 * len(chosen), -0.2), frame_on=False)
    name = label.removeprefix("label_")
    figure.suptitle(f"Test images (black frame) and their nearest training images, with their {name}", fontsize=10)
    figure.savefig(path, dpi=100)


@torch.no_grad()
def picture_places(pretrained: Pretrained, test: data.Split, features: dict[str, Tensor], path: Path) -> None:
    """Where on Earth the model places some test images: each image's embedding is compared with that of its own
    metadata, the location replaced by every place of a grid. A star marks the true place."""
    step = 5  # degrees
    longitudes, latitudes = np.arange(-180 + step / 2, 180, step), np.arange(75 - step / 2, -60, -step)
    places = [[float(x), float(y)] for y in latitudes for x in longitudes]
    rows = range(0, len(test), max(1, len(test) // 40))
    truths = {i: parse_numbers(test.record(i).get("location"), FIELDS["location"]) for i in rows}
    located = [i for i, truth in truths.items() if truth is not None]
    if not located:
        return
    chosen = located[:: max(1, len(located) // 6)][:6]
    figure, axes = data.canvas(len(chosen), 2, 10, 2.3 * len(chosen), width_ratios=(1, 2.7))
    earth = data.Image.open(data.MAPS / "bluemarble-2004-07.jpg").resize((1080, 540))
    for (left, right), i in zip(axes, chosen):
        record = test.record(i)
        varied = features_of(pretrained, ({**record, "location": place} for place in places))
        e = embed(pretrained, {"image": features["image"][i : i + 1], "metadata": varied})
        posterior = (e["metadata"] @ e["image"][0] * pretrained.model.logit_scale.exp()).softmax(0)
        share = (posterior / posterior.max()).view(len(latitudes), -1).cpu().numpy()
        left.imshow(data.load_image(test.folder / test.names[i], 96))
        inferred = " (month inferred)" if record.get("timestamp_inferred") else ""
        left.set_title(f"{record.get('timestamp', 'no date')}{inferred}", fontsize=8)
        right.imshow(earth, extent=(-180, 180, -90, 90), alpha=0.6)
        right.imshow(share, alpha=share**0.5, extent=(-180, 180, -60, 75), cmap="autumn", interpolation="bilinear")
        right.plot(*truths[i], "*", color="cyan", markersize=12, markeredgecolor="black")
        right.set(xlim=(-180, 180), ylim=(-60, 75))
    figure.suptitle("Where the model places test images, their other metadata given (star: the truth)", fontsize=10)
    figure.savefig(path, dpi=100)


# -----------------------------------------------------------------------------------------------------
# Results as tables


def read_results(paths: list[Path], keys: tuple[str, ...] = ("features", "label", "protocol")) -> list[dict]:
    """The lines of results files. BadInput names a file that is not there or a line that lacks one of the keys."""
    results = []
    for path in paths:
        if not path.is_file():
            raise BadInput(f"{path}: no such file; give results.jsonl files of run folders")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                results.append(json.loads(line))
                [results[-1][key] for key in keys]
            except (ValueError, KeyError, TypeError):
                raise BadInput(f"{path}, line {number}: not a result of train.py or evaluate.py") from None
    return results


def model_name(result: dict) -> str:
    """ "satmips (table)", "simclr", ..."""
    encoder = f" ({result['metadata_encoder']})" if result["metadata_encoder"] != "none" else ""
    return result["method"] + encoder


def protocol_name(result: dict) -> str:
    return f"kNN k={result['k']}" if result["protocol"] == "knn" else result["protocol"]


def show(values: list[float], interval: list[float] | None = None) -> str:
    """Percent: mean ± sample standard deviation of several seeds, or one value with its interval."""
    numbers = 100 * torch.tensor(values, dtype=torch.float64)
    if len(numbers) > 1:
        return f"{numbers.mean():.1f} ± {numbers.std():.1f}"
    spread = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{numbers[0]:.1f}{spread}" if len(numbers) else "-"


def markdown(lines: list[list[str]]) -> str:
    """Rows of cells, the header first, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def format_rows(results: list[dict]) -> str:
    """Results of one of the other protocols as they are, one a line: what was found, and for whom if that differs."""
    keys = dict.fromkeys(key for r in results for key in r if not isinstance(r[key], (list, dict)))
    found = {key for r in results for key in list(r)[list(r).index("features") :]}  # what stands before is the model's
    keys = [k for k in keys if k in found - {"protocol"} or len({str(r.get(k)) for r in results}) > 1]
    text = lambda v: "" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v)  # noqa: E731
    return markdown([[results[0]["protocol"], *keys], *(["", *(text(r.get(k)) for k in keys)] for r in results)])


def is_from(result: dict, *names: str) -> bool:
    """Whether the dataset's folder says that it is one of these."""
    return Path(result.get("data", "")).name.lower().startswith(names)


def metric_of(result: dict, metric: str) -> str:
    """ "paper" is macro-F1 on fMoW and FGSC-23, accuracy elsewhere (Section 4.2)."""
    return ("macro_f1" if is_from(result, "fmow", "fgsc") else "accuracy") if metric == "paper" else metric


def paper_k(result: dict) -> int:
    """Neighbours as in supplement C."""
    many = 20 if result["method"] in ("mae", "satmae", "satmaepp", "scalemae") else 100
    return many if is_from(result, "fmow") else 5


SCORED = ("knn", "linear", "finetune")  # protocols with one score a label: those that tables have cells for
# Features that no training made -> what they depend on; the others depend on the checkpoint
MODEL_FREE = {"location only": (), "colour histograms": (), "identity": ("fields",), "untrained, image": ("vit",)}


def cells(results: list[dict], place: Callable[[dict], tuple]) -> dict[tuple, list[dict]]:
    """Cell of a table or plot -> its results, one a seed, of the same one scored again the last. BadInput when two of
    one seed differ in more than their scores."""
    found = {}
    for r in results:
        seeds = found.setdefault(place(r), {})
        before = seeds.get(r.get("seed"), r)
        depends = MODEL_FREE.get(r["features"], ("checkpoint", "finetune_epochs", "finetune_lr", "policy"))
        for key in (*depends, "image_size", "averaged"):
            if before.get(key) != r.get(key):
                one, two = (f"{x.get('checkpoint')} ({key} {x.get(key)})" for x in (before, r))
                where = ", ".join(map(str, place(r)))
                raise BadInput(f"{one} and {two} are both seed {r.get('seed')} of {where}; give one of them")
        seeds[r.get("seed")] = r
    return {key: list(seeds.values()) for key, seeds in found.items()}


def format_table(results: list[dict], k: int | None = K, metric: str = "accuracy", interval: bool = False) -> str:
    """Markdown: a row for each model and kind of features, a column for each dataset, label and protocol, percent.

    Results that differ in the seed alone become one cell, mean ± sample standard deviation. Settings that differ
    among the models are named in their rows. Of the kNN results one k is shown.
    """
    shown = [r for r in results if r["protocol"] in SCORED and r.get("k", k) == k]
    varying = [s for s in SETTINGS if len({str(r[s]) for r in shown if s in r}) > 1]
    others = {}  # settings of each model by name: of those that the paper does not vary, what differs among its runs
    for r in shown:
        for name, value in r.get("settings", {}).items():
            others.setdefault(name, {}).setdefault(model_name(r), set()).add(str(value))
    unusual = [name for name, models in others.items() if any(len(values) > 1 for values in models.values())]
    several = len({r.get("data") for r in shown}) > 1

    def row(r: dict) -> str:
        if "checkpoint" not in r or r["features"] in MODEL_FREE:
            return r["features"]
        said = {name: r[name] for name in varying if name in r}
        said |= {name: value for name, value in r.get("settings", {}).items() if name in unusual}
        return ", ".join([model_name(r), *(f"{name}={value}" for name, value in said.items()), r["features"]])

    def column(r: dict) -> str:
        parts = [Path(r.get("data", "")).name] * several + [r["label"].removeprefix("label_")]
        return " ".join([*parts, protocol_name(r), *(["by area"] if r.get("averaged") == "area" else [])])

    found = cells(shown, lambda r: (row(r), column(r)))
    rows, columns = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))

    def cell(runs: list[dict]) -> str:
        limits = runs[0].get(metric_of(runs[0], metric) + "_interval") if runs and interval else None
        return show([r[metric_of(r, metric)] for r in runs], limits)

    lines = [[name, *(cell(found.get((name, c), [])) for c in columns)] for name in rows]
    return markdown([[f"{metric} (%)", *columns], *lines])


def costs(results: list[dict], simclr: list[dict]) -> list[str]:
    """Cells: seconds an epoch and GiB, means over runs, then both relative to SimCLR's (Table S8)."""

    def mean(runs: list[dict]) -> Tensor:
        known = [(r["seconds"] / r["epochs_logged"], r["memory"] / 2**30) for r in runs if r.get("epochs_logged")]
        return torch.tensor(known, dtype=torch.float64).view(-1, 2).mean(0)  # NaN where nothing is known

    found, base = mean(results), mean(simclr)
    return ["-" if x != x else f"{x:.2f}" for x in [*found.tolist(), *(found / base).tolist()]]


def paper_table(results: list[dict], number: str, k: int | None = None, metric: str = "paper") -> str:
    """One of the paper's tables in Markdown: its rows, in them our scores and, beside, the paper's where known.

    k: of kNN; by default supplement C's. A row is a combination of settings, over seeds. BadInput for a table that is
    not there, and when a row has two runs of one seed: they differ in something that is no setting of this table, such
    as the number of epochs.
    """
    with open(PAPER_TABLES, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter=";"))
    theirs = [line for line in lines if line["table"] == number]
    if not theirs:
        known = ", ".join(dict.fromkeys(line["table"] for line in lines))
        raise BadInput(f"--paper {number}: not one of {known}")
    names = [part.split("=")[0] for part in theirs[0]["settings"].split()]
    protocols, features = ({part for line in theirs for part in line[key].split()} for key in ("protocol", "features"))
    shown = [r for r in results if "checkpoint" in r and r["protocol"] in protocols and r["features"] in features]
    shown = [r for r in shown if r.get("k") in (None, k or paper_k(r))]
    value = lambda r, name: str(bool(r.get(name))) if name == "init" else str(r.get(name))  # noqa: E731
    key = lambda r: " ".join(f"{name}={value(r, name)}" for name in names)  # noqa: E731

    def column(r: dict) -> str:
        parts = [Path(r["data"]).name, r["label"].removeprefix("label_")]
        parts += [r["features"]] if len(features) > 1 and "features" not in names else []
        return " ".join([*parts, "F1" if metric_of(r, metric) == "macro_f1" else "acc."])

    rows = list(dict.fromkeys([*(line["settings"] for line in theirs), *map(key, shown)]))
    columns, printed = (list(dict.fromkeys(x)) for x in (map(column, shown), (line["column"] for line in theirs)))
    simclr = [r for r in results if r.get("method") == "simclr"]
    cost = ["s / epoch", "GiB", "time / SimCLR", "memory / SimCLR"] if "cost" in protocols else []
    table = [[f"Table {number}", *columns, *cost, *(f"paper: {name}" for name in printed)]]
    found = cells(shown, lambda r: (key(r), column(r)))
    for row in rows:
        mine = [show([r[metric_of(r, metric)] for r in found.get((row, c), [])]) for c in columns]
        mine += costs([r for r in shown if key(r) == row], simclr) if cost else []
        beside = {line["column"]: line["number"] for line in theirs if line["settings"] == row}
        table.append([row, *mine, *(beside.get(name, "") for name in printed)])
    return markdown(table)


# -----------------------------------------------------------------------------------------------------
# Results as plots


def relative_times(results: list[dict]) -> dict[int, float]:
    """id of each result -> training time of its run over SimCLR's at its fewest epochs (Fig. 3)."""
    simclr = [r for r in results if r["method"] == "simclr" and "seconds" in r]
    if not simclr or not all("seconds" in r for r in results):
        raise BadInput("plot time: needs runs of SimCLR, and of each run the log.jsonl beside its checkpoint")
    fewest = [r["seconds"] for r in simclr if r["epochs"] == min(r["epochs"] for r in simclr)]
    return {id(r): r["seconds"] * len(fewest) / sum(fewest) for r in results}


def blanked(result: dict) -> str:
    return f"no {result['without']}" if "without" in result else f"{result['blanked']:.0%} blank"


def learned(result: dict) -> str:
    return f"{model_name(result)}, {result['features']}"


PLOTS = {  # kind -> (what a bar or point stands over, what has a colour of its own, what features are shown)
    "time": (lambda r: r["epochs"], model_name, lambda name: name == "image"),
    "fields": (lambda r: r["fields"], learned, lambda name: name not in MODEL_FREE),
    "modality": (model_name, lambda r: r["features"], lambda name: True),
    "missing": (blanked, model_name, lambda name: True),
}


def plot(results: list[dict], kind: str, path: Path, k: int = K, metric: str = "accuracy") -> None:
    """One panel for each dataset, label and protocol; mean and deviation over seeds. "time" has lines over training
    time relative to SimCLR (Fig. 3), the others bars: fields (Table 5), modality (Tables 3, S6), missing fields."""
    over, colour, kept = PLOTS[kind]
    protocols = ("missing",) if kind == "missing" else SCORED
    wanted = [r for r in results if "checkpoint" in r and r["protocol"] in protocols and r.get("k", k) == k]
    wanted = [r for r in wanted if kept(r["features"])]
    if not wanted:
        raise BadInput(f"plot {kind}: no result of that kind; evaluate.py score --output writes them")
    from matplotlib.ticker import AutoLocator

    times = relative_times(wanted) if kind == "time" else {}
    title = lambda r: f"{Path(r['data']).name}: {r['label'].removeprefix('label_')}, {protocol_name(r)}"  # noqa: E731
    panels = list(dict.fromkeys(map(title, wanted)))
    figure, axes = data.canvas(1, len(panels), 1.5 + 4 * len(panels), 3.6)
    for axis, panel in zip(axes[0], panels):
        shown = [r for r in wanted if title(r) == panel]
        groups, series = (list(dict.fromkeys(map(f, shown))) for f in (over, colour))
        groups = sorted(groups) if times else groups
        found = cells(shown, lambda r: (over(r), colour(r)))
        for number, name in enumerate(series):
            runs = {group: found[group, name] for group in groups if (group, name) in found}
            scores = [[100 * r[metric_of(r, metric)] for r in mine] for mine in runs.values()]
            mean, deviation = zip(*((np.mean(x), np.std(x, ddof=1) if len(x) > 1 else np.nan) for x in scores))
            if times:
                x = [np.mean([times[id(r)] for r in mine]) for mine in runs.values()]
                axis.errorbar(x, mean, deviation, marker="o", capsize=3, label=name)
            else:
                x = [groups.index(group) + 0.8 * ((number + 0.5) / len(series) - 0.5) for group in runs]
                axis.bar(x, mean, 0.75 / len(series), yerr=deviation, capsize=3, label=name)
        axis.yaxis.set_major_locator(AutoLocator())
        if times:
            axis.xaxis.set_major_locator(AutoLocator())
            axis.set(xlabel="training time relative to SimCLR's shortest")
        else:
            axis.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
        axis.set_title(panel, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"{metric} (%)")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)


def plot_cost(reports: list[dict], path: Path) -> None:
    """Milliseconds a step of cost reports (train.py --benchmark), over each option that varies in them while the others
    have their commonest value."""
    settings = [
        {"batch": r["config"]["batch_size"], "image size (px)": r["config"]["image_size"],
         "fields": len(r["config"]["fields"].split(",")), "processes": r["machine"]["processes"]}
        for r in reports
    ]  # fmt: skip
    usual = {name: Counter(s[name] for s in settings).most_common(1)[0][0] for name in settings[0]}
    varied = [name for name in usual if any(s[name] != usual[name] for s in settings)]
    if not varied:
        raise BadInput("plot cost: nothing varies; add reports of other batches, sizes, fields or processes")
    from matplotlib.ticker import AutoLocator

    figure, axes = data.canvas(1, len(varied), 1.5 + 3 * len(varied), 3)
    for axis, name in zip(axes[0], varied):
        others = usual.items() - {(name, usual[name])}
        for method in dict.fromkeys(r["method"] for r in reports):
            points = {
                s[name]: r["ms"]["step"]
                for s, r in zip(settings, reports) if r["method"] == method and others <= s.items()
            }  # fmt: skip
            axis.plot(*zip(*sorted(points.items())), marker="o", markersize=3, label=method)
        axis.set_xticks(sorted(points), sorted(points))
        axis.set_ylim(0)
        axis.yaxis.set_major_locator(AutoLocator())
        axis.set(xlabel=name)
    axes[0, 0].set_ylabel("ms a step")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def picture_map(features: Tensor, ids: Tensor, classes: list[str], label: str, path: Path, most: int = 9) -> None:
    """Features [n, D] on their first two principal components; ids [n] of their classes, -1 where there is none. The
    commonest classes have a colour."""
    centred = (features.float() - features.float().mean(0)).cpu()
    variance, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    points = (centred @ directions[:, [-1, -2]]).numpy()
    common = torch.bincount(ids[ids >= 0]).argsort(descending=True)[:most].tolist()
    figure, axes = data.canvas(1, 1, 7.5, 5)
    axes[0, 0].scatter(*points[~torch.isin(ids, torch.tensor(common))].T, s=4, color="lightgray", label="other")
    for i in common:
        axes[0, 0].scatter(*points[ids == i].T, s=4, label=classes[i])
    share = (variance[-2:].sum() / variance.sum()).item()
    axes[0, 0].set_title(f"Two principal components ({share:.0%} of the variance), by {label.removeprefix('label_')}")
    axes[0, 0].legend(fontsize=8, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)


# -----------------------------------------------------------------------------------------------------
# Export


def write_rows(path: Path, rows: Callable[[int], Iterator[Tensor]], n: int, width: int, batch: int) -> None:
    """A .npy of float32 [n, width], batch by batch; rows(start) yields those from row `start` on.

    Written under another name until whole. A restart keeps the whole batches that are there, so that batches, and with
    them the last bits of every row, are those of a run that was never stopped.
    """
    unfinished, header = path.with_name(path.name + ".unfinished"), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (n, width)})
    header = header.getvalue()
    unfinished.touch()
    done = max(0, unfinished.stat().st_size - len(header)) // (4 * width) // batch * batch
    with open(unfinished, "r+b") as file:
        file.write(header)
        file.truncate(len(header) + 4 * width * done)
        file.seek(0, io.SEEK_END)
        for x in rows(done):
            file.write(x.cpu().numpy().astype("<f4").tobytes())
            file.flush()
    unfinished.replace(path)


def export(args: argparse.Namespace) -> None:
    """The command: the image encoder for other programs (encoder.pt, encoder.json) and, with --data, the features of
    a dataset (<split>.<modality>.npy) with the file names of their rows (<split>.ids.json)."""
    pretrained, state = load_pretrained(args.checkpoint, args.device)
    if "metadata" in args.modality and pretrained.encoder == "none":
        raise BadInput(f"{args.checkpoint}: {state['config']['method']} has no metadata encoder; use --modality image")
    c, out = pretrained.model.config, args.output
    about = describe_encoder(pretrained.model, state["channel_mean"], state["channel_std"])
    if args.data:
        splits = data.read_dataset(args.data, pretrained.fields, captions=pretrained.encoder == "text")
        statistics = data.channel_statistics(splits[0], c.image_size, args.workers)
        about["features"] = {
            "data": str(args.data), "rows": list(map(len, splits)), "mean": statistics[0], "std": statistics[1],
            "rows at a time": args.batch_size,
        }  # fmt: skip
    about = json.dumps(about, indent=1)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "encoder.json").is_file() and (out / "encoder.json").read_text() != about:
        raise BadInput(f"{out}: holds an export of another checkpoint or dataset; choose another folder")
    (out / "encoder.json").write_text(about)
    weights = {name: tensor.cpu() for name, tensor in pretrained.model.image_encoder.state_dict().items()}
    torch.save(weights, out / "encoder.pt")
    for stem, split in zip(("train", "test"), splits) if args.data else ():
        (out / f"{stem}.ids.json").write_text(json.dumps([split.names[i] for i in range(len(split))]))
        streams = {
            "image": (pretrained.model.image_encoder.width, lambda start: image_features(
                pretrained, split, statistics, c.image_size, args.workers, args.batch_size, start)),
            "metadata": (c.metadata_width, lambda start: metadata_features(
                pretrained, split.table, args.batch_size, start)),
        }  # fmt: skip
        for modality in args.modality:
            path = out / f"{stem}.{modality}.npy"
            if not path.is_file():
                size, rows = streams[modality]
                write_rows(path, rows, len(split), size, args.batch_size)
    print(f"in {out}: " + ", ".join(sorted(file.name for file in out.iterdir())))


# -----------------------------------------------------------------------------------------------------
# What train.py says at its end


def report(path: Path, splits: Splits, workers: int, device: torch.device) -> str:
    """Score all features of a checkpoint, beside colour histograms and the network as its training started, by kNN and
    probe; leave results.jsonl and two pictures beside it -> a table."""
    trained, state = load_pretrained(path, device)
    statistics, size, both = (state["channel_mean"], state["channel_std"]), trained.size, trained.encoder != "none"
    take = lambda network, modality: [  # noqa: E731
        extract(network, split, statistics, modality, size, workers) for split in splits
    ]
    before, after = take(untrained(trained), "image"), take(trained, "both" if both else "image")
    features = {
        "colour histograms": [histograms(split, size, workers) for split in splits],
        "untrained, image": [f["image"] for f in before], "image": [f["image"] for f in after],
    }  # fmt: skip
    if both:
        features |= {"metadata": [f["metadata"] for f in after], "both": [join(f) for f in after]}
        features["location only"] = [locations(split) for split in splits]
    features = {name: pair for name, pair in features.items() if pair[0] is not None and pair[1] is not None}
    features, labels = {name: tuple(x.to(device) for x in pair) for name, pair in features.items()}, label_names(splits)
    results = [{**trained.about, **r} for r in score_all(features, splits, labels, ["knn", "linear"])]
    with open(path.with_name("results.jsonl"), "w") as file:
        file.writelines(json.dumps(r) + "\n" for r in results)
    picture_neighbours(features["image"], splits, labels[0], path.with_name("neighbours.png"))
    if both and any(field.name == "location" for field in trained.fields):
        picture_places(trained, splits[1], after[1], path.with_name("places.png"))
    return format_table(results)


# -----------------------------------------------------------------------------------------------------
# The commands


def models(args: argparse.Namespace) -> Iterator[tuple[Pretrained, list[Path]]]:
    """What the command evaluates, each checkpoint or the weights of others, and on which datasets."""
    if args.weights:
        if args.source is None or args.data is None:
            raise BadInput(f"--weights {args.weights}: say --source ({', '.join(SOURCES)}) and --data")
        size = args.image_size or (128 if args.source == "scalemae" else 224)  # supplement A
        yield load_foreign(args.weights, args.source, args.heads, args.position_scale, size, args.device), args.data
    for path in args.checkpoint or ():
        pretrained, state = load_pretrained(path, args.device)
        patch = 1 if pretrained.model.config.vit == "resnet50" else pretrained.model.config.patch_size
        pretrained.size = args.image_size or pretrained.size  # NOTE[DIFF] supplement A: or the images', if larger
        if pretrained.size % patch:
            raise BadInput(f"--image-size {pretrained.size}: not a multiple of the patch size {patch}")
        yield pretrained, args.data or [Path(state["config"]["data"])]


class Job(NamedTuple):
    """One model on one dataset: what the protocols need."""

    pretrained: Pretrained
    splits: Splits
    statistics: Statistics
    labels: list[str]
    areas: list[str | None] | None  # of the test rows, where their predictions are to be averaged
    features: tuple[dict, dict]  # of train and test, by modality
    named: dict[str, tuple[Tensor, Tensor]]  # those to score: each modality, each baseline
    args: argparse.Namespace


def networks(pretrained: Pretrained, args: argparse.Namespace) -> dict[str, Pretrained]:
    """The model and, if that baseline is asked for, the untrained one, by what is added to the name of its features."""
    return {"": pretrained} | ({", random weights": untrained(pretrained)} if "random" in args.baselines else {})


def prepare(pretrained: Pretrained, folder: Path, args: argparse.Namespace, known: dict[tuple, Statistics]) -> Job:
    """Read and extract. known: channel statistics of (dataset, image size), to which those needed are added."""
    about, has = pretrained.about, [m for m in args.modality if m == "image" or pretrained.encoder != "none"]
    bimodal = args.places or not set(args.protocol) <= set(SCORED)
    if not has or (bimodal and pretrained.encoder == "none"):
        what = f"{about['method']} has no metadata encoder"
        raise BadInput(f"{about['checkpoint']}: {what}; use --modality image, --protocol knn or linear")
    if args.places and "location" not in {field.name for field in pretrained.fields}:
        raise BadInput(f"--places: {about['checkpoint']} was trained without the field location")
    splits = data.read_dataset(folder, pretrained.fields, captions=pretrained.encoder == "text")
    labels, unlabelled = label_names(splits), set(args.protocol) <= {"retrieval", "ask"} and not args.map
    if args.label not in (None, *labels) or not (labels or unlabelled):
        train, test = (", ".join(sorted(split.labels)) or "none" for split in splits)
        what = f"no label {args.label}" if args.label else "no label"
        raise BadInput(f"{folder}: {what} in both splits; train has: {train}; test has: {test}")
    at = folder, pretrained.size
    if pretrained.statistics is None and at not in known:
        known[at] = data.channel_statistics(splits[0], pretrained.size, args.workers)
    statistics = pretrained.statistics or known[at]
    needed, named, features = has[0] if len(has) == 1 and not bimodal else "both", {}, None
    for suffix, network in networks(pretrained, args).items():
        found = tuple(extract(network, split, statistics, needed, pretrained.size, args.workers) for split in splits)
        named |= {m + suffix: tuple(join(f) if m == "both" else f[m] for f in found) for m in has}
        features = features or found
    if has != ["image"]:
        named |= {"identity": identity(splits, pretrained.fields)} if "identity" in args.baselines else {}
        points = tuple(map(locations, splits)) if "location" in args.baselines else (None,)
        named |= {"location only": points} if all(p is not None for p in points) else {}
    named = {name: tuple(x.to(pretrained.device) for x in pair) for name, pair in named.items()}
    areas = column(splits[1], "area") if args.average_areas else None
    return Job(pretrained, splits, statistics, [args.label] if args.label else labels, areas, features, named, args)


def score_finetuned(job: Job) -> list[dict]:
    """The encoder fine-tuned on each label, and if that baseline is asked for, trained on it from scratch."""
    args, results = job.args, []
    recipe = {"finetune_epochs": args.finetune_epochs, "finetune_lr": args.finetune_lr, "policy": args.augment}
    for label, (suffix, network) in itertools.product(job.labels, networks(job.pretrained, args).items()):
        classes, y = data.class_ids(label, *job.splits)
        known, options = y[1] >= 0, (*recipe.values(), args.workers)
        probabilities = finetune(network, job.splits, job.statistics, y, len(classes), *options)[known]
        areas = job.areas and list(itertools.compress(job.areas, known.tolist()))
        scores = judge(probabilities, y[1][known].to(probabilities.device), len(classes), areas)
        results.append({"features": "image" + suffix, "label": label, "protocol": "finetune", **recipe, **scores})
    return results


def ask_all(job: Job) -> list[dict]:
    """Every question; what each image answered goes to --posteriors."""
    results, posteriors = ask(job.pretrained, job.splits, embed(job.pretrained, job.features[1])["image"])
    if job.args.posteriors:
        np.savez_compressed(job.args.posteriors, **posteriors)
    return results


PROTOCOLS = {
    "knn": lambda job: score_all(job.named, job.splits, job.labels, ["knn"], job.areas),
    "linear": lambda job: score_all(job.named, job.splits, job.labels, ["linear"], job.areas),
    "finetune": score_finetuned,
    "retrieval": lambda job: retrieval(embed(job.pretrained, job.features[1])),
    "ask": ask_all,
    "missing": lambda job: missing_fields(job.pretrained, job.splits, job.features, job.labels),
    "leakage": lambda job: leakage(job.splits, job.features, job.labels),
}


def evaluate(args: argparse.Namespace) -> None:
    """The command: every model on every dataset; read, extract, score, write, print."""
    if (args.places or args.posteriors or args.map) and len(args.checkpoint or "1") * len(args.data or "1") > 1:
        raise BadInput("--places, --posteriors, --map: one file each; give one --checkpoint and one --data")
    if args.posteriors and "ask" not in args.protocol:
        raise BadInput("--posteriors: they are those of --protocol ask")
    results, known = [], {}
    try:
        for pretrained, folder in ((p, folder) for p, folders in models(args) for folder in folders):
            job = prepare(pretrained, folder, args, known)
            found = [r for protocol in args.protocol for r in PROTOCOLS[protocol](job)]
            if args.places:
                picture_places(pretrained, job.splits[1], job.features[1], args.places)
            if args.map:
                classes, (ids,) = data.class_ids(job.labels[0], job.splits[1])
                picture_map(next(iter(job.named.values()))[1], ids, classes, job.labels[0], args.map)
            found = [{**pretrained.about, "data": str(folder), "image_size": pretrained.size, **r} for r in found]
            results += found
            if args.output:
                with open(args.output, "a") as file:
                    file.writelines(json.dumps(r) + "\n" for r in found)
    finally:  # what is done stays done when a later model fails
        print_results(results, list(dict.fromkeys(r["k"] for r in results if "k" in r)) or [None], args)


def print_results(results: list[dict], ks: list[int | None], args: argparse.Namespace) -> None:
    """Tables of the scores, one for each k and metric, then each other protocol's results as they are."""
    if any(r["protocol"] in SCORED for r in results):
        for k, metric in itertools.product(ks, args.metric):
            print(format_table(results, k, metric, args.intervals) + "\n")
    for protocol in dict.fromkeys(r["protocol"] for r in results if r["protocol"] not in SCORED):
        print(format_rows([r for r in results if r["protocol"] == protocol]) + "\n")


def print_table(args: argparse.Namespace) -> None:
    """The command: results of several files as one table, or as one of the paper's."""
    results = read_results(args.files)
    for metric in args.metric if args.paper else ():
        print(paper_table(results, args.paper, args.k, metric) + "\n")
    if not args.paper:
        print_results(results, [args.k or K], args)


def print_plot(args: argparse.Namespace) -> None:
    """The command: results of several files as a picture."""
    if args.kind == "cost":
        plot_cost(read_results(args.files, ("method", "ms", "config", "machine")), args.output)
    else:
        plot(read_results(args.files), args.kind, args.output, args.k or K, args.metric[0])


METRICS = ("accuracy", "macro_f1", "paper")


def positive(text: str, low: int = 1) -> int:
    """A whole number, for argparse."""
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
    return int(text)


def device(text: str) -> torch.device:
    """A device of torch's, for argparse."""
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; cuda, cuda:1 or cpu") from None


def arguments(argv: list[str]) -> argparse.Namespace:
    """Command line -> its options, and as `command` the function to call with them."""
    parser = argparse.ArgumentParser(description="What frozen features are worth. Without a command name: score.")
    commands = parser.add_subparsers(required=True)

    def command(name: str, function: Callable, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        found.set_defaults(command=function)
        return found

    p = command("plot", print_plot, "draw results files: time (Fig. 3), fields, modality or missing fields as bars")
    p.add_argument("kind", choices=(*PLOTS, "cost"))
    p.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results of score --output")
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture to write")
    c = command("score", evaluate, "score checkpoints of train.py, or the weights of others, on datasets")
    what = c.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, nargs="+", metavar="FILE", help="RUN/checkpoint.pt, one or several")
    what.add_argument("--weights", type=Path, metavar="FILE", help="an image encoder of another work")
    c.add_argument("--source", choices=tuple(SOURCES), help="whose weights --weights are: layout, heads, statistics")
    c.add_argument("--heads", type=positive, help="attention heads of --weights, where they are not its source's usual")
    c.add_argument("--position-scale", type=float, default=1.0, help="Scale-MAE: m a pixel, relative to its base")
    c.add_argument("--data", type=Path, nargs="+", metavar="DIR", help="datasets; default: the one of the training")
    c.add_argument("--protocol", choices=PROTOCOLS, nargs="+", default=["knn"])
    c.add_argument("--modality", choices=("image", "metadata", "both"), nargs="+", default=["image"])
    c.add_argument("--baselines", choices=("random", "identity", "location"), nargs="*", default=["location"],
                   help="untrained weights; raw metadata and place alone (both beside metadata)")  # fmt: skip
    c.add_argument("--finetune-epochs", type=positive, default=10, help="of --protocol finetune")
    c.add_argument("--finetune-lr", type=float, default=3e-4, help="its peak learning rate, for batches of 64")
    c.add_argument("--augment", choices=tuple(data.POLICIES), default="crop", help="its augmentation")
    c.add_argument("--label", help="one label of the dataset; default: all of them")
    c.add_argument("--average-areas", action="store_true", help="average probabilities over the images of an area")
    c.add_argument("--image-size", type=positive, help="px; default: as in training; --weights 224, scalemae 128")
    c.add_argument("--places", type=Path, metavar="FILE", help="draw where on Earth the model places test images")
    c.add_argument("--posteriors", type=Path, metavar="FILE.npz", help="of --protocol ask: ids, classes, probabilities")
    c.add_argument("--map", type=Path, metavar="FILE", help="draw the test features' two principal components")
    c.add_argument("--output", type=Path, metavar="FILE", help="append one JSON line per result to this file")
    e = command("export", export, "the image encoder by timm's names, and features of a dataset; resumes when stopped")
    e.add_argument("checkpoint", type=Path, help="RUN/checkpoint.pt")
    e.add_argument("output", type=Path, help="folder to write to")
    e.add_argument("--data", type=Path, metavar="DIR", help="dataset whose features are wanted")
    e.add_argument("--modality", choices=("image", "metadata"), nargs="+", default=["image"])
    e.add_argument("--batch-size", type=positive, default=512, help="rows at a time")
    t = command("table", print_table, "print results files as one table")
    t.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results.jsonl of train.py or score --output")
    t.add_argument("--paper", metavar="NUMBER", help="as this table of the paper, its numbers beside: 2-6, S4-S6, S8")
    for reader in (c, e):
        reader.add_argument("--workers", type=lambda text: positive(text, 0), default=2, help="that decode images")
        reader.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    for reader in (t, p):
        reader.add_argument("--k", type=positive, help=f"of the kNN results shown; default {K}, with --paper as there")
    for table in (c, t):
        table.add_argument("--intervals", action="store_true", help="show the 95 %% bootstrap interval of single runs")
    for table, metrics in ((c, ["accuracy", "macro_f1"]), (t, ["accuracy"]), (p, ["accuracy"])):
        table.add_argument("--metric", choices=METRICS, nargs="+", default=metrics, help="paper: F1 on fMoW, FGSC-23")
    if argv[:1] == ["--table"]:
        argv = ["table", *argv[1:]]
    elif argv and argv[0].startswith("--") and argv[0] != "--help":
        argv = ["score", *argv]
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(sys.argv[1:] if argv is None else argv)
    with data.errors_in_one_line(WrongWeights):
        args.command(args)


if __name__ == "__main__":
    main()
