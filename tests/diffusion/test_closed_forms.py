"""The step against what can be derived by hand.

For data x0 ~ N(mu, s^2) the best prediction of epsilon is linear in x,

    epsilon(x, a) = sqrt(1 - a) (x - sqrt(a) mu) / V(a),   V(a) = a s^2 + 1 - a,

so every step is x_prev = A x + B + sigma z, and the marginals of a run are normal with a mean and a variance
that can be followed exactly. A, B and sigma are read off the code by stepping from x = 0 and x = 1; what they
should be is written here in scalars, from the papers and not from the code. A point mass is s = 0.
"""

import math
from itertools import pairwise

import pytest
import torch

from ddim_cli import DDIMScheduler
from ddim_cli.config.schema import SamplingSettings, SchedulerSettings
from ddim_cli.diffusion.betas import make_alpha_bars, make_betas
from ddim_cli.diffusion.coefficients import make_inverse_table, make_table, step_coefficients
from ddim_cli.diffusion.grids import timestep_grid
from ddim_cli.diffusion.step import X0Treatment, ddim_step, predict

MU, S = 0.3, 0.5
SPACINGS = ("leading", "trailing", "linspace", "quadratic", "uniform", "logsnr")
NOISES = {
    "eta 0": {"eta": 0.0},
    "eta 0.5": {"eta": 0.5},
    "eta 1": {"eta": 1.0},
    "large": {"variance": "large"},
}
each_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
each_spacing = pytest.mark.parametrize("spacing", SPACINGS)
# All of it is float64, coefficients too: roundings of 1e-16, of which 1 / sqrt(alpha_bar) or 1 / sqrt(1 - alpha_bar),
# at most 160, and 1,000 steps cannot make more.
CLOSE = 1e-10


@pytest.mark.parametrize("make", [make_table, make_inverse_table])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_table_of_a_run_is_this_one_rounded_once(make, prediction):
    """To float32, which is what a run multiplies by unless it asks for float64."""
    scheduler = SchedulerSettings(prediction_type=prediction, set_alpha_to_one=False)
    sampling = SamplingSettings(steps=10, eta=0.5)
    grid = timestep_grid(scheduler, sampling)
    wide, narrow = make(scheduler, sampling, grid, dtype=torch.float64), make(scheduler, sampling, grid)
    assert narrow.values.dtype == torch.float32
    assert torch.equal(wide.values.float(), narrow.values)
    assert not torch.equal(wide.values, narrow.values.double())


def epsilon(x, alpha_bar, mu=MU, s=S):
    """The best prediction of epsilon at x, for data N(mu, s^2)."""
    return math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar) * mu) / (alpha_bar * s**2 + 1 - alpha_bar)


def table_of(steps=10, make=make_table, timesteps=None, noise=None, **scheduler):
    scheduler = SchedulerSettings(clip_sample=False, **scheduler)
    sampling = SamplingSettings(steps=steps, timesteps=timesteps, **(noise or {}))
    return make(scheduler, sampling, timestep_grid(scheduler, sampling), dtype=torch.float64)


def output_for(prediction, x, alpha_bar, **data):
    """What a perfect network of this prediction type returns at x."""
    eps = epsilon(x, alpha_bar, **data)
    x0 = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    velocity = math.sqrt(alpha_bar) * eps - math.sqrt(1 - alpha_bar) * x0
    return {"epsilon": eps, "sample": x0, "v_prediction": velocity}[prediction]


def linear_steps(table, prediction="epsilon", **data):
    """(A, B, sigma) of every step as the code takes it, in float64."""
    probe = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    noise = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    found = []
    for i, alpha_bar in enumerate(table.alpha_bar.tolist()):
        output = output_for(prediction, probe, alpha_bar, **data)
        at_0, at_1, noisy = ddim_step(probe, output, table.row(i), X0Treatment(), noise)[0].flatten().tolist()
        found.append((at_1 - at_0, at_0, noisy - at_0))
    return found


def marginals(steps, mean=0.0, variance=1.0):
    """Mean and variance after every step of a run from N(mean, variance)."""
    found = []
    for a, b, sigma in steps:
        mean, variance = a * mean + b, a**2 * variance + sigma**2
        found.append((mean, variance))
    return found


def levels(timesteps, **scheduler):
    """alpha_bar of every timestep and 1 at the end, multiplied up in plain floats."""
    alpha_bar, product = [], 1.0
    for beta in make_betas(SchedulerSettings(**scheduler)).tolist():
        product *= 1 - beta
        alpha_bar.append(product)
    return [alpha_bar[t] for t in timesteps] + [1.0]


