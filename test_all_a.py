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
import runpy
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


# --------------------------------------------------------------------------------------------------
# metadata.py


def test_parse_fields():
    """In the order asked for; "all" are the dataset's own or the paper's 15; wrong names are told."""
    own = {"height": metadata.Field("height", "number")}
    assert len(ALL) == 15 and metadata.names_of(DEFAULT) == "gsd,timestamp,location"
    assert metadata.names_of(parse_fields("utm_zone, height,gsd", own)) == "utm_zone,height,gsd"
    assert metadata.names_of(parse_fields("all", own)) == "height"
    assert "no 'gds'; choose from gsd, " in refusal(parse_fields, "gds")
    assert "names gsd twice" in refusal(parse_fields, "gsd,location,gsd")


NEVER = [None, "", "  ", nan, math.inf, -math.inf, True, False, [], {}]
MALFORMED = {
    "gsd": [[1], [1, 2, 3], [1, None], [1, nan], [0, 1], [[1], 2], 0, -1, {"x": 1, "y": 2}, "abc"],
    "multispectral_gsd": [[1], 0, "1_0", "nan", "inf", "1e999", 10**400],
    "pixel_size": [[1e-4, math.inf], ["a", "b"], [True, 1]],
    "timestamp": [
        "2004-13-01", "2004-13", "2004-00", "2004-10-00", "2004-02-30", "2004-10-", ["2004"], "now",
        "2015-09-21T25:00", "2015-09-21T15:61", "2015-09-21T15:30:61Z", "2015-09-21T15:30+99:99",
    ],
    "location": [
        [181, 0], [-181, 0], [0, 91], [0, -90.1], [None, 1], [1, nan], 12, [1, 2, 3], [1], ["", 1],
    ],
    "country_code": [["PER"], 1.5, {"a": 1}],
    "cloud_cover": [-1, 101, [14], "cloudy"],
    "wavelengths": [[661, 545], [661, 545, -1], 661],
    "sun_elevation_angle": [91, -91],
    "sun_azimuth_angle": [361],
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


TIMES = {
    "2015-09-21T15:30:08Z": [2015, 9, 21, 15, 0],
    " 2015-09-21 15:30 ": [2015, 9, 21, 15, 0],
    "2015-09-21T15:30:08.123456Z": [2015, 9, 21, 15, 0],
    "2004": [2004, nan, nan, nan, nan],
    "2004-10": [2004, 10, nan, nan, nan],
    "2004-10-05": [2004, 10, 5, nan, 1],
    "2015-01-01T00:30:00+02:00": [2014, 12, 31, 22, 2],
    "2014-12-31T20:30:00-0500": [2015, 1, 1, 1, 3],
    "2017-06-01T00:10": [2017, 6, 1, 0, 3],
    "2000-02-29": [2000, 2, 29, nan, 1],
}


@pytest.mark.parametrize("text", TIMES)
def test_timestamps(text):
    """Year, month, day, hour and weekday in UTC; a date may stop early."""
    np.testing.assert_equal(metadata.parse_timestamp(text), TIMES[text])


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
    said = capsys.readouterr().out
    assert f"{text}\n  207 tokens" in said and "\n  67 tokens" in said


def test_survey():
    """What can be read of each field, an example of what cannot, and rows with equal metadata."""
    rows = [{"gsd": 1}, {"gsd": "1", "timestamp": "2004"}, {"gsd": [1, 1]}, {"gsd": "one m"}, {}]
    found = metadata.survey(rows, DEFAULT)
    assert found.rows == 5 and found.readable == {"gsd": 3, "timestamp": 1, "location": 0}
    assert found.unreadable == {"gsd": "one m"}
    assert found.repeated == 4, "the first and the third, the last two"
    for part in ("5 rows", "gsd 60%", "'one m'", "location 0%", "4 rows (80%)"):
        assert part in str(found)


def test_text_reader():
    """Rows with start, end and padding 0, as wide as the longest; the end survives truncation."""
    fields = (metadata.Field("a", "category"),)
    records = [{"a": "cat"}, {}, {"a": "hello world diagram"}]
    encode = metadata.Tokenizer().encode
    a, colon, cat, hello, world, diagram = encode("a: cat hello world diagram")
    start, end = 49406, 49407
    reader = TextReader.fit(records, fields)
    assert reader.sizes() == {"context": 7}
    tokens, lengths = reader(records)
    assert lengths.tolist() == [5, 2, 7] and tokens.tolist() == [
        [start, a, colon, cat, end, 0, 0],
        [start, end, 0, 0, 0, 0, 0],
        [start, a, colon, hello, world, diagram, end],
    ]
    assert reader(records[:1])[0].shape == (1, 5)
    tokens, lengths = reader([{"a": "hello world diagram cat cat cat"}])
    assert tokens.tolist() == [[start, a, colon, hello, world, diagram, end]]
    assert "no training row has any of a" in refusal(TextReader.fit, [{}, {"a": ""}], fields)


def test_table_reader():
    """Standardised with the statistics of the known training values; NaN stays NaN, missing is row
    0, unknown row 1; a constant feature is 0."""
    fields = parse_fields("cloud_cover,location,country_code")
    training = [("10", [5, 1], "B"), (30, None, "A"), (None, [5, " 3 "], None), (20, [5, 2], "A")]
    a, b = (200 / 3) ** 0.5, (2 / 3) ** 0.5

    def records(rows: list[tuple]) -> list[dict]:
        return [dict(zip(("cloud_cover", "location", "country_code"), row)) for row in rows]

    reader = TableReader.fit(records(training), fields)
    assert reader.categories == [["A", "B"]]
    assert reader.sizes() == {"numbers": 3, "categories": (4,)}
    np.testing.assert_allclose([reader.mean, reader.std], [[20, 5, 2], [a, 1, b]])
    numbers, categories = reader(records([*training, (40, [6, 4], "C")]))
    np.testing.assert_allclose(numbers, [
        [-10 / a, 0, -1 / b], [10 / a, nan, nan], [nan, 0, 1 / b], [0, 0, 0], [20 / a, 1, 2 / b],
    ], rtol=1e-6)  # fmt: skip
    assert categories.tolist() == [[3], [2], [0], [2], [1]]
    assert (numbers.dtype, categories.dtype) == (torch.float32, torch.int64)
    constant = TableReader.fit([{"gsd": 0.1}] * 3, DEFAULT[:1])([{"gsd": 0.1}])[0]
    assert constant.abs().max() < 1e-9, "rounding errors are not amplified"
    assert "no training row has any of gsd,t" in refusal(TableReader.fit, [{"gsd": 0}], DEFAULT)


@pytest.mark.parametrize("kind", ["text", "table"])
@torch.no_grad()
def test_a_missing_value_concerns_its_own_row_only(kind):
    """Any field of any row gone: that row's embedding changes, no other; missing is no number."""
    records = []
    for i, country in enumerate("ABCABC"):
        records.append(POSTER | {"cloud_cover": i, "country_code": country, "gsd": [1 + i, 2]})
    reader = metadata.READERS[kind].fit(records, ALL)
    if kind == "text":
        encoder = model.TextTransformer(49408, **reader.sizes(), width=32, layers=2, heads=4)
    else:
        encoder = model.FTTransformer(**reader.sizes(), width=32, layers=2, heads=4)
    randomise(encoder)
    before = encoder(*reader(records))
    for i, field in enumerate(ALL):
        row = i % 6
        changed = records[:row] + [records[row] | {field.name: None}] + records[row + 1 :]
        difference = (encoder(*reader(changed)) - before).abs().amax(1)
        assert difference[row] > 1e-3, field.name
        assert difference[torch.arange(6) != row].max() < 1e-5, field.name
    missing, mean, zero = encoder(*reader([POSTER | {"cloud_cover": v} for v in (None, 2.5, 0)]))
    assert worst(mean, missing) > 1e-3 and worst(zero, missing) > 1e-3


CLIP_IDS = {  # ids of CLIP's own tokenizer
    "a diagram": [320, 22697],
    "": [],
    "Hello,   WORLD!\n\t": [3306, 267, 1002, 256],
    "\U0001f6f0\ufe0f satellite \U0001f30d": [11306, 34777, 10316, 18641],
    "cafe\u0301 na\xefve \xc5NGSTR\xd6M": [
        15304, 1097, 35689, 563, 23176, 10352, 807, 7255, 332,
    ],
    "\u4eba\u5de5\u885b\u661f \uc704\uc131": [
        36839, 161, 115, 98, 164, 94, 249, 42891, 509, 20909, 226, 15074, 365,
    ],
    "&lt;3 &amp;amp; 5&nbsp;km": [283, 274, 261, 276, 4590],
    "it's we're I'LL don't he'd": [585, 568, 649, 982, 328, 1342, 847, 713, 797, 1896],
    "\u201cquotes\u201d \u2018n\u2019 it\u2019s": [257, 5808, 257, 262, 333, 262, 585, 568],
    "a\x00b\x1b[31mred\x7f": [596, 736],
    "\xbd \xb2 \u2167 2015-09": [
        33613, 41175, 158, 227, 371, 273, 271, 272, 276, 268, 271, 280,
    ],
    "\u0130stanbul \u1e9etra\xdfe \u01c5": [
        328, 16384, 11231, 127, 253, 752, 127, 253, 324, 67, 129, 378,
    ],
    "sch\xc3\xb6n &eacute;": [844, 7255, 333, 4166],
    "\ufb01 \uff26\uff55\uff4c\uff4c": [3589, 1476],
    "_foo__bar--": [318, 23435, 3838, 2411, 2432],
    "\u0928\u092e\u0938\u094d\u0924\u0947": [3124, 101, 48254, 28505, 19389, 27263, 25130],
    "\u200b\xa0x\u2028y": [9844, 343, 344],
    "<|endoftext|> a <|startoftext|>": [49407, 320, 49406],
}  # fmt: skip


@pytest.mark.parametrize("text", CLIP_IDS, ids=ascii)
def test_token_ids_are_clips(text):
    """From plain words to emoji, CJK and control characters."""
    tokenizer = metadata.default_tokenizer()
    assert tokenizer.encode(text) == CLIP_IDS[text]
    assert tokenizer(text) == [49406, *CLIP_IDS[text], 49407]


def slow_tokenizer() -> Callable[[str], list[int]]:
    """Byte-pair encoding, one pair at a time: its symbols from the merges file, numbered."""
    lines = gzip.open(metadata.VOCABULARY, "rt", encoding="utf-8").read().split("\n")
    merges = [tuple(line.split()) for line in lines[1:48895]]
    rank = {pair: i for i, pair in enumerate(merges)}
    letters = {b: chr(b) for b in range(256) if chr(b).isprintable() and b != 32}
    others = [b for b in range(256) if b not in letters]
    letters |= {b: chr(256 + i) for i, b in enumerate(others)}
    symbols = [*letters.values(), *(c + "</w>" for c in letters.values()), *map("".join, merges)]
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    words = regex.compile(r"'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.I)

    def encode(text: str) -> list[int]:
        result, text = [], html.unescape(html.unescape(ftfy.fix_text(text)))
        for word in words.findall(" ".join(text.split()).lower()):
            parts = [letters[b] for b in word.encode()]
            parts[-1] += "</w>"
            while True:
                pairs = list(zip(parts, parts[1:]))
                ranks = [rank.get(pair, math.inf) for pair in pairs]
                if min(ranks, default=math.inf) == math.inf:
                    break
                i = ranks.index(min(ranks))
                parts[i : i + 2] = ["".join(pairs[i])]
            result += [ids[part] for part in parts]
        return result

    return encode


def test_tokenizer_equals_a_slow_transcription():
    """On random Unicode; half a surrogate pair does not stop it."""
    slow, fast, rng = slow_tokenizer(), metadata.default_tokenizer(), random.Random(0)
    ranges = [(32, 127)] * 3 + [(0, 768), (768, 0x3000), (0x3000, 0xD800), (0xE000, 0x10FFFF)]
    for _ in range(300):
        letters = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40))]
        text = "".join(letters)
        assert fast.encode(text) == slow(text), ascii(text)
    assert fast.encode("a \ud800") and fast.encode("\udfff b")


