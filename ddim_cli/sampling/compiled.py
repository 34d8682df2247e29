"""The compiled network that is kept in the user's cache folder: built once, found by every later process.

It is the network's body as machine code (torch.export, then AOTInductor), for one model, shape, dtype, device,
number of threads and set of versions; all of these are its key. A process that finds it imports neither the
compiler nor diffusers. Beside the code lies a list of its files with their digests, and who built it was this
user: what does not fit is thrown away, never run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim_cli import __version__
from ddim_cli.errors import RunError, UsageError, first_line
from ddim_cli.models.describe import ModelDescription
from ddim_cli.models.hashing import cache_folder, hexdigest
from ddim_cli.models.load import SamplingNetwork, TextNetwork, load_projection, load_sampling_network
from ddim_cli.sampling.precision import device_name

FACTS = "facts.json"
CODE = "network.so"
# Relative to the largest value of the output: what the order of summation may change, with room.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# What a build takes, and the share of a network call that it saves. Those of a CPU are measured (see
# tests/benchmarks/README.md), those of a GPU are not yet.
BUILD_SECONDS = {"cpu": 45.0, "cuda": 90.0}
SHARE_SAVED = {"cpu": 0.05, "cuda": 0.2}
# Of a shorter plan not even the calls that are timed would come back.
FEWEST_CALLS = 1000


@dataclass(frozen=True)
class Target:
    """What a compiled network is for.

    ``rows`` is what the network sees: the batch size, twice that with guidance. Of those of a text-to-image network,
    ``texts`` are of one image, which it is given once.
    """

    model: ModelDescription
    device: torch.device
    dtype: torch.dtype
    rows: int
    tf32: bool = False
    texts: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of what the body is given."""
        return (self.rows // self.texts, *self.model.input_shape)

    def facts(self) -> dict[str, Any]:
        """All that the code depends on."""
        gpu = self.device.type == "cuda"
        capability = torch.cuda.get_device_capability(self.device) if gpu else torch.backends.cpu.get_cpu_capability()
        return {
            "model": [self.model.sha256, self.model.config_sha256],
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "tf32": self.tf32 if gpu else None,
            "device": [self.device.type, device_name(self.device), str(capability)],
            "threads": None if gpu else torch.get_num_threads(),
            "versions": [__version__, torch.__version__, sys.platform],
            **({"texts": self.rows} if self.model.takes_text else {}),
        }

    @property
    def folder(self) -> Path:
        text = json.dumps(self.facts(), sort_keys=True)
        return folder() / hashlib.sha256(text.encode()).hexdigest()[:32]


def folder() -> Path:
    return cache_folder() / "compiled"


def _digest(path: Path) -> str:
    # Several times as fast as sha256, and some of these files are as large as the weights.
    return hexdigest(path, hashlib.blake2b(digest_size=32))


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user (or root) can have written it."""
    if not hasattr(os, "getuid"):
        return True
    stat = path.stat()
    return stat.st_uid in (os.getuid(), 0) and not stat.st_mode & 0o022


def _load(path: Path, device: torch.device) -> Any:
    if device.type == "cuda":
        return torch._C._aoti.AOTIModelContainerRunnerCuda(str(path / CODE), 1, str(device), str(path))
    return torch._C._aoti.AOTIModelContainerRunnerCpu(str(path / CODE), 1)


class CompiledNetwork:
    """A `SamplingNetwork` whose body is kept code, and whose projection is the model's own."""

    def __init__(self, target: Target, runner: Any):
        self._target, self._runner = target, runner
        self._projection = load_projection(target.model, target.device, target.dtype)
        self._whole: SamplingNetwork | None = None

    def project(self, timesteps: Tensor, classes: Tensor | None = None) -> Tensor:
        return self._projection.project(timesteps, classes)

    def body(self, x: Tensor, projections: Tensor, *context: Tensor) -> Tensor:
        if tuple(x.shape) == self._target.shape and all(len(each) == self._target.rows for each in context):
            inputs = [x.contiguous(memory_format=torch.channels_last), projections.contiguous()]
            return self._runner.run([*inputs, *(each.contiguous() for each in context)])[0]
        # A batch that was halved for want of memory: the code is for the whole one.
        if self._whole is None:
            self._whole = load_sampling_network(self._target.model, self._target.device, self._target.dtype)
        return self._whole.body(x, projections, *context)


class CompiledTextNetwork(CompiledNetwork):
    """A `TextNetwork` whose body is kept code, and whose keys and values of texts are the model's own."""

    def attend(self, text: Tensor) -> Tensor:
        assert isinstance(self._projection, TextNetwork)
        return self._projection.attend(text)


def find(target: Target) -> CompiledNetwork | None:
    """The kept network, or None. One that is damaged, or that others could have written, is removed."""
    path = target.folder
    try:
        facts = json.loads((path / FACTS).read_bytes())
        files = facts["files"]
        whole = (
            facts["facts"] == json.loads(json.dumps(target.facts()))
            and CODE in files
            and all(_is_ours(p) for p in (path, *(path / name for name in files)))
            and all(_digest(path / name) == digest for name, digest in files.items())
        )
        runner = _load(path, target.device) if whole else None
    except FileNotFoundError:
        runner = None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        runner = None
    if runner is None:
        shutil.rmtree(path, ignore_errors=True)
        return None
    return (CompiledTextNetwork if target.model.takes_text else CompiledNetwork)(target, runner)


def kept_folders() -> list[Path]:
    return sorted(path.parent for path in folder().glob(f"[!.]*/{FACTS}"))


def describe(path: Path) -> dict[str, Any]:
    """What a kept network is for, and what it takes, as JSON has it. Raises UsageError if it cannot be read."""
    try:
        found = json.loads((path / FACTS).read_bytes())
        facts = found["facts"]
        return {
            "model": found["model"],
            "shape": facts["shape"],
            "texts": facts.get("texts"),
            "dtype": facts["dtype"],
            "device": facts["device"][0],
            "threads": facts["threads"],
            "versions": facts["versions"],
            "bytes": sum(part.stat().st_size for part in path.iterdir()),
            "seconds": found["seconds"],
            "folder": str(path),
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise UsageError(f"{path}: no compiled network, or a damaged one; ddim compile --clear removes it") from None


def clear() -> list[dict[str, Any]]:
    """Remove all that are kept, damaged ones and what builds that were killed have left; what they were, as `describe`.

    Of one that cannot be described there are the keys bytes and folder alone.

    Raises:
        RunError: for one that cannot be removed.
    """
    removed = []
    for path in sorted(folder().iterdir()) if folder().is_dir() else ():
        try:
            facts = describe(path)
        except UsageError:
            facts = {"bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file()), "folder": str(path)}
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            raise RunError(f"{path}: cannot be removed: {error.strerror}") from None
        removed.append(facts)
    return removed


def is_kept(target: Target) -> bool:
    """Whether there is one, without reading it."""
    return (target.folder / FACTS).exists()


def compiler() -> str | None:
    """The C++ compiler that a build would use, or None where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next(filter(None, map(shutil.which, names)), None)


def earns_its_build(target: Target, network_calls: int, network: SamplingNetwork) -> bool:
    """Whether a build saves more than it costs in ``network_calls``, going by a timed call of the network as it is."""
    kind = target.device.type
    # The processes of torchrun would all build the same.
    if kind not in BUILD_SECONDS or network_calls < FEWEST_CALLS or "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    example = _example(target, network)
    with torch.inference_mode():
        network.body(*example)
        started = time.perf_counter()
        network.body(*example).flatten()[0].item()
    saved = (time.perf_counter() - started) * network_calls * SHARE_SAVED[kind]
    return saved > 2 * BUILD_SECONDS[kind]


def _example(target: Target, network: SamplingNetwork) -> tuple[Tensor, ...]:
    """An input of the body: noise, and the projections of the middle of the schedule; of one row if all share it.

    Of a text-to-image network also what it makes of texts, each of as many tokens as the model takes.
    """
    x = torch.randn(target.shape, generator=torch.Generator().manual_seed(0)).to(target.device, target.dtype)
    rows = target.rows if target.model.classes else 1
    timesteps = torch.full((rows,), 500, device=target.device)
    classes = torch.zeros_like(timesteps) if target.model.classes else None
    example = (x.contiguous(memory_format=torch.channels_last), network.project(timesteps, classes))
    if not isinstance(network, TextNetwork):
        return example
    assert target.model.latents is not None
    assert target.model.latents.text is not None
    tokens, width = target.model.latents.text.limit, target.model.latents.text.width
    text = torch.randn(target.rows, tokens, width, generator=torch.Generator().manual_seed(1))
    return (*example, network.attend(text.to(target.device, target.dtype)))


class _Body(nn.Module):
    def __init__(self, network: SamplingNetwork):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, projections: Tensor, *context: Tensor) -> Tensor:
        return self.network.body(x, projections, *context)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _compile(network: SamplingNetwork, example: tuple[Tensor, ...], package: Path, device: torch.device) -> None:
    import torch._inductor

    exported = torch.export.export(_Body(network), example)
    # Weights as constants can be laid out for the convolutions that use them; on a GPU that brings nothing.
    options = {"freezing": device.type == "cpu"}
    torch._inductor.aoti_compile_and_package(exported, package_path=str(package), inductor_configs=options)


def _unpack(package: Path, into: Path) -> None:
    """The code and, for a GPU, its kernels; not the sources it was made from."""
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if name.endswith((".so", ".cubin", ".hsaco")):
                target = into / (CODE if name.endswith(".so") else Path(name).name)
                with archive.open(name) as source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream)


def _check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    difference = (found.float() - expected.float()).abs().max().item()
    allowed = TOLERANCE[dtype] * expected.float().abs().max().item()
    # Written so that NaN fails too.
    if not difference <= allowed:
        raise RuntimeError(f"it computes something else: off by {difference:.3g}, where {allowed:.3g} is allowed")


def build(target: Target) -> CompiledNetwork:
    """Build and keep the network, after it has computed what the one it was made from does.

    Raises:
        UsageError: where there is no C++ compiler.
        RunError: where the compiler fails, or the cache folder cannot be written.
    """
    if target.device.type not in BUILD_SECONDS:
        raise UsageError(f"--compile: there is no compiled network for {target.device.type}; use --no-compile")
    found = compiler()
    if found is None:
        raise UsageError("--compile needs a C++ compiler, and none was found; install one, or use --no-compile")
    # What the compiler leaves behind goes away with the temporary folder, so that this cache stays the only one.
    path = target.folder
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    settings = {"CXX": found, "TORCHINDUCTOR_CACHE_DIR": str(temporary / "compiler")}
    started = time.perf_counter()
    try:
        temporary.mkdir(parents=True, mode=0o700)
        kept = temporary / "kept"
        kept.mkdir(mode=0o700)
        network = load_sampling_network(target.model, target.device, target.dtype, packed=False)
        with torch.no_grad(), _environment(**settings), _quiet():
            example = _example(target, network)
            expected = network.body(*example)
            _compile(network, example, temporary / "network.pt2", target.device)
            _unpack(temporary / "network.pt2", kept)
            for part in kept.iterdir():
                part.chmod(0o600)
            _check(_load(kept, target.device).run(list(example))[0], expected, target.dtype)
        facts = {
            "facts": target.facts(),
            "files": {part.name: _digest(part) for part in sorted(kept.iterdir())},
            "model": target.model.source,
            "seconds": round(time.perf_counter() - started, 1),
        }
        (kept / FACTS).write_text(json.dumps(facts, indent=2))
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            # Another process may have been quicker; what it kept is as good.
            kept.rename(path)
    except OSError as error:
        raise RunError(f"the compiled network cannot be kept: {path.parent}: {error.strerror or error}") from None
    except Exception as error:
        # A compiler fails in as many ways as there are machines; its own words are the best there are.
        raise RunError(f"the network cannot be compiled: {first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    built = find(target)
    if built is None:
        raise RunError(f"the compiled network was kept in {path}, but cannot be read from there")
    return built


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's warnings, which speak of its own insides."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
