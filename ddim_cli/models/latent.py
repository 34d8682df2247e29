"""Latent models (Rombach et al., arXiv:2112.10752): which parts a pipeline has beside its network, and their scale.

Known from JSON files alone, as all of a description is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddim_cli.config.schema import ModelSettings
from ddim_cli.errors import ModelError
from ddim_cli.models.directory import PIPELINE
from ddim_cli.models.networks import TEXT_NETWORK_CLASS, Size, checked_network, checked_text_network, is_for_inpainting
from ddim_cli.models.parts import Files, Part, TextParts, find_part, find_tokenizer, read_json

AUTOENCODERS = ("AutoencoderKL", "VQModel")
# Where pipelines keep it: Stable Diffusion, and unconditional latent diffusion.
FOLDERS = ("vae", "vqvae")
# What diffusers' autoencoders have where their config does not say.
DEFAULT_SCALE = 0.18215
_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
}
_LATENT_CHANNELS = {"AutoencoderKL": 4, "VQModel": 3}
# What a pipeline may name besides: it has no part in sampling.
_UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}
_KNOWN = {"unet", "scheduler", "text_encoder", "tokenizer", *FOLDERS, *_UNUSED}
TEXT_STEMS = ("model", "pytorch_model")


@dataclass(frozen=True)
class Latents:
    """What makes pictures of a network's states and, of a text-to-image model, conditions of prompts.

    A state is the autoencoder's latents times ``scale``; ``factor`` is by how much an image is larger than its state
    along each side, ``picture_channels`` its channels.
    """

    autoencoder: Part
    scale: float
    factor: int
    picture_channels: int
    text: TextParts | None = None

    def sha256s(self) -> list[str]:
        """Of all parts beside the network that decide a picture."""
        text = [] if self.text is None else [self.text.encoder.weights_sha256, self.text.tokenizer.sha256]
        return [self.autoencoder.weights_sha256, *text]

    def weighted_parts(self) -> dict[str, Part]:
        """The parts beside the network that have weights, under the names that diffusers' pipeline has for them."""
        if self.text is None:
            return {"vqvae": self.autoencoder}
        return {"vae": self.autoencoder, "text_encoder": self.text.encoder}

    def configs(self) -> dict[str, Any]:
        parts = {"autoencoder": self.autoencoder}
        if self.text is not None:
            parts["text_encoder"] = self.text.encoder
        return {name: {k: v for k, v in part.config.items() if not k.startswith("_")} for name, part in parts.items()}

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.weighted_parts().values())


def find_latents(
    tree: Files, root: str, network: Mapping[str, Any], settings: ModelSettings, where: str
) -> tuple[Latents, tuple[str, ...]] | None:
    """The parts of a latent model in ``root`` of a tree, and what a user should be told; None of a pixel-space model.

    ``network`` is its network's config.

    Raises:
        ModelError: for parts that are missing, or that are not known.
    """
    index = _read_index(tree, root)
    listed = {k for k, v in index.items() if isinstance(v, list) and any(v)}
    takes_text = network.get("_class_name") == TEXT_NETWORK_CLASS
    there = next((f for f in FOLDERS if any(file.startswith(_in(root, f) + "/") for file in tree.files)), None)
    folder = there or next((f for f in FOLDERS if f in listed), None)
    if folder is None and not takes_text:
        return None
    unknown = sorted(listed - _KNOWN)
    if unknown:
        raise ModelError(
            f"{where}: it is a {index.get('_class_name')}, whose {', '.join(unknown)} this tool does not know; it "
            "samples from Stable Diffusion 1 and 2 and from unconditional latent diffusion"
        )
    if folder is None:
        raise ModelError(f"{where}: a part of the pipeline is missing: there is no vae")
    part = find_part(tree, _in(root, folder), settings.variant, where)
    text = None
    if takes_text:
        encoder = find_part(tree, _in(root, "text_encoder"), settings.variant, where, TEXT_STEMS)
        if encoder.class_name != "CLIPTextModel":
            raise ModelError(f"{encoder.where}: the text encoder is a {encoder.class_name}, not a CLIPTextModel")
        text = TextParts(encoder, find_tokenizer(tree, _in(root, "tokenizer"), where))
    elif "text_encoder" in listed:
        raise ModelError(f"{where}: it takes text, but its network is not a {TEXT_NETWORK_CLASS}")
    notes = []
    scale = settings.latent_scale
    if scale is None:
        scale = part.config.get("scaling_factor")
        if scale is None:
            scale = DEFAULT_SCALE
            if part.class_name == "VQModel":
                notes.append(
                    f"{where}: its autoencoder's config does not say by what latents are scaled; {DEFAULT_SCALE} is "
                    "taken, as diffusers does; models of the original latent diffusion need model.latent_scale = 1"
                )
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not scale > 0:
        raise ModelError(f"{part.where}: scaling_factor is {json.dumps(scale)}; it must be a positive number")
    facts = _checked_autoencoder(part, network)
    levels, channels = facts["block_out_channels"], facts["out_channels"]
    return Latents(part, float(scale), 2 ** (len(levels) - 1), channels, text), tuple(notes)


