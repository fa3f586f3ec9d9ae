"""Makers of image files: every format and mode that ingest reads, and files that are broken in known ways."""

import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 24


def pixels(seed: int = 0, side: int = SIDE, channels: int = 0) -> np.ndarray:
    """Return random uint8 pixels: (side, side), or (side, side, channels)."""
    shape = (side, side, channels) if channels else (side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def gray_folder(folder: Path, count: int = 60, side: int = SIDE) -> Path:
    """Write `count` different gray PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(pixels(index, side)).save(folder / f"{index:04d}.png")
    return folder


def _palette(path: Path) -> None:
    Image.fromarray(pixels(channels=3)).quantize(16).save(path)


def _animation(path: Path) -> None:
    first, second = (Image.fromarray(pixels(seed, channels=3)) for seed in (0, 1))
    first.save(path, save_all=True, append_images=[second])


def _mode(mode: str, **options: object) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(pixels(channels=3)).convert(mode).save(path, **options)


def _gray_16(path: Path) -> None:
    Image.fromarray(pixels().astype(np.uint16) * 257).save(path)


# Every way to store an image that ingest reads, by file name.
READABLE: dict[str, Callable[[Path], None]] = {
    "gray.png": _mode("L"),
    "gray alpha.png": _mode("LA"),
    "bilevel.png": _mode("1"),
    "palette.png": _palette,
    "rgb.png": _mode("RGB"),
    "rgba.png": _mode("RGBA"),
    "gray16.png": _gray_16,
    "gray.jpg": _mode("L"),
    "rgb.jpeg": _mode("RGB"),
    "cmyk.jpg": _mode("CMYK"),
    "UPPER.JPG": _mode("RGB"),
    "gray.bmp": _mode("L"),
    "rgb.bmp": _mode("RGB"),
    "lossless.webp": _mode("RGB", lossless=True),
    "lossy.webp": _mode("RGBA"),
    "gray.tif": _mode("L"),
    "rgb lzw.tiff": _mode("RGB", compression="tiff_lzw"),
    "cmyk.tif": _mode("CMYK"),
    "gray16.tif": _gray_16,
    "palette.gif": _palette,
    "animated.gif": _animation,
    "animated.webp": _animation,
    "animated.png": _animation,
    "pages.tif": _animation,
    "ünïcode — 図.png": _mode("RGB"),
    "deep/er/and deeper/rgb.png": _mode("RGB"),
}


def _truncated(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        READABLE[name](path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return write


def png_bomb(path: Path, side: int = 30_000) -> None:
    """Write a PNG of a few bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def _bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


# Files that are broken, by file name: how to write one, and what its reason must say.
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty.png": (_bytes(b""), "empty file"),
    "text.png": (_bytes(b"this is no image\n" * 20), "no image"),
    "page.jpg": (_bytes(b"<html>not found</html>"), "no image"),
    "archive.png": (_bytes(gzip.compress(b"abc")), "no image"),
    "drawing.svg": (_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "no image"),
    "postscript.eps": (_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no image"),
    "one byte.jpg": (_bytes(b"\xff"), "no image"),
    "truncated.png": (_truncated("rgb.png"), "damaged"),
    "truncated.jpg": (_truncated("rgb.jpeg"), "damaged"),
    "truncated.bmp": (_truncated("rgb.bmp"), "damaged"),
    "truncated.gif": (_truncated("palette.gif", 0.9), "damaged"),
    "truncated.tif": (_truncated("gray.tif"), ""),
    "truncated lzw.tif": (_truncated("rgb lzw.tiff"), ""),
    "truncated.webp": (_truncated("lossless.webp"), ""),
    "header only.png": (lambda path: _truncated("rgb.png", 0.02)(path), ""),
    "bomb.png": (png_bomb, "too large"),
    "big.png": (lambda path: png_bomb(path, 9000), "too large: 9000 x 9000 px"),
    "float.tif": (lambda path: Image.fromarray(np.ones((9, 9), np.float32)).save(path), "32-bit"),
    "int32.tif": (lambda path: Image.fromarray(np.full((9, 9), 1 << 20, np.int32)).save(path), "32-bit"),
    "negative.tif": (lambda path: Image.fromarray(np.full((9, 9), -1, np.int32)).save(path), "32-bit"),
}


def write_idx(path: Path, array: np.ndarray, kind: int = 0x08) -> Path:
    """Write an IDX file of the array's bytes; gzipped where the name ends in `.gz`."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    data = header + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def idx_folder(folder: Path, train: int = 100, test: int = 20, end: str = "") -> Path:
    """Write the four files of a set in MNIST's layout, 10 classes, 8 x 8 pixels."""
    rng = np.random.default_rng(0)
    for name, count in [("train", train), ("t10k", test)]:
        images = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte{end}", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte{end}", (np.arange(count) % 10).astype(np.uint8))
    return folder
