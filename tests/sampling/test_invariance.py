"""An image depends on its seed and settings, and on nothing else."""

import numpy as np
import pytest

from ddim_cli import load_model, sample
from ddim_cli.sampling.plan import Shard


def pictures(model, **sampling):
    return {p.seed: np.asarray(p.image).astype(int) for p in sample({"sampling": sampling}, model=model)}


@pytest.fixture(scope="module")
def mnist():
    return load_model("mnist")


@pytest.mark.parametrize("eta", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_batch_size_does_not_matter(mnist, eta):
    by_size = {b: pictures(mnist, num_images=16, steps=10, batch_size=b, eta=eta) for b in (1, 3, 16)}
    for batch_size, found in by_size.items():
        assert list(found) == list(range(16)), batch_size
        assert max(abs(found[s] - by_size[16][s]).max() for s in found) <= 1


def test_what_else_is_sampled_does_not_matter(mnist):
    alone = pictures(mnist, seeds="11", steps=10, eta=1.0)
    among = pictures(mnist, seeds="40,11,2", steps=10, eta=1.0, batch_size=2)
    assert list(among) == [40, 11, 2]
    assert abs(alone[11] - among[11]).max() <= 1
    assert abs(among[40] - among[11]).max() > 100


def test_the_last_batch_is_padded_and_nothing_of_it_leaks(mnist):
    rows = []

    def network(x, t):
        rows.append(len(x))
        return mnist(x, t)

    found = list(sample({"sampling": {"num_images": 7, "steps": 2, "batch_size": 3}}, model=network, shape=(1, 32, 32)))
    assert [p.seed for p in found] == list(range(7))
    assert set(rows) == {3}


def test_shards_make_up_the_plan(ddim, tmp_path):
    common = ("sample", "--steps", 2, "--seeds", "0-4,100", "-q", "-b", 2)
    assert ddim(*common, "-o", "whole").exit_code == 0
    for part in ("1/3", "2/3", "3/3"):
        assert not (tmp_path / "parts" / "grid.png").exists()
        assert ddim(*common, "-o", "parts", "--shard", part).exit_code == 0
    assert list(Shard.parse("3/3").of(range(6))) == [0, 3]
    whole, parts = (sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("whole", "parts"))
    assert whole == parts
    for name in whole:
        if name.endswith(".png"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
