"""`ddim_cli.Sampler`: pictures of the rows of batches."""

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from ddim_cli import Sampler
from ddim_cli.errors import ConfigError, ModelError, UsageError
from ddim_cli.outputs.sidecar import of_the_picture
from ddim_cli.sampling import opened

SETTINGS = {"sampling": {"steps": 2, "eta": 0.5, "batch_size": 4}}


@pytest.fixture
def sampler(tiny_model):
    return Sampler(SETTINGS, tiny_model)


def joined(parts):
    return {key: np.concatenate([np.asarray(part[key]) for part in parts]) for key in parts[0]}


def part(batch, *numbers):
    return {key: np.asarray(column)[list(numbers)] for key, column in batch.items()}


def check_same_as_the_command(made, names, folder):
    """To the bit, with what the sidecars say but for the files."""
    for number, name in enumerate(names):
        picture = np.asarray(Image.open(folder / f"{name}.png"))
        assert np.array_equal(made["image"][number].reshape(picture.shape), picture), name
        told = of_the_picture(json.loads((folder / f"{name}.json").read_text()))
        assert json.loads(made["record"][number]) == told, name
        assert made["pixels_sha256"][number] == told["image"]["pixels_sha256"]


def test_a_batch_comes_back_as_the_command_makes_it(ddim, sampler, tiny_model, tmp_path):
    """In its order, with what else is in it, the seeds of names among them."""
    save_file({"latent": np.full((3, 8, 8), 0.5, np.float32)}, tmp_path / "half.safetensors")
    rows = [
        {"name": "a", "seed": 7},
        {"name": "b"},
        {"name": "c", "seed": 5, "latent": "half.safetensors"},
        {"name": "d", "seed": 2**63 - 1},
        {"name": "e", "seed": 0},
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("sample", "--items", "jobs.jsonl", "-m", tiny_model, "--steps", 2, "--eta", 0.5, "-b", 4, "-o", "out")
    assert ddim(*command).exit_code == 0
    batch = {key: [row.get(key) for row in rows] for key in ("name", "seed", "latent")}
    batch["weights"] = np.arange(15.0).reshape(5, 3)
    made = sampler(batch)
    assert list(made) == ["name", "seed", "latent", "weights", "image", "record", "pixels_sha256"]
    assert all(made[key] is batch[key] for key in batch)
    assert (made["image"].dtype, made["image"].shape) == (np.uint8, (5, 8, 8, 3))
    check_same_as_the_command(made, "abcde", tmp_path / "out")


def test_what_lies_beside_a_row_changes_no_bit_of_it(sampler, monkeypatch):
    """Nor does the network ever see another number of rows."""
    batch = {"seed": np.arange(11), "name": [f"row {n}" for n in range(11)]}
    batch["seed"] = [None if seed % 3 == 0 else seed for seed in batch["seed"]]
    seen = []
    launch = opened.Denoiser.launch

    def counted(self, items, rows, *more):
        seen.append(rows)
        return launch(self, items, rows, *more)

    monkeypatch.setattr(opened.Denoiser, "launch", counted)
    whole = sampler(batch)
    for cuts in ([[n] for n in range(11)], [range(3), range(3, 11)], [range(10, 4, -1), [0], [4, 3, 2, 1]]):
        found = joined([sampler(part(batch, *cut)) for cut in cuts])
        order = [n for cut in cuts for n in cut]
        for key in ("image", "record", "pixels_sha256", "name"):
            assert np.array_equal(found[key], np.asarray(whole[key])[order]), key
    assert set(seen) == {4}


def test_rows_that_begin_from_pictures_keep_their_order(ddim, tiny_model, tmp_path):
    """They are sampled by where they begin, and come back as they came."""
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(tmp_path / "i.png")
    rows = [
        {"name": f"r{n}", "seed": n, **({"init": "i.png", "strength": 0.5 + n / 20} if n % 2 else {})} for n in range(9)
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("sample", "--items", "jobs.jsonl", "-m", tiny_model, "--steps", 10, "-b", 2, "-o", "out")
    assert ddim(*command).exit_code == 0
    strengths = np.array([row.get("strength", np.nan) for row in rows], np.float32)
    batch = {key: [row.get(key, "") for row in rows] for key in ("seed", "init")} | {"strength": strengths}
    made = Sampler({"sampling": {"steps": 10, "batch_size": 2}}, tiny_model)(batch)
    check_same_as_the_command(made, [row["name"] for row in rows], tmp_path / "out")


def test_prompts(ddim, tiny_text_model, tmp_path):
    rows = [
        {"name": "a", "seed": 1, "prompt": "ab", "negative_prompt": "c"},
        {"name": "b", "seed": 2, "prompt": "x"},
        {"name": "c", "seed": 3},
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--steps", 2, "--guidance-scale", 3, "--prompt", "dd", "-b", 2, "-o", "out")
    assert ddim("sample", "--items", "jobs.jsonl", "-m", tiny_text_model, *flags).exit_code == 0
    config = {"sampling": {"steps": 2, "guidance_scale": 3.0, "prompt": "dd", "batch_size": 2}}
    batch = {key: [row.get(key) for row in rows] for key in ("seed", "prompt", "negative_prompt")}
    made = Sampler(config, tiny_text_model)(batch)
    check_same_as_the_command(made, "abc", tmp_path / "out")


def test_a_latent_that_is_handed_over(sampler, tiny_model, tmp_path):
    """It is the start, as one of a file would be, and its hash is recorded; replay finds it in a file by that."""
    values = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
    save_file({"latent": values[1].astype(np.float32)}, tmp_path / "second.safetensors")
    made = sampler({"seed": [4, 4, 4], "latent": [values[0], values[1].tolist(), str(tmp_path / "second.safetensors")]})
    assert np.array_equal(made["image"][1], made["image"][2])
    assert not np.array_equal(made["image"][0], made["image"][1])
    given, read = (json.loads(record)["sampling"]["latent"] for record in made["record"][1:])
    assert given == {"sha256": read["sha256"]}
    assert read["file"] == "second.safetensors"


def test_replay_of_a_latent_that_was_handed_over(ddim, sampler, tmp_path):
    values = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    made = sampler({"seed": [4], "latent": values})
    (tmp_path / "mine.json").write_text(made["record"][0])
    refused = ddim("replay", "mine.json", "-o", "again")
    assert (refused.exit_code, "say where it is with --latents" in refused.stderr) == (2, True)
    save_file({"latent": values[0]}, tmp_path / "kept.safetensors")
    done = ddim("replay", "mine.json", "--latents", "kept.safetensors", "-o", "again")
    assert done.exit_code == 0, done.stderr
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / "mine.png")), made["image"][0])


