"""The one dataset format, how it is read, and what happens to a batch of images (Section 4.1-4.2, supplement A, B).

In this order: numbered randomness -> a split read into arrays -> loading images -> augmentation on the device
-> the embedded demo data.

    python data.py demo data/demo        # cut 64 px images with metadata and labels out of the maps in demo/

A dataset is a folder with train/ and test/, each holding images and a metadata.jsonl (the Hugging Face
ImageFolder convention), one JSON object a line:

    {"file_name": "000001.jpg", "gsd": [3010.2, 3010.2], "timestamp": "2004-10", "location": [12.5, 41.9],
     "area": "a17", "label_climate": "Csa"}

file_name is relative to the split's folder. Metadata fields go by the names in metadata.FIELDS and may be
absent. `area` (optional) is shared by images of the same place. `label` or `label_<name>` (optional) are classes.
"""

import argparse
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Iterable, Iterator, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metadata import BadInput, Field, TableSchema, Tokenizer, caption, table_row

# -----------------------------------------------------------------------------------------------------
# Randomness as a function of what it is for: (seed, epoch, sample, view, slot) -> a number. No generator
# whose state would have to be saved, and nothing depends on workers, processes or batch size.


def hashed(*keys: int | np.ndarray) -> np.ndarray:
    """Integer keys, broadcast together -> 64 random bits (the finaliser of SplitMix64, once a key)."""
    bits = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            bits = bits + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """As `hashed`, but float64 in [0, 1)."""
    return (hashed(*keys) >> np.uint64(11)) * 2.0**-53


# -----------------------------------------------------------------------------------------------------
# A split, read into arrays


class Strings:
    """n strings in two arrays instead of n Python objects: workers share the pages, nobody copies them."""

    def __init__(self, strings: list[str]):
        encoded = [s.encode() for s in strings]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return self.bytes[self.ends[i] : self.ends[i + 1]].tobytes().decode()


@dataclass
class Table:
    """The metadata of n records, field by field, not yet encoded."""

    captions: list[str]  # empty when not asked for
    numbers: np.ndarray  # [n, F_num] raw table features, NaN where missing
    categories: list[list[str | None]]  # one list of n values for each categorical field


def tabulate(records: Iterable[dict], fields: tuple[Field, ...], captions: bool) -> Table:
    """Records -> their table, and their captions if asked for."""
    texts, numbers, categories = [], [], []
    for record in records:
        if captions:
            texts.append(caption(record, fields))
        row = table_row(record, fields)
        numbers.append(row[0])
        categories.append(row[1])
    columns = [list(column) for column in zip(*categories)]
    return Table(texts, np.array(numbers, np.float64), columns)


@dataclass
class Split:
    """One split of a dataset: everything a row needs, as arrays."""

    folder: Path
    names: Strings  # file names, relative to the folder
    lines: list[int]  # where each row's line starts in metadata.jsonl, in bytes
    labels: dict[str, list[str | None]]  # label name -> class of each row
    table: Table

    def __len__(self) -> int:
        return len(self.names)

    def record(self, i: int) -> dict:
        """Row i as it stands in metadata.jsonl."""
        with open(self.folder / "metadata.jsonl", "rb") as file:
            file.seek(self.lines[i])
            return json.loads(file.readline())


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as a dict; of two values for one key, Python would silently take the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"a key comes twice among {[key for key, _ in pairs]}")
    return record


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")  # though Python reads NaN and Infinity


LONGEST_LINE = 2**20  # bytes; a record has some hundreds


def read_record(line: bytes, where: str) -> dict:
    """One line of metadata.jsonl -> its record. BadInput names the file and the line."""
    if len(line) > LONGEST_LINE:
        raise BadInput(f"{where}: {len(line):,} bytes; one record a line, of at most {LONGEST_LINE:,}")
    try:
        record = json.loads(line, object_pairs_hook=unique, parse_constant=refuse)
        if b"\\u" in line or not line.isascii():
            json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no text: UnicodeEncodeError
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("file_name"), str) or not record["file_name"]:
        raise BadInput(f'{where}: no "file_name"; each line is {{"file_name": "image.jpg", ...}}')
    path = PurePosixPath(record["file_name"])
    if path.is_absolute() or ".." in path.parts:
        raise BadInput(f"{where}: file_name {record['file_name']!r} leaves the data folder")
    return record