# --------------------------------------------------------------------------------------------------
# model.py


def slow_norm(layer, x: torch.Tensor, eps: float) -> torch.Tensor:
    scaled = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + eps).sqrt()
    return layer.weight * scaled + layer.bias


def slow_encoder(encoder, x: torch.Tensor, eps: float, heads: int) -> torch.Tensor:
    """One sample's tokens [L, D] through every block in full, attention head by head -> [D]."""
    table = isinstance(encoder, model.FTTransformer)
    for i, block in enumerate(encoder.blocks):
        y = x if table and i == 0 else slow_norm(block.norm1, x, eps)
        y = y @ block.attn.qkv.weight.T + block.attn.qkv.bias
        mixed = []
        for q, k, v in zip(*(part.chunk(heads, dim=1) for part in y.chunk(3, dim=1))):
            weights = torch.exp(q @ k.T / math.sqrt(q.shape[1]))
            mixed.append(weights / weights.sum(1, keepdim=True) @ v)
        x = x + torch.cat(mixed, dim=1) @ block.attn.proj.weight.T + block.attn.proj.bias
        y = slow_norm(block.norm2, x, eps) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        if table:  # ReGLU
            a, b = y.chunk(2, dim=1)
            y = a * b.clamp(min=0)
        else:  # GELU
            y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        x = x + y @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return slow_norm(encoder.norm, x, eps)[0]


