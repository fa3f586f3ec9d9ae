"""The parameters of a run: typed, documented, validated. `params.yaml` holds the profiles."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unlabeled.errors import InputError


class Section(BaseModel):
    """A group of parameters: unknown keys are refused, values never change. KFP turns integers into floats; they turn back."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Ingest(Section):
    """How a source becomes an image table."""

    image_size: int = Field(32, ge=4, le=1024, description="side in pixels that images of a folder are brought to")
    channels: Literal["auto", "gray", "rgb"] = Field("auto", description="auto: gray when every image is gray")
    test_share: float = Field(0.2, gt=0, lt=1, description="share held out when the source has no test split")
    max_broken_share: float = Field(0.01, ge=0, le=1, description="more broken files than this stop the run")
    max_pixels: int = Field(64_000_000, ge=1, description="a larger image is broken: a decompression bomb")
    composites: int = Field(6000, ge=10, description="images that the source `stamps` is composed to")
    shard_images: int = Field(100_000, ge=1, description="images per shard of the table")


class Validation(Section):
    """Bounds that the image table must keep."""

    min_images: int = Field(50, ge=1, description="images in each split, at least")
    min_class_balance: float = Field(0.05, ge=0, le=1, description="rarest class over the most frequent, in train")
    max_exact_duplicates: float = Field(0.02, ge=0, le=1, description="share of images equal to an earlier one")
    max_near_duplicates: float = Field(0.05, ge=0, le=1, description="share of images nearly equal to an earlier one; a warning")
    near_difference: float = Field(4.0, ge=0, le=255, description="nearly equal: root mean square difference of the pixels, in gray levels")
    max_leakage: float = Field(0.0, ge=0, le=1, description="share of test images that also stand in train")
    max_near_leakage: float = Field(0.01, ge=0, le=1, description="share of test images nearly equal to a train image; a warning")
    max_constant: float = Field(0.001, ge=0, le=1, description="share of images of a single colour")
    max_drift: float = Field(0.1, ge=0, le=1, description="distance to the reference: Kolmogorov-Smirnov of mean, std, entropy; total variation of labels")


class Encoder(Section):
    """The network that every learning signal trains."""

    name: Literal["small_resnet", "resnet18", "tiny_vit", "pixel_cnn"] = Field("small_resnet", description="architecture")
    width: int = Field(64, ge=4, le=1024, description="channels of the first block of the small ResNet; the second has twice as many")
    pool: int = Field(2, ge=1, le=8, description="the last map is averaged to pool x pool before it is flattened")


class Training(Section):
    """The one training loop."""

    steps: int = Field(0, ge=0, description="optimizer steps; 0: as many as epochs make")
    epochs: float = Field(10, gt=0, description="passes over the train split, when steps is 0")
    batch_size: int = Field(256, ge=2, description="images per step, over all processes")
    optimizer: Literal["adamw", "sgd", "lars"] = Field("adamw", description="optimizer")
    learning_rate: float = Field(3e-3, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, gt=0, lt=1, description="of SGD and LARS; the first beta of AdamW")
    weight_decay: float = Field(1e-4, ge=0, description="not applied to biases and normalisation")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the steps with linearly rising rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("linear", description="linear: constant, then linear cool-down")
    cooldown_share: float = Field(0.3, ge=0, le=1, description="share of the steps of the linear cool-down")
    gradient_clip: float = Field(0.0, ge=0, description="largest gradient norm; 0: no clipping")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of what the nets compute; auto: bfloat16 where the processor has instructions for it")
    channels_last: bool = Field(True, description="memory format of images and weights")
    compile: Literal["auto", "yes", "no"] = Field("auto", description="torch.compile; auto: when the run is long enough to pay for it")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    log_every: int = Field(20, ge=1, description="steps between lines of metrics.jsonl")
    threads: int = Field(0, ge=0, description="CPU threads of each step; 0: the cores here over the methods in parallel")
    nodes: int = Field(1, ge=1, le=1000, description="machines that train together; above 1 on Kubeflow only")


