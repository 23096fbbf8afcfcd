# ruff: noqa: F821 (the import of the first half goes when both become test_all.py)
import argparse
import copy
import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import losses
import metadata
import model
import train
import test_all_a

globals().update({k: v for k, v in vars(test_all_a).items() if not k.startswith(("test_", "__"))})

# --- train.py -------------------------------------------------------------------------------------


def complaint(capsys, main: Callable, *argv) -> str:
    """The one line with which a program refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    line = stopped.value.code
    if not isinstance(line, str):  # argparse prints its own
        line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in line and not regex.search(r"\n|0x[0-9a-f]{6}|\w+Error\b", line), line
    return line


def config_of(options: str = "", **changes) -> train.Config:
    return dataclasses.replace(train.parse_config(["--data", "DIR", *options.split()]), **changes)


BASES = {  # from metadata, of two views; learning rate for a batch of 256, weight decay
    "simclr": (False, "simclr", 2e-4, 0.1), "satmip": (True, "none", 3.125e-5, 0.5),
    "satmips": (True, "simclr", 1.875e-4, 0.1), "moco": (False, "moco", 0.03, 1e-4),
}  # fmt: skip
PLUS = itertools.product(("simclr", "satmips", "moco"), ("-geo", "-tp", "-geo-tp"))
METHODS = [*BASES, *map("".join, PLUS)]


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_rows_of_options(method):
    c = config_of(f"--method {method}")
    assert (c.metadata, c.image_image, c.base_lr, c.weight_decay) == BASES[method.split("-")[0]]
    assert (c.geo, c.temporal) == ("geo" in method, "tp" in method)
    if c.image_image == "moco":  # its authors' recipe
        assert (c.optimizer, c.vit, c.batch_size, c.warmup_epochs) == ("sgd", "resnet50", 256, 0)
        assert (c.queue, c.temperature, c.mlp_out) == (65536, 0.2, 128)


def test_what_is_given_goes_over_the_preset_over_the_method_over_the_paper():
    paper, demo = config_of(), train.parse_config([])
    assert (paper.method, paper.vit, paper.image_size) == ("satmips", "vit_small", 224)
    assert (paper.batch_size, paper.epochs, paper.augment) == (1024, 200, "strong")
    assert (paper.metadata_encoder, paper.metadata_width) == ("text", 512)
    assert config_of("--metadata-encoder table").metadata_width == 192
    assert (paper.temperature, paper.loss_weight, paper.output) == (0.1, 1, "runs/satmips")
    assert (demo.vit, demo.image_size, demo.augment) == ("vit_micro", 64, "crop")
    assert dataclasses.replace(demo, data="DIR") == config_of("--preset small")
    moco = train.parse_config(["--method", "moco", "--epochs", "7", "--base-lr", "0.5"])
    assert (moco.epochs, moco.base_lr, moco.vit) == (7, 0.5, "vit_micro")
    assert (moco.image_image, moco.temperature) == ("moco", 0.2), "what the preset does not set"


WRONG_OPTIONS = (
    "--method simclr --decouple-views", "--method satmip --decouple-views", "--epochs many",
    "--method moco --micro-batch 8", "--method nope", "--nope 1", "--epochs 0", "--batch-size 0",
    "--image-size 33", "--log-every 0", "--workers -1", "--base-lr nan", "--temperature 0",
    "--seed 99999999999999999999",
)  # fmt: skip


@pytest.mark.parametrize("options", WRONG_OPTIONS)
def test_wrong_options_are_one_line(options, capsys):
    line = complaint(capsys, train.main, "--data", "nowhere", *options.split())
    assert regex.findall(r"--[\w-]+", options)[-1] in line


def test_learning_rate():
    """1e-6 at step 0, base_lr x batch / 256 after the warm-up, a cosine to 1e-5 at the last."""
    config = config_of(base_lr=2.0, batch_size=128, epochs=10, warmup_epochs=2)
    rate = [train.learning_rate(config, step, 5) for step in range(51)]
    last = 1e-5 + (1 - 1e-5) * (1 + math.cos(math.pi * 39 / 40)) / 2
    expected = {0: 1e-6, 5: (1 + 1e-6) / 2, 10: 1.0, 30: (1 + 1e-5) / 2, 49: last, 50: 1e-5}
    assert all(abs(rate[step] - value) < 1e-9 for step, value in expected.items())
    assert train.learning_rate(dataclasses.replace(config, warmup_epochs=0), 0, 5) == 1.0


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> Path:
    """121 train and 25 test images of 32 px: enough places for Geo, two dates of each area."""
    folder, records = tmp_path_factory.mktemp("places") / "places", []
    for i in range(121):
        records.append({
            "gsd": [1.0 + i % 5, 2.0], "timestamp": f"2004-{1 + i % 12:02d}-03",
            "location": [3.0 * (i // 2) - 170, 1.0 * (i % 80)], "area": f"a{i // 2}",
            "label_half": i // 2 % 2, "label_third": "abc"[i % 3],
        })  # fmt: skip
    write_split(folder / "train", records)
    write_split(folder / "test", records[:25])
    return folder


SMALL = (  # runs that a CPU finishes in a second
    "--preset small --vit vit_micro --image-size 32 --metadata-encoder table --batch-size 40 "
    "--epochs 2 --workers 0 --eval-every 1 --log-every 2"
).split()


def images_in(folder: Path, rows: list[int]) -> torch.Tensor:
    """uint8 [B, 3, 32, 32] of write_split."""
    files = [np.array(Image.open(folder / f"{row}.png")) for row in rows]
    return torch.from_numpy(np.stack(files)).permute(0, 3, 1, 2)


VIEWS = {"satmip": 1, "simclr-tp": 2, "satmips-tp": 2, "satmips-tp --decouple-views": 3, "moco": 2}


@pytest.mark.parametrize("options", VIEWS)
def test_views(options, places):
    """As many as the method needs, each drawn for its view, epoch and row, and standardised; the
    last one of "tp" shows another date of the same area."""
    argv = [*SMALL, "--data", str(places), "--augment", "strong", "--method", *options.split()]
    d = train.TrainingData(train.parse_config(argv))
    loaded = next(d.batches(4, 5))  # 121 // 40 steps an epoch, so this is of epoch 1
    views, rows = train.make_batch(loaded, 4, d, torch.device("cpu")).views, loaded.rows.tolist()
    assert views.shape == (VIEWS[options], 40, 3, 32, 32)
    for view in range(len(views)):
        if "-tp" in options and view == len(views) - 1:
            rows = [row ^ 1 if row < 120 else row for row in rows]
        draws = data.draw(data.POLICIES["strong"], 32, 0, 1, loaded.rows, view)
        expected = data.augment(images_in(places / "train", rows), draws, 32)
        assert worst(views[view], data.standardise(expected, *d.statistics)) < 1e-5


def one_step(m, batch: train.Batch, config: train.Config, optimizer=None, half=None) -> dict:
    """A step on this process -> its figures; without an optimizer the gradients alone."""
    optimizer = optimizer or torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    amp = torch.autocast("cpu", half, enabled=half is not None)
    figures = train.train_step(m, m, optimizer, scaler, batch, config, amp)
    assert not torch.is_autocast_enabled("cpu"), "losses and optimizer are in float32"
    return figures


def model_for(config: train.Config, encoder: str, **sizes) -> model.SatMIP:
    sizes = {"queue": 24, "places": 3 * config.geo} | sizes
    return small_model(encoder, config.image_image, **sizes).train()


def batch_for(config: train.Config, encoder: str) -> train.Batch:
    views, meta = small_batch(8, train.view_count(config), encoder)
    return train.Batch(views, meta, torch.arange(8) % 3)


@pytest.mark.parametrize(
    "method, encoder", [("satmips", "table"), ("satmips", "text"), ("moco-geo", "none")]
)
def test_micro_batches_under_autocast(method, encoder):
    """In bfloat16, too, pieces of 3 of 8 samples have the figures and gradients of the whole."""
    found = []
    for count in ("0", "3"):
        config = config_of(f"--vit vit_micro --method {method} --micro-batch {count}")
        m, batch = model_for(config, encoder), batch_for(config, encoder)
        figures = one_step(m, batch, config, half=torch.bfloat16)
        found.append(figures | {n: p.grad for n, p in m.named_parameters() if p.requires_grad})
    for name, value in found[0].items():
        assert worst(value, found[1][name]) <= 2e-6 + 0.05 * value.abs().max(), name


def test_options_reach_the_loss_and_the_temperature_is_clamped():
    """exp(logit_scale) starts at 1 / 0.07 as CLIP's and stays within 1 and 100."""
    config = config_of("--vit vit_micro --loss-weight 0.3 --temperature 0.2 --same-view-negatives")
    m, batch = model_for(config, "table"), batch_for(config, "table")
    expected, _ = losses.total_loss(m(batch.views, batch.metadata), None, 0.3, 0.2, True)
    figures = one_step(model_for(config, "table"), batch, config)
    assert worst(figures["loss"], expected) < 1e-5 and worst(figures["temperature"], 0.07) < 1e-6
    for before, after in ((9.0, math.log(100)), (-1.0, 0.0)):
        m.logit_scale.data.fill_(before)
        one_step(m, batch, config)
        assert abs(m.logit_scale - after) < 1e-6


