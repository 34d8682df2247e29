"""Objects in memory and in a real S3 server on loopback, before which a proxy breaks what networks break."""

import gc
import io
import itertools
import logging
import os
import random
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import pytest

from ddim_cli.errors import UsageError
from ddim_cli.stores import objects
from ddim_cli.stores.objects import ObjectPath, StoreError, is_url, open_url


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setenv("DDIM_STORE_WAIT", "0.01")
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    yield open_url("memory://bucket/run")
    MemoryFileSystem.store.clear()


@pytest.fixture
def run(s3):
    return open_url(s3.url("bucket", "run"))


@pytest.fixture(params=["memory", "s3"])
def place(request):
    """A name below which there is nothing yet, in each kind of store."""
    return request.getfixturevalue("memory" if request.param == "memory" else "run")


def test_what_is_written_is_listed_and_read(place):
    assert place.listing() == {}
    assert not place.exists()
    (place / "b.png").write_bytes(b"12345")
    (place / "001000/a.json").write_bytes(b"{}")
    (place / "empty").write_bytes(b"")
    (place.parent / "runner.png").write_bytes(b"of another run, whose name begins alike")
    assert place.listing() == {"001000/a.json": 2, "b.png": 5, "empty": 0}
    assert list(place.listing()) == sorted(place.listing())
    assert (place / "001000").listing() == {"a.json": 2}
    assert place.parent.listing() == {"run/001000/a.json": 2, "run/b.png": 5, "run/empty": 0, "runner.png": 39}

    assert (place / "b.png").read_bytes() == b"12345"
    assert (place / "empty").read_bytes() == b""
    assert (place / "b.png").read_range(1, 4) == b"234"
    assert (place / "b.png").size() == 5
    with (place / "b.png").open() as stream:
        stream.seek(-2, io.SEEK_END)
        assert stream.read() == b"45"
    assert (place / "b.png").is_file()
    assert not (place / "b.png").is_dir()
    assert place.is_dir()
    assert (place / "001000").is_dir()
    assert not place.is_file()
    assert not (place / "001").exists()


def test_an_object_is_replaced_and_removed(place):
    file = place / "run.json"
    before = file.write_bytes(b"one") or place.entries()["run.json"]
    file.write_bytes(b"other")
    assert file.read_bytes() == b"other"
    assert place.entries()["run.json"] != before
    file.unlink()
    assert place.listing() == {}
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.unlink()


def test_what_is_not_there(place):
    (place / "file").write_bytes(b"123")
    missing = place / "missing.png"
    for ask in (missing.read_bytes, missing.size, missing.open, lambda: missing.read_range(0, 1), place.size):
        with pytest.raises(FileNotFoundError) as caught:
            ask()
        assert caught.value.filename in (str(missing), str(place))
        assert caught.value.strerror == "there is no such object"
    with pytest.raises(StoreError, match="the answer broke off") as cut:
        (place / "file").read_range(1, 9)
    assert cut.value.filename == str(place / "file")


def test_a_large_file_goes_and_comes_in_pieces(place, monkeypatch):
    monkeypatch.setattr(objects, "PIECE", 5 << 20)
    monkeypatch.setattr(objects, "IN_MEMORY", 1 << 20)
    data = random.Random(0).randbytes((21 << 20) + 7)
    source = io.BytesIO(b"before" + data + b"behind")
    source.seek(6)
    (place / "shard.tar").upload(source, len(data))
    assert place.listing() == {"shard.tar": len(data)}
    to = io.BytesIO()
    to.write(b"before")
    assert (place / "shard.tar").download(to) == (place / "shard.tar").entry() == place.entries()["shard.tar"]
    assert to.getvalue() == b"before" + data
    with (place / "shard.tar").open() as stream:
        assert stream.read() == data


def test_names_are_those_of_paths():
    url, path = open_url("s3://bucket/runs/a.b/000012.x0.png"), PurePosixPath("/bucket/runs/a.b/000012.x0.png")
    for name in ("name", "stem", "suffix"):
        assert getattr(url, name) == getattr(path, name)
    assert str(url) == f"s3:/{path}"
    assert str(url.parent.parent) == f"s3:/{path.parent.parent}"
    assert str(url.with_name("x.json")) == f"s3:/{path.with_name('x.json')}"
    assert str(url.with_suffix(".json")) == f"s3:/{path.with_suffix('.json')}"
    assert url.relative_to(open_url("s3://bucket/runs")) == path.relative_to("/bucket/runs")
    assert url.parent / url.name == url == url.parent / PurePosixPath(url.name)
    assert len({url, url.parent, url.parent / url.name}) == 2
    assert sorted([url, url.parent]) == [url.parent, url]
    bucket = open_url("S3://bucket/")
    assert (str(bucket), bucket.bucket, bucket.key, bucket.name) == ("s3://bucket", "bucket", "", "")
    assert bucket.parent == bucket == open_url("s3://bucket/run/").parent
    with pytest.raises(ValueError, match="is not in"):
        url.relative_to(open_url("memory://bucket"))


