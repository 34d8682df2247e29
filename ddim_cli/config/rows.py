"""The rows of job files: their keys, what these take, and the formats they are written in. Needs no torch."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from ddim_cli.config.layers import nearest
from ddim_cli.config.seeds import MAX_SEED

KEYS = ("name", "seed", "prompt", "negative_prompt", "class", "latent", "init", "mask", "strength")
MAX_CLASS = 2**31 - 1
# With its ending, and what is put around it while its files are written, still a name for every file system.
LONGEST_NAME = 200
# What other files in an output folder are called.
RESERVED = frozenset({"grid", "strip", "run", "inverted", "edited", "sweep", "items", "report"})

_NO_FILE_NAME = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_DIGITS = re.compile(r"[0-9]{1,30}", re.ASCII)
_OF_A_STRIP = re.compile(r"[0-9]{6,}\.(x0|xt)", re.ASCII | re.IGNORECASE)


class Row(NamedTuple):
    """A row as it stands; None for what it does not say. ``latent``, ``init`` and ``mask`` are paths."""

    name: str | None = None
    seed: int | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    class_number: int | None = None
    latent: str | None = None
    init: str | None = None
    mask: str | None = None
    strength: float | None = None


class RowError(ValueError):
    """What is wrong with a row, in a sentence without its place; ``ends``: what follows cannot be read either."""

    def __init__(self, text: str, ends: bool = False):
        super().__init__(text)
        self.ends = ends


def number_name(number: int) -> str:
    """The name of a row without one, and how a name that is a number of six digits or more is written."""
    return f"{number:06d}"


def as_number(name: str) -> int | None:
    """The number whose `number_name` this is; None for any other name."""
    number = int(name) if _DIGITS.fullmatch(name) else -1
    return number if number >= 0 and name == number_name(number) else None


def _shown(value: Any) -> str:
    # Numbers of thousands of digits cannot be written out.
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge number"
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_text(key: str, value: Any) -> None:
    """Raise RowError for what is no text, or none that can be written down."""
    if not isinstance(value, str):
        raise RowError(f"{key} = {_shown(value)} is no text")
    if "\0" in value:
        raise RowError(f"{key} holds a null character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(f"{key} holds half of a surrogate pair, which is no character") from None


def _check_name(key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise RowError(f"name = {_shown(value)} is no text")
    called = f"the name {_shown(value)}"
    bad = _NO_FILE_NAME.search(value)
    if bad is not None:
        what = "a path separator" if bad[0] in "/\\" else f"the character {bad[0]!a}"
        raise RowError(f"{called} holds {what}, and is to name a file")
    if not value or value != value.strip():
        raise RowError(f"{called} is empty, or begins or ends with a space")
    if value[0] == ".":
        raise RowError(f"{called} begins with a dot, which hides files")
    if len(value) * 4 > LONGEST_NAME and len(value.encode()) > LONGEST_NAME:
        raise RowError(f"{called} is too long for a file: {len(value.encode())} bytes, and {LONGEST_NAME} fit")
    if value.casefold() in RESERVED:
        raise RowError(f"{called} is that of another file in an output folder")
    if value[0].isdigit():
        if _OF_A_STRIP.fullmatch(value):
            raise RowError(f"{called} is one of a strip of ddim trajectory")
        if len(value) >= 6 and _DIGITS.fullmatch(value) and as_number(value) is None:
            raise RowError(f"{called} is a number with leading zeros; write {number_name(int(value))}")


def _number_check(most: int) -> Callable[[str, Any], None]:
    def check(key: str, value: Any) -> None:
        if type(value) is not int:
            raise RowError(f"{key} = {_shown(value)} is no integer")
        if not 0 <= value <= most:
            raise RowError(f"{key} = {_shown(value)} is not from 0 to {most}")

    return check


def _check_path(key: str, value: Any) -> None:
    check_text(key, value)
    if not value:
        raise RowError(f"{key} is empty; leave it out, or name a file")


def _check_strength(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"{key} = {_shown(value)} is no number")
    if not 0 < value <= 1:
        raise RowError(f"{key} = {_shown(value)} is not above 0 and at most 1")


_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "name": _check_name,
    "seed": _number_check(MAX_SEED),
    "prompt": check_text,
    "negative_prompt": check_text,
    "class": _number_check(MAX_CLASS),
    "latent": _check_path,
    "init": _check_path,
    "mask": _check_path,
    "strength": _check_strength,
}


def row_of(values: Mapping[str, Any]) -> Row:
    """The row of these values; one that is None is not there. Raises RowError."""
    for key, value in values.items():
        check = _CHECKS.get(key)
        if check is None:
            raise RowError(f"unknown key {_shown(key)}{nearest(str(key), KEYS)}")
        if value is not None:
            check(key, value)
    return Row(*map(values.get, KEYS))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for n, key in enumerate(keys) if key in keys[:n])
        raise RowError(f"the key {_shown(twice)} is there twice")
    return values


_read_json = json.JSONDecoder(object_pairs_hook=_unique).decode
_KINDS = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}


def json_object(text: str) -> dict[str, Any]:
    """The values of a row in JSON, unchecked. Raises RowError."""
    try:
        values = _read_json(text)
    except RowError:
        raise
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError):
        raise RowError("not valid JSON: a number of thousands of digits, or too many lists in lists") from None
    if not isinstance(values, dict):
        kind = _KINDS.get(type(values), "a number")
        raise RowError(f'is {kind}, and a row is an object such as {{"name": "cat", "seed": 7}}')
    return values


def json_row(text: str) -> Row:
    """Raises RowError."""
    return row_of(json_object(text))


def text_row(text: str) -> Row:
    """Raises RowError."""
    check_text("prompt", text)
    return Row(prompt=text.strip())


T = TypeVar("T")


def _tried(parse: Callable[[T], Row], record: T) -> Row | RowError:
    try:
        return parse(record)
    except RowError as error:
        return error


def _decoded(data: bytes) -> str:
    """Raises RowError."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        text = f"not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8"
        raise RowError(text, ends=True) from None


