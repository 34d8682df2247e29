"""Signatures of commands, as typer reads them: their annotations evaluated, their paths checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import typer

from ddim_cli.stores.objects import is_url

EMPTY = "the name is empty; name a file or a folder"


def with_signature(command: Callable, parameters: Sequence[inspect.Parameter]) -> None:
    """Have typer read these parameters off a command."""
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    vars(command)["__signature__"] = inspect.Signature(parameters)


def named_path(text: str) -> Path:
    """A path as it was typed. Refuses an empty one, of which `Path` makes the current folder, and a URL."""
    if not text:
        raise typer.BadParameter(EMPTY)
    if is_url(text):
        raise typer.BadParameter(f"{text}: is in an object store; name a file or a folder of this machine")
    return Path(text)


def named_place(text: str) -> str:
    """A path or a URL as it was typed. Refuses an empty one, as `named_path`."""
    if not text:
        raise typer.BadParameter(EMPTY)
    return text


def with_named_paths(command: Callable) -> None:
    """Have every option and argument of a command that is a path go through `named_path`."""
    parameters = list(inspect.signature(command, eval_str=True).parameters.values())
    for parameter in parameters:
        # Annotated[list[Path] | None, typer.Option(...)]
        kind, *infos = get_args(parameter.annotation) or (parameter.annotation,)
        if Path in _types_in(kind):
            for info in infos:
                info.parser = named_path
    with_signature(command, parameters)


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _types_in(inner)
