"""``ddim sample --items``: the rows of a job file."""

import csv
import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ddim_cli import sample

STEPS = ("--steps", 2, "--no-compile", "--guidance-scale", 3)


def rows(count, **more):
    return [{"name": f"row {i}", "seed": 100 + i, "prompt": "abcdefghijkl"[i:], **more} for i in range(count)]


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def pixels(folder):
    left_out = ("grid.png",)
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in folder.glob("*.png") if p.name not in left_out}


def sidecar(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def made(result):
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    return told["made"], told["present"], told["left"]


@pytest.fixture
def job(ddim, tiny_text_model, tmp_path):
    """Run a job file of the text model into ``out``; the result as `ddim` has it."""

    def run(items, *more, out="out", file="jobs.jsonl"):
        write(tmp_path / file, items)
        return ddim("sample", "--items", file, "-m", tiny_text_model, *STEPS, "-o", out, "--json", *more)

    return run


# Pictures of processes of their own are compared with those made here.
pytestmark = pytest.mark.usefixtures("one_thread")


# Kills itself in the second batch of four, in its last step.
SUICIDE = """
import os, signal
from ddim_cli.sampling.loop import Stepper
whole, steps = Stepper.step, []
def step(self, noise):
    steps.append(noise)
    if len(steps) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, noise)
Stepper.step = step
"""


@pytest.mark.slow
def test_a_job_killed_in_the_middle_is_finished_as_two_shards(ddim, job, start, tiny_text_model, tmp_path):
    """With another batch size; then it is verified, and made again from what it says of itself."""
    items, noisy = rows(12), ("--eta", 0.5)
    assert made(job(items, "-b", 4, *noisy, out="whole")) == (12, 0, 0)
    command = ("sample", "--items", "jobs.jsonl", "-m", tiny_text_model, *STEPS, *noisy, "-o", "out")
    killed = start(*command, "-b", 4, before=SUICIDE)
    assert killed.wait() == -signal.SIGKILL
    out = tmp_path / "out"
    assert 0 < len(pixels(out)) < 12
    lacking = ddim("verify", "out", "--json")
    assert (lacking.exit_code, len(json.loads(lacking.stdout)["problems"])) == (
        3,
        12 - len(list(out.glob("row*.json"))),
    )
    assert "row 11.png is missing" in lacking.stdout
    # What a kill within a write leaves, so that there is some for certain; and a file that is none of ours.
    (out / ".row 3.png.0123456789ab.tmp").write_bytes(b"half")
    (out / ".row 5.json.lock").write_bytes(b"")
    (out / ".package.json.lock").write_bytes(b"")
    first = job(items, "-b", 3, *noisy, "--shard", "0/2")
    assert json.loads(first.stdout)["left"] > 0
    assert not (out / "grid.png").exists()
    assert made(job(items, "-b", 3, *noisy, "--shard", "1/2"))[2] == 0
    one, other = pixels(tmp_path / "whole"), pixels(out)
    assert one.keys() == other.keys()
    assert len(one) == 12
    assert max(abs(one[name] - other[name]).max() for name in one) <= 1
    assert len(np.unique(np.stack(list(one.values())), axis=0)) == 12
    assert {p.name for p in out.glob(".*")} == {".package.json.lock"}
    assert ddim("verify", "out").stdout == "12 images: all is well\n"
    again = ddim("replay", *sorted(out.glob("row*.json")), "--check")
    assert (again.exit_code, "12 with equal hashes" in again.stdout) == (0, True), again.stdout + again.stderr


def test_what_a_sidecar_and_the_folder_say(job, tmp_path):
    assert made(job([{"name": "a", "seed": 5, "prompt": "ab", "negative_prompt": "c"}, {"prompt": "x"}])) == (2, 0, 0)
    out = tmp_path / "out"
    first, second = sidecar(out, "a"), sidecar(out, "000001")
    assert (first["seed"], first["sampling"]["row"], first["sampling"]["prompt"]) == (5, {"seed": 5}, "ab")
    assert (first["sampling"]["negative_prompt"], first["sampling"]["tokens"]) == ("c", 2)
    assert (second["seed"], second["sampling"]["prompt"]) == (1, "x")
    assert "negative_prompt" not in second["sampling"]
    plan = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert plan == [
        {"name": "a", "seed": 5, "prompt": "ab", "negative_prompt": "c"},
        {"name": "000001", "seed": 1, "prompt": "x"},
    ]
    manifest = json.loads((out / "run.json").read_text())
    assert (manifest["items"], manifest["totals"]["images"], "seeds" in manifest) == (2, 2, False)
    assert "prompt" not in manifest["sampling"]
    assert (out / "grid.png").exists()


def test_the_identity_of_a_row_is_what_its_sidecar_says(ddim, job, tiny_text_model, tmp_path):
    """Computed for its plan without the sidecar, it is the same; and it knows nothing of place, file or other rows."""
    from ddim_cli.outputs.sidecar import identity, row_settings

    def identities(folder):
        run = identity(json.loads((folder / "run.json").read_text()))
        lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
        for line in lines:
            assert {**run, **row_settings(line)} == identity(sidecar(folder, line["name"]))
        return {line["name"]: identity(sidecar(folder, line["name"])) for line in lines}

    items = [{"name": "a", "prompt": "ab", "negative_prompt": ""}, {"name": "b", "seed": 3}, {"name": "c", "seed": 3}]
    assert job(items, "--prompt", "p", "--prompt", "q", "--negative-prompt", "n").exit_code == 0
    found = identities(tmp_path / "out")
    assert (found["b"]["sampling.prompt"], found["b"]["sampling.negative_prompt"]) == ("q", "n")
    assert "sampling.negative_prompt" not in found["a"]
    others = [{"name": "c", "seed": 3, "prompt": "q", "negative_prompt": "n"}, {"prompt": "z"}, items[0]]
    assert job(others, out="other", file="other.jsonl").exit_code == 0
    again = identities(tmp_path / "other")
    assert {name: again[name] for name in ("a", "c")} == {name: found[name] for name in ("a", "c")}


def test_a_row_put_in_makes_one_picture(job, tmp_path):
    """Also where the rows with names have no seeds."""
    items = [{"name": name, "prompt": "abc"} for name in "abcd"]
    assert made(job(items)) == (4, 0, 0)
    before = pixels(tmp_path / "out")
    assert len(np.unique(np.stack(list(before.values())), axis=0)) == 4
    items.insert(2, {"name": "new", "prompt": "xyz"})
    assert made(job(items)) == (1, 4, 0)
    assert [json.loads(line)["name"] for line in (tmp_path / "out" / "items.jsonl").open()] == [*"ab", "new", *"cd"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["items"] == 5
    # Rows that are taken out stay in the folder's plan.
    assert made(job(items[:2])) == (0, 2, 0)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["totals"]["images"] == 5


def test_job_files_add_up_by_name(ddim, job, tmp_path):
    """What is left is of the folder's plan; the sheet is drawn once all of it is there."""
    assert made(job(rows(4), "--shard", "0/2")) == (2, 0, 2)
    more = [{"name": "more", "seed": 1, "prompt": "m"}]
    assert made(job(more, file="more.jsonl")) == (1, 0, 2)
    assert not (tmp_path / "out" / "grid.png").exists()
    assert made(job(rows(4))) == (2, 2, 0)
    assert (tmp_path / "out" / "grid.png").exists()
    assert ddim("verify", "out").stdout == "5 images: all is well\n"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("prompt", "other", 'sampling.prompt = "bcdefghijkl", this run has "other"'),
        ("seed", 7, "was made with seed 101, this run has 7"),
        ("negative_prompt", "n", 'sampling.negative_prompt = null, this run has "n"'),
    ],
)
def test_another_picture_under_a_name_is_refused(ddim, job, tmp_path, key, value, told):
    assert made(job(rows(3))) == (3, 0, 0)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    items = rows(3)
    items[1][key] = value
    refused = job(items)
    assert refused.exit_code == 2
    assert "jobs.jsonl:2: out/row 1.json was made with" in refused.stderr
    assert told in refused.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert made(job(items, "--overwrite")) == (3, 0, 0)
    again = pixels(tmp_path / "out")
    assert sidecar(tmp_path / "out", "row 1")["sampling"].get(key, sidecar(tmp_path / "out", "row 1")["seed"]) == value
    assert made(job(items, out="afresh")) == (3, 0, 0)
    assert all(np.array_equal(picture, again[name]) for name, picture in pixels(tmp_path / "afresh").items())
    assert ddim("verify", "out").exit_code == 0


