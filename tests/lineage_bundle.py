"""A whole run in miniature: every step, made through `step`, with tiny files of the real names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from unlabeled.digest import dvc_digest
from unlabeled.files import link_or_copy, write_json
from unlabeled.lineage.record import method_artifacts, record
from unlabeled.lineage.registry import Registry
from unlabeled.lineage.step import Artifact, step

METHODS = ("autoencoder", "simclr")
# A file of each kind of artifact, by the step that made it.
KINDS = {
    "raw/train-images-idx3-ubyte": "ingest",
    "raw/später/ünï code.bin": "ingest",
    "table/images.npy": "ingest",
    "table/table.parquet": "ingest",
    "validation/validation.json": "validate",
    "baselines/baselines.json": "baselines",
    "methods/simclr/model/model.safetensors": "pretrain/simclr",
    "methods/autoencoder/model/metrics.jsonl": "pretrain/autoencoder",
    "methods/simclr/labels/labels.parquet": "self_label/simclr",
    "methods/simclr/evaluation/evaluation.json": "evaluate/simclr",
    "selection/selection.json": "select",
    "classifier/model.safetensors": "finetune",
    "repository/encoder/1/model.onnx": "export",
    "index/index.npz": "export",
    "serving/serving.json": "check_serving",
}


def write(folder: Path, files: dict[str, Any], seed: int) -> None:
    """Write files: JSON values as JSON, numbers as that many random bytes, text as it is."""
    for number, (name, value) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, int):
            path.write_bytes(np.random.default_rng([seed, number, len(name)]).bytes(value))
        elif isinstance(value, str):
            path.write_text(value)
        else:
            write_json(path, value)


def weights(folder: Path, seed: int, width: int) -> None:
    """Write a model's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).standard_normal((width, width), dtype=np.float32)
    save_file({"encoder.weight": values}, folder / "model.safetensors")


