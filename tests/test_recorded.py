"""What every command leaves on disk, held against a record: folders, names, sidecars, identities and pixels.

The record is in ``data/recorded``: one JSON file and one array of pixels a case. Write it anew, after a change that is
meant, with ``python tests/test_recorded.py``. What depends on the machine or the clock is left out. Pixels are equal
on the CPU they were recorded on, and within 1/255 on any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

TESTS = Path(__file__).parent
RECORDED = TESTS / "data" / "recorded"
DIGITS = TESTS / "data" / "digits"
PLAIN = ("--no-compile", "--dtype", "float32", "--device", "cpu")
# Each case is a list of commands, run one after the other in an empty folder.
CASES: dict[str, list[str]] = {
    "sample": ["sample --steps 4 -n 3"],
    "sample-noisy": ["sample --steps 3 --seeds 5,7,1000,1001 --eta 1 -b 2 --subdirs --spacing trailing -o out"],
    "sample-large-variance": [
        """sample --steps 3 -n 2 --set 'sampling.variance="large"' --thresholding --no-grid --spacing uniform"""
    ],
    "sample-shards": [f"sample --steps 2 -n 5 -b 2 -o out --shard {i}/2" for i in (0, 1)],
    "sample-array": ["sample --steps 2 -n 3 -o out --npz all.npz"],
    "sample-classes": [
        "sample -m conditional --classes 0-2 --guidance-scale 2 --guidance-rescale 0.5 --set model.null_class=3 "
        "--steps 3 -n 4 -o out"
    ],
    "invert": [f"invert {DIGITS}/0.png {DIGITS}/1.png {DIGITS}/2.png {DIGITS}/3.png --steps 4"],
    "latents": [f"invert {DIGITS}/1.png {DIGITS}/2.png --steps 3 -o up", "sample --latents up"],
    "interpolate": ["interpolate --between 3,8,5 --frames 3 --gif --steps 3"],
    "interpolate-square": ["interpolate --between 1,2,3,4 --square --frames 3 --steps 2 -o out"],
    "trajectory": ["trajectory --seeds 0,7 --steps 5 --every 2"],
    "trajectory-states": ["trajectory --seeds 7 --show xt --gif --eta 0.5 --steps 4 -o out"],
    "sweep": ["sweep --axis steps=2,3 --axis eta=0.0,1.0 -n 2"],
    "replay": ["sample --steps 3 -n 3 -b 3 --eta 0.3 -o first", "replay first/000001.json -o again"],
}
# Of the machine, the clock, or a consequence of rounding.
VOLATILE = {
    *("timing", "created", "finished", "seconds", "images_per_second", "device_name", "threads", "versions", "bytes"),
    *("pixels_sha256", "error", "mean_error", "path"),
}


def make_conditional(folder: Path) -> None:
    """A random class-conditional network, saved by diffusers as a pipeline directory."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=4,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder / "conditional")


def stable(value: Any, inside: str = "") -> Any:
    """A JSON value without what differs from one machine or minute to the next."""
    if isinstance(value, dict):
        # Latents carry rounding; the weights of a model made on the spot may.
        left_out = VOLATILE | ({"sha256"} if inside == "latent" or value.get("source") == "conditional" else set())
        return {k: stable(v, k) for k, v in value.items() if k not in left_out}
    if isinstance(value, list):
        return [stable(v, inside) for v in value]
    if isinstance(value, str):
        return value.replace(str(DIGITS), "DIGITS")
    return value


def read(path: Path) -> tuple[Any, np.ndarray | None]:
    """What is recorded of a file, and its pixels if it is a picture."""
    if path.suffix == ".json":
        return stable(json.loads(path.read_text())), None
    if path.suffix in (".png", ".gif"):
        with Image.open(path) as image:
            text = image.info.get("ddim")
            about = {"mode": image.mode, "frames": getattr(image, "n_frames", 1)}
            return {**about, "text": stable(json.loads(text)) if text else None}, np.asarray(image.convert("RGB"))
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: list(arrays[name].shape) for name in arrays.files}, arrays["arr_0"]
    return None, None


