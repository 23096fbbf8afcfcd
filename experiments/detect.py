"""Object detection on xView from a pretrained ResNet-50 (Ayush et al., 2021, 5.2.1, Table 3).

    python -m experiments.detect runs/moco XVIEW --output runs/detect/moco
    python -m experiments.detect random XVIEW --output runs/detect/random

XVIEW is the training set as it is distributed, see experiments/xview.py. Its chips are cut once,
into runs/detect/XVIEW-chips-416, for all runs beside one another. torchvision's RetinaNet is
fine-tuned on them; AP50 and AP are printed, and added to OUTPUT/results.jsonl. Killed, the same
command goes on after the last whole epoch. pycocotools is needed here alone.
"""

import contextlib
import io

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import data
from experiments.results import append, percent
from experiments.transfer import Loader, arguments, check, epoch_rows, fit, image_encoder
from experiments.xview import make_chips, read_classes
from metadata import BadInput
from prepare.loop import progress
from prepare.sources import need

DETECTIONS = 100  # of a chip, at most, as COCO's AP has it
EPOCHS = 10  # NOTE[PAPER] how long is not said

# --------------------------------------------------------------------------------------------------
# Chips and network


def read_chips(split: data.Split, rows: list[int], size: int) -> list[tuple[Tensor, dict]]:
    """-> uint8 [3, size, size], {"boxes": float32 [n, 4] as x1, y1, x2, y2, "labels": [n]}."""
    chips = []
    for row in rows:
        record = split[row]
        pixels = torch.from_numpy(data.load_image(split.folder / record["file_name"], size).copy())
        boxes = torch.tensor(record["boxes"]).reshape(-1, 4)
        target = {"boxes": boxes, "labels": torch.tensor(record["classes"], dtype=torch.long)}
        chips.append((pixels.permute(2, 0, 1), target))
    return chips


def retinanet(encoder: nn.Module, classes: int, size: int, statistics: tuple) -> RetinaNet:
    """As torchvision.models.detection.retinanet_resnet50_fpn: Lin et al., 2017.

    NOTE[PAPER] anchors of 32 to 813 px are torchvision's; batch norm is trained, at 4 images.
    Anchors take the features' type, which autocast halves: they would be off by up to 2 px."""
    levels = {"layer2": "0", "layer3": "1", "layer4": "2"}
    extra = LastLevelP6P7(256, 256)
    backbone = BackboneWithFPN(encoder, levels, [512, 1024, 2048], 256, extra)
    model = RetinaNet(
        backbone, classes, min_size=size, max_size=size, image_mean=list(statistics[0]),
        image_std=list(statistics[1]), detections_per_img=DETECTIONS,
    )  # fmt: skip
    in_float32 = lambda _, inputs: (inputs[0], [x[:, :1].float() for x in inputs[1]])  # noqa: E731
    model.anchor_generator.register_forward_pre_hook(in_float32)
    return model


def on_device(batch: list[tuple[Tensor, dict]], device: torch.device) -> tuple[list, list]:
    images, targets = [], []
    for pixels, target in batch:
        images.append(data.plain(pixels.to(device)))
        targets.append({name: values.to(device) for name, values in target.items()})
    return images, targets


def train(model: RetinaNet, split: data.Split, size: int, args, about: dict) -> None:
    """Adam, learning rate 1e-5, batch 4, all weights. NOTE[PAPER] no augmentation is named; chips
    without a box are left out of training, but scored."""
    rows = torch.tensor([i for i, record in enumerate(split) if record["boxes"]])
    if not len(rows):
        raise BadInput(f"{split.path}: no training chip has a box")
    print(f"{len(rows):,} of {len(split):,} training chips have a box", flush=True)
    device = next(model.parameters()).device

    def batches(epoch: int) -> Loader:
        order = epoch_rows(len(rows), 4, args.seed, epoch)
        return Loader(order, lambda at: read_chips(split, rows[at].tolist(), size), args.workers)

    def step_loss(batch: list) -> Tensor:
        return sum(model(*on_device(batch, device)).values())

    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    fit(model, step_loss, batches, optimizer, args.epochs, args.output, about)


