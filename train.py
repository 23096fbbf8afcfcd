"""Pretrain SatMIP, SatMIPS or a baseline (paper, Section 3 and 4.2, supplement B).

    python train.py --method satmips                                  # embedded data, 2 CPU cores, some minutes
    python train.py --method simclr-geo-tp                            # a baseline; METHODS lists all
    torchrun --nproc_per_node=4 train.py --method satmips --data DIR  # the paper's settings, 4 GPUs

In this order: methods, options, presets -> processes -> learning rate -> files of a run -> what it learns from and what
it trains -> one step -> its figures -> what goes wrong -> cost report -> the run. Without --data the embedded data are
prepared and the demo preset is the default; with --data the defaults are the paper's. Exit status: 0 done; 1 an error,
said in one line; 75 told to stop, saved.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import losses
from metadata import DEFAULT_FIELDS, POSTER, BadInput, TableSchema, rounded
from model import SOURCES, VITS, Block, ModelConfig, SatMIP, WrongWeights, load_encoder, parameter_groups

# -----------------------------------------------------------------------------------------------------
# Options: the defaults are the paper's


# A method is what it learns from, and its recipe: options, each of which may also be given by itself.
# NOTE[PAPER] the paper's table of base learning rates and weight decays is lost: SLIP's values for SimCLR, CLIP and
# SLIP, taken from its batch of 4096 to 256 by the linear rule.
SIMCLR = {"image_image": "simclr", "base_lr": 2.0e-4, "weight_decay": 0.1}
SATMIP = {"metadata_image": True, "base_lr": 3.125e-5, "weight_decay": 0.5}
SATMIPS = {"metadata_image": True, "image_image": "simclr", "base_lr": 1.875e-4, "weight_decay": 0.1}
# NOTE[PAPER] Ayush et al. print a learning rate of 1e-3, their README 0.03, which is MoCo-v2's own for this batch
MOCO = {
    "image_image": "moco", "optimizer": "sgd", "base_lr": 0.03, "weight_decay": 1e-4, "warmup_epochs": 0,
    "temperature": 0.2, "batch_size": 256, "vit": "resnet50", "mlp_hidden": 2048, "mlp_out": 128,
}  # fmt: skip
GEO, TP = {"geo": True}, {"temporal": True}
METHODS = {
    "simclr": SIMCLR, "satmip": SATMIP, "satmips": SATMIPS,
    "simclr-geo": SIMCLR | GEO, "simclr-tp": SIMCLR | TP, "simclr-geo-tp": SIMCLR | GEO | TP,
    "satmips-tp": SATMIPS | TP, "satmips-geo-tp": SATMIPS | GEO | TP,
    "moco": MOCO, "moco-geo": MOCO | GEO, "moco-tp": MOCO | TP, "moco-geo-tp": MOCO | GEO | TP,
}  # fmt: skip
LR_START, LR_END = 1e-6, 1e-5  # NOTE[PAPER] where warm-up starts and the cosine ends: SLIP's
AUGMENTATIONS = tuple(data.POLICIES)
TEXT_WIDTH, TABLE_WIDTH = 512, 192  # NOTE[PAPER] Section 4.2 says 512 for both, supplement B 192 for the table


def option(default, text: str, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every option; `None` means the value that the help names."""

    method: str = option("satmips", "what to learn from, and by which recipe", tuple(METHODS))
    metadata_image: bool = option(False, "align images with metadata, Eq. 2 (by method)")
    image_image: str = option("none", "align two views of an image, Eq. 3 (by method)", ("none", "simclr", "moco"))
    geo: bool = option(False, "tell clusters of places apart (by method)")
    temporal: bool = option(False, "TP: the last view shows another date of the same area (by method)")
    data: str = option("", "prepared dataset; default: the embedded data, cut into data/demo")
    output: str = option("", "run folder, resumed if it holds a checkpoint; default: runs/METHOD or runs/demo-METHOD")
    metadata_encoder: str = option("text", "how metadata is encoded", ("text", "table"))
    fields: str = option("", f"metadata fields in order or 'all'; default: DIR/fields.json's, else {DEFAULT_FIELDS}")
    vit: str = option("vit_small", "image encoder (by method)", (*VITS, "resnet50"))
    init: str = option("", "file of weights that the image encoder starts from (Table 4)")
    init_source: str = option("satmip", "whose weights; satmip: a checkpoint of this program", tuple(SOURCES))
    image_size: int = option(224, "side of a view in px")
    patch_size: int = option(16, "side of a patch in px")
    metadata_width: int | None = option(None, f"width of the metadata encoder (text {TEXT_WIDTH}, table {TABLE_WIDTH})")
    metadata_layers: int = option(3, "layers of the metadata encoder")
    mlp_hidden: int = option(4096, "hidden width of the SimCLR or MoCo head (by method)")
    mlp_out: int = option(256, "its output's width (by method)")
    epochs: int = option(200, "passes over the train split")
    batch_size: int = option(1024, "images a step over all processes (by method)")
    micro_batch: int = option(0, "images a process holds in memory at a time; same gradients, one more forward; 0: all")
    optimizer: str = option("adamw", "or sgd with momentum 0.9 (by method)", ("adamw", "sgd"))
    base_lr: float = option(0.0, "learning rate for a batch of 256, scaled linearly (by method)")
    weight_decay: float = option(0.0, "of the optimizer (by method)")
    warmup_epochs: float = option(1, "epochs of linear warm-up (by method)")
    loss_weight: float = option(1.0, "lambda of Eq. 4, the weight of the image-image loss")
    temperature: float = option(0.1, "of the image-image loss; the metadata-image loss learns its own (by method)")
    same_view_negatives: bool = option(False, "2K-1 terms in Eq. 3 as SimCLR and SLIP, not the K printed")
    mask_same_area: bool = option(False, "other images of an area are no negatives")
    geo_clusters: int = option(100, "clusters of places that Geo tells apart")
    queue: int = option(65536, "keys that MoCo compares with")
    key_momentum: float = option(0.999, "how slowly MoCo's key encoder follows")
    consistent_metadata: bool = option(False, "scales follow the crop, azimuths its flips and turns")
    field_dropout: float = option(0.0, "probability of each field to be missing, anew in each epoch")
    shuffle_fields: bool = option(False, "captions name the fields in any order, anew in each epoch")
    digits: int | None = option(None, "most decimals of a number in a caption")
    cyclic_features: bool = option(False, "times and angles as sine and cosine, places on the sphere, in the table")
    decouple_views: bool = option(False, "a third view for the metadata (Table 6)")
    augment: str = option("strong", "augmentation policy (Table 6)", AUGMENTATIONS)
    amp: str = option("auto", "auto: bf16, fp16 where the GPU lacks it, off on CPU", ("auto", "bf16", "fp16", "off"))
    checkpoint_blocks: bool = option(False, "keep less for the gradient: a block's inside is computed again")
    compile: bool = option(False, "torch.compile the encoders: not tried on a GPU yet, no gain on CPU")
    workers: int = option(8, "image-decoding workers a process")
    eval_every: int = option(25, "epochs between kNN scores on the test split; 0: never before the end")
    log_every: int = option(50, "steps between lines")
    save_every: int = option(0, "steps between checkpoints within an epoch; 0: at its end only")
    keep: int = option(0, "newest checkpoints also kept under their step's number")
    max_bad: float = option(0.01, "share of the training images that may be unreadable before the run stops")
    seed: int = option(0, "of weights, data order and augmentation")
    benchmark: bool = option(False, "in place of training, a cost report; on synthetic images unless given --data")
    benchmark_rounds: int = option(10, "rounds of that report, each one step of every method")


