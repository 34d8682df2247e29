"""Checkpoints of the original DDIM code; tests/data/ddim-original-tiny is what it computes for a small network."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddim_cli import load_model, sample
from ddim_cli.config.schema import ModelSettings
from ddim_cli.errors import ModelError
from ddim_cli.models.describe import describe_model
from ddim_cli.sampling import loop

sys.path.insert(0, str(Path(__file__).parents[1]))
from rounding import pipeline_in_float64

DATA = Path(__file__).parents[1] / "data" / "ddim-original-tiny"
CASES = json.loads((DATA / "cases.json").read_text())


@pytest.fixture(scope="module")
def expected():
    return load_file(DATA / "expected.safetensors")


@pytest.fixture
def training_checkpoint(tmp_path):
    """A list of model, optimizer, epoch, step and EMA; the raw weights are twice the averaged ones."""
    ema = torch.load(DATA / "model-1000.ckpt", weights_only=True)
    raw = {f"module.{k}": 2 * v for k, v in ema.items()}
    path = tmp_path / "ckpt.pth"
    torch.save([raw, {"state": {}, "param_groups": []}, 3, 1000, ema], path)
    shutil.copy(DATA / "as-dumped" / "config.yml", tmp_path)
    return path


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_the_networks_output_is_reproduced(expected):
    model = load_model(DATA / "model-1000.ckpt")
    with torch.inference_mode():
        found = model(expected["x_T"], expected["probe_t"])
    assert relative_error(found, expected["probe_eps"]) < 1e-5


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['sample_type']}-{c['skip_type']}-{c['timesteps']}-{c['eta']}"
)
def test_every_recorded_case_through_our_sampler(case, expected, monkeypatch):
    """The recorded initial noise and step noise in place of the generators'; the rest is what `ddim sample` runs."""
    number, noisy = case["case"], case["sample_type"] == "ddpm_noisy"
    recorded = expected.get(f"case{number}.noise")
    # A timestep that stands twice changes nothing and is dropped here; noise is drawn in the order computed.
    draws = iter([expected["x_T"], *(recorded if recorded is not None else [])])

    class Recorded(loop.BatchNoise):
        def draw_of(self, row):
            if row == 0:
                self.first = next(draws)
            return self.first[row]

        def draw(self):
            return next(draws)

    monkeypatch.setattr(loop, "BatchNoise", Recorded)
    config = {
        "scheduler": {
            "timestep_spacing": {"uniform": "uniform", "quad": "quadratic"}[case["skip_type"]],
            "clip_sample": noisy,
        },
        "sampling": {
            "steps": case["timesteps"],
            "num_images": 2,
            "batch_size": 2,
            "variance": "large" if noisy else "ddim",
            "use_clipped_model_output": noisy,
            **({} if noisy else {"eta": case["eta"]}),
        },
    }
    pictures = list(sample(config, model=DATA / "model-1000.ckpt"))
    assert pictures[0].metadata["sampling"]["timesteps"] == sorted(set(case["seq"]), reverse=True)
    found = torch.stack([p.tensor for p in pictures])
    assert relative_error(found, expected[f"case{number}.x0"]) < 1e-3


def test_ema_by_default_and_raw_weights_when_asked(training_checkpoint, expected):
    ema = load_model(training_checkpoint).network.conv_in.weight
    raw = load_model(training_checkpoint, ema=False).network.conv_in.weight
    torch.testing.assert_close(raw, 2 * ema)
    torch.testing.assert_close(ema, load_model(DATA / "model-1000.ckpt").network.conv_in.weight)


def test_both_kinds_of_config_say_the_same():
    from ddim_cli.models.original import read_config

    assert read_config(DATA / "config.yml") == read_config(DATA / "as-dumped" / "config.yml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("!!python/object/apply:os.system ['touch pwned']", "python/object/apply:os.system"),
        ("!!python/object:os.system {}", "python/object:os.system"),
        ("a: [", "not a config"),
        ("- 1", "no model, data and diffusion"),
        ("{model: {}, data: {}, diffusion: {}}", "not a config"),
    ],
)
def test_configs_that_are_refused(tmp_path, text, says):
    shutil.copy(DATA / "model-1000.ckpt", tmp_path)
    (tmp_path / "config.yml").write_text(text)
    with pytest.raises(ModelError, match=says):
        load_model(tmp_path / "model-1000.ckpt")
    assert not (tmp_path / "pwned").exists()


def test_without_a_config_the_network_is_inferred(tmp_path, expected):
    shutil.copy(DATA / "model-1000.ckpt", tmp_path)
    with pytest.raises(ModelError, match="--image-size"):
        load_model(tmp_path / "model-1000.ckpt")
    model = load_model(tmp_path / "model-1000.ckpt", image_size=8)
    assert "inferred" in model.description.notes[0]
    with torch.inference_mode():
        found = model(expected["x_T"], expected["probe_t"])
    assert relative_error(found, expected["probe_eps"]) < 1e-5


def test_the_schedule_of_the_config_is_used(tmp_path):
    shutil.copy(DATA / "model-1000.ckpt", tmp_path)
    text = (DATA / "config.yml").read_text()
    for kind, expected in (("linear", {"beta_schedule": "linear"}), ("quad", {"beta_schedule": "scaled_linear"})):
        (tmp_path / "config.yml").write_text(text.replace("beta_schedule: linear", f"beta_schedule: {kind}"))
        found = describe_model(ModelSettings(source=str(tmp_path / "model-1000.ckpt"))).scheduler
        assert expected.items() <= found.items()
    (tmp_path / "config.yml").write_text(text.replace("beta_schedule: linear", "beta_schedule: jsd"))
    betas = describe_model(ModelSettings(source=str(tmp_path / "model-1000.ckpt"))).scheduler["trained_betas"]
    assert (betas[0], betas[-1]) == (1 / 1000, 1.0)


@pytest.mark.parametrize("source", ["training", "plain"])
def test_convert_gives_a_directory_that_diffusers_loads_with_the_same_pictures(
    ddim, training_checkpoint, tmp_path, source, monkeypatch
):
    path = training_checkpoint if source == "training" else DATA / "model-1000.ckpt"
    assert ddim("convert", path, "out").exit_code == 0
    config = {"sampling": {"steps": 5, "num_images": 2, "eta": 0.5}}
    before = [p.tensor for p in sample(config, model=path)]
    torch.testing.assert_close([p.tensor for p in sample(config, model=tmp_path / "out")], before)
    make = pipeline_in_float64(tmp_path / "out", monkeypatch)
    for seed in (0, 1):
        image, leeway = make(seed, 5, eta=0.5)
        assert (before[seed].clamp(-1, 1) - image).abs().max() <= leeway < 2e-3
    assert ddim("convert", path, "out").exit_code == 2
    assert ddim("convert", path, "out", "--overwrite").exit_code == 0


FOREIGN = {
    "guided-diffusion": {"input_blocks.0.0.weight": torch.zeros(1), "time_embed.0.weight": torch.zeros(1)},
    "Stable Diffusion": {"model.diffusion_model.x": torch.zeros(1)},
    "score_sde": {"all_modules.0.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("whose", FOREIGN)
def test_other_codes_checkpoints_are_refused_by_name(ddim, tmp_path, whose):
    torch.save(FOREIGN[whose], tmp_path / "model.pt")
    result = ddim("sample", "-m", tmp_path / "model.pt", "--image-size", 32)
    assert result.exit_code == 2
    assert whose in result.stderr
    assert "lacks" not in result.stderr
