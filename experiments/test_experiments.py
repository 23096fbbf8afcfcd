"""The scripts of this folder: tables, figures, cost, pictures, questions, evidence.

    pytest -q experiments
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import train
from experiments import (
    ask, baselines, common, cost, evidence, export, few_labels, figures, gains, leakage, missing,
    pictures, results, retrieval, tables, variants,
)  # fmt: skip
from metadata import parse_timestamp

HERE = Path(__file__).parent
ROOT = HERE.parent
CPU = ["--device", "cpu", "--workers", "0"]

# --------------------------------------------------------------------------------------------------
# Helpers


def refusal(main, *argv) -> str:
    """The one line with which a script refuses its arguments."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in argv])
    line = str(caught.value)
    assert line.startswith("error: ") and "\n" not in line, line
    return line


def said(main, *argv) -> str:
    """What a script prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([str(a) for a in argv])
    return out.getvalue()


def rows_of(text: str) -> list[list[str]]:
    """Cells of the Markdown tables in a text, without the lines below their headers."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "| ---" not in line]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """48 and 16 images of two kinds, told by colour and hemisphere; some lack fields or labels."""
    folder, rng = tmp_path_factory.mktemp("dataset"), np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 16)):
        (folder / split).mkdir()
        lines = []
        for i in range(count):
            pixels = rng.integers(0, 100, (32, 32, 3), np.uint8)
            pixels[..., i % 2] += 100
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
            record = {"file_name": f"{i}.png", "label_kind": ("forest", "bare_rock")[i % 2]}
            record["gsd"] = float(rng.choice([1000, 20000]))
            record["timestamp"] = f"2004-{rng.choice([1, 7]):02d}"
            latitude = rng.uniform(5, 60) * (1 - 2 * (i % 2))
            record["location"] = [round(rng.uniform(-170, 170), 2), round(latitude, 2)]
            for name in (("timestamp", "location", "label_kind")[i % 3],) * (i % 7 == 3):
                del record[name]
            lines.append(json.dumps(record) + "\n")
        (folder / split / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def run(dataset, tmp_path_factory):
    """A run of one epoch: run("simclr"), run("satmips")."""
    folder, made = tmp_path_factory.mktemp("runs"), set()

    def make(method: str) -> Path:
        argv = ["--method", method, "--data", dataset, "--preset", "small", "--image-size", 32]
        argv += ["--epochs", 1, "--batch-size", 16, "--workers", 0, "--output", folder / method]
        argv += ["--metadata-encoder", "table"]
        if method not in made:
            said(train.main, *argv)
        made.add(method)
        return folder / method

    return make


def opened(run: Path, dataset: Path):
    """A run's model, the splits and their features."""
    p, splits = common.open_run(run, common.arguments("").parse_args([str(run), *CPU]))
    return p, splits, common.both_features(p, splits, 0)


def made_results(folder: Path) -> list[dict]:
    """What scoring three methods at two lengths, with two seeds, the second one on half of the
    images, might write."""
    found = []
    methods = ("simclr", "satmip", "satmips")
    for method, epochs, seed in itertools.product(methods, (25, 50), (0, 1)):
        path = folder / f"{method} {epochs} {seed}"
        path.mkdir(parents=True, exist_ok=True)
        cost, steps = {"simclr": 1.0, "satmip": 0.5, "satmips": 1.25}[method], epochs * (2 - seed)
        entry = {"step": steps, "epoch": epochs, "seconds": cost * steps, "memory": cost}
        (path / "log.jsonl").write_text(json.dumps(entry) + '\n{"step": 9, "knn": 0.5}\n')
        config = train.parse_config(["--method", method, "--data", "x", "--epochs", str(epochs)])
        common_ = vars(config) | {"checkpoint": str(path / "checkpoint.pt"), "seed": seed}
        common_["step"] = steps
        common_ |= {"fields": "gsd,timestamp,location", "metadata_encoder": "table"}
        for data_, label in (("x/fmow", "label"), ("data/demo", "label_climate")):
            r = common_ | {"data": data_, "label": label, "test": 9, "features": "image"}
            for k in (1, 5, 100):
                score = {"accuracy": 0.25 + k / 1000, "macro_f1": 0.5 + seed / 10}
                found.append(r | {"protocol": "knn", "k": k} | score)
            found.append(r | {"protocol": "linear", "accuracy": 0.75, "macro_f1": 0.5})
    return found


@pytest.fixture(scope="session")
def result_file(tmp_path_factory):
    """A file with those of the made results that fit, and that file's path."""
    folder = tmp_path_factory.mktemp("made")

    def write(name: str, **fixed) -> Path:
        path = folder / f"{name}.jsonl"
        path.unlink(missing_ok=True)
        wanted = [r for r in made_results(folder) if fixed.items() <= r.items()]
        results.append(path, wanted)
        return path

    return write


# --------------------------------------------------------------------------------------------------
# Tables


def test_a_table_a_label_with_k_as_columns(result_file):
    """Percent; seeds become mean and sample deviation; what differs among runs has a row each."""
    rows = rows_of(said(tables.main, result_file("all"), "--metric", "accuracy"))
    assert rows[0] == ["fmow, label: accuracy (%)", "k=1", "k=5", "k=100", "linear"]
    assert rows[1] == ["simclr, epochs=25, image", "25.1 ± 0.0", "25.5 ± 0.0", "35.0 ± 0.0",
                       "75.0 ± 0.0"]  # fmt: skip
    assert rows[7][0] == "demo, climate: accuracy (%)" and len(rows) == 14
    assert rows[-1][0] == "satmips (table), epochs=50, image"
    f1 = rows_of(said(tables.main, result_file("all"), "--k", 5))
    assert f1[0] == ["fmow, label: macro_f1 (%)", "k=5", "linear"] and f1[1][1] == "55.0 ± 7.1"


