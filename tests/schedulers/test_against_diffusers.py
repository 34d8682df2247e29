"""Our DDIMScheduler against diffusers' DDIMScheduler and DDIMInverseScheduler.

No tolerance is a number that some machine gave: each follows from the arithmetic (see `rounding`).

In float64 whole loops are compared, with diffusers' own steps on alpha_bars in float64 (`exact`): they may differ by
what both round in a step, and by what the step and the network make of the difference before it.

In float32 every step is compared from the same state, so that nothing adds up: ours with the exact result of equations
12 and 16, within the rounding of one step.

And diffusers as it is, in float32 on its float32 alpha_bars, which lose their digits where next to nothing is signal or
next to nothing is noise: with the exact result for just these alpha_bars. The two differ by what is allowed to each,
and by what the alpha_bars do; those are compared on their own.
"""

import inspect
import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, groupby, product
from pathlib import Path

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMPipeline, DDPMScheduler, PNDMScheduler
from diffusers import DDIMScheduler as Reference
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from diffusers.utils.torch_utils import randn_tensor

from ddim_cli import DDIMScheduler, load_model
from ddim_cli.errors import ConfigError, UsageError

sys.path.insert(0, str(Path(__file__).parents[1]))
from rounding import U32, U64, Coefficients, Levels, Rounded, alpha_bars_of, exact, make_betas, steepest
from rounding import step as rounded_step

STEPS = (1, 2, 3, 7, 13)
T = 1000

SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": [0.0002 + 0.00001 * t for t in range(T)]},
}
SPACINGS = {
    "leading": {},
    "leading+1": {"steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
}
X0 = (
    {"clip_sample_range": 1.5},
    {"clip_sample": False},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SWITCH = (True, False)

# (prediction, treatment of x0, set_alpha_to_one, rescale_betas_zero_snr, eta, use_clipped_model_output), each in
# every schedule and spacing; the five step counts take turns, and 5 divides no other factor.
KEYS = tuple(product(PREDICTIONS, X0, SWITCH, SWITCH, (0.0, 0.5, 1.0), (None, True)))
FAMILIES = tuple(product(SCHEDULES, SPACINGS))

X_T = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(T, 2, 1, 2, 3, generator=torch.Generator().manual_seed(1))


# Of `network`: r(x) moves by no more than 0.1 + 0.3 times what x moves.
REST = 0.4


def network(x, t, prediction="epsilon"):
    """A smooth function of x and t in which pixels depend on each other.

    It is as near to x as an epsilon or an x0 is, and as a velocity is not: were it otherwise, 1 / sqrt(alpha_bar)
    would amplify rounding errors from step to step without bound, or x would cancel out.
    """
    rest = 0.1 * x.flip(-1) - 0.3 * torch.sin(x + 0.01 * float(t))
    return rest if prediction == "v_prediction" else x + rest


@dataclass
class Steps:
    """A run, step by step: the state, the output there, the noise, and the x_prev and x0 that came of them."""

    x: torch.Tensor
    output: torch.Tensor
    noise: torch.Tensor
    prev: torch.Tensor
    x0: torch.Tensor


@torch.inference_mode()
def loop(scheduler, timesteps, dtype=torch.float32, method="step", **step):
    x, noise = X_T.to(dtype), NOISE[: len(timesteps)].to(dtype)
    rows = []
    for i, t in enumerate(timesteps):
        output = network(x, t, scheduler.config.prediction_type)
        given = {"variance_noise": noise[i], **step} if step else {}
        prev, x0 = getattr(scheduler, method)(output, t, x, **given, return_dict=False)
        rows.append((x, output, prev, x0))
        x = prev
    x, output, prev, x0 = map(torch.stack, zip(*rows, strict=True))
    return Steps(x, output, noise, prev, x0)


@torch.inference_mode()
def again(scheduler, timesteps, steps, **step):
    """The same steps by another scheduler: each from the state, the output and the noise of ``steps``."""
    rows = []
    for i, t in enumerate(timesteps):
        given = {"variance_noise": steps.noise[i], **step} if step else {}
        rows.append(scheduler.step(steps.output[i], t, steps.x[i], **given, return_dict=False))
    prev, x0 = map(torch.stack, zip(*rows, strict=True))
    return Steps(steps.x, steps.output, steps.noise, prev, x0)


def excess(found, expected, bound):
    """The largest error in units of its bound: what is at most 1 is rounding."""
    assert bound.isfinite().all(), "no bound at all"
    off = (found.double() - expected.double()).abs()
    return torch.where(off == 0, 0, off / bound).nan_to_num(nan=torch.inf).max().item()


def treatment(config):
    """What `config` does to a `Rounded` x0, and its name."""
    if config.get("thresholding"):
        most = config.sample_max_value
        return "thresholding", lambda x0: x0.threshold(config.dynamic_thresholding_ratio, most)
    if config.clip_sample:
        return "clipping", lambda x0: x0.clamp(config.clip_sample_range)
    return "", None


@lru_cache(maxsize=4096)
def levels_of(bars, last, a, b, eta):
    """Of every step from the timesteps ``a`` to ``b``; -1 is the level ``last``, or that of timestep 0."""
    last = last or bars[0]
    value, error = (torch.cat([getattr(bars, n), getattr(last, n).view(1)]) for n in ("value", "error"))
    a, b = (Rounded(value[list(t)].view(-1, 1, 1, 1, 1), error[list(t)].view(-1, 1, 1, 1, 1), bars.u) for t in (a, b))
    return Levels.of(a, b, eta)


ONE = Rounded.exact(1.0, U64)


@dataclass
class Judge:
    """Judges the steps of one run by their rounding.

    ``a`` and ``b`` are the timesteps of the levels that each step leads from and to; -1 is the final alpha_bar.
    """

    config: dict
    a: tuple[int, ...]
    b: tuple[int, ...]
    eta: float = 0.0
    rederive: bool = False
    treated: bool = True

    def exact_levels(self):
        """Of float64 alpha_bars."""
        bars = alpha_bars_of(self.config, U64)
        return levels_of(bars, ONE if self.config.set_alpha_to_one else None, self.a, self.b, self.eta)

    def errors(self, steps, by, u):
        """The largest in units of its bound: what is at most 1 is rounding."""
        prev, x0 = self.expected(steps, by, u)
        return max(excess(steps.prev, prev.value, prev.error), excess(steps.x0, x0.value, x0.error))

    def expected(self, steps, by, u):
        """x_prev and x0 of every step from its own state, with how far rounding may lead from them."""
        treat = treatment(self.config)[1] if self.treated else None
        return rounded_step(
            steps.x, steps.output, steps.noise, by, u, self.config.prediction_type, treat, self.rederive
        )

    @torch.inference_mode()
    def float32(self, ours):
        """Ours in float32, each step by itself: its coefficients are float64, rounded once."""
        return self.errors(ours, Coefficients(self.exact_levels(), U32), U32)

    @torch.inference_mode()
    def stock(self, theirs, alpha_bars, last):
        """diffusers as it is, each step by itself, for its own float32 alpha_bars, taken as exact."""
        return self.errors(theirs, levels_of(alpha_bars, last, self.a, self.b, self.eta), U32)

    @torch.inference_mode()
    def float64(self, ours, theirs, whole=True):
        """Both in float64: in whole loops, or each step by itself.

        Of a loop: |x_prev - x_prev'| <= L |x - x'| + what both may round in the step, L being how steep the step is; so
        what they differ by grows as the steps amplify it, and by no more.
        """
        levels, output = self.exact_levels(), ours.output
        if whole:
            # Each has its own output. Its largest intermediate is an angle of at most |x| + 10.
            output = Rounded(output, 8 * U64 * (1 + ours.x.abs()), U64)
        prev, x0 = self.expected(Steps(ours.x, output, ours.noise, ours.prev, ours.x0), levels, U64)
        of_prev, of_x0 = 2 * prev.error, 2 * x0.error
        if whole:
            prediction, name = self.config.prediction_type, treatment(self.config)[0] if self.treated else ""
            slope = 0 if prediction == "v_prediction" else 1
            steep, in_x0 = steepest(levels, prediction, slope, REST, name, self.rederive)
            before = (ours.x - theirs.x).abs().flatten(1).amax(1).view(-1, 1, 1, 1, 1)
            of_prev, of_x0 = of_prev + steep * before, of_x0 + in_x0 * before
        return max(excess(ours.prev, theirs.prev, of_prev), excess(ours.x0, theirs.x0, of_x0))


def own_levels(reference):
    """diffusers' float32 alpha_bars and the one beyond timestep 0, as exact numbers."""
    inverse = isinstance(reference, DDIMInverseScheduler)
    last = reference.initial_alpha_cumprod if inverse else reference.final_alpha_cumprod
    return Rounded.exact(reference.alphas_cumprod, U32), Rounded.exact(last, U32)


def down(config, timesteps, steps, **keys):
    """The judge of a run of diffusers' DDIMScheduler, whose steps go to t - T // N."""
    stride = config.num_train_timesteps // steps
    return Judge(config, tuple(timesteps), tuple(max(t - stride, -1) for t in timesteps), **keys)


def pair(scheduler, steps, other=Reference):
    """The reference and ours with the same settings and step count."""
    reference, ours = other(**scheduler), DDIMScheduler(**scheduler, previous_timestep="diffusers")
    reference.set_timesteps(steps)
    ours.set_timesteps(steps)
    return reference, ours


def visits_last(spacing, steps):
    """Whether T-1 is in the grid."""
    return spacing == "trailing" or (spacing == "linspace" and steps > 1)


def kind(schedule, spacing, keys, steps):
    """How a combination is compared: also with diffusers as it is, in float64 alone, or that we refuse it."""
    prediction, _, to_one, rescale, eta, _ = keys
    if not visits_last(spacing, steps):
        return "as it is"
    if rescale and prediction == "epsilon":
        # alpha_bar is 0, by whose root diffusers divides.
        return "refused"
    # Of a step from (next to) pure noise, eta 1 leaves next to nothing for the direction term: in diffusers' float32
    # the root of a rounding error, which may be below 0. A step to alpha_bar 1 leaves nothing, without rounding.
    pure = rescale or schedule == "squaredcos_cap_v2" or (schedule == "linear" and steps == 1)
    return "exact" if eta == 1 and pure and not (to_one and steps == 1) else "as it is"


def combinations():
    """All of (schedule, spacing, keys, steps)."""
    counts = cycle(STEPS)
    return [(*family, keys, next(counts)) for family in FAMILIES for keys in KEYS]


COMBINATIONS = combinations()


def test_how_many_combinations_there_are():
    """3,456: 259 that we refuse, and 3,197 compared in float64, of which 2,969 also with diffusers as it is."""
    assert Counter(kind(*c) for c in COMBINATIONS) == {"as it is": 2969, "exact": 228, "refused": 259}
    assert len({(*c[:2], str(c[2]), c[3]) for c in COMBINATIONS}) == len(COMBINATIONS) == 3456


@pytest.mark.parametrize(
    ("schedule", "spacing"),
    # Every fourth of them here, the others beside the slow tests.
    [pytest.param(*family, marks=pytest.mark.slow if i % 4 else ()) for i, family in enumerate(FAMILIES)],
    ids=[" ".join(family) for family in FAMILIES],
)
def test_every_key(schedule, spacing):
    """A sixteenth of the 3,456 combinations: the same grid, and the same x and x0 at every step."""
    chosen = [(keys, steps) for *family, keys, steps in COMBINATIONS if family == [schedule, spacing]]
    compared = 0
    for (prediction, x0, to_one, rescale), group in groupby(chosen, key=lambda c: c[0][:4]):
        settings = {"prediction_type": prediction, "set_alpha_to_one": to_one, "rescale_betas_zero_snr": rescale}
        settings = {**SCHEDULES[schedule], **SPACINGS[spacing], **x0, **settings}
        ours = DDIMScheduler(**settings, previous_timestep="diffusers")
        stock, reference = Reference(**settings), exact(Reference(**settings))
        levels = own_levels(stock)
        for keys, steps in group:
            compared += 1
            eta, clipped = keys[4:]
            how = kind(schedule, spacing, keys, steps)
            for scheduler in (ours, stock, reference):
                scheduler.set_timesteps(steps)
            timesteps = ours.timesteps.tolist()
            assert timesteps == reference.timesteps.tolist()
            if how == "refused":
                with pytest.raises(ConfigError, match="alpha_bar is 0"):
                    loop(ours, timesteps, eta=eta, use_clipped_model_output=clipped)
                continue
            step = {"eta": eta, "use_clipped_model_output": clipped}
            judge = down(reference.config, timesteps, steps, eta=eta, rederive=bool(clipped))
            found = loop(ours, timesteps, **step)
            assert judge.float32(found) <= 1, (keys, steps)
            if how == "as it is":
                theirs = again(stock, timesteps, found, **step)
                assert judge.stock(theirs, *levels) <= 1, (keys, steps)
            elif rescale:
                # From alpha_bar 0 the direction term is sqrt(0), of which rounding makes NaN there: a little off it.
                judge.eta = step["eta"] = 1 - 2.0**-47
            whole = [loop(scheduler, timesteps, torch.float64, **step) for scheduler in (ours, reference)]
            assert judge.float64(*whole) <= 1, (keys, steps)
    assert compared == 216


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("total", "counts"),
    [(50, range(1, 51)), (37, range(1, 38)), (T, (50, 61, 100, 250, 1000))],
    ids=["50", "37", "1000"],
)
def test_every_step_count(total, counts, spacing):
    """Every N of T = 50 and 37 and some of 1,000; where diffusers' trailing has N + 1 entries, ours has N."""
    malformed = []
    for steps in counts:
        reference, ours = pair({"num_train_timesteps": total, "timestep_spacing": spacing}, steps)
        timesteps = reference.timesteps.tolist()
        if len(timesteps) != steps:
            assert timesteps.pop() == -1
            malformed.append(steps)
        assert ours.timesteps.tolist() == timesteps
        assert len(timesteps) == ours.num_inference_steps == steps
        judge = down(reference.config, timesteps, steps, eta=0.5)
        found = loop(ours, timesteps, eta=0.5)
        assert judge.float32(found) <= 1, steps
        theirs = again(reference, timesteps, found, eta=0.5)
        assert judge.stock(theirs, *own_levels(reference)) <= 1, steps
        found = loop(ours, timesteps, torch.float64, eta=0.5)
        assert judge.float64(found, again(exact(reference), timesteps, found, eta=0.5), whole=False) <= 1, steps
    assert malformed == ({50: [29, 31], T: [61]}.get(total, []) if spacing == "trailing" else [])


def test_use_clipped_model_output_false_is_none():
    _, ours = pair({}, 7)
    runs = [loop(ours, ours.timesteps.tolist(), use_clipped_model_output=value).prev for value in (None, False, True)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("seeds", [3, [3, 4]], ids=["one", "list"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_generators(seeds, eta):
    """One generator for the batch, or one an image: the same draws at the same time, and none at eta 0.

    Drawn by step, the noise is to the bit what the same generator gives outside of it: of both, so the steps with noise
    from outside, compared above, stand for these.
    """

    def generators():
        make = torch.Generator().manual_seed
        return [make(s) for s in seeds] if isinstance(seeds, list) else make(seeds)

    def state(generator):
        return (generator[0] if isinstance(generator, list) else generator).get_state()

    for scheduler in pair({}, 10):
        x, inside, outside = X_T, generators(), generators()
        for t in scheduler.timesteps:
            output = network(x, t)
            noise = randn_tensor(x.shape, outside) if eta else None
            expected = scheduler.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
            x = scheduler.step(output, t, x, eta=eta, generator=inside).prev_sample
            assert torch.equal(x, expected)
        assert torch.equal(state(inside), state(outside))


@pytest.mark.slow
def test_the_inverse():
    """step_inverse against DDIMInverseScheduler without clipping, which ours never does: 432 combinations.

    88 are refused: 64 lead from alpha_bar 1 where the network predicts x0, 24 visit alpha_bar 0 where it
    predicts epsilon.
    """
    spacings = ("leading", "leading+1", "trailing")
    compared = Counter()
    for schedule, spacing, prediction, to_one, rescale, steps in product(
        SCHEDULES, spacings, PREDICTIONS, SWITCH, SWITCH, (1, 3, 13)
    ):
        keys = {"prediction_type": prediction, "set_alpha_to_one": to_one, "rescale_betas_zero_snr": rescale}
        keys = {**SCHEDULES[schedule], **SPACINGS[spacing], **keys}
        stock, reference = (DDIMInverseScheduler(**keys, clip_sample=False) for _ in range(2))
        ours = DDIMScheduler(**keys, clip_sample=True, thresholding=True, previous_timestep="diffusers")
        for scheduler in (ours, stock, exact(reference)):
            scheduler.set_timesteps(steps)
        timesteps = ours.timesteps.tolist()[::-1]
        assert timesteps == reference.timesteps.tolist()

        from_data = prediction == "sample" and to_one and timesteps[0] < T // steps
        if from_data or (prediction == "epsilon" and rescale and timesteps[-1] == T - 1):
            with pytest.raises(ConfigError, match="alpha_bar"):
                ours.step_inverse(X_T, timesteps[0], X_T)
            compared["refused"] += 1
            continue
        below = tuple(max(t - T // steps, -1) for t in timesteps)
        judge = Judge(reference.config, below, tuple(timesteps), treated=False)
        found = loop(ours, timesteps, method="step_inverse")
        assert judge.float32(found) <= 1, keys
        assert judge.stock(again(stock, timesteps, found), *own_levels(stock)) <= 1, keys
        whole = loop(ours, timesteps, torch.float64, "step_inverse"), loop(reference, timesteps, torch.float64)
        assert judge.float64(*whole) <= 1, keys
        compared["equal"] += 1
    assert compared == {"equal": 344, "refused": 88}


def test_no_inverse_from_alpha_bar_1_where_x0_is_predicted():
    """Nothing of x is noise there; the level below timestep 0 is what set_alpha_to_one chooses."""
    ours = DDIMScheduler(prediction_type="sample")
    ours.set_timesteps(10)
    ours.step(X_T, 0, X_T)
    with pytest.raises(ConfigError, match="set_alpha_to_one = false"):
        ours.step_inverse(X_T, 0, X_T)


@pytest.mark.parametrize("rescale", SWITCH)
@pytest.mark.parametrize("to_one", SWITCH)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_and_the_forward_process(schedule, to_one, rescale):
    keys = {**SCHEDULES[schedule], "set_alpha_to_one": to_one, "rescale_betas_zero_snr": rescale}
    reference, ours = Reference(**keys), DDIMScheduler(**keys)
    betas, bars = make_betas(reference.config, U32), alpha_bars_of(reference.config, U32)
    expected = {
        "betas": betas,
        "alphas": 1 - betas,
        "alphas_cumprod": bars,
        "final_alpha_cumprod": ONE if to_one else bars[0],
    }
    for name, value in expected.items():
        for scheduler in (ours, reference):
            assert excess(getattr(scheduler, name), value.value, value.error) <= 1, name
        assert getattr(ours, name).dtype == getattr(reference, name).dtype == torch.float32
    # And ours is as near as float32 can be.
    exact_bars = alpha_bars_of(reference.config, U64).once(U32)
    assert excess(ours.alphas_cumprod, exact_bars.value, exact_bars.error) <= 1
    assert ours.init_noise_sigma == reference.init_noise_sigma == 1.0
    assert ours.timesteps.tolist() == reference.timesteps.tolist()
    assert len(ours) == len(reference) == T
    assert ours.scale_model_input(X_T, 3) is X_T

    x0, noise, t = NOISE.roll(1, dims=0), NOISE, torch.arange(T)
    every = (range(T), range(T), 0.0)
    levels = {ours: Coefficients(levels_of(alpha_bars_of(reference.config, U64), None, *every), U32)}
    levels[reference] = levels_of(*own_levels(reference), *every)
    for method, (of_signal, of_noise) in {"add_noise": (x0, noise), "get_velocity": (noise, -x0)}.items():
        for scheduler, by in levels.items():
            expected = by.signal * Rounded.exact(of_signal, U32) + by.noise * Rounded.exact(of_noise, U32)
            found = getattr(scheduler, method)(x0, noise, t)
            assert excess(found, expected.value, expected.error) <= 1, method
        one = getattr(ours, method)(x0[:2], noise[:2], torch.tensor([7]))
        assert torch.equal(one, getattr(ours, method)(x0[:2], noise[:2], torch.tensor([7, 7])))


@pytest.mark.parametrize("total", [1000, 37])
def test_schedules_that_diffusers_has_elsewhere(total):
    """sigmoid and laplace are in its DDPMScheduler, exp in its HeunDiscreteScheduler."""
    for schedule in ("sigmoid", "laplace", "exp"):
        ours = DDIMScheduler(num_train_timesteps=total, beta_schedule=schedule)
        if schedule == "exp":
            expected = betas_for_alpha_bar(total, alpha_transform_type="exp")
        else:
            expected = DDPMScheduler(num_train_timesteps=total, beta_schedule=schedule).betas
        torch.testing.assert_close(ours.betas, expected, rtol=1e-5, atol=1e-7)
        with pytest.raises(NotImplementedError):
            Reference(beta_schedule=schedule)


def test_signatures():
    """Every parameter of diffusers', in its place, with its default; our own come after them."""
    for name in ("__init__", "set_timesteps", "step", "add_noise", "get_velocity", "scale_model_input"):
        theirs = inspect.signature(getattr(Reference, name)).parameters.values()
        ours = inspect.signature(getattr(DDIMScheduler, name)).parameters
        assert list(ours)[: len(theirs)] == [p.name for p in theirs]
        for parameter in theirs:
            if parameter.default is not parameter.empty:
                assert ours[parameter.name].default == parameter.default, (name, parameter.name)


@pytest.mark.parametrize(
    "call", [{}, {"eta": 0.5}, {"eta": 1.0, "use_clipped_model_output": True}], ids=["ddim", "eta 0.5", "clipped"]
)
def test_in_a_pipeline(tiny_model, call):
    """`pipe.scheduler = ours` gives the same pictures, with one generator and with one an image.

    In float64, where neither a network of some layers nor five steps make more than 1e-10 of roundings of 1e-16; in
    float32, on diffusers' own alpha_bars, to the eye.
    """
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1 / 255)):
        pipeline = DDIMPipeline.from_pretrained(tiny_model).to(dtype)
        pipeline.set_progress_bar_config(disable=True)
        reference = Reference.from_config(pipeline.scheduler.config)
        ours = DDIMScheduler.from_config(pipeline.scheduler.config)
        assert isinstance(ours, DDIMScheduler)
        for seeds in (5, [5, 6]):
            found = []
            for scheduler in (ours, exact(reference) if dtype == torch.float64 else reference):
                generators = [torch.Generator().manual_seed(s) for s in (seeds if isinstance(seeds, list) else [seeds])]
                generator = generators if isinstance(seeds, list) else generators[0]
                pipeline.scheduler = scheduler
                found.append(pipeline(2, generator, num_inference_steps=5, output_type="pt", **call).images)
            assert (found[0] - found[1]).abs().max() <= bound


OTHER = {
    "ddpm": DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, variance_type="fixed_large"),
    "pndm": PNDMScheduler(beta_schedule="scaled_linear", beta_end=0.012, steps_offset=1, skip_prk_steps=True),
    "ddim": Reference(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3, prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", OTHER)
def test_from_another_schedulers_config(name, tmp_path):
    """from_config and from_pretrained take what diffusers' own DDIMScheduler takes out of it."""
    other = OTHER[name]
    other.save_pretrained(tmp_path)
    keys = inspect.signature(Reference.__init__).parameters.keys() - {"self"}
    for read in (lambda cls: cls.from_config(other.config), lambda cls: cls.from_pretrained(tmp_path)):
        ours, expected = read(DDIMScheduler).config, read(Reference).config
        assert {key: ours[key] for key in keys} == {key: expected[key] for key in keys}
        assert ours.previous_timestep == "grid"


FILES = {
    "defaults": {},
    "all": {
        "num_train_timesteps": 50,
        "beta_start": 0.001,
        "beta_end": 0.03,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "clip_sample_range": 2.0,
        "sample_max_value": 3.0,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "previous_timestep": "diffusers",
    },
    "list": {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    "array": {"trained_betas": torch.tensor([0.1, 0.2, 0.3]).numpy(), "num_train_timesteps": 3},
}


@pytest.mark.parametrize("keys", FILES.values(), ids=FILES)
def test_files_round_trip(keys, tmp_path):
    """Ours reads what it wrote, and so does diffusers' DDIMScheduler."""
    ours = DDIMScheduler(**keys)
    ours.save_pretrained(tmp_path / "scheduler")
    written = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert written["_class_name"] == "DDIMScheduler"
    for again in (
        DDIMScheduler.from_pretrained(tmp_path / "scheduler"),
        DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
        DDIMScheduler.from_config(ours.config),
        DDIMScheduler.from_config(written),
    ):
        assert again.settings == ours.settings
        assert torch.equal(again.alphas_cumprod, ours.alphas_cumprod)
    theirs = Reference.from_pretrained(tmp_path / "scheduler")
    bars = alpha_bars_of(theirs.config, U32)
    for found in (theirs, ours):
        assert excess(found.alphas_cumprod, bars.value, bars.error) <= 1
    assert theirs.config.timestep_spacing == ours.config.timestep_spacing


def test_results_as_an_object_and_as_a_tuple():
    _, ours = pair({}, 10)
    for step in (ours.step, ours.step_inverse):
        result, as_tuple = step(X_T, 900, X_T), step(X_T, 900, X_T, return_dict=False)
        assert type(as_tuple) is tuple
        assert torch.equal(as_tuple[0], result.prev_sample)
        assert torch.equal(as_tuple[1], result.pred_original_sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_output_keeps_the_float32_state(dtype):
    """The output is raised before anything is done with it; so is noise given from outside."""
    _, ours = pair({"clip_sample": False}, 10)
    output, noise = network(X_T, 900).to(dtype), NOISE[0].to(dtype)
    narrow = ours.step(output, 900, X_T, eta=1.0, variance_noise=noise)
    raised = ours.step(output.float(), 900, X_T, eta=1.0, variance_noise=noise.float())
    for found, expected in zip(narrow.values(), raised.values(), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    assert torch.equal(ours.step_inverse(output, 900, X_T)[0], ours.step_inverse(output.float(), 900, X_T)[0])
    # The noise that is drawn is float32 too: a float16 network does not make it coarser.
    drawn = [
        ours.step(o, 900, X_T, eta=1.0, generator=torch.Generator().manual_seed(0))[0] for o in (output, output.float())
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_samples_dtype(dtype):
    """A half-precision sample is rounded once, at the end; a float64 one is never narrowed."""
    _, ours = pair({}, 10)
    x = X_T.to(dtype)
    output = network(x, 900)
    found = ours.step(output, 900, x, eta=0.5, variance_noise=NOISE[0])
    single = ours.step(output.float(), 900, x.float(), eta=0.5, variance_noise=NOISE[0])
    for value, expected in zip(found.values(), single.values(), strict=True):
        assert value.dtype == dtype
        assert torch.equal(value, expected.to(dtype)) == (dtype != torch.float64)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"timestep": 901}, "not in the grid"),
        ({"eta": 1.0, "generator": torch.Generator(), "variance_noise": NOISE[0]}, "not both"),
        ({"eta": 3.0}, "at most"),
        ({"eta": -0.5}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"eta": 0.5, "variance": "large"}, "implies eta 1"),
        ({"variance": "huge"}, "variance"),
    ],
    ids=["timestep", "two noises", "eta 3", "eta -0.5", "eta nan", "eta and large", "variance"],
)
def test_refused_steps(step, says):
    _, ours = pair({}, 10)
    with pytest.raises(ConfigError, match=says):
        ours.step(**{"model_output": X_T, "timestep": 900, "sample": X_T, **step})


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 3, "timesteps": [5, 3]}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 0}, "from 1 to"),
        ({"num_inference_steps": 1001}, "at most 1000"),
        ({"timesteps": []}, "timesteps"),
        ({"timesteps": [3, 5]}, "rises"),
    ],
    ids=["neither", "both", "none", "too many", "empty", "rising"],
)
def test_refused_grids(chosen, says):
    with pytest.raises(ConfigError, match=says):
        DDIMScheduler().set_timesteps(**chosen)


