"""``ddim schedule``: the timesteps and their coefficients, as a table or a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ddim_cli.cli import console, panels
from ddim_cli.cli.options import Json, OverwriteFile, Verbose, option, with_settings

if TYPE_CHECKING:
    from ddim_cli.config.layers import Layer
    from ddim_cli.outputs.named import NamedFile
    from ddim_cli.sampling.resolve import Run

COLUMNS = ("step", "t", "prev t", "alpha_bar", "prev alpha_bar", "sigma", "SNR (dB)")
# Of order 2 and 3 what x_prev is made of: x_t, the x0 predicted there, those of the two steps before, and noise.
WEIGHTS = {"from_x": "x_t", "from_now": "x0", "from_last": "x0 -1", "from_before_last": "x0 -2", "sigma": "sigma"}


@console.handles_errors
@with_settings(only=("model", "steps", "eta", "order", "beta_schedule", "spacing", "prediction_type"), each_file=True)
def schedule(
    schedules: dict[str, list],
    plot: Annotated[Path | None, option("Plot alpha_bar and SNR over t to this file.", metavar="FILE.png")] = None,
    overwrite: OverwriteFile = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    Print the timesteps and the coefficients of each step.

    Each -c FILE is a separate schedule here, so that several can be printed or plotted together.

    [bold]Examples[/bold]

    \b
    ddim schedule --steps 10 --spacing trailing
    ddim schedule -c a.toml -c b.toml --plot schedules.png
    ddim schedule --steps 20 --eta 1 --json
    ddim schedule --steps 10 --order 2 --spacing logsnr
    """
    from ddim_cli.outputs.named import name_file
    from ddim_cli.outputs.schedule_plot import PLOT

    to = name_file(plot, PLOT, "--plot", overwrite) if plot is not None else None
    shown = {name: _tabulate(name, layers) for name, layers in schedules.items()}
    if to is not None:
        _draw(to, shown)
    if json:
        console.print_json({"schedules": [{"name": name, **table} for name, (table, _) in shown.items()]})
    elif to is None:
        for name, (table, _) in shown.items():
            _show(name, table)


def _tabulate(name: str, layers: list[Layer]) -> tuple[dict[str, Any], Run]:
    """Return the rows of a schedule, and the run they are of."""
    import torch

    from ddim_cli.diffusion.levels import snr_db
    from ddim_cli.diffusion.solvers import solver_of
    from ddim_cli.sampling.resolve import resolve_loosely

    run = resolve_loosely(layers)
    for warning in run.warnings:
        console.warn(f"{name}: {warning}")
    settings = run.config.sampling
    table = solver_of(settings).table(run.config.scheduler, settings, run.timesteps, dtype=torch.float64)
    levels = zip(table.alpha_bar.tolist(), table.prev_alpha_bar.tolist(), table.sigma.tolist(), strict=True)
    rows = [
        {
            "step": i,
            "timestep": t,
            "previous_timestep": previous if previous >= 0 else None,
            "alpha_bar": alpha_bar,
            "previous_alpha_bar": previous_alpha_bar,
            "sigma": sigma,
            # JSON has no infinities.
            "snr_db": snr_db(alpha_bar) if 0 < alpha_bar < 1 else None,
        }
        for i, (t, previous, (alpha_bar, previous_alpha_bar, sigma)) in enumerate(
            zip(run.timesteps, table.prev_timesteps, levels, strict=True), start=1
        )
    ]
    if settings.order > 1:
        for i, row in enumerate(rows):
            weights = table.row(i)._asdict()
            row |= {"order": table.orders[i], **{key: weights[key].item() for key in WEIGHTS}}
    steps = settings.steps if settings.timesteps is None else len(rows)
    return {"asked": steps, "steps": len(rows), "order": settings.order, "rows": rows}, run


def _show(name: str, schedule: dict[str, Any]) -> None:
    from rich.table import Table

    asked = f", {schedule['asked']} asked for" if schedule["asked"] != schedule["steps"] else ""
    table = Table(title=f"{name}: {panels.counted(schedule['steps'], 'step')}{asked}", title_justify="left")
    several = schedule["order"] > 1
    for column in (*COLUMNS[:3], *(("order", *WEIGHTS.values()) if several else COLUMNS[3:])):
        table.add_column(column, justify="right", no_wrap=True)
    for row in schedule["rows"]:
        previous = row["previous_timestep"]
        table.add_row(
            str(row["step"]),
            str(row["timestep"]),
            "end" if previous is None else str(previous),
            *(_weights(row) if several else _levels(row)),
        )
    console.stdout().print(table)


def _levels(row: dict[str, Any]) -> list[str]:
    snr = "-inf" if row["alpha_bar"] <= 0 else "inf" if row["snr_db"] is None else f"{row['snr_db']:.2f}"
    return [*(f"{row[key]:.6f}" for key in ("alpha_bar", "previous_alpha_bar", "sigma")), snr]


def _weights(row: dict[str, Any]) -> list[str]:
    # What a step of lower order does not use is left empty.
    values = [f"{row[key]:.4f}" if row[key] or key == "sigma" else "" for key in WEIGHTS]
    return [str(row["order"]), *values]


def _draw(to: NamedFile, shown: dict[str, tuple[dict[str, Any], Run]]) -> None:
    from ddim_cli.diffusion.betas import make_alpha_bars
    from ddim_cli.diffusion.levels import snr_db
    from ddim_cli.outputs.schedule_plot import Curve, draw_schedules

    curves = []
    for name, (_, run) in shown.items():
        alpha_bars = make_alpha_bars(run.config.scheduler).tolist()
        curves.append(Curve(name, alpha_bars, [snr_db(a) for a in alpha_bars], run.timesteps))
    to.write(draw_schedules(curves))
    console.say(f"wrote {to}")
