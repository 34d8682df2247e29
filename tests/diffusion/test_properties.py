"""What holds for every setting: a descending grid with finite coefficients, or a refusal that says what to do."""

import json
import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ddim_cli import DDIMScheduler
from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.coefficients import largest_eta, make_inverse_table, make_table
from ddim_cli.diffusion.grids import timestep_grid
from ddim_cli.diffusion.solvers import solver_of
from ddim_cli.diffusion.step import X0Treatment, ddim_step
from ddim_cli.errors import ConfigError

SPACINGS = ("leading", "trailing", "linspace", "quadratic", "uniform", "logsnr")
BETA = st.floats(0, 1, exclude_max=True, allow_subnormal=False) | st.sampled_from([0.0, 1e-4, 0.02, 0.5])
TOTAL = st.integers(1, 1200) | st.sampled_from([1, 2, 10, 1000])


@st.composite
def scheduler_settings(draw):
    """Anything the schema takes, most often with betas that belong together."""
    total = draw(TOTAL)
    start, end = sorted([draw(BETA), draw(BETA)])
    if draw(st.integers(0, 20)) == 0:
        start, end = end, start
    keys = {
        "num_train_timesteps": total,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": draw(
            st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"])
        ),
        "prediction_type": draw(st.sampled_from(["epsilon", "sample", "v_prediction"])),
        "clip_sample": draw(st.booleans()),
        "clip_sample_range": draw(st.floats(0.01, 100)),
        "thresholding": draw(st.booleans()),
        "dynamic_thresholding_ratio": draw(st.floats(0.01, 1)),
        "sample_max_value": draw(st.floats(1, 100)),
        "timestep_spacing": draw(st.sampled_from(SPACINGS)),
        "steps_offset": draw(st.sampled_from([0, 0, 0, 1, 2, 7])),
        "set_alpha_to_one": draw(st.booleans()),
        "rescale_betas_zero_snr": draw(st.sampled_from([False, False, True])),
        "previous_timestep": draw(st.sampled_from(["grid", "diffusers"])),
    }
    if draw(st.integers(0, 3)) == 0:
        keys["num_train_timesteps"] = total = min(total, 12)
        keys["trained_betas"] = tuple(draw(st.lists(BETA, min_size=total - 1, max_size=total - 1)))
        keys["trained_betas"] += (draw(BETA | st.just(1.0)),)
    return SchedulerSettings(**keys)


@st.composite
def sampling_settings(draw, total):
    """Steps or an explicit list, mostly of this T; every kind of noise."""
    variance = draw(st.sampled_from(["ddim", "ddim", "large"]))
    keys = {
        "variance": variance,
        "eta": draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1) | st.floats(0, 3)) if variance == "ddim" else 1.0,
        "use_clipped_model_output": draw(st.booleans()),
        "steps": draw(st.integers(1, total) | st.integers(1, total + 5)),
    }
    if draw(st.integers(0, 3)) == 0:
        chosen = draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=20, unique=True))
        keys["timesteps"] = tuple(sorted(chosen, reverse=True))
    return SamplingSettings(**keys)


def sentence(refusal):
    """The refusal's text: a sentence or more, with no number in it that is none, and nothing of Python's."""
    text = str(refusal)
    return len(text.split()) >= 6 and not re.search(r"\b(nan|inf|tensor|None|Traceback)\b", text)


