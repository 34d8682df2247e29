"""Conditions: what a network takes beside x and the timestep, once a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Condition:
    """From the items of a batch to what the network takes after x and the step: nothing, if it is unconditional."""

    def of(self, class_numbers: Sequence[int | None], device: torch.device) -> tuple[Tensor, ...]:
        """One tensor a kind of condition, each with a row an item."""
        return ()


class ClassCondition(Condition):
    """The class of each item, int64 [B]."""

    def of(self, class_numbers: Sequence[int | None], device: torch.device) -> tuple[Tensor, ...]:
        return (torch.tensor(class_numbers, dtype=torch.int64, device=device),)
