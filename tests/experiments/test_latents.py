"""``ddim sample --latents``: pictures that begin at latents, of ``ddim invert`` or of a user."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

SHAPE = (3, 8, 8)


def noise(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def inverted(ddim, tiny_model, tmp_path):
    """The folder ``inv`` with the latents of three pictures, on a trailing grid of 4 steps."""
    for i, name in enumerate("abc"):
        values = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    args = ("-m", tiny_model, "--steps", 4, "--spacing", "trailing", "-b", 3, "-o", "inv")
    assert ddim("invert", "a.png", "b.png", "c.png", *args).exit_code == 0
    return tmp_path / "inv"


def command(model, *more):
    return ("sample", "-m", model, "--steps", 4, "-b", 2, "-o", "out", *more)


def test_latents_of_invert_give_its_reconstructions_to_the_bit(ddim, inverted, tmp_path):
    """With nothing said but the folder: model, grid and clipping are in the files."""
    result = ddim("sample", "--latents", "inv", "-b", 3, "-o", "out", "--json")
    assert (result.exit_code, "warning" in result.stderr) == (0, False), result.stderr
    found = json.loads(result.stdout)
    assert (found["made"], found["finished"], found["grid"]) == (3, True, "out/grid.png")
    for name in "abc":
        recon, again = inverted / f"{name}.recon.png", tmp_path / "out" / f"{name}.latent.png"
        assert np.array_equal(pixels(again), pixels(recon)), name
    sidecar = json.loads((tmp_path / "out" / "a.latent.json").read_text())
    before = json.loads((inverted / "a.recon.json").read_text())
    assert sidecar["seed"] is None
    assert sidecar["scheduler"] == before["scheduler"]
    assert sidecar["sampling"]["latent"] == before["inversion"]["latent"]
    assert ddim("verify", "out").exit_code == 0
    shown = ddim("inspect", "out/a.latent.png").stdout
    assert f"latent: a.latent.safetensors; sha256 {before['inversion']['latent']['sha256']}" in shown
    refused = ddim("replay", "out/a.latent.png", "--check")
    assert refused.exit_code == 2
    assert "the latent it started from, a.latent.safetensors, is not in out as it was then" in refused.stderr
    assert "1 with equal hashes" in ddim("replay", "out/a.latent.png", "--check", "--latents", "inv").stdout


def test_noise_of_a_seed_as_a_latent_gives_the_picture_of_the_seed(ddim, tiny_model, tmp_path):
    """A batch of the user's own, with no settings inside."""
    save_file({"latents": torch.stack([noise(3), noise(8)])}, tmp_path / "mine.safetensors")
    assert ddim(*command(tiny_model, "--latents", "mine.safetensors")).exit_code == 0
    assert ddim("sample", "-m", tiny_model, "--seeds", "3,8", "--steps", 4, "-b", 2, "-o", "seeds").exit_code == 0
    for index, seed in enumerate((3, 8)):
        own = pixels(tmp_path / "out" / f"mine-{index:03d}.latent.png")
        assert np.array_equal(own, pixels(tmp_path / "seeds" / f"{seed:06d}.png"))
    sidecar = json.loads((tmp_path / "out" / "mine-001.latent.json").read_text())
    assert sidecar["sampling"]["latent"]["index"] == 1
    assert "number 1 in it" in ddim("inspect", "out/mine-001.latent.json").stdout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_and_the_only_tensor_of_any_name(ddim, tiny_model, tmp_path, dtype):
    rounded = noise(3).to(dtype)
    save_file({"z": rounded}, tmp_path / "z.safetensors")
    save_file({"latent": rounded.float(), "other": torch.zeros(3)}, tmp_path / "same.safetensors")
    result = ddim(*command(tiny_model, "--latents", "z.safetensors", "--latents", "same.safetensors"))
    assert result.exit_code == 0, result.stderr
    assert np.array_equal(pixels(tmp_path / "out" / "z.latent.png"), pixels(tmp_path / "out" / "same.latent.png"))


