"""The tests: what the code promises, in the order in which its files are read.

    pytest -q test_all.py        # two CPU cores are enough; no GPU, no network

In this order: helpers -> metadata -> model -> losses -> data -> evaluate -> train -> the repository.
Numbers are compared with slow transcriptions of the papers, or with other people's code.
"""

import ast
import contextlib
import gzip
import html
import itertools
import json
import math
import multiprocessing
import random
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Callable

import ftfy
import numpy as np
import pytest
import regex
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

import data
import losses
import metadata
import model
import train
from metadata import POSTER, BadInput, TableReader, TextReader, caption, parse_fields

HERE = Path(__file__).parent
ALL, DEFAULT = parse_fields("all"), parse_fields(metadata.DEFAULT_FIELDS)
nan = math.nan

# --------------------------------------------------------------------------------------------------
# Helpers


def worst(a, b) -> float:
    """Largest absolute difference."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def likely(count: int, n: int, p: float) -> bool:
    """Whether `count` of n draws is within five deviations of probability p."""
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def refusal(work: Callable, *args) -> str:
    """The one line with which `work` refuses its arguments."""
    with pytest.raises(BadInput) as caught:
        work(*args)
    line = str(caught.value)
    assert "\n" not in line and not regex.search(r"0x[0-9a-f]{6}|\w+Error", line)
    return line


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, so that none hides behind being 0 or 1; in evaluation mode."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def small_model(encoder: str = "table", image_image: str = "simclr", **options) -> model.SatMIP:
    """A model of two views of 32 px; its metadata as in small_batch."""
    sizes = dict(image_size=32, vit="vit_micro", metadata_width=32, mlp_hidden=64, mlp_out=32)
    sizes |= dict(numbers=4, categories=(5,), vocabulary=20, context=6) | options
    torch.manual_seed(0)
    config = model.ModelConfig(metadata_encoder=encoder, image_image=image_image, **sizes)
    return model.SatMIP(config)


def small_batch(n: int, views: int = 2, encoder: str = "table") -> tuple[torch.Tensor, tuple]:
    """Views [views, n, 3, 32, 32] and metadata of n samples, some of it missing."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(views, n, 3, 32, 32, generator=generator)
    if encoder == "none":
        return images, ()
    if encoder == "text":
        return images, (torch.arange(6 * n).view(n, 6) % 19, 5 + torch.arange(n) % 2)
    numbers = torch.randn(n, 4, generator=generator).index_fill(0, torch.arange(0, n, 3), nan)
    return images, (numbers, torch.randint(5, (n, 1), generator=generator))


def images_of(n: int, side: int) -> torch.Tensor:
    """uint8 [n, 3, side, side] of smooth random colours with some noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bilinear")
    noise = torch.rand(n, 3, side, side, generator=generator)
    return (255 * (0.8 * smooth + 0.2 * noise)).byte()


def write_split(folder: Path, records: list[dict], side: int = 32) -> data.Split:
    """A split of these records, each with an image of its own: 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, image in enumerate(images_of(len(records), side)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", **records[i]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return data.Split(folder)


COLOURS = {
    "desert": (220, 180, 120), "forest": (30, 90, 40), "ice": (235, 240, 250), "sea": (20, 50, 120),
}  # fmt: skip
WRONG_VALUES = {
    5: {"gsd": [0, "abc"]}, 6: {"location": None}, 8: {"country_code": ""},
    9: {"timestamp": "2004-13-01"},
}  # fmt: skip


def write_dataset(folder: Path) -> Path:
    """48 train and 16 test images of 32 px, coloured by class and place; some values missing, some
    malformed, some rows without a label; two images of each area."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 48), ("test", 16)):
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(n):
            kind = list(COLOURS)[i % 4]
            place = [round(rng.uniform(-180, 180), 4), round(rng.uniform(-60, 75), 4)]
            pixels = np.array(COLOURS[kind]) + place[0] / 12 + rng.normal(0, 12, (32, 32, 3))
            name, when = f"{i:02d}.jpg", "2004-10"
            if i % 3:
                name = f"{i:02d}.png"
                when = f"20{i % 20:02d}-0{1 + i % 9}-21T{i % 24:02d}:30:08Z"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name)
            record = {
                "file_name": name, "gsd": [10.0 + i, 9.0 + i % 5], "timestamp": when,
                "location": place, "country_code": ("PER", "FRA", "KEN")[i % 3], "cloud_cover": i,
                "area": f"a{i // 2}", "label_kind": kind, **WRONG_VALUES.get(i % 10, {}),
            }  # fmt: skip
            if i % 10 == 7:
                del record["label_kind"], record["location"]
            lines.append(json.dumps(record) + "\n")
        (folder / split / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # these networks are tiny: threads would only wait for each other


def on_processes(world: int, work: Callable, *args) -> list:
    """work(rank, world, *args) on processes that reach each other by gloo -> what each returned."""
    multiprocessing.set_forkserver_preload([__name__])  # imports once, not once a process
    with tempfile.TemporaryDirectory() as folder:
        what = (world, folder, work, args)
        mp.start_processes(process, what, nprocs=world, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(world)]


def process(rank: int, world: int, folder: str, work: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    torch.save(work(rank, world, *args), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()
