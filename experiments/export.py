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
import json
from pathlib import Path

import numpy as np
import torch

import data
from evaluate import extract, load_pretrained, read_checkpoint
from experiments.common import devices
from metadata import BadInput
from model import VITS
from train import save


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
        p = load_pretrained(args.run, torch.device("cpu"))
        about = describe(read_checkpoint(args.run))
        save(args.out / "encoder.pt", p.model.image_encoder.state_dict())
        (args.out / "encoder.json").write_text(json.dumps(about, indent=1))
        if splits:
            p.model.to(args.device)
            p.reader, options = None, (splits[0], p.image_size, args.workers)
            p.statistics = p.statistics or data.channel_statistics(*options)
        for name, split in zip(("train", "test"), splits):
            np.save(args.out / f"{name}.npy", extract(p, split, args.workers)["image"].cpu())
            (args.out / f"{name}.json").write_text(json.dumps(split.columns("file_name")[0]))
        print(", ".join(sorted(map(str, args.out.iterdir()))))


if __name__ == "__main__":
    main()