# What suits 2 CPU cores and 64 px images. The table encoder reads the three fields as 10 tokens; the paper's text
# encoder costs 3.6 GFLOP a sample, forty times this ViT, and a narrow one still as much as both views. Crops alone:
# these colours are calibrated measurements, and jitter and grayscale erase what the images differ in.
DEMO = {
    "metadata_encoder": "table", "vit": "vit_micro", "image_size": 64, "patch_size": 16, "metadata_width": 64,
    "mlp_hidden": 512, "epochs": 5, "batch_size": 64, "base_lr": 6e-3, "warmup_epochs": 0.3, "augment": "crop",
    "workers": 1, "eval_every": 2, "log_every": 100, "optimizer": "adamw", "queue": 4096,
}  # fmt: skip


# Runs of the paper's tables, by what differs from the defaults; seeds, fields (Table 5) and lambda (S4) are flags
PRESETS = {
    "table2": {}, "table4": {"init_source": "slip"},
    "table5": {"method": "satmip", "metadata_encoder": "table", "epochs": 25},
    "table6-crop": {"method": "satmip", "augment": "crop", "epochs": 25},
    "table6-strong": {"method": "satmip", "epochs": 25},
    "table6-coupled": {"method": "satmips", "epochs": 25},
    "table6-decoupled": {"method": "satmips", "decouple_views": True, "epochs": 25},
    "tableS4": {"method": "satmips", "epochs": 25},
    "tableS5-text": {"metadata_encoder": "text"}, "tableS5-table": {"metadata_encoder": "table"},
}  # fmt: skip


MAY_BE_ZERO = {"weight_decay", "warmup_epochs", "loss_weight", "workers", "eval_every", "seed"}
MAY_BE_ZERO |= {"save_every", "keep", "max_bad", "micro_batch", "field_dropout", "digits"}


def configure(options: dict) -> Config:
    """The configuration of a method with some options changed. BadInput when they do not go together."""
    method = options.get("method", "satmips")
    c = Config(**({"method": method} | METHODS[method] | options))
    derived = {
        "metadata_width": c.metadata_width or (TEXT_WIDTH if c.metadata_encoder == "text" else TABLE_WIDTH),
        "data": c.data or str(Path("data") / "demo"),
        "output": c.output or str(Path("runs") / f"{'' if c.data else 'demo-'}{c.method}"),
    }
    for name, value in asdict(c).items():
        flag = "--" + name.replace("_", "-")
        if name not in MAY_BE_ZERO and type(value) in (int, float) and not value > 0:
            raise BadInput(f"{flag} {value}: must be positive")
        if name in MAY_BE_ZERO and value is not None and not value >= 0:
            raise BadInput(f"{flag} {value}: must not be negative")
    text, pairs, moco = c.metadata_encoder == "text", c.image_image != "none", c.image_image == "moco"
    varied = c.consistent_metadata or c.field_dropout or c.shuffle_fields or c.digits is not None or c.cyclic_features
    for problem, message in (
        (not c.field_dropout < 1, f"--field-dropout {c.field_dropout}: a probability below 1"),
        (c.key_momentum > 1, f"--key-momentum {c.key_momentum}: at most 1"),
        (c.batch_size == 1, "--batch-size 1: a contrastive loss needs something to contrast with; at least 2"),
        (not (c.metadata_image or c.geo or pairs), f"--method {c.method}: nothing is left to learn from"),
        (c.decouple_views and not (c.metadata_image and pairs),
         f"--decouple-views: {c.method} has one kind of view only; use --method satmips"),
        (c.temporal and not pairs, f"--temporal: {c.method} compares no two views; use --image-image simclr"),
        (c.same_view_negatives and moco, "--same-view-negatives: MoCo has its queue's; use --image-image simclr"),
        (c.checkpoint_blocks and c.vit == "resnet50", "--checkpoint-blocks: resnet50 has none; use a ViT"),
        (c.mask_same_area and moco, "--mask-same-area: MoCo's queue keeps no areas; use --image-image simclr"),
        (moco and c.queue < c.batch_size, f"--queue {c.queue}: shorter than a batch of {c.batch_size}"),
        (c.micro_batch and c.vit == "resnet50",
         "--micro-batch: resnet50 needs statistics of the whole batch; use a ViT"),
        (c.init and c.vit == "resnet50", "--init: weights for resnet50 are not read; use a ViT"),
        (varied and not c.metadata_image, f"--method {c.method} reads no metadata, which other options are to vary"),
        ((c.shuffle_fields or c.digits is not None) and not text,
         "--shuffle-fields and --digits change captions; use --metadata-encoder text"),
        (c.cyclic_features and text, "--cyclic-features changes the table; use --metadata-encoder table"),
    ):  # fmt: skip
        if problem:
            raise BadInput(message)
    return dataclasses.replace(c, **derived)


def parse_config(argv: list[str] | None) -> tuple[Config, str]:
    """Command line -> (configuration, name of the preset it started from)."""
    parser = argparse.ArgumentParser(description="Pretrain SatMIP, SatMIPS or a baseline.", allow_abbrev=False)
    for f in dataclasses.fields(Config):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            kind = next(t for t in (int, float, str) if t is f.type or t in getattr(f.type, "__args__", ()))
            text += "" if f.default in (None, "") or "by method" in text else f" (default {f.default})"
            parser.add_argument(flag, type=kind, choices=f.metadata["choices"], default=argparse.SUPPRESS, help=text)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="table2", help="settings of a table of the paper")
    given = vars(parser.parse_args(argv))
    benchmark, preset = given.get("benchmark", False), given.pop("preset")
    demo = "data" not in given and not benchmark
    small = {"batch_size": 8} if benchmark and not torch.cuda.is_available() else {}
    config = configure((DEMO if demo else small) | PRESETS[preset] | given)
    if benchmark:  # neither synthetic data nor a table on the screen needs a name
        config = dataclasses.replace(config, data=given.get("data", ""), output=given.get("output", ""))
    return config, " ".join(["demo" if demo else "paper", preset])