def test_the_same_command_goes_on(ddim, inverted, tmp_path):
    args = ("sample", "--latents", "inv", "-b", 3, "-o", "out", "--json")
    assert json.loads(ddim(*args).stdout)["made"] == 3
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert json.loads(ddim(*args).stdout)["present"] == 3
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "b.latent.png").unlink()
    found = json.loads(ddim(*args).stdout)
    assert (found["made"], found["present"]) == (1, 2)
    assert ddim("verify", "out").exit_code == 0
    # A latent of that name with other values is another picture.
    save_file({"latent": noise(1)}, inverted / "b.latent.safetensors")
    refused = ddim(*args)
    assert refused.exit_code == 2
    assert "out/b.latent.json was made with sampling.latent" in refused.stderr
    assert json.loads(ddim(*args, "--overwrite").stdout)["made"] == 3


def test_what_the_user_says_wins_over_the_file_and_is_warned_of(ddim, inverted, tmp_path):
    result = ddim("sample", "--latents", "inv", "--steps", 3, "-o", "out")
    assert result.exit_code == 0
    assert "(and 2 more) was made with sampling.timesteps = " in result.stderr
    assert "the picture is not the one that was inverted" in result.stderr
    timesteps = json.loads((tmp_path / "out" / "a.latent.json").read_text())["sampling"]["timesteps"]
    assert timesteps == [999, 666, 332], "the spacing is still the file's"
    clipped = ddim("sample", "--latents", "inv", "--clip-sample", "-o", "clipped")
    assert "was made with scheduler.clip_sample = False, and is sampled with True" in clipped.stderr


def test_a_model_that_has_moved(ddim, tiny_model, inverted, tmp_path):
    import shutil

    shutil.copytree(tiny_model, "there")
    args = ("--steps", 2, "--set", "scheduler.timestep_spacing=trailing")
    assert ddim("invert", "-m", "there", "a.png", "-o", "moved", *args).exit_code == 0
    shutil.move("there", "elsewhere")
    gone = ddim("sample", "--latents", "moved", "-o", "out")
    assert gone.exit_code == 2
    assert "its model is no longer at" in gone.stderr
    found = ddim("sample", "--latents", "moved", "-m", "elsewhere", "-o", "out")
    assert (found.exit_code, "warning" in found.stderr) == (0, False)
    assert np.array_equal(pixels(tmp_path / "moved/a.recon.png"), pixels(tmp_path / "out/a.latent.png"))


def test_shards_the_sheet_and_the_array(ddim, inverted, tmp_path):
    args = ("sample", "--latents", "inv", "-b", 3, "-o", "out", "--json", "--npz", "all.npz")
    first = json.loads(ddim(*args, "--shard", "0/2").stdout)
    assert (first["made"], first["left"], first["grid"], first["npz"]) == (2, 1, None, None)
    last = json.loads(ddim(*args, "--shard", "1/2").stdout)
    assert (last["made"], last["left"], last["grid"], last["npz"]) == (1, 0, "out/grid.png", "all.npz")
    expected = [pixels(tmp_path / "out" / f"{name}.latent.png") for name in "abc"]
    assert np.array_equal(np.load("all.npz")["arr_0"], expected)
    assert Image.open("out/grid.png").size == (2 * 96 + 3 * 6, 2 * 96 + 3 * 6)


def test_files_as_a_shell_lists_them(ddim, inverted, tmp_path):
    files = sorted(inverted.glob("*.safetensors"))
    found = json.loads(ddim("sample", "--latents", *files, "-o", "out", "--json").stdout)
    assert found["made"] == 3
    alone = ddim("sample", "inv")
    assert alone.exit_code == 2
    assert "inv: sample takes options alone; latents are named with --latents" in alone.stderr


def test_a_dry_run_writes_nothing(ddim, inverted, tmp_path):
    args = ("sample", "--latents", "inv/a.latent.safetensors", "-o", "out", "--dry-run")
    plan = json.loads(ddim(*args, "--json").stdout)
    assert (plan["latents"], plan["files"]) == (["inv/a.latent.safetensors"], ["out/a.latent.png"])
    assert "images: 1 (latents of inv/a.latent.safetensors)" in ddim(*args).stdout
    assert not (tmp_path / "out").exists()


def test_beside_pictures_of_seeds_the_sheet_is_theirs(ddim, tiny_model, tmp_path):
    save_file({"latent": noise(3)}, tmp_path / "mine.safetensors")
    assert ddim("sample", "-m", tiny_model, "-n", 2, "--steps", 4, "-o", "out").exit_code == 0
    sheet = (tmp_path / "out" / "grid.png").read_bytes()
    assert ddim(*command(tiny_model, "--latents", "mine.safetensors")).exit_code == 0
    assert (tmp_path / "out" / "grid.png").read_bytes() == sheet
    assert json.loads(ddim("verify", "out", "--json").stdout)["images"] == 3


