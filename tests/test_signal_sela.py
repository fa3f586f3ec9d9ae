"""SeLa as a learning signal: labels by image, balanced, assigned anew by schedule; what keeps it from collapse."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from signal_training import torchrun
from torch import Tensor

from unlabeled import views
from unlabeled.distributed import processes, rank
from unlabeled.nets.encoder import Encoder
from unlabeled.signals.priors import sela
from unlabeled.signals.priors.sela import SeLa
from unlabeled.training.loop import parallel

IMAGES, K = 96, 6


def signal_of(count: int = IMAGES, **settings: Any) -> SeLa:
    torch.manual_seed(0)
    few = {"clusters": K, "heads": 3, "hidden_dim": 32, "projection_dim": 16, "reassignments": 9}
    signal = SeLa(Encoder("small_resnet", 16, 2, (1, 8, 8), 0.4, 0.3), **{**few, **settings})
    signal.prepare(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), count)
    return signal


def images_of(count: int = IMAGES) -> Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(1)).byte()


def counts(labels: Tensor) -> Tensor:
    return labels.bincount(minlength=K)


def step(signal: SeLa, images: Tensor, indices: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    optimizer.zero_grad()
    loss, values = signal(images, indices)
    loss.backward()
    optimizer.step()
    signal.after_step()
    return {"loss": loss.item(), **values}


# Labels


def test_first_labels_are_balanced_by_each_head() -> None:
    signal = signal_of()
    signal(images_of(), torch.arange(IMAGES))
    assert not signal.labels.any(), "only `after_step` writes"
    signal.after_step()
    for head in range(3):
        assert counts(signal.labels[:, head]).min() >= 0.75 * IMAGES / K
        assert counts(signal.labels[:, head]).max() <= 1.25 * IMAGES / K
    assert (signal.labels[:, 0] != signal.labels[:, 1]).any(), "each head has its own"


def test_a_label_belongs_to_the_images_number_not_to_its_place_in_the_batch() -> None:
    signal, images = signal_of(), images_of(24)
    indices = torch.arange(10, 34)
    signal(images, indices)
    signal.after_step()
    kept = signal.labels.clone()
    assert kept[indices].unique(dim=0).shape[0] > 3 and not kept[34:].any() and not kept[:10].any()
    order = torch.randperm(24)
    assert torch.equal(signal.labels_of(images[order], indices[order]), kept[indices[order]])
    signal(images[order], indices[order])
    signal.after_step()
    assert torch.equal(signal.labels, kept), "labels stay until they are assigned anew"


def test_images_seen_keep_their_labels_beside_new_ones() -> None:
    signal, images = signal_of(), images_of(40)
    signal(images[:24], torch.arange(24))
    signal.after_step()
    kept = signal.labels[:24].clone()
    mixed = signal.labels_of(images[12:36], torch.arange(12, 36))
    assert torch.equal(mixed[:12], kept[12:]) and mixed[12:].unique().numel() > 1


def test_a_reassignment_balances_one_head_over_the_images_seen() -> None:
    """The memory says which images belong together; four images are not in it yet."""
    signal = signal_of(124)
    groups = torch.arange(120) % 4
    with torch.no_grad():
        signal.memory.vectors[:120] = torch.eye(16)[groups]
        signal.heads.weight.normal_()
        signal.labels[:] = 5
    signal.reassign(1)
    assert (signal.labels[:, [0, 2]] == 5).all() and (signal.labels[120:] == 5).all()
    found = signal.labels[:120, 1]
    assert all(found[groups == group].unique().numel() == 1 for group in range(4))
    signal.memory.vectors.data[:120] = torch.randn(120, 16)
    signal.reassign(1)
    assert counts(signal.labels[:120, 1]).min() >= 16 and counts(signal.labels[:120, 1]).max() <= 24


def test_heads_take_turns_more_often_early_in_the_run() -> None:
    signal = signal_of(reassignments=7)
    turns: list[tuple[int, int]] = []
    signal.reassign = lambda head: turns.append((number, head))  # type: ignore[method-assign]
    for number in range(64):
        signal.progress = number / 64
        signal.after_step()
    assert [head for _, head in turns] == [0, 1, 2, 0, 1, 2, 0]
    # The i-th of 7 at a share of (i / 8)²: steps i² of 64.
    assert [number for number, _ in turns] == [i * i for i in range(1, 8)]
    again = signal_of(reassignments=7)
    again.load_state_dict(signal.state_dict())
    assert again.assigned == 7


# The loss


def test_the_loss_of_indifferent_heads_is_that_of_guessing() -> None:
    signal = signal_of()
    for parameter in signal.heads.parameters():
        torch.nn.init.zeros_(parameter)
    loss, _ = signal(images_of(), torch.arange(IMAGES))
    assert loss.item() == pytest.approx(math.log(K), abs=1e-6)


def test_the_loss_is_the_mean_cross_entropy_of_the_heads() -> None:
    signal, images, indices = signal_of().eval(), images_of(20), torch.arange(20)
    signal.view = views.to_float  # type: ignore[method-assign, assignment]
    loss, values = signal(images, indices)
    signal.after_step()
    logits = signal.logits(signal.embed(images))
    assert logits.shape == (20, 3, K)
    own = [torch.nn.functional.cross_entropy(logits[:, head], signal.labels[:20, head]) for head in range(3)]
    assert loss.item() == pytest.approx(sum(part.item() for part in own) / 3, rel=1e-5)
    right = (logits.argmax(2) == signal.labels[:20]).float().mean()
    assert values["label_accuracy"].item() == pytest.approx(right.item())


def test_no_gradient_reaches_the_labels_or_the_memory() -> None:
    signal = signal_of()
    for _ in range(2):
        signal(images_of(), torch.arange(IMAGES))[0].backward()
        signal.after_step()
    assert signal.labels.grad is None and signal.memory.vectors.grad is None
    assert not signal.labels.is_floating_point() and not signal.memory.vectors.requires_grad


# Learning


def digits_of(digits: tuple[np.ndarray, np.ndarray], count: int) -> Tensor:
    return torch.from_numpy(digits[0][:count])


def trained(
    images: Tensor, steps: int = 120, shuffled: bool = False, **settings: Any
) -> tuple[SeLa, list[dict[str, Any]]]:
    """Train on random batches of 64; `shuffled`: the number of an image is another one at each look."""
    signal = signal_of(len(images), crop=0.8, jitter=0.2, **settings).train()
    optimizer = torch.optim.AdamW([p for p in signal.parameters() if p.requires_grad], 3e-3)
    lines = []
    for number in range(steps):
        torch.manual_seed(number)
        signal.progress = number / steps
        batch = torch.randperm(len(images))[:64]
        indices = torch.randperm(len(images))[:64] if shuffled else batch
        lines.append(step(signal, images[batch], indices, optimizer))
    return signal.eval(), lines


@pytest.fixture(scope="module")
def learned(digits: tuple[np.ndarray, np.ndarray]) -> tuple[SeLa, list[dict[str, Any]]]:
    return trained(digits_of(digits, 256))


def test_it_learns_its_labels_and_shuffled_ones_stay_at_chance(
    digits: tuple[np.ndarray, np.ndarray], learned: tuple[SeLa, list[dict[str, Any]]]
) -> None:
    lines = learned[1]
    _, by_chance = trained(digits_of(digits, 256), shuffled=True)

    def last(values: list[dict[str, Any]]) -> float:
        return float(np.mean([line["label_accuracy"].item() for line in values[-20:]]))

    assert last(lines) > 3 / K
    # The commonest of six balanced clusters is right once in six times; the rest is sampling.
    assert last(by_chance) < 1 / K + 0.12


def test_without_equal_partition_it_collapses(
    digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The degenerate answer of clustering with the net's own guesses: few clusters take all images."""
    images = digits_of(digits, 256)

    def shares(signal: SeLa) -> list[float]:
        return [float(counts(signal.labels[:, head]).max() / len(images)) for head in range(3)]

    balanced = shares(trained(images, reassignments=30)[0])
    monkeypatch.setattr(sela, "assign", lambda logits, sharpness: (logits.argmax(1), None))
    collapsed = shares(trained(images, reassignments=30)[0])
    assert max(balanced) < 1.35 / K and max(collapsed) > 2 / K