# -----------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class World:
    """This process among all; one process without a group is a world of its own."""

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def join() -> "World":
        """Read what torchrun set; NCCL on GPUs, gloo on CPU."""
        cuda = torch.cuda.is_available()
        if "RANK" not in os.environ:
            return World(0, 1, torch.device("cuda" if cuda else "cpu"))
        local = int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        elif "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] == "1":  # torchrun's own default
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
        store, rank, size = next(rendezvous("env://"))
        if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
            # torchrun's store outlives a restart, and with it the addresses of the processes that died
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        patience = timedelta(hours=2)  # rank 0 evaluates alone
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        return World(dist.get_rank(), dist.get_world_size(), device)

    def print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def first(self, work):
        """Rank 0 does the work, everyone gets what it returns; its error is raised everywhere."""
        result = None
        if self.rank == 0:
            try:
                result = work()
            except (BadInput, OSError) as error:
                result = error
        if self.size > 1:
            box = [result]
            dist.broadcast_object_list(box)
            result = box[0]
        if isinstance(result, (BadInput, OSError)):
            raise result
        return result

    def part(self) -> None:
        """Nobody closes its connections while another still reads from them."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value) -> list:
        """Each process's value, on all."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def mean(values: Tensor) -> Tensor:
    """Mean over processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def networked(model: SatMIP, world: World, config: Config):
    """The model; on several processes, with gradients averaged over them while the backward still runs. With
    --micro-batch, whose backward comes in pieces, they are averaged after the last."""
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # torch 2.14's new name for it is unknown to 2.11
    alone = world.size == 1 or config.micro_batch
    return model if alone else DistributedDataParallel(model, broadcast_buffers=False)


# -----------------------------------------------------------------------------------------------------
# Learning rate


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Of the step that comes next (supplement B): linear warm-up, then a cosine down to the last step."""
    peak = config.base_lr * config.batch_size / 256
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return LR_START + (peak - LR_START) * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return LR_END + (peak - LR_END) * (1 + math.cos(math.pi * progress)) / 2


# -----------------------------------------------------------------------------------------------------
# Files of a run: a kill at any moment leaves each of them whole. A checkpoint is plain types and tensors only, so
# that it loads with weights_only=True

# Options that a resumed run may change
FREE = {"data", "output", "workers", "eval_every", "log_every", "save_every", "keep", "max_bad"}
FREE |= {"micro_batch", "checkpoint_blocks", "compile", "benchmark", "benchmark_rounds"}


def write_whole(path: Path, write, previous: Path | None = None) -> None:
    """`write(file)` beside the old file, flush to disk, then put in its place; the old one may stay as `previous`."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            path.replace(previous)
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the names, too
        os.close(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's for any trouble, with the cause behind it
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise BadInput(f"{path}: cannot be written ({error.__context__ or error}); the last one is intact") from None


def write_lines(path: Path, entries: list[dict]) -> None:
    write_whole(path, lambda file: file.writelines(json.dumps(entry).encode() + b"\n" for entry in entries))


def read_lines(path: Path) -> list[dict]:
    """None if there is no file, and none after a line that is not whole."""
    entries = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        entries.extend(map(json.loads, path.read_text().splitlines()))
    return entries


def beside(path: Path, what: str) -> Path:
    """checkpoint.pt, "previous" -> checkpoint.previous.pt"""
    return path.with_suffix(f".{what}.pt")


def save_checkpoint(path: Path, state: dict, keep: int = 0) -> None:
    """The one before stays beside it; with `keep`, so do that many of the newest, by their step."""
    write_whole(path, lambda file: torch.save(state, file), beside(path, "previous"))
    if keep:
        numbered = beside(path, f"{state['step']:08d}")
        numbered.unlink(missing_ok=True)
        os.link(path, numbered)  # a second name for the same file
        for old in sorted(path.parent.glob("checkpoint." + "[0-9]" * 8 + ".pt"))[:-keep]:
            old.unlink()


def find_checkpoint(path: Path) -> bool:
    """Whether there is one. If `path` is damaged, or missing because of a kill, the one before takes its place."""
    previous = beside(path, "previous")
    try:
        evaluate.read_checkpoint(path)
    except BadInput as error:
        if not previous.exists():
            if path.exists():
                raise
            return False
        evaluate.read_checkpoint(previous)
        if path.exists():
            path.replace(beside(path, "damaged"))  # kept: it may be somebody else's file
        previous.replace(path)
        print(f"{error}; the checkpoint before it is used", flush=True)
    return True


def restore(path: Path, config: Config, derived: dict, model: SatMIP, optimizer, scaler: torch.amp.GradScaler) -> dict:
    """Put a checkpoint back -> all that it holds. BadInput when it belongs to another configuration, or to data
    from which something else was `derived`."""
    state = evaluate.read_checkpoint(path)
    for name, value in asdict(config).items():
        if name not in FREE and state["config"].get(name) != value:
            flag, old = "--" + name.replace("_", "-"), state["config"].get(name)
            raise BadInput(f"{path}: made with {flag} {old}, not {value}; choose another --output")
    for name in ("optimizer", "scaler", "epoch_so_far", "processes"):
        if name not in state:
            raise BadInput(f"{path}: cannot be resumed, it has no {name!r}; choose another --output")
    for name, value in derived.items():
        if state.get(name) != value:
            raise BadInput(f"{path}: made from other training data (another {name}); choose another --output")
    evaluate.load_weights(model, state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty when that part of the run had no fp16
        scaler.load_state_dict(state["scaler"])
    return state


# -----------------------------------------------------------------------------------------------------
# What a run learns from, and what it trains


class Batch(NamedTuple):
    """What a process learns from in one step, on the device."""

    views: Callable[[slice], Tensor]  # samples -> their views [V, B, 3, h, w], made when asked for: they are large
    metadata: tuple[Tensor, ...]  # what its encoder takes, each [B, ...]
    size: int  # B
    areas: Tensor | None = None  # [B], -1 where unknown
    places: Tensor | None = None  # [B] clusters of places, -1 where unknown


class TrainingData:
    """The dataset as this configuration reads it. BadInput when it lacks what the configuration asks for."""

    def __init__(self, config: Config, world: World):
        encoder = config.metadata_encoder if config.metadata_image else "none"
        fields = world.first(lambda: data.choose_fields(Path(config.data), config.fields))
        fields = fields if config.digits is None else rounded(fields, config.digits)
        world.first(lambda: bool(data.read_dataset(config.data, fields, captions=encoder == "text")))  # caches it
        self.splits = splits = data.read_dataset(config.data, fields, captions=encoder == "text")
        table, n = splits[0].table, len(splits[0])
        if config.batch_size % world.size:
            raise BadInput(f"--batch-size {config.batch_size}: not a multiple of the {world.size} processes")
        if config.batch_size > n:
            raise BadInput(f"--batch-size {config.batch_size}: {config.data} has only {n} training images")
        rates = data.missing_rates(table, fields) if encoder != "none" else {}
        if rates and min(rates.values()) == 1:
            columns = ", ".join(splits[0].record(0))
            raise BadInput(f"--fields: {', '.join(rates)} missing in every row of {splits[0].source}; it has {columns}")
        for name in (name for name, rate in rates.items() if rate == 1):
            world.print(f"field {name} is missing in every training row: nothing is learned from it")
        self.config = dataclasses.replace(config, fields=",".join(field.name for field in fields))
        self.encoder, self.fields, self.per_epoch = encoder, fields, n // config.batch_size
        self.schema = {
            "none": lambda: None, "text": lambda: np.unique(table.tokens.values).tolist(),
            "table": lambda: TableSchema.fit(fields, table.numbers, table.categories, config.cyclic_features),
        }[encoder]()  # fmt: skip
        self.metadata, test = (data.Metadata(split.table, encoder, self.schema) for split in splits)
        if encoder != "none" and (config.consistent_metadata or config.field_dropout or config.shuffle_fields):
            policy = data.POLICIES[config.augment] if config.consistent_metadata else None
            vary = data.Variation(policy, config.field_dropout, config.shuffle_fields)
            options = (vary, config.seed, config.image_size, self.per_epoch)
            self.metadata = data.VariedMetadata(splits[0], fields, encoder, self.schema, *options)
        self.context = -(-max(self.metadata.longest, test.longest) // 8) * 8  # in tokens, from the data
        self.areas = self.places = self.centres = self.partners = None
        if config.geo or config.temporal or config.mask_same_area:
            self.read_areas(world)
        self.statistics = world.first(lambda: data.channel_statistics(splits[0], config.image_size, config.workers))

    def read_areas(self, world: World) -> None:
        """What Geo, temporal positives and masked negatives need of the training rows."""
        config, source = self.config, self.splits[0].source
        world.first(lambda: bool(data.areas_and_dates(Path(config.data))))
        known = data.areas_and_dates(Path(config.data))
        area, date = (column.codes for column in known.categories)
        if (config.temporal or config.mask_same_area) and (area < 0).all():
            raise BadInput(f"{source}: no row has an area, which --temporal and --mask-same-area need")
        if config.mask_same_area:
            self.areas = torch.from_numpy(area).long()
        if config.temporal:
            self.partners = data.Partners(area, date, config.seed, self.per_epoch)
            world.print(f"{self.partners.some:,} of {len(area):,} training images have another date of their area")
        if config.geo:
            points = data.area_places(known)
            found = world.first(lambda: data.cluster_places(points, config.geo_clusters, config.seed))
            if not len(found):
                raise BadInput(f"{source}: no row has a location, which --geo needs")
            self.centres, self.places = found.tolist(), torch.from_numpy(data.nearest_centre(points, found))

    def batches(self, world: World, steps: range, faults: dict[str, str]) -> Iterator[data.Loaded]:
        """This process's share of each step, read ahead by workers."""
        config, split = self.config, self.splits[0]
        order = data.Order(len(split), config.batch_size, config.seed, world.rank, world.size)
        options = (config.workers, faults, steps, self.metadata, self.partners)
        return data.load(split, config.image_size, order, *options)

    def to_device(self, loaded: data.Loaded, step: int, device: torch.device) -> Batch:
        """A batch of the workers, on its way to the device, which is not waited for."""
        there = lambda x: x.to(device, non_blocking=True)  # noqa: E731
        rows, images = loaded.rows, there(loaded.images).unflatten(0, (-1, len(loaded.rows)))
        epoch, config = step // self.per_epoch, self.config
        views = lambda piece: make_views(images[:, piece], rows[piece], epoch, config, self.statistics)  # noqa: E731
        codes = (None if of is None else there(of[rows]) for of in (self.areas, self.places))
        return Batch(views, tuple(map(there, loaded.metadata)), len(rows), *codes)


