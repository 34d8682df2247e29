"""How far rounding may take one step of DDIM: a running error analysis (Higham, Accuracy and Stability, section 3.3).

A `Rounded` holds the exact value of a quantity in float64 and a bound on the error of the same quantity as computed
with unit roundoff u: every operation adds u |result| to what its operands bring along. So a bound follows from the
formulas and the numbers that go in, and holds on every processor, whatever it contracts or vectorises: fused
multiply-adds and wider registers round less often, never more often.

`step` is DDIM's equations 12 and 16 written a third time, beside ours and diffusers', in the order of operations of
either: diffusers computes everything from alpha_bars step by step; ours only multiplies by coefficients and adds, which
were computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

U32, U64 = 2.0**-24, 2.0**-53


@dataclass(frozen=True, eq=False)
class Rounded:
    """An exact value (float64), and how far it may be from it as computed with unit roundoff ``u``."""

    value: Tensor
    error: Tensor
    u: float

    @classmethod
    def exact(cls, value, u: float, error=0.0) -> Rounded:
        value = torch.as_tensor(value, dtype=torch.float64)
        return cls(value, torch.as_tensor(error, dtype=torch.float64).expand_as(value), u)

    def __getitem__(self, index) -> Rounded:
        return Rounded(self.value[index], self.error[index], self.u)

    def _lift(self, other) -> Rounded:
        return other if isinstance(other, Rounded) else Rounded.exact(other, self.u)

    def _computed(self, value: Tensor, carried: Tensor) -> Rounded:
        """The result of one operation: what its operands carried into it, and its own rounding."""
        return Rounded(value, carried + self.u * (value.abs() + carried), self.u)

    def __add__(self, other) -> Rounded:
        other = self._lift(other)
        return self._computed(self.value + other.value, self.error + other.error)

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error, self.u)

    def __sub__(self, other) -> Rounded:
        return self + -self._lift(other)

    def __rsub__(self, other) -> Rounded:
        return self._lift(other) - self

    def __rtruediv__(self, other) -> Rounded:
        return self._lift(other) / self

    def __mul__(self, other) -> Rounded:
        other = self._lift(other)
        carried = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error
        return self._computed(self.value * other.value, carried)

    def __truediv__(self, other) -> Rounded:
        other = self._lift(other)
        value = self.value / other.value
        # |p'/q' - p/q| <= (|p' - p| + |p/q| |q' - q|) / |q'|
        smallest = (other.value.abs() - other.error).clamp(min=0)
        return self._computed(value, (self.error + value.abs() * other.error) / smallest)

    def sqrt(self) -> Rounded:
        """The root, or the power 0.5 as diffusers has it, which libraries compute to one unit in the last place, 2u."""
        value = self.value.clamp(min=0)
        root, lowest = value.sqrt(), (self.value - self.error).clamp(min=0)
        # As quotients: the difference of two roots would lose its digits where the error is small.
        below = torch.where(root > 0, (value - lowest) / (root + lowest.sqrt()), 0)
        above = torch.where(self.error > 0, self.error / ((value + self.error).sqrt() + root), 0)
        found = self._computed(root, torch.maximum(below, above))
        return Rounded(found.value, found.error + self.u * root, self.u)

    def once(self, u: float) -> Rounded:
        """Rounded once to ``u`` after it was computed."""
        return Rounded(self.value, self.error + u * (self.value.abs() + self.error), u)

    def clamp(self, limit: float) -> Rounded:
        """To +-limit: what is beyond it on one side with all of its error has none any more."""
        limit_error = self.u * limit
        value = self.value.clamp(-limit, limit)
        above = (self.value + self.error).clamp(-limit, limit) - value
        below = value - (self.value - self.error).clamp(-limit, limit)
        return Rounded(value, torch.maximum(above, below) + limit_error, self.u)

    def threshold(self, ratio: float, most: float) -> Rounded:
        """Dynamic thresholding; the dimensions of an image are the last three.

        An order statistic, and so the quantile, moves by no more than the values do. torch computes where the quantile
        lies in the values' own dtype, which moves the weight between two neighbours by 2u times its place.
        """
        ordered = self.value.abs().flatten(-3).sort(dim=-1).values
        place = ratio * (ordered.shape[-1] - 1)
        low, high = ordered[..., math.floor(place)], ordered[..., math.ceil(place)]
        s = low + (high - low) * (place - math.floor(place))
        moved = self.error.flatten(-3).amax(-1)
        moved = moved + self.u * ((3 + 2 * place) * (high - low) + s + moved)
        # At one of its ends s is the same in both.
        moved = torch.where((s + moved <= 1) | (s - moved >= most), self.u * most, moved)
        s, moved = s.clamp(1, most)[..., None, None, None], moved[..., None, None, None]
        value = torch.minimum(torch.maximum(self.value, -s), s) / s
        # |n'/s' - n/s| <= (|n' - n| + |n/s| |s' - s|) / s', where clipping moves n by no more than x0 or s moves.
        off = torch.maximum(self.error, moved)
        return self._computed(value, (off + value.abs() * moved) / (s - moved).clamp(min=1))


@dataclass(frozen=True, eq=False)
class Levels:
    """What equations 12 and 16 make of alpha_bar_t ``a`` and alpha_bar_prev ``b``, every operation rounded."""

    signal: Rounded
    noise: Rounded
    prev_signal: Rounded
    direction: Rounded
    sigma: Rounded | None

    @classmethod
    def of(cls, a: Rounded, b: Rounded, eta: float) -> Levels:
        noisy, rest, sigma = 1 - a, 1 - b, None
        if eta:
            sigma = ((rest / noisy) * (1 - a / b)).sqrt() * Rounded.exact(eta, a.u).once(a.u)
            rest = rest - sigma * sigma
        return cls(a.sqrt(), noisy.sqrt(), b.sqrt(), rest.sqrt(), sigma)

    def predict(self, x: Rounded, output: Rounded, prediction: str) -> tuple[Rounded, Rounded]:
        if prediction == "epsilon":
            return (x - self.noise * output) / self.signal, output
        if prediction == "sample":
            return output, (x - self.signal * output) / self.noise
        return self.signal * x - self.noise * output, self.signal * output + self.noise * x

    def rederive(self, x: Rounded, x0: Rounded) -> Rounded:
        return (x - self.signal * x0) / self.noise


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What ours makes of them in float64, each rounded once to ``u``."""

    levels: Levels
    u: float

    @property
    def signal(self) -> Rounded:
        return self.levels.signal.once(self.u)

    @property
    def noise(self) -> Rounded:
        return self.levels.noise.once(self.u)

    @property
    def prev_signal(self) -> Rounded:
        return self.levels.prev_signal.once(self.u)

    @property
    def direction(self) -> Rounded:
        return self.levels.direction.once(self.u)

    @property
    def sigma(self) -> Rounded | None:
        return self.levels.sigma and self.levels.sigma.once(self.u)

    def predict(self, x: Rounded, output: Rounded, prediction: str) -> tuple[Rounded, Rounded]:
        signal, noise, u = self.levels.signal, self.levels.noise, self.u
        if prediction == "epsilon":
            return (1 / signal).once(u) * x - (noise / signal).once(u) * output, output
        if prediction == "sample":
            return output, (1 / noise).once(u) * x - (signal / noise).once(u) * output
        return self.signal * x - self.noise * output, self.signal * output + self.noise * x

    def rederive(self, x: Rounded, x0: Rounded) -> Rounded:
        return (x - self.signal * x0) * (1 / self.levels.noise).once(self.u)


