"""Results as tables and plots: what evaluate.py and train.py have measured, beside what the paper printed.

In this order: reading results -> tables -> the paper's tables -> plots. A result is a dict: what was evaluated, how,
and the scores; tables and plots only choose and arrange. The paper's numbers are in paper_tables.csv.
"""

import csv
import json
from pathlib import Path

import torch

from data import canvas
from metadata import BadInput

HERE = Path(__file__).parent
SETTINGS = ("epochs", "fields", "loss_weight", "augment", "decouple_views", "vit", "init")  # ablated in the paper


# -----------------------------------------------------------------------------------------------------
# Reading


def read_results(paths: list[Path]) -> list[dict]:
    """The lines of results files. BadInput names a file that is not there or a line that is no result."""
    results = []
    for path in paths:
        if not path.is_file():
            raise BadInput(f"{path}: no such file; give results.jsonl files of run folders")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                results.append(json.loads(line))
                results[-1]["features"], results[-1]["label"], results[-1]["protocol"]
            except (ValueError, KeyError, TypeError):
                raise BadInput(f"{path}, line {number}: not a result of train.py or evaluate.py") from None
    return results


# -----------------------------------------------------------------------------------------------------
# Tables


def model_name(result: dict) -> str:
    """"satmips (table)", "simclr", ..."""
    encoder = f" ({result['metadata_encoder']})" if result["metadata_encoder"] != "none" else ""
    return result["method"] + encoder


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


def metric_of(result: dict, metric: str) -> str:
    """"paper" is macro-F1 on fMoW and FGSC-23, accuracy elsewhere (Section 4.2), by the dataset's folder."""
    unbalanced = Path(result.get("data", "")).name.lower().startswith(("fmow", "fgsc"))
    return ("macro_f1" if unbalanced else "accuracy") if metric == "paper" else metric


SCORED = ("knn", "linear", "finetune")  # protocols with one score a label: those that tables have cells for
MODEL_FREE = ("location only", "identity", "colour histograms")  # features that no model has made


def format_table(results: list[dict], k: int | None = 20, metric: str = "accuracy", interval: bool = False) -> str:
    """Markdown: a row for each model and kind of features, a column for each dataset, label and protocol, percent.

    Results that differ in the seed alone become one cell, mean ± sample standard deviation. Settings that differ
    among the models are named in their rows. Of the kNN results one k is shown; NOTE[PAPER] 20, fixed beforehand,
    where the paper reports each dataset's best.
    """
    shown = [r for r in results if r["protocol"] in SCORED and r.get("k", k) == k]
    varying = [s for s in SETTINGS if len({str(r[s]) for r in shown if s in r}) > 1]
    several = len({r.get("data") for r in shown}) > 1

    def row(r: dict) -> str:
        if "checkpoint" not in r or r["features"] in MODEL_FREE:
            return r["features"]
        return ", ".join([model_name(r), *(f"{s}={r[s]}" for s in varying if s in r), r["features"]])

    def column(r: dict) -> str:
        parts = [Path(r.get("data", "")).name] * several + [r["label"].removeprefix("label_")]
        parts += [f"kNN k={k}" if r["protocol"] == "knn" else r["protocol"], "by area"]
        return " ".join(parts[: len(parts) - (r.get("averaged") != "area")])

    cells = {}  # (row, column) -> {seed: result}
    for r in shown:
        cells.setdefault((row(r), column(r)), {})[r.get("seed")] = r
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))

    def cell(found: list[dict]) -> str:
        limits = found[0].get(metric_of(found[0], metric) + "_interval") if found and interval else None
        return show([r[metric_of(r, metric)] for r in found], limits)

    lines = [[name, *(cell(list(cells.get((name, c), {}).values())) for c in columns)] for name in rows]
    return markdown([[f"{metric} (%)", *columns], *lines])


# -----------------------------------------------------------------------------------------------------
# The paper's tables


def costs(results: list[dict], simclr: list[dict]) -> list[str]:
    """Cells: seconds an epoch and GiB, means over runs, then both relative to SimCLR's (Table S8)."""

    def mean(runs: list[dict]) -> torch.Tensor:
        known = [(r["seconds"] / r["epochs"], r["memory"] / 2**30) for r in runs if "seconds" in r]
        return torch.tensor(known, dtype=torch.float64).view(-1, 2).mean(0)  # NaN where nothing is known

    found, base = mean(results), mean(simclr)
    return ["-" if x != x else f"{x:.2f}" for x in [*found.tolist(), *(found / base).tolist()]]


