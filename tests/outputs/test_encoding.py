"""Pictures as PNG, WebP and JPEG: the pixels come back, and the texts inside are where others look for them."""

import hashlib
import io
import json
import struct
from xml.dom import minidom

import numpy as np
import pytest
from PIL import Image

from ddim_cli.errors import ConfigError
from ddim_cli.outputs import embedded
from ddim_cli.outputs.picture import (
    Encoding,
    decode,
    encode_png,
    parameters_inside,
    read_own,
    read_pixels,
    restored,
    text_inside,
    to_image,
    to_pixels,
)

FORMATS = ("png", "webp", "jpg")
PARAMETERS = "a sevén, 🦆 and 好\nNegative prompt: thin\nSteps: 5, Sampler: DDIM"


def pixels(channels, size=(9, 14), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)


def text_of(mode, **more):
    return json.dumps({"image": {"mode": mode}, **more}, ensure_ascii=False)


def plain(data):
    """As Pillow decodes it, without any code of ours."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_lossless_formats_keep_every_bit(format, mode, channels):
    values = pixels(channels)
    if mode == "RGBA":
        # Colours under nothing at all are kept too.
        values[:4, :, 3] = 0
    data = Encoding(format).encode(to_image(values), text_of(mode), PARAMETERS)
    shown = np.asarray(plain(data).convert(mode))
    assert np.array_equal(shown.reshape(values.shape), values)
    image, _ = decode(io.BytesIO(data))
    assert image.mode == mode
    assert hashlib.sha256(image.tobytes()).digest() == hashlib.sha256(values.tobytes()).digest()


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_webp_without_colour_or_transparency_comes_back_as_it_was(mode, tmp_path):
    """libwebp knows no grey, and stores no alpha that is opaque everywhere."""
    values = pixels(1 if mode == "L" else 4)
    if mode == "RGBA":
        values[:, :, 3] = 255
    path = tmp_path / "a.webp"
    path.write_bytes(Encoding("webp").encode(to_image(values), text_of(mode)))
    assert plain(path.read_bytes()).mode == "RGB"
    assert np.array_equal(read_pixels(path), values)
    assert read_own(path).mode == mode
    # Without a text, a sidecar tells.
    bare = plain(Encoding("webp").encode(to_image(values)))
    assert restored(bare).mode == "RGB"
    assert np.array_equal(to_pixels(restored(bare, mode)), values)


def test_what_is_coloured_is_not_made_grey():
    image = plain(Encoding("webp").encode(to_image(pixels(3)), text_of("L")))
    assert restored(image) is image
    assert restored(image, "L") is image


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_picture_gives_the_same_bytes(format):
    first, again = (Encoding(format).encode(to_image(pixels(3)), text_of("RGB"), PARAMETERS) for _ in range(2))
    assert first == again


def test_a_png_is_the_one_it_always_was():
    image, text = to_image(pixels(3)), text_of("RGB")
    assert Encoding().encode(image, text, "abc") == encode_png(image, text, parameters="abc")


@pytest.mark.parametrize("channels", [1, 3])
def test_quality_is_jpegs_and_no_colour_is_left_out(channels):
    image = to_image(pixels(channels))
    sizes = [len(Encoding("jpg", quality).encode(image)) for quality in (1, 50, 95, 100)]
    assert sizes == sorted(set(sizes))
    expected = io.BytesIO()
    image.save(expected, "JPEG", quality=95, subsampling="4:4:4")
    again = plain(Encoding("jpg").encode(image, text_of(image.mode), PARAMETERS))
    assert again.mode == image.mode
    assert np.array_equal(np.asarray(again), np.asarray(plain(expected.getvalue())))


# What JSON and XML have to escape, or cannot have.
AWKWARD = 'é<&>]]> "quoted" \\ \ufffe \uffff \x7f \u2028 🦆 &amp; \t\r\n'


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("count", [0, 1000, 60_000])
def test_the_text_comes_back_whatever_its_length(format, count):
    """A JPEG's segments have room for 64 KiB each."""
    record = {"image": {"mode": "RGB"}, "prompt": AWKWARD, "timesteps": list(range(count, 0, -1))}
    text = json.dumps(record, ensure_ascii=False)
    image = plain(Encoding(format).encode(to_image(pixels(3)), text, PARAMETERS))
    assert json.loads(text_inside(image)) == record
    assert parameters_inside(image) == PARAMETERS


def values_of(xmp):
    """The property, by another parser."""
    document = minidom.parseString(xmp)
    assert document.getElementsByTagNameNS("http://www.w3.org/1999/02/22-rdf-syntax-ns#", "Description")
    return [node.firstChild.data for node in document.getElementsByTagNameNS("urn:ddim-cli:", "picture")]


def app1(data):
    """The APP1 segments of a JPEG, read byte by byte."""
    assert data[:2] == b"\xff\xd8"
    place, found = 2, []
    while data[place : place + 2] != b"\xff\xda":
        marker, size = struct.unpack(">HH", data[place : place + 4])
        if marker == 0xFFE1:
            found.append(data[place + 4 : place + 2 + size])
        place += 2 + size
    return found


def chunks(data):
    """The chunks of a WebP by name."""
    assert (data[:4], data[8:12], struct.unpack("<L", data[4:8])[0]) == (b"RIFF", b"WEBP", len(data) - 8)
    place, found = 12, {}
    while place < len(data):
        name, size = struct.unpack("<4sL", data[place : place + 8])
        found[name] = data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2
    return found


