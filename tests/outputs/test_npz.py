import tracemalloc

import numpy as np
import pytest
from PIL import Image

from ddim_cli.errors import RunError
from ddim_cli.outputs.named import name_file
from ddim_cli.outputs.npz import PICTURES, write_npz


def target(path):
    return name_file(path, PICTURES)


def save(folder, count, size=(6, 5), channels=3):
    draw, arrays = np.random.default_rng(0), []
    for i in range(count):
        pixels = draw.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(folder / f"{i:06d}.png")
        arrays.append(pixels)
    return sorted(folder.glob("*.png")), np.stack(arrays)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_array_in_the_order_given(tmp_path, channels):
    files, expected = save(tmp_path, 5, channels=channels)
    write_npz(target(tmp_path / "a.npz"), reversed(files), 5)
    with np.load(tmp_path / "a.npz") as found:
        assert found.files == ["arr_0"]
        assert found["arr_0"].dtype == np.uint8
        assert np.array_equal(found["arr_0"], expected[::-1])


def test_classes_and_equal_bytes(tmp_path):
    files, _ = save(tmp_path, 3)
    for name in "ab":
        write_npz(target(tmp_path / name), files, 3, labels=[7, 8, 7])
    assert np.load(tmp_path / "a")["arr_1"].tolist() == [7, 8, 7]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_memory_stays_flat(tmp_path):
    files, _ = save(tmp_path, 4, size=(256, 256))
    peaks = []
    for times in (1, 25):
        tracemalloc.start()
        write_npz(target(tmp_path / "a.npz"), files * times, 4 * times)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 256 * 256 * 3


def test_a_picture_that_does_not_fit_leaves_no_file(tmp_path):
    files, _ = save(tmp_path, 3)
    Image.new("RGB", (9, 9)).save(files[1])
    with pytest.raises(RunError, match=r"000001.png: is 9 x 9 x 3, and the pictures before it are 5 x 6 x 3"):
        write_npz(target(tmp_path / "a.npz"), files, 3)
    files[2].write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"000002.png: cannot be read"):
        write_npz(target(tmp_path / "a.npz"), files[2:], 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in files]
