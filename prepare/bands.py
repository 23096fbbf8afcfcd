"""Images of any depth and any number of bands -> 8 bits, three bands."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data import FORMATS, MAX_PIXELS, bits_per_sample, open_image
from metadata import BadInput
from prepare.sources import eight_bits, encode, need

KEPT = ("JPEG", "MPO", "PNG")  # MPO: a camera's JPEG with a preview behind it
ONE_BAND = ("I;16", "I;16B", "I;16L", "I", "F")  # Pillow's modes of more than 8 bits
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def pages_are_bands(image: Image.Image) -> bool:
    """Whether a gray TIFF has further pages that are no smaller copies of the first."""
    if image.format != "TIFF" or image.mode not in ("L", *ONE_BAND) or image.n_frames == 1:
        return False
    size = image.size
    image.seek(1)
    same = image.size == size
    image.seek(0)
    return same


def check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadInput(f"{path}: {width} x {height} px; {MAX_PIXELS:,} at most")


def read_tiff(path: Path) -> np.ndarray:
    """A TIFF's pixels [h, w] or [h, w, bands], by tifffile, which reads what Pillow cannot."""
    tifffile, compression = need("tifffile", f"{path}: a TIFF that Pillow cannot read"), ""
    try:
        with tifffile.TiffFile(path) as file:
            series, frame = file.series[0], file.series[0].keyframe
            check_size(path, frame.imagewidth, frame.imagelength)
            axes, compression = series.axes, frame.compression.name
            pixels = series.asarray()
    except BadInput:
        raise
    except Exception as error:  # tifffile has many kinds
        if "imagecodecs" in str(error):
            need("imagecodecs", f"{path}: {compression} compression")
        raise BadInput(f"{path}: damaged, or no TIFF") from None
    if pixels.ndim == 3:  # bands first, last, or one a page: the file says which
        (bands,) = [axis for axis in range(3) if axes[axis] not in "YX"] or [2]
        pixels = np.moveaxis(pixels, bands, 2)
    return pixels


def read_pixels(path: Path) -> np.ndarray:
    """Pixels as the file holds them, of any depth, [h, w] or [h, w, bands]."""
    content = path.read_bytes()
    tiff = content[:4] in TIFF
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        check_size(path, *image.size)
        deep = bits_per_sample(image, content) > 8
        if tiff and (pages_are_bands(image) or (deep and image.mode not in ONE_BAND)):
            return read_tiff(path)
        if deep and image.format == "JPEG2000":  # Pillow scales them to 8 or 16 bits
            return need("imagecodecs", f"{path}: a deep JPEG 2000").jpeg2k_decode(content)
        if deep and image.format == "PNG" and image.mode not in ONE_BAND:  # and these
            return need("imagecodecs", f"{path}: a deep PNG").png_decode(content)
        if deep and image.format == "PPM" and image.mode != "F":  # and these
            pixels = np.frombuffer(content, ">u2", offset=image.tile[0].offset)
            return pixels.reshape(image.height, image.width, -1)
        return np.asarray(image if image.mode in ("L", *ONE_BAND) else image.convert("RGB"))
    except BadInput:
        raise
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        if tiff:
            return read_tiff(path)
        raise BadInput(f"{path}: damaged, or no image") from None


def three_bands(pixels: np.ndarray, path: Path, low: float, high: float) -> Image.Image:
    """Gray three times, or the first three bands; the values low and high become 0 and 255."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] > 4:
        raise BadInput(f"{path}: shape {pixels.shape}; wanted are 1 to 4 bands, red, green, blue")
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, 2)
    return eight_bits(pixels, low, high)


def eight_bit_image(path: Path, limits: list[float] | None) -> Image.Image:
    """An image of one's own; without limits it has 8 bits, also where Pillow does not know it."""
    if limits:
        return three_bands(read_pixels(path), path, *limits)
    try:
        image = open_image(path, path)
    except BadInput as refusal:
        if "bits per sample" in str(refusal):
            raise
        pixels = read_pixels(path)  # a TIFF that Pillow does not know
        image = three_bands(pixels, path, 0, 255)
        if pixels.dtype != np.uint8:
            what = f"bands of {pixels.dtype}; --range LOW HIGH makes 8 bits of them"
            raise BadInput(f"{path}: {what}") from None
        return image
    if pages_are_bands(image):
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
