"""Pretrain SatMIP, SatMIPS or SimCLR (paper, Section 3 and 4.2, supplement B).

    python train.py --method satmips                                  # embedded data, 2 CPU cores, some minutes
    torchrun --nproc_per_node=4 train.py --method satmips --data DIR  # the paper's settings, 4 GPUs

In this order: options and presets -> processes -> learning rate -> checkpoint -> one step -> report -> main. Without
--data the embedded data are prepared and the demo preset is the default; with --data the defaults are the paper's.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import platform
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import losses
from metadata import DEFAULT_FIELDS, BadInput, TableSchema
from model import SOURCES, VITS, ModelConfig, SatMIP, WrongWeights, load_encoder, parameter_groups

# -----------------------------------------------------------------------------------------------------
# Options: the defaults are the paper's


@dataclass(frozen=True)
class Method:
    """A method is the losses it has. NOTE[PAPER] the paper's table of base learning rates and weight decays is
    lost: SLIP's values for SimCLR, CLIP and SLIP, taken from its batch of 4096 to 256 by the linear rule."""

    metadata_image: bool
    image_image: bool
    base_lr: float
    weight_decay: float


METHODS = {
    "simclr": Method(False, True, 2.0e-4, 0.1),
    "satmip": Method(True, False, 3.125e-5, 0.5),
    "satmips": Method(True, True, 1.875e-4, 0.1),
}
LR_START, LR_END = 1e-6, 1e-5  # NOTE[PAPER] where warm-up starts and the cosine ends: SLIP's
AUGMENTATIONS = tuple(data.POLICIES)
TEXT_WIDTH, TABLE_WIDTH = 512, 192  # NOTE[PAPER] Section 4.2 says 512 for both, supplement B 192 for the table


