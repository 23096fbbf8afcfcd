"""The tests: what the code promises, in the order in which its files are read.

    pytest -q test_all.py        # two CPU cores are enough; no GPU, no network

Helpers come first. Numbers meet slow transcriptions of the papers, or other people's code.
"""

import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import regex
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop, functional as TF

import data
import evaluate
import losses
import metadata
import model
import train
from metadata import POSTER, BadInput, TableReader, TextReader, caption, parse_fields

HERE = Path(__file__).parent
ALL, DEFAULT = parse_fields("all"), parse_fields(metadata.DEFAULT_FIELDS)
nan = math.nan

# --- Helpers --------------------------------------------------------------------------------------

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
    assert "\n" not in line and not regex.search(r"0x[0-9a-f]{6}|\w+Error", line), line
    return line


def randomise(module: nn.Module) -> nn.Module:
    """Every parameter random, so that none hides behind being 0 or 1; in evaluation mode."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def small_model(encoder: str = "table", image_image: str = "simclr", **options) -> model.SatMIP:
    """A model of views of 32 px; its metadata as in small_batch."""
    sizes = dict(image_size=32, vit="vit_micro", metadata_width=32, mlp_hidden=64, mlp_out=32)
    sizes |= dict(numbers=4, categories=(5,), vocabulary=20, context=6) | options
    torch.manual_seed(0)
    config = model.ModelConfig(metadata_encoder=encoder, image_image=image_image, **sizes)
    return model.SatMIP(config)


def small_batch(n: int, views: int = 2, encoder: str = "table") -> tuple[Tensor, tuple]:
    """Views [views, n, 3, 32, 32] and metadata of n samples, some of it missing."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(views, n, 3, 32, 32, generator=generator)
    if encoder == "none":
        return images, ()
    if encoder == "text":
        return images, (torch.arange(6 * n).view(n, 6) % 19, 5 + torch.arange(n) % 2)
    numbers = torch.randn(n, 4, generator=generator).index_fill(0, torch.arange(0, n, 3), nan)
    return images, (numbers, torch.randint(5, (n, 1), generator=generator))


def images_of(n: int, side: int) -> Tensor:
    """uint8 [n, 3, side, side] of smooth random colours with some noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bilinear")
    noise = torch.rand(n, 3, side, side, generator=generator)
    return (255 * (0.8 * smooth + 0.2 * noise)).byte()


def picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def write_split(folder: Path, records: list[dict], images: Tensor | None = None) -> data.Split:
    """A split of these records, each with an image of its own: 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, images = [], images_of(len(records), 32) if images is None else images
    for i, image in enumerate(images):
        picture(image).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", **records[i]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return data.Split(folder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """48 train and 16 test images, coloured by class, two of each area; some values are missing."""
    folder, noise = tmp_path_factory.mktemp("data") / "tiny", images_of(48, 32) // 6
    colours = torch.tensor([[210, 180, 120], [30, 90, 40], [200, 210, 205], [20, 50, 120]])
    for split, n in (("train", 48), ("test", 16)):
        records = []
        for i in range(n):
            record = {"gsd": 10 + i, "timestamp": f"2004-0{1 + i % 9}", "area": f"a{i // 2}"}
            if i % 10 != 7:
                record |= {"label_kind": "dfis"[i % 4], "location": [7.3 * i - 180, 2.1 * i - 50]}
            records.append(record)
        images = noise[:n] + colours[torch.arange(n) % 4, :, None, None]
        write_split(folder / split, records, images.byte())
    return folder


@pytest.fixture(scope="session", autouse=True)
def alone():
    """One thread, as these networks are tiny; no other machine; a time zone that is not UTC."""

    def guarded(self, address, connect=socket.socket.connect):
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        assert local, f"connects to {address}"
        return connect(self, address)

    socket.socket.connect, os.environ["TZ"] = guarded, "Asia/Kolkata"
    time.tzset()
    torch.set_num_threads(1)


def on_processes(world: int, work: Callable, *args) -> list:
    """work(rank, world, *args) on processes that reach each other by gloo -> what each returned."""
    multiprocessing.set_forkserver_preload([__name__])  # imports once, not once a process
    with tempfile.TemporaryDirectory() as folder:
        what = (world, folder, work, args)
        mp.start_processes(process, what, nprocs=world, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(world)]


def process(rank: int, world: int, folder: str, work: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.save(work(rank, world, *args), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


# --- metadata.py ----------------------------------------------------------------------------------

NEVER = [None, "", "  ", nan, math.inf, -math.inf, True, False, [], {}]
MALFORMED = {
    "gsd": [[1], [1, 2, 3], [1, None], [1, nan], [0, 1], [[1], 2], 0, -1, {"x": 1, "y": 2}, "abc"],
    "multispectral_gsd": [[1], 0, "1_0", "nan", "inf", "1e999", 10**400],
    "pixel_size": [[1e-4, math.inf], ["a", "b"], [True, 1]],
    "timestamp": [
        "2004-13-01", "2004-13", "2004-00", "2004-10-00", "2004-02-30", "2004-10-", ["2004"],
        "2015-09-21T25:00", "2015-09-21T15:60", "2015-09-21T15:30:61Z", "0000-01", "\u0662000",
    ],
    "location": [
        [181, 0], [-181, 0], [0, 91], [0, -90.1], [None, 1], [1, nan], 12, [1, 2, 3], [1], ["", 1],
    ],
    "country_code": [["PER"], 1.5, {"a": 1}, "A\udfffB"], "cloud_cover": [-1, 101, [14], "cloudy"],
    "wavelengths": [[661, 545], [661, 545, -1], 661],
    "sun_elevation_angle": [91, -91], "sun_azimuth_angle": [361],
}  # fmt: skip


@pytest.mark.parametrize("field", ALL, ids=lambda field: field.name)
def test_malformed_values_are_missing(field):
    """Left out of the caption, NaN or None in the table; other fields stay as they are."""
    rest = tuple(other for other in ALL if other != field)
    for bad in NEVER + MALFORMED.get(field.name, []):
        record = {**POSTER, field.name: bad}
        assert caption(record, ALL) == caption(POSTER, rest), bad
        numbers, categories = metadata.table_rows([record], (field,))
        assert np.isnan(numbers).all() and categories == [[None] * (field.kind == "category")], bad


@pytest.mark.parametrize("text, parts", [
    ("2015-09-21T15:30:08Z", [2015, 9, 21, 15, 0]), (" 2015-09-21 15:30 ", [2015, 9, 21, 15, 0]),
    ("2016-12-31T23:59:60Z", [2016, 12, 31, 23, 5]), ("2004", [2004, nan, nan, nan, nan]),
    ("2004-10", [2004, 10, nan, nan, nan]), ("2004-10-05", [2004, 10, 5, nan, 1]),
    ("2015-01-01T00:30:00+02:00", [2014, 12, 31, 22, 2]), ("2000-02-29", [2000, 2, 29, nan, 1]),
    ("2014-12-31T20:30:00-0500", [2015, 1, 1, 1, 3]), ("20170601T101031", [2017, 6, 1, 10, 3]),
])  # fmt: skip
def test_timestamps(text, parts):
    """Year, month, day, hour and weekday in UTC; a date may stop early."""
    np.testing.assert_equal(metadata.parse_timestamp(text), parts)


def test_captions_are_the_posters(capsys):
    """All 15 fields as the poster prints them, 207 tokens; the three defaults are 67."""
    text = (
        "gsd: [11.4546, 9.1344], multispectral_gsd: 41.1896, pixel_size: [1.03e-04, 8.23e-05], "
        "timestamp: 2015-09-21T15:30:08Z, location: [-73.310776, -3.785814], utm_zone: 18M, "
        "country_code: PER, cloud_cover: 14, scan_direction: Reverse, wavelengths: [661, 545, 477],"
        " target_azimuth_angle: 39.12, sun_azimuth_angle: 77.28, sun_elevation_angle: 70.44, "
        "off_nadir_angle: 27.70, sensor_platform: GEOEYE01"
    )
    assert caption(POSTER, ALL) == text
    assert caption(POSTER, parse_fields("utm_zone,gsd")) == "utm_zone: 18M, gsd: [11.4546, 9.1344]"
    assert caption({"gsd": "7", "utm_zone": 18.0}, ALL) == "gsd: [7.0000, 7.0000], utm_zone: 18"
    runpy.run_path(str(HERE / "metadata.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"{text}\n  207 tokens" in printed and "\n  67 tokens" in printed


def test_survey():
    """What can be read of each field, an example of what cannot, and rows with equal metadata."""
    rows = [{"gsd": 1}, {"gsd": "1", "timestamp": "2004"}, {"gsd": [1, 1]}, {"gsd": "one m"}, {}]
    found = metadata.survey(rows, DEFAULT)
    assert found.rows == 5 and found.readable == {"gsd": 3, "timestamp": 1, "location": 0}
    assert found.unreadable == {"gsd": "one m"} and found.repeated == 2, "1 and 3"
    assert all(part in str(found) for part in ("gsd 60%", "'one m'", "location 0%", "2 rows (40%)"))


def test_text_reader():
    """Rows with start, end and padding 0, as wide as the longest; the end survives truncation."""
    fields, (start, end) = (metadata.Field("a", "category"),), (49406, 49407)
    records = [{"a": "cat"}, {}, {"a": "hello world diagram"}]
    a, colon, cat, hello, *rest = metadata.Tokenizer().encode("a: cat hello world diagram")
    reader = TextReader.fit(records, fields)
    tokens, lengths = reader(records)
    assert lengths.tolist() == [5, 2, 7] and reader.sizes() == {"context": 7}
    longest = [start, a, colon, hello, *rest, end]
    assert tokens.tolist() == [[start, a, colon, cat, end, 0, 0], [start, end] + [0] * 5, longest]
    assert reader(records[:1])[0].shape == (1, 5)
    assert reader([{"a": "hello world diagram cat cat cat"}])[0].tolist() == [longest]


def test_table_reader():
    """Standardised with the statistics of the known training values; NaN stays NaN, missing is row
    0, unknown row 1; a constant feature is 0."""
    fields = parse_fields("cloud_cover,location,country_code")
    training = [("10", [5, 1], "B"), (30, None, "A"), (None, [5, " 3 "], None), (20, [5, 2], "A")]
    training = [dict(zip(("cloud_cover", "location", "country_code"), row)) for row in training]
    a, b, reader = (200 / 3) ** 0.5, (2 / 3) ** 0.5, TableReader.fit(training, fields)
    assert reader.sizes() == {"numbers": 3, "categories": (4,)}
    np.testing.assert_allclose([reader.mean, reader.std], [[20, 5, 2], [a, 1, b]])
    unknown = {"cloud_cover": 40, "location": [6, 4], "country_code": "C"}
    numbers, categories = reader([*training, unknown])
    np.testing.assert_allclose(numbers, [
        [-10 / a, 0, -1 / b], [10 / a, nan, nan], [nan, 0, 1 / b], [0, 0, 0], [20 / a, 1, 2 / b],
    ], rtol=1e-6)  # fmt: skip
    assert categories.tolist() == [[3], [2], [0], [2], [1]] and numbers.dtype == torch.float32
    constant = TableReader.fit([{"gsd": 0.1}] * 3, DEFAULT[:1])([{"gsd": 0.1}])[0]
    assert constant.abs().max() < 1e-9, "rounding errors are not amplified"


@pytest.mark.parametrize("kind", ["text", "table"])
@torch.no_grad()
def test_a_missing_value_concerns_its_own_row_only(kind):
    """Any field of any row gone: that row's embedding changes, no other; missing is no number."""
    records = [POSTER | {"cloud_cover": i, "country_code": "ABC"[i % 3]} for i in range(6)]
    reader = metadata.READERS[kind].fit(records, ALL)
    encoder = randomise(small_model(kind, vocabulary=49408, **reader.sizes()).metadata_encoder)
    before = encoder(*reader(records))
    for i, field in enumerate(ALL):
        row = i % 6
        changed = records[:row] + [records[row] | {field.name: None}] + records[row + 1 :]
        difference = (encoder(*reader(changed)) - before).abs().amax(1)
        assert (difference > 1e-3).nonzero().tolist() == [[row]], field.name
        assert difference.sort()[0][4] < 1e-5, field.name
    missing, mean, zero = encoder(*reader([POSTER | {"cloud_cover": v} for v in (None, 2.5, 0)]))
    assert worst(mean, missing) > 1e-3 and worst(zero, missing) > 1e-3


