"""What the loop calls in every step, made from whatever network there is, compiled code where that pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ddim_cli.errors import DdimError
from ddim_cli.models.describe import ModelDescription
from ddim_cli.models.load import SamplingNetwork, load_sampling_network
from ddim_cli.sampling import compiled
from ddim_cli.sampling.compiled import Target

# (x [B, C, H, W], timesteps int64 [B]) -> the network's output [B, C, H, W]; a conditional one takes classes int64 [B]
Network = Callable[..., Tensor]
# The same with the step i of the grid, an int or int64 [1] on the device, in place of the timesteps
StepNetwork = Callable[..., Tensor]


def _row(rows: Tensor, i: int | Tensor) -> Tensor:
    """Row ``i`` as [1, ...], without asking the device for the number."""
    return rows[i : i + 1] if isinstance(i, int) else rows.index_select(0, i)


def as_network(network: SamplingNetwork) -> Network:
    """Both parts as one: (x, timesteps[, classes]) -> output."""

    def whole(x: Tensor, timesteps: Tensor, *classes: Tensor) -> Tensor:
        return network.body(x, network.project(timesteps, *classes))

    return whole


def at_steps(network: Network, timesteps: Tensor) -> StepNetwork:
    """A network by timestep, int64 [N], as one by step."""

    def step(x: Tensor, i: int | Tensor, *classes: Tensor) -> Tensor:
        return network(x, _row(timesteps, i).expand(len(x)), *classes)

    return step


@torch.no_grad()
def with_projections(network: SamplingNetwork, timesteps: Tensor) -> StepNetwork:
    """An unconditional network as one by step: what depends on the timestep alone is computed here, for all of them."""
    projections = network.project(timesteps)

    def step(x: Tensor, i: int | Tensor) -> Tensor:
        return network.body(x, _row(projections, i))

    return step


def load_network(
    target: Target,
    setting: bool | Literal["auto"],
    calls: int,
    compiling: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
    load: Callable[[ModelDescription, torch.device, torch.dtype], SamplingNetwork] = load_sampling_network,
) -> tuple[SamplingNetwork, bool]:
    """The network of ``target``, and whether it is compiled code.

    ``setting`` is runtime.compile: True takes kept code or builds it; "auto" builds it only if ``calls`` of the
    network earn the build back, and runs uncompiled, saying so to ``note``, if that fails. ``compiling`` is called
    before a build; ``load`` loads the weights where kept code is not found.

    Raises:
        ModelError: for weights that cannot be loaded.
        UsageError: with ``setting`` True, where there is no C++ compiler.
        RunError: with ``setting`` True, where the build fails.
    """
    if setting is not False:
        found = compiled.find(target)
        if found is not None:
            return found, True
    if setting is True:
        compiling()
        return compiled.build(target), True
    network = load(target.model, target.device, target.dtype)
    if setting == "auto" and compiled.earns_its_build(target, calls, network):
        if compiled.compiler() is None:
            note("there is no C++ compiler: the network runs uncompiled")
            return network, False
        compiling()
        try:
            return compiled.build(target), True
        except DdimError as error:
            note(f"{error}; it runs uncompiled")
    return network, False
