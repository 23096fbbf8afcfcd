"""Result rows, as evaluate.py --output writes them, and what tables and figures make of them."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Callable, Iterable

from metadata import FIELDS, BadInput
from train import Config

OWN_METRIC = {"detect": "AP50", "segment": "mIoU"}  # protocols that have no accuracy
SCORED = ("knn", "linear", "finetune", "few-labels", *OWN_METRIC)  # with one score a label
METRICS = ("paper", "accuracy", "macro_f1", "top5")
# Options of train.py that make no row of a table: in a model's name already, or without effect
NO_SETTINGS = {"method", "metadata", "metadata_encoder", "image_image", "geo", "temporal", "seed",
               "data", "output", "preset", "workers", "eval_every", "log_every",
               "micro_batch"}  # fmt: skip
SETTINGS = [f.name for f in dataclasses.fields(Config) if f.name not in NO_SETTINGS]
SETTINGS += ["trained_on", "transfer_epochs"]
DATASETS = {"fmow": "fMoW", "resisc45": "R45", "optimal31": "O31", "ucmerced": "UCM",
            "fgsc23": "F23", "eurosat": "Euro", "so2sat": "So2", "xview": "xView",
            "spacenet": "SpaceNet", "naip": "NAIP", "geoimagenet": "GeoImageNet"}  # fmt: skip


def read_rows(paths: Iterable[Path]) -> list[dict]:
    """The results in these files. BadInput names the first line that is none."""
    rows = []
    for path in paths:
        if not path.is_file():
            raise BadInput(f"{path}: no such file; evaluate.py --output writes results")
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                row["features"], row["label"], row["protocol"], row["data"], row["method"]
            except (ValueError, TypeError, KeyError):
                what = "not a result that evaluate.py --output wrote"
                raise BadInput(f"{path}, line {number}: {what}") from None
            rows.append(row)
    return rows


def append(path: Path | None, rows: list[dict]) -> None:
    """Add one JSON line a row; None: nowhere."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def missing(wanted: list[dict], output: Path | None) -> list[dict]:
    """Those wanted rows that no row of the file matches in all their keys. With it a script goes on
    where it stopped."""
    rows = read_rows([output]) if output and output.is_file() else []
    return [w for w in wanted if not any(w.items() <= row.items() for row in rows)]


def model_name(result: dict) -> str:
    """ "satmips (table)", "simclr", ..."""
    if result["method"] == "random" and result["features"] == "image":
        return "untrained"
    if result.get("metadata"):
        return f"{result['method']} ({result['metadata_encoder']})"
    return result["method"]


def class_name(label: str) -> str:
    return label.removeprefix("label_").replace("_", " ")


def dataset_name(result: dict) -> str:
    """The paper's name of the dataset, the folder's where it has none."""
    folder = Path(result["data"]).name
    for prefix, name in DATASETS.items():
        if folder.lower().startswith(prefix):
            return name
    return folder


def metric_of(result: dict, metric: str) -> str:
    """ "paper": macro-F1 on fMoW and FGSC-23, accuracy elsewhere (Section 4.1)."""
    if result["protocol"] in OWN_METRIC:
        return OWN_METRIC[result["protocol"]]
    if metric != "paper":
        return metric
    return "macro_f1" if dataset_name(result) in ("fMoW", "F23") else "accuracy"


def setting(result: dict, name: str) -> str:
    """An option's value as tables show it."""
    value = result.get(name)
    if name == "model":
        return model_name(result)
    if name == "method" and value == "random":
        return "untrained"
    if name == "init":
        return str(bool(value))
    if name == "trained_on":
        return Path(value or "").name
    if name == "fields" and value == ",".join(FIELDS):
        return "all"
    return str(value)


def run_folder(result: dict) -> Path:
    """Of the run whose checkpoint was scored."""
    path = Path(result.get("checkpoint", ""))
    return path.parent if path.name == "checkpoint.pt" else path


def collect(results: list[dict], place: Callable[[dict], tuple]) -> dict[tuple, dict[tuple, dict]]:
    """-> place(result), the row and the column -> seeds of training and of transfer -> result;
    scored twice, the last counts.

    Two runs of one seed in a cell are refused, and two image sizes: what tells them apart has no
    row of its own."""
    cells = {}
    for r in results:
        seeds, seed = cells.setdefault(place(r), {}), (r.get("seed"), r.get("transfer_seed"))
        before = seeds.get(seed, r)
        unlike = [name for name in SETTINGS if before.get(name) != r.get(name)]
        other = run_folder(before) != run_folder(r) or "image_size" in unlike
        if other and r["method"] != "random":
            differ = ", ".join(f"{n} {setting(before, n)} and {setting(r, n)}" for n in unlike)
            raise BadInput(
                f"{before.get('checkpoint')} and {r.get('checkpoint')} are both seed {seed[0]} of "
                f"{', '.join(map(str, place(r)))} ({differ or 'equal settings'}): give one of them"
            )
        seeds[seed] = r
    return cells


def scores(runs: dict[tuple, dict], metric: str) -> list[float]:
    """Percent, one a seed; none where a result has no such score (top5 of few classes)."""
    found = [r.get(metric_of(r, metric)) for r in runs.values()]
    return [100 * share for share in found if share is not None]


def show(numbers: list[float], sign: str = "") -> str:
    """Mean ± sample standard deviation; sign "+": of differences."""
    if not numbers:
        return "-"
    deviation = ""
    if len(numbers) > 1:
        deviation = f" ± {statistics.stdev(numbers):.1f}"
    return f"{statistics.mean(numbers):{sign}.1f}{deviation}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def run_cost(result: dict) -> tuple[float, float] | None:
    """Seconds and GiB (0 on a CPU) of the run's training by the log.jsonl beside its checkpoint;
    None where there is none."""
    path = run_folder(result) / "log.jsonl"
    if not path.is_file():
        return None
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    memory = max(entry.get("memory", 0) for entry in entries)
    return sum(entry.get("seconds", 0) for entry in entries), memory


def relative_costs(
    results: list[dict], row: Callable[[dict], str]
) -> dict[tuple[str, str], str]:
    """(row, "time" or "memory") -> that of its runs, by sample, relative to SimCLR's (means)."""
    costs, texts = {}, {}
    for r in {r.get("checkpoint"): r for r in results}.values():
        if cost := run_cost(r):
            names = [row(r)]
            if r["method"] == "simclr":
                names.append("SimCLR")
            for name in names:
                seconds = cost[0] / (r["step"] * r["batch_size"])
                costs.setdefault(name, []).append((seconds, cost[1]))
    base = [statistics.mean(values) for values in zip(*costs.pop("SimCLR", []))]
    for name, found in costs.items():
        for what, theirs, values in zip(("time", "memory"), base, zip(*found)):
            if theirs:
                texts[name, what] = f"{statistics.mean(values) / theirs:.2f}"
    return texts


def markdown(lines: list[list[str]]) -> str:
    """Rows of cells, the header first, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    rows = [" | ".join(c.ljust(w) for c, w in zip(line, widths)) for line in lines]
    return "\n".join(f"| {row} |" for row in rows)
