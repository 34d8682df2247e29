"""On which line of a TOML text a key stands.

tomli gives values without positions. This scanner reads a text that tomli has already accepted,
so it only has to find where statements begin and end; where it cannot tell for certain (a key
inside a table that spans lines) it names no line rather than a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tomli

_DELIMITERS = ('"""', "'''", '"', "'")


def _skip_string(text: str, i: int) -> int:
    """Index after the string that starts at ``i``."""
    quote = next(d for d in _DELIMITERS if text.startswith(d, i))
    i += len(quote)
    while not text.startswith(quote, i):
        i += 2 if text[i] == "\\" and quote[0] == '"' else 1
    i += len(quote)
    # A multi-line string may end in one or two quotes of its own before the closing three.
    while len(quote) == 3 and text.startswith(quote[0], i):
        i += 1
    return i


def _skip_line(text: str, i: int) -> int:
    end = text.find("\n", i)
    return len(text) if end < 0 else end


def _skip_value(text: str, i: int) -> int:
    """Index of the end of the value that starts at ``i``: its newline or comment, outside every bracket and string."""
    depth = 0
    while i < len(text):
        if text[i] in "\"'":
            i = _skip_string(text, i)
            continue
        if text[i] == "#":
            i = _skip_line(text, i)
            if depth == 0:
                return i
            continue
        if text[i] == "\n" and depth == 0:
            return i
        depth += (text[i] in "[{") - (text[i] in "]}")
        i += 1
    return i


def _key_end(text: str, i: int, stop: str) -> int:
    """Index of the ``stop`` character that ends a (dotted, possibly quoted) key."""
    while text[i] != stop:
        i = _skip_string(text, i) if text[i] in "\"'" else i + 1
    return i


def _key_path(key: str) -> tuple[str, ...]:
    """The parts of a dotted key, read by tomli itself so that quoting rules are its own."""
    value, path = tomli.loads(f"{key.strip()} = 0"), []
    while isinstance(value, dict):
        [(part, value)] = value.items()
        path.append(part)
    return tuple(path)


@dataclass(frozen=True)
class KeyLines:
    """1-based lines of keys by path; None where one cannot be told. ``inline`` are keys whose value is a table."""

    lines: Mapping[tuple[str, ...], int | None]
    inline: frozenset[tuple[str, ...]]

    def line_of(self, path: tuple[str, ...]) -> int | None:
        """The line of ``path``, or of the inline table it stands in; None where it cannot be told."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines and (length == len(path) or path[:length] in self.inline):
                return self.lines[path[:length]]
        return None


def key_lines(text: str) -> KeyLines:
    """The lines of all keys that have a statement of their own in ``text``, which tomli has accepted.

    A key given twice by way of arrays of tables, or whose value is a table that spans lines, has
    None: what lies in it cannot be told apart.
    """
    text = text.replace("\r\n", "\n")
    lines: dict[tuple[str, ...], int | None] = {}
    inline: set[tuple[str, ...]] = set()
    prefix: tuple[str, ...] = ()
    i = 0

    def record(path: tuple[str, ...], line: int | None, known: int) -> None:
        lines[path] = None if path in lines else line
        # a.b.c = 1 is the statement that makes a.b as well, unless a header did before.
        for length in range(known + 1, len(path)):
            lines.setdefault(path[:length], line)

    while i < len(text):
        if text[i] in " \t\n":
            i += 1
        elif text[i] == "#":
            i = _skip_line(text, i)
        elif text[i] == "[":
            brackets = 2 if text.startswith("[[", i) else 1
            end = _key_end(text, i + brackets, "]")
            prefix = _key_path(text[i + brackets : end])
            record(prefix, text.count("\n", 0, i) + 1, 0)
            i = _skip_line(text, end)
        else:
            line = text.count("\n", 0, i) + 1
            equals = _key_end(text, i, "=")
            path = prefix + _key_path(text[i:equals])
            end = _skip_value(text, equals + 1)
            value = text[equals + 1 : end].strip()
            if value.startswith("{"):
                inline.add(path)
            record(path, None if value.startswith("{") and "\n" in value else line, len(prefix))
            i = end
    return KeyLines(lines, frozenset(inline))