def read_split(folder: Path, fields: tuple[Field, ...], captions: bool = False) -> Split:
    """Read folder/metadata.jsonl. BadInput names what is wrong: the file, the line that is not JSON or lacks a
    file_name, the image that does not exist."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise BadInput(f"{path}: no such file; a dataset is a folder with train/ and test/, each with a metadata.jsonl")
    names, lines, labels = [], [], {}

    def records() -> Iterator[dict]:
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = read_record(line, f"{path}, line {number}")
                    for key in record:
                        if key == "label" or key.startswith("label_"):
                            labels.setdefault(key, [None] * len(names))
                    for key, column in labels.items():
                        value = record.get(key)
                        column.append(None if value is None else str(value))
                    if not os.path.isfile(folder / record["file_name"]):
                        raise BadInput(f"{folder / record['file_name']}: no such image ({path}, line {number})")
                    names.append(record["file_name"])
                    lines.append(offset)
                    yield record
                offset += len(line)

    table = tabulate(records(), fields, captions)
    if not names:
        raise BadInput(f"{path}: no rows")
    return Split(folder, Strings(names), lines, labels, table)


def read_dataset(folder: str | Path, fields: tuple[Field, ...], captions: bool = False) -> tuple[Split, Split]:
    """-> (train, test); what can be wrong is said at read_split"""
    return read_split(Path(folder) / "train", fields, captions), read_split(Path(folder) / "test", fields, captions)


def class_ids(name: str, *splits: Split) -> tuple[list[str], list[Tensor]]:
    """-> the classes of that label in any split, sorted (0, 1, ... if they are integers), and ids [n] of each
    split, -1 where a row has no label."""
    columns = [split.labels.get(name, [None] * len(split)) for split in splits]
    classes = sorted({value for column in columns for value in column if value is not None})
    if all(value.isdecimal() for value in classes):
        classes.sort(key=int)
    code = {value: i for i, value in enumerate(classes)} | {None: -1}
    return classes, [torch.tensor([code[value] for value in column]) for column in columns]


class Metadata:
    """The metadata of n rows as the encoder takes it: encoded once, then only indexed."""

    def __init__(self, table: Table, encoder: str, schema: TableSchema | None = None, context: int | None = None):
        """encoder: "text", "table" or "none". schema: for the table encoder. context: most tokens of a caption."""
        self.encoder, self.longest = encoder, 0
        if encoder == "text":
            tokens, lengths = Tokenizer()(table.captions, context)
            self.arrays, self.longest = (torch.from_numpy(tokens), torch.from_numpy(lengths)), tokens.shape[1]
        elif encoder == "table":
            self.arrays = tuple(map(torch.from_numpy, schema.encode(table.numbers, table.categories)))

    def batch(self, rows: Tensor, device: torch.device) -> tuple[Tensor, ...] | None:
        """Rows [B] -> what the metadata encoder's forward takes. Captions are padded to the longest of the batch."""
        if self.encoder == "none":
            return None
        first, second = (array[rows] for array in self.arrays)
        if self.encoder == "text":
            first = first[:, : int(second.max())].long()
        return first.to(device, non_blocking=True), second.to(device, non_blocking=True)


# -----------------------------------------------------------------------------------------------------
# Loading images: workers decode, nothing else


MAX_PIXELS = 500_000_000  # satellite images are large (fMoW has 20,000 px sides); still no bomb
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would only warn, up to twice its value
ATTEMPTS = 10  # at a row in place of one that cannot be read
MODES = ("RGB", "RGBA", "L", "LA", "P", "CMYK", "1")  # 8 bits a channel: what convert("RGB") reads right


