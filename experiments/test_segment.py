"""experiments.segment: masks, splits, scores, and a run on images in SpaceNet's own layout.

    pytest -q experiments/test_segment.py
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, TiffImagePlugin

import data
from experiments import masks, segment, variants
from metadata import BadInput
from model import ModelConfig, SatMIP
from prepare.demo import LAND_COVERS, Areas

CPU = ["--device", "cpu", "--workers", "0", "--size", "32"]
CORNER, SCALE = (-43.7, -22.9), 5e-6  # longitude and latitude of a corner; degrees a pixel


def refusal(*argv) -> str:
    """The one line with which segment refuses its arguments."""
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stdout(io.StringIO()):
        segment.main([str(a) for a in argv])
    line = str(caught.value)
    assert line.startswith("error: ") and "\n" not in line, line
    return line


def write_tiff(path: Path, pixels: np.ndarray, tie: tuple = (0, 0, 0, *CORNER, 0)) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for number, values in ((33550, (SCALE, SCALE, 0)), (33922, tie)):
        tags[number], tags.tagtype[number] = tuple(map(float, values)), 12  # doubles
    Image.fromarray(pixels).save(path, tiffinfo=tags if tie else None)


def on_earth(ring: list) -> list:
    """Columns and rows -> longitude, latitude, height."""
    return [[CORNER[0] + x * SCALE, CORNER[1] - y * SCALE, 12.5] for x, y in ring]


def square(x: float, y: float, side: float) -> list:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def write_geojson(path: Path, *geometries: dict | None) -> None:
    features = [{"type": "Feature", "properties": {}, "geometry": g} for g in geometries]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def polygon(*rings: list) -> dict:
    return {"type": "Polygon", "coordinates": [on_earth(ring) for ring in rings]}


@pytest.fixture
def spacenet(tmp_path) -> Path:
    """10 images of 39 x 36 px or so with a bright building each, the last without one."""
    folder, rng = tmp_path / "spacenet", np.random.default_rng(0)
    images, labels = folder / "3band", folder / "vectordata" / "geojson"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for i in range(10):
        pixels = rng.integers(0, 90, (36, 39 - i % 2, 3), np.uint8)
        x, y = rng.integers(2, 20, 2).tolist()
        if i < 9:
            pixels[y : y + 12, x : x + 12] += 150
        write_tiff(images / f"3band_AOI_1_RIO_img{i}.tif", pixels)
        shapes = [polygon(square(x, y, 12))] if i < 9 else []
        write_geojson(labels / f"Geo_AOI_1_RIO_img{i}.geojson", *shapes)
    (images / "._3band_AOI_1_RIO_img0.tif").write_bytes(b"Mac OS X")
    return folder


# --------------------------------------------------------------------------------------------------
# Masks


def crossings(x: float, y: float, ring: np.ndarray) -> int:
    """Edges of a ring that a ray from a point to the right meets."""
    count = 0
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0)):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            count += 1
    return count


def edge_distance(x: float, y: float, ring: np.ndarray) -> float:
    nearest = math.inf
    for a, b in zip(ring, np.roll(ring, -1, axis=0)):
        t = np.clip(np.dot((x, y) - a, b - a) / np.dot(b - a, b - a), 0, 1)
        nearest = min(nearest, math.dist((x, y), a + t * (b - a)))
    return nearest


def star(rng, x: float, y: float, radius: float) -> np.ndarray:
    angles = 2 * np.pi / 9 * (np.arange(9) + rng.random(9))
    lengths = radius * rng.uniform(0.6, 1, 9)
    return np.stack([x + lengths * np.cos(angles), y + lengths * np.sin(angles)], 1)


def test_pixels_whose_centre_is_inside():
    """Polygons with holes, one in another's hole, one over another, some across the border."""
    rng, sure = np.random.default_rng(0), 0
    outlines = []
    for x, y, radius in ((9, 9, 8), (25, 12, 12), (25, 12, 2.5), (39, 30, 9), (3, 33, 14)):
        outer = star(rng, x, y, radius)
        outlines.append([outer, (outer + (x, y)) / 2] if radius > 7 else [outer])
    drawn = masks.draw(outlines, 40, 34)
    for row in range(34):
        for column in range(40):
            x, y, inside = column + 0.5, row + 0.5, False
            for rings in outlines:
                inside |= sum(crossings(x, y, ring) for ring in rings) % 2 == 1
            if min(edge_distance(x, y, ring) for rings in outlines for ring in rings) > 0.3:
                assert drawn[row, column] == inside, (row, column)
                sure += 1
    assert sure > 900 and 300 < drawn.sum() < 900