def attempt(make, *args, **keys):
    """What ``make`` returns, or None where it refuses with a sentence; another exception is a failure."""
    try:
        return make(*args, **keys)
    except ConfigError as error:
        refusal = error
    assert sentence(refusal), str(refusal)
    return None


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_every_setting_has_a_table_or_a_refusal(data):
    """A grid strictly descending in [0, T-1]; finite coefficients; sigma^2 <= 1 - alpha_prev and direction real."""
    scheduler = data.draw(scheduler_settings())
    total = scheduler.num_train_timesteps
    sampling = data.draw(sampling_settings(total))
    grid = attempt(timestep_grid, scheduler, sampling)
    if grid is None:
        return
    assert grid == sorted(set(grid), reverse=True)
    assert 0 <= grid[-1] <= grid[0] <= total - 1
    assert grid == list(sampling.timesteps or grid)
    table = attempt(make_table, scheduler, sampling, grid)
    if table is None:
        return
    assert len(table) == len(grid)
    assert table.values.isfinite().all()
    assert table.values.dtype == torch.float32
    assert table.sigma.dtype == torch.float64
    prev, sigma = table.prev_alpha_bar, table.sigma
    assert ((prev >= table.alpha_bar - 1e-9) & (prev <= 1)).all()
    assert (sigma >= 0).all()
    c = table.row(torch.arange(len(grid))[-1:])
    if sampling.variance == "ddim":
        assert (sigma.square() <= 1 - prev + 1e-9).all()
        kept = c.prev_signal.square() + c.direction.square() + c.sigma.square()
        # What a step keeps of x0, epsilon and z adds up to one, or to more where eta is above 1 by rounding only.
        assert kept.item() == pytest.approx(1, abs=1e-5)
    else:
        assert sigma[-1] == 0
        assert (sigma.square() <= 1 - table.alpha_bar + 1e-9).all()
    if scheduler.previous_timestep == "grid":
        assert list(table.prev_timesteps) == [*grid[1:], -1]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([2, 3]), st.booleans())
def test_every_setting_has_a_table_of_higher_order_or_a_refusal(data, order, inverse):
    """Finite coefficients, at any grid; down it, of one x0 alone a step is exact, with the noise of its level."""
    scheduler = data.draw(scheduler_settings())
    sampling = data.draw(sampling_settings(scheduler.num_train_timesteps)).model_copy(update={"order": order})
    grid = attempt(timestep_grid, scheduler, sampling)
    solver = solver_of(sampling, inverse)
    table = grid and attempt(solver.table, scheduler, sampling, grid, dtype=torch.float64)
    if not table:
        return
    assert len(table) == len(grid)
    assert table.values.isfinite().all()
    assert all(1 <= each <= order for each in table.orders)
    assert table.orders[0] == 1
    assert table.timesteps.tolist() == (grid[::-1] if inverse else grid)
    if inverse:
        assert not table.sigma.any()
        return
    *_, from_x, now, last, before_last, sigma = table.values.unbind(1)
    a, prev = table.alpha_bar, table.prev_alpha_bar
    # Weights of either sign, as large as extrapolation makes them, add up to a number below 1.
    scale = 1 + now.abs() + last.abs() + before_last.abs()
    assert ((from_x * a.sqrt() + now + last + before_last - prev.sqrt()).abs() < 1e-6 * scale).all()
    assert ((from_x.square() * (1 - a) + sigma.square() - (1 - prev)).abs() < 1e-6).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_setting_has_an_inverse_or_a_refusal(data):
    scheduler = data.draw(scheduler_settings())
    sampling = data.draw(sampling_settings(scheduler.num_train_timesteps))
    grid = attempt(timestep_grid, scheduler, sampling)
    inverse = grid and attempt(make_inverse_table, scheduler, sampling, grid)
    if inverse:
        assert inverse.values.isfinite().all()
        assert not inverse.sigma.any()


@settings(max_examples=150, deadline=None)
@given(scheduler_settings())
def test_scheduler_config_json_and_back_is_the_identity(tmp_path_factory, scheduler):
    """Every key, to the last bit, through to_json_string and through a file."""
    ours = attempt(DDIMScheduler, **scheduler.model_dump())
    if ours is None:
        return
    assert ours.settings == scheduler
    written = json.loads(ours.to_json_string())
    assert written.pop("_class_name") == "DDIMScheduler"
    assert written.pop("_diffusers_version")
    assert SchedulerSettings(**written) == scheduler
    assert DDIMScheduler.from_config(written).settings == scheduler
    folder = tmp_path_factory.mktemp("scheduler")
    ours.save_config(folder)
    assert json.loads((folder / "scheduler_config.json").read_text()) == json.loads(ours.to_json_string())
    assert DDIMScheduler.from_pretrained(folder).settings == scheduler


def table(grid=None, **keys):
    """A table of settings of both kinds."""
    sampling = {key: keys.pop(key) for key in list(keys) if key in SamplingSettings.model_fields}
    scheduler, sampling = SchedulerSettings(**keys), SamplingSettings(**{"steps": 5, **sampling})
    return make_table(scheduler, sampling, timestep_grid(scheduler, sampling))