def _line_end(content: bytes, start: int) -> int:
    return content.find(b"\n", start) + 1 or len(content)


@dataclass(frozen=True)
class Lines:
    """A format of a row a line; blank lines are none."""

    of_text: Callable[[str], Row]

    def rows(self, content: bytes, start: int) -> Iterator[tuple[int, int, Row | RowError]]:
        """The position, the line, and the row or what is wrong with it, of each from ``start`` on."""
        line = 0
        while start < len(content):
            end = _line_end(content, start)
            data, line = content[start:end], line + 1
            if not data.isspace():
                yield start, line, _tried(self.row, data)
            start = end

    def row(self, data: bytes) -> Row:
        """The row that these bytes hold. Raises RowError."""
        return self.of_text(_decoded(data))


def _number(column: str, cell: str) -> Any:
    """A cell as a number where its column holds numbers and it is one, else as its text."""
    if column in ("seed", "class"):
        return int(cell) if _DIGITS.fullmatch(cell.strip()) else cell
    if column == "strength":
        with contextlib.suppress(ValueError):
            return float(cell)
    return cell


@dataclass(frozen=True)
class Cells:
    """CSV, or with another delimiter TSV; a row whose quotes hold line ends spans lines."""

    delimiter: str
    columns: tuple[str, ...]

    def rows(self, content: bytes, start: int) -> Iterator[tuple[int, int, Row | RowError]]:
        """As of `Lines`, behind the header."""
        position, line = _line_end(content, start), 1

        def lines() -> Iterator[str]:
            nonlocal position, line
            while position < len(content):
                begin, position, line = position, _line_end(content, position), line + 1
                yield _decoded(content[begin:position])

        reader = csv.reader(lines(), delimiter=self.delimiter, strict=True)
        while True:
            begin, first = position, line + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield begin, first, RowError(f"not valid CSV: {error}", ends=True)
                return
            except RowError as error:
                yield begin, line, error
                return
            if any(cells):
                yield begin, first, _tried(self._parse, cells)

    def _parse(self, cells: Sequence[str]) -> Row:
        """The row of these cells; an empty one says nothing. Raises RowError."""
        if len(cells) > len(self.columns):
            raise RowError(
                f"has {len(cells)} fields, and the header {len(self.columns)}; a text with a {self.delimiter!r} inside "
                "stands in quotes"
            )
        values: dict[str, Any] = {}
        for column, cell in zip(self.columns, cells, strict=False):
            if cell:
                values[column] = _number(column, cell)
        return row_of(values)

    def row(self, data: bytes) -> Row:
        """As of `Lines`."""
        reader = csv.reader(io.StringIO(data.decode(), newline="\n"), delimiter=self.delimiter, strict=True)
        return self._parse(next(cells for cells in reader if any(cells)))


Format = Lines | Cells


def header_of(content: bytes, start: int, delimiter: str) -> list[str]:
    """The first line as cells. Raises RowError."""
    text = _decoded(content[start : _line_end(content, start)])
    return [cell.strip() for cell in next(csv.reader([text], delimiter=delimiter), [])]


def cells_of(content: bytes, start: int, delimiter: str) -> Cells:
    """The format of a CSV, by its header. Raises RowError."""
    columns = header_of(content, start, delimiter)
    for n, column in enumerate(columns):
        if column not in KEYS:
            hint = "; separate columns with commas" if ";" in column else nearest(column, KEYS)
            raise RowError(f"unknown column {_shown(column)}{hint} (the header names some of {', '.join(KEYS)})")
        if column in columns[:n]:
            raise RowError(f"the column {column} is there twice")
    return Cells(delimiter, tuple(columns))


JSON, TEXT = Lines(json_row), Lines(text_row)
_CSV = {".csv": ",", ".tsv": "\t"}


def format_by_ending(ending: str, content: bytes, start: int) -> Format:
    """JSONL, CSV or TSV by the ending of a file's name; all others hold a prompt a line. Raises RowError."""
    ending = ending.lower()
    if ending in _CSV:
        return cells_of(content, start, _CSV[ending])
    return JSON if ending in (".jsonl", ".ndjson", ".json") else TEXT


def format_by_content(content: bytes, start: int) -> Format:
    """JSONL if it begins with a brace, CSV if with a header of keys alone, else a prompt a line. Raises RowError."""
    if content[start : start + 4096].lstrip()[:1] == b"{":
        return JSON
    columns = header_of(content, start, ",")
    return cells_of(content, start, ",") if columns and set(columns) <= set(KEYS) else TEXT
