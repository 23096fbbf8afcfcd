"""The tests: what the code promises, in the order in which its files are read.

    pytest -q test_all.py        # about five minutes on two CPU cores; no GPU, no network

In this order: helpers -> metadata -> model -> losses (alone, then on 1, 2 and 4 processes) -> data -> evaluate
-> train -> whole programs -> what a user can get wrong -> the repository itself.
"""

import argparse
import ast
import contextlib
import copy
import csv
import dataclasses
import functools
import gzip
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

import ftfy
import numpy as np
import pytest
import regex
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet50
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF
from tqdm import tqdm

import data
import evaluate
import losses
import metadata
import model
import train
from metadata import POSTER, BadInput, TableSchema, Tokenizer, caption, parse_fields, parse_timestamp, table_row

HERE = Path(__file__).parent
ALL, DEFAULT = parse_fields("all"), parse_fields(metadata.DEFAULT_FIELDS)
nan = math.nan

# -----------------------------------------------------------------------------------------------------
# Helpers


def worst(a, b) -> float:
    """Largest absolute difference."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def likely(count: int, n: int, p: float) -> bool:
    """Whether `count` of n draws is within five deviations of probability p."""
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, so that none hides behind being 0 or 1; in evaluation mode."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def small_model(encoder: str = "table", image_image: str = "simclr", **options) -> model.SatMIP:
    sizes = dict(image_size=32, vit="vit_micro", metadata_width=32, metadata_layers=1, numbers=4, categories=(5,))
    sizes |= dict(joint_dim=32, mlp_hidden=64, mlp_out=32) | options
    torch.manual_seed(0)
    return model.SatMIP(model.ModelConfig(metadata_encoder=encoder, image_image=image_image, **sizes))


def small_batch(n: int, views: int = 2) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Views and table rows for `small_model`."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(n, 4, generator=generator).index_fill(0, torch.arange(0, n, 3), nan)
    categories = torch.randint(5, (n, 1), generator=generator)
    return torch.randn(views, n, 3, 32, 32, generator=generator), (numbers, categories)


def batch_of(views: torch.Tensor, meta: tuple, rows: slice = slice(None), **codes: torch.Tensor) -> train.Batch:
    """What one process learns from of a whole batch."""
    codes = {name: values[rows] for name, values in codes.items()}
    meta = tuple(values[rows] for values in meta)

    def made(piece: slice) -> torch.Tensor:
        assert not torch.is_autocast_enabled("cpu"), "views are made in float32"
        return views[:, rows][:, piece]

    return train.Batch(made, meta, views[:, rows].shape[1], **codes)


def images_of(n: int, side: int) -> torch.Tensor:
    """uint8 [n, side, side, 3] of smooth random colours with some noise."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(n, 3, 4, 4, generator=generator), (side, side), mode="bilinear")
    noisy = 0.8 * smooth + 0.2 * torch.rand(n, 3, side, side, generator=generator)
    return (255 * noisy).byte().permute(0, 2, 3, 1).contiguous()


COLOURS = {"desert": (220, 180, 120), "forest": (30, 90, 40), "ice": (235, 240, 250), "sea": (20, 50, 120)}
WRONG_VALUES = {5: {"gsd": [0, "abc"]}, 6: {"location": None}, 8: {"country_code": ""}, 9: {"timestamp": "2004-13-01"}}


def write_dataset(folder: Path) -> Path:
    """48 train and 16 test images of 32 px, coloured by class and place; some values missing, some malformed."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 48), ("test", 16)):
        (folder / split).mkdir(parents=True)
        records = []
        for i in range(n):
            kind, place = list(COLOURS)[i % 4], [round(rng.uniform(-180, 180), 4), round(rng.uniform(-60, 75), 4)]
            pixels = np.array(COLOURS[kind]) + place[0] / 12 + rng.normal(0, 12, (32, 32, 3))
            name = f"{i:02d}.png" if i % 3 else f"{i:02d}.jpg"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name)
            when = f"20{i % 20:02d}-0{1 + i % 9}-21T{i % 24:02d}:30:08Z" if i % 3 else "2004-10"
            record = {"file_name": name, "gsd": [10.0 + i, 9.0 + i % 5], "timestamp": when, "location": place}
            record |= {"country_code": ("PER", "FRA", "KEN")[i % 3], "cloud_cover": i, "area": f"a{i // 2}"}
            record |= {"label_kind": kind, **WRONG_VALUES.get(i % 10, {})}
            if i % 10 == 7:
                del record["label_kind"], record["location"]
            records.append(record)
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b) -> bool:
    """Bit by bit, all through."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Nothing here may reach beyond this machine."""
    torch.set_num_threads(1)  # these networks are tiny: threads would only wait for each other
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    connect = socket.socket.connect

    def guarded(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), (
            f"connects to {address}"
        )
        return connect(self, address)

    socket.socket.connect = guarded
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


TINY = (
    "--vit vit_micro --image-size 32 --patch-size 16 --metadata-width 32 --metadata-layers 1 --mlp-hidden 64 "
    "--batch-size 16 --epochs 2 --workers 0 --eval-every 1 --base-lr 0.01"
).split()
RUNS = {  # together they use every method, encoder and switch
    "simclr": "--method simclr --augment crop --same-view-negatives",
    "satmip": "--method satmip --metadata-encoder text --checkpoint-blocks",
    "satmips": "--method satmips --metadata-encoder text",
    "table": "--method satmips --metadata-encoder table --fields all --decouple-views",
    "geo": "--method satmips-geo-tp --metadata-encoder table --fields all --consistent-metadata --field-dropout 0.2 "
           "--cyclic-features --mask-same-area --geo-clusters 5 --base-lr 0.001",
    "varied": "--method satmip --metadata-encoder text --shuffle-fields --digits 2 --field-dropout 0.3 --micro-batch 3",
    "moco": "--method moco-geo-tp --vit vit_micro --queue 40 --optimizer adamw",
    "resnet": "--method moco --vit resnet50 --queue 32 --base-lr 0.001",
}  # fmt: skip


@pytest.fixture(scope="session")
def run(dataset, tmp_path_factory):
    """Name in RUNS -> folder of that finished run; each is trained once, when first asked for."""
    folders = {}

    def finished(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            train.main([*TINY, "--data", str(dataset), "--output", str(folder), *RUNS[name].split()])
            folders[name] = folder
        return folders[name]

    return finished


# -----------------------------------------------------------------------------------------------------
# metadata: the tokenizer

CLIP_IDS = {  # ids of CLIP's own tokenizer
    "a diagram": [320, 22697],
    "a dog": [320, 1929],
    "a cat": [320, 2368],
    "": [],
    "Hello,   WORLD!\n\t": [3306, 267, 1002, 256],
    "\U0001f6f0\ufe0f satellite \U0001f30d": [11306, 34777, 10316, 18641],
    "cafe\u0301 na\xefve \xc5NGSTR\xd6M": [15304, 1097, 35689, 563, 23176, 10352, 807, 7255, 332],
    "\u4eba\u5de5\u885b\u661f \uc704\uc131": [36839, 161, 115, 98, 164, 94, 249, 42891, 509, 20909, 226, 15074, 365],
    "&lt;3 &amp;amp; 5&nbsp;km": [283, 274, 261, 276, 4590],
    "it's we're I'LL don't he'd": [585, 568, 649, 982, 328, 1342, 847, 713, 797, 1896],
    "\u201cquotes\u201d \u2018n\u2019 it\u2019s": [257, 5808, 257, 262, 333, 262, 585, 568],
    "a\x00b\x1b[31mred\x7f": [596, 736],
    "\xbd \xb2 \u2167 2015-09": [33613, 41175, 158, 227, 371, 273, 271, 272, 276, 268, 271, 280],
    "\u0130stanbul \u1e9etra\xdfe \u01c5": [328, 16384, 11231, 127, 253, 752, 127, 253, 324, 67, 129, 378],
    "sch\xc3\xb6n &eacute;": [844, 7255, 333, 4166],
    "\ufb01 \uff26\uff55\uff4c\uff4c": [3589, 1476],
    "_foo__bar--": [318, 23435, 3838, 2411, 2432],
    "\u0928\u092e\u0938\u094d\u0924\u0947": [3124, 101, 48254, 28505, 19389, 27263, 25130],
    "\u200b\xa0x\u2028y": [9844, 343, 344],
    "<|endoftext|> a <|startoftext|>": [49407, 320, 49406],
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.mark.parametrize("text", CLIP_IDS)
def test_token_ids_are_clips(tokenizer, text):
    """Known strings, from plain words to emoji, CJK and control characters, have CLIP's ids."""
    assert tokenizer.encode(text) == CLIP_IDS[text]


def test_tokenizer_equals_a_slow_transcription(tokenizer):
    """Byte-pair encoding one pair at a time, written apart from the code, gives the same ids on random Unicode."""
    merges = [tuple(line.split()) for line in gzip.open(metadata.VOCABULARY, "rt").read().split("\n")[1:48895]]
    rank = {pair: i for i, pair in enumerate(merges)}
    letters = {b: chr(b) for b in range(256) if chr(b).isprintable() and b != 32}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    ends = [c + "</w>" for c in letters.values()]
    ids = {symbol: i for i, symbol in enumerate([*letters.values(), *ends, *map("".join, merges)])}
    word = regex.compile(r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def slow(text: str) -> list[int]:
        result, text = [], html.unescape(html.unescape(ftfy.fix_text(text)))
        for found in word.findall(" ".join(text.split()).lower()):
            parts = [letters[b] for b in found.encode()]
            parts[-1] += "</w>"
            while any(pair in rank for pair in zip(parts, parts[1:])):
                i = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), math.inf))
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            result += [ids[part] for part in parts]
        return result

    rng = random.Random(0)
    ranges = [(32, 127)] * 3 + [(0, 0x300), (0x300, 0x3000), (0x3000, 0xD800), (0xE000, 0x10FFFF)]
    for _ in range(300):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))
        assert tokenizer.encode(text) == slow(text), ascii(text)


def test_batches_of_tokens(tokenizer):
    """Rows with start, end and padding 0; a single caption is a row too; the end survives truncation."""
    fields = (metadata.Field("a", "category"),)
    records = [{"a": "cat"}, {}, {"a": "hello world diagram"}]
    table = data.tabulate(records, fields, captions=True)
    a, colon, cat, hello, world, diagram = tokenizer.encode("a: cat hello world diagram")
    rows = [[49406, a, colon, cat, 49407], [49406, 49407], [49406, a, colon, hello, world, diagram, 49407]]
    assert table.tokens.values.dtype == np.uint16 and [table.tokens[i].tolist() for i in range(3)] == rows
    read = data.Metadata(table, "text", list(range(49408)))
    ids, lengths = read.batch(torch.tensor([2, 1]))
    assert ids.tolist() == [rows[2], [49406, 49407, 0, 0, 0, 0, 0]] and lengths.tolist() == [7, 2] and read.longest == 7
    assert read.batch(torch.tensor([0]))[0].tolist() == [rows[0]]
    read = data.Metadata(table, "text", list(range(49408)), context=4)
    ids, lengths = read.batch(torch.tensor([0, 1, 2]))
    assert ids.tolist() == [[49406, a, colon, 49407], [49406, 49407, 0, 0], [49406, a, colon, 49407]]
    assert lengths.tolist() == [4, 2, 4] and read.longest == 4


def test_rows_that_no_caption_reaches_change_nothing():
    """An embedding of the tokens met, trained for some steps, gives what the whole vocabulary's gives."""
    records = [{"gsd": 1 + i, "timestamp": f"20{10 + i}-03-0{i}"} for i in range(1, 9)]
    table, losses_of = data.tabulate(records, DEFAULT, captions=True), []
    ids = np.unique(table.tokens.values).tolist()
    torch.manual_seed(0)
    whole = model.TextTransformer(49408, 64, 32, 1, 4)
    few = model.TextTransformer(len(ids) + 1, 64, 32, 1, 4)
    few.load_state_dict({**whole.state_dict(), "token_embedding.weight": whole.token_embedding.weight[[*ids, 0]]})
    for text, schema in ((whole, list(range(49408))), (few, ids)):
        batch = data.Metadata(table, "text", schema).batch(torch.arange(8))
        optimizer, values = torch.optim.AdamW(text.parameters(), lr=0.01, weight_decay=0.1), []
        for _ in range(5):
            optimizer.zero_grad()
            (loss := text(*batch).square().mean(0).sub(torch.arange(32)).square().mean()).backward()
            optimizer.step()
            values.append(loss.item())
        losses_of.append(values)
    assert worst(*losses_of) < 1e-4 and losses_of[0][0] > losses_of[0][-1] + 1 and len(ids) < 40
    assert worst(whole.token_embedding.weight[ids], few.token_embedding.weight[:-1]) < 1e-5
    unseen = data.tabulate([{"timestamp": "2015-01-01T00:00Z"}], DEFAULT, captions=True)
    row = data.Metadata(unseen, "text", ids).batch(torch.tensor([0]))[0][0]
    assert (row == len(ids)).sum() == 2, "T and Z"


# -----------------------------------------------------------------------------------------------------
# metadata: values, captions, tables


def test_captions_are_the_posters(tokenizer):
    """All 15 fields as the poster prints them, 207 tokens; the three defaults are 67; the order is as asked for."""
    assert len(ALL) == 15 and caption(POSTER, ALL) == (
        "gsd: [11.4546, 9.1344], multispectral_gsd: 41.1896, pixel_size: [1.03e-04, 8.23e-05], "
        "timestamp: 2015-09-21T15:30:08Z, location: [-73.310776, -3.785814], utm_zone: 18M, country_code: PER, "
        "cloud_cover: 14, scan_direction: Reverse, wavelengths: [661, 545, 477], target_azimuth_angle: 39.12, "
        "sun_azimuth_angle: 77.28, sun_elevation_angle: 70.44, off_nadir_angle: 27.70, sensor_platform: GEOEYE01"
    )
    assert [len(tokenizer.encode(caption(POSTER, fields))) for fields in (ALL, DEFAULT)] == [207, 67]
    assert caption(POSTER, parse_fields("utm_zone, gsd")) == "utm_zone: 18M, gsd: [11.4546, 9.1344]"
    assert caption({"gsd": 7}, DEFAULT) == "gsd: [7.0000, 7.0000]" and caption({}, ALL) == ""


MALFORMED = {
    "gsd": [[1], [1, 2, 3], [1, None], [0, 1], [[1], 2], "1,2", 0, -1, {"x": 1, "y": 2}, [True, 1]],
    "multispectral_gsd": [[1], 0, "1 m", 10**400],
    "pixel_size": [[1e-4, math.inf], ["a", "b"]],
    "timestamp": [
        "2004-13-01", "2004-00", "2004-10-00", "2004-02-30", "2004-10-", "10/2004", "20041301", 2004, ["2004"],
        "2015-09-21T25:00", "2015-09-21T15:61", "2015-09-21T15:30:61Z", "2015-09-21T15:30:08+99:99", "0000-01",
    ],
    "location": [[181, 0], [-181, 0], [0, 91], [0, -90.1], [None, 1], [1, nan], "12,41", 12, [1, 2, 3], {}],
    "country_code": ["  ", ["PER"], 1.5, {"a": 1}, "\ud800", "A\udfffB"],
    "cloud_cover": [-1, 101, [14], "cloudy"],
    "wavelengths": [[661, 545], [661, 545, -1], 661],
    "sun_elevation_angle": [91, -91],
    "sun_azimuth_angle": [361],
}  # fmt: skip
BAD_VALUES = [(name, bad) for name, values in MALFORMED.items() for bad in values]
BAD_VALUES += [(f.name, bad) for f in ALL for bad in (None, "", nan, math.inf, -math.inf, True, False, [], {})]
BAD_VALUES += [(f.name, bad) for f in ALL if f.kind != "category" for bad in ("abc", "nan", "inf")]


@pytest.mark.parametrize("name, bad", BAD_VALUES, ids=[f"{name}-{ascii(bad)[:26]}" for name, bad in BAD_VALUES])
def test_malformed_values_are_missing(name, bad):
    """A bad value is left out of the caption and empty in the table, as if absent; other fields stay as they are."""
    (field,), rest = parse_fields(name), tuple(field for field in ALL if field.name != name)
    assert caption({**POSTER, name: bad}, ALL) == caption(POSTER, rest)
    numbers, categories = table_row({**POSTER, name: bad}, (field,))
    assert len(numbers) == len(metadata.number_columns((field,))) and all(map(math.isnan, numbers))
    assert categories == [None] * (field.kind == "category")


TIMES = {
    "2015-09-21T15:30:08Z": [2015, 9, 21, 15, 0],
    " 2015-09-21 15:30 ": [2015, 9, 21, 15, 0],
    "2015-09-21T15:30:08.123456Z": [2015, 9, 21, 15, 0],
    "2004": [2004, nan, nan, nan, nan],
    "2004-10": [2004, 10, nan, nan, nan],
    "2004-10-05": [2004, 10, 5, nan, 1],
    "2015-01-01T00:30:00+02:00": [2014, 12, 31, 22, 2],
    "2014-12-31T20:30:00-0500": [2015, 1, 1, 1, 3],
    "2016-12-31T23:59:60Z": [2016, 12, 31, 23, 5],
    "2000-02-29": [2000, 2, 29, nan, 1],
}


@pytest.mark.parametrize("text", TIMES)
def test_timestamps(text):
    """Year, month, day, hour, weekday in UTC; a date may stop early; a leap second is a time."""
    np.testing.assert_equal(parse_timestamp(text), TIMES[text])


def test_cyclic_features():
    """December is next to January, the date line no border; what is missing stays missing, the rest as it was."""
    fields = parse_fields("gsd,timestamp,location,sun_azimuth_angle")
    rows = [{"gsd": [1, 2], "timestamp": t, "location": p, "sun_azimuth_angle": a} for t, p, a in (
        ("2015-12-31T23:00Z", [180, 10], 359), ("2016-01-01T00:00Z", [-180, 10], 1), (None, None, None))]  # fmt: skip
    numbers = data.tabulate(rows, fields, captions=False).numbers
    found = metadata.cyclic_features(numbers, metadata.periods(fields))
    own = (metadata.Field("rain_per_month", "number"), metadata.Field("latitude", "number"))
    assert metadata.periods(own) == [0, 0], "a name alone says nothing"
    assert found.shape == (3, 2 + 2 + 3 * 2 + 3 + 2) and np.isnan(found[2, 2:]).all() and (found[:, :2] == [1, 2]).all()
    month, place, azimuth = found[:2, 3:5], found[:2, 10:13], found[:2, 13:]
    assert worst(*place) < 1e-12 and worst(*azimuth) < 0.04 and abs(np.linalg.norm(month[0] - month[1]) - 0.5176) < 1e-3
    longitude, latitude = np.radians([180, 10])
    sphere = [np.sin(longitude) * np.cos(latitude), np.cos(longitude) * np.cos(latitude), np.sin(latitude)]
    assert worst(place[0], sphere) < 1e-12
    schema = TableSchema.fit(fields, numbers, [], cyclic=True)
    encoded, _ = schema.encode(numbers, [])
    assert encoded.shape == found.shape and worst(encoded[:2].mean(0), np.zeros(15)) < 1e-6 and len(schema.mean) == 15


def test_rounded_captions():
    """No number has more decimals than asked for; formats with fewer stay."""
    record = {"gsd": [1.23456, 2.5], "location": [1.123456, 2.5], "cloud_cover": 7, "pixel_size": [1.234e-5, 2e-5]}
    fields = (*ALL, metadata.Field("warmth", "number", style="%.6g"))
    text = caption(record | {"warmth": 12.3456}, metadata.rounded(fields, 1))
    assert text == "gsd: [1.2, 2.5], pixel_size: [1.2e-05, 2.0e-05], location: [1.1, 2.5], cloud_cover: 7, warmth: 12.3"


def test_schema_is_fitted_on_the_known_training_values():
    """Standardised with the training split's statistics; NaN stays NaN; missing is row 0, unknown row 1."""
    fields = parse_fields("cloud_cover,location,country_code")
    training = [("10", [5, 1], "B"), (30, None, "A"), (None, [5, " 3 "], None), (20, [5, 2], "A")]

    def read(rows: list[tuple]) -> tuple[np.ndarray, list]:
        table = data.tabulate([dict(zip([f.name for f in fields], row)) for row in rows], fields, captions=False)
        return table.numbers, table.categories

    schema, a, b = TableSchema.fit(fields, *read(training)), (200 / 3) ** 0.5, (2 / 3) ** 0.5
    assert schema.numbers == ["cloud_cover", "location_longitude", "location_latitude"]
    assert schema.categories == {"country_code": ["A", "B"]}
    np.testing.assert_allclose([schema.mean, schema.std], [[20, 5, 2], [a, 1, b]])
    numbers, categories = schema.encode(*read([*training, (40, [6, 4], "C")]))
    expected = [[-10 / a, 0, -1 / b], [10 / a, nan, nan], [nan, 0, 1 / b], [0, 0, 0], [20 / a, 1, 2 / b]]
    np.testing.assert_allclose(numbers, expected, rtol=1e-6)
    assert categories.tolist() == [[3], [2], [0], [2], [1]]


@pytest.mark.parametrize("kind", ["text", "table"])
@torch.no_grad()
def test_a_missing_value_concerns_its_own_row_only(kind):
    """Any field of any row gone: that row's embedding changes, no other does; missing is not the mean, nor zero."""
    records = [dict(POSTER, cloud_cover=i, country_code=c, gsd=[1 + i, 2]) for i, c in enumerate("ABCABC")]
    batches = [records, [{**POSTER, "cloud_cover": value} for value in (2.5, 0, None)] * 2]
    for i, field in enumerate(ALL):
        batches.append([{**r, field.name: None} if row == i % 6 else r for row, r in enumerate(records)])
    table = data.tabulate(records, ALL, captions=False)
    schema = TableSchema.fit(ALL, table.numbers, table.categories)
    table = data.tabulate(sum(batches, []), ALL, captions=True)
    read = data.Metadata(table, kind, schema if kind == "table" else list(range(49408)))
    sizes = len(schema.numbers), [len(values) + 2 for values in schema.categories.values()]
    encoder = model.TextTransformer(49408, 256, 32, 2, 4) if kind == "text" else model.FTTransformer(*sizes, 32, 2, 4)
    randomise(encoder)
    rows = data.in_order(6 * len(batches), 6)
    before, (mean, zero, missing, *_), *changed = (encoder(*read.batch(r)) for r in rows)
    for i, after in enumerate(changed):
        difference = (after - before).abs().amax(1)
        assert difference[i % 6] > 1e-3 and difference[torch.arange(6) != i % 6].max() < 1e-5, ALL[i].name
    assert worst(mean, missing) > 1e-3 and worst(zero, missing) > 1e-3


# -----------------------------------------------------------------------------------------------------
# model


def test_parameter_counts():
    """ViT-S/16, the text and table blocks, SLIP's head and the projections, counted by hand."""
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    sizes = dict(metadata_encoder="table", metadata_width=192, numbers=9, categories=(4,), image_image="simclr")
    with torch.device("meta"):
        table = model.SatMIP(model.ModelConfig(**sizes))
        text = model.SatMIP(model.ModelConfig(metadata_encoder="text"))
    small, wide = (12 * w**2 + 13 * w for w in (384, 512))  # a block: qkv, proj, two layers of 4 w, two norms
    assert count(table.image_encoder) == 12 * small + 769 * 384 + 384 + 197 * 384 + 2 * 384 == 21_665_664
    assert count(text.metadata_encoder.blocks) == 3 * wide == 9_457_152
    assert count(text.metadata_encoder) == 9_457_152 + (49408 + 77 + 2) * 512
    reglu = 4 * 192 * 193 + 193 * 512 + 257 * 192 + 4 * 192  # hidden width 4/3 of 192
    assert count(table.metadata_encoder.blocks) == 3 * reglu - 2 * 192 == 891_072, "the first block has no first norm"
    assert count(table.metadata_encoder) == 891_072 + 192 * (1 + 9 + 10 + 9 + 4) + 2 * 192
    assert count(table.image_mlp) == 385 * 4096 + 4097 * 4096 + 4 * 4096 + 4097 * 256 == 19_423_488
    projections = table.image_projection, text.metadata_projection, table.metadata_projection
    assert [count(p) for p in projections] == [196_608, 262_144, 98_304]


def test_vit_has_timms_names_and_shapes():
    """Foreign ViT-S weights load by name: the state dict is timm's."""
    with torch.device("meta"):
        own = {k: tuple(v.shape) for k, v in model.ViT(224, 16, *model.VITS["vit_small"]).state_dict().items()}
    block = {
        "norm1.weight": (384,), "norm1.bias": (384,), "attn.qkv.weight": (1152, 384), "attn.qkv.bias": (1152,),
        "attn.proj.weight": (384, 384), "attn.proj.bias": (384,), "norm2.weight": (384,), "norm2.bias": (384,),
        "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,), "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,),
    }  # fmt: skip
    timm = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384), "norm.weight": (384,), "norm.bias": (384,)}
    timm |= {"patch_embed.proj.weight": (384, 3, 16, 16), "patch_embed.proj.bias": (384,)}
    assert own == timm | {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()}


def slow_blocks(encoder, x: torch.Tensor, epsilon: float, heads: int) -> torch.Tensor:
    """One sample's tokens [L, D] through every block in full, attention as written in books -> CLS row [D]."""

    def norm(layer, x):
        scaled = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + epsilon).sqrt()
        return layer.weight * scaled + layer.bias

    linear = lambda layer, x: x @ layer.weight.T + layer.bias  # noqa: E731
    for i, block in enumerate(encoder.blocks):
        table = isinstance(encoder, model.FTTransformer)
        q, k, v = linear(block.attn.qkv, x if table and i == 0 else norm(block.norm1, x)).chunk(3, dim=1)
        mixed = []
        for a, b, c in zip(q.chunk(heads, dim=1), k.chunk(heads, dim=1), v.chunk(heads, dim=1)):
            weights = torch.exp(a @ b.T / math.sqrt(a.shape[1]))
            mixed.append(weights / weights.sum(1, keepdim=True) @ c)
        x = x + linear(block.attn.proj, torch.cat(mixed, dim=1))
        hidden = linear(block.mlp.fc1, norm(block.norm2, x))
        if table:
            a, b = hidden.chunk(2, dim=1)
            hidden = a * b.clamp(min=0)
        else:
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + linear(block.mlp.fc2, hidden)
    return norm(encoder.norm, x)[0]


@torch.no_grad()
def test_vit_equals_a_slow_transcription():
    """Patches in reading order, explicit softmax attention, all tokens through the last block."""
    vit = randomise(model.ViT(32, 16, 24, 3, 4)).double()
    images = torch.randn(3, 3, 32, 32).double()
    for image, out in zip(images, vit(images)):
        patches = torch.stack([image[:, y : y + 16, x : x + 16].flatten() for y in (0, 16) for x in (0, 16)])
        tokens = patches @ vit.patch_embed.proj.weight.flatten(1).T + vit.patch_embed.proj.bias
        assert worst(out, slow_blocks(vit, torch.cat([vit.cls_token[0], tokens]) + vit.pos_embed[0], 1e-6, 4)) < 1e-9