def load_image(path: Path, size: int) -> np.ndarray:
    """-> uint8 [size, size, 3]; an image of another size is resized, aspect not kept. BadInput names the path."""
    try:
        with Image.open(path) as image:
            named = Image.registered_extensions().get(path.suffix.lower(), image.format)
            if image.format != named and image.format != "MPO":  # a camera's JPEG with a preview behind it
                raise BadInput(f"{path}: holds {image.format}, its name says {named}; rename it")
            if image.width * image.height > MAX_PIXELS:
                raise BadInput(f"{path}: {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            if image.mode not in MODES:
                raise BadInput(f"{path}: mode {image.mode}, more than 8 bits a channel; convert it to 8-bit RGB")
            image.draft("RGB", (size, size))  # lets the JPEG decoder skip detail that the resize would drop
            image = image.convert("RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except BadInput:
        raise
    except Exception as error:  # Pillow raises what its decoders raise: OSError, SyntaxError, struct.error, ...
        raise BadInput(f"{path}: cannot be read as an image ({error})") from None


class Images(torch.utils.data.Dataset):
    """Asked for rows [B], gives (uint8 [B, size, size, 3], rows, {file name: why it cannot be read}).

    With `replace`, a row that cannot be read gives way to another, drawn by its number alone, so that every run on
    these files sees the same; its own number then stands in `rows`. Without, the images are None.
    """

    def __init__(self, split: Split, size: int, replace: bool):
        self.folder, self.names, self.size, self.replace = split.folder, split.names, size, replace

    def __getitem__(self, rows: Tensor) -> tuple[Tensor | None, Tensor, dict[str, str]]:
        images, rows, faults = np.empty((len(rows), self.size, self.size, 3), np.uint8), rows.clone(), {}
        for i, wanted in enumerate(rows.tolist()):
            for attempt in range(ATTEMPTS if self.replace else 1):
                row = int(hashed(wanted, attempt) % np.uint64(len(self.names))) if attempt else wanted
                try:
                    images[i], rows[i] = load_image(self.folder / self.names[row], self.size), row
                    break
                except BadInput as error:  # passed on: an exception would arrive wrapped in the worker's traceback
                    faults[self.names[row]] = str(error)
            else:
                return None, rows, faults
        return torch.from_numpy(images), rows, faults


class Order:
    """Rows of each step from `start` to `stop`, for one process of `world`: a function of the seed and the step.

    Every epoch is a new permutation of all n rows, cut into global batches of G; what is left over is dropped.
    """

    def __init__(self, n: int, batch: int, start: int, stop: int, seed: int, rank: int, world: int):
        self.n, self.batch, self.seed = n, batch, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Tensor]:
        per_epoch, local, epoch = self.n // self.batch, self.batch // self.world, -1
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                permutation = np.argsort(hashed(self.seed, epoch, np.arange(self.n)), kind="stable")
            first = step % per_epoch * self.batch + self.rank * local
            yield torch.from_numpy(permutation[first : first + local])


def outlast_signals(worker: int) -> None:
    """A scheduler and Ctrl-C signal the workers too, but the main process still needs them, to end well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # a minute to live, whoever wants the end


def load(
    split: Split, size: int, order: Order | list[Tensor], workers: int, faults: dict[str, str] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decoded batches in the order given, prepared ahead by worker processes, with their rows. An image that cannot
    be read is a BadInput that names it; but given `faults`, it is noted there and another row takes its place."""
    loader = torch.utils.data.DataLoader(
        Images(split, size, faults is not None), sampler=order, batch_size=None, num_workers=workers,
        pin_memory=torch.cuda.is_available(), worker_init_fn=outlast_signals,
    )  # fmt: skip
    for images, rows, found in loader:
        if images is None:
            others = f" (nor can {len(found) - 1} in its place)" if len(found) > 1 else ""
            raise BadInput(next(iter(found.values())) + others)
        if found:
            faults |= found
        yield images, rows


def in_order(n: int, batch: int) -> list[Tensor]:
    """All rows once, in order, in batches: the order of evaluation."""
    return list(torch.arange(n).split(batch))


def channel_statistics(split: Split, size: int, workers: int, most: int = 10_000) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, in 0..1, over the split (supplement A); over `most` evenly spaced images
    of a larger one, which settles three digits."""
    rows = torch.arange(0, len(split), max(1, len(split) // most))
    total, squares, pixels = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for images, _ in load(split, size, list(rows.split(256)), workers, faults={}):
        flat = images.view(-1, 3).double() / 255
        total, squares, pixels = total + flat.sum(0), squares + flat.square().sum(0), pixels + len(flat)
    mean = total / pixels
    return mean.tolist(), (squares / pixels - mean**2).clamp(min=1e-6).sqrt().tolist()


# -----------------------------------------------------------------------------------------------------
# Augmentation, on batches, on the device (supplement B)


@dataclass(frozen=True)
class Policy:
    """Ranges and probabilities of supplement B.

    NOTE[PAPER] jitter strengths and blur sigma are not given: SLIP's (0.4, 0.4, 0.4, 0.1) and [0.1, 2].
    """

    scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that the crop keeps
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    turn: float = 0.75  # by 90, 180 or 270 degrees
    jitter: float = 0.8
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    gray: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)


POLICIES = {
    "strong": Policy(),
    "crop": Policy((0.5, 1.0), horizontal_flip=0, vertical_flip=0, turn=0, jitter=0, gray=0, blur=0),  # Table 6
}
ORDERS = np.array(list(itertools.permutations(range(4))))  # of brightness, contrast, saturation, hue
TRIES = 10  # at a crop that fits, as torchvision's RandomResizedCrop


class Draws(NamedTuple):
    """The random parameters of B views, as numpy arrays: drawn on the host, so that the device never waits."""

    box: np.ndarray  # [B, 4] top, left, height, width in pixels
    flip: np.ndarray  # [B, 2] rows, columns
    transpose: np.ndarray  # [B] after the flips; together with them this makes every quarter turn
    factors: np.ndarray  # [B, 4] brightness, contrast, saturation (1 = as is), hue (0 = as is)
    order: np.ndarray  # [B, 4] which of the four comes first, second, ...
    gray: np.ndarray  # [B]
    sigma: np.ndarray  # [B] in pixels, 0 = not blurred


def draw(policy: Policy, side: int, seed: int, epoch: int, rows: np.ndarray, view: int) -> Draws:
    """Parameters for one view of each row [B] of side x side images, the distributions being torchvision's."""
    u = uniform(seed, epoch, rows[:, None], view, np.arange(2 * TRIES + 15)[None])
    tries, u = u[:, : 2 * TRIES].reshape(-1, 2, TRIES), u[:, 2 * TRIES :]
    area = side**2 * (policy.scale[0] + tries[:, 0] * (policy.scale[1] - policy.scale[0]))
    low, high = np.log(policy.ratio)
    ratio = np.exp(low + tries[:, 1] * (high - low))
    height, width = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))  # [B, TRIES]
    fits = (height <= side) & (width <= side)
    first = np.where(fits.any(1), fits.argmax(1), -1)[:, None]
    # When none fits, torchvision takes the whole image (of a square one, whose own ratio is inside the range).
    height, width = (np.where(first[:, 0] < 0, side, np.take_along_axis(x, first, 1)[:, 0]) for x in (height, width))
    top, left = np.floor(u[:, 0] * (side - height + 1)), np.floor(u[:, 1] * (side - width + 1))
    turns = np.where(u[:, 4] < policy.turn, 1 + np.floor(3 * u[:, 5]), 0)  # quarter turns, counter-clockwise
    rows_flipped = (u[:, 2] < policy.vertical_flip) ^ np.isin(turns, (2, 3))
    columns_flipped = (u[:, 3] < policy.horizontal_flip) ^ np.isin(turns, (1, 2))
    jittered = (u[:, 6] < policy.jitter)[:, None]
    factors = np.array([1, 1, 1, 0]) + jittered * np.array(policy.strengths) * (2 * u[:, 7:11] - 1)
    sigma = np.where(u[:, 13] < policy.blur, policy.sigma[0] + u[:, 14] * (policy.sigma[1] - policy.sigma[0]), 0)
    return Draws(
        np.stack([top, left, height, width], 1), np.stack([rows_flipped, columns_flipped], 1), turns % 2 == 1,
        factors, ORDERS[np.floor(24 * u[:, 11]).astype(int)], u[:, 12] < policy.gray, sigma,
    )  # fmt: skip


