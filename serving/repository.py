"""The Triton model repository: one folder per model with `config.pbtxt`, `labels.txt` and `1/model.onnx`.

It runs unchanged on Triton's native onnxruntime backend, on CPU and GPU, and on the embedded server.
"""

from collections.abc import Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from unlabeled.errors import InputError
from unlabeled.files import write_bytes

CONFIG, LABELS, MODEL = "config.pbtxt", "labels.txt", "1/model.onnx"


def model_config(
    name: str,
    channels: int,
    output: str,
    output_size: int,
    max_batch_size: int,
    instances: int = 0,
    labelled: bool = False,
    response_cache: bool = False,
    warmup: Sequence[int] = (),
    side: Sequence[int] = (),
) -> triton.ModelConfig:
    """Return the configuration of a served model.

    Args:
        channels: channels of the input `images`, uint8 (B, channels, height, width).
        output: name of the output, float32 (B, output_size).
        max_batch_size: largest batch that Triton forms.
        instances: number of instances on each device; 0: Triton's default, two on a CPU, one on each GPU.
        labelled: the output has a class name per column in `labels.txt`.
        response_cache: equal requests are answered from memory, by a server with `--cache-config`.
        warmup: batch sizes that each instance computes before the model is ready.
        side: height and width of the images of these batches.

    Raises:
        InputError: a batch of `warmup` is larger than `max_batch_size`.
    """
    config = triton.ModelConfig(
        name=name,
        backend="onnxruntime",
        max_batch_size=max_batch_size,
        input=[triton.ModelInput(name="images", data_type=triton.TYPE_UINT8, dims=[channels, -1, -1])],
        output=[triton.ModelOutput(name=output, data_type=triton.TYPE_FP32, dims=[output_size])],
        version_policy=triton.ModelVersionPolicy(latest=triton.ModelVersionPolicy.Latest(num_versions=1)),
        # No queue delay: a batch is what waits when an instance gets free. A delay costs a lone client much.
        dynamic_batching=triton.ModelDynamicBatching(),
    )
    if labelled:
        config.output[0].label_filename = LABELS
    if instances:
        config.instance_group.add(count=instances, kind=triton.ModelInstanceGroup.KIND_AUTO)
    if response_cache:
        config.response_cache.enable = True
    for size in warmup:
        if size > max_batch_size:
            raise InputError(
                f"export.warmup has a batch of {size}; export.max_batch_size is {max_batch_size}"
            )
        warm = config.model_warmup.add(name=f"batch of {size}", batch_size=size)
        warm.inputs["images"].CopyFrom(
            triton.ModelWarmup.Input(data_type=triton.TYPE_UINT8, dims=[channels, *side], zero_data=True)
        )
    # Instances run side by side, so one thread each: instances x threads stays within the cores.
    config.parameters["intra_op_thread_count"].string_value = "1"
    return config


def write_model(
    repository: Path, config: triton.ModelConfig, model: bytes, labels: Sequence[str] = ()
) -> None:
    """Write one model's folder.

    Raises:
        InputError: there is not one label for each output column.
    """
    columns = config.output[0].dims[0]
    if config.output[0].label_filename and len(labels) != columns:
        raise InputError(f"model {config.name} has {columns} outputs but {len(labels)} class names")
    folder = repository / config.name
    write_bytes(folder / MODEL, model)
    if labels:
        # A line is a label: a line break within a name would shift all that follow.
        write_bytes(folder / LABELS, "".join(" ".join(label.split()) + "\n" for label in labels).encode())
    write_bytes(folder / CONFIG, text_format.MessageToBytes(config))
    assert read_config(folder / CONFIG) == config


def read_config(path: Path) -> triton.ModelConfig:
    """Read a `config.pbtxt`.

    Raises:
        InputError: it is missing or no model configuration.
    """
    try:
        return text_format.Parse(path.read_text(), triton.ModelConfig())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no Triton model configuration: {error}") from None


def model_names(repository: Path) -> list[str]:
    """Return the names of the models in a repository, sorted.

    Raises:
        InputError: the folder holds no model.
    """
    names = sorted(config.parent.name for config in repository.glob(f"*/{CONFIG}"))
    if not names:
        raise InputError(f"{repository} is no Triton model repository: <model>/{CONFIG} belongs there")
    return names


def read_labels(repository: Path, model: str) -> list[str]:
    """Return the class names of a model's output; empty when it has none."""
    path = repository / model / LABELS
    return path.read_text().splitlines() if path.is_file() else []
