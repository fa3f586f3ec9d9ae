"""A run's bundle for the tests of the report: real images, made-up scores, laid out by `record` itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from conftest import write_table
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from unlabeled.data.table import ImageTable
from unlabeled.digest import dvc_digest, tree_digest
from unlabeled.environment import machine
from unlabeled.files import link_or_copy, write_json
from unlabeled.lineage.record import record
from unlabeled.lineage.step import Artifact, sign

DIGITS = tuple(str(digit) for digit in range(10))
SERVED = ("encoder", "classifier", "clusterer")


def build_bundle(
    folder: Path,
    *,
    methods: Sequence[str] = ("simclr", "autoencoder"),
    classes: Sequence[str] = DIGITS,
    labelled: bool = True,
    broken: Sequence[tuple[str, str]] = (),
    warnings: bool = False,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    source: str = "digits",
) -> Path:
    """Write a whole bundle below `folder` and return its path.

    Args:
        methods: names of the methods; the first has the best scores; an autoencoder has a picture.
        classes: names of the ten classes.
        labelled: False leaves out every label and every score that needs one.
        broken: files that ingest could not read, as (path, reason).
        warnings: make two expectations fail, one of them with offenders.
        images, labels: uint8 (N, C, H, W) and int64 (N,) instead of scikit-learn's digits.
    """
    rng = np.random.default_rng(0)
    if images is None or labels is None:
        digits = load_digits()
        images, labels = (digits.images[:, None] * 255 / 16).astype(np.uint8), digits.target
    work = folder / "work"
    (work / "raw").mkdir(parents=True)
    (work / "raw" / "images.bin").write_bytes(images.tobytes()[:1000])
    data_digest = dvc_digest(work / "raw")

    test = np.arange(len(images)) % 7 == 6
    labels = labels if labelled else np.full(len(images), -1)
    table = ImageTable(write_table(work / "table", images, labels, test, list(classes) if labelled else []))
    told = {"digest": data_digest, "broken": [{"path": path, "reason": reason} for path, reason in broken]}
    write_json(work / "table" / "summary.json", table.summary | told)
    table = ImageTable(work / "table")

    _validation(work / "validation", table, warnings)
    clusters = _kmeans(table)
    linear = {method: 0.887 - 0.4 * rank / (len(methods) + 3) for rank, method in enumerate(methods)}
    for method, score in linear.items():
        _model(work / "methods" / method / "model", table, method, rng)
        _labels(work / "methods" / method / "labels", table, score, clusters)
        evaluation = _scores(table, score, 40 * score) | {"method": method, "family": _family(method)}
        write_json(work / "methods" / method / "evaluation" / "evaluation.json", evaluation)
    rows = [
        {"method": "raw pixels", "family": "baseline", **_scores(table, 0.841, 21.4)},
        {"method": "PCA-128", "family": "baseline", **_scores(table, 0.84, 19.0)},
        {"method": "random init", "family": "baseline", **_scores(table, 0.771, 60.0)},
    ]
    write_json(work / "baselines" / "baselines.json", {"rows": rows})
    meaning = "accuracy of weighted kNN on a held-out part of train" if labelled else "effective rank"
    selection = {"selected": methods[0], "criterion": "held_out_knn", "meaning": meaning, "scores": linear}
    write_json(work / "selection" / "selection.json", selection)
    for name in ("model", "labels"):
        link_or_copy(work / "methods" / methods[0] / name, work / name)
    _classifier(work / "classifier", table, rng)
    _serving(work)

    bundle = folder / "runs" / f"{source}-20260102-030405-0a1b2c"
    data = {"source": source, "digest": data_digest, "reference": ""}
    parameters = {"data": source, "methods": list(methods)}
    record(bundle.name, _artifacts(work, methods), parameters, data, "", "", bundle)
    return bundle


def _validation(folder: Path, table: ImageTable, warnings: bool) -> None:
    ids = table.rows["id"].tolist()
    found, drift = (ids[10:22], 0.31) if warnings else ([], 0.02)
    checks: list[tuple[str, str, bool, Any, str, Any, list[str]]] = [
        ("images in train", "critical", True, 1541, "at least", 50, []),
        ("type of mean", "critical", True, "float64", "like", "float64", []),
        ("missing id", "critical", True, 0, "at most", 0, []),
        ("exact duplicates", "critical", True, 0.0017, "at most", 0.02, ids[:3]),
        ("drift of std", "warning", not warnings, drift, "at most", 0.1, []),
        ("near duplicates", "warning", not warnings, len(found) / 1797, "at most", 0.001, found),
    ]
    keys = ("name", "severity", "success", "observed", "relation", "bound")
    result = {
        "success": True,
        "severity": "warning" if warnings else None,
        "images": len(table),
        "expectations": [
            dict(zip(keys, check)) | {"offenders": len(check[-1]), "ids": check[-1][:10]} for check in checks
        ],
        "drift": {"reference": "c" * 64, "mean": 0.02, "std": drift, "entropy": 0.01},
    }
    write_json(folder / "validation.json", result)


def _family(method: str) -> str:
    return "Bottleneck" if "autoencoder" in method else "Invariance"


def _model(folder: Path, table: ImageTable, method: str, rng: np.random.Generator) -> None:
    steps = np.arange(20, 1001, 20)
    loss = (2.4 + 3 * np.exp(-steps / 250)) * (1 + 0.01 * rng.standard_normal(len(steps)))
    rate = 0.003 * np.minimum(1, (1000 - steps) / 300)
    lines = [
        {"step": int(step), "loss": float(value), "learning_rate": float(share), "accuracy": 0.71}
        for step, value, share in zip(steps, loss, rate)
    ]
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(rng.bytes(100))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "method": method, "family": _family(method), "equation": "f(pi(x)) = f(x)",
        "paper": "Chen et al. 2020", "encoder": {"name": "small_resnet"}, "settings": {},
        "training": {"batch_size": 256}, "steps": 1000,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    if "autoencoder" in method:
        originals = table.images(table.indices("train")[:8])
        np.save(
            folder / "picture.npy", np.stack([originals, originals // 4 + np.roll(originals, 1, -1) // 2])
        )


def _scores(table: ImageTable, linear: float, rank: float) -> dict[str, Any]:
    known = {
        "linear": linear,
        "knn": linear - 0.01,
        "knn_standardised": linear - 0.004,
        "held_out_knn": linear,
    }
    collapse = {
        "std": 0.041,
        "cosine": 0.21,
        "effective_rank": rank,
        "participation_ratio": 17.5,
        "dimensions": 512,
    }
    always = {"view_retrieval": linear / 2, "effective_rank": rank, "collapse": collapse}
    return (known if table.classes else dict.fromkeys(known)) | always


def _kmeans(table: ImageTable) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of each train image, and its distances to all ten, by its first thousand pixels."""
    images = table.images(table.indices("train"))
    pixels = images.reshape(len(images), -1)[:, :1000] / 255
    means = KMeans(10, n_init=1, random_state=0).fit(pixels[:2000])
    return means.predict(pixels), means.transform(pixels)


