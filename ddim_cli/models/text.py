"""Prompts to what a text-to-image network is conditioned on: CLIP's tokenizer and text encoder, by transformers."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddim_cli.errors import ModelError, first_line
from ddim_cli.models.parts import Part, TextParts, Tokenizer
from ddim_cli.models.weights import load_into, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

# Embeddings that are kept for prompts that come again: one of Stable Diffusion 1.5 takes 236 kB.
KEPT = 256
# transformers before 5.6 had it before the names of all parameters.
_PREFIX = "text_model."


def check_installed() -> None:
    """Raise ModelError where transformers, an extra of this package, is not there."""
    if importlib.util.find_spec("transformers") is None:
        raise ModelError("text-to-image models need the package transformers: pip install 'ddim-cli[text]'")


@dataclass(frozen=True)
class Tokens:
    """A prompt as the text encoder takes it.

    ``ids`` int64 [1, L], padded to the tokenizer's limit, and ``mask`` int64 [1, L], 1 for what is no padding;
    ``count`` the tokens of the whole prompt, without the marks of begin and end; ``left_out`` the end of a prompt that
    is too long, which has no effect.
    """

    ids: Tensor
    mask: Tensor
    count: int
    left_out: str


def load_tokenizer(tokenizer: Tokenizer) -> CLIPTokenizer:
    """Raises ModelError for files that make none."""
    check_installed()
    from transformers import CLIPTokenizer

    folder = tokenizer.files[0].parent
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        # Damaged files fail in as many ways as there are formats; its own words are the best there are.
        raise ModelError(f"{tokenizer.where}: the tokenizer cannot be read: {first_line(error)}") from None


def load_text_encoder(part: Part, device: torch.device | str = "cpu") -> CLIPTextModel:
    """A CLIPTextModel in float32, for use.

    Raises:
        ModelError: for a config that builds none, or weights that do not fit it.
    """
    check_installed()
    from transformers import CLIPTextConfig, CLIPTextModel

    try:
        config = CLIPTextConfig.from_dict(dict(part.config))
        with torch.device("meta"):
            network = CLIPTextModel(config)
    except Exception as error:
        raise ModelError(f"{part.where}: its config builds no CLIPTextModel: {first_line(error)}") from None
    names = {name.removeprefix(_PREFIX): name for name in network.state_dict()}
    # Files of before have the positions 0, 1, 2 ... among the weights.
    weights = {
        names.get(name.removeprefix(_PREFIX), name): tensor.to(device, torch.float32)
        for path in part.weights
        for name, tensor in read_tensors(path)
        if not name.endswith("position_ids")
    }
    load_into(network, weights, part.weights[0])
    for module in network.modules():
        if "position_ids" in module._buffers:
            positions = torch.arange(config.max_position_embeddings, device=device)
            module._buffers["position_ids"] = positions.expand(1, -1)
    return network.eval().requires_grad_(False)


class TextEncoder:
    """The tokenizer and the text encoder of a model, loaded when they are first needed, each prompt encoded once."""

    def __init__(self, parts: TextParts, device: torch.device | str = "cpu"):
        self._parts, self._device = parts, device
        self._network: CLIPTextModel | None = None
        self._tokenizer: CLIPTokenizer | None = None
        self._kept: OrderedDict[str, tuple[Tensor, Tokens]] = OrderedDict()

    @property
    def limit(self) -> int:
        """How many tokens a prompt may have, the marks of begin and end included."""
        return self._parts.limit

    def _tokens(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._parts.tokenizer)
        return self._tokenizer

    def load(self) -> CLIPTextModel:
        """The tokenizer and the network, loaded now if they are not there yet. Raises ModelError."""
        self._tokens()
        if self._network is None:
            self._network = load_text_encoder(self._parts.encoder, self._device)
        return self._network

    def tokenize(self, prompt: str) -> Tokens:
        """As diffusers' pipelines do: cut and padded to the tokenizer's limit."""
        tokenizer = self._tokens()
        found = tokenizer(prompt, padding="max_length", max_length=self.limit, truncation=True, return_tensors="pt")
        whole = tokenizer(prompt).input_ids
        # The last token of a prompt that is cut marks its end.
        left_out = tokenizer.decode(whole[self.limit - 1 : -1]) if len(whole) > self.limit else ""
        return Tokens(found.input_ids, found.attention_mask, len(whole) - 2, left_out)

    @torch.no_grad()
    def encode(self, prompt: str) -> tuple[Tensor, Tokens]:
        """The last hidden state, float32 [1, L, D] on the device, and the tokens that it is of.

        Each prompt is encoded alone, so that none depends on another.
        """
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
            embedding, tokens = self._kept[prompt]
            return embedding.to(self._device), tokens
        network, tokens = self.load(), self.tokenize(prompt)
        masked = bool(self._parts.encoder.config.get("use_attention_mask"))
        mask = tokens.mask.to(self._device) if masked else None
        embedding = network(tokens.ids.to(self._device), attention_mask=mask)[0]
        # On the host, where there is more room.
        self._kept[prompt] = embedding.cpu(), tokens
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return embedding, tokens

    def release(self) -> None:
        """Give back the memory of the weights, which are read again when they are next needed."""
        self._network = None
