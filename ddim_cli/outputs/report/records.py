"""Many sidecars, each of their values stated once.

A value is kept as the JSON text that it has in the sidecar: a page in which every number went through a float would
lose large seeds, and the difference between 0 and 0.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str, ...]

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """The values in ``value`` that are no object, with the keys that lead there: lists are kept whole."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, _encode(value)


class Records:
    """Records in the order they came. Those with the same keys are a group: what differs in it is a row each."""

    def __init__(self) -> None:
        self._groups: dict[tuple[tuple[Path, ...], ...], int] = {}
        self._rows: list[list[list[str]]] = []
        self._sections: dict[tuple[str, str], tuple[tuple[Path, ...], tuple[str, ...]]] = {}

    def add(self, record: Mapping[str, Any]) -> tuple[int, int]:
        """The group of a record, and its row there. Raises ValueError for one with NaN or infinity in it."""
        paths: list[tuple[Path, ...]] = []
        texts: list[str] = []
        for name, section in record.items():
            own_paths, own_texts = self._section(name, section)
            paths.append(own_paths)
            texts += own_texts
        group = self._groups.setdefault(tuple(paths), len(self._groups))
        if group == len(self._rows):
            self._rows.append([])
        self._rows[group].append(texts)
        return group, len(self._rows[group]) - 1

    def _section(self, name: str, section: Any) -> tuple[tuple[Path, ...], tuple[str, ...]]:
        # Most sections are the same in all records of a run.
        key = (name, _encode(section))
        if key not in self._sections:
            paths, texts = zip(*_leaves(section, (name,)), strict=True)
            self._sections[key] = (paths, texts)
        return self._sections[key]

    def as_json(self) -> tuple[list[dict[str, Any]], list[list[list[str]]]]:
        """The groups, and of each the rows.

        A group has the ``paths`` of its values, their ``texts`` where all records agree, else None, and the positions
        that are ``varying``; a row has the texts of these.
        """
        groups, rows = [], []
        for paths, own in zip(self._groups, self._rows, strict=True):
            same = [texts[0] if len(set(texts)) == 1 else None for texts in zip(*own, strict=True)]
            varying = [i for i, text in enumerate(same) if text is None]
            groups.append({"paths": [path for section in paths for path in section], "texts": same, "varying": varying})
            rows.append([[texts[i] for i in varying] for texts in own])
        return groups, rows