def test_parameter_counts():
    """ViT-S/16, the text and table encoders, SLIP's head and the projections, counted by hand."""

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
    assert abs(small_model().logit_scale.exp() * 0.07 - 1) < 1e-6, "CLIP's temperature"


def test_vit_has_timms_names():
    """So that weights go either way; the shapes are counted above."""
    with torch.device("meta"):
        names = model.build_image_encoder("vit_small", 224, 16).state_dict().keys()
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers = [f"blocks.{i}.{layer}" for i in range(12) for layer in layers]
    expected = itertools.product(["patch_embed.proj", "norm", *layers], ["weight", "bias"])
    assert names == {"cls_token", "pos_embed", *map(".".join, expected)}


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
    """Resampled for another size, rows as rows, columns as columns; CLS keeps its own."""
    vit = model.ViT(64, 16, 8, 1, 2)
    vit.pos_embed[0, 1:] = torch.arange(4.0).repeat(4)[:, None]  # grows along columns only
    assert torch.equal(model.resample_positions(vit.pos_embed, 4, 4), vit.pos_embed)
    cls, grid = model.resample_positions(vit.pos_embed, 3, 8)[0].split([1, 24])
    grid = grid[:, 0].view(3, 8)
    assert torch.equal(cls, vit.pos_embed[0, :1]) and worst(grid, grid[:1].expand(3, 8)) < 1e-5
    assert (grid[0].diff() > 0).all() and abs(grid.mean() - 1.5) < 0.01
    assert vit(torch.randn(2, 3, 48, 128)).shape == (2, 8)


