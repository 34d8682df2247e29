"""Conditions: what a network takes beside x and the timestep, once a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddim_cli.models.text import TextEncoder


@dataclass(frozen=True)
class Blend:
    """A text between two prompts: their embeddings, weighted linearly from 0 (the first) to 1 (the second)."""

    prompts: tuple[str, str]
    weight: float


@dataclass(frozen=True)
class Conditioning:
    """What one picture is conditioned on: a class, a text and what to lead away from; None where there is none.

    ``guidance_scale`` is how strongly, None for as strongly as the run says.
    """

    class_number: int | None = None
    prompt: str | Blend | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None


NOTHING = Conditioning()


class Condition:
    """From what a batch is conditioned on to what the network takes after x and the step: nothing, if it takes none."""

    def of(self, wanted: Sequence[Conditioning], device: torch.device) -> tuple[Tensor, ...]:
        """One tensor a kind of condition, each with as many rows for every entry of ``wanted``, in its order."""
        return ()

    def prepare(self) -> None:
        """Load what `of` needs, where it is to stay in memory. Raises ModelError."""

    def facts(self, wanted: Conditioning) -> Mapping[str, Any]:
        """What the sidecar's section ``sampling`` says of a picture's condition that only its encoder knows."""
        return {}


class ClassCondition(Condition):
    """The class of each picture, int64 [B]."""

    def of(self, wanted: Sequence[Conditioning], device: torch.device) -> tuple[Tensor, ...]:
        import torch

        return (torch.tensor([each.class_number for each in wanted], dtype=torch.int64, device=device),)


class TextCondition(Condition):
    """What the network takes of each picture's prompt, [B, L, K]; ``guided``, [2 B, L, K], negative prompts first.

    A batch whose pictures have a guidance scale of their own is guided if that is not 1; all of them have the same.

    ``attend`` makes it of a text's embedding [1, L, D], which is in float32: for our own network the keys and values of
    its cross-attention, so that no step computes them again. Each text is encoded alone: no picture depends on others
    of its batch. ``on_cut`` is told of a prompt that is too long, and of its end, which has no effect. With ``reclaim``
    the text encoder's memory is free while the network runs.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        attend: Callable[[Tensor], Tensor],
        guided: bool,
        on_cut: Callable[[str, str], None] = lambda prompt, left_out: None,
        reclaim: Callable[[], None] | None = None,
    ):
        self._encoder, self._attend, self._guided = encoder, attend, guided
        self._on_cut, self._reclaim = on_cut, reclaim
        self._counts: dict[str, int] = {}

    def of(self, wanted: Sequence[Conditioning], device: torch.device) -> tuple[Tensor, ...]:
        import torch

        prompts = [each.prompt if each.prompt is not None else "" for each in wanted]
        scale = wanted[0].guidance_scale
        guided = self._guided if scale is None else scale != 1
        negatives: list[str | Blend] = [each.negative_prompt or "" for each in wanted] if guided else []
        texts = [*negatives, *prompts]
        self._counts = {}
        found = {text: self._attend(self._embedded(text)) for text in dict.fromkeys(texts)}
        if self._reclaim is not None:
            self._encoder.release()
            self._reclaim()
        return (torch.cat([found[text] for text in texts]).to(device),)

    def _embedded(self, text: str | Blend) -> Tensor:
        if isinstance(text, Blend):
            first, second = (self._embedded(prompt) for prompt in text.prompts)
            return first.lerp(second, text.weight)
        embedding, tokens = self._encoder.encode(text)
        self._counts[text] = tokens.count
        if tokens.left_out:
            self._on_cut(text, tokens.left_out)
        return embedding

    def prepare(self) -> None:
        if self._reclaim is None:
            self._encoder.load()

    def facts(self, wanted: Conditioning) -> Mapping[str, Any]:
        """The number of tokens of the prompt, of one of the last batch."""
        return {"tokens": self._counts[wanted.prompt]} if wanted.prompt in self._counts else {}
