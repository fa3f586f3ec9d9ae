"""One image file to pixels: any common format and mode to 8-bit gray or RGB, upright, square."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unlabeled.data.files import UNREADABLE

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")
GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
Mode = Literal["L", "RGB"]


class BrokenImage(Exception):
    """An image that cannot be used; the message is the reason, without the path."""


def is_gray(path: Path, max_pixels: int) -> bool:
    """Return whether a file is a gray image, from its header (for a palette, from its colours).

    Raises:
        BrokenImage: the file is empty, unreadable, no image, damaged in its header, or above `max_pixels`.
    """
    with _opened(path, max_pixels) as image:
        if image.mode != "P":
            return image.mode in GRAY_MODES
        colours = np.reshape(image.getpalette() or [], (-1, 3))
        return bool((colours == colours[:, :1]).all())


def read_image(path: Path, mode: Mode, size: int, max_pixels: int) -> tuple[np.ndarray, int, int]:
    """Decode an image file: uint8 pixels (C, size, size), and the upright image's height and width as found.

    The first frame is taken, EXIF orientation applied, 16-bit gray scaled to 8 bits, transparency laid on
    white. The largest centred square is then brought to `size` by antialiased linear resampling.

    Raises:
        BrokenImage: as of `is_gray`, or the pixels are damaged, or 32-bit values.
    """
    with _opened(path, max_pixels) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = (left, top, left + side, top + side)
        resized = _to_8_bit(image, mode).resize((size, size), Image.Resampling.BILINEAR, box=square)
    pixels = np.asarray(resized).reshape(size, size, -1)
    return np.moveaxis(pixels, -1, 0), height, width


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image by its header; whatever goes wrong with it in the body becomes a BrokenImage."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(UNREADABLE) + 1)
            if not start:
                raise BrokenImage("empty file")
            if start == UNREADABLE:
                raise BrokenImage(UNREADABLE.decode().strip())
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BrokenImage(f"too large: {width} x {height} px, {max_pixels} px are allowed")
                yield image
    except PermissionError:
        raise BrokenImage(UNREADABLE.decode().strip()) from None
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BrokenImage(str(error.strerror).lower()) from None
    except Image.DecompressionBombError:
        raise BrokenImage("too large: above Pillow's own limit of 178956970 px") from None
    except UnidentifiedImageError:
        raise BrokenImage(f"no image: {', '.join(FORMATS)} are read") from None
    except (BrokenImage, MemoryError):
        raise
    except Exception as error:  # Pillow raises errors of many types on damaged files
        raise BrokenImage(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


def _to_8_bit(image: Image.Image, mode: Mode) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise BrokenImage("32-bit values, whose range is unknown; save them in 8 or 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)