def test_what_is_a_url():
    assert all(map(is_url, ["s3://bucket/run", "memory://x", "gs://x", "S3://x", "abfs://c@a.dfs.core.windows.net/x"]))
    others = ["C:\\x", "C:/x", "c://x", "owner/name", "outputs/run", "/s3://x", "s3:/x", "", "a b://x"]
    assert not any(map(is_url, others))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s4://bucket/run", "s4:// is no object store that is known here: use s3, gs or az"),
        ("file:///tmp/run", "file:// is this machine: give the path without it"),
        ("sftp://host/run", "sftp:// is no object store: what is written there can be seen half done"),
        ("https://host/run?X-Amz-Signature=s3cret", "https:// is no object store"),
        ("s3://", "names no bucket: it is written s3://BUCKET/NAME"),
        ("s3://name:s3cret@bucket/run", "s3://bucket: a URL with a name or password in it would be kept"),
        ("s3://s3cret@bucket/run", "s3://bucket: a URL with a name or password in it would be kept"),
        ("abfs://container:s3cret@account/run", "abfs://account: a URL with a name or password in it"),
        ("s3://bucket/a//b", "s3://bucket/a//b: a name in an object store has no parts that are empty"),
        ("s3://bucket/a/../b", "has no parts that are empty, '.' or '..'"),
        ("s3://bucket/a?versionId=1", "leave out ?versionId="),
        ("outputs/run", "not a URL"),
    ],
)
def test_wrong_urls(url, words):
    with pytest.raises(UsageError) as caught:
        open_url(url)
    assert words in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_package_that_is_not_installed(monkeypatch):
    import fsspec

    def missing(scheme):
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    objects._file_system_class.cache_clear()
    try:
        for scheme, extra in (("s3", "s3"), ("gs", "gs"), ("az", "az"), ("abfs", "az")):
            with pytest.raises(UsageError, match=rf"{scheme}:// needs .*: pip install 'ddim-cli\[{extra}\]'"):
                open_url(f"{scheme}://bucket/run")
        with pytest.raises(UsageError, match="oss:// needs a package that is not installed: Install ossfs"):
            open_url("oss://bucket/run")
    finally:
        objects._file_system_class.cache_clear()