@torch.no_grad()
def test_text_encoder_equals_a_slow_transcription_without_padding():
    """Padding, however long and whatever stands in it, changes nothing; every token is seen, the last one too."""
    text = randomise(model.TextTransformer(100, 20, 24, 3, 4)).double()
    captions = [[98, 5, 6, 99], [98, 7, 99], [98, 8, 9, 10, 11, 12, 99]]
    lengths = torch.tensor([len(c) for c in captions])
    inputs = [text.token_embedding.weight[c] + text.pos_embed[: len(c)] for c in captions]
    expected = torch.stack([slow_blocks(text, x, 1e-5, 4) for x in inputs])
    for L in (7, 12, 20):
        tokens = torch.randint(0, 100, (3, L))  # garbage beyond each caption
        for row, c in zip(tokens, captions):
            row[: len(c)] = torch.tensor(c)
        assert worst(text(tokens, lengths), expected) < 1e-9
    tokens[2, 6] = 50
    assert worst(text(tokens, lengths)[2], expected[2]) > 1e-3, "the first token sees the last"


def test_padding_receives_no_gradient():
    """Neither the embedding of a padding token nor positions beyond the captions learn."""
    text = randomise(model.TextTransformer(100, 20, 24, 2, 4))
    text(torch.tensor([[98, 5, 99, 0, 0], [98, 6, 99, 1, 2]]), torch.tensor([3, 3])).square().sum().backward()
    tokens, positions = text.token_embedding.weight.grad.abs().amax(1), text.pos_embed.grad.abs().amax(1)
    assert not tokens[:3].any() and not positions[3:].any() and tokens[[98, 5, 6, 99]].all() and positions[:3].all()


@torch.no_grad()
def test_table_encoder_equals_a_slow_transcription():
    """x_j W_j + b_j, missing_j + b_j where x_j is missing, an embedding + b_j for categories; ReGLU, no first norm."""
    table = randomise(model.FTTransformer(3, [4, 5], 24, 2, 4)).double()
    numbers, categories = torch.tensor([[0.5, nan, -2.0], [nan, 0.0, 1.0]]).double(), torch.tensor([[0, 4], [3, 1]])
    for x, c, out in zip(numbers, categories, table(numbers, categories)):
        tokens = [table.missing[j] if x[j].isnan() else x[j] * table.weight[j] for j in range(3)]
        tokens += [embedding.weight[i] for embedding, i in zip(table.embeddings, c)]
        x = torch.stack([table.cls_token[0, 0], *(t + b for t, b in zip(tokens, table.bias))])
        assert worst(out, slow_blocks(table, x, 1e-5, 4)) < 1e-9


@torch.no_grad()
def test_positions_follow_the_image_size():
    """At another size the grid of positions is resampled, rows as rows, columns as columns; CLS keeps its own."""
    vit = model.ViT(64, 16, 8, 1, 2)
    vit.pos_embed[0, 1:] = torch.arange(4.0).repeat(4)[:, None]  # grows along columns only
    assert vit.positions(4, 4) is vit.pos_embed
    cls, grid = vit.positions(3, 8)[0].split([1, 24])
    grid = grid[:, 0].view(3, 8)
    assert torch.equal(cls, vit.pos_embed[0, :1]) and worst(grid, grid[:1].expand(3, 8)) < 1e-5
    assert (grid[0].diff() > 0).all() and abs(grid.mean() - 1.5) < 0.01
    assert vit(torch.randn(2, 3, 48, 128)).shape == (2, 8)


def foreign_file(path: Path, name: str, vit: model.ViT, **changes) -> Path:
    """The encoder's weights as that source stores them, with what else its authors keep in the file."""
    tensors = {**vit.state_dict(), **changes}
    if name == "satmaepp":
        tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].flip(1)
    if name == "scalemae":
        tensors["pos_embed"] = torch.zeros(1, 5, vit.width)
    extra = {
        "slip": {"module.logit_scale": torch.ones(()), "module.image_mlp.layer1.weight": torch.ones(2, 2)},
        "mocov3": {"module.momentum_encoder.norm.bias": torch.ones(1), "module.base_encoder.head.bias": torch.ones(2)},
        "dino": {"module.head.mlp.0.weight": torch.ones(2)},
        "timm": {"head.weight": torch.ones(2, 2)},
    }.get(name, {"mask_token": torch.ones(1), "decoder_blocks.0.norm1.bias": torch.ones(1), "fpn.bias": torch.ones(1)})
    prefix = {"slip": "module.visual.", "mocov3": "module.base_encoder.", "dino": "module.backbone."}.get(name, "")
    content = {prefix + key: value for key, value in tensors.items()} | extra
    key = {"slip": "state_dict", "mocov3": "state_dict", "dino": "teacher", "timm": None}.get(name, "model")
    whole = {key: content, "args": argparse.Namespace(lr=0.1), "epoch": 3} if key else content
    torch.save(whole, path)
    return path


@pytest.mark.parametrize("name", ["slip", "mocov3", "dino", "timm", "mae", "satmae", "satmaepp", "scalemae"])
def test_weights_of_others(name, tmp_path):
    """Every tensor where it belongs; the blocks of a BGR network answer to RGB; Scale-MAE's positions are computed."""
    theirs, ours = (randomise(model.ViT(32, 16, *model.VITS["vit_micro"])) for _ in range(2))
    with torch.no_grad():
        ours.cls_token.zero_()
    path = foreign_file(tmp_path / "x.pt", name, theirs)
    said = model.load_encoder(ours, path, name, heads=4, scale=2.5)
    assert "loaded 54 tensors; missing: none; unexpected: none" in said and "4 heads" in said
    with torch.no_grad():
        if name == "scalemae":
            theirs.pos_embed.copy_(model.sincos_positions(128, 2, 2.5))
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())
    larger = model.ViT(64, 16, *model.VITS["vit_micro"])
    assert "4 x 4" in model.load_encoder(larger, path, name, heads=4)
    if name != "scalemae":
        assert worst(larger.pos_embed, theirs.positions(4, 4)) < 1e-6


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of TorchScript
def test_wrong_weights_of_others(tmp_path):
    """Heads, a missing or misshapen tensor, another architecture, another source, code: each refused by name."""
    vit, path = randomise(model.ViT(32, 16, *model.VITS["vit_micro"])), tmp_path / "x.pt"
    small = model.ViT(32, 16, 384, 1, 12)
    foreign_file(path, "dino", model.ViT(32, 16, 384, 1, 6))
    with pytest.raises(model.WrongWeights, match="dino has 6 heads where the model has 12"):
        model.load_encoder(small, path, "dino")
    for changes, needle in (
        ({"norm.weight": torch.ones(64)}, r"norm.weight: \(64,\), wanted \(128,\)"),
        ({"blocks.0.ls1.gamma": torch.ones(128)}, "blocks.0.ls1.gamma.* wanted nothing"),
        ({"pos_embed": torch.ones(1, 6, 128)}, r"pos_embed: \(1, 6, 128\)"),
        ({"patch_embed.proj.weight": torch.ones(128, 3, 8, 8)}, "patch_embed.proj.weight"),
    ):
        foreign_file(path, "timm", vit, **changes)
        with pytest.raises(model.WrongWeights, match=needle):
            model.load_encoder(vit, path, "timm", heads=4)
    pooled = {key: value for key, value in vit.state_dict().items() if not key.startswith("norm.")}
    torch.save({"model": pooled | {"fc_norm.weight": torch.ones(128)}}, path)  # a fine-tuned MAE, which averages tokens
    with pytest.raises(model.WrongWeights, match="norm.weight: nothing, wanted"):
        model.load_encoder(vit, path, "mae", heads=4)
    with pytest.raises(model.WrongWeights, match="not slip weights: no module.visual.cls_token; it holds model"):
        model.load_encoder(vit, path, "slip", heads=4)
    openai = {"visual.class_embedding": torch.ones(8), "visual.conv1.weight": torch.ones(8, 3, 4, 4)}
    torch.save(openai | {"visual.ln_pre.weight": torch.ones(8)}, path)
    refused = r"x.pt: [^\n]*OpenAI's CLIP, .* \(ln_pre\) and QuickGELU; .* not supported$"
    with pytest.raises(model.WrongWeights, match=refused):
        model.load_encoder(vit, path, "clip")
    with zipfile.ZipFile(path, "a") as archive:  # makes it TorchScript, as OpenAI distributes it
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(model.WrongWeights, match=refused):
        model.load_encoder(vit, path, "clip")
    torch.save({"model": Malice(tmp_path / "marker")}, path)
    with pytest.raises(model.WrongWeights, match="holds code"):
        model.load_encoder(vit, path, "mae")
    assert not (tmp_path / "marker").exists()


def test_sincos_positions_equal_a_slow_transcription():
    """MAE's table, element by element; scaled as in Scale-MAE's Equation 2."""
    for scale in (1.0, 2.5):
        found = model.sincos_positions(16, 3, scale)[0]
        assert found[0].abs().max() == 0
        for row, column, i in itertools.product(range(3), range(3), range(4)):
            angles = [scale * at / 10000 ** (i / 4) for at in (column, row)]
            expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
            assert worst(found[1 + 3 * row + column, i::4], expected) < 1e-5


@pytest.mark.parametrize("meets", [[{"image", "first"}, {"second"}], [{"image"}, {"first"}, {"second"}]], ids=len)
@torch.no_grad()
def test_view_coupling(meets):
    """The first view meets the metadata, the last two each other: two share the first, three are apart."""
    m = small_model().eval()
    x, meta = small_batch(4, len(meets))
    before = m(x, meta)._asdict()
    for view, affected in enumerate(meets):
        after = m(x + torch.eye(len(meets))[view][:, None, None, None, None], meta)._asdict()
        there = {name: value for name, value in after.items() if value is not None}
        assert {name for name, value in there.items() if worst(value, before[name]) > 1e-4} == affected
    metadata_features, project = m.metadata_encoder(*meta), lambda head, x: F.normalize(x @ head.weight.T, dim=1)
    assert worst(before["image"], project(m.image_projection, m.image_encoder(x[0]))) < 1e-5
    assert worst(before["metadata"], project(m.metadata_projection, metadata_features)) < 1e-5
    assert worst(before["second"], F.normalize(m.image_mlp(m.image_encoder(x[-1])), dim=1)) < 1e-5


@pytest.mark.parametrize("encoder, options", [("table", "checkpoint_blocks"), ("text", "checkpoint_blocks compile")])
def test_other_costs_same_results(encoder, options, monkeypatch):
    """Outputs, gradients and names are those of the plain model; checkpointed blocks keep less."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # inductor: minutes
    plain, kept = small_model(encoder, vocabulary=20, context=6).train(), []
    views, meta = small_batch(4)
    meta = meta if encoder == "table" else (torch.arange(24).view(4, 6) % 19, torch.tensor([6, 5, 6, 4]))
    m, names = copy.deepcopy(plain), list(plain.state_dict())
    train.set_costs(m, train.configure(dict.fromkeys(options.split(), True)))
    for network in (plain, m):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            embeddings = network(views, meta)
        kept.append(0)
        train.compute_losses(embeddings, batch_of(views, meta), train.configure({}))[0].backward()
    before, after = sum(kept[: kept.index(0)]), sum(kept[kept.index(0) :])
    assert after < before / 2 or "compile" in options
    assert list(m.state_dict()) == names
    for name, p in plain.named_parameters():
        assert worst(dict(m.named_parameters())[name].grad, p.grad) < 1e-7 + 1e-5 * p.grad.abs().max(), name
    with torch.no_grad():
        pairs = zip(plain.eval()(views, meta), m.eval()(views, meta))
        assert all(worst(a, b) < 1e-5 for a, b in pairs if a is not None)


def test_each_method_has_its_own_parts_only():
    """SimCLR has no metadata encoder, SatMIP no SimCLR head, and neither gives what it lacks."""
    x, meta = small_batch(4)
    simclr, satmip = small_model("none"), small_model(image_image="none")
    assert {name.split(".")[0] for name, _ in simclr.named_parameters()} == {"image_encoder", "image_mlp"}
    assert "image_mlp" not in {name.split(".")[0] for name, _ in satmip.named_parameters()}
    assert [name for name, v in simclr(x, ())._asdict().items() if v is not None] == ["first", "second"]
    found = [name for name, v in satmip(x[:1], meta)._asdict().items() if v is not None]
    assert found == ["image", "metadata", "scale"]


@pytest.mark.parametrize("encoder", ["text", "table"])
def test_weight_decay_spares_biases_norms_and_the_temperature(encoder):
    """Each parameter is in one group; positions, tokens and embeddings do decay."""
    m = small_model(encoder, vocabulary=50)
    name_of = {id(p): name for name, p in m.named_parameters()}
    groups = model.parameter_groups(m, 0.3)
    decayed, plain = ([name_of[id(p)] for p in group["params"]] for group in groups)
    assert [g["weight_decay"] for g in groups] == [0.3, 0] and sorted(decayed + plain) == sorted(name_of.values())
    spared = regex.compile(r"bias$|norm|logit_scale|image_mlp\.[14]\.")
    assert set(plain) == {name for name in name_of.values() if spared.search(name)}


# -----------------------------------------------------------------------------------------------------
# losses, alone


def slow_contrast(a, b, scale: float, others=()) -> float:
    """Eq. 1, term by term."""
    total, similarity = 0.0, lambda x, y: math.exp(scale * sum(float(p) * float(q) for p, q in zip(x, y)))
    for i in range(len(a)):
        terms = [similarity(a[i], row) for row in b]
        total -= math.log(
            terms[i] / (sum(terms) + sum(similarity(a[i], row) for k, row in enumerate(others) if k != i))
        )
    return total / len(a)


def test_losses_equal_loops_over_the_papers_equations():
    """Eq. 2, 3 (with K and with 2K-1 terms) and 4, and the share of rows that find their partner."""
    torch.manual_seed(0)
    K, base = 7, torch.randn(7, 8)
    image, meta, first, second = (F.normalize(base + 1.5 * torch.randn(K, 8), dim=1) for _ in range(4))
    mi = losses.metadata_image_loss(image, meta, torch.tensor(14.0))
    assert abs(mi.loss - (slow_contrast(image, meta, 14) + slow_contrast(meta, image, 14)) / 2) < 1e-5
    found = [max(range(K), key=lambda j: a[i] @ b[j]) == i for a, b in ((image, meta), (meta, image)) for i in range(K)]
    assert 0 < sum(found) < 2 * K and abs(mi.accuracy - sum(found) / (2 * K)) < 1e-6
    ii = losses.image_image_loss(first, second, 0.2)
    assert abs(ii.loss - (slow_contrast(first, second, 5) + slow_contrast(second, first, 5)) / 2) < 1e-5
    more = losses.image_image_loss(first, second, 0.2, same_view_negatives=True)
    both = slow_contrast(first, second, 5, others=first) + slow_contrast(second, first, 5, others=second)
    assert abs(more.loss - both / 2) < 1e-5 and more.loss > ii.loss
    assert abs(losses.total_loss(mi, ii, 0.3) - (mi.loss + 0.3 * ii.loss)) < 1e-6
    assert losses.total_loss(mi, None) == mi.loss and losses.total_loss(None, ii, 0.3) == ii.loss


def test_losses_of_the_baselines_equal_loops():
    """MoCo's with its queue, Geo's with unknown places, and the paper's where other images of an area are masked."""
    torch.manual_seed(0)
    a, b, queue = (F.normalize(torch.randn(n, 8), dim=1) for n in (6, 6, 9))
    moco = losses.momentum_loss(a, b, queue, 0.2)
    rows = [[math.exp(float(q @ k) / 0.2) for k in (own, *queue)] for q, own in zip(a, b)]
    assert abs(moco.loss + np.mean([math.log(row[0] / sum(row)) for row in rows])) < 1e-5
    assert abs(moco.accuracy - np.mean([max(row) == row[0] for row in rows])) < 1e-6
    logits, places = torch.randn(5, 3), torch.tensor([2, -1, 0, 1, -1])
    known = [-math.log(float(row.softmax(0)[i])) for row, i in zip(logits, places.tolist()) if i >= 0]
    assert abs(losses.place_loss(logits, places).loss - sum(known) / 5) < 1e-5
    areas = torch.tensor([3, 1, 3, -1, -1, 3])
    masked = losses.same_area(areas)
    assert masked.nonzero().tolist() == [[0, 2], [0, 5], [2, 0], [2, 5], [5, 0], [5, 2]]
    for others in (None, a):
        found = losses.contrast(a, b, 5.0, others, masked)
        total = 0.0
        for i in range(6):
            kept = [k for k in range(6) if not masked[i, k]]
            terms = [math.exp(5 * float(a[i] @ b[k])) for k in kept]
            terms += [math.exp(5 * float(a[i] @ a[k])) for k in kept if k != i] if others is not None else []
            total -= math.log(math.exp(5 * float(a[i] @ b[i])) / sum(terms)) / 6
        assert abs(found.loss - total) < 1e-5


@pytest.mark.parametrize("K", [2, 16])
def test_closed_forms(K):
    """No information costs log K (log(2K-1) with same-view negatives); perfect separation costs nothing."""
    same, apart, scale = torch.eye(32)[:1].expand(K, -1), torch.eye(32)[:K], torch.tensor(100.0)
    assert abs(losses.metadata_image_loss(same, same, scale).loss - math.log(K)) < 1e-5
    assert abs(losses.image_image_loss(same, same).loss - math.log(K)) < 1e-5
    assert abs(losses.image_image_loss(same, same, 0.1, True).loss - math.log(2 * K - 1)) < 1e-5
    for matching in (
        losses.metadata_image_loss(apart, apart, scale),
        losses.image_image_loss(apart, apart, 0.01, True),
    ):
        assert matching.loss < 1e-5 and matching.accuracy == 1


# -----------------------------------------------------------------------------------------------------
# losses and model on several processes

CASES = [
    {}, {"same_view_negatives": True}, {"mask_same_area": True}, {"micro_batch": 1}, {"micro_batch": 3},
    {"method": "satmips-geo-tp", "micro_batch": 2}, {"method": "simclr-geo"}, {"method": "moco-geo"},
    {"method": "moco-geo", "micro_batch": 3}, {"decouple_views": True, "micro_batch": 2}, {"checkpoint_blocks": True},
]  # fmt: skip


