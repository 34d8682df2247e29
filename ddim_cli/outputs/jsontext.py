"""JSON as people read it: objects indented, lists on one line, keys in the order given."""

from __future__ import annotations

import json
from typing import Any

# One encoder for all: json.dumps would build a new one for every value, and a sidecar has a hundred.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def dump_json(value: Any, indent: int = 0) -> str:
    """``value`` as JSON text without a final newline; NaN and infinities are refused with ValueError."""
    if not isinstance(value, dict) or not value:
        return _encode(value)
    pad = "  " * (indent + 1)
    rows = (f"{pad}{_encode(k)}: {dump_json(v, indent + 1)}" for k, v in value.items())
    return "{\n" + ",\n".join(rows) + "\n" + "  " * indent + "}"
