"""Kept compiled networks: what they are for, when they are not trusted, and what they compute."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_cli.config.schema import ModelSettings
from ddim_cli.errors import RunError, UsageError
from ddim_cli.models.describe import describe_model
from ddim_cli.models.load import load_sampling_network
from ddim_cli.sampling import compiled
from ddim_cli.sampling.compiled import FACTS, Target
from ddim_cli.sampling.network import Networks, Use
from ddim_cli.sampling.reporter import Reporter

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def target(tiny_model, cache):
    return Target(describe_model(ModelSettings(source=str(tiny_model))), CPU, torch.float32, 2)


class Noting(Reporter):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def load(target, setting, reporter=None):
    return Networks().load(Use(target, setting, 1), reporter or Reporter())


def keep_fake(target, monkeypatch):
    """Something kept under the target's key, whose code is never run."""
    path = target.folder
    path.mkdir(parents=True, mode=0o700)
    (path / "network.so").write_bytes(b"code")
    (path / "network.so").chmod(0o600)
    files = {"network.so": compiled._digest(path / "network.so")}
    (path / FACTS).write_text(
        json.dumps({"facts": target.facts(), "files": files, "model": target.model.source, "seconds": 1.0})
    )
    monkeypatch.setattr(compiled, "_load", lambda path, device: "runner")
    return path


def test_the_key_is_all_that_the_code_depends_on(target, tmp_path, monkeypatch):
    folders = {target.folder}
    for change in ({"rows": 3}, {"dtype": torch.bfloat16}, {"model": describe_model(ModelSettings())}):
        folders.add(dataclasses.replace(target, **change).folder)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    folders.add(target.folder)
    monkeypatch.setattr(compiled, "device_name", lambda device: "another processor")
    folders.add(target.folder)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    folders.add(target.folder)
    assert len(folders) == 7


def test_what_fits_is_found(target, monkeypatch):
    assert compiled.find(target) is None
    path = keep_fake(target, monkeypatch)
    assert compiled.find(target) is not None
    assert path.exists()


def damage_code(path):
    (path / "network.so").write_bytes(b"c0de")


def damage_facts(path):
    (path / FACTS).write_text("{")


def lose_code(path):
    (path / "network.so").unlink()


def other_facts(path):
    found = json.loads((path / FACTS).read_text())
    found["facts"]["versions"][1] = "1.0"
    (path / FACTS).write_text(json.dumps(found))


def open_code(path):
    (path / "network.so").chmod(0o666)


def open_folder(path):
    path.chmod(0o777)


@pytest.mark.parametrize("spoil", [damage_code, damage_facts, lose_code, other_facts, open_code, open_folder])
def test_what_does_not_fit_is_thrown_away(spoil, target, monkeypatch):
    path = keep_fake(target, monkeypatch)
    spoil(path)
    loaded = []
    monkeypatch.setattr(compiled, "_load", lambda path, device: loaded.append(path))
    assert compiled.find(target) is None
    assert not path.exists()
    assert not loaded, "it was not even looked into"


def test_without_a_compiler_only_an_explicit_compile_is_an_error(ddim, tiny_model, cache, monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiled, "earns_its_build", lambda *args: True)
    args = ("sample", "-m", tiny_model, "-n", 2, "--steps", 2)
    done = ddim(*args, "--compile", "-o", "a")
    assert done.exit_code == 2
    assert "--compile needs a C++ compiler" in done.stderr
    done = ddim(*args, "-v", "-o", "b")
    assert done.exit_code == 0
    assert "there is no C++ compiler: the network runs uncompiled" in done.stderr
    assert json.loads(Path("b/000000.json").read_text())["runtime"]["compile"] is False
    assert "compiler" not in ddim(*args, "-o", "c").stderr
    assert ddim("compile", "-m", tiny_model).exit_code == 2


def test_a_build_that_fails_ends_an_explicit_compile_alone(target, monkeypatch):
    def fail(*args):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(compiled, "_compile", fail)
    monkeypatch.setattr(compiled, "compiler", lambda: "c++")
    with pytest.raises(RunError, match=r"^the network cannot be compiled: no such instruction$"):
        load(target, True)
    monkeypatch.setattr(compiled, "earns_its_build", lambda *args: True)
    reporter = Noting()
    _, is_compiled = load(target, "auto", reporter)
    assert not is_compiled
    assert "no such instruction; it runs uncompiled" in reporter.notes[0]
    assert not any(compiled.folder().iterdir()), "nothing is left behind"


