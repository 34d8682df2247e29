"""Tables and panels on stdout, and how they write numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddim_cli.cli import console
from ddim_cli.outputs.figures import speed_text as speed_text


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``; hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else ('es' if noun.endswith('h') else 's')}"


def steps_text(steps: int, order: int = 1) -> str:
    """ "50 steps", "10 steps of order 2"."""
    return counted(steps, "step") + (f" of order {order}" if order > 1 else "")


def timesteps_text(timesteps: Sequence[Any]) -> str:
    """How many, and which: the first and the last of many."""
    shown = timesteps if len(timesteps) <= 12 else [*timesteps[:6], "...", *timesteps[-5:]]
    return f"{len(timesteps)}: {' '.join(map(str, shown))}"


def beginning(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What pictures begin from besides their own noise, as a record's section ``sampling`` says: names and values."""
    rows: dict[str, Any] = {}
    for key, name in (("init", "begins from"), ("mask", "mask")):
        if isinstance(sampling.get(key), Mapping):
            rows[name] = picture_text(sampling[key])
    if "strength" in sampling:
        start = f", from timestep {sampling['start_timestep']}" if "start_timestep" in sampling else ""
        rows["strength"] = f"{sampling['strength']}{start}"
    if "resample" in sampling:
        rows["each step runs"] = f"{sampling['resample']} times (RePaint)"
    if "variation_strength" in sampling:
        rows["noise"] = f"turned by {sampling['variation_strength']} to seed {sampling.get('variation_seed')}'s"
    return rows


def picture_text(facts: Mapping[str, Any]) -> str:
    """What a sidecar says of a picture from elsewhere: its name, and what was done to it first."""
    conversion = facts.get("conversion")
    done = ", ".join(map(str, conversion)) if isinstance(conversion, list) else ""
    return f"{facts.get('file')}" + (f" ({done})" if done else "")


def first_and_last(names: Sequence[str]) -> str:
    """``"a.png ... z.png"``, or the only name."""
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"


def show_columns(rows: Sequence[Mapping[str, str]], title: str = "", words: int = 1) -> None:
    """Print rows of the same names: a table on a terminal, else a line a row. The first ``words`` columns are text."""
    screen = console.stdout()
    for row in rows:
        line = ", ".join(f"{name}: {value}" for name, value in row.items() if value)
        console.log(line)
        if not screen.is_terminal:
            screen.print(line, markup=False, soft_wrap=True)
    if not screen.is_terminal:
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if number < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))
    screen.print(table)


def crossed(
    across: tuple[str, Sequence[str]], down: tuple[str, Sequence[str]], texts: Mapping[tuple[int, ...], str]
) -> list[dict[str, str]]:
    """Rows for `show_columns` with two axes, each a name and its labels; ``texts`` are by place, (across, down)."""
    (name, labels), (other, rows) = across, down
    return [
        {f"{other} \\ {name}": row, **{label: texts.get((i, j), "") for i, label in enumerate(labels)}}
        for j, row in enumerate(rows)
    ]


def show_table(rows: Mapping[str, Any], title: str, style: str = "green") -> None:
    """Print names and values: a panel on a terminal, else plain lines."""
    screen = console.stdout()
    if not screen.is_terminal:
        for name, value in rows.items():
            screen.print(f"{name}: {value}".replace("\n", "\n  "), markup=False, soft_wrap=True)
        return
    from rich.panel import Panel
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    screen.print(Panel(table, title=title, border_style=style, expand=False))


def close(rows: Mapping[str, Any], title: str = "done") -> None:
    """Print the closing panel of a command, and copy its rows to the log file."""
    for name, value in rows.items():
        console.log(f"{name}: {value}")
    show_table(rows, title)
