"""Captions, and what they say of a picture."""

from __future__ import annotations

import random

import pytest
import torch

from ddim_cli.models.bundled.captions import (
    DIGITS,
    TRAITS,
    WORDS,
    Thirds,
    Traits,
    full_caption,
    ink,
    random_caption,
    shear,
)


def stroke(lean: float, width: int = 2, size: int = 32) -> torch.Tensor:
    """A straight stroke that moves ``lean`` columns to the right a row upwards, [1, 1, size, size] in {-1, 1}."""
    x = -torch.ones(1, 1, size, size)
    for row in range(6, 26):
        column = round(15.5 + lean * (15.5 - row))
        x[0, 0, row, column - width // 2 : column - width // 2 + width] = 1
    return x


def test_ink_is_the_inked_share():
    assert ink(-torch.ones(2, 1, 32, 32)).tolist() == [0, 0]
    assert ink(torch.ones(1, 1, 32, 32)).item() == 1
    assert ink(stroke(0, width=2)).item() == pytest.approx(20 * 2 / 1024)
    assert ink(torch.full((1, 1, 4, 4), 5.0)).item() == 1


@pytest.mark.parametrize("lean", [-0.4, 0.0, 0.25, 0.5])
def test_shear_is_the_lean_of_a_stroke(lean):
    assert shear(stroke(lean)).item() == pytest.approx(lean, abs=0.03)


def test_shear_does_not_depend_on_place_or_boldness():
    x = stroke(0.3)
    moved = torch.roll(x, (4, -3), (2, 3))
    assert shear(moved).item() == pytest.approx(shear(x).item(), abs=1e-5)
    assert shear(stroke(0.3, width=6)).item() == pytest.approx(shear(x).item(), abs=0.02)


def test_shear_of_nothing_is_nothing():
    assert shear(-torch.ones(1, 1, 32, 32)).item() == 0


def test_thirds_are_those_of_the_class():
    """Width 2 is thin among threes and bold among ones, if that is how they are."""
    widths = {1: (1, 1, 2), 3: (2, 4, 6)}
    x = torch.cat([stroke(0, width) for each in widths.values() for width in each])
    labels = torch.tensor([1, 1, 1, 3, 3, 3])
    traits = Thirds.of(x, labels).traits(x, labels)
    assert traits[2].ink == "bold"
    assert traits[3].ink == "thin"
    assert traits[4].ink is None
    assert traits[5].ink == "bold"


def test_thirds_of_lean():
    x = torch.cat([stroke(lean) for lean in (-0.2, 0.1, 0.4)])
    labels = torch.full((3,), 7)
    assert [t.shear for t in Thirds.of(x, labels).traits(x, labels)] == ["upright", None, "slanted"]


def test_a_class_never_measured_is_never_described():
    x = stroke(0.2)
    thirds = Thirds.of(x, torch.tensor([4]))
    assert thirds.traits(x, torch.tensor([9])) == [Traits(None, None)]


def test_full_caption():
    assert full_caption(7, Traits("bold", "slanted")) == "a bold slanted seven"
    assert full_caption(8, Traits(None, None)) == "an eight"
    assert full_caption(1, Traits(None, "upright")) == "an upright one"


def test_random_captions_say_what_is_so():
    rng = random.Random(0)
    captions = [random_caption(7, Traits("bold", "upright"), rng) for _ in range(2000)]
    assert 0.07 < captions.count("") / len(captions) < 0.13
    said = set(" ".join(captions).split())
    wrong = {"thin", "slanted", *TRAITS["thin"], *TRAITS["slanted"], *DIGITS, *"0123456789"} - {"seven", "7"}
    assert {"seven", "7", "bold", "upright", "a"} <= said
    assert not wrong & said
    named = [caption for caption in captions if {"seven", "7"} & set(caption.split())]
    assert len(named) / len(captions) > 0.8
    assert captions == [
        random_caption(7, Traits("bold", "upright"), again) for again in [random.Random(0)] for _ in range(2000)
    ]


def test_a_picture_in_the_middle_is_called_neither():
    rng = random.Random(1)
    said = set(" ".join(random_caption(3, Traits(None, None), rng) for _ in range(500)).split())
    assert not said & set(TRAITS)


def test_words_are_lower_case_and_distinct():
    assert len(set(WORDS)) == len(WORDS)
    assert all(word.isalpha() and word == word.lower() for word in WORDS)
