"""DINO: its loss against lightly's, its teacher, its schedules, and the two ways in which it collapses."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from signal_training import torchrun
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.data.batches import Batches
from unlabeled.data.table import ImageTable
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.prototypes import PrototypeHead
from unlabeled.parameters import Training
from unlabeled.probes.knn import weighted_knn
from unlabeled.signals.invariance.dino import (
    DINO,
    dino_loss,
    entropy,
    moved_center,
    principal_components,
    teacher_momentum,
    teacher_probabilities,
    teacher_temperature,
)
from unlabeled.training.loop import train as loop
from unlabeled.training.optimizers import build_optimizer

VIT = {"name": "tiny_vit", "width": 4}


def dino(
    shape: tuple[int, int, int] = (1, 16, 16), name: str = "small_resnet", width: int = 16, **settings: Any
) -> DINO:
    torch.manual_seed(0)
    small = {"prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16}
    return DINO(Encoder(name, width, 2, shape, 0.3, 0.3), **small | settings)


def images_of(shape: tuple[int, int, int] = (1, 16, 16), count: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(0)).byte()


def outputs(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def train(signal: DINO, images: Tensor, steps: int, rate: float = 3e-3) -> list[dict[str, float]]:
    """Train as the loop does, on the same images each step."""
    training = Training(**{**DINO.training_defaults, "learning_rate": rate})
    signal.train()
    optimizer = build_optimizer(signal, training)
    lines = []
    for step in range(steps):
        torch.manual_seed(step)
        signal.progress = step / steps
        optimizer.zero_grad()
        loss, values = signal(images, torch.arange(len(images)))
        loss.backward()
        nn.utils.clip_grad_norm_(signal.parameters(), training.gradient_clip)
        optimizer.step()
        signal.after_step()
        lines.append({name: value.item() for name, value in {"loss": loss, **values}.items()})
    return lines


# The loss


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_loss_and_the_center_are_lightlys(count: int) -> None:
    teacher, student, k = outputs(2, 6, 20), outputs(count, 6, 20, seed=1), 20
    oracle = DINOLoss(k, warmup_teacher_temp=0.05, teacher_temp=0.05, student_temp=0.2, center_momentum=0.8)
    center = torch.zeros(k)
    for _ in range(3):
        expected = oracle(list(teacher), list(student))
        loss = dino_loss(teacher_probabilities(teacher, center, 0.05), student, 0.2)
        torch.testing.assert_close(loss, expected)
        center = moved_center(center, teacher, 0.8)
        torch.testing.assert_close(center, oracle.center.flatten())
        teacher = teacher.roll(1, 2)


def test_every_pair_of_different_views_counts_once() -> None:
    """2 x (2 + L) - 2 of them, by hand."""
    targets, student = outputs(2, 4, 5).softmax(-1), outputs(6, 4, 5, seed=1)
    losses = [
        -(targets[t] * (student[v] / 0.1).log_softmax(1)).sum(1).mean()
        for t in range(2)
        for v in range(6)
        if t != v
    ]
    assert len(losses) == 10
    torch.testing.assert_close(dino_loss(targets, student, 0.1), torch.stack(losses).mean())


def test_a_uniform_student_costs_the_log_of_the_prototypes() -> None:
    targets = outputs(2, 4, 1024).softmax(-1)
    assert dino_loss(targets, torch.zeros(6, 4, 1024), 0.1).item() == pytest.approx(6.9315, abs=1e-4)


def test_the_loss_at_init_has_its_analytic_value() -> None:
    """Cosines with random prototypes are normal, of variance s = 1 / bottleneck.

    The student's log-partition is then ln K + s / 2t², and centred targets of other images know nothing of
    its logits.
    """
    torch.manual_seed(0)
    head = PrototypeHead(64, 64, 128, 1024)
    with torch.no_grad():
        student, teacher = head(torch.randn(8 * 64, 64) * 50).view(8, 64, -1).split((6, 2))
    targets = teacher_probabilities(teacher, teacher.mean((0, 1)), 0.04)
    analytic = math.log(1024) + 1 / 128 / (2 * 0.1**2)
    assert dino_loss(targets, student, 0.1).item() == pytest.approx(analytic, abs=0.1)


def test_the_loss_of_half_precision_is_computed_in_single() -> None:
    teacher, student = outputs(2, 6, 64), outputs(4, 6, 64, seed=1)
    loss = dino_loss(
        teacher_probabilities(teacher.bfloat16(), torch.zeros(64), 0.04), student.bfloat16(), 0.1
    )
    exact = dino_loss(teacher_probabilities(teacher, torch.zeros(64), 0.04), student, 0.1)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), abs=0.05)


def test_shuffled_targets_bring_the_loss_above_that_of_the_right_ones() -> None:
    teacher = outputs(2, 16, 64)
    pairs = teacher[:1].expand(2, -1, -1)
    targets = teacher_probabilities(pairs, torch.zeros(64), 0.04)
    assert dino_loss(targets.roll(1, 1), pairs, 0.1) > dino_loss(targets, pairs, 0.1) + 0.5


# The head


def test_the_head_is_lightlys() -> None:
    torch.manual_seed(0)
    ours, theirs = PrototypeHead(12, 16, 8, 20), DINOProjectionHead(12, 16, 8, 20)
    for mine, its in zip(ours.mlp[::2], theirs.layers[::2], strict=True):
        mine.load_state_dict(its.state_dict())
    ours.prototypes.data = theirs.last_layer.weight_v.data.clone() * 3
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours(x).abs().max() <= 1


def test_frozen_prototypes_take_no_step_and_the_rest_of_the_head_does() -> None:
    signal = dino(frozen=0.5)
    before = copy.deepcopy(signal.state_dict())
    train(signal, images_of(), 2)  # The first step is frozen, the second is not.
    first = dino(frozen=0.5)
    loss, _ = first(images_of(), torch.arange(8))
    loss.backward()
    assert first.head.prototypes.grad is not None and not first.head.prototypes.grad.any()
    assert all(layer.weight.grad.any() for layer in first.head.mlp if isinstance(layer, nn.Linear))
    assert not torch.equal(signal.head.prototypes, before["head.prototypes"])


# Schedules


def test_the_ends_of_the_schedules_are_exact() -> None:
    assert teacher_momentum(0, 0.996) == pytest.approx(0.996, abs=1e-12)
    assert teacher_momentum(1, 0.996) == 1
    assert teacher_momentum(0.5, 0.996) == pytest.approx(0.998, abs=1e-12)
    temperatures = [teacher_temperature(p, 0.04, 0.07, 0.5) for p in (0, 0.25, 0.5, 1)]
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert teacher_temperature(0, 0.04, 0.04, 0.3) == pytest.approx(0.04)


def test_the_loop_tells_how_much_of_the_run_is_done(digits_table: Path, tmp_path: Path) -> None:
    training = Training(steps=4, batch_size=8, compile="no", channels_last=False)
    signal, shares = dino((1, 8, 8), width=4), []
    after_step = signal.after_step
    signal.after_step = lambda: (shares.append(signal.progress), after_step())  # type: ignore[method-assign]
    batches = Batches(ImageTable(digits_table), 8, 0, 0, 1)
    loop(signal, batches, training, 0, torch.device("cpu"), tmp_path)
    assert shares == [0, 0.25, 0.5, 0.75] and signal.progress == 1


# Teacher and student


def teacher_and_student(signal: DINO) -> list[tuple[Tensor, Tensor]]:
    return [
        *zip(signal.encoder.parameters(), signal.student.parameters(), strict=True),
        *zip(signal.teacher_head.parameters(), signal.head.parameters(), strict=True),
    ]


def test_the_teacher_starts_as_the_student_and_shares_nothing_with_it() -> None:
    for teacher, student in teacher_and_student(dino()):
        assert torch.equal(teacher, student) and teacher.data_ptr() != student.data_ptr()
        assert student.requires_grad and not teacher.requires_grad


@pytest.mark.parametrize("net", [{}, VIT])
def test_the_teacher_is_the_exact_moving_average_and_takes_no_gradient(net: dict[str, Any]) -> None:
    signal = dino(**net, momentum=0.9).train()
    optimizer = torch.optim.SGD((p for p in signal.parameters() if p.requires_grad), 0.5)
    for step in range(3):
        signal.progress = step / 10
        old = [teacher.clone() for teacher, _ in teacher_and_student(signal)]
        loss, _ = signal(images_of(), torch.arange(8))
        loss.backward()
        optimizer.step()
        signal.after_step()
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * step / 10)) / 2
        for before, (teacher, student) in zip(old, teacher_and_student(signal), strict=True):
            assert teacher.grad is None and student.grad is not None
            torch.testing.assert_close(teacher, momentum * before + (1 - momentum) * student)
    assert any((teacher - student).abs().max() > 1e-4 for teacher, student in teacher_and_student(signal))


def test_the_teachers_batch_statistics_are_of_the_large_crops_alone() -> None:
    """Not the student's, which mix large and small ones: exported are whole images."""
    signal = dino().train()
    seen: list[tuple[int, ...]] = []
    signal.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    small: list[tuple[int, ...]] = []
    signal.student.register_forward_pre_hook(lambda _, inputs: small.append(tuple(inputs[0].shape)))
    signal(images_of(), torch.arange(8))
    crops = signal.local_crops
    assert seen == [(16, 1, 16, 16)] and small == [(16, 1, 16, 16), (8 * crops, 1, 8, 8)]
    assert signal.encoder.net[1].num_batches_tracked == 1 and signal.student.net[1].num_batches_tracked == 2


