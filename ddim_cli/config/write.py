"""Settings as TOML text: what holds and why (``config show``), a starter (``config init``), one scheduler's keys."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from ddim_cli.config.layers import Resolved, describe_allowed, key_schema, replaced_by
from ddim_cli.config.schema import SECTIONS

_STARTER_SWEEP = [
    "# For ddim sweep: the same seeds with every combination of these. Any key takes a list of values.",
    "# [sweep]",
    "# steps = [10, 20, 50]",
    "# eta = [0.0, 1.0]",
]


def toml_value(value: Any) -> str:
    """A TOML literal for a setting's value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, float):
        # TOML floats need a digit after the point, and JSON's repr of them may lack one.
        text = repr(value)
        return text if any(c in text for c in ".en") else text + ".0"
    # A basic string of TOML escapes as JSON does, DEL aside.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def render_resolved(resolved: Resolved) -> str:
    """TOML of every setting that holds, each with a comment that says where it came from."""
    blocks = []
    for section in SECTIONS:
        rows = []
        for name, value in getattr(resolved.config, section):
            key = f"{section}.{name}"
            other = replaced_by(key, resolved.origins)
            if value is None:
                rows.append((f"# {name}", "not set"))
            elif other is not None:
                rows.append((f"# {name}", f"replaced by {other}"))
            else:
                rows.append((f"{name} = {toml_value(value)}", resolved.origin(key)))
        width = min(52, max(len(text) for text, _ in rows))
        blocks.append("\n".join([f"[{section}]", *(f"{text:<{width}}  # {origin}" for text, origin in rows)]))
    return "\n\n".join(blocks) + "\n"


def render_starter(values: Mapping[str, Any]) -> str:
    """A commented starter: every key with its meaning and default, those in ``values`` set, the others commented out.

    ``values`` is dotted key -> value.
    """
    lines = [
        "# A sampling config of ddim. Every key is optional: a line that is commented out shows the default,",
        "# or an example where there is none.",
        "# Run it:  ddim sample -c THIS_FILE      Check it:  ddim config check THIS_FILE",
    ]
    for section, model in SECTIONS.items():
        lines += ["", *textwrap.wrap((model.__doc__ or "").strip(), 96, initial_indent="# ", subsequent_indent="# ")]
        lines.append(f"[{section}]")
        for name, field in model.model_fields.items():
            key = f"{section}.{name}"
            schema = key_schema(key)
            allowed = describe_allowed(schema) if "pattern" not in schema else ""
            about = f"{field.description}{f' ({allowed})' if allowed and allowed != 'a string' else ''}"
            lines += textwrap.wrap(about, 96, initial_indent="# ", subsequent_indent="#   ")
            if key in values and values[key] is not None:
                lines.append(f"{name} = {toml_value(values[key])}")
            else:
                [shown, *_] = (field.examples or []) if field.default is None else [field.default]
                lines.append(f"# {name} = {toml_value(shown)}")
    lines += ["", *_STARTER_SWEEP]
    return "\n".join(lines) + "\n"