def build_model(material: TrainingData) -> SatMIP:
    """The network of this configuration for these data, as its training starts. BadInput when sizes do not fit."""
    config, encoder, schema, table = material.config, material.encoder, material.schema, material.encoder == "table"
    model_config = ModelConfig(
        config.image_size, config.patch_size, config.vit, encoder, config.metadata_width, config.metadata_layers,
        vocabulary=len(schema) + 1 if encoder == "text" else 0, context=material.context,
        numbers=len(schema.mean) if table else 0,
        categories=tuple(len(values) + 2 for values in schema.categories.values()) if table else (),
        image_image=config.image_image, mlp_hidden=config.mlp_hidden, mlp_out=config.mlp_out,
        queue=config.queue if config.image_image == "moco" else 0, places=len(material.centres or ()),
    )  # fmt: skip
    torch.manual_seed(config.seed)
    try:
        return SatMIP(model_config)
    except ValueError as error:
        raise BadInput(f"--vit, --image-size, --patch-size or --metadata-width: {error}") from None


def make_optimizer(model: SatMIP, config: Config) -> torch.optim.Optimizer:
    """AdamW as SLIP's, or SGD as MoCo's, which decays every parameter; fused, so that the device may skip a step."""
    if config.optimizer == "sgd":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 0.0, momentum=0.9, weight_decay=config.weight_decay, fused=True)
        for p in trained:  # else a first step that is skipped would leave it as the memory was
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8, fused=True)


def precision(config: Config, device: torch.device) -> torch.dtype | None:
    """Of the encoders and heads under autocast; None for float32."""
    # No TF32, in matrix products and convolutions alike: the backbone runs in half precision, which is faster still,
    # and what is left to float32 needs all its digits: logits reach 100, and TF32 has three digits
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if config.amp == "auto" and device.type == "cuda":
        return evaluate.half_precision()
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None, "auto": None}[config.amp]


# -----------------------------------------------------------------------------------------------------
# One step


def make_views(images: Tensor, rows: Tensor, epoch: int, config: Config, statistics: tuple[list, list]) -> Tensor:
    """uint8 images [1, B, h, w, 3] on the device -> standardised views [V, B, 3, size, size]. Of [2, B, ...] the second
    are each image's temporal partner, which the last view shows."""
    count = 3 if config.decouple_views else 2 if config.image_image != "none" else 1
    views = []
    for view in range(count):
        draws = data.draw(data.POLICIES[config.augment], images.shape[2], config.seed, epoch, rows.numpy(), view)
        shown = images[-1 if view == count - 1 else 0]
        views.append(data.standardise(data.augment(shown, draws, config.image_size), *statistics))
    return torch.stack(views)


