"""Images a second over the batch size, ours and others'. Drawn by matplotlib, of the ``plot`` extra."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from ddim_cli.errors import missing_extra
from ddim_cli.outputs.named import Kind

# Ours comes first and stands out.
COLOURS = ("#1f77b4", "#d9822b", "#6b7a8f")
MARKERS = "os^"
SOFTWARE = "ddim bench --plot"
PLOT = Kind.of_png("plot of ddim bench", SOFTWARE)


@dataclass(frozen=True)
class SpeedCurve:
    """One contestant: images a second at each batch size, the median and the slowest and fastest round."""

    name: str
    batch_sizes: Sequence[int]
    median: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _label_points(axes, curves: Sequence[SpeedCurve]) -> None:
    """Each point's number: above all bars of its batch size if it is the fastest there, below them if the slowest."""
    from matplotlib.patheffects import withStroke

    for i, size in enumerate(curves[0].batch_sizes):
        by_speed = sorted(range(len(curves)), key=lambda c: curves[c].median[i])
        for place, c in enumerate(by_speed):
            above = place == len(curves) - 1
            if above:
                y = max(curve.high[i] for curve in curves)
            else:
                y = min(curve.low[i] for curve in curves) if place == 0 else curves[c].low[i]
            axes.annotate(
                _number(curves[c].median[i]),
                (size, y),
                xytext=(0, 5 if above else -5),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=8,
                color=COLOURS[c % len(COLOURS)],
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                zorder=5,
            )


def draw_speeds(curves: Sequence[SpeedCurve], title: str, subtitle: str = "") -> bytes:
    """A PNG with a line for each contestant, both axes logarithmic, bars from the slowest round to the fastest.

    Raises:
        UsageError: where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    except ImportError:
        raise missing_extra("--plot", "matplotlib", "plot") from None
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, curve in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        bars = [
            [m - low for m, low in zip(curve.median, curve.low, strict=True)],
            [high - m for m, high in zip(curve.median, curve.high, strict=True)],
        ]
        axes.errorbar(
            curve.batch_sizes,
            curve.median,
            yerr=bars,
            label=curve.name,
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            markersize=6,
            linewidth=2 if i == 0 else 1.5,
            capsize=3,
            elinewidth=1,
            zorder=3 - i * 0.1,
        )
    _label_points(axes, curves)
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({size for curve in curves for size in curve.batch_sizes})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    # Room for the numbers at the points; a single point gets a factor to either side.
    axes.margins(x=0.08)
    if len(sizes) == 1:
        axes.set_xlim(sizes[0] / 2, sizes[0] * 2)
    low, high = min(min(c.low) for c in curves), max(max(c.high) for c in curves)
    room = max((high / low) ** 0.12, 1.25)
    axes.set_ylim(low / room, high * room)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch size")
    axes.set_ylabel("images per second")
    axes.grid(alpha=0.25, which="major")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"{title}\n", loc="left", fontsize=12, fontweight="bold")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#555555")
    axes.legend(frameon=False, loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": SOFTWARE})
    return buffer.getvalue()
