import pytest
import torch

from ddim_cli.diffusion.thresholding import dynamic_threshold, image_quantile


@pytest.mark.parametrize("ratio", [0.001, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 3072])
def test_quantile_equals_torchs(ratio, count):
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(image_quantile(values, ratio), torch.quantile(values, ratio, dim=1, keepdim=True))


def test_quantile_of_more_elements_than_torch_takes():
    values = torch.arange(2**24 + 3, dtype=torch.float32).view(1, -1)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.995, dim=1)
    expected = 0.995 * (2**24 + 2)
    assert abs(image_quantile(values, 0.995).item() - expected) <= 2


def test_each_image_has_its_own_threshold():
    x0 = torch.stack([torch.full((1, 4, 4), 0.5), torch.full((1, 4, 4), 3.0), torch.full((1, 4, 4), -9.0)])
    found = dynamic_threshold(x0, 0.995, 5.0)
    assert found.flatten(1).unique(dim=1).flatten().tolist() == pytest.approx([0.5, 1.0, -1.0])
