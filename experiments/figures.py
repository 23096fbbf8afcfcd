"""Results as a figure: accuracy against training length (Fig. 3), fields or modalities as bars.

    python -m experiments.figures epochs results.jsonl --output figure3.png
    python -m experiments.figures time results.jsonl --output figure3.png       # relative to SimCLR
    python -m experiments.figures fields results.jsonl --output fields.png      # Table 5
    python -m experiments.figures modality results.jsonl --output modality.png  # Tables 3, S6

One panel a dataset, label and classifier; mean and sample standard deviation over seeds.
"""

import argparse
import math
import statistics
from pathlib import Path

import data
from experiments.results import (
    DATASETS, METRICS, class_name, collect, dataset_name, metric_of, model_name, read_rows,
    run_cost, scores, setting,
)  # fmt: skip
from experiments.tables import paper_k
from metadata import BadInput
from prepare.show import canvas, save

BARS = ("fields", "modality")
KINDS = ("epochs", "time", *BARS)


def series(kind: str, r: dict) -> str:
    """What has a colour of its own."""
    if kind == "modality":
        return r["features"]
    if kind == "fields":
        return f"{model_name(r)}, {r['features']}"
    return model_name(r)


def position(kind: str, r: dict) -> object:
    """What a point or bar stands over."""
    if kind == "modality":
        return model_name(r)
    return setting(r, "fields") if kind == "fields" else r["epochs"]


def relative_times(results: list[dict]) -> dict[tuple[str, int], float]:
    """(model, epochs) -> mean training time, in that of the shortest SimCLR."""
    seconds = {}
    for r in {r.get("checkpoint"): r for r in results}.values():
        cost = run_cost(r)
        if cost is None:
            raise BadInput(f"{r.get('checkpoint')}: no log.jsonl beside it says how long it took")
        seconds.setdefault((model_name(r), r["epochs"]), []).append(cost[0])
    times = {key: statistics.mean(values) for key, values in seconds.items()}
    simclr = [epochs for model, epochs in times if model == "simclr"]
    if not simclr:
        raise BadInput("time: no run of simclr, to which times are relative")
    shortest = times["simclr", min(simclr)]
    return {key: value / shortest for key, value in times.items()}


def usual_k(r: dict) -> int:
    """The paper's on its datasets, else 20."""
    name = dataset_name(r)
    return paper_k(name, r["method"]) if name in DATASETS.values() else 20


def chosen(kind: str, results: list[dict], k: int | None, metric: str) -> list[dict]:
    """The results that such a figure shows."""
    found = []
    for r in results:
        scored = r["protocol"] in ("knn", "linear") and r.get("k") in (None, k or usual_k(r))
        scored = scored and r.get("averaged") != "areas"
        if kind in ("epochs", "time"):
            scored = scored and r["features"] == "image" and "epochs" in r
        if scored and r["method"] != "random" and metric_of(r, metric) in r:
            found.append(r)
    if not found:
        what = f"kNN with k = {k or 'usual'} or of a probe (--metric {metric})"
        raise BadInput(f"{kind}: no such result of {what}")
    return found


def panel(axis, kind: str, shown: list[dict], names: list[str], metric: str, times: dict) -> None:
    cells, bars = collect(shown, lambda r: (position(kind, r), series(kind, r))), kind in BARS
    places = list(dict.fromkeys(place for place, _ in cells))
    if not bars:
        places.sort()
    for number, name in enumerate(names):  # of all panels, so that a colour has one meaning
        found = [place for place in places if (place, name) in cells]
        if not found:
            continue
        look = {"color": f"C{number}", "label": name}
        values = [scores(cells[place, name], metric) for place in found]
        mean = [statistics.mean(v) for v in values]
        deviation = [statistics.stdev(v) if len(v) > 1 else math.nan for v in values]
        if bars:
            width = 0.8 / len(names)
            x = [places.index(place) + width * (number + 0.5) - 0.4 for place in found]
            axis.bar(x, mean, 0.9 * width, yerr=deviation, capsize=2, **look)
            continue
        x = found
        if kind == "time":
            x = [times[name, epochs] for epochs in found]
        line = axis.errorbar(x, mean, deviation, marker="o", markersize=4, capsize=3, **look)
        line[0].set_clip_on(False)  # whole marks at 100 %
    if bars:
        names = [place.replace(",", "\n") for place in places]
        axis.set_xticks(range(len(places)), names, fontsize=7)
    elif kind == "epochs":
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, places)
        axis.minorticks_off()


def draw(kind: str, results: list[dict], k: int | None, metric: str, path: Path) -> None:
    shown, times, panels = chosen(kind, results, k, metric), {}, {}
    if kind == "time":
        times = relative_times(shown)
    for r in shown:
        classifier = f"kNN, k={r['k']}" if r["protocol"] == "knn" else "linear probe"
        title = f"{dataset_name(r)}, {class_name(r['label'])}: {classifier}"
        panels.setdefault(title, []).append(r)
    width, names = 3.6 * len(panels) + 1.8, list(dict.fromkeys(series(kind, r) for r in shown))
    figure, axes = canvas(1, len(panels), width, 3.4)
    for axis, (title, rows) in zip(axes[0], panels.items()):
        panel(axis, kind, rows, names, metric, times)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel(f"{metric_of(rows[0], metric).replace('_', ' ')} (%)", fontsize=9)
        axis.set_ylim(top=min(100, axis.get_ylim()[1]))
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if kind == "epochs":
            axis.set_xlabel("epochs", fontsize=9)
        if kind == "time":
            axis.set_xlabel("training time, SimCLR's shortest = 1", fontsize=9)
    marks = {}
    for axis in axes[0]:
        marks |= {name: mark for mark, name in zip(*axis.get_legend_handles_labels())}
    outside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False}
    axes[0, -1].legend(marks.values(), marks, fontsize=8, **outside)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("kind", choices=KINDS, help="what the figure shows")
    parser.add_argument("files", type=Path, nargs="+", help="what evaluate.py --output wrote")
    parser.add_argument("--output", type=Path, required=True, help="the picture, .png")
    parser.add_argument("--k", type=int, help="of kNN (the paper's on its datasets, else 20)")
    parser.add_argument("--metric", default="paper", choices=METRICS,
                        help="paper: macro-F1 on fMoW and FGSC-23, else accuracy")  # fmt: skip
    args = parser.parse_args(argv)
    with data.errors_in_one_line():
        draw(args.kind, read_rows(args.files), args.k, args.metric, args.output)


if __name__ == "__main__":
    main()
