"""Our DDIMScheduler against diffusers' DDIMScheduler and DDIMInverseScheduler, in whole loops.

Errors are relative to the largest magnitude of the tensor compared, at every step, for x and for x0. Our
coefficients are float64 rounded once; diffusers computes with float32 alpha_bars, which lose their digits where
next to nothing is signal or next to nothing is noise. There its step is compared with its alpha_bars raised to
float64 (`exact`), which leaves its formulas as they are; its own alpha_bars are compared on their own.
"""

import inspect
import json
from collections import Counter
from itertools import cycle, groupby, product

import diffusers
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMPipeline, DDPMScheduler, PNDMScheduler
from diffusers import DDIMScheduler as Reference
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

from ddim_cli import DDIMScheduler, load_model
from ddim_cli.errors import ConfigError, UsageError

TOLERANCE = 2e-5
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


def network(x, t, prediction="epsilon"):
    """A smooth function of x and t in which pixels depend on each other.

    It is as near to x as an epsilon or an x0 is, and as a velocity is not: were it otherwise, 1 / sqrt(alpha_bar)
    would amplify rounding errors from step to step without bound, or x would cancel out.
    """
    rest = 0.1 * x.flip(-1) - 0.3 * torch.sin(x + 0.01 * float(t))
    return rest if prediction == "v_prediction" else x + rest


@torch.inference_mode()
def loop(scheduler, timesteps, x=X_T, **step):
    """Every x and every x0 of a run, [2 N, ...]."""
    found = []
    for i, t in enumerate(timesteps):
        output = network(x, t, scheduler.config.prediction_type)
        x, x0 = scheduler.step(output, t, x, variance_noise=NOISE[i], return_dict=False, **step)
        found += [x, x0]
    return torch.stack(found)


def error(found, expected):
    """The largest error relative to the largest magnitude: of each x alone, and of all x and x0 of the run together.

    (x0 alone would not do: at the noisiest steps it is a difference divided by sqrt(alpha_bar), 0.006, and
    then clipped, which takes its magnitude but not its rounding error away.)
    """
    difference, scale = ((v.flatten(1).abs().amax(1)) for v in (found - expected, expected))
    return max((difference[::2] / scale[::2]).max().item(), (difference.max() / scale.max()).item())


def pair(scheduler, steps, other=Reference):
    """The reference and ours with the same settings and step count."""
    reference, ours = other(**scheduler), DDIMScheduler(**scheduler, previous_timestep="diffusers")
    reference.set_timesteps(steps)
    ours.set_timesteps(steps)
    return reference, ours


def exact(reference):
    """diffusers' scheduler with the alpha_bars of its own betas' formula in float64: its step is left as it is."""
    config = reference.config
    total = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float64)
    elif config.beta_schedule == "squaredcos_cap_v2":
        bar = torch.cos((torch.arange(total + 1, dtype=torch.float64) / total + 0.008) / 1.008 * torch.pi / 2).square()
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        power = 0.5 if config.beta_schedule == "scaled_linear" else 1
        betas = torch.linspace(config.beta_start**power, config.beta_end**power, total, dtype=torch.float64)
        betas = betas ** (1 / power)
    if config.rescale_betas_zero_snr:
        betas = diffusers.schedulers.scheduling_ddim.rescale_zero_terminal_snr(betas)
    reference.alphas_cumprod = (1 - betas).cumprod(0)
    last = torch.ones((), dtype=torch.float64) if config.set_alpha_to_one else reference.alphas_cumprod[0]
    reference.final_alpha_cumprod = reference.initial_alpha_cumprod = last
    return reference


def visits_last(spacing, steps):
    """Whether T-1 is in the grid."""
    return spacing == "trailing" or (spacing == "linspace" and steps > 1)