CLIP_IDS = {  # ids of CLIP's own tokenizer: plain words, emoji, CJK, control characters
    "": [], "Hello,   WORLD!\n\t": [3306, 267, 1002, 256], "\u200b\xa0x\u2028y": [9844, 343, 344],
    "sch\xc3\xb6n &eacute;": [844, 7255, 333, 4166],
    "\U0001f6f0\ufe0f satellite \U0001f30d": [11306, 34777, 10316, 18641],
    "cafe\u0301 na\xefve \xc5NGSTR\xd6M": [15304, 1097, 35689, 563, 23176, 10352, 807, 7255, 332],
    "\u4eba\u5de5\u885b\u661f": [36839, 161, 115, 98, 164, 94, 249, 42891, 509],
    "&lt;3 &amp;amp; 5&nbsp;km": [283, 274, 261, 276, 4590], "< &amp;amp;": [283, 261],
    "a\x00b\x1b[31mred\x7f": [596, 736],
    "it's we're I'LL don't he'd": [585, 568, 649, 982, 328, 1342, 847, 713, 797, 1896],
    "\u201cquotes\u201d \u2018n\u2019 it\u2019s": [257, 5808, 257, 262, 333, 262, 585, 568],
    "\xbd \xb2 \u2167 2015-09": [33613, 41175, 158, 227, 371, 273, 271, 272, 276, 268, 271, 280],
    "\ufb01 \uff26\uff55\uff4c\uff4c": [3589, 1476], "_foo__bar--": [318, 23435, 3838, 2411, 2432],
    "\u0928\u092e\u0938\u094d\u0924\u0947": [3124, 101, 48254, 28505, 19389, 27263, 25130],
    "<|endoftext|> a <|startoftext|>": [49407, 320, 49406],
}  # fmt: skip


def test_tokenizer():
    """CLIP's ids; half a surrogate pair does not stop it."""
    fast = metadata.default_tokenizer()
    for text, ids in CLIP_IDS.items():
        assert fast.encode(text) == ids and fast(text) == [49406, *ids, 49407], ascii(text)
    assert fast.encode("a \ud800") and fast.encode("\udfff b")


# --- model.py -------------------------------------------------------------------------------------

