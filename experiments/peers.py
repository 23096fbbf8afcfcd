"""Speed beside others' code, in pairs: augmentation, ViT-S, kNN, linear probe, micro-batches.

    pip install timm scikit-learn && OMP_NUM_THREADS=1 python -m experiments.peers

Each line is the median and the range of their CPU time over ours: above 1 ours is faster. Both
sides of a pair run one after the other, so that other load meets both.
"""

import argparse
import random
import statistics
import time
from typing import Callable

import train  # first: it sets the environment that torch reads

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter

import data
import evaluate
import model
from prepare.sources import need

CLASSES = 62


def compare(name: str, ours: Callable, theirs: Callable, pairs: int) -> None:
    """Print theirs / ours; the first pair warms up."""
    ratios = []
    for _ in range(pairs + 1):
        start = time.process_time()
        ours()
        middle = time.process_time()
        theirs()
        ratios.append((time.process_time() - middle) / (middle - start))
    ratios = ratios[1:]
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"{name}: {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


def augmentation(pairs: int) -> None:
    """32 views, strong policy, 256 -> 224 px, beside SLIP's recipe on PIL images."""
    small = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
    pil = [Image.fromarray(x).resize((256, 256), Image.Resampling.BILINEAR) for x in small]
    images = torch.from_numpy(np.stack(pil)).permute(0, 3, 1, 2).contiguous()
    blur = T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    slip = T.Compose([
        T.RandomResizedCrop(224, scale=(0.2, 1.0)), T.RandomHorizontalFlip(),
        T.RandomVerticalFlip(), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(0.2), T.RandomApply([blur], p=0.5), T.ToTensor(),
    ])  # fmt: skip
    policy, rows = data.POLICIES["strong"], torch.arange(32)

    def ours() -> None:
        epoch = random.randrange(1000)
        data.augment(images, data.draw(policy, 256, 0, epoch, rows, 0), 224)

    compare("augmentation, torchvision on PIL / ours", ours, lambda: list(map(slip, pil)), pairs)


def networks(pairs: int) -> None:
    """ViT-S/16 at 224 px, batch 4, forward and backward."""
    timm, images = need("timm"), torch.randn(4, 3, 224, 224)
    options = {"num_heads": 12, "num_classes": 0}
    theirs = timm.create_model("vit_small_patch16_224", **options)
    ours = model.build_image_encoder("vit_small", 224, 16)
    both = [lambda net=net: net(images).sum().backward() for net in (ours, theirs)]
    compare("ViT-S/16, timm / ours", *both, pairs)
    steps = []
    for piece in ("0", "4"):
        config = train.parse_config(["--method", "simclr", "--data", "-", "--micro-batch", piece])
        net = model.SatMIP(model.ModelConfig(image_image="simclr"))
        optimizer = model.make_optimizer(net, "adamw", 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        amp = torch.autocast("cpu", enabled=False)
        batch = train.Batch(torch.randn(2, 8, 3, 224, 224), (), None)
        state = (net, net, optimizer, scaler, batch, config, amp)
        steps.append(lambda state=state: train.train_step(*state))
    compare("SimCLR, 8 images, micro-batches of 4 / whole", *steps, max(3, pairs // 2))


def classifiers(pairs: int) -> None:
    """20,000 training and 4,000 test features of width 384, a fifth of the labels wrong."""
    neighbors, linear = need("sklearn.neighbors"), need("sklearn.linear_model")
    torch.manual_seed(0)
    centres, y = torch.randn(CLASSES, 384), torch.randint(CLASSES, (20_000,))
    x = centres[y] + 3 * torch.randn(len(y), 384)
    test = centres[torch.randint(CLASSES, (4_000,))] + 3 * torch.randn(4_000, 384)
    y = torch.where(torch.rand(len(y)) < 0.2, torch.randint(CLASSES, y.shape), y)

    def brute_force() -> None:
        options = {"algorithm": "brute", "metric": "cosine"}
        for k in evaluate.KS:
            votes = neighbors.KNeighborsClassifier(
                k, weights=lambda distance: np.exp((1 - distance) / evaluate.TEMPERATURE), **options
            )
            votes.fit(x.numpy(), y.numpy()).predict_proba(test.numpy())

    ours = lambda: evaluate.knn(x, y, test, CLASSES)  # noqa: E731
    compare("kNN at four k, scikit-learn's brute force / ours", ours, brute_force, pairs // 2)
    x = (x - x.mean(0)) / x.std(0)
    for kind in (np.float64, np.float32):
        solver = linear.LogisticRegression(C=np.inf, max_iter=200, tol=1e-5)
        theirs = lambda: solver.fit(x.numpy().astype(kind), y.numpy())  # noqa: B023, E731
        ours = lambda: evaluate.logistic_regression(x, y, CLASSES)  # noqa: E731
        name = f"linear probe, scikit-learn in {kind.__name__} / ours"
        compare(name, ours, theirs, max(2, pairs // 3))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10, help="rounds per comparison (default: 10)")
    args = parser.parse_args(argv)
    with data.errors_in_one_line():
        for work in (augmentation, networks, classifiers):
            work(max(2, args.pairs))


if __name__ == "__main__":
    main()