def test_it_is_sent_as_settings_alone(tiny_model, tmp_path, monkeypatch):
    """Before and after it was used; a config file is read where it is made, and its sweep stays behind."""
    file = tmp_path / "run.toml"
    file.write_text(
        f'[model]\nsource = "{tiny_model}"\n[sampling]\nsteps = 2\nbatch_size = 4\n[sweep]\nsteps = [1, 2]\n'
    )
    first = Sampler(file)
    sent = pickle.dumps(first)
    assert len(sent) < 2000
    file.unlink()
    batch = {"seed": [1, 2]}
    made = first(batch)
    assert pickle.dumps(first) == sent
    assert np.array_equal(pickle.loads(sent)(batch)["record"], made["record"])


def test_torch_waits_for_the_first_batch(tiny_model):
    code = f"""
import pickle, sys
from ddim_cli import Sampler
sampler = pickle.loads(pickle.dumps(Sampler({{"sampling": {{"steps": 2}}}}, {str(tiny_model)!r})))
assert "torch" not in sys.modules and "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_network_is_loaded_once(sampler, monkeypatch):
    from ddim_cli.sampling import network

    loads = []
    load = network.load_sampling_network
    monkeypatch.setattr(network, "load_sampling_network", lambda *which: loads.append(which) or load(*which))
    for seed in range(3):
        sampler({"seed": [seed]})
    assert len(loads) == 1


def test_empty_batches(tiny_model):
    """Engines ask with them what columns there will be; no network is needed for that."""
    for batch in ({"seed": np.empty(0, np.int64), "x": []}, {}):
        made = Sampler(SETTINGS, tiny_model)(batch)
        assert (made["image"].shape, made["image"].dtype) == ((0, 8, 8, 3), np.uint8)
        assert list(made)[-3:] == ["image", "record", "pixels_sha256"]
        assert len(made["record"]) == 0


def test_auto_is_one_size_for_all_batches(tiny_model):
    """64 rows here, whatever comes; a number is taken as it is."""
    sampler = Sampler({"sampling": {"steps": 1}}, tiny_model)
    records = [sampler({"seed": range(count)})["record"][0] for count in (1, 70)]
    assert [json.loads(record)["runtime"]["batch_size"] for record in records] == [64, 64]
    large = Sampler({"sampling": {"steps": 1, "batch_size": 100}}, tiny_model)({"seed": [0]})["record"][0]
    assert json.loads(large)["runtime"]["batch_size"] == 100


def test_memory_that_does_not_suffice_is_met_once(sampler, monkeypatch):
    asked = []
    launch = opened.Denoiser.launch

    def tight(self, items, rows, *more):
        asked.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("out of memory")
        return launch(self, items, rows, *more)

    monkeypatch.setattr(opened.Denoiser, "launch", tight)
    records = [json.loads(sampler({"seed": [1, 2, 3]})["record"][0]) for _ in range(2)]
    assert asked == [4, 2, 2, 2, 2]
    assert [record["runtime"]["batch_size"] for record in records] == [2, 2]


def test_a_warning_comes_once(tiny_text_model):
    sampler = Sampler({"sampling": {"steps": 2, "batch_size": 2, "guidance_scale": 1.0}}, tiny_text_model)
    with pytest.warns(UserWarning, match="a negative prompt has no effect"):
        sampler({"seed": [1], "prompt": ["a"], "negative_prompt": ["b"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler({"seed": [1, 2], "prompt": ["a", "c"], "negative_prompt": [None, "b"]})


@pytest.mark.parametrize(
    ("batch", "error", "says"),
    [
        ({"x": [1]}, UsageError, r"batch\[0\]: has no seed, and neither a name to have one by nor a latent"),
        ({"seed": [1], "image": [0]}, UsageError, "has a column image, where what is made is to go"),
        ({"seed": [1, -1]}, ConfigError, r"batch\[1\]: seed = -1 is not from 0"),
        ({"seed": [1.5]}, ConfigError, r"batch\[0\]: seed = 1.5 is no integer"),
        ({"seed": [1], "prompt": ["a"]}, ConfigError, r"batch\[0\]: prompt is for text-to-image models"),
        ({"seed": [1], "class": [0]}, ConfigError, r"batch\[0\]: has a class, and tiny is not class-conditional"),
        ({"seed": [1], "prompt": [b"a"]}, UsageError, r"batch\[0\]: 'bytes' object"),
        (
            {"seed": [1], "latent": np.zeros((1, 3, 9, 8))},
            ConfigError,
            r"its latent is 3 x 9 x 8 .*tiny takes 3 x 8 x 8",
        ),
        ({"seed": [1], "latent": np.full((1, 3, 8, 8), np.inf)}, ConfigError, "values that are not finite"),
        ({"latent": np.zeros((1, 3, 8, 8))}, ConfigError, "has a latent and no seed, and the noise of each step"),
        ({"seed": [1], "latent": ["no.safetensors"]}, ConfigError, "no such file"),
    ],
)
def test_rows_that_are_refused(sampler, batch, error, says):
    with pytest.raises(error, match=says) as caught:
        sampler(batch)
    # Engines carry errors from one process to another.
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_settings_that_are_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"unknown key sampling.step; did you mean sampling.steps"):
        Sampler({"sampling": {"step": 3}})
    with pytest.raises(UsageError, match="config is a list"):
        Sampler([1])
    with pytest.raises(UsageError, match="model is a function; it must be a source"):
        Sampler(None, lambda x, t: x)
    with pytest.raises(ModelError, match="not found"):
        Sampler({}, "nothing")({"seed": [1]})


def test_a_setting_that_no_row_of_a_batch_has_a_use_for_is_no_mistake(tiny_model, tmp_path):
    """Another batch may have such rows: what is refused does not hang on how rows were cut."""
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(tmp_path / "i.png")
    Image.fromarray(np.repeat(np.uint8([0, 255]), 32).reshape(8, 8)).save(tmp_path / "m.png")
    config = {"sampling": {"steps": 15, "batch_size": 2, "resample": 2, "strength": 0.9}}
    sampler = Sampler(config, tiny_model)
    init, mask = str(tmp_path / "i.png"), str(tmp_path / "m.png")
    whole = sampler({"seed": [1, 2, 3], "init": [None, init, init], "mask": [None, mask, None]})
    parts = [sampler({"seed": [1]}), sampler({"seed": [2], "init": [init], "mask": [mask]})]
    parts.append(sampler({"seed": [3], "init": [init]}))
    assert np.array_equal(np.concatenate([each["record"] for each in parts]), whole["record"])
    assert json.loads(whole["record"][1])["sampling"]["mask"]["file"] == "m.png"
