"""What all pictures of a run have in common: the sections that every sidecar and run.json share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ddim_cli.config.schema import SamplingSettings
from ddim_cli.models.conditions import Blend, Conditioning
from ddim_cli.outputs.sidecar import EDIT, ROW
from ddim_cli.sampling.items import Item
from ddim_cli.sampling.outside import describe_callable
from ddim_cli.sampling.resolve import Run
from ddim_cli.stores.objects import is_url

# Which pictures a plan has, and where its files go, say nothing about one picture.
_OF_THE_PLAN = {"num_images", "seed", "seeds", "batch_size"}
# What every sidecar has, whatever its value; and what has a meaning with guidance alone.
_ALWAYS = ("steps", "eta", "timesteps", "variance", "use_clipped_model_output")
# What has a meaning for latent models alone.
_OF_LATENTS = {"offload", "tile"}
# Settings that came later: a record has them where they are not their defaults, so that those of before stay the same.
_LATER = {"order", "refine", "resample", "variation_strength"}
_OF_GUIDANCE = ("guidance_scale", "guidance_rescale")


def sampling_record(run: Run) -> dict[str, Any]:
    """The section ``sampling``: what was asked for where it is not the default, and the timesteps that ran."""
    settings = run.config.sampling
    record = {key: getattr(settings, key) for key in _ALWAYS}
    record["steps"] = settings.steps if settings.timesteps is None else len(run.timesteps)
    record["timesteps"] = list(run.timesteps)
    for key, field in SamplingSettings.model_fields.items():
        value = getattr(settings, key)
        if key not in record and key not in _OF_THE_PLAN and key not in _OF_GUIDANCE and value != field.default:
            record[key] = value
    if not settings.variation_strength:
        # Nothing is turned towards it.
        record.pop("variation_seed", None)
    if isinstance(settings.prompt, tuple):
        # `prompt` is that of one picture, as `class` is.
        record["prompts"] = list(record.pop("prompt"))
    if run.init is not None:
        record |= run.init.about
    if settings.guidance_scale != 1 and not run.of_edits:
        record |= {key: getattr(settings, key) for key in _OF_GUIDANCE}
        if run.config.model.null_class is not None or run.takes_classes:
            record["null_class"] = run.config.model.null_class
    else:
        # Without guidance nothing is led away from.
        record.pop("negative_prompt", None)
    if run.of_edits:
        # As of rows: what an edit says of itself takes its place.
        record[EDIT] = {}
        for key in ("mask", "negative_prompt"):
            record.pop(key, None)
        if settings.guidance_rescale:
            record["guidance_rescale"] = settings.guidance_rescale
        if run.config.model.null_class is not None:
            record["null_class"] = run.config.model.null_class
    if run.of_rows:
        # What a row says of itself takes its place.
        record[ROW] = {}
    return record


def config_record(run: Run) -> dict[str, Any]:
    """The resolved config of one picture: enough to make it again, given its seed and the network."""
    settings, pixels = run.config.sampling, run.described is None or run.described.latents is None
    defaults = {key for key in _LATER if getattr(settings, key) == SamplingSettings.model_fields[key].default}
    sampling = _OF_THE_PLAN | defaults
    left_out: Any = {"sampling": sampling, "output": True, **({"runtime": _OF_LATENTS} if pixels else {})}
    config = run.config.model_dump(mode="json", exclude=left_out, exclude_none=True)
    if run.described is None:
        # A network from outside was handed over: of [model] only what bears on how it was called is about it.
        config["model"] = {key: config["model"][key] for key in ("null_class",) if key in config["model"]}
    return config


def model_record(run: Run, outside: Callable[..., Any] | None = None) -> dict[str, Any]:
    """The section ``model``, without what only the loaded network knows; of one from ``outside`` what it tells."""
    if run.described is None:
        unknown = dict.fromkeys(("revision", "class", "parameters", "sha256", "config_sha256"))
        return {"source": None, "kind": "callable", **unknown, **(describe_callable(outside) if outside else {})}
    # Where a relative source was, so that replay finds it from any folder.
    local = run.model.kind in ("directory", "checkpoint", "file") and not is_url(run.model.source)
    return {
        "source": run.model.source,
        **({"path": os.path.abspath(run.model.where)} if local else {}),
        "kind": run.model.kind,
        "revision": run.model.revision,
        "class": run.model.network_class,
        "parameters": run.model.all_parameters,
        "sha256": run.model.sha256,
        "config_sha256": run.model.config_sha256,
    }


def make_record(run: Run, runtime: Mapping[str, Any], outside: Callable[..., Any] | None = None) -> dict[str, Any]:
    """The shared sections, in the order in which they are written; ``outside`` is the network if no model was named."""
    return {
        "sampling": sampling_record(run),
        "scheduler": run.config.scheduler.model_dump(mode="json"),
        "model": model_record(run, outside),
        "runtime": dict(runtime),
        "config": config_record(run),
    }


def item_record(record: Mapping[str, Any], item: Item, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The sections of an item's sidecar: those of its run's ``record``, its condition, and what it says besides.

    ``known`` is what only the encoder of its condition knows, such as the number of its prompt's tokens.
    """
    own = {**own_record(item, record["sampling"]), **(known or {})}
    if not own:
        return dict(record)
    return {**record, "sampling": {**record["sampling"], **own}}


def own_record(item: Item, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What the section ``sampling`` of an item's sidecar says besides that of its run."""
    return {**condition_record(item.conditioning, sampling), **item.about}


def condition_record(conditioning: Conditioning, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What ``sampling`` says of the class or the prompt of one picture."""
    record: dict[str, Any] = {}
    if conditioning.class_number is not None:
        record["class"] = conditioning.class_number
    if isinstance(conditioning.prompt, Blend):
        record["between_prompts"] = {"prompts": list(conditioning.prompt.prompts), "weight": conditioning.prompt.weight}
    elif conditioning.prompt is not None:
        record["prompt"] = conditioning.prompt
    scale = conditioning.guidance_scale
    if scale is not None:
        record["guidance_scale"] = scale
    guided = "guidance_scale" in sampling if scale is None else scale != 1
    if conditioning.negative_prompt and guided:
        record["negative_prompt"] = conditioning.negative_prompt
    return record
