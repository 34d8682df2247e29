"""Models from the Hub, against a server on loopback; in processes of their own, as their variables are read once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["google/flat", "owner/pipeline"])
def test_both_layouts_and_only_what_is_needed(run, hub, tmp_path, name):
    result = run("sample", "-m", name, *SHORT)
    assert result.returncode == 0, result.stderr
    sidecar = json.loads((tmp_path / "out" / "000000.json").read_text())
    assert sidecar["model"]["kind"] == "hub"
    assert sidecar["model"]["revision"] == COMMIT
    fetched = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {"config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"}
    hub.requests.clear()
    shutil.rmtree(tmp_path / "out")
    assert run("sample", "-m", name, *SHORT).returncode == 0
    assert not [path for method, path in hub.requests if method == "GET" and "/resolve/" in path], "fetched twice"


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
