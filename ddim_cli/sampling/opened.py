"""A run whose network is loaded, for programs: it makes pictures of whatever items it is given, without files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ddim_cli.models.load import LoadedModel, SamplingNetwork, as_sampling_network
from ddim_cli.models.text import check_installed
from ddim_cli.outputs.sidecar import describe_picture
from ddim_cli.sampling.items import Item
from ddim_cli.sampling.job import network_target, rows_an_image
from ddim_cli.sampling.loop import Denoiser, Picture, run_batches
from ddim_cli.sampling.network import Network, Networks, Use
from ddim_cli.sampling.outside import guarded
from ddim_cli.sampling.precision import choose_batch_size, halve_to_fit, runtime_record, tf32
from ddim_cli.sampling.record import item_record, make_record
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.resolve import Run
from ddim_cli.sampling.rows import RowItems
from ddim_cli.sampling.sampler import make_sampler

# Of rows that cannot all share batches: enough for most batches to be full, few enough to wait for.
BATCHES_AT_A_TIME = 16


@dataclass
class OpenRun:
    """What makes the pictures of items, for as long as there are some.

    ``batch_size`` is how many rows the network sees at a time, halved once memory does not suffice; ``record`` has the
    sections that all sidecars share; ``tf32`` is what torch's switches of it are while a batch is sampled; ``warned``
    is what there is to warn of since it was last emptied.
    """

    denoiser: Denoiser
    batch_size: int
    record: Mapping[str, Any]
    tf32: bool
    warned: list[str] = field(default_factory=list)

    def batches(self, plan: Sequence[Item]) -> Iterator[list[Picture]]:
        """The pictures of a plan in its order, a batch at a time. Raises as `run_batches`."""
        made = self._in_order(plan)
        while True:
            # Around a batch and not around all: between two pictures the caller's program runs.
            with tf32(self.tf32):
                pictures = next(made, None)
            if pictures is None:
                return
            yield pictures

    def _in_order(self, plan: Sequence[Item]) -> Iterator[list[Picture]]:
        """Rows of several kinds are sampled by kind, some batches at a time."""
        if not isinstance(plan, RowItems) or plan.kinds is None:
            yield from self._made(plan)
            return
        step = BATCHES_AT_A_TIME * self.batch_size
        for start in range(0, len(plan), step):
            part = plan[start : start + step]
            places = {item.name: place for place, item in enumerate(part)}
            pictures = [picture for batch in self._made(part.by_kind()) for picture in batch]
            yield sorted(pictures, key=lambda picture: places[picture.item.name])

    def _made(self, plan: Sequence[Item]) -> Iterator[list[Picture]]:
        return run_batches(self.denoiser, plan, self.batch_size, on_halved=self._halved)

    def _halved(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def describe(self, picture: Picture) -> dict[str, Any]:
        """The content of a picture's sidecar, without what is about its file; the caller's own."""
        said = item_record(self.record, picture.item, picture.known)
        return copy.deepcopy(describe_picture(said, picture.item.seed, picture.pixels, picture.batch_size))


def open_run(
    run: Run,
    device: torch.device,
    dtype: torch.dtype,
    most: int,
    images: int,
    given: LoadedModel | Network | None = None,
    shape: tuple[int, int, int] | None = None,
    keeps_x0: bool = True,
) -> OpenRun:
    """Load the network of a run, unless it is ``given``, and settle the batch size.

    Args:
        most: how many items a batch could hold at most.
        images: how many there are in all: whether compiled code would pay; 0 takes none that is not there already.
        given: a network in place of the run's model: a loaded one, or one from outside, whose state has ``shape``
            (C, H, W).
        keeps_x0: whether pictures carry x0 beside their pixels.

    Raises:
        UsageError: for a package that is missing.
        ConfigError: for coefficients that cannot be computed.
        ModelError: for weights that cannot be loaded.
    """
    outside = None if given is None or isinstance(given, LoadedModel) else given
    if outside is None and run.model.takes_text:
        check_installed()
    settings = run.config.runtime
    batch_size = choose_batch_size(run.config.sampling.batch_size, most, run.described, device, dtype)
    batch_size = halve_to_fit(batch_size, run.described, device, dtype, rows_an_image(run))
    network: SamplingNetwork | Network
    compiled = False
    warned: list[str] = []
    with tf32(settings.tf32):
        if isinstance(given, LoadedModel):
            network = as_sampling_network(given)
        elif outside is not None:
            network = guarded(outside)
        else:
            calls = -(-images // batch_size) * len(run.timesteps)
            use = Use(network_target(run, device, dtype, batch_size), settings.compile, calls)
            network, compiled = Networks().load(use, Reporter())
        sampler = make_sampler(run, network, device, dtype, shape, keeps_x0, warned.append)
    denoiser = Denoiser(sampler, on_slower=lambda what, why: warned.append(f"{what}: {why}"))
    record = make_record(run, runtime_record(settings, device, dtype, batch_size, compiled), outside)
    return OpenRun(denoiser, batch_size, record, settings.tf32, warned)
