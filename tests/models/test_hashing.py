import hashlib
import os

import pytest

from ddim_cli.errors import ModelError
from ddim_cli.models import hashing


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DDIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "SMALLEST_KEPT", 1)
    return tmp_path / "cache"


def test_a_file_is_hashed_once_until_it_changes(cache, tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    calls = []
    digest = hashing.hexdigest
    monkeypatch.setattr(hashing, "hexdigest", lambda p, by: calls.append(p) or digest(p, by))
    for _ in range(3):
        assert hashing.file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(calls) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert hashing.file_sha256(path) == hashlib.sha256(b"two").hexdigest()
    [kept] = (cache / "sha256").iterdir()
    kept.write_text("{")
    assert hashing.file_sha256(path) == hashlib.sha256(b"two").hexdigest()
    assert len(calls) == 3


def test_a_cache_that_cannot_be_written_only_costs_time(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDIM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(hashing, "SMALLEST_KEPT", 1)
    assert hashing.file_sha256(tmp_path / "file") == hashlib.sha256(b"").hexdigest()


def test_several_files_and_none(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    both = hashing.files_sha256([tmp_path / "a", tmp_path / "b"])
    assert both != hashing.files_sha256([tmp_path / "b", tmp_path / "a"])
    with pytest.raises(ModelError, match="cannot be read"):
        hashing.file_sha256(tmp_path / "none")


def test_an_empty_variable_is_none(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIM_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hashing.cache_folder() == tmp_path / "xdg" / "ddim"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hashing.cache_folder() == tmp_path / "home" / ".cache" / "ddim"
