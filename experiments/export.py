"""The image encoder of a run for other programs: timm's names (torchvision's for ResNet-50).

    python -m experiments.export runs/satmips OUT                   # encoder.pt and encoder.json
    python -m experiments.export runs/satmips OUT --features DATA   # also its features of a dataset

encoder.json says how to build the network and standardise its input. In timm:

    import json, timm, torch
    about = json.load(open("OUT/encoder.json"))
    vit = timm.create_model(about["timm"], **about["arguments"])
    vit.load_state_dict(torch.load("OUT/encoder.pt"))
    mean, std = (torch.tensor(about[name])[:, None, None] for name in ("mean", "std"))
    features = vit((images - mean) / std)  # images [B, 3, side, side], RGB in 0..1

With --features: train.npy and test.npy, float32 [n, D], and train.json and test.json, their files;
as evaluate.py does, they standardise DATA with its own mean and std.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch

import data
from evaluate import extract, load_pretrained, read_checkpoint
from experiments.common import devices
from metadata import BadInput
from model import VITS


def write(path: Path, content: bytes) -> None:
    """Written beside and renamed: a kill leaves no half a file of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)
    print(path)


def describe(state: dict) -> dict:
    """How to build the encoder, and what it expects of its input."""
    config = state["model_config"]
    mean, std = state.get("own_statistics") or state["statistics"]
    about = {
        "input": "images [B, 3, side, side], RGB in 0..1, minus mean, divided by std, by channel",
        "side": config["image_size"], "mean": mean, "std": std, "trained by": state["config"],
    }  # fmt: skip
    if config["vit"] == "resnet50":
        return about | {"torchvision": "resnet50", "missing": ["fc.weight", "fc.bias"]}
    width, layers, heads = VITS[config["vit"]]
    arguments = {
        "img_size": config["image_size"], "patch_size": config["patch_size"], "embed_dim": width,
        "depth": layers, "num_heads": heads, "num_classes": 0,
    }  # fmt: skip
    return about | {"timm": "vit_small_patch16_224", "arguments": arguments}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a run, or its checkpoint.pt")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--features", type=Path, metavar="DATA", help="dataset whose features it "
                        "writes, too")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode images")
    parser.add_argument("--device", choices=devices(), default=devices()[-1])
    args = parser.parse_args(argv)
    with data.errors_in_one_line():
        if args.features and not args.features.is_dir():
            raise BadInput(f"--features {args.features}: no such folder; wanted a prepared dataset")
        splits = data.read_dataset(args.features) if args.features else ()
        path = args.run
        if path.is_dir():
            path = path / "checkpoint.pt"
        state, prefix, weights = read_checkpoint(path), "image_encoder.", {}
        if "statistics" not in state and "own_statistics" not in state:
            raise BadInput(f"{path}: no statistics of its images; others' weights need no export")
        for name, tensor in state["model"].items():
            if name.startswith(prefix):
                weights[name.removeprefix(prefix)] = tensor
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        write(args.out / "encoder.pt", buffer.getvalue())
        write(args.out / "encoder.json", json.dumps(describe(state), indent=1).encode())
        if splits:
            p = load_pretrained(path, torch.device(args.device))
            p.reader, options = None, (splits[0], p.image_size, args.workers)
            p.statistics = p.statistics or data.channel_statistics(*options)
            for name, split in zip(("train", "test"), splits):
                features = extract(p, split, args.workers)["image"].cpu().numpy()
                buffer = io.BytesIO()
                np.save(buffer, features)
                write(args.out / f"{name}.npy", buffer.getvalue())
                names = split.columns("file_name")[0]
                write(args.out / f"{name}.json", json.dumps(names).encode())


if __name__ == "__main__":
    main()
