"""A colour set with exact ground truth: real cut-out photographs, composed on photographic backgrounds.

The cut-outs are the photographs with alpha of Debian's `tuxpaint-stamps-default`, the backgrounds those that
scikit-image and scikit-learn bring along. Train and test share no cut-out and no background.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from unlabeled.data.download import debian_package, fetch_proven
from unlabeled.data.reading import Batch, Reading, batch_length
from unlabeled.errors import InputError
from unlabeled.parameters import Ingest

STAMPS = "stamps"
STAMPS_DIGEST = "19cbb33925fb70d41fbcfd4662e4cd3d.dir"
PACKAGE, FOLDER = "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps"
# Where the package keeps the photographs of a class; its drawings lie elsewhere.
CLASSES = {
    "bird": ["animals/birds"],
    "fish": ["animals/fish"],
    "flower": ["plants/flowers"],
    "fruit": ["food/fruit"],
    "hoofed animal": [f"animals/mammals/{kind}" for kind in ("bovines", "camel", "deer", "equines")],
    "insect": ["animals/insects"],
    "planet": ["space/planets"],
    "rodent": ["animals/mammals/rodents"],
    "tool": ["household/tools"],
    "vegetable": ["food/vegetables"],
}
BACKGROUNDS = {
    "skimage": (
        "data",
        ["astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "motorcycle_left", "rocket"],
    ),
    "sklearn": ("datasets/images", ["china", "flower"]),
}
TEST_BACKGROUNDS = ("china", "coffee", "gravel")
# Every so many'th cut-out of a class is kept for test.
TEST_STAMPS = 4
TEST_SHARE = 0.2
# Longer side of a cut-out over the image's, and side of the background's part over its shorter side.
STAMP_SIZES, BACKGROUND_SIZES, LARGEST_TURN = (0.5, 0.9), (0.4, 1.0), 15.0


def fetch_stamps(digest: str, folder: Path) -> Path:
    """Return `folder` holding `cutouts/<class>/*.png` and `backgrounds/*`, fetched unless there, proven by digest.

    Raises:
        InputError: no way gives files of that digest; each way is named with what it gave.
    """
    ways = {"installed Debian package": _installed, "Debian package": _downloaded}
    return fetch_proven("the stamps", digest, folder, ways, _collect)


def _installed(room: Path) -> Path:
    folder = Path("/", FOLDER)
    if not folder.is_dir():
        raise InputError("not installed")
    return folder


def _downloaded(room: Path) -> Path:
    return debian_package(PACKAGE, room) / FOLDER


def _collect(package: Path, folder: Path) -> None:
    for name, places in CLASSES.items():
        (folder / "cutouts" / name).mkdir(parents=True)
        for place in places:
            for file in (package / place).glob("*.png"):
                shutil.copyfile(file, folder / "cutouts" / name / file.name)
    (folder / "backgrounds").mkdir()
    for library, (place, names) in BACKGROUNDS.items():
        found = find_spec(library)
        assert found is not None and found.origin is not None
        for name in names:
            (file,) = (Path(found.origin).parent / place).glob(f"{name}.*g")
            shutil.copyfile(file, folder / "backgrounds" / file.name)


def read_stamps(folder: Path, parameters: Ingest) -> Reading:
    """Return the reading of `parameters.composites` composed images, RGB, with labels, masks and splits.

    An id names class, cut-out, background and number: `bird/parrot/china/000012`. Every image has a seed of
    its own, so that the first n of a longer set are those of a shorter one.
    """
    size = parameters.image_size
    shape = (3, size, size)
    backgrounds = {
        file.stem: Image.open(file).convert("RGB") for file in sorted((folder / "backgrounds").iterdir())
    }
    files = [sorted((folder / "cutouts" / name).iterdir()) for name in CLASSES]
    cutouts = {file: _cutout(file, 2 * size) for some in files for file in some}

    def compose(number: int) -> tuple[np.ndarray, np.ndarray, int, str, str]:
        random = np.random.default_rng([number, 0])
        split = "test" if random.random() < TEST_SHARE else "train"
        label = int(random.integers(len(CLASSES)))
        mine = [
            file
            for position, file in enumerate(files[label])
            if (position % TEST_STAMPS == TEST_STAMPS - 1) == (split == "test")
        ]
        places = [name for name in backgrounds if (name in TEST_BACKGROUNDS) == (split == "test")]
        file, place = mine[random.integers(len(mine))], places[random.integers(len(places))]
        scene, layer = _part(backgrounds[place], size, random), _placed(cutouts[file], size, random)
        scene.paste(layer, (0, 0), layer)
        name = f"{file.parent.name}/{file.stem}/{place}/{number:06d}"
        return np.asarray(scene).transpose(2, 0, 1), np.asarray(layer)[:, :, 3] >= 128, label, split, name

    def batches() -> Iterator[Batch]:
        step = batch_length(shape)
        with ThreadPoolExecutor() as pool:
            for start in range(0, parameters.composites, step):
                numbers = range(start, min(start + step, parameters.composites))
                images, masks, labels, splits, names = zip(*pool.map(compose, numbers))
                yield Batch(
                    images=np.stack(images),
                    ids=list(names),
                    splits=list(splits),
                    labels=np.array(labels, np.int64),
                    sizes=np.full((len(numbers), 2), size, np.int64),
                    masks=np.stack(masks),
                )

    return Reading(STAMPS, list(CLASSES), shape, parameters.composites, batches())


def _cutout(file: Path, largest: int) -> Image.Image:
    """Return a cut-out, RGBA, trimmed to what is not transparent, at most `largest` a side."""
    image = Image.open(file).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha >= 128)).getbbox())
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    return image


def _part(photograph: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    """Return a random square part of a photograph at `size`, mirrored or not."""
    side = random.uniform(*BACKGROUND_SIZES) * min(photograph.size)
    left, top = (random.uniform(0, length - side) for length in photograph.size)
    part = photograph.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else part


def _placed(cutout: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    """Return a cut-out, turned, mirrored or not, scaled, whole and anywhere on a transparent layer (size, size)."""
    image = cutout.rotate(random.uniform(-LARGEST_TURN, LARGEST_TURN), Image.Resampling.BICUBIC, expand=True)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = random.uniform(*STAMP_SIZES) * size / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    layer = Image.new("RGBA", (size, size))
    left, top = random.integers(size - width + 1), random.integers(size - height + 1)
    layer.paste(image.resize((width, height), Image.Resampling.BOX), (int(left), int(top)))
    return layer
