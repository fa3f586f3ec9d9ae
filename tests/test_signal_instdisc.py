"""Instance discrimination, and the memory of images that it shares with PIRL."""

import copy
import math
from typing import Any

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor
from torch.nn import functional as F

from unlabeled.measures.matching import match_accuracy, nearest
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.memory import MemoryBank, memory_logits, memory_nce
from unlabeled.signals.contrast.instdisc import InstDisc

PLAIN: dict[str, Any] = {"crop": 1.0, "jitter": 0.0}
NONE = torch.zeros(1, 1, dtype=torch.bool)


def unit(count: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator), dim=1)


def random_images(count: int, side: int = 16, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, side, side), generator=generator).byte()


def instdisc(count: int, **settings: Any) -> InstDisc:
    torch.manual_seed(0)
    signal = InstDisc(Encoder("small_resnet", 16, 2, (1, 16, 16), 0.5, 0.3), **settings)
    signal.prepare(random_images(2), count)
    return signal


def plain_view(signal: InstDisc) -> InstDisc:
    """Let a signal see the images as they are."""
    signal.view = lambda images: images.float() / 255  # type: ignore[method-assign]
    return signal


# The loss


@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_hand_value_of_orthonormal_memories(temperature: float) -> None:
    """One right answer of cosine 1 among two wrong ones of cosine 0."""
    z, others = torch.eye(3), torch.arange(3)
    same = torch.eye(3, dtype=torch.bool)
    loss, accuracy = memory_nce(z, z, z[others], same, temperature)
    assert loss.item() == pytest.approx(math.log1p(2 * math.exp(-1 / temperature)), abs=1e-6)
    assert accuracy == 1


def test_with_all_images_it_is_the_softmax_over_the_memory() -> None:
    memory, z, indices = unit(20, 6), 3 * unit(5, 6, 1), torch.tensor([3, 0, 19, 7, 4])
    same = indices.unsqueeze(1) == torch.arange(20)
    loss, _ = memory_nce(z, memory[indices], memory, same, 0.07)
    expected = F.cross_entropy(F.normalize(z, dim=1) @ memory.T / 0.07, indices)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_lightlys_loss_with_a_memory_bank(temperature: float) -> None:
    z, own, others = unit(8, 16), unit(8, 16, 1), unit(30, 16, 2)
    oracle = NTXentLoss(temperature, memory_bank_size=(30, 16))
    oracle.memory_bank.bank = others
    loss, _ = memory_nce(z, own, others, NONE.expand(8, 30), temperature)
    assert loss.item() == pytest.approx(oracle(z, own).item(), rel=1e-5)


def test_a_collapse_leaves_chance() -> None:
    z = unit(1, 8)
    loss, _ = memory_nce(z.expand(5, 8), z.expand(5, 8), z.expand(40, 8), NONE.expand(5, 40))
    assert loss.item() == pytest.approx(math.log(41), abs=1e-4)


def test_the_own_image_is_no_negative() -> None:
    """Were it one, perfect embeddings could not pass ln 2."""
    z = torch.eye(4)
    masked, _ = memory_nce(z, z, z, torch.eye(4, dtype=torch.bool), 0.07)
    unmasked, _ = memory_nce(z, z, z, torch.zeros(4, 4, dtype=torch.bool), 0.07)
    assert masked < 1e-4 and unmasked > 0.999 * math.log(2)
    logits = memory_logits(z, z, z, torch.eye(4, dtype=torch.bool), 0.07)
    assert logits.shape == (4, 5) and logits[:, 1:].diag().eq(-math.inf).all()


def test_invariant_to_length_and_order() -> None:
    z, own, others = unit(6, 5), unit(6, 5, 1), unit(9, 5, 2)
    loss, _ = memory_nce(z, own, others, NONE.expand(6, 9), 0.2)
    order, among = torch.randperm(6), torch.randperm(9)
    for same, _ in (
        memory_nce(7 * z, own, others, NONE.expand(6, 9), 0.2),
        memory_nce(z[order], own[order], others[among], NONE.expand(6, 9), 0.2),
    ):
        assert same.item() == pytest.approx(loss.item(), abs=1e-5)
    wrong, _ = memory_nce(z, own[order.roll(1)], others, NONE.expand(6, 9), 0.2)
    assert abs(wrong - loss) > 1e-3


