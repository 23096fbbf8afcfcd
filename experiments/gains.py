"""How much runs gain over those of another method, paired by seed.

    python -m experiments.gains runs/evidence/scores.jsonl --over simclr
    python -m experiments.gains few.jsonl --over "satmip (text), epochs=4" --metric macro_f1

A cell is the mean difference in points ± its sample standard deviation over seeds, and how many of
the seeds gain. A run is compared with the --over run of the same seed and epochs, and of the same
value of every other option in which the --over runs differ. If no --over run was trained on the
same, changed dataset, its run on the dataset that is scored is taken. Settings named in --over, as
tables show them, are those of the --over runs alone.
"""

import argparse
from pathlib import Path

import data
from experiments.results import (
    METRICS, SCORED, class_name, markdown, metric_of, model_name, read_rows, setting, show,
)  # fmt: skip
from experiments.tables import general_tables, protocol_name, varying_settings
from metadata import BadInput


def pair(r: dict, names: list[str], untrained: bool, trained_on: str) -> tuple:
    """What a result has in common with the one that it is compared with."""
    settings = [setting(r, name) for name in names if name != "trained_on"]
    seeds = (r.get("seed"), r.get("transfer_seed"))
    if untrained and "transfer_seed" in r:
        seeds = seeds[1:]  # an untrained network has the seed of its fine-tuning
    return r["data"], r["label"], protocol_name(r), seeds, *settings, trained_on


def differences(results: list[dict], over: str, metric: str) -> dict:
    """-> table -> row -> column -> seed -> difference in points."""
    general_tables(results, metric)  # refuses two runs of one seed
    varying, tables, bases = varying_settings(results), {}, {}
    model, *fixed = over.split(", ")
    names = dict.fromkeys(varying.get(model, ()))
    if model != "untrained":
        names["epochs"] = None
    fixed = dict(part.split("=", 1) for part in fixed if "=" in part)
    common = ([name for name in names if name not in fixed], model == "untrained")

    def is_base(r: dict) -> bool:
        return model_name(r) == model and all(setting(r, n) == v for n, v in fixed.items())

    for r in results:
        if is_base(r) and r["features"] == "image":
            trained_on = setting(r, "trained_on")
            if "trained_on" in fixed:
                trained_on = Path(r["data"]).name
            bases[pair(r, *common, trained_on)] = r
    for r in results:
        usual = bases.get(pair(r, *common, Path(r["data"]).name))
        base = bases.get(pair(r, *common, setting(r, "trained_on")), usual)
        measure = metric_of(r, metric)
        if base is None or is_base(r) or measure not in r or measure not in base:
            continue
        title = f"{Path(r['data']).name}, {class_name(r['label'])}: {measure}, gain over {over}"
        settings = [f"{name}={setting(r, name)}" for name in varying[model_name(r)]]
        row = ", ".join([model_name(r), *settings, r["features"]])
        cells = tables.setdefault(title, {}).setdefault(row, {}).setdefault(protocol_name(r), {})
        cells[r.get("seed"), r.get("transfer_seed")] = 100 * (r[measure] - base[measure])
    if not tables:
        models = ", ".join(varying)
        raise BadInput(f"--over {over}: no result has its seed and epochs; there are {models}")
    return tables


def cell(found: dict[tuple, float]) -> str:
    """ "+1.2 ± 0.4, 3 of 3"."""
    values = list(found.values())
    positive = sum(value > 0 for value in values)
    return f"{show(values, '+')}, {positive} of {len(values)}" if values else "-"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("files", type=Path, nargs="+", help="what evaluate.py --output wrote")
    parser.add_argument("--over", default="simclr", help="model, or model and settings (simclr)")
    parser.add_argument("--metric", default="paper", choices=METRICS,
                        help="paper: macro-F1 on fMoW and FGSC-23, else accuracy")  # fmt: skip
    args = parser.parse_args(argv)
    with data.errors_in_one_line():
        results = [r for r in read_rows(args.files) if r["protocol"] in SCORED]
        for title, rows in differences(results, args.over, args.metric).items():
            columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
            lines = [[title, *columns]]
            for row, cells in rows.items():
                lines.append([row, *(cell(cells.get(column, {})) for column in columns)])
            print(f"{markdown(lines)}\n")


if __name__ == "__main__":
    main()
