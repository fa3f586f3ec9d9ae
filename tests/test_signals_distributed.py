"""Two processes train a learning signal as one does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from signal_training import torchrun
from test_training import make_table
from torch import Tensor

from unlabeled.distributed import processes, rank
from unlabeled.nets.encoder import Encoder
from unlabeled.signals import all_signals, find_signal
from unlabeled.signals.bottleneck.autoencoder import Autoencoder
from unlabeled.signals.signal import Signal
from unlabeled.training.loop import parallel

pytestmark = pytest.mark.slow

COUPLED = ("simclr", "instdisc", "pirl")
BATCH, IMAGES = 12, 200


def quarters(images: Tensor) -> Tensor:
    """Return the four quarters of float images (B, C, H, H), in their order: (B, 4, C, H/2, H/2)."""
    half = images.shape[-1] // 2
    return images.unfold(2, half, half).unfold(3, half, half).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def plain_signal(method: str) -> Signal:
    """Return a signal whose loss no view and no batch statistics change, in this process as in others."""
    torch.manual_seed(0)
    settings = {"negatives": 64} if method != "simclr" else {}
    signal = find_signal(method)(Encoder("small_resnet", 16, 2, (1, 16, 16), 0.5, 0.3), **settings)
    signal.prepare(torch.zeros(2, 1, 16, 16, dtype=torch.uint8), IMAGES)
    # SimCLR's two views come as one batch: the second half is made to differ.
    powers = {"simclr": (1.0, 1.5)}.get(method, (1.0,))

    def view(images: Tensor) -> Tensor:
        parts = (images.float() / 255).chunk(len(powers))
        return torch.cat([part**power for part, power in zip(parts, powers, strict=True)])

    signal.view = view  # type: ignore[assignment]
    if method == "pirl":
        signal.jigsaw = lambda images: quarters(view(images))  # type: ignore[assignment]
    return signal.eval()


def train(method: str) -> dict[str, Any]:
    """Take three steps over this process's share of each batch; return losses, gradients and final state."""
    signal = plain_signal(method)
    model = parallel(signal, torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in signal.parameters() if p.requires_grad], 0.1)
    generator = torch.Generator().manual_seed(1)
    losses, gradients = [], []
    numbers = torch.arange(0)
    for step in range(3):
        images = torch.randint(0, 256, (BATCH, 1, 16, 16), generator=generator).byte()
        if step < 2:  # the third batch has the numbers of the second: it is remembered
            numbers = torch.randperm(IMAGES, generator=generator)[:BATCH]
        share = BATCH // processes()
        mine = slice(rank() * share, rank() * share + share)
        torch.manual_seed(10 * step + rank())  # rank 0 draws as the one process does
        optimizer.zero_grad()
        loss, _ = model(images[mine], numbers[mine])
        loss.backward()
        losses.append(loss.detach())
        gradients.append(
            torch.cat([p.grad.flatten() for p in signal.encoder.parameters() if p.grad is not None])
        )
        optimizer.step()
        signal.after_step()
    memory = signal.memory.vectors.detach().clone() if method != "simclr" else torch.zeros(1)
    return {"losses": torch.stack(losses), "gradients": torch.stack(gradients), "memory": memory}


EQUAL = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import test_signals_distributed as tests
from unlabeled.distributed import process_group, rank
with process_group():
    torch.save({method: tests.train(method) for method in tests.COUPLED}, f"{sys.argv[2]}/{rank()}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "worker.py").write_text(EQUAL)
    torchrun(str(folder / "worker.py"), str(Path(__file__).parent), str(folder))
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


@pytest.mark.parametrize("method", COUPLED)
def test_two_halves_of_a_batch_train_as_the_whole(method: str, ranks: list[dict[str, Any]]) -> None:
    one, (first, second) = train(method), (result[method] for result in ranks)
    assert torch.allclose((first["losses"] + second["losses"]) / 2, one["losses"], atol=1e-5)
    for result in (first, second):  # DistributedDataParallel has averaged
        assert torch.allclose(result["gradients"], one["gradients"], atol=1e-5)
        assert torch.allclose(result["memory"], one["memory"], atol=1e-5)
    assert torch.equal(first["memory"], second["memory"])
    # The losses do differ by half: it is their mean that is one process's.
    assert (first["losses"] - second["losses"]).abs().max() > 1e-3
    assert one["gradients"].abs().max() > 1e-3


SPARSE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import test_signals_distributed as tests
from unlabeled.distributed import process_group, rank
with process_group():
    torch.save(tests.sparse_step(), f"{sys.argv[2]}/{rank()}.pt")
"""


def sparse_step() -> dict[str, Tensor]:
    """Return the sparse autoencoder's loss and gradient over this process's share of a batch of two unlike halves."""
    torch.manual_seed(0)
    encoder = Encoder("small_resnet", 16, 2, (1, 16, 16), 0.5, 0.3)
    signal = Autoencoder(encoder, sparsity=1.0, activity=0.05).eval()
    images = torch.randint(0, 256, (BATCH, 1, 16, 16), generator=torch.Generator().manual_seed(1))
    images[BATCH // 2 :] //= 4
    model, mine = parallel(signal, torch.device("cpu")), images.byte().chunk(processes())[rank()]
    loss, _ = model(mine, torch.arange(len(mine)))
    loss.backward()
    return {"loss": loss.detach(), "gradient": signal.code.weight.grad}


def test_sparsity_is_that_of_the_joined_batch(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(SPARSE)
    torchrun(str(tmp_path / "worker.py"), str(Path(__file__).parent), str(tmp_path))
    one, (first, second) = sparse_step(), (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, one["loss"])
    for result in (first, second):  # DistributedDataParallel has averaged
        torch.testing.assert_close(result["gradient"], one["gradient"], rtol=1e-4, atol=1e-6)


LOOP = """
import json, sys, traceback
from pathlib import Path
from unlabeled.parameters import Encoder, Training
from unlabeled.signals import all_signals
from unlabeled.distributed import process_group, rank
from unlabeled.training.pretrain import pretrain

table, out, failures = Path(sys.argv[1]), Path(sys.argv[2]), {}
training = Training(steps=3, batch_size=16, threads=1, compile="no")
with process_group():
    for method in all_signals():
        try:
            pretrain(table, out / method, {"name": method}, Encoder(width=16), training, 0, out / "checkpoints")
        except Exception:
            failures[method] = traceback.format_exc()
    (out / f"failures-{rank()}.json").write_text(json.dumps(failures))
"""


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """Train every method in one pair of processes; return where the models lie and each process's failures."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "worker.py").write_text(LOOP)
    torchrun(str(folder / "worker.py"), str(make_table(folder / "table", shape=(3, 8, 8))), str(folder))
    return folder, [json.loads((folder / f"failures-{number}.json").read_text()) for number in range(2)]


@pytest.mark.parametrize("method", list(all_signals()))
def test_every_method_trains_in_two_processes(
    method: str, failures: tuple[Path, list[dict[str, str]]]
) -> None:
    folder, by_rank = failures
    for failed in by_rank:
        assert method not in failed, failed[method][-3000:]
    assert json.loads((folder / method / "config.json").read_text())["processes"] == 2
    last = json.loads((folder / method / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3
