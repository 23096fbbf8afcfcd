"""What experiments.detect and experiments.segment share (Ayush et al., 2021, Section 5.2): encoders
by name, batches by worker processes, a training loop that resumes.

    encoder, about, statistics = image_encoder(args.checkpoint, args.seed)
    about |= {"protocol": "detect", "data": ..., "label": ..., "transfer_seed": args.seed, ...}

    def batches(epoch):
        return Loader(epoch_rows(n, 4, args.seed, epoch), read, args.workers)

    fit(model, step_loss, batches, optimizer, args.epochs, args.output, about)
    append(args.output / "results.jsonl", [about | {"AP50": 0.5}])  # experiments.results

Whatever is random is a function of (seed, epoch, row), so that a resumed run equals one without a
break, on a CPU bit for bit.
"""

import argparse
import math
import os
from datetime import timedelta
from pathlib import Path
from time import perf_counter as clock
from typing import Callable, Iterable, Iterator, Sized

import torch
from torch import Tensor, nn

import data
from evaluate import autocast, contents_of, half_precision, load_pretrained, read_checkpoint
from experiments.common import devices
from metadata import BadInput
from model import build_image_encoder
from prepare.loop import in_order, progress
from prepare.weights import IMAGENET
from train import save


def arguments(text: str, source: str, epochs: int) -> argparse.ArgumentParser:
    """CHECKPOINT SOURCE --epochs --output --seed --device --workers."""
    parser = argparse.ArgumentParser(description=text.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="a run with --vit resnet50, what prepare.weights wrote, or: random")
    add("source", type=Path, help=source)
    add("--output", type=Path, required=True, help="folder of this run; an existing one resumes")
    add("--epochs", type=int, default=epochs, help=f"over the training images ({epochs})")
    add("--seed", type=int, default=0, help="of order, new layers, random weights (0)")
    add("--device", choices=devices(), default=devices()[-1])
    add("--workers", type=int, default=8, help="processes that read images, at most the cores (8)")
    return parser


def check(args: argparse.Namespace) -> torch.device:
    if args.epochs < 1 or args.workers < 0 or args.seed < 0:
        raise BadInput("--epochs: 1 or more; --seed, --workers: 0 or more")
    return torch.device(args.device)


def image_encoder(name: str, seed: int) -> tuple[nn.Module, dict, tuple]:
    """A run's folder, a checkpoint or "random" -> torchvision's ResNet-50 without its classifier,
    what results say of it, and the channel mean and std that it was trained with.

    NOTE[PAPER] how images are standardised is not said; random weights take ImageNet's values."""
    torch.manual_seed(seed)
    if name == "random":
        encoder, statistics = build_image_encoder("resnet50", 224, 16), IMAGENET
        about = {"method": "random", "vit": "resnet50", "seed": seed}
        about["checkpoint"] = f"untrained resnet50, seed {seed}"
    else:
        p = load_pretrained(Path(name), torch.device("cpu"))
        if p.model.config.vit != "resnet50":
            raise BadInput(f"{name}: {p.model.config.vit}; wanted a run of train.py --vit resnet50")
        encoder, about = p.model.image_encoder, p.about
        statistics = p.statistics or read_checkpoint(Path(name)).get("statistics", IMAGENET)
    # Layers that the caller adds next are the same for all encoders. A DataLoader draws, too
    torch.manual_seed(seed + 2**32)
    return encoder, about, statistics


def epoch_rows(n: int, batch: int, seed: int, epoch: int) -> list[Tensor]:
    """The epoch's permutation of n rows, cut into batches; fewer rows than a batch are dropped."""
    order = data.Order(n, min(batch, n), seed)
    per_epoch = n // order.batch
    return [order[step] for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]


class Loader:
    """read(rows) of each batch of rows, in order, done ahead by worker processes."""

    def __init__(self, batches: list[Tensor], read: Callable, workers: int):
        self.batches, self.read = batches, read
        self.workers = min(workers, len(os.sched_getaffinity(0)))

    def __len__(self) -> int:
        return len(self.batches)

    def one(self, rows: Tensor):
        try:
            return self.read(rows)
        except (BadInput, OSError) as error:  # a worker would wrap it in its traceback
            return error

    def __iter__(self) -> Iterator:
        for batch in in_order(self.batches, self.one, self.workers):
            if isinstance(batch, Exception):
                raise batch
            yield batch


def restore(path: Path, about: dict, model: nn.Module, optimizer, scaler) -> int:
    """-> how many epochs are done."""
    state = read_checkpoint(path)
    with contents_of(path):
        old, done = dict(state["about"]), int(state["epoch"])
    for key, value in about.items():
        if old.get(key) != value:
            raise BadInput(f"{path} has {key} {old.get(key)}, not {value}; choose another --output")
    with contents_of(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    return done


def fit(
    model: nn.Module, step_loss: Callable, batches: Callable[[int], Iterable | Sized],
    optimizer: torch.optim.Optimizer, epochs: int, folder: Path, about: dict,
) -> None:  # fmt: skip
    """Train by step_loss(batch) -> loss, over batches(epoch), in mixed precision on a GPU.

    folder/checkpoint.pt is written after each epoch; if it is there, training goes on from it. A
    checkpoint with another `about` is refused. about["transfer_seed"] seeds dropout."""
    device, path, done = next(model.parameters()).device, folder / "checkpoint.pt", 0
    scaled = half_precision(device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    if path.exists():
        done = restore(path, about, model, optimizer, scaler)
        print(f"{path}: {done} of {epochs} epochs are done", flush=True)
    model.train()
    for epoch in range(done, epochs):
        torch.manual_seed(int(2**32 * data.uniform(about["transfer_seed"], epoch)))
        name, began, total, loaded = f"epoch {epoch + 1} of {epochs}", clock(), 0.0, batches(epoch)
        for step, batch in enumerate(progress(loaded, name, len(loaded)), 1):
            with autocast(device):
                loss = step_loss(batch)
            total += loss.item()
            if not math.isfinite(total):
                raise BadInput(f"loss {loss.item()}: not finite in {name}, step {step}: diverged")
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        left = timedelta(seconds=round((epochs - epoch - 1) * (clock() - began)))
        print(f"{name}: loss {total / len(loaded):.4g}, {left} left", flush=True)
        save(path, {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1,
            "scaler": scaler.state_dict(), "about": about,
        })  # fmt: skip