def global_step(rank: int, world: int, options: dict, detached: bool = False) -> dict:
    """One step of this process's rows of a batch of 8 -> what is logged, gradients and buffers of the whole batch."""
    config = train.configure(options | {"vit": "vit_micro"})
    encoder = "table" if config.metadata_image else "none"
    m = small_model(encoder, config.image_image, places=3 * config.geo, queue=20).train()
    train.set_costs(m, config)
    wrapped = dist.is_initialized() and not config.micro_batch
    network = torch.nn.parallel.DistributedDataParallel(m, broadcast_buffers=False) if wrapped else m
    (views, meta), rows = (
        small_batch(8, 3 if config.decouple_views else 2),
        slice(rank * 8 // world, (rank + 1) * 8 // world),
    )
    codes = {"areas": torch.tensor([0, 1, 1, -1, 0, 0, -1, 2]), "places": torch.tensor([0, 2, 1, -1, 0, -1, 1, 2])}
    gather, scaler = losses.gather, torch.amp.GradScaler("cpu", enabled=False)
    if detached:  # what SLIP does: other processes' rows come without gradient
        losses.gather = lambda x: gather(x.detach())
    half = torch.autocast("cpu", enabled=False)
    e, logged = train.forward_backward(network, scaler, batch_of(views, meta, rows, **codes), config, half)
    losses.gather = gather
    if e.queue is not None:
        m.enqueue(losses.gather(e.second), torch.tensor(False))
    means = torch.stack([v.detach() for v in logged.values()]) / world
    if dist.is_initialized():
        dist.all_reduce(means)
    gradients = {name: p.grad for name, p in m.named_parameters() if p.requires_grad}
    return {"logged": {"means": means}, "buffers": dict(m.named_buffers()), "gradients": gradients}


def normalise(kind: type[torch.nn.Module], rank: int, world: int) -> list[torch.Tensor]:
    """Batch normalisation of images -> the last quarter of the output and of the gradient, and the statistics."""
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    part = x.chunk(world)[rank].requires_grad_()
    norm = randomise(kind(3)).train()
    y = norm(part)
    (y * x.sin().chunk(world)[rank]).sum().backward()
    return [y[-2:].detach(), part.grad[-2:], norm.running_mean, norm.running_var]


def shuffled_keys(rank: int, world: int) -> torch.Tensor:
    """MoCo's ResNet-50 keys of this process's part of 8 images."""
    m, views = resnet_moco()
    return m.encode_keys(views.chunk(world)[rank][None])


def expected_keys(world: int) -> torch.Tensor:
    """Those of the last process: every process normalises a share of the whole batch that has some of everyone's."""
    m, views = resnet_moco()
    order = torch.tensor({1: [*range(8)], 2: [0, 4, 1, 5, 2, 6, 3, 7], 4: [0, 2, 4, 6, 1, 3, 5, 7]}[world])
    with torch.no_grad():
        keys = torch.cat([m.key_mlp(copy.deepcopy(m.key_encoder)(views[share])) for share in order.chunk(world)])
    return F.normalize(keys[order.argsort()].chunk(world)[-1], dim=1)


def resnet_moco() -> tuple[model.SatMIP, torch.Tensor]:
    m = small_model("none", "moco", vit="resnet50", queue=8, mlp_out=8).train()
    return m, torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def process(rank: int, world: int, folder: str) -> None:
    """What each process does; the last one writes down what it got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    results = [global_step(rank, world, case) for case in CASES] + [global_step(rank, world, {}, detached=True)]
    results += [normalise(model.BatchNorm, rank, world), shuffled_keys(rank, world)]
    if rank == world - 1:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_together_equal_one_on_the_whole_batch(world, tmp_path):
    """Losses, every parameter's gradient and BatchNorm's statistics; a gather that loses its gradient is seen."""
    multiprocessing.set_forkserver_preload(["test_all"])  # imports once, not once a process
    mp.start_processes(process, (world, str(tmp_path)), nprocs=world, start_method="forkserver")
    *results, detached, normalised, keys = torch.load(tmp_path / "results.pt")
    assert worst(keys, expected_keys(world)) < 1e-4
    assert all(worst(a, b) < 1e-5 for a, b in zip(normalised, normalise(torch.nn.BatchNorm2d, 0, 1), strict=True))
    for case, result in zip(CASES, results, strict=True):
        plain = {name: value for name, value in case.items() if name != "micro_batch"}
        for part, values in global_step(0, 1, plain).items():
            assert result[part].keys() == values.keys()
            for name, value in values.items():
                assert worst(result[part][name], value) < 2e-6 + 1e-5 * value.abs().max(), (case, name)
    right, wrong = (r["gradients"]["image_projection.weight"] for r in (results[0], detached))
    assert worst(right, wrong) > 0.1 * right.abs().max()


# -----------------------------------------------------------------------------------------------------
# data: reading and order


def test_a_split_is_read_as_it_stands(dataset):
    """Names, captions, labels and records of every row; labels that a row lacks are None; pixels and statistics."""
    records = json_lines(dataset / "train" / "metadata.jsonl")
    split = data.read_split(dataset / "train", DEFAULT, captions=True)
    assert [split.names[i] for i in range(len(split))] == [r["file_name"] for r in records]
    assert [split.record(i) for i in range(48)] == [metadata.canonical(r) for r in records]
    encode = metadata.Tokenizer()
    assert [split.table.tokens[i].tolist() for i in range(48)] == [encode(caption(r, DEFAULT)) for r in records]
    labels = [r.get("label_kind") for r in records]
    classes, (ids,) = data.class_ids("label_kind", split)
    assert list(split.labels) == ["label_kind"] and classes == sorted(COLOURS) and None in labels
    assert [split.labels["label_kind"][i] for i in range(48)] == labels
    assert [classes[i] if i >= 0 else None for i in ids] == labels
    pixels = np.concatenate([np.asarray(Image.open(dataset / "train" / r["file_name"])) for r in records]) / 255
    mean, std = data.channel_statistics(split, 32, 0)
    assert worst(mean, pixels.mean((0, 1))) < 1e-9 and worst(std, pixels.std((0, 1))) < 1e-9
    x = data.standardise(torch.from_numpy(pixels).permute(2, 0, 1), mean, std)
    assert x.mean((1, 2)).abs().max() < 1e-5 and worst(x.std((1, 2), correction=0), torch.ones(3)) < 1e-5


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "CMYK", "1"])
def test_images_of_other_modes_and_sizes(mode, tmp_path):
    """Anything of 8 bits becomes RGB of the size asked for, as Pillow does it."""
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.fromarray(images_of(1, 50)[0].numpy()).convert("L" if mode == "LA" else "RGB").convert(mode).save(path)
    expected = np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(data.load_image(path, 32), expected) and expected.std() > 1


def test_order():
    """Each row at most once an epoch; epochs and seeds differ; processes share the batches; a restart goes on."""

    def order(start=0, seed=0, rank=0, world=1):
        steps = data.Order(50, 8, seed, rank, world)
        return [steps[step].tolist() for step in range(start, 12)]

    batches = order()
    epochs = [sum(batches[:6], []), sum(batches[6:], [])]
    assert [len(b) for b in batches] == [8] * 12 and epochs[0] != epochs[1] and order(0, 1) != batches
    assert all(len(set(epoch)) == 48 and set(epoch) <= set(range(50)) for epoch in epochs)
    assert [a + b for a, b in zip(order(0, 0, 0, 2), order(0, 0, 1, 2), strict=True)] == batches
    assert all(order(start) == batches[start:] for start in (1, 6, 8))
    assert torch.cat(data.in_order(10, 4)).tolist() == list(range(10))


# -----------------------------------------------------------------------------------------------------
# data: augmentation


# -----------------------------------------------------------------------------------------------------
# data: areas, places, and records that vary


def test_temporal_partners():
    """Of the same area and another date whenever there is one, each alike often; a function of seed, epoch and row."""
    areas = np.array([0, 0, 0, 1, 1, -1, 2, 0, 3, 3, 3, -1])
    dates = np.array([5, 6, 6, 5, 5, 7, 7, 8, -1, -1, 4, 7])
    partners, rows = data.Partners(areas, dates, seed=0, per_epoch=1), torch.arange(12)
    drawn = torch.stack([partners(rows, epoch) for epoch in range(3000)])
    for i in range(12):
        others = [k for k in range(12) if areas[k] == areas[i] >= 0 and k != i]
        allowed = [k for k in others if dates[k] != dates[i] or dates[i] < 0]
        counts = torch.bincount(drawn[:, i], minlength=12).tolist()
        assert {k for k, count in enumerate(counts) if count} == set(allowed or [i])
        assert all(likely(counts[k], 3000, 1 / len(allowed)) for k in allowed)
    assert torch.equal(partners(rows[4:9], 2), drawn[2, 4:9]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(data.Partners(areas, dates, 0, per_epoch=4)(rows, 11), drawn[2])
    assert not torch.equal(data.Partners(areas, dates, 1, 1)(rows, 2), drawn[2])
    assert partners.some == 7


def test_images_come_with_their_partners(dataset, tmp_path):
    """Behind the images of a batch stand those of the rows that `partners` names."""
    split = data.read_split(dataset / "train", DEFAULT)
    known = data.areas_and_dates(dataset)
    area, date = (column.codes for column in known.categories)
    partners = data.Partners(area, date, 0, 3)
    (batch,) = data.load(split, 32, [torch.tensor([4, 20, 9])], 0, partners=partners)
    rows = [4, 20, 9, *partners(torch.tensor([4, 20, 9]), 0).tolist()]
    assert batch.rows.tolist() == rows[:3] and [area[r] for r in rows[:3]] == [area[r] for r in rows[3:]]
    for image, row in zip(batch.images, rows, strict=True):
        assert np.array_equal(image, data.load_image(dataset / "train" / split.names[row], 32))
    folder = shutil.copytree(dataset / "train", tmp_path / "train")
    for row in (4, rows[4]):  # an image, and another's partner
        (folder / split.names[row]).write_bytes(b"")
    split, faults = data.read_split(folder, DEFAULT), {}
    (batch,) = data.load(split, 32, [torch.tensor([4, 20, 9])], 0, faults, partners=partners)
    assert batch.rows[0] != 4 and faults.keys() == {split.names[4], split.names[rows[4]]}
    shown = [*batch.rows.tolist(), *partners(batch.rows, 0).tolist()]
    shown[4] = 20  # without its partner, its own
    for image, row in zip(batch.images, shown, strict=True):
        assert np.array_equal(image, data.load_image(folder / split.names[row], 32))


def test_clusters_of_places():
    """k-means: each centre is the mean of what is nearest to it, blobs are found exactly, areas count once, an unknown
    place has no cluster."""
    rng = np.random.default_rng(0)
    blobs = np.array([[0.0, 0], [50, 10], [-80, 40]])
    points = np.concatenate([blob + rng.normal(size=(40, 2)) for blob in blobs])
    centres = data.cluster_places(points, 3, seed=1)
    assert sorted(map(tuple, np.round(centres, 9))) == sorted(
        tuple(np.round(p.mean(0), 9)) for p in np.split(points, 3)
    )
    many = data.cluster_places(points, 20, seed=0)
    group = [min(range(20), key=lambda c: ((p - many[c]) ** 2).sum()) for p in points]  # noqa: B023
    assert data.nearest_centre(points, many).tolist() == group
    assert all(worst(many[c], points[[g == c for g in group]].mean(0)) < 1e-9 for c in range(20))
    assert np.array_equal(many, data.cluster_places(points[::-1], 20, 0)), "the order of rows does not matter"
    assert data.nearest_centre(np.array([[nan, 3], [1, 1]]), centres).tolist()[0] == -1
    assert len(data.cluster_places(np.array([[1.0, 2], [1, 2], [nan, 0]]), 5, 0)) == 1
    areas = metadata.Categories(["a"], np.array([0, 0, -1, -1, 0]))
    table = data.Table(None, np.array([[0, 0], [2, 4], [9, 9], [7, 7], [nan, 0]]), [areas])
    assert data.area_places(table).tolist() == [[0, 0], [0, 0], [9, 9], [7, 7], [0, 0]]
    assert not len(data.cluster_places(np.full((4, 2), nan), 5, 0))


def test_metadata_follow_the_view():
    """A crop of half the side halves the scale; a clockwise quarter turn adds 90 degrees to an azimuth, a flip mirrors
    it; checked against where an arrow in the image goes."""
    record = {
        "gsd": [2.0, 3.0],
        "multispectral_gsd": 8.0,
        "pixel_size": [1e-5, 2e-5],
        "sun_azimuth_angle": 30.0,
        "x": 1,
    }
    record["target_azimuth_angle"] = 350.0

    def view(box: list, flip: list, transpose: bool, record: dict = record, fields: tuple = ALL) -> dict:
        return data.follow_view(record, fields, np.array(box, float), np.array(flip), transpose, 64)

    assert view([0, 0, 64, 64], [False, False], False) == record
    half = view([0, 0, 16, 32], [False, False], False)
    assert half["gsd"] == [1.0, 0.75] and half["multispectral_gsd"] == 8 * 0.375 and half["pixel_size"] == [5e-6, 5e-6]
    assert view([0, 0, 16, 32], [False, False], True)["gsd"] == [0.75, 1.0], "x and y change places"
    own = (metadata.Field("gsd", "number"), metadata.Field("pixel_size", "category"))  # a dataset's own definitions
    changed = view([0, 0, 32, 32], [True, True], True, {"gsd": 0.5, "pixel_size": "big"}, own)
    assert changed == {"gsd": 0.25, "pixel_size": "big"}
    azimuths = lambda flip, transpose: [  # noqa: E731
        round(view([0, 0, 64, 64], flip, transpose)[f"{name}_azimuth_angle"], 9) for name in ("sun", "target")
    ]
    assert azimuths([False, True], False) == [330, 10] and azimuths([True, False], False) == [150, 190]
    assert azimuths([True, False], True) == [120, 80], "clockwise quarter turn: flipped upside down, then transposed"
    for flip, transpose in itertools.product(itertools.product([False, True], repeat=2), [False, True]):
        image = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
        x, y = (round(31.5 + 25 * s) for s in (math.sin(math.radians(30)), -math.cos(math.radians(30))))
        image[0, y - 1 : y + 2, x - 1 : x + 2] = 255
        seen = data.augment(image, fixed(1, flip=[flip], transpose=[transpose]), 64)[0, 0]
        row, column = (seen.sum(1 - axis) @ torch.arange(64.0) / seen.sum() - 31.5 for axis in (0, 1))
        turned = math.degrees(math.atan2(column, -row)) % 360
        assert abs(turned - azimuths(flip, transpose)[0]) < 3


def test_varied_metadata(dataset):
    """Fields vanish with their probability, captions name them in any order, scales follow the first view; each a
    function of seed, epoch and row; without any of it the rows read as always."""
    fields = ALL[:5]
    split = data.read_split(dataset / "train", fields, captions=True)
    rows, schema = torch.tensor([0, 5, 12, 5]), list(range(49408))
    make = lambda per_epoch=3, **how: data.VariedMetadata(  # noqa: E731
        split, fields, "text", schema, data.Variation(**how), 0, 64, per_epoch
    )
    plain = data.Metadata(split.table, "text", schema)
    assert same(make().batch(rows), plain.batch(rows))
    words = lambda step: [tuple(ids[:n].tolist()) for ids, n in zip(*make(shuffle=True).batch(rows, step))]  # noqa: E731
    drawn, record = [words(step) for step in range(180)], split.record(0)
    orders = itertools.permutations([field for field in fields if field.name in record])
    expected = {tuple(Tokenizer()(caption(record, order))) for order in orders}
    assert {first for first, *_ in drawn} == expected and len(expected) > 5
    assert drawn[::3] == drawn[1::3] == drawn[2::3], "the three steps of an epoch"
    assert all(second == last for _, second, _, last in drawn) and len({second for _, second, *_ in drawn}) > 1
    table = data.read_split(dataset / "train", fields)
    table_schema = TableSchema.fit(fields, table.table.numbers, table.table.categories)
    dropped = data.VariedMetadata(table, fields, "table", table_schema, data.Variation(dropout=0.3), 0, 64, 1)
    clean, many = data.Metadata(table.table, "table", table_schema), torch.arange(48)
    known, lost = ~clean.batch(many)[0].isnan(), 0
    for step in range(30):
        numbers, _ = dropped.batch(many, step)
        assert (numbers.isnan() | (numbers == clean.batch(many)[0])).all()
        lost += (numbers.isnan() & known)[:, 0].sum().item()
    assert likely(lost, 30 * known[:, 0].sum().item(), 0.3)
    policy = data.POLICIES["crop"]
    consistent = data.VariedMetadata(
        table, fields, "table", table_schema, data.Variation(consistent=policy), 7, 64, 1
    ).batch(many, 2)[0]
    draws = data.draw(policy, 64, 7, 2, many.numpy(), 0)
    raw = consistent.double() * torch.tensor(table_schema.std) + torch.tensor(table_schema.mean)
    expected = table.table.numbers[:, 0] * draws.box[:, 3] / 64
    assert worst(raw[:, 0].nan_to_num(), np.nan_to_num(expected)) < 1e-4


def fixed(n: int, **parameters) -> data.Draws:
    """Parameters for n images of 64 px that do nothing, but for those given."""
    same = {"box": np.tile([0.0, 0, 64, 64], (n, 1)), "flip": np.zeros((n, 2), bool), "transpose": np.zeros(n, bool)}
    same |= {"factors": np.tile([1.0, 1, 1, 0], (n, 1)), "order": np.tile(np.arange(4), (n, 1))}
    same |= {"gray": np.zeros(n, bool), "sigma": np.zeros(n)}
    return data.Draws(**same | {name: np.array(value) for name, value in parameters.items()})


JITTER = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
BOXES = [[3, 5, 40, 30], [0, 0, 64, 64], [10, 20, 33, 44], [61, 60, 2, 3]]
FACTORS = [[1.3, 0.7, 1.2, 0.08], [0.6, 1.4, 0.7, -0.1], [1, 1.2, 1, 0.05], [1.1, 1, 0.6, 0]]
FLIPS = list(itertools.product([False, True], repeat=3))
AUGMENTATIONS = {  # name -> size of the view, parameters
    "nothing": (64, fixed(1)),
    "crops": (48, fixed(4, box=BOXES)),
    "magnified": (224, fixed(4, box=BOXES)),
    "flips": (64, fixed(8, flip=[f[:2] for f in FLIPS], transpose=[f[2] for f in FLIPS])),
    "jitter": (64, fixed(24, factors=FACTORS * 6, order=data.ORDERS)),
    "gray": (64, fixed(3, gray=[True, False, True])),
    "blur": (64, fixed(4, sigma=[0.1, 0.5, 0, 2])),
    "blur at 224": (224, fixed(3, sigma=[0.1, 1, 2])),
    **{name: (32, data.draw(policy, 64, 0, 0, np.arange(70), 0)) for name, policy in data.POLICIES.items()},
}


@pytest.mark.parametrize("each", [True, False], ids=["each", "all"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_equals_torchvision(name, each):
    """With the same parameters, each operation alone and all of them together give torchvision's pixels; the way of a
    CPU rounds what it resized to 8 bits, which jitter may magnify."""
    size, d = AUGMENTATIONS[name]
    images, resized = images_of(len(d.gray), 64), size != 64 or not (d.box == [0, 0, 64, 64]).all()
    tolerance = (5 if name == "strong" else 1.2) / 255 if each and resized else 2e-5
    for i, (x, out) in enumerate(zip(images, data.augment(images, d, size, each), strict=True)):
        x = TF.resized_crop(x.permute(2, 0, 1) / 255, *map(int, d.box[i]), [size, size], antialias=True)
        x = TF.vflip(x) if d.flip[i][0] else x
        x = TF.hflip(x) if d.flip[i][1] else x
        x = x.transpose(1, 2) if d.transpose[i] else x
        for operation in d.order[i]:
            x = JITTER[operation](x, float(d.factors[i][operation]))
        x = TF.rgb_to_grayscale(x, 3) if d.gray[i] else x
        x = TF.gaussian_blur(x, 2 * (size // 20) + 1, float(d.sigma[i])) if d.sigma[i] else x
        assert worst(out, x) < tolerance and (out - x).abs().mean() < 0.5 / 255, i


@pytest.mark.parametrize("each", [True, False], ids=["each", "all"])
def test_augmentation_does_not_depend_on_the_batch(each):
    """A view is the same alone and among others, in the way of a CPU bit for bit; which a CPU takes by itself."""
    images, d = images_of(70, 64), data.draw(data.POLICIES["strong"], 64, 0, 1, np.arange(70), 0)
    together = data.augment(images, d, 48, each)
    alone = [data.augment(images[i : i + 1], data.Draws(*(v[i : i + 1] for v in d)), 48, each) for i in range(70)]
    assert torch.equal(torch.cat(alone), together) if each else worst(torch.cat(alone), together) < 2e-6
    assert torch.equal(data.augment(images, d, 48), together) == each


@pytest.mark.parametrize("vertical, horizontal, turn", FLIPS)
def test_flips_and_turns_compose(vertical, horizontal, turn):
    """Flips come first, then a turn by 90, 180 or 270 degrees, each as often."""
    policy = data.Policy((1, 1), (1, 1), float(horizontal), float(vertical), float(turn), 0, (0, 0, 0, 0), 0, 0)
    image = images_of(1, 16)
    out = data.augment(image.expand(300, -1, -1, -1), data.draw(policy, 16, 0, 0, np.arange(300), 0), 16)
    flipped = (image[0].permute(2, 0, 1) / 255).flip([axis for axis, on in ((1, vertical), (2, horizontal)) if on])
    same = torch.stack([(out - torch.rot90(flipped, k, (1, 2))).abs().amax((1, 2, 3)) < 1e-5 for k in range(4)])
    none, *turns = same.sum(1).tolist()
    assert (same.sum(0) == 1).all() and none == (0 if turn else 300)
    assert not turn or all(likely(count, 300, 1 / 3) for count in turns)


def test_draws_have_the_papers_probabilities():
    """Supplement B: jitter 0.8, gray 0.2, blur 0.5, all 8 orientations and 24 orders alike, ranges uniform."""
    n = 20_000
    d, crop = (data.draw(data.POLICIES[name], 64, 0, 0, np.arange(n), 0) for name in ("strong", "crop"))
    jittered, blurred = (d.factors != [1, 1, 1, 0]).any(1), d.sigma > 0
    assert likely(jittered.sum(), n, 0.8) and likely(d.gray.sum(), n, 0.2) and likely(blurred.sum(), n, 0.5)
    for code, ways in ((d.flip @ [4, 2] + d.transpose, 8), (d.order @ [64, 16, 4, 1], 24)):
        counts = np.unique(code, return_counts=True)[1]
        assert len(counts) == ways and all(likely(c, n, 1 / ways) for c in counts)
    ranges = [(d.sigma[blurred], 0.1, 2), (d.factors[jittered, 3], -0.1, 0.1)]
    for values, low, high in ranges + [(d.factors[jittered, i], 0.6, 1.4) for i in range(3)]:
        share = (values - low) / (high - low)
        assert 0 <= share.min() < 0.01 and 0.99 < share.max() <= 1
        assert abs(share.mean() - 1 / 2) < 0.02 and abs(share.std() - 12**-0.5) < 0.01
    independent = np.corrcoef(np.c_[d.factors, d.gray, blurred, d.flip, d.transpose].T) - np.eye(9)
    assert abs(independent).max() < 0.05
    assert not any(x.any() for x in (crop.flip, crop.transpose, crop.gray, crop.sigma, crop.factors - [1, 1, 1, 0]))


@pytest.mark.parametrize("policy", data.POLICIES)
def test_crops_are_distributed_as_torchvisions(policy):
    """Top, left, height, width and area of 4000 crops against RandomResizedCrop's (Kolmogorov-Smirnov)."""
    p, n, image = data.POLICIES[policy], 4000, torch.empty(3, 64, 64)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, p.scale, p.ratio) for _ in range(n)]).T
    own = data.draw(p, 64, 0, 0, np.arange(n), 0).box.T
    for a, b in [*zip(own, theirs), (own[2] * own[3], theirs[2] * theirs[3])]:
        a, b, at = np.sort(a), np.sort(b), np.union1d(a, b)
        gap = abs(np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")).max() / n
        assert gap < 0.045  # larger once in 2000 times when the distributions agree


def test_draws_belong_to_the_row():
    """They depend on seed, epoch, row and view, each of them, and on nothing else in the batch."""

    def draw(seed: int, epoch: int, rows: list[int], view: int) -> list[tuple]:
        draws = data.draw(data.POLICIES["strong"], 64, seed, epoch, np.array(rows), view)
        return [tuple(map(str, row)) for row in zip(*draws)]

    together = draw(0, 3, [5, 9, 2], 1)
    assert together == [draw(0, 3, [row], 1)[0] for row in (5, 9, 2)] and len(set(together)) == 3
    assert not set(together) & {*draw(1, 3, [5], 1), *draw(0, 4, [5], 1), *draw(0, 3, [5], 0)}


# -----------------------------------------------------------------------------------------------------
# data: the embedded data


def test_a_cut_averages_the_map_under_each_pixel():
    """A constant map gives its value; one linear in latitude the value there; noise the mean of many samples."""
    steps = np.arange(64) - 31.5
    grid = data.local_grid(20, 40, 50, steps)
    assert (data.cut(np.full((90, 180, 3), 77, np.uint8), grid, 50) == 77).all()
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 512, 3))
    assert abs(data.cut(ramp, grid, 50) - ((90 - grid[1]) / 180 * 256 - 0.5)[..., None]).max() <= 1
    noise, offsets = np.random.default_rng(0).integers(0, 256, (360, 720, 3), np.uint8), np.arange(-99.5, 100) / 200
    for longitude, latitude, gsd in ((20, 40, 80), (179, -65, 120), (-100, 0, 200)):
        grid, high = data.local_grid(longitude, latitude, gsd, steps), gsd / data.DEGREE
        out = data.cut(noise, grid, gsd)
        for i, j in ((0, 0), (10, 50), (31, 32), (63, 63)):
            x, y = grid[0][i, j], grid[1][i, j]
            points = np.meshgrid(x + offsets * high / math.cos(math.radians(y)), y + offsets * high)
            assert worst(out[i, j], [data.lookup(noise[..., c], points).mean() for c in range(3)]) <= 1


@pytest.fixture(scope="session")
def areas() -> data.DemoAreas:
    return data.DemoAreas(0)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    data.main(["demo", str(folder), "--train", "60", "--test", "12"])
    return folder


def test_demo_is_the_same_each_time(demo, areas, tmp_path, monkeypatch):
    """The same bytes in every file; an existing folder is never touched."""
    monkeypatch.setattr(data, "DemoAreas", lambda seed: areas)
    data.prepare_demo(tmp_path / "again", 60, 12)
    first, second = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in (demo, tmp_path / "again"))
    assert first == second and len(first) == 60 + 12 + 3 and list(demo.parent.iterdir()) == [demo]
    with pytest.raises(BadInput, match="exists"):
        data.prepare_demo(tmp_path / "again", 1, 1)


def test_demo_records(demo):
    """Every image has scale, place, month and area; October is marked inferred; coarse areas have three months."""
    fine, coarse = {}, {}
    for record in json_lines(demo / "train" / "metadata.jsonl") + json_lines(demo / "test" / "metadata.jsonl"):
        assert {"file_name", "gsd", "location", "timestamp", "area"} <= record.keys()
        assert record.get("timestamp_inferred", False) == (record["timestamp"] == "2004-10")
        (coarse if record["gsd"][0] > 19_000 else fine).setdefault(record["area"], []).append(record["timestamp"])
    assert set(map(tuple, fine.values())) == {("2004-10",)}
    assert all(len(set(months)) == len(months) <= 3 for months in coarse.values()) and 3 in map(len, coarse.values())
    assert {Image.open(path).size for path in demo.rglob("*.jpg")} == {(64, 64)}


def test_no_training_crop_shows_a_held_out_block(demo, areas):
    """Not one pixel of one, not even where a block's corner only just enters; test crops are centred in one."""
    grazed = [(split, r) for area in (56636, 74994) for split, r, _ in areas.crops(area)]
    for split, record in grazed + [(s, r) for s in ("train", "test") for r in json_lines(demo / s / "metadata.jsonl")]:
        grid = data.local_grid(*record["location"], record["gsd"][0] / 1000, np.arange(64) - 31.5)
        held_out = areas.held_out(*grid)
        assert held_out[31, 31] if split == "test" else not held_out.any(), record["area"]


# -----------------------------------------------------------------------------------------------------
# data: preparing, checking, showing


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the cache, with its bytes."""
    paths = (p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def prepared(*argv, monkeypatch=None) -> tuple[list[dict], list[dict], list[dict]]:
    """Run data.py -> (train rows, test rows, quarantine) of the folder that it was given last."""
    argv = list(map(str, argv))
    data.main([*argv, "--jobs", "2"])
    folder = Path([a for a in argv if not a.startswith("-")][2 if argv[0] != "own" else 3])
    return tuple(
        json_lines(folder / name) for name in ("train/metadata.jsonl", "test/metadata.jsonl", "quarantine.jsonl")
    )


def polygon(west: float, south: float, east: float, north: float) -> str:
    return f"POLYGON (({west} {north}, {east} {north}, {east} {south}, {west} {south}, {west} {north}))"


# The poster's record, by hand. The image has 900 columns and 1000 rows, its box is 361 wide and 312 high at (200, 16).
# 361 of 1000 rows is 0.361, hence 0.3 of the width is added: 54 px on each side. 312 of 900 columns is 0.347: 46 px.
# The top is clipped: 0. So the crop is 146 .. 615 by 0 .. 374, and 224 px stand for 469 and 374.
POSTER_BOX, POSTER_CROP = [200, 16, 361, 312], (146, 0, 615, 374)
POSTER_JSON = {
    "gsd": 11.4546 * 224 / 469, "multi_resolution_dbl": 41.1896 * 224 / ((469 + 374) / 2),
    "mean_pixel_width": 1.03e-4 * 224 / 469, "mean_pixel_height": 8.23e-5 * 224 / 374, "img_width": 900,
    "img_height": 1000, "timestamp": "2015-09-21T15:30:08Z", "utm": "18M", "country_code": "PER", "cloud_cover": 14,
    "scan_direction": "Reverse", "approximate_wavelengths": [661, 545, 477], "target_azimuth_dbl": 39.12,
    "sun_azimuth_dbl": 77.28, "sun_elevation_dbl": 70.44, "off_nadir_angle_dbl": 27.70,
    "sensor_platform_name": "GEOEYE01",
}  # fmt: skip
POSTER_AOI = polygon(-73.320776, -3.795814, -73.300776, -3.775814)


def fmow_json(*boxes, **changes) -> dict:
    entries = [{"ID": i, "box": b, "category": c, "visible": "True"} for i, b, c in boxes]
    return {**POSTER_JSON, "bounding_boxes": entries, **changes}


def write_fmow(source: Path) -> Path:
    """The official release in small, with everything odd that the real one has; the ground truth unpacked."""
    rng = np.random.default_rng(0)
    truths, port = {}, [40, 60, 100, 80]

    def view(stem: str, meta: dict | None, aoi: str | None = None, size: tuple[int, int] = (300, 400)) -> None:
        path = source / f"{stem}_rgb.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (size[1] // 20, size[0] // 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
        path.with_name(path.name.replace("_rgb", "_msrgb")).write_bytes(path.read_bytes())
        if meta is not None:
            text = json.dumps(meta)
            path.with_suffix(".json").write_text(text)
            path.with_name(path.name.replace("_rgb.jpg", "_msrgb.json")).write_text(text)
        if aoi:
            found = meta["bounding_boxes"]
            first = (found if isinstance(found, list) else [found])[0]
            entry = {**first, "ID": -1, "raw_location": aoi}
            footprint = polygon(10, 40, 10.3, 40.4)
            truths[stem] = {**meta, "raw_location": footprint, "bounding_boxes": [entry, first]}

    view("train/airport/airport_0/airport_0_0", fmow_json((7, POSTER_BOX, "airport")), POSTER_AOI, (900, 1000))
    for i in range(1, 5):
        view(
            f"train/airport/airport_0/airport_0_{i}",
            fmow_json((7, port, "airport")),
            polygon(10.04, 40.26, 10.14, 40.34),
        )
    both = fmow_json((8, port, "port"), (9, [200, 300, 50, 60], "port"), country_code="KO-")
    view("train/port/port_3/port_3_0", both, polygon(10.04, 40.26, 10.14, 40.34))
    single = fmow_json(country_code="CA-", utm=None)
    view(
        "train/port/port_3/port_3_1",
        {**single, "bounding_boxes": {"ID": 8, "box": port, "category": "port", "visible": "True"}},
        POSTER_AOI,
    )
    view("train/port/port_4/port_4_0", fmow_json((1, [5, 5, 2, 40], "port"), (2, [350, 5, 40, 40], "port")))
    view("train/zoo/zoo_1/zoo_1_0", fmow_json((3, port, "zoo")), POSTER_AOI)
    os.truncate(source / "train/zoo/zoo_1/zoo_1_0_rgb.jpg", 700)
    view("train/zoo/zoo_1/zoo_1_1", fmow_json((3, port, "zoo"), gsd=math.nan))
    view("train/zoo/zoo_1/zoo_1_2", None)
    (source / "train/zoo/zoo_1/zoo_1_2_rgb.json").write_text("{")
    (source / "train/zoo/zoo_1/zoo_1_3_rgb.json").write_text(json.dumps(fmow_json((3, port, "zoo"))))
    for i in range(4):
        boxes = [(20 + i, port, "airport")] + [(90, [1, 1, 30, 30], "false_detection")] * (i == 0)
        view(f"val/airport/airport_{i}/airport_{i}_0", fmow_json(*boxes), polygon(10.04, 40.26, 10.14, 40.34))
    for stem, truth in truths.items():
        path = source / "groundtruth" / f"{stem}_rgb.json".replace("val/", "val_gt/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(truth))
    return source


@pytest.fixture(scope="session")
def fmow(tmp_path_factory) -> Path:
    return write_fmow(tmp_path_factory.mktemp("fmow") / "fmow-rgb")


def tar(path: Path, folder: Path, mode: str, *suffixes: str) -> None:
    with tarfile.open(path, mode) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.name.endswith(suffixes)):
            archive.add(file, file.relative_to(folder.parent))


@pytest.mark.parametrize("groundtruth", ["folder", "archive"])
def test_fmow(fmow, tmp_path, groundtruth, capsys):
    """The official release: crops, GSD, location, caption of the poster; what is left out or quarantined, and why."""
    source = fmow
    if groundtruth == "archive":
        source = shutil.copytree(fmow, tmp_path / "source")
        tar(source / "groundtruth.tar.bz2", source / "groundtruth", "w:bz2", ".json")
        shutil.rmtree(source / "groundtruth")
    train_rows, test_rows, quarantine = prepared("fmow", source, tmp_path / "out")
    rows = {row["file_name"]: row for row in train_rows}
    poster = rows["airport/airport_0/airport_7/airport_0_0_rgb.jpg"]
    assert (
        caption(poster, ALL) == caption(POSTER, ALL) and poster["label"] == "airport" and poster["area"] == "airport_0"
    )
    image = Image.open(source / "train/airport/airport_0/airport_0_0_rgb.jpg")
    # The bilinear resize of OpenCV, slowly: pixel centres, four neighbours, the border repeated.
    crop, at = np.asarray(image.crop(POSTER_CROP), np.float64), []
    for target, length in ((224, 374), (224, 469)):
        where = ((np.arange(target) + 0.5) * length / target - 0.5).clip(0, length - 1)
        at.append((np.floor(where).astype(int), np.minimum(np.floor(where).astype(int) + 1, length - 1), where % 1))
    (top, bottom, v), (left, right, u) = at
    u, v = u[None, :, None], v[:, None, None]
    expected = (1 - v) * ((1 - u) * crop[top][:, left] + u * crop[top][:, right])
    expected += v * ((1 - u) * crop[bottom][:, left] + u * crop[bottom][:, right])
    found = np.asarray(Image.open(tmp_path / "out/train" / poster["file_name"]), np.float64)
    buffer = io.BytesIO()
    Image.fromarray(np.floor(expected + 1e-6).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    difference = np.abs(found - np.asarray(Image.open(buffer)))
    assert difference.mean() < 0.01, "but for the last bit before JPEG"
    names = [
        "port/port_3/port_8/port_3_0_rgb.jpg",
        "port/port_3/port_9/port_3_0_rgb.jpg",
        "port/port_3/port_8/port_3_1_rgb.jpg",
    ]
    first, second, third = (rows[name] for name in names)
    assert worst(first["location"], [10.09, 40.30]) < 1e-9 and first["country_code"] == "XKX"
    assert worst(second["location"], [10 + 0.3 * 225 / 300, 40.4 - 0.4 * 330 / 400]) < 1e-9, "from the image's bounds"
    assert "country_code" not in third and "utm_zone" not in third
    assert len(train_rows) == 9 and len(test_rows) == 4 and all("msrgb" not in name for name in rows)
    assert "gsd" not in rows["zoo/zoo_1/zoo_3/zoo_1_1_rgb.jpg"], "it was not a number"
    bad = {q["item"].rpartition("/")[2]: q["problem"] for q in quarantine}
    assert sorted(bad) == ["zoo_1_0_rgb", "zoo_1_2_rgb", "zoo_1_3_rgb"]
    out = capsys.readouterr().out
    for part in ("1 boxes of 2 px or less", "1 boxes outside the image", "1 false detections", "quarantine.jsonl: 3",
                 "(paper: 363,572; 62 classes)", "gsd x", "(0.76)", "(207 different)", "deviation"):  # fmt: skip
        assert part in out, part


def test_fmow_switches(fmow, tmp_path):
    """--rescale gsd is the supplement's word, --crop box has no context, --no-location goes without ground truth."""
    source = shutil.copytree(fmow, tmp_path / "source")
    shutil.rmtree(source / "groundtruth")
    assert "groundtruth.tar.bz2: no such file" in complaint(data.main, "fmow", source, tmp_path / "out")
    argv = ("fmow", source, tmp_path / "out", "--rescale", "gsd", "--crop", "box", "--no-location", "--size", "100")
    row = next(r for r in prepared(*argv)[0] if r["file_name"].endswith("airport_0_0_rgb.jpg"))
    assert worst(row["gsd"], [POSTER_JSON["gsd"] * 3.61, POSTER_JSON["gsd"] * 3.12]) < 1e-9 and "location" not in row
    assert row["multispectral_gsd"] == POSTER_JSON["multi_resolution_dbl"]
    assert row["pixel_size"] == [POSTER_JSON["mean_pixel_width"], POSTER_JSON["mean_pixel_height"]]
    assert Image.open(tmp_path / "out/train" / row["file_name"]).size == (100, 100)