# --------------------------------------------------------------------------------------------------
# Scores


def as_coco(found: list[dict], classes: int):
    """Boxes of each image, with scores if they are detections, as pycocotools has them."""
    from pycocotools.coco import COCO

    boxes = []
    for image, of_image in enumerate(found, 1):
        corners = of_image["boxes"].double()
        sides = corners[:, 2:] - corners[:, :2]
        columns = [torch.cat([corners[:, :2], sides], 1).tolist(), of_image["labels"].tolist()]
        columns += [of_image.get("scores", torch.ones(len(corners))).tolist()]
        for box, label, score in zip(*columns):
            box = {"image_id": image, "category_id": label, "bbox": box, "score": score}
            boxes.append(box | {"id": len(boxes) + 1, "area": 1.0, "iscrowd": 0})
    coco = COCO()
    coco.dataset = {"annotations": boxes, "images": [{"id": i + 1} for i in range(len(found))]}
    coco.dataset["categories"] = [{"id": label} for label in range(classes)]
    coco.createIndex()
    return coco


def average_precision(truths: list[dict], found: list[dict], classes: int) -> dict[str, float]:
    """Of all images: boxes [n, 4], labels [n], of detections scores [n] -> AP50, and AP, the mean
    over IoU 0.5 to 0.95, both over the classes that occur; by pycocotools."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        scored = COCOeval(as_coco(truths, classes), as_coco(found, classes), "bbox")
        scored.params.maxDets = [1, 10, DETECTIONS]
        scored.params.areaRng, scored.params.areaRngLbl = [[0, 1e10]], ["all"]
        scored.evaluate()
        scored.accumulate()
    precision = scored.eval["precision"][..., 0, -1]  # [10 IoU, 101 recalls, C], -1: no such class
    occurs = precision[0, 0] > -1
    means = precision[..., occurs].mean(axis=(1, 2))
    return {"AP50": float(means[0]), "AP": float(means.mean())}


@torch.no_grad()
def detect(model: RetinaNet, split: data.Split, size: int, workers: int) -> tuple[list, list]:
    """-> true and found boxes of each chip. In float32: half precision rounds anchors to 2 px."""
    device, truths, found = next(model.parameters()).device, [], []
    model.eval()
    batches = list(torch.arange(len(split)).split(16))
    loader = Loader(batches, lambda at: read_chips(split, at.tolist(), size), workers)
    for batch in progress(loader, "test chips", len(loader)):
        images, _ = on_device(batch, device)
        truths += [target for _, target in batch]
        for answer in model(images):
            found.append({name: values.cpu() for name, values in answer.items()})
    return truths, found


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, "xView's folder: train_images/, xView_train.geojson, ...", EPOCHS)
    parser.add_argument("--chip", type=int, default=416, help="side of a chip, px (416)")
    args = parser.parse_args(argv)
    with data.errors_in_one_line():
        device = check(args)
        if args.chip < 32:
            raise BadInput(f"--chip {args.chip}: 32 px or more")
        need("pycocotools", "AP50")
        names = read_classes(args.source / "xview_class_labels.txt")
        encoder, about, statistics = image_encoder(args.checkpoint, args.seed)
        model = retinanet(encoder, len(names), args.chip, statistics)
        model.to(device, memory_format=torch.channels_last)
        chips = args.output.parent / f"{args.source.resolve().name}-chips-{args.chip}"
        splits = make_chips(args.source, chips, list(names), args.chip, args.workers)
        about |= {"features": "image", "label": "label", "protocol": "detect"}
        about |= {"data": str(args.source), "size": args.chip, "transfer_seed": args.seed}
        about["transfer_epochs"] = args.epochs
        train(model, splits[0], args.chip, args, about)
        truths, found = detect(model, splits[1], args.chip, args.workers)
        scores = average_precision(truths, found, len(names))
        scores |= {"train": len(splits[0]), "test": len(splits[1])}
        append(args.output / "results.jsonl", [about | scores])
        print(f"AP50 {percent(scores['AP50'])} %, AP {percent(scores['AP'])} %")


if __name__ == "__main__":
    main()
