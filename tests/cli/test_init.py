"""``ddim sample --init`` with what does not fit: each refused in a sentence, or done and said."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, (8, 8, 4), dtype=np.uint8)


def cut(image, kind):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()[: len(stream.getvalue()) // 2]


def bomb(png):
    """The PNG with a header that says 20000 x 20000."""
    data = bytearray(png)
    data[16:24] = struct.pack(">II", 20000, 20000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.fixture(autouse=True)
def files(tmp_path):
    image = Image.fromarray(NOISE[..., :3])
    image.save(tmp_path / "p.png")
    Image.fromarray(NOISE).save(tmp_path / "alpha.png")
    large = image.resize((80, 64), Image.Resampling.NEAREST)
    large.save(tmp_path / "large.png")
    image.save(tmp_path / "two.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    Image.fromarray(RANDOM.integers(0, 65536, (8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    for name, size, value in (("m", (8, 8), 255), ("small", (4, 2), 255), ("black", (8, 8), 0)):
        Image.new("L", size, value).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(cut(large, "JPEG"))
    (tmp_path / "cut.png").write_bytes(cut(large, "PNG"))
    (tmp_path / "bomb.png").write_bytes(bomb((tmp_path / "p.png").read_bytes()))
    (tmp_path / "run.toml").write_text('[sampling]\ninit = "p.png"\n')
    save_file({"latent": torch.zeros(3, 8, 8)}, tmp_path / "l.safetensors")


@pytest.fixture
def tiny(ddim, tiny_model):
    return lambda *args: ddim("sample", "-m", tiny_model, "-n", 1, "--steps", 10, "--no-compile", "-o", "out", *args)


def refused(result, told, tmp_path):
    """In one sentence, with nothing made."""
    assert (result.exit_code, result.stderr.count("error: ")) == (2, 1), result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert told in result.stderr
    assert not (tmp_path / "out").exists()


P = ("--init", "p.png")
NOT_ALLOWED = "is not allowed; it takes a number above 0 and of at most 1"
UNREADABLE = "cannot be read as a picture: it is none, or is damaged or cut off"
BROKEN, STRENGTHS = ("text.png", "empty.png", "cut.jpg", "cut.png", "."), ("0.0", "1.5", "-1.0", "NaN")
WRONG = {
    "all black": (
        (*P, "--mask", "black.png"),
        "black.png: the mask is black everywhere, so nothing would be made anew",
    ),
    **{
        f"strength {x}": ((*P, "--strength", x), f"--strength: sampling.strength = {x} {NOT_ALLOWED}")
        for x in STRENGTHS
    },
    "no step left": (
        (*P, "--strength", 0.001),
        "sampling.strength = 0.001 leaves none of the 10 steps of the grid; use 0.1 or more, or more steps",
    ),
    "too few for the order": (
        (*P, "--strength", 0.1, "--order", 2),
        "leaves 1 of the 10 steps of the grid, and sampling.order = 2 needs 2; use 0.2 or more, or more steps",
    ),
    "mask alone": (("--mask", "m.png"), "sampling.mask says what of a picture is made anew; name the picture"),
    "strength alone": (("--strength", 0.5), "sampling.strength says how much a picture may change; name the picture"),
    "resample alone": ((*P, "--resample", 3), "sampling.resample = 3 joins what is made anew to what is kept"),
    "resample and order": (
        (*P, "--mask", "m.png", "--resample", 3, "--order", 2),
        "sampling.resample is for order 1, and sampling.order = 2",
    ),
    "towards no seed": (("--variation-strength", 0.5), "name it with sampling.variation_seed"),
    "too far": (("--variation-seed", 1, "--variation-strength", 2), "sampling.variation_strength = 2.0 is not allowed"),
    "missing": (("--init", "none.png"), "none.png: no such file"),
    "missing mask": ((*P, "--mask", "none.png"), "none.png: no such file"),
    **{name: (("--init", name), f"{name}: {UNREADABLE}") for name in BROKEN},
    "mask of text": ((*P, "--mask", "text.png"), f"text.png: {UNREADABLE}"),
    "bomb": (("--init", "bomb.png"), "bomb.png: has more than 178,956,970 pixels, which may be a trap"),
    "bomb as mask": ((*P, "--mask", "bomb.png"), "bomb.png: has more than 178,956,970 pixels, which may be a trap"),
    "no classes": ((*P, "--classes", 3), "sampling.classes = '3', but tiny is not class-conditional"),
    "no text": ((*P, "--prompt", "x"), "sampling.prompt is for text-to-image models"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_is_refused_in_a_sentence(tiny, tmp_path, kind):
    args, told = WRONG[kind]
    refused(tiny(*args), told, tmp_path)


def test_a_picture_with_more_pixels_than_pillow_opens(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    refused(tiny(*P), "p.png: has more than 62 pixels, which may be a trap; make it smaller first", tmp_path)
    # Half as many are large, and no trap.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    result = tiny(*P, "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_class_that_the_model_has_not(ddim, tmp_path):
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, num_class_embeds=4, **blocks)
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "four")
    command = ("sample", "-m", "four", *P, "-n", 1, "--steps", 2, "-o", "out")
    refused(ddim(*command, "--classes", 4), "sampling.classes: four has no class 4; it has 0-3", tmp_path)
    refused(ddim(*command), "four is class-conditional; say which of the classes 0-3 with --classes", tmp_path)
    assert ddim(*command, "--classes", 3).exit_code == 0


@pytest.mark.parametrize("key", ["init", "variation-seed"])
def test_latents_say_themselves_what_pictures_begin_from(ddim, tiny_model, tmp_path, key):
    value = "p.png" if key == "init" else 1
    result = ddim("sample", "-m", tiny_model, "--latents", "l.safetensors", "-o", "out", f"--{key}", value)
    name = key.replace("-", "_")
    refused(result, f"sampling.{name} says what pictures begin from, and --latents says so too; keep one", tmp_path)


def test_an_inversion_does_not_begin_from_another_picture(ddim, tiny_model, tmp_path):
    result = ddim("invert", "large.png", "-m", tiny_model, "-c", "run.toml", "-o", "out")
    told = "sampling.init says what pictures begin from, and an inversion begins from the picture itself"
    refused(result, f"{told} (sampling.init: run.toml:2)", tmp_path)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((*P, "--mask", "small.png"), "small.png: resized from 4 x 2 to 8 x 8"),
        (("--init", "two.gif"), "two.gif: the first of 2 frames, a palette to RGB"),
        (("--init", "deep.png"), "deep.png: 16-bit grey"),
        (("--init", "alpha.png"), "alpha.png: alpha composited on white"),
        (
            ("--init", "large.png"),
            "large.png: cropped in the middle from 80 x 64 to 64 x 64, resized from 64 x 64 to 8 x 8",
        ),
    ],
    ids=str,
)
def test_what_is_done_to_a_picture_is_said(tiny, tmp_path, args, said):
    result = tiny(*args, "--json")
    assert (result.exit_code, json.loads(result.stdout)["made"]) == (0, 1), result.stderr
    assert result.stderr.splitlines()[0] == said
    facts = json.loads((tmp_path / "out" / "000000.json").read_text())["sampling"]
    facts = facts["mask" if "--mask" in args else "init"]
    assert f"{facts['file']}: {', '.join(facts['conversion'])}" == said
    assert tiny(*args, "-q").stderr == ""


def test_a_picture_that_fits_is_passed_over(tiny):
    assert tiny(*P, "--dry-run").stderr == ""
