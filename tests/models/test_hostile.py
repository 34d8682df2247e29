"""Files made hostile on purpose: never executed, never a traceback, always exit 2 and a sentence."""

import os
import pickle
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddim_cli import load_model
from ddim_cli.errors import ModelError

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Payload:
    """Unpickled carelessly, creates the file ``pwned``."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture
def model(tiny_model, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    return directory


@pytest.mark.parametrize("name", ["ckpt.pth", "model.ckpt", "model.pt", "model.bin"])
@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_that_would_run_something(ddim, tmp_path, name, archive):
    path = tmp_path / name
    torch.save([{"a": torch.zeros(1)}, Payload()], path, _use_new_zipfile_serialization=archive)
    result = ddim("sample", "-m", path, "--image-size", 8)
    assert result.exit_code == 2
    assert "refused: loading it would run posix.system" in result.stderr
    assert not (tmp_path / "pwned").exists()


def test_a_bare_pickle(ddim, tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Payload()))
    assert ddim("sample", "-m", "model.pt").exit_code == 2
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["model.pt", "ckpt.pth", "model.ckpt"])
@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_of_a_later_protocol_says_what_it_is(ddim, tmp_path, name, write):
    weights = {"a": torch.zeros(1)} if write is torch.save else {"a": [1, 2]}
    with (tmp_path / name).open("wb") as stream:
        write(weights, stream, **{"pickle_protocol" if write is torch.save else "protocol": 4})
    result = ddim("sample", "-m", name, "--image-size", 8)
    assert result.exit_code == 2
    assert f"{name}: refused: it is a pickle of protocol 4, and none above 2 is read" in result.stderr
    assert "would run" not in result.stderr


def test_bytes_that_are_no_pickle_run_nothing(ddim, tmp_path):
    """Torch names the byte that it does not know, which is no name of anything."""
    (tmp_path / "model.pt").write_bytes(b"\x80\x02" + bytes([0x89, 0xFE, 0x01]))
    result = ddim("sample", "-m", "model.pt", "--image-size", 8)
    assert result.exit_code == 2
    assert "model.pt: not a checkpoint, or a damaged one" in result.stderr


def test_bin_weights_in_a_directory(model, tmp_path):
    weights = load_file(model / "unet" / WEIGHTS)
    expected = load_model(model).network.state_dict()
    (model / "unet" / WEIGHTS).unlink()
    torch.save(weights, model / "unet" / "diffusion_pytorch_model.bin")
    found = load_model(model).network.state_dict()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    torch.save({**weights, "x": Payload()}, model / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"posix\.system"):
        load_model(model)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin", "ckpt"])
def test_truncations_at_random_points(model, tmp_path, kind):
    path = model / "unet" / WEIGHTS
    weights = load_file(path)
    source = model
    if kind == "bin":
        path.unlink()
        path = model / "unet" / "diffusion_pytorch_model.bin"
        torch.save(weights, path)
    elif kind == "ckpt":
        source = path = tmp_path / "x.ckpt"
        torch.save(weights, path)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(50):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(ModelError):
            load_model(source, image_size=8)


def test_flipped_bytes_in_the_header(model):
    path = model / "unet" / WEIGHTS
    whole, rng = path.read_bytes(), random.Random(1)
    length = struct.unpack("<Q", whole[:8])[0]
    for _ in range(60):
        broken = bytearray(whole)
        broken[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            loaded = load_model(model)
        except ModelError:
            continue
        # A flip in padding or metadata harms nothing; the tensors are then all there.
        assert loaded.parameters == sum(t.numel() for t in load_file(path).values())


def test_sharded_weights(model):
    weights = load_file(model / "unet" / WEIGHTS)
    expected = load_model(model).network.state_dict()
    (model / "unet" / WEIGHTS).unlink()
    names = sorted(weights)
    shards = {"a": names[::2], "b": names[1::2]}
    import json

    index = {"weight_map": {n: f"{shard}.safetensors" for shard, part in shards.items() for n in part}}
    for shard, part in shards.items():
        save_file({n: weights[n] for n in part}, model / "unet" / f"{shard}.safetensors")
    path = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    found = load_model(model)
    assert all(torch.equal(found.network.state_dict()[k], expected[k]) for k in expected)
    assert len(found.description.weights) == 2
    (model / "unet" / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of 2 shards .* missing: b.safetensors"):
        load_model(model)
    path.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        load_model(model)
    path.write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        load_model(model)
