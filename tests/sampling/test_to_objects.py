"""Pictures that go to an object store: an S3 server on loopback, and one that breaks."""

import json
import os
import signal
import tarfile
import time

import pytest

PLAN = ("--steps", 2, "-b", 4, "--device", "cpu", "--no-compile")
TAR = ("--format", "tar", "--set", "output.shard_size=10")


@pytest.fixture
def sample(ddim, s3, tiny_model):
    def run(*args, plan=("-n", 25), to=None, kind=()):
        return ddim("sample", "-m", tiny_model, *PLAN, *plan, *kind, "-o", to or s3.url("bucket", "run"), *args)

    return run


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def pixels(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith((".png", ".tar", ".index.json"))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), TAR], ids=["files", "tar"])
def test_what_is_there_is_what_a_folder_has(sample, s3, tmp_path, kind):
    assert sample(kind=kind).exit_code == 0
    assert sample(kind=kind, to="here").exit_code == 0
    there, here = contents(s3.bucket() / "run"), contents(tmp_path / "here")
    assert list(there) == list(here)
    assert pixels(there) == pixels(here)
    assert json.loads(there["run.json"])["totals"]["images"] == 25
    # One request for the whole of each object.
    for name in there:
        assert s3.faults.count("PUT", f"run/{name}$") == (2 if name == "run.json" else 1), name


@pytest.mark.parametrize("kind", [(), TAR], ids=["files", "tar"])
def test_the_same_command_lists_once_and_asks_for_no_picture(sample, s3, kind):
    assert sample(kind=kind).exit_code == 0
    s3.faults.clear()
    told = json.loads(sample("--json", kind=kind).stdout)
    assert (told["made"], told["present"], told["finished"]) == (0, 25, True)
    assert told["folder"] == s3.url("bucket", "run")
    assert s3.faults.count("PUT") == 0
    assert s3.faults.count(key=r"0000\d\d\.(png|json|tar)") == 0
    assert s3.faults.count("GET", r"\.index\.json") == (3 if kind else 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), TAR], ids=["files", "tar"])
def test_what_is_missing_is_made(sample, s3, kind):
    assert sample(kind=kind).exit_code == 0
    folder = s3.bucket() / "run"
    before = pixels(contents(folder))
    (folder / ("000001.index.json" if kind else "000003.json")).unlink()
    assert json.loads(sample("--json", kind=kind).stdout)["made"] == (10 if kind else 1)
    assert pixels(contents(folder)) == before
    assert json.loads(sample("--json", plan=("-n", 31), kind=kind).stdout)["made"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), TAR], ids=["files", "tar"])
def test_other_settings_are_refused_and_overwritten(sample, s3, kind):
    assert sample(kind=kind).exit_code == 0
    result = sample("--eta", 1, kind=kind)
    assert result.exit_code == 2
    assert f"{s3.url('bucket', 'run')}/run.json was made with sampling.eta = 0.0, this run has 1" in result.stderr
    assert sample("--eta", 1, "--overwrite", "-n", 12, plan=(), kind=kind).exit_code == 0
    names = sorted(contents(s3.bucket() / "run"))
    expected = ["000000.index.json", "000000.tar", "000001.index.json", "000001.tar"] if kind else [
        f"{seed:06d}.{ending}" for seed in range(12) for ending in ("json", "png")
    ]  # fmt: skip
    assert names == [*expected, "grid.png", "run.json"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), TAR], ids=["files", "tar"])
def test_rows(sample, s3, tmp_path, kind):
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(f'{{"name": "row {n}", "seed": {n}}}\n' for n in range(12)))
    assert sample("--items", jobs, plan=(), kind=kind).exit_code == 0
    jobs.write_text(jobs.read_text() + '{"name": "last"}\n')
    assert json.loads(sample("--items", jobs, "--json", plan=(), kind=kind).stdout)["made"] == 1
    jobs.write_text(jobs.read_text().replace('"seed": 5}', '"seed": 50}'))
    result = sample("--items", jobs, plan=(), kind=kind)
    assert result.exit_code == 2
    assert f"{jobs}:6: " in result.stderr


@pytest.mark.slow
def test_parts_in_folders_of_a_thousand(sample, ddim):
    """In fsspec's store in memory: the server's file system stands still where two threads write into a folder."""
    url = "memory://bucket/thousands"
    for part in range(2):
        assert sample("--subdirs", "--shard", f"{part}/2", plan=("--seeds", "0-5,1000-1003"), to=url).exit_code == 0
    assert ddim("verify", url).stdout == "10 images: all is well\n"
    assert json.loads(ddim("inspect", f"{url}/001000/001003.png", "--json").stdout)["seed"] == 1003
    # In either layout.
    assert json.loads(sample("--json", plan=("--seeds", "0-5,1000-1003"), to=url).stdout)["made"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), TAR], ids=["files", "tar"])
