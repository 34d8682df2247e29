"""Which frames an interpolation has."""

import pytest

from ddim_cli.errors import UsageError
from ddim_cli.experiments.between import Between
from ddim_cli.models.conditions import Conditioning


def test_two_seeds():
    plan = Between.parse("3,8")
    frames = plan.frames()
    assert len(plan) == len(frames) == 11
    assert [f.weights for f in frames] == [(i / 10,) for i in range(11)]
    assert {f.seeds for f in frames} == {(3, 8)}
    assert [f.seed for f in frames] == [3, *[None] * 9, 8]
    assert plan.items(None)[3].about == {"between": {"seeds": [3, 8], "weight": 0.3}}


def test_a_path_has_each_seed_once_and_a_longer_one_begins_the_same():
    plan = Between.parse("3,8,3", 4)
    assert [(f.seeds, round(f.weights[0], 3), f.seed) for f in plan.frames()] == [
        ((3, 8), 0.0, 3), ((3, 8), 0.333, None), ((3, 8), 0.667, None), ((3, 8), 1.0, 8),
        ((8, 3), 0.333, None), ((8, 3), 0.667, None), ((8, 3), 1.0, 3),
    ]  # fmt: skip
    assert len(plan) == 7
    assert Between.parse("3,8", 4).frames() == plan.frames()[:4]
    assert Between.parse("0-3", 2).seeds == (0, 1, 2, 3)


def test_a_square_has_its_corners_in_reading_order():
    plan = Between.parse("1,2,3,4", 3, square=True)
    frames = plan.frames()
    assert len(plan) == len(frames) == 9
    assert [f.seed for f in frames] == [1, None, 2, None, None, None, 3, None, 4]
    assert plan.items(7)[5].about == {"between": {"seeds": [1, 2, 3, 4], "weight": [1.0, 0.5]}}
    assert {item.class_number for item in plan.items(Conditioning(7))} == {7}
    assert len(Between.parse("1,2,3,4", square=True)) == 64


@pytest.mark.parametrize(
    ("text", "count", "square", "problem"),
    [
        ("3", None, False, "name at least two seeds"),
        ("3,3", None, False, "from seed 3 to itself"),
        ("3,x", None, False, "'x' is neither a seed nor a range"),
        ("1,2,3", None, True, "four different seeds"),
        ("1,2,3,1", None, True, "four different seeds"),
        ("3,8", 1, False, "it takes at least 2"),
        ("3,8", 20_000, False, "20,000 frames, and 10,000 is the most"),
    ],
)
def test_mistakes(text, count, square, problem):
    with pytest.raises(UsageError, match=problem):
        Between.parse(text, count, square)
