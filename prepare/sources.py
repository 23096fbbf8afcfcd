"""What the scripts of the papers' datasets share: their files, optional packages, Table S1."""

import importlib
import itertools
import os
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from data import class_ids, read_dataset
from metadata import BadInput
from prepare.loop import read_list

TABLE_S1 = {  # training images, test images, classes
    "fmow": (363_572, 53_043, 62), "resisc45": (18_900, 6_300, 45), "optimal31": (930, 930, 31),
    "ucmerced": (1_260, 840, 21), "fgsc23": (3_256, 824, 23), "eurosat": (16_200, 5_400, 10),
    "so2sat": (352_366, 48_307, 17),
}  # fmt: skip
ARCHIVES = (".zip", ".rar", ".tar", ".tar.gz", ".tgz", ".tar.bz2")
# NOTE[PAPER] two of fMoW's codes are no countries: Kosovo's becomes the one in use
COUNTRIES = {"KO-": "XKX", "CA-": None}
# NOTE[PAPER] Sentinel-2's 16 bits become 8 as in EuroSAT's own JPEGs: reflectance 0.275 is white.
REFLECTANCE = 0.275


def list_files(source: Path, *endings: str, under: tuple[str, ...] = ("",)) -> list[Path]:
    """The files whose names end so in these folders of `source`, sorted; links are followed."""
    found, companions, walked = [], 0, set()
    walks = (os.walk(source / name, followlinks=True) for name in under)
    for folder, folders, names in itertools.chain.from_iterable(walks):
        if os.path.realpath(folder) in walked:  # a link to a folder above it
            folders.clear()
            continue
        walked.add(os.path.realpath(folder))
        names = [name for name in names if name.endswith(endings)]
        found += [Path(folder, name) for name in names if not name.startswith("._")]
        companions += sum(name.startswith("._") for name in names)
    if companions:
        print(f"{source}: {companions:,} files ._* skipped, which macOS puts beside others")
    if not found:
        packed = sorted(path.name for path in source.glob("*") if path.name.endswith(ARCHIVES))
        advice = f"unpack {', '.join(packed)} first" if packed else "see prepare/README.md"
        raise BadInput(f"{source}: no file *{' or *'.join(endings)} in it; {advice}")
    return sorted(found, key=str)


def split_by_lists(source: Path, paths: list[Path], lists: dict[str, str]) -> dict[Path, str]:
    """-> the split of each path whose stem is in a list. lists: file in `source` -> split."""
    splits = {}
    for name, split in lists.items():
        splits |= dict.fromkeys(read_list(source, name), split)
    return {path: splits[path.stem] for path in paths if path.stem in splits}


def need(package: str) -> ModuleType:
    """An optional package, or one line on how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise BadInput(f"{package} is not installed: pip install {package}") from None


def eight_bits(values: np.ndarray, white: float) -> Image.Image:
    """[h, w, 3] -> an image: 0 and below are black, `white` and above are white."""
    return Image.fromarray(np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8))


def report(folder: Path, name: str) -> None:
    """How many images and classes there are, beside the paper's."""
    *images, classes = TABLE_S1[name]
    for split, expected in zip(read_dataset(folder), images):
        found = len(class_ids("label", split)[0])
        paper = f"Table S1: {expected:,} of {classes}"
        print(f"{split.folder.name}: {len(split):,} images of {found} classes ({paper})")
