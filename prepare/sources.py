"""What several scripts share: finding files, optional packages, encoding images."""

import importlib
import io
import itertools
import os
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from metadata import BadInput

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


def need(package: str, what: str = "this") -> ModuleType:
    """An optional package, or one line on how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise BadInput(f"{what} needs a package: pip install {package}") from None


def eight_bits(values: np.ndarray, low: float, high: float) -> Image.Image:
    """[h, w, 3] -> an image: the values low and high become 0 and 255."""
    values = (values.astype(np.float64) - low) * (255 / (high - low))
    return Image.fromarray(np.rint(np.nan_to_num(values)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=95)  # of a JPEG
    return buffer.getvalue()