def test_everything_reads_them(sample, ddim, s3, tmp_path, kind):
    url = s3.url("bucket", "run")
    assert sample("--npz", "all.npz", kind=kind).exit_code == 0
    assert (tmp_path / "all.npz").exists()
    assert ddim("verify", url).stdout == "25 images: all is well\n"
    member = f"{url}/000001.tar/000013" if kind else f"{url}/000013"
    told = json.loads(ddim("inspect", f"{member}.png", "--json").stdout)
    assert (told["seed"], told["pixels_unchanged"], told["picture"]) == (13, True, f"{member}.png")
    assert ddim("replay", f"{member}.json", "--check").stdout == "1 picture made again: 1 with equal hashes\n"
    assert sample(to="here").exit_code == 0
    assert ddim("compare", "here", url).exit_code == 0
    assert ddim("report", url, "-o", "page.html").exit_code == 0
    assert (tmp_path / "page.html").read_text().count("data:image/png;base64,") == 25


@pytest.mark.slow
def test_verify_finds_what_is_wrong(sample, ddim, s3):
    assert sample(kind=TAR).exit_code == 0
    tar = s3.bucket() / "run" / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:9000])
    result = ddim("verify", s3.url("bucket", "run"))
    assert result.exit_code == 3
    assert f"{s3.url('bucket', 'run')}/000001.tar: is cut short" in result.stdout


def test_wrong_input(ddim, sample, s3, monkeypatch):
    for to, said in {
        "s4://bucket/run": "s4://",
        "s3://": "names no bucket",
        "s3://user:secret@bucket/run": "would be kept beside every picture",
        "s3://not-there/run": "there is no bucket 'not-there'",
    }.items():
        result = sample(to=to)
        assert result.exit_code == 2
        assert said in result.stderr
        assert "Traceback" not in result.stderr
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    result = sample()
    assert result.exit_code == 2
    assert "no credentials were found" in result.stderr
    assert ddim("interpolate", "--between", "1,2", "-o", s3.url("bucket", "frames")).exit_code == 2


def test_no_credential_is_written(sample, s3, tmp_path):
    result = sample("--verbose", "--log-file", "log.txt", "--shard", "0/1")
    written = b"".join(contents(s3.bucket() / "run").values()) + (tmp_path / "log.txt").read_bytes()
    for secret in (s3.secret, s3.name):
        assert secret.encode() not in written
        assert secret not in result.stdout + result.stderr


# A store that breaks.

KINDS = ["reset", "status", "cut", "cut request", "lost"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), TAR], ids=["files", "tar"])
def test_no_picture_is_lost_and_none_half_there(sample, s3, tmp_path, kind):
    """A third of all requests fails, each in one of five ways."""
    assert sample(to="here", kind=kind).exit_code == 0
    for fault in KINDS:
        s3.faults.add(fault, times=None, probability=0.08)
    s3.faults.add("slow", times=3, seconds=0.5)
    assert sample(kind=kind).exit_code == 0
    happened = dict(s3.faults.happened)
    assert sum(happened.values()) > (2 if kind else 10)
    assert pixels(contents(s3.bucket() / "run")) == pixels(contents(tmp_path / "here"))
    assert json.loads(sample("--json", kind=kind).stdout)["made"] == 0


@pytest.mark.slow
def test_a_store_that_refuses_for_good_names_bucket_and_key(sample, s3):
    s3.faults.add("status", method="PUT", key="run/000007.png", times=None, status=403, code="AccessDenied")
    result = sample()
    assert result.exit_code == 1
    assert f"{s3.url('bucket', 'run', '000007.png')}: cannot be written: the store refused" in result.stderr
    assert "Traceback" not in result.stderr
    s3.faults.clear()
    assert json.loads(sample("--json").stdout)["finished"] is True


@pytest.mark.slow
def test_a_store_that_is_gone_while_it_is_read(sample, ddim, s3):
    assert sample().exit_code == 0
    s3.faults.add("status", method="GET", key="run/000007.json", times=None)
    result = ddim("verify", s3.url("bucket", "run"))
    assert result.exit_code == 1
    assert f"{s3.url('bucket', 'run', '000007.json')}: the store answered with an error (status 503" in result.stderr
    s3.faults.clear()
    s3.faults.add("reset", times=None)
    result = sample()
    assert result.exit_code == 2
    assert f"{s3.url('bucket', 'run')}: the connection broke off, 6 times" in result.stderr


@pytest.mark.slow
def test_a_store_that_is_gone_for_a_moment_is_waited_for(sample, s3, monkeypatch):
    monkeypatch.setenv("DDIM_STORE_WAIT", "0.1")
    with s3.refusing(seconds=0.5):
        assert sample(kind=TAR).exit_code == 0
    assert len(list((s3.bucket() / "run").glob("*.tar"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), TAR], ids=["files", "tar"])
@pytest.mark.usefixtures("one_thread")
def test_a_killed_process_leaves_whole_objects(start, sample, s3, tmp_path, tiny_model, kind):
    assert sample(to="here", kind=kind).exit_code == 0
    command = ("sample", "-m", tiny_model, *PLAN, "-n", 25, *kind, "-o", s3.url("bucket", "run"))
    for delay in (0.2, 0.5, 0.8, 1.1):
        process = start(*command, **s3.environment())
        time.sleep(delay)
        process.kill(signal.SIGKILL)
        process.wait()
        for path in (s3.bucket() / "run").glob("*.tar"):
            with tarfile.open(path) as archive:
                assert len(archive.getmembers()) in (20, 10)
    assert start(*command, **s3.environment()).wait() == 0
    assert pixels(contents(s3.bucket() / "run")) == pixels(contents(tmp_path / "here"))
    assert not [name for name in os.listdir(s3.bucket() / "run") if name.startswith(".")]