CROPS = {  # box, (columns, rows) -> crop, worked by hand from the baseline's table
    "half": ([0, 0, 500, 500], (1000, 1000), (0, 0, 537, 537)),
    "just below": ([200, 200, 499, 400], (1000, 1000), (151, 160, 748, 640)),
    "small": ([500, 500, 99, 100], (1000, 1000), (401, 450, 698, 650)),
    "swapped": ([100, 100, 300, 90], (400, 1000), (55, 78, 400, 212)),
}


@pytest.mark.parametrize("what", CROPS)
def test_context_crop(what):
    """The context table, floors, clipping, and the slip of the baseline: width against rows, height against columns."""
    box, (columns, rows), expected = CROPS[what]
    assert data.context_crop(tuple(box), columns, rows) == expected


def test_fmow_ready_cropped(fmow, tmp_path):
    """The cropped copy, as folders or as archives: images byte for byte, GSD and location as from the original."""
    prepared("fmow", fmow, tmp_path / "from-original")
    cropped = tmp_path / "cropped"
    for split, ours in (("train", "train"), ("val", "test")):
        for row in json_lines(tmp_path / "from-original" / ours / "metadata.jsonl"):
            path, (*folders, _, name) = cropped / split / row["file_name"], row["file_name"].split("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "from-original" / ours / row["file_name"], path)
            original = fmow / split / Path(*folders) / name
            meta = json.loads(original.with_suffix(".json").read_text())
            meta |= {"img_width": Image.open(original).width, "img_height": Image.open(original).height}
            path.with_suffix(".json").write_text(json.dumps(meta))
    shutil.copytree(fmow / "groundtruth", cropped / "groundtruth")
    archives = tmp_path / "archives"
    archives.mkdir()
    for split in ("train", "val"):
        tar(archives / f"{split}-images.tar.gz", cropped / split, "w:gz", ".jpg")
        tar(archives / f"{split}-metadata.tar.gz", cropped / split, "w:gz", ".json")
    tar(archives / "groundtruth.tar.bz2", cropped / "groundtruth", "w:bz2", ".json")
    expected = {k: v for k, v in files(tmp_path / "from-original").items() if "quarantine" not in k}
    for source in (cropped, archives):
        assert prepared("fmow", source, tmp_path / f"from-{source.name}")[2] == []
        found = {k: v for k, v in files(tmp_path / f"from-{source.name}").items() if "quarantine" not in k}
        assert found.keys() == expected.keys() and all(found[k] == expected[k] for k in found if k.endswith(".jpg"))
        for split in ("train", "test"):
            a, b = (
                json_lines(tmp_path / n / split / "metadata.jsonl") for n in ("from-original", f"from-{source.name}")
            )
            assert sorted(a, key=str) == sorted(b, key=str)
    (archives / "val-metadata.tar.gz").unlink()
    assert "val-metadata.tar.gz: no such file" in complaint(data.main, "fmow", archives, tmp_path / "none")


def test_wilds(tmp_path, capsys):
    """Place and date from its table, no GSD, areas from the names of the original files."""
    (tmp_path / "wilds/images").mkdir(parents=True)
    lines = ["split,img_filename,category,country_code,cloud_cover,timestamp,lat,lon"]
    for i, split in enumerate(("train", "seq", "train", "val", "test")):
        Image.fromarray(images_of(1, 64)[0].numpy()).save(tmp_path / f"wilds/images/rgb_img_{i}.png")
        lines.append(
            f"{split},airport_hangar_0_{i}_rgb.jpg,airport_hangar,KO-,{i},2015-0{i + 1}-02T10:00:00Z,-3.5,{70 + i}"
        )
    (tmp_path / "wilds/rgb_metadata.csv").write_text("\n".join(lines) + "\n")
    train_rows, test_rows, _ = prepared("fmow", tmp_path / "wilds", tmp_path / "out")
    assert [r["file_name"] for r in train_rows] == ["rgb_img_0.png", "rgb_img_2.png"] and len(test_rows) == 1
    row = {"location": [72.0, -3.5], "area": "airport_hangar_0", "label": "airport_hangar", "country_code": "XKX"}
    assert train_rows[1].items() >= row.items() and "no ground sample distance" in capsys.readouterr().out


def test_what_failed_once_is_tried_again(tmp_path):
    """A disk that could not be read, a copy that was not whole: not for ever in quarantine."""
    failing = [True]

    def make(i: int):
        if i == 1 and failing[0]:
            raise OSError("I/O error")
        yield data.Sample("train" if i < 2 else "test", {"file_name": f"{i}.png"}, b"...")

    def items():
        yield from (data.Item(str(i), functools.partial(make, i)) for i in range(3))
        if failing[0]:
            raise BadInput("the archive ends here")

    argv = (items, 3, tmp_path / "out", {"source": "x"}, 1, {})
    assert "start again to go on" in str(pytest.raises(BadInput, data.prepare, *argv).value)
    assert len((tmp_path / "out.unfinished" / data.JOURNAL).read_text().splitlines()) == 4
    failing[0] = False
    data.prepare(*argv)
    names = [
        r["file_name"] for split in ("train", "test") for r in json_lines(tmp_path / "out" / split / "metadata.jsonl")
    ]
    assert names == ["0.png", "1.png", "2.png"] and not (tmp_path / "out/quarantine.jsonl").read_text()


def test_killed_preparation_ends_in_the_same_bytes(fmow, tmp_path):
    """Ten kills of all its processes at random moments; what was done is not done again; other options are refused."""
    source = shutil.copytree(fmow, tmp_path / "source")
    for i in range(5, 400):
        for suffix in (".jpg", ".json"):
            stem = "train/airport/airport_0/airport_0_"
            os.link(source / f"{stem}1_rgb{suffix}", source / f"{stem}{i}_rgb{suffix}")
    prepared("fmow", source, tmp_path / "undisturbed")
    argv = ["fmow", str(source), str(tmp_path / "killed"), "--jobs", "2"]
    journal, rng, kills, sizes = tmp_path / "killed.unfinished" / data.JOURNAL, random.Random(0), 0, []

    def work():
        os.setsid()  # a group of its own, so that the kill reaches its workers too
        tqdm.set_lock(threading.RLock())  # not the one of this process, which nobody would give back after a kill
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        data.main(argv)

    while kills < 10 and not (tmp_path / "killed").exists():
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        before, deadline = journal.stat().st_size if journal.exists() else 0, time.monotonic() + 60
        while child.is_alive() and time.monotonic() < deadline:  # wait until it has done something, then a bit more
            if journal.exists() and journal.stat().st_size > before:
                time.sleep(rng.random() * 0.02)
                break
            time.sleep(0.002)
        if child.is_alive():
            os.killpg(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        sizes.append(journal.stat().st_size if journal.exists() else 0)
    assert kills >= 5 and sizes == sorted(sizes), "work was lost"
    if not (tmp_path / "killed").exists():
        assert "begun with other options" in complaint(data.main, *argv, "--size", 64)
        data.main(argv)
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")
    assert "exists" in complaint(data.main, *argv)
    (tmp_path / "killed" / data.JOURNAL).touch()  # as after a kill between the last two steps
    data.main(argv)
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")


def test_a_killed_worker_is_told(tmp_path):
    """The system may kill a worker that needs too much memory: one line, and what is done is kept."""
    sample = data.Sample("train", {"file_name": "a.png"}, b"")
    die = lambda: time.sleep(0.5) or os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    items = [data.Item("0", lambda: [sample]), data.Item("1", die)]
    with pytest.raises(BadInput, match="a process ended .* what is done is kept"):
        data.prepare(lambda: items, 2, tmp_path / "out", {}, 1, {})
    journal = tmp_path / "out.unfinished" / data.JOURNAL
    assert "a.png" in journal.read_text()
    with journal.open("a") as file:
        file.write('{"key": "1", "ro')  # a line torn by a kill: cut off, and its item made again
    items = [data.Item(key, lambda name=f"{key}.png": [data.Sample("train", {"file_name": name}, b"")]) for key in "01"]
    data.prepare(lambda: items, 2, tmp_path / "out", {}, 1, {})
    assert [r["file_name"] for r in json_lines(tmp_path / "out/train/metadata.jsonl")] == ["a.png", "1.png"]


def write_classes(folder: Path, classes: dict[str, int], suffix: str, name: str) -> list[str]:
    """n images for each class, named by the pattern -> their names."""
    names, rng = [], np.random.default_rng(0)
    for kind, n in classes.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(1, n + 1):
            names.append(name.format(kind=kind, i=i) + suffix)
            pixels = rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / kind / names[-1])
    return names


def test_class_folders_with_split_lists(tmp_path, capsys):
    """RESISC45, UC Merced (val joins test; TIFF becomes PNG) and EuroSAT's JPEGs follow their lists, by base name."""
    layouts = {
        "resisc45": ("NWPU-RESISC45", ".jpg", "{kind}_{i:03d}", "resisc45", 3, 2),
        "ucmerced": ("UCMerced_LandUse/Images", ".tif", "{kind}{i:02d}", "uc_merced", 3, 3),
        "eurosat": ("2750", ".jpg", "{kind}_{i}", "eurosat", 3, 2),
    }
    for name, (folder, suffix, pattern, prefix, train_rows, test_rows) in layouts.items():
        source = tmp_path / name
        names = write_classes(source / folder, {"a b": 3, "forest": 3}, suffix, pattern)
        parts = {"train": names[:3], "val": names[3:4], "test": names[4:]}
        assert f"{prefix}-train.txt" in complaint(data.main, name, source, tmp_path / f"{name}-out")
        for part, listed in parts.items():
            text = "\n".join(n.replace(".tif", ".jpg") if name == "eurosat" else n for n in listed)
            (source / f"{prefix}-{part}.txt").write_text(text + "\n")
        rows = prepared(name, source, tmp_path / f"{name}-out")
        assert (len(rows[0]), len(rows[1])) == (train_rows, test_rows) and {r["label"] for r in rows[0]} == {"a b"}
        first = tmp_path / f"{name}-out/train" / rows[0][0]["file_name"]
        original = source / folder / "a b" / names[0]
        same = first.read_bytes() == original.read_bytes() if suffix == ".jpg" else first.suffix == ".png"
        assert same and np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(original)))
    assert "without GSD and location" in capsys.readouterr().out


def test_optimal31_and_fgsc23(tmp_path):
    """Half of each class, the same for the same seed, or the lists where they are; FGSC's own train/ and test/."""
    write_classes(tmp_path / "optimal/Images", {"airplane": 6, "zoo": 4}, ".jpg", "{kind}({i})")
    rows = [prepared("optimal31", tmp_path / "optimal", tmp_path / f"o{i}", "--seed", i // 2) for i in range(3)]
    count = lambda part: sorted(r["label"] for r in part)  # noqa: E731
    assert all(count(r[0]) == count(r[1]) == ["airplane"] * 3 + ["zoo"] * 2 for r in rows)
    assert rows[0] == rows[1] != rows[2]
    for split, names in (("train", ["airplane(1).jpg"]), ("test", ["airplane(2).jpg", "zoo(1).jpg"])):
        (tmp_path / f"optimal/optimal31-{split}.txt").write_text("\n".join(names))
    rows = prepared("optimal31", tmp_path / "optimal", tmp_path / "lists")
    assert [[r["file_name"] for r in part] for part in rows[:2]] == [
        ["airplane/airplane(1).jpg"],
        ["airplane/airplane(2).jpg", "zoo/zoo(1).jpg"],
    ]
    write_classes(tmp_path / "fgsc/train", {"0": 2, "10": 2}, ".jpg", "{kind}_{i}")
    write_classes(tmp_path / "fgsc/test", {"0": 1, "2": 1}, ".jpg", "{kind}_{i}")
    train_rows, test_rows, _ = prepared("fgsc23", tmp_path / "fgsc", tmp_path / "fgsc-out")
    assert [r["label"] for r in train_rows] == ["0", "0", "10", "10"] and [r["label"] for r in test_rows] == ["0", "2"]


def test_prepared_trees_are_checked_trained_on_and_evaluated(fmow, tmp_path):
    """Each kind of source goes the whole way: prepare, check, train on fMoW with all 15 fields, evaluate on all of
    them, the downstream ones without any field."""
    prepared("fmow", fmow, tmp_path / "fmow")
    write_classes(tmp_path / "a/Images", {"airplane": 6, "zoo": 4}, ".jpg", "{kind}({i})")
    prepared("optimal31", tmp_path / "a", tmp_path / "optimal31")
    for split in ("train", "test"):
        write_classes(tmp_path / "b" / split, {"0": 3, "10": 3}, ".jpg", split + "{kind}_{i}")
    prepared("fgsc23", tmp_path / "b", tmp_path / "fgsc23")
    for name, folder, suffix, pattern in (
        ("resisc45", "NWPU-RESISC45", ".jpg", "{kind}_{i:03d}"), ("eurosat", "2750", ".jpg", "{kind}_{i}"),
        ("ucmerced", "UCMerced_LandUse/Images", ".tif", "{kind}{i:02d}"),
    ):  # fmt: skip
        names = write_classes(tmp_path / name / folder, {"beach": 3, "forest": 3}, suffix, pattern)
        for part, listed in {"train": names[:2] + names[3:5], "val": names[2:3], "test": names[5:]}.items():
            path = tmp_path / name / f"{name.replace('ucm', 'uc_m')}-{part}.txt"
            path.write_text("\n".join(listed))
        prepared(name, tmp_path / name, tmp_path / f"{name}-out")
    folders = [tmp_path / n for n in "fmow optimal31 fgsc23 resisc45-out eurosat-out ucmerced-out".split()]
    for folder in folders:
        with pytest.raises(SystemExit) as stopped:
            data.main(["check", str(folder), "--jobs", "1"])
        assert stopped.value.code == 0, folder
    argv = [*TINY, "--data", folders[0], "--output", tmp_path / "run", "--metadata-encoder", "table", "--fields", "all"]
    train.main([*map(str, argv), "--batch-size", "4", "--epochs", "1"])
    argv = ["--checkpoint", tmp_path / "run/checkpoint.pt", "--data", *folders, "--modality", "image", "both"]
    evaluate.main([*map(str, argv), "--workers", "0", "--output", str(tmp_path / "scores.jsonl")])
    found = {(r["data"], r["features"]) for r in json_lines(tmp_path / "scores.jsonl")}
    assert {(str(folder), name) for folder in folders for name in ("image", "both")} <= found


def test_utm():
    """Against published coordinates (the CN Tower, to a metre), the axes, and both hemispheres."""
    assert worst(data.utm_to_degrees(630084, 4833438, 17, True), [-79.387139, 43.642567]) < 1.5e-5
    assert worst(data.utm_to_degrees(500000, 0, 32, True), [9, 0]) < 1e-12
    north, south = data.utm_to_degrees(300000, 4e6, 10, True), data.utm_to_degrees(300000, 1e7 - 4e6, 10, False)
    assert worst(north, [south[0], -south[1]]) < 1e-12
    # The meridian's length from the equator to 45 degrees north is 4,984,944.378 m on WGS 84.
    assert worst(data.utm_to_degrees(500000, 0.9996 * 4984944.378, 31, True), [3, 45]) < 1e-8


def test_eurosat_from_geotiffs(tmp_path):
    """Bands 4, 3, 2 at 2750 to 255, GSD and place of the centre out of the file's own georeference."""
    tifffile = pytest.importorskip("tifffile", reason="tifffile is optional")
    folder = tmp_path / "eurosat/ds/images/remote_sensing/otherDatasets/sentinel_2/tif/Forest"
    folder.mkdir(parents=True)
    bands = np.arange(13) * 250 + np.zeros((64, 64, 1), np.uint16)
    for i in (1, 2):
        keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32617)
        tags = [
            (33550, "d", 3, (10.0, 10.0, 0.0)),
            (33922, "d", 6, (0, 0, 0, 629764.0, 4833758.0, 0)),
            (34735, "H", 16, keys),
        ]
        options = dict(photometric="minisblack", planarconfig="contig", extratags=tags)
        tifffile.imwrite(folder / f"Forest_{i}.tif", bands.astype(np.uint16), **options)
    for part, name in (("train", "Forest_1.jpg"), ("test", "Forest_2.jpg")):
        (tmp_path / f"eurosat/eurosat-{part}.txt").write_text(name)
    (row,), _, bad = prepared("eurosat", tmp_path / "eurosat", tmp_path / "out")
    assert bad == [] and row["gsd"] == [10.0, 10.0] and worst(row["location"], [-79.387139, 43.642567]) < 1.5e-5
    pixels = np.asarray(Image.open(tmp_path / "out/train" / row["file_name"]))
    assert pixels.shape == (64, 64, 3) and pixels[5, 5].tolist() == [round(v * 250 * 255 / 2750) for v in (3, 2, 1)]


def test_so2sat(tmp_path):
    """Bands 4, 3, 2 of sen2 and the name of the local climate zone, from the two HDF5 files."""
    h5py = pytest.importorskip("h5py", reason="h5py is optional")
    (tmp_path / "source/culture_10").mkdir(parents=True)
    for name, n in (("training", 3), ("testing", 2)):
        with h5py.File(tmp_path / f"source/culture_10/{name}.h5", "w") as file:
            file["sen2"] = np.arange(10) * 0.05 + np.zeros((n, 32, 32, 1))
            file["label"] = np.eye(17)[[16, 0, 2][:n]]
    train_rows, test_rows, _ = prepared("so2sat", tmp_path / "source", tmp_path / "out")
    assert [r["label"] for r in train_rows] == ["water", "compact high-rise", "compact low-rise"] and len(
        test_rows
    ) == 2
    pixel = np.asarray(Image.open(tmp_path / "out/train" / train_rows[0]["file_name"]))[3, 3]
    assert pixel.tolist() == [round(v * 255 / 0.275) for v in (0.1, 0.05, 0)]


@pytest.mark.parametrize("command, package", [("eurosat", "tifffile"), ("so2sat", "h5py")])
def test_optional_packages_are_asked_for(command, package, tmp_path, monkeypatch):
    """One line that says what to install."""
    (tmp_path / "source/Forest").mkdir(parents=True)
    (tmp_path / "source/Forest/Forest_1.tif").touch()
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in complaint(data.main, command, tmp_path / "source", tmp_path / "out")


DATES = {
    "21/09/2015": "2015-09-21", "9/21/2015 7:05": "2015-09-21T07:05", "20150921T153008Z": "2015-09-21T15:30:08Z",
    "20150921": "2015-09-21", "21 Sep 2015": "2015-09-21", "September 21, 2015 15:30": "2015-09-21T15:30",
    "2015/09/21 15:30:08 +02:00": "2015-09-21T15:30:08+02:00", "05.05.2015": "2015-05-05", "03/04/2015": None,
    "31/31/2015": None, "2015-09-21T15:30:08.5Z": "2015-09-21T15:30:08.5Z", "next week 5": None, "abc": None,
    "123456": None, "2015-9-21": "2015-09-21", "21/09/2015 9:30:15": "2015-09-21T09:30:15",
    "2015-09-21 9:30:15": "2015-09-21T09:30:15", "page 1\nof 2": None,
}  # fmt: skip


@pytest.mark.parametrize("text", DATES)
def test_dates_as_people_write_them(text):
    """ISO comes back as it is, other unambiguous dates in ISO; what may be two dates is none."""
    iso = metadata.iso_timestamp(text)
    assert (iso if parse_timestamp(text) else None) == DATES[text]
    assert metadata.format_value(text, metadata.FIELDS["timestamp"]) == DATES[text]


def test_an_empty_dataset_and_a_marked_one(tmp_path, capsys):
    """No rows: `check` says so, as training does. The mark that some editors write first does no harm."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.jsonl").write_text("")
    with pytest.raises(SystemExit, match="1"):
        data.main(["check", str(tmp_path)])
    assert "no rows" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no rows"):
        data.read_split(tmp_path / "train", DEFAULT)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "0.png")
    (tmp_path / "train" / "metadata.jsonl").write_text('\ufeff{"file_name": "0.png", "gsd": [1, 2]}\n')
    assert data.read_split(tmp_path / "train", DEFAULT).record(0) == {"file_name": "0.png", "gsd": [1, 2]}


def test_blanks():
    """What tables write for nothing is left out; but a class may be called so."""
    row = {"label": "none", "label_soil": "-", "label_kind": " ", "soil": "None", "slope": "n/a", "country_code": "NA"}
    assert metadata.canonical(row) == {"label": "none", "label_soil": "-", "country_code": "NA"}


def test_kinds_of_columns():
    """What a column is taken for, by nine tenths of its values."""
    values = {
        "height": ["1.5", 2, "3e3", "NA"], "count": [1, 2, 3], "bands": [[1, 2.5], [3, 4]], "site": ["a", "b", "7"],
        "acquired": ["20150921", "2015-09-22", "22 Sep 2015"], "id": [f"x{i}" for i in range(50)], "gsd": [[1, 2]],
        "altitude": ["1234", "4711", "2015"], "mixed": [1] * 95 + ["bad"] * 5, "half": [1, "bad"] * 5,
    }  # fmt: skip
    kinds = {
        "height": ("number", "%.6g", ()), "count": ("number", "%.0f", ()), "bands": ("number", "%.6g", ("1", "2")),
        "site": ("category", "%s", ()), "acquired": ("timestamp", "%s", ()), "id": None,
        "mixed": ("number", "%.0f", ()), "altitude": ("number", "%.0f", ()), "gsd": ("number", "%.4f", ("x", "y")),
        "half": ("category", "%s", ()),
    }  # fmt: skip
    for name, column in values.items():
        field, remark = metadata.infer_field(name, column)
        assert (field and (field.kind, field.style, field.parts)) == kinds[name], name
        assert ("5 of 100" in remark) == (name == "mixed") and ("left out" in remark) == (name == "id")


def test_rows_are_put_in_order():
    """Blanks, lists as text, STAC's names, two coordinates; Namibia's NA stays; what is in order stays as it is."""
    row = {
        "lon": "12.5",
        "LAT": "41.9",
        "eo:cloud_cover": 3,
        "bands": "[1, 2]",
        "x": "n/a",
        "y": "",
        "country": "NA",
        "night": True,
    }
    expected = {"location": ["12.5", "41.9"], "cloud_cover": 3, "bands": [1, 2], "country": "NA", "night": "true"}
    assert metadata.canonical({**row, "null": None, "area": None}) == expected and metadata.canonical(POSTER) == POSTER
    assert metadata.canonical({"lon": "", "lat": 5}) == {}, "half a place is none"
    assert metadata.canonical({"location": [1, 2], "lon": 5, "lat": 6}) == {"location": [1, 2], "lon": 5, "lat": 6}


def write_own(folder: Path, n: int = 60) -> Path:
    """A table of columns nobody has heard of, 30 % of it blank, and images in folders with spaces and umlauts."""
    rng = random.Random(0)
    dates = ("2015-09-{:02d}", "{:02d} Sep 2015", "201509{:02d}", "2015/09/{:02d} 10:30")
    lines = ["picture;split;elevation;soil;acquired;lon;lat;bands;kind;note"]
    for i in range(n):
        path = folder / "images" / ("Kraków 1" if i % 2 else "b/c") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images_of(1, 40)[0].numpy() // (1 + i % 3)).save(path)
        split, soil = ("test", "peat") if i % 5 == 0 else ("train", rng.choice(["clay", "sand"]))
        values = [f"{rng.uniform(0, 3000):.1f}", soil, rng.choice(dates).format(1 + i % 28)]
        values += [f"{rng.uniform(-180, 180):.4f}", f"{rng.uniform(-60, 70):.4f}", f"[{i}, {i % 7}]"]
        values = ["" if rng.random() < 0.3 else value for value in values]
        lines.append(";".join([str(path.relative_to(folder / "images")), split, *values, f"k{i % 3}", f"text {i}"]))
    (folder / "table.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    return folder


def test_ones_own_table_is_read_to_its_end(tmp_path, monkeypatch):
    """Sorted by split, with a class that comes late and a text too long for a file's name."""
    monkeypatch.setattr(data, "SAMPLE", 3)
    (tmp_path / "images").mkdir()
    rows = [
        {"note": "word " * 100, "path": f"{i}.png", "split": s} for i, s in enumerate(["train"] * 4 + ["val", "test"])
    ]
    rows[-1]["label_late"] = "peat"
    for row in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / row["path"])
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_rows, test_rows, _ = prepared("own", tmp_path / "table.jsonl", tmp_path / "images", tmp_path / "out")
    assert len(train_rows) == 4 and [(r["file_name"], r["label_late"]) for r in test_rows] == [("5.png", "peat")]