def by_hand(levels, eta, sigma_hat=False, mu=MU, s=S):
    """(A, B, sigma) of DDIM's equations 12 and 16 with the best epsilon; the last of sigma-hat's steps has no noise."""
    steps = []
    for a, prev in pairwise(levels):
        sigma = eta * math.sqrt((1 - prev) / (1 - a)) * math.sqrt(1 - a / prev)
        direction = math.sqrt(max(1 - prev - sigma**2, 0))
        slope = math.sqrt(1 - a) / (a * s**2 + 1 - a)  # of epsilon
        intercept = -slope * math.sqrt(a) * mu
        # x0 = (x - sqrt(1 - a) epsilon) / sqrt(a)
        of_x = (1 - math.sqrt(1 - a) * slope) / math.sqrt(a)
        of_1 = -math.sqrt(1 - a) * intercept / math.sqrt(a)
        if sigma_hat:
            sigma = math.sqrt(1 - a / prev) if prev < 1 else 0.0
        steps.append(
            (math.sqrt(prev) * of_x + direction * slope, math.sqrt(prev) * of_1 + direction * intercept, sigma)
        )
    return steps


@each_spacing
@each_noise
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_gaussian_data(noise, spacing, prediction):
    """Mean and variance after every one of 20 steps, for a network that predicts epsilon, x0 or v perfectly."""
    table = table_of(20, timestep_spacing=spacing, noise=noise, prediction_type=prediction)
    expected = by_hand(
        levels(table.timesteps.tolist()), noise.get("eta", 1.0), sigma_hat=noise.get("variance") == "large"
    )
    found = marginals(linear_steps(table, prediction))
    for (mean, variance), (hand_mean, hand_variance) in zip(found, marginals(expected), strict=True):
        assert mean == pytest.approx(hand_mean, abs=CLOSE)
        assert variance == pytest.approx(hand_variance, rel=CLOSE)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@each_spacing
def test_a_point_mass_keeps_its_marginals(spacing, eta):
    """DDIM, lemma 1: with the true x0 every member of the family has the marginals N(sqrt(a) x0, 1 - a)."""
    table = table_of(13, timestep_spacing=spacing, noise={"eta": eta})
    steps = linear_steps(table, s=0.0)
    first = table.alpha_bar[0].item()
    found = marginals(steps, math.sqrt(first) * MU, 1 - first)
    for (mean, variance), level in zip(found, levels(table.timesteps.tolist())[1:], strict=True):
        assert mean == pytest.approx(math.sqrt(level) * MU, abs=CLOSE)
        assert variance == pytest.approx(1 - level, rel=CLOSE, abs=CLOSE)


def test_large_variance_adds_what_it_says():
    """Of a point mass: the variance of eta 1 plus what sigma-hat has beyond sigma, and none in the last step."""
    a = levels(table_of(13).timesteps.tolist())
    (*large, last), eta_1 = (
        [sigma**2 for *_, sigma in linear_steps(table_of(13, noise=noise), s=0.0)]
        for noise in (NOISES["large"], NOISES["eta 1"])
    )
    assert last == 0
    for i, variance in enumerate(large):
        assert variance == pytest.approx(1 - a[i] / a[i + 1], rel=CLOSE)
        assert variance * (1 - a[i + 1]) / (1 - a[i]) == pytest.approx(eta_1[i], rel=CLOSE)


@each_noise
def test_samples_have_the_mean_and_variance_that_the_steps_imply(noise):
    """100,000 samples through the class with its own draws, in float32; five standard errors are allowed."""
    count = 100_000
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, generator=generator)
    for t in scheduler.timesteps.tolist():
        output = epsilon(x, scheduler.alphas_cumprod[t].item())
        x = scheduler.step(output, t, x, generator=generator, **noise).prev_sample
    steps = by_hand(
        levels(scheduler.timesteps.tolist()), noise.get("eta", 1.0), sigma_hat=noise.get("variance") == "large"
    )
    mean, variance = marginals(steps)[-1]
    assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / count))
    assert x.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / count))