def step(x, output, z, by: Levels | Coefficients, u: float, prediction: str, treat=None, again=False):
    """x_prev and x0, each a `Rounded`, of a step from the very same x, output and noise z.

    Args:
        treat: what is done to a `Rounded` x0 (clipping, thresholding), or None.
        again: whether epsilon is then derived again.
    """
    x, output, z = (v if isinstance(v, Rounded) else Rounded.exact(v, u) for v in (x, output, z))
    x0, epsilon = by.predict(x, output, prediction)
    if treat:
        x0 = treat(x0)
    if again:
        epsilon = by.rederive(x, x0)
    x_prev = by.prev_signal * x0 + by.direction * epsilon
    return (x_prev if by.sigma is None else x_prev + by.sigma * z), x0


def steepest(levels: Levels, prediction: str, slope: float, rest: float, treatment: str = "", again: bool = False):
    """By how much a step at most multiplies a difference in x, the network following it, in x_prev and in x0.

    In the maximum norm, for a network ``slope`` x + r(x) in which r moves by no more than ``rest`` times what x moves.
    Clipping keeps the derivative of x0 or takes it away, and thresholding adds at most that of another pixel's x0,
    through the quantile; what is convex in the share that is kept is largest at one of its ends.
    """
    signal, noise = levels.signal.value, levels.noise.value
    one, none = torch.ones_like(signal), torch.zeros_like(signal)
    # x0 and epsilon as combinations of x and the output, then as derivatives by x and by r.
    x0_x, x0_r, epsilon_x, epsilon_r = {
        "epsilon": (1 / signal, -noise / signal, none, one),
        "sample": (none, one, 1 / noise, -signal / noise),
        "v_prediction": (signal, -noise, noise, signal),
    }[prediction]
    x0_x, epsilon_x = x0_x + slope * x0_r, epsilon_x + slope * epsilon_r
    of_x0 = levels.prev_signal.value
    if again:
        of_x0, epsilon_x, epsilon_r = of_x0 - levels.direction.value * signal / noise, 1 / noise, none
    by_x, by_r = levels.direction.value * epsilon_x, levels.direction.value * epsilon_r
    found = torch.stack(
        [(kept * of_x0 * x0_x + by_x).abs() + rest * (kept * of_x0 * x0_r + by_r).abs() for kept in (0, 1)][
            0 if treatment else 1 :
        ]
    ).amax(0)
    in_x0 = x0_x.abs() + rest * x0_r.abs()
    if treatment == "thresholding":
        return found + of_x0.abs() * in_x0, 2 * in_x0
    return found, in_x0


