"""From a run and a network to what the denoising loop needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ddim_cli.diffusion.coefficients import StepTable
from ddim_cli.diffusion.solvers import DDIM, INVERSION, SAMPLING
from ddim_cli.models.conditions import ClassCondition, Condition
from ddim_cli.models.load import SamplingNetwork
from ddim_cli.sampling.guidance import with_guidance
from ddim_cli.sampling.loop import Pass, Sampler
from ddim_cli.sampling.network import Network, StepNetwork, as_network, at_steps, with_projections
from ddim_cli.sampling.resolve import Run


def make_sampler(
    run: Run,
    network: SamplingNetwork | Network,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    keeps_x0: bool = True,
    inverts: bool = False,
) -> Sampler:
    """What the denoising loop needs; with ``inverts`` also what leads up the same grid, without clipping.

    Raises:
        ConfigError: for a grid whose coefficients cannot be computed.
    """
    conditional = run.config.sampling.classes is not None
    step = _step_network(run, network, conditional)
    return Sampler(
        down=_make_pass(run, SAMPLING, step, device),
        up=_make_pass(run, INVERSION, step, device) if inverts else None,
        shape=shape,
        device=device,
        dtype=dtype,
        condition=ClassCondition() if conditional else Condition(),
        keeps_x0=keeps_x0,
    )


def _make_pass(run: Run, solver: DDIM, step: Callable[[Tensor], StepNetwork], device: torch.device) -> Pass:
    config = run.config
    table = solver.table(config.scheduler, config.sampling, run.timesteps, device)
    asked = starting_timesteps(run, table) if solver.inverse else table.timesteps
    return Pass(
        network=step(asked),
        table=table,
        treatment=solver.treatment(config.scheduler, config.sampling),
        solver=solver,
        draws_noise=not solver.inverse and config.sampling.draws_noise,
    )


def _step_network(run: Run, network: SamplingNetwork | Network, conditional: bool) -> Callable[[Tensor], StepNetwork]:
    """Timesteps int64 [N] -> the network by step, guided where that is asked for."""
    if isinstance(network, SamplingNetwork):
        if not conditional:
            return partial(with_projections, network)
        network = as_network(network)
    settings, null_class = run.config.sampling, run.config.model.null_class
    if settings.guidance_scale != 1:
        assert null_class is not None  # refused when the run was settled
        network = with_guidance(network, null_class, settings.guidance_scale, settings.guidance_rescale)
    return partial(at_steps, network)


def starting_timesteps(run: Run, table: StepTable) -> Tensor:
    """At which timestep each step of an inverse table asks the network: that of the level at which it starts.

    So a step up is Euler's step of the ODE (DDIM, eq. 13), as a step down is. A picture without noise is asked about at
    timestep 0, the level nearest to it; a network that embeds log t, at the lowest of the grid. int64 [N] on the
    table's device.
    """
    embeds_log = run.described is not None and run.described.network.get("time_embedding_type") == "fourier"
    lowest = run.timesteps[-1] if embeds_log else 0
    return table.timesteps.new_tensor([lowest if t < 0 else t for t in table.prev_timesteps])