def kind(schedule, spacing, keys, steps):
    """How a combination is compared: with diffusers as it is, with its alpha_bars exact, or that we refuse it."""
    prediction, _, to_one, rescale, eta, clipped = keys
    cosine = schedule == "squaredcos_cap_v2"
    if visits_last(spacing, steps) and (rescale or cosine):
        # alpha_bar is 0, or 2e-9. Where we refuse, diffusers divides by 0.
        if rescale and prediction == "epsilon":
            return "refused"
        # Leaving pure noise with eta 1, the direction term is the root of a rounding error in float32.
        return "exact" if eta == 1 or (rescale and cosine) else "as it is"
    # The step from t = 1 divides by sqrt(1 - alpha_bar_1), 0.01, to derive epsilon from x0.
    divides = prediction == "sample" or clipped
    return "exact" if spacing == "leading+1" and not to_one and divides else "as it is"


def combinations():
    """All of (schedule, spacing, keys, steps)."""
    counts = cycle(STEPS)
    return [(*family, keys, next(counts)) for family in FAMILIES for keys in KEYS]


COMBINATIONS = combinations()


def test_how_many_combinations_there_are():
    """3,456: 2,585 with diffusers as it is, 612 with its alpha_bars in float64, 259 that we refuse."""
    assert Counter(kind(*c) for c in COMBINATIONS) == {"as it is": 2585, "exact": 612, "refused": 259}
    assert len({(*c[:2], str(c[2]), c[3]) for c in COMBINATIONS}) == len(COMBINATIONS) == 3456


@pytest.mark.parametrize(("schedule", "spacing"), FAMILIES, ids=[" ".join(family) for family in FAMILIES])
def test_every_key(schedule, spacing):
    """A sixteenth of the 3,456 combinations: the same grid, and the same x and x0 at every step."""
    chosen = [(keys, steps) for *family, keys, steps in COMBINATIONS if family == [schedule, spacing]]
    compared = 0
    for (prediction, x0, to_one, rescale), group in groupby(chosen, key=lambda c: c[0][:4]):
        settings = {"prediction_type": prediction, "set_alpha_to_one": to_one, "rescale_betas_zero_snr": rescale}
        settings = {**SCHEDULES[schedule], **SPACINGS[spacing], **x0, **settings}
        ours = DDIMScheduler(**settings, previous_timestep="diffusers")
        references = {"as it is": Reference(**settings), "exact": exact(Reference(**settings))}
        for keys, steps in group:
            compared += 1
            eta, clipped = keys[4:]
            how = kind(schedule, spacing, keys, steps)
            reference = references.get(how, references["as it is"])
            ours.set_timesteps(steps)
            reference.set_timesteps(steps)
            assert ours.timesteps.tolist() == reference.timesteps.tolist()
            if how == "refused":
                with pytest.raises(ConfigError, match="alpha_bar is 0"):
                    loop(ours, ours.timesteps, eta=eta, use_clipped_model_output=clipped)
                continue
            found = loop(ours, ours.timesteps, eta=eta, use_clipped_model_output=clipped)
            # Leaving pure noise with eta 1, the direction term is sqrt(0), of which rounding makes NaN there.
            eta = min(eta, 1 - 1e-12) if how == "exact" else eta
            expected = loop(reference, reference.timesteps, eta=eta, use_clipped_model_output=clipped)
            assert error(found, expected) < TOLERANCE, (keys, steps)
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
        found = loop(ours, ours.timesteps, eta=0.5)
        assert error(found, loop(reference, timesteps, eta=0.5)) < TOLERANCE, steps
    assert malformed == ({50: [29, 31], T: [61]}.get(total, []) if spacing == "trailing" else [])