def test_a_build_that_computes_something_else_is_not_kept(target, monkeypatch):
    class Runner:
        def run(self, inputs):
            return [torch.zeros(target.shape)]

    monkeypatch.setattr(compiled, "_compile", lambda *args: None)
    monkeypatch.setattr(compiled, "_unpack", lambda *args: None)
    monkeypatch.setattr(compiled, "_load", lambda path, device: Runner())
    monkeypatch.setattr(compiled, "compiler", lambda: "c++")
    with pytest.raises(RunError, match="it computes something else"):
        compiled.build(target)
    assert not target.folder.exists()


def test_auto_builds_where_the_plan_is_long_enough(target, monkeypatch):
    network = load_sampling_network(target.model)
    assert not compiled.earns_its_build(target, 10, network)
    assert compiled.earns_its_build(target, 100_000_000, network)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert not compiled.earns_its_build(target, 100_000_000, network), "eight ranks would build the same eight times"


def test_no_compile_looks_for_nothing(target, monkeypatch):
    keep_fake(target, monkeypatch)
    monkeypatch.setattr(compiled, "find", None)
    assert load(target, False)[1] is False


def test_a_smaller_batch_than_the_code_is_for(target, monkeypatch):
    keep_fake(target, monkeypatch)
    network = compiled.find(target)
    x = torch.randn(1, 3, 8, 8)
    rows = network.project(torch.tensor([500]))
    whole = load_sampling_network(target.model)
    torch.testing.assert_close(network.body(x, rows), whole.body(x, whole.project(torch.tensor([500]))))


def test_the_command_lists_and_clears(ddim, target, monkeypatch):
    assert "nothing" in ddim("compile", "--list").stdout
    path = keep_fake(target, monkeypatch)
    [kept] = json.loads(ddim("compile", "--list", "--json").stdout)["kept"]
    assert (kept["shape"], kept["dtype"], kept["folder"]) == ([2, 3, 8, 8], "float32", str(path))
    assert "2 rows of 3x8x8 in float32 on cpu" in ddim("compile", "--list").stdout
    assert ddim("compile", "--list", "--clear").exit_code == 2
    assert json.loads(ddim("compile", "--clear", "--json").stdout)["removed"] == [kept]
    assert not path.exists()


def test_clearing_says_what_is_removed(ddim, target, monkeypatch):
    assert "nothing to remove" in ddim("compile", "--clear").stdout
    path = keep_fake(target, monkeypatch)
    damaged = path.with_name("damaged")
    damaged.mkdir()
    (damaged / FACTS).write_text("{}")
    unfinished = path.with_name(".0123.tmp")
    (unfinished / "kept").mkdir(parents=True)
    result = ddim("compile", "--clear")
    assert result.exit_code == 0, result.stderr
    lines = sorted(result.stdout.splitlines())
    assert len(lines) == 3
    assert f"removed {path}: {target.model.source}, 2 rows of 3x8x8 in float32 on cpu, 0.0 MB" in lines
    assert sum("damaged or unfinished" in line for line in lines) == 2
    assert list(path.parent.iterdir()) == []


