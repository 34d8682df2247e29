"""Solvers: how a step leads from x_t to x_prev. Each has its table of coefficients, its state and its step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.coefficients import Coefficients, StepTable, make_table
from ddim_cli.diffusion.step import X0Treatment, ddim_step


@dataclass(frozen=True)
class DDIM:
    """DDIM (arXiv:2010.02502, eq. 12), which needs nothing of the steps before.

    Its ``inverse`` leads up the grid, from a picture to its latent (section 5.4), without clipping, which has none.
    """

    inverse: bool = False

    def table(
        self,
        scheduler: SchedulerSettings,
        sampling: SamplingSettings,
        timesteps: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> StepTable:
        """The coefficients of all steps, in the order in which they run. Raises ConfigError."""
        table = make_table(scheduler, sampling, timesteps, device, inverse=self.inverse)
        return table.reversed() if self.inverse else table

    def treatment(self, scheduler: SchedulerSettings, sampling: SamplingSettings) -> X0Treatment:
        """What is done to a predicted x0."""
        return X0Treatment() if self.inverse else X0Treatment.of(scheduler, sampling)

    def state(self, x: Tensor) -> tuple[Tensor, ...]:
        """Buffers for what a step leaves to the next one, for states of x's shape [B, C, H, W]."""
        return ()

    def step(
        self,
        x: Tensor,
        output: Tensor,
        c: Coefficients,
        treatment: X0Treatment,
        noise: Tensor | None,
        state: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        """x_t -> (x_prev, x0), float32 [B, C, H, W]; ``state`` is updated in place."""
        return ddim_step(x, output, c, treatment, noise)


SAMPLING, INVERSION = DDIM(), DDIM(inverse=True)