def test_the_gradient_moves_the_embedding_across_and_the_memory_not_at_all() -> None:
    memory = MemoryBank(9, 5, 0.5)
    memory.vectors.data = unit(9, 5)
    z = unit(4, 5, 1).requires_grad_()
    indices = torch.arange(4)
    own = memory.recall(indices, lambda: z)
    loss, _ = memory_nce(z, own, memory.vectors, indices.unsqueeze(1) == torch.arange(9), 0.2)
    loss.backward()
    assert z.grad is not None and z.grad.norm() > 0.01 and memory.vectors.grad is None
    assert torch.allclose((z.grad * z).sum(1), torch.zeros(4), atol=1e-6)


# The memory


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_memory_is_the_moving_average_on_the_sphere(momentum: float) -> None:
    memory = MemoryBank(6, 4, momentum)
    first, second = 5 * unit(2, 4), 3 * unit(2, 4, 1)
    memory.remember(torch.tensor([4, 1]), first)
    assert not memory.vectors.any()  # not before the step is done
    memory.update()
    assert torch.allclose(memory.vectors[[4, 1]], first / 5, atol=1e-6)  # whatever the momentum
    memory.remember(torch.tensor([4, 1]), second)
    memory.update()
    expected = F.normalize(momentum * first / 5 + (1 - momentum) * second / 3, dim=1)
    assert torch.allclose(memory.vectors[[4, 1]], expected, atol=1e-6)
    assert not memory.vectors[[0, 2, 3, 5]].any()
    before = memory.vectors.clone()
    memory.update()  # once only
    assert torch.equal(memory.vectors, before)


def test_an_image_never_seen_is_looked_at() -> None:
    memory, look = MemoryBank(5, 4, 0.5), (2 * unit(3, 4)).requires_grad_()
    memory.remember(torch.tensor([1]), unit(1, 4, 1))
    memory.update()
    own = memory.recall(torch.tensor([0, 1, 2]), lambda: look)
    assert torch.allclose(own[[0, 2]], look[[0, 2]] / 2, atol=1e-6) and not own.requires_grad
    assert torch.equal(own[1], memory.vectors[1])
    # With nothing new, the second look costs nothing.
    memory.recall(torch.tensor([1, 1]), lambda: pytest.fail("looked"))


def test_draws_cover_the_images_and_repeat_with_the_seed() -> None:
    memory = MemoryBank(50, 2, 0.5)
    assert memory.draw(50).tolist() == memory.draw(4096).tolist() == list(range(50))
    torch.manual_seed(0)
    drawn = memory.draw(20)
    torch.manual_seed(0)
    assert len(drawn) == 20 and drawn.max() < 50 and torch.equal(memory.draw(20), drawn)
    assert not torch.equal(memory.draw(20), drawn)
    torch.manual_seed(0)
    assert len({int(number) for _ in range(100) for number in memory.draw(20)}) == 50


def test_negatives_are_the_batch_and_what_was_seen_before_each_once() -> None:
    memory, indices, own = MemoryBank(20, 6, 0.0), torch.tensor([3, 0, 19]), unit(3, 6, 1)
    others, same = memory.negatives(indices, own, 50)
    # Before anything was seen only the others of the batch are left.
    assert torch.equal(others[(~same).any(0)], own)
    assert torch.equal(~same[:, -3:], ~torch.eye(3, dtype=torch.bool)) and same[:, :-3].all()
    memory.vectors.data = unit(20, 6)
    own = memory.vectors[indices]
    loss, _ = memory_nce(own, own, *memory.negatives(indices, own, 50))
    assert loss.item() == pytest.approx(F.cross_entropy(own @ memory.vectors.T / 0.07, indices).item(), rel=1e-4)