@pytest.mark.parametrize("encoder", ["text", "table"])
def test_ones_own_table_trains_and_evaluates(encoder, tmp_path, capsys):
    """Unknown columns, blanks, four date formats, a category first seen in the test split; a blank is its row's own."""
    source = write_own(tmp_path / "mine")
    argv = ("own", source / "table.csv", source / "images", tmp_path / "out", "--label", "kind")
    train_rows, test_rows, bad = prepared(*argv, "--split-column", "split")
    assert (len(train_rows), len(test_rows), bad) == (48, 12, [])
    assert "left out: 60 different values" in capsys.readouterr().out
    fields = data.read_fields(tmp_path / "out")
    assert {name: (f.kind, len(f.parts)) for name, f in fields.items()} == {
        "elevation": ("number", 0), "soil": ("category", 0), "acquired": ("timestamp", 0), "location": ("number", 2),
        "bands": ("number", 2),
    }  # fmt: skip
    argv = [*TINY, "--data", tmp_path / "out", "--output", tmp_path / "run", "--metadata-encoder", encoder]
    train.main(list(map(str, argv)))
    evaluate.main(["--checkpoint", str(tmp_path / "run/checkpoint.pt"), "--modality", "both", "--workers", "0"])
    pretrained, _ = evaluate.load_pretrained(tmp_path / "run/checkpoint.pt", torch.device("cpu"))
    assert [f.name for f in pretrained.fields] == list(fields)
    assert {r["soil"] for r in test_rows if "soil" in r} == {"peat"}

    def embed(rows: list[dict]) -> torch.Tensor:
        table = pretrained.metadata(data.tabulate(rows, pretrained.fields, captions=True))
        return pretrained.model.metadata_encoder(*table.batch(torch.arange(len(rows))))

    whole = embed(train_rows)
    for name in fields:
        row = next(i for i, r in enumerate(train_rows) if name in r)
        blanked = [r if i != row else {k: v for k, v in r.items() if k != name} for i, r in enumerate(train_rows)]
        changed = (embed(blanked) - whole).abs().amax(1) > 1e-5
        assert changed.nonzero().flatten().tolist() == [row], name


def test_plain_image_folders(tmp_path, capsys):
    """--data takes a Hugging Face ImageFolder with metadata.csv and a validation split; --types and fields.json say
    what a column is; a column that is not there is told."""
    source = write_own(tmp_path / "mine")
    table = list(csv.DictReader(open(source / "table.csv", encoding="utf-8-sig", newline=""), delimiter=";"))
    for split, ours in (("train", "train"), ("test", "validation")):
        chosen = [r for r in table if r["split"] == split]
        shutil.copytree(source / "images", tmp_path / "hf" / ours)
        with open(tmp_path / "hf" / ours / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", *list(table[0])[2:]])
            writer.writeheader()
            writer.writerows({"file_name": r["picture"], **{k: r[k] for k in list(r)[2:]}} for r in chosen)
    argv = [*TINY, "--data", str(tmp_path / "hf"), "--metadata-encoder", "table", "--epochs", "1"]
    train.main([*argv, "--output", str(tmp_path / "run"), "--fields", "soil,elevation,acquired,location"])
    out = capsys.readouterr().out
    assert regex.search(r"elevation +number +\d\d%", out) and checkpoint(tmp_path / "run")["schema"]["categories"] == {
        "soil": ["clay", "sand"]
    }
    assert "unknown field 'sol'" in complaint(train.main, *argv, "--output", tmp_path / "x", "--fields", "sol")
    assert "missing in every row" in complaint(train.main, *argv, "--output", tmp_path / "x", "--fields", "gsd")
    (tmp_path / "hf/fields.json").write_text(
        '{"soil": {"kind": "category"}, "elevation": {"kind": "number", "style": "%.1f"}}'
    )
    assert [f.style for f in data.choose_fields(tmp_path / "hf", "")] == ["%s", "%.1f"]
    for wrong in ('{"soil": {"kind": "categories"}}', '{"soil": {"sort": 1, "kind": "number"}}', "[1]", "{"):
        (tmp_path / "hf/fields.json").write_text(wrong)
        assert "fields.json" in complaint(train.main, *argv, "--output", tmp_path / "x")


def test_own_options(tmp_path):
    """Kinds and dates as the user says, whole areas on one side of a random split, rows that are wrong quarantined."""
    source = tmp_path / "mine"
    names = write_classes(source / "images", {"a": 40}, ".png", "{i}")
    rows = [{"p": f"a/{n}", "when": "03/04/2015", "code": i % 4, "place": i // 4} for i, n in enumerate(names)]
    rows += [{"p": "a/none.png"}, {"p": "../table.jsonl"}, {"p": "/etc/hostname"}, {"code": 1}]
    (source / "table.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "[1]\n{\n")
    argv = ["own", source / "table.jsonl", source / "images", tmp_path / "out"]
    options = "--types code=category --dates day-first --area place --test-share 0.3 --path-column p".split()
    train_rows, test_rows, bad = prepared(*argv, *options)
    assert {r["when"] for r in train_rows} == {"2015-04-03"} and len(train_rows) + len(test_rows) == 40
    assert data.read_fields(tmp_path / "out")["code"].kind == "category"
    assert not {r["area"] for r in train_rows} & {r["area"] for r in test_rows} and test_rows
    needles = ["line 41: ", "line 42: p '../table.jsonl' leaves", "line 43: p '/etc/hostname' leaves", "line 44: no p",
               "line 45: not a JSON object", "line 46: not JSON"]  # fmt: skip
    assert [n for n, q in zip(needles, bad, strict=True) if n not in q["problem"]] == []
    for wrong, needle in {
        "--types=code=float": "--types code=float: a kind is one of", "--types=cod=number": "no column 'cod'",
        "--label=kind": "no column 'kind'", "--path-column=q": "no column 'q'",
    }.items():  # fmt: skip
        assert needle in complaint(data.main, *argv[:3], tmp_path / "x", wrong)
    assert "no column holds names of files" in complaint(data.main, *argv[:2], source, tmp_path / "x")
    assert "no such file" in complaint(data.main, "own", source / "nothing.csv", source, tmp_path / "x")


def test_stac_items(tmp_path):
    """A folder of STAC items is a table: their properties by the paper's names, place from the bbox, image beside."""
    for i in range(4):
        folder = tmp_path / "stac" / f"item{i}"
        folder.mkdir(parents=True)
        Image.fromarray(images_of(1, 40)[0].numpy()).save(folder / ("thumb.png" if i else f"item{i}.png"))
        properties = {
            "datetime": f"2015-09-0{i + 1}T15:30:08Z",
            "gsd": 0.5,
            "eo:cloud_cover": i,
            "view:off_nadir": 12.5,
        }
        properties |= {
            "view:sun_azimuth": 100 + i,
            "view:sun_elevation": 50,
            "platform": "worldview-2",
            "kind": "ab"[i % 2],
        }
        item = {"type": "Feature", "bbox": [10 + i, 40, 12 + i, 42], "properties": properties}
        item["assets"] = {"meta": {"href": "./x.xml"}, "thumb": {"href": "./thumb.png"}}
        (folder / f"item{i}.json").write_text(json.dumps(item))
    (tmp_path / "stac/catalog.json").write_text('{"type": "Catalog"}')
    (tmp_path / "stac/broken.json").write_text('{"type": "Feature"}')
    rows = prepared(
        "own", tmp_path / "stac", tmp_path / "stac", tmp_path / "out", "--label", "kind", "--test-share", "0.5"
    )
    record = next(r for part in rows[:2] for r in part if "item1" in r["file_name"])
    assert caption(record, ALL) == (
        "gsd: [0.5000, 0.5000], timestamp: 2015-09-02T15:30:08Z, location: [12.000000, 41.000000], cloud_cover: 1, "
        "sun_azimuth_angle: 101.00, sun_elevation_angle: 50.00, off_nadir_angle: 12.50, sensor_platform: worldview-2"
    )
    assert (
        record["label"] == "b"
        and len(rows[0]) + len(rows[1]) == 4
        and "broken.json: not a STAC item" in rows[2][0]["problem"]
    )


DEPTHS = {
    "I;16": (".png", np.uint16),
    "RGB": (".png", np.uint16),
    "I;16 tif": (".tif", np.uint16),
    "F": (".tif", np.float32),
}


def deep_image(path: Path, what: str) -> np.ndarray:
    """Write an image of more than 8 bits -> its pixels."""
    pixels = np.arange(40 * 40, dtype=DEPTHS[what][1]).reshape(40, 40) * 2
    if what == "RGB":  # Pillow cannot write these: a PNG by hand
        pixels = np.stack([pixels, pixels + 1, pixels + 2], -1)
        raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
        chunk = lambda kind, body: (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )  # noqa: E731
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    else:
        Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize("what", DEPTHS)
def test_deep_images_are_refused_or_read_right(what, tmp_path):
    """More than 8 bits a channel: refused by name, though Pillow would open some; right with --range."""
    if DEPTHS[what][0] == ".tif":
        pytest.importorskip("tifffile", reason="tifffile is optional")
    path = tmp_path / f"images/deep{DEPTHS[what][0]}"
    path.parent.mkdir()
    pixels = deep_image(path, what)
    with pytest.raises(BadInput, match=f"{path}: mode .* --range"):
        data.load_image(path, 40)
    (tmp_path / "table.csv").write_text(f"file_name,split\n{path.name},train\n")
    argv = ("own", tmp_path / "table.csv", tmp_path / "images")
    assert "--range LOW HIGH" in complaint(data.main, *argv, tmp_path / "refused", "--split-column", "split")
    data.main([*map(str, argv), str(tmp_path / "out"), "--split-column", "split", "--range", "0", "3200"])
    found = np.asarray(Image.open(tmp_path / f"out/train/{path.name}{'' if path.suffix == '.png' else '.png'}"))
    expected = np.rint(pixels.astype(np.float64) * (255 / 3200)).clip(0, 255)
    assert np.array_equal(found, expected if what == "RGB" else np.stack([expected] * 3, -1))


def test_a_table_with_an_index_column(tmp_path):
    """As pandas writes it, its first column without a name: left out. A row with more values than columns is told."""
    (tmp_path / "table.csv").write_text(",file_name,label\n0,a.png,x\n1,b.png,y,z\n")
    (_, _, first), (_, _, second) = data.read_rows(tmp_path / "table.csv")
    assert first == {"file_name": "a.png", "label": "x"} and "line 3: more values than columns" in str(second)
    assert [data.fault_of(v, metadata.FIELDS["location"]) for v in (12.3, [12.3], [5, 100])][2].endswith("swapped")


def test_runs_on_other_data_and_with_skipped_steps(run, dataset, tmp_path):
    """A run is not resumed on other rows; its log may tell of skipped steps and it can be evaluated still."""
    shutil.copytree(run("simclr"), tmp_path / "run")
    with (tmp_path / "run/log.jsonl").open("a") as file:
        file.write('{"step": 6, "not_finite": ["loss"], "files": ["a.jpg"]}\n')
    pretrained, _ = evaluate.load_pretrained(tmp_path / "run/checkpoint.pt", torch.device("cpu"))
    assert pretrained.about["seconds"] > 0
    path = shutil.copytree(dataset, tmp_path / "data") / "train" / "metadata.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[1:]))
    argv = [*TINY, "--data", tmp_path / "data", "--output", tmp_path / "run", *RUNS["simclr"].split()]
    assert "other training data (another rows)" in complaint(train.main, *argv)


def test_cache(dataset, tmp_path, monkeypatch):
    """What was read once is mapped, not read again, until the file changes; a folder that cannot be written works."""
    folder = shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns(".cache")) / "train"
    first = data.read_split(folder, DEFAULT, captions=True)
    with monkeypatch.context() as patch:
        patch.setattr(data, "build_split", None)
        again = data.read_split(folder, DEFAULT, captions=True)
    assert str(tmp_path / "data/.cache") in Path("/proc/self/maps").read_text(), "it is mapped"
    assert np.array_equal(first.table.numbers, again.table.numbers, True)
    assert [again.names[i] for i in range(48)] == [first.names[i] for i in range(48)]
    path = folder / "metadata.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[1:]))
    assert len(data.read_split(folder, DEFAULT, captions=True)) == 47
    records = json_lines(path)
    path.write_text(path.read_text().replace("\n", "\n \v\n"))
    split = data.read_split(folder, DEFAULT)
    assert [split.record(i) for i in range(47)] == [metadata.canonical(r) for r in records], "blank lines between"
    (kept,) = (folder.parent / ".cache").iterdir()  # what was kept of earlier states is removed
    stale = shutil.copy(kept, kept.with_name(kept.name.rpartition("-")[0] + "-0"))
    os.utime(stale, (2, 2)), os.utime(path, (1, 1))  # later than the file, before this code
    data.read_split(folder, DEFAULT)
    assert kept.exists() and not stale.exists()
    shutil.rmtree(folder.parent / ".cache")
    (folder.parent / ".cache").write_text("in the way")
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path))
    assert len(data.read_split(folder, DEFAULT)) == 47 and list(tmp_path.glob("satmip-*/train-*"))


def plant(folder: Path) -> dict[str, str]:
    """Every fault that check knows, in a copy of the tiny data set -> problem: what its example says."""
    for split in ("train", "test"):
        rows = json_lines(folder / split / "metadata.jsonl")
        for i, row in enumerate(rows):
            row.update({k: v for k, v in POSTER.items() if k in ("wavelengths",)} | {"area": f"{split}{i}"})
        by = {int(r["file_name"][:2]): r for r in rows}
        if split == "train":
            by[1]["timestamp"], by[2]["location"], by[3]["gsd"] = "sometime", [41.9, 112.5], "wide"
            by[4].update(location=[200.0, 5.0]), by[10].update(utm_zone="18M", location=[10.0, 50.0])
            by[11].update(area="shared", cloud_cover=140)
            shutil.copy(folder / "train/12.jpg", folder / "train/extra.jpg")
            os.truncate(folder / "train/13.png", 600)
            (folder / "train/14.png").unlink()
            shutil.copy(folder / "train/20.png", folder / "train/22.png")
            shutil.copy(folder / "train/23.png", folder / "test/01.png")
            rows.append(dict(by[15]))
        else:
            by[3].update(area="shared")
        for i, wrong in {5: [1.0, 1.0], 15: [1.0, 1.0], 25: [1.0, 1.0], 35: [1.0, 1.0], 45: [1.0, 1.0]}.items():
            if i in by:
                by[i]["gsd"] = wrong  # the data set's own malformed values
        text = "".join(json.dumps(r) + "\n" for r in rows).replace("2004-13-01", "2004-12-01")
        (folder / split / "metadata.jsonl").write_text(text + ("not a line\n" if split == "train" else ""))
    return {
        "timestamp: no date": "sometime", "location: latitude and longitude swapped": "112.5",
        "gsd: malformed": "'wide'", "location: out of range": "200.0", "location outside its utm_zone": "18M",
        "cloud_cover: out of range": "140",
        "image without a row": "extra.jpg", "unreadable image": "13.png", "row without its image": "14.png",
        "image twice": "22.png is 20.png", "image in train and test": "23.png, 01.png", "file_name twice": "15.jpg",
        "unreadable line": "line 50: not JSON", "area in train and test": "shared", "wavelengths: constant": "661",
    }  # fmt: skip


def test_check_finds_every_planted_fault(dataset, tmp_path, capsys):
    """Each fault with its place, nothing else; the exit status says whether training can start."""
    folder = shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    planted = plant(folder)
    with pytest.raises(SystemExit) as stopped:
        data.main(["check", str(folder), "--json", "--jobs", "2"])
    found = json.loads(capsys.readouterr().out)
    problems = {p["problem"]: p for p in found["problems"]}
    assert problems.keys() == planted.keys() and all(planted[p] in problems[p]["first"] for p in planted)
    assert stopped.value.code == 1 and not found["can_train"]
    assert {p for p in problems if problems[p]["stops"]} == {
        "unreadable line",
        "unreadable image",
        "row without its image",
    }
    assert all(problems[p]["count"] == 1 for p in problems if not p.startswith("gsd"))
    assert (
        found["train"]["fields"]["utm_zone"] == pytest.approx(48 / 49)
        and found["train"]["labels"]["label_kind"]["ice"] > 5
    )
    with pytest.raises(SystemExit):
        data.main(["check", str(folder), "--jobs", "1"])
    assert regex.search(r"train +image twice +1 +runs +22.png", capsys.readouterr().out)


def test_check_and_show_on_the_embedded_data(demo, tmp_path, capsys):
    """Nothing is wrong with it; the pictures are drawn."""
    with pytest.raises(SystemExit) as stopped:
        data.main(["check", str(demo), "--jobs", "2"])
    assert stopped.value.code == 0 and "no problem found" in capsys.readouterr().out
    data.main(["show", str(demo), "--output", str(tmp_path)])
    assert all(min(Image.open(tmp_path / f"{name}.png").size) > 500 for name in ("samples", "distributions"))


# -----------------------------------------------------------------------------------------------------
# evaluate


@pytest.mark.parametrize("queries, classes, chunk", [(1, 3, 1024), (40, 200, 7), (40, 5, 1)])
def test_knn_equals_a_loop(queries, classes, chunk):
    """Votes exp(cosine / 0.07) of the k nearest, for every k, one query or many, in chunks of any size."""
    rng, ks = np.random.default_rng(classes), (20, 1, 100, 5)
    bank, labels, asked = rng.normal(size=(150, 6)), rng.integers(0, classes, 150), rng.normal(size=(queries, 6))
    tensors = [torch.from_numpy(a) for a in (bank, labels, asked)]
    expected = np.zeros((len(ks), queries))
    for (row, k), (i, q) in itertools.product(enumerate(ks), enumerate(asked)):
        votes, cosine = np.zeros(classes), bank @ q / np.linalg.norm(bank, axis=1) / np.linalg.norm(q)
        for j in np.argsort(-cosine)[:k]:
            votes[labels[j]] += math.exp(cosine[j] / 0.07)
        expected[row, i] = votes.argmax()
    shares = evaluate.knn(*tensors, classes, ks, chunk=chunk)
    assert np.array_equal(shares.argmax(2), expected) and worst(shares.sum(2), torch.ones(len(ks), queries)) < 1e-5
    with pytest.raises(ValueError, match="151"):
        evaluate.knn(*tensors, classes, (1, 151))


@pytest.mark.parametrize("n, k", [(1000, 5), (1007, 62), (1007, 63), (15, 15)])
def test_largest_of_many(n, k):
    """top: topk's own values and columns, whether n falls into 16 equal groups or not, sorted or dealt unluckily."""
    torch.manual_seed(0)
    shuffled, falling = torch.randn(5, n), torch.arange(n, 0.0, -1).expand(2, n)
    for x in (shuffled, falling, falling.flip(1), falling.half()):
        assert all(map(torch.equal, evaluate.top(x, k), x.topk(k)))


def test_linear_probe_reaches_the_optimum():
    """On data that no plane separates the gradient vanishes and the loss is that of Newton's method in float64."""
    torch.manual_seed(0)
    x, noise = torch.randn(200, 4), torch.randint(3, (200,))
    y = torch.where(torch.rand(200) < 0.5, (x[:, 0] > 0).long(), noise)
    weight, bias, loss = evaluate.linear_probe(x, y, 3)
    objective = lambda p: F.cross_entropy(x.double() @ p[:12].view(3, 4).T + p[12:], y)  # noqa: E731
    gradient, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    assert gradient(objective, torch.cat([weight.flatten(), bias]).double()).abs().max() < 1e-4
    p = torch.zeros(15, dtype=torch.float64)
    for _ in range(20):
        p = p - torch.linalg.pinv(hessian(objective, p), hermitian=True, rtol=1e-10) @ gradient(objective, p)
    assert abs(loss - objective(p)) < 1e-6 and 0.5 < loss < 1.05


def test_finetuning_learns(run, dataset):
    """Colours of four kinds are learnt by heart; the checkpoint's own encoder stays as it was; a seed repeats it."""
    pretrained, state = evaluate.load_pretrained(run("simclr") / "checkpoint.pt", torch.device("cpu"))
    splits = data.read_dataset(dataset, DEFAULT)
    classes, y = data.class_ids("label_kind", *splits)
    statistics = state["channel_mean"], state["channel_std"]
    first, again = (
        evaluate.finetune(pretrained, splits, statistics, y, len(classes), 4, 1e-3, "crop", 0) for _ in range(2)
    )
    known = y[1] >= 0
    assert evaluate.accuracy(first[known].argmax(1), y[1][known]) > 0.8 and torch.equal(first, again)
    assert worst(first.sum(1), torch.ones(16)) < 1e-5
    own = pretrained.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state["model"].items())


def test_scores_by_hand():
    """Accuracy; macro-F1 over the classes that occur among predictions or truths."""
    predicted, true = torch.tensor([0, 0, 1, 1, 2, 4]), torch.tensor([0, 1, 1, 1, 0, 0])
    f1 = [2 * 1 / (2 + 3), 2 * 2 / (2 + 3), 0, 0]  # classes 0, 1, 2, 4; class 3 never occurs
    assert evaluate.accuracy(predicted, true) == 0.5
    assert abs(evaluate.macro_f1(predicted, true, 5) - sum(f1) / 4) < 1e-12


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_rows_without_a_label_are_left_out(protocol):
    """Unlabelled rows neither teach nor count, whatever their features."""
    torch.manual_seed(0)
    x, y, known = torch.randn(60, 5), torch.arange(60) % 3, torch.arange(60) % 2 == 0
    x[:, 0] += y
    spoilt = torch.where(known[:, None], x, 100.0), torch.where(known, y, -1)
    clean = evaluate.score(protocol, (x[known],) * 2, (y[known],) * 2, 3)
    assert evaluate.score(protocol, (spoilt[0],) * 2, (spoilt[1],) * 2, 3) == clean and clean[0]["train"] == 30


def test_features_do_not_depend_on_the_batch(run, dataset):
    """Batches of 5 or of 512 give the same features, in the order of the rows."""
    pretrained, state = evaluate.load_pretrained(run("satmips") / "checkpoint.pt", torch.device("cpu"))
    split = data.read_split(dataset / "train", pretrained.fields, captions=True)
    statistics = state["channel_mean"], state["channel_std"]
    few, many = (evaluate.extract(pretrained, split, statistics, "both", 32, 0, batch) for batch in (5, 512))
    assert [x.shape for x in few.values()] == [(48, 128), (48, 32)]
    assert all(worst(few[name], many[name]) < 1e-4 for name in ("image", "metadata"))


def test_baselines(dataset):
    """Histograms are unit vectors of 16 bins a channel; places lie on the sphere, rows without one at its centre."""
    split = data.read_split(dataset / "test", DEFAULT)
    rows, red = evaluate.histograms(split, 32, 0), data.load_image(split.folder / split.names[3], 32)[..., 0]
    assert worst(rows[3, :16].square() * 3 * 32 * 32, np.histogram(red, 16, (0, 256))[0]) < 1e-2
    points, (longitude, latitude) = evaluate.locations(split), np.radians(split.record(3)["location"])
    assert worst(points.norm(dim=1), [0.0 if i % 10 in (6, 7) else 1.0 for i in range(16)]) < 1e-6
    x, y = math.cos(longitude), math.sin(longitude)
    assert worst(points[3], [x * math.cos(latitude), y * math.cos(latitude), math.sin(latitude)]) < 1e-6


def test_identity_is_the_standardised_row(dataset):
    """Numbers with the training mean 0, categories one-hot; zero where missing or, in the test, never seen."""
    splits = data.read_dataset(dataset, parse_fields("cloud_cover,country_code"))
    train, test = evaluate.identity(splits, parse_fields("cloud_cover,country_code"))
    clouds = np.arange(48)
    assert worst(train[:, 0], (clouds - clouds.mean()) / clouds.std()) < 1e-5
    country = [-1 if i % 10 == 8 else (2, 0, 1)[i % 3] for i in range(16)]  # FRA, KEN, PER in alphabetical order
    assert worst(test[:, 1:], [[float(c == code) for c in range(3)] for code in country]) == 0


def test_bootstrap_intervals():
    """Of accuracy: those of a binomial; of both: what drawing samples one by one gives. The order does not matter."""
    rng = np.random.default_rng(0)
    true = torch.from_numpy(rng.integers(0, 4, 400))
    predicted = torch.where(torch.from_numpy(rng.random(400)) < 0.7, true, 3)
    found = evaluate.intervals(predicted, true, 5, draws=4000)
    shuffled = torch.randperm(400)
    assert found == evaluate.intervals(predicted[shuffled], true[shuffled], 5, draws=4000)
    share = evaluate.accuracy(predicted, true)
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert worst(found["accuracy_interval"], [share - half, share + half]) < 0.006
    draws = (torch.from_numpy(rng.integers(0, 400, 400)) for _ in range(1000))
    f1 = [evaluate.macro_f1(predicted[d], true[d], 5) for d in draws]
    assert worst(found["macro_f1_interval"], np.quantile(f1, (0.025, 0.975))) < 0.012


def test_areas_are_averaged_by_hand():
    """Two images of a wrong and of a right mind: the area takes the mean; images without an area stay alone."""
    probabilities = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    true, areas = torch.tensor([1, 1, 0, 0]), ["a", "a", None, None]
    mean, labels = evaluate.average_areas(probabilities, true, areas)
    assert worst(mean, [[0.35, 0.65], [0.8, 0.2], [0.3, 0.7]]) < 1e-6 and labels.tolist() == [1, 0, 0]
    alone, averaged = (evaluate.judge(probabilities, true, 2, a) for a in (None, areas))
    assert (alone["accuracy"], alone["test"]) == (0.5, 4) and (averaged["accuracy"], averaged["test"]) == (2 / 3, 3)
    with pytest.raises(BadInput, match="'b'"):
        evaluate.average_areas(probabilities, true, ["a", "b", "b", "c"])


def test_table_of_several_models():
    """A setting that differs is named in the rows; F1 on fMoW, accuracy elsewhere; one run may show its interval."""
    common = {"checkpoint": "x", "metadata_encoder": "text", "method": "satmip", "protocol": "linear", "label": "label"}
    common |= {"features": "image", "macro_f1": 0.1, "macro_f1_interval": [0.05, 0.2], "augment": "strong"}
    results = [
        {**common, "fields": fields, "seed": seed, "accuracy": 0.4 + seed / 10, "data": folder}
        for fields, seed, folder in (("gsd", 0, "x/fmow"), ("all", 0, "x/eurosat"), ("all", 1, "x/eurosat"))
    ]
    text = evaluate.format_table(results, metric="paper", interval=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0] == ["paper (%)", "fmow label linear", "eurosat label linear"]
    assert rows[2] == ["satmip (text), fields=gsd, image", "10.0 [5.0, 20.0]", "-"]
    assert rows[3] == ["satmip (text), fields=all, image", "-", "45.0 \xb1 7.1"]
    masked = [{**common, "checkpoint": str(on), "seed": 0, "accuracy": on / 2, "data": "x/fmow", "fields": "gsd",
               "settings": {"mask_same_area": bool(on), "queue": 1}} for on in (0, 1)]  # fmt: skip
    text = evaluate.format_table(masked)
    assert "mask_same_area=True, image" in text and "mask_same_area=False, image" in text and "queue" not in text
    with pytest.raises(BadInput, match=r"0 \(checkpoint 0\) and 1 \(checkpoint 1\) are both seed 0 of satmip"):
        evaluate.format_table([{**r, "settings": {}} for r in masked])
    sizes = [{**masked[0], "image_size": size} for size in (224, 256)]
    with pytest.raises(BadInput, match="image_size 224.*image_size 256"):
        evaluate.format_table(sizes)
    free = [{**r, "features": "identity", "fields": f} for r, f in zip(masked, ("gsd", "gsd"))]
    assert "50.0" in evaluate.format_table(free), "no training made it; of the same scored twice the last"
    with pytest.raises(BadInput, match="fields gsd.*fields all"):
        evaluate.format_table([free[0], {**free[1], "fields": "all"}])


@pytest.mark.parametrize("chunk", [None, 7])
def test_ranks_equal_a_loop(chunk):
    """1 + those that are nearer + half of those as near; recall and median of the ranks, both ways."""
    torch.manual_seed(0)
    images, metadata = (F.normalize(torch.randn(30, 4), dim=1) for _ in range(2))
    metadata[20:] = metadata[:10]  # images that share their metadata
    expected = []
    for i, query in enumerate(images.double()):
        similarity = [float(query @ other) for other in metadata.double()]
        nearer = sum(s > similarity[i] + 1e-12 for s in similarity)
        expected.append(1 + nearer + (sum(abs(s - similarity[i]) <= 1e-12 for s in similarity) - 1) / 2)
    assert worst(evaluate.ranks(images, metadata, chunk), expected) == 0
    first, back = evaluate.retrieval({"image": images, "metadata": metadata})
    assert first["features"] == "image to metadata" and back["features"] == "metadata to image"
    assert first["recall_5"] == np.mean(np.array(expected) <= 5)
    assert evaluate.retrieval({"image": images, "metadata": images})[0]["recall_1"] == 1


def test_great_circles():
    """Paris to New York and back, a quarter of the globe, a metre: the haversine's answer."""
    places = np.array([[2.3522, 48.8566], [-74.006, 40.7128], [0, 0], [90, 0], [10, 50], [10, 50 + 1e-5 / 1.11195]])
    points = evaluate.unit_sphere(places)
    found = evaluate.great_circle(points[::2], points[1::2])
    assert worst(found, [5837.2, math.pi / 2 * 6371, 1e-3]) < 1 and abs(found[2] - 1e-3) < 1e-6


def test_answers_of_records():
    """Month and hour where the timestamp says them, the octave of the scale, the place in range."""
    answers = {name: question[1] for name, question in evaluate.QUESTIONS.items()}
    assert [answers["month"](v) for v in ("2004-10", "2004", None, "2004-13")] == [10, None, None, None]
    assert [answers["hour"](v) for v in ("2015-09-21T15:30:08Z", "2015-09-21")] == [15, None]
    assert [answers["gsd"](v) for v in ([0.9, 1.1], 3.1, [0, 1])] == [1.0, 4.0, None]
    assert [answers["place"](v) for v in ([1, 2], [1, 91])] == [(1.0, 2.0), None]


def test_table_of_results():
    """A cell for each kind of features, label and protocol; seeds become mean and deviation; one k is shown."""
    common = {"features": "image", "label": "label_kind", "protocol": "knn"}
    results = [{**common, "seed": s, "accuracy": a, "k": k} for s, a in ((0, 0.5), (1, 0.6)) for k in (1, 20)]
    results.append({**common, "features": "both", "protocol": "linear", "seed": 0, "accuracy": 0.25})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in evaluate.format_table(results).splitlines()]
    assert rows[0] == ["accuracy (%)", "kind kNN k=20", "kind linear"]
    assert rows[2:] == [["image", "55.0 \xb1 7.1", "-"], ["both", "-", "25.0"]]


