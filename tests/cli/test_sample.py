import io
import json
import re
import signal
import sys
import time

import pytest
from PIL import Image


@pytest.fixture
def tiny(ddim, tiny_model):
    return lambda *args: ddim("sample", "-m", tiny_model, "--steps", 4, *args)


def test_a_run_leaves_pairs_a_manifest_and_a_contact_sheet(tiny, tmp_path):
    result = tiny("-n", 5, "-b", 2, "-o", "out")
    assert result.exit_code == 0, result.stderr
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    pairs = [f"{seed:06d}.{kind}" for seed in range(5) for kind in ("json", "png")]
    assert names == sorted([*pairs, "grid.png", "run.json"])
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    assert manifest["seeds"] == "0-4"
    assert manifest["totals"]["images"] == 5
    assert manifest["sampling"]["timesteps"] == [750, 500, 250, 0]
    assert "images: 5 images" in result.stdout
    assert "contact sheet: out/grid.png" in result.stdout


def test_the_default_folder_is_found_again(tiny, tmp_path):
    assert tiny("-n", 2).exit_code == 0
    [folder] = (tmp_path / "outputs").iterdir()
    assert folder.name.startswith("tiny-4steps-")
    assert "nothing to do" in tiny("-n", 2).stdout
    assert tiny("-n", 2, "--eta", 0.5).exit_code == 0
    assert len(list((tmp_path / "outputs").iterdir())) == 2


def test_the_same_command_makes_what_is_missing(tiny, tmp_path):
    assert tiny("-n", 4, "-o", "out").exit_code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("0*")}
    (tmp_path / "out" / "000001.json").unlink()
    (tmp_path / "out" / "000002.png").unlink()
    result = tiny("-n", 4, "-o", "out", "--json")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert (summary["made"], summary["present"], summary["images"]) == (2, 2, 4)
    for name, content in before.items():
        if name.endswith(".png"):
            assert (tmp_path / "out" / name).read_bytes() == content


def test_a_finished_folder_is_not_written_to(tiny, tmp_path, monkeypatch):
    """So it may be on a disk that is read-only."""
    assert tiny("-n", 2, "-o", "out").exit_code == 0

    def state():
        return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in [tmp_path / "out", *(tmp_path / "out").iterdir()]}

    before = state()
    # As of a disk that is mounted read-only.
    monkeypatch.setattr("os.access", lambda *args: False)
    for images in (2, 1):
        done = tiny("-n", images, "-o", "out")
        assert (done.exit_code, "nothing to do" in done.stdout) == (0, True), done.stderr
        assert state() == before
    for more in (["-n", 3, "-o", "out"], ["-n", 3, "-o", "out", "--dry-run"], ["-o", "out/new"]):
        assert "out cannot be written to" in tiny(*more).stderr
    assert state() == before


def test_more_seeds_extend_a_folder(tiny, tmp_path):
    assert tiny("-n", 2, "-o", "out").exit_code == 0
    assert tiny("--seeds", "1-3,9", "-o", "out").exit_code == 0
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    assert manifest["seeds"] == "0-3,9"
    assert manifest["totals"]["images"] == 5
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (3 * 102 + 6, 2 * 102 + 6)