def test_other_settings_are_refused_and_replaced(ddim, job, tiny_text_model, tmp_path):
    assert made(job(rows(3))) == (3, 0, 0)
    refused = job(rows(2), "--eta", 1)
    assert (refused.exit_code, "run.json was made with sampling.eta = 0.0" in refused.stderr) == (2, True)
    seeds = ("sample", "-m", tiny_text_model, *STEPS, "-o", "out", "--prompt", "a", "-n", 2)
    refused = ddim(*seeds)
    assert (refused.exit_code, "was made from a job file, this run is of none" in refused.stderr) == (2, True)
    # Of other settings none stays, also of rows that this file does not have.
    assert made(job(rows(2), "--eta", 1, "--overwrite")) == (2, 0, 0)
    assert sorted(pixels(tmp_path / "out")) == ["row 0.png", "row 1.png"]
    assert ddim("verify", "out").exit_code == 0
    assert ddim(*seeds, "--overwrite").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["run.json", "grid.png", *(f"00000{i}.{kind}" for i in range(2) for kind in ("png", "json"))]
    )
    refused = job(rows(2))
    assert (refused.exit_code, "was made without a job file, this run is of one" in refused.stderr) == (2, True)


def test_a_dry_run_writes_nothing(job, tmp_path):
    plan = json.loads(job(rows(3), "--dry-run").stdout)
    assert (plan["images"], plan["rows"], plan["items"], plan["present"]) == (3, 3, "jobs.jsonl", 0)
    assert plan["files"] == [f"out/row {i}.png" for i in range(3)]
    assert [p.name for p in tmp_path.iterdir()] == ["jobs.jsonl"]
    assert made(job(rows(2))) == (2, 0, 0)
    plan = json.loads(job(rows(3), "--dry-run").stdout)
    assert (plan["present"], plan["files"]) == (2, ["out/row 2.png"])


