"""Order 2 and 3 against diffusers' multistep schedulers, whole loops in float64 and in float32.

In float64 diffusers' steps run on its own formulas with alpha_bars in float64 (`Wide`), each of the order that it has
here (`AtOrders`), and ours equal them to 1e-10 of the largest value. What diffusers does otherwise, each held below
with its difference:

- ``solver_order = 3`` of DPMSolverMultistepScheduler takes half of the second difference that the parabola through
  three predictions has, so its error falls as that of order 2. With ``sde-dpmsolver++`` that term has another sign too,
  and the error falls as that of order 1. Ours is the whole parabola, which diffusers' UniPCMultistepScheduler without
  its corrector integrates as well.
- A step more than twice as long as the one before it is of its full order there, of order 1 here.
- With ``rescale_betas_zero_snr`` it takes 2^-24 for the alpha_bar 0 at which the grid begins.
- A step from timestep 0 to the level of timestep 0, which is none, gives NaN there with ``solver_order = 3``.
"""

import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import diffusers.schedulers.scheduling_dpmsolver_multistep as dpm
import diffusers.schedulers.scheduling_unipc_multistep as unipc
import pytest
import torch

from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.grids import timestep_grid
from ddim_cli.diffusion.levels import half_log_snr
from ddim_cli.diffusion.multistep import SHORT_GRID, make_multistep_table, moments, multistep_coefficients
from ddim_cli.diffusion.solvers import solver_of

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from rounding import U32, U64, alpha_bars_of
from test_multistep import Mixture, fine, levels, slope, solve

SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
}
GRIDS = ("trailing", "linspace", "logsnr")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
COUNTS = (5, 14, 15, 50)
SHAPE = (2, 1, 4, 4)
X_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISE = torch.randn(50, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CLOSE = 1e-10


def at_orders(kind):
    """A scheduler of diffusers whose steps are of the orders of ``orders``, where its own are higher.

    ``lowered`` are the steps at which that makes a difference.
    """

    class AtOrders(kind):
        orders, lowered = (), ()

        def _lower(self, own):
            lower = min(own, self.orders[self.step_index])
            self.lowered += (self.step_index,) if lower < own else ()
            return lower

        def multistep_dpm_solver_second_order_update(self, outputs, *args, **keys):
            if self._lower(2) == 1:
                return self.dpm_solver_first_order_update(outputs[-1], *args, **keys)
            return super().multistep_dpm_solver_second_order_update(outputs, *args, **keys)

        def multistep_dpm_solver_third_order_update(self, outputs, *args, **keys):
            order = self._lower(3)
            if order == 1:
                return self.dpm_solver_first_order_update(outputs[-1], *args, **keys)
            if order == 2:
                return super().multistep_dpm_solver_second_order_update(outputs, *args, **keys)
            return super().multistep_dpm_solver_third_order_update(outputs, *args, **keys)

        def multistep_uni_p_bh_update(self, *args, order, **keys):
            return super().multistep_uni_p_bh_update(*args, order=self._lower(order), **keys)

    return AtOrders


class Wide:
    """torch, whose float32 is float64: diffusers' steps raise and lower to that."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def scheduler_of(kind, scheduler, sampling, wide=True, **keys):
    """A multistep scheduler of diffusers on our timesteps, at our orders, its levels from alpha_bars in float64."""
    table, kind = make_multistep_table(scheduler, sampling, timestep_grid(scheduler, sampling)), at_orders(kind)
    grid = table.timesteps.tolist()
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "thresholding")
    names += ("dynamic_thresholding_ratio", "sample_max_value")
    final = "zero" if scheduler.set_alpha_to_one else "sigma_min"
    shared = {name: getattr(scheduler, name) for name in names}
    found = kind(**shared, final_sigmas_type=final, solver_order=sampling.order, **keys)
    found.orders = table.orders
    found.set_timesteps(len(grid))
    found.timesteps, found.num_inference_steps = torch.tensor(grid), len(grid)
    alpha_bars = alpha_bars_of(found.config, U64).value if wide else found.alphas_cumprod
    last = 1.0 if scheduler.set_alpha_to_one else alpha_bars[0].item()
    levels = torch.cat([alpha_bars[grid], torch.tensor([last], dtype=alpha_bars.dtype)])
    found.sigmas = ((1 - levels) / levels).sqrt()
    return found


def network(x, t):
    """Some function of x and t, neither small nor linear."""
    return torch.tanh(1.3 * x + 0.2) * (1 + t / 2000) - 0.3 * x


def theirs(found, x, noise, states=None):
    """The loop that diffusers' documentation shows, or its first ``states`` steps."""
    for i, t in enumerate(found.timesteps.tolist()[:states]):
        given = {} if noise is None else {"variance_noise": noise[i]}
        x = found.step(network(x, t), t, x, **given).prev_sample
    return x


def same(value):
    return value


def ours(scheduler, sampling, x, noise, dtype=torch.float64, change=same, move=same, states=None, alpha_bars=None):
    """The same loop with ours: its table changed, its numbers moved, or on other levels than the scheduler's."""
    solver, grid = solver_of(sampling), timestep_grid(scheduler, sampling)
    table, state = solver.table(scheduler, sampling, grid, dtype=dtype), solver.state(x)
    if alpha_bars is not None:
        orders = torch.tensor(table.orders)
        columns = multistep_coefficients(
            alpha_bars[:-1], alpha_bars[1:], orders, scheduler.prediction_type, sampling.eta
        )
        table = replace(table, values=torch.stack(columns, 1))
    table, treatment = change(table), solver.treatment(scheduler, sampling)
    for i, t in enumerate(grid[:states]):
        output, c = move(network(move(x), t)), table.row(i)
        if move is not same:
            c = type(c)(*(move(column) for column in c))
        x, _ = solver.step(move(x), output, c, treatment, None if noise is None else noise[i], state)
    return x


def settings(steps, order, eta=0.0, **keys):
    keys = {"timestep_spacing": "trailing", "clip_sample": False, **keys}
    return SchedulerSettings(**keys), SamplingSettings(steps=steps, order=order, eta=eta)


def both(scheduler, sampling, kind=dpm.DPMSolverMultistepScheduler, change=same, states=None, **keys):
    """Whole loops in float64, or their first ``states`` steps: diffusers' and ours; and its lowered steps."""
    noise = NOISE if sampling.eta else None
    if kind is dpm.DPMSolverMultistepScheduler:
        keys["algorithm_type"] = "sde-dpmsolver++" if sampling.eta else "dpmsolver++"
        keys |= {"solver_type": "midpoint", "lower_order_final": True}
    with mock.patch.object(dpm, "torch", Wide()), mock.patch.object(unipc, "torch", Wide()):
        reference = scheduler_of(kind, scheduler, sampling, **keys)
        expected = theirs(reference, X_T, noise, states)
    return expected, ours(scheduler, sampling, X_T, noise, change=change, states=states)


def too_long(scheduler, sampling):
    """The steps that are more than twice as long as the one before, but for the ends, where diffusers lowers too."""
    table = make_multistep_table(scheduler, sampling, timestep_grid(scheduler, sampling))
    length = half_log_snr(table.prev_alpha_bar) - half_log_snr(table.alpha_bar)
    return [i for i in range(1, len(table)) if 2 * length[i - 1] < length[i] < torch.inf]


def off(found, expected):
    """The largest difference, of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("to_one", [True, False], ids=["to 1", "to timestep 0"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_order_2_is_dpm_solver_pp(schedule, prediction, to_one, eta):
    for steps, spacing in product(COUNTS, GRIDS):
        keys = {"prediction_type": prediction, "set_alpha_to_one": to_one, "timestep_spacing": spacing, **schedule}
        scheduler, sampling = settings(steps, 2, eta, **keys)
        expected, found = both(scheduler, sampling)
        assert off(found, expected) < CLOSE, (steps, spacing)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_order_3_is_unipc_without_its_corrector(schedule, prediction):
    """UniP-3 solves for the weights of the same parabola. It always ends with lower orders, ours on a short grid."""
    for steps, spacing in product((5, 8, SHORT_GRID - 1), GRIDS):
        scheduler, sampling = settings(steps, 3, prediction_type=prediction, timestep_spacing=spacing, **schedule)
        kind = unipc.UniPCMultistepScheduler
        expected, found = both(scheduler, sampling, kind, disable_corrector=list(range(steps)))
        assert off(found, expected) < CLOSE, (steps, spacing)


class Halved:
    """Our table, its second difference weighted as DPMSolverMultistepScheduler does."""

    def __init__(self, table, sde):
        self._table, (start, end) = table, map(half_log_snr, (table.alpha_bar, table.prev_alpha_bar))
        step = end - start
        decay = (2 if sde else 1) * step
        a, b = (start - start.roll(1)) / step, (start - start.roll(2)) / step
        theirs = moments(decay)[2] / 2 - (1 if sde else 0)
        more = table.prev_alpha_bar.sqrt() * (theirs - moments(decay)[2])
        weights = torch.stack([1 / (a * b), -1 / (a * (b - a)), 1 / (b * (b - a))])
        self._more = torch.where(torch.tensor(table.orders) == 3, more * weights, 0)

    def row(self, i):
        c, (now, last, before_last) = self._table.row(i), self._more[:, i]
        return c._replace(
            from_now=c.from_now + now,
            from_last=c.from_last + last,
            from_before_last=c.from_before_last + before_last,
        )


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_order_3_of_diffusers_is_ours_but_for_its_second_difference(schedule, prediction, eta):
    for steps, spacing in product(COUNTS, GRIDS):
        scheduler, sampling = settings(steps, 3, eta, prediction_type=prediction, timestep_spacing=spacing, **schedule)
        expected, found = both(scheduler, sampling)
        _, halved = both(scheduler, sampling, change=partial(Halved, sde=eta > 0))
        assert off(halved, expected) < CLOSE, (steps, spacing)
        if spacing == "trailing" and steps > 5:
            # Of five steps two begin, and two end, with lower orders.
            assert off(found, expected) > 1e-6, steps


def test_so_its_error_falls_as_that_of_order_2():
    """On a mixture of normals, whose solution is known: ours of order 3, diffusers' of hardly more than 2."""
    scheduler, data, counts = fine(), Mixture(), (40, 80, 160)
    errors = {"ours": [], "theirs": []}
    for steps in counts:
        a, b = levels(scheduler, steps=steps, order=3)
        exact = data.exact(data.points, a, b)
        for name, change in (("ours", lambda table: table), ("theirs", lambda table: Halved(table, False))):
            found = solve(data.x0, data.points, scheduler, change=change, steps=steps, order=3)
            errors[name].append((found - exact).abs().mean().item())
    assert slope(errors["ours"], counts) > 2.6
    assert 1.8 < slope(errors["theirs"], counts) < 2.3


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_thresholding_is_in_the_same_place(order, eta):
    keys = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    scheduler, sampling = settings(20, order, eta, **keys)
    change = {"change": lambda table: Halved(table, eta > 0)} if order == 3 else {}
    expected, found = both(scheduler, sampling, **change)
    assert off(found, expected) < CLOSE
    unbound, _ = both(*settings(20, order, eta), **change)
    assert off(unbound, expected) > 0.01


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic", "logsnr"])
def test_steps_are_lowered_where_they_are_long_and_nowhere_else(spacing, order):
    """Of the orders that diffusers chooses by itself: all but the steps of `too_long` are of the same here."""
    for steps in COUNTS:
        scheduler, sampling = settings(steps, order, timestep_spacing=spacing)
        with mock.patch.object(dpm, "torch", Wide()):
            reference = scheduler_of(dpm.DPMSolverMultistepScheduler, scheduler, sampling)
            theirs(reference, X_T, None)
        long = [i for i in too_long(scheduler, sampling) if i < len(reference.timesteps) - 1]
        assert list(reference.lowered) == long, steps


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_in_float32_both_are_as_close_as_float32_allows(schedule, prediction, eta):
    """Ours to the exact loop, and diffusers' to the exact loop on its own levels, which it has in float32.

    Each may be off by what the loop makes of outputs that are off by a few units of float32; and diffusers' by more,
    as it takes differences of lambda in float32, whose relative error grows as the steps get short.
    """
    for steps in (5, 14, 50):
        scheduler, sampling = settings(steps, 2, eta, prediction_type=prediction, **schedule)
        noise = NOISE.float() if eta else None
        exact = ours(scheduler, sampling, X_T, noise)
        found = ours(scheduler, sampling, X_T.float(), noise, torch.float32)
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() <= leeway(scheduler, sampling, exact, noise, 8 * U32)

        kind = "sde-dpmsolver++" if eta else "dpmsolver++"
        reference = scheduler_of(dpm.DPMSolverMultistepScheduler, scheduler, sampling, False, algorithm_type=kind)
        theirs_found = theirs(reference, X_T.float(), noise)
        levels = 1 / (1 + reference.sigmas.double().square())
        lam = half_log_snr(levels)[:-1]
        rounding = 8 * (1 + lam.abs().max() / lam.diff().min()).item() * U32
        on_its_levels = ours(scheduler, sampling, X_T, noise, alpha_bars=levels)
        assert (theirs_found - on_its_levels).abs().max() <= leeway(scheduler, sampling, exact, noise, rounding)


def leeway(scheduler, sampling, exact, noise, by):
    """How far a loop gets where all that goes into a step, and each term that comes out, is off by ``by`` of itself."""
    found = 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def move(value, generator=generator):
            return value * (1 + by * (torch.randint(2, value.shape, generator=generator).to(value) * 2 - 1))

        found = max(found, (ours(scheduler, sampling, X_T, noise, move=move) - exact).abs().max().item())
    return 4 * found
