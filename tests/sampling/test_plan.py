import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_cli.errors import UsageError
from ddim_cli.sampling.plan import Shard, batches, even_batch_size, padded


@given(st.integers(1, 9), st.integers(0, 60))
def test_either_way_of_counting_parts_covers_everything_once(count, images):
    seeds = range(100, 100 + images)
    from_zero = [s for i in range(count) for s in Shard.parse(f"{i}/{count}").of(seeds)]
    from_one = [s for i in range(1, count + 1) for s in Shard.parse(f"{i}/{count}").of(seeds)]
    assert sorted(from_zero) == sorted(from_one) == list(seeds)


@pytest.mark.parametrize("text", ["3/2", "1/0", "a/2", "-1/2", "1", "1/2/3", ""])
def test_shards_that_are_refused(text):
    with pytest.raises(UsageError, match="--shard"):
        Shard.parse(text)


@given(st.integers(1, 500), st.integers(1, 64))
def test_batches_lose_nothing(images, batch_size):
    found = list(batches(range(images), batch_size))
    assert [s for batch in found for s in batch] == list(range(images))
    assert all(len(padded(batch, batch_size)) == batch_size for batch in found)


def test_even_batches():
    assert even_batch_size(100, 64) == 50
    assert even_batch_size(3, 64) == 3