def test_text_encoder_equals_a_slow_transcription_without_padding():
    """Padding changes nothing and learns nothing, whatever stands in it; the last token counts."""
    text = randomise(small_model("text", vocabulary=100, context=12).metadata_encoder).double()
    captions = [[98, 5, 6, 99], [98, 7, 99], [98, 8, 9, 10, 11, 12, 99]]
    lengths, expected = torch.tensor([len(c) for c in captions]), []
    for c in captions:
        x = text.token_embedding.weight[c] + text.pos_embed[: len(c)]
        expected.append(slow_encoder(text, x, 1e-5, heads=8))
    for L in (7, 12):
        tokens = torch.randint(20, 90, (3, L))  # garbage behind each caption
        for row, c in zip(tokens, captions):
            row[: len(c)] = torch.tensor(c)
        out = text(tokens, lengths)
        assert worst(out, torch.stack(expected)) < 1e-9
    out.square().sum().backward()
    assert text.token_embedding.weight.grad.any(1).nonzero().flatten().tolist() == [*range(5, 13), 98, 99]
    assert text.pos_embed.grad.any(1).tolist() == [True] * 7 + [False] * 5
    tokens[2, 6] = 50
    assert worst(text(tokens, lengths)[2], expected[2]) > 1e-3


@torch.no_grad()
def test_table_encoder_equals_a_slow_transcription():
    """x_j W_j + b_j, missing_j + b_j where x_j is missing, embedding + b_j of a category; ReGLU."""
    table = small_model("table", numbers=3, categories=(4, 5)).metadata_encoder
    table = randomise(table).double()
    numbers = torch.tensor([[0.5, nan, -2.0], [nan, 0.0, 1.0]]).double()
    categories = torch.tensor([[0, 4], [3, 1]])
    for x, c, out in zip(numbers, categories, table(numbers, categories)):
        tokens = [table.cls_token[0, 0]]
        for j in range(3):
            token = table.missing[j] if x[j].isnan() else x[j] * table.weight[j]
            tokens.append(token + table.bias[j])
        for j in range(2):
            tokens.append(table.embeddings[j].weight[c[j]] + table.bias[3 + j])
        assert worst(out, slow_encoder(table, torch.stack(tokens), 1e-5, heads=8)) < 1e-9


