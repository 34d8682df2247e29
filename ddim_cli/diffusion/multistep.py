"""Multistep solvers of higher order, of which DDIM is the first: a step also looks at what the last ones predicted.

With lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), half the log-SNR, the probability-flow ODE has an exact
solution but for an integral over the predicted x0 (DPM-Solver++, Lu et al., arXiv:2211.01095, eq. 8). DDIM takes x0
for constant during a step; a solver of order k takes a polynomial through the last k predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddim_cli.config.schema import PredictionType, SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.coefficients import (
    StepTable,
    checked,
    grid_levels,
    noise_and_direction,
    prediction_weights,
)
from ddim_cli.diffusion.levels import half_log_snr
from ddim_cli.diffusion.rules import check_combination
from ddim_cli.diffusion.step import X0Treatment, with_noise

# A grid of fewer steps ends with steps of lower order, and a step that is so many times as long as the one before it is
# of order 1; see `step_orders`.
SHORT_GRID, LONG_STEP = 15, 2.0


class MultistepCoefficients(NamedTuple):
    """What one step multiplies by; 0-d tensors of one step, or [N] tensors of all.

    With o the network's output at x_t:  x0 = x0_from_x x_t + x0_from_output o, and epsilon likewise. With d that of the
    two in which the solver predicts, d' and d'' those of the last step and the one before,
    x_prev = from_x x_t + from_now d + from_last d' + from_before_last d'' + sigma z, z ~ N(0, I).
    """

    x0_from_x: Tensor
    x0_from_output: Tensor
    epsilon_from_x: Tensor
    epsilon_from_output: Tensor
    from_x: Tensor
    from_now: Tensor
    from_last: Tensor
    from_before_last: Tensor
    sigma: Tensor


def moments(decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w_k = H int_0^1 exp(-H (1 - u)) u^k du for k = 0, 1, 2: what a step makes of x0 = u^k. H in [0, inf], float64.

    They are the phi functions of exponential integrators, H phi_1(-H), H phi_2(-H) and 2 H phi_3(-H).
    """
    closed = [-torch.expm1(-decay)]
    for k in (1, 2):
        closed.append(1 - k / decay * closed[-1])
    # Small ones lose digits in the differences above; there the series of exp, integrated term by term.
    small, series = decay.clamp(max=1), []
    for k in (0, 1, 2):
        term = small / (k + 1)
        total = term
        for j in range(1, 20):
            term = -term * small / (k + 1 + j)
            total = total + term
        series.append(total)
    w0, w1, w2 = (torch.where(decay < 1, s, c) for s, c in zip(series, closed, strict=True))
    return w0, w1, w2


def step_orders(start: Tensor, end: Tensor, order: int, lowers_end: bool = True) -> Tensor:
    """The order that each step runs in, int64 [N], from positions ``start`` to ``end``, float64 [N], rising.

    A step needs order - 1 predictions of before, made at positions that are finite and differ: the first step is of
    order 1, the second of 2. Of order 1 is also

    - a step to an infinite position, alpha_bar 1, which is then exactly x0: no polynomial reaches that far;
    - one more than `LONG_STEP` times as long as the one before it. Its middle lies further ahead than the last
      prediction lies behind, and a slope that is followed so far overshoots: on the leading grid, whose step to
      timestep 0 is four times as long as others, 15 steps of order 3 came out three times as far off as of order 1;
    - with ``lowers_end`` the last one of a grid of fewer than `SHORT_GRID` steps, while the one before it is of order 2
      at most, as in the published solver: no step comes after them to dampen what they extrapolate wrongly. It helps
      in 5 steps, and costs a few per cent where the steps are of similar length. The README has the figures.
    """
    count = len(start)
    steps_back = torch.zeros(count, dtype=torch.int64)
    for i in range(1, count):
        usable = bool(start[i - 1].isfinite() & (start[i] > start[i - 1]))
        steps_back[i] = steps_back[i - 1] + 1 if usable else 0
    orders = (steps_back + 1).clamp(max=order)
    too_long = torch.zeros(count, dtype=torch.bool)
    too_long[1:] = (end - start)[1:] > LONG_STEP * start.diff()
    orders[~end.isfinite() | ~(end > start) | too_long] = 1
    if lowers_end and count < SHORT_GRID:
        orders[-1:] = 1
        orders[-2:-1].clamp_(max=2)
    return orders