def _labels(folder: Path, table: ImageTable, score: float, clusters: tuple[np.ndarray, np.ndarray]) -> None:
    train, (cluster, distance) = table.indices("train"), clusters
    folder.mkdir(parents=True)
    ids = table.rows["id"].to_numpy()[train]
    pd.DataFrame({"id": ids, "cluster": cluster, "confidence": 0.7}).to_parquet(folder / "labels.parquet")
    central = np.argsort(distance, axis=0)[:10].T
    np.save(folder / "gallery.npy", np.stack([table.images(train[few]) for few in central]))
    scores: dict[str, Any] = {"k": 10, "inertia": 123.4}
    if table.classes:
        scores |= {"acc": score - 0.25, "nmi": score - 0.3, "ari": score - 0.4, "ami": score - 0.31}
        scores |= {"purity": score - 0.24, "scored_on": "test"}
    write_json(folder / "scores.json", scores)


def _classifier(folder: Path, table: ImageTable, rng: np.random.Generator) -> None:
    classes = table.classes or [f"cluster {number}" for number in range(10)]
    config = {"classes": classes, "target": "labels" if table.classes else "clusters"}
    write_json(folder / "config.json", config)
    rows = [
        {"share": 0.01, "labels": 600, "probe": 0.812, "finetuned": 0.82, "scratch": 0.78},
        {"share": 0.1, "labels": 6000, "probe": 0.862, "finetuned": 0.87, "scratch": 0.837},
        {"share": 1.0, "labels": 60000, "probe": 0.887, "finetuned": 0.921, "scratch": 0.908},
    ]
    write_json(folder / "efficiency.json", {"rows": rows if table.classes else []})
    matrix = np.diag(rng.integers(80, 110, 10)) + rng.integers(0, 4, (10, 10)) * (rng.random((10, 10)) < 0.4)
    write_json(folder / "confusion.json", {"classes": classes, "matrix": matrix.tolist()})