FAULTS = {
    "reset": {},
    "status": {"retry_after": 0},
    "cut request": {"method": "PUT"},
    "lost": {},
    "cut": {"method": "GET"},
    "slow": {"seconds": 1.5},
    "stall": {"method": "GET", "seconds": 1.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_transient_is_asked_for_again(s3, run, kind, monkeypatch):
    if kind in ("slow", "stall"):
        monkeypatch.setenv("DDIM_STORE_TIMEOUT", "0.4")
    data = random.Random(0).randbytes(100_000)
    method = FAULTS[kind].get("method")
    if method != "GET":
        s3.faults.add(kind, **{**FAULTS[kind], "method": "PUT"}, times=2)
        (run / "x").write_bytes(data)
        assert s3.faults.happened[kind] == 2
        assert s3.faults.count("PUT") == 3
    else:
        (run / "x").write_bytes(data)
    assert (s3.bucket() / "run/x").read_bytes() == data
    if method == "PUT":
        return
    s3.faults.clear()
    s3.faults.add(kind, **{**FAULTS[kind], "method": "GET", "key": "run/x"}, times=2)
    assert (run / "x").read_bytes() == data
    assert s3.faults.happened[kind] == 2
    assert [(r.method, r.key) for r in s3.faults.requests] == [("GET", "run/x")] * 3, "asked for more than the object"
    s3.faults.clear()
    s3.faults.add(kind, **{**FAULTS[kind], "method": "GET"}, times=1)
    assert run.listing() == {"x": len(data)}
    assert s3.faults.listings == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_statuses_that_pass(s3, run, status):
    s3.faults.add("status", status=status, code="InternalError" if status == 500 else "Busy", times=2)
    (run / "x").write_bytes(b"123")
    assert s3.faults.count("PUT") == 3


@pytest.mark.slow
def test_refused_connections(s3, run):
    (run / "x").write_bytes(b"123")
    with s3.refusing(0.2):
        os.environ["DDIM_STORE_WAIT"] = "0.1"
        assert (run / "x").read_bytes() == b"123"
    with s3.refusing():
        os.environ["DDIM_STORE_WAIT"] = "0.01"
        with pytest.raises(StoreError) as caught:
            (run / "x").write_bytes(b"456")
    assert caught.value.filename == "s3://bucket/run/x"
    assert caught.value.strerror == f"the store cannot be reached, {objects.TRIES} times"
    assert caught.value.is_transient
    assert (run / "x").read_bytes() == b"123"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("reset", "the connection broke off, 6 times"),
        ("status", r"the store answered with an error \(status 503, SlowDown\), 6 times: as planned"),
        # It depends on how far it came.
        ("cut", "the (answer|connection) broke off, 6 times"),
        ("lost", "the connection broke off, 6 times"),
    ],
)
def test_tries_end(s3, run, kind, words):
    (run / "x").write_bytes(b"123")
    s3.faults.clear()
    s3.faults.add(kind, times=None)
    with pytest.raises(StoreError) as caught:
        (run / "x").read_bytes()
    assert caught.value.filename == "s3://bucket/run/x"
    assert re.fullmatch(words, caught.value.strerror)
    # Below ours, aiohttp asks twice where a connection broke before any answer.
    assert s3.faults.count() in (objects.TRIES, 2 * objects.TRIES)
    assert objects.TRIES == 6
    with pytest.raises(StoreError) as caught:
        run.listing()
    assert caught.value.filename == "s3://bucket/run"
    assert re.fullmatch(words, caught.value.strerror)
    with pytest.raises(UsageError) as said:
        run.check()
    assert re.fullmatch(f"s3://bucket/run: {words}", str(said.value))


@pytest.mark.slow
def test_slow_answers_end(s3, run, monkeypatch):
    monkeypatch.setenv("DDIM_STORE_TIMEOUT", "0.2")
    monkeypatch.setattr(objects, "TRIES", 2)
    s3.faults.add("slow", seconds=0.8, times=None)
    with pytest.raises(StoreError, match=r"the store did not answer within 0\.2 seconds, 2 times") as caught:
        (run / "x").read_bytes()
    assert caught.value.is_transient


def test_waits_grow_and_heed_what_the_store_asks_for(monkeypatch):
    monkeypatch.setenv("DDIM_STORE_WAIT", "")
    waits = [objects._wait(tries, Exception()) for tries in range(1, objects.TRIES)]
    for wait, middle in zip(waits, (0.5, 1, 2, 4, 8), strict=True):
        assert 0.75 * middle <= wait <= 1.25 * middle
    busy = Exception()
    busy.response = {"Error": {}, "ResponseMetadata": {"HTTPHeaders": {"retry-after": "20"}}}
    assert objects._wait(1, busy) == 20
    busy.response["ResponseMetadata"]["HTTPHeaders"]["retry-after"] = "4000"
    assert objects._wait(1, busy) == objects.LONGEST_ASKED_WAIT
    busy.response["ResponseMetadata"]["HTTPHeaders"]["retry-after"] = "Wed, 21 Oct 2026 07:28:00 GMT"
    assert objects._wait(1, busy) < 1


def test_retry_after_is_read_of_an_answer(s3, run, monkeypatch):
    asked = []
    monkeypatch.setattr(objects, "_wait", lambda tries, error: asked.append(objects._asked_wait(error)) or 0.0)
    s3.faults.add("status", retry_after=7)
    s3.faults.add("status")
    (run / "x").write_bytes(b"1")
    assert asked == [7.0, 0.0]


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "the store refused (status 403, AccessDenied): as planned"),
        (404, "NoSuchBucket", "there is no bucket 'bucket'"),
        (400, "InvalidRequest", "the store answered with an error (status 400, InvalidRequest): as planned"),
    ],
)
def test_what_stays_is_asked_for_once(s3, run, status, code, words):
    s3.faults.add("status", status=status, code=code, times=None)
    for ask in ((run / "x").read_bytes, lambda: (run / "x").write_bytes(b"1"), run.listing):
        s3.faults.requests.clear()
        with pytest.raises(StoreError) as caught:
            ask()
        assert caught.value.strerror == words
        assert not caught.value.is_transient
        assert s3.faults.count() == 1
    with pytest.raises(UsageError) as said:
        run.check()
    assert str(said.value) == f"s3://bucket/run: {words}"