def test_use_clipped_model_output_false_is_none():
    _, ours = pair({}, 7)
    runs = [loop(ours, ours.timesteps, use_clipped_model_output=value) for value in (None, False, True)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("seeds", [3, [3, 4]], ids=["one", "list"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_generators(seeds, eta):
    """One generator for the batch, or one an image: the same draws at the same time, and none at eta 0."""

    def run(scheduler):
        make = torch.Generator().manual_seed
        generator = [torch.Generator().manual_seed(s) for s in seeds] if isinstance(seeds, list) else make(seeds)
        x = X_T
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, eta=eta, generator=generator).prev_sample
        first = generator[0] if isinstance(generator, list) else generator
        return x, first.get_state()

    reference, ours = pair({}, 10)
    (expected, state), (found, our_state) = run(reference), run(ours)
    assert error(found[None], expected[None]) < TOLERANCE
    assert torch.equal(state, our_state)


def test_the_inverse():
    """step_inverse against DDIMInverseScheduler without clipping, which ours never does: 432 combinations.

    88 are refused: 64 lead from alpha_bar 1 where the network predicts x0, 24 visit alpha_bar 0 where it
    predicts epsilon. What is predicted as x0 is compared with exact alpha_bars: from t = 0 on up, epsilon is a
    difference divided by 0.01.
    """
    spacings = ("leading", "leading+1", "trailing")
    compared = Counter()
    for schedule, spacing, prediction, to_one, rescale, steps in product(
        SCHEDULES, spacings, PREDICTIONS, SWITCH, SWITCH, (1, 3, 13)
    ):
        keys = {"prediction_type": prediction, "set_alpha_to_one": to_one, "rescale_betas_zero_snr": rescale}
        keys = {**SCHEDULES[schedule], **SPACINGS[spacing], **keys}
        reference = DDIMInverseScheduler(**keys, clip_sample=False)
        ours = DDIMScheduler(**keys, clip_sample=True, thresholding=True, previous_timestep="diffusers")
        reference.set_timesteps(steps)
        ours.set_timesteps(steps)
        timesteps = ours.timesteps.tolist()[::-1]
        assert timesteps == reference.timesteps.tolist()

        from_data = prediction == "sample" and to_one and timesteps[0] < T // steps
        if from_data or (prediction == "epsilon" and rescale and timesteps[-1] == T - 1):
            with pytest.raises(ConfigError, match="alpha_bar"):
                ours.step_inverse(X_T, timesteps[0], X_T)
            compared["refused"] += 1
            continue
        if prediction == "sample":
            reference = exact(reference)
        x = y = X_T
        for t in timesteps:
            x, x0 = ours.step_inverse(network(x, t, prediction), t, x, return_dict=False)
            result = reference.step(network(y, t, prediction), t, y)
            y = result.prev_sample
            assert error(torch.stack([x, x0]), torch.stack([y, result.pred_original_sample])) < TOLERANCE, (keys, t)
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
    for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
        found, expected = getattr(ours, name), getattr(reference, name)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.max()))
    assert ours.init_noise_sigma == reference.init_noise_sigma == 1.0
    assert ours.timesteps.tolist() == reference.timesteps.tolist()
    assert len(ours) == len(reference) == T
    assert ours.scale_model_input(X_T, 3) is X_T

    x0, noise, t = NOISE.roll(1, dims=0), NOISE, torch.arange(T)
    for method in ("add_noise", "get_velocity"):
        found, expected = getattr(ours, method)(x0, noise, t), getattr(reference, method)(x0, noise, t)
        assert error(found, expected) < TOLERANCE
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
    """`pipe.scheduler = ours` gives the same pictures, with one generator and with one an image."""
    pipeline = DDIMPipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    for seeds in (5, [5, 6]):

        def pictures(seeds=seeds):
            generators = [torch.Generator().manual_seed(s) for s in (seeds if isinstance(seeds, list) else [seeds])]
            generator = generators if isinstance(seeds, list) else generators[0]
            return pipeline(2, generator, num_inference_steps=5, output_type="pt", **call).images

        pipeline.scheduler = Reference.from_config(pipeline.scheduler.config)
        expected = pictures()
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        assert isinstance(pipeline.scheduler, DDIMScheduler)
        assert error(pictures(), expected) < TOLERANCE


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
    torch.testing.assert_close(theirs.alphas_cumprod, ours.alphas_cumprod, rtol=1e-4, atol=1e-6)
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
    found = ours.step(network(x, 900), 900, x, eta=0.5, variance_noise=NOISE[0])
    wide = ours.step(network(x, 900).to(torch.float64), 900, x.to(torch.float64), eta=0.5, variance_noise=NOISE[0])
    for value, expected in zip(found.values(), wide.values(), strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value, expected.to(dtype))


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