def _serving(work: Path) -> None:
    for name in SERVED:
        write_json(work / "repository" / name / "model.onnx", name)
    write_json(work / "index" / "index.npz", "index")
    models = {
        name: {"onnx": 2.1e-7 * scale, "triton": 2.4e-7 * scale} for scale, name in enumerate(SERVED, 1)
    }
    write_json(work / "serving" / "serving.json", {"tolerance": 1e-5, "models": models})


def _artifacts(work: Path, methods: Sequence[str]) -> dict[str, Artifact]:
    """The artifacts of a run with the records of steps that never ran."""
    digest = {
        path.relative_to(work).as_posix(): tree_digest(path) for path in work.rglob("*") if path.is_dir()
    }
    artifacts: dict[str, Artifact] = {}
    clock = 1_767_323_045.0

    def step(name: str, seconds: float, inputs: dict[str, Any], outputs: dict[str, str]) -> None:
        nonlocal clock
        metrics = {"images_per_second": 566.5, "seconds": seconds}
        made = {
            "name": name, "code": "c" * 64, "machine": machine(), "metrics": metrics,
            "started": clock, "ended": clock + seconds, "seconds": seconds, "cpu_seconds": seconds,
            "inputs": {
                key: [digest[folder] for folder in value] if isinstance(value, list) else digest[value]
                for key, value in inputs.items()
            },
            "outputs": {key: digest[folder] for key, folder in outputs.items()},
        }  # fmt: skip
        if name == "check_serving":
            metrics |= {f"{model}_milliseconds": 0.82 for model in SERVED}
        for folder in outputs.values():
            artifacts[folder] = Artifact(str(work / folder))
            sign(artifacts[folder], digest[folder], made)
        clock += seconds

    table, chosen = {"table": "table"}, {"model": "model", "labels": "labels"}
    step("ingest", 2.4, {}, {"table": "table", "raw": "raw"})
    step("validate", 3.1, table, {"validation": "validation"})
    step("baselines", 12, table, {"baselines": "baselines"})
    for method in methods:
        model = {"model": f"methods/{method}/model"}
        step(f"pretrain/{method}", 240, table, model)
        step(f"self_label/{method}", 9, table | model, {"labels": f"methods/{method}/labels"})
        step(f"evaluate/{method}", 14, table | model, {"evaluation": f"methods/{method}/evaluation"})
    several = {
        kind + "s": [f"methods/{method}/{kind}" for method in methods] for kind in ("evaluation", "model")
    } | {"labels": [f"methods/{method}/labels" for method in methods]}
    step("select", 0.1, several, {"selection": "selection", "model": "model", "model_labels": "labels"})
    step("finetune", 75, chosen | table, {"classifier": "classifier"})
    served = {"repository": "repository", "index": "index"}
    step("export", 18, chosen | table | {"classifier": "classifier"}, served)
    step("check_serving", 21, served, {"serving": "serving"})
    return artifacts