def slow_encoder(encoder, x: Tensor, eps: float, heads: int) -> Tensor:
    """One sample's tokens [L, D] through every block in full, attention head by head -> [D]."""
    for i, block in enumerate(encoder.blocks):
        table, y, mixed = isinstance(encoder, model.FTTransformer), x, []
        if i or not table:
            y = F.layer_norm(x, x.shape[1:], block.norm1.weight, block.norm1.bias, eps)
        y = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias)
        for q, k, v in zip(*(part.chunk(heads, dim=1) for part in y.chunk(3, dim=1))):
            weights = torch.exp(q @ k.T / math.sqrt(q.shape[1]))
            mixed.append(weights / weights.sum(1, keepdim=True) @ v)
        x = x + F.linear(torch.cat(mixed, dim=1), block.attn.proj.weight, block.attn.proj.bias)
        y = F.layer_norm(x, x.shape[1:], block.norm2.weight, block.norm2.bias, eps)
        y = F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias)
        if table:  # ReGLU
            y = y[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :].clamp(min=0)
        else:  # GELU
            y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        x = x + F.linear(y, block.mlp.fc2.weight, block.mlp.fc2.bias)
    return F.layer_norm(x, x.shape[1:], encoder.norm.weight, encoder.norm.bias, eps)[0]


def test_parameter_counts():
    """ViT-S/16, the text and table encoders, SLIP's head and the projections, counted by hand; the
    ViT's parameters are named as timm's."""

    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        sizes = dict(metadata_width=192, numbers=9, categories=(4,), image_image="simclr")
        table = model.SatMIP(model.ModelConfig(metadata_encoder="table", **sizes))
        text = model.SatMIP(model.ModelConfig(metadata_encoder="text"))
    small, wide = (12 * w**2 + 13 * w for w in (384, 512))  # qkv, proj, two layers of 4 w, norms
    assert count(table.image_encoder) == 12 * small + (769 + 1 + 197 + 2) * 384 == 21_665_664
    assert count(text.metadata_encoder) == 3 * wide + (49408 + 77 + 2) * 512
    reglu = 4 * 192 * 193 + 193 * 512 + 257 * 192 + 4 * 192  # hidden width 4/3 of 192
    blocks = 3 * reglu - 2 * 192  # the first block has no first norm
    assert count(table.metadata_encoder) == blocks + 192 * (1 + 9 + 10 + 9 + 4) + 2 * 192
    assert count(table.image_mlp) == 385 * 4096 + 4097 * 4096 + 4 * 4096 + 4097 * 256
    projections = (table.image_projection, text.metadata_projection, table.metadata_projection)
    assert [count(p) for p in projections] == [196_608, 262_144, 98_304]
    names = {"cls_token", "pos_embed", "patch_embed.proj", "norm"}
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        names |= {f"blocks.{i}.{layer}" for i in range(12)}
    found = table.image_encoder.state_dict().keys()
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in found} == names


@pytest.mark.parametrize("name, heads", [("vit_small", 12), ("vit_small_6", 6), ("vit_tiny", 3)])
@torch.no_grad()
def test_vit_equals_a_slow_transcription(name, heads):
    """Patches in reading order, all tokens through the last block; as many heads as its authors."""
    vit = randomise(model.build_image_encoder(name, 32, 16)).double()
    images, corners = torch.randn(2, 3, 32, 32).double(), [(0, 0), (0, 16), (16, 0), (16, 16)]
    for image, out in zip(images, vit(images)):
        patches = torch.stack([image[:, y : y + 16, x : x + 16].flatten() for y, x in corners])
        tokens = patches @ vit.patch_embed.proj.weight.flatten(1).T + vit.patch_embed.proj.bias
        x = torch.cat([vit.cls_token[0], tokens]) + vit.pos_embed[0]
        assert worst(out, slow_encoder(vit, x, 1e-6, heads)) < 1e-9


@torch.no_grad()
def test_positions_follow_the_image_size():
    """Resampled as Pillow's bicubic does, rows as rows, columns as columns; CLS keeps its own."""
    vit = randomise(model.ViT(64, 16, 8, 1, 2))
    assert torch.equal(model.resample_positions(vit.pos_embed, 4, 4), vit.pos_embed)
    for rows, columns in ((3, 8), (8, 3), (2, 2)):
        found = model.resample_positions(vit.pos_embed, rows, columns)[0]
        grid = Image.fromarray(vit.pos_embed[0, 1:, 5].view(4, 4).numpy())
        expected = np.array(grid.resize((columns, rows), Image.Resampling.BICUBIC))
        assert torch.equal(found[0], vit.pos_embed[0, 0])
        assert worst(found[1:, 5].view(rows, columns), torch.from_numpy(expected)) < 1e-5
    assert vit(torch.randn(2, 3, 48, 128)).shape == (2, 8)


def test_text_encoder_equals_a_slow_transcription_without_padding():
    """Padding changes nothing and learns nothing, whatever stands in it."""
    text = randomise(small_model("text", vocabulary=100, context=12).metadata_encoder).double()
    captions, expected = [[98, 5, 6, 99], [98, 7, 99], [98, 8, 9, 10, 11, 12, 99]], []
    for c in captions:
        x = text.token_embedding.weight[c] + text.pos_embed[: len(c)]
        expected.append(slow_encoder(text, x, 1e-5, heads=8))
    for L in (7, 12):
        tokens = torch.randint(20, 90, (3, L))  # garbage behind each caption
        for row, c in zip(tokens, captions):
            row[: len(c)] = torch.tensor(c)
        out = text(tokens, torch.tensor([4, 3, 7]))
        assert worst(out, torch.stack(expected)) < 1e-9
    out.square().sum().backward()
    learnt = text.token_embedding.weight.grad.any(1).nonzero().flatten().tolist()
    assert learnt == [*range(5, 13), 98, 99]
    assert text.pos_embed.grad.any(1).tolist() == [True] * 7 + [False] * 5


@torch.no_grad()
def test_table_encoder_equals_a_slow_transcription():
    """x_j W_j + b_j, missing_j + b_j where x_j is missing, embedding + b_j of a category; ReGLU."""
    table = small_model("table", numbers=3, categories=(4, 5)).metadata_encoder
    table, categories = randomise(table).double(), torch.tensor([[0, 4], [3, 1]])
    numbers = torch.tensor([[0.5, nan, -2.0], [nan, 0.0, 1.0]]).double()
    for x, c, out in zip(numbers, categories, table(numbers, categories)):
        tokens = [table.cls_token[0, 0]]
        for j in range(3):
            token = table.missing[j] if x[j].isnan() else x[j] * table.weight[j]
            tokens.append(token + table.bias[j])
        for j in range(2):
            tokens.append(table.embeddings[j].weight[c[j]] + table.bias[3 + j])
        assert worst(out, slow_encoder(table, torch.stack(tokens), 1e-5, heads=8)) < 1e-9


RESNET = dict(vit="resnet50", queue=8, mlp_out=8)


def normalise_and_shuffle(rank: int, world: int, kind=model.BatchNorm) -> tuple:
    """This process's rows of a batch normalised, their gradient, the statistics; MoCo's keys."""
    x, norm = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), randomise(kind(3))
    part = x.chunk(world)[rank].requires_grad_()
    y = norm.train()(part)
    (y * x.sin().chunk(world)[rank]).sum().backward()
    found = [y.detach(), part.grad, norm.eval()(part).detach(), norm.running_mean, norm.running_var]
    slow = small_model("none", "moco", **RESNET).train().key_encoder
    return found, slow(small_batch(8)[0][-1].chunk(world)[rank])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batch_norm_and_shuffling_bn(world):
    """The head normalises over all processes. For its keys each process's ResNet-50 normalises
    images of all the others, and every process gets back the keys of its own."""
    found = on_processes(world, normalise_and_shuffle)
    expected, _ = normalise_and_shuffle(0, 1, nn.BatchNorm1d)
    for rank, (normalised, _) in enumerate(found):
        whole = [x.chunk(world)[rank] for x in expected[:3]] + expected[3:]
        assert all(worst(a, b) < 1e-5 for a, b in zip(normalised, whole, strict=True))
    slow = small_model("none", "moco", **RESNET).train().key_encoder
    images, keys = small_batch(8)[0][-1], torch.empty(8, 8)
    order = {1: range(8), 2: [0, 4, 1, 5, 2, 6, 3, 7], 4: [0, 2, 4, 6, 1, 3, 5, 7]}[world]
    for dealt in torch.tensor(order).chunk(world):
        keys[dealt] = F.normalize(slow.mlp(slow.encoder(images[dealt])), dim=1)
    assert worst(torch.cat([own for _, own in found]), keys) < 1e-4


