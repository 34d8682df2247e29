"""What JPEG can have lost is no difference, and what it cannot have lost is one."""

import numpy as np
import pytest
from PIL import Image

from ddim_cli.evaluation.jpeg import least_difference
from ddim_cli.outputs.picture import Encoding, to_image

KINDS = {
    "noise": lambda h, w, c, draw: draw.integers(0, 256, (h, w, c)),
    "black and white": lambda h, w, c, draw: draw.integers(0, 2, (h, w, c)) * 255,
    "one colour": lambda h, w, c, draw: np.zeros((h, w, c)) + draw.integers(0, 256, c),
    "a slope": lambda h, w, c, draw: (np.indices((h, w)).sum(0)[:, :, None] * 7 % 256) * np.ones((1, 1, c)),
}


def written(path, pixels, quality):
    path.write_bytes(Encoding("jpg", quality).encode(to_image(pixels)))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quality", [1, 10, 50, 75, 95, 100])
def test_a_jpeg_does_not_differ_from_what_it_was_made_of(tmp_path, kind, quality):
    draw = np.random.default_rng(quality)
    for channels in (1, 3):
        for size in ((8, 8), (28, 28), (33, 20), (5, 3)):
            pixels = KINDS[kind](*size, channels, draw).astype(np.uint8)
            path = written(tmp_path / "a.jpg", pixels, quality)
            assert least_difference(path, pixels) == 0
            # Nor from what is within rounding of it.
            near = np.where(pixels < 255, pixels + 1, pixels - 1).astype(np.uint8)
            assert least_difference(path, near) <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_it_differs_from_another_picture_by_no_more_than_is_true(tmp_path, channels):
    draw = np.random.default_rng(0)
    pixels = draw.integers(60, 200, (16, 24, channels), dtype=np.uint8)
    path = written(tmp_path / "a.jpg", pixels, 95)
    found = []
    for by in (0, 2, 10, 40):
        other = (pixels.astype(int) + by * draw.choice([-1, 1], pixels.shape)).astype(np.uint8)
        found.append(least_difference(path, other))
        assert found[-1] <= by
    assert found[0] == 0
    assert found[-1] > 10


def test_where_colour_was_left_out_nothing_is_known(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, subsampling="4:2:0")
    assert least_difference(tmp_path / "a.jpg", pixels[::-1].copy()) == 0