@pytest.mark.parametrize("total", [1000, 50])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_eta_1_over_every_timestep_is_ddpm(schedule, total):
    """Ho et al., arXiv:2006.11239, eq. 7: the posterior's mean is a combination of x0 and x_t, its variance beta-tilde.

    sigma-hat squared is beta itself, their other choice of variance.
    """
    settings = SchedulerSettings(num_train_timesteps=total, beta_schedule=schedule)
    alpha_bar = make_alpha_bars(settings).flip(0)
    beta = make_betas(settings).flip(0)
    before = torch.cat([alpha_bar[1:], torch.ones(1, dtype=torch.float64)])
    c = step_coefficients(alpha_bar, before, eta=1.0)
    # epsilon = (x_t - signal x0) / noise
    of_x_t = c.direction * c.inverse_noise
    of_x0 = c.prev_signal - of_x_t * c.signal
    close = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(of_x0, before.sqrt() * beta / (1 - alpha_bar), **close)
    torch.testing.assert_close(of_x_t, (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar), **close)
    torch.testing.assert_close(c.sigma.square(), (1 - before) / (1 - alpha_bar) * beta, **close)
    large = step_coefficients(alpha_bar, before, eta=1.0, variance="large")
    torch.testing.assert_close(large.sigma[:-1].square(), beta[:-1], **close)
    assert large.sigma[-1] == 0
    torch.testing.assert_close(large.direction, c.direction)
    # And the grid of N = T steps has them all.
    assert table_of(total, num_train_timesteps=total).timesteps.tolist() == list(range(total))[::-1]


def exact_ode(x, alpha_bar, mu=MU, s=S):
    """The x0 to which the probability flow leads from x: the same quantile of the data's distribution."""
    return mu + s * (x - math.sqrt(alpha_bar) * mu) / math.sqrt(alpha_bar * s**2 + 1 - alpha_bar)


def exact_ode_inverse(x0, alpha_bar, mu=MU, s=S):
    return math.sqrt(alpha_bar) * mu + math.sqrt(alpha_bar * s**2 + 1 - alpha_bar) * (x0 - mu) / s


def test_the_error_of_eta_0_falls_as_one_over_n():
    """Against the exact solution of the ODE; and each run's contraction is a product of cosines.

    With phi = atan2(sqrt(1 - a), s sqrt(a)), a step multiplies the standardised deviation by cos(phi - phi_prev).
    """
    x, counts, errors = 1.7, (10, 20, 40, 100, 200), []
    for count in counts:
        table = table_of(count, timestep_spacing="trailing")
        a = levels(table.timesteps.tolist())
        found = x
        for slope, intercept, _ in linear_steps(table):
            found = slope * found + intercept
        phi = [math.atan2(math.sqrt(1 - level), S * math.sqrt(level)) for level in a]
        cosines = math.prod(math.cos(p - q) for p, q in pairwise(phi))
        assert found == pytest.approx(MU + (exact_ode(x, a[0]) - MU) * cosines, abs=CLOSE)
        errors.append(abs(found - exact_ode(x, a[0])))
    orders = [math.log(e / f) / math.log(n / m) for (m, e), (n, f) in pairwise(zip(counts, errors, strict=True))]
    assert orders == pytest.approx([1.0] * len(orders), abs=0.1)


def there_and_back(steps, spacing, x0):
    """x0 -> x_T -> x0 over the same grid, with the best epsilon at the states that each direction visits."""
    inverse = table_of(steps, make_inverse_table, timestep_spacing=spacing)
    forward = table_of(steps, timestep_spacing=spacing)
    x = torch.tensor(x0, dtype=torch.float64).view(-1, 1)
    for i in reversed(range(len(inverse))):
        output = epsilon(x, inverse.alpha_bar[i].item())
        x = ddim_step(x, output, inverse.row(i), X0Treatment())[0]
    encoded = x
    for i in range(len(forward)):
        x = ddim_step(x, epsilon(x, forward.alpha_bar[i].item()), forward.row(i), X0Treatment())[0]
    return encoded.flatten().tolist(), x.flatten().tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
def test_invert_and_sample_are_inverses_as_n_grows(spacing):
    """The image that comes back, and the x_T on the way, both err by about 1/N; with 500 steps by less than 1 %."""
    points, counts = [-0.9, 0.3, 0.1, 1.4], (10, 50, 250, 500)
    returned, encoded = [], []
    for steps in counts:
        noisy, x0 = there_and_back(steps, spacing, points)
        a = levels(table_of(steps, timestep_spacing=spacing).timesteps.tolist())[0]
        returned.append(error(x0, points))
        encoded.append(error(noisy, [exact_ode_inverse(x, a) for x in points]))
    for errors in (returned, encoded):
        assert errors[-1] < 0.01
        for (n, before), (m, after) in pairwise(zip(counts, errors, strict=True)):
            assert after * m == pytest.approx(before * n, rel=0.3), errors


