"""What every command that makes pictures can do: a dry run, shards, a resume, half batches, replay, torchrun."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from ddim_cli.outputs.picture import read_pixels
from ddim_cli.sampling import executor
from ddim_cli.sampling.loop import Stepper

DIGITS = Path(__file__).parent.parent / "data" / "digits"
LATENTS = Path(__file__).parent.parent / "data" / "half"
ROWS = Path(__file__).parent.parent / "data" / "rows.csv"
PLAIN = ("--steps", 3, "--no-compile", "-b", 2)
# Stands for the directory of a text-to-image model.
TEXT = object()
# Each with the number of its pictures, a file that it makes last, and one that can be replayed.
COMMANDS = {
    "sample": (("sample", "-n", 5), 5, "grid.png", "000003.json"),
    "sample of order 2": (("sample", "-n", 5, "--order", 2, "--eta", 0.5), 5, "grid.png",
                          "000003.json"),
    "latents": (("sample", "--latents", LATENTS / "0.latent.safetensors", LATENTS / "1.latent.safetensors"), 2,
                "grid.png", "1.latent.json"),
    "items": (("sample", "--items", ROWS), 5, "grid.png", "three.json"),
    "interpolate": (("interpolate", "--between", "3,8", "--frames", 5), 5, "strip.png", "frame_003.json"),
    "interpolate --gif": (("interpolate", "--between", "3,8", "--frames", 3, "--gif"), 3, "strip.gif", "frame_001.png"),
    "prompts": (("interpolate", "-m", TEXT, "--prompt", "a", "--to-prompt", "b c", "--seed", 4, "--eta", 0.5,
                 "--frames", 5), 5, "strip.png", "frame_003.json"),
    "trajectory": (("trajectory", "--seeds", "0-4"), 5, None, "000003.x0.png"),
    "trajectory xt": (("trajectory", "--seeds", "2,9", "--show", "xt", "--eta", 1), 2, None, "000009.xt.png"),
    "invert": (("invert", *(DIGITS / f"{i}.png" for i in range(3))), 3, "inverted.png", "1.recon.json"),
    "invert refined": (("invert", *(DIGITS / f"{i}.png" for i in range(3)), "--refine", 2), 3, "inverted.png",
                       "1.recon.json"),
    "invert text": (("invert", "-m", TEXT, "--prompt", "a", *(DIGITS / f"{i}.png" for i in range(3))), 3,
                    "inverted.png", "1.recon.json"),
    "mask": (("sample", "-n", 5, "--init", DIGITS / "3.png", "--mask", DIGITS / "4.png", "--eta", 0.5,
              "--variation-seed", 9, "--variation-strength", 0.2), 5, "grid.png", "000003.json"),
    "inverted edits": (("edit", "-m", TEXT, DIGITS / "3.png", DIGITS / "4.png", "--from", "a", "--to", "b", "--refine",
                        1), 4, "edited.png", "3.b-7.5.edit.json"),
    "inverted frames": (("interpolate", "--between", f"{DIGITS / '3.png'},{DIGITS / '4.png'}", "--frames", 3), 3,
                        "strip.png", "frame_001.json"),
}  # fmt: skip
# One of each kind; the others are beside the slow tests, and so is all but one of what takes processes of its own.
OFTEN = ("sample", "items", "interpolate", "trajectory", "invert", "prompts")


def of_commands(*often):
    """Parametrized by all commands, those that are not named slow."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in often else pytest.mark.slow) for name in COMMANDS]
    )


every, every_slowly = of_commands(*OFTEN), of_commands("sample")


# Pictures of processes of their own are compared with those made here.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def ddim(ddim, tiny_text_model):
    return lambda *args: ddim(*(tiny_text_model if arg is TEXT else arg for arg in args))


@pytest.fixture
def start(start, tiny_text_model):
    return lambda *args, **more: start(*(tiny_text_model if arg is TEXT else arg for arg in args), **more)


def run(ddim, name, *more, out="out"):
    command, *_ = COMMANDS[name]
    result = ddim(*command, *PLAIN, "-o", out, "--json", *more)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def files(folder):
    """The pictures and latents of a folder, by name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".png", ".gif", ".safetensors")}


@every
def test_a_dry_run_writes_nothing(ddim, name, tmp_path):
    _, count, *_ = COMMANDS[name]
    plan = run(ddim, name, "--dry-run")
    grid = [667, 334, 1] if TEXT in COMMANDS[name][0] else [666, 333, 0]
    assert (plan["images"], plan["present"], len(plan["files"]), plan["timesteps"]) == (count, 0, count, grid)
    assert not (tmp_path / "out").exists()
    run(ddim, name)
    plan = run(ddim, name, "--dry-run")
    assert (plan["present"], plan["files"]) == (count, [])


@every
def test_two_shards_are_one_run(ddim, name, tmp_path):
    _, count, last, _ = COMMANDS[name]
    run(ddim, name, out="whole")
    first = run(ddim, name, "--shard", "0/2")
    assert (first["made"], first["left"]) == (-(-count // 2), count // 2) or name == "sample"
    assert last is None or not (tmp_path / "out" / last).exists()
    second = run(ddim, name, "--shard", "1/2")
    assert (first["made"] + second["made"], second["left"]) == (count, 0)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@every
def test_a_run_that_is_interrupted_goes_on(ddim, name, tmp_path, monkeypatch):
    _, count, last, _ = COMMANDS[name]
    run(ddim, name, out="whole")
    whole, steps, of_a_batch = Stepper.step, [], 6 if "invert" in name else 3

    def interrupted(self, noise):
        steps.append(noise)
        # In the second batch, or where there is one alone, in that.
        if len(steps) == (of_a_batch + 2 if count > 2 else 2):
            raise KeyboardInterrupt
        return whole(self, noise)

    monkeypatch.setattr(Stepper, "step", interrupted)
    command, *_ = COMMANDS[name]
    stopped = ddim(*command, *PLAIN, "-o", "out", "--json")
    monkeypatch.setattr(Stepper, "step", whole)
    assert stopped.exit_code == 130
    assert json.loads(stopped.stdout)["exit_code"] == 130
    assert "the same command goes on from there" in stopped.stderr
    assert last is None or not (tmp_path / "out" / last).exists()
    again = run(ddim, name)
    assert again["made"] + again["present"] == count
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    done = run(ddim, name)
    assert (done["made"], done["present"]) == (0, count)


# A process that kills itself in the middle of its second batch, or of its only one.
SUICIDE = """
import os, signal
from ddim_cli.sampling.loop import Stepper
whole, steps = Stepper.step, []
def step(self, noise):
    steps.append(noise)
    if len(steps) == {last}:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, noise)
