import numpy as np
import pytest
from diffusers import DDIMScheduler

from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.betas import make_alpha_bars
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


def half_log_snrs(**scheduler):
    alpha_bars = make_alpha_bars(SchedulerSettings(**scheduler)).numpy()
    with np.errstate(divide="ignore"):
        return np.log(alpha_bars / (1 - alpha_bars)) / 2


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
@pytest.mark.parametrize(
    "scheduler",
    [{}, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, {"num_train_timesteps": 4000}],
)
def test_logsnr_is_even_in_log_snr(scheduler, steps):
    """From T-1 on, each timestep is the one nearest to its level, and the last step would end at timestep 0."""
    levels = half_log_snrs(**scheduler)
    found = grid(steps, timestep_spacing="logsnr", **scheduler)
    wanted = np.linspace(levels[-1], levels[0], steps + 1)[:-1]
    assert found == [int(abs(levels - level).argmin()) for level in wanted]
    assert found[0] == len(levels) - 1


def test_logsnr_has_no_timestep_twice_and_never_0():
    """Near 0 the levels lie further apart than the steps of a long grid: there it has every timestep."""
    for steps in (30, 50, 200, 999):
        found = grid(steps, timestep_spacing="logsnr")
        assert (found[0], found[-1], len(found)) == (999, 1, steps)
        assert found == sorted(set(found), reverse=True)
    assert grid(50, timestep_spacing="logsnr")[-8:] == [10, 8, 6, 5, 4, 3, 2, 1]
    assert grid(1000, timestep_spacing="logsnr") == list(range(999, -1, -1))


def test_logsnr_begins_at_a_level_of_no_signal_and_is_even_from_the_next():
    levels = half_log_snrs(rescale_betas_zero_snr=True)
    assert levels[-1] == -np.inf
    found = grid(10, timestep_spacing="logsnr", rescale_betas_zero_snr=True)
    wanted = np.linspace(levels[-2], levels[0], 10)[:-1]
    assert found == [999, *(int(abs(levels - level).argmin()) for level in wanted)]
    assert grid(1, timestep_spacing="logsnr", rescale_betas_zero_snr=True) == [999]


def test_logsnr_leaves_out_a_level_of_no_noise():
    """Timestep 0 with beta 0 lies infinitely far away: the steps are even down to timestep 1."""
    levels = half_log_snrs(beta_start=0.0)
    assert levels[0] == np.inf
    found = grid(8, timestep_spacing="logsnr", beta_start=0.0)
    wanted = np.linspace(levels[-1], levels[1], 9)[:-1]
    assert found == [int(abs(levels - level).argmin()) for level in wanted]


def test_logsnr_needs_noise():
    with pytest.raises(ConfigError, match="needs betas that add noise"):
        grid(2, timestep_spacing="logsnr", num_train_timesteps=3, trained_betas=[0.0, 0.0, 0.5])
    with pytest.raises(ConfigError, match="has 2 values"):
        grid(2, timestep_spacing="logsnr", num_train_timesteps=3, trained_betas=[0.1, 0.2])


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
