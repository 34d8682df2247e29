"""Models in object stores: in a real S3 server on loopback, before which a proxy breaks what networks break."""

import hashlib
import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from ddim_cli.config.schema import ModelSettings
from ddim_cli.models.describe import describe_model

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SHORT = ("--steps", 4, "-n", 1, "--no-grid")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DDIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stored(s3, tiny_model):
    """The folder that is s3://bucket/models/tiny."""
    folder = s3.bucket() / "models" / "tiny"
    shutil.copytree(tiny_model, folder)
    (folder / "notes.md").write_text("not needed")
    return folder


URL = "s3://bucket/models/tiny"


def came(s3):
    """The objects that were fetched, or pieces of them."""
    return [r.key.removeprefix("models/tiny/") for r in s3.faults.requests if r.method == "GET" and not r.is_listing]


def kept(cache):
    """What is kept of objects' contents."""
    return sorted(p.name for p in (cache / "objects").glob("*/files/*/*") if p.name != ".lock")


def model_of(folder):
    return json.loads((folder / "000000.json").read_text())["model"]


def test_pictures_are_those_of_the_directory(ddim, s3, stored, tiny_model, tmp_path):
    assert ddim("sample", "-m", tiny_model, *SHORT, "-o", "here").exit_code == 0
    result = ddim("sample", "-m", URL, *SHORT, "-o", "there")
    assert result.exit_code == 0, result.stderr
    assert s3.faults.listings == 1
    needed = ["model_index.json", WEIGHTS, "scheduler/scheduler_config.json", "unet/config.json"]
    assert sorted(came(s3)) == sorted(needed)
    here, there = (json.loads((tmp_path / name / "000000.json").read_text()) for name in ("here", "there"))
    assert there["image"]["pixels_sha256"] == here["image"]["pixels_sha256"]
    assert there["model"] == {**{k: v for k, v in here["model"].items() if k != "path"}, "source": URL}
    assert there["model"]["kind"] == "directory"

    s3.faults.clear()
    assert ddim("sample", "-m", URL, *SHORT, "-o", "again").exit_code == 0
    assert (s3.faults.listings, s3.faults.count()) == (1, 1), "asked for more than what there is"

    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    replayed = ddim("replay", tmp_path / "there" / "000000.png", "--check", "-o", "replayed")
    assert replayed.exit_code == 0, replayed.stderr
    for path in [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.png")]:
        assert s3.secret.encode() not in path.read_bytes(), path


def test_a_changed_object_is_fetched_anew_and_no_other(ddim, s3, stored, cache):
    assert ddim("sample", "-m", URL, *SHORT, "-o", "old").exit_code == 0
    old = model_of(cache.parent / "old")
    tensors = load_file(stored / WEIGHTS)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, stored / WEIGHTS)
    s3.faults.clear()
    assert ddim("sample", "-m", URL, *SHORT, "-o", "new").exit_code == 0
    assert came(s3) == [WEIGHTS]
    new = model_of(cache.parent / "new")
    assert new["sha256"] == hashlib.sha256((stored / WEIGHTS).read_bytes()).hexdigest() != old["sha256"]
    refused = ddim("replay", "old/000000.png", "-o", "replayed")
    assert refused.exit_code == 2
    assert f"that of {URL} is {new['sha256']}" in refused.stderr
    # What is needed no more is not fetched again either.
    (stored / "notes.md").write_text("changed")
    s3.faults.clear()
    assert ddim("sample", "-m", URL, *SHORT, "-o", "third").exit_code == 0
    assert came(s3) == []