def test_what_cannot_be_removed_is_said(ddim, target, monkeypatch):
    path = keep_fake(target, monkeypatch)

    def fail(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(compiled.shutil, "rmtree", fail)
    result = ddim("compile", "--clear")
    assert result.exit_code == 1
    assert f"{path}: cannot be removed: Permission denied" in result.stderr


@pytest.mark.slow
def test_a_build_is_found_by_the_next_process_and_made_again_when_damaged(tiny_model, tmp_path):
    environment = {**os.environ, "DDIM_CACHE": str(tmp_path / "cache")}

    def ddim(*args):
        done = subprocess.run(
            [sys.executable, "-m", "ddim_cli", *map(str, args)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done

    def sample(out, *more):
        ddim("sample", "-m", tiny_model, "-n", 5, "-b", 3, "--steps", 4, "-o", tmp_path / out, *more)
        pairs = [(tmp_path / out / f"{i:06d}.png", tmp_path / out / f"{i:06d}.json") for i in range(5)]
        sidecars = [json.loads(b.read_text()) for _, b in pairs]
        return [np.asarray(Image.open(a)).astype(int) for a, _ in pairs], {s["runtime"]["compile"] for s in sidecars}

    plain, was = sample("plain", "--no-compile")
    assert was == {False}
    first = json.loads(ddim("compile", "-m", tiny_model, "-b", 3, "--json").stdout)
    assert first["built"]
    assert not json.loads(ddim("compile", "-m", tiny_model, "-b", 3, "--json").stdout)["built"]
    names = sorted(p.name for p in (tmp_path / "cache" / "compiled").iterdir())
    assert names == [os.path.basename(first["folder"])], "nothing of the compiler's own is left"

    kept, was = sample("kept")
    assert was == {True}
    assert all(abs(a - b).max() <= 1 for a, b in zip(kept, plain, strict=True))
    again, _ = sample("again")
    assert all((a == b).all() for a, b in zip(kept, again, strict=True))

    code = os.path.join(first["folder"], "network.so")
    with open(code, "r+b") as stream:
        stream.seek(5000)
        stream.write(b"\0\0\0\0damaged")
    after, was = sample("after", "--compile")
    assert was == {True}
    assert all((a == b).all() for a, b in zip(kept, after, strict=True))


def test_compile_on_a_device_without_one(target):
    with pytest.raises(UsageError, match="no compiled network for mps"):
        compiled.build(dataclasses.replace(target, device=torch.device("mps")))


@pytest.fixture
def text_target(tiny_text_model, cache):
    return Target(describe_model(ModelSettings(source=str(tiny_text_model))), CPU, torch.float32, 4, texts=2)


def test_a_guided_network_of_text_sees_each_image_once(text_target, monkeypatch):
    assert text_target.shape == (2, 4, 32, 32)
    assert dataclasses.replace(text_target, texts=1).folder != text_target.folder
    assert dataclasses.replace(text_target, rows=2, texts=1).folder != text_target.folder, "the same x, other texts"
    keep_fake(text_target, monkeypatch)
    network, whole = compiled.find(text_target), load_sampling_network(text_target.model)
    text, steps = torch.randn(4, 77, 8), torch.tensor([500])
    assert torch.equal(network.attend(text), whole.attend(text))
    given = []
    network._runner = SimpleNamespace(run=lambda inputs: given.append([tuple(each.shape) for each in inputs]) or [0])
    x = torch.randn(2, 4, 32, 32)
    network.body(x, network.project(steps), network.attend(text))
    kept = len(network.attend(text)[0, 0])
    assert given == [[(2, 4, 32, 32), tuple(network.project(steps).shape), (4, 77, kept)]]
    # Without guidance, or of a batch that was halved, it is the network itself that runs.
    for images, texts in ((2, 2), (1, 2)):
        arguments = x[:images], network.project(steps), network.attend(text[:texts])
        torch.testing.assert_close(network.body(*arguments), whole.body(*arguments))
    assert len(given) == 1


def test_compile_needs_no_prompt(ddim, tiny_text_model, cache, monkeypatch):
    built = []
    monkeypatch.setattr(compiled, "build", built.append)
    monkeypatch.setattr(compiled, "describe", lambda path: {**facts, "folder": str(path)})
    facts = {"shape": [2, 4, 32, 32], "texts": 4, "dtype": "float32", "device": "cpu", "bytes": 1, "seconds": 1.0}
    result = ddim("compile", "-m", tiny_text_model, "-n", 2, "-b", 2)
    assert result.exit_code == 0, result.stderr
    assert "4 rows of 4x32x32 in float32 on cpu" in result.stdout
    assert ddim("compile", "-m", tiny_text_model, "-n", 2, "-b", 2, "--guidance-scale", 1).exit_code == 0
    assert [(target.rows, target.texts, target.shape[0]) for target in built] == [(4, 2, 2), (2, 1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("foreign", [False, True])
def test_a_compiled_text_network_makes_the_same_pictures(foreign, ddim, tiny_text_model, cache, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(tiny_text_model, path)
    if foreign:
        # What our own network does not know runs as diffusers'.
        config = path / "unet" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "key_of_the_future": True}))
    args = ("-m", path, "--prompt", "a seven", "--steps", 3, "-n", 3, "-b", 2)
    assert ddim("sample", *args, "-o", "plain", "--no-compile").exit_code == 0
    result = ddim("compile", "-m", path, "-n", 3, "-b", 2, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["built"]
    assert ddim("sample", *args, "-o", "kept").exit_code == 0
    for i in range(3):
        plain, kept = (np.asarray(Image.open(f"{name}/00000{i}.png")).astype(int) for name in ("plain", "kept"))
        assert json.loads(Path(f"kept/00000{i}.json").read_text())["runtime"]["compile"] is True
        assert abs(plain - kept).max() <= 1
