"""Reading single image files: exact pixels where a format keeps them, a reason where a file is broken."""

from pathlib import Path

import numpy as np
import pytest
from images import BROKEN, READABLE, SIDE, pixels
from PIL import Image

from unlabeled.data.arrays import convert_channels
from unlabeled.data.files import UNREADABLE
from unlabeled.data.images import BrokenImage, Mode, is_gray, read_image

MAX_PIXELS = 64_000_000


def read(path: Path, mode: Mode = "RGB", size: int = SIDE) -> np.ndarray:
    return read_image(path, mode, size, MAX_PIXELS)[0]


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("name", READABLE)
def test_every_format_and_mode_reads(tmp_path: Path, name: str) -> None:
    path = tmp_path / Path(name).name
    READABLE[name](path)
    for mode, channels in [("L", 1), ("RGB", 3)]:
        image, height, width = read_image(path, mode, 10, MAX_PIXELS)
        assert (image.shape, image.dtype, height, width) == ((channels, 10, 10), np.uint8, SIDE, SIDE)
        assert image.std() > 5


@pytest.mark.parametrize("name", [name for name in READABLE if "gray" in name or "bilevel" in name])
def test_gray_is_seen_from_the_header(tmp_path: Path, name: str) -> None:
    READABLE[name](tmp_path / name)
    assert is_gray(tmp_path / name, MAX_PIXELS)


@pytest.mark.parametrize(
    "name", ["rgb.png", "palette.png", "cmyk.jpg", "animated.gif", "lossy.webp", "pages.tif"]
)
def test_colour_is_seen_from_the_header(tmp_path: Path, name: str) -> None:
    READABLE[name](tmp_path / name)
    assert not is_gray(tmp_path / name, MAX_PIXELS)


@pytest.mark.parametrize("end", ["png", "bmp", "tif"])
def test_gray_pixels_are_exact(tmp_path: Path, end: str) -> None:
    assert np.array_equal(read(save(tmp_path / f"a.{end}", pixels()), "L")[0], pixels())


@pytest.mark.parametrize("end", ["png", "bmp", "tif", "webp"])
def test_colour_pixels_are_exact(tmp_path: Path, end: str) -> None:
    colour = pixels(channels=3)
    path = save(tmp_path / f"a.{end}", colour, **({"lossless": True} if end == "webp" else {}))
    assert np.array_equal(read(path), colour.transpose(2, 0, 1))