def running_product(factors: Rounded) -> Rounded:
    """cumprod, one factor after the other; a wider accumulator only rounds less."""
    values, errors, product, off = [], [], 1.0, 0.0
    for factor, error in zip(factors.value.tolist(), factors.error.tolist(), strict=True):
        off = abs(product) * error + abs(factor) * off + off * error
        product *= factor
        off += factors.u * (abs(product) + off)
        values.append(product)
        errors.append(off)
    return Rounded(*torch.tensor([values, errors], dtype=torch.float64), factors.u)


def _plain_betas(config, u: float) -> Rounded:
    """Those before rescaling."""
    total = config.num_train_timesteps
    if config.trained_betas is not None:
        return Rounded.exact(torch.tensor(config.trained_betas, dtype=torch.float64), u).once(u)
    if config.beta_schedule == "squaredcos_cap_v2":
        # In Python's floats, and then rounded. An angle's rounding moves its cosine by theta tan(theta), relatively.
        theta = (torch.arange(total + 1, dtype=torch.float64) / total + 0.008) / 1.008 * torch.pi / 2
        bars = theta.cos().square()
        bars = Rounded(bars, U64 * (6 * theta * theta.tan().abs() + 3) * bars, U64)
        found = 1 - bars[1:] / bars[:-1]
        capped = found.value >= 0.999
        value, error = torch.where(capped, 0.999, found.value), torch.where(capped, 0.0, found.error)
        return Rounded(value, error, u).once(u)
    power = 0.5 if config.beta_schedule == "scaled_linear" else 1
    start, end = config.beta_start**power, config.beta_end**power
    # A step, its multiple, a sum, and the ends themselves.
    line = Rounded.exact(torch.linspace(start, end, total, dtype=torch.float64), u, error=5 * u * end)
    return line if power == 1 else line * line


