"""Models from the Hub, against a server on loopback; in processes of their own, as their variables are read once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import COMMIT, HubServer


@pytest.fixture
def flat(tiny_model, tmp_path):
    """The layout of google/ddpm-*: everything in the root; and files that nobody needs."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for file in (
        *(tiny_model / "unet").iterdir(),
        *(tiny_model / "scheduler").iterdir(),
        tiny_model / "model_index.json",
    ):
        shutil.copy(file, folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"not needed beside safetensors")
    (folder / "training.tfevents").write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(flat, tiny_model):
    with HubServer(
        {"google/flat": flat, "owner/pipeline": tiny_model, "owner/gated": flat}, ("owner/gated",)
    ) as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    def run(*args, **variables):
        home = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        command = [sys.executable, "-m", "ddim_cli", *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**environment, **home, **variables}, check=False
        )

    return run


SHORT = ("--steps", 4, "-n", 1, "-o", "out")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def downloads(hub):
    """(path, range) of what was fetched of files."""
    return [(path, asked) for method, path, asked in hub.requests if method == "GET" and "/resolve/" in path]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["google/flat", "owner/pipeline"])
def test_both_layouts_and_only_what_is_needed(run, hub, tmp_path, name):
    result = run("sample", "-m", name, *SHORT)
    assert result.returncode == 0, result.stderr
    sidecar = json.loads((tmp_path / "out" / "000000.json").read_text())
    assert sidecar["model"]["kind"] == "hub"
    assert sidecar["model"]["revision"] == COMMIT
    fetched = {path.rpartition("/")[2] for path, asked in downloads(hub) if asked is None}
    index = {"model_index.json"} if name == "owner/pipeline" else set()
    assert fetched == {"config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors", *index}
    hub.requests.clear()
    shutil.rmtree(tmp_path / "out")
    assert run("sample", "-m", name, *SHORT).returncode == 0
    assert not downloads(hub), "fetched twice"