@pytest.mark.slow
def test_many_threads_and_a_store_that_fails_often(s3, run):
    """No object is lost, none half there, and nothing is asked for beside what is needed."""
    s3.faults.clear(seed=7)
    for kind in ("reset", "status", "cut request", "lost"):
        s3.faults.add(kind, method="PUT", times=None, probability=0.08)
    for kind in ("reset", "status", "cut"):
        s3.faults.add(kind, method="GET", times=None, probability=0.08)
    written = {f"{n:06}.png": random.Random(n).randbytes(2_000 + 37 * n) for n in range(80)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: (run / name).write_bytes(written[name]), written))
        on_disk = {p.name: p.read_bytes() for p in (s3.bucket() / "run").iterdir()}
        assert on_disk == written
        assert run.listing() == {name: len(data) for name, data in written.items()}
        assert list(pool.map(lambda name: (run / name).read_bytes(), written)) == list(written.values())
    assert set(s3.faults.happened) == {"reset", "status", "cut request", "lost", "cut"}
    assert s3.faults.count("HEAD") == s3.faults.count("POST") == 0
    assert s3.faults.count("PUT") + s3.faults.count("GET") == 161 + sum(s3.faults.happened.values())


@pytest.mark.slow
def test_a_long_listing_comes_in_pages_of_which_only_the_broken_comes_again(s3, run):
    folder = s3.bucket() / "run"
    folder.mkdir()
    for n in range(1_010):
        (folder / f"{n:06}.png").write_bytes(b"x")
    names = {f"{n:06}.png": 1 for n in range(1_010)}
    assert run.listing() == names
    assert s3.faults.listings == 2
    s3.faults.clear()
    s3.faults.add("status", times=3)
    assert run.listing() == names
    assert s3.faults.listings == 5
    # What another process writes is seen at once.
    (folder / "more.png").write_bytes(b"12")
    assert run.listing() == {**names, "more.png": 2}


def uploads(file):
    """Those to this name that are neither complete nor given up; the server knows those of all tests."""
    found = file._fs.call_s3("list_multipart_uploads", Bucket=file.bucket)
    return [upload["Key"] for upload in found.get("Uploads") or [] if upload["Key"] == file.key]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(objects, "PIECE", 1 << 20)


@pytest.mark.slow
def test_parts_that_fail_are_sent_again(s3, run, small_pieces):
    data = random.Random(0).randbytes(5 << 20)
    for kind in ("reset", "cut request", "lost", "status"):
        s3.faults.add(kind, method="PUT", times=2)
    s3.faults.add("status", method="POST", times=2)
    (run / "parts.tar").upload(io.BytesIO(data), len(data))
    assert sum(s3.faults.happened.values()) == 10
    assert (s3.bucket() / "run/parts.tar").read_bytes() == data
    assert uploads(run / "parts.tar") == []


def test_an_answer_to_the_last_request_that_is_lost(s3, run, small_pieces):
    data = random.Random(0).randbytes(3 << 20)
    s3.faults.add("lost", method="POST", key="uploadId=", times=1)
    # This server remembers what is complete; another says so.
    s3.faults.add("status", method="POST", key="uploadId=", status=404, code="NoSuchUpload", times=1)
    (run / "lost.tar").upload(io.BytesIO(data), len(data))
    assert s3.faults.happened == {"lost": 1, "status": 1}
    assert (s3.bucket() / "run/lost.tar").read_bytes() == data
    assert uploads(run / "lost.tar") == []


@pytest.mark.parametrize("failure", ["store", "interrupt", "file"])
def test_of_an_upload_that_fails_nothing_stays(s3, run, small_pieces, failure):
    data = random.Random(0).randbytes(5 << 20)
    file = run / f"{failure}.tar"
    file.write_bytes(b"the one before")

    class Source(io.BytesIO):
        def read(self, size=-1):
            if failure != "store" and self.tell() >= 3 << 20:
                raise KeyboardInterrupt if failure == "interrupt" else OSError(5, "the disk broke", "local.tar")
            return super().read(size)

    if failure == "store":
        s3.faults.add("status", method="PUT", times=None, status=403, code="AccessDenied")
    expected = {"store": StoreError, "interrupt": KeyboardInterrupt, "file": OSError}[failure]
    with pytest.raises(expected) as caught:
        file.upload(Source(data), len(data))
    if failure != "interrupt":
        assert caught.value.filename == (str(file) if failure == "store" else "local.tar")
    assert uploads(file) == []
    assert run.listing() == {file.name: 14}
    assert (s3.bucket() / "run" / file.name).read_bytes() == b"the one before"