def test_webp_has_the_text_as_xmp():
    text = text_of("RGB", prompt="a <seven> & é")
    data = Encoding("webp").encode(to_image(pixels(3)), text)
    found = chunks(data)
    # Lossless, and nothing else.
    assert list(found) == [b"VP8X", b"VP8L", b"XMP "]
    assert values_of(found[b"XMP "]) == [text]
    assert list(chunks(Encoding("webp").encode(to_image(pixels(3))))) == [b"VP8L"]


def test_jpeg_has_the_text_as_xmp():
    text = text_of("RGB", prompt="a <seven> & é")
    [segment] = app1(Encoding("jpg").encode(to_image(pixels(3)), text))
    standard = b"http://ns.adobe.com/xap/1.0/\0"
    assert segment.startswith(standard)
    assert values_of(segment.removeprefix(standard)) == [text]


def test_a_long_text_of_a_jpeg_is_extended_xmp():
    text = text_of("RGB", timesteps=list(range(50_000)))
    first, *rest = app1(Encoding("jpg").encode(to_image(pixels(3)), text))
    extension, head = b"http://ns.adobe.com/xmp/extension/\0", struct.Struct(">32sLL")
    parts = {}
    for segment in rest:
        assert segment.startswith(extension)
        name, whole, start = head.unpack_from(segment, len(extension))
        parts[start] = segment[len(extension) + head.size :]
        assert f'xmpNote:HasExtendedXMP="{name.decode()}"'.encode() in first
    joined = b"".join(parts[start] for start in sorted(parts))
    assert len(joined) == whole
    assert hashlib.md5(joined).hexdigest().upper() == name.decode()
    assert values_of(joined) == [text]


@pytest.mark.parametrize("format", ["webp", "jpg"])
def test_other_tools_find_the_parameters_in_exif(format):
    """As the web UIs do: UserComment, the word UNICODE, and UTF-16 with the higher byte first."""
    exif = plain(Encoding(format).encode(to_image(pixels(3)), text_of("RGB"), PARAMETERS)).getexif()
    comment = exif.get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == PARAMETERS
    assert dict(plain(Encoding(format).encode(to_image(pixels(3)), text_of("RGB"))).getexif()) == {}


def test_parameters_too_long_for_a_jpeg_are_left_out():
    long, text = "x" * 40_000, text_of("RGB")
    assert parameters_inside(plain(Encoding("webp").encode(to_image(pixels(3)), text, long))) == long
    image = plain(Encoding("jpg").encode(to_image(pixels(3)), text, long))
    assert (parameters_inside(image), text_inside(image)) == (None, text)


def test_xmp_that_another_program_wrote_anew_is_understood():
    """With other prefixes, and the value as an attribute."""
    rdf = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
    xmp = (
        f'<R xmlns="adobe:ns:meta/"><r:RDF xmlns:r="{rdf}"><r:Description r:about="" xmlns:q="urn:ddim-cli:" '
        'q:picture="{&quot;a&quot;: 1}"/></r:RDF></R>'
    )
    buffer = io.BytesIO()
    to_image(pixels(3)).save(buffer, "WEBP", xmp=xmp.encode())
    assert text_inside(plain(buffer.getvalue())) == '{"a": 1}'


@pytest.mark.parametrize(
    "xmp",
    [
        b"",
        b"no xml",
        b"<a/>",
        b"\xff\xfe",
        b'<!DOCTYPE a [<!ENTITY b "c">]><a xmlns:d="urn:ddim-cli:"><d:picture>&b;</d:picture></a>',
        b"<a" * 1000,
    ],
)
def test_xmp_of_others_is_none_of_ours(xmp):
    for name, more in (("WEBP", {"xmp": xmp}), ("JPEG", {"extra": embedded._segment(embedded._XMP + xmp)})):
        buffer = io.BytesIO()
        to_image(pixels(3)).save(buffer, name, **more)
        assert text_inside(plain(buffer.getvalue())) is None
        assert parameters_inside(plain(buffer.getvalue())) is None


def test_what_has_no_room_is_refused():
    with pytest.raises(ConfigError, match="JPEG has no transparency"):
        Encoding("jpg").check((4, 8, 8))
    with pytest.raises(ConfigError, match="has room for 16,383 pixels a side, and these pictures have 20,000"):
        Encoding("webp").check((3, 8, 20_000))
    for encoding in (Encoding(), Encoding("webp")):
        encoding.check((4, 8, 8))
    Encoding("jpg").check((3, 20_000, 8))
    Encoding().check((3, 65_536, 8))


def test_quality_bears_on_jpeg_alone():
    assert Encoding("webp", 50) == Encoding("webp", 60)
    assert Encoding("jpg", 50) != Encoding("jpg", 60)
    assert [Encoding(name, 80).suffix for name in FORMATS] == ["", "-webp", "-jpg80"]
    for encoding in (Encoding(), Encoding("webp"), Encoding("jpg", 7)):
        assert Encoding.told_by({"output": encoding.settings}) == encoding
        assert Encoding.told_by({"image": {"file": f"a{encoding.ending}", **encoding.about}}) == encoding
    # What nobody has written says nothing.
    for record in ({}, {"output": 3}, {"output": {"image_format": [], "quality": "x"}}, {"image": {"file": 7}}):
        assert Encoding.told_by(record) == Encoding()
