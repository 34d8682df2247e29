"""Pictures of any kind as a network takes them, and what is said of it."""

import numpy as np
import pytest
from PIL import Image

from ddim_cli.errors import UsageError
from ddim_cli.sampling.pictures import find_pictures, read_input

GREY, RGB, RGBA = (1, 8, 8), (3, 8, 8), (4, 8, 8)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_a_picture_that_fits_is_taken_as_it_is(tmp_path):
    values = noise(8, 8, 3)
    found, x0 = read_input(saved(tmp_path, Image.fromarray(values)), RGB)
    assert (found.name, found.conversion) == ("a", ())
    assert (x0.dtype, x0.shape) == (np.float32, RGB)
    assert np.allclose(x0, values.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_its_hash_is_that_of_a_sidecar(tmp_path):
    import hashlib

    values = noise(8, 8)
    found, _ = read_input(saved(tmp_path, Image.fromarray(values)), GREY)
    assert found.pixels_sha256 == hashlib.sha256(values.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("mode", "shape", "conversion"),
    [
        ("L", RGB, ("grey to RGB",)),
        ("L", RGBA, ("grey to RGBA",)),
        ("RGB", GREY, ("RGB to grey",)),
        ("RGB", RGBA, ("RGB to RGBA",)),
        ("CMYK", RGB, ("CMYK to RGB",)),
        ("1", GREY, ()),
        ("P", RGB, ("a palette to RGB",)),
    ],
)
def test_channels(tmp_path, mode, shape, conversion):
    image = Image.fromarray(noise(8, 8, 3)).convert(mode) if mode != "RGB" else Image.fromarray(noise(8, 8, 3))
    found, x0 = read_input(saved(tmp_path, image, "a.tif" if mode == "CMYK" else "a.png"), shape)
    assert found.conversion == conversion
    assert x0.shape == shape
    expected = np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[shape[0]]), np.float32)
    expected = expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1)
    assert np.allclose(x0, expected / 127.5 - 1, atol=1e-6)


def test_alpha_is_composited_on_white_where_the_network_has_no_channel_for_it(tmp_path):
    values = noise(8, 8, 4)
    path = saved(tmp_path, Image.fromarray(values))
    found, x0 = read_input(path, RGB)
    assert found.conversion == ("alpha composited on white",)
    alpha = values[..., 3:] / 255
    expected = values[..., :3] / 255 * alpha + (1 - alpha)
    assert np.abs(x0.transpose(1, 2, 0) / 2 + 0.5 - expected).max() < 0.005
    found, x0 = read_input(path, RGBA)
    assert found.conversion == ()
    assert np.allclose(x0, values.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    values[..., 3] = 255
    assert read_input(saved(tmp_path, Image.fromarray(values)), RGB)[0].conversion == ()


def test_16_bits_are_kept(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    path = saved(tmp_path, Image.fromarray(values))
    found, x0 = read_input(path, GREY)
    assert found.conversion == ("16-bit grey",)
    assert np.allclose(x0[0], values / 32767.5 - 1, atol=1e-6)
    assert read_input(path, RGB)[1].shape == RGB
    assert np.all(read_input(path, RGBA)[1][3] == 1)


def test_numbers_of_no_known_range_are_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(noise(8, 8).astype(np.float32)), "a.tif")
    with pytest.raises(UsageError, match=r"a\.tif: its values run from .* nothing says which is black"):
        read_input(path, GREY)
    fits = saved(tmp_path, Image.fromarray(noise(8, 8).astype(np.float32) / 255), "b.tif")
    assert np.allclose(read_input(fits, GREY)[1][0], noise(8, 8) / 127.5 - 1, atol=1e-6)


def test_another_aspect_is_cropped_in_the_middle_and_another_size_resized(tmp_path):
    # Left red, the middle green, right blue.
    image = Image.new("RGB", (64, 32), "lime")
    image.paste("red", (0, 0, 16, 32))
    image.paste("blue", (48, 0, 64, 32))
    found, x0 = read_input(saved(tmp_path, image), RGB)
    assert found.conversion == (
        "cropped in the middle from 64 x 32 to 32 x 32",
        "resized from 32 x 32 to 8 x 8",
    )
    assert np.allclose(x0, np.array([-1, 1, -1])[:, None, None])
    tall, _ = read_input(saved(tmp_path, image), (3, 16, 8))
    assert tall.conversion[0] == "cropped in the middle from 64 x 32 to 16 x 32"


def test_smaller_is_an_average_and_no_choice_of_pixels(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    _, x0 = read_input(saved(tmp_path, Image.fromarray(board)), GREY)
    assert np.abs(x0).max() < 0.1


def test_exif_orientation(tmp_path):
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    found, x0 = read_input(saved(tmp_path, image, exif=exif), GREY)
    assert found.conversion == ("turned as its EXIF orientation 6 says",)
    # Its top is to be shown on the right.
    assert np.all(x0[0, :, 4:] == 1)
    assert np.all(x0[0, :, :4] == -1)


def test_of_an_animation_the_first_frame(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (255, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    found, x0 = read_input(tmp_path / "a.gif", GREY)
    assert found.conversion[0] == "the first of 2 frames"
    assert np.all(x0 == 1)


def test_of_a_folder_the_pictures_without_sheets_and_reconstructions(tmp_path):
    for name in ("b.png", "a.JPG", "grid.png", "inverted.png", "strip.png", "b.recon.png", "000000.x0.png", ".c.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    assert [p.name for p in find_pictures([tmp_path])] == ["a.JPG", "b.png"]
    assert find_pictures([tmp_path / "b.recon.png"]) == [tmp_path / "b.recon.png"]
    assert len(find_pictures([tmp_path / "b.png", tmp_path])) == 2, "named twice, it is one"


def test_two_pictures_of_one_name(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/A.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    with pytest.raises(UsageError, match=r"would both become A\.recon\.png"):
        find_pictures([tmp_path / "a.png", tmp_path / "sub"])
