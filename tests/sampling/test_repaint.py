"""What is made anew beside a mask (RePaint, arXiv:2201.09865): closed forms, what stays, and what is refused."""

import math

import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler
from PIL import Image

from ddim_cli import sample
from ddim_cli.config.layers import merge, table_layer
from ddim_cli.errors import ConfigError
from ddim_cli.sampling.items import SeedItems
from ddim_cli.sampling.loop import Denoiser, Observer, run_batches
from ddim_cli.sampling.resolve import settle, with_init
from ddim_cli.sampling.sampler import make_sampler

# Of the default schedule, multiplied up in plain floats; behind the last one what is free of noise, at -1.
ALPHA_BAR = [*np.cumprod([1 - (1e-4 + t * (0.02 - 1e-4) / 999) for t in range(1000)]).tolist(), 1.0]
SIDE, CORRELATION = 128, 0.8


def files(folder, picture, mask):
    """The settings that name a picture and a mask, uint8 [H, W]."""
    for name, values in (("picture", picture), ("mask", mask)):
        Image.fromarray(np.asarray(values, np.uint8)).save(folder / f"{name}.png")
    return {"init": str(folder / "picture.png"), "mask": str(folder / "mask.png")}


def right_half(height, width):
    """A mask that keeps the left half."""
    return np.repeat([[0] * (width // 2) + [255] * (width // 2)], height, axis=0)


def of_pairs(x, t):
    """The best epsilon for pairs of pixels, one in the left half and one in the right: N(0, 1), and correlated."""
    a = ALPHA_BAR[t[0]]
    left, right = x.chunk(2, dim=-1)
    shared = a * CORRELATION
    return math.sqrt(1 - a) / (1 - shared**2) * torch.cat([left - shared * right, right - shared * left], dim=-1)


def by_hand(steps, resample, eta):
    """Slope and standard deviation of a pixel made anew, given the known one k, of the chain that RePaint describes.

    The pixel is slope k + g, and the known state sqrt(a) k + sqrt(1 - a) z: g has the variance v, z the variance 1, and
    w is how they covary, where z stays the same until a jump: without jumps, or without noise of steps. The times are
    those of diffusers' list.
    """
    scheduler, stride = RePaintScheduler(), 1000 // steps
    scheduler.set_timesteps(steps, jump_length=10, jump_n_sample=resample)
    slope, v, w, before = 0.0, 1.0, 0.0, 1000
    for t in scheduler.timesteps.tolist():
        if t > before:
            low, high = ALPHA_BAR[max(before - stride, -1)], ALPHA_BAR[before]
            slope, v = math.sqrt(high / low) * slope, high / low * v + 1 - high / low
            w *= high / low * math.sqrt((1 - low) / (1 - high))
        else:
            a, after = ALPHA_BAR[t], ALPHA_BAR[max(t - stride, -1)]
            sigma = eta * math.sqrt((1 - after) / (1 - a) * (1 - a / after))
            # x_prev is sqrt(after / a) x and so much of epsilon (DDIM, eq. 12), which is linear in both pixels.
            of_epsilon = math.sqrt(max(1 - after - sigma**2, 0)) - math.sqrt(after * (1 - a) / a)
            of_epsilon *= math.sqrt(1 - a) / (1 - (a * CORRELATION) ** 2)
            of_own, of_known = math.sqrt(after / a) + of_epsilon, -of_epsilon * a * CORRELATION
            # Before the first step all is noise.
            signal, noise = (0.0, 1.0) if before == 1000 else (math.sqrt(a), math.sqrt(1 - a))
            slope = of_own * slope + of_known * signal
            v = of_own**2 * v + 2 * of_own * of_known * noise * w + (of_known * noise) ** 2 + sigma**2
            w = 0.0 if eta and resample > 1 else of_own * w + of_known * noise
        before = t
    return slope, math.sqrt(v)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_pixels_made_anew_come_nearer_to_what_the_known_ones_imply(eta, tmp_path):
    """With the exact network, 16,384 pairs of pixels: the conditional mean is 0.8 k, and the deviation 0.6.

    How far RePaint is from that is followed by hand; from what is followed, five standard errors are allowed.
    """
    known = np.random.default_rng(0).choice([0, 255], (SIDE, SIDE))
    named = files(tmp_path, np.concatenate([known, known], axis=1), right_half(SIDE, 2 * SIDE))
    k = torch.from_numpy(known / 127.5 - 1).flatten()
    off = []
    for resample in (1, 3, 10):
        settings = {**named, "steps": 100, "num_images": 1, "eta": eta, "resample": resample}
        config = {"sampling": settings, "scheduler": {"clip_sample": False}}
        [picture] = sample(config, model=of_pairs, shape=(1, SIDE, 2 * SIDE))
        made = picture.tensor[0, :, SIDE:].double().flatten()
        found = (made @ k / SIDE**2).item()
        rest = made - found * k
        slope, deviation = by_hand(100, resample, eta)
        assert found == pytest.approx(slope, abs=5 * deviation / SIDE)
        assert rest.mean().item() == pytest.approx(0, abs=5 * deviation / SIDE)
        assert rest.std().item() == pytest.approx(deviation, rel=5 / (math.sqrt(2) * SIDE))
        off.append((abs(found - 0.8), abs(rest.std().item() - 0.6)))
    (first, first_spread), (second, _), (last, last_spread) = off
    assert first > 1.5 * second > 3 * last, off
    assert first_spread > 2 * last_spread, off
    assert last < 0.1


def test_the_chain_leads_to_the_conditional_distribution():
    """With more steps, so that a jump is short, and with more jumps."""
    found = [by_hand(steps, resample, 0.0) for steps, resample in ((50, 1), (50, 5), (100, 20), (250, 50))]
    off = [max(abs(slope - 0.8), abs(deviation - 0.6)) for slope, deviation in found]
    assert off == sorted(off, reverse=True)
    assert off[-1] < 0.025


class Seen(Observer):
    """Remembers the number of each step and the state after it."""

    def __init__(self, items, decoder):
        self.states = []

    def step(self, i, x, x0):
        self.states.append((i, x.clone()))

    def seen(self, row):
        return self.states


@pytest.mark.parametrize(("steps", "strength"), [(25, 1.0), (50, 0.5)])
@pytest.mark.parametrize(("eta", "resample"), [(0.0, 1), (1.0, 1), (0.0, 3), (1.0, 3)])
@pytest.mark.parametrize("to_one", [True, False])
def test_known_pixels_are_at_the_level_of_each_step(to_one, eta, resample, steps, strength, tmp_path):
    """sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise after each step; the noise is the seed's own, until a jump.

    With jumps and noise of steps it is that of the step. And a jump adds noise to all pixels, the next of the seed's
    stream.
    """
    shape, given = (1, 4, 6), []

    def network(x, t):
        given.append((t[0].item(), x.clone()))
        return torch.tanh(x + 1)

    picture = np.random.default_rng(0).integers(0, 256, shape[1:])
    named = files(tmp_path, picture, right_half(4, 6))
    settings = {**named, "steps": steps, "eta": eta, "resample": resample, "strength": strength, "seed": 7}
    config = {"sampling": {**settings, "num_images": 1}, "scheduler": {"set_alpha_to_one": to_one}}
    run = with_init(settle(merge([table_layer(config, "test")])), shape)
    sampler = make_sampler(run, network, torch.device("cpu"), torch.float32, shape)
    [[made]] = run_batches(Denoiser(sampler, Seen), SeedItems.of(run.config, run.begins), 1)

    stream = torch.Generator().manual_seed(7)
    noise = torch.randn(shape, generator=stream)
    x0, grid = torch.from_numpy(picture / 127.5 - 1).float()[None], run.timesteps
    after = [*(ALPHA_BAR[t] for t in run.timesteps[1:]), 1.0 if to_one else ALPHA_BAR[0]]
    begin = grid.index(given[0][0])
    x, expected, before = noise, [], begin - 1
    if begin:
        level = ALPHA_BAR[grid[begin]]
        x = math.sqrt(level) * x0 + math.sqrt(1 - level) * noise
    for (i, state), (t, before_it) in zip(made.seen, given, strict=True):
        if i <= before:
            low, high = after[before], ALPHA_BAR[grid[i]]
            more = torch.randn(shape, generator=stream)
            x = math.sqrt(high / low) * x + math.sqrt(1 - high / low) * more
            noise = (x - math.sqrt(high) * x0) / math.sqrt(1 - high)
        assert t == grid[i]
        torch.testing.assert_close(before_it[0], x, rtol=0, atol=1e-6)
        drawn = torch.randn(shape, generator=stream) if eta else noise
        noise = drawn if resample > 1 else noise
        # What the grid ends with is free of noise, whatever level it stands for.
        level = after[i] if i < steps - 1 else 1.0
        known = math.sqrt(level) * x0 + math.sqrt(1 - level) * noise
        torch.testing.assert_close(state[0, :, :, :3], known[:, :, :3], rtol=0, atol=1e-6)
        x, before = state[0], i
        expected.append(i)
    # Half of 50 steps are 25: jumps behind the 15th and the last, twice each.
    jumps = (range(15), range(5, 15), range(5, 25), range(15, 25), range(15, 25)) if resample == 3 else (range(25),)
    assert expected == [begin + i for part in jumps for i in part]


def of_a_point(value):
    """The best epsilon for pictures that are ``value`` everywhere."""

    def network(x, t):
        a = ALPHA_BAR[t[0]]
        return (x - math.sqrt(a) * value) / math.sqrt(1 - a)

    return network


@pytest.mark.parametrize("resample", [1, 3])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_is_black_stays_to_the_bit(eta, resample, tmp_path):
    rng = np.random.default_rng(0)
    picture, mask = rng.integers(0, 256, (16, 16)), rng.choice([0, 255], (16, 16))
    settings = {**files(tmp_path, picture, mask), "steps": 25, "num_images": 2, "eta": eta, "resample": resample}
    for made in sample({"sampling": settings}, model=of_a_point(1.5), shape=(1, 16, 16)):
        black = mask == 0
        assert np.array_equal(np.asarray(made.image)[black], picture[black])
        exact = picture.astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1)
        assert np.array_equal(made.tensor[0].numpy()[black], exact[black])
        assert (np.asarray(made.image)[~black] == 255).all()


def test_grey_blends(tmp_path):
    """What is made anew counts as much as the mask is white."""
    mask, known, made_anew = np.tile([0, 64, 128, 192, 255], (5, 1)), 191 / 127.5 - 1, -0.5
    settings = {**files(tmp_path, np.full((5, 5), 191), mask), "steps": 10, "num_images": 1}
    [made] = sample({"sampling": settings}, model=of_a_point(made_anew), shape=(1, 5, 5))
    assert made.tensor[0].tolist() == pytest.approx(known + mask / 255 * (made_anew - known), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"order": 2}, "sampling.resample is for order 1, and sampling.order = 2: a step of higher order remembers"),
        ({"mask": None}, "sampling.resample = 3 joins what is made anew to what is kept of a picture; name a mask"),
        ({"mask": None, "init": None}, "sampling.resample = 3 joins what is made anew to what is kept of a picture"),
        ({"init": None}, "sampling.mask says what of a picture is made anew; name the picture with sampling.init"),
        ({"resample": 0}, "sampling.resample"),
    ],
)
def test_resampling_without_sense_is_refused(change, sentence, tmp_path):
    settings = {**files(tmp_path, np.full((4, 4), 9), right_half(4, 4)), "resample": 3, **change}
    settings = {key: value for key, value in settings.items() if value is not None}
    with pytest.raises(ConfigError, match=sentence.replace(".", r"\.")):
        sample({"sampling": settings}, model=of_a_point(0.0), shape=(1, 4, 4))


def test_rows_bring_their_masks(tmp_path):
    """And resampling is refused where none does."""
    row = files(tmp_path, np.full((4, 4), 9), right_half(4, 4))
    settings = {"resample": 3, "steps": 20}
    [made] = sample({"sampling": settings}, model=of_a_point(1.5), shape=(1, 4, 4), items=[{**row, "seed": 0}])
    assert np.asarray(made.image).tolist() == [[9, 9, 255, 255]] * 4
    with pytest.raises(ConfigError, match=r"sampling.resample = 3 is for rows with a mask, and none has one"):
        sample({"sampling": settings}, model=of_a_point(1.5), shape=(1, 4, 4), items=[{"init": row["init"]}])