def made_results() -> list[dict]:
    """What scoring three methods at two lengths, two seeds and two sets of fields might write."""
    results = []
    for method, epochs, seed in itertools.product(("simclr", "satmip", "satmips"), (25, 50), (0, 1)):
        cost = {"simclr": 1.0, "satmip": 0.5, "satmips": 1.25}[method]
        common = {"checkpoint": f"{method} {epochs} {seed}", "method": method, "metadata_encoder": "table"}
        common |= {"epochs": epochs, "epochs_logged": epochs, "seed": seed}
        common |= {"seconds": 10 * cost * epochs, "memory": 2**30 * cost, "data": "d/fmow", "label": "label"}
        common |= {"fields": ("gsd", "location")[seed], "loss_weight": 1.0, "augment": "strong"}
        for features in ("image", "both"):
            score = {"accuracy": 0.9, "macro_f1": 0.5 + 0.1 * seed}
            for k in (5, 20, 100):
                found = score if k == 100 else {"accuracy": 0.1, "macro_f1": 0.1}  # supplement C has 100 on fMoW
                results.append({**common, "features": features, "protocol": "knn", "k": k, **found})
            results.append({**common, "features": features, "protocol": "linear", **score})
        if method != "simclr":
            score = {"features": "both", "protocol": "missing", "accuracy": 0.5, "macro_f1": 0.5}
            results += [{**common, **score, "blanked": 0.5}, {**common, **score, "without": "gsd"}]
        results.append({**common, "features": "image to metadata", "protocol": "retrieval", "recall_1": 0.5})
    return results


def test_tables_of_the_paper():
    """Our scores and costs in the paper's rows, its numbers beside, as they are printed there."""

    results = [r for r in made_results() if r["epochs"] == 25]

    def cells(number: str) -> dict[str, list[str]]:
        text = evaluate.paper_table(results, number)
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        return {row[0]: row[1:] for row in rows}

    with open(evaluate.PAPER_TABLES, encoding="utf-8") as file:
        numbers = {line.split(";")[0] for line in file if line[0] not in "#t"}
    assert numbers == {"2", "3", "4", "5", "6", "S4", "S5", "S6", "S8"} and all(map(cells, numbers))
    two = cells("2")
    names = "fMoW F1,R45,O31,UCM,F23 F1,Euro,So2".split(",")
    assert two["Table 2"] == ["fmow label F1", *(f"paper: {name}" for name in names)]
    assert two["method=satmips"][:3] == ["55.0 \xb1 7.1", "62.3 \xb1 0.0", "89.7 \xb1 0.2"]
    five, six = cells("5"), cells("S6")
    theirs = ["47.1 \xb1 0.2", "53.3 \xb1 0.2", "76.1 \xb1 0.7"]
    assert five["method=satmip fields=location"] == ["60.0", "60.0", *theirs]
    assert five[f"method=satmip fields={','.join(field.name for field in ALL)}"][:2] == ["-", "-"]
    assert cells("S8")["method=satmips"][1:] == ["12.50", "1.25", "1.25", "1.25", "1.05", "1.11"]
    theirs = ["27.8 \xb1 0.1", "27.8 \xb1 0.2"]
    assert six["method=satmip metadata_encoder=table features=metadata"] == ["-", *theirs]
    with pytest.raises(BadInput, match="--paper 7: not one of 2, 3, 4"):
        evaluate.paper_table([], "7")
    with pytest.raises(BadInput, match="simclr 25 0.* and simclr 50 0.* are both seed 0 of method=simclr"):
        evaluate.paper_table(made_results(), "2")
    text = evaluate.format_table(made_results())
    assert "satmips (table), epochs=50, fields=gsd, both" in text and "missing" not in text and "retrieval" not in text


@pytest.mark.parametrize("kind", evaluate.PLOTS)
def test_plots(kind, tmp_path):
    """A picture of each kind; training time is relative to SimCLR's shortest run."""
    results = made_results()
    evaluate.plot([r for r in results if r["epochs"] == 25 or kind == "time"], kind, tmp_path / "x.png")
    assert min(Image.open(tmp_path / "x.png").size) > 300
    if kind != "time":
        with pytest.raises(BadInput, match="both seed 0"):
            evaluate.plot(results, kind, tmp_path / "y.png")
    times = evaluate.relative_times(results)
    assert {times[id(r)] for r in results if r["method"] == "satmip"} == {0.5, 1.0}
    for unfit in ([], [r for r in results if r["method"] != "simclr" and kind == "time"]):
        with pytest.raises(BadInput, match=f"plot {kind}"):
            evaluate.plot(unfit, kind, tmp_path / "y.png")


# -----------------------------------------------------------------------------------------------------
# train


def test_presets():
    """With --data the paper's settings, without it the demo's; what is given overrides both."""
    paper, name = train.parse_config(["--data", "DIR"])
    assert name == "paper table2" and (paper.vit, paper.image_size, paper.batch_size) == ("vit_small", 224, 1024)
    assert (paper.metadata_encoder, paper.metadata_width, paper.epochs) == ("text", 512, 200)
    assert train.parse_config(["--data", "DIR", "--metadata-encoder", "table"])[0].metadata_width == 192
    demo, name = train.parse_config(["--epochs", "3"])
    assert name == "demo table2" and {**dataclasses.asdict(demo), **train.DEMO, "epochs": 3} == dataclasses.asdict(demo)
    table, name = train.parse_config(["--data", "DIR", "--preset", "table6-decoupled", "--epochs", "2"])
    assert name == "paper table6-decoupled"
    assert (table.decouple_views, table.epochs, table.vit) == (True, 2, "vit_small")
    for name in train.PRESETS:
        assert train.parse_config(["--preset", name])[0].image_size == 64


def test_learning_rate():
    """1e-6 at step 0, linear to base_lr x batch / 256 after the warm-up, a cosine to 1e-5 at the end."""
    config = train.Config(base_lr=2.0, batch_size=128, epochs=10, warmup_epochs=2)
    rate = [train.learning_rate(config, step, 5) for step in range(51)]
    last = 1e-5 + (1 - 1e-5) * (1 + math.cos(math.pi * 39 / 40)) / 2
    expected = {0: 1e-6, 5: (1 + 1e-6) / 2, 10: 1.0, 30: (1 + 1e-5) / 2, 49: last, 50: 1e-5}
    assert all(abs(rate[step] - value) < 1e-9 for step, value in expected.items())
    assert rate[:11] == sorted(rate[:11]) and rate[10:] == sorted(rate[10:], reverse=True)


@pytest.mark.parametrize(
    "method, decoupled, count", [("satmip", 0, 1), ("simclr", 0, 2), ("satmips", 0, 2), ("satmips", 1, 3)]
)
def test_views(method, decoupled, count):
    """As many as the method needs, each drawn anew for its view, its epoch and its row; standardised."""
    config, mean, std = (
        train.configure({"method": method, "decouple_views": bool(decoupled), "image_size": 32}),
        [0.5, 0.4, 0.3],
        [0.2, 0.3, 0.4],
    )
    images, rows = images_of(1, 64).expand(1, 4, -1, -1, -1), torch.arange(4)
    views, later = (train.make_views(images, rows, epoch, config, (mean, std)) for epoch in (0, 1))
    assert views.shape == (count, 4, 3, 32, 32)
    every = torch.cat([views, later]).flatten(0, 1)
    assert torch.cdist(every.flatten(1), every.flatten(1)).fill_diagonal_(9).min() > 1
    draws = data.draw(data.POLICIES["strong"], 64, config.seed, 0, rows.numpy(), count - 1)
    plain = views[-1] * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    assert worst(plain, data.augment(images[0], draws, 32)) < 1e-5


METHODS = [("simclr", "none"), *itertools.product(["satmip", "satmips"], ["text", "table"])]
METHODS += [("simclr-geo-tp", "none"), ("satmips-geo-tp", "table"), ("moco", "none"), ("moco-geo-tp", "none")]


@pytest.mark.parametrize("method, encoder", METHODS)
def test_every_method_overfits(method, encoder):
    """Some dozens of steps on 32 samples, and each embedding finds its partner, in every task that the method has."""
    config = train.configure({"method": method, "augment": "crop", "image_size": 32, "vit": "vit_micro"})
    rng = np.random.default_rng(0)
    places = rng.uniform((-180, -80), (180, 80), (32, 2)).tolist()
    records = [{"gsd": 1 + i % 3, "location": place, "timestamp": f"20{i + 10}"} for i, place in enumerate(places)]
    table = data.tabulate(records, DEFAULT, captions=True)
    schema = TableSchema.fit(DEFAULT, table.numbers, table.categories)
    read = data.Metadata(table, encoder, schema if encoder == "table" else list(range(49408)))
    sizes = dict(vocabulary=49408, context=77, numbers=9, categories=(), metadata_width=64)
    m = small_model(encoder, config.image_image, queue=16, places=4 * config.geo, **sizes).train()
    views = train.make_views(images_of(32, 32)[None], torch.arange(32), 0, config, ([0.5] * 3, [0.25] * 3))
    optimizer = torch.optim.AdamW(model.parameter_groups(m, 0.1), lr=0.0, betas=(0.9, 0.98), fused=True)
    scaler, batch = torch.amp.GradScaler("cpu", enabled=False), read.batch(torch.arange(32))
    half = 16 if config.image_image == "moco" else 32  # so that the queue holds the keys of the other half
    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(1, (step + 1) / 30)
        rows = slice(step * half % 32, step * half % 32 + half)
        part = batch_of(views, batch, rows, places=torch.arange(32) % 4)
        logged = train.train_step(m, optimizer, scaler, part, config, None, {})
        accuracies = [value.item() for name, value in logged.items() if name.startswith("accuracy")]
        if min(accuracies) >= 0.9:
            break
    parts = config.metadata_image + config.geo + (config.image_image != "none")
    assert len(accuracies) == parts and min(accuracies) >= 0.9


def test_options_reach_the_loss():
    """--loss-weight is lambda of Eq. 4, --temperature that of Eq. 3, --same-view-negatives its further terms."""
    batch = small_batch(8)
    e = small_model().train()(*batch)
    mi = losses.metadata_image_loss(e.image, e.metadata, e.scale)
    for weight, temperature, same_view in ((1.0, 0.1, False), (0.25, 0.5, False), (2.0, 0.2, True)):
        options = {"loss_weight": weight, "temperature": temperature, "same_view_negatives": same_view}
        ii = losses.image_image_loss(e.first, e.second, temperature, same_view)
        loss, _ = train.compute_losses(e, batch_of(*batch), train.configure(options))
        assert abs(loss - (mi.loss + weight * ii.loss)) < 1e-5


def test_moco():
    """The key encoder follows the queries' by its momentum and learns nothing; keys of the last batches fill the queue,
    the oldest first to go; the loss is against what was there before."""
    config = train.configure({"method": "moco", "vit": "vit_micro", "queue": 256, "key_momentum": 0.75})
    m = small_model("none", "moco", queue=20).train()
    keys, queries = ([*e.parameters(), *h.parameters()] for e, h in (
        (m.key_encoder, m.key_mlp), (m.image_encoder, m.image_mlp)))  # fmt: skip
    assert all(map(torch.equal, keys, queries)) and not any(p.requires_grad for p in keys)
    optimizer, batch = train.make_optimizer(m, dataclasses.replace(config, base_lr=0.1)), small_batch(8)
    optimizer.param_groups[0]["lr"] = 0.1
    assert optimizer.param_groups[0]["momentum"] == 0.9 and optimizer.param_groups[0]["weight_decay"] == 1e-4
    plain = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        queue, before = m.queue.clone(), copy.deepcopy(m)
        logged = train.train_step(m, optimizer, plain, batch_of(*batch), config, None, {})
        earlier = [*before.key_encoder.parameters(), *before.key_mlp.parameters()]
        follow = [0.75 * key + 0.25 * query for key, query in zip(earlier, queries)]
        assert all(worst(key, expected) < 1e-6 for key, expected in zip(keys, follow))
        assert not all(map(torch.equal, queries, [p for p in before.parameters() if p.requires_grad]))
        with torch.no_grad():
            unit = lambda x: F.normalize(x, dim=1)  # noqa: E731
            own = unit(before.key_mlp(before.key_encoder(batch[0][1])))
            query = unit(before.image_mlp(before.image_encoder(batch[0][0])))
        terms = [[math.exp(float(q @ k) / 0.2) for k in (own[i], *queue)] for i, q in enumerate(query)]
        assert abs(logged["loss"] + np.mean([math.log(t[0] / sum(t)) for t in terms])) < 1e-4
        at = [(8 * step + i) % 20 for i in range(8)]
        assert worst(m.queue[at], own) < 1e-5
        left = [i for i in range(20) if i not in at]
        assert torch.equal(m.queue[left], queue[left])
    nothing, state = dataclasses.replace(config, temperature=math.nan), copy.deepcopy(m.state_dict())
    assert train.train_step(m, optimizer, plain, batch_of(*batch), nothing, None, {})["skipped"]
    assert same(dict(m.state_dict()), dict(state)), "what a step that is not finite has found is not kept"


def test_wrong_combinations():
    """What cannot go together is said in one line before anything is read."""
    for options, message in (
        ("--method satmip --temporal", "--temporal: satmip compares no two views"),
        ("--method satmip --no-metadata-image", "nothing is left to learn from"),
        ("--method moco --mask-same-area", "queue keeps no areas"),
        ("--method moco --same-view-negatives", "MoCo has its queue's"),
        ("--method simclr --vit resnet50 --checkpoint-blocks", "resnet50 has none"),
        ("--method moco --queue 32", "--queue 32: shorter than a batch of 64"),
        ("--method simclr --vit resnet50 --micro-batch 8", "--micro-batch: resnet50"),
        ("--method simclr --field-dropout 0.5", "simclr reads no metadata"),
        ("--method satmips --digits 2", "change captions; use --metadata-encoder text"),
        ("--metadata-encoder text --cyclic-features", "changes the table"),
        ("--method moco --vit resnet50 --init x.pt", "--init: weights for resnet50"),
        ("--method simclr --decouple-views", "--decouple-views: simclr has one kind of view"),
    ):
        with pytest.raises(BadInput, match=message):
            train.parse_config(options.split())


def test_methods_are_rows_of_options():
    """Each named method has its parts; a part may be set by itself; MoCo's recipe is its authors'."""
    parts = lambda c: (c.metadata_image, c.image_image, c.geo, c.temporal)  # noqa: E731
    of = lambda text: train.parse_config(["--data", "DIR", *text.split()])[0]  # noqa: E731
    assert parts(of("--method satmips-geo-tp")) == (True, "simclr", True, True)
    assert parts(of("--method simclr --geo")) == parts(of("--method simclr-geo")) == (False, "simclr", True, False)
    assert parts(of("--method satmips-tp --no-temporal --image-image moco")) == (True, "moco", False, False)
    moco = of("--method moco-tp")
    assert (moco.optimizer, moco.base_lr, moco.vit) == ("sgd", 0.03, "resnet50")
    assert (moco.queue, moco.temperature) == (65536, 0.2)
    assert (moco.batch_size, moco.weight_decay, moco.mlp_out, moco.key_momentum) == (256, 1e-4, 128, 0.999)


@pytest.mark.parametrize("encoder", ["text", "table"])
def test_micro_batches_under_autocast(encoder):
    """In bf16, too, the pieces' gradients are the whole batch's, and every parameter has one."""
    config = train.configure({"vit": "vit_micro", "metadata_encoder": encoder})
    views, meta = small_batch(8)
    meta = meta if encoder == "table" else (torch.arange(48).view(8, 6) % 19, torch.tensor([6, 5] * 4))
    found = []
    for micro in (0, 3):
        m, plain = small_model(encoder, vocabulary=20, context=6).train(), torch.amp.GradScaler("cpu", enabled=False)
        c = dataclasses.replace(config, micro_batch=micro)
        train.forward_backward(m, plain, batch_of(views, meta), c, torch.autocast("cpu", torch.bfloat16))
        found.append({name: p.grad for name, p in m.named_parameters()})
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() < 0.03 * gradient.norm() + 1e-4, name


class Numbered(np.ndarray):
    """Row numbers on the host, as a tensor gives them."""

    def numpy(self) -> np.ndarray:
        return np.asarray(self)


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("method, encoder", METHODS)
def test_a_step_on_a_pretended_gpu(method, encoder, micro_batch, monkeypatch):
    """Augmentation, forward in bf16, losses, optimizer, MoCo's upkeep on tensors that know only shape, type, device:
    nothing meets a tensor of another device or asks for a value, which would wait; views are float32."""
    options = {"method": method, "vit": "vit_micro", "image_size": 32, "queue": 256, "optimizer": "adamw"}
    config = dataclasses.replace(train.configure(options), micro_batch=micro_batch)
    m = small_model(encoder, config.image_image, vocabulary=20, context=6, queue=24, places=3 * config.geo)
    gpu, scaler, made, leaves = torch.device("cuda"), torch.amp.GradScaler("cpu", enabled=False), [], []
    rows, take = np.arange(8).view(Numbered), torch.Tensor.requires_grad_

    def backward(*tensors, **options) -> None:  # the engine itself would need the device
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)

    def views(piece: slice) -> torch.Tensor:
        made.append(train.make_views(images[:, piece], rows[piece], 0, config, ([0.5] * 3, [0.2] * 3)))
        return made[-1]

    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "backward", lambda *_: backward())
    with FakeTensorMode(allow_non_fake_inputs=True):
        m = m.to(gpu).train()
        leaves += [p for p in m.parameters() if p.requires_grad]
        monkeypatch.setattr(torch.Tensor, "requires_grad_", lambda x: leaves.append(take(x)) or x)
        images = torch.zeros(1 + config.temporal, 8, 32, 32, 3, dtype=torch.uint8, device=gpu)
        codes = torch.zeros(8, dtype=torch.long, device=gpu)
        text, table = (codes[:, None].expand(8, 6), codes + 6), (images[0, :, 0, :4, 0].float(), codes[:, None])
        batch = train.Batch(views, {"none": (), "text": text, "table": table}[encoder], 8, codes, codes)
        optimizer = train.make_optimizer(m, config)
        logged = train.train_step(m, optimizer, scaler, batch, config, torch.bfloat16, {"stop": 0.0})
    assert {(x.device.type, x.dtype) for x in [*made, *logged.values()]} == {("cuda", torch.float32)}


def test_temperature():
    """exp(logit_scale) starts at 1 / 0.07 as CLIP's and stays within 1 and 100 after every step."""
    m, scaler = small_model().train(), torch.amp.GradScaler("cpu", enabled=False)
    assert abs(m.logit_scale.exp() * 0.07 - 1) < 1e-6
    for before, after in ((9.0, math.log(100)), (-1.0, 0.0)):
        m.logit_scale.data.fill_(before)
        optimizer = torch.optim.SGD(m.parameters(), 1e-6, fused=True)
        train.train_step(m, optimizer, scaler, batch_of(*small_batch(4)), train.configure({}), None, {})
        assert abs(m.logit_scale - after) < 1e-5


def test_a_torn_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """Whatever happens while a checkpoint is written, the file is the old one or the new one."""

    def torn(state, file):
        file.write(b"half")
        raise OSError("disk full")

    path = tmp_path / "checkpoint.pt"
    train.save_checkpoint(path, {"step": 1})
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="disk full.*intact"):
        patch.setattr(torch, "save", torn)
        train.save_checkpoint(path, {"step": 2})
    assert checkpoint(tmp_path) == {"step": 1} and len(list(tmp_path.iterdir())) == 1
    for step in (3, 4, 5):
        train.save_checkpoint(path, {"step": step}, keep=2)
    steps = {p.name: torch.load(p)["step"] for p in tmp_path.iterdir()}
    names = ("checkpoint.pt", "checkpoint.previous.pt", "checkpoint.00000004.pt", "checkpoint.00000005.pt")
    assert steps == dict(zip(names, (5, 4, 4, 5)))


def test_a_step_that_is_not_finite_changes_nothing():
    """Neither weights, nor moments, nor BatchNorm's statistics; what is logged tells which term it was."""
    m, scaler = small_model().train(), torch.amp.GradScaler("cpu", enabled=False)
    optimizer, config = torch.optim.AdamW(m.parameters(), 1e-2, fused=True), train.configure({})
    step = lambda weight: train.train_step(  # noqa: E731
        m, optimizer, scaler, batch_of(*small_batch(8)), dataclasses.replace(config, loss_weight=weight), None, {}
    )
    assert not step(1.0)["skipped"]
    before = copy.deepcopy((m.state_dict(), optimizer.state_dict()))
    logged = step(math.inf)
    assert logged["skipped"] and not logged["loss"].isfinite() and logged["loss_metadata_image"].isfinite()
    assert same((m.state_dict(), optimizer.state_dict()), before)
    meter = train.Meter(torch.device("cpu"))
    for figures in (step(1.0), logged, step(1.0)):
        meter.add(figures, 0.0)
    read = meter.read(torch.device("cpu"), 8)
    assert read["skipped"] == 1 and 0 < read["loss"] < 10 and not same((m.state_dict(), optimizer.state_dict()), before)


def test_too_many_skipped_steps_stop_the_run(dataset, tmp_path):
    """Ten in a row; one line names the term; the log names the files."""
    argv = [*TINY, "--data", dataset, "--output", tmp_path, "--epochs", 4, "--loss-weight", "inf", "--eval-every", 0]
    assert regex.search("loss was not finite in 10 steps in a row.*base-lr", complaint(train.main, *argv))
    skipped = [line for line in json_lines(tmp_path / "log.jsonl") if "not_finite" in line]
    assert [(line["step"], len(line["files"])) for line in skipped] == [(step, 16) for step in range(1, 11)]
    argv = [*TINY, "--data", dataset, "--output", tmp_path / "tp", "--epochs", 4, "--loss-weight", "inf", "--temporal"]
    assert "not finite" in complaint(train.main, *argv, "--eval-every", 0)
    assert len(json_lines(tmp_path / "tp" / "log.jsonl")[0]["files"]) == 32, "and of those that they were compared with"