Stepper.step = step
"""


@every_slowly
def test_a_run_that_is_killed_goes_on(ddim, start, name, tmp_path):
    command, count, *_ = COMMANDS[name]
    run(ddim, name, out="whole")
    last = (8 if "invert" in name else 5) if count > 2 else 2
    killed = start(*command, *PLAIN, "-o", "out", before=SUICIDE.format(last=last))
    assert killed.wait() == -signal.SIGKILL
    again = run(ddim, name)
    assert again["made"] + again["present"] == count
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*"))


@every
def test_want_of_memory_halves_the_batches(ddim, name, tmp_path, monkeypatch):
    """The allocator fails for more than one row."""
    run(ddim, name, out="whole")

    class Greedy(Stepper):
        def __init__(self, sampler, of, rows, *rest):
            if rows > 1:
                raise torch.OutOfMemoryError("tried to allocate 1 GiB")
            super().__init__(sampler, of, rows, *rest)

    monkeypatch.setattr("ddim_cli.sampling.loop.Stepper", Greedy)
    command, count, *_ = COMMANDS[name]
    result = ddim(*command, *PLAIN, "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("out of memory; going on with batches of 1") == 1
    assert run(ddim, name)["present"] == count
    assert files(tmp_path / "out").keys() == files(tmp_path / "whole").keys()


@every
def test_no_memory_for_one_ends_the_run(ddim, name, monkeypatch):
    def greedy(self, *args):
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    monkeypatch.setattr(Stepper, "step", greedy)
    command, *_ = COMMANDS[name]
    result = ddim(*command, *PLAIN, "-o", "out")
    assert result.exit_code == 1
    assert "out of memory on cpu, even for a single image" in result.stderr


@every
def test_one_picture_is_replayed(ddim, name, tmp_path):
    *_, one = COMMANDS[name]
    run(ddim, name)
    more = ("--latents", LATENTS) if name == "latents" else ()
    found = ddim("replay", f"out/{one}", "--check", *more)
    assert (found.exit_code, "1 with equal hashes" in found.stdout) == (0, True), found.stdout + found.stderr
    assert ddim("replay", f"out/{one}", "-o", "again", *more).exit_code == 0
    pictures = (tmp_path.joinpath(folder, one).with_suffix(".png") for folder in ("out", "again"))
    assert np.array_equal(*map(read_pixels, pictures))


@every
def test_a_replay_that_differs_is_seen(ddim, name, tmp_path, monkeypatch):
    *_, one = COMMANDS[name]
    run(ddim, name)
    whole = executor.make_sampler

    def other(*args, **more):
        from dataclasses import replace

        def weaker(of):
            return replace(of, network=lambda *given: of.network(*given) * 0.9)

        sampler = whole(*args, **more)
        return replace(sampler, down=weaker(sampler.down), passes=lambda *asked: weaker(sampler.passes(*asked)))

    monkeypatch.setattr(executor, "make_sampler", other)
    more = ("--latents", LATENTS) if name == "latents" else ()
    assert ddim("replay", f"out/{one}", "--check", *more).exit_code == 3


@every
def test_overwrite_makes_all_anew(ddim, name, tmp_path):
    _, count, *_ = COMMANDS[name]
    run(ddim, name)
    before = files(tmp_path / "out")
    command, *_ = COMMANDS[name]
    again = json.loads(ddim(*command, *PLAIN, "-o", "out", "--json", "--overwrite").stdout)
    assert (again["made"], again["present"]) == (count, 0)
    assert files(tmp_path / "out") == before


@every_slowly
def test_under_torchrun_each_rank_is_a_shard(ddim, name, tmp_path, monkeypatch):
    _, count, last, _ = COMMANDS[name]
    for variable, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    command, *_ = COMMANDS[name]
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        result = ddim(*command, *PLAIN, "-o", "out", "--json")
        assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["made"], told["present"], told["left"]) == (-(-count // 2), 0, 0)
    assert last is None or (tmp_path / "out" / last).exists()


def test_a_latent_that_has_changed_is_not_taken(ddim, tmp_path):
    run(ddim, "invert")
    shutil.copy(tmp_path / "out" / "0.latent.safetensors", tmp_path / "out" / "1.latent.safetensors")
    refused = ddim("replay", "out/1.recon.json", "--check")
    assert refused.exit_code == 2
    assert "1.latent.safetensors, is not in out as it was then" in refused.stderr