def error(found, expected):
    return max(abs(f - e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("previous", ["grid", "diffusers"])
@each_spacing
def test_an_inverse_step_undoes_a_step_with_the_same_epsilon(spacing, previous):
    """Whatever epsilon is: the levels of the one are those of the other, exchanged; and it draws no noise."""
    keys = {"timestep_spacing": spacing, "previous_timestep": previous}
    forward, inverse = table_of(13, **keys), table_of(13, make_inverse_table, noise={"eta": 1.0}, **keys)
    assert not inverse.sigma.any()
    for i, t in enumerate(forward.timesteps.tolist()):
        x, eps = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        there, x0 = ddim_step(x, eps, forward.row(i), X0Treatment())
        back, same_x0 = ddim_step(there, eps, inverse.row(i), X0Treatment())
        torch.testing.assert_close(back, x, rtol=0, atol=CLOSE)
        torch.testing.assert_close(same_x0, x0, rtol=0, atol=CLOSE)


def off_level(spacing, previous, x0=MU, noise=2.35):
    """How far x_t is from its level in 13 steps with the exact epsilon of a point mass: at each next read, and at last.

    2.35 is a large value of a normal picture: of 53 numbers one is beyond it.
    """
    table = table_of(13, timestep_spacing=spacing, previous_timestep=previous)
    a = levels(table.timesteps.tolist())
    on_level = [math.sqrt(level) * x0 + math.sqrt(1 - level) * noise for level in a]
    x = torch.tensor([[on_level[0]]], dtype=torch.float64)
    off = []
    for i, level in enumerate(on_level[1:]):
        x = ddim_step(x, epsilon(x, a[i], mu=x0, s=0.0), table.row(i), X0Treatment())[0]
        off.append(abs(x.item() - level))
    return max(off[:-1]), off[-1]


@each_spacing
def test_x_t_is_on_the_level_at_which_it_is_read_next(spacing):
    """With the next entry of the grid, for a grid that T // N does not describe."""
    assert max(off_level(spacing, "grid")) < CLOSE


@pytest.mark.parametrize(
    ("spacing", "read", "last"),
    [("leading", 0, 0), ("uniform", 0, 0), ("linspace", 0.11, 0), ("trailing", 0.014, 0.024), ("quadratic", 0.32, 0)],
)
def test_diffusers_stride_leaves_the_level(spacing, read, last):
    """By what issue 3 records for linspace and trailing; what trailing ends at is not even free of noise."""
    found = off_level(spacing, "diffusers", x0=0.0)
    assert found == pytest.approx((read, last), abs=0.005 if read > 0.1 else 5e-4)


TREATMENTS = {
    "none": X0Treatment(),
    "clip": X0Treatment(clip=0.8),
    "clip, epsilon again": X0Treatment(clip=0.8, rederive_epsilon=True),
    "threshold": X0Treatment(threshold=(0.9, 1.5)),
    "threshold, epsilon again": X0Treatment(threshold=(0.9, 1.5), rederive_epsilon=True),
}


@pytest.mark.parametrize("treatment", TREATMENTS.values(), ids=TREATMENTS)
def test_the_three_predictions_say_the_same(treatment):
    """From outputs that mean the same x0 and epsilon follow the same x0 and epsilon, however x0 is treated."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64, generator=generator)
    # Most images are in range, some are not.
    x0 *= torch.tensor([0.2, 0.5, 1.0, 3.0]).view(-1, 1, 1, 1)
    for i, a in enumerate(table_of(10).alpha_bar.tolist()):
        signal, noise = math.sqrt(a), math.sqrt(1 - a)
        x = signal * x0 + noise * eps
        outputs = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}
        for prediction, output in outputs.items():
            found_x0, found_eps = predict(x, output, table_of(10, prediction_type=prediction).row(i), treatment)
            limit = x0.abs().flatten(1).quantile(0.9, dim=1).clamp(1, 1.5).view(-1, 1, 1, 1)
            expected = x0
            if treatment.clip:
                expected = x0.clamp(-0.8, 0.8)
            elif treatment.threshold:
                expected = x0.clamp(-limit, limit) / limit
            expected_eps = (x - signal * expected) / noise if treatment.rederive_epsilon else eps
            torch.testing.assert_close(found_x0, expected, rtol=0, atol=CLOSE)
            torch.testing.assert_close(found_eps, expected_eps, rtol=0, atol=CLOSE)
            assert found_x0.abs().max() <= (0.8 if treatment.clip else 1 if treatment.threshold else 99)


def test_clipping_and_thresholding_come_from_the_settings():
    """Thresholding replaces clipping; neither is done when both are off."""
    sampling = SamplingSettings(use_clipped_model_output=True)
    assert X0Treatment.of(SchedulerSettings(clip_sample_range=2.0), sampling) == X0Treatment(2.0, None, True)
    both = SchedulerSettings(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)
    assert X0Treatment.of(both, SamplingSettings()) == X0Treatment(None, (0.9, 1.5))
    assert X0Treatment.of(SchedulerSettings(clip_sample=False), SamplingSettings()) == X0Treatment()
