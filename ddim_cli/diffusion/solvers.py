"""Solvers: how a step leads from x_t to x_prev. Each has its table of coefficients, its state and its step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.coefficients import StepTable, make_table
from ddim_cli.diffusion.multistep import make_multistep_table, multistep
from ddim_cli.diffusion.step import X0Treatment, ddim_step


@dataclass(frozen=True)
class Solver:
    """A way along the grid: down it, or with ``inverse`` up it, from a picture to its latent (DDIM, section 5.4).

    Of ``order`` 1 it is DDIM (arXiv:2010.02502, eq. 12), which needs nothing of the steps before; of order 2 or 3
    DPM-Solver++, and its SDE form for eta above 0 (arXiv:2211.01095; see `multistep`). The way up adds no noise and
    clips nothing, since clipping has no inverse.
    """

    order: int = 1
    inverse: bool = False

    def table(
        self,
        scheduler: SchedulerSettings,
        sampling: SamplingSettings,
        timesteps: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> StepTable[Any]:
        """The coefficients of all steps, in the sequence in which they run. Raises ConfigError."""
        if self.order > 1:
            return make_multistep_table(scheduler, sampling, timesteps, device, dtype, self.inverse)
        table = make_table(scheduler, sampling, timesteps, device, dtype, self.inverse)
        return table.reversed() if self.inverse else table

    def treatment(self, scheduler: SchedulerSettings, sampling: SamplingSettings) -> X0Treatment:
        """What is done to a predicted x0: nothing on the way up."""
        return X0Treatment() if self.inverse else X0Treatment.of(scheduler, sampling)

    def state(self, x: Tensor) -> tuple[Tensor, ...]:
        """Buffers for what a step leaves to the next one, for states of x's shape [B, C, H, W]."""
        return tuple(torch.zeros_like(x) for _ in range(self.order - 1))

    def step(
        self,
        x: Tensor,
        output: Tensor,
        c: Any,
        treatment: X0Treatment,
        noise: Tensor | None,
        state: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        """x_t -> (x_prev, x0), float32 [B, C, H, W], by a row of the table; ``state`` is updated in place."""
        if self.order > 1:
            return multistep(x, output, c, treatment, noise, state, self.inverse)
        return ddim_step(x, output, c, treatment, noise)


def solver_of(sampling: SamplingSettings, inverse: bool = False) -> Solver:
    """The solver of ``sampling.order``."""
    return Solver(sampling.order, inverse)