def run(case: str, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run a case in an empty folder: what is recorded of it, and the pixels by file."""
    from ddim_cli.cli.app import app

    if case == "sample-classes":
        make_conditional(folder)
    said = []
    for command in CASES[case]:
        plain = () if command.startswith("replay") else PLAIN
        result = CliRunner().invoke(app, [*shlex.split(command), *plain, "--json"])
        assert result.exit_code == 0, result.stderr
        said.append(stable(json.loads(result.stdout)))
    shutil.rmtree(folder / "conditional", ignore_errors=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): read(path) for path in files}
    about = {name: content for name, (content, _) in found.items()}
    return {"stdout": said, "files": about}, {name: pixels for name, (_, pixels) in found.items() if pixels is not None}


def cpu() -> str:
    """What the rounding of a CPU depends on, as a hash: its make and its instructions, and torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = [platform.processor()]
    wanted = ("vendor_id", "cpu family", "model\t", "flags")
    facts = [" ".join(line.split()) for line in lines if line.startswith(wanted)]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return hashlib.sha256("\n".join([*facts, torch.__version__, threads]).encode()).hexdigest()[:16]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_as_recorded(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about, pixels = run(case, tmp_path)
    recorded = json.loads((RECORDED / f"{case}.json").read_text())
    # What is printed may say more than it did, and nothing less.
    before, now = recorded["about"], json.loads(json.dumps(about))
    for said, says in zip(before["stdout"], now["stdout"], strict=True):
        assert {key: says.get(key) for key in said} == said
    assert now["files"] == before["files"]
    with np.load(RECORDED / f"{case}.npz") as arrays:
        assert set(arrays.files) == set(pixels)
        for name, found in pixels.items():
            expected = arrays[name]
            assert found.shape == expected.shape, name
            largest = int(np.abs(found.astype(int) - expected.astype(int)).max())
            assert largest <= (0 if recorded["cpu"] == cpu() else 1), f"{name}: {largest}/255"


# Folders that version 0.1.0 left half made: the command that finishes them, and how much of it was there.
HALF = {
    "sample": ("sample --steps 3 -n 4", 2, 2),
    "interpolate": ("interpolate --between 3,8 --frames 4 --steps 3", 3, 1),
    "invert": (f"invert {DIGITS}/0.png {DIGITS}/1.png --steps 3", 1, 1),
    "latents": ("sample --latents 0.latent.safetensors 1.latent.safetensors", 1, 1),
    "trajectory": ("trajectory --seeds 0,1 --steps 3", 1, 1),
    "sweep": ("sweep --axis steps=2,3 -n 2", 3, 1),
}


@pytest.mark.parametrize("name", HALF)
def test_a_folder_half_made_before_is_finished(name, tmp_path, ddim):
    command, there, missing = HALF[name]
    shutil.copytree(TESTS / "data" / "half", tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in (tmp_path / name).rglob("*.png") if "grid" not in path.name}
    for made, present in ((missing, there), (0, there + missing)):
        result = ddim(*shlex.split(command), *PLAIN, "-o", name, "--json")
        assert result.exit_code == 0, result.stderr
        told = json.loads(result.stdout)
        assert (told["made"], told["present"]) == (made, present)
    half_written = tmp_path / "sample" / "000003.png"
    assert all(path.read_bytes() == data for path, data in before.items() if path != half_written)


def options() -> dict[str, list[str]]:
    """The options and arguments of every command."""
    import typer

    from ddim_cli.cli.app import app

    def of(command: Any, name: str) -> Iterator[tuple[str, list[str]]]:
        yield name, sorted(n for p in command.params for n in [*p.opts, *p.secondary_opts])
        if hasattr(command, "list_commands"):
            for inner in sorted(command.list_commands(None)):
                yield from of(command.get_command(None, inner), f"{name} {inner}")

    return dict(of(typer.main.get_command(app), "ddim"))


def test_every_option_is_still_there():
    recorded = json.loads((RECORDED / "options.json").read_text())
    found = options()
    assert set(recorded) <= set(found)
    for command, names in recorded.items():
        assert set(names) <= set(found[command]), command


def record() -> None:
    """Write the record anew."""
    RECORDED.mkdir(exist_ok=True)
    (RECORDED / "options.json").write_text(json.dumps(options(), indent=1) + "\n")
    torch.set_num_threads(1)
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            os.chdir(name)
            about, pixels = run(case, Path(name))
            os.chdir(TESTS)
        text = json.dumps({"cpu": cpu(), "about": about}, indent=1, ensure_ascii=False)
        (RECORDED / f"{case}.json").write_text(text + "\n")
        np.savez_compressed(RECORDED / f"{case}.npz", **pixels)
        print(case, file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    record()
