"""The same seeds give the pictures of diffusers: DDIMPipeline, one image and one generator at a time."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from PIL import Image

from ddim_cli import sample

sys.path.insert(0, str(Path(__file__).parents[1]))
from rounding import pipeline_in_float64


def reference(directory, seeds, steps, eta, **step_settings):
    pipeline = DDIMPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.float()
    return np.stack(
        [
            np.asarray(
                pipeline(
                    batch_size=1,
                    generator=torch.Generator().manual_seed(seed),
                    num_inference_steps=steps,
                    eta=eta,
                    **step_settings,
                ).images[0]
            )
            for seed in seeds
        ]
    ).astype(int)


@pytest.mark.parametrize("eta", [0.0, *(pytest.param(eta, marks=pytest.mark.slow) for eta in (0.5, 1.0))])
def test_the_bundled_model(ddim, bundled, tmp_path, eta):
    assert ddim("sample", "-n", 4, "--seed", 7, "--steps", 25, "--eta", eta, "-o", "out", "-q").exit_code == 0
    ours = np.stack([np.asarray(Image.open(tmp_path / "out" / f"{seed:06d}.png")) for seed in range(7, 11)]).astype(int)
    theirs = reference(bundled, range(7, 11), 25, eta)
    assert abs(ours - theirs).max() <= 1
    # Not a comparison of blank pictures: there is ink, and seeds differ.
    assert theirs.std() > 20
    assert abs(theirs[0] - theirs[1]).max() > 100


@pytest.mark.parametrize(
    ("scheduler", "sampling"),
    [
        ({}, {"use_clipped_model_output": True, "eta": 1.0}),
        ({"thresholding": True, "sample_max_value": 2.0}, {}),
        ({"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}, {"eta": 0.5}),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
        ({"prediction_type": "sample", "timestep_spacing": "linspace", "previous_timestep": "diffusers"}, {}),
        ({"beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False}, {}),
    ],
)
def test_scheduler_keys(tiny_model, scheduler, sampling, monkeypatch):
    """Within what float32 may round, of the same pipeline in float64, with the noise that it draws in float32."""
    from diffusers import DDIMScheduler

    steps = 13 if scheduler.get("previous_timestep") == "diffusers" else 10
    found = list(
        sample(
            {"scheduler": scheduler, "sampling": {"steps": steps, "num_images": 3, **sampling}}, model=str(tiny_model)
        )
    )
    theirs = {k: v for k, v in scheduler.items() if k != "previous_timestep"}
    make = pipeline_in_float64(tiny_model, monkeypatch, DDIMScheduler(**theirs))
    for picture in found:
        expected, leeway = make(picture.seed, steps, **{"eta": 0.0, **sampling})
        assert (picture.tensor.clamp(-1, 1) - expected).abs().max() <= leeway < 2e-3
