"""What a page shows of a sweep: a set of pictures a cell, the axes, and each cell's speed and score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddim_cli.config.seeds import Seeds, parse_seeds
from ddim_cli.outputs.figures import distance_text
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.report.contents import (
    Links,
    OnImage,
    PictureSet,
    add_planned,
    rate_text,
    read_set,
    section,
    seed_sources,
    settings,
)
from ddim_cli.outputs.tar_folder import open_folder

# What scores are called where there is little room.
_SHORT = {"Frechet distance": "FD", "Frechet inception distance": "FID"}


def read_cells(root: Path, manifest: Mapping[str, Any], links: Links, on_image: OnImage) -> dict[str, Any]:
    """Axes, sets and facts of a sweep, as the page reads them."""
    folders = [open_folder(root / cell["folder"]) for cell in manifest["cells"]]
    sources = [seed_sources(folder) for folder in folders]
    total, done, sets, problems = sum(map(len, sources)), 0, [], []
    for cell, folder, own in zip(manifest["cells"], folders, sources, strict=True):

        def of_all(n: int, _: int, before: int = done) -> None:
            on_image(before + n, total)

        name = _name(manifest["axes"], cell["at"])
        found = read_set(name, "seed", own, links, root, of_all)
        add_planned(found, _planned(cell, folder), own)
        done += len(own)
        problems += found.problems
        sets.append({**found.as_json(), "about": name, **_cell(cell, folder, found)})
    finished = sum(one["finished"] for one in sets)
    model, parameters = section(manifest, "model"), section(manifest, "model").get("parameters")
    facts = {
        "model": model.get("source") or model.get("kind"),
        "parameters": f"{parameters:,}" if type(parameters) is int else None,
        "cells": f"{len(sets)}" if finished == len(sets) else f"{finished} of {len(sets)} finished",
        "seeds": manifest.get("seeds"),
        "score": next((one["score"]["label"] for one in sets if one["score"]), None),
        "date": str(manifest.get("created") or "")[:10] or None,
    }
    return {
        "axes": [{"name": a["name"], "values": [v["label"] for v in a["values"]]} for a in manifest["axes"]],
        "sets": sets,
        "facts": [(name, str(value)) for name, value in facts.items() if value is not None],
        "problems": problems,
    }


def _name(axes: list[Mapping[str, Any]], at: list[int]) -> str:
    """A cell in words: "steps 10, eta=0.0"."""
    labels = [(axis["name"], axis["values"][i]["label"]) for axis, i in zip(axes, at, strict=True)]
    return ", ".join(label if "=" in label else f"{name} {label}" for name, label in labels)


def _planned(cell: Mapping[str, Any], folder: OutputFolder) -> Seeds:
    try:
        return parse_seeds(cell["seeds"])
    except (KeyError, ValueError, AttributeError):
        return folder.planned()


def _cell(cell: Mapping[str, Any], folder: OutputFolder, found: PictureSet) -> dict[str, Any]:
    """What sweep.json says of a cell beside its pictures."""
    rate = cell.get("images_per_second")
    return {
        "at": cell["at"],
        "folder": cell["folder"],
        "finished": cell.get("finished") is True,
        "rate": rate if rate_text(rate) else None,
        "rate_text": rate_text(rate),
        "score": _score(section(cell, "score")),
        "settings": settings(folder.read_manifest() or found.first),
    }


def _score(score: Mapping[str, Any]) -> dict[str, Any] | None:
    value = score.get("value")
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    metric, kid = str(score.get("metric") or "score"), section(score, "kid")
    reference = section(score, "reference")
    return {
        "value": value,
        "text": distance_text(value),
        "short": _SHORT.get(metric, metric),
        "label": str(score.get("label") or metric),
        "kid": _kid(kid),
        "images": score.get("images") if type(score.get("images")) is int else None,
        "extractor": section(score, "extractor").get("name"),
        "reference": reference.get("source"),
        "warning": score.get("warning") if isinstance(score.get("warning"), str) else None,
    }


def _kid(kid: Mapping[str, Any]) -> str | None:
    if not all(isinstance(kid.get(key), (int, float)) for key in ("mean", "std")):
        return None
    return f"{distance_text(kid['mean'])} ± {distance_text(kid['std'])}"
