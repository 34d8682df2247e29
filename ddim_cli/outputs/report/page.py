"""The page itself: one HTML file with its style, its script and all that it tells, which fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ddim_cli.errors import UsageError
from ddim_cli.outputs.atomic import remove_leftovers
from ddim_cli.outputs.files import Place, here
from ddim_cli.outputs.named import Kind, name_file
from ddim_cli.outputs.report import cells
from ddim_cli.outputs.report.contents import Links, OnImage, facts, read_folder, settings
from ddim_cli.outputs.sweep_manifest import is_sweep, read_sweep
from ddim_cli.outputs.tar_folder import TarFolder, open_folder

SCHEMA = "ddim-cli/report/1"
NAME = "report.html"
PAGE = Kind.of_text("page of ddim report", b'name="generator" content="ddim report"')
# Beyond this, a list of what is wrong is not read.
MOST_PROBLEMS = 200

_PLACE = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Report:
    """What was written: ``kind`` is "run" or "sweep", ``images`` how many pictures the page shows, in ``sets``."""

    path: Path
    kind: str
    images: int
    sets: int
    problems: tuple[str, ...]
    bytes: int
    embedded: bool


def write_report(
    folder: Place,
    to: Path | None = None,
    embed: bool = False,
    on_image: OnImage = lambda done, total: None,
    overwrite: bool = False,
) -> Report:
    """Write the page of an output folder or a sweep. The same folder gives the same bytes.

    Args:
        folder: of ``ddim sample``, ``interpolate``, ``trajectory``, ``invert`` or ``sweep``.
        to: the file to write; None: report.html in the folder.
        embed: have the pictures inside the file, in place of their ways from it.
        on_image: called with the number of pictures read and their total.
        overwrite: replace a file that is there and is no such page.

    Raises:
        UsageError: for a folder that is not there or holds nothing of ddim, and a file that is another's.
        RunError: for a file that cannot be written.
    """
    try:
        if not folder.is_dir():
            raise UsageError(f"{folder}: {'is not a folder' if folder.exists() else 'there is no such folder'}")
    except OSError as error:
        raise UsageError(f"{str(error.filename)[:200]}: {error.strerror}") from None
    if to is None and not isinstance(folder, Path):
        raise UsageError(f"{folder}: the page is written on this machine; say where with -o FILE")
    file = name_file(to or here(folder) / NAME, PAGE, overwrite=overwrite)
    to = file.path
    # A browser looks neither into a tar nor into an object store.
    embed = embed or not isinstance(folder, Path) or isinstance(open_folder(folder), TarFolder)
    data = contents(folder, Links(to.parent, embed), on_image)
    page = render(data).encode()
    if isinstance(folder, Path):
        remove_leftovers(folder)
    file.write(page)
    images = sum(len(one["pictures"]) for one in data["sets"])
    return Report(to, data["kind"], images, len(data["sets"]), tuple(data["problems"]), len(page), embed)


def contents(folder: Place, links: Links, on_image: OnImage = lambda done, total: None) -> dict[str, Any]:
    """All that the page tells. Raises UsageError for a folder that holds nothing of ddim."""
    title = (folder.resolve() if isinstance(folder, Path) else folder).name or str(folder)
    if isinstance(folder, Path) and is_sweep(folder):
        found = cells.read_cells(folder, read_sweep(folder), links, on_image)
        return {"schema": SCHEMA, "kind": "sweep", "title": title, **found}
    output = open_folder(folder)
    sets = read_folder(output, links, on_image)
    if not sets:
        raise UsageError(
            f"{folder}: holds nothing to show; name a folder of ddim sample (000000.png ...), of ddim interpolate "
            "(frame_000.png ...), of ddim trajectory (000000.x0.png ...), of ddim invert (NAME.recon.png ...), or of "
            "ddim sweep (sweep.json)"
        )
    return {
        "schema": SCHEMA,
        "kind": "run",
        "title": title,
        "axes": [],
        "sets": [{**one.as_json(), "settings": settings(one.first), "facts": facts(output, one)} for one in sets],
        "problems": [problem for one in sets for problem in one.problems],
    }


@cache
def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _policy(style: str, script: str) -> str:
    """What the browser may do: show pictures, run this script, and nothing else. Nothing is fetched by mistake."""
    return (
        f"default-src 'none'; img-src 'self' file: data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _inert(data: Mapping[str, Any]) -> str:
    """JSON that ends no script and opens no comment, whatever the sidecars say."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def render(data: Mapping[str, Any]) -> str:
    style, script = _source("report.css"), _source("report.js")
    problems = data["problems"]
    if len(problems) > MOST_PROBLEMS:
        problems = [*problems[:MOST_PROBLEMS], f"and {len(problems) - MOST_PROBLEMS:,} more"]
    parts = {
        "policy": _policy(style, script),
        # A file's name may have bytes that are no text.
        "title": html.escape(data["title"].encode("utf-8", "replace").decode()),
        "style": style,
        "script": script,
        "data": _inert({**data, "problems": problems}),
    }
    return _PLACE.sub(lambda place: parts[place[1]], _source("report.html"))
