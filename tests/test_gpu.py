"""What must hold on a GPU too. Without one these tests are passed over, and say so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_table
from torch import Tensor

from unlabeled.nets.encoder import Encoder, load_encoder
from unlabeled.parameters import Encoder as EncoderParameters
from unlabeled.parameters import SelfLabel, Training
from unlabeled.probes import knn
from unlabeled.selflabel.cluster import self_label
from unlabeled.selflabel.neighbours import mine_neighbours
from unlabeled.signals import all_signals, find_signal
from unlabeled.sinkhorn import assign, balance
from unlabeled.training.pretrain import pretrain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHODS = tuple(all_signals())
BRIEF: dict[str, Any] = {"steps": 12, "batch_size": 32, "threads": 1, "checkpoint_every": 5, "log_every": 1}


@pytest.fixture(scope="module")
def tables(
    tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]
) -> dict[int, Path]:
    """Tables of 300 digits by their channels: gray, and in colour, a hue of its own for each image."""
    images, labels = digits[0][:300].repeat(2, axis=2).repeat(2, axis=3), digits[1][:300]
    hues = np.random.default_rng(0).uniform(0.2, 1, (300, 3, 1, 1))
    test, classes = np.arange(300) % 5 == 4, [str(digit) for digit in range(10)]
    folder = tmp_path_factory.mktemp("tables")
    return {
        1: write_table(folder / "gray", images, labels, test, classes),
        3: write_table(folder / "colour", (images * hues).astype(np.uint8), labels, test, classes),
    }


def run(tables: dict[int, Path], out: Path, method: str, seed: int = 0, **training: Any) -> dict[str, Any]:
    kind = find_signal(method)
    table = tables[3 if kind.needs_color else 1]
    encoder = EncoderParameters(**{"width": 16, **kind.encoder_defaults})
    checkpoints = out.parent / "checkpoints"
    return pretrain(
        table, out, {"name": method}, encoder, Training(**{**BRIEF, **training}), seed, checkpoints
    )


def bits(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_killed_and_resumed_it_ends_with_the_same_bits(
    tables: dict[int, Path], tmp_path: Path, method: str, precision: str
) -> None:
    """Once from the beginning to the end; once again from step 10, its later checkpoint lost."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run(tables, tmp_path / "a/model", method, precision=precision)
    run(tables, tmp_path / "b/model", method, precision=precision)
    whole = bits(tmp_path / "a/model")
    assert bits(tmp_path / "b/model") == whole
    kept = sorted((tmp_path / "b/checkpoints").rglob("step-*.pt"))
    assert [path.name.split("-")[1] for path in kept] == ["00000010", "00000012"]
    kept[-1].unlink()
    result = run(tables, tmp_path / "b/again", method, precision=precision)
    assert result["resumed_at"] == 10
    assert bits(tmp_path / "b/again") == whole


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_what_the_cpu_learns(
    tables: dict[int, Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draws differ, so the curves do: the means over several seeds are near each other."""

    def start_and_end(seed: int) -> Tensor:
        folder = tmp_path / str(seed)
        folder.mkdir()
        run(tables, folder / "model", method, seed, precision="float32", steps=60, checkpoint_every=60)
        lines = (folder / "model/metrics.jsonl").read_text().splitlines()
        losses = torch.tensor([json.loads(line)["loss"] for line in lines])
        return torch.stack((losses[:5].mean(), losses[-20:].mean()))

    on_gpu = torch.stack([start_and_end(seed) for seed in range(4)])
    assert load_encoder(tmp_path / "0/model").mean.device.type == "cpu"  # the artifact knows no device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = torch.stack([start_and_end(seed) for seed in range(4, 12)])
    # Of one distribution, these means are 0.6 deviations apart.
    allowed = 3 * on_cpu.std(0) + 0.01 * on_cpu.mean(0).abs()
    assert ((on_gpu.mean(0) - on_cpu.mean(0)).abs() < allowed).all(), (on_gpu, on_cpu)


def test_an_encoder_answers_as_on_the_cpu() -> None:
    encoder = Encoder("small_resnet", 32, 2, (1, 28, 28), 0.3, 0.35).eval()
    images = torch.rand(64, 1, 28, 28)
    with torch.inference_mode():
        expected = encoder(images)
        found = encoder.cuda()(images.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)  # products in TF32
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9999


def test_neighbours_and_balanced_labels_are_those_of_the_cpu() -> None:
    features = torch.randn(3000, 64)
    expected, found = mine_neighbours(features, 20), mine_neighbours(features.cuda(), 20).cpu()
    assert (expected == found).float().mean() > 0.99  # near ties
    scores = torch.randn(3000, 20)
    torch.testing.assert_close(balance(20 * scores.cuda()).cpu(), balance(20 * scores), rtol=0, atol=1e-8)
    assert torch.equal(assign(scores.cuda(), 25.0)[0].cpu(), assign(scores, 25.0)[0])


def test_votes_are_those_of_the_cpu(
    digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = digits[0].reshape(len(digits[0]), -1).astype(np.float32), digits[1]
    found = knn.weighted_knn(features[:1200], labels[:1200], features[1200:])
    monkeypatch.setattr(knn, "accelerator", lambda: torch.device("cpu"))
    expected = knn.weighted_knn(features[:1200], labels[:1200], features[1200:])
    assert (found == expected).mean() > 0.995


@pytest.mark.parametrize("method", ["kmeans", "scan", "sela"])
def test_clusters_repeat_to_the_bit(tables: dict[int, Path], tmp_path: Path, method: str) -> None:
    (tmp_path / "a").mkdir()
    run(tables, tmp_path / "a/model", "simclr")
    for name in ("first", "second"):
        section = SelfLabel(method=method, steps=50, heads=3, self_training_steps=5)
        self_label(tmp_path / "a/model", tables[1], tmp_path / name, section, 0)
    assert bits(tmp_path / "first") == bits(tmp_path / "second")
