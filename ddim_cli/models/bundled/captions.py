"""What the captions of the ``mnist-text`` model are made of: words, and what they mean, measured in a picture.

A digit's own name comes from its label. Whether it is bold or thin, slanted or upright, is measured, and
judged among the digits of its own class: the third with the most ink is bold, the third with the least is thin, and
alike for shear.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Each trait has a word of its own, which is the most usual one in captions, and others that mean the same.
TRAITS: dict[str, tuple[str, ...]] = {
    "bold": ("thick", "heavy"),
    "thin": ("light", "fine"),
    "slanted": ("italic", "leaning"),
    "upright": ("straight", "vertical"),
}
NOUNS = ("digit", "number", "figure")
PICTURES = ("photo", "photograph", "picture", "image", "drawing", "painting", "sketch")
OTHERS = ("a", "an", "the", "of", "and", "in", "very", "handwritten", "written", "black", "white")
# Every word that a tokenizer should know as one.
WORDS = tuple(dict.fromkeys((*DIGITS, *TRAITS, *sum(TRAITS.values(), ()), *NOUNS, *PICTURES, *OTHERS)))

EMPTY = 0.1
UNKNOWN = 0.15
VOWEL_SOUNDS = ("an", "eight", "upright", "italic", "image")


def ink(x: Tensor) -> Tensor:
    """The share of a picture that is inked: [N, 1, H, W] in [-1, 1] -> [N] in 0..1."""
    return ((x.float().clamp(-1, 1) + 1) / 2).flatten(1).mean(1)


def shear(x: Tensor) -> Tensor:
    """How far strokes lean to the right, as columns a row upwards: [N, 1, H, W] in [-1, 1] -> [N].

    The slope of the line of columns on rows that fits the ink best: the moments -mu_11 / mu_02 of the picture (Hu,
    "Visual pattern recognition by moment invariants", 1962). 0 is upright. A picture without ink has 0.
    """
    weight = (x.float().clamp(-1, 1).squeeze(1) + 1) / 2
    rows = torch.arange(weight.shape[1], dtype=torch.float32, device=x.device).view(1, -1, 1)
    columns = torch.arange(weight.shape[2], dtype=torch.float32, device=x.device).view(1, 1, -1)
    total = weight.sum((1, 2), keepdim=True).clamp_min(1e-6)
    down = rows - (weight * rows).sum((1, 2), keepdim=True) / total
    right = columns - (weight * columns).sum((1, 2), keepdim=True) / total
    spread = (weight * down.square()).sum((1, 2))
    return -(weight * down * right).sum((1, 2)) / spread.clamp_min(1e-6)


class Traits(NamedTuple):
    """The words for one picture: "bold", "thin" or None, and "slanted", "upright" or None."""

    ink: str | None
    shear: str | None


@dataclass(frozen=True)
class Thirds:
    """Where the lowest and the highest third of each class begin: ``ink`` and ``shear``, each [10, 2]."""

    ink: Tensor
    shear: Tensor

    @classmethod
    def of(cls, x: Tensor, labels: Tensor) -> Thirds:
        """Measure [N, 1, H, W] in [-1, 1] with labels [N]; a class that is not there gets no thirds (NaN)."""

        def bounds(values: Tensor) -> Tensor:
            found = torch.full((len(DIGITS), 2), torch.nan)
            for digit in labels.unique().tolist():
                found[digit] = values[labels == digit].quantile(torch.tensor([1 / 3, 2 / 3]))
            return found

        return cls(bounds(ink(x)), bounds(shear(x)))

    def traits(self, x: Tensor, labels: Tensor) -> list[Traits]:
        """What to say of each of [N, 1, H, W] in [-1, 1]: nothing where it is in the middle third of its class."""

        def words(values: Tensor, bounds: Tensor, low: str, high: str) -> list[str | None]:
            least, most = bounds[labels].unbind(1)
            # A bound that is not a number compares false: no word.
            below, above = (values < least).tolist(), (values > most).tolist()
            return [low if b else high if a else None for b, a in zip(below, above, strict=True)]

        inks = words(ink(x), self.ink, "thin", "bold")
        shears = words(shear(x), self.shear, "upright", "slanted")
        return [Traits(*pair) for pair in zip(inks, shears, strict=True)]


def _article(following: str) -> str:
    return "an" if following in VOWEL_SOUNDS else "a"


def full_caption(digit: int, traits: Traits) -> str:
    """All there is to say, in the usual words: "a bold slanted seven"."""
    words = [word for word in traits if word is not None] + [DIGITS[digit]]
    return " ".join([_article(words[0]), *words])


def _unknown_word(rng: random.Random) -> str:
    """Letters that are no word; half of them begin as a word does."""
    start = ""
    if rng.random() < 0.5:
        word = rng.choice(WORDS)
        start = word[: rng.randint(1, len(word))]
    return start + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6)))


def random_caption(digit: int, traits: Traits, rng: random.Random) -> str:
    """One of the many ways to describe a digit; the empty string in a tenth of cases, for classifier-free guidance.

    Ho and Salimans, arXiv:2207.12598, section 3.2. Words are left out, put in another order and replaced by others that
    mean the same. Now and then there are words that mean nothing, so that a model learns to pass over them.
    """
    if rng.random() < EMPTY:
        return ""
    described = [word for word in traits if word is not None and rng.random() < 0.75]
    described = [word if rng.random() < 0.7 else rng.choice(TRAITS[word]) for word in described]
    if rng.random() < 0.25:
        described.reverse()
    if rng.random() < 0.05:
        described.append("handwritten")
    name = str(digit) if rng.random() < 0.2 else DIGITS[digit]
    form = rng.random()
    if form < 0.04:
        words = [*described, rng.choice(NOUNS)]
    elif form < 0.14:
        words = [*described, rng.choice(NOUNS), name]
    else:
        words = [*described, name]
    opening = rng.random()
    if opening < 0.55:
        words.insert(0, _article(words[0]))
    elif opening < 0.62:
        words.insert(0, "the")
    if opening < 0.15:
        picture = rng.choice(PICTURES)
        words = [_article(picture), picture, "of", *words]
    if rng.random() < UNKNOWN:
        for _ in range(rng.randint(1, 2)):
            extra = rng.choice((",", ".", "!", *OTHERS)) if rng.random() < 0.3 else _unknown_word(rng)
            words.insert(rng.randint(0, len(words)), extra)
    return " ".join(words)
