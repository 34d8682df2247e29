"""Spherical interpolation in closed form."""

import math

import pytest
import torch

from ddim_cli.diffusion.slerp import slerp

WEIGHTS = [i / 10 for i in range(11)]


def angle(a, b):
    # Of half the chord, which is exact for small angles too.
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.asin(min(1.0, float((a - b).norm()) / 2))


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_quarter_of_a_circle():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for w in WEIGHTS:
        expected = torch.tensor([math.cos(w * math.pi / 2), math.sin(w * math.pi / 2)])
        torch.testing.assert_close(slerp(a, b, w), expected)


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8), (1, 32, 32)])
def test_of_equal_norms_the_norm_stays_and_the_angle_is_linear_in_the_weight(shape):
    a, b = noise(1, *shape), noise(2, *shape)
    b = b * a.norm() / b.norm()
    whole = angle(a, b)
    for w in WEIGHTS:
        between = slerp(a, b, w)
        assert float(between.norm()) == pytest.approx(float(a.norm()), rel=1e-12)
        assert angle(a, between) == pytest.approx(w * whole, abs=1e-9)
        assert angle(between, b) == pytest.approx((1 - w) * whole, abs=1e-9)


def test_the_norm_stays_that_of_noise():
    """Its expectation is sqrt(d) with a deviation of sqrt(1/2); a straight line's middle would be at sqrt(d / 2)."""
    d = 3 * 32 * 32
    for pair in range(5):
        for w in WEIGHTS:
            between = slerp(noise(2 * pair, 3, 32, 32), noise(2 * pair + 1, 3, 32, 32), w)
            assert abs(float(between.norm()) - math.sqrt(d)) < 4


def test_the_ends_are_the_very_tensors():
    a, b = noise(1, 3, 4, 4).float(), noise(2, 3, 4, 4).float()
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    assert slerp(a, b, 0.5).dtype == torch.float32
    # The same arc from its other end.
    torch.testing.assert_close(slerp(a, b, 0.3), slerp(b, a, 0.7))


def test_one_direction_and_opposite_ones():
    a = noise(1, 5)
    torch.testing.assert_close(slerp(a, 2 * a, 0.25), 1.25 * a)
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, 0.5)
