"""RePaint's way along the grid (arXiv:2201.09865, algorithm 1 and its appendix), and the noise of its jumps."""

import math
from collections import Counter
from itertools import chain, pairwise, product

import pytest
import torch
from diffusers import RePaintScheduler

from ddim_cli.diffusion.forward import noised, risen
from ddim_cli.diffusion.resampling import JUMP, stretches

COUNTS, JUMPS, RESAMPLES = (1, 2, 9, 10, 11, 19, 20, 21, 25, 50, 57), (1, 3, 10), (1, 2, 5)
each_way = pytest.mark.parametrize(("count", "jump", "resample"), list(product(COUNTS, JUMPS, RESAMPLES)))


def as_in_the_paper(count, jump, resample):
    """The steps one after another, by a time t that falls from ``count`` to 0, and at whose multiples jumps begin."""
    t, jumped, found = count, Counter(), []
    while t > 0:
        found.append(count - t)
        t -= 1
        if t % jump == 0 and t < count - jump and jumped[t] < resample - 1:
            jumped[t] += 1
            t += jump
    return found


@each_way
def test_the_steps_are_those_of_the_paper(count, jump, resample):
    found = stretches(count, resample, jump)
    assert list(chain(*found)) == as_in_the_paper(count, jump, resample)
    assert all(found)
    assert (found[0].start, found[-1].stop) == (0, count)
    assert [there.stop - then.start for there, then in pairwise(found)] == [jump] * (len(found) - 1)


@each_way
def test_every_step_runs_as_often(count, jump, resample):
    """Only above the highest jump, at most so many steps as it has, each runs once."""
    runs = Counter(chain(*stretches(count, resample, jump)))
    once = count if count <= jump else (count - 1) % jump + 1
    assert [runs[i] for i in range(count)] == [1] * once + [resample] * (count - once)


@pytest.mark.parametrize("count", COUNTS)
def test_without_jumps_there_is_one_stretch(count):
    assert stretches(count, 1) == [range(count)]
    assert (len(stretches(count, 2)) == 1) == (count <= JUMP)


@pytest.mark.parametrize(("count", "resample"), [(50, 1), (50, 10), (250, 10), (25, 3), (8, 4)])
def test_the_steps_are_those_of_diffusers(count, resample):
    """Its list has the times that a jump passes, too: a step is where time falls."""
    scheduler = RePaintScheduler(num_train_timesteps=count)
    scheduler.set_timesteps(count, jump_length=JUMP, jump_n_sample=resample)
    times = [count, *scheduler.timesteps.tolist()]
    expected = [count - 1 - t for before, t in pairwise(times) if t < before]
    assert list(chain(*stretches(count, resample))) == expected


@pytest.mark.parametrize("low", [1.0, 0.999, 0.5, 1e-4])
@pytest.mark.parametrize("ratio", [1.0, 0.7, 1e-3, 0.0])
def test_what_rises_is_as_what_got_its_noise_at_once(low, ratio):
    """Of x0 both have sqrt(alpha_bar), and of independent noises as much as makes a variance of 1 - alpha_bar."""
    x0, noise, more = torch.eye(3, dtype=torch.float64)
    high = ratio * low
    of_x0, of_noise, of_more = risen(noised(x0, noise, low), more, low, high).tolist()
    assert of_x0 == pytest.approx(math.sqrt(high), abs=1e-15)
    assert of_noise == pytest.approx(math.sqrt(ratio * (1 - low)), abs=1e-15)
    assert of_more == pytest.approx(math.sqrt(1 - ratio), abs=1e-15)
    assert of_noise**2 + of_more**2 == pytest.approx(1 - high, abs=1e-15)
    assert noised(x0, noise, high).tolist() == pytest.approx([math.sqrt(high), math.sqrt(1 - high), 0], abs=1e-15)


def test_a_jump_is_all_its_forward_steps():
    """Each is N(sqrt(1 - beta) x, beta), RePaint's equation 7: the mean's factor and the variance of ten of them."""
    factor, variance, low = 1.0, 0.0, 0.9
    high = low
    for beta in (0.001 * n for n in range(1, 11)):
        factor, variance, high = factor * math.sqrt(1 - beta), (1 - beta) * variance + beta, high * (1 - beta)
    of_x, of_noise = risen(*torch.eye(2, dtype=torch.float64), low, high).tolist()
    assert of_x == pytest.approx(factor, rel=1e-14)
    assert of_noise**2 == pytest.approx(variance, rel=1e-13)


def test_samples_that_rise_have_the_mean_and_variance_of_their_level():
    """200,000 of them in float32; five standard errors are allowed."""
    count, low, high = 200_000, 0.8, 0.3
    noise, more = torch.randn(2, count, generator=torch.Generator().manual_seed(0))
    x = risen(noised(torch.full((count,), -0.6), noise, low), more, low, high)
    assert x.mean().item() == pytest.approx(math.sqrt(high) * -0.6, abs=5 * math.sqrt((1 - high) / count))
    assert x.var().item() == pytest.approx(1 - high, rel=5 * math.sqrt(2 / count))
