import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from ddim_cli import load_model, sample
from ddim_cli.config.schema import Config, SamplingSettings
from ddim_cli.errors import ConfigError, ModelError, RunError, UsageError

sys.path.insert(0, str(Path(__file__).parents[1]))
from rounding import pipeline_in_float64


def test_yields_what_the_command_writes(ddim, tiny_model, tmp_path):
    settings = {"steps": 5, "num_images": 3, "seed": 4, "eta": 0.5}
    found = list(sample({"sampling": settings}, model=tiny_model))
    flags = [str(x) for x in ("--steps", 5, "-n", 3, "--seed", 4, "--eta", 0.5)]
    assert ddim("sample", "-m", tiny_model, *flags, "-o", "out").exit_code == 0
    assert [p.seed for p in found] == [4, 5, 6]
    for p in found:
        file = tmp_path / "out" / f"{p.seed:06d}.png"
        assert np.array_equal(np.asarray(p.image), np.asarray(Image.open(file)))
        assert p.tensor.shape == (3, 8, 8)
        assert p.tensor.dtype == torch.float32
        sidecar = json.loads(file.with_suffix(".json").read_text())
        for key in ("timing", "created"):
            del sidecar[key]
        for key in ("file", "bytes"):
            del sidecar["image"][key]
        assert p.metadata == sidecar


def test_a_config_object_leaves_the_models_own_settings_alone(tiny_model, tmp_path):
    import shutil

    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    path = directory / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "timestep_spacing": "trailing"}))
    [picture] = sample(Config(sampling=SamplingSettings(steps=2, num_images=1)), model=directory)
    assert picture.metadata["sampling"]["timesteps"] == [999, 499]


def test_a_callable_with_the_exact_epsilon_of_a_point_mass():
    """All data at 0.5: epsilon = (x - sqrt(a) 0.5) / sqrt(1 - a), and every seed ends at 0.5."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0).float()

    def network(x, t):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * 0.5) / (1 - a).sqrt()

    config = {"sampling": {"steps": 13, "num_images": 5, "batch_size": 2}, "scheduler": {"clip_sample": False}}
    found = list(sample(config, model=network, shape=(3, 4, 6)))
    assert len(found) == 5
    for p in found:
        assert p.image.size == (6, 4)
        torch.testing.assert_close(p.tensor, torch.full((3, 4, 6), 0.5), atol=1e-4, rtol=0)


def test_a_module_tells_its_own_shape(tiny_model, monkeypatch):
    network = UNet2DModel.from_pretrained(tiny_model / "unet")
    config = {"sampling": {"steps": 3, "num_images": 2}}
    ours = [p.tensor for p in sample(config, model=tiny_model)]
    theirs = [p.tensor for p in sample(config, model=network)]
    make = pipeline_in_float64(tiny_model, monkeypatch)
    for seed, both in enumerate(zip(ours, theirs, strict=True)):
        expected, leeway = make(seed, 3, eta=0.0)
        for found in both:
            assert (found - expected).abs().max() <= leeway < 2e-3


def test_a_loaded_model_brings_its_description(tiny_model):
    [p] = sample({"sampling": {"steps": 2, "num_images": 1}}, model=load_model(tiny_model))
    assert p.metadata["model"]["sha256"]


def test_mistakes(tiny_model):
    with pytest.raises(UsageError, match="shape"):
        sample({}, model=lambda x, t: x)
    with pytest.raises(UsageError, match="channels"):
        sample({}, model=lambda x, t: x, shape=(2, 8, 8))
    with pytest.raises(ConfigError, match=r"config: unknown key sampling.step; did you mean sampling.steps"):
        sample({"sampling": {"step": 3}})
    with pytest.raises(ModelError, match="not found"):
        sample({}, model="nothing")
    for config in ([1], 3):
        with pytest.raises(UsageError, match="config is a"):
            sample(config)
    with pytest.raises(ConfigError, match="unknown"):
        sample({1: 2})
    with pytest.raises(UsageError, match="model is a int"):
        sample({}, model=5)
    for shape in (3, (3, -1, 4), (3.0, 4, 4), (3, 0, 4)):
        with pytest.raises(UsageError, match="shape is"):
            sample({}, model=lambda x, t: x, shape=shape)
    with pytest.raises(ConfigError, match="load_model"):
        load_model("mnist", variants="fp16")
    with pytest.raises(ModelError, match="dtype"):
        load_model("mnist", dtype="int7")


@pytest.mark.parametrize("wrong", [lambda x, t: x[:1], lambda x, t: x[:, :1]])
def test_an_output_of_another_shape_is_never_broadcast(wrong):
    with pytest.raises(UsageError, match="the network gives"):
        list(sample({"sampling": {"num_images": 2}}, model=wrong, shape=(3, 4, 4)))


def same(pictures, others):
    return [torch.equal(p.tensor, q.tensor) for p, q in zip(pictures, others, strict=True)]


def test_a_callable_that_writes_to_what_it_is_given_changes_no_picture():
    """It would halve the state, and set every later batch's timestep to 0."""
    shape, config = (1, 4, 4), {"sampling": {"steps": 3, "num_images": 4, "batch_size": 2, "classes": "1-3"}}

    def network(x, t, classes):
        return x * 0.5 + t.view(-1, 1, 1, 1) / 1000 + classes.view(-1, 1, 1, 1)

    def in_place(x, t, classes):
        result = network(x, t, classes)
        for given in (x, t, classes):
            given.zero_()
        return result

    expected = list(sample(config, model=network, shape=shape))
    assert all(same(sample(config, model=in_place, shape=shape), expected))