TEN = {"num_train_timesteps": 10}
REFUSED = {
    "epsilon at alpha_bar 0": (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ["alpha_bar is 0", "v_prediction", "leading"],
    ),
    "epsilon at alpha_bar 0, linspace": (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "linspace"},
        ["alpha_bar is 0", "v_prediction", "leading"],
    ),
    "epsilon at alpha_bar 0, a list": (
        {"rescale_betas_zero_snr": True, "timesteps": (999, 3)},
        ["alpha_bar is 0", "999", "v_prediction"],
    ),
    "epsilon at alpha_bar 0, trained": (
        {**TEN, "trained_betas": (0.1,) * 9 + (1.0,), "timestep_spacing": "trailing"},
        ["alpha_bar is 0", "v_prediction"],
    ),
    "epsilon again at beta 0": (
        {"beta_start": 0.0, "use_clipped_model_output": True},
        ["timestep 0", "beta is 0", "use_clipped_model_output", "beta_start above 0"],
    ),
    "epsilon again at beta 0, scaled": (
        {"beta_start": 0.0, "beta_schedule": "scaled_linear", "use_clipped_model_output": True},
        ["timestep 0", "beta is 0", "use_clipped_model_output"],
    ),
    "sample at beta 0": (
        {"beta_start": 0.0, "prediction_type": "sample"},
        ["timestep 0", "beta is 0", 'prediction_type = "sample"', "without timestep 0"],
    ),
    "sample at beta 0, trained": (
        {**TEN, "trained_betas": (0.0,) + (0.1,) * 9, "prediction_type": "sample"},
        ["timestep 0", "beta is 0", 'prediction_type = "sample"'],
    ),
    "several betas 0": (
        {**TEN, "trained_betas": (0.0,) * 3 + (0.1,) * 7, "timesteps": (9, 2), "use_clipped_model_output": True},
        ["timestep 2", "use_clipped_model_output"],
    ),
    "a beta that is lost in rounding": (
        {"beta_start": 1e-20, "use_clipped_model_output": True},
        ["timestep 0", "use_clipped_model_output"],
    ),
    "beta 0 at last, rescaled": (
        {
            **TEN,
            "trained_betas": (0.1,) * 9 + (0.0,),
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
        },
        ["rescale_betas_zero_snr"],
    ),
    "no signal long before the end, rescaled": (
        {"beta_start": 0.9, "beta_end": 0.9, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        ["rescale_betas_zero_snr"],
    ),
    "no noise at all, rescaled": (
        {"beta_start": 0.0, "beta_end": 0.0, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        ["rescale_betas_zero_snr"],
    ),
    "negative beta": (
        {**TEN, "trained_betas": (0.1,) * 4 + (-0.1,) + (0.1,) * 5},
        ["trained_betas[4] = -0.1", "[0, 1)"],
    ),
    "beta 1 before the last": ({**TEN, "trained_betas": (1.0,) + (0.1,) * 9}, ["trained_betas[0] = 1", "[0, 1)"]),
    "betas too few": ({"trained_betas": (0.1,) * 10}, ["10 values", "num_train_timesteps = 1000", "as many"]),
    "betas exchanged": ({"beta_start": 0.3, "beta_end": 0.02}, ["beta_start = 0.3", "beta_end = 0.02", "exchange"]),
    "betas exchanged, sigmoid": (
        {"beta_start": 0.3, "beta_end": 0.02, "beta_schedule": "sigmoid"},
        ["beta_start = 0.3", "beta_end = 0.02", "exchange"],
    ),
    "eta too large": ({"eta": 1.2}, ["sampling.eta = 1.2", "at most"]),
    "large with eta 0.5": ({"variance": "large", "eta": 0.5}, ["implies eta 1", "eta = 0.5", "leave eta out"]),
    "one timestep, rescaled": ({"num_train_timesteps": 1, "steps": 1, "rescale_betas_zero_snr": True}, ["at least 2"]),
}


@pytest.mark.parametrize(("keys", "says"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_remedy(keys, says):
    with pytest.raises(ConfigError) as refusal:
        table(**keys)
    assert sentence(refusal.value)
    for part in says:
        assert part in str(refusal.value), str(refusal.value)


# Each of the combinations above works when one thing is other than it was: they are not refused too widely.
ALLOWED = {
    "v at alpha_bar 0": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
    "sample at alpha_bar 0": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "sample",
    },
    "a grid without alpha_bar 0": {"rescale_betas_zero_snr": True, "timestep_spacing": "leading"},
    "epsilon at beta 0": {"beta_start": 0.0},
    "v at beta 0": {"beta_start": 0.0, "prediction_type": "v_prediction"},
    "a grid without beta 0": {"beta_start": 0.0, "prediction_type": "sample", "timesteps": (900, 1)},
    "sigmoid from 0": {"beta_start": 0.0, "beta_schedule": "sigmoid", "use_clipped_model_output": True},
    "bounds that the cosine has no use for": {"beta_start": 0.3, "beta_schedule": "squaredcos_cap_v2"},
    "no noise at all": {"beta_start": 0.0, "beta_end": 0.0},
    "large with eta 1": {"variance": "large", "eta": 1.0},
    "large without eta": {"variance": "large"},
    "eta 1 from alpha_bar 0": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "eta": 1.0,
    },
}


@pytest.mark.parametrize("keys", ALLOWED.values(), ids=ALLOWED)
def test_not_refused_without_need(keys):
    assert table(**keys).values.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"trained_betas": [0.1, math.nan, 0.1], "num_train_timesteps": 3}, "trained_betas"),
        ({"trained_betas": [0.1, -0.1, 0.1], "num_train_timesteps": 3}, "trained_betas"),
        ({"trained_betas": [0.1, 0.1], "num_train_timesteps": 3}, "trained_betas"),
        ({"beta_start": math.nan}, "beta_start"),
        ({"beta_start": -0.1}, "beta_start"),
        ({"beta_end": 1.5}, "beta_end"),
        ({"beta_start": 0.3}, "beta_start"),
        ({"beta_schedule": "cosine"}, "beta_schedule"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"timestep_spacing": "karras"}, "timestep_spacing"),
        ({"previous_timestep": "last"}, "previous_timestep"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"clip_sample_range": 0.0}, "clip_sample_range"),
        ({"dynamic_thresholding_ratio": 1.1}, "dynamic_thresholding_ratio"),
        ({"sample_max_value": 0.5}, "sample_max_value"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"beta_start": 0.0, "beta_end": 0.0, "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_the_class_refuses_what_cannot_be(keys, key):
    """In its constructor, naming the key."""
    with pytest.raises(ConfigError, match=key):
        DDIMScheduler(**keys)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.sampled_from(["leading", "trailing", "linspace"]))