def test_the_center_moves_after_it_was_used_and_only_in_training() -> None:
    signal = dino(**VIT, batch_norm=False).train()
    recorded: list[Tensor] = []
    signal.teacher_head.register_forward_hook(lambda _, __, result: recorded.append(result))
    for share in (0.0, 0.1, 0.19):
        mean = recorded[0].mean(0) if recorded else torch.zeros(32)
        torch.testing.assert_close(signal.center, share * mean)
        torch.manual_seed(0)  # The same views and the same teacher, another center.
        _, values = signal(images_of(), torch.arange(8))
        targets = teacher_probabilities(recorded[-1], share * recorded[0].mean(0), 0.04)
        torch.testing.assert_close(values["teacher_entropy"], entropy(targets).mean())
    before = signal.center.clone()
    signal.eval().objective(images_of())
    assert torch.equal(signal.center, before)


def test_global_and_local_crops() -> None:
    signal = dino((3, 33, 33), split=0.3, smallest=0.1)
    images = images_of((3, 33, 33), 4)
    assert signal.global_crops(images).shape == (8, 3, 33, 33)
    assert signal.local_views(images, 3).shape == (12, 3, 16, 16)
    assert signal.global_area == (0.3, 1) and signal.local_area == (0.1, 0.3)
    first, second = signal.global_crops(images).chunk(2)
    assert (first - second).abs().amax((1, 2, 3)).min() > 0.01