def test_a_download_that_is_cut_and_one_of_an_object_that_changes(s3, run, small_pieces):
    old, new = random.Random(0).randbytes(5 << 20), random.Random(1).randbytes(4 << 20)
    (run / "x").upload(io.BytesIO(old), len(old))
    s3.faults.clear()
    s3.faults.add("cut", method="GET", times=4)
    to = io.BytesIO()
    (run / "x").download(to)
    assert to.getvalue() == old
    assert s3.faults.count("GET") == 5 + 4

    class To(io.BytesIO):
        writes = itertools.count()

        def write(self, data):
            if next(self.writes) == 2:
                (run / "x").write_bytes(new)
            return super().write(data)

    to = To()
    assert (run / "x").download(to).size == len(new)
    assert to.getvalue() == new


def test_a_disk_that_is_full_is_no_fault_of_the_store(run):
    (run / "x").write_bytes(b"123")

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device", "/cache/x")

    with pytest.raises(OSError, match="No space left") as caught:
        (run / "x").download(Full())
    assert not isinstance(caught.value, StoreError)
    assert caught.value.filename == "/cache/x"


def test_check(s3, run, memory):
    run.check()
    memory.check()
    with pytest.raises(UsageError, match=r"s3://elsewhere/run: there is no bucket 'elsewhere'"):
        open_url("s3://elsewhere/run").check()
    with pytest.raises(StoreError, match="there is no bucket 'elsewhere'"):
        open_url("s3://elsewhere/run").listing()
    with pytest.raises(StoreError, match="there is no bucket 'elsewhere'"):
        open_url("s3://elsewhere/run/x").write_bytes(b"")


@pytest.mark.slow
def test_the_usual_environment(s3, run, monkeypatch, tmp_path):
    """Another user, another server, a profile: seen at once, also in a process that has asked before."""
    (run / "x").write_bytes(b"123")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UsageError, match=r"the store refused .*SignatureDoesNotMatch"):
        run.check()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UsageError, match=r"s3://bucket/run: no credentials were found, or not all of them: set AWS_"):
        run.check()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UsageError, match="no credentials were found"):
        run.check()
    monkeypatch.setenv("AWS_PROFILE", "mine")
    with pytest.raises(UsageError, match="no credentials were found"):
        run.check()
    profile = f"[mine]\naws_access_key_id = {s3.name}\naws_secret_access_key = {s3.secret}\n"
    (tmp_path / "credentials").write_text(profile)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    run.check()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert (run / "x").read_bytes() == b"123"
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    with pytest.raises(UsageError, match="cannot be reached"):
        run.check()


@pytest.mark.slow
def test_no_secret_is_told(s3, run, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    said = []

    def ask(place: ObjectPath):
        for question in (place.read_bytes, lambda: place.write_bytes(b"1"), place.listing, place.check):
            try:
                question()
            except (OSError, UsageError) as error:
                said.extend([str(error), repr(error), str(error.__cause__)])

    ask(run / "x")
    monkeypatch.setattr(objects, "TRIES", 1)
    for kind in ("reset", "status", "cut"):
        s3.faults.clear()
        s3.faults.add(kind, times=None)
        ask(run / "x")
    s3.faults.clear()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an0therSecret")
    ask(run / "x")
    for endpoint in ("http://me:pa55word@127.0.0.1:1", "me:pa55word@nowhere"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        ask(run / "x")
    logged = caplog.text
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    s3.faults.add("status", status=403, code="Denied-an0therSecret", times=None)
    ask(run / "x")
    assert len(said) >= 3 * 20
    for text in said:
        assert not any(secret in text for secret in (s3.secret, "an0therSecret", "pa55word"))
    assert s3.secret not in logged
    assert "an0therSecret" not in logged


@pytest.mark.slow
def test_a_forked_process_has_connections_of_its_own(s3, run, monkeypatch):
    monkeypatch.setenv("DDIM_STORE_TIMEOUT", "3")
    (run / "x").write_bytes(b"123")
    child = os.fork()
    if child == 0:
        try:
            code = 0 if (run / "x").read_bytes() == b"123" else 1
            # What ends with a process, as one that is not killed ends.
            gc.collect()
            weakref.finalize._exitfunc()
            os._exit(code)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    s3.faults.clear()
    assert (run / "x").read_bytes() == b"123"
    assert s3.faults.count() == 1, "its connection was taken from it"