def test_tables_of_the_paper(result_file):
    """Our scores in the paper's rows, k in the header, its numbers beside, differences below."""
    path = result_file("short", epochs=25)
    lines = tables.PAPER.read_text(encoding="utf-8").splitlines()
    numbers = {line.split(";")[0] for line in lines if line[0] not in "#t"}
    numbers -= {*tables.AYUSH}
    assert numbers == {"2", "3", "4", "5", "6", "S4", "S5", "S6", "S8"} and lines[0][0] == "#"
    for number in numbers:
        assert max(len(row[0]) for row in rows_of(said(tables.main, path, "--paper", number))) < 60
    text = said(tables.main, path, "--paper", 2)
    two = rows_of(text)
    assert two[0][:4] == ["Table 2", "fMoW F1 k=100", "paper: fMoW F1 k=100", "paper: R45 k=5"]
    assert two[3][:3] == ["satmips", "55.0 ± 7.1", "62.3 ± 0.0"]
    assert two[0][-1] == "demo climate k=5"
    assert text.endswith("Here (the paper): metadata_encoder table (text); epochs 25 (200)\n")
    assert "relative" not in said(tables.main, path, "--paper", "S8")
    head, *eight = rows_of(said(tables.main, path, "--paper", "S8"))
    assert head[1:] == ["time", "paper: time", "memory", "paper: memory"]
    eight = {row[0]: row[1:] for row in eight}
    assert eight["satmips (table)"] == ["1.25", "", "1.25", ""], "of each run's log.jsonl, a sample"
    assert eight["satmips (text)"] == ["", "1.05", "", "1.11"], "theirs is text alone"
    five = rows_of(said(tables.main, path, "--paper", 5))
    assert five[8][:5] == ["satmip fields=all", "", "50.7 ± 0.1", "58.0 ± 0.2", "78.6 ± 0.1"]
    six = rows_of(said(tables.main, path, "--paper", "S6"))
    assert six[0][1:3] == ["fMoW 25 epochs F1", "paper: fMoW 25 epochs F1"]
    row = json_lines(path)[0] | {"k": 100, "macro_f1": 0.125}
    more = [row | {"averaged": "areas"}, row | {"method": "random", "metadata": False}]
    results.append(path.with_name("more.jsonl"), more)
    rows = rows_of(said(tables.main, path, path.with_name("more.jsonl"), "--paper", 2))
    assert rows[1][:2] == ["simclr", "55.0 ± 7.1"], "not the score of areas"
    assert ["untrained", "12.5"] in [row[:2] for row in rows], "Random of the paper"
    at_256 = [row | {"data": name, "image_size": 256, "k": 5} for name in ("RESISC45", "EUROSAT")]
    results.append(path.with_name("sizes.jsonl"), at_256)
    text = said(tables.main, path.with_name("sizes.jsonl"), "--paper", 2)
    assert text.endswith("epochs 25 (200); image_size 256 (224)\n"), "EuroSAT alone: supplement A"
    at_256[1]["data"] = "ucmerced"
    path.with_name("sizes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in at_256))
    assert "image_size" not in said(tables.main, path.with_name("sizes.jsonl"), "--paper", 2)
    text = said(tables.main, result_file("alone", method="satmip"), "--paper", "S8")
    assert "time, memory: no log of a run of simclr" in text and "35.0" not in text


def transfer_rows() -> list[dict]:
    """What detection, segmentation and scores of land cover and of photographs might write."""
    found = []
    run = {"features": "image", "label": "label", "vit": "resnet50", "epochs": 200}
    for method, seed, transfer_seed in (("random", 0, 0), ("moco-geo", 0, 0), ("moco-geo", 0, 1)):
        about = run | {"method": method, "checkpoint": method, "seed": seed}
        score = 0.25 + 0.5 * transfer_seed
        for protocol, source, key in (("detect", "xview", "AP50"), ("segment", "SpaceNet", "mIoU")):
            r = about | {"protocol": protocol, "data": source, "transfer_seed": transfer_seed}
            found.append(r | {key: score})
        for protocol in ("linear", "finetune"):
            r = about | {"protocol": protocol, "macro_f1": 0.0}
            found.append(r | {"data": "x/naip", "accuracy": 0.75})
            found.append(r | {"data": "geoimagenet", "accuracy": 0.5, "top5": 0.625})
    return found


def test_tables_of_ayush_et_al(tmp_path):
    """Several fine-tunings of a checkpoint are repeats; untrained rows count; top-5 is a column."""
    path = tmp_path / "rows.jsonl"
    results.append(path, transfer_rows())
    for number, column, theirs, ours in (("A3", "xView AP50", "15.63", "50.0 ± 35.4"),
                                         ("A4", "SpaceNet mIoU", "78.42", "50.0 ± 35.4")):
        rows = rows_of(said(tables.main, path, "--paper", number))
        assert rows[0] == [f"Table {number}", column, f"paper: {column}"]
        assert rows[1][:2] == ["untrained", "25.0"]
        assert ["moco-geo", ours, theirs] in rows
    for number, name, expected in (
        ("A5", "NAIP", ("58.23", "75.0", "75.0")),
        ("A6", "GeoImageNet", ("39.96", "50.0", "50.0")),
        ("A6", "GeoImageNet", ("58.71", "62.5", "62.5", " top-5")),
    ):
        head, *rows = rows_of(said(tables.main, path, "--paper", number))
        cells = {row[0]: dict(zip(head, row)) for row in rows}["moco-geo"]
        end = "".join(expected[3:])
        columns = [f"paper: {name}{end}", f"{name} linear{end}", f"{name} finetune{end}"]
        assert [cells[column] for column in columns] == list(expected[:3])
    text = said(tables.main, path, "--metric", "top5")
    assert "xview, label: AP50 (%)" in text and "SpaceNet, label: mIoU (%)" in text
    assert rows_of(text)[-1] == ["moco-geo, image", "62.5", "62.5"]
    assert ["moco-geo, image", "-", "-"] in rows_of(text), "NAIP's made rows have no top-5"


def test_gains_are_paired_by_seed(tmp_path):
    """Differences by hand: at equal epochs; the base on the scored data where metadata changed."""
    path, made = tmp_path / "rows.jsonl", []
    for method, epochs, trained_on, accuracies in (
        ("simclr", 4, "demo", (0.5, 0.75)), ("satmips", 4, "demo", (0.625, 0.625)),
        ("satmips", 4, "demo-shuffled", (0.5, 0.5)), ("satmips", 8, "demo", (1.0, 1.0)),
        ("simclr", 4, "demo-fine", (0.0, 0.0)), ("satmips", 4, "demo-fine", (0.125, 0.25)),
    ):  # fmt: skip
        for seed, accuracy in enumerate(accuracies):
            r = {"method": method, "epochs": epochs, "trained_on": f"x/{trained_on}", "seed": seed}
            r |= {"data": "x/demo", "label": "label_climate", "features": "image", "k": 1}
            r |= {"protocol": "few-labels", "labelled": 50, "accuracy": accuracy, "macro_f1": 0}
            made.append(r | {"checkpoint": f"{method}-{epochs}-{trained_on}-{seed}"})
    results.append(path, made)
    rows = rows_of(said(gains.main, path))
    assert rows == [
        ["demo, climate: accuracy, gain over simclr", "50 labels k=1"],
        ["satmips, epochs=4, trained_on=demo, image", "+0.0 ± 17.7, 1 of 2"],
        ["satmips, epochs=4, trained_on=demo-shuffled, image", "-12.5 ± 17.7, 0 of 2"],
        ["satmips, epochs=4, trained_on=demo-fine, image", "+18.8 ± 8.8, 2 of 2"],
    ]
    rows = rows_of(said(gains.main, path, "--over", "satmips, epochs=4, trained_on=demo-shuffled"))
    assert rows[2] == ["satmips, epochs=4, trained_on=demo, image", "+12.5 ± 0.0, 2 of 2"]
    rows = rows_of(said(gains.main, path, "--over", "satmips, epochs=4"))
    assert ["satmips, epochs=8, trained_on=demo, image", "+37.5 ± 0.0, 2 of 2"] in rows
    longer = [r | {"transfer_epochs": 9} for r in transfer_rows() if r["protocol"] == "detect"]
    results.append(tmp_path / "longer.jsonl", transfer_rows() + longer)
    names = [row[0] for row in rows_of(said(tables.main, tmp_path / "longer.jsonl"))]
    assert "untrained, transfer_epochs=9, image" in names
    results.append(tmp_path / "transfer.jsonl", transfer_rows())
    rows = rows_of(said(gains.main, tmp_path / "transfer.jsonl", "--over", "untrained"))
    assert ["moco-geo, image", "+0.0, 0 of 1"] in rows, "detection, of the same fine-tuning seed"
    assert "--over x: no result has its seed and epochs; there are simclr, satmips" in refusal(
        gains.main, path, "--over", "x"
    )
    results.append(path, [made[0] | {"checkpoint": "another"}])
    assert "both seed 0" in refusal(gains.main, path)


def test_tables_refuse_what_they_cannot_tell_apart(result_file, tmp_path):
    """Two runs of one seed in a cell; a file without results. The same run twice is no fault."""
    both, short = result_file("both"), result_file("short", epochs=25)
    line = refusal(tables.main, both, "--paper", 2)
    assert re.search(r"simclr 25 0.* and .*simclr 50 0.* both seed 0 .*epochs 25 and 50", line)
    assert "--paper 7: not one of 2, 3, 4" in refusal(tables.main, both, "--paper", 7)
    assert "README.md, line 1: not a result" in refusal(tables.main, HERE / "README.md")
    assert "nowhere.jsonl: no such file" in refusal(tables.main, tmp_path / "nowhere.jsonl")
    again = [r | {"macro_f1": 0.125} for r in json_lines(short)]
    results.append(tmp_path / "again.jsonl", again)
    rows = rows_of(said(tables.main, short, tmp_path / "again.jsonl", "--paper", 2))
    assert rows[1][1] == "12.5 ± 0.0", "of a checkpoint that was scored twice the last counts"
    (once,) = [r for r in again[:4] if r.get("k") == 100]
    weights = [once | {"method": "mocov2", "checkpoint": f"weights/{i}.pt"} for i in (1, 2)]
    sizes = [once, once | {"image_size": 256}]
    for name, made, needle in (("weights", weights, "1.pt and weights/2.pt are both"),
                               ("sizes", sizes, "image_size 224 and 256")):
        results.append(tmp_path / f"{name}.jsonl", made)
        assert needle in refusal(tables.main, tmp_path / f"{name}.jsonl", "--paper", 2)


def test_tables_of_real_runs(run):
    """What training leaves: both methods and the untrained network, which is one of each seed."""
    paths = [run(method) / "results.jsonl" for method in ("simclr", "satmips")]
    names = [row[0] for row in rows_of(said(tables.main, *paths))]
    assert names[0] == "dataset0, kind: accuracy (%)"
    assert {"simclr, image", "satmips (table), both", "untrained, image"} <= {*names}
    assert names.count("untrained, image") == 1


# --------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("kind", figures.KINDS)
def test_figures(kind, result_file, tmp_path):
    """A picture of each kind; bars cannot tell lengths apart, and time needs SimCLR."""
    path = result_file("short", epochs=25)
    if kind in ("epochs", "time"):
        path = result_file("all")
    figures.main([kind, str(path), "--output", str(tmp_path / "x.png"), "--k", "5"])
    assert min(Image.open(tmp_path / "x.png").size) > 300
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    if kind == "time":
        times = figures.relative_times(json_lines(path))
        assert times["satmip (table)", 50] == 1 and times["satmips (table)", 25] == 1.25
        other = result_file("other", method="satmip")
        assert "no run of simclr" in refusal(figures.main, kind, other, "--output", "x", "--k", 5)
    if kind in figures.BARS:
        line = refusal(figures.main, kind, result_file("all"), "--output", "x", "--k", 5)
        assert "both seed 0" in line


def test_axes_end_at_100_percent(result_file, tmp_path, monkeypatch):
    rows, drawn = json_lines(result_file("all")), []
    results.append(tmp_path / "rows.jsonl", [r | {"accuracy": 1.0, "macro_f1": 1.0} for r in rows])
    monkeypatch.setattr(figures, "save", lambda figure, _: drawn.append(figure))
    figures.main(["epochs", str(tmp_path / "rows.jsonl"), "--output", "x.png", "--k", "5"])
    axes = drawn[0].axes
    assert len(axes) == 4 and all(axis.get_ylim()[1] == 100 for axis in axes)
    left = [r for r in rows if r["method"] == "simclr" or r["label"] == "label_climate"]
    results.append(tmp_path / "left.jsonl", left)
    figures.main(["epochs", str(tmp_path / "left.jsonl"), "--output", "x.png", "--k", "5"])
    colours = [axis.get_legend_handles_labels() for axis in drawn[1].axes]
    colours = [{name: mark[0].get_color() for mark, name in zip(*pair)} for pair in colours]
    assert [len(found) for found in colours] == [1, 1, 3, 3], "SimCLR alone on the first label"
    assert all(found.items() <= colours[-1].items() for found in colours), "one legend for all"
    results.append(tmp_path / "k20.jsonl", [*rows, rows[-2] | {"k": 20}])
    figures.main(["epochs", str(tmp_path / "k20.jsonl"), "--output", "x.png"])
    titles = [axis.get_title() for axis in drawn[2].axes]
    assert titles[0] == "fMoW, label: kNN, k=100" and "demo, climate: kNN, k=20" in titles
    assert "--metric top5" in refusal(
        figures.main, "epochs", tmp_path / "rows.jsonl", "--output", "x", "--metric", "top5"
    )


# --------------------------------------------------------------------------------------------------
# Cost


def test_cost_report(tmp_path):
    """The parts of a step add up to it; a second view and the head double SatMIP's arithmetic."""
    argv = ["--preset", "small", "--image-size", 32, "--batch-size", 4, "--rounds", 1]
    text = said(cost.main, *argv, "--workers", 0, "--json", tmp_path / "cost.jsonl")
    names = ["simclr", "satmip (text)", "satmip (table)", "satmips (text)", "satmips (table)"]
    rows = json_lines(tmp_path / "cost.jsonl")
    assert [row["method"] for row in rows] == names == [row[0] for row in rows_of(text)[1:]]
    for row in rows:
        step, wait = row["ms"].pop("step"), row["ms"].pop("wait")
        assert {"augment", "forward", "backward", "optimizer", "end"} == {*row["ms"]} and wait > 0
        assert abs(sum(row["ms"].values()) - step) < 1e-6
        assert 0 < row["GiB"] < 4 and 0 < row["of peak"] < 1.5
    assert [rows[0]["time"], rows[0]["memory"]] == [1, 1]
    # 5 tokens of width 128 in 4 blocks, the last MLP for one of them; gradients cost twice
    patches, head = 2 * 4 * 768 * 128, 2 * (128 * 512 + 512 * 512 + 512 * 256)
    blocks = 3 * 2 * (5 * 12 * 128**2 + 2 * 5 * 5 * 128)
    blocks += 2 * ((5 * 4 + 8) * 128**2 + 2 * 5 * 5 * 128)
    flops = 2 * (2 * patches + 3 * blocks + 3 * head) + 3 * 2 * 2 * 2 * 256
    assert abs(rows[0]["GFLOP a sample"] * 1e9 / flops - 1) < 0.05
    view = rows[4]["GFLOP a sample"] - rows[2]["GFLOP a sample"]
    assert abs(view * 1e9 / (2 * patches + 3 * blocks + 6 * head) - 1) < 0.05


# --------------------------------------------------------------------------------------------------
# Pictures


def test_pictures(run, dataset, monkeypatch):
    """Two pictures of a run, one without metadata; one line where matplotlib is missing."""
    text = said(pictures.main, run("satmips"), *CPU)
    made = [f"wrote {run('satmips') / name}.png" for name in ("neighbours", "places")]
    assert text.splitlines() == made
    assert min(Image.open(run("satmips") / "places.png").size) > 500
    assert said(pictures.main, run("simclr"), *CPU).count(".png") == 1
    assert "--label x: not one of label_kind" in refusal(
        pictures.main, run("simclr"), "--label", "x", *CPU
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert "pip install matplotlib" in refusal(pictures.main, run("simclr"), *CPU)


def test_maps_show_the_world_or_a_region():
    """Around places of one region, twice its extent; the world where that would leave the Earth."""
    west, east, south, north = pictures.window([[10.0, 50.0], [14.0, 50.5]])
    assert (west, east) == (8, 16) and (south, north) == (48.75, 51.75)
    for places in ([[-100, 0], [50, 20]], [[178, 10], [179.9, 11]], [[10, 89], [12, 89.9]]):
        assert pictures.window(places) == pictures.WORLD


def test_classes_are_spelled_out():
    """Köppen's codes with their meaning, other names as they are, in at most two lines."""
    assert pictures.spell("Dfb") == "Dfb, continental, warm\nsummer"
    assert pictures.spell("bare_rock") == "bare rock"
    assert pictures.spell("long " * 20).count("\n") == 1
    assert all(pictures.spell(code).count("\n") <= 1 for code in pictures.KOPPEN)


# --------------------------------------------------------------------------------------------------
# Places


def test_great_circles():
    """Paris to New York, a quarter of the globe, a metre: the haversine's answers."""
    a = common.unit_sphere([[2.3522, 48.8566], [0, 0], [10, 50]])
    b = common.unit_sphere([[-74.006, 40.7128], [90, 0], [10, 50 + 1e-5 / 1.11195]])
    expected = torch.tensor([5837.2, math.pi / 2 * 6371, 1e-3])
    assert (common.great_circle(a, b) - expected).abs()[:2].max() < 1
    assert abs(common.great_circle(a, b)[2] - 1e-3) < 1e-6
    assert common.unit_sphere([None]).norm() == 0
    each = common.great_circle(a[:, None], b)
    assert torch.equal(common.nearest_km(a, b), each.min(dim=1).values)


# --------------------------------------------------------------------------------------------------
# Retrieval, ask, missing, leakage


def test_ranks_equal_a_loop():
    """1 + those that are nearer + half of those as near; recall and median, both ways."""
    torch.manual_seed(0)
    images, metadata = (F.normalize(torch.randn(30, 4), dim=1) for _ in range(2))
    metadata[20:] = metadata[:10]  # images that share their metadata
    expected = []
    for i, query in enumerate(images.double()):
        similarity = [float(query @ other) for other in metadata.double()]
        nearer = sum(s > similarity[i] + 1e-12 for s in similarity)
        equal = sum(abs(s - similarity[i]) <= 1e-12 for s in similarity) - 1
        expected.append(1 + nearer + equal / 2)
    above, equal = retrieval.ranks(images, metadata)
    assert (1 + above + equal / 2).tolist() == expected
    there, back = retrieval.retrieval({"image": images, "metadata": metadata})
    assert there["features"] == "image to metadata" and back["features"] == "metadata to image"
    assert there["median_rank"] == sorted(expected)[14]
    shared = torch.eye(4).repeat(3, 1)  # perfect, but three images share each caption
    found, _ = retrieval.retrieval({"image": shared, "metadata": shared})
    assert found["recall_1"] == pytest.approx(1 / 3) and found["recall_5"] == 1


def test_retrieval_needs_metadata(run, tmp_path):
    text = said(retrieval.main, run("satmips"), "--output", tmp_path / "x" / "r.jsonl", *CPU)
    assert rows_of(text)[1][:2] == ["satmips (table), seed 0", "image to metadata"]
    assert len(json_lines(tmp_path / "x" / "r.jsonl")) == 2
    assert "simclr reads no metadata" in refusal(retrieval.main, run("simclr"), *CPU)
    assert "--workers -1" in refusal(retrieval.main, run("simclr"), "--workers", -1)


@pytest.fixture()
def bare(dataset, tmp_path) -> Path:
    """The dataset without metadata and labels in test/."""
    folder = shutil.copytree(dataset, tmp_path / "bare")
    lines = [json.dumps({"file_name": f"{i}.png"}) + "\n" for i in range(16)]
    (folder / "test/metadata.jsonl").write_text("".join(lines))
    return folder


def test_a_test_split_without_labels_or_metadata(run, bare, capsys):
    """Refused in a line, or left out: no score of nothing, no NaN."""
    asked = (run("satmips"), "--data", bare, *CPU)
    for script in (missing, retrieval, ask):
        assert "gsd, timestamp, location missing in every row" in refusal(script.main, *asked)
    assert "no label to score" in refusal(few_labels.main, *asked)
    assert "no label to score" in refusal(baselines.main, bare, "--workers", 0)
    assert "no label to score" in refusal(leakage.main, *asked)
    pictures.main(list(map(str, (run("simclr"), "--data", bare, *CPU))))
    assert "no label_kind, no neighbours.png" in capsys.readouterr().out


def test_no_map_of_a_run_that_reads_no_location(run, dataset, tmp_path):
    p, splits, _ = opened(run("satmips"), dataset)
    p.reader = dataclasses.replace(p.reader, fields=p.reader.fields[:1])
    assert not pictures.places(p, splits, 0, tmp_path / "map.png")


def test_scoring_runs_with_and_without_metadata_together(run, tmp_path):
    """--modality image both: of SimCLR's the image alone."""
    argv = ["--checkpoint", run("simclr"), run("satmips"), "--modality", "image", "both", *CPU]
    said(evaluate.main, *argv, "--output", tmp_path / "x.jsonl")
    found = {(r["method"], r["features"]) for r in json_lines(tmp_path / "x.jsonl")}
    assert found == {("simclr", "image"), ("satmips", "image"), ("satmips", "both")}


def test_an_unfinished_run_is_no_run_of_its_full_length(run, tmp_path):
    state = torch.load(run("simclr") / "checkpoint.pt")
    state["config"]["epochs"] = 3  # of which one is done
    torch.save(state, tmp_path / "checkpoint.pt")
    p = evaluate.load_pretrained(tmp_path / "checkpoint.pt", torch.device("cpu"))
    assert p.about["epochs"] == 1 and p.about["step"] == 3


def test_answers_of_records():
    """Month and hour where the timestamp says them, the octave of the scale, a place in range."""
    months = [ask.answer("month", v) for v in ("2004-10", "2004", None, "2004-13")]
    assert months == [10, None, None, None]
    hours = [ask.answer("hour", v) for v in ("2015-09-21T15:30:08Z", "2015-09-21")]
    assert hours == [15, None]
    assert [ask.answer("gsd", v) for v in ([0.9, 1.1], 3.1, [0, 1])] == [1.0, 4.0, None]
    assert [ask.answer("place", v) for v in ([1, 2], [1, 91])] == [(1.0, 2.0), None]
    assert ask.answer("country", "PER") == "PER"


def test_ask_adds_up_a_gallery_of_single_fields(run, dataset, tmp_path):
    """Months by hand: softmax over records with nothing but a timestamp, added up by month."""
    p, (train_, test), (_, features) = opened(run("satmips"), dataset)
    images = common.embed(p, {"image": features["image"]})["image"]
    values = [r["timestamp"] for r in train_ if "timestamp" in r]
    classes, probabilities = ask.posterior(p, "month", values, images)
    gallery = common.metadata_features(p, [{"timestamp": v} for v in values])
    gallery = common.embed(p, {"metadata": gallery})["metadata"]
    right = []
    for i, record in enumerate(test):
        sums = np.zeros(13)
        scores = (gallery @ images[i] * p.model.logit_scale.exp()).softmax(0).tolist()
        for value, score in zip(values, scores):
            sums[int(parse_timestamp(value)[1])] += score
        assert np.abs(sums[classes] - probabilities[i].detach().numpy()).max() < 1e-5
        if "timestamp" in record:
            right.append(sums.argmax() == parse_timestamp(record["timestamp"])[1])
    result = ask.ask(p, (train_, test), images, "month")
    assert result["test"] == len(right) < 16 and result["accuracy"] == np.mean(right)
    rows = rows_of(said(ask.main, run("satmips"), "--places", tmp_path / "map.png", *CPU))
    assert [row[1] for row in rows] == ["asked for", "month", "gsd", "place"]
    assert rows[1][3].startswith("always the commonest: ") and "any training place" in rows[3][3]
    assert "km off" in rows[3][2] and Image.open(tmp_path / "map.png").height > 500


def test_missing_fields(run, dataset, tmp_path):
    """Nothing missing is the probe on image and metadata, beside it the image alone."""
    text = said(missing.main, run("satmips"), "--output", tmp_path / "m.jsonl", *CPU)
    found = {r["missing"]: r["accuracy"] for r in json_lines(tmp_path / "m.jsonl")}
    probe = {}
    for r in json_lines(run("satmips") / "results.jsonl"):
        if r["protocol"] == "linear" and r["method"] == "satmips":
            probe[r["features"]] = r["accuracy"]
    assert found["nothing"] == probe["both"] and found["image alone"] == probe["image"]
    fields = ["gsd", "timestamp", "location"]
    assert [*found][4:-2] == fields and "all fields" in found
    assert [row[0] for row in rows_of(text)[1:]] == [*found]
    mask = missing.masks(fields, 2000)
    assert not mask["nothing"].any()
    assert abs(mask["25% of all values"].mean() - 0.25) < 0.03 and mask["all fields"].all()
    assert mask["timestamp"].sum(axis=0).tolist() == [0, 2000, 0]


def test_leakage_by_distance(run, dataset, tmp_path):
    """Distances by hand; each image with label and place is in one group; sizes differ by 1."""
    text = said(leakage.main, run("satmips"), "--output", tmp_path / "l.jsonl", "--bins", 3, *CPU)
    found = json_lines(tmp_path / "l.jsonl")
    splits = data.read_dataset(dataset)
    places = [[common.location(r) for r in split] for split in splits]
    known = [common.unit_sphere([place])[0] for place in places[0] if place]
    km = []
    for record, place in zip(splits[1], places[1]):
        if place and "label_kind" in record:
            here = common.unit_sphere([place])[0]
            km.append(min(float(common.great_circle(here, other)) for other in known))
    image = [r for r in found if r["features"] == "image"]
    assert sum(r["test"] for r in image) == len(km) and len(image) == 3
    assert max(r["test"] for r in image) - min(r["test"] for r in image) <= 1
    assert abs(image[0]["from_km"] - min(km)) < 1e-6 > abs(image[-1]["to_km"] - max(km))
    kinds = ["image", "metadata", "both", "location alone"]
    assert [r["features"] for r in found[:4]] == kinds and rows_of(text)[0][3:7] == kinds
    assert "--bins 0" in refusal(leakage.main, run("satmips"), "--bins", 0, *CPU)
    near = {"method": "simclr", "label": "label", "features": "image", "test": 5, "accuracy": 0.5}
    limits = ({"from_km": km, "to_km": km + 0.01} for km in (0.11, 0.13))
    rows = rows_of(leakage.table([near | limit for limit in limits]))
    assert [row[1] for row in rows[1:]] == ["0.1 to 0.1 km"] * 2, "of one region, each group a row"


# --------------------------------------------------------------------------------------------------
# Baselines, few labels, export


def test_identity_is_the_standardised_row(tmp_path):
    """A missing number is the mean, a missing or new category all zero."""
    for split, platforms in (("train", ("a", "b", None)), ("test", ("b", "new", None))):
        (tmp_path / split).mkdir()
        with open(tmp_path / split / "metadata.jsonl", "w") as file:
            for platform, gsd in zip(platforms, (1.0, 3.0, None)):
                record = {"file_name": "x", "sensor_platform": platform, "gsd": gsd}
                file.write(json.dumps(record) + "\n")
    splits = data.read_dataset(tmp_path)
    train_, test = baselines.identity(splits, "gsd,sensor_platform", tmp_path)
    assert train_.tolist() == [[-1, -1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
    assert test.tolist() == [[-1, -1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_baselines(dataset, tmp_path):
    """Colours and hemispheres tell the two kinds apart."""
    rows = rows_of(said(baselines.main, dataset, "--output", tmp_path / "b.jsonl", *CPU[2:]))
    assert [row[0] for row in rows[1:]] == ["histograms, image", "location, metadata",
                                            "identity, metadata"]  # fmt: skip
    found = {(r["method"], r["protocol"]): r["accuracy"] for r in json_lines(tmp_path / "b.jsonl")}
    assert found["histograms", "linear"] == 1 and found["location", "linear"] > 0.75


def test_few_labels(run, dataset, tmp_path, monkeypatch):
    """Subsets are shared and nested; all labels give evaluate.py's kNN; a restart adds nothing."""
    known = torch.arange(10, 40)
    assert torch.equal(few_labels.subset(known, 5, 3), few_labels.subset(known, 20, 3)[:5])
    assert not torch.equal(few_labels.subset(known, 5, 3), few_labels.subset(known, 5, 4))
    monkeypatch.setattr(few_labels, "COUNTS", ((10, 1), (0, 20)))
    argv = [run("simclr"), "--subsets", 3, "--histograms", "--random", *CPU]
    argv += ["--output", tmp_path / "few.jsonl"]
    said(few_labels.main, *argv)
    found = json_lines(tmp_path / "few.jsonl")
    assert [r["method"] for r in found] == ["simclr"] * 2 + ["random"] * 2 + ["histograms"] * 2
    for r in json_lines(run("simclr") / "results.jsonl"):
        if r.get("k") == 20 and r["method"] == "simclr":
            assert r["accuracy"] == found[1]["accuracy"]
    assert found[0]["subsets"] == 3 and found[1]["subsets"] == 1 and found[5]["accuracy"] == 1
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found[:-1]))
    text = said(few_labels.main, *argv)
    assert json_lines(tmp_path / "few.jsonl") == found and text.count(" 0 of 2 to score") == 2
    assert "\nuntrained, untrained vit_micro, seed 0: 0 of 2 to score\nhistograms: 1 of 2" in text
    assert rows_of(said(tables.main, tmp_path / "few.jsonl"))[0][1:] == [
        "10 labels k=1", f"{found[1]['labelled']} labels k=20",
    ]  # fmt: skip


def test_few_labels_says_why_there_is_nothing_to_score(run, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(few_labels, "COUNTS", ((50, 1), (0, 60)))
    line = refusal(few_labels.main, run("simclr"), *CPU)
    assert "metadata.jsonl: fewer than 50 training images with a label (kind 4" in line
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / split / "x.png")
        (tmp_path / split / "metadata.jsonl").write_text('{"file_name": "x.png"}\n')
    line = refusal(few_labels.main, run("simclr"), "--data", tmp_path, *CPU)
    assert line.endswith("metadata.jsonl: no label to score")


def test_export_checks_before_it_writes(run, tmp_path):
    line = refusal(export.main, run("simclr"), tmp_path / "out", "--features", tmp_path / "x", *CPU)
    assert "--features" in line and "no such folder" in line and not (tmp_path / "out").exists()


def test_timm_takes_the_export(run, dataset, tmp_path):
    """The header's lines, run: the same features as ours, with the standardisation in the JSON."""
    timm = pytest.importorskip("timm")
    said(export.main, run("satmips"), tmp_path, "--features", dataset, *CPU)
    names = ["encoder.json", "encoder.pt", "test.json", "test.npy", "train.json", "train.npy"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    files = json.loads((tmp_path / "test.json").read_text())
    images = [data.load_image(dataset / "test" / name, 32) for name in files]
    images = data.plain(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    snippet = "\n".join(re.findall(r"^    (?!python)(.*)$", export.__doc__, re.MULTILINE))
    names = {"images": images, "timm": timm, "torch": torch}
    exec(snippet.replace("OUT/", f"{tmp_path}/"), names)
    ours = torch.from_numpy(np.load(tmp_path / "test.npy"))
    assert (names["features"] - ours).abs().max() < 1e-4
    p, _, (_, features) = opened(run("satmips"), dataset)
    assert (features["image"] - ours).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------
# Variants and evidence


def test_variants(dataset, tmp_path):
    """Shuffled: the same metadata in other rows, labels where they were. Images can be read."""
    records = [*data.read_dataset(dataset)[0]]
    for kind in variants.KINDS:
        said(variants.main, kind, dataset, tmp_path / kind)
        train_, test = data.read_dataset(tmp_path / kind)
        data.load_image(train_.folder / train_[0]["file_name"], 32)
        assert len(test) == 16
    shuffled = [*data.read_dataset(tmp_path / "shuffled")[0]]
    for name, same in (("label_kind", True), ("location", False), ("gsd", False)):
        columns = [[r.get(name) for r in rows] for rows in (records, shuffled)]
        assert (columns[0] == columns[1]) == same
        assert sorted(map(str, columns[0])) == sorted(map(str, columns[1]))
    scales = {k: {r["gsd"] for r in data.read_dataset(tmp_path / k)[0]} for k in ("coarse", "fine")}
    assert scales == {"coarse": {20000.0}, "fine": {1000.0}}
    fields = data.choose_fields(tmp_path / "rounded", "")
    assert [f.style for f in fields if f.kind == "number"] == ["%.0f", "%.0f"]
    assert "exists" in refusal(variants.main, "fine", dataset, tmp_path / "fine")


def test_evidence_says_what_is_missing(tmp_path):
    """Commands in their order; nothing that is there is run again."""
    argv = ["shuffled", "--list", "--seeds", 0, "--folder", tmp_path, "--data", tmp_path / "demo"]
    lines = said(evidence.main, *argv).splitlines()
    kinds = [line.split()[1] if line.split()[1] != "-m" else line.split()[2] for line in lines]
    once = ["train.py", "evaluate.py", "experiments.few_labels"]
    assert kinds == [*once, *once, "experiments.variants", *once, "0"]
    folder = tmp_path / "simclr-0"
    folder.mkdir()
    torch.save({"log": [{"epoch": 4.0}]}, folder / "checkpoint.pt")
    assert said(evidence.main, *argv).splitlines()[:-1] == lines[1:-1], "its last epoch is there"
    torch.save({"log": [{"epoch": 3.0}]}, folder / "checkpoint.pt")
    row = {"checkpoint": str(folder / "checkpoint.pt"), "features": "image", "epochs": 8,
           "label": "label_climate", "method": "simclr", "data": str(tmp_path / "demo")}
    results.append(tmp_path / "scores.jsonl", [row | {"protocol": "linear"}])
    assert said(evidence.main, *argv).splitlines() == lines, "scores of another length"
    row["epochs"] = 4
    results.append(tmp_path / "scores.jsonl", [row | {"protocol": "linear"}])
    assert said(evidence.main, *argv).splitlines()[:2] == [lines[0], lines[2]], "few labels missing"
    results.append(tmp_path / "scores.jsonl", [row | evidence.LAST_FEW])
    assert said(evidence.main, *argv).splitlines()[:-1] == lines[3:-1], "scored: not trained again"
    assert "nonsense: not one of few-labels" in refusal(evidence.main, "nonsense")
    assert said(evidence.main, "shuffled", "--list") == "shuffled: 9 of 9 runs were there\n"
    text = said(evidence.main, "--list", "--folder", tmp_path)
    assert re.findall(r"of (\d+) runs", text) == ["15", "18", "15", "9", "15", "3", "6"], "seeds"


# --------------------------------------------------------------------------------------------------
# The repository and its READMEs

ARROWS = {  # what each of the six files imports of ours
    "metadata": set(), "losses": set(), "model": {"losses"}, "data": {"metadata"},
    "evaluate": {"model", "data", "metadata", "losses"},
    "train": {"evaluate", "model", "data", "metadata", "losses"},
}  # fmt: skip


def test_arrows_go_one_way():
    """The six files import one another in one direction, never the scripts; neither they nor their
    tests draw pictures or progress bars; everything else is in requirements.txt."""
    required = set(re.findall(r"(?m)^\w+", (ROOT / "requirements.txt").read_text()))
    known = {*sys.stdlib_module_names, *required, "PIL", *ARROWS}
    for path in ROOT.glob("*.py"):
        lines = re.findall(r"(?m)^ *(?:from ([\w.]+) import|import ([\w.]+))", path.read_text())
        found = {"".join(names).split(".")[0] for names in lines}
        assert not found & {"prepare", "experiments", "matplotlib", "tqdm"}, path
        if path.stem in ARROWS:
            assert found <= known and found & ARROWS.keys() == ARROWS[path.stem], path


@pytest.mark.parametrize("program, most", [(train, 25), (evaluate, 12)], ids=["train", "evaluate"])
def test_options_are_few_and_explained(program, most, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    listed = capsys.readouterr().out.split("-h, --help")[1].split("\n  --")[1:]
    assert stopped.value.code == 0 and 8 < len(listed) <= most
    for option in listed:
        words = re.split(r"\n? {2,}", option.strip(), maxsplit=1)
        assert len(words) == 2 and len(words[1]) > 8, f"--{option} has no help"


def test_differences_from_the_paper_are_marked():
    """NOTE[PAPER]: the paper leaves it open; NOTE[DIFF]: we depart from it; each with a reason."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        marks = re.findall(r"\bNOTE\b.*", path.read_text())
        if not path.stem.startswith("test_"):
            assert all(re.match(r"NOTE\[(PAPER|DIFF)\] \S+ \S+", m) for m in marks), path
            assert marks or path.stem not in ("metadata", "model", "losses", "data", "train"), path


def test_documented_commands_have_their_options(capsys):
    """Every option in README.md is one of the program before it; every program is there."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    program = r"(train\.py|evaluate\.py|(?:experiments|prepare)\.[a-z_0-9]+)\b([^`\n|]*)"
    programs = re.findall(program, text)
    asked = {}
    for program, rest in programs:
        asked.setdefault(program, set()).update(re.findall(r"--[a-z][a-z-]*", rest))
    scripts = {f"experiments.{p.stem}" for p in HERE.glob("*.py") if "\ndef main(" in p.read_text()}
    assert len(scripts) > 15 and scripts <= {*asked}
    for program, options in asked.items():
        with pytest.raises(SystemExit):
            importlib.import_module(program.removesuffix(".py")).main(["--help"])
        known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        if program == "experiments.cost":  # takes those of train.py
            known |= {"--" + name.replace("_", "-") for name in train.Config.__dataclass_fields__}
        assert options <= known, (program, options - known)


def commands(document: Path) -> list[list[str]]:
    """The words of each python or torchrun command in its blocks of shell; a loop's first round."""
    blocks = re.findall(r"(?ms)^```(?:bash|sh|shell)\n(.*?)^```", document.read_text())
    text, found = "".join(blocks).replace("\\\n", " "), []
    first = dict(re.findall(r"for (\w+) in (\S+)", text))
    text = re.sub(r"\$\{?(\w+)\}?", lambda name: first.get(name[1], "1"), text)
    for line in text.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        words = list(words)
        for i, word in enumerate(words):
            if word in ("python", "python3", "torchrun"):
                end = itertools.takewhile(lambda w: not set(w) <= set(";&|<>()"), words[i:])
                found.append(list(end))
    return found


@pytest.mark.parametrize("document", ["README.md", "prepare/README.md", "experiments/README.md"])
def test_documented_commands_are_understood(document, monkeypatch):
    """Each names a program that is here, and options that this program has."""
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def only_parse(self, argv=None, namespace=None, parse=parse):
            parse(self, argv, namespace)
            raise EOFError("understood")

        monkeypatch.setattr(argparse.ArgumentParser, name, only_parse)
    checked = 0
    for launcher, program, *argv in commands(ROOT / document):
        while launcher == "torchrun" and program.startswith("--") or program == "-m":
            program, *argv = argv
        if program in ("pytest", "venv", "pip"):
            continue
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        assert ROOT in Path(module.__file__).parents
        if hasattr(module, "main"):
            with pytest.raises(EOFError, match="understood"):
                module.main(argv)
        checked += 1
    assert checked
