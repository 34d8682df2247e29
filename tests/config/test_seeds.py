import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_cli.config.seeds import Seeds, format_seeds, parse_seeds


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


@given(st.data())
def test_seeds_are_as_a_tuple_of_them(data):
    count = data.draw(st.integers(0, 5))
    bounds = sorted(data.draw(st.sets(st.integers(0, 60), min_size=2 * count, max_size=2 * count)))
    ranges = data.draw(st.permutations([range(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True)]))
    seeds, plain = Seeds(ranges), tuple(seed for part in ranges for seed in part)
    # As shards of shards.
    for _ in range(data.draw(st.integers(0, 2))):
        part = data.draw(st.slices(len(plain)))
        seeds, plain = seeds[part], plain[part]
    assert seeds == plain
    assert Seeds.of(plain) == seeds
    assert hash(Seeds.of(plain)) == hash(seeds)
    assert len(seeds) == len(plain)
    assert [seed in seeds for seed in range(61)] == [seed in plain for seed in range(61)]
    assert [seeds[i] for i in range(-len(plain), len(plain))] == [*plain, *plain]
    assert format_seeds(seeds) == format_seeds(plain)
    assert seeds.is_ascending == (list(plain) == sorted(plain))
    gone = data.draw(st.sets(st.integers(0, 60)))
    assert seeds.without(gone) == [seed for seed in plain if seed not in gone]


def test_ten_million_seeds_are_no_burden(monkeypatch):
    """They are never looked at one by one."""
    monkeypatch.setattr(Seeds, "__iter__", lambda self: pytest.fail("looked at one by one"))
    seeds = parse_seeds("0-9999999")
    assert (len(seeds), seeds[-1], 5 in seeds[3::8], 11 in seeds[3::8]) == (10_000_000, 9_999_999, False, True)
    assert format_seeds(seeds) == "0-9999999"
    assert len(seeds.without({7, 8})) == 9_999_998
    with pytest.raises(ValueError, match="the seed 9999998 is named twice"):
        parse_seeds("0-9999997,9999998,9999998")
    with pytest.raises(ValueError, match="more than 10,000,000"):
        parse_seeds("0-10000000")
