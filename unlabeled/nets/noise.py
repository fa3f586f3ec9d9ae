"""Gaussian diffusion: a chain that turns images into noise step by step, and its reversal (Ho et al. 2020)."""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from unlabeled.nets.likelihood import discretized_gaussian

# Noised images (B, C, H, W) and their times, int64 (B,), to the noise in them (B, C, H, W).
Denoiser = Callable[[Tensor, Tensor], Tensor]


class NoiseProcess(nn.Module):
    """The chain x_0 … x_T and its formulas; images are float (B, C, H, W) in [-1, 1], times int64 (B,) in 1 … T.

    Every schedule has T + 1 entries and t is its index: entry 0 is the clean image, so that the formulas hold
    at t = 1 as they stand. No state: the schedules follow from the arguments.

    Args:
        steps: T, at least 2.
        schedule: `linear`, β from 1e-4 to 0.02 at T = 1000 and scaled by 1000 / T for any other, without
            which a short chain ends before the image is gone; or `cosine` (Nichol & Dhariwal 2021).
        variance: of a reverse step, β or the posterior's: the two bounds on the best.

    Attributes:
        beta, alpha_bar, posterior_variance, variance: float32 (T + 1,).
    """

    beta: Tensor
    alpha_bar: Tensor
    posterior_variance: Tensor
    variance: Tensor
    _from_clean: Tensor
    _from_noised: Tensor

    def __init__(
        self,
        steps: int,
        schedule: Literal["linear", "cosine"] = "linear",
        variance: Literal["beta", "posterior"] = "beta",
    ) -> None:
        super().__init__()
        self.steps = steps
        if schedule == "linear":
            beta = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
        else:
            time = torch.arange(steps + 1, dtype=torch.float64) / steps
            wanted = ((time + 0.008) / 1.008 * math.pi / 2).cos().square()
            beta = 1 - wanted[1:] / wanted[:-1]
        beta = torch.cat((beta.new_zeros(1), beta.clamp(max=0.999)))
        alpha_bar = (1 - beta).cumprod(0)
        before = torch.cat((alpha_bar[:1], alpha_bar[:-1]))
        beyond = (1 - alpha_bar).clamp(min=1e-20)
        posterior_variance = beta * (1 - before) / beyond
        reverse = (beta if variance == "beta" else posterior_variance).clone()
        # The posterior's is 0 at t = 1, which no likelihood bears; both take its value at t = 2 there.
        reverse[1] = posterior_variance[2]
        schedules = {
            "beta": beta,
            "alpha_bar": alpha_bar,
            "posterior_variance": posterior_variance,
            "variance": reverse,
            "_from_clean": beta * before.sqrt() / beyond,
            "_from_noised": (1 - before) * (1 - beta).sqrt() / beyond,
        }
        for name, values in schedules.items():
            self.register_buffer(name, values.float(), persistent=False)

    def noised(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t of x_0 in one step: √ᾱ x_0 + √(1 − ᾱ) ε."""
        alpha_bar = _at(self.alpha_bar, t)
        return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise

    def clean(self, noised: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_0 of x_t and its noise, whatever its range."""
        alpha_bar = _at(self.alpha_bar, t)
        return (noised - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()

    def posterior_mean(self, clean: Tensor, noised: Tensor, t: Tensor) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0); its variance is `posterior_variance`."""
        return _at(self._from_clean, t) * clean + _at(self._from_noised, t) * noised

    def reverse_mean(self, noised: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the mean of p(x_{t-1} | x_t), given the noise a model sees in x_t.

        The clean image it implies is clipped to [-1, 1], where all images are.
        """
        return self.posterior_mean(self.clean(noised, t, noise).clamp(-1, 1), noised, t)

    def ancestral_step(self, noised: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_{t-1} from p(x_{t-1} | x_t); the last step, t = 1, adds no noise."""
        std = (_at(self.variance, t) * (_at(t, slice(None)) > 1)).sqrt()
        return self.reverse_mean(noised, t, noise) + std * torch.randn_like(noised)

    def ddim_step(self, noised: Tensor, t: Tensor, to: Tensor, noise: Tensor) -> Tensor:
        """Return x_to of x_t, to < t, without randomness (Song et al. 2021)."""
        clean = self.clean(noised, t, noise).clamp(-1, 1)
        alpha_bar = _at(self.alpha_bar, t)
        return self.noised(clean, to, (noised - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt())

    def sample(self, denoiser: Denoiser, noise: Tensor, steps: int = 0) -> list[Tensor]:
        """Return a path of images from noise, x_T first, x_0 last.

        Args:
            noise: x_T, from N(0, I).
            steps: of DDIM, evenly spread over 1 … T; 0: ancestral sampling, all T.
        """
        times = torch.linspace(self.steps, 0, (min(steps, self.steps) or self.steps) + 1).round().long()
        path = [noise]
        for time, following in itertools.pairwise(times):
            t, to = (moment.to(noise.device).expand(len(noise)) for moment in (time, following))
            seen = denoiser(path[-1], t)
            path.append(
                self.ddim_step(path[-1], t, to, seen) if steps else self.ancestral_step(path[-1], t, seen)
            )
        return path

    def bound(self, clean: Tensor, denoiser: Denoiser, draws: int) -> tuple[Tensor, Tensor]:
        """Return the negative variational bound in bits per dimension, and L_simple, of each image, (B,) both.

        Both are free of bias: t = 1, the decoder of 256 levels, is always computed, of 2 … T only `draws`
        times, evenly spread from a random start. T - 1 draws are every t once: the whole bound.
        """
        first = torch.ones(len(clean), dtype=torch.int64, device=clean.device)
        nats, squares = self._term(clean, first, denoiser, self._decoder)
        nats = nats + self._prior(clean)
        start = torch.rand((), dtype=torch.float64, device=clean.device)
        image = torch.arange(len(clean), device=clean.device) / len(clean)
        weight = (self.steps - 1) / draws
        for draw in range(draws):
            place = (start + (draw + image.double()) / draws) % 1
            t = 2 + (place * (self.steps - 1)).long()
            term, square = self._term(clean, t, denoiser, self._divergence)
            nats, squares = nats + weight * term, squares + weight * square
        return nats / (clean[0].numel() * math.log(2)), squares / self.steps

    def _term(
        self, clean: Tensor, t: Tensor, denoiser: Denoiser, nats: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(clean)
        noised = self.noised(clean, t, noise)
        seen = denoiser(noised, t)
        mean = self.reverse_mean(noised, t, seen)
        return nats(clean, noised, t, mean).flatten(1).sum(1), (seen - noise).square().flatten(1).mean(1)

    def _decoder(self, clean: Tensor, noised: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        return -discretized_gaussian((clean + 1) / 2, (mean + 1) / 2, _at(self.variance, t).sqrt() / 2)

    def _divergence(self, clean: Tensor, noised: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        true, ours = _at(self.posterior_variance, t), _at(self.variance, t)
        away = (self.posterior_mean(clean, noised, t) - mean).square()
        return ((ours / true).log() + (true + away) / ours - 1) / 2

    def _prior(self, clean: Tensor) -> Tensor:
        alpha_bar = self.alpha_bar[-1]
        nats = (alpha_bar * clean.square() - alpha_bar - torch.log1p(-alpha_bar)) / 2
        return nats.flatten(1).sum(1)


def _at(schedule: Tensor, t: Tensor | slice) -> Tensor:
    return schedule[t].view(-1, 1, 1, 1)
