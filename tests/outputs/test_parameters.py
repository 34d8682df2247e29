"""The text ``parameters`` in PNGs of prompts: what other image tools read of how a picture was made."""

import json
import re

import pytest
from PIL import Image

from ddim_cli.outputs.parameters import parameters_text

# Generation parameters end in a line of pairs; a value in quotes is a JSON text.
PAIR = re.compile(r'\s*([\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
PLAIN = ("--steps", 3, "--no-compile", "-o", "out")


def described(seed=3, runtime=None, image=(64, 48), **sampling):
    return {
        "schema": "ddim-cli/sidecar/1",
        "image": {"width": image[0], "height": image[1]},
        "seed": seed,
        "sampling": {"steps": 3, "timesteps": [667, 334, 1], "eta": 0.0, **sampling},
        "model": {"source": "models/mini.safetensors", "sha256": "0123456789abcdef"},
        "runtime": runtime or {"versions": {"ddim_cli": "1.2.3"}},
    }


def read(text):
    """Prompt, negative prompt and pairs, as those tools tell them apart."""
    *lines, last = text.split("\n")
    at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[at:]).removeprefix("Negative prompt:").strip()
    pairs = {key: json.loads(value) if value.startswith('"') else value for key, value in PAIR.findall(last)}
    return "\n".join(lines[:at]), negative, pairs


def test_the_text_of_a_prompt():
    text = parameters_text(described(prompt="a seven,\nbold", negative_prompt="thin", guidance_scale=7.5))
    assert text == (
        "a seven,\nbold\nNegative prompt: thin\nSteps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: 3, Size: 64x48, "
        "Model hash: 0123456789, Model: mini, RNG: CPU, Version: ddim-cli 1.2.3"
    )
    assert read(text)[:2] == ("a seven,\nbold", "thin")


def test_a_class_or_a_plain_picture_has_none():
    assert parameters_text(described()) is None
    assert parameters_text(described(**{"class": 3})) is None


def test_what_is_not_there_is_left_out():
    record = described(seed=None, prompt="", eta=0.25, runtime={"dtype": "float32"})
    record["model"] = {"source": None, "sha256": None}
    prompt, negative, pairs = read(parameters_text(record))
    assert (prompt, negative) == ("", "")
    assert pairs == {"Steps": "3", "Sampler": "DDIM", "CFG scale": "1", "Size": "64x48", "Eta DDIM": "0.25"}


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        ({}, "DDIM"),
        ({"order": 2}, "DPM++ 2M"),
        ({"order": 3}, "DPM++ 3M"),
        ({"order": 2, "eta": 0.5}, "DPM++ 2M SDE"),
    ],
)
def test_a_solver_has_the_name_that_those_tools_know(sampling, name):
    pairs = read(parameters_text(described(prompt="a", **sampling)))[2]
    assert pairs["Sampler"] == name
    assert pairs.get("Eta") == ("0.5" if "eta" in sampling else None)
    assert "Eta DDIM" not in pairs


def test_signs_between_the_pairs_are_quoted():
    record = described(prompt="x")
    record["model"]["source"] = 'hub/a, "b": c'
    assert read(parameters_text(record))[2]["Model"] == 'a, "b": c'


@pytest.mark.parametrize(("weight", "prompt"), [(0.0, "a"), (1.0, "b"), (0.25, "between a and b, at 0.25")])
def test_a_frame_between_prompts(weight, prompt):
    text = parameters_text(described(between_prompts={"prompts": ["a", "b"], "weight": weight}))
    assert read(text)[0] == prompt


@pytest.mark.parametrize("prompt", ["a café", "ein 数字 семь ☃"])
def test_pngs_have_it_in_any_script(ddim, tiny_text_model, tmp_path, prompt):
    command = ("sample", "-m", tiny_text_model, "--prompt", prompt, "--negative-prompt", "thin", "-n", 2, *PLAIN)
    assert ddim(*command).exit_code == 0
    first = (tmp_path / "out" / "000001.png").read_bytes()
    # tEXt is Latin-1; what does not fit in there is iTXt.
    chunk = b"tEXtparameters\0" if prompt.isascii() or "é" in prompt else b"iTXtparameters\0"
    assert chunk in first
    with Image.open(tmp_path / "out" / "000001.png") as image:
        found, negative, pairs = read(image.info["parameters"])
    assert (found, negative) == (prompt, "thin")
    assert (pairs["Seed"], pairs["Size"], pairs["CFG scale"], pairs["Steps"]) == ("1", "64x64", "7.5", "3")
    assert pairs["Model"] == "tiny-text"
    sidecar = json.loads((tmp_path / "out" / "000001.json").read_text())
    assert sidecar["model"]["sha256"].startswith(pairs["Model hash"])
    assert ddim(*command, "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "000001.png").read_bytes() == first
    assert ddim("verify", "out").exit_code == 0


def test_it_can_be_turned_off_and_decides_nothing(ddim, tiny_text_model, tmp_path):
    command = ("sample", "-m", tiny_text_model, "--prompt", "seven", *PLAIN)
    assert ddim(*command, "-n", 1, "--no-parameters").exit_code == 0
    with Image.open(tmp_path / "out" / "000000.png") as image:
        assert set(image.info) == {"ddim"}
    # The same folder, and the picture that is there stays.
    told = json.loads(ddim(*command, "-n", 2, "--json").stdout)
    assert (told["made"], told["present"]) == (1, 1)
    with Image.open(tmp_path / "out" / "000001.png") as image:
        assert set(image.info) == {"ddim", "parameters"}
    assert ddim("verify", "out").exit_code == 0
    assert ddim("replay", "out/000000.json", "out/000001.png", "--check").exit_code == 0


def test_pictures_of_other_models_have_none(ddim, tiny_model, tmp_path):
    assert ddim("sample", "-m", tiny_model, "-n", 1, *PLAIN).exit_code == 0
    with Image.open(tmp_path / "out" / "000000.png") as image:
        assert set(image.info) == {"ddim"}