def test_draws_estimate_the_whole_softmax() -> None:
    """Their logits, shifted by how many images each of them stands for, give the loss over all images."""
    memory, z = unit(2000, 16), unit(1, 16, 1)
    whole = memory_nce(z, z, memory, NONE.expand(1, 2000), 0.2)[0]
    losses = []
    for seed in range(20):
        torch.manual_seed(seed)
        others = memory[torch.randint(2000, (500,))]
        logits = memory_logits(z, z, others, NONE.expand(1, 500), 0.2)
        logits[:, 1:] += math.log(2000 / 500)
        losses.append(F.cross_entropy(logits, torch.zeros(1, dtype=torch.int64)))
    assert torch.stack(losses).mean().item() == pytest.approx(whole.item(), rel=0.05)


# The signal


def step(signal: InstDisc, images: Tensor, indices: Tensor, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss, _ = signal(images, indices)
    loss.backward()
    optimizer.step()
    signal.after_step()
    return loss.item()


def test_it_overfits_one_batch_and_wrong_numbers_bring_it_to_chance() -> None:
    images, indices = (
        F.interpolate(random_images(32, 4).float(), 16, mode="bilinear").byte(),
        torch.arange(32),
    )
    signal = instdisc(32, crop=0.8, jitter=0.2)
    optimizer = torch.optim.AdamW(signal.parameters(), 3e-3)
    torch.manual_seed(0)
    losses = [step(signal, images, indices, optimizer) for _ in range(60)]
    # From the second on, all images are in the memory.
    assert sum(losses[-5:]) / 5 < 0.4 * losses[1]
    loss, values = signal(images, indices)
    assert values["instance_accuracy"] > 0.8
    shuffled, wrong = signal(images, indices.roll(5))
    assert wrong["instance_accuracy"] < 0.1 and shuffled > loss + 1


def test_the_first_loss_is_analytic() -> None:
    """One image in every place: its view finds it no better than the seven others; nobody else was seen."""
    signal = plain_view(instdisc(100, temperature=1.0)).eval()
    loss, _ = signal(random_images(1).expand(8, -1, -1, -1), torch.arange(8))
    assert loss.item() == pytest.approx(math.log(8), abs=1e-5)


def test_the_memory_changes_after_the_step_alone_and_is_no_trained_weight() -> None:
    signal = instdisc(32)
    signal(random_images(8), torch.arange(8))
    assert not signal.memory.vectors.any()
    signal.after_step()
    vectors = signal.memory.vectors
    assert torch.allclose(vectors[:8].norm(dim=1), torch.ones(8)) and not vectors[8:].any()
    assert not vectors.requires_grad and "memory.vectors" in signal.state_dict()
    before = copy.deepcopy(vectors)
    signal.eval()
    signal.objective(random_images(8))
    signal.after_step()
    assert torch.equal(vectors, before)


def test_objective_is_whole_where_views_are_equal_and_chance_where_images_are() -> None:
    signal = plain_view(instdisc(32)).eval()
    result = signal.objective(random_images(16))
    assert result["accuracy"] == 1 and result["chance"] == pytest.approx(1 / 16)
    signal = instdisc(32).eval()
    same = signal.objective(random_images(1).expand(200, -1, -1, -1))
    assert same["accuracy"] < 0.05


def test_picture_shows_the_nearest_images() -> None:
    images = random_images(12)
    images[9] = images[2]
    picture = instdisc(32).eval().picture(images)
    assert picture.shape == (6, 8, 1, 16, 16)
    assert torch.equal(picture[3, 2], images[2].float() / 255)


# Matching


def test_nearest_leaves_out_the_image_itself() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])
    assert nearest(features, 2).tolist() == [[1, 2], [0, 2], [1, 0]]
    assert nearest(features[:2], 3).tolist() == [[1, 0, 0], [0, 1, 1]]


def test_match_accuracy_counts_rows() -> None:
    keys = torch.eye(4)
    assert match_accuracy(5 * keys, keys) == 1
    assert match_accuracy(keys[[0, 1, 3, 2]], keys) == 0.5
