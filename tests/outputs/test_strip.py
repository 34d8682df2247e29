import io

import numpy as np
import pytest
from PIL import Image

from ddim_cli.outputs.contact_sheet import BACKGROUND, GAP
from ddim_cli.outputs.lettering import LABEL_SIZE, MARGIN, fitting, font, line_height, wrapped
from ddim_cli.outputs.strip import FRAME_MS, REST_MS, Row, draw_strip, encode_gif, enlarged

WHITE = Image.new("L", (32, 32), 255)


def ink(region):
    """Whether anything but the ground is there."""
    return bool((np.asarray(region) != BACKGROUND).any())


@pytest.mark.parametrize(("size", "smallest", "found"), [((32, 32), 96, (96, 96)), ((8, 4), 96, (96, 48))])
def test_small_frames_are_enlarged_by_whole_pixels(size, smallest, found):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    tile = enlarged(Image.fromarray(noise), smallest)
    assert tile.size == found
    factor = found[0] // size[0]
    assert np.array_equal(np.asarray(tile), noise.repeat(factor, 0).repeat(factor, 1))


def test_large_frames_stay_and_transparent_ones_lie_on_the_ground():
    assert enlarged(Image.new("RGB", (256, 128))).size == (256, 128)
    assert enlarged(Image.new("RGBA", (256, 128), (255, 0, 0, 0))).getpixel((3, 3)) == BACKGROUND


@pytest.mark.parametrize("above", [False, True])
def test_labels_stand_beside_their_own_frames(above):
    strip = draw_strip([Row([WHITE] * 3, ["t = 980", "", "t = 0"], above)])
    line = line_height(LABEL_SIZE)
    top = MARGIN + (line if above else 0)
    assert strip.width == 2 * MARGIN + 3 * 96 + 2 * GAP
    assert strip.getpixel((MARGIN, top)) == strip.getpixel((MARGIN + 95, top + 95)) == (255, 255, 255)
    place = MARGIN if above else top + 96
    labels = [strip.crop((x, place, x + 96, place + line - 4)) for x in (MARGIN + i * (96 + GAP) for i in range(3))]
    assert [ink(label) for label in labels] == [True, False, True]


def test_a_caption_and_rows_of_different_lengths():
    strip = draw_strip([Row([WHITE] * 3), Row([WHITE])], "a caption")
    assert ink(strip.crop((0, 0, strip.width, MARGIN + 20)))
    assert strip.getpixel((strip.width - MARGIN - 1, strip.height - MARGIN - 1)) == BACKGROUND
    assert strip.getpixel((MARGIN, strip.height - MARGIN - 1)) == (255, 255, 255)


def test_text_that_is_too_long_loses_its_middle():
    text = f"seed {2**63 - 1}"
    short = fitting(text, LABEL_SIZE, 96)
    assert short.startswith("seed ")
    assert short.endswith("07")
    assert font(LABEL_SIZE).getlength(short) <= 96 < font(LABEL_SIZE).getlength(text)
    assert fitting("t = 0", LABEL_SIZE, 96) == "t = 0"


def test_an_animation_has_its_frames_in_order_and_rests():
    shades = (0, 120, 250)
    data = encode_gif([Image.new("L", (32, 32), shade) for shade in shades], ["a", "b", "c"], rests=[2])
    with Image.open(io.BytesIO(data)) as animation:
        assert (animation.n_frames, animation.info["loop"]) == (3, 0)
        for i, shade in enumerate(shades):
            animation.seek(i)
            assert animation.convert("RGB").getpixel((100, 100)) == (shade,) * 3
            assert animation.info["duration"] == (REST_MS if i == 2 else FRAME_MS)


@pytest.mark.parametrize(("widest", "side"), [(None, 512), (4 * 518 + 6, 512), (4 * 518 + 5, 256), (800, 171)])
def test_frames_are_reduced_by_whole_numbers_where_a_strip_would_be_too_wide(widest, side):
    strip = draw_strip([Row([Image.new("RGB", (512, 512))] * 4)], widest=widest)
    assert strip.width == 2 * MARGIN + 4 * side + 3 * GAP


@pytest.mark.parametrize(
    ("text", "lines"), [("a b", ["a b"]), ("", [""]), ("aaaa bbbb cccc", ["aaaa", "bbbb", "cccc"])]
)
def test_wrapped(text, lines):
    width = int(font(LABEL_SIZE).getlength("aaaa b"))
    assert wrapped(text, LABEL_SIZE, width, 3) == lines


def test_what_is_beyond_the_last_line_is_left_out():
    width = int(font(LABEL_SIZE).getlength("aaaa b"))
    first, second = wrapped("aaaa bbbb cccc dddd", LABEL_SIZE, width, 2)
    assert first == "aaaa"
    assert ".." in second
    assert font(LABEL_SIZE).getlength(second) <= width
