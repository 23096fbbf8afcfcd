"""Images of any depth and any number of bands -> 8 bits, three bands."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from data import FORMATS, MAX_PIXELS, bits_per_sample, open_image
from metadata import BadInput
from prepare.loop import encode

KEPT = ("JPEG", "MPO", "PNG")  # MPO: a camera's JPEG with a preview behind it
DEEP = ("I;16", "I;16B", "I;16L", "I", "F")  # Pillow's modes of more than 8 bits, of one band
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_tiff(path: Path) -> np.ndarray:
    """A TIFF's pixels [h, w] or [h, w, bands], by tifffile, which reads what Pillow cannot."""
    try:
        import tifffile
    except ImportError:
        raise BadInput(f"{path}: a TIFF that Pillow cannot read: pip install tifffile") from None
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            compression = series.keyframe.compression
            axes, frame = series.axes, series.keyframe
            width, height = frame.imagewidth, frame.imagelength
            if width * height > MAX_PIXELS:
                raise BadInput(f"{path}: {width} x {height} px; {MAX_PIXELS:,} at most")
            pixels = series.asarray()
    except BadInput:
        raise
    except Exception as error:  # tifffile has many kinds
        if "imagecodecs" in str(error):
            name = getattr(compression, "name", compression)
            raise BadInput(f"{path}: {name} compression: pip install imagecodecs") from None
        raise BadInput(f"{path}: damaged, or no TIFF") from None
    if pixels.ndim == 3:  # bands first, last, or one a page: the file says which
        (bands,) = [axis for axis in range(3) if axes[axis] not in "YX"] or [2]
        pixels = np.moveaxis(pixels, bands, 2)
    return pixels


def read_pixels(path: Path) -> np.ndarray:
    """Pixels as the file holds them, of any depth, [h, w] or [h, w, bands]."""
    content, image = path.read_bytes(), None
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        bits, pages = bits_per_sample(image, content), getattr(image, "n_frames", 1)
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        if content[:4] not in TIFF:
            raise BadInput(f"{path}: damaged, or no image") from None
        return read_tiff(path)
    if image.width * image.height > MAX_PIXELS:
        raise BadInput(f"{path}: {image.width} x {image.height} px; {MAX_PIXELS:,} at most")
    if content[:4] in TIFF and (pages > 1 or (bits > 8 and image.mode not in DEEP)):
        return read_tiff(path)
    if bits <= 8:
        image = open_image(io.BytesIO(content), path)
        return np.asarray(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB"))
    try:
        if image.mode in DEEP:
            return np.asarray(image)
        if image.format == "PNG":
            file = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels = decode_png(file, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
            return pixels[..., :1] if pixels.shape[2] == 2 else pixels  # gray and alpha
    except (OSError, SyntaxError, RuntimeError):
        raise BadInput(f"{path}: damaged, or no image") from None
    raise BadInput(f"{path}: {image.format} of {bits} bits a sample; make a TIFF or PNG of it")


def three_bands(pixels: np.ndarray, path: Path, low: float, high: float) -> Image.Image:
    """Gray three times, or the first three bands; the values low and high become 0 and 255."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] > 4:
        raise BadInput(f"{path}: shape {pixels.shape}; wanted are 1 to 4 bands, red, green, blue")
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, 2)
    pixels = (pixels.astype(np.float64) - low) * (255 / (high - low))
    return Image.fromarray(np.rint(np.nan_to_num(pixels)).clip(0, 255).astype(np.uint8))


def eight_bit_image(path: Path, limits: list[float] | None) -> Image.Image:
    """An image of one's own; without limits it has 8 bits, also where Pillow does not know it."""
    if limits:
        return three_bands(read_pixels(path), path, *limits)
    content = path.read_bytes()
    try:
        image = open_image(io.BytesIO(content), path)
    except BadInput as refusal:
        if content[:4] not in TIFF or "bits per sample" in str(refusal):
            raise
        pixels = read_tiff(path)
        bands = pixels.shape[2] if pixels.ndim == 3 else 1
        if pixels.dtype != np.uint8 and bands <= 4:
            what = f"{bands} bands of {pixels.dtype}; --range LOW HIGH makes 8 bits of them"
            raise BadInput(f"{path}: {what}") from None
        return three_bands(pixels, path, 0, 255)
    if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1 and image.mode == "L":
        raise BadInput(f"{path}: {image.n_frames} pages; --range 0 255 reads them as bands")
    return image


def reduced(path: Path, limits: list[float] | None, size: int | None) -> tuple[bytes, str, tuple]:
    """-> a file that training reads, its suffix, how many times smaller it is in x and y.

    A JPEG or PNG of 8 bits keeps its bytes, unless its longer side is above `size`."""
    image = eight_bit_image(path, limits)
    width, height = image.size
    if not limits and image.format in KEPT and max(image.size) <= (size or MAX_PIXELS):
        return path.read_bytes(), path.suffix, (1, 1)
    image = image.convert("RGB")
    if size and max(image.size) > size:
        scale = size / max(image.size)
        sides = max(1, round(width * scale)), max(1, round(height * scale))
        image = image.resize(sides, Image.Resampling.BOX)
    return encode(image), ".png", (width / image.width, height / image.height)