def test_an_fp16_scale_that_collapses_stops_the_run(dataset, tmp_path):
    """Gradients that overflow are how the scaler finds its scale; below 1 it has found none."""
    world, config = train.World(0, 1, torch.device("cpu")), train.Config(data=str(dataset), output=str(tmp_path))
    material = train.TrainingData(dataclasses.replace(config, batch_size=16, image_size=32, workers=0), world)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    watch = train.Watch(world, material, scaler, [])
    logged = {"loss": torch.tensor(1.0), "gradient": torch.tensor(math.inf)}
    logged |= {"unreadable": torch.tensor(0.0), "stop": torch.tensor(0.0)}
    for step in range(20):
        assert not watch.look(step, logged, {})
    scaler.update(0.5)
    with pytest.raises(BadInput, match="fp16"):
        watch.look()


def test_unreadable_images_are_replaced(dataset, tmp_path):
    """By the same rows in every run, which also give the metadata; counted, listed, and too many stop the run.
    Scores replace nothing."""
    folder = shutil.copytree(dataset, tmp_path / "data")
    (folder / "train" / "04.png").write_bytes(b"")
    os.truncate(folder / "train" / "06.jpg", 400)
    split = data.read_split(folder / "train", DEFAULT)
    results = []
    for workers in (0, 2):
        faults = {}
        ((images, rows, _),) = data.load(split, 32, [torch.arange(2, 8)], workers, faults)
        results.append((images, rows))
        assert faults.keys() == {"04.png", "06.jpg"} and rows[2] != 4 and rows[4] != 6
        for image, row in zip(images, rows.tolist()):
            assert np.array_equal(image, data.load_image(folder / "train" / split.names[row], 32))
    assert same(*results)
    with pytest.raises(BadInput, match="04.png"):
        list(data.load(split, 32, data.in_order(48, 16), 0))
    argv = [*TINY, "--data", folder, "--output", tmp_path / "run", *RUNS["simclr"].split(), "--max-bad", 0.05]
    assert regex.search("04.png|06.jpg", complaint(train.main, *argv)), "of the report, when all is trained and saved"
    assert checkpoint(tmp_path / "run")["step"] == 6
    listed = json_lines(tmp_path / "run" / "quarantine.jsonl")
    assert {entry["file_name"] for entry in listed} == {"04.png", "06.jpg"}
    assert all(entry["file_name"] in entry["reason"] for entry in listed)
    assert [line["unreadable"] for line in json_lines(tmp_path / "run" / "log.jsonl")] == [2, 2]
    said = complaint(train.main, *argv[:-1], 0.03, "--output", tmp_path / "other")
    assert "2 of 48 training images" in said and "--max-bad 0.03" in said and "other/quarantine.jsonl" in said