def _read_index(tree: Files, root: str) -> Mapping[str, Any]:
    """The pipeline's model_index.json, empty where there is none."""
    file = _in(root, PIPELINE)
    return read_json(tree.fetch(file), "the pipeline's index") if file in tree.files else {}


def _in(root: str, folder: str) -> str:
    return f"{root}/{folder}" if root else folder


def _checked_autoencoder(part: Part, network: Mapping[str, Any]) -> dict[str, Any]:
    """The autoencoder's config with what is needed filled in. Raises ModelError for one that does not fit."""
    if part.class_name not in AUTOENCODERS:
        raise ModelError(f"{part.where}: the autoencoder is a {part.class_name}, not one of {', '.join(AUTOENCODERS)}")
    config = {**_DEFAULTS, "latent_channels": _LATENT_CHANNELS[part.class_name], **part.config}
    widths, channels = config["block_out_channels"], config["out_channels"]
    if not (isinstance(widths, (list, tuple)) and widths):
        raise ModelError(f"{part.where}: block_out_channels is {json.dumps(widths)}; it must be a list of channels")
    if channels not in (1, 3, 4):
        raise ModelError(f"{part.where}: the autoencoder makes {channels} channels; a picture has 1, 3 or 4")
    takes_text = network.get("_class_name") == TEXT_NETWORK_CLASS
    states = network.get("in_channels", 4 if takes_text else 3)
    if takes_text and is_for_inpainting(network):
        states = states // 2
    if config["latent_channels"] != states:
        raise ModelError(
            f"{part.where}: latents have {config['latent_channels']} channels, and the network takes {states}"
        )
    return config


def checked_latent_network(
    config: Mapping[str, Any], latents: Latents, image_size: Size | None, where: str
) -> dict[str, Any]:
    """A latent model's network config, for states of pictures of ``image_size``, by default of its own.

    Raises:
        ModelError: for one that cannot be sampled from, and a size that is no multiple of the autoencoder's factor.
    """
    size = None
    if image_size is not None:
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if any(side % latents.factor for side in sides):
            raise ModelError(
                f"{where}: an image of {sides[0]} x {sides[1]} cannot be made: its sides must be multiples of "
                f"{latents.factor}, by which the autoencoder enlarges"
            )
        size = [side // latents.factor for side in sides]
    if latents.text is None:
        return checked_network(config, size, where, in_pixels=False)
    network = checked_text_network(config, size, where)
    taken, width = network["cross_attention_dim"], latents.text.width
    if any(each != width for each in (taken if isinstance(taken, (list, tuple)) else [taken])):
        raise ModelError(
            f"{where}: the network takes texts of {json.dumps(taken)} channels (cross_attention_dim), and the text "
            f"encoder gives {width}"
        )
    return network


def pipeline_scheduler(
    scheduler: Mapping[str, Any], latents: Latents, where: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the pipeline makes of its scheduler's config, as `ModelDescription` has it, and what a user should be told.

    Of text-to-image models diffusers' pipeline sets steps_offset to 1 and clip_sample to false, whatever is written.

    Raises:
        ModelError: where there is none.
    """
    keys = scheduler.get("scheduler")
    if keys is None:
        raise ModelError(f"{where}: a part of the pipeline is missing: there is no scheduler/scheduler_config.json")
    if latents.text is None:
        return dict(scheduler), ()
    forced = {"steps_offset": 1, "clip_sample": False}
    changed = [f"{key} = {json.dumps(value)}" for key, value in forced.items() if keys.get(key, value) != value]
    note = f"{where}: its scheduler's config is read with {' and '.join(changed)}, as StableDiffusionPipeline does"
    return {**scheduler, "scheduler": {**keys, **forced}}, (note,) if changed else ()
