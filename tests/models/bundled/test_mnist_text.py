"""The bundled text model as it ships, in diffusers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import ddim_cli.models.bundled
from ddim_cli.evaluation.digits import load_classifier, probabilities
from ddim_cli.evaluation.judge_mnist_text import drawn_as_asked, ordered_pairs
from ddim_cli.models.bundled.captions import DIGITS, WORDS
from ddim_cli.models.bundled.text_recipe import TEXT_LENGTH

FOLDER = Path(ddim_cli.models.bundled.__file__).parent / "mnist-text"
LARGEST = 8_000_000


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline: StableDiffusionPipeline, prompts, count: int, guidance: float, steps: int = 50) -> torch.Tensor:
    """Pictures [count, 1, 32, 32] in [-1, 1], as the judge draws them."""
    images = pipeline(
        [prompts[seed % len(prompts)] for seed in range(count)],
        num_inference_steps=steps,
        guidance_scale=guidance,
        eta=0.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        output_type="pt",
    ).images
    return images * 2 - 1


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= LARGEST


def test_it_has_a_card_and_a_sheet_of_samples():
    assert "CC BY-SA 3.0" in (FOLDER / "README.md").read_text()
    assert Image.open(FOLDER / "samples.png").size > (100, 100)


def test_its_parts_agree(pipeline):
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings == TEXT_LENGTH
    assert len(pipeline.tokenizer) == pipeline.text_encoder.config.vocab_size
    assert pipeline.tokenizer.eos_token_id == pipeline.text_encoder.config.eos_token_id
    assert pipeline.text_encoder.config.hidden_size == pipeline.unet.config.cross_attention_dim
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels
    assert pipeline.vae_scale_factor * pipeline.unet.config.sample_size == pipeline.vae.config.sample_size
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    assert pipeline.safety_checker is None


def test_its_words_are_one_token_each(pipeline):
    assert all(len(pipeline.tokenizer.tokenize(word)) == 1 for word in WORDS)


def test_it_draws_what_is_asked_for_in_a_few_steps(pipeline):
    found = probabilities(load_classifier(), draw(pipeline, DIGITS, 20, 2.0, steps=10))
    assert (found.argmax(1) == torch.arange(20) % 10).float().mean() >= 0.9


@pytest.mark.parametrize("prompt", ["", "seven " * 50, "quokka 😀", "a photo of a purple seven"])
def test_any_prompt_makes_a_picture(pipeline, prompt):
    images = pipeline(prompt, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 1)
    assert np.isfinite(images).all()


@pytest.mark.slow
def test_the_figures_of_its_card(pipeline):
    """A tenth of what the judge samples."""
    network = load_classifier()
    guided = drawn_as_asked(probabilities(network, draw(pipeline, DIGITS, 100, 2.0)))
    assert guided["as_asked"] >= 0.98
    assert guided["sure"] >= 0.96
    assert drawn_as_asked(probabilities(network, draw(pipeline, DIGITS, 100, 1.0)))["as_asked"] >= 0.92
    shares = ordered_pairs(lambda prompts, count, scale: draw(pipeline, prompts, count, scale), 50, 2.0)
    assert set(shares) == {"bold > thin", "slanted > upright"}
    assert min(shares.values()) >= 0.92


@pytest.mark.slow
def test_unknown_words_do_not_derail_it(pipeline):
    prompts = [f"a quokka drew a {digit} yesterday" for digit in DIGITS]
    found = probabilities(load_classifier(), draw(pipeline, prompts, 50, 2.0))
    assert (found.argmax(1) == torch.arange(50) % 10).float().mean() >= 0.9
