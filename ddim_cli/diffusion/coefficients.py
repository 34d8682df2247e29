"""The coefficients of every step of a run, computed once in float64 and kept on the device, in float32 by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ddim_cli.config.schema import PredictionType, SamplingSettings, SchedulerSettings, Variance
from ddim_cli.diffusion.betas import make_alpha_bars
from ddim_cli.diffusion.rules import check_combination
from ddim_cli.errors import ConfigError


class Coefficients(NamedTuple):
    """What one step multiplies by; 0-d tensors of one step, or [N] tensors of all.

    With o the network's output at x_t:  x0 = x0_from_x x_t + x0_from_output o,
    epsilon = epsilon_from_x x_t + epsilon_from_output o, and after x0 was clipped
    epsilon = (x_t - signal x0) / noise, where x_t = signal x0 + noise epsilon.
    Then x_prev = prev_signal x0 + direction epsilon + sigma z, z ~ N(0, I)  (DDIM, eq. 12).
    """

    x0_from_x: Tensor
    x0_from_output: Tensor
    epsilon_from_x: Tensor
    epsilon_from_output: Tensor
    signal: Tensor
    inverse_noise: Tensor
    prev_signal: Tensor
    direction: Tensor
    sigma: Tensor


# A named tuple with a field a column of a table.
Columns = TypeVar("Columns", bound=tuple[Any, ...])


@dataclass(frozen=True)
class StepTable(Generic[Columns]):
    """Everything about the N steps of a run that does not depend on an image.

    ``timesteps`` int64 [N] and ``values`` [N, columns of ``kind``] lie on the run's device, ``values`` in float32
    unless float64 was asked for;
    ``alpha_bar``, ``prev_alpha_bar`` and ``sigma`` float64 [N] on the host, for tables and plots;
    ``prev_timesteps`` has -1 where a step ends at the final alpha_bar; ``orders`` is what each step is of.
    """

    kind: Callable[..., Columns]
    timesteps: Tensor
    values: Tensor
    prev_timesteps: tuple[int, ...]
    alpha_bar: Tensor
    prev_alpha_bar: Tensor
    sigma: Tensor
    orders: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prev_timesteps)

    def row(self, index: int | Tensor) -> Columns:
        """Coefficients of step ``index``: an int, or an int64 [1] tensor on the device (no synchronisation)."""
        row = self.values[index] if isinstance(index, int) else self.values.index_select(0, index)[0]
        return self.kind(*row.unbind())

    def to(self, device: torch.device | str) -> StepTable[Columns]:
        """The same table on ``device``."""
        return replace(self, timesteps=self.timesteps.to(device), values=self.values.to(device))

    def reversed(self) -> StepTable[Columns]:
        """The same steps in the opposite order."""
        return StepTable(
            self.kind,
            self.timesteps.flip(0),
            self.values.flip(0),
            self.prev_timesteps[::-1],
            self.alpha_bar.flip(0),
            self.prev_alpha_bar.flip(0),
            self.sigma.flip(0),
            self.orders[::-1],
        )


def previous_timesteps(
    timesteps: Sequence[int], scheduler: SchedulerSettings, steps: int | None = None
) -> tuple[int, ...]:
    """The timestep each step goes to, -1 for the final alpha_bar.

    ``previous_timestep = "grid"``: the next entry of the grid. ``"diffusers"``: t - T // N, N being
    ``steps``, the number asked for (default: the grid's length).
    """
    if scheduler.previous_timestep == "grid":
        return (*timesteps[1:], -1)
    stride = scheduler.num_train_timesteps // (steps or len(timesteps))
    return tuple(max(t - stride, -1) for t in timesteps)


def final_alpha_bar(alpha_bars: Tensor, set_alpha_to_one: bool) -> Tensor:
    """The alpha_bar that the last step goes to: 1, or that of timestep 0. 0-d."""
    return torch.ones((), dtype=alpha_bars.dtype) if set_alpha_to_one else alpha_bars[0]


def ddim_sigma(alpha_bar: Tensor, prev_alpha_bar: Tensor, eta: float) -> Tensor:
    """sigma = eta sqrt((1 - a_prev) / (1 - a_t)) sqrt(1 - a_t / a_prev)  (DDIM, eq. 16); 0 where a_t = 1."""
    ratio = torch.where(alpha_bar < 1, (1 - prev_alpha_bar) / (1 - alpha_bar), 0)
    return eta * (ratio * (1 - alpha_bar / prev_alpha_bar).clamp(min=0)).sqrt()


def large_sigma(alpha_bar: Tensor, prev_alpha_bar: Tensor) -> Tensor:
    """sigma-hat = sqrt(1 - a_t / a_prev) (DDIM, section 5.1), and none in the last step of the grid."""
    sigma = (1 - alpha_bar / prev_alpha_bar).clamp(min=0).sqrt()
    return torch.cat([sigma[:-1], torch.zeros_like(sigma[-1:])])


def prediction_weights(
    prediction: PredictionType, signal: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0 and epsilon as linear combinations of x and the output: (x0_x, x0_out, epsilon_x, epsilon_out)."""
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "epsilon":
        return 1 / signal, -noise / signal, zero, one
    if prediction == "sample":
        return zero, one, 1 / noise, -signal / noise
    return signal, -noise, noise, signal


def largest_eta(alpha_bar: Tensor, prev_alpha_bar: Tensor) -> float:
    """The largest eta for which 1 - a_prev - sigma^2 is negative in no step."""
    sigma = ddim_sigma(alpha_bar, prev_alpha_bar, 1.0)
    return torch.where(sigma > 0, (1 - prev_alpha_bar).sqrt() / sigma, torch.inf).min().item()


def noise_and_direction(alpha_bar: Tensor, prev_alpha_bar: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """sigma and sqrt(1 - a_prev - sigma^2), of which the noise of x_prev is made up (DDIM, eq. 12 and 16).

    Raises:
        ConfigError: for an eta so far above 1 that 1 - a_prev - sigma^2 would turn negative.
    """
    sigma = ddim_sigma(alpha_bar, prev_alpha_bar, eta)
    remaining = 1 - prev_alpha_bar - sigma.square()
    # eta = 1 meets zero exactly where a step leaves pure noise, up to rounding.
    if (remaining < -1e-9).any():
        most = largest_eta(alpha_bar, prev_alpha_bar)
        raise ConfigError(
            f"sampling.eta = {eta} asks for more noise than x_prev may hold (1 - alpha_bar_prev - sigma^2 < 0); "
            f"on this grid it can be at most {int(most * 1e4) / 1e4:g}"
        )
    return sigma, remaining.clamp(min=0).sqrt()


def step_coefficients(
    alpha_bar: Tensor,
    prev_alpha_bar: Tensor,
    prediction: PredictionType = "epsilon",
    eta: float = 0.0,
    variance: Variance = "ddim",
) -> Coefficients:
    """The coefficients of steps from levels ``alpha_bar`` to ``prev_alpha_bar``, both float64 [N].

    The ``variance`` "large" is sigma-hat, with the direction term of ``eta``, which is 1 there.

    Raises:
        ConfigError: for an eta so far above 1 that 1 - a_prev - sigma^2 would turn negative.
    """
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    sigma_ddim, direction = noise_and_direction(alpha_bar, prev_alpha_bar, eta)
    sigma = large_sigma(alpha_bar, prev_alpha_bar) if variance == "large" else sigma_ddim
    x0_from_x, x0_from_output, epsilon_from_x, epsilon_from_output = prediction_weights(prediction, signal, noise)
    return Coefficients(
        x0_from_x,
        x0_from_output,
        epsilon_from_x,
        epsilon_from_output,
        signal=signal,
        # Where a_t = 1 nothing is noise; only re-deriving epsilon would use it, which is refused there.
        inverse_noise=torch.where(noise > 0, 1 / noise, 0),
        prev_signal=prev_alpha_bar.sqrt(),
        direction=direction,
        sigma=sigma,
    )


def grid_levels(
    scheduler: SchedulerSettings, sampling: SamplingSettings, timesteps: Sequence[int]
) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """The timesteps that the steps of a grid go to, and the alpha_bars that they lead from and to, float64 [N]."""
    alpha_bars = make_alpha_bars(scheduler)
    previous = previous_timesteps(timesteps, scheduler, sampling.steps if sampling.timesteps is None else None)
    levels = torch.cat([alpha_bars, final_alpha_bar(alpha_bars, scheduler.set_alpha_to_one).view(1)])
    return previous, levels[list(timesteps)], levels[list(previous)]


def make_table(
    scheduler: SchedulerSettings,
    sampling: SamplingSettings,
    timesteps: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    inverse: bool = False,
) -> StepTable[Coefficients]:
    """The table of a run over ``timesteps`` (see `grids.timestep_grid`), its tensors on ``device``.

    ``dtype`` is that of the coefficients: float32, as the sampling loop has it, or float64. An ``inverse`` one is of
    the reverse direction (DDIM, section 5.4), in the same order of timesteps: row i leads from the level that sampling
    reaches from timestep i back up to the level of timestep i, with no noise, sampling's own step read backwards.

    Raises:
        ConfigError: for combinations that cannot work; see `rules` and `step_coefficients`.
    """
    check_combination(scheduler, sampling, timesteps)
    previous, alpha_bar, prev_alpha_bar = grid_levels(scheduler, sampling, timesteps)
    if inverse:
        columns = step_coefficients(prev_alpha_bar, alpha_bar, scheduler.prediction_type)
    else:
        columns = step_coefficients(
            alpha_bar, prev_alpha_bar, scheduler.prediction_type, sampling.eta, sampling.variance
        )
    values = torch.stack(columns, dim=1).to(dtype)
    table = StepTable(
        Coefficients,
        torch.tensor(timesteps, dtype=torch.int64),
        values,
        previous,
        alpha_bar,
        prev_alpha_bar,
        columns.sigma,
        (1,) * len(previous),
    )
    return checked(table, scheduler, sampling, inverse).to(device)


def checked(
    table: StepTable[Columns], scheduler: SchedulerSettings, sampling: SamplingSettings, inverse: bool
) -> StepTable[Columns]:
    """The table, unless a step starts so near to alpha_bar 0 or 1 that x0 or epsilon cannot be derived there.

    What the settings alone tell is refused before, by `rules`; this is exact.

    Raises:
        ConfigError: for the first such step.
    """
    values, start = table.values, table.prev_alpha_bar if inverse else table.alpha_bar
    broken = ~values.isfinite().all(dim=1)
    if sampling.use_clipped_model_output and not inverse:
        broken |= start >= 1
    if not broken.any():
        return table
    i = int(broken.nonzero()[0])
    finite = bool(values[i].isfinite().all())
    which = "use_clipped_model_output" if finite else f'prediction_type = "{scheduler.prediction_type}"'
    if inverse and start[i] >= 1:
        remedy = "set scheduler.set_alpha_to_one = false"
    else:
        remedy = "use betas that leave some signal and some noise there, or a grid without it"
    raise ConfigError(
        f"at timestep {table.timesteps[i]} the step starts from alpha_bar {start[i].item():.6g}, where {which} cannot "
        f"tell x0 from epsilon; {remedy}"
    )


make_inverse_table = partial(make_table, inverse=True)