def test_other_settings_are_refused_unless_overwritten(tiny, tmp_path):
    assert tiny("-n", 3, "-o", "out").exit_code == 0
    before = (tmp_path / "out" / "000000.png").read_bytes()
    result = tiny("-n", 3, "-o", "out", "--eta", 0.5)
    assert result.exit_code == 2
    assert "sampling.eta = 0.0, this run has 0.5" in result.stderr
    assert "--overwrite" in result.stderr
    assert (tmp_path / "out" / "000000.png").read_bytes() == before
    assert tiny("-n", 2, "-o", "out", "--eta", 0.5, "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "000000.png").read_bytes() != before
    # The third picture had the old settings: a folder holds one kind.
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["000000.png", "000001.png", "grid.png"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seeds"] == "0-1"


def test_another_size_is_named_and_not_its_hash(tiny, tmp_path):
    assert tiny("-n", 1, "--image-size", 16, "-o", "out").exit_code == 0
    result = tiny("-n", 1, "-o", "out")
    assert (result.exit_code, "sha256" in result.stderr) == (2, False)
    assert "run.json was made with images of 16 x 16, this run has 8 x 8; choose another folder" in result.stderr
    (tmp_path / "out" / "run.json").unlink()
    assert "000000.json was made with images of 16 x 16, this run has 8 x 8" in tiny("-n", 1, "-o", "out").stderr


def test_another_network_config_is_another_model(ddim, tiny_model, tmp_path):
    """The same weights under another config compute something else."""
    import shutil

    shutil.copytree(tiny_model, "model")
    command = ("sample", "-m", "model", "--steps", 4, "-n", 1, "-o", "out")
    assert ddim(*command).exit_code == 0
    path = tmp_path / "model" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "center_input_sample": True}))
    result = ddim(*command)
    assert result.exit_code == 2
    assert "model.config_sha256" in result.stderr


def test_an_unfinished_folder_says_what_is_left(tiny, tmp_path):
    result = tiny("-n", 6, "-o", "out", "--shard", "0/3", "--json")
    assert (json.loads(result.stdout)["finished"], json.loads(result.stdout)["left"]) == (False, 4)
    assert "totals" not in json.loads((tmp_path / "out" / "run.json").read_text())
    assert "left: 4 images" in tiny("-n", 6, "-o", "out", "--shard", "0/3").stdout


def test_a_dry_run_refuses_what_the_run_would(tiny):
    assert tiny("-n", 2, "-o", "out").exit_code == 0
    assert tiny("-n", 2, "-o", "out", "--eta", 0.5, "--dry-run").exit_code == 2
    plan = json.loads(tiny("-n", 3, "-o", "out", "--dry-run", "--json").stdout)
    assert (plan["present"], plan["files"]) == (2, ["out/000002.png"])


def test_a_grid_of_another_length_says_so(ddim):
    result = ddim("sample", "--dry-run", "--spacing", "uniform", "--steps", 30)
    assert "the uniform grid for 30 steps has 31 timesteps" in result.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": None},
        {"block_out_channels": []},
        {"block_out_channels": "ab"},
        {"block_out_channels": [8, "16"]},
        {"layers_per_block": None},
        {"layers_per_block": "1"},
        {"sample_size": 7},
        {"sample_size": [8, 9]},
        {"sample_size": "32"},
        {"sample_size": 10**12},
        {"in_channels": True},
    ],
    ids=str,
)
def test_malformed_network_configs(ddim, tiny_model, tmp_path, changes):
    import shutil

    shutil.copytree(tiny_model, "model")
    path = tmp_path / "model" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    result = ddim("sample", "-m", "model", "-o", "out")
    assert result.exit_code == 2, result.stderr
    assert any(word in result.stderr for word in (*changes, "halved", "channels"))
    assert not (tmp_path / "out").exists()


def test_subdirs_and_no_grid(tiny, tmp_path):
    assert tiny("--seeds", "5,1500", "--subdirs", "--no-grid", "-o", "out").exit_code == 0
    names = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    assert names == ["000000/000005.png", "001000/001500.png"]
    assert "nothing to do" in tiny("--seeds", "5,1500", "--subdirs", "--no-grid", "-o", "out").stdout


