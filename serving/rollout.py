"""Another version of all models into a running Triton, without a failed request; and back where it does not answer.

Each version is a folder `<model>/<number>` with the model, its labels and its configuration, of one number for all
models. `<model>/config.pbtxt` names the one version that Triton serves: replacing that file is the switch, and a
server that starts in the middle of a roll-out finds whole versions only.
"""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton
from tritonclient.utils import InferenceServerException

from serving.client import UNAVAILABLE, Client
from serving.index import Index
from serving.repository import CONFIG, LABELS, MODEL, model_names, read_config
from unlabeled.errors import CheckFailed, InputError
from unlabeled.files import write_bytes

CONTROL_HEADER = "triton-grpc-protocol-control-key"
LOAD_SECONDS = 300.0
# Beside the repository: the version that last gave its run's golden answers.
PROVEN = ".proven"
FILES = (Path(MODEL).name, LABELS)


def place(bundle: Path, repository: Path) -> int:
    """Put a run's models beside those that are served, and return the number of the version.

    A version that is there already, its models byte for byte and its configuration, is found again. What is served
    does not change.

    Args:
        bundle: with `repository/` and `index/`, on the file system of `repository`; its models are moved.
        repository: of the server; made where it does not exist.

    Raises:
        InputError: the bundle is no run's, or the repository none.
    """
    new, side = bundle / "repository", Index(bundle / "index").image_shape[1:]
    models = model_names(new)
    for model in models:
        if (labels := new / model / LABELS).exists():
            labels.rename(new / model / "1" / LABELS)
    _adopt(repository, side)
    taken = sorted({number for model in models for number in _numbers(repository, model)})
    for number in reversed(taken):
        if all(_same(new / model, repository / model / str(number), side) for model in models):
            return number
    number = max(taken, default=0) + 1
    for model in models:
        config = _of_version(read_config(new / model / CONFIG), number, side)
        write_bytes(new / model / "1" / CONFIG, text_format.MessageToBytes(config))
        (repository / model).mkdir(parents=True, exist_ok=True)
        (new / model / "1").rename(repository / model / str(number))
    return number


def point(repository: Path, number: int) -> None:
    """Have a server that loads the repository serve this version."""
    for model in _models_of(repository, number):
        write_bytes(repository / model / CONFIG, (repository / model / str(number) / CONFIG).read_bytes())


def served_number(repository: Path) -> int:
    """Return the version that the repository's configuration names; 0: none."""
    versions = {
        number
        for config in repository.glob(f"*/{CONFIG}")
        for number in read_config(config).version_policy.specific.versions
    }
    return versions.pop() if len(versions) == 1 else 0


def proven_number(repository: Path) -> int:
    """Return the version that last gave its golden answers; where nothing tells, the one that is served; 0: none."""
    path = repository.parent / PROVEN
    number = int(path.read_text()) if path.exists() else served_number(repository)
    return number if _models_of(repository, number) else 0


def _prove(repository: Path, number: int) -> None:
    write_bytes(repository.parent / PROVEN, str(number).encode())


def roll_out(repository: Path, number: int, index: Index, client: Client, key: str, tolerance: float) -> bool:
    """Switch a running server to a version, and prove by the golden answers that it is the one.

    Triton loads and warms the new version beside the old one, gives it new requests as soon as it is ready, and
    unloads the old one once that has answered what it has. The models switch at the same time, but not at the
    same moment: each switches when it is ready. Where this process is killed before the proof, the next call goes
    on: what serves unproven is proven then, or goes back.

    Args:
        index: of the version's run.
        key: of the control API where Triton asks for one; else empty.
        tolerance: largest difference to the golden answers (absolute; over the largest where that is above 1).

    Returns:
        False: the server served it already.

    Raises:
        CheckFailed: Triton cannot load it, or it gives other answers; the version proven before serves again.
        InputError: Triton is not there, or refuses the key; the version proven before serves, or will again.
    """
    models, before = _models_of(repository, number), proven_number(repository)
    try:
        ready = [client.connection.is_model_ready(model, str(number), **client.settings) for model in models]
    except InferenceServerException as error:
        raise InputError(f"no answer from Triton at {client.url}: {error.message()}") from None
    changed = not (all(ready) and served_number(repository) == number)
    try:
        if changed:
            _prove(repository, before)
            point(repository, number)
            _load(client.url, models, key)
        _check_golden(models, number, index, client, tolerance)
    except (CheckFailed, InputError) as error:
        if before in (0, number):
            raise
        point(repository, before)
        try:
            _load(client.url, models, key)
            outcome = "serves again"
        except (CheckFailed, InputError) as second:
            outcome = f"is not loaded either: {second}"
        raise type(error)(f"{error}; version {before} {outcome}") from None
    _prove(repository, number)
    return changed