class SelfLabel(Section):
    """Clustering of the train split."""

    method: Literal["kmeans", "scan", "sela"] = Field("kmeans", description="how the features are clustered")
    clusters: int = Field(0, ge=0, description="number of clusters; 0: the number of classes, 10 where there are none")
    sweep: tuple[Annotated[int, Field(ge=2)], ...] = Field((), description="numbers of clusters to try and to compare without labels; none: no sweep")
    restarts: int = Field(10, ge=1, description="k-means runs; the one of lowest inertia is kept")
    iterations: int = Field(100, ge=1, description="k-means iterations, at most")
    neighbours: int = Field(20, ge=1, description="SCAN: mined neighbours of each image")
    heads: int = Field(20, ge=1, description="SCAN: clustering heads trained beside each other; those of low loss are averaged")
    steps: int = Field(900, ge=1, description="SCAN: optimizer steps of the heads")
    batch_size: int = Field(1000, ge=2, description="SCAN: images per step; many times the number of clusters")
    learning_rate: float = Field(0.1, gt=0, description="SCAN: first learning rate of the heads, falling linearly")
    entropy_weight: float = Field(2.0, ge=0, description="SCAN: weight of the term that keeps all clusters in use")
    self_training_steps: int = Field(0, ge=0, description="steps in which the whole net learns its own confident answers; 0: the encoder stays as it is")
    self_training_rate: float = Field(1e-4, gt=0, description="peak learning rate of self-training")
    confidence: float = Field(0.99, ge=0, lt=1, description="self-training: answers above this probability are learned")


class Evaluation(Section):
    """Probes of the frozen features."""

    neighbours: int = Field(20, ge=1, description="k of weighted kNN")
    temperature: float = Field(0.07, gt=0, description="temperature of weighted kNN")
    held_out_share: float = Field(0.1, gt=0, lt=1, description="share of train held out to select and to tune")
    linear_iterations: int = Field(200, ge=1, description="L-BFGS iterations of the linear probe, at most")


class Finetuning(Section):
    """Classifiers from few and from all labels."""

    label_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.01, 0.1, 1.0), min_length=1, description="shares of the train labels, nested; the last one is served")
    held_out_share: float = Field(0.2, gt=0, lt=1, description="share of those labels, at most 5,000, that chooses between linear probe and whole net")
    steps: int = Field(300, ge=1, description="optimizer steps of each fine-tuning")
    batch_size: int = Field(256, ge=2, description="images per step")
    learning_rate: float = Field(2e-3, gt=0, description="peak learning rate, of AdamW on a cosine schedule")
    weight_decay: float = Field(1e-4, ge=0, description="not applied to biases and normalisation")
    crop_area: float = Field(1.0, gt=0, le=1, description="smallest share of an image that random crops keep; 1: no crops, best for few epochs")


class FewLabels(Section):
    """Classifiers from few labels and many images, as `compare labels` sets them side by side."""

    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.01, 0.1), min_length=1, description="shares of the train labels, nested, at least 4 of each class")
    draws: int = Field(5, ge=1, description="draws of the labels; a table shows mean and standard deviation")
    held_out_share: float = Field(0.2, gt=0, lt=1, description="share of those labels that chooses between settings")
    steps: int = Field(300, ge=1, description="optimizer steps of each training")
    batch_size: int = Field(128, ge=2, description="labelled images per step")
    unlabelled_batch_size: int = Field(192, ge=2, description="unlabelled images per step")
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field((1e-3, 3e-3), min_length=1, description="peak learning rates to choose from, of AdamW on a cosine schedule")
    weight_decay: float = Field(1e-3, ge=0, description="not applied to biases and normalisation")
    crop: float = Field(0.6, gt=0, le=1, description="smallest share of an image that a view keeps; the same views for every method")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a mirrored view")
    threshold: float = Field(0.95, gt=0, lt=1, description="probability from which on a prediction becomes a pseudo-label")
    rounds: int = Field(2, ge=1, description="rounds of Pseudo-Label after the first training")
    radii: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.1, 0.3), min_length=1, description="lengths of VAT's perturbation to choose from, of the image in [0, 1]")


class Export(Section):
    """What is served."""

    tolerance: float = Field(1e-5, gt=0, description="largest difference of probabilities from torch to ONNX to Triton")
    max_batch_size: int = Field(64, ge=1, description="largest batch that Triton forms")
    instances: int = Field(0, ge=0, description="model instances in Triton; 0: left to the server")
    response_cache: bool = Field(False, description="Triton answers a request that it has answered before from memory")
    warmup: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="batch sizes that a model computes once before it is ready")
    precision: Literal["float32", "int8", "float16"] = Field("float32", description="int8 for CPUs, float16 for GPUs; what it costs is measured")
    max_accuracy_drop: float = Field(0.01, ge=0, le=1, description="how much accuracy less precision may cost; without labels: agreement")
    index_images: int = Field(10_000, ge=1, description="training images that nearest-image answers choose from")