def option(default, text: str, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every option; `None` means the value that the help names."""

    method: str = option("satmips", "what to learn from", tuple(METHODS))
    data: str = option("", "prepared dataset; default: the embedded data, cut into data/demo")
    output: str = option("", "run folder, resumed if it holds a checkpoint; default: runs/METHOD or runs/demo-METHOD")
    metadata_encoder: str = option("text", "how metadata is encoded", ("text", "table"))
    fields: str = option("", f"metadata fields in order or 'all'; default: DIR/fields.json's, else {DEFAULT_FIELDS}")
    vit: str = option("vit_small", "image encoder", tuple(VITS))
    init: str = option("", "file of weights that the image encoder starts from (Table 4)")
    init_source: str = option("satmip", "whose weights; satmip: a checkpoint of this program", tuple(SOURCES))
    image_size: int = option(224, "side of a view in px")
    patch_size: int = option(16, "side of a patch in px")
    metadata_width: int | None = option(None, f"width of the metadata encoder (text {TEXT_WIDTH}, table {TABLE_WIDTH})")
    metadata_layers: int = option(3, "layers of the metadata encoder")
    mlp_hidden: int = option(4096, "hidden width of the SimCLR head")
    epochs: int = option(200, "passes over the train split")
    batch_size: int = option(1024, "images a step over all processes")
    base_lr: float | None = option(None, "learning rate for a batch of 256, scaled linearly (by method)")
    weight_decay: float | None = option(None, "AdamW's (by method)")
    warmup_epochs: float = option(1, "epochs of linear warm-up")
    loss_weight: float = option(1.0, "lambda of Eq. 4, the weight of the image-image loss")
    temperature: float = option(0.1, "of the image-image loss; that of the metadata-image loss is learned")
    same_view_negatives: bool = option(False, "2K-1 terms in Eq. 3 as SimCLR and SLIP, not the K printed")
    decouple_views: bool = option(False, "a third view for the metadata (Table 6)")
    augment: str = option("strong", "augmentation policy (Table 6)", AUGMENTATIONS)
    amp: str = option("auto", "auto: bf16, fp16 where the GPU lacks it, off on CPU", ("auto", "bf16", "fp16", "off"))
    workers: int = option(8, "image-decoding workers a process")
    eval_every: int = option(25, "epochs between kNN scores on the test split; 0: never before the end")
    log_every: int = option(50, "steps between lines")
    seed: int = option(0, "of weights, data order and augmentation")


# What suits 2 CPU cores and 64 px images. The table encoder reads the three fields as 10 tokens; the paper's text
# encoder costs 3.6 GFLOP a sample, forty times this ViT, and a narrow one still as much as both views. Crops alone:
# these colours are calibrated measurements, and jitter and grayscale erase what the images differ in.
DEMO = {
    "metadata_encoder": "table", "vit": "vit_micro", "image_size": 64, "patch_size": 16, "metadata_width": 64,
    "mlp_hidden": 512, "epochs": 5, "batch_size": 64, "base_lr": 6e-3, "warmup_epochs": 0.3, "augment": "crop",
    "workers": 1, "eval_every": 2, "log_every": 100,
}  # fmt: skip


MAY_BE_ZERO = {"weight_decay", "warmup_epochs", "loss_weight", "workers", "eval_every", "seed"}


def parse_config(argv: list[str] | None) -> tuple[Config, str]:
    """Command line -> (configuration, name of the preset it started from)."""
    parser = argparse.ArgumentParser(description="Pretrain SatMIP, SatMIPS or SimCLR.", allow_abbrev=False)
    for f in dataclasses.fields(Config):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            kind = next(t for t in (int, float, str) if t is f.type or t in getattr(f.type, "__args__", ()))
            text += "" if f.default in (None, "") else f" (default {f.default})"
            parser.add_argument(flag, type=kind, choices=f.metadata["choices"], default=argparse.SUPPRESS, help=text)
    given = vars(parser.parse_args(argv))
    demo = "data" not in given
    config = Config(**((DEMO if demo else {}) | given))
    method = METHODS[config.method]
    derived = {
        "base_lr": method.base_lr if config.base_lr is None else config.base_lr,
        "weight_decay": method.weight_decay if config.weight_decay is None else config.weight_decay,
        "metadata_width": config.metadata_width or (TEXT_WIDTH if config.metadata_encoder == "text" else TABLE_WIDTH),
        "data": config.data or str(Path("data") / "demo"),
        "output": config.output or str(Path("runs") / f"{'demo-' if demo else ''}{config.method}"),
    }
    config = dataclasses.replace(config, **derived)
    for name, value in asdict(config).items():
        if name not in MAY_BE_ZERO and type(value) in (int, float) and not value > 0:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be positive")
        if name in MAY_BE_ZERO and not value >= 0:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must not be negative")
    if config.decouple_views and not (method.metadata_image and method.image_image):
        raise BadInput(f"--decouple-views: {config.method} has one kind of view only; use --method satmips")
    return config, "demo" if demo else "paper"


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
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))  # rank 0 evaluates alone
        return World(dist.get_rank(), dist.get_world_size(), device)

    def print(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def first(self, work):
        """Rank 0 does the work, everyone gets what it returns; its BadInput is raised everywhere."""
        result = None
        if self.rank == 0:
            try:
                result = work()
            except BadInput as error:
                result = error
        if self.size > 1:
            box = [result]
            dist.broadcast_object_list(box)
            result = box[0]
        if isinstance(result, BadInput):
            raise result
        return result

    def mean(self, values: Tensor) -> list[float]:
        """Mean over processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return (values / self.size).tolist()


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
# Checkpoint: plain types and tensors only, so that it loads with weights_only=True

FREE = {"data", "output", "workers", "eval_every", "log_every"}  # options that a resumed run may change


def save_checkpoint(path: Path, state: dict) -> None:
    """Written beside the old one, flushed to disk, then put in its place: a kill leaves one or the other, whole."""
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def restore(path: Path, config: Config, model: SatMIP, optimizer, scaler: torch.amp.GradScaler) -> int:
    """Put a checkpoint back -> the step it was saved after. BadInput when it belongs to another configuration."""
    state = evaluate.read_checkpoint(path)
    for name, value in asdict(config).items():
        if name not in FREE and state["config"].get(name) != value:
            flag, old = "--" + name.replace("_", "-"), state["config"].get(name)
            raise BadInput(f"{path}: made with {flag} {old}, not {value}; choose another --output")
    evaluate.load_weights(model, state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["step"]


# -----------------------------------------------------------------------------------------------------
# One step


def make_views(images: Tensor, rows: Tensor, epoch: int, config: Config, statistics: tuple[list, list]) -> Tensor:
    """uint8 images [B, h, w, 3] on the device -> standardised views [V, B, 3, size, size]."""
    method, policy = METHODS[config.method], data.POLICIES[config.augment]
    count = 3 if config.decouple_views else 2 if method.image_image else 1
    views = []
    for view in range(count):
        draws = data.draw(policy, images.shape[1], config.seed, epoch, rows.numpy(), view)
        views.append(data.standardise(data.augment(images, draws, config.image_size), *statistics))
    return torch.stack(views)


def compute_losses(embeddings, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings -> (Eq. 4, what to log of it)."""
    e, logged, metadata_image, image_image = embeddings, {}, None, None
    if e.image is not None:
        metadata_image = losses.metadata_image_loss(e.image, e.metadata, e.scale)
        logged |= {"loss_metadata_image": metadata_image.loss, "accuracy_metadata_image": metadata_image.accuracy}
    if e.first is not None:
        image_image = losses.image_image_loss(e.first, e.second, config.temperature, config.same_view_negatives)
        logged |= {"loss_image_image": image_image.loss, "accuracy_image_image": image_image.accuracy}
    loss = losses.total_loss(metadata_image, image_image, config.loss_weight)
    return loss, {"loss": loss} | logged


def train_step(
    network, optimizer, scaler, views: Tensor, metadata, config: Config, amp: torch.dtype | None
) -> dict[str, Tensor]:
    """One forward of all views and the metadata, the losses in float32, one optimizer step -> what to log."""
    with torch.autocast(views.device.type, amp, enabled=amp is not None):
        embeddings = network(views, metadata)
    loss, logged = compute_losses(embeddings, config)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    if embeddings.scale is not None:
        model = network.module if isinstance(network, DistributedDataParallel) else network
        with torch.no_grad():
            model.logit_scale.clamp_(0, losses.MAX_SCALE)
        logged["temperature"] = 1 / embeddings.scale
    return {name: value.detach() for name, value in logged.items()}


# -----------------------------------------------------------------------------------------------------
# Figures of a stretch of steps


class Meter:
    """Sums what steps log, without waiting for the device until it is read."""

    def __init__(self):
        self.sums, self.steps, self.waited, self.began = {}, 0, 0.0, time.perf_counter()

    def add(self, logged: dict[str, Tensor], waited: float) -> None:
        """waited: seconds that this step waited for its images."""
        self.sums = {name: value.float() + self.sums.get(name, 0) for name, value in logged.items()}
        self.steps, self.waited = self.steps + 1, self.waited + waited

    def read(self, world: World, batch_size: int) -> dict[str, float]:
        """Means over steps and processes, speed, share of the time spent waiting for images, memory in bytes."""
        means = dict(zip(self.sums, world.mean(torch.stack(list(self.sums.values())) / self.steps)))
        if not math.isfinite(means["loss"]):
            bad = next(name for name, value in means.items() if not math.isfinite(value))
            raise BadInput(f"{bad} became {means[bad]} within the last {self.steps} steps; try a lower --base-lr")
        seconds = time.perf_counter() - self.began
        peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else resident_memory()
        speed = {"images_per_second": self.steps * batch_size / seconds, "wait": self.waited / seconds}
        return means | speed | {"seconds": seconds, "memory": peak}


def resident_memory() -> int:
    """The most bytes that this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(figures: dict[str, float]) -> str:
    """Figures as one readable stretch of a line."""
    known = {"images_per_second", "wait", "seconds", "memory"}
    terms = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items() if name not in known]
    return (
        "  ".join(terms) + f"  {figures['images_per_second']:.0f} images/s  wait {figures['wait']:.1%}"
        f"  {figures['memory'] / 2**30:.1f} GiB"
    )


# -----------------------------------------------------------------------------------------------------
# What is said of a run at its end


def report(trained: evaluate.Pretrained, untrained: evaluate.Pretrained, splits, statistics, config: Config) -> str:
    """Score colour histograms, the untrained network and the trained one alike, draw the two pictures -> a table."""
    run, size, workers, device = Path(config.output), config.image_size, config.workers, trained.device
    modality = "image" if trained.encoder == "none" else "both"
    before = [evaluate.extract(untrained, split, statistics, "image", size, workers) for split in splits]
    after = [evaluate.extract(trained, split, statistics, modality, size, workers) for split in splits]
    name = config.method if trained.encoder == "none" else f"{config.method} ({trained.encoder})"
    features = {
        "colour histograms": [evaluate.histograms(split, size, workers) for split in splits],
        "untrained, image": [f["image"] for f in before],
        f"{name}, image": [f["image"] for f in after],
    }
    if modality == "both":
        features[f"{name}, metadata"] = [f["metadata"] for f in after]
        features[f"{name}, both"] = [evaluate.join(f) for f in after]
        features["location only"] = [evaluate.locations(split) for split in splits]
    features = {key: pair for key, pair in features.items() if pair[0] is not None and pair[1] is not None}
    features = {key: tuple(x.to(device) for x in pair) for key, pair in features.items()}
    labels = evaluate.label_names(splits)
    results = evaluate.score_all(features, splits, labels, ["knn", "linear"])
    with open(run / "results.jsonl", "w") as file:
        file.writelines(json.dumps({"method": config.method, "seed": config.seed, **r}) + "\n" for r in results)
    evaluate.picture_neighbours(features[f"{name}, image"], splits, labels[0], run / "neighbours.png")
    if any(field.name == "location" for field in trained.fields) and modality == "both":
        evaluate.picture_places(trained, splits[1], statistics, size, run / "places.png")
    return evaluate.format_table(results)


# -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    try:
        train(*parse_config(argv))
    except (BadInput, WrongWeights, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(config: Config, preset: str) -> None:
    """The whole run, in the order of its banners."""
    # --- processes and precision ---
    world = World.join()
    device, method = world.device, METHODS[config.method]
    if config.batch_size % world.size:
        raise BadInput(f"--batch-size {config.batch_size}: not a multiple of the {world.size} processes")
    if config.batch_size == 1:
        raise BadInput("--batch-size 1: a contrastive loss needs something to contrast with; at least 2")
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None, "auto": None}[config.amp]
    if config.amp == "auto" and device.type == "cuda":
        amp = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16

    # --- data ---
    if preset == "demo" and world.first(lambda: not Path(config.data).exists()):
        world.print(f"no --data: preparing the embedded data (NASA imagery, about a minute, once) in {config.data}")
        world.first(lambda: data.prepare_demo(Path(config.data)))
    encoder = config.metadata_encoder if method.metadata_image else "none"
    fields = world.first(lambda: data.choose_fields(Path(config.data), config.fields))
    config = dataclasses.replace(config, fields=",".join(field.name for field in fields))
    world.first(lambda: bool(data.read_dataset(config.data, fields, captions=encoder == "text")))  # caches it for all
    splits = data.read_dataset(config.data, fields, captions=encoder == "text")
    if config.batch_size > len(splits[0]):
        raise BadInput(f"--batch-size {config.batch_size}: {config.data} has only {len(splits[0])} training images")
    table = splits[0].table
    rates = data.missing_rates(table, fields) if encoder != "none" else {}
    if rates and min(rates.values()) == 1:
        columns = ", ".join(splits[0].record(0))
        raise BadInput(f"--fields: {', '.join(rates)} missing in every row of {splits[0].source}; it has {columns}")
    for name in (name for name, rate in rates.items() if rate == 1):
        world.print(f"field {name} is missing in every training row: nothing is learned from it")
    schema = {
        "none": lambda: None, "text": lambda: np.unique(table.tokens.values).tolist(),
        "table": lambda: TableSchema.fit(fields, table.numbers, table.categories),
    }[encoder]()  # fmt: skip
    metadata, test_metadata = (data.Metadata(split.table, encoder, schema) for split in splits)
    context = -(-max(metadata.longest, test_metadata.longest) // 8) * 8  # in tokens, from the data
    statistics = world.first(lambda: data.channel_statistics(splits[0], config.image_size, config.workers))

    # --- model and optimizer ---
    model_config = ModelConfig(
        config.image_size, config.patch_size, config.vit, encoder, config.metadata_width, config.metadata_layers,
        vocabulary=len(schema) + 1 if encoder == "text" else 0, context=context,
        numbers=len(schema.numbers) if encoder == "table" else 0,
        categories=tuple(len(v) + 2 for v in schema.categories.values()) if encoder == "table" else (),
        image_image=method.image_image, mlp_hidden=config.mlp_hidden,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    try:
        model = SatMIP(model_config)
    except ValueError as error:
        raise BadInput(f"--vit, --image-size, --patch-size or --metadata-width: {error}") from None
    untrained = copy.deepcopy(model)
    if config.init:  # NOTE[PAPER] channel statistics stay the dataset's (supplement A), whatever the weights had seen
        world.print(load_encoder(model.image_encoder, Path(config.init), config.init_source))
    model.to(device).train()
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    # --- resume ---
    path, start = Path(config.output) / "checkpoint.pt", 0
    world.first(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    if world.first(path.exists):
        start = restore(path, config, model, optimizer, scaler)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # torch 2.14's new name for it is unknown to 2.11
    network = DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model

    # --- say what is about to happen ---
    per_epoch = len(splits[0]) // config.batch_size
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

    def state(step: int) -> dict:
        """All that a checkpoint holds. No random state: randomness is a function of seed, epoch, row and view."""
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        return {
            "model": model.state_dict(), "model_config": asdict(model_config), "config": options,
            "fields": [asdict(field) for field in fields], "schema": asdict(schema) if encoder == "table" else schema,
            "channel_mean": statistics[0], "channel_std": statistics[1], "step": step,
            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "versions": versions,
        }  # fmt: skip

    # --- train ---
    order = data.Order(len(splits[0]), config.batch_size, start, steps, config.seed, world.rank, world.size)
    batches = data.load(splits[0], config.image_size, order, config.workers)
    trained = evaluate.Pretrained(model, fields, schema, device)
    began, line, whole = time.perf_counter(), Meter(), Meter()
    for step in range(start, steps):
        epoch, asked = step // per_epoch, time.perf_counter()
        images, rows = next(batches)
        waited = time.perf_counter() - asked
        rate = learning_rate(config, step, per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        views = make_views(images.to(device, non_blocking=True), rows, epoch, config, statistics)
        logged = train_step(network, optimizer, scaler, views, metadata.batch(rows, device), config, amp)
        line.add(logged, waited)
        whole.add(logged, waited)

        epoch_ends = (step + 1) % per_epoch == 0
        if line.steps == config.log_every or epoch_ends:
            figures = line.read(world, config.batch_size)
            left = timedelta(seconds=round((time.perf_counter() - began) / (step + 1 - start) * (steps - step - 1)))
            where = f"epoch {epoch + 1}/{config.epochs} step {step + 1}/{steps}"
            world.print(f"{where}  {describe(figures)}  lr {rate:.1e}  {left} left")
            line = Meter()
        if epoch_ends:
            entry = {"epoch": epoch + 1, "step": step + 1, "lr": rate, **whole.read(world, config.batch_size)}
            monitored = config.eval_every and (epoch + 1) % config.eval_every == 0 and evaluate.label_names(splits)

            def finish_epoch() -> None:
                if monitored:
                    label, size, workers = monitored[0], config.image_size, config.workers
                    pair = [evaluate.extract(trained, s, statistics, "image", size, workers)["image"] for s in splits]
                    scores = evaluate.score_all({"image": tuple(pair)}, splits, [label], ["knn"])
                    model.train()
                    entry[f"knn_{label}"] = {str(r["k"]): r["accuracy"] for r in scores}
                    shown = ", ".join(f"{100 * r['accuracy']:.1f} (k={r['k']})" for r in scores)
                    world.print(f"kNN accuracy on {label}: {shown}")
                save_checkpoint(path, state(step + 1))
                with open(path.with_name("log.jsonl"), "a") as file:
                    file.write(json.dumps(entry) + "\n")

            world.first(finish_epoch)
            line, whole = Meter(), Meter()

    # --- report ---
    if evaluate.label_names(splits):
        before = evaluate.Pretrained(untrained.to(device), fields, schema, device)
        table = world.first(lambda: report(trained, before, splits, statistics, config))
        world.print(f"\n{table}\n\nin {path.parent}: " + ", ".join(sorted(file.name for file in path.parent.iterdir())))
    if world.size > 1:
        dist.barrier()  # nobody closes its connections while another still reads from them


if __name__ == "__main__":
    main()
