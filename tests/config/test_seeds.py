import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_cli.config.seeds import format_seeds, parse_seeds


def test_grammar():
    assert parse_seeds("0-3,7, 5") == (0, 1, 2, 3, 7, 5)
    assert parse_seeds("9") == (9,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5-2", "backwards"),
        ("", "neither"),
        ("1,,2", "neither"),
        ("-3", "neither"),
        ("1-2-3", "neither"),
        ("a", "neither"),
        ("0-3,2", "twice"),
        (str(2**63), "above"),
    ],
)
def test_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_seeds(text)


@given(st.sets(st.integers(0, 10_000), min_size=1))
def test_format_is_the_inverse_of_parse(seeds):
    assert set(parse_seeds(format_seeds(seeds))) == seeds


def test_runs_are_joined():
    assert format_seeds([3, 1, 2, 9]) == "1-3,9"