def test_two_global_crops_alone_train_too() -> None:
    signal = dino(local_crops=0)
    loss, _ = signal(images_of(), torch.arange(8))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 33, 33)])
def test_a_vit_trains_and_shows_its_heads(shape: tuple[int, int, int]) -> None:
    signal = dino(shape, **VIT)
    loss, _ = signal(images_of(shape), torch.arange(8))
    loss.backward()
    for name, parameter in signal.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    picture = signal.eval().picture(images_of(shape))
    assert picture.shape == (8, 8, *shape) and picture.min() >= 0 and picture.max() <= 1
    assert signal.encoder(torch.rand(2, *shape)).shape == (2, signal.encoder.feature_dim)


def test_principal_components_are_those_of_the_svd() -> None:
    maps = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    flat = maps.movedim(1, -1).flatten(0, 2)
    expected = torch.pca_lowrank(flat, 6, niter=8)
    scores = ((flat - flat.mean(0)) @ expected[2][:, :2]).view(3, 4, 5, 2).movedim(-1, 1)
    components = principal_components(maps, 2)
    torch.testing.assert_close(components.abs(), scores.abs(), atol=1e-3, rtol=1e-3)
    energy = maps.norm(dim=1) - maps.norm(dim=1).mean()
    assert ((components * energy.unsqueeze(1)).sum((0, 2, 3)) >= 0).all()


# Learning and collapse


@pytest.fixture(scope="module")
def small_digits(digits: tuple[np.ndarray, np.ndarray]) -> Tensor:
    return torch.from_numpy(digits[0][:64])


def collapse(images: Tensor, **settings: Any) -> tuple[dict[str, float], float]:
    """Train a little; return the last values, and the spread of the teacher's probabilities over images."""
    signal = dino((1, 8, 8), width=8, prototypes=64, momentum=0.9, local_crops=2, frozen=0.0, **settings)
    values = train(signal, images, 60)[-1]
    with torch.no_grad():
        targets = signal.teach(images.float() / 255)[1]
    return values, targets.std(0).sum().item()


def test_centring_and_sharpening_together_do_not_collapse(small_digits: Tensor) -> None:
    values, spread = collapse(small_digits)
    assert 0.15 * math.log(64) < values["teacher_entropy"] < 0.85 * math.log(64), values
    assert values["prototypes_used"] > 8 and values["divergence"] > 0.1 and spread > 1, (values, spread)


def test_without_centring_one_prototype_wins(small_digits: Tensor) -> None:
    values, spread = collapse(small_digits, center_momentum=1.0)
    assert values["teacher_entropy"] < 0.1 and values["prototypes_used"] < 1.2, values
    assert values["divergence"] < 0.1 and spread < 0.2, (values, spread)


def test_without_sharpening_all_prototypes_are_alike(small_digits: Tensor) -> None:
    dull = {"teacher_temperature_start": 1.0, "teacher_temperature_end": 1.0}
    values, spread = collapse(small_digits, **dull)
    assert values["teacher_entropy"] > 0.99 * math.log(64) and values["prototypes_used"] > 62, values
    assert values["divergence"] < 0.05 and spread < 0.2, (values, spread)