def normalise(rank: int, world: int, kind=model.BatchNorm) -> list[torch.Tensor]:
    """This process's rows of a batch normalised -> them, their gradient, the statistics."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    part, norm = x.chunk(world)[rank].requires_grad_(), randomise(kind(3)).train()
    y = norm(part)
    (y * x.sin().chunk(world)[rank]).sum().backward()
    return [y.detach(), part.grad, norm.running_mean, norm.running_var, norm.eval()(part).detach()]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batch_norm_is_over_all_processes(world):
    expected = normalise(0, 1, torch.nn.BatchNorm1d)
    for rank, found in enumerate(on_processes(world, normalise)):
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert worst(a, b if i in (2, 3) else b.chunk(world)[rank]) < 1e-5


@torch.no_grad()
def test_moco_keys():
    """The key encoder follows the image encoder's; its keys fill the queue, the oldest go first."""
    m, (views, _) = small_model("none", "moco", queue=20).eval(), small_batch(8)
    slow = [*m.key_encoder.encoder.parameters(), *m.key_encoder.mlp.parameters()]
    fast = [*m.image_encoder.parameters(), *m.image_mlp.parameters()]
    assert all(map(torch.equal, slow, fast)) and not any(p.requires_grad for p in slow)
    assert all(p.requires_grad for p in fast)
    randomise(m.image_encoder)
    for step in range(3):
        queue, before = m.key_encoder.queue.clone(), [p.clone() for p in slow]
        keys = m.encode_keys(views)
        expected = m.key_encoder.mlp(m.key_encoder.encoder(views[-1]))
        assert worst(keys, expected / expected.norm(dim=1, keepdim=True)) < 1e-6
        assert torch.equal(m(views, ()).queue, queue), "the loss is against what was there before"
        m.key_encoder.update(m.image_encoder, m.image_mlp, 0.75, keys)
        for new, old, query in zip(slow, before, fast):
            assert worst(new, 0.75 * old + 0.25 * query) < 1e-6
        at = [(8 * step + i) % 20 for i in range(8)]
        queue[at] = keys
        assert torch.equal(m.key_encoder.queue, queue)


