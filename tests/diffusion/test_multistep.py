"""Solvers of order 2 and 3 against closed forms: what is exact for any grid, and how fast the rest falls with N.

Where data is normal or a mixture of normals, the best prediction of x0 is known at every level, and so is the exact
solution of the probability-flow ODE: it keeps the quantile of x (in one dimension), or its place in units of the
marginal's deviation along each principal axis. Grids are even in log-SNR, on 200,000 training timesteps, so that
rounding to timesteps is no part of an error.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch

from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.grids import timestep_grid
from ddim_cli.diffusion.multistep import SHORT_GRID, moments
from ddim_cli.diffusion.solvers import solver_of
from ddim_cli.errors import ConfigError

ORDERS, COUNTS = (1, 2, 3), (10, 20, 40, 80, 160, 320)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
# All of it is float64: roundings of 1e-16, which no factor of these grids makes more than a million times as large.
CLOSE = 1e-10


@cache
def fine(total=200_000, **keys):
    """The linear betas of DDPM on so many training timesteps, ending at the level of timestep 0 and not at 1."""
    start, end = 1e-4 * 1000 / total, 0.02 * 1000 / total
    return SchedulerSettings(
        num_train_timesteps=total,
        beta_start=start,
        beta_end=end,
        set_alpha_to_one=False,
        clip_sample=False,
        timestep_spacing="logsnr",
        **keys,
    )


def output_for(prediction, x0, x, alpha_bar):
    """What a network of this type returns at x that predicts this x0."""
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    eps = (x - signal * x0) / noise if noise else torch.zeros_like(x)
    return {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}[prediction]


def table_of(scheduler, inverse=False, **sampling):
    sampling = SamplingSettings(**sampling)
    solver, grid = solver_of(sampling, inverse), timestep_grid(scheduler, sampling)
    return solver, solver.table(scheduler, sampling, grid, dtype=torch.float64)


def solve(predict_x0, x, scheduler, inverse=False, change=lambda table: table, **sampling):
    """All steps from x, float64, with a network that predicts ``predict_x0(x, alpha_bar)``."""
    solver, table = table_of(scheduler, inverse, **sampling)
    treatment, rows = solver.treatment(scheduler, SamplingSettings(**sampling)), change(table)
    starts, state = table.prev_alpha_bar if inverse else table.alpha_bar, solver.state(x)
    for i, alpha_bar in enumerate(starts.tolist()):
        output = output_for(scheduler.prediction_type, predict_x0(x, alpha_bar), x, alpha_bar)
        x, _ = solver.step(x, output, rows.row(i), treatment, None, state)
    return x


def levels(scheduler, **sampling):
    """alpha_bar at the start and at the end of a run."""
    _, table = table_of(scheduler, **sampling)
    return table.alpha_bar[0].item(), table.prev_alpha_bar[-1].item()


class Mixture:
    """Two normals on a line."""

    means, weights, s = torch.tensor([-1.0, 1.5], dtype=torch.float64), torch.tensor([0.4, 0.6]).double(), 0.2
    points = torch.linspace(-2, 2, 41, dtype=torch.float64)

    def _deviation(self, a):
        return math.sqrt(a * self.s**2 + 1 - a)

    def x0(self, x, a):
        variance = self._deviation(a) ** 2
        off = x[:, None] - math.sqrt(a) * self.means
        share = torch.softmax(self.weights.log() - off**2 / (2 * variance), 1)
        return (share * (self.means + math.sqrt(a) * self.s**2 / variance * off)).sum(1)

    def _below(self, x, a):
        return (self.weights * torch.special.ndtr((x[:, None] - math.sqrt(a) * self.means) / self._deviation(a))).sum(1)

    def exact(self, x, a, b):
        """Where the ODE takes x from level a to b: to the same quantile, found by bisection."""
        wanted, low, high = self._below(x, a), torch.full_like(x, -20), torch.full_like(x, 20)
        for _ in range(100):
            middle = (low + high) / 2
            less = self._below(middle, b) < wanted
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        return (low + high) / 2


class Correlated:
    """A normal in the plane, its axes at an angle, one ten times as wide as the other."""

    mean = torch.tensor([0.5, -0.2], dtype=torch.float64)
    _c, _s = math.cos(0.6), math.sin(0.6)
    axes, deviations = torch.tensor([[_c, -_s], [_s, _c]], dtype=torch.float64), torch.tensor([0.8, 0.08]).double()
    points = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def _scaled(self, x, a, factor):
        """What of x is off the mean, times ``factor`` of the deviations along each axis."""
        return (x - math.sqrt(a) * self.mean) @ self.axes * factor @ self.axes.T

    def x0(self, x, a):
        variance = self.deviations**2
        return self.mean + self._scaled(x, a, math.sqrt(a) * variance / (a * variance + 1 - a))

    def exact(self, x, a, b):
        before, after = (torch.sqrt(level * self.deviations**2 + 1 - level) for level in (a, b))
        return math.sqrt(b) * self.mean + self._scaled(x, a, after / before)


def slope(errors, counts=COUNTS):
    """How fast errors fall: the power of 1 / N, by least squares in log-log."""
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize(("order", "least"), [(1, 0.9), (2, 1.8), (3, 2.6)])
@pytest.mark.parametrize("data", [Mixture(), Correlated()], ids=["mixture", "correlated"])
def test_the_error_falls_with_the_order(data, order, least):
    errors = []
    for steps in COUNTS:
        a, b = levels(fine(), steps=steps, order=order)
        found = solve(data.x0, data.points, fine(), steps=steps, order=order)
        errors.append((found - data.exact(data.points, a, b)).abs().mean().item())
    assert slope(errors) >= least, errors


@pytest.mark.parametrize(("order", "least"), [(1, 0.9), (2, 1.8), (3, 2.6)])
def test_inversion_has_its_order_too(order, least):
    """Up the same grid, from the level of timestep 0."""
    data, errors = Mixture(), []
    for steps in COUNTS:
        a, b = levels(fine(), steps=steps, order=order)
        x = data.exact(data.points, a, b)
        found = solve(data.x0, x, fine(), inverse=True, steps=steps, order=order)
        errors.append((found - data.points).abs().mean().item())
    assert slope(errors) >= least, errors


def marginal(order, eta, steps, mean=0.3, s=0.5):
    """How far mean and variance of the last x of a run are off, on data N(mean, s^2), followed exactly.

    Every step is linear. The state is (x, the last x0, the one before it, 1), of which it makes a linear map and adds
    sigma z. x starts off the marginal by 1 in mean and in variance, of which the SDE of tau leaves, from the ratio
    w = (1 - a) / a at the start of a step to w' at its end, sqrt(V' / V) ((s^2 + w') / (s^2 + w))^(tau^2 / 2) and its
    square.
    """
    _, table = table_of(fine(), steps=steps, order=order, eta=eta)

    def variance_at(a):
        return a * s**2 + 1 - a

    a = table.alpha_bar[0].item()
    first = np.array([math.sqrt(a) * mean + 1, 0, 0, 1])
    moment, left = np.outer(first, first), 1.0
    moment[0, 0] += variance_at(a) + 1
    for i, (a, b) in enumerate(zip(table.alpha_bar.tolist(), table.prev_alpha_bar.tolist(), strict=True)):
        gain = math.sqrt(a) * s**2 / variance_at(a)
        x0 = np.array([gain, 0, 0, mean - gain * math.sqrt(a) * mean])
        c = {name: value.item() for name, value in table.row(i)._asdict().items()}
        if order == 1:
            x = np.array([c["direction"] / math.sqrt(1 - a), 0, 0, 0])
            x += (c["prev_signal"] - x[0] * math.sqrt(a)) * x0
        else:
            x = np.array([c["from_x"], c["from_last"], c["from_before_last"], 0.0]) + c["from_now"] * x0
        step = np.stack([x, x0, [0, 1, 0, 0], [0, 0, 0, 1]])
        moment = step @ moment @ step.T
        moment[0, 0] += c["sigma"] ** 2
        w, w_after = (1 - a) / a, (1 - b) / b
        tau_squared = math.log(1 - c["sigma"] ** 2 / (1 - b)) / math.log(w_after / w)
        left *= math.sqrt(variance_at(b) / variance_at(a)) * ((s**2 + w_after) / (s**2 + w)) ** (tau_squared / 2)
    found_variance = moment[0, 0] - moment[0, 3] ** 2
    return (
        abs(moment[0, 3] - math.sqrt(b) * mean - left),
        abs(found_variance - variance_at(b) - left**2),
    )


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(("order", "least", "limit"), [(1, 0.9, 0.01), (2, 1.8, 2e-4), (3, 1.8, 5e-5)])
def test_with_noise_the_marginal_converges(order, least, limit, eta):
    """Mean and variance of a normal. The noise of a step limits the variance to order 2; order 3 has less error."""
    of_mean, of_variance = zip(*(marginal(order, eta, steps) for steps in COUNTS), strict=True)
    for errors in (of_mean, of_variance):
        # At eta 1 nothing is left of the mean that was off.
        assert errors[-1] < 1e-14 or math.log2(errors[-2] / errors[-1]) >= least, errors
        assert errors[-1] < limit, errors


def test_orders_differ_in_error_as_well_as_in_slope():
    """In 80 steps of a mixture, each order is at least three times as close as the one below it."""
    data, errors = Mixture(), []
    for order in ORDERS:
        a, b = levels(fine(), steps=80, order=order)
        found = solve(data.x0, data.points, fine(), steps=80, order=order)
        errors.append((found - data.exact(data.points, a, b)).abs().mean().item())
    assert errors[0] > 3 * errors[1] > 9 * errors[2], errors


@pytest.mark.parametrize("decay", [0.0, 1e-9, 1e-3, 0.3, 0.999, 1.0, 1.001, 3.0, 20.0, 700.0])
def test_moments_are_the_integrals(decay):
    nodes, weights = np.polynomial.legendre.leggauss(200)
    # Where it decays fast, only the last part of the step counts.
    low = max(0.0, 1 - 60 / decay) if decay else 0.0
    u = low + (1 - low) * (nodes + 1) / 2
    for k, found in enumerate(moments(torch.tensor([decay], dtype=torch.float64))):
        expected = (1 - low) / 2 * np.sum(weights * decay * np.exp(-decay * (1 - u)) * u**k)
        assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-300)


def test_moments_of_an_endless_step_are_one():
    assert [w.item() for w in moments(torch.tensor([math.inf], dtype=torch.float64))] == [1, 1, 1]


GRIDS = {
    "leading": {},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace", "set_alpha_to_one": False},
    "quadratic": {"timestep_spacing": "quadratic"},
    "uniform": {"timestep_spacing": "uniform"},
    "logsnr": {"timestep_spacing": "logsnr"},
    "logsnr to timestep 0": {"timestep_spacing": "logsnr", "set_alpha_to_one": False},
    "zero SNR": {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "zero SNR, logsnr": {
        "timestep_spacing": "logsnr",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"},
    "no beta at 0": {"beta_start": 0.0},
    "explicit": {"timesteps": (999, 500, 499, 20, 3)},
}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def settings_of(grid, **sampling):
    keys = {key: value for key, value in grid.items() if key != "timesteps"}
    return SchedulerSettings(clip_sample=False, **keys), {
        **({"timesteps": grid["timesteps"]} if "timesteps" in grid else {"steps": 13}),
        **sampling,
    }


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("order", [2, 3])
@each_grid
def test_a_single_picture_is_met_exactly(grid, order, eta):
    """Of one x0 alone every step is exact, on every grid: the signal of its level, and just that level's noise."""
    scheduler, sampling = settings_of(grid, order=order, eta=eta)
    _, table = table_of(scheduler, **sampling)
    c = table.values.unbind(1)
    *_, from_x, now, last, before_last, sigma = c
    signal, noise = table.alpha_bar.sqrt(), (1 - table.alpha_bar).sqrt()
    prev_signal, prev_noise = table.prev_alpha_bar.sqrt(), (1 - table.prev_alpha_bar).sqrt()
    close = {"rtol": 0, "atol": CLOSE}
    torch.testing.assert_close(from_x * signal + now + last + before_last, prev_signal, **close)
    torch.testing.assert_close((from_x * noise).square() + sigma.square(), prev_noise.square(), **close)


@each_grid
def test_a_step_to_the_end_is_the_predicted_x0(grid):
    """At alpha_bar 1 there is no noise, and nothing but x0: to the bit, whatever came before."""
    scheduler, sampling = settings_of(grid, order=3)
    solver, table = table_of(scheduler, **sampling)
    if table.prev_alpha_bar[-1] < 1:
        return
    generator = torch.Generator().manual_seed(0)
    x, output, *state = torch.randn(4, 2, 1, 3, 3, generator=generator, dtype=torch.float64)
    treatment = solver.treatment(scheduler, SamplingSettings(**sampling))
    last, x0 = solver.step(x, output, table.row(len(table) - 1), treatment, None, tuple(state))
    assert torch.equal(last, x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_first_step_is_ddim(prediction, eta):
    """With the epsilon that follows from the clipped x0, which is DDIM's use_clipped_model_output."""
    scheduler = SchedulerSettings(prediction_type=prediction, timestep_spacing="trailing")
    x, output, noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for sampling in (
        SamplingSettings(steps=10, eta=eta, order=1, use_clipped_model_output=True),
        SamplingSettings(steps=10, eta=eta, order=3),
    ):
        solver = solver_of(sampling)
        table = solver.table(scheduler, sampling, timestep_grid(scheduler, sampling), dtype=torch.float64)
        treatment = solver.treatment(scheduler, sampling)
        found.append(solver.step(x, output, table.row(0), treatment, noise, solver.state(x))[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=CLOSE)


def test_clipping_acts_on_every_x0_that_a_step_uses():
    """A network that predicts far beyond the bound is one that predicts the bound."""
    scheduler = SchedulerSettings(timestep_spacing="trailing", prediction_type="sample")
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    beyond = solve(lambda x, a: torch.full_like(x, 7.0), x, scheduler, steps=10, order=3)
    at = solve(lambda x, a: torch.full_like(x, 1.0), x, scheduler, steps=10, order=3)
    assert torch.equal(beyond, at)
    assert torch.equal(at, torch.ones_like(at))


def test_a_parabola_in_lambda_is_integrated_exactly():
    """Order 3, once three predictions are there: where x0 = lambda^2, by quadrature of the integral itself."""
    scheduler = fine(total=1000)
    solver, table = table_of(scheduler, steps=20, order=3)
    assert table.orders[2] == 3

    def lam(a):
        return math.log(a / (1 - a)) / 2

    a = table.alpha_bar.tolist()
    x0, *state = (torch.tensor([lam(a[i]) ** 2], dtype=torch.float64) for i in (2, 1, 0))
    x = torch.zeros_like(x0)
    output = output_for("epsilon", x0, x, a[2])
    c = table.row(2)
    found, _ = solver.step(x, output, c, solver.treatment(scheduler, SamplingSettings(order=3)), None, tuple(state))
    end, start = lam(table.prev_alpha_bar[2].item()), lam(a[2])
    nodes, weights = np.polynomial.legendre.leggauss(50)
    at = start + (end - start) * (nodes + 1) / 2
    integral = (end - start) / 2 * np.sum(weights * np.exp(at) * at**2)
    assert found.item() == pytest.approx(math.sqrt(1 - table.prev_alpha_bar[2].item()) * integral, rel=1e-9)


@pytest.mark.parametrize("order", [2, 3])
@each_grid
def test_inversion_of_one_epsilon_is_exact(grid, order):
    """Where epsilon is the same at every level, the way up leads to just that much of it, whatever the steps."""
    scheduler, sampling = settings_of(grid, order=order)
    if scheduler.prediction_type != "epsilon":
        return
    x0, eps = torch.randn(2, 2, 1, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    solver, table = table_of(scheduler, inverse=True, **sampling)
    treatment, state = solver.treatment(scheduler, SamplingSettings(**sampling)), solver.state(x0)
    bottom, top = table.prev_alpha_bar[0].item(), table.alpha_bar[-1].item()
    x = math.sqrt(bottom) * x0 + math.sqrt(1 - bottom) * eps
    for i in range(len(table)):
        x, predicted = solver.step(x, eps, table.row(i), treatment, None, state)
        torch.testing.assert_close(predicted, x0, rtol=0, atol=CLOSE)
    torch.testing.assert_close(x, math.sqrt(top) * x0 + math.sqrt(1 - top) * eps, rtol=0, atol=CLOSE)


def test_orders_of_a_short_grid():
    """1, 2 and then 3; of a grid of fewer than 15 steps the last is of 1 and the one before it of 2 at most."""
    for steps in (5, SHORT_GRID - 1):
        _, table = table_of(fine(), steps=steps, order=3)
        assert table.orders == (1, 2, *[3] * (steps - 4), 2, 1)
    _, table = table_of(fine(), steps=SHORT_GRID, order=3)
    assert table.orders == (1, 2, *[3] * 13)
    _, table = table_of(fine(), steps=SHORT_GRID, order=2)
    assert table.orders == (1, *[2] * 14)


def test_a_step_much_longer_than_the_last_is_of_order_1():
    """The leading grid goes from one stride above 0 to 0: four times as far in lambda as before, in ten steps."""
    scheduler, sampling = settings_of(GRIDS["leading"], order=2, steps=10)
    _, table = table_of(scheduler, **sampling)
    assert table.orders == (1, *[2] * 7, 1, 1)
    scheduler, sampling = settings_of({"timesteps": (900, 800, 400, 300, 200, 190, 100)}, order=3)
    _, table = table_of(scheduler, **sampling)
    lam = [math.log(a / (1 - a)) / 2 for a in table.alpha_bar.tolist()]
    ratios = [(lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) for i in range(1, len(lam) - 1)]
    assert [ratio > 2 for ratio in ratios] == [True, False, False, False, True]
    assert table.orders == (1, 1, 3, 3, 3, 1, 1)


def test_a_level_of_no_signal_is_no_node():
    """The first step from alpha_bar 0 comes from infinitely far away; the second is of order 1 again."""
    scheduler, sampling = settings_of(GRIDS["zero SNR"], order=3, steps=20)
    _, table = table_of(scheduler, **sampling)
    assert table.alpha_bar[0] == 0
    assert table.orders == (1, 1, 2, *[3] * 16, 1)


@pytest.mark.parametrize(
    ("sampling", "scheduler", "says"),
    [
        ({"order": 3, "steps": 2}, {}, "needs a grid of 3 steps or more, and this one has 2"),
        ({"order": 2, "timesteps": (999,)}, {}, "needs a grid of 2 steps or more"),
        ({"order": 2, "use_clipped_model_output": True}, {}, "use_clipped_model_output is for order 1"),
        ({"order": 2, "variance": "large"}, {}, "no SDE adds that noise"),
        ({"order": 2}, {"previous_timestep": "diffusers"}, "starts where the last one ended"),
        ({"order": 2, "eta": 3.0}, {}, "asks for more noise"),
    ],
)
def test_refused(sampling, scheduler, says):
    if sampling.get("variance") == "large":
        sampling = {**sampling, "eta": 1.0}
    with pytest.raises(ConfigError, match=says):
        table_of(SchedulerSettings(**scheduler), **sampling)