def resampling(start: Tensor, length: Tensor, flip: Tensor, source: int, target: int) -> Tensor:
    """[B] each -> [B, target, source]: row i holds what every source pixel gives to output pixel i.

    A triangle as wide as the reduction and never narrower than a pixel: Pillow's and torchvision's antialiased
    bilinear resize of the crop alone, whose pixels outside have weight 0.
    """
    scale = (length / target)[:, None, None]
    out = torch.arange(target, device=start.device).expand(len(start), -1)
    out = torch.where(flip[:, None], target - 1 - out, out)[:, :, None]
    pixel = torch.arange(source, device=start.device) - start[:, None, None]  # [B, 1, source]
    weight = (1 - ((out + 0.5) * scale - (pixel + 0.5)).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel >= 0) & (pixel < length[:, None, None]))
    return weight / weight.sum(2, keepdim=True)


def blurring(sigma: Tensor, side: int) -> Tensor:
    """sigma [B] -> [B, side, side]: Gaussian weights with mirrored borders, as torchvision's gaussian_blur.

    NOTE[PAPER] kernel size not given: SimCLR's tenth of the side, made odd (23 at 224 px).
    """
    reach = side // 20
    kernel = torch.exp(-0.5 * (torch.arange(reach + 2, device=sigma.device) / sigma[:, None]).square())
    kernel[:, reach + 1] = 0  # beyond the kernel
    here, there = torch.arange(side, device=sigma.device)[:, None], torch.arange(side, device=sigma.device)
    weight = 0
    for image, real in ((there, True), (-there, there > 0), (2 * (side - 1) - there, there < side - 1)):
        weight = weight + kernel[:, (here - image).abs().clamp(max=reach + 1)] * real
    return weight / weight.sum(2, keepdim=True)


LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision


def luma(x: Tensor) -> Tensor:
    """[B, 3, h, w] -> [B, 1, h, w]"""
    return LUMA[0] * x[:, :1] + LUMA[1] * x[:, 1:2] + LUMA[2] * x[:, 2:]


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """RGB [B, 3, h, w] in 0..1, shift [B] as a share of the colour circle: RGB -> HSV, turn the hue, -> RGB."""
    r, g, b = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = torch.where(chroma == 0, 1, chroma)
    sextant = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    sextant = sextant + 6 * shift[:, None, None]
    channels = []
    for corner in (5, 3, 1):  # where red, green and blue start to fall
        k = (sextant + corner).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def augment(images: Tensor, draws: Draws, size: int) -> Tensor:
    """uint8 [B, h, w, 3] -> float32 [B, 3, size, size] in 0..1: crop, flips and quarter turn as one resampling,
    then colour jitter, grayscale and blur, each sample with its own parameters."""
    if images.device.type == "cpu" and len(images) > 32:  # pieces that stay in the cache: twice as fast
        pieces = [slice(i, i + 32) for i in range(0, len(images), 32)]
        return torch.cat([augment(images[p], Draws(*(d[p] for d in draws)), size) for p in pieces])
    device = images.device
    to = lambda array: torch.from_numpy(np.asarray(array, np.float32)).to(device, non_blocking=True)  # noqa: E731
    B, h, w, _ = images.shape
    top, left, height, width = to(draws.box).unbind(1)
    flip = to(draws.flip) > 0
    x = resampling(top, height, flip[:, 0], h, size) @ images.reshape(B, h, w * 3).float().div_(255)
    x = x.view(B, size, w, 3).permute(0, 3, 1, 2).reshape(B, 3 * size, w)
    x = (x @ resampling(left, width, flip[:, 1], w, size).transpose(1, 2)).view(B, 3, size, size)
    x = torch.where((to(draws.transpose) > 0)[:, None, None, None], x.transpose(2, 3), x)

    # Brightness, contrast, saturation and grayscale are all  x <- p x + q luma(x) + r mean(luma(x)).
    def blend(x: Tensor, p: np.ndarray, q: np.ndarray, r: np.ndarray) -> Tensor:
        p, q, r = to(np.stack([p, q, r]))[:, :, None, None, None].unbind(0)
        gray = luma(x)
        return (p * x + (q * gray + r * gray.mean((2, 3), keepdim=True))).clamp_(0, 1)

    factors, zero = draws.factors, np.zeros(B)
    if (factors != [1, 1, 1, 0]).any():
        for turn in range(4):
            operation = draws.order[:, turn]
            f = np.take_along_axis(factors, np.minimum(operation, 2)[:, None], 1)[:, 0]
            f = np.where(operation == 3, 1, f)
            x = blend(x, f, np.where(operation == 2, 1 - f, 0), np.where(operation == 1, 1 - f, 0))
            turned = np.flatnonzero((operation == 3) & (factors[:, 3] != 0))
            if len(turned):
                at = torch.from_numpy(turned).to(device, non_blocking=True)
                x = x.index_copy(0, at, shift_hue(x[at], to(factors[turned, 3])))
    if draws.gray.any():
        x = blend(x, ~draws.gray, draws.gray, zero)
    blurred = np.flatnonzero(draws.sigma)
    if len(blurred):
        at = torch.from_numpy(blurred).to(device, non_blocking=True)
        weights = blurring(to(draws.sigma[blurred]), size)[:, None]
        x = x.index_copy(0, at, weights @ x[at] @ weights.transpose(2, 3))
    return x


