"""One step of DDIM, as the paper writes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.coefficients import Coefficients
from ddim_cli.diffusion.thresholding import dynamic_threshold


@dataclass(frozen=True)
class X0Treatment:
    """What is done to a predicted x0 before it is used.

    ``clip``: the bound to clip to, or None. ``threshold``: (ratio, max_value) of dynamic
    thresholding, which replaces clipping, or None. ``rederive_epsilon``: whether epsilon is then
    derived again, so that x0 and epsilon still make up x_t (use_clipped_model_output).
    """

    clip: float | None = None
    threshold: tuple[float, float] | None = None
    rederive_epsilon: bool = False

    @classmethod
    def of(cls, scheduler: SchedulerSettings, sampling: SamplingSettings) -> X0Treatment:
        if scheduler.thresholding:
            threshold = (scheduler.dynamic_thresholding_ratio, scheduler.sample_max_value)
            return cls(threshold=threshold, rederive_epsilon=sampling.use_clipped_model_output)
        clip = scheduler.clip_sample_range if scheduler.clip_sample else None
        return cls(clip=clip, rederive_epsilon=sampling.use_clipped_model_output)

    def apply(self, x0: Tensor) -> Tensor:
        """The predicted x0, clipped or thresholded; [B, ...]."""
        if self.threshold is not None:
            return dynamic_threshold(x0, *self.threshold)
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)


def predict(x: Tensor, output: Tensor, c: Coefficients, treatment: X0Treatment) -> tuple[Tensor, Tensor]:
    """x0 and epsilon from x_t and the network's output; all [B, ...] in one dtype."""
    x0 = treatment.apply(c.x0_from_x * x + c.x0_from_output * output)
    if treatment.rederive_epsilon:
        return x0, (x - c.signal * x0) * c.inverse_noise
    return x0, c.epsilon_from_x * x + c.epsilon_from_output * output


def with_noise(x: Tensor, sigma: Tensor, noise: Tensor | None) -> Tensor:
    """x + sigma noise, in x's dtype; x itself for None."""
    return x if noise is None else x + sigma * noise.to(x.dtype)


def undone(x_prev: Tensor, x: Tensor, output: Tensor, c: Coefficients) -> Tensor:
    """The x_t from which a step without noise leads to x_prev, taking from ``x`` what the network says there.

    The x_t sought is the fixed point of the map from ``x`` to this, and the map contracts where steps are short (Pan
    et al., arXiv:2309.04907; Garibi et al., arXiv:2403.14602). Epsilon is taken from ``x``. Where there is less than a
    tenth as much signal as noise, x0 is in its place, since at alpha_bar 0 every ``x`` would be its own epsilon; but
    not of a network that predicts epsilon, whose errors x0 would multiply there.

    Args:
        x_prev: the state that the step down is to lead to, [B, ...] in float32 or float64.
        x: what x_t is taken for, [B, ...] in the same dtype.
        output: the network's output at ``x`` and t, [B, ...].
        c: the coefficients of the step down, of eta 0.

    Returns:
        x_t, [B, ...].
    """
    x0, epsilon = predict(x, output.to(x.dtype), c, X0Treatment())
    noise = torch.where(c.inverse_noise > 0, 1 / c.inverse_noise, 0)
    by_epsilon = c.signal / c.prev_signal * (x_prev - c.direction * epsilon) + noise * epsilon
    by_x0 = c.signal * x0 + noise / c.direction * (x_prev - c.prev_signal * x0)
    takes_x0 = (10 * c.signal < noise) & (c.direction > 0) & (c.epsilon_from_x != 0)
    return torch.where(takes_x0, by_x0, by_epsilon)


def ddim_step(
    x: Tensor, output: Tensor, c: Coefficients, treatment: X0Treatment, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x_t -> x_prev (DDIM, eq. 12): prev_signal x0 + direction epsilon + sigma noise.

    Args:
        x: the state x_t, [B, ...] in float32, or in float64 with a table made in float64.
        output: the network's output at x_t, [B, ...]; raised to x's dtype if it is narrower.
        c: the step's coefficients, 0-d on x's device.
        treatment: clipping, thresholding and what follows from them.
        noise: standard normal [B, ...], or None for none; raised likewise.

    Returns:
        x_prev and the predicted x0, [B, ...] in x's dtype.
    """
    x0, epsilon = predict(x, output.to(x.dtype), c, treatment)
    x_prev = c.prev_signal * x0 + c.direction * epsilon
    return with_noise(x_prev, c.sigma, noise), x0
