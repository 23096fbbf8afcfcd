"""experiments.transfer, experiments.xview and experiments.detect.

pytest -q experiments/test_detect.py
"""

import contextlib
import io
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
from evaluate import read_checkpoint
from experiments import detect, transfer, xview
from experiments.test_experiments import refusal
from metadata import BadInput
from model import ModelConfig, SatMIP
from train import save

ABOUT = {"method": "random", "transfer_seed": 0}


# --------------------------------------------------------------------------------------------------
# transfer


def train_small(folder: Path, stop: int = 3, scale: float = 1.0) -> nn.Module:
    """Three epochs of a small network with dropout, broken off before epoch `stop`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    x = scale * torch.eye(3).repeat(4, 1)

    def batches(epoch: int) -> transfer.Loader:
        if epoch == stop:
            raise KeyboardInterrupt
        return transfer.Loader(transfer.epoch_rows(len(x), 5, 0, epoch), lambda rows: x[rows], 0)

    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def step_loss(x):
        return (model(x) - 1).square().mean()

    transfer.fit(model, step_loss, batches, optimizer, 3, folder, ABOUT)
    return model


def test_a_run_broken_off_after_an_epoch_goes_on_to_the_same_weights(tmp_path):
    whole = train_small(tmp_path / "whole").state_dict()
    with pytest.raises(KeyboardInterrupt):
        train_small(tmp_path / "broken", stop=2)
    assert read_checkpoint(tmp_path / "broken")["epoch"] == 2
    for name, values in train_small(tmp_path / "broken").state_dict().items():
        assert torch.equal(values, whole[name])


def test_a_finished_run_is_not_trained_again(tmp_path):
    weights = train_small(tmp_path).state_dict()
    for name, values in train_small(tmp_path, stop=0).state_dict().items():
        assert torch.equal(values, weights[name])


def test_other_options_than_the_checkpoints_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save(path, {"epoch": 1, "about": {"method": "moco", "transfer_seed": 0}})
    with pytest.raises(BadInput, match="has method moco, not random; choose another --output"):
        train_small(tmp_path)
    save(path, {"model": {}, "step": 3})
    with pytest.raises(BadInput, match="contents are not a checkpoint's"):
        train_small(tmp_path)


def test_a_loss_that_is_not_finite_names_epoch_and_step(tmp_path):
    with pytest.raises(BadInput, match="loss (inf|nan): not finite in epoch 1 of 3, step 1"):
        train_small(tmp_path, scale=1e30)


def test_batches_are_a_new_permutation_each_epoch():
    first, second = transfer.epoch_rows(10, 3, 0, 0), transfer.epoch_rows(10, 3, 0, 1)
    for batches in (first, second):
        assert [len(rows) for rows in batches] == [3, 3, 3]
        assert len(set(torch.cat(batches).tolist())) == 9
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert [len(rows) for rows in transfer.epoch_rows(2, 4, 0, 5)] == [2]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_keeps_the_order_and_raises_what_reading_raised(workers):
    batches = [torch.tensor([i]) for i in range(5)]
    loader = transfer.Loader(batches, lambda rows: int(rows) * 10, workers)
    assert len(loader) == 5 and list(loader) == [0, 10, 20, 30, 40]

    def fail(rows):
        raise BadInput("3.tif: damaged")

    with pytest.raises(BadInput, match="^3.tif: damaged$"):
        list(transfer.Loader(batches, fail, workers))


def test_encoders_come_from_a_checkpoint_or_at_random_with_equal_new_layers(tmp_path):
    torch.manual_seed(5)
    model = SatMIP(ModelConfig(vit="resnet50", image_image="simclr", mlp_hidden=8, mlp_out=8))
    state = {"model": model.state_dict(), "model_config": asdict(model.config), "step": 7}
    state["config"] = {"method": "moco", "vit": "resnet50", "seed": 2, "data": "fmow"}
    state["statistics"] = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    save(tmp_path / "checkpoint.pt", state)
    encoder, about, statistics = transfer.image_encoder(str(tmp_path), 0)
    layer = nn.Linear(2, 2)
    assert about["method"] == "moco" and about["seed"] == 2 and about["trained_on"] == "fmow"
    assert about["checkpoint"] == str(tmp_path) and statistics == state["statistics"]
    for name, values in model.image_encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], values)
    save(tmp_path / "checkpoint.pt", state | {"own_statistics": ([0.5] * 3, [0.25] * 3)})
    assert transfer.image_encoder(str(tmp_path), 0)[2] == ([0.5] * 3, [0.25] * 3)

    random, about, statistics = transfer.image_encoder("random", 0)
    assert torch.equal(layer.weight, nn.Linear(2, 2).weight)
    assert about["method"] == "random" and about["seed"] == 0
    assert statistics == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    again, other = transfer.image_encoder("random", 0)[0], transfer.image_encoder("random", 1)[0]
    assert torch.equal(random.conv1.weight, again.conv1.weight)
    assert not torch.equal(random.conv1.weight, other.conv1.weight)


def test_an_encoder_that_is_no_resnet_is_refused(tmp_path):
    model = SatMIP(ModelConfig(vit="vit_micro"))
    state = {"model": model.state_dict(), "model_config": asdict(model.config)}
    save(tmp_path / "checkpoint.pt", state)
    with pytest.raises(BadInput, match="vit_micro; wanted a run of train.py --vit resnet50$"):
        transfer.image_encoder(str(tmp_path), 0)


# --------------------------------------------------------------------------------------------------
# xview


def feature(image, kind, bounds) -> dict:
    properties = {"bounds_imcoords": bounds, "edited_by": "someone", "cat_id": "1040010028371A00"}
    properties |= {"type_id": kind, "image_id": image, "feature_id": 374410}
    ring = [[-90.53, 14.56], [-90.53, 14.57], [-90.52, 14.57], [-90.53, 14.56]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "properties": properties, "geometry": geometry}


def write_boxes(source: Path, features: list[dict]) -> Path:
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}
    collection = {"type": "FeatureCollection", "crs": crs, "features": features}
    (source / "xView_train.geojson").write_text(json.dumps(collection))
    return source / "xView_train.geojson"


@pytest.fixture
def source(tmp_path) -> Path:
    """Three images of 120 x 100 px with a red square each, and the flaws of the distribution."""
    folder, features = tmp_path / "xView", []
    (folder / "train_images").mkdir(parents=True)
    (folder / "xview_class_labels.txt").write_text("11:Fixed-wing Aircraft\n73:Building\n")
    for i in (100, 101, 102):
        pixels = np.full((100, 120, 3), 90, np.uint8)
        pixels[20:60, 30:70] = [230, 0, 0]
        Image.fromarray(pixels).save(folder / "train_images" / f"{i}.tif")
        features.append(feature(f"{i}.tif", 73, "30,20,70,60"))
    (folder / "train_images" / "._100.tif").write_bytes(b"Mac OS X")
    features += [feature("1395.tif", 11, "1,2,30,40"), feature("1395.tif", 11, "5,2,30,40")]
    features += [feature("100.tif", kind, "1,2,30,40") for kind in (75, 82)]
    features += [feature("100.tif", 11, bounds) for bounds in ("-9,-8,40,50", "100,90,130,104")]
    features += [feature("100.tif", 11, bounds) for bounds in ("-9,5,-1,9", "121,5,140,9")]
    features += [feature("101.tif", 73, "30,20,70,60"), feature("101.tif", 73, "1,2,x")]
    features += [feature("101.tif", 73, bounds) for bounds in ("1,2,3", "nan,2,3,4", None)]
    write_boxes(folder, features)
    return folder


def test_boxes_that_the_distribution_gets_wrong_are_dropped_and_counted(source, capsys):
    names = {"100.tif", "101.tif", "102.tif"}
    boxes = xview.read_boxes(source / "xView_train.geojson", ["11", "73"], names)
    assert boxes["101.tif"] == boxes["102.tif"] == [(1, 30, 20, 70, 60)]
    assert boxes["100.tif"][:2] == [(1, 30, 20, 70, 60), (0, -9, -8, 40, 50)]
    assert len(boxes["100.tif"]) == 5 and "1395.tif" not in boxes
    out = capsys.readouterr().out.replace("xView_train.geojson: ", "")
    assert sorted(out.splitlines()) == [
        "1 boxes dropped: twice in the file",
        "1 boxes dropped: type_id 75 is no class",
        "1 boxes dropped: type_id 82 is no class",
        "2 boxes dropped: there is no image 1395.tif",
        "4 boxes dropped: bounds_imcoords are not four numbers",
    ]


def test_boxes_are_cut_at_a_window_and_what_is_thinner_than_a_pixel_is_dropped():
    boxes = [[3, 0, 0, 20, 30], [1, 12, 22, 14, 24], [2, 0, 0, 10.5, 99], [0, 40, 0, 50, 50]]
    found = xview.inside(np.array(boxes, float), 10, 20, 30, 30)
    assert found.tolist() == [[3, 0, 0, 10, 10], [1, 2, 2, 4, 4]]


@pytest.mark.parametrize("width, height, fit", [(60, 90, 12), (16, 16, 1), (16, 40, 1)])
def test_chips_overlap_by_less_than_a_quarter(width, height, fit):
    places = xview.place_chips(width, height, 16, 30, 7).tolist()
    masks = np.zeros((len(places), height, width), bool)
    for mask, (x, y) in zip(masks, places):
        mask[y : y + 16, x : x + 16] = True
        assert mask.sum() == 256  # inside the image
    for a, b in itertools.combinations(masks, 2):
        assert (a & b).sum() < 64
    assert fit <= len(places) <= 30
    assert places == xview.place_chips(width, height, 16, 30, 7).tolist()


def test_chips_differ_between_images_and_reach_all_corners():
    places = xview.place_chips(400, 400, 8, 2000, 1)
    assert len(places) > 1000 and places.min() == 0 and places.max() == 392
    assert not np.array_equal(places[:9], xview.place_chips(400, 400, 8, 9, 2))
    assert len(xview.place_chips(400, 400, 8, 100, 1)) == 100


def test_chips_have_the_pixels_and_boxes_of_their_place(source, tmp_path, capsys):
    splits = xview.make_chips(source, tmp_path / "chips", ["11", "73"], 64, 0)
    out = capsys.readouterr().out
    assert "2 training and 1 test images" in out
    assert "1 files ._* skipped" in out
    assert "2 left out: boxes of which nothing lies in their image" in out
    assert f"{sum(map(len, splits)) / 3:.1f} chips an image fitted, of 100" in out
    images = [{record["file_name"].split("/")[0] for record in split} for split in splits]
    assert len(images[0]) == 2 and len(images[1]) == 1 and not images[0] & images[1]
    aircraft = []
    for split, record in [(split, record) for split in splits for record in split]:
        pixels = data.load_image(split.folder / record["file_name"], 64).astype(int)
        red = np.argwhere(pixels[..., 0] > 160)[:, ::-1]  # x, y
        buildings = [b for b, kind in zip(record["boxes"], record["classes"]) if kind == 1]
        aircraft += [b for b, kind in zip(record["boxes"], record["classes"]) if kind == 0]
        if len(red) > 300:
            corners = [*red.min(axis=0), *(red.max(axis=0) + 1)]
            np.testing.assert_allclose(buildings, [corners], atol=1)
    assert np.min(aircraft) >= 0 and np.max(aircraft) <= 64
    xview.make_chips(source, tmp_path / "chips", ["11", "73"], 64, 0)  # once only
    assert "exists, made of the same" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# detect


def boxes(*rows, scores=None) -> dict:
    """Rows of (label, x1, y1, x2, y2)."""
    table = torch.tensor(rows).reshape(-1, 5)
    found = {"boxes": table[:, 1:].float(), "labels": table[:, 0].long()}
    if scores is not None:
        found["scores"] = torch.tensor(scores)
    return found


def test_average_precision_by_hand():
    pytest.importorskip("pycocotools")
    truths = [boxes((0, 0, 0, 10, 10), (1, 50, 50, 60, 66)), boxes((0, 5, 5, 25, 25)), boxes()]
    found = [
        boxes((0, 0, 0, 10, 10), (1, 50, 50, 60, 60), scores=[0.9, 0.3]),
        boxes((0, 5, 5, 25, 25), (2, 0, 0, 5, 5), scores=[0.7, 0.9]),
        boxes((0, 1, 1, 9, 9), scores=[0.8]),
    ]
    # Class 0: a hit, a miss, a hit; precision 1 up to recall 0.5 (51 of COCO's 101 recalls), 2/3
    # beyond. Class 1: an IoU of 0.625, a hit at 0.5, 0.55 and 0.6. Class 2 has no true box.
    first = (51 + 50 * 2 / 3) / 101
    scores = detect.average_precision(truths, found, 3)
    assert scores == pytest.approx({"AP50": (first + 1) / 2, "AP": (first + 0.3) / 2})
    nothing = [boxes(scores=[])] * 3
    assert detect.average_precision(truths, nothing, 3) == {"AP50": 0, "AP": 0}


def test_average_precision_is_pycocotools_summary(tmp_path):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval
    rng, truths, found = np.random.default_rng(0), [], []
    annotations, detections = [], []
    for image in range(12):
        n = rng.integers(0, 9)
        corner, side = rng.integers(0, 300, (n, 2)), rng.integers(9, 99, (n, 2))
        true = np.concatenate([rng.integers(0, 4, (n, 1)), corner, corner + side], 1)
        moved = true[rng.random(n) < 0.8] + rng.integers(-4, 5, 5) * [0, 1, 1, 1, 1]
        score = rng.random(len(moved)).astype(np.float32)
        truths.append(boxes(*true.tolist()))
        found.append(boxes(*moved.tolist(), scores=score.tolist()))
        for k, a, b, c, d in true.tolist():
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": k, "iscrowd": 0}
            annotations.append(entry | {"bbox": [a, b, c - a, d - b], "area": (c - a) * (d - b)})
        for (k, a, b, c, d), s in zip(moved.tolist(), score.tolist()):
            entry = {"image_id": image, "category_id": k, "score": s}
            detections.append(entry | {"bbox": [a, b, c - a, d - b]})
    kinds = [{"id": k} for k in range(4)]
    images = [{"id": image} for image in range(12)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": kinds})
    (tmp_path / "truth.json").write_text(text)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "truth.json"))
        theirs = COCOeval(truth, truth.loadRes(detections), "bbox")
        for step in (theirs.evaluate, theirs.accumulate, theirs.summarize):
            step()
    ours = detect.average_precision(truths, found, 4)
    assert ours == pytest.approx({"AP": theirs.stats[0], "AP50": theirs.stats[1]})
    assert 0.1 < ours["AP"] < ours["AP50"] < 1


def test_the_detector_is_torchvisions_with_our_encoder_all_of_it_trained():
    from torchvision.models.detection import retinanet_resnet50_fpn

    encoder = transfer.image_encoder("random", 0)[0]
    ours = detect.retinanet(encoder, 60, 416, ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=60)
    shapes = {name: p.shape for name, p in ours.named_parameters() if p.requires_grad}
    assert shapes == {name: p.shape for name, p in theirs.named_parameters()}
    assert torch.equal(ours.backbone.body.conv1.weight, encoder.conv1.weight)
    ours.eval()
    image = torch.rand(3, 416, 416)
    seen = ours.transform([image])[0].tensors[0, :, :416, :416]
    expected = data.standardise(image, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)
    images, anchors = ours.transform([image])[0], []
    for dtype in (torch.float32, torch.bfloat16):  # autocast's features
        features = [torch.zeros(1, 256, n, n, dtype=dtype) for n in (52, 26, 13, 7, 4)]
        anchors.append(ours.anchor_generator(images, features)[0])
    assert torch.equal(*anchors), "not rounded to the features' type"


def test_detect_from_the_distribution_to_a_row(source, tmp_path, capsys):
    pytest.importorskip("pycocotools")
    run, folder = tmp_path / "runs" / "random", tmp_path / "runs" / "xView-chips-64"
    argv = ["random", source, "--output", run, "--chip", 64, "--epochs", 1, "--workers", 0]
    argv = [str(a) for a in [*argv, "--device", "cpu"]]
    detect.main(argv)
    assert "AP50 " in capsys.readouterr().out
    row = json.loads((run / "results.jsonl").read_text())
    wanted = {"method": "random", "protocol": "detect", "features": "image", "label": "label"}
    wanted |= {"data": str(source), "size": 64, "transfer_epochs": 1, "transfer_seed": 0}
    assert row | wanted == row and 0 <= row["AP"] <= row["AP50"] <= 1
    chips = [len(split) for split in data.read_dataset(folder)]
    assert [row["train"], row["test"]] == chips

    detect.main(argv)  # trained already: scored again
    first, second = (run / "results.jsonl").read_text().splitlines()
    assert first == second and "1 of 1 epochs are done" in capsys.readouterr().out
    detect.main([*argv, "--output", str(run.with_name("again"))])  # with the chips of the first
    weights = [read_checkpoint(run.with_name(name))["model"] for name in ("random", "again")]
    for name, values in weights[0].items():
        assert torch.equal(values, weights[1][name])
    assert "has seed 0, not 1" in refusal(detect.main, *argv, "--seed", 1)


def test_bad_input_is_one_line(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", ModuleType("pycocotools"))
    argv = ["random", source, "--output", tmp_path / "run", "--chip", 64, "--device", "cpu"]
    argv += ["--workers", 0]
    boxes, names = source / "xView_train.geojson", source / "xview_class_labels.txt"
    whole, images = boxes.read_text(), sorted((source / "train_images").glob("1*.tif"))

    line = refusal(detect.main, *argv, "--chip", 416)
    assert "120 x 100 px, smaller than a chip of 416" in line
    for text in ('{"features": []}', '{"features": [{"type": "Feature"}]}'):
        boxes.write_text(text)
        assert f"{boxes}: no features" in refusal(detect.main, *argv)
    for text in (whole[:-9], "[1]", '{"features": 3}', "", whole.replace("73", "\xe9")):
        boxes.write_bytes(text.encode("latin-1"))
        assert f"{boxes}: not GeoJSON, or cut off" in refusal(detect.main, *argv)
    write_boxes(source, [feature("9.tif", 73, "1,2,3,4")])
    assert "no box of a known class in any image" in refusal(detect.main, *argv)
    boxes.write_text(whole)

    images[0].write_bytes(images[0].read_bytes()[:500])
    line = refusal(detect.main, *argv)
    assert f"{images[0]}: damaged" in line and "mend it, remove" in line
    for text, what in (("", "no class"), ("11:Aircraft\nfoo\n", "line 2: 'foo' is not type_id")):
        names.write_text(text)
        assert what in refusal(detect.main, *argv)
    names.unlink()
    assert f"{names}: no such file" in refusal(detect.main, *argv)
    names.write_text("73:Building")
    for path in images:
        path.unlink()
    assert "no file *.tif in it" in refusal(detect.main, *argv)
    boxes.unlink()
    assert "--epochs: 1 or more" in refusal(detect.main, *argv, "--epochs", 0)
    assert "--chip 8: 32 px or more" in refusal(detect.main, *argv, "--chip", 8)
    assert "no such file" in refusal(detect.main, tmp_path / "none", *argv[1:])
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert "pip install pycocotools" in refusal(detect.main, *argv)