def test_moco_step():
    """The keys' encoder follows the queries' by a thousandth; its keys replace the oldest."""
    config = config_of("--method moco --vit vit_micro")
    m, batch = model_for(config, "none", queue=20), batch_for(config, "none")
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1)
    for step in range(3):
        before = copy.deepcopy(m)
        one_step(m, batch, config, optimizer)
        at = [(8 * step + i) % 20 for i in range(8)]
        expected = before.key_encoder.queue.clone()
        expected[at] = before.key_encoder(batch.views[1])
        assert worst(m.key_encoder.queue, expected) < 1e-5
        now = zip(m.key_encoder.parameters(), before.key_encoder.parameters(), strict=True)
        fast = [*m.image_encoder.parameters(), *m.image_mlp.parameters()]
        for (slow, old), new in zip(now, fast, strict=True):
            assert worst(slow, 0.999 * old + 0.001 * new) < 1e-6 and not torch.equal(old, new)


@pytest.mark.parametrize(
    "method, encoder",
    [("simclr-geo", "none"), ("moco-geo", "none"), ("satmip", "text"), ("satmips-geo", "table")],
)  # fmt: skip
def test_methods_overfit(method, encoder):
    """Some dozens of steps on 16 samples, and each embedding finds its partner, in every task."""
    config, (_, meta) = config_of(f"--method {method} --vit vit_micro"), small_batch(16, 1, encoder)
    views, half = images_of(16, 32) / 64 - 2, 16
    views, places = torch.stack([views, views.flip(3)]), torch.arange(16) % 3
    if encoder == "table":
        meta = (torch.randn(16, 4), torch.zeros(16, 1).long())
    if "moco" in method:
        half = 8  # the queue holds the keys of the other half
    m = model_for(config, encoder, queue=8, vocabulary=20, context=6)
    optimizer = torch.optim.AdamW(model.parameter_groups(m, 0.1), lr=5e-4, betas=(0.9, 0.98))
    for step in range(120):
        part = slice(step * half % 16, step * half % 16 + half)
        described = tuple(x[part] for x in meta)
        batch = train.Batch(views[: train.view_count(config), part], described, places[part])
        figures = one_step(m, batch, config, optimizer)
        right = [value for name, value in figures.items() if name.startswith("accuracy")]
        if step >= 20 and min(right) >= 0.9:  # by then MoCo's queue holds keys of images
            break
    assert len(right) == config.metadata + config.geo + (config.image_image != "none")
    assert min(right) >= 0.9