def resnet_moco() -> tuple[model.SatMIP, torch.Tensor]:
    m = small_model("none", "moco", vit="resnet50", queue=8, mlp_out=8).train()
    return m, torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def resnet_keys(rank: int, world: int) -> torch.Tensor:
    m, images = resnet_moco()
    return m.encode_keys(images.chunk(world)[rank][None])


@pytest.mark.parametrize("world", [1, 2, 4])
@torch.no_grad()
def test_shuffling_bn(world):
    """Each process normalises images of all the others, and gets back the keys of its own."""
    m, images = resnet_moco()
    order = {1: range(8), 2: [0, 4, 1, 5, 2, 6, 3, 7], 4: [0, 2, 4, 6, 1, 3, 5, 7]}[world]
    keys = torch.empty(8, 8)
    for dealt in torch.tensor(order).chunk(world):
        keys[dealt] = F.normalize(m.key_encoder.mlp(m.key_encoder.encoder(images[dealt])), dim=1)
    assert worst(torch.cat(on_processes(world, resnet_keys)), keys) < 1e-4


@pytest.mark.parametrize(
    "meets", [[{"image", "first"}, {"second"}], [{"image"}, {"first"}, {"second"}]], ids=len
)
@torch.no_grad()
def test_view_coupling(meets):
    """The first view meets the metadata, the last two each other."""
    m = small_model().eval()
    views, table = small_batch(4, len(meets))
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


def test_each_method_has_its_own_parts_only():
    views, table = small_batch(4)
    parts = {
        ("none", "simclr", 0): ({"image_encoder", "image_mlp"}, ["first", "second"]),
        ("table", "none", 0): (
            {"image_encoder", "metadata_encoder", "image_projection", "metadata_projection",
             "logit_scale"}, ["image", "metadata", "scale"],
        ),
        ("none", "moco", 3): (
            {"image_encoder", "image_mlp", "key_encoder", "place_head"},
            ["first", "second", "queue", "place"],
        ),
    }  # fmt: skip
    for (encoder, image_image, places), (modules, outputs) in parts.items():
        m = small_model(encoder, image_image, queue=20, places=places)
        assert {name.split(".")[0] for name, _ in m.named_parameters()} == modules
        assert [name for name, x in m(views, table)._asdict().items() if x is not None] == outputs


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


# --------------------------------------------------------------------------------------------------
# losses.py


def slow_contrast(a, b, scale: float, others=()) -> float:
    """Eq. 1, term by term."""
    total = 0.0
    for i in range(len(a)):
        terms = [math.exp(scale * float(a[i] @ row)) for row in b]
        more = [math.exp(scale * float(a[i] @ row)) for k, row in enumerate(others) if k != i]
        total -= math.log(terms[i] / (sum(terms) + sum(more)))
    return total / len(a)


def test_losses_equal_loops_over_the_papers_equations():
    """Eq. 2, Eq. 3 with K and with 2 K - 1 terms, and the share of rows that find their partner."""
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


def test_losses_of_the_baselines_equal_loops():
    """MoCo's with its queue; Geo's, in which unknown places count as zero."""
    torch.manual_seed(0)
    a, b, queue = (F.normalize(torch.randn(n, 8), dim=1) for n in (6, 6, 9))
    moco, expected, found = losses.momentum_loss(a, b, queue, 0.2), 0.0, 0
    for query, key in zip(a, b):
        terms = [math.exp(float(query @ k) / 0.2) for k in (key, *queue)]
        expected -= math.log(terms[0] / sum(terms)) / 6
        found += terms[0] == max(terms)
    assert abs(moco.loss - expected) < 1e-5 and abs(moco.accuracy - found / 6) < 1e-6
    logits, places, expected = torch.randn(5, 3), [2, -1, 0, 1, -1], 0.0
    for row, place in zip(logits, places):
        if place >= 0:
            expected -= math.log(float(row.softmax(0)[place])) / 5
    assert abs(losses.place_loss(logits, torch.tensor(places)).loss - expected) < 1e-5