def shard(folder):
    """The weights of a flat model in two files, and the index of them."""
    whole = folder / WEIGHTS
    tensors = load_file(whole)
    names = sorted(tensors)
    where = {name: f"{WEIGHTS.split('.')[0]}-{1 + (i % 2):05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    whole.unlink()


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=SLOW)])
def test_a_dry_run_reads_no_weights_and_plans_what_is_run(run, hub, flat, tmp_path, sharded):
    if sharded:
        shard(flat)
    assert sum(file.stat().st_size for file in flat.glob("*.safetensors")) > 150_000
    args = ("sample", "-m", "google/flat", "--steps", 4, "-n", 1)
    planned = run(*args, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    asked = [range_ for path, range_ in downloads(hub) if path.endswith(".safetensors")]
    assert asked == ["bytes=0-100000"] * (2 if sharded else 1)
    plan = json.loads(planned.stdout)

    assert run(*args).returncode == 0
    [folder] = (tmp_path / "outputs").iterdir()
    made = json.loads((folder / "000000.json").read_text())["model"]
    assert folder == tmp_path / plan["folder"]
    assert {key: plan["model"][key] for key in made} == made

    hub.requests.clear()
    cached = run(*args, "--dry-run", "--json")
    assert json.loads(cached.stdout)["model"] == plan["model"]
    asked = [(method, range_) for method, path, range_ in hub.requests if path.endswith(".safetensors")]
    assert asked == [("HEAD", None)] * (2 if sharded else 1), "asked for more than whether the cached files are current"


@pytest.mark.slow
def test_a_dry_run_into_a_folder_reads_no_weights(run, hub):
    assert run("sample", "-m", "google/flat", *SHORT, "--dry-run").returncode == 0
    assert [asked for path, asked in downloads(hub) if path.endswith(WEIGHTS)] == ["bytes=0-100000"]


@SLOW
def test_shards_of_which_one_is_cached(run, hub, flat, tmp_path):
    shard(flat)
    args = ("sample", "-m", "google/flat", "--dry-run", "--json")
    plan = json.loads(run(*args).stdout)
    assert run("sample", "-m", "google/flat", *SHORT).returncode == 0
    next((tmp_path / "hf").rglob("*-00002-of-00002.safetensors")).unlink()
    hub.requests.clear()
    assert json.loads(run(*args).stdout)["model"] == plan["model"]
    assert [asked for _, asked in downloads(hub)] == ["bytes=0-100000"]


@pytest.mark.slow
def test_other_bytes_than_were_announced_are_refused_and_not_kept(run, hub, tmp_path):
    hub.spoiled = (WEIGHTS,)
    result = run("sample", "-m", "google/flat", *SHORT)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert f"google/flat: {WEIGHTS}: the download broke: its sha256 is " in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
    hub.spoiled = ()
    assert run("sample", "-m", "google/flat", *SHORT).returncode == 0


def test_bin_files_are_fetched_for_a_dry_run(run, hub, flat):
    torch.save(load_file(flat / WEIGHTS), flat / "diffusion_pytorch_model.bin")
    (flat / WEIGHTS).unlink()
    result = run("sample", "-m", "google/flat", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    assert [asked for path, asked in downloads(hub) if path.endswith(".bin")] == [None]


@pytest.mark.slow
def test_offline_from_the_cache(run, hub):
    missing = run("config", "show", "-m", "google/flat", HF_HUB_OFFLINE="1")
    assert missing.returncode == 2
    assert "not in the cache, and HF_HUB_OFFLINE is set" in missing.stderr
    assert run("sample", "-m", "google/flat", *SHORT).returncode == 0
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        hub.requests.clear()
        result = run("inspect", "google/flat", **variables)
        assert result.returncode == 0, result.stderr
        assert not hub.requests


@pytest.mark.parametrize(
    ("args", "variables", "says"),
    [
        (["nobody/nothing"], {}, "not found on the Hub, nor as a directory"),
        (["owner/gated"], {}, "gated on the Hub"),
        (["google/flat", "--set", "model.revision=v9"], {}, "no such revision"),
        (["google/flat"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached"),
    ],
)
def test_what_can_go_wrong(run, args, variables, says):
    result = run("config", "show", "-m", *args, **variables)
    assert result.returncode == 2, result.stderr
    assert says in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_a_token_opens_what_is_gated(run, hub):
    assert run("config", "show", "-m", "owner/gated", HF_TOKEN=hub.token).returncode == 0


def test_a_variant_that_is_not_there(run):
    result = run("sample", "-m", "google/flat", "--set", "model.variant=fp16", *SHORT)
    assert result.returncode == 2
    assert "no diffusion_pytorch_model.fp16.safetensors; there is" in result.stderr


@pytest.mark.slow
def test_a_broken_download_has_its_own_message(run, hub):
    hub.break_download = True
    result = run("config", "show", "-m", "google/flat")
    assert result.returncode == 2
    assert "the download broke" in result.stderr
    hub.break_download = False
    assert run("config", "show", "-m", "google/flat").returncode == 0


def test_config_check_asks_nobody(run, hub, tmp_path):
    (tmp_path / "run.toml").write_text('[model]\nsource = "google/flat"\n')
    assert run("config", "check", "run.toml").returncode == 0
    assert not hub.requests


PARTS = ("unet", "vae", "text_encoder")
NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/config.json" for part in PARTS),
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
}


@pytest.fixture
def diffusion(tiny_text_model, hub, tmp_path):
    """A repository as those of Stable Diffusion are: every format and variant, and parts that nobody needs."""
    folder = tmp_path / "diffusion"
    shutil.copytree(tiny_text_model, folder)
    for part, stem, pickled in (
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model", "pytorch_model.bin"),
    ):
        weights = load_file(folder / part / f"{stem}.safetensors")
        save_file({k: v.half() for k, v in weights.items()}, folder / part / f"{stem}.fp16.safetensors")
        for name in (pickled, pickled.replace(".bin", ".fp16.bin"), "flax_model.msgpack", "model.onnx", "openvino.bin"):
            (folder / part / name).write_bytes(b"not needed")
    for part in ("safety_checker", "feature_extractor"):
        (folder / part).mkdir()
        for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
            (folder / part / name).write_bytes(b"not needed")
    for name in ("v1-5-pruned.ckpt", "v1-5-pruned-emaonly.safetensors", "README.md"):
        (folder / name).write_bytes(b"not needed")
    index = folder / "model_index.json"
    checkers = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index.write_text(json.dumps({**json.loads(index.read_text()), **checkers}))
    hub.repositories["owner/diffusion"] = folder
    return folder


TEXT = ("sample", "-m", "owner/diffusion", "--prompt", "a")


def fetched(hub):
    return {path.partition("/resolve/")[2].partition("/")[2] for path, asked in downloads(hub) if asked is None}


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokenizer", ["both", pytest.param("tokenizer.json", marks=SLOW), pytest.param("vocab.json", marks=SLOW)]
)
def test_a_text_model_and_only_what_is_needed(run, hub, diffusion, tmp_path, tokenizer):
    words = json.loads((diffusion / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    names = {"tokenizer.json"} if tokenizer == "tokenizer.json" else {"vocab.json", "merges.txt"}
    if tokenizer != "tokenizer.json":
        (diffusion / "tokenizer" / "vocab.json").write_text(json.dumps(words))
        (diffusion / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    if tokenizer == "vocab.json":
        (diffusion / "tokenizer" / "tokenizer.json").unlink()
    result = run(*TEXT, *SHORT, "--no-compile")
    assert result.returncode == 0, result.stderr
    expected = NEEDED | {f"tokenizer/{name}" for name in names | {"tokenizer_config.json"}}
    assert fetched(hub) == expected
    sidecar = json.loads((tmp_path / "out" / "000000.json").read_text())
    assert (sidecar["model"]["kind"], sidecar["model"]["revision"]) == ("hub", COMMIT)
    assert sidecar["sampling"]["tokens"] == 1

    hub.requests.clear()
    shutil.rmtree(tmp_path / "out")
    offline = run(*TEXT, *SHORT, "--no-compile", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert not hub.requests
    assert json.loads((tmp_path / "out" / "000000.json").read_text())["model"] == sidecar["model"]


@pytest.mark.slow
def test_a_variant_of_every_part_that_has_it(run, hub, diffusion, tmp_path):
    (diffusion / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (diffusion / "vae" / "diffusion_pytorch_model.fp16.bin").unlink()
    result = run(*TEXT, *SHORT, "--no-compile", "--set", "model.variant=fp16")
    assert result.returncode == 0, result.stderr
    assert {name for name in fetched(hub) if name.endswith(("safetensors", "bin"))} == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.fp16.safetensors",
    }


@pytest.mark.slow
def test_a_dry_run_of_a_text_model_fetches_no_weights(run, hub, diffusion, tmp_path):
    planned = run(*TEXT, "--steps", 4, "-n", 1, "--no-compile", "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    asked = {path.partition(COMMIT)[2] or path: range_ for path, range_ in downloads(hub) if path.endswith("tensors")}
    assert len(asked) == 3, "the header of every part's weights"
    assert set(asked.values()) == {"bytes=0-100000"}
    plan = json.loads(planned.stdout)["model"]
    assert run(*TEXT, *SHORT, "--no-compile").returncode == 0
    made = json.loads((tmp_path / "out" / "000000.json").read_text())["model"]
    assert {key: plan[key] for key in made} == made


@pytest.mark.slow
def test_a_part_of_other_bytes_than_were_announced_is_refused(run, hub, diffusion, tmp_path):
    hub.spoiled = ("vae/diffusion_pytorch_model.safetensors",)
    result = run(*TEXT, *SHORT, "--no-compile")
    assert result.returncode == 2, result.stderr
    assert "vae/diffusion_pytorch_model.safetensors: the download broke: its sha256 is " in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("tokenizer", "the tokenizer is missing"),
        ("vae", "there is no vae"),
        ("text_encoder", "there is no text_encoder/config.json"),
        ("scheduler", "there is no scheduler/scheduler_config.json"),
    ],
)
def test_a_repository_that_lacks_a_part(run, diffusion, lost, says):
    shutil.rmtree(diffusion / lost)
    result = run(*TEXT, *SHORT)
    assert result.returncode == 2, result.stderr
    assert "a part of the pipeline is missing" in result.stderr or lost == "tokenizer"
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