def bomb(path: Path) -> None:
    """A PNG of some bytes that says it has 10 gigapixels."""
    Image.new("1", (10, 10)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


REFUSED_IMAGES = {
    "bomb.png": (bomb, "100000 x 100000 pixels"),
    "empty.jpg": (Path.touch, "cannot be read as an image"),
    "folder.jpg": (Path.mkdir, "cannot be read as an image"),
    "really-a-png.jpg": (lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"), "holds PNG, its name says JPEG"),
}


@pytest.mark.parametrize("name", REFUSED_IMAGES)
def test_refused_images(name, tmp_path):
    make, message = REFUSED_IMAGES[name]
    make(tmp_path / name)
    with pytest.raises(BadInput, match=regex.escape(str(tmp_path / name)) + ".*" + message):
        data.load_image(tmp_path / name, 32)


REFUSED_LINES = {
    b'{"file_name": "a.png", "gsd": NaN}': "NaN",
    b'{"file_name": "a.png", "gsd": [1, -Infinity]}': "-Infinity",
    b'{"file_name": "a.png", "gsd": 1, "gsd": 2}': "twice",
    b'{"file_name": "a.png", "country_code": "\\ud800"}': "surrogates",
    b'{"file_name": "a\xed\xa0\x80.png"}': "surrogates",
    b'{"file_name": "a\xff.png"}': "decode",
    b'{"file_name": "a.png", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "recursion",
    b'{"file_name": "a.png", "more": "' + b"x" * 2**20 + b'"}': "1,048,",
}


@pytest.mark.parametrize("line", REFUSED_LINES, ids=REFUSED_LINES.values())
def test_refused_lines(line):
    with pytest.raises(BadInput, match="^here: .*" + REFUSED_LINES[line]):
        data.read_record(line, "here")


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, deleted, repeated, moved, or cut off."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 2, 10, 100)))
        tokens = (b'"', b"}", b"[", b"null", b"1e999", b"-", b"\\u", b"\0", b"\n", bytes([rng.randrange(256)]))
        token = rng.choice(tokens)
        content = content[:a] + rng.choice((token, b"", content[a:b] * 2, token + content[a:b])) + content[b:]
        if rng.random() < 0.05:
            content = content[:a]
        content = content or b" "
    return content


def test_a_line_without_end_is_refused_and_the_next_one_read(tmp_path):
    """Three mebibytes without a newline are never held at once; numbers and places of later lines stay right."""
    path, last = tmp_path / "metadata.jsonl", b'{"file_name": "b.jpg"}\n'
    first = b'{"file_name": "a.jpg"}\n'
    path.write_bytes(first + b'{"file_name": "' + b"x" * 3 * 2**20 + b'"}\n' + last)
    (_, _, row), (where, _, problem), (end, offset, found) = data.read_rows(path)
    assert row["file_name"] == "a.jpg" and isinstance(problem, BadInput) and "line 2: a line of more" in str(problem)
    assert found["file_name"] == "b.jpg" and end.endswith("line 3") and offset == path.stat().st_size - len(last)


def test_mutated_metadata_is_read_right_or_refused(dataset, tokenizer):
    """3000 lines: what is accepted is what a strict JSON parser reads, encodes to finite numbers or missing ones, and
    to a caption."""
    rng, lines, accepted = random.Random(0), (dataset / "train" / "metadata.jsonl").read_bytes().splitlines(), 0
    for i in range(3000):
        line = mutate(lines[i % 48], rng)
        try:
            record = data.checked(data.read_record(line, "here"), "here")
        except BadInput as error:
            assert str(error).startswith("here: ") and "\n" not in str(error)
            continue
        accepted += 1
        assert record == metadata.canonical(json.loads(line)) and record["file_name"].encode()
        table = data.tabulate([record], ALL, captions=True)
        assert not np.isinf(table.numbers).any() and table.tokens[0].tolist() == tokenizer(caption(record, ALL))
    assert 200 < accepted < 2800


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of odd tags
def test_mutated_images_are_read_or_refused(tmp_path):
    """2000 files: pixels of the size asked for, or one line that names the file."""
    rng, whole = random.Random(0), {}
    for name, options in {"a.jpg": {}, "b.png": {}, "c.tif": {"compression": "tiff_lzw"}, "d.webp": {}}.items():
        Image.fromarray(images_of(1, 40)[0].numpy()).save(tmp_path / name, **options)
        whole[name] = (tmp_path / name).read_bytes()
    accepted = 0
    for name in list(whole) * 500:
        (tmp_path / name).write_bytes(mutate(whole[name], rng))
        try:
            image = data.load_image(tmp_path / name, 32)
        except BadInput as error:
            assert str(tmp_path / name) in str(error) and "\n" not in str(error)
            continue
        accepted += 1
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert 100 < accepted < 1900


def test_loading_does_not_grow(dataset):
    """6400 samples by a worker: memory of both processes and open files stay where they were after the first 1600."""
    split, sizes = data.read_split(dataset / "train", DEFAULT), []
    for step, _ in enumerate(data.load(split, 32, data.Order(48, 16, 0), 1, steps=range(400))):
        if step in (100, 399):
            (worker,) = multiprocessing.active_children()
            pids = (os.getpid(), worker.pid)
            pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
            sizes.append([*pages, len(os.listdir("/proc/self/fd"))])
    assert all(after - before < 1024 for before, after in zip(*sizes)) and abs(sizes[1][2] - sizes[0][2]) < 8


# -----------------------------------------------------------------------------------------------------
# Whole programs


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_its_results(run, name):
    """Checkpoint, a log line an epoch, scores of every kind of features, pictures; missing values and all."""
    config = checkpoint(run(name))["config"]
    has_metadata, has_views = config["metadata_image"], config["image_image"] != "none"
    files = ["checkpoint.previous.pt", "checkpoint.pt", "log.jsonl", "neighbours.png", "places.png", "results.jsonl"]
    assert sorted(p.name for p in run(name).iterdir()) == [f for f in files if has_metadata or f != "places.png"]
    assert all(min(Image.open(picture).size) > 100 for picture in run(name).glob("*.png"))
    lines, results = json_lines(run(name) / "log.jsonl"), json_lines(run(name) / "results.jsonl")
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    losses_of = {key: has for key, has in zip(("metadata_image", "image_image"), (has_metadata, has_views))}
    assert all((f"loss_{key}" in lines[0]) == has for key, has in (losses_of | {"place": config["geo"]}).items())
    assert len({r["features"] for r in results}) == (6 if has_metadata else 3)
    assert {r["protocol"] for r in results} == {"knn", "linear"} and all(0 <= r["macro_f1"] <= 1 for r in results)
    assert {(r["train"], r["test"]) for r in results} == {(43, 15)}, "rows with a label"


@pytest.mark.parametrize("name", ["simclr", "table"])
def test_checkpoints_are_plain(run, dataset, name):
    """weights_only=True loads them: tensors and plain types, with the training split's statistics and schema."""
    state = checkpoint(run(name))

    def kinds(value) -> set[str]:
        parts = value if isinstance(value, (list, tuple)) else []
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else parts
        return {type(value).__name__}.union(*map(kinds, parts))

    assert kinds(state) <= set("dict OrderedDict list tuple str int float bool NoneType Tensor".split())
    fields = parse_fields(state["config"]["fields"])
    assert state["fields"] == [dataclasses.asdict(field) for field in fields]
    split = data.read_split(dataset / "train", fields)
    assert (state["channel_mean"], state["channel_std"]) == data.channel_statistics(split, 32, 0) and state["step"] == 6
    rates = [(group["lr"], group["weight_decay"]) for group in state["optimizer"]["param_groups"]]
    last = train.learning_rate(train.Config(**state["config"]), 5, 3)
    assert rates == [(last, 0.1), (last, 0.0)], "the optimizer's, in the last step"
    schema = TableSchema.fit(fields, split.table.numbers, split.table.categories)
    assert state["schema"] == (dataclasses.asdict(schema) if name == "table" else None)


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """What two runs have in common if they computed the same: checkpoint and log, without times and free options."""
    state = checkpoint(folder)
    for key in ("waited", "seconds"):
        del state["epoch_so_far"][key]
    state["config"] = {key: value for key, value in state["config"].items() if key not in train.FREE}
    timings = {"images_per_second", "wait", "seconds", "memory"}
    log = json_lines(folder / "log.jsonl")
    return state, [{key: value for key, value in line.items() if key not in timings} for line in log]


def stop_at(step: int, number: int):
    """train_step, but it raises this signal in this step."""
    count, original = itertools.count(), train.train_step

    def replaced(*args, **more):
        if next(count) == step:
            signal.raise_signal(number)
        return original(*args, **more)

    return replaced


@pytest.mark.parametrize(
    "name, workers", [("simclr", 0), ("satmip", 2), ("table", 2), ("geo", 0), ("varied", 2), ("moco", 0)]
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(run, dataset, tmp_path, monkeypatch, capsys, name, workers):
    """Killed in the middle of the first epoch, told to stop in the second: the same weights, optimizer and log, bit
    by bit, and statuses that say what happened."""
    argv = [*TINY, "--data", str(dataset), "--output", str(tmp_path), *RUNS[name].split(), "--save-every", "2"]
    argv += ["--workers", str(workers)]
    ends = ((2, signal.SIGINT, 130, 2), (0, signal.SIGTERM, 75, 4), (0, signal.SIGUSR1, 75, 6))
    for step, number, status, saved in ends:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(train, "train_step", stop_at(step, number))
            train.main(argv)
        assert (stopped.value.code, checkpoint(tmp_path)["step"]) == (status, saved)
        assert ("told to stop: saved after" if status == 75 else "interrupted") in capsys.readouterr().out
    train.main(argv)
    assert all(map(same, outcome(tmp_path), outcome(run(name))))


def damage(change):
    return lambda path: path.write_bytes(change(bytearray(path.read_bytes())))


def flip(content: bytearray) -> bytearray:
    """One bit, in the middle of some tensor."""
    content[len(content) // 2] ^= 4
    return content


DAMAGE = {  # what happened to checkpoint.pt: how, what the program says of it
    "torn": (damage(lambda content: content[: len(content) // 2]), "torn, or not a checkpoint"),
    "truncated": (damage(lambda content: content[:-1]), "torn, or not a checkpoint"),
    "bit-flipped": (damage(flip), "damaged (the checksum"),
    "empty": (damage(lambda content: b""), "torn, or not a checkpoint"),
    "foreign": (damage(lambda content: b"hello"), "torn, or not a checkpoint"),
    "foreign tensors": (lambda path: torch.save({"model": torch.ones(3)}, path), "it has no"),
    "missing": (Path.unlink, "no such file"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, dataset, tmp_path, capsys, what):
    """One line says so, the run ends as it would have, the damaged file stays; and nothing is trained anew when the
    one before is gone, too."""
    change, message = DAMAGE[what]
    folder = shutil.copytree(run("simclr"), tmp_path / "run")
    argv = [*TINY, "--data", str(dataset), "--output", str(folder), *RUNS["simclr"].split()]
    change(folder / "checkpoint.pt")
    train.main(argv)
    assert message in capsys.readouterr().out and (folder / "checkpoint.damaged.pt").exists() == (what != "missing")
    assert all(map(same, outcome(folder), outcome(run("simclr"))))
    if what != "missing":
        (folder / "checkpoint.previous.pt").unlink()
        change(folder / "checkpoint.pt")
        assert message in complaint(train.main, *argv)


def test_no_flipped_bit_passes_for_weights(tmp_path):
    """Anywhere in the file: it is refused, or of no consequence. (torch.load alone would take most of them.)"""
    path, rng = tmp_path / "checkpoint.pt", random.Random(0)
    state = dict.fromkeys(("model_config", "fields", "schema", "config", "step"), 1) | {"model": torch.randn(2000)}
    train.save_checkpoint(path, state)
    content, refused = path.read_bytes(), 0
    for _ in range(500):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(evaluate.read_checkpoint(path), state)
        except BadInput:
            refused += 1
    assert refused > 400


def test_a_full_disk_leaves_the_old_checkpoint(run, dataset, tmp_path):
    """And so does a folder that cannot be written; here the limit on a file's size plays the full disk."""
    argv = [*TINY, "--data", dataset, "--output", tmp_path, *RUNS["simclr"].split(), "--save-every", 1]
    shutil.copy(run("simclr") / "checkpoint.previous.pt", tmp_path / "checkpoint.pt")
    before, (soft, hard) = (tmp_path / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        assert "checkpoint.pt: cannot be written" in complaint(train.main, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and not list(tmp_path.glob("*.unfinished"))
    (tmp_path / "file").touch()
    assert "Not a directory" in complaint(train.main, *argv, "--output", tmp_path / "file" / "run")


def real(argvs: list[list[str]], env: dict, fault) -> None:
    """What a process of its own does: `fault` spoils something, then train.py runs once for each argv."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # workers are its own, as in a program started by hand
    os.environ.update(env)
    sys.stdout = sys.stderr = open(env["SAID"], "a")
    torch.set_num_threads(1)
    if fault:
        fault()
    for argv in argvs:
        train.main(argv)


def start(folder: Path, *argvs: list, world: int = 1, fault=None) -> list[multiprocessing.Process]:
    """Training as `world` processes, forked from one that has imported everything; what rank r says is in said-r."""
    multiprocessing.set_forkserver_preload(["test_all"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in map(str, range(world)):
        env = {"SAID": str(folder / f"said-{rank}"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if world > 1:
            env |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        argvs = [list(map(str, argv)) for argv in argvs]
        processes.append(multiprocessing.get_context("forkserver").Process(target=real, args=(argvs, env, fault)))
        processes[-1].start()
    return processes


def codes(processes: list, timeout: float = 120) -> list[int]:
    """Exit codes, negative for signals."""
    for process in processes:
        process.join(timeout)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung
    return [process.exitcode for process in processes]


class DieWhileSaving:
    """SIGKILL in the n-th of the calls that write a file: before the flush, before either renaming, after."""

    def __init__(self, n: int):
        self.n = n

    def __call__(self) -> None:
        for owner, name in ((os, "fsync"), (Path, "replace")):
            setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, original):
        def replaced(*args):
            self.n -= 1
            if self.n < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        return replaced


def test_killed_again_and_again(run, dataset, tmp_path):
    """SIGKILL at random moments and in the middle of saves: what is there in the end is what an undisturbed run
    leaves, log and scores included, and there is never half a line. KILLS=20 is the long form."""
    rng, kills, undisturbed = random.Random(0), 0, run("table")
    argv = [*TINY, "--data", dataset, "--output", tmp_path / "run", *RUNS["table"].split(), "--save-every", 1]
    while kills < int(os.environ.get("KILLS", "3")):
        while_saving = kills % 2 == 0
        (process,) = start(tmp_path, argv, fault=DieWhileSaving(rng.randrange(20)) if while_saving else None)
        process.join(120 if while_saving else rng.uniform(0.2, 3))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
        else:  # it was done before
            assert process.exitcode == 0 and all(map(same, outcome(tmp_path / "run"), outcome(undisturbed)))
            shutil.rmtree(tmp_path / "run")
        for log in tmp_path.glob("run/log.jsonl"):
            json_lines(log)
    assert codes(start(tmp_path, argv)) == [0]
    assert all(map(same, outcome(tmp_path / "run"), outcome(undisturbed)))
    ours, theirs = (json_lines(folder / "results.jsonl") for folder in (tmp_path / "run", undisturbed))
    for result in ours + theirs:
        del result["checkpoint"], result["seconds"], result["memory"]
    assert ours == theirs


def sleep_in_step_two() -> None:
    count, original = itertools.count(), train.train_step

    def replaced(*args, **more):
        if next(count) == 2:
            print("asleep", flush=True)
            time.sleep(60)
        return original(*args, **more)

    train.train_step = replaced


def parent(stat: Path) -> int | None:
    """Of a process, by its /proc/PID/stat; None if it has ended meanwhile."""
    with contextlib.suppress(OSError):
        return int(stat.read_text().rsplit(")", 1)[1].split()[1])


def test_signals_to_a_real_process(dataset, tmp_path):
    """Two SIGTERM: at once, without saving. Ctrl-C: no worker stays. A killed worker: one line. The second is sent
    to the whole session, as a terminal does."""
    argv = [*TINY, *RUNS["simclr"].split(), "--workers", 2, "--epochs", 9]
    argv += ["--data", dataset, "--output", tmp_path / "run"]
    for case, code in {"twice": 143, "interrupt": 130, "worker": 1}.items():
        (process,) = start(tmp_path, argv, fault=sleep_in_step_two)
        said = tmp_path / "said-0"
        while not (said.exists() and "asleep" in said.read_text()):
            assert process.is_alive() and time.sleep(0.05) is None
        workers = [stat.parent.name for stat in Path("/proc").glob("[0-9]*/stat") if parent(stat) == process.pid]
        assert len(workers) == 2
        if case == "twice":
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(1.2)
            os.kill(process.pid, signal.SIGTERM)
        elif case == "interrupt":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(int(workers[0]), signal.SIGKILL)
        assert codes([process], 10) == [code], said.read_text()
        if case != "twice":  # these see by themselves that they are alone, within 5 seconds
            assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
            assert ("interrupted" if case == "interrupt" else "error: a worker was killed") in said.read_text()
        assert "Traceback" not in said.read_text() and not (tmp_path / "run" / "checkpoint.pt").exists()
        said.unlink()


class InStep:
    """In this step, this rank does something to itself; once only, if there is a marker to leave."""

    def __init__(self, step: int, rank: str, what: str, marker: Path | None = None):
        self.step, self.rank, self.what, self.marker = step, rank, what, marker

    def __call__(self) -> None:
        count, original = itertools.count(), train.compute_losses

        def replaced(*args):
            loss, logged = original(*args)
            if next(count) == self.step and os.environ["RANK"] == self.rank:
                if self.what == "die" and not (self.marker and self.marker.exists()):
                    if self.marker:
                        self.marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.what == "terminate":
                    os.kill(os.getpid(), signal.SIGTERM)
                if self.what == "nan":
                    return loss * nan, logged | {"loss": loss * nan}
            return loss, logged

        train.compute_losses = replaced


def test_two_processes_act_as_one(run, dataset, tmp_path):
    """One killed: the other ends. One told to stop: both do, after the same step. One meets a NaN: neither takes the
    step. And started again, on as many or on another number: the same bits, or the same data."""
    argv = [*TINY, "--data", dataset, *RUNS["table"].split(), "--save-every", 1, "--output"]
    assert codes(start(tmp_path, [*argv, tmp_path / "whole"], world=2)) == [0, 0]
    stopped = codes(start(tmp_path, [*argv, tmp_path / "run"], world=2, fault=InStep(3, "1", "die")), 60)
    assert stopped[1] == -signal.SIGKILL and stopped[0] > 0 and 1 <= checkpoint(tmp_path / "run")["step"] <= 4
    stop = start(tmp_path, [*argv, tmp_path / "run"], world=2, fault=InStep(0, "1", "terminate"))
    assert codes(stop) == [75, 75] and "told to stop" in (tmp_path / "said-0").read_text()
    alone = shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert codes(start(tmp_path, [*argv, tmp_path / "run"], world=2)) == [0, 0]
    assert all(map(same, outcome(tmp_path / "run"), outcome(tmp_path / "whole")))
    assert codes(start(tmp_path, [*argv, alone], [*argv, tmp_path / "one"])) == [0]
    assert "on 1 processes, before on 2: same data" in (tmp_path / "said-0").read_text()
    for ours, theirs in zip(json_lines(alone / "log.jsonl"), json_lines(tmp_path / "one" / "log.jsonl"), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-3
    assert codes(start(tmp_path, [*argv, tmp_path / "nan"], world=2, fault=InStep(4, "1", "nan"))) == [0, 0]
    skip, *epochs = json_lines(tmp_path / "nan" / "log.jsonl")[1:]
    rows = data.Order(48, 16, 0)[4].tolist()
    names = [record["file_name"] for record in json_lines(dataset / "train" / "metadata.jsonl")]
    assert skip == {"step": 5, "not_finite": ["loss", "gradient"], "files": [names[row] for row in rows]}
    assert [line["skipped"] for line in epochs] == [1]
    assert all(value.isfinite().all() for value in checkpoint(tmp_path / "nan")["model"].values())


def test_torchrun_restarts(run, dataset, tmp_path):
    """A rank that is killed once: --max-restarts picks up from the last checkpoint."""
    (tmp_path / "program.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport test_all, train\nfrom pathlib import Path\n"
        "test_all.InStep(4, '1', 'die', Path('died'))()\ntrain.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    argv = [*TINY, "--data", str(dataset), *RUNS["simclr"].split(), "--save-every", "1", "--output", "run"]
    done = subprocess.run([*command, "program.py", *argv], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and (tmp_path / "died").exists(), done.stderr
    assert "resumed run/checkpoint.pt after step" in done.stdout
    for ours, theirs in zip(*(json_lines(f / "log.jsonl") for f in (tmp_path / "run", run("simclr"))), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-4


@pytest.mark.parametrize("world", [2, 4])
def test_processes_have_one_loss_curve(world, tmp_path):
    """Every method, the same global batch, 20 steps: the losses of one process within 1e-4."""
    multiprocessing.set_forkserver_preload(["test_all"])
    mp.start_processes(write_curves, (world, str(tmp_path)), nprocs=world, start_method="forkserver")
    for (method, encoder), curve in json.loads((tmp_path / "curves").read_text()):
        alone = loss_curve_alone(method, encoder)
        assert len(alone) == 20 and max(alone) - alone[-1] > 0.1 and worst(curve, alone) < 1e-4, (method, encoder)


def loss_curve(rank: int, world: int, method: str, encoder: str) -> list[float]:
    """train_step on this process's rows of a batch of 8, 20 times, with DistributedDataParallel where it is asked."""
    config = train.configure({"method": method, "vit": "vit_micro", "queue": 256})
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    m = small_model(encoder, config.image_image, vocabulary=20, context=6, queue=24, places=3 * config.geo).train()
    network = torch.nn.parallel.DistributedDataParallel(m, broadcast_buffers=False) if dist.is_initialized() else m
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 3e-4, fused=True)
    views, meta = small_batch(8, 1 if method == "satmip" else 2)
    if encoder == "text":
        meta = torch.arange(48).view(8, 6) % 19, torch.tensor([6, 5] * 4)
    batch = batch_of(views, meta, rows, places=torch.arange(8) % 3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = lambda: train.train_step(network, optimizer, scaler, batch, config, None, {})  # noqa: E731
    return [step()["loss"].item() for _ in range(20)]


@functools.cache
def loss_curve_alone(method: str, encoder: str) -> list[float]:
    return loss_curve(0, 1, method, encoder)


def write_curves(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    curves = [((method, encoder), loss_curve(rank, world, method, encoder)) for method, encoder in METHODS]
    if rank == 0:
        Path(folder, "curves").write_text(json.dumps(curves))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_cost_report(dataset, tmp_path, world, capsys):
    """A table for the machine, for each part of a step, and for each method beside SimCLR; the same as JSON lines."""
    argv = ["--benchmark", "--benchmark-rounds", "1", *TINY, "--output", str(tmp_path / "cost.jsonl")]
    if world == 1:
        train.main(argv)
        said = capsys.readouterr().out
    else:
        argv += ["--decouple-views", "--method", "satmips", "--checkpoint-blocks", "--data", dataset]
        assert codes(start(tmp_path, argv, world=world)) == [0] * world
        said = (tmp_path / "said-0").read_text()
    lines = json_lines(tmp_path / "cost.jsonl")
    names = ["simclr", "satmip (text)", "satmip (table)", "satmips (text)", "satmips (table)"]
    assert [line["method"] for line in lines] == names and all(said.count(f"\n| {name} ") == 2 for name in names)
    assert "Error" not in said and "Warning" not in said, said
    for line in lines:
        communication, step = line["ms"].pop("communication"), line["ms"].pop("step")
        assert (communication != 0) == (world == 2) and min(line["ms"].values()) > 0
        assert 0.5 * step < sum(line["ms"].values()) - line["ms"]["wait"] <= 1.001 * step, "of one round they add up"
        assert 0 < line["GiB"] < 8 and line["machine"]["processes"] == world
    whole = json_lines(tmp_path / "cost.jsonl")
    other = [line | {"config": line["config"] | {"batch_size": 99}} for line in whole]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole + other))
    for name in ("two", "cost"):
        argv = ["plot", "cost", str(tmp_path / f"{name}.jsonl"), "--output", str(tmp_path / "x.png")]
        if name == "two":
            evaluate.main(argv)
            assert min(Image.open(tmp_path / "x.png").size) > 300
        else:
            assert "nothing varies" in complaint(evaluate.main, *argv)
    # 5 tokens of width 128 in 4 blocks, the last for one of them; the gradient costs twice, but images have none
    patches, head = 2 * 4 * 768 * 128, 2 * (128 * 64 + 64 * 64 + 64 * 256)
    blocks = 3 * 2 * (5 * 12 * 128**2 + 2 * 5 * 5 * 128) + 2 * ((5 * 2 + 10) * 128**2 + 2 * 5 * 128)
    losses_ = 2 * 2 * 2 * 256 * world  # of 2 local rows against all
    assert round(lines[0]["GFLOP a sample"] * 1e9) == 2 * (2 * patches + 3 * blocks + 3 * head) + 3 * losses_
    assert [lines[0][key] for key in ("time", "memory")] == [1, 1]
    more = (lines[4]["GFLOP a sample"] - lines[2]["GFLOP a sample"]) * 1e9 - 6 * head
    assert abs(more / (2 * patches + 3 * blocks) - world) < 0.05, "beyond SatMIP's view: one, or two when decoupled"


@pytest.mark.parametrize("name", ["simclr", "satmips", "geo", "moco"])
def test_torchrun_equals_one_process(run, dataset, tmp_path, name):
    """Two processes with half the batch each: the same losses and, where gradients are not mere noise, weights."""
    argv = [*TINY, "--data", str(dataset), "--output", str(tmp_path), *RUNS[name].split()]
    if name == "satmips":  # as a user starts it; the others by processes that need not import everything again
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run([*torchrun, HERE / "train.py", *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        assert codes(start(tmp_path, argv, world=2)) == [0, 0]
    for ours, theirs in zip(*(json_lines(folder / "log.jsonl") for folder in (tmp_path, run(name))), strict=True):
        assert all(abs(ours[key] - theirs[key]) < 1e-4 for key in theirs if key.startswith(("loss", "accuracy")))
    ours, theirs = checkpoint(tmp_path), checkpoint(run(name))
    torch.manual_seed(0)
    untrained = model.SatMIP(model.ModelConfig(**ours["model_config"])).state_dict()
    for key, value in theirs["model"].items():
        if value.ndim > 1:  # biases before a norm have no gradient: Adam steps with its noise
            assert worst(ours["model"][key], value) < min(1e-4, 0.1 * worst(untrained[key], value)), key


@pytest.mark.parametrize(
    "name, modality", [*itertools.product(["satmips", "table"], ["metadata", "both"]), ("simclr", "image")]
)
@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_evaluate(run, name, modality, protocol, tmp_path, capsys):
    """A table on the screen, a JSON line a result; the scores are those of the report at the end of training."""
    path = tmp_path / "results.jsonl"
    argv = ["--checkpoint", str(run(name) / "checkpoint.pt"), "--workers", "0", "--output", str(path)]
    argv += ["--modality", modality, "--protocol", protocol]
    evaluate.main(argv)
    evaluate.main([*argv, "--label", "label_kind"])
    lines = json_lines(path)
    once = lines[: len(lines) // 2]
    assert lines == once + once, "appended; the label asked for is the only one"
    assert {line["features"] for line in lines} == {modality} | ({"location only"} if name != "simclr" else set())
    score = lambda r: (r["protocol"], r.get("k"), r["accuracy"], r["macro_f1"])  # noqa: E731
    report = [r for r in json_lines(run(name) / "results.jsonl") if r["protocol"] == protocol]
    theirs = [score(r) for r in report if r["features"] == modality]
    assert [score(r) for r in once if r["features"] == modality] == theirs
    assert "accuracy (%)" in capsys.readouterr().out


def test_evaluate_at_another_image_size(run, tmp_path, capsys):
    """Positions are interpolated; the result files of several runs make one table."""
    for name in ("simclr", "satmip"):
        path = tmp_path / f"{name}.jsonl"
        argv = ["--checkpoint", str(run(name) / "checkpoint.pt"), "--workers", "0", "--output", str(path)]
        evaluate.main([*argv, "--image-size", "48"])
        assert {line["image_size"] for line in json_lines(path)} == {48}
    capsys.readouterr()
    evaluate.main(["--table", *map(str, tmp_path.iterdir())])
    assert "kind kNN k=20" in capsys.readouterr().out


def test_training_starts_from_given_weights(run, dataset, tmp_path, capsys):
    """--init: the image encoder is the file's, said on the screen; a file of another source is refused."""
    start = run("simclr") / "checkpoint.pt"
    argv = [*TINY, "--data", str(dataset), "--output", str(tmp_path), "--epochs", "1", "--base-lr", "1e-9"]
    train.main([*argv, *RUNS["satmip"].split(), "--init", str(start)])  # the rate is next to nothing
    ours, theirs = checkpoint(tmp_path)["model"], checkpoint(run("simclr"))["model"]
    names = [name for name in theirs if name.startswith("image_encoder.")]
    assert len(names) == 54 and all(worst(ours[name], theirs[name]) < 1e-4 for name in names)
    assert "loaded 54 tensors" in capsys.readouterr().out
    assert "not slip weights" in complaint(
        train.main, *argv, "--output", tmp_path / "x", "--init", start, "--init-source", "slip"
    )


def test_evaluate_weights_of_others(dataset, tmp_path, capsys):
    """Size from the file, heads from the source, statistics the source's; what was loaded is printed."""
    vit = randomise(model.ViT(32, 16, *model.VITS["vit_micro"]))
    path = foreign_file(tmp_path / "x.pt", "slip", vit)
    argv = ["--weights", str(path), "--source", "slip", "--data", str(dataset), "--image-size", "32", "--workers", "0"]
    assert "width 128, 4 layers, 2 heads" in complaint(evaluate.main, *argv)
    evaluate.main([*argv, "--heads", "4", "--output", str(tmp_path / "out.jsonl")])
    assert "loaded 54 tensors" in capsys.readouterr().out
    found = json_lines(tmp_path / "out.jsonl")
    assert {(r["method"], r["vit"], r["heads"]) for r in found} == {("slip", "vit_micro", 4)}
    pretrained = evaluate.load_foreign(path, "slip", 4, 1.0, 32, torch.device("cpu"))
    split = data.read_split(dataset / "test", DEFAULT)
    images = torch.from_numpy(np.stack([data.load_image(split.folder / name, 32) for name in split.names]))
    found = evaluate.extract(pretrained, split, pretrained.statistics, "image", 32, 0)["image"]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert worst(found, vit((images.permute(0, 3, 1, 2) / 255 - mean) / std)) < 1e-4


def test_evaluate_many_at_once(run, dataset, tmp_path, capsys):
    """Checkpoints x datasets x protocols x modalities, with baselines; a dataset may lack fields of the training."""
    bare, whole = (shutil.copytree(dataset, tmp_path / name) for name in ("bare", "whole"))
    for folder, split in itertools.product((bare, whole), ("train", "test")):
        path = folder / split / "metadata.jsonl"
        records = [r | {"area": f"{i % 4}{i % 8 > 3}"} for i, r in enumerate(json_lines(path))]  # 8 areas, of one kind
        kept = ("file_name", "gsd", "location", "label_kind") if folder == bare else records[0].keys()  # as EuroSAT has
        path.write_text("".join(json.dumps({key: r[key] for key in kept if key in r}) + "\n" for r in records))
    argv = ["--checkpoint", *(str(run(name) / "checkpoint.pt") for name in ("table", "simclr"))]
    argv += ["--data", str(whole), str(bare), "--protocol", "knn", "linear", "finetune", "--modality", "image", "both"]
    argv += ["--finetune-epochs", "1"]
    argv += ["--baselines", "random", "identity", "location", "--average-areas", "--workers", "0"]
    evaluate.main([*argv, "--intervals", "--output", str(tmp_path / "out.jsonl")])
    results = json_lines(tmp_path / "out.jsonl")
    features = {"image", "both", "identity", "location only", "image, random weights", "both, random weights"}
    with_metadata = {(r["features"], r["data"]) for r in results if r["method"] == "satmips"}
    assert with_metadata == set(itertools.product(features, (str(whole), str(bare))))
    assert {r["features"] for r in results if r["method"] == "simclr"} == {"image", "image, random weights"}
    assert {(r["averaged"], r["test"]) for r in results if r["data"] == str(whole)} == {("area", 8)}
    assert {r["test"] for r in results if r["data"] == str(bare)} == {15}, "no areas there: each image counts alone"
    assert all(r["seconds"] > 0 and r["memory"] > 0 and r["epochs"] == 2 for r in results)
    assert all(low <= r["accuracy"] <= high for r in results for low, high in [r["accuracy_interval"]])
    assert "by area" in capsys.readouterr().out


def test_export_and_its_resumption(run, dataset, tmp_path, monkeypatch):
    """The encoder gives the same features elsewhere; killed midway and started again, they are the same bytes."""
    argv = ["--data", str(dataset), "--modality", "image", "metadata", "--batch-size", "7", "--workers", "0"]
    start, whole, broken = str(run("table") / "checkpoint.pt"), tmp_path / "whole", tmp_path / "broken"
    evaluate.main(["export", start, str(whole), *argv])
    load = data.load
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop = lambda i, batch: batch if i < 3 else signal.raise_signal(signal.SIGINT)  # noqa: E731
        batches = lambda *args: itertools.starmap(stop, enumerate(load(*args)))  # noqa: E731
        statistics = data.channel_statistics(data.read_split(dataset / "train", ALL), 32, 0)
        patch.setattr(data, "channel_statistics", lambda *args: statistics)
        patch.setattr(data, "load", batches)
        evaluate.main(["export", start, str(broken), *argv])
    unfinished = broken / "train.image.npy.unfinished"
    assert 21 <= (unfinished.stat().st_size - 128) / 512 < 22, "three batches of 7 rows"
    os.truncate(unfinished, unfinished.stat().st_size - 100)  # torn in the middle of a row
    evaluate.main(["export", start, str(broken), *argv])
    files = [f"{split}.{kind}" for split in ("train", "test") for kind in ("image.npy", "metadata.npy", "ids.json")]
    assert sorted(p.name for p in broken.iterdir()) == sorted(["encoder.json", "encoder.pt", *files])
    assert all((whole / name).read_bytes() == (broken / name).read_bytes() for name in files)

    about, names = json.loads((whole / "encoder.json").read_text()), json.loads((whole / "test.ids.json").read_text())
    made, size = about["timm"]["arguments"], about["timm"]["arguments"]["img_size"]
    vit = model.ViT(size, made["patch_size"], made["embed_dim"], made["depth"], about["heads"])
    vit.load_state_dict(torch.load(whole / "encoder.pt", weights_only=True))
    images = torch.from_numpy(np.stack([data.load_image(dataset / "test" / name, size) for name in names]))
    x = data.standardise(data.plain(images), about["features"]["mean"], about["features"]["std"])
    assert worst(vit(x), np.load(whole / "test.image.npy")) < 1e-4
    other = str(run("simclr") / "checkpoint.pt")
    assert "another checkpoint" in complaint(evaluate.main, "export", other, whole, "--data", dataset, "--workers", 0)
    assert "no metadata encoder" in complaint(evaluate.main, "export", other, tmp_path / "x", "--modality", "metadata")


def test_export_of_resnet50(run, dataset, tmp_path):
    """torchvision's own network takes the weights, all but the classifier's, and gives the same features."""
    evaluate.main(
        ["export", str(run("resnet") / "checkpoint.pt"), str(tmp_path), "--data", str(dataset), "--workers", "0"]
    )
    network = resnet50()
    missing, unexpected = network.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    network.fc, about = torch.nn.Identity(), json.loads((tmp_path / "encoder.json").read_text())
    names = json.loads((tmp_path / "test.ids.json").read_text())
    images = torch.from_numpy(np.stack([data.load_image(dataset / "test" / name, 32) for name in names]))
    x = data.standardise(data.plain(images), about["features"]["mean"], about["features"]["std"])
    assert worst(network.eval()(x), np.load(tmp_path / "test.image.npy")) < 1e-3


@pytest.mark.parametrize("name", ["satmips", "table"])
def test_protocols_of_both_encoders(run, dataset, name, tmp_path, capsys):
    """Retrieval, questions, missing fields, leakage: what they find is what a slow hand finds."""
    argv = ["--checkpoint", str(run(name) / "checkpoint.pt"), "--workers", "0"]
    argv += ["--output", str(tmp_path / "out.jsonl"), "--places", str(tmp_path / "places.png")]
    argv += ["--map", str(tmp_path / "map.png"), "--posteriors", str(tmp_path / "ask.npz")]
    evaluate.main([*argv, "--protocol", "retrieval", "ask", "missing", "leakage", "linear", "--modality", "both"])
    results = {p: [r for r in json_lines(tmp_path / "out.jsonl") if r["protocol"] == p] for p in evaluate.PROTOCOLS}
    assert all(min(Image.open(picture).size) > 100 for picture in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 2 and "median_rank" in capsys.readouterr().out
    country = {"country"} if name == "table" else set()
    assert {r["label"] for r in results["ask"]} == {"month", "hour", "gsd", "place"} | country
    pretrained, state = evaluate.load_pretrained(run(name) / "checkpoint.pt", torch.device("cpu"))
    splits = data.read_dataset(dataset, pretrained.fields, captions=True)
    statistics = state["channel_mean"], state["channel_std"]
    features = evaluate.extract(pretrained, splits[1], statistics, "both", 32, 0)

    # months, by hand: softmax over single-field records, added up by month
    months = [v for i in range(48) if (v := splits[0].record(i).get("timestamp")) and parse_timestamp(v)]
    table = data.tabulate(({"timestamp": v} for v in months), pretrained.fields, True)
    gallery = pretrained.model.metadata_encoder(*pretrained.metadata(table).batch(torch.arange(len(months))))
    gallery = F.normalize(pretrained.model.metadata_projection(gallery), dim=1)
    right, stored = [], np.load(tmp_path / "ask.npz")
    for i in range(16):
        truth, sums = parse_timestamp(splits[1].record(i).get("timestamp")), np.zeros(13)
        image = F.normalize(pretrained.model.image_projection(features["image"][i]), dim=0)
        for value, p in zip(months, (gallery @ image * pretrained.model.logit_scale.exp()).softmax(0).tolist()):
            sums[int(parse_timestamp(value)[1])] += p
        right += [sums.argmax() == truth[1]] if truth else []
        if truth:  # of each image: the posterior that was written
            assert stored["month.ids"][len(right) - 1] == splits[1].names[i]
            assert worst(stored["month.probabilities"][len(right) - 1], sums[stored["month.classes"]]) < 1e-5
    places = [stored[f"place.{key}"] for key in ("ids", "classes", "probabilities")]
    assert places[1].shape[1] == 2 and places[2].shape == (len(places[0]), len(places[1]))
    month = next(r for r in results["ask"] if r["label"] == "month")
    assert abs(month["accuracy"] - np.mean(right)) < 1e-9 and month["test"] == len(right)

    # nothing blanked is the probe itself; all blanked is one answer to each image, and no field left out is none
    missing = {r.get("blanked", r.get("without")): r for r in results["missing"]}
    assert list(missing) == [0, 0.25, 0.5, 0.75, 1, *(f.name for f in pretrained.fields)]
    both = next(r for r in results["linear"] if r["features"] == "both")
    assert missing[0]["accuracy"] == both["accuracy"] and missing[0]["macro_f1"] == both["macro_f1"]

    # distances, by hand
    places = [[evaluate.QUESTIONS["place"][1](s.record(i).get("location")) for i in range(len(s))] for s in splits]
    train = [p for p in places[0] if p]
    sphere = lambda place: evaluate.unit_sphere(np.array([place]))[0]  # noqa: E731
    to = lambda a, b: float(evaluate.great_circle(sphere(a), sphere(b)))  # noqa: E731
    km = [min(to(p, q) for q in train) for i, p in enumerate(places[1]) if p and splits[1].record(i).get("label_kind")]
    assert sum(r["test"] for r in results["leakage"]) == len(km) and len(results["leakage"]) == 4
    assert abs(results["leakage"][0]["from_km"] - min(km)) < 0.01 > abs(results["leakage"][-1]["to_km"] - max(km))


# -----------------------------------------------------------------------------------------------------
# What a user can get wrong: one clear line and a non-zero exit


def test_a_checkpoint_of_another_version(run, tmp_path):
    """An option of the model that this program does not know: one line."""
    state = checkpoint(run("simclr"))
    state["model_config"]["colour"] = "blue"
    torch.save(state, tmp_path / "checkpoint.pt")
    assert "another version of this program" in complaint(evaluate.main, "--checkpoint", tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("option", ["--device gpu", "--workers -1", "--image-size 0"])
def test_values_that_no_option_takes(option, capsys):
    """Said by argparse, before anything is read."""
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--checkpoint", "x", *option.split()])
    assert f"argument {option.split()[0]}: '{option.split()[1]}' is not a" in capsys.readouterr().err


def complaint(main, *argv) -> str:
    """The single line that the program ends with, exit status 1."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, argv)))
    assert isinstance(stopped.value.code, str) and regex.fullmatch(r"error: [^\n]+", stopped.value.code)
    return stopped.value.code


def append(line: str):
    return lambda folder: (folder / "metadata.jsonl").open("a").write(line + "\n")


def sixteen_bits(folder: Path) -> None:
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(folder / "04.png")


WRONG_DATA = {  # what is wrong: how it comes about in train/, what the message says
    "no metadata.jsonl": (lambda folder: (folder / "metadata.jsonl").unlink(), "train/metadata.jsonl: no such file"),
    "no rows": (lambda folder: (folder / "metadata.jsonl").write_text("\n"), "train/metadata.jsonl: no rows"),
    "not JSON": (append('{"file_name": oops}'), "train/metadata.jsonl, line 49: not JSON"),
    "not an object": (append('["03.jpg"]'), "train/metadata.jsonl, line 49: not a JSON object"),
    "no file_name": (append('{"gsd": 1}'), 'train/metadata.jsonl, line 49: no "file_name"'),
    "path upwards": (append('{"file_name": "../test/03.jpg"}'), "line 49: file_name '../test/03.jpg' leaves"),
    "absolute path": (append('{"file_name": "/etc/hostname"}'), "line 49: file_name '/etc/hostname' leaves"),
    "missing image": (lambda folder: (folder / "03.jpg").unlink(), "train/03.jpg: no such image"),
    "truncated image": (lambda folder: os.truncate(folder / "04.png", 500), "train/04.png: cannot be read"),
    "text as image": (lambda folder: (folder / "03.jpg").write_text("hello"), "train/03.jpg: cannot be read"),
    "16-bit image": (sixteen_bits, "train/04.png: mode I;16"),
}


@pytest.mark.parametrize("what", WRONG_DATA)
def test_wrong_data(dataset, tmp_path, what):
    """The message names the file, the line, the image; also when a worker process found it."""
    change, needle = WRONG_DATA[what]
    folder = shutil.copytree(dataset, tmp_path / "data")
    change(folder / "train")
    workers = 1 if what == "truncated image" else 0
    assert needle in complaint(train.main, *TINY, "--data", folder, "--output", tmp_path / "run", "--workers", workers)


def test_a_label_without_training_rows_is_said(run, dataset, tmp_path):
    """A label that only the test split has cannot be scored: told by name."""
    path = shutil.copytree(dataset, tmp_path / "data") / "train" / "metadata.jsonl"
    path.write_text(path.read_text().replace("label_kind", "kind"))
    argv = ["--checkpoint", run("simclr") / "checkpoint.pt", "--data", tmp_path / "data", "--workers", 0]
    assert "label_kind" in complaint(evaluate.main, *argv)


WRONG_OPTIONS = {
    "train --fields gsd,altitude": "'altitude'",
    "train --fields gsd,gsd": "'gsd,gsd'",
    "train --batch-size 49": "--batch-size 49",
    "train --epochs 0": "--epochs 0",
    "train --image-size 33": "33",
    "train --metadata-width 33": "33",
    "train --decouple-views": "--decouple-views",
    "train --seed 1": "--seed 0, not 1",  # that run folder has a checkpoint made with another seed
    "evaluate --modality metadata": "simclr",
    "evaluate --label nope": "label_kind",
    "evaluate --protocol ask": "simclr",
    "evaluate --places x.png": "simclr",
    "evaluate --average-areas": "'a0'",  # whose two images are of different kinds
    "evaluate --places x.png --data a b": "--places",
    "evaluate --posteriors x.npz": "--posteriors",
    "evaluate --image-size 33": "33",
    "evaluate --data nowhere": "nowhere",
}


@pytest.mark.parametrize("options", WRONG_OPTIONS)
def test_wrong_options(run, dataset, options):
    """The message names the option, its value, or what there is instead."""
    program, *options_ = options.split()
    argv = ["--checkpoint", run("simclr") / "checkpoint.pt", "--workers", 0]
    if program == "train":
        method = "--method satmips" if "--metadata-width" in options else RUNS["simclr"]
        output = run("simclr") if "--seed" in options else run("simclr").with_name("never made")
        argv = [*TINY, "--data", dataset, "--output", output, *method.split()]
    assert WRONG_OPTIONS[options] in complaint({"train": train, "evaluate": evaluate}[program].main, *argv, *options_)


UNKNOWN = "train --method nope,train --nope 1,train --epochs many,evaluate --checkpoint x --protocol nope,data nope"
UNKNOWN += ",evaluate --checkpoint x --finetune-epochs 0,evaluate plot nope x,evaluate,evaluate --weights x --source no"


@pytest.mark.parametrize("command", UNKNOWN.split(","))
def test_unknown_options_end_in_usage(command, capsys):
    """argparse's line and exit status 2."""
    program, *argv = command.split()
    with pytest.raises(SystemExit) as stopped:
        {"train": train, "evaluate": evaluate, "data": data}[program].main(argv)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


class Malice:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_wrong_checkpoints(run, tmp_path):
    """Absent, foreign, empty, torn, misshapen or malicious: refused by name, and no code in them is run."""
    path, marker, state = tmp_path / "x.pt", tmp_path / "marker", checkpoint(run("simclr"))
    whole = (run("simclr") / "checkpoint.pt").read_bytes()
    assert "no such file" in complaint(evaluate.main, "--checkpoint", path)
    for content in (b"hello\n", b"", whole[: len(whole) // 2], pickle.dumps(Malice(marker), protocol=2)):
        path.write_bytes(content)
        assert str(path) in complaint(evaluate.main, "--checkpoint", path)
    assert not marker.exists() and pickle.loads(content) and marker.exists(), "the malice is real, and was not run"
    marker.unlink()
    for content in ([1, 2], torch.ones(3), state["model"], {**state, "step": Malice(marker)}):
        torch.save(content, path)
        assert str(path) in complaint(evaluate.main, "--checkpoint", path) and not marker.exists()
    torch.save({**state, "model": {**state["model"], "image_encoder.cls_token": torch.zeros(1, 1, 64)}}, path)
    assert "image_encoder.cls_token has shape (1, 1, 64)" in complaint(evaluate.main, "--checkpoint", path)


# -----------------------------------------------------------------------------------------------------
# The repository itself

OURS = {  # the import graph, in reading order
    "metadata": set(),
    "model": set(),
    "losses": set(),
    "data": {"metadata"},
    "evaluate": {"model", "metadata", "data"},
    "train": {"metadata", "model", "losses", "data", "evaluate"},
}


def source(name: str) -> ast.Module:
    return ast.parse((HERE / f"{name}.py").read_text())


@pytest.mark.parametrize("name", OURS)
def test_files_and_imports(name):
    """Seven files; each imports of ours what the design allows, else what requirements.txt names."""
    assert {path.stem for path in HERE.glob("*.py")} == {*OURS, "test_all"}
    nodes = list(ast.walk(source(name)))
    found = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    found |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    required = set(regex.findall(r"^\w+", (HERE / "requirements.txt").read_text(), regex.MULTILINE)) | {"PIL"}
    assert found & {*OURS, "test_all"} == OURS[name] and found <= {*sys.stdlib_module_names, *required, *OURS}


def test_every_option_is_used():
    """Each field of Config is read as config.<name> outside the parser."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    functions = [n for n in source("train").body if isinstance(n, kinds) and n.name != "parse_config"]
    nodes = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.Attribute)]
    used = {n.attr for n in nodes if isinstance(n.value, ast.Name) and n.value.id == "config"}
    assert {f.name for f in dataclasses.fields(train.Config)} - used == set()


def test_every_option_of_evaluate_is_used():
    """Each option of its commands is read as args.<name>."""
    nodes = list(ast.walk(source("evaluate")))
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "args"}
    calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "add_argument"]
    names = {call.args[0].value.lstrip("-").replace("-", "_") for call in calls}
    assert len(names) > 20 and names - used == set()


@pytest.mark.parametrize("name", ["README.md", "data.py", "evaluate.py", "train.py"])
def test_documented_commands_parse(name, monkeypatch):
    """Each command of the README's bash blocks and of a file's opening lines is one that the program accepts."""
    text = (HERE / name).read_text()
    if name == "README.md":
        text = "".join(regex.findall(r"^```bash\n(.*?)^```", text, regex.MULTILINE | regex.DOTALL))
        assert all(part in text for part in ("pytest -q test_all.py", "python train.py", "python evaluate.py"))
    else:
        text = "\n".join(line for line in text.split('"""')[1].splitlines() if line.startswith("    "))
        assert f"python {name}" in text
    accepted, parse_args = [], argparse.ArgumentParser.parse_args

    def stop(self, argv):
        parse_args(self, argv)
        accepted.append(argv)
        raise BadInput("parsed")

    for command in regex.split(r"&&|;|\n", text.replace("\\\n", " ")):
        program, *words = shlex.split(command, comments=True) or [""]
        script = next((word for word in words if word.endswith(".py")), "")
        if program in ("python", "python3", "torchrun") and script and (HERE / script).name != "metadata.py":
            argv = words[words.index(script) + 1 :]
            if script == "train.py":
                accepted.append(train.parse_config(argv))
                continue
            with monkeypatch.context() as patch, pytest.raises((BadInput, SystemExit), match="parsed"):
                patch.setattr(argparse.ArgumentParser, "parse_args", stop)
                {"data.py": data.main, "evaluate.py": evaluate.main}[script](argv)
    assert accepted