@pytest.mark.parametrize("kind", ["reset", "status", "cut", "lost"])
def test_what_breaks_on_the_way_comes_again(ddim, s3, stored, tiny_model, cache, kind):
    s3.faults.add(kind, method="GET", times=None, probability=0.3)
    result = ddim("sample", "-m", URL, *SHORT, "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert s3.faults.happened[kind] > 0
    expected = hashlib.sha256((tiny_model / WEIGHTS).read_bytes()).hexdigest()
    assert model_of(cache.parent / "out")["sha256"] == expected


@pytest.mark.slow
def test_what_is_half_there_is_not_taken(ddim, s3, stored, cache):
    s3.faults.add("cut", method="GET", key="safetensors", times=None)
    for _ in range(2):
        result = ddim("sample", "-m", URL, *SHORT, "-o", "out")
        assert result.exit_code == 2
        assert f"{URL}/{WEIGHTS}: the " in result.stderr
        assert "broke off, 6 times" in result.stderr
        assert kept(cache) == ["config.json", "model_index.json", "scheduler_config.json"]
    s3.faults.clear()
    # As a killed process leaves it.
    [folder] = {p.parent for p in (cache / "objects").glob("*/files/*/.lock")} - {
        p.parent for p in (cache / "objects").glob("*/files/*/*.json")
    }
    (folder / ".diffusion_pytorch_model.safetensors.part").write_bytes(b"half")
    assert ddim("sample", "-m", URL, *SHORT, "-o", "out").exit_code == 0
    assert came(s3) == [WEIGHTS]
    assert not list(cache.rglob("*.part"))


def test_an_object_that_takes_its_place_meanwhile(s3, stored):
    model = describe_model(ModelSettings(source=URL))
    (stored / WEIGHTS).write_bytes(b"another")
    with pytest.raises(Exception, match=f"{URL}/{WEIGHTS}: another object took its place since it was listed"):
        _ = model.weights
    shutil.rmtree(stored)
    with pytest.raises(Exception, match=f"{URL}/{WEIGHTS}: there is no such object"):
        _ = model.weights


@pytest.mark.slow
def test_a_store_that_cannot_be_reached(ddim, s3, stored):
    with s3.refusing():
        result = ddim("sample", "-m", URL, *SHORT, "-o", "out")
        assert result.exit_code == 2
        assert result.stderr == f"error: {URL}: the store cannot be reached, 6 times\n"
    assert ddim("sample", "-m", URL, *SHORT, "-o", "out").exit_code == 0
    with s3.refusing():
        result = ddim("sample", "-m", URL, *SHORT, "-o", "out2")
        assert result.exit_code == 0
        assert f"{URL}: the store cannot be reached; the model is taken as it was when it last could" in result.stderr


def test_who_asks_nobody(ddim, s3, stored, tmp_path):
    (tmp_path / "job.toml").write_text(f'[model]\nsource = "{URL}"\n')
    result = ddim("config", "check", "job.toml")
    assert result.exit_code == 0, result.stderr
    assert f"{URL}: not in the cache, and the store was not asked" in result.stderr
    assert s3.faults.count() == 0
    assert ddim("sample", "-m", URL, *SHORT, "-o", "out").exit_code == 0
    s3.faults.clear()
    result = ddim("config", "check", "job.toml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert s3.faults.count() == 0


@pytest.mark.slow
def test_a_dry_run_reads_no_weights_whose_sha256_the_store_keeps(ddim, s3, stored, cache):
    from ddim_cli.stores.objects import open_url

    weights = open_url(f"{URL}/{WEIGHTS}")
    data = (stored / WEIGHTS).read_bytes()
    here = {"Bucket": weights.bucket, "Key": weights.key}
    weights._fs.call_s3("put_object", **here, Body=data, ChecksumAlgorithm="SHA256")
    assert weights.sha256() == hashlib.sha256(data).hexdigest()
    s3.faults.clear()
    planned = ddim("sample", "-m", URL, *SHORT, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert kept(cache) == ["config.json", "model_index.json", "scheduler_config.json"]
    assert ddim("sample", "-m", URL, *SHORT).exit_code == 0
    plan = json.loads(planned.stdout)
    assert (cache.parent / plan["folder"] / "000000.json").is_file()
    made = model_of(cache.parent / plan["folder"])
    assert made["sha256"] == hashlib.sha256(data).hexdigest()
    assert {key: plan["model"][key] for key in made} == made


@pytest.mark.slow
def test_a_weights_file_with_what_lies_beside_it(ddim, s3, stored, tiny_model, tmp_path):
    url = f"{URL}/{WEIGHTS}"
    result = ddim("sample", "-m", url, *SHORT, "-o", "file")
    assert result.exit_code == 0, result.stderr
    assert s3.faults.listings == 0
    assert sorted(came(s3)) == [WEIGHTS, "unet/config.json"] or sorted(came(s3)) == sorted(
        [WEIGHTS, "scheduler/scheduler_config.json", "unet/config.json"]
    )
    assert ddim("sample", "-m", tiny_model / WEIGHTS, *SHORT, "-o", "here").exit_code == 0
    one, other = (json.loads((tmp_path / name / "000000.json").read_text()) for name in ("file", "here"))
    assert one["image"]["pixels_sha256"] == other["image"]["pixels_sha256"]
    assert (one["model"]["kind"], one["model"]["source"], "path" in one["model"]) == ("file", url, False)
    s3.faults.clear()
    assert ddim("replay", "file/000000.png", "--check", "-o", "replayed").exit_code == 0
    assert came(s3) == []
    (stored / "unet" / "config.json").unlink()
    missing = ddim("inspect", url)
    assert missing.exit_code == 2
    assert f"error: {url}: there is neither a config.json beside it nor a config in its metadata" in missing.stderr


def test_a_checkpoint_of_the_original_code(ddim, s3, request, tmp_path):
    from pathlib import Path

    data = Path(__file__).parent.parent / "data" / "ddim-original-tiny"
    (s3.bucket() / "original").mkdir()
    for name in ("model-1000.ckpt", "config.yml"):
        shutil.copy(data / name, s3.bucket() / "original")
    url = "s3://bucket/original/model-1000.ckpt"
    result = ddim("inspect", url, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["kind"], facts["source"]) == ("checkpoint", url)
    assert ddim("convert", url, "converted").exit_code == 0
    assert ddim("convert", data / "model-1000.ckpt", "expected").exit_code == 0
    assert (tmp_path / "converted" / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_text_model(ddim, s3, tiny_text_model, tmp_path):
    shutil.copytree(tiny_text_model, s3.bucket() / "text")
    args = ("--prompt", "a b", "--steps", 2, "-n", 1, "--no-grid")
    result = ddim("sample", "-m", "s3://bucket/text", *args, "-o", "there")
    assert result.exit_code == 0, result.stderr
    assert ddim("sample", "-m", tiny_text_model, *args, "-o", "here").exit_code == 0
    one, other = (json.loads((tmp_path / name / "000000.json").read_text()) for name in ("there", "here"))
    assert one["image"]["pixels_sha256"] == other["image"]["pixels_sha256"]
    assert one["model"]["sha256"] == other["model"]["sha256"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("s4://bucket/x", "model.source: s4:// is no object store that is known here: use s3, gs or az"),
        ("s3://", "model.source: s3://: names no bucket"),
        ("s3://me:s3cret@bucket/x", "model.source: s3://bucket: a URL with a name or password in it"),
        ("s3://elsewhere/x", "s3://elsewhere/x: there is no bucket 'elsewhere'"),
        ("s3://bucket/models/missing", "s3://bucket/models/missing: there is no such object, and nothing below it"),
        ("s3://bucket/missing.ckpt", "s3://bucket/missing.ckpt: there is no such object, and nothing below it"),
        ("s3://bucket/models", "s3://bucket/models: not a diffusers model"),
    ],
)
def test_wrong_input(ddim, s3, stored, source, words):
    result = ddim("sample", "-m", source, *SHORT, "-o", "out")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {words}")
    assert "s3cret" not in result.stderr


def test_no_credentials(ddim, stored, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    result = ddim("sample", "-m", URL, *SHORT, "-o", "out", "--verbose")
    assert result.exit_code == 2
    assert f"{URL}: no credentials were found, or not all of them: set AWS_ACCESS_KEY_ID" in result.stderr


def test_a_revision_is_not_for_stores(ddim, stored):
    result = ddim("sample", "-m", URL, *SHORT, "--set", "model.revision=main")
    assert result.exit_code == 2
    assert "is for models on the Hub" in result.stderr


@pytest.mark.slow
def test_processes_of_their_own_fetch_once(start, s3, stored, cache):
    environment = {**s3.environment(), "DDIM_CACHE": str(cache)}
    shards = [
        start("sample", "-m", URL, "--steps", 4, "-n", 4, "-o", "out", "--shard", f"{i}/2", **environment)
        for i in (1, 2)
    ]
    assert [shard.wait() for shard in shards] == [0, 0], [shard.stderr for shard in shards]
    assert len(list((cache.parent / "out").glob("0*.png"))) == 4
    assert came(s3).count(WEIGHTS) == 1
    assert not any(s3.secret in shard.stderr + shard.stdout for shard in shards)
