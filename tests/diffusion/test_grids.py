import numpy as np
import pytest
from diffusers import DDIMScheduler

from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.grids import timestep_grid
from ddim_cli.errors import ConfigError


def grid(steps=None, timesteps=None, **scheduler):
    sampling = {"steps": steps} if timesteps is None else {"timesteps": tuple(timesteps)}
    return timestep_grid(SchedulerSettings(**scheduler), SamplingSettings(**sampling))


@pytest.mark.parametrize("total", [1000, 100, 37])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_equals_diffusers_for_every_step_count(spacing, total):
    reference = DDIMScheduler(num_train_timesteps=total, timestep_spacing=spacing)
    malformed = []
    for steps in range(1, total + 1):
        reference.set_timesteps(steps)
        expected = reference.timesteps.tolist()
        if len(expected) != steps:
            # diffusers' trailing returns N + 1 entries here, the last -1.
            assert expected[-1] == -1
            expected.pop()
            malformed.append(steps)
        assert grid(steps, num_train_timesteps=total, timestep_spacing=spacing) == expected, steps
    assert len(malformed) == {("trailing", 1000): 62, ("trailing", 100): 5}.get((spacing, total), 0)


@pytest.mark.parametrize("steps", [1, 2, 10, 29, 50, 100, 1000])
def test_quadratic_is_the_papers_formula_without_repeats(steps):
    formula = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
    found = grid(steps, timestep_spacing="quadratic")
    assert found == sorted(set(formula), reverse=True)


def test_uniform_is_the_papers_range():
    assert grid(30, timestep_spacing="uniform") == list(range(0, 1000, 33))[::-1]
    assert len(grid(30, timestep_spacing="uniform")) == 31


def test_an_explicit_list_is_taken_as_it_is():
    assert grid(timesteps=[999, 500, 3]) == [999, 500, 3]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 1001}, "use at most 1000"),
        ({"steps": 1000, "steps_offset": 1}, "steps = 999 or fewer"),
        ({"steps": 10, "steps_offset": 2000}, "steps_offset = 0"),
        ({"timesteps": [5, 5]}, "repeats"),
        ({"timesteps": [5, 6]}, "rises"),
        ({"timesteps": [1000, 0]}, "outside 0..999"),
        ({"timesteps": [5, -1]}, "outside 0..999"),
    ],
)
def test_refused_with_what_to_use(settings, says):
    with pytest.raises(ConfigError, match=says):
        grid(**settings)