class Drift(Section):
    """When the recent inputs of a server raise an alert."""

    alpha: float = Field(0.01, gt=0, lt=1, description="share of the checks without drift that raise an alert all the same")
    permutations: int = Field(999, ge=1, description="random exchanges of recent and held-out images that the threshold comes from")
    images: int = Field(1000, ge=2, description="recent, training and held-out images that are compared, at most; the more, the smaller the drift that is found")
    min_images: int = Field(50, ge=2, description="images of each kind, at least")
    max_age_hours: float = Field(48.0, gt=0, description="a log of inputs that ended earlier is refused")


class Parameters(Section):
    """All parameters of a run."""

    data: str = Field("fashion-mnist", min_length=1, description="a name in data.dvc, `digits`, `stamps`, a folder, IDX files or an npz file")
    methods: tuple[str, ...] = Field(("simclr", "autoencoder"), min_length=1, description="learning signals to compare")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")
    ingest: Ingest = Ingest()
    validation: Validation = Validation()
    encoder: Encoder = Encoder()
    training: Training = Training()
    pretrain: dict[str, dict[str, Any]] = Field({}, description="settings of a method by its name; `training` and `encoder` in it override the above")
    self_label: SelfLabel = SelfLabel()
    evaluation: Evaluation = Evaluation()
    finetuning: Finetuning = Finetuning()
    few_labels: FewLabels = FewLabels()
    export: Export = Export()
    drift: Drift = Drift()


def nearest(name: str, names: Sequence[str]) -> str:
    """Return a hint `; did you mean 'x'?`, or the valid names where none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; valid: {', '.join(sorted(names))}"


# What is wrong with a value, by pydantic's error type: a user knows YAML, not pydantic.
WRONG = {
    "model_type": "is a section: set a key in it, as {path}.KEY=VALUE",
    "dict_type": "is a section: set a key in it, as {path}.KEY=VALUE",
    "tuple_type": "must be a list, as [1, 2]",
    "too_short": "must list at least {min_length}",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "invalid_key": "is named by no text: quote it",
}


def described(model: type[BaseModel], prefix: str = "") -> list[dict[str, Any]]:
    """Return {"parameter": dotted path, "default", "meaning"} of each parameter of a model and of its sections."""
    rows: list[dict[str, Any]] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            rows += described(field.annotation, f"{prefix}{name}.")
        else:
            rows.append({"parameter": prefix + name, "default": field.default, "meaning": field.description or ""})
    return rows


def validated(model: type[BaseModel], values: Any, where: str = "") -> Any:
    """Return `values` as the given model.

    Raises:
        InputError: a key is unknown (with the nearest valid one) or a value is wrong, by its dotted path.
    """
    try:
        return model.model_validate(values)
    except ValidationError as errors:
        error = errors.errors()[0]
        path = ".".join(str(part) for part in (where, *error["loc"]) if part != "")
        if error["type"] == "extra_forbidden":
            raise InputError(f"unknown parameter {path}{nearest(str(error['loc'][-1]), _fields(model, error['loc'][:-1]))}") from None
        wrong = WRONG.get(error["type"], error["msg"].lower()).format(path=path, **error.get("ctx", {}))
        given = "nothing" if error["input"] is None else repr(error["input"])
        raise InputError(f"parameter {path} {wrong} (got {given})") from None


def _fields(model: Any, path: Sequence[Any]) -> list[str]:
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def load_parameters(file: Path, profile: str, overrides: Mapping[str, Any] | None = None) -> Parameters:
    """Read a profile of `params.yaml` and lay overrides over it.

    Args:
        file: a YAML file {profile: {section: {key: value}}}.
        profile: name of the profile.
        overrides: values by dotted path, as `{"training.epochs": 3}`; a string is read as YAML.

    Raises:
        InputError: the file or profile is missing, or a parameter is unknown or wrong.
    """
    try:
        profiles = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise InputError(f"cannot read the parameters {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not valid YAML: no text in UTF-8") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(profiles, dict) or profile not in profiles:
        names = [str(name) for name in profiles] if isinstance(profiles, dict) else []
        raise InputError(f"no profile '{profile}' in {file}{nearest(profile, names)}")
    values = profiles[profile] or {}
    if not isinstance(values, dict):
        raise InputError(f"profile '{profile}' in {file} is {values!r}, not a section")
    try:
        validated(Parameters, values)
    except InputError as error:
        raise InputError(f"{file}, profile '{profile}': {error}") from None
    for path, value in (overrides or {}).items():
        _lay(values, path, value)
    return validated(Parameters, values)


def _lay(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for part in sections:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise InputError(f"unknown parameter {path}: {part} is a value, not a section")
    # A path or name stays the string that it is, `1e3` and `null` too.
    if isinstance(value, str) and path != "data":
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"parameter {path}: '{value}' is no YAML value") from None
    values[key] = value
