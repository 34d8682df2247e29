"""alpha_bar and SNR over t, with the grids that are sampled marked. Drawn by matplotlib, of the ``plot`` extra."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from ddim_cli.errors import missing_extra
from ddim_cli.outputs.named import Kind

# Hollow and of different shapes, so that grids which share timesteps stay apart.
MARKERS = "os^Dv"
SOFTWARE = "ddim schedule --plot"
PLOT = Kind.of_png("plot of ddim schedule", SOFTWARE)


@dataclass(frozen=True)
class Curve:
    """One schedule: ``alpha_bars`` and ``snr_db`` of all T timesteps, and the ``timesteps`` of the grid."""

    name: str
    alpha_bars: Sequence[float]
    snr_db: Sequence[float]
    timesteps: Sequence[int]


def draw_schedules(curves: Sequence[Curve]) -> bytes:
    """A PNG with the curves overlaid: alpha_bar above, SNR below.

    Raises:
        UsageError: where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("--plot", "matplotlib", "plot") from None
    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for curve, marker in zip(curves, cycle(MARKERS), strict=False):
        label = f"{curve.name}: {len(curve.timesteps)} steps"
        for axes, values in ((above, curve.alpha_bars), (below, curve.snr_db)):
            [line] = axes.plot(range(len(values)), values, linewidth=1.2, label=label)
            marked = [values[t] for t in curve.timesteps]
            axes.plot(curve.timesteps, marked, marker, markersize=5, markerfacecolor="none", color=line.get_color())
    above.set_ylabel("alpha_bar")
    below.set_ylabel("SNR (dB)")
    below.set_xlabel("timestep t")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    above.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": SOFTWARE})
    return buffer.getvalue()