def compute_losses(embeddings, batch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings -> (Eq. 4 and what else the method learns from, what to log of it)."""
    e, parts, logged = embeddings, {}, {}
    masked = losses.same_area(batch.areas) if config.mask_same_area else None
    if e.image is not None:
        parts["metadata_image"] = losses.metadata_image_loss(e.image, e.metadata, e.scale, masked)
        logged["temperature"] = 1 / e.scale
    if e.queue is not None:
        parts["image_image"] = losses.momentum_loss(e.first, e.second, e.queue, config.temperature)
    elif e.first is not None:
        options = (config.temperature, config.same_view_negatives, masked)
        parts["image_image"] = losses.image_image_loss(e.first, e.second, *options)
    if e.place is not None:
        parts["place"] = losses.place_loss(e.place, batch.places)
    if masked is not None:
        logged["masked"] = masked.float().mean()
    loss = losses.total_loss(
        parts.get("metadata_image"), parts.get("image_image"), config.loss_weight, parts.get("place")
    )
    figures = {f"{what}_{name}": getattr(part, what) for name, part in parts.items() for what in ("loss", "accuracy")}
    return loss, {"loss": loss} | figures | logged


def forward_backward(network, scaler, batch: Batch, config: Config, half: torch.autocast):
    """One forward of all views and the metadata, the losses in float32, one backward -> embeddings, what to log.

    With --micro-batch the same in the memory of a few samples: the backbones run without gradient, piece by piece;
    heads and losses once on all their features; then the backbones again, each piece with its features' gradient. They
    treat each sample by itself, so this is exact (the gradient cache of Gao et al., 2021).
    """
    if not config.micro_batch:
        views = batch.views(slice(None))  # outside of autocast, as everywhere below: augmentation is float32
        with half:
            embeddings = network(views, batch.metadata)
        loss, logged = compute_losses(embeddings, batch, config)
        scaler.scale(loss).backward()
        return embeddings, logged

    pieces = [slice(i, i + config.micro_batch) for i in range(0, batch.size, config.micro_batch)]
    encode = lambda piece, views: network.encode(views, tuple(x[piece] for x in batch.metadata))  # noqa: E731
    features, keys = [], []
    for piece in pieces:
        views = batch.views(piece)
        with half:
            with torch.no_grad():
                features.append(encode(piece, views))
            keys.append(network.encode_keys(views))
    features = [torch.cat(parts).requires_grad_() for parts in zip(*features)]
    with half:
        embeddings = network.project(features, None if keys[0] is None else torch.cat(keys))
    loss, logged = compute_losses(embeddings, batch, config)
    scaler.scale(loss).backward()
    for piece in pieces:
        views = batch.views(piece)
        with half:
            again = encode(piece, views)
        torch.autograd.backward(again, [x.grad[piece] for x in features])
    if dist.is_initialized():  # DistributedDataParallel would do so after each piece
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        means = mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, means.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))
    return embeddings, logged


def train_step(
    network, optimizer, scaler, batch: Batch, config: Config, amp: torch.dtype | None, also: dict[str, float]
) -> dict[str, Tensor]:
    """Forward, backward, one optimizer step -> what to log of it and `also`, as means over all processes.

    If one of these figures is not finite, in any process, then none takes the step. They share one all-reduce, and
    the device decides by itself: an optimizer with fused=True leaves weights and moments alone where found_inf is 1.
    """
    model = network.module if isinstance(network, DistributedDataParallel) else network
    statistics = [buffer for name, buffer in model.named_buffers() if name not in ("queue", "enqueued")]  # BatchNorm's
    before, device = [buffer.clone() for buffer in statistics], next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    half = torch.autocast(device.type, amp, enabled=amp is not None)
    embeddings, logged = forward_backward(network, scaler, batch, config, half)
    scaler.unscale_(optimizer)
    logged["gradient"] = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    logged |= {name: torch.full((), float(value), device=device) for name, value in also.items()}
    means = mean(torch.stack([value.detach().float() for value in logged.values()]))
    skipped = ~means.isfinite().all()
    optimizer.found_inf = skipped.float()
    optimizer.step()  # not the scaler's, which would put its own found_inf in place of this one
    scaler.update()
    with torch.no_grad():
        for buffer, old in zip(statistics, before):
            buffer.copy_(torch.where(skipped, old, buffer))
        if config.image_image == "moco":
            model.enqueue(losses.gather(embeddings.second), skipped)
            model.follow(config.key_momentum, skipped)
        if embeddings.scale is not None:
            model.logit_scale.clamp_(0, losses.MAX_SCALE)
    return dict(zip(logged, means)) | {"skipped": skipped.float()}


# -----------------------------------------------------------------------------------------------------
# Figures of a stretch of steps

COUNTS = ("skipped", "unreadable")  # these are summed; of all others, the mean over the steps not skipped is told


class Meter:
    """Sums what steps log, without waiting for the device until it is read."""

    def __init__(self, device: torch.device, state: dict | None = None):
        """state: of a meter in a checkpoint, to go on from"""
        state = state or {"sums": {}, "steps": 0, "waited": 0.0, "seconds": 0.0}
        self.sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        self.steps, self.waited, self.began = state["steps"], state["waited"], time.perf_counter() - state["seconds"]

    def add(self, logged: dict[str, Tensor], waited: float) -> None:
        """waited: seconds that this step waited for its images."""
        for name, value in logged.items():
            if name not in COUNTS:
                value = torch.where(logged["skipped"] > 0, 0, value)
            self.sums[name] = value + self.sums.get(name, 0)
        self.steps, self.waited = self.steps + 1, self.waited + waited

    def state(self) -> dict:
        """float32 as Python's floats and back is exact."""
        sums = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        seconds = time.perf_counter() - self.began
        return {"sums": dict(zip(self.sums, sums)), "steps": self.steps, "waited": self.waited, "seconds": seconds}

    def read(self, device: torch.device, batch_size: int) -> dict[str, float]:
        """Means over steps, counts, speed, share of the time spent waiting for images, memory in bytes."""
        state = self.state()
        sums, seconds, taken = state["sums"], state["seconds"], max(1, self.steps - state["sums"]["skipped"])
        figures = {name: value if name in COUNTS else value / taken for name, value in sums.items()}
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_memory()
        speed = {"images_per_second": self.steps * batch_size / seconds, "wait": self.waited / seconds}
        return figures | speed | {"seconds": seconds, "memory": peak}


def resident_memory() -> int:
    """The most bytes that this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(figures: dict[str, float]) -> str:
    """Figures as one readable stretch of a line."""
    known = {"images_per_second", "wait", "seconds", "memory", *COUNTS}
    terms = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items() if name not in known]
    terms += [f"{name} {figures[name]:.0f}" for name in COUNTS if figures[name]]
    return (
        "  ".join(terms) + f"  {figures['images_per_second']:.0f} images/s  wait {figures['wait']:.1%}"
        f"  {figures['memory'] / 2**30:.1f} GiB"
    )


# -----------------------------------------------------------------------------------------------------
# What goes wrong while it runs

REQUEUE = 75  # exit status after SIGTERM or SIGUSR1: EX_TEMPFAIL, "try again later"
MOST_SKIPPED = 10  # steps in a row


class Signals:
    """SIGTERM and SIGUSR1 (Slurm's --signal) ask for an end after this step; a second one ends at once."""

    def __init__(self):
        self.since = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        if self.since is None:
            self.since = time.monotonic()
        elif time.monotonic() - self.since > 1:  # within a second it is the same one again, passed on by torchrun
            os._exit(128 + number)

    @staticmethod
    def reset() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)


class Watch:
    """Looks at every step, one step late: its figures are then on the host, and the device need not be waited for.

    They are means over all processes, so that all see the same, and stop, or go on, together.
    """

    def __init__(self, world: World, material: TrainingData, scaler: torch.amp.GradScaler, log: list[dict]):
        self.world, self.scaler, self.log = world, scaler, log
        self.config, self.split, self.partners = material.config, material.splits[0], material.partners
        self.run, self.last, self.skipped, self.unreadable = Path(self.config.output), None, 0, {}

    def look(self, step: int | None = None, logged: dict | None = None, faults: dict | None = None) -> bool:
        """Judge the step before and keep this one for later (none: before a checkpoint) -> whether to stop."""
        last, self.last = self.last, None
        if step is not None:
            figures = torch.stack(list(logged.values())).to("cpu", non_blocking=True)
            arrived = torch.cuda.current_stream().record_event() if self.world.device.type == "cuda" else None
            self.last = step, list(logged), figures, arrived, faults
        return last is not None and self.judge(*last)

    def judge(self, step: int, names: list[str], figures: Tensor, arrived, faults: dict[str, str]) -> bool:
        if arrived:
            arrived.synchronize()
        figures = dict(zip(names, figures.tolist()))
        if figures["unreadable"]:
            self.quarantine(faults)
        broken = [name for name, value in figures.items() if not math.isfinite(value)]
        if broken == ["gradient"] and self.scaler.is_enabled():  # how the scaler finds its scale, by halving
            broken = []
            if self.scaler.get_scale() < 1:
                raise BadInput("fp16 gradients overflow at any scale; try --amp bf16, or a lower --base-lr")
        self.skipped = self.skipped + 1 if broken else 0
        if broken:
            self.world.first(lambda: self.note_skipped(step, broken))
        if self.skipped == MOST_SKIPPED:
            raise BadInput(
                f"{broken[0]} was not finite in {self.skipped} steps in a row, the last of them {step + 1}; "
                f"{self.run / 'log.jsonl'} names their files; try a lower --base-lr"
            )
        return figures["stop"] > 0

    def note_skipped(self, step: int, broken: list[str]) -> None:
        config, n = self.config, len(self.split)
        rows = data.Order(n, config.batch_size, config.seed)[step]  # of all processes
        rows = torch.cat([rows, self.partners(rows, step)]) if self.partners else rows
        files = [self.split.names[row] for row in rows.tolist()]
        self.log.append({"step": step + 1, "not_finite": broken, "files": files})
        write_lines(self.run / "log.jsonl", self.log)
        print(f"step {step + 1} skipped, not finite: {', '.join(broken)}; log.jsonl names its files", flush=True)

    def quarantine(self, faults: dict[str, str]) -> None:
        known, path = len(self.unreadable), self.run / "quarantine.jsonl"
        for found in self.world.gather(faults):
            self.unreadable |= found

        def note() -> None:  # beside what an earlier part of this run has met
            old = {entry["file_name"]: entry["reason"] for entry in read_lines(path)}
            listed = (old | self.unreadable).items()
            write_lines(path, [{"file_name": name, "reason": reason} for name, reason in listed])

        if len(self.unreadable) > known:
            self.world.first(note)
        config = self.config
        if len(self.unreadable) > config.max_bad * len(self.split):
            raise BadInput(
                f"{len(self.unreadable)} of {len(self.split):,} training images cannot be read, more than --max-bad "
                f"{config.max_bad:g}; {path} lists them; one is {next(iter(self.unreadable.values()))}"
            )


# -----------------------------------------------------------------------------------------------------
# Cost report: each part of a step, and each method beside SimCLR as in the paper's Tables 6 and S8 (--benchmark)

COMPARED = [("simclr", "text"), ("satmip", "text"), ("satmip", "table"), ("satmips", "text"), ("satmips", "table")]


def set_costs(model: SatMIP, config: Config) -> None:
    """--checkpoint-blocks and --compile: the same results under the same names, at another cost."""
    for module in model.modules():
        if isinstance(module, Block):
            module.checkpointed = config.checkpoint_blocks
    if config.compile:
        torch._dynamo.config.optimize_ddp = config.vit != "resnet50"  # in which its cut between buckets fails
        # encoders whole: block by block, the variants of one forward would pass dynamo's limit of 8
        for encoder in [model.image_encoder] + ([model.key_encoder] if config.image_image == "moco" else []):
            encoder.compile()
        if model.config.metadata_encoder != "none":
            model.metadata_encoder.compile()


def write_synthetic(folder: Path, size: int, rows: int) -> None:
    """A dataset with 64 JPEG files for all its rows; its records are the poster's at other scales, times and places."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (folder / split).mkdir()
        for i in range(64):
            smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((size, size))
            pixels = np.asarray(smooth) + rng.normal(0, 8, (size, size, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / f"{i}.jpg", quality=90)
        gsd, places = rng.uniform(0.3, 3, (rows, 2)), rng.uniform((-180, -60), (180, 75), (rows, 2))
        when = [f"20{10 + i % 8}-{1 + i % 12:02d}-{1 + i % 28:02d}T{i % 24:02d}:30:08Z" for i in range(rows)]
        own = [{"gsd": gsd[i].tolist(), "location": places[i].tolist(), "timestamp": when[i]} for i in range(rows)]
        records = [json.dumps(POSTER | own[i] | {"file_name": f"{i % 64}.jpg"}) + "\n" for i in range(rows)]
        (folder / split / "metadata.jsonl").write_text("".join(records))


def now(device: torch.device):
    """The moment at which the device has done all that it has been given so far; it is not waited for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(begin, end) -> float:
    if isinstance(begin, float):
        return 1e3 * (end - begin)
    end.synchronize()
    return begin.elapsed_time(end)


class Costed:
    """A method ready to train, whose steps are those of training and note when each of their parts begins and ends."""

    def __init__(self, config: Config, world: World):
        self.world, self.material, self.amp = world, TrainingData(config, world), precision(config, world.device)
        self.network, self.moments, self.waits = build_model(self.material).to(world.device).train(), [], []
        self.optimizer = make_optimizer(self.network, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp == torch.float16)
        counter, empty = FlopCounterMode(display=False), torch.zeros(2, *[config.image_size] * 2, 3, dtype=torch.uint8)
        with sdpa_kernel(SDPBackend.MATH):  # not all the others are counted
            self.step(data.Loaded(empty, torch.arange(2), ()), counter, micro_batch=0)
        self.flops = counter.get_total_flops() / 2  # of a sample, forward and backward, nothing computed twice
        self.moments.clear()
        set_costs(self.network, config)
        self.network = networked(self.network, world, config)
        note = lambda *_: self.moments[-1].append(now(world.device))  # noqa: E731
        self.network.register_forward_pre_hook(note)
        self.network.register_forward_hook(note)
        self.optimizer.register_step_pre_hook(note)
        self.optimizer.register_step_post_hook(note)

    def step(self, loaded: data.Loaded, watch=contextlib.nullcontext(), **changed) -> None:
        m, device = self.material, self.world.device
        config = dataclasses.replace(m.config, **changed)
        self.moments.append([now(device)])
        batch = m.to_device(loaded._replace(metadata=m.metadata.batch(loaded.rows)), 0, device)
        if not config.micro_batch:  # which makes its views itself, piece by piece
            views = batch.views(slice(None))
            batch = batch._replace(views=lambda piece: views[:, piece])
        self.moments[-1].append(now(device))
        with watch:
            train_step(self.network, self.optimizer, self.scaler, batch, config, self.amp, {})
        self.moments[-1].append(now(device))

    def milliseconds(self) -> dict[str, np.ndarray]:
        """Of each step so far and of its parts. The losses belong to the backward; a forward may come in pieces."""
        spans = []
        for begin, viewed, *forwards, before, after, end in self.moments:
            forward = sum(map(milliseconds, forwards[::2], forwards[1::2]))  # with --micro-batch within the backward
            backward = milliseconds(viewed, before) - forward
            optimizer, step = milliseconds(before, after), milliseconds(begin, end)
            spans.append([milliseconds(begin, viewed), forward, backward, optimizer, step])
        return dict(zip(("augment", "forward", "backward", "optimizer", "step"), np.array(spans).T))


def peak_memory(config: Config) -> int:
    """The most bytes that a process holds in training; on a CPU, beyond what it held before it had a model."""
    before, device = resident_memory(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    costed, size, n = Costed(config, World(0, 1, device)), config.image_size, config.batch_size
    costed.step(data.Loaded(torch.zeros(n, size, size, 3, dtype=torch.uint8), torch.arange(n), ()))  # has its moments
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_memory() - before


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some products of large matrices."""
    n, moments = 8192 if device.type == "cuda" else 1024, [now(device)]
    a = torch.ones(n, n, device=device, dtype=dtype)
    for _ in range(10):
        a @ a
        moments.append(now(device))
    return 2e3 * n**3 / min(map(milliseconds, moments, moments[1:]))


def cost_report(config: Config) -> None:
    """Print what a step of each method costs; with --output, add it to that file as JSON lines.

    The methods take turns on the same images, in another order each round, and are compared round by round, so that
    whatever else the machine does meets all of them alike. Communication is what a step gains without the all-reduce
    of its gradients (DistributedDataParallel.no_sync): the part of it that the backward does not hide.
    """
    world = World.join()
    compared = COMPARED + [(config.method, config.metadata_encoder)] * (config.method not in dict(COMPARED))
    n = len(compared)
    with tempfile.TemporaryDirectory() as folder:
        if not config.data:
            write_synthetic(Path(folder), config.image_size, max(256, config.batch_size))
        width = {"text": TEXT_WIDTH, "table": TABLE_WIDTH, config.metadata_encoder: config.metadata_width}
        parts = {"metadata_image": False, "image_image": "none", "geo": False, "temporal": False}
        configs = []
        for method, encoder in compared:
            changed = {name: value for name, value in METHODS[method].items() if name in parts}
            changed |= {"method": method, "metadata_encoder": encoder, "metadata_width": width[encoder]}
            both = {"metadata_image", "image_image"} <= changed.keys()
            changed |= {"decouple_views": config.decouple_views and both, "data": config.data or folder}
            configs.append(dataclasses.replace(config, **(parts | changed)))

        def memories() -> list[int]:
            """What a process has held never falls, so each method has a process of its own, with one's share."""
            shares = [dataclasses.replace(c, batch_size=c.batch_size // world.size, workers=0) for c in configs]
            multiprocessing.set_forkserver_preload(["train"])  # imports once, not once a process
            context = multiprocessing.get_context("forkserver")
            with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
                try:
                    return list(pool.map(peak_memory, shares))
                except BrokenProcessPool:
                    raise BadInput(f"--batch-size {config.batch_size}: killed, perhaps for want of memory") from None

        memory = world.first(memories)
        costed = [Costed(c, world) for c in configs]
        split, amp = costed[0].material.splits[0], costed[0].amp
        began = time.perf_counter()
        data.Images(split, config.image_size, [torch.arange(64) % len(split)], None, None, True)[0]
        decode = (time.perf_counter() - began) / 64
        turns = n * (1 + config.benchmark_rounds)  # the first round warms up
        overlapped = world.size > 1 and not config.micro_batch
        order = data.Order(len(split), config.batch_size, config.seed, world.rank, world.size)
        batches = data.load(split, config.image_size, order, config.workers, {}, range(turns))
        dtype, peak = amp or torch.float32, 0.0
        for turn in range(turns):
            if turn % n == 0:
                peak = max(peak, matrix_peak(world.device, dtype))
            method, asked = costed[(turn + turn // n) % n], time.perf_counter()
            batch = next(batches)
            method.waits.append(1e3 * (time.perf_counter() - asked))
            method.step(batch)
            if overlapped:
                with method.network.no_sync():
                    method.step(batch)

    cuda, local, every = world.device.type == "cuda", config.batch_size // world.size, 2 if overlapped else 1
    machine = {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(), "torch": str(torch.__version__),
        "processes": world.size, "threads": torch.get_num_threads(), "precision": str(dtype),
        "peak GFLOP/s": peak / 1e9, "decoded images/s a worker": 1 / decode,
    }  # fmt: skip
    entries, base = [], costed[0].milliseconds()["step"][::every][1:]
    for c, method, held in zip(configs, costed, memory):
        spans = method.milliseconds()
        synced, alone = ({k: v[i::every][1:] for k, v in spans.items()} for i in (0, every - 1))
        times = {name: float(np.median(values)) for name, values in synced.items()}
        if not config.micro_batch:  # whose all-reduce comes after the backward, which includes it
            times["communication"] = float(np.median(synced["step"] - alone["step"]))
        times["wait"] = float(np.mean(method.waits[1:]))  # it comes in bursts
        name = f"{c.method} ({c.metadata_encoder})" if c.metadata_image else c.method
        speed = method.flops * local / times["step"] * 1e3
        entries.append({
            "method": name, "ms": times,
            "samples/s": config.batch_size / (times["step"] + times["wait"]) * 1e3,
            "GFLOP a sample": method.flops / 1e9, "GFLOP/s a process": speed / 1e9, "of peak": speed / peak,
            "GiB": held / 2**30, "time": float(np.median(synced["step"] / base)), "memory": held / memory[0],
            "machine": machine, "config": asdict(method.material.config),
        })  # fmt: skip

    def table(title: str, rows: list[dict]) -> str:
        shown = lambda value: value if isinstance(value, str) else f"{value:.4g}"  # noqa: E731
        return f"\n{title}\n\n" + evaluate.markdown([list(rows[0]), *(list(map(shown, row.values())) for row in rows)])

    world.print(table(f"Batch {config.batch_size}, {config.image_size} px, {config.vit}", [machine]))
    world.print(table("Milliseconds a step", [{"method": e["method"]} | e["ms"] for e in entries]))
    plain = [{k: v for k, v in e.items() if k not in ("ms", "machine", "config")} for e in entries]
    world.print(table("Speed and memory of a process; time and memory relative to SimCLR", plain))
    if config.output and world.rank == 0:
        with open(config.output, "a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
    world.part()


# -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    try:
        with data.errors_in_one_line(WrongWeights):
            config, preset = parse_config(argv)
            cost_report(config) if config.benchmark else train(config, preset)
    except KeyboardInterrupt:
        print("interrupted; start again to resume from the last checkpoint")
        sys.exit(128 + signal.SIGINT)
    finally:
        Signals.reset()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would complain of what comes now:
        for worker in multiprocessing.active_children():  # left only when something went wrong
            worker.kill()
        error = sys.exception()
        code = getattr(error, "code", 1)
        if dist.is_initialized() and dist.get_world_size() > 1 and error and code != REQUEUE:
            # Others may wait for this process, and NCCL's group would wait for them before it lets go: just end
            print(code, file=sys.stderr) if isinstance(code, str) else traceback.print_exception(error)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
        if dist.is_initialized():
            dist.destroy_process_group()


def train(config: Config, preset: str) -> None:
    """The whole run, in the order of its banners."""
    # --- processes, data, model ---
    world = World.join()
    device, amp = world.device, precision(config, world.device)
    if preset.startswith("demo") and world.first(lambda: not Path(config.data).exists()):
        world.print(f"no --data: preparing the embedded data (NASA imagery, about a minute, once) in {config.data}")
        world.first(lambda: data.prepare_demo(Path(config.data)))
    material = TrainingData(config, world)
    config, fields, splits, per_epoch = material.config, material.fields, material.splits, material.per_epoch
    path, saved, start = Path(config.output) / "checkpoint.pt", {}, 0
    world.first(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    resumed = world.first(lambda: find_checkpoint(path))
    model = build_model(material)
    if config.init and not resumed:  # NOTE[PAPER] channel statistics stay the dataset's, whatever the weights had seen
        world.print(load_encoder(model.image_encoder, Path(config.init), config.init_source))
        if config.image_image == "moco":
            model.follow(0.0, torch.tensor(False))  # the key encoder starts there, too
    model.to(device).train()
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    # --- resume ---
    derived = {
        "fields": [asdict(field) for field in fields],
        "schema": asdict(material.schema) if material.encoder == "table" else material.schema,
        "rows": f"{len(splits[0])} {hashlib.sha256(splits[0].names.values).hexdigest()}",
    }  # fmt: skip
    if resumed:
        saved = restore(path, config, derived, model, optimizer, scaler)
        start = saved["step"]
    set_costs(model, config)
    log = [entry for entry in read_lines(path.with_name("log.jsonl")) if entry["step"] <= start]
    network = networked(model, world, config)

    # --- say what is about to happen ---
    steps = config.epochs * per_epoch
    options = asdict(config)
    world.print(f"{preset} preset and your options: " + ", ".join(f"{name}={value}" for name, value in options.items()))
    world.print(
        f"{len(splits[0]):,} training and {len(splits[1]):,} test images; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; "
        f"batch {config.batch_size // world.size} x {world.size} processes = {config.batch_size}; "
        f"learning rate {config.base_lr:g} x {config.batch_size} / 256 = {config.base_lr * config.batch_size / 256:g}; "
        f"{config.epochs} epochs of {per_epoch} steps; {device.type}, {amp or torch.float32}"
    )
    if start:
        world.print(f"resumed {path} after step {start:,} of {steps:,}")
    if start and saved["processes"] != world.size:
        world.print(f"on {world.size} processes, before on {saved['processes']}: same data, but not the same last bits")

    # --- what is saved, and what ends an epoch ---
    labels = evaluate.label_names(splits)
    trained = evaluate.Pretrained(model, fields, material.schema, device)
    whole = Meter(device, saved.get("epoch_so_far"))

    def state(step: int) -> dict:
        """All that the next step depends on. No random state: randomness is a function of seed, epoch, row and view."""
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        return {
            "model": model.state_dict(), "model_config": asdict(model.config), "config": options, **derived,
            "geo_centres": material.centres,
            "channel_mean": material.statistics[0], "channel_std": material.statistics[1], "step": step,
            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "epoch_so_far": whole.state(),
            "processes": world.size, "versions": versions,
        }  # fmt: skip

    def save(step: int) -> None:
        world.first(lambda: save_checkpoint(path, state(step), config.keep))

    def monitored(epoch: int) -> bool:
        return bool(config.eval_every and epoch % config.eval_every == 0 and labels)

    def log_epoch(step: int) -> None:
        epoch = step // per_epoch
        rate = learning_rate(config, step - 1, per_epoch)
        entry = {"epoch": epoch, "step": step, "lr": rate, **whole.read(device, config.batch_size)}
        if monitored(epoch):
            size, workers = config.image_size, config.workers
            try:
                options = (material.statistics, "image", size, workers)
                pair = [evaluate.extract(trained, split, *options)["image"] for split in splits]
                scores = evaluate.score_all({"image": tuple(pair)}, splits, labels[:1], ["knn"])
                entry[f"knn_{labels[0]}"] = {str(r["k"]): r["accuracy"] for r in scores}
                shown = ", ".join(f"{100 * r['accuracy']:.1f} (k={r['k']})" for r in scores)
                world.print(f"kNN accuracy on {labels[0]}: {shown}")
            except BadInput as error:  # scores are of what is there, or none; training need not end for it
                world.print(f"not scored: {error}")
            model.train()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # the next epoch's figure is of training again
        log[:] = [old for old in log if old.get("epoch") != epoch] + [entry]
        write_lines(path.with_name("log.jsonl"), log)

    def end_epoch(step: int) -> None:
        """The log first: an entry without its checkpoint is dropped at the next start, and made anew."""
        nonlocal whole
        world.first(lambda: log_epoch(step))
        whole = Meter(device)
        save(step)

    # --- train ---
    if whole.steps == per_epoch:  # stopped between an epoch's last step and its end
        end_epoch(start)
    faults = {}
    batches = material.batches(world, range(start, steps), faults)
    watch, signals = Watch(world, material, scaler, log), Signals()
    began, line = time.perf_counter(), Meter(device)
    for step in range(start, steps):
        epoch, asked = step // per_epoch, time.perf_counter()
        loaded = next(batches)
        waited = time.perf_counter() - asked
        rate = learning_rate(config, step, per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = material.to_device(loaded, step, device)
        also = {"unreadable": len(faults) * world.size, "stop": signals.since is not None}
        logged = train_step(network, optimizer, scaler, batch, config, amp, also)
        stop = watch.look(step, logged, dict(faults))
        faults.clear()
        del logged["stop"]
        line.add(logged, waited)
        whole.add(logged, waited)

        epoch_ends = (step + 1) % per_epoch == 0
        if line.steps == config.log_every or epoch_ends:
            figures = line.read(device, config.batch_size)
            left = timedelta(seconds=round((time.perf_counter() - began) / (step + 1 - start) * (steps - step - 1)))
            where = f"epoch {epoch + 1}/{config.epochs} step {step + 1}/{steps}"
            world.print(f"{where}  {describe(figures)}  lr {rate:.1e}  {left} left")
            line = Meter(device)
        due = config.save_every and (step + 1) % config.save_every == 0
        due = due or epoch_ends and monitored(epoch + 1)  # an evaluation is long, and may be killed
        if due or stop or epoch_ends:
            stop = watch.look() or stop  # nothing is saved of a step that nobody has looked at
        if due or stop:
            save(step + 1)
        if stop:
            world.print(f"told to stop: saved after step {step + 1:,}; start again to resume")
            world.part()
            sys.exit(REQUEUE)
        if epoch_ends:
            end_epoch(step + 1)
    signals.reset()  # all is saved

    # --- report ---
    if labels:
        table = world.first(lambda: evaluate.report(path, splits, config.workers, device))
        world.print(f"\n{table}\n\nin {path.parent}: " + ", ".join(sorted(file.name for file in path.parent.iterdir())))
    world.part()


if __name__ == "__main__":
    main()
