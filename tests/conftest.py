"""Models made on the spot, and the command line in-process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# As the command line has it; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent

# Help and errors are wrapped to the terminal's width: give the tests a wide one, without colours.
os.environ.update(COLUMNS="200", TERMINAL_WIDTH="200", NO_COLOR="1")
# What a user keeps, compiled networks above all, is no business of the tests, nor theirs the user's.
_CACHE = tempfile.TemporaryDirectory(prefix="ddim-tests-")
os.environ["DDIM_CACHE"] = _CACHE.name


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The directory of the bundled model."""
    return ROOT / "ddim_cli" / "models" / "bundled" / "mnist"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random 8x8 RGB network, saved by diffusers as a pipeline directory."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_text_model(tmp_path_factory) -> Path:
    """A random text-to-image pipeline of 16x16 pictures, latents [4, 8, 8], whose tokens are the letters a to z."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("models")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|pad|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    text = CLIPTextConfig(
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        vocab_size=len(tokens),
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=autoencoder,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "tiny-text")
    return folder / "tiny-text"


@pytest.fixture
def ddim(monkeypatch, tmp_path):
    """Run ``ddim ARGS...`` in a fresh working directory; the result has exit_code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        from ddim_cli.cli.app import app

        result = CliRunner().invoke(app, [str(a) for a in args])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@dataclass
class Forked:
    """A ``ddim`` process of its own, which need not import torch again."""

    server: ForkServer
    pid: int
    streams: Path

    def wait(self) -> int:
        """The exit code; of one that a signal ended, minus its number."""
        return self.server.ask({"wait": self.pid})

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return self.streams.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return self.streams.with_suffix(".err").read_text()


class ForkServer:
    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # Threads do not survive a fork.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, question: dict) -> int:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, *args, cwd: Path, before: str = "", **environment: str) -> Forked:
        self._count += 1
        streams = self._folder / str(self._count)
        question = {
            "args": [str(a) for a in args],
            "cwd": str(cwd),
            "streams": str(streams),
            "env": environment,
            "before": before,
        }
        return Forked(self, self.ask(question), streams)

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("forked"))
    yield server
    server.stop()


@pytest.fixture
def start(fork_server, tmp_path):
    """Start ``ddim ARGS...`` in a process of its own, in ``tmp_path``.

    ``before`` is Python that runs there first; other keywords are environment variables.
    """
    return lambda *args, **environment: fork_server.start(*args, cwd=tmp_path, **environment)