def test_a_step_before_set_timesteps_is_refused():
    with pytest.raises(ConfigError, match="set_timesteps"):
        DDIMScheduler().step(X_T, 900, X_T)
    with pytest.raises(ConfigError, match="set_timesteps"):
        DDIMScheduler().step_inverse(X_T, 900, X_T)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_bundled_model_over_50_steps(eta):
    """What the README promises: of one step, and of what a trained network makes of the differences of all."""
    model, (reference, ours) = load_model("mnist"), pair({}, 50)
    x = theirs = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(7))
    for i, t in enumerate(ours.timesteps):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) if eta else None
        step = {"eta": eta, "variance_noise": noise}
        output = model(x, t.expand(2))
        one = reference.step(output, t, x, **step).prev_sample
        theirs = reference.step(model(theirs, t.expand(2)), t, theirs, **step).prev_sample
        x = ours.step(output, t, x, **step).prev_sample
        assert (x - one).abs().max() < 1e-5 * one.abs().max()
    assert (x - theirs).abs().max() < 2e-3
    found, expected = ((each / 2 + 0.5).clamp(0, 1).mul(255).round() for each in (x, theirs))
    assert (found - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"generator": [torch.Generator()] * 2}, "2 generators for 3 images"),
        ({"generator": [torch.Generator()] * 4}, "4 generators for 3 images"),
        ({"generator": []}, "0 generators for 3 images"),
        ({"generator": (torch.Generator(),) * 3}, "generator is a tuple"),
        ({"generator": 0}, "generator is a int"),
        (
            {"variance_noise": torch.zeros(1, 1, 2, 3)},
            r"variance_noise is \[1, 1, 2, 3\], and the sample",
        ),
        ({"model_output": torch.zeros(3, 1, 1, 1)}, "model_output is"),
        ({"model_output": None}, "model_output is None"),
        ({"model_output": (torch.zeros(3, 1, 2, 3),)}, "model_output is a tuple"),
        ({"timestep": None}, "timestep None is not in the grid"),
        ({"timestep": 800.5}, "timestep 800.5 is not in the grid"),
        ({"timestep": torch.tensor([800, 600])}, "is not in the grid"),
    ],
)
def test_what_does_not_fit_the_sample_is_refused(given, says):
    """Fewer rows or generators would be broadcast, and more left unused."""
    ours, x = DDIMScheduler(), torch.zeros(3, 1, 2, 3)
    ours.set_timesteps(5)
    with pytest.raises(UsageError, match=says):
        ours.step(**{"model_output": x, "timestep": 800, "sample": x, "eta": 1.0, **given})


def test_an_explicit_grid():
    """A list, a tensor, on which the step takes an int or a tensor; it replaces the grid before it."""
    ours = DDIMScheduler()
    ours.set_timesteps(10)
    first = ours.step(X_T, 900, X_T).prev_sample
    ours.set_timesteps(timesteps=torch.tensor([900, 300, 5]))
    assert ours.timesteps.tolist() == [900, 300, 5]
    assert ours.num_inference_steps == 3
    found = ours.step(X_T, torch.tensor(900), X_T).prev_sample
    assert torch.equal(found, ours.step(X_T, 900, X_T).prev_sample)
    assert not torch.equal(found, first)
    with pytest.raises(ConfigError, match="not in the grid"):
        ours.step(X_T, 800, X_T)
