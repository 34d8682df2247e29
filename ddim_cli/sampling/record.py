"""What all pictures of a run have in common: the sections that every sidecar and run.json share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ddim_cli.sampling.outside import describe_callable
from ddim_cli.sampling.resolve import Run

# Which seeds a plan has, and where its files go, say nothing about one picture.
_NOT_OF_A_PICTURE = {"sampling": {"num_images", "seed", "seeds", "batch_size"}, "output": ...}


def sampling_record(run: Run) -> dict[str, Any]:
    """The section ``sampling``: what was asked for, and the timesteps that ran."""
    settings = run.config.sampling
    record = {
        "steps": settings.steps if settings.timesteps is None else len(run.timesteps),
        "eta": 1.0 if settings.variance == "large" else settings.eta,
        "timesteps": list(run.timesteps),
        "variance": settings.variance,
        "use_clipped_model_output": settings.use_clipped_model_output,
    }
    if settings.classes is not None:
        record["classes"] = settings.classes
    if settings.guidance_scale != 1:
        record["guidance_scale"] = settings.guidance_scale
        record["guidance_rescale"] = settings.guidance_rescale
        record["null_class"] = run.config.model.null_class
    return record


def config_record(run: Run) -> dict[str, Any]:
    """The resolved config of one picture: enough to make it again, given its seed and the network."""
    config = run.config
    found = config.model_dump(mode="json", exclude=_NOT_OF_A_PICTURE, exclude_none=True)
    if config.sampling.variance == "large":
        found["sampling"]["eta"] = 1.0
    if run.model is None:
        # A network from outside was handed over: of [model] only what bears on how it was called is about it.
        found["model"] = {key: found["model"][key] for key in ("null_class",) if key in found["model"]}
    return found


def model_record(run: Run, outside: Callable[..., Any] | None = None) -> dict[str, Any]:
    """The section ``model``, without what only the loaded network knows; of one from ``outside`` what it tells."""
    if run.model is None:
        unknown = dict.fromkeys(("revision", "class", "parameters", "sha256", "config_sha256"))
        return {"source": None, "kind": "callable", **unknown, **(describe_callable(outside) if outside else {})}
    # Where a relative source was, so that replay finds it from any folder.
    local = run.model.kind in ("directory", "checkpoint", "file")
    return {
        "source": run.model.source,
        **({"path": os.path.abspath(run.model.where)} if local else {}),
        "kind": run.model.kind,
        "revision": run.model.revision,
        "class": "UNet2DModel",
        "parameters": run.model.parameters,
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