def prune(repository: Path, keep: Sequence[int]) -> None:
    """Remove the versions that are not to be kept.

    The highest stays: its number, given again, would let a response cache answer for other models.
    """
    numbers = {model: _numbers(repository, model) for model in model_names(repository)}
    highest = max((number for taken in numbers.values() for number in taken), default=0)
    for model, taken in numbers.items():
        for number in taken:
            if number not in (*keep, highest):
                shutil.rmtree(repository / model / str(number))


def _adopt(repository: Path, side: tuple[int, ...]) -> None:
    """Make what export wrote, one unnamed version, a version like the others; Triton serves it as before."""
    for path in sorted(repository.glob(f"*/{CONFIG}")):
        config, labels = read_config(path), path.parent / LABELS
        if config.version_policy.specific.versions:
            continue
        number = max(_numbers(repository, path.parent.name), default=0)
        if not number:
            raise InputError(f"model {path.parent} has no version: a folder with a number belongs there")
        if labels.exists():
            write_bytes(path.parent / str(number) / LABELS, labels.read_bytes())
        content = text_format.MessageToBytes(_of_version(config, number, side))
        write_bytes(path.parent / str(number) / CONFIG, content)
        write_bytes(path, content)


def _of_version(config: triton.ModelConfig, number: int, side: tuple[int, ...]) -> triton.ModelConfig:
    """Return a model's configuration with one version to serve, warmed before it is asked."""
    found = triton.ModelConfig()
    found.CopyFrom(config)
    found.version_policy.CopyFrom(
        triton.ModelVersionPolicy(specific=triton.ModelVersionPolicy.Specific(versions=[number]))
    )
    if found.output[0].label_filename:
        found.output[0].label_filename = f"{number}/{LABELS}"
    images = triton.ModelWarmup.Input(
        data_type=triton.TYPE_UINT8, dims=[config.input[0].dims[0], *side], random_data=True
    )
    for size in sorted({1, config.max_batch_size} - {warm.batch_size for warm in config.model_warmup}):
        found.model_warmup.add(name=f"batch of {size}", batch_size=size, inputs={"images": images})
    return found


def _load(url: str, models: Sequence[str], key: str) -> None:
    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(partial(_load_one, url, key), models))


def _load_one(url: str, key: str, model: str) -> None:
    # A client of tritonclient is for one thread.
    with Client(url) as client:
        try:
            headers = client.headers | ({CONTROL_HEADER: key} if key else {})
            client.connection.load_model(model, headers=headers, client_timeout=LOAD_SECONDS)
        except InferenceServerException as error:
            reason = f"Triton at {url} cannot load {model}: {error.message()}"
            raise (InputError(reason) if error.status() in UNAVAILABLE else CheckFailed(reason)) from None


def _check_golden(models: Sequence[str], number: int, index: Index, client: Client, tolerance: float) -> None:
    images = index.golden["images"]
    for model in models:
        expected, output = index.golden[model], index.models[model]["output"]
        answers = [client.infer(model, image[None], str(number))[output] for image in images]
        found = np.concatenate(answers)
        # As unlabeled.export.parity has it, which would bring torch into a small sidecar.
        worst = np.inf
        if found.shape == expected.shape and np.isfinite(found).all():
            worst = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
        if worst > tolerance:
            raise CheckFailed(
                f"version {number} of {model} answers {worst:.1e} away from its run's golden answers; "
                f"allowed {tolerance:.0e}"
            )


def _models_of(repository: Path, number: int) -> list[str]:
    return sorted(path.parent.parent.name for path in repository.glob(f"*/{number}/{CONFIG}"))


def _numbers(repository: Path, model: str) -> list[int]:
    return [int(path.name) for path in (repository / model).glob("[1-9]*") if path.name.isdigit()]


def _same(new: Path, placed: Path, side: tuple[int, ...]) -> bool:
    def content(folder: Path) -> list[bytes | None]:
        return [path.read_bytes() if (path := folder / name).exists() else None for name in FILES]

    if not (placed / CONFIG).exists() or content(new / "1") != content(placed):
        return False
    return _of_version(read_config(new / CONFIG), int(placed.name), side) == read_config(placed / CONFIG)