def real_model(folder: Path, seed: int) -> None:
    """Write an untrained encoder as `pretrain` writes a trained one."""
    import torch
    from safetensors.torch import save_file

    from unlabeled.nets.encoder import Encoder

    torch.manual_seed(seed)
    encoder = Encoder("small_resnet", 4, 1, (1, 8, 8), 0.3, 0.3)
    folder.mkdir(parents=True)
    state = {f"encoder.{name}": value.contiguous() for name, value in encoder.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    write_json(folder / "config.json", {"method": "simclr", "encoder": encoder.settings})


def real_onnx(repository: Path, model: Path) -> None:
    """Export the encoder of a model as it is served."""
    from unlabeled.export.models import load_served
    from unlabeled.export.onnx import onnx_bytes

    (repository / "encoder" / "1").mkdir(parents=True)
    exported = onnx_bytes(load_served("encoder", model, model, model))
    (repository / "encoder" / "1" / "model.onnx").write_bytes(exported)


def run_steps(
    work: Path,
    seed: int = 0,
    size: int = 200,
    changed: str = "",
    exported: Path | None = None,
    reference: str = "",
    served: Path | None = None,
) -> dict[str, Artifact]:
    """Execute the steps of a run and return its artifacts by their path in the bundle.

    Args:
        seed: of all bytes; another seed is another run on other data.
        size: bytes of the larger files.
        changed: a step whose result comes out differently this time.
        reference: sha256 of the table that drift is measured against.
        exported: a real model of SimCLR; its encoder is exported and served.
        served: folder with the real `table/`, `repository/`, `index/` and `serving/` of the run.
    """

    def new(name: str) -> Artifact:
        return Artifact(str(work / name))

    def seed_of(name: str) -> int:
        return seed + 1000 * (name == changed)

    raw, table = new("raw"), new("table")
    with step("ingest", {}, {"raw": raw, "table": table}):
        write(
            Path(raw.path),
            {"train-images-idx3-ubyte": size, "später/ünï code.bin": 50, "empty": ""},
            seed_of("ingest"),
        )
        if served:
            link_or_copy(served / "table", table.path)
        else:
            write(Path(table.path), {"images.npy": size, "table.parquet": size // 2}, seed_of("ingest"))
            write_json(
                Path(table.path) / "summary.json", {"classes": ["a", "b"], "counts": {"train": 10, "test": 4}}
            )
    validation, baselines = new("validation"), new("baselines")
    with step("validate", {"table": table}, {"validation": validation}):
        result = {"success": True, "seed": seed_of("validate"), "drift": {"reference": reference}}
        write_json(Path(validation.path) / "validation.json", result)
    with step("baselines", {"table": table}, {"baselines": baselines}):
        rows = [
            {"method": "raw pixels", "knn": 0.5 + seed / 100, "linear": 0.6},
            {"method": "PCA-128", "knn": 0.6, "linear": 0.61},
        ]
        write_json(Path(baselines.path) / "baselines.json", {"rows": rows})
    models, labels, evaluations = [], [], []
    for number, method in enumerate(METHODS):
        model, label, evaluation = (
            new(f"model-{method}"),
            new(f"labels-{method}"),
            new(f"evaluation-{method}"),
        )
        with step(f"pretrain/{method}", {"table": table}, {"model": model}) as result:
            if exported and method == "simclr":
                real_model(Path(model.path), seed)
            else:
                weights(Path(model.path), seed_of(f"pretrain/{method}") + number, max(2, int(size**0.5) // 2))
                write_json(Path(model.path) / "config.json", {"method": method})
            log = "".join(json.dumps({"step": n, "loss": 1 / (n + 1)}) + "\n" for n in range(3))
            write(Path(model.path), {"metrics.jsonl": log}, seed)
            result.update(loss=np.float32(0.25), images_per_second=1000.0, steps=3)
        with step(f"self_label/{method}", {"model": model, "table": table}, {"labels": label}):
            scores = {"acc": 0.5, "nmi": 0.4, "ari": 0.3, "ami": 0.35, "purity": 0.55, "k": 2}
            write(
                Path(label.path),
                {"labels.parquet": 60, "scores.json": scores},
                seed_of(f"self_label/{method}") + number,
            )
        with step(f"evaluate/{method}", {"model": model, "table": table}, {"evaluation": evaluation}):
            knn = 0.8 + seed_of(f"evaluate/{method}") % 99 / 1000 + number / 100
            scores = {
                "method": method,
                "family": "contrast",
                "knn": knn,
                "linear": knn + 0.05,
                "held_out_knn": knn,
                "effective_rank": 9.5,
            }
            write_json(Path(evaluation.path) / "evaluation.json", scores)
        models, labels, evaluations = [*models, model], [*labels, label], [*evaluations, evaluation]
    selection, model, model_labels = new("selection"), new("model"), new("labels")
    candidates = {"models": models, "labels": labels, "evaluations": evaluations}
    with step("select", candidates, {"selection": selection, "model": model, "model_labels": model_labels}):
        write_json(Path(selection.path) / "selection.json", {"selected": "simclr"})
        link_or_copy(models[1].path, model.path)
        link_or_copy(labels[1].path, model_labels.path)
    classifier, repository, index, serving = (
        new("classifier"),
        new("repository"),
        new("index"),
        new("serving"),
    )
    chosen = {"table": table, "model": model, "labels": model_labels}
    with step("finetune", chosen, {"classifier": classifier}):
        weights(Path(classifier.path), seed_of("finetune") + 7, width=4)
        write_json(Path(classifier.path) / "config.json", {"classes": ["a", "b"]})
    with step("export", {**chosen, "classifier": classifier}, {"repository": repository, "index": index}):
        if served:
            link_or_copy(served / "repository", repository.path)
            link_or_copy(served / "index", index.path)
        else:
            if exported:
                real_onnx(Path(repository.path), exported)
            else:
                write(Path(repository.path), {"encoder/1/model.onnx": 90}, seed_of("export"))
            write(Path(repository.path), {"encoder/config.pbtxt": "name: 'encoder'\n"}, 0)
            write(Path(index.path), {"index.npz": 70, "golden.npz": 30}, seed_of("export") + 1)
    with step("check_serving", {"repository": repository, "index": index}, {"serving": serving}):
        if served:
            link_or_copy(served / "serving", serving.path)
        else:
            write_json(Path(serving.path) / "serving.json", {"max_difference": 0.0})
    return {
        "raw": raw, "table": table, "validation": validation, "baselines": baselines,
        **method_artifacts(models, labels, evaluations),
        "selection": selection, "model": model, "labels": model_labels, "classifier": classifier,
        "repository": repository, "index": index, "serving": serving,
    }  # fmt: skip


def record_run(
    registry: Registry | None, work: Path, run: str, seed: int = 0, reference: str = "", **options: Any
) -> Path:
    """Make a run and record it; returns its bundle.

    Args:
        reference: an earlier run of the registry; its table is the one that drift is measured against.
    """
    if registry and reference:
        subjects = {subject["name"]: subject for subject in registry.show(reference)["subject"]}
        options = {"reference": subjects["table/table.parquet"]["digest"]["sha256"], **options}
    artifacts = run_steps(work / "steps", seed, **options)
    bundle = work / "bundle"
    data = {"source": "mini", "digest": dvc_digest(artifacts["raw"].path), "reference": reference}
    address = (registry.url, registry.remote) if registry else ("", "")
    record(run, artifacts, {"data": "mini", "seed": seed}, data, *address, bundle)
    return bundle


def key_pair(folder: Path, name: str = "signer") -> tuple[Path, Path]:
    """Write a private and a public key, as openssl writes them."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(pem, *plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def flip(path: Path, position: int = -1) -> None:
    """Flip one bit of a file, read-only or not; its size and modes stay."""
    mode = path.stat().st_mode
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(mode)