def test_one_batch_is_overfitted() -> None:
    """Of views that all are the image itself, the student learns the teacher's answer."""
    signal = dino(momentum=0.9, local_crops=0, frozen=0.0)
    signal.view = lambda images, *_: images  # type: ignore[method-assign]
    lines = train(signal, images_of(count=16), 60)
    assert lines[-1]["divergence"] < 0.3 * lines[0]["divergence"]
    assert signal.eval().objective(images_of(count=16))["accuracy"] > 0.8


def test_the_objective_stands_beside_its_trivial_answers(small_digits: Tensor) -> None:
    signal = dino((1, 8, 8)).eval()
    values = {name: value.item() for name, value in signal.objective(small_digits).items()}
    assert values["entropy_uniform"] == pytest.approx(math.log(32)) and values["prototypes"] == 32
    assert 0 <= values["teacher_entropy"] <= values["entropy_uniform"]
    assert 1 <= values["prototypes_used"] <= 32 and values["chance"] == 1 / 64
    nn.init.zeros_(signal.head.mlp[-1].weight)
    nn.init.zeros_(signal.teacher_head.mlp[-1].weight)
    values = {name: value.item() for name, value in signal.objective(small_digits).items()}
    # Nothing is told apart: chance, and no difference between an image and another.
    assert values["accuracy"] == pytest.approx(1 / 64) and values["teacher_entropy"] == pytest.approx(
        values["entropy_uniform"], abs=1e-4
    )
    assert values["divergence"] == pytest.approx(values["divergence_of_another"], abs=1e-4)


@pytest.mark.slow
def test_mid_training_the_teacher_keeps_up_with_its_student(digits: tuple[np.ndarray, np.ndarray]) -> None:
    """In the paper's long trainings the teacher leads; in these 60 steps neither does, over four seeds."""
    images, labels = torch.from_numpy(digits[0]), digits[1]

    def accuracy(encoder: nn.Module) -> float:
        with torch.no_grad():
            features = F.normalize(encoder(images.float() / 255), dim=1).numpy()
        predicted = weighted_knn(features[:1200], labels[:1200], features[1200:], 10, 0.07)
        return float((predicted == labels[1200:]).mean())

    teachers, students = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        signal = DINO(Encoder("small_resnet", 16, 2, (1, 8, 8), 0.3, 0.3), 128, 32, 16, momentum=0.9, flip=0)
        optimizer = build_optimizer(signal, Training(**DINO.training_defaults))
        for step in range(60):
            torch.manual_seed(1000 * seed + step)
            signal.progress = step / 120
            optimizer.zero_grad()
            loss, _ = signal(images[torch.randperm(1200)[:128]], torch.arange(128))
            loss.backward()
            optimizer.step()
            signal.after_step()
        signal.eval()
        teachers.append(accuracy(signal.encoder))
        students.append(accuracy(signal.student))
    assert np.mean(teachers) > np.mean(students) - 0.03, (teachers, students)


# Two processes

WORKER = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from test_signal_dino import fixed_views
from unlabeled.distributed import process_group, rank

with process_group():
    torch.set_num_threads(1)
    signal, images = fixed_views()
    model = DistributedDataParallel(signal)
    for _ in range(2):
        signal.zero_grad()
        loss, _ = model(images.chunk(2)[rank()], torch.arange(4))
        loss.backward()
    torch.save({"loss": loss.detach(), "center": signal.center, "gradient": signal.head.prototypes.grad,
                "first": signal.student.net.patches.weight.grad}, f"{sys.argv[1]}/{rank()}.pt")
"""


def fixed_views() -> tuple[DINO, Tensor]:
    """A signal without batch norm whose views are no draw: what is left is the loss and the center."""
    signal = dino((1, 8, 8), **VIT, batch_norm=False, local_crops=1, frozen=0.0).train()

    def view(images: Tensor, area: Any, size: int, *_: Any) -> Tensor:
        return F.interpolate(images, (size, size)).flip(3) if area[1] < 1 else images

    signal.view = view  # type: ignore[method-assign, assignment]
    return signal, images_of((1, 8, 8), 8)


def test_two_processes_give_the_loss_and_the_center_of_one_on_the_joined_batch(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(str(tmp_path / "worker.py"), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    signal, images = fixed_views()
    for _ in range(2):
        signal.zero_grad()
        loss, _ = signal(images, torch.arange(8))
        loss.backward()
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss.detach(), atol=1e-5, rtol=0)
    first = signal.student.net.patches.weight.grad
    for result in ranks:
        torch.testing.assert_close(result["center"], signal.center, atol=1e-6, rtol=0)
        torch.testing.assert_close(result["gradient"], signal.head.prototypes.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(result["first"], first, atol=1e-5, rtol=1e-4)