def test_the_largest_eta_is_the_largest(steps, spacing):
    """What the refusal offers works, and a thousandth more does not."""
    keys = {"timestep_spacing": spacing, "steps": steps}
    at_0 = table(**keys)
    most = largest_eta(at_0.alpha_bar, at_0.prev_alpha_bar)
    assume(math.isfinite(most))
    assert most >= 1 - 1e-9
    with pytest.raises(ConfigError) as refusal:
        table(**keys, eta=most * 1.001)
    offered = float(str(refusal.value).rsplit(" ", 1)[1])
    assert most * 0.999 < offered <= most
    assert table(**keys, eta=offered).values.isfinite().all()


@pytest.mark.parametrize(
    "treatment",
    [X0Treatment(clip=1.0), X0Treatment(threshold=(0.9, 2.0), rederive_epsilon=True)],
    ids=["clip", "threshold"],
)
def test_a_step_by_index_has_no_graph_break(treatment):
    """One graph for all steps, no value of a tensor asked for on the way: what a CUDA graph can capture."""
    steps = table(eta=1.0)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def step(x, output, index, noise):
        return ddim_step(x, output, steps.row(index), treatment, noise)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=count)
    x, output, noise = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for i in range(len(steps)):
        found = compiled(x, output, torch.tensor([i]), noise)
        expected = ddim_step(x, output, steps.row(i), treatment, noise)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert len(graphs) == 1
    assert not {"item", "tolist", "cpu"} & {str(node.target) for node in graphs[0].graph.nodes}
