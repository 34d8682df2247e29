"""What a run tells whoever watches it. Needs no torch, so that progress bars can inherit it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddim_cli.sampling.job import Job
    from ddim_cli.sampling.product import Product


class Reporter:
    """Is told what a run is doing. This one says nothing."""

    def loading(self, job: Job) -> None:
        """The weights are about to be loaded."""

    def compiling(self, name: str, rows: int) -> None:
        """The network of the model ``name`` is about to be compiled for batches of ``rows`` rows."""

    def sweeping(self, image_steps: int, cells: int) -> None:
        """A sweep begins; of its cells, ``image_steps`` is the sum of images to make times steps."""

    def cell(self, number: int, title: str) -> None:
        """The job of cell ``number`` of a sweep, from 1 on, is next."""

    def started(self, job: Job, product: Product, todo: int) -> None:
        """Sampling begins; ``todo`` of the job's items are to be made."""

    def step(self, done: int) -> None:
        """A step of the current batch has been launched; ``done`` of them so far."""

    def batch(self, images: int) -> None:
        """A batch of this many images has been handed to the writers."""

    def note(self, text: str) -> None:
        """Something that a person who looks closer wants to know."""

    def warn(self, text: str) -> None:
        """Something that makes other pictures than were asked for, without being wrong."""

    def slower(self, what: str, why: str) -> None:
        """Something runs slower than it could: to be said once, and why to a person who looks closer."""

    def halved(self, batch_size: int) -> None:
        """Memory did not suffice; from here on batches are of this size."""

    def stopped(self) -> None:
        """No more of the above follows."""

    def interrupted(self) -> None:
        """Ctrl-C: what was denoised is being written."""

    def closing(self, what: str) -> None:
        """All is made; something that takes a while follows."""

    def waiting_for_others(self, job: Job, product: Product) -> None:
        """Under torchrun: this rank's own items are made, those of others are not yet."""

    def others_done(self, there: int, planned: int) -> None:
        """Under torchrun: of the whole plan, so many items are there; no more are waited for."""
