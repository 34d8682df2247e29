"""Tensors from files, safely: safetensors, and pickles of which nothing is executed.

`read_tensors` gives the tensors of any weights file by name, as they are needed, so that no second
full copy of the weights lies in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ddim_cli.errors import ModelError, first_line

# torch says this of a pickle that needs more than tensors: the name of what it needs.
_WANTED = re.compile(r"GLOBAL ([\w.]+)|Unsupported class (\S+)")
# torch.save writes this protocol, and torch reads no other without running the pickle.
_PROTOCOL = 2


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a safetensors file, each read when it is asked for. Raises ModelError."""
    try:
        safetensors_header(path)
        with safe_open(path, framework="pt", device="cpu") as stream:
            names = list(stream.keys())
        for name in names:
            # Opened anew for each, so that pages of the file do not pile up in memory beside converted tensors.
            with safe_open(path, framework="pt", device="cpu") as stream:
                tensor = stream.get_tensor(name)
            yield name, tensor
            del tensor
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error}") from None


def read_pickle(path: Path, mmap: bool = True) -> Any:
    """What a pickle holds, if that is tensors and plain containers.

    With ``mmap`` only what is used of it is read, where its format allows that.

    Raises:
        ModelError: for a damaged file, and for one that would run anything, naming what it wanted to run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            except RuntimeError:
                # Files of torch before 1.6 are no archives, and cannot be mapped.
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = _WANTED.search(str(error))
        if wanted is None:
            raise ModelError(f"{path}: {_unread(path)}") from None
        raise ModelError(
            f"{path}: refused: loading it would run {wanted[1] or wanted[2]}; "
            "only tensors and plain containers are read"
        ) from None
    except Exception as error:
        # A damaged file can fail anywhere in torch's reader; its own words are the best there are.
        raise ModelError(f"{path}: not a checkpoint, or a damaged one: {first_line(error, 200)}") from None


def _unread(path: Path) -> str:
    """What a pickle is that torch does not read: of a protocol that it only reads by running it, or damaged."""
    protocol = _protocol(path)
    if protocol is None or not _PROTOCOL < protocol <= pickle.HIGHEST_PROTOCOL:
        return "not a checkpoint, or a damaged one"
    return (
        f"refused: it is a pickle of protocol {protocol}, and none above {_PROTOCOL} is read, since that could run "
        "code; write it with torch.save, without pickle_protocol, or as safetensors"
    )


def _protocol(path: Path) -> int | None:
    """The protocol that a pickle names in its first two bytes, of an archive of torch.save that of its data.pkl."""
    start = b""
    with contextlib.suppress(OSError, zipfile.BadZipFile, StopIteration):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                start = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))[:2]
        else:
            with path.open("rb") as stream:
                start = stream.read(2)
    return start[1] if len(start) == 2 and start[:1] == pickle.PROTO else None


def state_dict_of(path: Path, value: Any) -> Mapping[str, Tensor]:
    """``value``, which must map names to tensors. Raises ModelError if it does not."""
    if not isinstance(value, Mapping) or not value:
        raise ModelError(f"{path}: holds no weights by name")
    wrong = next((k for k, v in value.items() if not isinstance(k, str) or not isinstance(v, Tensor)), None)
    if wrong is not None:
        raise ModelError(f"{path}: {wrong!r} is not a tensor; expected weights by name")
    return value


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a weights file by its ending: safetensors, else a pickled state dict. Raises ModelError."""
    if path.suffix == ".safetensors":
        yield from read_safetensors(path)
    else:
        # Read whole and given away one by one: a mapped file would stay in memory beside converted tensors.
        tensors = dict(state_dict_of(path, read_pickle(path, mmap=False)))
        while tensors:
            yield tensors.popitem()


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: name -> dtype, shape, offsets; __metadata__. Raises ModelError."""
    try:
        with path.open("rb") as stream:
            return header_of(stream, path.stat().st_size)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error}") from None


def header_of(stream: BinaryIO, size: int) -> dict[str, Any]:
    """As `safetensors_header`, of the start of a file of ``size`` bytes. Raises ValueError."""
    start = stream.read(8)
    if start == b"version ":
        raise ValueError("it is a Git LFS pointer, not the file itself")
    length = int.from_bytes(start, "little")
    if not 2 <= length <= size - 8:
        raise ValueError(f"its header would be {length} bytes long")
    header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header


def count_elements(header: Mapping[str, Any], path: Path) -> int:
    """The number of elements of all tensors of a safetensors header. Raises ModelError."""
    try:
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error!r} in its header") from None


def load_into(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Give ``network`` its weights, of the file ``path``. Raises ModelError if they do not fit."""
    check_fit(network.state_dict(), weights, path)
    network.load_state_dict(dict(weights), assign=True, strict=False)


def check_fit(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
    """ModelError with the first three keys that are missing, extra or of the wrong shape, and how many there are."""

    def some(keys: list[str]) -> str:
        return f"{', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''} ({len(keys)} in all)"

    common = sorted(expected.keys() & weights.keys())
    shapes = [
        f"{k} {list(weights[k].shape)} instead of {list(expected[k].shape)}"
        for k in common
        if expected[k].shape != weights[k].shape
    ]
    broken = [k for k in common if not bool(weights[k].isfinite().all())]
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    problems = [
        f"{what} {some(keys)}"
        for what, keys in (("lacks", missing), ("has unknown", extra), ("has shapes", shapes), ("has NaN in", broken))
        if keys
    ]
    if problems:
        raise ModelError(f"{path}: the weights do not fit the config: {'; '.join(problems)}")
