"""Semantic segmentation by a fine-tuned ResNet-50 (Ayush et al., 2021, Section 5.2.2, Table 4).

    python -m experiments.segment CHECKPOINT SPACENET --output runs/segment/moco-0
    python -m experiments.segment random IMAGES --masks MASKS --classes 17 --output runs/segment/r-0

SPACENET is AOI 1, Rio, as distributed: 3band/3band_*.tif and vectordata/geojson/Geo_*.geojson.
With --masks: a folder of images and one of PNG masks of the same names, whose palette or gray
values are classes, 255 for pixels without one. A prepared dataset keeps its splits, with masks in
MASKS/train and MASKS/test; SpaceNet or one folder is split at random, the same way always.

Images keep their pixels: training crops those larger than --size and pads the smaller ones of a
batch, which counts neither in the loss nor in scores; test images are predicted whole.

NOTE[DIFF] torchvision's DeepLabV3 in PSANet's place, which torchvision lacks: as PSANet, and unlike
FCN, it sees context from the whole image, at output stride 8 (a crop of 64 px: features of 8 x 8).
--stride 16 takes half the time; only the last stage of the ResNet-50 is dilated then.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

import data
from evaluate import autocast
from experiments import transfer
from experiments.masks import NONE, Pair, choose, find_pairs, read_pair
from experiments.results import append, percent
from metadata import BadInput
from prepare.loop import progress

BATCH = 16


def deeplab(encoder: nn.Module, classes: int, stride: int) -> nn.Module:
    """images [B, 3, h, w] -> {"out": [B, C, h, w]}, with the encoder's weights."""
    dilated = resnet50(weights=None, replace_stride_with_dilation=[False, stride == 8, True])
    dilated.fc = nn.Identity()
    dilated.load_state_dict(encoder.state_dict())
    backbone = create_feature_extractor(dilated, {"layer4": "out"})
    return DeepLabV3(backbone, DeepLabHead(encoder.width, classes))


def survey(pairs: list[Pair], classes: int, workers: int, name: str) -> None:
    """Reads every pair once, so that faults show at the start; says what the masks hold."""

    def read(row: Tensor) -> Tensor:
        mask = torch.from_numpy(read_pair(pairs[row], classes)[1])
        return torch.bincount(mask.flatten(), minlength=NONE + 1)[:classes]

    loader = transfer.Loader(list(torch.arange(len(pairs))), read, workers)
    counts = torch.stack(list(progress(loader, f"reading {name} images", len(loader))))
    shares = " ".join(f"{100 * s:.3g}" for s in counts.sum(0) / counts.sum().clamp(min=1))
    empty = (counts[:, 1:].sum(1) == 0).sum()
    print(f"{len(pairs):,} {name} images, {empty:,} of them without a class other than 0;")
    print(f"classes 0, 1, ... have {shares} % of the pixels", flush=True)
    if (counts.sum(0) > 0).sum() < 2:
        raise BadInput(f"{pairs[0].mask} and the other {name} masks show fewer than two classes")


def crop(image: np.ndarray, mask: np.ndarray, side: int, draws: np.ndarray) -> tuple:
    """NOTE[PAPER] augmentation is not given: PSANet's crops, and flips of rows and columns."""
    top, left = (int(u * (max(0, n - side) + 1)) for u, n in zip(draws, mask.shape))
    place = np.s_[top : top + side, left : left + side]
    image, mask = image[place], mask[place]
    if draws[2] < 0.5:
        image, mask = image[::-1], mask[::-1]
    if draws[3] < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    return image, mask


def stack(samples: list[tuple], mean: list[float]) -> tuple[Tensor, Tensor]:
    """-> images uint8 [B, 3, h, w], classes [B, h, w], padded below and to the right."""
    h, w = np.max([mask.shape for _, mask in samples], axis=0)
    images = np.full((len(samples), h, w, 3), np.rint(255 * np.array(mean)), np.uint8)
    masks = np.full((len(samples), h, w), NONE, np.uint8)
    for i, (image, mask) in enumerate(samples):
        images[i, : len(image), : image.shape[1]] = image
        masks[i, : len(mask), : mask.shape[1]] = mask
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(masks)


def logits(model: nn.Module, images: Tensor, statistics: tuple) -> Tensor:
    """uint8 [B, 3, h, w] -> float32 [B, C, h, w]"""
    images = images.to(next(model.parameters()).device, non_blocking=True)
    with autocast(images.device):
        return model(data.standardise(data.plain(images), *statistics))["out"].float()