@pytest.mark.parametrize("meets", [
    [{"image", "first"}, {"second"}], [{"image"}, {"first"}, {"second"}],
], ids=len)  # fmt: skip
@torch.no_grad()
def test_view_coupling(meets):
    """The first view meets the metadata, the last two each other; the last one has MoCo's keys."""
    m, (views, table) = small_model(places=3).eval(), small_batch(4, len(meets))
    meets = [names | {"place"} if "first" in names else names for names in meets]
    before = m(views, table)._asdict()
    for view, affected in enumerate(meets):
        changed = views.clone()
        changed[view] += 1
        after = {name: x for name, x in m(changed, table)._asdict().items() if x is not None}
        assert {name for name, x in after.items() if worst(x, before[name]) > 1e-4} == affected
    features = m.image_encoder(views[0]), m.metadata_encoder(*table), m.image_encoder(views[-1])
    heads = m.image_projection, m.metadata_projection, m.image_mlp
    for name, x, head in zip(("image", "metadata", "second"), features, heads):
        assert worst(before[name], F.normalize(head(x), dim=1)) < 1e-5, name
    a, b, c = (layer for layer in m.image_mlp if isinstance(layer, nn.Linear))
    with_relu = c(F.relu(b(F.relu(a(features[2]))))) * (1 + 1e-5) ** -0.5  # BatchNorm at its start
    assert worst(before["second"], F.normalize(with_relu, dim=1)) < 1e-5
    first = m.image_mlp(m.image_encoder(views[-2]))
    assert worst(before["place"], m.place_head(F.relu(first))) < 1e-5
    m = small_model("none", "moco", queue=20).eval()
    first, keys = (F.normalize(m.image_mlp(m.image_encoder(views[i])), dim=1) for i in (-2, -1))
    randomise(m.image_encoder.blocks[0])  # the keys' encoder is a copy
    e = m(views, ())
    assert worst(e.second, keys) < 1e-6 and worst(e.first, first) > 1e-3
    assert worst(e.queue.norm(dim=1), torch.ones(20)) < 1e-6


@pytest.mark.parametrize("encoder", ["text", "table"])
def test_weight_decay_spares_biases_norms_and_the_temperature(encoder):
    """Each trained parameter is in one group; positions, tokens and embeddings do decay."""
    m = small_model(encoder, places=3)
    names, groups = {p: name for name, p in m.named_parameters()}, model.parameter_groups(m, 0.3)
    decayed, spared = ([names[p] for p in group["params"]] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.3, 0]
    assert sorted(decayed + spared) == sorted(names.values())
    expected = regex.compile(r"bias$|norm|logit_scale|image_mlp\.[14]\.")
    assert set(spared) == {name for name in names.values() if expected.search(name)}


# --- losses.py ------------------------------------------------------------------------------------

def slow_contrast(a, b, scale: float, others=()) -> float:
    """Eq. 1, term by term."""
    total = 0.0
    for i in range(len(a)):
        terms = [math.exp(scale * float(a[i] @ row)) for row in b]
        more = [math.exp(scale * float(a[i] @ row)) for k, row in enumerate(others) if k != i]
        total -= math.log(terms[i] / (sum(terms) + sum(more)))
    return total / len(a)


def test_losses_equal_loops_over_the_papers_equations():
    """Eq. 2, Eq. 3 with K and with 2 K - 1 terms; MoCo's with its queue; Geo's, in which unknown
    places count as zero; and the share of rows that find their partner."""
    torch.manual_seed(0)
    base = torch.randn(7, 8)
    a, b = (F.normalize(base + 1.5 * torch.randn(7, 8), dim=1) for _ in range(2))
    mi = losses.metadata_image_loss(a, b, torch.tensor(14.0))
    assert abs(mi.loss - (slow_contrast(a, b, 14) + slow_contrast(b, a, 14)) / 2) < 1e-5
    found = [int((x[i] @ y.T).argmax()) == i for x, y in ((a, b), (b, a)) for i in range(7)]
    assert 0 < sum(found) < 14 and abs(mi.accuracy - sum(found) / 14) < 1e-6
    ii = losses.image_image_loss(a, b, 0.2)
    assert abs(ii.loss - (slow_contrast(a, b, 5) + slow_contrast(b, a, 5)) / 2) < 1e-5
    more = losses.image_image_loss(a, b, 0.2, same_view_negatives=True)
    assert abs(more.loss - (slow_contrast(a, b, 5, a) + slow_contrast(b, a, 5, b)) / 2) < 1e-5
    queue = F.normalize(torch.randn(9, 8), dim=1)
    terms = [[math.exp(float(a[i] @ key) / 0.2) for key in (b[i], *queue)] for i in range(7)]
    moco = losses.momentum_loss(a, b, queue, 0.2)
    assert abs(moco.loss + sum(math.log(t[0] / sum(t)) for t in terms) / 7) < 1e-5
    assert abs(moco.accuracy - sum(t[0] == max(t) for t in terms) / 7) < 1e-6
    logits, places = torch.randn(5, 3), torch.tensor([2, -1, 0, 1, -1])
    known = [math.log(float(logits[i].softmax(0)[places[i]])) for i in (0, 2, 3)]
    assert abs(losses.place_loss(logits, places).loss + sum(known) / 5) < 1e-5
    apart = torch.eye(16)  # at the highest scale separation costs nothing
    assert losses.metadata_image_loss(apart, apart, torch.tensor(100.0)).loss < 1e-5


@torch.no_grad()
def test_total_loss():
    """Eq. 4: L_MI + weight L_Sim, and L_g; alone, L_Sim has no weight."""
    e, places = small_model(places=3).train()(*small_batch(8)), torch.arange(8) % 3
    mi = losses.metadata_image_loss(e.image, e.metadata, e.scale).loss
    sim = losses.image_image_loss(e.first, e.second, 0.2, True).loss
    g = losses.place_loss(e.place, places).loss
    loss, figures = losses.total_loss(e, places, 0.3, 0.2, True)
    found = [loss, *(figures[name] for name in ("loss", "L_MI", "L_Sim", "L_g", "temperature"))]
    assert worst(found, [mi + 0.3 * sim + g, mi + 0.3 * sim + g, mi, sim, g, 0.07]) < 1e-5
    alone, _ = losses.total_loss(e._replace(image=None, place=None), None, 0.3, 0.2, True)
    assert abs(alone - sim) < 1e-5


STEPS = [f"--method {name}" for name in train.METHODS if "tp" not in name]  # its step is the same
STEPS += ["--method satmip --metadata-encoder text", "--decouple-views", "--same-view-negatives"]