def test_the_default_folder_is_named_after_the_file(ddim, tmp_path):
    write(tmp_path / "my jobs.jsonl", [{"seed": 3}])
    for out in (("--steps", 2), ("--steps", 2)):
        assert ddim("sample", "--items", "my jobs.jsonl", *out).exit_code == 0
    [folder] = (tmp_path / "outputs").iterdir()
    assert folder.name.startswith("mnist-2steps-")
    assert folder.name.endswith("-my jobs")


def test_stdin(ddim, monkeypatch, tmp_path):
    import io
    from types import SimpleNamespace

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"name,seed\na,1\n")))
    from pathlib import Path

    from ddim_cli.cli.options import RunOptions, build_layers
    from ddim_cli.cli.sample import sample_rows

    assert sample_rows(
        build_layers([], ['output.dir="out"', "sampling.steps=2"], {}), Path("-"), RunOptions(quiet=True), None
    )
    assert (tmp_path / "out" / "a.png").exists()


def test_an_array_in_the_order_of_the_rows(ddim, tmp_path):
    write(tmp_path / "a.jsonl", [{"name": "z", "seed": 1}, {"name": "a", "seed": 2}, {"seed": 3}])
    command = ("sample", "--items", "a.jsonl", "--steps", 2, "-o", "out", "--npz", "all.npz", "--subdirs")
    assert ddim(*command).exit_code == 0
    found = np.load(tmp_path / "all.npz")["arr_0"]
    for i, file in enumerate(("z.png", "a.png", "000000/000002.png")):
        assert np.array_equal(found[i, :, :, 0], np.asarray(Image.open(tmp_path / "out" / file)))
    assert ddim("verify", "out").stdout == "3 images: all is well\n"
    # A row's noise is that of its seed, whatever its name.
    assert ddim("sample", "--seeds", "1-3", "--steps", 2, "-o", "seeds").exit_code == 0
    for name, seed in (("z", 1), ("a", 2), ("000000/000002", 3)):
        one, other = (
            np.asarray(Image.open(tmp_path / p)).astype(int) for p in (f"out/{name}.png", f"seeds/{seed:06d}.png")
        )
        assert abs(one - other).max() <= 1