def test_the_objective_is_at_chance_for_one_cluster_and_above_it_when_trained(
    digits: tuple[np.ndarray, np.ndarray], learned: tuple[SeLa, list[dict[str, Any]]]
) -> None:
    images = digits_of(digits, 512)[256:]
    fresh, signal = signal_of().eval(), learned[0]
    torch.nn.init.zeros_(fresh.heads.weight)
    with torch.inference_mode():
        collapsed, found = fresh.objective(images), signal.objective(images)
    assert collapsed["agreement"] == collapsed["chance"] == 1
    assert found["agreement"] > 0.5 and found["agreement"] > 2 * found["chance"]


def test_the_picture_shows_a_clusters_images_most_probable_first() -> None:
    signal, images = signal_of().eval(), images_of(40)
    with torch.inference_mode():
        picture = signal.picture(images)
        logits = signal.logits(signal.projector(signal.encoder(views.to_float(images))))[:, 0]
    assert picture.shape == (5, K, 1, 8, 8)
    largest = logits.argmax(1).bincount(minlength=K).argmax()
    expected = views.to_float(images)[logits.log_softmax(1)[:, largest].argsort(descending=True)[:5]]
    assert torch.equal(picture[:, 0], expected)


# Several processes


def train_plain() -> dict[str, Tensor]:
    """Take five steps over this process's share of each batch, with no view and no batch statistics."""
    signal = signal_of(40).eval()
    signal.view = views.to_float  # type: ignore[method-assign, assignment]
    model = parallel(signal, torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in signal.parameters() if p.requires_grad], 0.1)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for number in range(5):
        signal.progress = number / 5
        images = torch.randint(0, 256, (24, 1, 8, 8), generator=generator).byte()
        indices = torch.randperm(40, generator=generator)[:24]
        share = 24 // processes()
        mine = slice(rank() * share, (rank() + 1) * share)
        optimizer.zero_grad()
        loss, _ = model(images[mine], indices[mine])
        loss.backward()
        optimizer.step()
        signal.after_step()
        losses.append(loss.detach())
    weights = torch.cat([p.detach().flatten() for p in signal.encoder.parameters()])
    return {"losses": torch.stack(losses), "weights": weights, "labels": signal.labels.detach().clone()}


WORKER = """
import sys
import torch
import test_signal_sela as tests
from unlabeled.distributed import process_group, rank
with process_group():
    torch.save(tests.train_plain(), f"{sys.argv[1]}/{rank()}.pt")
"""


@pytest.mark.slow
def test_two_halves_of_a_batch_train_as_the_whole(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(str(tmp_path / "worker.py"), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    one = train_plain()
    assert torch.allclose((first["losses"] + second["losses"]) / 2, one["losses"], atol=1e-5)
    for result in (first, second):
        assert torch.allclose(result["weights"], one["weights"], atol=1e-5)
        assert torch.equal(result["labels"], one["labels"])
    assert (first["losses"] - second["losses"]).abs().max() > 1e-3
    assert one["labels"].unique().numel() == K
