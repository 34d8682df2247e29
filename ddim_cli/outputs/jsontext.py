"""JSON as people read it: objects indented, lists on one line, keys in the order given."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

# One encoder for all: json.dumps would build a new one for every value, and a sidecar has a hundred.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def dump_json(value: Any, indent: int = 0) -> str:
    """``value`` as JSON text without a final newline; NaN and infinities are refused with ValueError."""
    if type(value) is int:
        # The encoder takes several times as long for it.
        return str(value)
    if not isinstance(value, dict) or not value:
        return _encode(value)
    pad = "  " * (indent + 1)
    rows = (f"{pad}{_encode(k)}: {dump_json(v, indent + 1)}" for k, v in value.items())
    return "{\n" + ",\n".join(rows) + "\n" + "  " * indent + "}"


# Of each section the one that was written last; and if it was written twice, how it was then, and its text.
_last: dict[str, tuple[Mapping[str, Any], Mapping[str, Any] | None, str]] = {}


def dump_record(record: Mapping[str, Any]) -> str:
    """As `dump_json`, for records of which many share their sections: the text of such a section is kept for the next.

    Writing them anew would be most of the work of a small picture.
    """
    rows = (f"  {_encode(key)}: {_dump_section(key, value)}" for key, value in record.items())
    return "{\n" + ",\n".join(rows) + "\n}"


def _dump_section(key: str, value: Any) -> str:
    if not isinstance(value, dict):
        return dump_json(value, 1)
    before, then, kept = _last.get(key, (None, None, ""))
    if before is not value:
        _last[key] = value, None, ""
        return dump_json(value, 1)
    # It may have been changed since.
    if then is None or then != value:
        kept = dump_json(value, 1)
        _last[key] = value, copy.deepcopy(value), kept
    return kept