def test_pixels_by_the_tags(tmp_path):
    """The tie point may lie anywhere; heights, points and empty features count for nothing."""
    pair = masks.Pair(tmp_path / "a.tif", tmp_path / "a.geojson")
    tie = (10, 4, 0, CORNER[0] + 10 * SCALE, CORNER[1] - 4 * SCALE, 0)
    write_tiff(pair.image, np.zeros((20, 30, 3), np.uint8), tie)
    several = {"type": "MultiPolygon"}
    several["coordinates"] = [[on_earth(square(20, 1, 3))], [on_earth(square(27, 15, 9))]]
    point = {"type": "Point", "coordinates": on_earth([[5, 5]])[0]}
    rings = square(2, 3, 8), square(4, 5, 2)
    write_geojson(pair.mask, polygon(*rings), several, point, None)
    expected = np.zeros((20, 30), np.uint8)
    expected[3:11, 2:10] = expected[1:4, 20:23] = expected[15:, 27:] = 1
    expected[5:7, 4:6] = 0
    assert np.array_equal(masks.read_pair(pair, 2)[1], expected)
    for nothing in ("", "{}", '{"features": []}', '{"features": null}'):
        pair.mask.write_text(nothing)
        assert not masks.read_pair(pair, 2)[1].any()


def test_masks_of_classes(tmp_path):
    pair, values = masks.Pair(tmp_path / "a.jpg", tmp_path / "a.png"), np.zeros((8, 9), np.uint8)
    values[2, 3], values[4, 5] = 16, 255
    Image.new("RGB", (9, 8)).save(pair.image)
    palette = Image.fromarray(values, "P")
    palette.putpalette(list(range(256)) * 3)
    for image in (palette, Image.fromarray(values)):
        image.save(pair.mask)
        assert np.array_equal(masks.read_pair(pair, 17)[1], values)
    Image.fromarray(values > 0).save(pair.mask)
    assert np.array_equal(masks.read_pair(pair, 2)[1], values > 0)


# --------------------------------------------------------------------------------------------------
# Splits and batches


def test_splits():
    pairs = [masks.Pair(Path(f"{i}.tif"), Path(f"{i}.png")) for i in range(50)]
    train, test = masks.choose([pairs], [40, 5])
    assert len(train) == 40 and len(test) == 5 and len({*train, *test}) == 45
    assert train != sorted(train)
    train, test = masks.choose([pairs], [4000, 1000])  # fewer: the same share
    assert len(train) == 40 and {*train, *test} == {*pairs}
    train, test = masks.choose([pairs[:20], pairs[20:]], [12, 100])
    assert len(train) == 12 and {*train} < {*pairs[:20]} and {*test} == {*pairs[20:]}
    assert masks.choose([pairs[:20], pairs[20:]], [6, 9])[0] == train[:6]


def test_crops_and_padding():
    """Image and mask are cut and flipped alike; what is beyond an image has no class."""
    mask = np.arange(30 * 40).reshape(30, 40) % 200
    image, seen = np.repeat(mask[..., None], 3, 2), set()
    for draws in data.uniform(0, np.arange(40)[:, None], np.arange(4)):
        cut, classes = segment.crop(image, mask, 32, draws)
        assert cut.shape == (30, 32, 3) and np.array_equal(cut[..., 1], classes)
        seen.add(tuple(classes[0, :2]))
    assert len(seen) > 12
    images, classes = segment.stack([(image, mask), (image[:9, :7], mask[:9, :7])], [0.4, 0.5, 0.6])
    assert images.shape == (2, 3, 30, 40) and np.array_equal(classes[0], mask)
    assert np.array_equal(images[1, 2, :9, :7], mask[:9, :7]) and (classes[1, :9, 7:] == 255).all()
    assert (images[1, :, 9:] == torch.tensor([102, 128, 153])[:, None, None]).all()


