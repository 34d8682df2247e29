"""Models made on the spot, and the command line in-process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# As the command line has it; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent
# What tests of every folder share.
sys.path.insert(0, str(TESTS))

from object_server import ObjectServer  # noqa: E402
from pipelines import make_latent_pipeline, make_text_pipeline  # noqa: E402

# Help and errors are wrapped to the terminal's width: give the tests a wide one, without colours.
os.environ.update(COLUMNS="200", TERMINAL_WIDTH="200", NO_COLOR="1")
# What a user keeps, compiled networks above all, is no business of the tests, nor theirs the user's.
_CACHE = tempfile.TemporaryDirectory(prefix="ddim-tests-")
os.environ["DDIM_CACHE"] = _CACHE.name
# Nor are a user's buckets; and no test asks a cloud's machine for credentials.
for _name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[_name]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


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
    """A random Stable Diffusion pipeline of 64x64 RGB pictures and 4x32x32 latents, its tokens single letters."""
    folder = tmp_path_factory.mktemp("models") / "tiny-text"
    make_text_pipeline(folder, words=())
    return folder


@pytest.fixture(scope="session")
def tiny_latent_model(tmp_path_factory) -> Path:
    """A random unconditional latent model of 64x64 pictures, saved as an LDMPipeline."""
    folder = tmp_path_factory.mktemp("models") / "tiny-latent"
    make_latent_pipeline(folder)
    return folder


@pytest.fixture
def ddim(monkeypatch, tmp_path):
    """Run ``ddim ARGS...`` in a fresh working directory; the result has exit_code, stdout and stderr.

    ``stdin`` is what can be read there.
    """
    monkeypatch.chdir(tmp_path)

    def run(*args, stdin: bytes | None = None):
        from ddim_cli.cli.app import app

        result = CliRunner().invoke(app, [str(a) for a in args], input=stdin)
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

    def pipes(self) -> tuple[BinaryIO, BinaryIO]:
        """Our ends of its stdin and stdout, where it was started with ``piped``."""
        return self.streams.with_suffix(".in").open("wb"), self.streams.with_suffix(".out").open("rb")

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

    def start(self, *args, cwd: Path, before: str = "", piped: bool = False, **environment: str) -> Forked:
        self._count += 1
        streams = self._folder / str(self._count)
        for ending in ("in", "out") if piped else ():
            os.mkfifo(streams.with_suffix(f".{ending}"))
        question = {
            "args": [str(a) for a in args],
            "cwd": str(cwd),
            "streams": str(streams),
            "env": environment,
            "before": before,
            "piped": piped,
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

    ``before`` is Python that runs there first; with ``piped`` its stdin and stdout are pipes (`Forked.pipes`); other
    keywords are environment variables.
    """
    return lambda *args, **environment: fork_server.start(*args, cwd=tmp_path, **environment)


@pytest.fixture
def one_thread():
    """As many as a process of ``start`` has: another number changes the last bits of a picture."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def object_server(tmp_path_factory):
    with ObjectServer(tmp_path_factory.mktemp("buckets")) as server:
        yield server


@pytest.fixture
def s3(object_server, monkeypatch):
    """A real S3 server on loopback, empty, and this process's environment set to use it; see `ObjectServer`.

    A process that is started by ``start`` needs ``**s3.environment()``.
    """
    object_server.clear()
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    yield object_server
    object_server.clear()