@pytest.mark.parametrize("end", ["png", "tif"])
def test_16_bit_gray_is_scaled_with_rounding(tmp_path: Path, end: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
    values[0, :6] = [0, 65535, 128, 129, 257, 65535 - 128]
    image = read(save(tmp_path / f"a.{end}", values), "L")[0]
    assert np.array_equal(image, np.rint(values / 257).astype(np.uint8))
    assert image[0, :6].tolist() == [0, 255, 0, 1, 1, 255]


def test_big_endian_16_bit_gray(tmp_path: Path) -> None:
    values = (pixels().astype(np.uint16) * 257).astype(">u2")
    Image.frombytes("I;16B", values.shape[::-1], values.tobytes()).save(tmp_path / "a.tif")
    assert np.array_equal(read(tmp_path / "a.tif", "L")[0], pixels())


@pytest.mark.parametrize("end", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.T),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).T),
        (8, np.rot90),
    ],
)
def test_exif_orientation(tmp_path: Path, end: str, orientation: int, upright) -> None:
    # Blocks of 8 x 8 in black and white come through JPEG unchanged.
    stored = np.kron([[0, 255, 0], [255, 255, 0], [0, 0, 255]], np.ones((8, 8))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if end == "webp" else {"quality": 100} if end == "jpg" else {}
    path = save(tmp_path / f"a.{end}", stored, exif=exif, **options)
    assert np.abs(read(path, "L")[0].astype(int) - upright(stored)).max() <= 2


def test_size_as_found_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for end in ("jpg", "tif"):
        path = save(tmp_path / f"a.{end}", np.zeros((20, 50), np.uint8), exif=exif)
        assert read_image(path, "L", 8, MAX_PIXELS)[1:] == (50, 20)


def test_palette_gives_its_colours(tmp_path: Path) -> None:
    colours = pixels(3, 4, 3).reshape(16, 3)
    indices = pixels() % 16
    image = Image.frombytes("P", (SIDE, SIDE), indices.tobytes())
    image.putpalette(colours.tobytes())
    for end in ("png", "gif", "bmp", "tif"):
        image.save(tmp_path / f"a.{end}")
        assert np.array_equal(read(tmp_path / f"a.{end}"), colours[indices].transpose(2, 0, 1)), end


def test_gray_palette_counts_as_gray(tmp_path: Path) -> None:
    image = Image.frombytes("P", (SIDE, SIDE), (pixels() % 4).tobytes())
    image.putpalette([0, 0, 0, 80, 80, 80, 160, 160, 160, 255, 255, 255])
    image.save(tmp_path / "a.png")
    assert is_gray(tmp_path / "a.png", MAX_PIXELS)
    assert np.array_equal(read(tmp_path / "a.png", "L")[0], np.array([0, 80, 160, 255])[pixels() % 4])


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    colour = pixels(channels=4)
    colour[0, 0, 3], colour[0, 1, 3] = 0, 255
    image = read(save(tmp_path / "a.png", colour)).transpose(1, 2, 0)
    alpha = colour[..., 3:] / 255
    assert np.abs(image - (colour[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert image[0, 0].tolist() == [255] * 3
    assert np.array_equal(image[0, 1], colour[0, 1, :3])


def test_transparent_colour_lies_on_white(tmp_path: Path) -> None:
    gray = np.where(pixels() < 128, 7, 200).astype(np.uint8)
    Image.fromarray(gray).save(tmp_path / "a.png", transparency=7)
    assert np.array_equal(read(tmp_path / "a.png", "L")[0], np.where(gray == 7, 255, gray))


def test_cmyk_of_pure_inks(tmp_path: Path) -> None:
    inks = np.zeros((SIDE, SIDE, 4), np.uint8)
    inks[:, :8, 0], inks[:, 8:16, 1], inks[:, 16:, 3] = 255, 255, 255
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    image = read(tmp_path / "a.tif").transpose(1, 2, 0)
    assert image[0, [0, 8, 16]].tolist() == [[0, 255, 255], [255, 0, 255], [0, 0, 0]]


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    READABLE["pages.tif"](tmp_path / "pages.tif")
    READABLE["animated.png"](tmp_path / "animated.png")
    for name in ("pages.tif", "animated.png"):
        assert np.array_equal(read(tmp_path / name), pixels(0, channels=3).transpose(2, 0, 1))


def test_centre_crop_keeps_the_middle(tmp_path: Path) -> None:
    wide = np.hstack([np.zeros((SIDE, 8), np.uint8), pixels(), np.full((SIDE, 8), 255, np.uint8)])
    assert np.array_equal(read(save(tmp_path / "wide.png", wide), "L")[0], pixels())
    assert np.array_equal(read(save(tmp_path / "high.png", wide.T), "L")[0], pixels().T)


def test_resize_is_antialiased(tmp_path: Path) -> None:
    # Stripes of one pixel vanish to their mean; without antialiasing they would alias to black or white.
    stripes = np.tile([0, 255], (160, 80)).astype(np.uint8)
    image = read(save(tmp_path / "a.png", stripes), "L", 16)[0].astype(int)
    assert np.abs(image - 127.5).max() < 8


def test_colour_to_gray_is_as_for_arrays(tmp_path: Path) -> None:
    colour = pixels(channels=3)
    gray = read(save(tmp_path / "a.png", colour), "L")
    assert np.array_equal(gray, convert_channels(colour.transpose(2, 0, 1)[None], 1)[0])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_have_a_reason(tmp_path: Path, name: str) -> None:
    write, reason = BROKEN[name]
    write(tmp_path / name)
    with pytest.raises(BrokenImage) as broken:
        read(tmp_path / name)
    assert reason in str(broken.value)
    assert str(tmp_path) not in str(broken.value)
    assert "\n" not in str(broken.value)
    assert 5 < len(str(broken.value)) < 200


def test_bomb_is_refused_without_decoding(tmp_path: Path) -> None:
    save(tmp_path / "a.png", pixels())
    with pytest.raises(BrokenImage, match="24 x 24 px, 500 px are allowed"):
        is_gray(tmp_path / "a.png", 500)


def test_the_stand_in_of_an_unreadable_file_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(UNREADABLE)
    with pytest.raises(BrokenImage, match=r"^unreadable: permission denied$"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "reason"), [("none.png", "no such file or directory"), ("", "is a directory")]
)
def test_what_is_no_file_is_told_in_plain_words(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(BrokenImage, match=f"^{reason}$"):
        read(tmp_path / name)
