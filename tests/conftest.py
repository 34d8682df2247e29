"""Models made on the spot, and the command line in-process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent

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