# --------------------------------------------------------------------------------------------------
# Scores


def test_miou_equals_a_slow_count():
    """Class 3 is never true, though predicted; class 4 is true, though never predicted."""
    rng = np.random.default_rng(0)
    true, predicted = rng.choice([0, 1, 2, 4, 255], (3, 20, 20)), rng.choice(4, (3, 20, 20))
    counts = 0
    for t, p in zip(true, predicted):
        counts += segment.confusion(torch.from_numpy(p), torch.from_numpy(t), 5)
    ious = []
    for c in (0, 1, 2, 4):
        both = either = 0
        for t, p in zip(true.ravel(), predicted.ravel()):
            if t != 255:
                both += t == c and p == c
                either += t == c or p == c
        ious.append(both / either)
    assert segment.class_ious(counts).tolist() == pytest.approx(ious)
    assert ious[3] == 0 and counts.sum() == (true != 255).sum()


# --------------------------------------------------------------------------------------------------
# Runs


def keep_first(checkpoint: Path, kept: Path) -> None:
    """What a kill after the first epoch leaves: the file before the next epoch replaces it."""
    while not checkpoint.exists():
        time.sleep(0.01)
    os.link(checkpoint, kept)


def test_a_resumed_run_equals_one_without_a_break(spacenet, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    files = [folder / "checkpoint.pt" for folder in (whole, killed)]
    argv = ["random", str(spacenet), *CPU, "--stride", "16", "--epochs", "2", "--output"]
    keeper = threading.Thread(target=keep_first, args=files)
    keeper.start()
    segment.main([*argv, str(whole)])
    keeper.join()
    (row,) = map(json.loads, (whole / "results.jsonl").read_text().splitlines())
    assert row["train"] == 8 and row["test"] == 2 and row["protocol"] == "segment"
    assert 0 < row["mIoU"] < 1 and row["mIoU"] == pytest.approx(sum(row["IoUs"].values()) / 2)

    assert torch.load(files[1])["epoch"] == 1
    segment.main([*argv, str(killed)])
    assert json.loads((killed / "results.jsonl").read_text()) == row
    states = [torch.load(file)["model"] for file in files]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_weights_come_from_the_checkpoint(spacenet, tmp_path):
    config = ModelConfig(image_size=32, vit="resnet50")
    trained = {"model_config": dataclasses.asdict(config), "config": {"method": "moco", "seed": 3}}
    torch.manual_seed(1)
    trained["model"] = SatMIP(config).state_dict()
    trained["own_statistics"] = ([0.4, 0.4, 0.4], [0.2, 0.2, 0.2])
    torch.save(trained, tmp_path / "moco.pt")
    argv = [str(tmp_path / "moco.pt"), str(spacenet), *CPU, "--epochs", "1", "--images", "4", "3"]
    segment.main([*argv, "--output", str(tmp_path / "out")])
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert (row["method"], row["seed"], row["train"], row["test"]) == ("moco", 3, 4, 3)
    tuned = torch.load(tmp_path / "out" / "checkpoint.pt")["model"]
    for name in ("conv1.weight", "layer3.2.conv2.weight", "layer4.0.downsample.0.weight"):
        before, after = trained["model"][f"image_encoder.{name}"], tuned[f"backbone.{name}"]
        similar = F.cosine_similarity(after.flatten(), before.flatten(), dim=0)
        assert similar > 0.5 and not torch.equal(after, before), (name, similar)


def test_what_cannot_be_used_is_refused_at_the_start(spacenet, tmp_path):
    out = ["--output", str(tmp_path / "out"), *CPU]
    image = spacenet / "3band" / "3band_AOI_1_RIO_img4.tif"
    label = spacenet / "vectordata" / "geojson" / "Geo_AOI_1_RIO_img4.geojson"
    good_image, good_label = image.read_bytes(), label.read_text()

    def refused(path: Path, content: str | bytes, *words: str) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        line = refusal("random", spacenet, *out)
        assert all(word in line for word in (str(path), *words)), line

    refused(image, good_image[:300], "damaged")
    image.write_bytes(good_image)
    refused(label, good_label[:99], "GeoJSON")
    refused(label, good_label.replace("12.5", "12.5, NaN").replace("[-43", "[NaN, -43"), "GeoJSON")
    label.write_text(good_label.replace("-22.", "48."))
    assert "no polygon near" in refusal("random", spacenet, *out)
    label.write_text(good_label)
    Image.new("RGB", (39, 36)).save(image)
    assert f"{image}: no geotags" in refusal("random", spacenet, *out)
    for path in label.parent.iterdir():
        path.write_text("{}")
    image.write_bytes(good_image)
    assert "fewer than two classes" in refusal("random", spacenet, *out)
    for path in label.parent.iterdir():
        path.unlink()
    assert "0 and 0 pairs" in refusal("random", spacenet, *out)
    assert "no such folder" in refusal("random", spacenet, *out, "--masks", tmp_path / "none")


def test_masks_that_cannot_be_used_are_refused(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    for folder in (images, labels):
        folder.mkdir()
        for i in range(5):
            Image.new("L", (20, 20), i).save(folder / f"{i}.png")
    argv = ["random", images, "--masks", labels, *CPU, "--output", tmp_path / "out"]
    line = refusal(*argv, "--classes", "4")
    assert f"{labels / '4.png'}: a pixel of class 4; --classes 4 are 0 to 3" in line
    Image.new("L", (20, 21)).save(labels / "3.png")
    line = refusal(*argv, "--classes", "5")
    assert f"{labels / '3.png'}: 20 x 21 px, its image has 20 x 20" in line
    Image.new("RGB", (20, 20)).save(labels / "3.png")
    assert "RGB pixels" in refusal(*argv, "--classes", "5")
    assert "--classes" in refusal(*argv, "--classes", "1")


def test_land_cover_lies_on_the_images_own_pixels(tmp_path):
    """Land and water explain the brightness of a coast less when the mask is moved; a label is the
    class of more than half of an image."""
    demo, out, areas, coasts = tmp_path / "demo", tmp_path / "masks", Areas(0), []
    (demo / "train").mkdir(parents=True)
    crops = [crop for number in range(5) for crop in areas.hundred(number)]
    with open(demo / "train" / "metadata.jsonl", "w") as file:
        for i, (_, record, jpeg) in enumerate(crops):
            (demo / "train" / f"{i}.jpg").write_bytes(jpeg)
            file.write(json.dumps(record | {"file_name": f"{i}.jpg"}) + "\n")
    shutil.copytree(demo / "train", demo / "test")
    variants.make_masks(areas, demo, out)
    for record in data.Split(demo / "train"):
        path = demo / "train" / record["file_name"]
        image = np.asarray(Image.open(path).convert("L"), float)
        mask = np.asarray(Image.open(out / "train" / path.with_suffix(".png").name))
        if "label_land_cover" in record:
            name = LAND_COVERS[np.bincount(mask.ravel()).argmax()]
            assert name == record["label_land_cover"]
        if 0.25 < (mask == 0).mean() < 0.75:
            coasts.append((image, mask == 0))
    assert len(coasts) > 2
    explained = {}
    for move in ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)):
        inner = np.s_[4 + move[0] : 60 + move[0], 4 + move[1] : 60 + move[1]]
        pairs = [(image[4:60, 4:60].ravel(), water[inner].ravel()) for image, water in coasts]
        explained[move] = np.mean([abs(np.corrcoef(*pair)[0, 1]) for pair in pairs])
    assert max(explained, key=explained.get) == (0, 0), explained
    found = masks.find_pairs(demo, out)
    assert list(map(len, found)) == 2 * [len(crops)]
    assert found[1][3].mask == out / "test" / "3.png"
    areas.seed = 1
    with pytest.raises(BadInput, match="0.jpg is no image of prepare.demo with --seed 1"):
        variants.make_masks(areas, demo, tmp_path / "other")