def test_what_diffusers_networks_return_is_opened(tiny_model):
    """Of any callable: a tuple, or an output object, with the prediction first."""
    network = UNet2DModel.from_pretrained(tiny_model / "unet")
    config, shape = {"sampling": {"steps": 2, "num_images": 2}}, (3, 8, 8)
    expected = list(sample(config, model=network))
    for wrapped in (
        network.__call__,
        lambda x, t: network(x, t, return_dict=False),
        lambda x, t: (network(x, t)[0], t),
    ):
        assert all(same(sample(config, model=wrapped, shape=shape), expected))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda x: None, "the network gives None for an input of"),
        (lambda x: 0.5, "the network gives a float"),
        (lambda x: x.numpy(), "the network gives a ndarray"),
        (lambda x: [x], "the network gives a list"),
        (lambda x: (), "the network gives a tuple"),
        (lambda x: (None, x), "the network gives None first in a tuple"),
        (lambda x: (x[:1],), "the network gives [1, 1, 4, 4]"),
        (lambda x: x.long(), "the network gives int64"),
        (lambda x: x + 1j, "the network gives complex64"),
    ],
)
@pytest.mark.parametrize("guided", [False, True])
def test_what_is_no_prediction_is_refused(given, says, guided):
    config = {"sampling": {"steps": 2, "num_images": 2}}
    if guided:
        config["sampling"] |= {"classes": "0-3", "guidance_scale": 2.0}
        config["model"] = {"null_class": 4}
    with pytest.raises(UsageError) as caught:
        list(sample(config, model=lambda x, t, *classes: given(x), shape=(1, 4, 4)))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "network", "says"),
    [
        ({"guidance_scale": 2.0}, lambda x, t: x, "set sampling.classes too"),
        ({"guidance_scale": 2.0, "classes": "0-3"}, lambda x, t, c: x, "set model.null_class too"),
        ({"classes": "0-3"}, lambda x, t: x, r"cannot be called as network\(x, t, classes\)"),
        ({}, lambda x, t, c: x, "missing a required argument: 'c'; one that takes classes needs sampling.classes"),
        ({}, torch.nn.Conv2d(1, 1, 1), r"cannot be called as network\(x, t\)"),
    ],
)
def test_conditions_that_a_callable_does_not_take(settings, network, says):
    with pytest.raises(UsageError, match=says):
        sample({"sampling": settings}, model=network, shape=(1, 4, 4))


def test_conditions_that_a_module_does_not_take(tiny_model):
    network = UNet2DModel.from_pretrained(tiny_model / "unet")
    with pytest.raises(ConfigError, match="this UNet2DModel is not class-conditional"):
        sample({"sampling": {"classes": "1"}}, model=network)
    config = {k: v for k, v in network.config.items() if not k.startswith("_")} | {"num_class_embeds": 4}
    conditional = UNet2DModel(**config)
    with pytest.raises(ConfigError, match="say which of the classes 0-3"):
        sample({}, model=conditional)
    with pytest.raises(ConfigError, match="has no class 4"):
        sample({"sampling": {"classes": "0-4"}}, model=conditional)
    with pytest.raises(UsageError, match="the network takes 3 channels"):
        sample({}, model=network, shape=(1, 8, 8))