@pytest.fixture(scope="session")
def run(places, tmp_path_factory):
    """Method -> folder of a finished run of it; each is trained once, when first asked for."""

    @functools.cache
    def finished(method: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / method
        train.main(arguments(places, folder, method))
        return folder

    return finished


def arguments(folder: Path, output: Path, method: str, *more) -> list[str]:
    argv = [*SMALL, "--data", folder, "--output", output, "--method", method, *more]
    return [str(word) for word in argv]


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoint(folder: Path) -> dict:
    """Tensors and plain types only, or torch would refuse it."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b) -> bool:
    """Bit by bit, all through."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_and_score(method, run, places, capsys):
    """Its losses are logged, its checkpoint is plain and can be scored by the run's folder."""
    folder, config = run(method), config_of(f"--method {method}")
    log, state = json_lines(folder / "log.jsonl"), checkpoint(folder)
    assert [(line["step"], 3 * line["epoch"]) for line in log] == [(2, 2), (3, 3), (4, 4), (6, 6)]
    terms = {"L_MI": config.metadata, "L_Sim": config.image_image != "none", "L_g": config.geo}
    for line in log:
        assert math.isfinite(line["loss"]) and {t: t in line for t in terms} == terms
    knn = {f"knn_label_{label}_k{k}" for label in ("half", "third") for k in (1, 5, 20, 100)}
    assert knn <= log[1].keys() and not knn & (log[0].keys() | log[2].keys()), "after each epoch"
    pixels = images_in(places / "train", range(121)).numpy() / 255
    assert worst(state["statistics"], [pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))]) < 1e-6
    assert state["step"] == 6 and state["config"]["method"] == method
    if config.metadata:
        reader = TableReader.fit(data.Split(places / "train"), DEFAULT)
        assert state["reader"]["mean"] == reader.mean and len(state["reader"]["fields"]) == 3
    kinds = ["image", "both"][: 1 + config.metadata]
    results = scored(capsys, "--checkpoint", folder, "--modality", *kinds)
    assert len(results) == len(kinds) * 2 * 4 and {r["method"] for r in results} == {method}


