"""How near few steps come, by order: a table and a plot of finished sweeps over order and steps.

    ddim sweep -c configs/orders.toml -o orders
    ddim sample -c configs/orders.toml -n 32 --steps 1000 -o exact
    python tests/benchmarks/orders.py orders=exact --plot orders.png

Each argument is the folder of a sweep, and after "=" one of pictures in 1000 steps: the Frechet distances are those
that the sweep has, and how far pictures are from those of 1000 steps is computed here: the root mean square of the
difference, of pixels from 0 to 1, the mean over the seeds that the exact folder has.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

Table = dict[tuple[int, int], float]


def cells(sweep: Path) -> dict[tuple[int, int], dict]:
    """(steps, order) -> what sweep.json says of the cell."""
    found = json.loads((sweep / "sweep.json").read_text())
    names = [axis["name"] for axis in found["axes"]]
    table = {}
    for cell in found["cells"]:
        at = {name: axis["values"][i]["label"] for name, axis, i in zip(names, found["axes"], cell["at"], strict=True)}
        table[int(at["steps"]), int(at["order"])] = cell
    return table


def distances(sweep: Path) -> Table:
    return {at: cell["score"]["value"] for at, cell in cells(sweep).items() if cell.get("score")}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.float64) / 255


def errors(sweep: Path, exact: Path) -> Table:
    """How far the pictures of each cell are from those of the same seeds in ``exact``."""
    names = [path.name for path in sorted(exact.glob("[0-9]*.png"))]
    return {
        at: float(
            np.mean(
                [
                    np.sqrt(np.mean((pixels(sweep / cell["folder"] / name) - pixels(exact / name)) ** 2))
                    for name in names
                ]
            )
        )
        for at, cell in cells(sweep).items()
    }


def show(title: str, table: Table, digits: int) -> None:
    steps, orders = (sorted({at[i] for at in table}) for i in (0, 1))
    print(f"\n| {title} | {' | '.join(f'{n} steps' for n in steps)} |")
    print("|---" * (len(steps) + 1) + "|")
    for order in orders:
        print(f"| order {order} | {' | '.join(f'{table[n, order]:.{digits}f}' for n in steps)} |")


def draw(panels: list[tuple[str, str, Table]]) -> bytes:
    """A panel each: its title, what its values are, and the values, over the steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(4.6 * len(panels), 4), dpi=110, layout="constrained")
    for axes, (title, what, table) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        steps = sorted({at[0] for at in table})
        for order, marker in zip(sorted({at[1] for at in table}), "os^", strict=False):
            name = "order 1 (DDIM)" if order == 1 else f"order {order}"
            axes.plot(steps, [table[n, order] for n in steps], marker=marker, markersize=5, linewidth=1.4, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(steps, [str(n) for n in steps])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(title)
        axes.set_xlabel("steps")
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", metavar="SWEEP[=EXACT]")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    given = parser.parse_args()
    panels = []
    for text in given.sweeps:
        sweep, _, exact = text.partition("=")
        found = json.loads((Path(sweep) / "sweep.json").read_text())
        name = found.get("model", {}).get("source") or Path(sweep).name
        if scored := distances(Path(sweep)):
            show(f"{name}: Frechet distance (mnist-digits)", scored, 2)
            panels.append((name, "Frechet distance (mnist-digits)", scored))
        if exact:
            table = errors(Path(sweep), Path(exact))
            show(f"{name}: distance to 1000 steps", table, 4)
            panels.append((name, "distance to 1000 steps", table))
    if given.plot is not None:
        given.plot.write_bytes(draw(panels))


if __name__ == "__main__":
    main()