def test_a_negative_prompt_without_guidance_is_named(job, tmp_path):
    """It is no part of the picture then."""
    items = [{"name": "a", "prompt": "a"}, {"name": "b", "prompt": "a", "negative_prompt": "c"}]
    result = job(items, "--guidance-scale", 1)
    assert "jobs.jsonl:2: a negative prompt has no effect at a guidance scale of 1" in result.stderr
    assert "negative_prompt" not in sidecar(tmp_path / "out", "b")["sampling"]
    del items[1]["negative_prompt"]
    assert made(job(items, "--guidance-scale", 1)) == (0, 2, 0)


def test_latents(ddim, tiny_model, tmp_path):
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(4))
    (tmp_path / "jobs").mkdir()
    save_file({"latent": noise}, tmp_path / "jobs" / "n.safetensors")
    latent = {"latent": "n.safetensors"}
    write(
        tmp_path / "jobs" / "a.jsonl",
        [{"name": "l", **latent}, {"name": "s", "seed": 4}, {"name": "b", "seed": 4, **latent}],
    )
    command = ("sample", "-m", tiny_model, "--items", "jobs/a.jsonl", "--steps", 3, "--no-compile", "-o")
    assert ddim(*command, "out").exit_code == 0
    found = pixels(tmp_path / "out")
    assert np.array_equal(found["l.png"], found["s.png"])
    facts = sidecar(tmp_path / "out", "l")
    assert (facts["seed"], facts["sampling"]["row"], facts["sampling"]["latent"]["file"]) == (
        None,
        {"seed": None},
        "n.safetensors",
    )
    assert ddim("verify", "out").exit_code == 0
    again = ddim("replay", *sorted((tmp_path / "out").glob("[lsb].json")), "--check", "--latents", "jobs")
    assert (again.exit_code, "3 with equal hashes" in again.stdout) == (0, True), again.stdout + again.stderr
    refused = ddim(*command, "noisy", "--eta", 1)
    assert (refused.exit_code, "a.jsonl:1: has a latent and no seed" in refused.stderr) == (2, True)
    write(tmp_path / "jobs" / "a.jsonl", [{"name": "s", "seed": 4}, {"name": "b", "seed": 4, **latent}])
    assert ddim(*command, "noisy", "--eta", 1).exit_code == 0
    found = pixels(tmp_path / "noisy")
    assert np.array_equal(found["b.png"], found["s.png"])
    # Another latent of the same name is another picture.
    save_file({"latent": noise * 0.5}, tmp_path / "jobs" / "n.safetensors")
    refused = ddim(*command, "noisy", "--eta", 1)
    assert (refused.exit_code, "a.jsonl:2: noisy/b.json was made with sampling.latent" in refused.stderr) == (2, True)


