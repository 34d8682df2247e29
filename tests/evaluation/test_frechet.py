"""The distances against closed forms, a direct double loop, and torchmetrics."""

import numpy as np
import pytest

from ddim_cli.evaluation.frechet import Gaussian, Moments, frechet_distance, kernel_distance, squared_mmd

RNG = np.random.default_rng


def random_covariance(seed, size=5, rank=None):
    factor = RNG(seed).standard_normal((size, rank or 2 * size))
    return factor @ factor.T / factor.shape[1]


def gaussian(mean, covariance):
    return Gaussian(np.asarray(mean, float), np.asarray(covariance, float), None)


def moments(features, *splits):
    found = Moments()
    for part in np.split(features, splits):
        found.add(part)
    return found.gaussian()


def test_a_shift_of_the_mean_counts_its_square():
    covariance = random_covariance(0)
    shift = np.array([3.0, 0, 4, 0, 0])
    assert frechet_distance(gaussian(np.zeros(5), covariance), gaussian(shift, covariance)) == pytest.approx(25)


def test_commuting_covariances_differ_by_the_squares_of_their_roots_differences():
    basis, _ = np.linalg.qr(RNG(1).standard_normal((4, 4)))
    a, b = np.array([1.0, 4, 9, 16]), np.array([4.0, 4, 1, 0.25])
    found = frechet_distance(
        gaussian(np.ones(4), basis @ np.diag(a) @ basis.T), gaussian(np.ones(4), basis @ np.diag(b) @ basis.T)
    )
    assert found == pytest.approx(np.square(np.sqrt(a) - np.sqrt(b)).sum())


def test_covariances_that_do_not_commute():
    """In two dimensions tr((AB)^(1/2)) = sqrt(tr(AB) + 2 sqrt(det(AB)))."""
    a, b = random_covariance(2, 2), random_covariance(3, 2)
    assert not np.allclose(a @ b, b @ a)
    overlap = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * overlap
    assert frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b)) == pytest.approx(expected)


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "singular"])
def test_it_is_symmetric_and_zero_for_equal_ones(rank):
    a = gaussian(RNG(4).standard_normal(5), random_covariance(4, rank=rank))
    b = gaussian(RNG(5).standard_normal(5), random_covariance(5, rank=rank))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, b) > 0.1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_moments_of_batches_are_those_of_all():
    # Far from zero, where sums of squares would lose their digits.
    features = (RNG(6).standard_normal((50, 3)) + 1e5).astype(np.float32)
    found = moments(features, 1, 7, 30)
    assert found.count == 50
    # Either is a sum of 50.
    np.testing.assert_allclose(found.mean, features.astype(float).mean(0), rtol=2 * 50 * 2**-53)
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(float).T), rtol=1e-9)


def test_squared_mmd_is_the_double_loop():
    # More rows than are computed at a time.
    a, b = RNG(7).standard_normal((70, 3)), RNG(8).standard_normal((9, 3)) + 1

    def k(x, y):
        return (np.dot(x, y) / 3 + 1) ** 3

    def among(x):
        return np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])

    expected = among(a) + among(b) - 2 * np.mean([k(x, y) for x in a for y in b])
    assert squared_mmd(a, b) == pytest.approx(expected)


def test_squared_mmd_is_unbiased():
    """Of sets from one distribution its mean is 0, whatever their size; the biased one's would be positive."""
    generator = RNG(9)
    found = [squared_mmd(generator.standard_normal((5, 2)), generator.standard_normal((5, 2))) for _ in range(4000)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error
    assert min(found) < 0


def test_kernel_distance_tells_sets_apart_and_repeats_itself():
    a, b, far = (RNG(i).standard_normal((40, 4)).astype(np.float32) for i in range(3))
    near, apart = kernel_distance(a, b), kernel_distance(a, far + 2)
    assert near.subset_size == 20
    assert near == kernel_distance(a, b)
    assert near.mean != kernel_distance(a, b, seed=1).mean
    assert apart.mean > 10 * abs(near.mean)
    assert kernel_distance(a[:3], b) is None
    assert kernel_distance(RNG(0).random((2400, 2)), RNG(1).random((3000, 2))).subset_size == 1000


def test_torchmetrics_agrees():
    """The same features through its FrechetInceptionDistance and its polynomial MMD."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_mmd

    class Rows(torch.nn.Module):
        num_features = 6

        def forward(self, x):
            return x.flatten(1)

    a = RNG(10).gamma(2.0, size=(80, 6))
    b = RNG(11).gamma(2.5, size=(60, 6)) @ random_covariance(12, 6)
    theirs = FrechetInceptionDistance(feature=Rows()).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(a), real=True)
    theirs.update(torch.from_numpy(b), real=False)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(theirs.compute().item(), rel=1e-9)
    # Theirs is of sets of one size.
    expected = poly_mmd(torch.from_numpy(a[:60]), torch.from_numpy(b)).item()
    assert squared_mmd(a[:60], b) == pytest.approx(expected, rel=1e-9)