def test_moco_with_resnet50_as_its_authors_train_it(dataset, tmp_path, capsys):
    """SGD with momentum, decay of every parameter; on one process, no shuffling BN: said."""
    argv = ["--method", "moco", "--data", dataset, "--output", tmp_path, "--image-size", 32]
    argv += ["--batch-size", 24, "--epochs", 1, "--workers", 0]
    train.main([str(word) for word in argv])
    assert regex.search("one process.*shuffl", capsys.readouterr().out)
    state = checkpoint(tmp_path)
    assert state["model"]["image_encoder.conv1.weight"].shape == (64, 3, 7, 7)
    (group,) = state["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)


def test_resuming_refuses_other_options_and_other_data(run, places, dataset, tmp_path, capsys):
    """With nothing changed, a finished run is left as it is and scored again."""
    folder = shutil.copytree(run("satmip"), tmp_path / "run")
    for option in ("--seed 1 0", "--base-lr 0.5 0.006", "--fields gsd gsd,", "--vit vit_tiny vit_"):
        name, new, old = option.split()
        line = complaint(capsys, train.main, *arguments(places, folder, "satmip", name, new))
        needles = (str(folder), name.strip("-").replace("-", "_"), new, old)
        assert all(needle in line for needle in needles)
    shutil.copytree(places, tmp_path / "data")
    for path in (tmp_path / "data/train").glob("*0.png"):
        Image.new("RGB", (32, 32)).save(path)
    line = complaint(capsys, train.main, *arguments(tmp_path / "data", folder, "satmip"))
    assert "other training" in line
    before = [(folder / name).read_bytes() for name in ("checkpoint.pt", "log.jsonl")]
    train.main(arguments(places, folder, "satmip", "--workers", 1))
    assert [(folder / name).read_bytes() for name in ("checkpoint.pt", "log.jsonl")] == before


class Malice:
    def __reduce__(self):  # unpickled, it makes a file
        return open, ("malice", "w")


SPOILT = {  # what may be in the place of a checkpoint
    "torn": lambda path, state: os.truncate(path, 9_999),
    "text": lambda path, state: path.write_text("hello\n"),
    "weights": lambda path, state: torch.save(state | {"model": []}, path),
    "sizes": lambda path, state: torch.save(state | {"model_config": {"vit": 3}}, path),
    "options": lambda path, state: torch.save(state | {"config": 1}, path),
    "malice": lambda path, state: torch.save(state | {"step": Malice()}, path),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_checkpoint_is_one_line(what, run, places, tmp_path, capsys, monkeypatch):
    """Neither scored nor trained over, and no code in it is run."""
    folder = shutil.copytree(run("simclr"), tmp_path / "run")
    path = folder / "checkpoint.pt"
    monkeypatch.chdir(tmp_path)
    SPOILT[what](path, checkpoint(folder))
    content = path.read_bytes()
    argv = ["--checkpoint", path, "--data", places, "--workers", 0]
    assert str(path) in complaint(capsys, evaluate.main, *argv)
    assert str(folder) in complaint(capsys, train.main, *arguments(places, folder, "simclr"))
    assert path.read_bytes() == content and not Path("malice").exists()


def spawn(work: Callable, *args):
    """A process of its own, forked from one that has imported everything."""
    multiprocessing.set_forkserver_preload([__name__])
    started = multiprocessing.get_context("forkserver").Process(target=work, args=args)
    started.start()
    return started


def wait(happened: Callable, process) -> None:
    while not happened():
        assert process.is_alive()
        time.sleep(0.01)


def save_again_and_again(path: Path) -> None:
    for i in itertools.count():
        train.save(path, {"step": i, "model": torch.full((500_000,), float(i))})


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    """kill -9 at random moments of a process that does nothing but save."""
    path, rng, steps = tmp_path / "checkpoint.pt", random.Random(0), []
    for _ in range(6):
        process = spawn(save_again_and_again, path)
        wait(path.exists, process)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        state = torch.load(path)
        assert (state["model"] == state["step"]).all()
        steps.append(state["step"])
        path.unlink()
    assert max(steps) > 0, "killed after the first save, too"


def run_program(argv: list[str], environment: dict, said: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(said, "a")
    train.main(argv)


def start(folder: Path, argv: list[str], world: int = 1) -> list:
    """train.py on `world` processes, as torchrun starts them; folder/said-r has rank r's output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started, environment = [], {}
    for r in range(world):
        if world > 1:
            environment = meeting | {"RANK": str(r), "LOCAL_RANK": str(r)}
            environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))
        started.append(spawn(run_program, argv, environment, folder / f"said-{r}"))
    return started


def codes(processes: list) -> list[int | None]:
    """Exit codes, negative for signals; None for a process that hangs."""
    for process in processes:
        process.join(120)
    found = [process.exitcode for process in processes]
    return [process.kill() or code for process, code in zip(processes, found)]


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """What two runs have in common if they computed the same: all but names and times."""
    state, log = checkpoint(folder), json_lines(folder / "log.jsonl")
    del state["config"]["output"], state["log"]
    for line in log:
        del line["seconds"], line["images_per_second"]
    return state, log


@pytest.mark.parametrize("method, more", [("satmips-geo-tp", ""), ("moco", "--micro-batch 7")])
def test_killed_and_stopped_runs_end_like_an_undisturbed_one(method, more, places, tmp_path):
    """kill -9 at random moments, SIGTERM, SIGUSR1: at the end the same weights, moments and log,
    bit by bit. A signal ends a run at its next log line, with a checkpoint of that step."""
    more = ("--epochs", 9, "--batch-size", 20, "--workers", 1, *more.split())
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert codes(start(tmp_path, arguments(places, whole, method, *more))) == [0]
    log, rng = folder / "log.jsonl", random.Random(0)
    between = np.median([line["seconds"] for line in json_lines(whole / "log.jsonl")])
    argv = arguments(places, folder, method, *more)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1):
        before = log.read_bytes() if log.exists() else b""
        (process,) = start(tmp_path, argv)
        wait(lambda: log.exists() and log.read_bytes() != before, process)  # an epoch is done
        time.sleep(rng.uniform(0, 3 * between))
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            assert codes([process]) == [-signal.SIGKILL]
            continue
        assert codes([process]) == [0] and "told to stop" in (tmp_path / "said-0").read_text()
        assert json_lines(log)[-1]["step"] == checkpoint(folder)["step"] < 54
    assert codes(start(tmp_path, argv)) == [0]
    assert all(map(same, outcome(folder), outcome(whole)))


def test_two_processes_act_as_one(places, tmp_path):
    """torchrun: the losses of one process. One rank is told to stop: both do, and go on to the same
    bits as undisturbed; another number of processes goes on with the same data."""
    more = ("--epochs", 5, "--log-every", 1, "--decouple-views", "--base-lr", 1e-3)
    whole, alone, stopped, one = (tmp_path / name for name in ("whole", "alone", "stopped", "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(HERE / "train.py"), *arguments(places, whole, "satmips", *more)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train.main(arguments(places, alone, "satmips", *more))
    for ours, theirs in zip(json_lines(whole / "log.jsonl")[:6], json_lines(alone / "log.jsonl")):
        for name in ("loss", "L_MI", "L_Sim", "accuracy_MI", "accuracy_Sim", "temperature"):
            assert abs(ours[name] - theirs[name]) < 1e-4, name

    argv, log = arguments(places, stopped, "satmips", *more), stopped / "log.jsonl"
    processes = start(tmp_path, argv, world=2)
    wait(lambda: log.exists() and log.read_text(), processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    assert codes(processes) == [0, 0] and "told to stop" in (tmp_path / "said-0").read_text()
    step = checkpoint(stopped)["step"]
    assert step == json_lines(log)[-1]["step"] < 15
    shutil.copytree(stopped, one)
    assert codes(start(tmp_path, argv, world=2)) == [0, 0]
    assert all(map(same, outcome(stopped), outcome(whole)))
    train.main(arguments(places, one, "satmips", *more))
    ours, theirs = (json_lines(folder / "log.jsonl")[step] for folder in (one, whole))
    assert ours["step"] == step + 1 and abs(ours["loss"] - theirs["loss"]) < 1e-3


WRONG_DATA = {  # what is done to train/, options -> what the line names
    "missing image": (lambda folder: (folder / "3.png").unlink(), "", "train/3.png: no such"),
    "torn image": (lambda folder: os.truncate(folder / "4.png", 500), "", "train/4.png"),
    "no rows": (lambda folder: (folder / "metadata.jsonl").write_text(""), "", "jsonl: no rows"),
    "large batch": (Path.touch, "--batch-size 122", "--batch-size 122"),
    "unknown field": (Path.touch, "--fields altitude", "'altitude'"),
    "diverged": (Path.touch, "--base-lr 2e9 --warmup-epochs 0", "not finite before step 2"),
    "field twice": (Path.touch, "--fields gsd,gsd", "--fields gsd,gsd"),
}


@pytest.mark.parametrize("what", WRONG_DATA)
def test_wrong_data_is_one_line(what, places, tmp_path, capsys):
    """It names the file, also when a worker found it, the option or the step; nothing is saved."""
    change, options, needle = WRONG_DATA[what]
    folder = shutil.copytree(places, tmp_path / "data")
    change(folder / "train")
    argv = arguments(folder, tmp_path / "run", "satmip", "--workers", 1, *options.split())
    assert needle in complaint(capsys, train.main, *argv)
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_training_starts_from_given_weights(run, places, tmp_path, capsys):
    """--init: the image encoder is the checkpoint's, MoCo's slow copy, too; another is refused."""
    more = ("--init", run("simclr"), "--base-lr", 1e-12, "--batch-size", 121)
    train.main(arguments(places, tmp_path / "run", "moco", *more))
    ours, theirs = checkpoint(tmp_path / "run")["model"], checkpoint(run("simclr"))["model"]
    names = [name for name in theirs if name.startswith("image_encoder.")]
    assert len(names) == 54
    for name in names:
        slow = name.replace("image_encoder.", "key_encoder.encoder.")
        assert worst(ours[name], theirs[name]) < 1e-4 and worst(ours[slow], theirs[name]) < 1e-4
    other = arguments(places, tmp_path / "x", "satmip", *more, "--vit", "vit_tiny")
    assert "vit_tiny" in complaint(capsys, train.main, *other)


# --- evaluate.py ----------------------------------------------------------------------------------


def pretrained(folder: Path) -> evaluate.Pretrained:
    p = evaluate.load_pretrained(folder / "checkpoint.pt", torch.device("cpu"))
    p.statistics = p.statistics or checkpoint(folder)["statistics"]
    return p


def features_by_hand(p: evaluate.Pretrained, split: data.Split) -> dict[str, torch.Tensor]:
    """One image after the other."""
    images = images_in(split.folder, range(len(split))) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in p.statistics)
    with torch.no_grad():
        found = {"image": [p.model.image_encoder(x[None])[0] for x in (images - mean) / std]}
        found["metadata"] = [p.model.metadata_encoder(*p.reader([r]))[0] for r in split]
    return {name: torch.stack(rows) for name, rows in found.items()}


def extracted(rank: int, world: int, folder: Path, dataset: Path) -> dict[str, torch.Tensor]:
    return evaluate.extract(pretrained(folder), data.Split(dataset / "test"), 0)


def test_features(run, places):
    """Those of each image by itself, in the order of the rows; the same on one and two processes,
    which share an odd number of rows."""
    expected = features_by_hand(pretrained(run("satmips")), data.Split(places / "test"))
    alone = extracted(0, 1, run("satmips"), places)
    assert [x.shape for x in alone.values()] == [(25, 128), (25, 128)]
    for found in (alone, *on_processes(2, extracted, run("satmips"), places)):
        assert found.keys() == expected.keys()
        for name in found:
            assert worst(found[name], expected[name]) < 1e-5
            assert worst(found[name], alone[name]) < 1e-6


def slow_knn(bank, labels, query, classes: int, k: int) -> np.ndarray:
    """The share of the votes of each class, one neighbour after the other."""
    votes = np.zeros(classes)
    cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
    for j in np.argsort(-cosine, kind="stable")[:k]:
        votes[labels[j]] += math.exp(cosine[j] / 0.07)
    return votes / votes.sum()


@pytest.mark.parametrize("queries, classes", [(1, 3), (40, 200)])
def test_knn_equals_a_loop(queries, classes):
    """Shares of votes exp(cosine / 0.07) of the k nearest, which are there twice, for every k."""
    rng, ks = np.random.default_rng(classes), (20, 2, 150, 6)
    bank, labels = rng.normal(size=(75, 6)), rng.integers(0, classes, 75)
    bank, labels = np.concatenate([bank, 3 * bank]), np.concatenate([labels, labels])
    asked = rng.normal(size=(queries, 6))
    tensors = [torch.from_numpy(array) for array in (bank, labels, asked)]
    shares = evaluate.knn(*tensors, classes, ks)
    for (i, k), (j, query) in itertools.product(enumerate(ks), enumerate(asked)):
        assert worst(shares[i, j], slow_knn(bank, labels, query, classes, k)) < 1e-4
    with pytest.raises(ValueError, match="151"):
        evaluate.knn(*tensors, classes, (1, 151))
    split = evaluate.knn(torch.ones(3, 2), torch.tensor([4, 2, 4]), torch.ones(1, 2), 5, (1, 3))
    assert worst(split[1, 0], [0, 0, 1 / 3, 0, 2 / 3]) < 1e-6 and split[0].max() == 1


def test_linear_probe_reaches_the_optimum():
    """On data that no plane separates the gradient vanishes, and the probabilities are those of
    Newton's method in float64, whatever the features' scale."""
    torch.manual_seed(0)
    x, noise = torch.randn(200, 4), torch.randint(3, (200,))
    y = torch.where(torch.rand(200) < 0.5, (x[:, 0] > 0).long(), noise)
    x = (x - x.mean(0)) / x.std(0, correction=0)

    def objective(p: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x.double() @ p[:12].view(3, 4).T + p[12:], y)

    gradient, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    linear, p = evaluate.logistic_regression(x, y, 3), torch.zeros(15, dtype=torch.float64)
    found = torch.cat([linear.weight.flatten(), linear.bias]).detach().double()
    for _ in range(20):
        inverse = torch.linalg.pinv(hessian(objective, p), hermitian=True, rtol=1e-10)
        p = p - inverse @ gradient(objective, p)
    assert gradient(objective, found).abs().max() < 2e-5
    assert 0 <= objective(found) - objective(p) < 1e-6
    expected = (x.double() @ p[:12].view(3, 4).T + p[12:]).softmax(1)
    scaled = torch.cat([1000 * x - 50, torch.full((200, 1), 7.0)], dim=1)  # and a constant
    assert worst(evaluate.linear_probe(scaled, y, scaled, 3), expected) < 2e-3


def test_finetuning_learns(run, dataset):
    """Colours of four kinds; a seed repeats it; the checkpoint's own encoder stays as it was."""
    p, splits = pretrained(run("simclr")), data.read_dataset(dataset)
    before, (_, y) = copy.deepcopy(p.model.state_dict()), data.class_ids("label_kind", *splits)
    options = {"epochs": 4, "peak": 1e-3, "batch": 16}
    first, again = (evaluate.finetune(p, splits, y[0], 4, 0, **options) for _ in range(2))
    assert evaluate.score(first, y[1], None)["accuracy"] > 0.8
    assert torch.equal(first, again) and worst(first.sum(1), torch.ones(16)) < 1e-5
    assert same(dict(p.model.state_dict()), dict(before))


def test_scores_by_hand():
    """Accuracy; macro-F1 over the classes that occur among predictions or truths. As Ayush et al.,
    the mean of an area's probabilities counts once; an area with a single image does not count."""
    predicted, true = torch.tensor([0, 0, 1, 1, 2, 4, 3]), torch.tensor([0, 1, 1, 1, 0, 0, -1])
    f1 = [2 * 1 / (2 + 3), 2 * 2 / (2 + 3), 0, 0]  # classes 0, 1, 2, 4; class 3 never occurs
    found = evaluate.score(F.one_hot(predicted, 5).float(), true, None)
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx(sum(f1) / 4), "test": 6}
    p = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.9, 0.1], [0.2, 0.8]])
    true, areas = torch.tensor([1, 1, 0, 1, 1, 1]), ["a", "a", None, "b", "c", "c"]
    averaged = evaluate.score(p, true, areas)  # a: 0.35, 0.65; c: 0.55, 0.45
    assert (averaged["accuracy"], averaged["test"]) == (0.5, 2)
    for labels, names in ([1, 1, 0, 1, 0, 1], areas), ([1, 1, 0, 1, 1, 1], list("abcdef")):
        assert "--average-areas" in refusal(evaluate.score, p, torch.tensor(labels), names)


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_rows_without_a_label_are_left_out(protocol):
    """They neither teach nor count, whatever their features; k goes as far as there are rows."""
    torch.manual_seed(0)
    x, y, known = torch.randn(60, 5), torch.arange(60) % 3, torch.arange(60) % 2 == 0
    spoilt = torch.where(known[:, None], x, 100.0), torch.where(known, y, -1)
    clean = evaluate.score_features(protocol, (x[known],) * 2, [y[known]] * 2, 3)
    assert evaluate.score_features(protocol, (spoilt[0],) * 2, [spoilt[1]] * 2, 3) == clean
    assert [r.get("k") for r in clean] == ([1, 5, 20] if protocol == "knn" else [None])
    assert {r["test"] for r in clean} == {30}


