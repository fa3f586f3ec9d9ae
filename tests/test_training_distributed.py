"""Two processes train as one."""

import json
from pathlib import Path
from typing import Any

import joint_training
import pytest
import torch
from joint_training import curve
from signal_training import torchrun
from test_training import BRIEF, bits, make_table, run
from torch import Tensor
from torch.nn import functional as F

from unlabeled.distributed import broadcast, gather, processes, rank
from unlabeled.errors import InputError
from unlabeled.signals.contrast.simclr import nt_xent

pytestmark = pytest.mark.slow

LOSS = """
import torch, sys
from pathlib import Path
from joint_training import curve
from unlabeled.signals.contrast.simclr import nt_xent
from unlabeled.distributed import broadcast, gather, process_group, processes, rank

with process_group():
    data = torch.load(sys.argv[1])
    mine = slice(rank() * 5, rank() * 5 + 5)
    weight = data["weight"].requires_grad_()
    z1, z2 = ((data[name][mine] @ weight).requires_grad_() for name in ("x1", "x2"))
    for z in (z1, z2):
        z.retain_grad()
    loss = nt_xent(z1, z2, 0.3)
    loss.backward()
    result = {
        "loss": loss.detach(), "z1": z1.grad, "z2": z2.grad, "weight": weight.grad, "gathered":
        gather(torch.tensor([rank()])), "processes": processes(), "told": broadcast({"from": rank()}),
    }
    result["metrics"], result["weights"] = curve(Path(sys.argv[3]), Path(sys.argv[2]) / "checkpoints")
    torch.save(result, f"{sys.argv[2]}/{rank()}.pt")
"""


def test_one_process_is_the_simplest_case() -> None:
    values = torch.randn(3, 2)
    assert (processes(), rank(), broadcast(5)) == (1, 0, 5) and gather(values) is values


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_table(tmp_path_factory.mktemp("images") / "table")


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x1": (10, 6), "x2": (10, 6), "weight": (6, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory, table: Path, given: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(given, folder / "data.pt")
    (folder / "worker.py").write_text(LOSS)
    torchrun(str(folder / "worker.py"), str(folder / "data.pt"), str(folder), str(table))
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


def test_the_loss_of_two_ranks_is_that_of_the_joined_batch(
    given: dict[str, Tensor], ranks: list[dict[str, Any]]
) -> None:
    weight = given["weight"].clone().requires_grad_()
    z1, z2 = given["x1"] @ weight, given["x2"] @ weight
    for z in (z1, z2):
        z.retain_grad()
    loss = nt_xent(z1, z2, 0.3)
    loss.backward()
    assert z1.grad is not None and z2.grad is not None and weight.grad is not None
    # The mean over ranks, as DistributedDataParallel takes it.
    assert abs(sum(r["loss"] for r in ranks) / 2 - loss) < 1e-5
    assert torch.allclose(torch.cat([r["z1"] for r in ranks]) / 2, z1.grad, atol=1e-5)
    assert torch.allclose(torch.cat([r["z2"] for r in ranks]) / 2, z2.grad, atol=1e-5)
    assert torch.allclose((ranks[0]["weight"] + ranks[1]["weight"]) / 2, weight.grad, atol=1e-5)
    for result in ranks:
        assert (
            result["gathered"].tolist() == [0, 1]
            and result["processes"] == 2
            and result["told"] == {"from": 0}
        )
    # Without the negatives of the other rank it would be another loss.
    alone = F.mse_loss(nt_xent(z1[:5], z2[:5], 0.3), loss)
    assert alone > 1e-3


def test_two_processes_have_the_loss_curve_of_one(
    table: Path, tmp_path: Path, ranks: list[dict[str, Any]]
) -> None:
    """Where nothing is random and no net looks at its batch, two processes differ from one by rounding alone."""

    def losses(metrics: list[dict[str, float]]) -> Tensor:
        return torch.tensor([line["loss"] for line in metrics])

    metrics, weights = curve(table, tmp_path / "one")
    assert len(metrics) == 15 and losses(metrics)[-1] < 0.7 * losses(metrics)[0]
    for found in ranks:
        for line, expected in zip(found["metrics"], metrics, strict=True):
            assert line == pytest.approx(expected, rel=1e-5)
        assert torch.allclose(found["weights"], weights, atol=1e-5)
    # On half of each batch one process goes another way.
    halved, _ = curve(table, tmp_path / "half", batch_size=16)
    assert (losses(halved) / losses(metrics) - 1).abs().max() > 1e-3


def test_a_killed_worker_ends_the_training_and_the_same_command_resumes_it(
    table: Path, tmp_path: Path
) -> None:
    def options(out: str) -> list[str]:
        return [
            str(table), str(tmp_path / out), "--checkpoints", str(tmp_path / f"{out}-checkpoints"),
            "--method", json.dumps({"name": "simclr"}), "--encoder", '{"width": 16}',
            "--training", json.dumps({**BRIEF, "batch_size": 32}),
        ]  # fmt: skip

    def launch(out: str) -> dict[str, Any]:
        return json.loads(torchrun("-m", "unlabeled.training.pretrain", *options(out)))

    result = launch("whole")
    assert result["images"] == 12 * 32 and result["resumed_at"] == 0
    assert json.loads((tmp_path / "whole/config.json").read_text())["processes"] == 2

    # The second process is killed at step 7, checkpoints are written every five.
    said = torchrun(joint_training.__file__, *options("killed"), fails=True)
    assert "SIGKILL" in said
    left = [path.name for path in tmp_path.rglob("*killed*")]
    assert left == ["killed-checkpoints"], "no model, and none half-written"
    (checkpoint,) = (tmp_path / "killed-checkpoints").rglob("*.pt")
    assert checkpoint.name.startswith("step-00000005-")

    assert launch("killed")["resumed_at"] == 5
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")

    # One process on the joined batch: the same images and schedule, other views and batch statistics.
    run(table, tmp_path / "one", batch_size=32)
    two, one = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "one")
    )
    assert [line["learning_rate"] for line in two] == [line["learning_rate"] for line in one]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.1)
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=0.2)


def test_several_nodes_are_refused_where_one_process_trains(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.nodes is 2, here 1 process trains"):
        run(table, tmp_path / "model", nodes=2)
    assert not (tmp_path / "model").exists()
