"""What the judge of the text model makes of pictures."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_cli.evaluation import judge_mnist_text
from ddim_cli.evaluation.judge_mnist_text import SHEET_PROMPTS, drawn_as_asked, judge, ordered_pairs


def test_as_asked_counts_the_digits_in_turn():
    found = torch.full((20, 10), 0.01)
    for i in range(20):
        found[i, i % 10] = 0.91
    found[13, 3], found[13, 8] = 0.3, 0.62
    figures = drawn_as_asked(found)
    assert figures["as_asked"] == 0.95
    assert figures["as_asked_by_digit"][3] == 0.5
    assert figures["sure"] == 0.95
    assert figures["images"] == 20


def stroke(prompt: str) -> torch.Tensor:
    """A stroke as the prompt wants it, [1, 32, 32] in {-1, 1}."""
    x = -torch.ones(1, 32, 32)
    width, lean = (6 if "bold" in prompt else 2), (0.4 if "slanted" in prompt else 0.0)
    for row in range(6, 26):
        left = round(13 + lean * (15.5 - row))
        x[0, row, left : left + width] = 1
    return x


def draw(prompts, count, guidance):
    return torch.stack([stroke(prompts[seed % len(prompts)]) for seed in range(count)])


def test_pairs_are_in_the_order_their_words_say():
    assert ordered_pairs(draw, 20, 2.0) == {"bold > thin": 1.0, "slanted > upright": 1.0}


def test_equal_pairs_are_in_no_order():
    same = ordered_pairs(lambda prompts, count, guidance: draw(["one"], count, guidance), 10, 2.0)
    assert same == {"bold > thin": 0.0, "slanted > upright": 0.0}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Every configuration that the judge samples; the sampling is a stroke."""
    configs = []

    def sample(config, model):
        assert model == "mnist-text"
        configs.append(config["sampling"])
        prompts = config["sampling"]["prompt"]
        for seed in range(config["sampling"]["num_images"]):
            yield SimpleNamespace(seed=seed, tensor=stroke(prompts[seed % len(prompts)]))

    monkeypatch.setattr(judge_mnist_text, "sample", sample)
    return configs


def test_the_judge_prints_its_figures_and_draws_its_sheet(asked, tmp_path, capsys):
    data = tmp_path / "digits.npz"
    np.savez(data, x_test=np.zeros((10, 28, 28), np.uint8), y_test=np.arange(10))
    judge(data, num_images=20, pairs=10, steps=5, sheet=tmp_path / "sheet.png", model="mnist-text", guidance=2.0)
    printed = {}
    for line in capsys.readouterr().out.splitlines():
        printed |= json.loads(line)
    assert printed["guidance 2"]["images"] == printed["guidance 1"]["images"] == 20
    assert printed["pairs at guidance 2"]["bold > thin"] == 1
    assert {config["guidance_scale"] for config in asked} == {1.0, 2.0}
    assert {config["steps"] for config in asked} == {5}
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 64 * len(SHEET_PROMPTS)
