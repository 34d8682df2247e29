"""What the loop calls in every step, made from whatever network there is, compiled code where that pays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ddim_cli.errors import DdimError
from ddim_cli.models.load import SamplingNetwork, load_sampling_network
from ddim_cli.sampling import compiled
from ddim_cli.sampling.compiled import Target
from ddim_cli.sampling.reporter import Reporter

# (x [B, C, H, W], timesteps int64 [B]) -> the network's output [B, C, H, W]; a conditional one takes classes int64 [B]
Network = Callable[..., Tensor]
# The same with the step i of the grid, int64 [1] on the device, in place of the timesteps
StepNetwork = Callable[..., Tensor]


def as_network(network: SamplingNetwork) -> Network:
    """Both parts as one: (x, timesteps[, classes]) -> output."""

    def whole(x: Tensor, timesteps: Tensor, *classes: Tensor) -> Tensor:
        return network.body(x, network.project(timesteps, *classes))

    return whole


def at_steps(network: Network, timesteps: Tensor) -> StepNetwork:
    """A network by timestep, int64 [N], as one by step."""

    def step(x: Tensor, i: Tensor, *classes: Tensor) -> Tensor:
        return network(x, timesteps.index_select(0, i).expand(len(x)), *classes)

    return step


@torch.no_grad()
def with_projections(network: SamplingNetwork, timesteps: Tensor) -> StepNetwork:
    """A network as one by step: what depends on the timestep alone is computed here, for all of them.

    Of a network without classes; one that takes text is given it with every call.
    """
    projections = network.project(timesteps)

    def step(x: Tensor, i: Tensor, *context: Tensor) -> Tensor:
        return network.body(x, projections.index_select(0, i), *context)

    return step


def with_channels(network: StepNetwork) -> StepNetwork:
    """A network for inpainting, given as the last of its conditions what it takes as channels behind x."""

    def step(x: Tensor, i: Tensor, *context: Tensor) -> Tensor:
        *others, channels = context
        return network(torch.cat([x, channels.to(x.dtype)], dim=1), i, *others)

    return step


@dataclass(frozen=True)
class Use:
    """What a network is wanted for: ``calls`` of it tell whether a build of compiled code would pay.

    ``setting`` is runtime.compile: True takes kept code or builds it; "auto" builds it only if the calls earn the
    build back, and runs uncompiled, with a note, where that fails.
    """

    target: Target
    setting: bool | Literal["auto"]
    calls: int


@dataclass
class Networks:
    """Loads networks, each once for as long as one use after the other has the same.

    ``planned`` are all uses that follow: whether compiled code pays is judged by all that would use it.
    """

    planned: Iterable[Use] = ()
    _weights: tuple[Any, SamplingNetwork] | None = field(default=None, init=False)
    _last: tuple[Any, tuple[SamplingNetwork, bool]] | None = field(default=None, init=False)

    def load(self, use: Use, reporter: Reporter) -> tuple[SamplingNetwork, bool]:
        """The network, and whether it is compiled code.

        Raises:
            ModelError: for weights that cannot be loaded.
            UsageError: with ``compile = true``, where there is no C++ compiler.
            RunError: with ``compile = true``, where the build fails.
        """
        key = (use.target, use.setting)
        if self._last is None or self._last[0] != key:
            # Nothing of the one before is to lie in memory beside the next.
            self._last = None
            self._last = (key, self._load(use, reporter))
        return self._last[1]

    def _load(self, use: Use, reporter: Reporter) -> tuple[SamplingNetwork, bool]:
        target, setting = use.target, use.setting
        if setting is not False:
            kept = compiled.find(target)
            if kept is not None:
                return kept, True
        if setting is True:
            reporter.compiling(target.model.name, target.rows)
            return compiled.build(target), True
        network = self._uncompiled(target)
        calls = sum(other.calls for other in self.planned if other.target == target) or use.calls
        if setting == "auto" and compiled.earns_its_build(target, calls, network):
            if compiled.compiler() is None:
                reporter.note("there is no C++ compiler: the network runs uncompiled")
                return network, False
            reporter.compiling(target.model.name, target.rows)
            try:
                return compiled.build(target), True
            except DdimError as error:
                reporter.note(f"{error}; it runs uncompiled")
        return network, False

    def _uncompiled(self, target: Target) -> SamplingNetwork:
        which = (target.model, target.device, target.dtype)
        if self._weights is None or self._weights[0] != which:
            self._weights = None
            self._weights = (which, load_sampling_network(*which))
        return self._weights[1]