WRONG = {
    "prompt without text": ([{"seed": 1}, {"prompt": "x"}], "mnist", ":2: prompt is for text-to-image models"),
    "negative prompt without text": ([{"negative_prompt": "x"}], "mnist", ":1: negative_prompt is for text-to-image"),
    "class without classes": ([{}, {"class": 1}], "mnist", ":2: has a class, and mnist is not class-conditional"),
    "text without a prompt": ([{"prompt": "x"}, {"name": "a"}], "text", ":2: has no prompt, and tiny-text takes text"),
    "class of text": ([{"prompt": "x", "class": 0}], "text", ":1: has a class, and tiny-text takes a prompt"),
    "no latent there": ([{"latent": "none.safetensors"}], "mnist", ":1: none.safetensors: no such file"),
    "another shape": (
        [{"latent": "l.safetensors"}],
        "mnist",
        ":1: l.safetensors: is 3 x 8 x 8 (C x H x W), and mnist takes 1 x 32 x 32",
    ),
    "no latent": ([{"latent": "w.jsonl"}], "mnist", ":1: w.jsonl: cannot be read as a safetensors file"),
    "several": ([{"latent": "several.safetensors"}], "mnist", ":1: several.safetensors: holds 2 latents"),
    "not finite": ([{"latent": "nan.safetensors"}], "mnist", ":1: nan.safetensors: has values that are not finite"),
    "unknown key": ([{"sed": 1}], "mnist", ':1: unknown key "sed"; did you mean seed?'),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_the_model_cannot_make_is_refused_before_anything_runs(ddim, tiny_text_model, tmp_path, kind):
    items, model, told = WRONG[kind]
    save_file({"latent": torch.zeros(3, 8, 8)}, tmp_path / "l.safetensors")
    save_file({"latent": torch.zeros(2, 1, 32, 32)}, tmp_path / "several.safetensors")
    save_file({"latent": torch.full((1, 32, 32), torch.nan)}, tmp_path / "nan.safetensors")
    write(tmp_path / "w.jsonl", items)
    before = sorted(tmp_path.iterdir())
    model = tiny_text_model if model == "text" else model
    refused = ddim("sample", "--items", "w.jsonl", "-m", model, "--json", "-o", "out")
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["error"].startswith(f"w.jsonl{told}"), refused.stdout
    assert len(refused.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "more", [("-n", 3), ("--seed", 3), ("--seeds", "1-2"), ("--set", "sampling.seed=2"), ("--latents", "x")]
)
def test_rows_and_seeds_exclude_each_other(ddim, tmp_path, more):
    write(tmp_path / "a.jsonl", [{"seed": 1}])
    refused = ddim("sample", "--items", "a.jsonl", *more)
    assert (refused.exit_code, "which images there are, and so does --" in refused.stderr) == (2, True), refused.stderr
    assert not (tmp_path / "outputs").exists()


def test_seeds_of_a_config_are_replaced(ddim, tmp_path):
    write(tmp_path / "a.jsonl", [{}, {"seed": 1}])
    for text, seed in (('seeds = "5-9"', 0), ("seed = 40", 40)):
        (tmp_path / "run.toml").write_text(f"[sampling]\n{text}\nsteps = 2\n")
        assert ddim("sample", "--items", "a.jsonl", "-c", "run.toml", "-o", f"out{seed}").exit_code == 0
        assert [sidecar(tmp_path / f"out{seed}", f"00000{i}")["seed"] for i in range(2)] == [seed, 1]


@pytest.fixture
def conditional(tmp_path):
    """A random network of 8x8 pictures with four classes."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=4,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "conditional")
    return tmp_path / "conditional"


def test_classes(ddim, conditional, tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("name", "seed", "class"), ("a", 5, 3), ("b", 5, 1), ("c", 6, "")])
    command = ("sample", "--items", "a.csv", "-m", conditional, "--steps", 2, "--no-compile", "-o", "out", "-b", 3)
    refused = ddim(*command)
    assert (refused.exit_code, "a.csv:4: has no class, and conditional has the classes 0-3" in refused.stderr) == (
        2,
        True,
    )
    guided = ("--classes", "0-2", "--guidance-scale", 2, "--set", "model.null_class=0")
    assert ddim(*command, *guided).exit_code == 0
    out = tmp_path / "out"
    assert [sidecar(out, name)["sampling"]["class"] for name in "abc"] == [3, 1, 0]
    assert ddim("verify", "out").exit_code == 0
    assert ddim("sample", "--seeds", 5, "--classes", 3, *command[3:8], *guided[2:], "-o", "seed").exit_code == 0
    assert abs(pixels(out)["a.png"] - pixels(tmp_path / "seed")["000005.png"]).max() <= 1
    again = ddim("replay", "out/a.png", "out/b.json", "--check", "--json")
    assert (again.exit_code, json.loads(again.stdout)["ok"]) == (0, True), again.stdout + again.stderr
    assert ddim("replay", "out/a.png", "out/c.json", "-o", "again").exit_code == 0
    assert ddim("verify", "again").stdout == "2 images: all is well\n"
    (tmp_path / "a.csv").write_text("class\n0\n4\n1\n")
    refused = ddim(*command)
    assert (refused.exit_code, "a.csv:3: conditional has no class 4; it has 0-3" in refused.stderr) == (2, True)


def test_under_torchrun_each_rank_is_a_shard(ddim, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", [{"name": f"n{i}"} for i in range(5)])
    for variable, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        result = ddim("sample", "--items", "a.jsonl", "--steps", 2, "-o", "out", "--json", "--npz", "all.npz")
        assert result.exit_code == 0, result.stderr
    assert made(result) == (3, 0, 0)
    refused = ddim("sample", "--items", "-", "-o", "out")
    assert (refused.exit_code, "would each read a part of stdin" in refused.stderr) == (2, True)
    assert (tmp_path / "out" / "grid.png").exists()
    assert len(np.load(tmp_path / "all.npz")["arr_0"]) == 5


def test_verify_sees_what_is_wrong_with_rows(ddim, job, tmp_path):
    assert made(job(rows(6))) == (6, 0, 0)
    out = tmp_path / "out"
    (out / "row 0.png").unlink()
    (out / "row 1.json").unlink()
    record = sidecar(out, "row 2")
    record["sampling"]["prompt"] = "other"
    (out / "row 2.json").write_text(json.dumps(record))
    for kind in ("png", "json"):
        (out / f"row 9.{kind}").write_bytes((out / f"row 5.{kind}").read_bytes())
        (out / f"row 3.{kind}").unlink()
    found = json.loads(ddim("verify", "out", "--json").stdout)
    assert [p["problem"] for p in found["problems"]] == [
        "row 0.png is missing, its sidecar is there",
        "row 1.png has no sidecar",
        'row 2.png was made with sampling.prompt = "other", the run with "cdefghijkl"',
        "row 3.png is missing",
        "row 9.png is extra: items.jsonl does not name it",
    ]
    (out / "items.jsonl").unlink()
    assert "items.jsonl: names 0 rows, and run.json says 6" in ddim("verify", "out").stdout


def test_from_python(tiny_text_model, tmp_path):
    config = {"sampling": {"steps": 2, "guidance_scale": 3.0}, "runtime": {"compile": False}}
    items = [{"name": "a", "seed": 9, "prompt": "ab"}, {"prompt": "ab"}, {"seed": 9, "prompt": "ab"}]
    found = list(sample(config, tiny_text_model, items=items))
    assert [each.seed for each in found] == [9, 1, 9]
    assert found[0].metadata["sampling"]["row"] == {"seed": 9}
    assert torch.equal(found[0].tensor, found[2].tensor)
    assert not torch.equal(found[0].tensor, found[1].tensor)
    again = list(sample(config, tiny_text_model, items=write(tmp_path / "a.jsonl", items)))
    assert all(torch.equal(one.tensor, other.tensor) for one, other in zip(found, again, strict=True))


def test_from_python_with_a_callable():
    def network(x, t, classes):
        return x * 0.1 + classes[:, None, None, None]

    config = {"sampling": {"steps": 2}}
    items = [{"class": 0}, {"seed": 0, "class": 1}]
    one, other = (s.tensor for s in sample(config, network, shape=(1, 8, 8), items=items))
    assert not torch.equal(one, other)
    from ddim_cli.errors import ConfigError

    with pytest.raises(ConfigError, match=r"items\[1\]: has no class, and other rows have one"):
        sample(config, network, shape=(1, 8, 8), items=[{"class": 0}, {}])
    with pytest.raises(ConfigError, match=r"items\[0\]: prompt is for text-to-image models"):
        sample(config, lambda x, t: x, shape=(1, 8, 8), items=[{"prompt": "a"}])


def test_rows_are_scored_and_shown_as_pictures_of_their_plan(ddim, job, tmp_path):
    from ddim_cli.errors import UsageError
    from ddim_cli.evaluation.pictures import open_pictures
    from ddim_cli.outputs.folder import OutputFolder
    from ddim_cli.outputs.report.contents import Links, read_folder

    items = [{"prompt": "a"}, {"name": "z", "prompt": "b"}, {"name": "frame_001", "prompt": "c"}]
    assert made(job(items)) == (3, 0, 0)
    out = tmp_path / "out"
    assert len(open_pictures(out)) == 3
    [shown] = read_folder(OutputFolder(out), Links(out), lambda done, total: None)
    assert ([label for *_, label in shown.pictures], shown.planned) == (["000000", "z", "frame_001"], 3)
    assert ddim("report", "out").exit_code == 0
    assert ddim("verify", "out").exit_code == 0
    (out / "z.png").unlink()
    with pytest.raises(UsageError, match=r"lacks 1 of 3 pictures \(first z\)"):
        open_pictures(out)