def paper_table(results: list[dict], number: str, k: int = 20, metric: str = "paper") -> str:
    """One of the paper's tables in Markdown: its rows, in them our scores and, beside, the paper's where known.

    A row is a combination of settings, over seeds. BadInput for a table that is not there, and when a row has two runs
    of one seed: they differ in something that is no setting of this table, such as the number of epochs.
    """
    with open(HERE / "paper_tables.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter=";"))
    theirs = [line for line in lines if line["table"] == number]
    if not theirs:
        known = ", ".join(dict.fromkeys(line["table"] for line in lines))
        raise BadInput(f"--paper {number}: not one of {known}")
    names = [part.split("=")[0] for part in theirs[0]["settings"].split()]
    protocols, features = ({part for line in theirs for part in line[key].split()} for key in ("protocol", "features"))
    shown = [r for r in results if "checkpoint" in r and r["protocol"] in protocols and r["features"] in features]
    shown = [r for r in shown if r.get("k", k) == k]
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
    for row in rows:
        mine = [r for r in shown if key(r) == row]
        runs = sorted({(str(r.get("seed")), r["checkpoint"]) for r in mine})
        for (seed, first), (other, second) in zip(runs, runs[1:]):
            if seed == other:
                raise BadInput(f"--paper {number}: {first} and {second} are both seed {seed} of {row}; give one")
        scores = [{r["checkpoint"]: r[metric_of(r, metric)] for r in mine if column(r) == c} for c in columns]
        cells = [show(list(found.values())) for found in scores]
        beside = {line["column"]: line["number"] for line in theirs if line["settings"] == row}
        table.append([row, *cells, *(costs(mine, simclr) if cost else []), *(beside.get(name, "") for name in printed)])
    return markdown(table)


# -----------------------------------------------------------------------------------------------------
# Plots


def relative_times(results: list[dict]) -> dict[int, float]:
    """id of each result -> training time of its run over SimCLR's at its fewest epochs (Fig. 3)."""
    simclr = [r for r in results if r["method"] == "simclr" and "seconds" in r]
    if not simclr or not all("seconds" in r for r in results):
        raise BadInput("plot time: needs runs of SimCLR, and of each run the log.jsonl beside its checkpoint")
    fewest = [r["seconds"] for r in simclr if r["epochs"] == min(r["epochs"] for r in simclr)]
    return {id(r): r["seconds"] * len(fewest) / sum(fewest) for r in results}


def blanked(result: dict) -> str:
    return f"no {result['without']}" if "without" in result else f"{result['blanked']:.0%} blank"


PLOTS = {  # kind -> (what a bar or point stands over, what has a colour of its own)
    "time": (lambda r: r["epochs"], model_name),
    "fields": (lambda r: r["fields"], lambda r: r["features"]),
    "modality": (model_name, lambda r: r["features"]),
    "missing": (blanked, model_name),
}


def plot(results: list[dict], kind: str, path: Path, k: int = 20, metric: str = "accuracy") -> None:
    """One panel for each dataset, label and protocol; mean and deviation over seeds. "time" has lines over training
    time relative to SimCLR (Fig. 3), the others bars: fields (Table 5), modality (Tables 3, S6), missing fields."""
    wanted = [r for r in results if "checkpoint" in r and "accuracy" in r and r.get("k", k) == k]
    wanted = [r for r in wanted if (r["protocol"] == "missing") == (kind == "missing") and r["protocol"] != "ask"]
    hidden = {"time": lambda r: r["features"] != "image", "fields": lambda r: r["features"] in MODEL_FREE}.get(kind)
    wanted = [r for r in wanted if not (hidden and hidden(r))]
    if not wanted:
        raise BadInput(f"plot {kind}: no result of that kind; evaluate.py score --output writes them")
    from matplotlib.ticker import AutoLocator

    over, colour = PLOTS[kind]
    times = relative_times(wanted) if kind == "time" else {}
    protocol = lambda r: f"kNN k={k}" if r["protocol"] == "knn" else r["protocol"]  # noqa: E731
    title = lambda r: f"{Path(r['data']).name}: {r['label'].removeprefix('label_')}, {protocol(r)}"  # noqa: E731
    panels = list(dict.fromkeys(map(title, wanted)))
    figure, axes = canvas(1, len(panels), 1.5 + 4 * len(panels), 3.6)
    for axis, panel in zip(axes[0], panels):
        shown = [r for r in wanted if title(r) == panel]
        groups, series = (list(dict.fromkeys(map(f, shown))) for f in (over, colour))
        for number, name in enumerate(series):
            points = []  # position, mean, deviation
            for group in sorted(groups) if kind == "time" else groups:
                found = [r for r in shown if over(r) == group and colour(r) == name]
                if found:
                    scores = 100 * torch.tensor([r[metric_of(r, metric)] for r in found], dtype=torch.float64)
                    place = groups.index(group) + 0.8 * ((number + 0.5) / len(series) - 0.5)
                    x = sum(times[id(r)] for r in found) / len(found) if times else place
                    points.append((x, scores.mean().item(), scores.std().item() if len(scores) > 1 else float("nan")))
            x, mean, deviation = zip(*points)
            if kind == "time":
                axis.errorbar(x, mean, deviation, marker="o", capsize=3, label=name)
            else:
                axis.bar(x, mean, 0.75 / len(series), yerr=deviation, capsize=3, label=name)
        axis.yaxis.set_major_locator(AutoLocator())
        if kind == "time":
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


def picture_map(
    features: torch.Tensor, ids: torch.Tensor, classes: list[str], label: str, path: Path, most: int = 9
) -> None:
    """Features [n, D] on their first two principal components; ids [n] of their classes, -1 where there is none. The
    commonest classes have a colour."""
    centred = (features.float() - features.float().mean(0)).cpu()
    variance, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    points = (centred @ directions[:, [-1, -2]]).numpy()
    common = torch.bincount(ids[ids >= 0]).argsort(descending=True)[:most].tolist()
    figure, axes = canvas(1, 1, 7.5, 5)
    axes[0, 0].scatter(*points[~torch.isin(ids, torch.tensor(common))].T, s=4, color="lightgray", label="other")
    for i in common:
        axes[0, 0].scatter(*points[ids == i].T, s=4, label=classes[i])
    share = (variance[-2:].sum() / variance.sum()).item()
    axes[0, 0].set_title(f"Two principal components ({share:.0%} of the variance), by {label.removeprefix('label_')}")
    axes[0, 0].legend(fontsize=8, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