def make_betas(config, u: float) -> Rounded:
    """The betas of diffusers' DDIMScheduler: with U32 of the class as it is, with U64 of its formulas in float64."""
    betas = _plain_betas(config, u)
    if not config.rescale_betas_zero_snr:
        return betas
    root = running_product(1 - betas).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bars = root * root
    alphas = bars[1:] / bars[:-1]
    return 1 - Rounded(torch.cat([bars.value[:1], alphas.value]), torch.cat([bars.error[:1], alphas.error]), u)


def make_alpha_bars(config, u: float) -> Rounded:
    """Its alphas_cumprod."""
    return running_product(1 - make_betas(config, u))


@cache
def _alpha_bars(key: tuple, u: float) -> Rounded:
    return make_alpha_bars(SimpleNamespace(**dict(key)), u)


def alpha_bars_of(config, u: float) -> Rounded:
    """`make_alpha_bars`, each made once."""
    names = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "rescale_betas_zero_snr")
    trained = config.trained_betas and tuple(config.trained_betas)
    return _alpha_bars((*((name, config[name]) for name in names), ("trained_betas", trained)), u)


def exact(reference):
    """diffusers' scheduler with the alpha_bars of its own formulas in float64: its step is left as it is."""
    reference.alphas_cumprod = alpha_bars_of(reference.config, U64).value
    last = torch.ones((), dtype=torch.float64) if reference.config.set_alpha_to_one else reference.alphas_cumprod[0]
    reference.final_alpha_cumprod = reference.initial_alpha_cumprod = last
    return reference


@contextmanager
def _off(network: torch.nn.Module, by: float, seed: int):
    """Each number that the network returns is ``by`` times its largest off, up or down at random."""
    generator = torch.Generator().manual_seed(seed)

    def move(module, args, output):
        signs = torch.randint(2, output.sample.shape, generator=generator).to(output.sample) * 2 - 1
        output.sample = output.sample + by * output.sample.abs().max() * signs
        return output

    hook = network.register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def float32_leeway(run: Callable[[], Tensor], network: torch.nn.Module) -> tuple[Tensor, float]:
    """What a run in float64 gives, and how far from it one in float32 may come out.

    That is how far it gets with each output of its network off by 32 units roundoff of float32: several times what the
    layers of a small network round, in whatever order a processor sums, and more than a step does. What the steps and
    the network make of it is measured, so a bound follows from the run and not from the processor.
    """
    found, off = run(), 0.0
    for seed in range(3):
        with _off(network, 32 * U32, seed):
            off = max(off, (run() - found).abs().max().item())
    return found, off


def pipeline_in_float64(directory, monkeypatch, scheduler=None):
    """diffusers' DDIMPipeline on float64 alpha_bars, with the noise that it draws in float32.

    The function returned makes one picture, [C, H, W] in [-1, 1], and says how far one in float32 may come out.
    """
    from diffusers import DDIMPipeline
    from diffusers.pipelines.ddim import pipeline_ddim
    from diffusers.schedulers import scheduling_ddim
    from diffusers.utils.torch_utils import randn_tensor

    def drawn(shape, generator=None, device=None, dtype=None):
        return randn_tensor(shape, generator, device, torch.float32).to(dtype)

    for module in (pipeline_ddim, scheduling_ddim):
        monkeypatch.setattr(module, "randn_tensor", drawn)
    pipeline = DDIMPipeline.from_pretrained(directory).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = exact(scheduler or scheduling_ddim.DDIMScheduler.from_config(pipeline.scheduler.config))

    def picture(seed: int, steps: int, **step) -> tuple[Tensor, float]:
        def run():
            generator = torch.Generator().manual_seed(seed)
            return pipeline(generator=generator, num_inference_steps=steps, output_type="pt", **step).images[0] * 2 - 1

        return float32_leeway(run, pipeline.unet)

    return picture