def scored(capsys, *argv) -> list[dict]:
    """What evaluate.py appends to its --output."""
    output = Path(tempfile.mkdtemp()) / "made" / "results.jsonl"
    evaluate.main([str(word) for word in (*argv, "--workers", 0, "--output", output)])
    assert capsys.readouterr().out.strip()
    return json_lines(output)


def test_scores_of_a_run_are_those_of_its_features(run, places, capsys):
    """Each label, modality and k: features, neighbours and votes by hand; the run's own data."""
    splits, p, names = data.read_dataset(places), pretrained(run("satmips")), ("image", "metadata")
    features = [features_by_hand(p, split) for split in splits]
    results = scored(capsys, "--checkpoint", run("satmips"), "--modality", *names, "both")
    assert len({(r["label"], r["features"], r["k"]) for r in results}) == len(results) == 2 * 3 * 4
    for r in results:
        kinds = names if r["features"] == "both" else (r["features"],)
        bank, asked = (torch.cat([f[kind] for kind in kinds], dim=1).numpy() for f in features)
        classes, (y, true) = data.class_ids(r["label"], *splits)
        votes = [slow_knn(bank, y.numpy(), query, len(classes), r["k"]) for query in asked]
        expected = evaluate.score(torch.tensor(np.array(votes)), true, None)
        assert abs(r["accuracy"] - expected["accuracy"]) < 0.041  # one of 25 images
        assert abs(r["macro_f1"] - expected["macro_f1"]) < 0.05
        assert (r["method"], r["data"], r["test"], r["seed"]) == ("satmips", str(places), 25, 0)


