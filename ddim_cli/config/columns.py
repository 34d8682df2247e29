"""Rows as engines hand them out: a batch of columns, whose cells are numpy's or pandas's. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddim_cli.config.job_file import seed_of
from ddim_cli.config.rows import KEYS, Row, RowError, check_text
from ddim_cli.errors import UsageError

LABEL = "batch"
# Above it a float64 does not tell a whole number from the next.
_EXACT = 2**53
_NOTHING = ("NAType", "NaTType")


class Columns(NamedTuple):
    """The columns of a batch, and how many ``rows`` they have."""

    of: dict[str, Any]
    rows: int


class Told(NamedTuple):
    """What rows say, as `job_of` takes it, and the latents that are among their cells, by what rows call them."""

    rows: list[dict[str, Any]]
    latents: dict[str, np.ndarray]


def columns_of(batch: Any) -> Columns:
    """The columns of a mapping of arrays or lists, of a pandas DataFrame, or of a pyarrow table.

    Raises UsageError for what is none of them, and for columns of different lengths.
    """
    columns: dict[str, Any]
    if isinstance(batch, Mapping):
        columns = dict(batch)
    elif callable(getattr(batch, "to_pydict", None)):
        columns = batch.to_pydict()
    elif hasattr(batch, "columns") and hasattr(batch, "iloc"):
        columns = {name: batch[name].to_numpy() for name in batch.columns}
    else:
        raise UsageError(
            f"{LABEL} is a {type(batch).__name__}; it must be a mapping of columns, a pandas DataFrame or a "
            "pyarrow table"
        )
    lengths: dict[str, int] = {}
    for name, column in columns.items():
        try:
            lengths[name] = len(column)
        except TypeError:
            raise UsageError(f"{LABEL}: the column {name} is a {type(column).__name__}, and no array or list") from None
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UsageError(f"{LABEL}: its columns have different lengths: {told}")
    return Columns(columns, next(iter(lengths.values()), 0))


def told_by(columns: Columns, first_seed: int) -> Told:
    """What the rows of a batch say of their pictures; columns that no job file has say nothing of them.

    Every row comes with its seed, or with a latent; names, which may be any text and need not differ, are used up for
    that, with ``first_seed`` as `seed_of` has it. So no row depends on those beside it.

    Raises UsageError for a row with nothing to tell its seed by, and for a cell that cannot be read.
    """
    said = {key: columns.of[key] for key in KEYS if key in columns.of}
    told = Told([], {})
    for number in range(columns.rows):
        place = f"{LABEL}[{number}]"
        try:
            row = {key: value for key, cells in said.items() if (value := _value(key, cells[number])) is not None}
            name = row.pop("name", None)
            if name is not None:
                check_text("name", name)
        except RowError as error:
            raise UsageError(f"{place}: {error}") from None
        if isinstance(row.get("latent"), np.ndarray):
            called = f"the latent of {place}"
            told.latents[called], row["latent"] = row["latent"], called
        if "seed" not in row and "latent" not in row:
            if name is None:
                raise UsageError(
                    f"{place}: has no seed, and neither a name to have one by nor a latent; where a row stands tells "
                    "nothing here, so give each a seed or a name"
                )
            row["seed"] = seed_of(Row(name=name), number, first_seed)
        told.rows.append(row)
    return told


def _value(key: str, cell: Any) -> Any:
    """What a cell says, None if nothing. Raises RowError."""
    if key == "latent" and isinstance(cell, (np.ndarray, list, tuple)):
        return _floats(cell)
    if isinstance(cell, np.ndarray) and not cell.ndim:
        cell = cell[()]
    if isinstance(cell, np.generic):
        # A float32 as it reads: 0.6 is 0.6, and not 0.60000002.
        narrow = isinstance(cell, np.floating) and not isinstance(cell, float)
        cell = float(str(cell)) if narrow else cell.item()
    if cell is None or type(cell).__name__ in _NOTHING or (isinstance(cell, str) and not cell):
        return None
    if isinstance(cell, float):
        if np.isnan(cell):
            return None
        if key in ("seed", "class") and cell.is_integer():
            # Where a cell is empty, pandas makes floats of all.
            if abs(cell) > _EXACT:
                raise RowError(
                    f"{key} = {cell:.0f} is a floating-point number, which is not exact above 2**53; make the column "
                    "one of integers"
                )
            return int(cell)
    return cell


def _floats(cell: Sequence[Any] | np.ndarray) -> np.ndarray:
    """A latent as float32, of whatever lists and arrays it is made. Raises RowError."""
    try:
        return np.ascontiguousarray(_flat(cell), np.float32)
    except (ValueError, TypeError):
        raise RowError("latent is no array of numbers [C, H, W]") from None


def _flat(cell: Any) -> Any:
    """Arrays of arrays, as Arrow has them, as one."""
    nested = isinstance(cell, (list, tuple)) or (isinstance(cell, np.ndarray) and cell.dtype == object)
    return np.stack([_flat(part) for part in cell]) if nested else np.asarray(cell, np.float32)
