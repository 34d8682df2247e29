"""Prompts where there is room for a few words."""

import pytest

from ddim_cli.config.labels import label_of


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("a seven", "a seven"),
        ("  a\n\tseven ", "a seven"),
        ("", ""),
        ("a" * 40, "a" * 40),
        ("a" * 30 + "b" * 30, "a" * 26 + ".." + "b" * 12),
    ],
)
def test_label_of(text, label):
    assert label_of(text) == label


def test_the_ends_of_prompts_tell_them_apart():
    long = "a seven, drawn with a thick pen on a large sheet of white paper"
    assert label_of(f"{long}, bold") != label_of(f"{long}, thin")
