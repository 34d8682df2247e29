"""Images a second over the batch size, ours and others'. Drawn by matplotlib, of the ``plot`` extra."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from ddim_cli.errors import UsageError

# The first is ours; the others step back.
COLOURS = ("#1f77b4", "#d9822b", "#6b7a8f")
MARKERS = "os^"


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


def _label_points(axes, curve: SpeedCurve, colour: str, above: bool) -> None:
    for x, y in zip(curve.batch_sizes, curve.median, strict=True):
        axes.annotate(
            _number(y),
            (x, y),
            xytext=(0, 9 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
            color=colour,
        )


def draw_speeds(curves: Sequence[SpeedCurve], title: str, subtitle: str = "") -> bytes:
    """A PNG with a line for each contestant, both axes logarithmic, bars from the slowest round to the fastest.

    Raises:
        UsageError: where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
    except ImportError:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install 'ddim-cli[plot]'") from None
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
        _label_points(axes, curve, colour, above=i == 0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({size for curve in curves for size in curve.batch_sizes})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    # Room for the numbers at the points; a single point gets a factor to either side.
    axes.margins(x=0.08, y=0.15)
    if len(sizes) == 1:
        axes.set_xlim(sizes[0] / 2, sizes[0] * 2)
    low, high = min(min(c.low) for c in curves), max(max(c.high) for c in curves)
    room = max((high / low) ** 0.12, 1.25)
    axes.set_ylim(low / room, high * room)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images per second")
    axes.grid(alpha=0.25, which="major")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"{title}\n", loc="left", fontsize=12, fontweight="bold")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#555555")
    axes.legend(frameon=False, loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
