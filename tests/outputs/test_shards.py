"""Tar shards, against Python's own tarfile."""

import io
import json
import tarfile

import pytest

from ddim_cli.outputs import open_shard
from ddim_cli.outputs.open_shard import OpenShard, spool_path
from ddim_cli.outputs.shards import header, images_in, pairs_in, read_index, shard_name, shard_number

KEYS = [f"{number:06d}" for number in range(10)]


def pair(key: str) -> tuple[bytes, bytes, str]:
    picture = key.encode() * (7 + int(key))
    return picture, json.dumps({"image": {"bytes": len(picture), "pixels_sha256": f"sha {key}"}}).encode(), f"sha {key}"


def shard(folder, number=0, keys=KEYS, is_ours=lambda record: True) -> OpenShard:
    return OpenShard(folder, number, keys, ".png", False, is_ours)


def fill(opened: OpenShard, keys) -> OpenShard:
    for key in keys:
        opened.add(key, *pair(key))
    return opened


def members(path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}


@pytest.mark.parametrize("name", ["000123.png", "a" * 100, "a" * 101 + ".json", "ümlaut.webp"])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 70_000])
def test_a_header_is_the_one_that_tarfile_writes(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    assert header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


def test_a_member_of_many_gigabytes_has_a_header_too():
    size = 9 * 2**30
    with tarfile.open(fileobj=io.BytesIO(header("000000.png", size)), mode="r:") as archive:
        assert archive.next().size == size


def test_a_shard_has_the_members_in_the_order_of_the_plan_and_nobodys_times(tmp_path):
    fill(shard(tmp_path), KEYS).close()
    with tarfile.open(tmp_path / "000000.tar") as archive:
        infos = archive.getmembers()
    assert [info.name for info in infos] == [f"{key}.{kind}" for key in KEYS for kind in ("png", "json")]
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {(0, 0, 0, "", "", 0o644)}
    assert members(tmp_path / "000000.tar")["000003.png"] == pair("000003")[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.index.json", "000000.tar"]


def test_the_index_says_where_pictures_begin(tmp_path):
    fill(shard(tmp_path), KEYS).close()
    index, data = json.loads((tmp_path / "000000.index.json").read_text()), (tmp_path / "000000.tar").read_bytes()
    assert (index["images"], index["bytes"], index["ending"]) == (10, len(data), ".png")
    for item in index["items"]:
        picture, sidecar, sha256 = pair(item["key"])
        assert data[item["offset"] :][: item["bytes"]] == picture
        assert data[item["json_offset"] :][: item["json_bytes"]] == sidecar
        assert item["pixels_sha256"] == sha256
    assert images_in(tmp_path, 0) == 10


@pytest.mark.parametrize("waiting", [1, 3, 64])
def test_the_order_in_which_pictures_come_changes_no_byte(tmp_path, monkeypatch, waiting):
    fill(shard(tmp_path), KEYS).close()
    monkeypatch.setattr(open_shard, "MOST_WAITING", waiting)
    fill(shard(tmp_path, 1), [*KEYS[5:], *reversed(KEYS[:5])]).close()
    assert (tmp_path / "000001.tar").read_bytes() == (tmp_path / "000000.tar").read_bytes()
    assert read_index(tmp_path, 1).entries == read_index(tmp_path, 0).entries
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("torn", [0, 1, 300, 512, 700, 1024])
def test_what_a_killed_process_left_is_gone_on_with(tmp_path, torn):
    """A killed process leaves a spool whose last member is torn."""
    fill(shard(tmp_path / "."), KEYS).close()
    whole = (tmp_path / "000000.tar").read_bytes()
    opened = fill(shard(tmp_path, 1), KEYS[:4])
    opened.keep()
    with spool_path(tmp_path, 1).open("ab") as spool:
        spool.write(whole[read_index(tmp_path, 0).entries[3].end :][:torn])
    opened = shard(tmp_path, 1)
    assert opened.images == 4
    fill(opened, KEYS[4:]).close()
    assert (tmp_path / "000001.tar").read_bytes() == whole
    assert not spool_path(tmp_path, 1).exists()


def test_a_spool_of_another_run_is_not_gone_on_with(tmp_path):
    fill(shard(tmp_path), KEYS[:4]).keep()
    assert shard(tmp_path, is_ours=lambda record: record["image"]["pixels_sha256"] != "sha 000002").images == 2


def test_a_shard_that_another_process_writes_is_written_beside_it(tmp_path):
    first, second = fill(shard(tmp_path), KEYS[:4]), shard(tmp_path)
    assert second.images == 0
    fill(second, KEYS).close()
    whole = (tmp_path / "000000.tar").read_bytes()
    fill(first, KEYS[4:]).close()
    assert (tmp_path / "000000.tar").read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 2


def test_a_shard_grows_with_its_plan(tmp_path):
    fill(shard(tmp_path, keys=KEYS[:6]), KEYS[:6]).close()
    opened = shard(tmp_path)
    assert opened.images == 6
    fill(opened, KEYS[6:]).close()
    fill(shard(tmp_path, 1), KEYS).close()
    assert (tmp_path / "000000.tar").read_bytes() == (tmp_path / "000001.tar").read_bytes()


def test_the_pairs_of_a_tar_end_where_it_is_cut(tmp_path):
    fill(shard(tmp_path), KEYS).close()
    data, entries = (tmp_path / "000000.tar").read_bytes(), read_index(tmp_path, 0).entries
    for length in (0, 100, entries[2].offset, entries[2].end - 512, entries[2].end, len(data)):
        found = [each.key for each in pairs_in(io.BytesIO(data[:length]))]
        assert found == [entry.key for entry in entries if entry.json_offset + entry.json_bytes <= length]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": "ddim-cli/shard/1"}', '{"schema": "x", "items": []}', "null"]
)
def test_what_is_no_index_is_none(tmp_path, text):
    (tmp_path / "000000.index.json").write_text(text)
    assert read_index(tmp_path, 0) is None
    assert images_in(tmp_path, 0) == 0


def test_the_names_of_shards():
    assert shard_name(3) == "000003.tar"
    assert shard_name(1_000_000) == "1000000.tar"
    named = {
        "000003.tar": 3,
        "1000000.tar": 1_000_000,
        "0000003.tar": None,
        "3.tar": None,
        "a.tar": None,
        "000003": None,
    }
    assert {name: shard_number(name) for name in named} == named
