"""The step against numbers that the paper's own code computed (ermongroup/ddim at e8df66c).

tests/data/ddim-original-tiny holds, for seven runs of a small random network in float32: x_T, the network's
output at every step, the noise drawn at every step, and the states it led to. So the mathematics is compared
without the network, whose output does not depend on what is tested here.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.coefficients import make_table
from ddim_cli.diffusion.grids import timestep_grid
from ddim_cli.diffusion.step import X0Treatment, ddim_step

sys.path.insert(0, str(Path(__file__).parents[1]))
from rounding import U32, U64, Coefficients, Levels, Rounded
from rounding import step as rounded_step

DATA = Path(__file__).parent.parent / "data" / "ddim-original-tiny"
CASES = json.loads((DATA / "cases.json").read_text())
SPACINGS = {"uniform": "uniform", "quad": "quadratic"}
# Relative to the largest magnitude. The recorded numbers are float32, and the original's coefficients are too; ours are
# float64 here, so that how far off they are is the same on every machine: half of this, or less. Clipping x0 takes its
# magnitude, tens, but not its rounding error away.
TOLERANCE = {"generalized": 1e-6, "ddpm_noisy": 5e-6}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"case{case['case']}")


@pytest.fixture(scope="module")
def expected():
    return load_file(DATA / "expected.safetensors")


def settings_of(case):
    """Our names for what the original calls sample_type, skip_type and timesteps."""
    noisy = case["sample_type"] == "ddpm_noisy"
    scheduler = SchedulerSettings(timestep_spacing=SPACINGS[case["skip_type"]], clip_sample=noisy)
    sampling = SamplingSettings(
        steps=case["timesteps"],
        # The large variance implies an eta of its own.
        **({"variance": "large"} if noisy else {"eta": case["eta"]}),
        use_clipped_model_output=noisy,
    )
    return scheduler, sampling


def recorded(case, expected, kind):
    """The rows of the steps that run here: of a repeated timestep the last, the one that leaves it, is kept."""
    descending = case["seq"][::-1]
    rows = [i for i, t in enumerate(descending) if t not in descending[i + 1 :]]
    values = expected.get(f"case{case['case']}.{kind}")
    return None if values is None else values[rows]


def run(case, expected, dtype=torch.float64):
    """The table, and our states and predicted x0 after every step, from the recorded x_T, outputs and noise."""
    scheduler, sampling = settings_of(case)
    table = make_table(scheduler, sampling, timestep_grid(scheduler, sampling), dtype=dtype)
    eps, noise = recorded(case, expected, "eps"), recorded(case, expected, "noise")
    treatment = X0Treatment.of(scheduler, sampling)
    x, states, predictions = expected["x_T"].to(dtype), [], []
    for i in range(len(table)):
        x, x0 = ddim_step(x, eps[i], table.row(i), treatment, None if noise is None else noise[i])
        states.append(x)
        predictions.append(x0)
    return table, states, predictions


def error(found, reference):
    return ((found - reference).abs().max() / reference.abs().max()).item()


def test_all_seven_runs_are_here():
    assert [case["case"] for case in CASES] == list(range(7))
    assert {(case["sample_type"], case["skip_type"], case["eta"]) for case in CASES} == {
        ("generalized", "uniform", 0.0),
        ("generalized", "uniform", 0.5),
        ("generalized", "uniform", 1.0),
        ("generalized", "quad", 0.0),
        ("ddpm_noisy", "uniform", 0.0),
    }


@each_case
def test_the_grid_is_its_seq(case):
    """Case 6 repeats timestep 0, which is visited once here."""
    grid = timestep_grid(*settings_of(case))
    assert grid == sorted(set(case["seq"]), reverse=True)
    assert len(case["seq"]) - len(grid) == (1 if case["case"] == 6 else 0)


@each_case
def test_whole_run(case, expected):
    """From x_T to x0: the first step, its prediction and the final sample are the original's."""
    _, states, predictions = run(case, expected)
    name, tolerance = f"case{case['case']}", TOLERANCE[case["sample_type"]]
    assert error(predictions[0], expected[f"{name}.pred_x0_first"]) < tolerance
    assert error(states[0], expected[f"{name}.x_after_first"]) < tolerance
    assert error(states[-1], expected[f"{name}.x0"]) < tolerance
    assert states[-1].abs().mean().item() == pytest.approx(case["final_abs_mean"], rel=1e-5)


@each_case
def test_every_step_in_float32(case, expected):
    """Within the rounding of one step from the same state, by equations 12 and 16."""
    noisy = case["sample_type"] == "ddpm_noisy"
    table, states, predictions = run(case, expected, torch.float32)
    a, b = (Rounded.exact(level.view(-1, 1, 1, 1, 1), U64) for level in (table.alpha_bar, table.prev_alpha_bar))
    levels = Levels.of(a, b, 1.0 if noisy else case["eta"])
    if noisy:
        levels = replace(levels, sigma=(1 - a / b).sqrt() * (b.value < 1))
    x, noise = torch.stack([expected["x_T"], *states[:-1]]), recorded(case, expected, "noise")
    prev, x0 = rounded_step(
        x,
        recorded(case, expected, "eps"),
        torch.zeros_like(x) if noise is None else noise,
        Coefficients(levels, U32),
        U32,
        "epsilon",
        (lambda x0: x0.clamp(1.0)) if noisy else None,
        noisy,
    )
    for found, exact in ((states, prev), (predictions, x0)):
        assert ((torch.stack(found) - exact.value).abs() <= exact.error).all()


def test_the_repeated_timestep_changes_nothing(expected):
    """The original's step from 0 to 0 left x, and so the next output of its network, as they were."""
    eps = expected["case6.eps"]
    assert CASES[6]["seq"][:2] == [0, 0]
    assert torch.equal(eps[-1], eps[-2])


@pytest.mark.parametrize("case", [case for case in CASES if case["eta"] > 0 or case["sample_type"] == "ddpm_noisy"])
def test_the_order_of_the_noise_matters(case, expected):
    """So the agreement above is no accident: the same draws in another order lead elsewhere."""
    name = f"case{case['case']}.noise"
    rolled = run(case, {**expected, name: expected[name].roll(1, dims=0)})[1][-1]
    assert error(rolled, expected[f"case{case['case']}.x0"]) > 0.01
