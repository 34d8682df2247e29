"""How a picture of a prompt was made, as the web UIs of Stable Diffusion write it into PNGs: a text ``parameters``.

Other image tools read it: the prompt, the negative prompt, and one line of ``Key: value`` pairs. What they have no key
for is in the text ``ddim`` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

CHUNK = "parameters"
# Of a hash, as those tools show it.
HASH_DIGITS = 10
_WEIGHTS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


def parameters_text(described: Mapping[str, Any]) -> str | None:
    """The text for a picture that `sidecar.describe_picture` describes; None for one that is of no prompt."""
    sampling = described["sampling"]
    prompt = _prompt(sampling)
    if prompt is None:
        return None
    negative = sampling.get("negative_prompt")
    facts = ", ".join(f"{key}: {_quoted(value)}" for key, value in _facts(described).items() if value is not None)
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), facts])


def _prompt(sampling: Mapping[str, Any]) -> str | None:
    between = sampling.get("between_prompts")
    if between is None:
        return sampling.get("prompt")
    first, second = between["prompts"]
    # There is no notation for embeddings between two prompts; at an end it is the prompt itself.
    ends = {0.0: first, 1.0: second}
    return ends.get(between["weight"], f"between {first} and {second}, at {between['weight']:.4g}")


def _facts(described: Mapping[str, Any]) -> dict[str, Any]:
    sampling, image, model = described["sampling"], described["image"], described["model"]
    eta, sha256, source = sampling.get("eta"), model.get("sha256"), model.get("source")
    version = described["runtime"].get("versions", {}).get("ddim_cli")
    return {
        "Steps": len(sampling["timesteps"]),
        "Sampler": _sampler(sampling.get("order", 1), eta or 0),
        "CFG scale": _number(sampling.get("guidance_scale", 1.0)),
        "Seed": described["seed"],
        "Size": f"{image['width']}x{image['height']}",
        "Model hash": sha256[:HASH_DIGITS] if sha256 else None,
        "Model": _model_name(source) if source else None,
        "Eta DDIM": _number(eta) if eta and "order" not in sampling else None,
        "Eta": _number(eta) if eta and "order" in sampling else None,
        "Denoising strength": _number(sampling["strength"]) if "strength" in sampling else None,
        "Variation seed": sampling.get("variation_seed"),
        "Variation seed strength": _number(sampling["variation_strength"])
        if "variation_strength" in sampling
        else None,
        # Noise is drawn on the CPU on every device.
        "RNG": "CPU" if described["seed"] is not None else None,
        "Version": f"ddim-cli {version}" if version else None,
    }


def _sampler(order: int, eta: float) -> str:
    """The name that those tools have for a solver: DDIM of order 1, DPM-Solver++ in its multistep form else."""
    return "DDIM" if order == 1 else f"DPM++ {order}M{' SDE' if eta else ''}"


def _number(value: float) -> str:
    """7.5, and 7 for 7.0."""
    return f"{value!r}".removesuffix(".0")


def _model_name(source: str) -> str:
    path = PurePath(source)
    return path.stem if path.suffix in _WEIGHTS else path.name


def _quoted(value: Any) -> str:
    """A value in which the signs between the pairs occur is written as a JSON text."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',:"\n') else text