def plain(images: Tensor) -> Tensor:
    """uint8 [B, h, w, 3] -> float32 [B, 3, h, w] in 0..1, nothing random: what evaluation sees."""
    return images.permute(0, 3, 1, 2).float() / 255


def standardise(x: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Per-channel standardisation of [..., 3, h, w] with the training split's statistics (supplement A)."""
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
    return (x - mean) / std


# -----------------------------------------------------------------------------------------------------
# The embedded data: real places, months and scales out of NASA's maps (demo/README.md)

MAPS = Path(__file__).with_name("demo")
MONTHS = ("01", "03", "05", "07", "08", "10")
FINE = "10"  # the one month whose map is fine: 2.7 km a pixel, the others have 19.5 km
EARTH_RADIUS, DEGREE = 6371.0, 111.195  # km; km in a degree of latitude
CLIMATES = (
    "Af Am As Aw BSh BSk BWh BWk Cfa Cfb Cfc Csa Csb Csc Cwa Cwb Cwc "
    "Dfa Dfb Dfc Dfd Dsa Dsb Dsc Dsd Dwa Dwb Dwc Dwd EF ET Ocean"
).split()
LAND_COVERS = (
    "water;evergreen needleleaf forest;evergreen broadleaf forest;deciduous needleleaf forest;"
    "deciduous broadleaf forest;mixed forest;closed shrubland;open shrubland;woody savanna;savanna;grassland;"
    "permanent wetland;cropland;urban;cropland/natural mosaic;snow and ice;barren"
).split(";")
PIXELS = 64


class DemoAreas(torch.utils.data.Dataset):
    """Candidate places, numbered: asked for the i-th hundred, gives their crops as (split, record, JPEG bytes).

    What keeps the task honest (each trap is measured in demo/README.md):
      - whole 10-degree blocks are held out, and no training crop shows a pixel of a held-out block;
      - every crop is averaged from its map's native pixels, never magnified, so blur does not tell the scale;
      - only October exists below 19.5 km: a fine area has October alone, a coarse one has three months drawn
        from the six, at scales drawn alike for all. Scale therefore does tell October among fine crops.
    """

    def __init__(self, seed: int):
        self.seed = seed
        with ThreadPoolExecutor() as pool:
            read = lambda name: np.asarray(Image.open(MAPS / name))  # noqa: E731
            names = [f"bluemarble-2004-{m}.jpg" for m in MONTHS] + ["climate-koppen.png", "landcover-2019-igbp.png"]
            *maps, self.climate, self.land_cover = pool.map(read, names)
        self.maps = dict(zip(MONTHS, maps))

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, hundred: int) -> list[tuple[str, dict, bytes]]:
        return [crop for area in range(100 * hundred, 100 * hundred + 100) for crop in self.crops(area)]

    def held_out(self, longitude: np.ndarray, latitude: np.ndarray) -> np.ndarray:
        """Whether a place lies in a test block: one 10-degree block in six."""
        column, row = np.floor((longitude % 360) / 10), np.floor((latitude + 90) / 10)
        return uniform(self.seed, 1, column, row) < 1 / 6

    def crops(self, area: int) -> Iterator[tuple[str, dict, bytes]]:
        u = uniform(self.seed, 2, area, np.arange(12))
        longitude, latitude = 360 * u[0] - 180, math.degrees(math.asin(1.9 * u[1] - 0.95))  # up to 72 degrees
        fine = u[2] < 0.8
        low, high = (3.0, 12.0) if fine else (20.0, 26.0)
        gsd = low * (high / low) ** u[3]  # km a pixel
        outline = local_grid(longitude, latitude, gsd, np.linspace(-PIXELS / 2, PIXELS / 2, 10))  # cheap; most end here
        split = "test" if self.held_out(longitude, latitude) else "train"
        ocean = lookup(self.climate, outline) == len(CLIMATES)
        if ocean.mean() > 0.4 or (split == "train" and self.held_out(*outline).any()):
            return
        grid = local_grid(longitude, latitude, gsd, np.arange(PIXELS) - (PIXELS - 1) / 2)
        if split == "train" and self.held_out(*grid).any():  # a corner of a block, between the outline's points
            return
        place = [round(longitude, 6), round(latitude, 6)]
        record = {"gsd": [round(1000 * gsd, 4)] * 2, "location": place, "area": f"a{area}"}
        inside = tuple(axis[2::4, 2::4] for axis in grid)
        climate, cover = lookup(self.climate, inside), lookup(self.land_cover, inside).ravel()
        climate = climate[(climate > 0) & (climate < len(CLIMATES))] - 1  # of the land
        for key, values, names in (("climate", climate, CLIMATES), ("land_cover", cover, LAND_COVERS)):
            count = np.bincount(values, minlength=1)
            if count.max() > 0.5 * len(values):  # else the crop shows several classes, none of which is "the" label
                record[f"label_{key}"] = names[count.argmax()]
        for month in [FINE] if fine else sorted(np.array(MONTHS)[np.argsort(u[4:10])[:3]]):
            inferred = {"timestamp_inferred": True} if month == FINE else {}
            buffer = io.BytesIO()
            Image.fromarray(cut(self.maps[month], grid, gsd)).save(buffer, "JPEG", quality=95)
            yield split, {"timestamp": f"2004-{month}", **inferred, **record}, buffer.getvalue()


