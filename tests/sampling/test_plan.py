from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddim_cli.errors import UsageError
from ddim_cli.sampling.items import SeedItems
from ddim_cli.sampling.loop import run_batches
from ddim_cli.sampling.plan import Shard, even_batch_size


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


class Recording:
    """A denoiser that makes nothing, and remembers what it was asked for."""

    sampler = SimpleNamespace(device=torch.device("cpu"), runs_ahead=False)

    def __init__(self):
        self.launched = []

    def launch(self, items, rows, on_step):
        self.launched.append((len(items), rows))
        return SimpleNamespace(collect=lambda: list(items))


@given(st.integers(1, 500), st.integers(1, 64))
def test_batches_lose_nothing_and_are_all_of_one_size(images, batch_size):
    denoiser = Recording()
    batches = list(run_batches(denoiser, SeedItems(range(images)), batch_size))
    assert [item.seed for batch in batches for item in batch] == list(range(images))
    assert {rows for _, rows in denoiser.launched} == {batch_size}


def test_even_batches():
    assert even_batch_size(100, 64) == 50
    assert even_batch_size(3, 64) == 3