def test_options_of_evaluate(run, dataset, tmp_path, capsys):
    """Several checkpoints, every protocol; a label alone, untrained weights, areas, another image
    size; lines are appended."""
    areas = shutil.copytree(dataset, tmp_path / "areas")
    for path in areas.glob("*/metadata.jsonl"):
        lines = enumerate(json_lines(path))
        lines = [r | {"area": f"{i % 4}{i % 8 > 3}", "label_x": 1} for i, r in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--checkpoint", run("satmip"), run("simclr"), "--data", areas, "--label", "label_kind"]
    more = ["--protocol", "knn", "linear", "--random", "--average-areas", "--image-size", 48]
    results = scored(capsys, *argv, *more)
    assert {(r["test"], r["label"]) for r in results} == {(7, "label_kind")}, "8 areas, 7 labelled"
    assert [r["method"] for r in results[::4]] == ["satmip", "random", "simclr", "random"]
    assert [r["protocol"] for r in results] == 4 * (["knn"] * 3 + ["linear"]), "43 rows: no k = 100"
    results = scored(capsys, *argv, "--protocol", "finetune", "knn")
    assert len(results) == 2 * 4 and {r["test"] for r in results} == {15}
    assert "label" in complaint(capsys, evaluate.main, *argv[:2], "--data", dataset, more[4])
    output = str(tmp_path / "r.jsonl")
    for _ in range(2):
        evaluate.main([*map(str, argv[:2]), "--random", "--workers=0", "--output", output])
    found = json_lines(tmp_path / "r.jsonl")
    assert found[:16] == found[16:] and len(found) == 32
    assert [r["accuracy"] for r in found[:8]] != [r["accuracy"] for r in found[8:16]], "random"


@pytest.mark.parametrize(
    "options",
    "--modality metadata,--modality image both,--label nope,--data nowhere,--image-size 33,"
    "--workers -1,--device cuda:9,--device gpu,--protocol nope,--checkpoint nowhere".split(","),
)  # fmt: skip
def test_what_evaluate_refuses(options, run, capsys):
    argv = ["--checkpoint", run("simclr"), "--workers", 0, *options.split()]
    line = complaint(capsys, evaluate.main, *argv)
    assert options.split()[0] in line or options.split()[1] in line


def without(folder: Path, copy: Path, keys: str) -> Path:
    """The dataset without some columns."""
    for path in shutil.copytree(folder, copy).glob("*/metadata.jsonl"):
        records = [{k: v for k, v in r.items() if k not in keys.split()} for r in json_lines(path)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return copy


def test_what_the_data_lack_is_told(run, places, tmp_path, capsys):
    """A field of the checkpoint that no test row has; without any, the metadata have no score.
    Classes that training lacks. A run without labels is saved, and says why it has no scores."""
    argv = ["--checkpoint", str(run("satmip")), "--workers=0", "--modality", "metadata", "--data"]
    evaluate.main([*argv, str(without(places, tmp_path / "some", "timestamp location"))])
    assert regex.search("timestamp.*location", capsys.readouterr().out)
    none = without(places, tmp_path / "none", "gsd timestamp location")
    assert "timestamp" in complaint(capsys, evaluate.main, *argv, none)
    path = none / "train/metadata.jsonl"
    path.write_text(path.read_text().replace('"label_third": "c"', '"label_third": "d"'))
    evaluate.main(["--checkpoint", str(run("simclr")), "--workers", "0", "--data", str(none)])
    assert regex.search(r"label_third.*training.*\bc\n", capsys.readouterr().out)
    bare = without(places, tmp_path / "bare", "label_half label_third")
    train.main(arguments(bare, tmp_path / "run", "satmip"))
    assert "label" in capsys.readouterr().out and checkpoint(tmp_path / "run")["step"] == 6


def test_features_that_are_not_finite_are_not_scored(run, places, tmp_path, capsys):
    state = checkpoint(run("simclr"))
    state["model"]["image_encoder.norm.weight"][3] = nan
    torch.save(state, tmp_path / "checkpoint.pt")
    line = complaint(capsys, evaluate.main, "--checkpoint", tmp_path, "--workers", 0)
    assert "not finite" in line and str(tmp_path) in line


# --- The repository -------------------------------------------------------------------------------

ARROWS = {  # what each of the six files imports of ours
    "metadata": set(), "losses": set(), "model": {"losses"}, "data": {"metadata"},
    "evaluate": {"model", "data", "metadata", "losses"},
    "train": {"evaluate", "model", "data", "metadata", "losses"},
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Nothing here reaches beyond this machine."""

    def guarded(self, address, connect=socket.socket.connect):
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        assert local, f"connects to {address}"
        return connect(self, address)

    socket.socket.connect = guarded


def test_arrows_go_one_way():
    """The six files import one another in one direction, never the scripts; neither they nor these
    tests draw pictures or progress bars; everything else is in requirements.txt."""
    required = set(regex.findall(r"(?m)^\w+", (HERE / "requirements.txt").read_text()))
    known = {*sys.stdlib_module_names, *required, "PIL", *ARROWS}
    for path in HERE.glob("*.py"):
        lines = regex.findall(r"(?m)^ *(?:from ([\w.]+) import|import ([\w.]+))", path.read_text())
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
        words = regex.split(r"\n? {2,}", option.strip(), maxsplit=1)
        assert len(words) == 2 and len(words[1]) > 8, f"--{option} has no help"


def commands(document: Path) -> list[list[str]]:
    """The words of each python or torchrun command in its blocks of shell; a loop's first round."""
    blocks = regex.findall(r"(?ms)^```(?:bash|sh|shell)\n(.*?)^```", document.read_text())
    text, found = "".join(blocks).replace("\\\n", " "), []
    first = dict(regex.findall(r"for (\w+) in (\S+)", text))
    text = regex.sub(r"\$\{?(\w+)\}?", lambda name: first.get(name[1], "1"), text)
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
    for launcher, program, *argv in commands(HERE / document):
        while launcher == "torchrun" and program.startswith("--") or program == "-m":
            program, *argv = argv
        if program in ("pytest", "venv", "pip"):
            continue
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        assert HERE in Path(module.__file__).parents
        if hasattr(module, "main"):
            with pytest.raises(EOFError, match="understood"):
                module.main(argv)
        checked += 1
    assert checked