def check_gradient(m: model.SatMIP, batch: train.Batch, c: train.Config) -> None:
    """Along its gradient the loss changes by the gradient's norm: nothing in it is cut off."""
    m, terms = copy.deepcopy(m), (c.loss_weight, c.temperature, c.same_view_negatives)
    trained = [p for p in m.parameters() if p.requires_grad]
    loss = lambda: losses.total_loss(m(*batch[:2]), batch.places, *terms)[0]  # noqa: E731
    gradients, found = torch.autograd.grad(loss(), trained), []
    norm = torch.nn.utils.get_total_norm(gradients)
    for step in (1e-6, -2e-6):
        for p, g in zip(trained, gradients):
            p.data += step / norm * g
        found.append(loss().item())
    assert abs((found[0] - found[1]) / 2e-6 - norm) < 1e-6 * norm, c


def steps_in_float64(rank: int, world: int, micro_batch: int) -> list[dict]:
    """One step of each method on this process's rows of 8 -> figures, gradients and buffers."""
    torch.Tensor.float = torch.Tensor.double  # also what the code computes in float32
    torch.set_default_dtype(torch.float64)
    results, B, places = [], 8 // world, torch.tensor([0, 2, 1, -1, 0, -1, 1, 2])
    rows, scaler = slice(rank * B, rank * B + B), torch.amp.GradScaler("cpu", enabled=False)
    for options in STEPS:
        argv = ["--vit", "vit_micro", *options.split(), "--micro-batch", str(micro_batch)]
        c = train.parse_config(argv)
        encoder = c.metadata_encoder if c.metadata else "none"
        m = small_model(encoder, c.image_image, queue=20, places=3 * c.geo).train()
        views, meta = small_batch(8, train.view_count(c), encoder)
        batch = train.Batch(views[:, rows], tuple(x[rows] for x in meta), places[rows])
        if world == 1 and not micro_batch:
            check_gradient(m, batch, c)
        network = torch.nn.parallel.DistributedDataParallel(m, broadcast_buffers=False)
        optimizer, amp = torch.optim.SGD(m.parameters(), 0.0), torch.autocast("cpu", enabled=False)
        figures = train.train_step(network, m, optimizer, scaler, batch, c, amp)
        gradients = {name: p.grad for name, p in m.named_parameters() if p.requires_grad}
        results.append({"figures": figures, **gradients, **dict(m.named_buffers())})
    return results


@pytest.fixture(scope="module")
def one_process() -> list[dict]:
    return on_processes(1, steps_in_float64, 0)[0]


@pytest.mark.parametrize("world, micro_batch", [(1, 3), (2, 0), (2, 3), (4, 0), (4, 1)])
def test_gradients_are_those_of_one_process_with_the_whole_batch(world, micro_batch, one_process):
    """Every parameter's gradient, BatchNorm's statistics, MoCo's queue, the figures, in float64."""
    found = on_processes(world, steps_in_float64, micro_batch)
    for options, expected, *ranks in zip(STEPS, one_process, *found, strict=True):
        for name, value in expected["figures"].items():
            mean = sum(result["figures"][name] for result in ranks) / world
            assert abs(mean - value) < 1e-9, (options, name)
        for name in expected.keys() - {"figures"}:
            value = expected[name]
            limit = 1e-9 * (1 + value.abs().max())
            assert all(worst(result[name], value) < limit for result in ranks), (options, name)


# --- data.py --------------------------------------------------------------------------------------

def test_split(tmp_path):
    """A sequence of its records; columns have None where a row says nothing; NaN is a value. A
    metadata.csv of a Hugging Face ImageFolder is read with its lists, without its blanks."""
    records = [{"label": "a"}, {"note": "ü" * 500}, {"label": 3, "gsd": 1, "cloud_cover": nan}]
    split = write_split(tmp_path / "train", records)
    assert len(split) == 3 and split[1] == {"file_name": "1.png", "note": "ü" * 500}
    assert caption(split[2], ALL) == "gsd: [1.0000, 1.0000]"
    assert split.columns("label", "note") == [["a", None, 3], [None, "ü" * 500, None]]
    assert str(tmp_path / "test") in refusal(data.read_dataset, tmp_path)
    (tmp_path / "validation").mkdir()
    text = '\ufefffile_name, gsd,label_b\r\na.png, "[0.5, 0.4]","a, b"\r\nb.png,,[c\r\n'
    (tmp_path / "validation" / "metadata.csv").write_text(text, encoding="utf-8", newline="")
    train, test = data.read_dataset(tmp_path)
    a = {"file_name": "a.png", "gsd": [0.5, 0.4], "label_b": "a, b"}
    assert len(train) == 3 and list(test) == [a, {"file_name": "b.png", "label_b": "[c"}]
    assert [*map(data.label_names, (train, test))] == [["label"], ["label_b"]]


WRONG_LINES = [
    b"{", b"[1]", b'{"gsd": 1}', b"\n", b"{}", b"null", b'"file_name"', b"\xff", b"[" * 100_000,
    b'{"file_name": 5}', b'{"file_name": "a", "label": "\xe4"}',
]  # fmt: skip


def test_wrong_lines_are_named(tmp_path):
    path, table = tmp_path / "metadata.jsonl", tmp_path / "metadata.csv"
    for line in WRONG_LINES:
        path.write_bytes(b'{"file_name": "a"}\n' + line)
        assert refusal(list, data.Split(tmp_path)).startswith(f"{path}, row 2: "), line[:20]
    path.write_bytes(b"")
    assert "no rows" in refusal(data.Split, tmp_path)
    path.unlink()
    for row in (b"c,H\xe4fen\n", b'"c,d\n', b"c\n", b"c,d,e\n", b'c,"d\ne,f\ng,h"\n'):
        table.write_bytes(b"file_name,label\na,b\n" + row)
        assert refusal(data.Split, tmp_path).startswith(f"{table}, row ")


def test_class_ids(tmp_path):
    """Sorted, integers as integers however written; classes of any split; -1 without a label."""
    a = write_split(tmp_path / "a", [{"label": 10}, {"label": 9.0}, {}])
    b = write_split(tmp_path / "b", [{"label": "2"}, {"label": "9"}, {"label": "10.0"}])
    classes, (x, y) = data.class_ids("label", a, b)
    assert classes == ["2", "9", "10"] and x.tolist() == [2, 1, -1] and y.tolist() == [0, 1, 2]
    c = write_split(tmp_path / "c", [{"label": "b", "label_b": ["a", "b"]}])
    assert data.class_ids("label", a, c)[0] == ["10", "9", "b"]
    assert str(c.path) in refusal(data.class_ids, "label_b", c)


def test_choose_fields(tmp_path):
    """The paper's three; all of fields.json where it is; names select from both."""

    def names(asked: str) -> str:
        return ",".join(field.name for field in data.choose_fields(tmp_path, asked))

    path = tmp_path / "fields.json"
    assert names("") == "gsd,timestamp,location"
    path.write_text('{"soil": {"kind": "category"}, "ab": {"kind": "number", "parts": ["a", "b"]}}')
    assert names("") == names("all") == "soil,ab" and names("gsd, soil") == "gsd,soil"
    assert "'gds'" in refusal(names, "gds") and "twice" in refusal(names, "ab,gsd,ab")
    assert caption({"ab": [1.5, 2]}, data.choose_fields(tmp_path, "ab")) == "ab: [1.5, 2.0]"
    for wrong in (
        "{", "[1]", '{"a": 1}', '{"a": {}}', '{"a": {"kind": "colour"}}',
        '{"a": {"kind": "number", "low": "x"}}', '{"a": {"kind": "number", "style": "%s %s"}}',
        '{"a": {"kind": "number", "sort": 1}}', '{"a": {"kind": "number", "style": "%q"}}',
        '{"a": {"kind": "number", "style": 5}}',
    ):  # fmt: skip
        path.write_text(wrong)
        assert str(path) in refusal(names, ""), wrong