def integral_weights(start: Tensor, end: Tensor, decay: Tensor, orders: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the last three predictions weigh in the integral over a step; float64 [N] each.

    Order 2 takes the slope between the last two for the whole step, weighted as at its middle (DPM-Solver++,
    algorithm 2). Order 3 integrates the parabola through three exactly.
    """
    w0, w1, w2 = moments(decay)
    step = end - start
    # How far back the last prediction lies, and the one before it, in steps of this one.
    a = (start - start.roll(1)) / step
    b = (start - start.roll(2)) / step
    slope = w0 / (2 * a)
    zero = torch.zeros_like(w0)
    second = (w0 + slope, -slope, zero)
    third = (w0 + ((a + b) * w1 + w2) / (a * b), -(b * w1 + w2) / (a * (b - a)), (a * w1 + w2) / (b * (b - a)))
    now, last, before_last = (
        torch.where(orders == 3, three, torch.where(orders == 2, two, one))
        for one, two, three in zip((w0, zero, zero), second, third, strict=True)
    )
    return now, last, before_last


def multistep_coefficients(
    alpha_bar: Tensor,
    prev_alpha_bar: Tensor,
    orders: Tensor,
    prediction: PredictionType = "epsilon",
    eta: float = 0.0,
) -> MultistepCoefficients:
    """The coefficients of steps down from levels ``alpha_bar`` to ``prev_alpha_bar``, float64 [N], in this sequence.

    ``orders`` int64 [N] are those of `step_orders`.
    For eta 0 DPM-Solver++ (arXiv:2211.01095), for eta 1 SDE-DPM-Solver++. Between, and above, the noise of a step is
    DDIM's (DDIM, eq. 16): the SDEs dx = f x dt - (1 + tau^2) / 2 g^2 score dt + tau g dw have the same marginals
    for every tau (SA-Solver, Xue et al., arXiv:2309.05019), and exp(-2 tau^2 h) = 1 - sigma^2 / (1 - alpha_bar_prev)
    is the tau of a step of h in lambda that adds just that noise. Its x0 then decays at rate H = (1 + tau^2) h.

    Raises:
        ConfigError: for an eta so far above 1 that 1 - a_prev - sigma^2 would turn negative.
    """
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    sigma, direction = noise_and_direction(alpha_bar, prev_alpha_bar, eta)
    start, end = half_log_snr(alpha_bar), half_log_snr(prev_alpha_bar)
    added = torch.where(prev_alpha_bar < 1, sigma.square() / (1 - prev_alpha_bar), 0).clamp(max=1)
    decay = torch.where(noise > 0, end - start - (-added).log1p() / 2, torch.inf)
    now, last, before_last = (prev_alpha_bar.sqrt() * w for w in integral_weights(start, end, decay, orders))
    from_x = torch.where(noise > 0, direction / noise, 0)
    return MultistepCoefficients(*prediction_weights(prediction, signal, noise), from_x, now, last, before_last, sigma)


def inverse_coefficients(
    alpha_bar: Tensor, next_alpha_bar: Tensor, orders: Tensor, prediction: PredictionType = "epsilon"
) -> MultistepCoefficients:
    """The coefficients of steps up from levels ``alpha_bar`` to ``next_alpha_bar``, float64 [N], in this sequence.

    With the parts of x0 and epsilon, and the sign of lambda, exchanged: what decays on the way up is the picture, and
    the integral is over epsilon (DPM-Solver, Lu et al., arXiv:2206.00927, eq. 3.4).
    """
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    start, end = -half_log_snr(alpha_bar), -half_log_snr(next_alpha_bar)
    decay = torch.where(start == end, 0, end - start)
    weights = integral_weights(start, end, decay, orders)
    now, last, before_last = ((1 - next_alpha_bar).sqrt() * weight for weight in weights)
    from_x, sigma = next_alpha_bar.sqrt() / signal, torch.zeros_like(signal)
    return MultistepCoefficients(*prediction_weights(prediction, signal, noise), from_x, now, last, before_last, sigma)


def make_multistep_table(
    scheduler: SchedulerSettings,
    sampling: SamplingSettings,
    timesteps: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    inverse: bool = False,
) -> StepTable[MultistepCoefficients]:
    """As `coefficients.make_table`, of order ``sampling.order``; an ``inverse`` one is in the order in which it runs.

    Raises:
        ConfigError: for combinations that cannot work; see `rules` and `multistep_coefficients`.
    """
    check_combination(scheduler, sampling, timesteps)
    previous, alpha_bar, prev_alpha_bar = grid_levels(scheduler, sampling, timesteps)
    at = torch.tensor(timesteps, dtype=torch.int64)
    if inverse:
        at, previous = at.flip(0), previous[::-1]
        alpha_bar, prev_alpha_bar = alpha_bar.flip(0), prev_alpha_bar.flip(0)
        start, end = prev_alpha_bar, alpha_bar
        orders = step_orders(-half_log_snr(start), -half_log_snr(end), sampling.order, lowers_end=False)
        columns = inverse_coefficients(start, end, orders, scheduler.prediction_type)
    else:
        start, end = alpha_bar, prev_alpha_bar
        orders = step_orders(half_log_snr(start), half_log_snr(end), sampling.order)
        columns = multistep_coefficients(start, end, orders, scheduler.prediction_type, sampling.eta)
    values, ran = torch.stack(columns, dim=1).to(dtype), tuple(orders.tolist())
    table = StepTable(MultistepCoefficients, at, values, previous, alpha_bar, prev_alpha_bar, columns.sigma, ran)
    return checked(table, scheduler, sampling, inverse).to(device)


def multistep(
    x: Tensor,
    output: Tensor,
    c: MultistepCoefficients,
    treatment: X0Treatment,
    noise: Tensor | None,
    before: tuple[Tensor, ...],
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """x_t -> x_prev: from_x x_t + from_now d + from_last d' + from_before_last d'' + sigma noise.

    Args:
        x: the state x_t, [B, ...] in float32, or in float64 with a table made in float64.
        output: the network's output at x_t, [B, ...]; raised to x's dtype if it is narrower.
        c: the step's coefficients, 0-d on x's device.
        treatment: clipping and thresholding of x0.
        noise: standard normal [B, ...], or None for none; raised likewise.
        before: d' of order 2, d' and d'' of order 3, [B, ...] each; updated in place.
        inverse: predict in epsilon, on the way up, in place of x0.

    Returns:
        x_prev and the predicted x0, [B, ...] in x's dtype.
    """
    output = output.to(x.dtype)
    x0 = treatment.apply(c.x0_from_x * x + c.x0_from_output * output)
    now = c.epsilon_from_x * x + c.epsilon_from_output * output if inverse else x0
    x_prev = c.from_x * x + c.from_now * now
    for weight, then in zip((c.from_last, c.from_before_last), before, strict=False):
        x_prev = x_prev + weight * then
    for i in reversed(range(len(before))):
        before[i].copy_(before[i - 1] if i else now)
    return with_noise(x_prev, c.sigma, noise), x0