def test_a_network_is_used_as_it_is(tiny_model):
    """Neither moved nor converted: settings that ask for that are refused, and shape= beside a model is."""
    loaded, narrow = load_model(tiny_model), load_model(tiny_model, dtype="bfloat16")
    for model in (loaded, loaded.network):
        with pytest.raises(UsageError, match=r"runtime\.dtype is bfloat16, but the network is in float32"):
            sample({"runtime": {"dtype": "bfloat16"}}, model=model)
    with pytest.raises(UsageError, match=r"runtime\.dtype is float32, but the network is in bfloat16"):
        sample({"runtime": {"dtype": "float32"}}, model=narrow)
    [picture] = sample({"sampling": {"steps": 1, "num_images": 1}}, model=narrow)
    assert picture.metadata["runtime"]["dtype"] == "bfloat16"
    for model in (loaded, tiny_model, str(tiny_model)):
        with pytest.raises(UsageError, match="shape is for a callable; tiny makes pictures of 3 x 8 x 8"):
            sample({}, model=model, shape=(3, 9, 9))


def test_the_record_of_a_network_from_outside_says_what_it_is(tiny_model):
    config = {"sampling": {"steps": 1, "num_images": 1}}

    def mine(x, t):
        return x

    [picture] = sample(config, model=mine, shape=(1, 4, 4))
    assert picture.metadata["model"] == {
        "source": None,
        "kind": "callable",
        "revision": None,
        "class": f"{test_the_record_of_a_network_from_outside_says_what_it_is.__qualname__}.<locals>.mine",
        "parameters": None,
        "sha256": None,
        "config_sha256": None,
    }
    assert "mnist" not in json.dumps(picture.metadata)
    network = UNet2DModel.from_pretrained(tiny_model / "unet")
    [picture] = sample(config, model=network)
    found = picture.metadata["model"]
    assert (found["class"], found["parameters"]) == ("UNet2DModel", network.num_parameters())
    assert "mnist" not in json.dumps(picture.metadata)


def test_where_a_model_is_loaded():
    model = load_model("mnist", device="auto", dtype="auto")
    weight = next(model.network.parameters())
    if not torch.cuda.is_available():
        assert weight.dtype == torch.float32
        with pytest.raises(UsageError, match="device cuda: there is none here"):
            load_model("mnist", device="cuda")
    if not torch.backends.mps.is_available():
        assert weight.device.type in ("cpu", "cuda")
        with pytest.raises(UsageError, match="device mps: there is none here"):
            load_model("mnist", device=torch.device("mps"))
    for device in ("gpu", None, 5, "meta"):
        with pytest.raises(ConfigError, match="it takes auto, cpu, cuda, cuda:N or mps"):
            load_model("mnist", device=device)


def test_warnings_reach_python(tiny_model):
    with pytest.warns(UserWarning, match="was trained with"):
        sample({"scheduler": {"prediction_type": "sample"}}, model=tiny_model)


def test_metadata_is_each_pictures_own():
    config = {"sampling": {"steps": 4, "num_images": 2}}
    first, second = sample(config, model=lambda x, t: 0.1 * x, shape=(1, 4, 4))
    first.metadata["sampling"]["eta"] = 9
    assert second.metadata["sampling"]["eta"] == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_names_seed_and_step(value):
    """From the third step on, seed 5 alone goes wrong; the other rows of its batch stay finite."""
    timesteps = [800, 600, 400, 200, 0]
    noise = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(5))
    seen = {}

    def network(x, t):
        if t[0] == 800:
            seen["row"] = [i for i in range(len(x)) if torch.equal(x[i], noise)]
        out = torch.zeros_like(x)
        if t[0] <= 400:
            out[seen["row"]] = value
        return out

    config = {"sampling": {"timesteps": timesteps, "num_images": 8, "batch_size": 4}}
    found = []
    with pytest.raises(RunError, match=r"seed 5: .* at step 3 of 5 \(timestep 400\)"):
        found.extend(sample(config, model=network, shape=(1, 4, 4)))
    assert [p.seed for p in found] == [0, 1, 2, 3]