@pytest.mark.parametrize("mode, ending", [
    ("RGB", "jp2"), ("RGB", "ppm"), ("RGB", "bmp"), ("RGB", "webp"), ("RGBA", "png"), ("1", "tif"),
    ("L", "tif"), ("LA", "png"), ("P", "gif"), ("CMYK", "jpg"), ("YCbCr", "tif"),
])  # fmt: skip
def test_load_image(mode, ending, tmp_path):
    """Whatever has 8 bits or fewer becomes RGB of the size asked for, as Pillow does it."""
    path = tmp_path / f"x.{ending}"
    picture(images_of(1, 50)[0]).convert("L" if mode == "LA" else "RGB").convert(mode).save(path)
    expected = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(data.load_image(path, 32), expected) and np.std(expected) > 1


def saved(kind: str, *changes: tuple[bytes, bytes], mode: str = "RGB") -> bytes:
    """An image of 8 x 8 px in a file, some of whose bytes are others."""
    file = io.BytesIO()
    Image.new(mode, (8, 8), 1000 if "I" in mode else None).save(file, kind)
    content = file.getvalue()
    for old, new in changes:
        assert content.count(old) == 1
        content = content.replace(old, new)
    return content


def with_crc(*headers: bytes) -> list[bytes]:
    headers = [b"IHDR" + header + bytes(3) for header in headers]
    return [header + struct.pack(">I", zlib.crc32(header)) for header in headers]


DEEP = (struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16))  # BitsPerSample
PLANAR = (struct.pack("<HHIH", 284, 3, 1, 1), struct.pack("<HHIH", 284, 3, 1, 2))
PNG, HUGE = struct.pack(">IIBB", 8, 8, 8, 2), struct.pack(">IIBB", 10**5, 10**5, 8, 2)
REFUSED_IMAGES = {
    "16 bits-gray.png": saved("PNG", mode="I;16"),
    "16 bits-rgb.png": saved("PNG", with_crc(PNG, PNG[:8] + b"\x10\2")),
    "16 bits-gray.tif": saved("TIFF", mode="I;16"),
    "16 bits-rgb.tif": saved("TIFF", DEEP),
    "16 bits-planar.tif": saved("TIFF", DEEP, PLANAR),  # which Pillow opens as 8-bit RGB
    "32 bits-float.tif": saved("TIFF", mode="F"),
    "12 bits-rgb.jp2": saved("JPEG2000", (b"\0\3" + b"\7\1\1" * 3, b"\0\3" + b"\x0b\1\1" * 3)),
    "16 bits-gray.jp2": saved("JPEG2000", mode="I;16"),
    "16 bits-rgb.ppm": b"P6 8 8 65535\n" + bytes(384),
    "12 bits-gray.pgm": b"P5 8 8 4095\n" + bytes(128),
    "16 bits-float.pfm": b"Pf\n8 8\n-1.0\n" + bytes(256),
    "100000 x 100000-bomb.png": saved("PNG", with_crc(PNG, HUGE)),
    "damaged-text.png": b"hello",
    "damaged-cut.jpg": saved("JPEG")[:-6],
    "damaged-other.tga": saved("TGA"),  # Pillow reads more, but .eps would start Ghostscript
    "no such file-gone.png": None,
}


def test_refused_images(tmp_path):
    """More than 8 bits by the file's own header, too large, damaged: one line names the file."""
    for name, content in REFUSED_IMAGES.items():
        if content:
            (tmp_path / name).write_bytes(content)
        line = refusal(data.load_image, tmp_path / name, 32)
        assert f"{tmp_path / name}: " in line and name.split("-")[0] in line.split(name)[1], line


def test_order():
    """Each row at most once an epoch; epochs and seeds differ; processes share the batches."""

    def steps(seed=0, rank=0, world=1) -> list[list[int]]:
        order = data.Order(50, 8, seed, rank, world)
        return [order[step].tolist() for step in (8, *range(12))][1:]  # a function of the step

    one, halves = steps(), zip(steps(rank=0, world=2), steps(rank=1, world=2))
    epochs = [sum(one[:6], []), sum(one[6:], [])]
    assert all(len(set(epoch)) == 48 and set(epoch) <= {*range(50)} for epoch in epochs)
    assert epochs[0] != epochs[1] and one != steps(seed=1) and [a + b for a, b in halves] == one


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_load(workers, tmp_path):
    """Images, rows, metadata and partners belong together, in order; a bad image is named."""
    split = write_split(tmp_path, [{"gsd": i + 1} for i in range(6)])
    batches = list(data.load(
        split, 32, list(torch.arange(6).split(4)), workers, partners=lambda rows, step: 5 - rows,
        read=lambda records: (torch.tensor([record["gsd"] for record in records]),),
    ))  # fmt: skip
    assert [batch.rows.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    for batch in batches:
        assert torch.equal(batch.metadata[0], batch.rows + 1)
        assert torch.equal(batch.images, images_of(6, 32)[batch.rows])
        assert torch.equal(batch.partners, images_of(6, 32)[5 - batch.rows])
    order = data.Order(6, 2, 0)
    shuffled = [batch.rows.tolist() for batch in data.load(split, 32, order, workers, range(4, 7))]
    assert shuffled == [order[step].tolist() for step in (4, 5, 6)]
    assert not list(data.load(split, 32, order, workers, range(5, 5))), "no steps left"
    (tmp_path / "5.png").write_bytes(b"")
    assert str(tmp_path / "5.png") in refusal(list, data.load(split, 32, order, workers, range(3)))


def test_draw_has_the_papers_probabilities():
    """Supplement B: jitter 0.8, gray 0.2, blur 0.5; 8 orientations and 24 orders alike; uniform
    ranges; all independent. "crop" crops only; "moco" has no vertical flip and no turn."""
    n, rows = 20_000, torch.arange(20_000)
    d, moco, crop = (data.draw(policy, 64, 0, 0, rows, 0) for policy in data.POLICIES.values())
    for which, p in ((d.jittered, 0.8), (d.gray, 0.2), (d.sigma > 0, 0.5)):
        assert likely(which.sum(), n, p)
    for code, ways in ((d.flip @ [4, 2] + d.transpose, 8), (d.order @ [64, 16, 4, 1], 24)):
        counts = np.unique(code, return_counts=True)[1]
        assert len(counts) == ways and all(likely(c, n, 1 / ways) for c in counts)
    ranges = [(d.sigma[d.sigma > 0], 0.1, 2), (d.factors[:, 3], -0.1, 0.1)]
    for values, low, high in ranges + [(d.factors[:, i], 0.6, 1.4) for i in range(3)]:
        share = (values - low) / (high - low)
        assert 0 <= share.min() < 0.01 and 0.99 < share.max() <= 1
        assert abs(share.mean() - 1 / 2) < 0.02 and abs(share.std() - 12**-0.5) < 0.01
    parts = np.c_[d.factors, d.jittered, d.gray, d.sigma > 0, d.flip, d.transpose, d.box[:, 0]]
    assert abs(np.corrcoef(parts.T) - np.eye(11)).max() < 0.05
    for x, least in ((d, 0.2), (crop, 0.5)):
        area, ratio = x.box[:, 2] * x.box[:, 3] / 64**2, x.box[:, 3] / x.box[:, 2]
        assert abs(area.min() - least) < 0.02 and area.max() > 0.97
        assert abs(ratio.max() - 4 / 3) < 0.06 and abs(ratio.min() - 3 / 4) < 0.06
    assert np.array_equal(moco.sigma, d.sigma) and np.array_equal(moco.jittered, d.jittered)
    never = (crop.flip, crop.transpose, crop.gray, crop.sigma, crop.jittered, moco.transpose)
    assert not any(x.any() for x in never) and not moco.flip[:, 0].any()
    assert likely(moco.flip[:, 1].sum(), n, 0.5)


@pytest.mark.parametrize("policy", data.POLICIES)
def test_draw_crops_as_torchvision(policy):
    """4000 boxes and their areas against RandomResizedCrop's (Kolmogorov-Smirnov)."""
    p, n, image = data.POLICIES[policy], 4000, torch.empty(3, 64, 64)
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(image, p.scale, p.ratio) for _ in range(n)]
    theirs, own = np.array(theirs).T, data.draw(p, 64, 0, 0, torch.arange(n), 0).box.T
    for a, b in [*zip(own, theirs), (own[2] * own[3], theirs[2] * theirs[3])]:
        a, b, at = np.sort(a), np.sort(b), np.union1d(a, b)
        gap = np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")
        assert abs(gap).max() / n < 0.045  # larger once in 2000 times when they agree


