"""The runs behind the findings: says what is missing, and goes on where it stopped.

    python -m experiments.tables experiments/evidence_avx512.jsonl   # what has been run: a file for
    python -m experiments.gains experiments/evidence_avx2.jsonl --over simclr    # each processor
    python -m experiments.evidence --list             # all studies: what is there, what is missing
    python -m experiments.evidence longer shuffled    # train and score what is missing of these

On the demo data, three seeds. It runs commands of this repository and prints each, so that any can
be pasted. A finished score is known by its row in evidence_*.jsonl here or in
runs/evidence/scores.jsonl, where new ones go; a finished run by its checkpoint. train.py itself
resumes a run that was stopped midway. Another --folder runs all of it anew. Processors round
differently, and after 1,248 steps that is as much as another seed: compare within a file.
"""

import argparse
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import data
from evaluate import read_checkpoint
from experiments.results import missing
from metadata import BadInput

RESULTS = sorted(Path(__file__).parent.glob("evidence*.jsonl"))  # what has been run
LAST_FEW = {"protocol": "few-labels", "label": "label_land_cover", "k": 20}  # what it scores last
TEXT, TABLE = "--metadata-encoder text", "--metadata-encoder table"


class Run(NamedTuple):
    """A training run of a study."""

    name: str  # its folder, without the seed
    options: str  # of train.py
    epochs: int = 4
    variant: str = ""  # of the demo data, by experiments.variants
    start: "Run | None" = None  # another run, whose image encoder it starts from


SIMCLR = Run("simclr", "--method simclr")
SATMIPS = Run("satmips", f"--method satmips {TEXT}")
SATMIPS_TABLE = Run("satmips-table", f"--method satmips {TABLE}")
SATMIP = Run("satmip", f"--method satmip {TEXT}")
SATMIP_TABLE = Run("satmip-table", f"--method satmip {TABLE}")
COARSE = Run("simclr-coarse", "--method simclr", variant="coarse")
STUDIES = {
    # Where do the methods separate, from 50 labels to all? 20 subsets each
    "few-labels": [SIMCLR, SATMIP, SATMIP_TABLE, SATMIPS, SATMIPS_TABLE],
    # Does the gain over SimCLR grow, hold or vanish with more epochs?
    "longer": [
        SIMCLR, SATMIPS, SIMCLR._replace(name="simclr-8", epochs=8),
        SATMIPS._replace(name="satmips-8", epochs=8),
        SIMCLR._replace(name="simclr-16", epochs=16),
        SATMIPS._replace(name="satmips-16", epochs=16),
    ],
    # Text against table, SatMIP against SatMIPS, numbers as they are and rounded
    "encoders": [
        SATMIPS, SATMIPS_TABLE, SATMIP, SATMIP_TABLE,
        SATMIPS._replace(name="satmips-rounded", variant="rounded"),
    ],
    # Control: with the metadata of other images SatMIPS must lose its gain
    "shuffled": [SIMCLR, SATMIPS, SATMIPS._replace(name="satmips-shuffled", variant="shuffled")],
    # Table 4: on fine images, from scratch and from a SimCLR of coarse images
    "hierarchical": [
        COARSE, SIMCLR._replace(name="simclr-fine", variant="fine"),
        SATMIPS._replace(name="satmips-fine", variant="fine"),
        SIMCLR._replace(name="simclr-fine-init", variant="fine", start=COARSE),
        SATMIPS._replace(name="satmips-fine-init", variant="fine", start=COARSE),
    ],
    # The same ViT trained on the labels, from random weights and from these runs
    "upper": [SIMCLR],
    # Robustness to place: scores by distance to the nearest training image
    "leakage": [SATMIPS, SATMIPS_TABLE],
}  # fmt: skip


def finished(folder: Path, epochs: int) -> bool:
    """Whether a run's checkpoint is of its last epoch."""
    if not (folder / "checkpoint.pt").is_file():
        return False
    log = read_checkpoint(folder)["log"]
    return bool(log) and log[-1]["epoch"] >= epochs


def training(run: Run, seed: int, args: argparse.Namespace) -> list[str]:
    """The commands that are missing until this run is trained."""
    folder, source, commands = args.folder / f"{run.name}-{seed}", args.data, []
    if finished(folder, args.epochs or run.epochs):
        return []
    if run.start:
        commands += training(run.start, seed, args)
    if run.variant:
        source = args.data.with_name(f"{args.data.name}-{run.variant}")
        if not source.exists():
            commands.append(f"-m experiments.variants {run.variant} {args.data} {source}")
    command = f"train.py {run.options} --preset small --data {source} --seed {seed}"
    command += f" --epochs {args.epochs or run.epochs} --eval-every 0 --output {folder}"
    if run.start:
        command += f" --init {args.folder / f'{run.start.name}-{seed}'}"
    return [*commands, command]


def scoring(study: str, run: Run, seed: int, args: argparse.Namespace) -> list[str]:
    """The commands that are missing until this run is scored on the whole embedded data; a run with
    all its scores needs no training."""
    path, commands = args.folder / f"{run.name}-{seed}" / "checkpoint.pt", []
    evaluate = f"evaluate.py --checkpoint {path} --data {args.data} --output {args.output}"
    where = f"{path} --data {args.data} --output {args.output}"
    kinds = "image metadata both"
    if "simclr" in run.name or run.variant:
        kinds = "image"
    asked = [
        ({"protocol": "linear"}, f"{evaluate} --protocol knn linear --modality {kinds}"),
        (LAST_FEW, f"-m experiments.few_labels {where} --histograms --random"),
    ]
    if study == "upper":
        asked.append(({"protocol": "finetune"}, f"{evaluate} --protocol finetune --random"))
    if study == "leakage":
        asked.append(({"protocol": "leakage"}, f"-m experiments.leakage {where}"))
    about = {"checkpoint": str(path), "epochs": args.epochs or run.epochs, "data": str(args.data)}
    for wanted, command in asked:
        rows = [about | wanted]
        for path in (*RESULTS, args.output):
            rows = missing(rows, path)
        if rows:
            commands.append(command)
    if commands:
        commands = training(run, seed, args) + commands
    return commands


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("study", nargs="*", help=f"of {', '.join(STUDIES)} (default: all)")
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: 0 1 2)")
    parser.add_argument("--epochs", type=int, default=0, help="of every run (default: the study's)")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="the demo data")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="of the runs")
    args = parser.parse_args(argv)
    args.output = args.folder / "scores.jsonl"
    if args.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence
    printed = set()  # studies share runs
    with data.errors_in_one_line():
        for study in args.study or STUDIES:
            if study not in STUDIES:
                raise BadInput(f"{study}: not one of {', '.join(STUDIES)}")
            if not args.list and not args.data.is_dir():
                raise BadInput(f"{args.data}: not there; python -m prepare.demo {args.data}")
            complete, seeds = 0, args.seeds or range(3)
            for seed in seeds:
                for run in STUDIES[study]:
                    commands = scoring(study, run, seed, args)
                    complete += not commands
                    for command in commands:
                        if command in printed:
                            continue
                        printed.add(command)
                        print(f"python {command}", flush=True)
                        if not args.list:
                            execute(command)
            count = len(STUDIES[study]) * len(seeds)
            print(f"{study}: {complete} of {count} runs were there", flush=True)


def execute(command: str) -> None:
    if subprocess.run([sys.executable, *shlex.split(command)]).returncode:
        raise BadInput(f"python {command}: failed, see above; start again to go on from here")


if __name__ == "__main__":
    main()