def test_dry_run_writes_nothing(tiny, tmp_path):
    result = tiny("-n", 5, "-b", 2, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert (plan["images"], plan["batches"], plan["batch_size"]) == (5, 3, 2)
    assert plan["timesteps"] == [750, 500, 250, 0]
    assert len(plan["files"]) == 5
    assert "750 500 250 0" in tiny("--dry-run").stdout
    assert list(tmp_path.iterdir()) == []


def test_the_bar_ends_at_the_last_step(tiny, monkeypatch):
    from rich.console import Console

    from ddim_cli.cli import console

    screen = io.StringIO()
    monkeypatch.setattr(console, "stderr", lambda: Console(file=screen, force_terminal=True, width=100))
    assert tiny("-n", 3, "-b", 2, "-o", "out").exit_code == 0
    shown = re.findall(r"(\d/3 images).*?(step \d/4)", screen.getvalue())
    assert shown[0] == ("0/3 images", "step 0/4")
    assert shown[-1] == ("3/3 images", "step 4/4")


def test_a_dry_run_of_millions_says_what_a_line_holds(tiny, monkeypatch):
    from ddim_cli.config.seeds import Seeds

    monkeypatch.setattr(Seeds, "__iter__", lambda self: pytest.fail("looked at one by one"))
    shown = tiny("--seeds", "0-9999999", "--dry-run", "-o", "out").stdout
    assert "images: 10,000,000 (seeds 0-9999999)" in shown
    assert "files: out/000000.png ... out/9999999.png" in shown
    shown = tiny("--seeds", "0-9999999", "--shard", "3/8", "--dry-run", "-o", "out").stdout
    assert "images: 1,250,000 (shard 3/8 of the seeds 0-9999999)" in shown
    assert "files: out/000003.png ... out/9999995.png" in shown
    listed = ",".join(map(str, range(0, 1000, 2)))
    assert max(map(len, tiny("--seeds", listed, "--dry-run", "-o", "out").stdout.splitlines())) < 150


def test_quiet_and_json(tiny):
    quiet = tiny("-n", 1, "-o", "a", "-q")
    assert (quiet.stdout, quiet.stderr) == ("", "")
    result = tiny("-n", 1, "-o", "b", "--json")
    assert json.loads(result.stdout)["finished"] is True
    assert "\x1b" not in result.stdout + result.stderr
    assert "\r" not in result.stderr


def test_the_models_scheduler_is_below_files_and_flags(ddim, tiny_model, tmp_path):
    import shutil

    shutil.copytree(tiny_model, "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    found = {**json.loads(path.read_text()), "timestep_spacing": "trailing", "clip_sample": False, "skip_prk_steps": 1}
    path.write_text(json.dumps(found))
    (tmp_path / "run.toml").write_text("[scheduler]\nclip_sample = true\n")
    shown = json.loads(ddim("config", "show", "-m", "model", "-c", "run.toml", "--json").stdout)
    assert shown["config"]["scheduler"]["timestep_spacing"] == "trailing"
    assert shown["config"]["scheduler"]["clip_sample"] is True
    assert shown["origins"]["scheduler.timestep_spacing"] == "model's scheduler_config.json"
    assert shown["origins"]["scheduler.clip_sample"] == "run.toml:2"
    verbose = ddim("sample", "-m", "model", "--dry-run", "-v")
    assert "skip_prk_steps" in verbose.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--prediction-type", "v_prediction"], "was trained with"),
        (["--set", "scheduler.beta_end=0.03"], "was trained with"),
        (["--steps", 3], "starts at timestep 666"),
        (["--set", "scheduler.num_train_timesteps=2000"], "num_train_timesteps = 2000"),
    ],
)
def test_settings_that_make_garbage_are_warned_of_once(tiny, args, says):
    result = tiny("--dry-run", *args)
    assert result.exit_code == 0
    assert result.stderr.count("warning: ") == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--steps", 0], "sampling.steps = 0"),
        (["--steps", 1001], "use at most 1000 (sampling.steps: --steps"),
        (["--eta", -1], "at least 0"),
        (["--eta", 1.5], "at most 1.0"),
        (["--spacing", "even"], '"leading"'),
        (["--beta-schedule", "cosine"], '"squaredcos_cap_v2"'),
        (["-c", "none.toml"], "no such file"),
        (["-m", "nonesuch"], "mnist"),
        (["--seeds", "5-2"], "backwards"),
        (["--seeds", "0-9999999999"], "10,000,000"),
        (["--seed", 2**63 - 1, "-n", 2], "leaves no room"),
        (["--set", f"sampling.steps={'9' * 5000}"], "not a TOML value"),
        (["-m", "x" * 300], "File name too long"),
        (["--seed", 1, "--seeds", "3"], "two ways"),
        (["-n", 4, "--seeds", "3"], "two ways"),
        (["-o", "file"], "is a file"),
        (["-o", "file/below"], "is a file"),
        (["-o", "/proc/none/x"], "cannot be made"),
        (["--device", "cuda:99"], "device cuda:99"),
        (["--device", "toaster"], "auto, cpu, cuda"),
        (["--dtype", "int8"], "bfloat16"),
        (["--shard", "5/4"], "no part 5 of 4"),
        (["--set", "sampling.stepz=3"], "did you mean sampling.steps"),
        (["--set", "scheduler.beta_start=0.5"], "is above"),
        (["--set", "scheduler.trained_betas=[0.1]"], "as many"),
        (["--spacing", "trailing", "--set", "scheduler.rescale_betas_zero_snr=true"], "v_prediction"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_2(ddim, tmp_path, args, says):
    (tmp_path / "file").write_text("")
    result = ddim("sample", *args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_json_says_what_went_wrong_too(ddim):
    result = ddim("sample", "--eta", -1, "--json")
    assert json.loads(result.stdout)["exit_code"] == 2


def test_a_network_that_explodes_names_seed_and_step(ddim, tiny_model, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, "model")
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "conv_out.bias": torch.full_like(weights["conv_out.bias"], 3e38)}, path)
    result = ddim("sample", "-m", "model", "--seeds", "6,7", "-o", "out", "--no-clip-sample")
    assert result.exit_code == 1
    assert "seed 6: " in result.stderr
    assert "at step 1 of 50 (timestep 980)" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(start, tiny_model, tmp_path):
    command = ("sample", "-m", tiny_model, "-n", 120, "--steps", 30, "-b", 4, "-o", "out")
    process, out = start(*command), tmp_path / "out"
    deadline = time.monotonic() + 120
    while not (out / "000007.json").exists():
        assert time.monotonic() < deadline, process.stderr
        time.sleep(0.02)
    process.kill(signal.SIGINT)
    assert process.wait() == 130, process.stderr
    assert "interrupted: " in process.stderr
    assert "of 120 images were made" in process.stderr
    assert "Traceback" not in process.stderr
    sidecars = sorted(out.glob("0*.json"))
    assert 8 <= len(sidecars) < 120
    assert len(list(out.glob("0*.png"))) == len(sidecars)
    assert not list(out.glob(".*"))
    # The same command finds what is there, and makes the rest.
    before = {path.name: path.read_bytes() for path in out.glob("0*.png")}
    again = start(*command)
    assert again.wait() == 0, again.stderr
    assert f"{len(sidecars)} images are there already" in again.stderr
    assert len(list(out.glob("0*.png"))) == 120
    assert all((out / name).read_bytes() == content for name, content in before.items())


def test_pictures_that_are_not_square(ddim, tiny_model, tmp_path):
    """As a flag the size is the one of a config, which a finished folder shows."""
    assert ddim("sample", "-m", tiny_model, "--image-size", "8x16", "--steps", 2, "-n", 1, "-o", "out").exit_code == 0
    with Image.open(tmp_path / "out" / "000000.png") as image:
        assert image.size == (16, 8)
    (tmp_path / "pair.toml").write_text("model.image_size = [8, 16]")
    again = ddim("sample", "-m", tiny_model, "-c", "pair.toml", "--steps", 2, "-n", 1, "-o", "out")
    assert again.exit_code == 0, again.stderr
    assert "nothing to do" in again.stdout + again.stderr