@pytest.mark.parametrize("K", [2, 16])
def test_closed_forms(K):
    """No information costs log K, or log(2 K - 1) with same-view negatives; separation nothing."""
    same, apart, scale = torch.eye(32)[:1].expand(K, -1), torch.eye(32)[:K], torch.tensor(100.0)
    assert abs(losses.metadata_image_loss(same, same, scale).loss - math.log(K)) < 1e-5
    assert abs(losses.image_image_loss(same, same).loss - math.log(K)) < 1e-5
    assert abs(losses.image_image_loss(same, same, 0.1, True).loss - math.log(2 * K - 1)) < 1e-5
    mi, ii = losses.metadata_image_loss(apart, apart, scale), losses.image_image_loss(apart, apart, 0.01)
    assert mi.loss < 1e-5 and ii.loss < 1e-5 and mi.accuracy == ii.accuracy == 1


def test_total_loss():
    """Eq. 4: L_MI + weight L_Sim, with the temperature and the negatives asked for; plus L_g."""
    views, table = small_batch(8)
    e, places = small_model(places=3).train()(views, table), torch.arange(8) % 3
    mi = losses.metadata_image_loss(e.image, e.metadata, e.scale).loss
    g = losses.place_loss(e.place, places).loss
    for weight, temperature, same_view in ((1.0, 0.1, False), (0.25, 0.5, False), (2.0, 0.2, True)):
        how = (weight, temperature, same_view)
        sim = losses.image_image_loss(e.first, e.second, temperature, same_view).loss
        loss, figures = losses.total_loss(e, places, *how)
        assert abs(loss - (mi + weight * sim + g)) < 1e-5
        assert abs(figures["L_MI"] - mi) + abs(figures["L_Sim"] - sim) + abs(figures["L_g"] - g) < 1e-6
        alone, _ = losses.total_loss(e._replace(image=None, place=None), None, *how)
        assert abs(alone - sim) < 1e-5, "L_Sim alone has no weight"
    assert abs(figures["temperature"] - 0.07) < 1e-6


STEPS = [f"--method {name}" for name in train.METHODS if "tp" not in name]  # its step is the same
STEPS += ["--method satmip --metadata-encoder text", "--decouple-views", "--same-view-negatives"]


def steps_in_float64(rank: int, world: int, micro_batch: int) -> list[dict]:
    """One step of each method on this process's rows of 8 -> figures, gradients and buffers."""
    torch.Tensor.float = torch.Tensor.double  # also what the code computes in float32
    torch.set_default_dtype(torch.float64)
    results, B = [], 8 // world
    for options in STEPS:
        argv = ["--vit", "vit_micro", *options.split(), "--micro-batch", str(micro_batch)]
        c = train.parse_config(argv)
        encoder = c.metadata_encoder if c.metadata else "none"
        m = small_model(encoder, c.image_image, queue=20, places=3 * c.geo).train()
        views, meta = small_batch(8, train.view_count(c), encoder)
        rows, places = slice(rank * B, rank * B + B), torch.tensor([0, 2, 1, -1, 0, -1, 1, 2])
        batch = train.Batch(views[:, rows], tuple(x[rows] for x in meta), places[rows])
        network = torch.nn.parallel.DistributedDataParallel(m, broadcast_buffers=False)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.0)
        scaler, amp = torch.amp.GradScaler("cpu", enabled=False), torch.autocast("cpu", enabled=False)
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
            for result in ranks:
                scale = 1e-9 * (1 + expected[name].abs().max())
                assert worst(result[name], expected[name]) < scale, (options, name)