def test_seeds_of_a_config_stand_for_runs_without_latents(ddim, tiny_model, tmp_path):
    save_file({"latent": noise(3)}, tmp_path / "mine.safetensors")
    (tmp_path / "run.toml").write_text('[sampling]\nseeds = "0-9"\n')
    result = ddim(*command(tiny_model, "-c", "run.toml", "--latents", "mine.safetensors", "--json"))
    assert json.loads(result.stdout)["images"] == 1


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--seeds", "3"], "--seeds says which noise images begin with, and so does --latents"),
        (["-n", "3"], "--num-images says which noise"),
        (["--set", "sampling.seed=3"], "--set says which noise"),
        (["--eta", "1"], "sampling.eta = 1.0 (--eta): sampling from a latent needs eta 0"),
        (["--latents", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--latents", "empty"], "there are no safetensors files in this folder"),
        (["--latents", "text.safetensors"], "cannot be read as a safetensors file"),
        (["--latents", "large.safetensors"], "its latents are 3 x 16 x 16 (C x H x W), and tiny takes 3 x 8 x 8"),
        (["--latents", "flat.safetensors"], "a latent is [C, H, W], several are [N, C, H, W]"),
        (["--latents", "integers.safetensors"], "is of type I64; latents are floating-point numbers"),
        (["--latents", "several.safetensors"], "holds 2 tensors, none of them called 'latent' or 'latents'"),
        (["--latents", "nan.safetensors"], "nan.safetensors: has values that are not finite"),
        (["--latents", "sub/mine.safetensors"], "would both become mine.latent.png"),
        (["--latents", "odd.safetensors"], "does not say how a latent came about"),
    ],
)
def test_mistakes_are_told_before_anything_runs(ddim, tiny_model, tmp_path, more, text):
    for folder in ("empty", "sub"):
        (tmp_path / folder).mkdir()
    files = {
        "mine": {"latent": noise(3)},
        "sub/mine": {"latent": noise(4)},
        "large": {"latent": torch.zeros(3, 16, 16)},
        "flat": {"latent": torch.zeros(192)},
        "integers": {"latent": torch.zeros(SHAPE, dtype=torch.int64)},
        "several": {"a": noise(1), "b": noise(2)},
        "nan": {"latent": torch.full(SHAPE, torch.nan)},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    save_file({"latent": noise(1)}, tmp_path / "odd.safetensors", metadata={"ddim": '{"schema": 1}'})
    (tmp_path / "text.safetensors").write_text("no tensors")
    result = ddim(*command(tiny_model, "--latents", "mine.safetensors", *more))
    assert result.exit_code == 2
    assert text in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_files_of_one_name_in_two_folders_have_two_default_folders(ddim, tiny_model, tmp_path):
    for i, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        save_file({"latent": noise(i)}, tmp_path / folder / "mine.safetensors")
        save_file({"latent": noise(8)}, tmp_path / folder / "other.safetensors")
    common = ("sample", "-m", tiny_model, "--steps", 4, "--json", "--latents")
    found = {}
    for path in ("a/mine.safetensors", "b/mine.safetensors", "./a/other.safetensors"):
        result = ddim(*common, path)
        assert result.exit_code == 0, result.stderr
        found[path] = json.loads(result.stdout)["folder"]
    assert found["a/mine.safetensors"] != found["b/mine.safetensors"]
    # Others beside it extend its folder, and the same command finds it again.
    assert found["a/mine.safetensors"] == found["./a/other.safetensors"]
    assert json.loads(ddim(*common, "a").stdout)["made"] == 0


def test_the_latent_that_is_read_is_the_one_that_was_written(inverted):
    from ddim_cli.outputs.latents import open_latents, read_latent

    file = open_latents(inverted / "a.latent.safetensors")
    assert (file.tensor, file.shape, file.indices, file.stem) == ("latent", SHAPE, (None,), "a")
    assert torch.equal(torch.from_numpy(read_latent(file, None)), load_file(file.path)["latent"])
    assert file.record["sampling"]["inverted"]["file"] == "a.png"