def test_draw_depends_on_seed_epoch_row_and_view():
    """On each of them, and on nothing else in the batch."""

    def draw(seed: int, epoch: int, rows: list[int], view: int) -> list[tuple]:
        draws = data.draw(data.POLICIES["strong"], 64, seed, epoch, torch.tensor(rows), view)
        return [tuple(map(str, row)) for row in zip(*draws)]

    together = draw(0, 3, [5, 9], 1)
    assert together == draw(0, 3, [5], 1) + draw(0, 3, [9], 1) and together[0] != together[1]
    assert together[0] not in draw(1, 3, [5], 1) + draw(0, 4, [5], 1) + draw(0, 3, [5], 0)


@pytest.mark.parametrize("policy, side, size, n", [
    ("strong", 64, 64, 60), ("crop", 64, 64, 60), ("strong", 32, 64, 60), ("strong", 224, 224, 24),
])  # fmt: skip
def test_augment_equals_torchvision(policy, side, size, n):
    """With the same parameters its pixels, each view the same alone and among others."""
    images, d = images_of(n, side), data.draw(data.POLICIES[policy], side, 0, 0, torch.arange(n), 0)
    jitter = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    images[3] = images[3, :1]  # gray, which has no hue
    out = data.augment(images, d, size)
    alone = data.augment(images[7:8], data.Draws(*(values[7:8] for values in d)), size)
    assert worst(out[7:8], alone) < 1e-5
    for i, x in enumerate(images):
        x = TF.resized_crop(x / 255, *map(int, d.box[i]), [size, size], antialias=True)
        x = x.flip([axis for axis in (1, 2) if d.flip[i][axis - 1]])
        x = x.mT if d.transpose[i] else x
        for j in d.order[i] if d.jittered[i] else ():
            x = jitter[j](x, float(d.factors[i][j]))
        x = TF.rgb_to_grayscale(x, 3) if d.gray[i] else x
        x = TF.gaussian_blur(x, 2 * (size // 20) + 1, float(d.sigma[i])) if d.sigma[i] else x
        assert worst(out[i], x) < 5e-5, i


def test_partners():
    """Of the same area and another date whenever there is one, each alike often; a function of
    seed, epoch and row."""
    areas, dates = ["a", "a", "a", 1, 1, None, 2, "a", None], [5, 6, 6, 5, 5, 7, 7, 8, 7]
    partners, rows = data.Partners(areas, dates, seed=0, per_epoch=2), torch.arange(9)
    drawn = torch.stack([partners(rows, step) for step in range(0, 6000, 2)])
    for i in range(9):
        allowed = [k for k in range(9) if areas[k] == areas[i] is not None and dates[k] != dates[i]]
        counts = torch.bincount(drawn[:, i], minlength=9).tolist()
        assert {k for k, count in enumerate(counts) if count} == set(allowed or [i])
        assert all(likely(counts[k], 3000, 1 / len(allowed)) for k in allowed)
    assert partners.count() == 4 and torch.equal(partners(rows[4:], 5), drawn[2, 4:])
    other = data.Partners(areas, dates, seed=1, per_epoch=2)
    assert any(not torch.equal(other(rows, 2 * epoch), drawn[epoch]) for epoch in range(9))
    assert "no training row has an area" in refusal(data.Partners, [None] * 2, [1, 2], 0, 1)


def test_cluster_places():
    """k-means: every row is in the cluster whose mean is nearest; no place, no cluster."""
    places = np.array([[0.0, 0], [50, 10], [-80, 40]]).repeat(20, 0)
    places += np.random.default_rng(0).normal(size=(60, 2))
    for seed in range(9):
        own = data.cluster_places([*places.tolist(), None, [0, 91]], 3, seed).tolist()
        assert own[60:] == [-1, -1] and len(set(own[:60])) == 3
        means = np.stack([places[np.array(own[:60]) == j].mean(0) for j in range(3)])
        assert own[:60] == ((places[:, None] - means) ** 2).sum(2).argmin(1).tolist()
    line = refusal(data.cluster_places, places.tolist(), 99, 0)
    assert "60 training rows have a place, fewer than 99 clusters" in line


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
        assert (c.queue, c.temperature, c.mlp_out, c.augment) == (65536, 0.2, 128, "moco")


def test_what_is_given_goes_over_the_preset_over_the_method_over_the_paper():
    paper, demo = config_of(), train.parse_config([])
    assert (paper.method, paper.vit, paper.image_size) == ("satmips", "vit_small", 224)
    assert (paper.batch_size, paper.epochs, paper.augment) == (1024, 200, "strong")
    assert (paper.metadata_encoder, paper.metadata_width) == ("text", 512)
    assert config_of("--metadata-encoder table").metadata_width == 192
    assert (paper.temperature, paper.loss_weight, paper.output) == (0.1, 1, "runs/satmips")
    assert (paper.optimizer, paper.warmup_epochs, paper.amp) == ("adamw", 1, "auto")
    assert (paper.mlp_hidden, paper.mlp_out, paper.same_view_negatives) == (4096, 256, False)
    assert (demo.vit, demo.image_size, demo.augment) == ("vit_micro", 64, "crop")
    assert dataclasses.replace(demo, data="DIR") == config_of("--preset small")
    moco = train.parse_config(["--method", "moco", "--epochs", "7", "--base-lr", "0.5"])
    assert (moco.epochs, moco.base_lr, moco.vit) == (7, 0.5, "vit_micro")
    assert (moco.image_image, moco.temperature) == ("moco", 0.2), "what the preset does not set"
    said = train.describe(config_of("--method moco --epochs 7 --preset small"))
    for line in ("epochs +7 +you", "queue +4096 +--preset small", "mlp_out +128 +--method moco"):
        assert regex.search(line, said) and "loss_weight" not in said


WRONG_OPTIONS = (
    "--method simclr --decouple-views", "--method satmip --decouple-views", "--seed 9999999999",
    "--method moco --micro-batch 8", "--epochs 0", "--batch-size 0",
    "--image-size 33", "--log-every 0", "--workers -1", "--base-lr nan", "--temperature 0",
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


VIEWS = {"satmip": 1, "simclr-tp": 2, "satmips-tp --decouple-views": 3, "moco-geo": 2}


@pytest.mark.parametrize("options", VIEWS)
def test_views(options, places):
    """As many as the method needs, each drawn for its view, epoch and row, and standardised; the
    last one of "tp" shows another date of the same area."""
    argv = [*SMALL, "--data", str(places), "--augment", "strong", "--method", *options.split()]
    d = train.TrainingData(train.parse_config(argv))
    loaded = next(d.batches(4, 5))  # 121 // 40 steps an epoch, so this is of epoch 1
    views, _, clusters = train.make_batch(loaded, 4, d, torch.device("cpu"))
    rows, (where,) = loaded.rows.tolist(), d.train.columns("location")
    assert not d.config.geo or torch.equal(clusters, data.cluster_places(where, 100, 0)[rows])
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
    return train.train_step(m, m, optimizer, scaler, batch, config, amp)


def model_for(config: train.Config, encoder: str, **sizes) -> model.SatMIP:
    sizes = {"queue": 24, "places": 3 * config.geo} | sizes
    return small_model(encoder, config.image_image, **sizes).train()


def batch_for(config: train.Config, encoder: str) -> train.Batch:
    views, meta = small_batch(8, train.view_count(config), encoder)
    return train.Batch(views, meta, torch.arange(8) % 3)


def test_options_reach_the_loss_and_the_temperature_is_clamped():
    """exp(logit_scale) starts at 1 / 0.07 as CLIP's and stays within 1 and 100."""
    config = config_of("--vit vit_micro --loss-weight 0.3 --temperature 0.2 --same-view-negatives")
    m, batch = model_for(config, "table"), batch_for(config, "table")
    expected, _ = losses.total_loss(m(batch.views, batch.metadata), None, 0.3, 0.2, True)
    figures = one_step(model_for(config, "table"), batch, config)
    assert worst(figures["loss"], expected) < 1e-5 and worst(figures["temperature"], 0.07) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        e = model_for(config, "table")(batch.views, batch.metadata)
    assert {x.dtype for x in e if x is not None} == {torch.float32}, "heads end in float32"
    expected, _ = losses.total_loss(e, None, 0.3, 0.2, True)
    figures = one_step(model_for(config, "table"), batch, config, half=torch.bfloat16)
    assert worst(figures["loss"], expected) < 1e-4, "so are the losses"
    for before, after in ((9.0, math.log(100)), (-1.0, 0.0)):
        m.logit_scale.data.fill_(before)
        one_step(m, batch, config)
        assert abs(m.logit_scale - after) < 1e-6


def test_moco_keys_follow_and_replace_the_oldest():
    """After each step: momentum 0.999; the step's 8 keys go round in a queue of 12."""
    config = config_of("--method moco --vit vit_micro")
    m, batch = model_for(config, "none", queue=12), batch_for(config, "none")
    slow = m.key_encoder
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 1.0)
    for rows in ([*range(8)], [8, 9, 10, 11, 0, 1, 2, 3]):
        old, keys = [p.clone() for p in slow.parameters()], slow(batch.views[-1])
        one_step(m, batch, config, optimizer)
        fast = [*m.image_encoder.parameters(), *m.image_mlp.parameters()]
        for now, before, query in zip(slow.parameters(), old, fast, strict=True):
            assert worst(now, 0.999 * before + 0.001 * query) < 1e-6
        assert worst(slow.queue[rows], keys) < 1e-6


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
def test_methods_train(method, run, places):
    """Its losses and its scores after each epoch are logged, its checkpoint is plain."""
    folder, config = run(method), train.parse_config(arguments(places, run(method), method))
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
    decayed, spared = state["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (config.weight_decay, 0)
    assert decayed["betas"] == (0.9, 0.98)
    assert decayed["lr"] == log[-1]["lr"] == train.learning_rate(config, 5, 3)
    if config.metadata:
        reader = TableReader.fit(data.Split(places / "train"), DEFAULT)
        assert state["reader"]["mean"] == reader.mean and len(state["reader"]["fields"]) == 3


def test_moco_with_resnet50_as_its_authors_train_it(dataset, tmp_path, capsys):
    """SGD with momentum, decay of every parameter; on one process, no shuffling BN: said."""
    argv = ["--method", "moco", "--data", dataset, "--output", tmp_path, "--image-size", 32]
    argv += ["--batch-size", 24, "--epochs", 1, "--workers", 0]
    train.main([str(word) for word in argv])
    assert regex.search("one process.*shuffl", capsys.readouterr().out)
    state = checkpoint(tmp_path)
    assert state["model"]["image_encoder.conv1.weight"].shape == (64, 3, 7, 7)
    assert state["model"]["image_mlp.2.weight"].shape == (128, 2048)
    assert state["model"]["key_encoder.queue"].shape == (65536, 128)
    (group,) = state["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)


def test_resuming_refuses_other_options_and_other_data(run, places, dataset, tmp_path, capsys):
    """With nothing changed, a finished run is left as it is and scored again."""
    folder = shutil.copytree(run("satmip"), tmp_path / "run")
    for option in ("--seed 1 0", "--base-lr 0.5 0.006", "--fields gsd gsd,", "--vit vit_tiny vit_",
                   "--epochs 3 2"):  # fmt: skip
        name, new, old = option.split()
        line = complaint(capsys, train.main, *arguments(places, folder, "satmip", name, new))
        needles = (str(folder), name.strip("-").replace("-", "_"), new, old)
        assert all(needle in line for needle in needles)
    shutil.copytree(places, tmp_path / "data")
    for path in (tmp_path / "data/train").glob("*0.png"):
        Image.new("RGB", (32, 32)).save(path)
    line = complaint(capsys, train.main, *arguments(tmp_path / "data", folder, "satmip"))
    assert "other training" in line
    shutil.copytree(places, tmp_path / "edited")
    path = tmp_path / "edited/train/metadata.jsonl"
    path.write_text(path.read_text().replace("\"a7\"", "\"a8\""))
    line = complaint(capsys, train.main, *arguments(tmp_path / "edited", folder, "satmip"))
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
    path, rng = tmp_path / "checkpoint.pt", random.Random(0)
    for least in (0, 0, 1, 1, 2, 3):
        process = spawn(save_again_and_again, path)
        wait(lambda: path.exists() and torch.load(path)["step"] >= least, process)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        state = torch.load(path)
        assert (state["model"] == state["step"]).all()
        path.unlink()


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
        process.join(300)
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
    argv = arguments(places, folder, method, *more)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1):
        before = log.read_bytes() if log.exists() else b""
        (process,) = start(tmp_path, argv)
        wait(lambda: log.exists() and log.read_bytes() != before, process)  # another log line
        time.sleep(rng.uniform(0, 0.1))
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
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 300}  # if a rank hangs
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, **options)
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
    "large batch": (Path.touch, "--batch-size 122", "--batch-size 122"),
    "diverged": (Path.touch, "--base-lr 2e9 --warmup-epochs 0", "not finite before step 2"),
    "scoring": (lambda folder: (folder / "../test/3.png").unlink(), "", "test/3.png: no such"),
}


@pytest.mark.parametrize("what", WRONG_DATA)
def test_wrong_data_is_one_line(what, places, tmp_path, capsys):
    """It names the file, the option or the step; only an epoch that cannot be scored is saved."""
    change, options, needle = WRONG_DATA[what]
    folder = shutil.copytree(places, tmp_path / "data")
    change(folder / "train")
    argv = arguments(folder, tmp_path / "run", "satmip", "--workers", 1, *options.split())
    assert needle in complaint(capsys, train.main, *argv)
    assert (tmp_path / "run/checkpoint.pt").exists() == (what == "scoring")


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
    assert gradient(objective, found).abs().max() < 1e-4
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
    votes = torch.arange(12.0).expand(4, 12).clone()  # top-5: a tie for the fifth rank is a miss
    votes[3, 6:] = 7
    found = evaluate.score(votes, torch.tensor([7, 6, 11, 7]), None)
    assert (found["accuracy"], found["top5"]) == (0.25, 0.5)
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
    "--modality metadata,--modality both,--label nope,--data nowhere,--image-size 33,"
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