def local_grid(longitude: float, latitude: float, gsd: float, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes [k, k] of an azimuthal-equidistant grid around a place; steps [k] in pixels of gsd."""
    x, y = np.meshgrid(steps * gsd, -steps * gsd)
    distance = np.hypot(x, y) + 1e-9
    c, phi = distance / EARTH_RADIUS, math.radians(latitude)
    sine, cosine = np.sin(c), np.cos(c)
    away = np.arctan2(x * sine, distance * math.cos(phi) * cosine - y * math.sin(phi) * sine)
    north = np.arcsin(cosine * math.sin(phi) + y / distance * sine * math.cos(phi))
    return longitude + np.degrees(away), np.degrees(north)


def lookup(world: np.ndarray, grid: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Class of a plate-carree map at each point of a grid."""
    rows, columns = world.shape
    column = np.floor((grid[0] + 180) / 360 * columns).astype(int) % columns
    return world[np.clip(np.floor((90 - grid[1]) / 180 * rows).astype(int), 0, rows - 1), column]


def cut(world: np.ndarray, grid: tuple[np.ndarray, np.ndarray], gsd: float) -> np.ndarray:
    """uint8 [64, 64, 3]: the mean of the map over each pixel's footprint, exact for fractions of map pixels.

    The footprint is taken as a rectangle along the map's axes, gsd high and gsd / cos(latitude) wide. Its sum is a
    difference of the map's integral at its corners; the integral is linear between map pixels.
    """
    rows, columns, _ = world.shape
    half = gsd / DEGREE / 2
    wide = half / np.cos(np.radians(grid[1]))
    left, right = ((grid[0] + side * wide + 180) / 360 * columns for side in (-1, 1))
    top, bottom = (np.clip((90 - grid[1] - side * half) / 180 * rows, 0, rows) for side in (1, -1))
    x0, y0 = math.floor(left.min()), math.floor(top.min())
    width, height = math.ceil(right.max()) - x0, math.ceil(bottom.max()) - y0
    patch = world[y0 : y0 + height].take(np.arange(x0, x0 + width), axis=1, mode="wrap").transpose(2, 0, 1)
    integral = np.zeros((3, height + 1, width + 1))
    integral[:, 1:, 1:] = patch.cumsum(2, dtype=np.int32).cumsum(1, dtype=np.int32)
    x = np.concatenate([right, right, left, left])  # four corners, below one another
    y = np.concatenate([bottom, top, bottom, top])
    corners = np.stack([2 * (x - x0) / width - 1, 2 * (y - y0) / height - 1], -1)  # grid_sample's -1 .. 1
    integral, corners = torch.from_numpy(integral)[None], torch.from_numpy(corners)[None]
    at = torch.nn.functional.grid_sample(integral, corners, align_corners=True)
    a, b, c, d = at[0].numpy().reshape(3, 4, PIXELS, PIXELS).transpose(1, 2, 3, 0)
    return np.rint((a - b - c + d) / ((bottom - top) * (right - left))[..., None]).clip(0, 255).astype(np.uint8)


def prepare_demo(folder: Path, train: int = 20_000, test: int = 4_000, seed: int = 0) -> None:
    """Cut the embedded data into `folder`. Written beside it and moved there when complete: never half a dataset."""
    from tqdm import tqdm

    if folder.exists():
        raise BadInput(f"{folder}: exists; remove it first, or choose another folder")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    wanted, lines = {"train": train, "test": test}, {"train": [], "test": []}
    for split in wanted:
        (unfinished / split).mkdir(parents=True)
    areas = torch.utils.data.DataLoader(
        DemoAreas(seed), batch_size=None, num_workers=len(os.sched_getaffinity(0)), collate_fn=lambda crops: crops
    )
    with tqdm(total=train + test, desc=f"cutting images into {folder}", unit=" images", mininterval=1) as bar:
        for split, record, jpeg in itertools.chain.from_iterable(areas):
            number = len(lines[split])
            if number < wanted[split]:
                record = {"file_name": f"{number:06d}.jpg", **record}
                (unfinished / split / record["file_name"]).write_bytes(jpeg)
                lines[split].append(json.dumps(record) + "\n")
                bar.update()
            elif all(len(lines[s]) == wanted[s] for s in wanted):
                break
    for split in wanted:
        (unfinished / split / "metadata.jsonl").write_text("".join(lines[split]))
    shutil.copy(MAPS / "README.md", unfinished / "CREDITS.md")
    unfinished.rename(folder)


# -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prepare a dataset.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="cut the embedded data out of the maps in demo/ (about a minute)")
    demo.add_argument("folder", type=Path, help="where to write it; must not exist")
    demo.add_argument("--train", type=int, default=20_000, help="training images")
    demo.add_argument("--test", type=int, default=4_000, help="test images")
    demo.add_argument("--seed", type=int, default=0, help="of places, scales, months and held-out blocks")
    args = parser.parse_args(argv)
    try:
        prepare_demo(args.folder, args.train, args.test, args.seed)
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
