import copy
import math
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.errors import InputError
from unlabeled.nets.decoder import Decoder
from unlabeled.nets.encoder import Encoder
from unlabeled.signals import all_signals, find_signal, method_settings
from unlabeled.signals.bottleneck.autoencoder import Autoencoder, sparsity_divergence
from unlabeled.signals.contrast.simclr import SimCLR, nt_xent
from unlabeled.signals.signal import Signal
from unlabeled.training.loop import compile_nets
from unlabeled.training.precision import bfloat16_nets, nets_of

METHODS = tuple(all_signals())
SHAPES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 33, 33), (1, 96, 96)]


def small_encoder(shape: tuple[int, int, int] = (1, 16, 16), name: str = "small_resnet") -> Encoder:
    return Encoder(name, 16, 2, shape, 0.3, 0.2)


def images_of(shape: tuple[int, int, int], count: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(0)).byte()


def run(signal: Signal, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return signal(images, torch.arange(len(images)))


def embeddings(count: int = 6, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator), torch.randn(count, dim, generator=generator)


# Every method


def signal_for(
    method: str, shape: tuple[int, int, int], net: str = "small_resnet", **settings: Any
) -> Signal:
    """Return a method as `pretrain` makes it, prepared on a few images: of `shape`, in colour if it must be."""
    kind = find_signal(method)
    if kind.needs_color:
        shape = (3, *shape[1:])
    mine = {"name": net, "width": 16, "pool": 2} | kind.encoder_defaults
    torch.manual_seed(0)
    signal = kind(Encoder(**mine, image_shape=shape, mean=0.3, std=0.2), **settings)
    signal.prepare(images_of(shape, 32), 32)
    return signal


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_method_trains_on_gray_and_colour_of_any_size(method: str, shape: tuple[int, int, int]) -> None:
    signal = signal_for(method, shape)
    shape = signal.encoder.image_shape
    loss, values = run(signal, images_of(shape))
    assert loss.shape == () and loss.isfinite()
    assert all(value.shape == () and value.isfinite() for value in values.values())
    loss.backward()
    for name, parameter in signal.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    signal.after_step()
    signal.eval()
    objective = signal.objective(images_of(shape))
    assert all(value.shape == () and value.isfinite() for value in objective.values())
    picture = signal.picture(images_of(shape, 10))
    assert picture is not None and picture.shape[2:] == shape
    assert len(picture) == len(signal.picture_rows) <= 8 and picture.shape[1] <= 8
    assert picture.min() >= 0 and picture.max() <= 1


@pytest.mark.parametrize("net", ["small_resnet", "tiny_vit"])
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_and_compiled_code_reach_every_layer(
    method: str, net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer below a net is called but by a net that is compiled, and each computes in bfloat16."""
    signal, inside = signal_for(method, (1, 16, 16), net), []
    layers = [
        layer
        for net in nets_of(signal)
        for layer in net.modules()
        if layer is not net and isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    ]

    def record_compiled(net: nn.Module, **_: Any) -> None:
        net.register_forward_pre_hook(lambda *_: inside.append(net))
        net.register_forward_hook(lambda *_: inside.pop() and None)

    def check(layer: nn.Module, _: Any, output: Tensor) -> None:
        assert inside and output.dtype == torch.bfloat16, layer

    monkeypatch.setattr(nn.Module, "compile", record_compiled)
    compile_nets(signal)
    for layer in layers:
        layer.register_forward_hook(check)
    with bfloat16_nets(signal, torch.device("cpu")):
        run(signal, images_of(signal.encoder.image_shape))


@pytest.mark.parametrize("net", ["small_resnet", "resnet18", "tiny_vit", "pixel_cnn"])
def test_features_and_maps_of_every_encoder_come_from_compiled_code(
    net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        return lambda *arguments: entered.append(net) or compiled(*arguments)

    signal = Signal(small_encoder(name=net)).eval()
    compiled = copy.deepcopy(signal)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    compile_nets(compiled)
    # DINO's small crops are smaller than its large ones.
    for images in (torch.rand(2, 1, 16, 16), torch.rand(2, 1, 10, 10)):
        for way in ("forward", "feature_map"):
            entered.clear()
            found = getattr(compiled.encoder, way)(images)
            assert entered == [net], "one graph, entered once"
            torch.testing.assert_close(found, getattr(signal.encoder, way)(images))


@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_batch_trains(method: str) -> None:
    signal = signal_for(method, (1, 16, 16))
    loss, _ = run(signal, images_of(signal.encoder.image_shape, 2))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize(
    "method", [method for method in METHODS if "name" not in find_signal(method).encoder_defaults]
)
def test_every_method_without_a_net_of_its_own_trains_a_resnet18(method: str) -> None:
    signal = signal_for(method, (3, 32, 32), "resnet18")
    loss, _ = run(signal, images_of((3, 32, 32), 4))
    loss.backward()
    assert loss.isfinite() and signal.encoder.feature_dim == 2048


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_loss(method: str) -> None:
    signal = signal_for(method, (1, 16, 16))

    def loss_of(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run(copy.deepcopy(signal), images_of(signal.encoder.image_shape))[0]

    assert torch.equal(loss_of(0), loss_of(0))


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16_the_nets_round_and_nothing_else(method: str) -> None:
    signal, images = signal_for(method, (3, 16, 16)), images_of((3, 16, 16))

    def loss_of(signal: Signal) -> Tensor:
        torch.manual_seed(0)
        return run(signal, images)[0]

    exact, rounded = copy.deepcopy(signal), copy.deepcopy(signal)
    with bfloat16_nets(rounded, torch.device("cpu")):
        features = rounded.eval().encoder(images / 255)
        loss = loss_of(rounded.train())
        loss.backward()
    expected = exact.eval().encoder(images / 255)
    assert features.dtype == loss.dtype == torch.float32
    assert (features - expected).norm() < 0.05 * expected.norm() and not torch.equal(features, expected)
    assert loss.item() == pytest.approx(loss_of(exact.train()).item(), rel=0.05, abs=0.02)
    gradients = [parameter.grad for parameter in rounded.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    after = copy.deepcopy(signal)
    with bfloat16_nets(after, torch.device("cpu")):
        pass
    assert torch.equal(loss_of(after), loss_of(copy.deepcopy(signal))), "the nets are as they were"


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_changes_no_weight_and_no_statistics(method: str) -> None:
    signal = signal_for(method, (1, 16, 16)).eval()
    before = {name: tensor.clone() for name, tensor in signal.state_dict().items()}
    images = images_of(signal.encoder.image_shape, 3)
    signal.encoder(images.float() / 255)
    signal.objective(images)
    signal.picture(images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in signal.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_goes_on_with_the_same_bits(method: str) -> None:
    """Weights and buffers of a run that goes through its state dict are those of one that does not."""

    def train(signal: Signal, first: int, end: int, optimizer: torch.optim.Optimizer) -> None:
        for step in range(first, end):
            torch.manual_seed(step)
            optimizer.zero_grad()
            run(signal, images_of(signal.encoder.image_shape))[0].backward()
            optimizer.step()
            signal.after_step()

    def fresh() -> tuple[Signal, torch.optim.Optimizer]:
        signal = signal_for(method, (1, 16, 16))
        return signal, torch.optim.AdamW(signal.parameters(), 1e-3)

    whole, optimizer = fresh()
    train(whole, 0, 4, optimizer)
    killed, optimizer = fresh()
    train(killed, 0, 2, optimizer)
    state = copy.deepcopy((killed.state_dict(), optimizer.state_dict()))
    resumed, optimizer = fresh()
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(resumed, 2, 4, optimizer)
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())


@pytest.mark.parametrize(("method", "share"), [("autoencoder", 0.3), ("simclr", 0.4)])
def test_every_method_overfits_one_batch(method: str, share: float) -> None:
    torch.manual_seed(0)
    encoder = Encoder("small_resnet", 16, 2, (1, 12, 12), 0.5, 0.3)
    settings = {"crop": 1.0, "rotation": 0.0, "blur": 0.0, "flip": 0.0} if method == "simclr" else {}
    signal = find_signal(method)(encoder, **settings)
    optimizer = torch.optim.AdamW(signal.parameters(), 3e-3)
    images, losses = images_of((1, 12, 12), 32), []
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = run(signal, images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < share * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_what_it_is(method: str) -> None:
    signal = find_signal(method)
    assert signal.family and signal.equation and signal.paper
    assert all_signals()[method] is signal and set(METHODS) <= set(all_signals())


# Settings


def test_settings_are_complete_with_defaults() -> None:
    settings = method_settings("simclr", {"temperature": 0.5, "training": {"steps": 7.0}})
    assert settings["temperature"] == 0.5 and settings["crop"] == 0.4
    assert settings["training"] == {"steps": 7} and isinstance(settings["training"]["steps"], int)
    assert method_settings("simclr", settings) == settings
    assert settings.pop("encoder") == {} and settings.pop("training")
    find_signal("simclr")(small_encoder(), **settings)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("simclr", {"temprature": 1}, ["pretrain.simclr.temprature", "'temperature'"]),
        ("simclr", {"temperature": -1}, ["pretrain.simclr.temperature", "must be above 0"]),
        ("simclr", {"temperature": "warm"}, ["pretrain.simclr.temperature", "number"]),
        ("simclr", {"flip": 1.5}, ["pretrain.simclr.flip", "must be at most 1"]),
        ("simclr", {"projection_dim": 2.5}, ["pretrain.simclr.projection_dim", "whole number"]),
        ("simclr", {"crop": float("nan")}, ["pretrain.simclr.crop"]),
        ("autoencoder", {"code_dim": -1}, ["pretrain.autoencoder.code_dim"]),
        (
            "autoencoder",
            {"training": {"batch_sise": 3}},
            ["pretrain.autoencoder.training.batch_sise", "'batch_size'"],
        ),
        ("autoencoder", {"training": {"steps": -3}}, ["pretrain.autoencoder.training.steps"]),
        ("autoencoder", {"training": 3}, ["pretrain.autoencoder.training"]),
        ("autoencoder", {"encoder": 3}, ["pretrain.autoencoder.encoder"]),
        ("simclrr", {}, ["unknown method 'simclrr'", "'simclr'"]),
        ("zzz", {}, ["unknown method 'zzz'", "autoencoder, ", "simclr"]),
        ("signal", {}, ["unknown method 'signal'"]),
    ],
)
def test_wrong_settings_are_refused_by_name(method: str, settings: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        method_settings(method, settings)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_method_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import unlabeled.signals as signals

    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "__init__.py").touch()
    (tmp_path / "family" / "mean_value.py").write_text(
        "from unlabeled.signals.signal import Signal\n"
        "class MeanValue(Signal):\n"
        "    family, equation, paper = 'test', 'f(x) = mean', 'none'\n"
        "    def __init__(self, encoder, power: int = 2) -> None:\n"
        "        super().__init__(encoder)\n"
    )
    monkeypatch.setattr(signals, "__path__", [*signals.__path__, str(tmp_path)])
    signals._modules.cache_clear()
    try:
        assert find_signal("mean_value").family == "test" and "mean_value" in all_signals()
        assert method_settings("mean_value", {"power": 3}) == {"power": 3, "training": {}, "encoder": {}}
    finally:
        monkeypatch.undo()
        signals._modules.cache_clear()


# NT-Xent


def test_nt_xent_hand_values() -> None:
    orthonormal = torch.eye(2)
    assert nt_xent(orthonormal, orthonormal, 0.5).item() == pytest.approx(0.239545, abs=1e-6)
    assert nt_xent(orthonormal, orthonormal, 1.0).item() == pytest.approx(0.551445, abs=1e-6)
    assert nt_xent(orthonormal, orthonormal, 0.3).item() == pytest.approx(
        math.log1p(2 * math.exp(-1 / 0.3)), abs=1e-6
    )
    crossed = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    assert nt_xent(orthonormal, crossed, 0.5).item() == pytest.approx(1.950183, abs=1e-6)


@pytest.mark.parametrize("count", [2, 4, 256])
def test_nt_xent_of_a_collapse_is_the_log_of_the_others(count: int) -> None:
    z = torch.ones(count, 3)
    assert nt_xent(z, z, 0.1).item() == pytest.approx(math.log(2 * count - 1), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.5, 1.0])
def test_nt_xent_equals_lightlys(temperature: float) -> None:
    z1, z2 = embeddings(32, 16)
    expected = NTXentLoss(temperature=temperature)(z1, z2)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(expected.item(), rel=1e-5)


def test_nt_xent_invariances() -> None:
    z1, z2 = embeddings()
    loss = nt_xent(z1, z2, 0.5)
    order = torch.randperm(6)
    scales = torch.rand(6, 1) + 0.1
    rotation, _ = torch.linalg.qr(torch.randn(5, 5))
    for same in (
        nt_xent(z2, z1, 0.5),
        nt_xent(z1[order], z2[order], 0.5),
        nt_xent(z1 * scales, z2 * 7, 0.5),
        nt_xent(z1 @ rotation, z2 @ rotation, 0.5),
    ):
        assert torch.allclose(same, loss, atol=1e-5)
    assert not torch.allclose(nt_xent(z1, z2[order.roll(1)], 0.5), loss, atol=1e-3)


def test_nt_xent_gradient_is_orthogonal_to_the_embedding() -> None:
    z1, z2 = (z.requires_grad_() for z in embeddings())
    nt_xent(z1, z2, 0.2).backward()
    for z in (z1, z2):
        assert z.grad is not None and z.grad.norm() > 0.01
        assert torch.allclose((z.grad * z).sum(1), torch.zeros(6), atol=1e-6)


def test_nt_xent_masks_the_self_similarity() -> None:
    """With it, perfect embeddings could not pass ln 2, and the hand value would be another."""
    z1, z2 = torch.eye(2), torch.eye(2)
    z = torch.cat((z1, z2))
    unmasked = F.cross_entropy(z @ z.T / 0.1, torch.arange(4).roll(2))
    assert unmasked > math.log(2) > 0.01 > nt_xent(z1, z2, 0.1)


def test_shuffled_partners_bring_the_task_to_chance() -> None:
    torch.manual_seed(0)
    z = torch.randn(128, 64)
    assert nt_xent(z, z + 0.1 * torch.randn_like(z), 0.5) < nt_xent(z, z[torch.randperm(128)], 0.5) - 1
    assert nt_xent(z, z[torch.randperm(128)], 0.5).item() == pytest.approx(math.log(255), abs=0.3)


# SimCLR


def test_simclr_starts_near_chance() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 1, 16, 16)).byte().repeat(64, 1, 1, 1)
    loss, values = run(SimCLR(small_encoder(), temperature=1.0), images)
    # All images are one: which view is the partner cannot be told.
    assert loss.item() == pytest.approx(math.log(127), abs=0.3)
    assert values["contrastive_accuracy"] < 0.1


def test_simclrs_views_differ_from_each_other_and_by_image() -> None:
    torch.manual_seed(0)
    views = SimCLR(small_encoder()).view(images_of((1, 16, 16), 1).repeat(4, 1, 1, 1))
    assert all((views[i] - views[j]).abs().max() > 0.01 for i in range(4) for j in range(i))


def test_simclr_pairs_the_two_views_of_an_image() -> None:
    """Easy images, views without change: only the right pairing finds every partner."""
    torch.manual_seed(0)
    plain = {"crop": 1.0, "flip": 0, "rotation": 0, "brightness": 0, "contrast": 0, "blur": 0}
    signal = SimCLR(small_encoder(), **plain)
    signal.crop["aspect"] = (1, 1)
    _, values = run(signal, images_of((1, 16, 16), 32))
    assert values["contrastive_accuracy"] > 0.99


# Autoencoder


class Linear(nn.Module):
    """A linear encoder or decoder of flat images."""

    def __init__(self, inputs: int, outputs: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.linear, self.shape = nn.Linear(inputs, outputs), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)).view(-1, *self.shape)


def test_a_linear_autoencoder_is_pca() -> None:
    torch.manual_seed(0)
    side, k = 4, 3
    scales = torch.tensor([0.15, 0.12, 0.1] + [0.03] * 13)
    basis, _ = torch.linalg.qr(torch.randn(16, 16))
    images = (
        ((torch.randn(400, 16) * scales) @ basis.T + 0.5)
        .clamp(0, 1)
        .mul(255)
        .round()
        .byte()
        .view(-1, 1, side, side)
    )
    flat = images.flatten(1).float() / 255
    centred = flat - flat.mean(0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    residual = (singular[k:] ** 2).sum() / flat.numel()

    signal = Autoencoder(Encoder("small_resnet", 8, 1, (1, side, side), 0.5, 0.2), code_dim=0)
    signal.encoder, signal.decoder = Linear(16, k, (k,)), Linear(k, 16, (1, side, side))  # type: ignore[assignment]
    optimizer = torch.optim.LBFGS(signal.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = run(signal, images)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    error = run(signal, images)[0].item()
    assert residual.item() * 0.9999 <= error <= residual.item() * 1.01
    found, _ = torch.linalg.qr(signal.decoder.linear.weight.detach())
    cosines = torch.linalg.svdvals(found.T @ directions[:k].T)
    assert torch.rad2deg(torch.arccos(cosines.clamp(max=1))).max() < 2


@pytest.mark.parametrize("code_dim", [2, 32])
def test_the_decoder_receives_the_code_and_nothing_else(code_dim: int) -> None:
    torch.manual_seed(0)
    signal = Autoencoder(small_encoder((1, 28, 28)), code_dim=code_dim)
    nn.init.normal_(signal.decoder.out.weight)
    signal.eval()
    originals = torch.rand(4, 1, 28, 28)
    codes = signal.encode(originals)
    assert codes.shape == (4, code_dim)
    before = signal.decoder(codes)
    # Another image, another encoder: the same code gives the same picture.
    for parameter in signal.encoder.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(signal.decoder(codes), before)
    assert not torch.allclose(signal.decoder(codes + 1), before, atol=1e-3)
    # And every one of its numbers is used.
    codes = codes.detach().requires_grad_()
    signal.decoder(codes).square().sum().backward()
    assert codes.grad is not None and (codes.grad.abs() > 0).all()


def test_code_dim_0_is_the_features() -> None:
    signal = Autoencoder(small_encoder(), code_dim=0).eval()
    originals = torch.rand(2, 1, 16, 16)
    assert torch.equal(signal.encode(originals), signal.encoder(originals))


def test_the_loss_at_init_is_the_variance_around_the_mean() -> None:
    images = images_of((3, 20, 20))
    originals = images.float() / 255
    encoder = Encoder("small_resnet", 16, 2, (3, 20, 20), originals.mean().item(), 0.3)
    loss, _ = run(Autoencoder(encoder), images)
    assert loss.item() == pytest.approx(originals.var(unbiased=False).item(), rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 9), (1, 28, 28), (3, 33, 20), (1, 96, 96)])
def test_the_decoder_gives_the_size_of_the_images(shape: tuple[int, int, int]) -> None:
    decoder = Decoder(5, shape, 16, mean=0.25)
    result = decoder(torch.randn(2, 5))
    assert result.shape == (2, *shape) and torch.allclose(result, torch.tensor(0.25))


def test_more_numbers_in_the_code_less_error() -> None:
    images = images_of((1, 8, 8), 64)
    errors = []
    for code_dim in (1, 4, 32):
        torch.manual_seed(0)
        signal = Autoencoder(Encoder("small_resnet", 16, 2, (1, 8, 8), 0.5, 0.3), code_dim=code_dim)
        optimizer = torch.optim.AdamW(signal.parameters(), 3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss, _ = run(signal, images)
            loss.backward()
            optimizer.step()
        errors.append(loss.item())
    assert errors[0] > errors[1] > errors[2]


def test_sparsity_is_the_divergence_of_bernoullis() -> None:
    activations = torch.tensor([[0.1, 0.5], [0.3, 0.7]])
    expected = sum(0.05 * math.log(0.05 / mean) + 0.95 * math.log(0.95 / (1 - mean)) for mean in (0.2, 0.6))
    assert sparsity_divergence(activations, 0.05).item() == pytest.approx(expected, rel=1e-5)
    assert sparsity_divergence(torch.full((4, 3), 0.05), 0.05).item() == pytest.approx(0, abs=1e-6)


def test_sparsity_lowers_the_activity() -> None:
    images = images_of((1, 8, 8), 64)
    torch.manual_seed(0)
    signal = Autoencoder(Encoder("small_resnet", 16, 2, (1, 8, 8), 0.5, 0.3), sparsity=0.1, activity=0.1)
    optimizer = torch.optim.AdamW(signal.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss, values = run(signal, images)
        loss.backward()
        optimizer.step()
    codes = signal.encode(images.float() / 255)
    assert codes.min() >= 0 and codes.max() <= 1
    assert codes.mean().item() == pytest.approx(0.1, abs=0.05) and values["sparsity"] < 1


def test_signals_are_modules_of_one_interface() -> None:
    for method, kind in all_signals().items():
        assert issubclass(kind, Signal)
        assert signal_for(method, (1, 16, 16)).after_step() is None  # type: ignore[func-returns-value]
