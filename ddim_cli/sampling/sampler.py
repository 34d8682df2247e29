"""From a run and a network to what the denoising loop needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ddim_cli.diffusion.coefficients import StepTable, make_table
from ddim_cli.diffusion.solvers import Solver, solver_of
from ddim_cli.models.conditions import ClassCondition, Condition, TextCondition
from ddim_cli.models.decoders import AutoencoderDecoder, Decoder
from ddim_cli.models.load import SamplingNetwork, TextNetwork
from ddim_cli.models.parts import TextParts
from ddim_cli.models.text import TextEncoder
from ddim_cli.outputs.figures import shortened
from ddim_cli.sampling.guidance import with_guidance, with_text_guidance
from ddim_cli.sampling.host import reclaim_memory
from ddim_cli.sampling.loop import Pass, Refinement, Sampler
from ddim_cli.sampling.network import Network, StepNetwork, as_network, at_steps, with_channels, with_projections
from ddim_cli.sampling.precision import offloads
from ddim_cli.sampling.resolve import Run


def make_sampler(
    run: Run,
    network: SamplingNetwork | Network,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int] | None = None,
    keeps_x0: bool = True,
    warn: Callable[[str], None] = lambda text: None,
) -> Sampler:
    """What the denoising loop needs.

    ``shape`` (C, H, W) is of a state of a network from outside. ``warn`` is told of prompts that are too long.

    Raises:
        ConfigError: for a grid whose coefficients cannot be computed.
    """
    settings = run.config.sampling

    @cache
    def passes(begin: int, inverse: bool, guidance_scale: float | None) -> Pass:
        scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        step = _step_network(run, network, scale)
        return _make_pass(run, solver_of(settings, inverse), step, device, begin)

    latents = run.described.latents if run.described is not None else None
    reclaim = partial(reclaim_memory, device) if latents is not None and offloads(run, device, dtype) else None
    decoder, condition = Decoder(), _class_condition(run)
    if latents is not None:
        decoder = AutoencoderDecoder(latents, device, run.config.runtime.tile, reclaim)
    if latents is not None and latents.text is not None:
        assert isinstance(network, TextNetwork)
        condition = _text_condition(run, network, latents.text, device, dtype, warn, reclaim)
    state = shape if shape is not None else run.model.state_shape
    return Sampler(
        down=passes(0, False, None),
        passes=passes,
        shape=state,
        picture_shape=run.described.shape if run.described is not None else state,
        device=device,
        dtype=dtype,
        condition=condition,
        decoder=decoder,
        keeps_x0=keeps_x0,
        resample=settings.resample,
        inpaints=run.described is not None and run.model.inpaints,
    )


def _class_condition(run: Run) -> Condition:
    return ClassCondition() if run.takes_classes else Condition()


def _text_condition(
    run: Run,
    network: TextNetwork,
    parts: TextParts,
    device: torch.device,
    dtype: torch.dtype,
    warn: Callable[[str], None],
    reclaim: Callable[[], None] | None,
) -> TextCondition:
    told: set[str] = set()

    def on_cut(prompt: str, left_out: str) -> None:
        if prompt not in told:
            told.add(prompt)
            warn(
                f"the prompt {shortened(prompt, 60)!r} has more than the {encoder.limit - 2} tokens that the model "
                f"takes, and its end has no effect: {shortened(left_out, 200)!r}"
            )

    @torch.no_grad()
    def attend(text: Tensor) -> Tensor:
        return network.attend(text.to(device, dtype))

    encoder = TextEncoder(parts, device)
    return TextCondition(encoder, attend, run.config.sampling.guidance_scale != 1, on_cut, reclaim)


def _make_pass(
    run: Run, solver: Solver, step: Callable[[Tensor], StepNetwork], device: torch.device, begin: int
) -> Pass:
    """The pass over the grid from step ``begin`` on."""
    config = run.config
    table = solver.table(config.scheduler, config.sampling, run.timesteps[begin:], device)
    asked = starting_timesteps(run, table) if solver.inverse else table.timesteps
    return Pass(
        network=step(asked),
        table=table,
        refinement=_refinement(run, step, device) if solver.inverse and config.sampling.refine else None,
        treatment=solver.treatment(config.scheduler, config.sampling),
        solver=solver,
        draws_noise=not solver.inverse and config.sampling.draws_noise,
    )


def _refinement(run: Run, step: Callable[[Tensor], StepNetwork], device: torch.device) -> Refinement:
    """What undoes the steps down: their network, asked where they start, and their table."""
    config = run.config
    down = make_table(config.scheduler, config.sampling, run.timesteps, device).reversed()
    return Refinement(step(down.timesteps), down, config.sampling.refine)


def _step_network(
    run: Run, network: SamplingNetwork | Network, guidance_scale: float
) -> Callable[[Tensor], StepNetwork]:
    """Timesteps int64 [N] -> the network by step, guided where ``guidance_scale`` is not 1."""
    settings, null_class = run.config.sampling, run.config.model.null_class
    if isinstance(network, TextNetwork):
        text_network = network

        def with_text(timesteps: Tensor) -> StepNetwork:
            step = with_projections(text_network, timesteps)
            if run.model.inpaints:
                step = with_channels(step)
            if guidance_scale == 1:
                return step
            return with_text_guidance(step, guidance_scale, settings.guidance_rescale)

        return with_text
    if isinstance(network, SamplingNetwork):
        if not run.takes_classes:
            return partial(with_projections, network)
        network = as_network(network)
    if guidance_scale != 1:
        assert null_class is not None  # refused when the run was settled
        network = with_guidance(network, null_class, guidance_scale, settings.guidance_rescale)
    return partial(at_steps, network)


def starting_timesteps(run: Run, table: StepTable[Any]) -> Tensor:
    """At which timestep each step of an inverse table asks the network: that of the level at which it starts.

    So a step up is Euler's step of the ODE (DDIM, eq. 13), as a step down is. A picture without noise is asked about at
    timestep 0, the level nearest to it; a network that embeds log t, at the lowest of the grid. int64 [N] on the
    table's device.
    """
    embeds_log = run.described is not None and run.described.network.get("time_embedding_type") == "fourier"
    lowest = run.timesteps[-1] if embeds_log else 0
    return table.timesteps.new_tensor([lowest if t < 0 else t for t in table.prev_timesteps])