def train(model: nn.Module, pairs: list[Pair], args, about: dict, statistics: tuple) -> None:
    """NOTE[PAPER] SGD's momentum, weight decay and schedule are not given: PSANet's, but the same
    learning rate for all layers, as with ten times as much for new ones the loss rises at first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def batches(epoch: int) -> transfer.Loader:
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - epoch / args.epochs) ** 0.9

        def read(rows: Tensor) -> tuple[Tensor, Tensor]:
            draws = data.uniform(args.seed, epoch, rows.numpy()[:, None], np.arange(4))
            samples = [read_pair(pairs[row], args.classes) for row in rows]
            return stack([crop(*s, args.size, u) for s, u in zip(samples, draws)], statistics[0])

        rows = transfer.epoch_rows(len(pairs), BATCH, args.seed, epoch)
        return transfer.Loader(rows, read, args.workers)

    def step_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        y = logits(model, batch[0], statistics)
        true = batch[1].to(y.device).long()
        total = F.cross_entropy(y, true, ignore_index=NONE, reduction="sum")
        return total / (true != NONE).sum().clamp(min=1)  # a batch may have no class at all

    transfer.fit(model, step_loss, batches, optimizer, args.epochs, args.output, about)


def confusion(predicted: Tensor, true: Tensor, classes: int) -> Tensor:
    """Pixels [C, C] of each true and predicted class, without those of no class."""
    known = true != NONE
    cells = true[known].long() * classes + predicted[known]
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def class_ious(counts: Tensor) -> Tensor:
    """Pixels [C, C] -> intersection over union of each class that occurs in the test masks; mIoU is
    their mean. A class that is predicted and never true lowers those that it was taken for."""
    hits, true = counts.diagonal().double(), counts.sum(1)
    return (hits / (true + counts.sum(0) - hits))[true > 0]


@torch.no_grad()
def score(model: nn.Module, pairs: list[Pair], args, statistics: tuple) -> dict:
    """Over all pixels of the test images together."""
    counts, classes = torch.zeros(args.classes, args.classes, dtype=torch.int64), args.classes

    def read(rows: Tensor) -> list[tuple]:
        return [read_pair(pairs[row], classes) for row in rows]

    loader = transfer.Loader(list(torch.arange(len(pairs)).split(BATCH)), read, args.workers)
    model.eval()
    for samples in progress(loader, "scoring", len(loader)):
        groups = [samples]
        if len({mask.shape for _, mask in samples}) > 1:  # padding would change predictions
            groups = [[sample] for sample in samples]
        for group in groups:
            images, true = stack(group, statistics[0])
            predicted = logits(model, images, statistics).argmax(1).cpu()
            counts += confusion(predicted, true, classes)
    ious, accuracy = class_ious(counts), counts.diagonal().sum() / counts.sum()
    numbers = counts.sum(1).nonzero()[:, 0].tolist()
    by_class = {str(number): iou for number, iou in zip(numbers, ious.tolist())}
    return {"mIoU": ious.mean().item(), "IoUs": by_class, "pixel_accuracy": accuracy.item()}


def main(argv: list[str] | None = None) -> None:
    parser = transfer.arguments(__doc__, "SpaceNet, or with --masks a folder of images", 100)
    add = parser.add_argument
    add("--masks", type=Path, help="folder of PNG masks")
    add("--classes", type=int, default=2, help="of the masks, numbered from 0 (2: buildings)")
    add("--images", type=int, nargs=2, default=[4000, 1000], help="training, test (4000 1000)")
    add("--size", type=int, default=473, help="side of a training crop in px (473, PSANet's)")
    add("--stride", type=int, choices=(8, 16), default=8, help="pixels a feature (8, PSANet's)")
    args = parser.parse_args(argv)
    with data.errors_in_one_line():
        device = transfer.check(args)
        if not 2 <= args.classes <= NONE or min(args.images) < 1 or args.size < 32:
            raise BadInput("--classes: 2 to 255; --images: 1 or more of each; --size: 32 or more")
        for folder in (args.source, args.masks):
            if folder and not folder.is_dir():
                raise BadInput(f"{folder}: no such folder")
        encoder, about, statistics = transfer.image_encoder(args.checkpoint, args.seed)
        pairs = choose(find_pairs(args.source, args.masks), args.images)
        if len(pairs[0]) < 2 or not pairs[1]:  # BatchNorm: a batch has two images or more
            wanted = "two training pairs and a test pair, 3band_*.tif and Geo_*.geojson, or --masks"
            raise BadInput(f"{args.source}: {len(pairs[0])} and {len(pairs[1])} pairs; {wanted}")
        for name, some in zip(("training", "test"), pairs):
            survey(some, args.classes, args.workers, name)
        model = deeplab(encoder, args.classes, args.stride)
        model = model.to(device, memory_format=torch.channels_last)
        about |= {"features": "image", "label": "label", "protocol": "segment"}
        about |= {"data": str(args.source), "masks": str(args.masks), "classes": args.classes}
        about |= {"transfer_seed": args.seed, "transfer_epochs": args.epochs, "size": args.size}
        about |= {"stride": args.stride, "train": len(pairs[0]), "test": len(pairs[1])}
        train(model, pairs[0], args, about, statistics)
        row = about | score(model, pairs[1], args, statistics)
        append(args.output / "results.jsonl", [row])
        ious = ", ".join(f"class {number} {percent(iou)}" for number, iou in row["IoUs"].items())
        print(f"mIoU {percent(row['mIoU'])} %; {ious}")


if __name__ == "__main__":
    main()
