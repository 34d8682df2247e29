"""Files that a user names: nothing of a user's is replaced unasked, and what cannot be written is said well."""

import json
import os
import stat
import subprocess
import zipfile

import numpy as np
import pytest

NAMING = {
    "schedule --plot": ("schedule", "--plot"),
    "bench --plot": ("bench", "--plot"),
    "sample --npz": ("sample", "--npz"),
    "sample --dry-run --npz": ("sample", "--dry-run", "--npz"),
    "report -o": ("report", "pictures", "-o"),
    "evaluate --keep-reference": ("evaluate", "pictures", "--reference", "mnist", "--keep-reference"),
    "config init": ("config", "init"),
}
every_way = pytest.mark.parametrize("command", NAMING.values(), ids=NAMING)


@pytest.fixture
def quick_bench(monkeypatch):
    """What is measured is no matter here."""
    from ddim_cli.cli import bench

    monkeypatch.setattr(bench, "show", lambda found, quiet: print(found))
    monkeypatch.setattr("ddim_cli.outputs.bench_plot.draw_speeds", lambda *given: b"a plot")
    found = {"results": [], "machine": {"dtype": "", "device_name": ""}, "against": [], "timed": ""}
    found |= {"sampling": {"timesteps": []}, "model": {"source": ""}}
    monkeypatch.setattr("ddim_cli.evaluation.bench.Bench.measure", lambda self: found)


@every_way
def test_a_file_of_the_user_is_refused_before_any_work(ddim, command, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "pictures").mkdir()
    # A name that all take; what is in it is no .npz.
    (tmp_path / "notes.npz").write_text("mine")
    (tmp_path / "link.npz").symlink_to("notes.npz")
    for name in ("notes.npz", "link.npz"):
        result = ddim(*command, name)
        assert result.exit_code == 2, result.stderr
        assert f"{name}: is there" in result.stderr
        assert "--overwrite" in result.stderr
    assert (tmp_path / "notes.npz").read_text() == "mine"
    assert (tmp_path / "link.npz").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link.npz", "notes.npz", "pictures"]


def test_a_plot_is_told_from_other_pictures(ddim, tiny_model, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "link.png").symlink_to("p.png")
    plot = ("schedule", "--steps", 3, "--plot")
    for name in ("p.png", "p.png", "link.png"):
        assert ddim(*plot, name).exit_code == 0
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert ddim("bench", "--plot", "p.png").exit_code == 2
    # One of ours too, but no plot.
    assert ddim("sample", "-m", tiny_model, "--steps", 1, "-n", 1, "-o", "out", "-q").exit_code == 0
    made = (tmp_path / "out" / "000000.png").read_bytes()
    assert ddim(*plot, "out/000000.png").exit_code == 2
    assert (tmp_path / "out" / "000000.png").read_bytes() == made
    assert ddim(*plot, "out/000000.png", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "000000.png").read_bytes() != made


def test_an_array_is_told_from_others(ddim, tiny_model, tmp_path):
    command = ("sample", "-m", tiny_model, "--steps", 1, "-n", 2, "-b", 2, "-o", "out", "-q", "--npz", "all.npz")
    for _ in range(2):
        assert ddim(*command).exit_code == 0
    found = np.load(tmp_path / "all.npz")["arr_0"]
    before = (tmp_path / "out" / "000000.json").read_bytes()
    np.savez(tmp_path / "all.npz", arr_0=found[:1])
    refused = ddim(*command)
    assert refused.exit_code == 2
    assert "delete it (--overwrite replaces it, and makes the pictures anew)" in refused.stderr
    assert len(np.load(tmp_path / "all.npz")["arr_0"]) == 1
    assert (tmp_path / "out" / "000000.json").read_bytes() == before
    assert ddim(*command, "--overwrite").exit_code == 0
    assert np.array_equal(np.load(tmp_path / "all.npz")["arr_0"], found)


def test_statistics_are_told_from_others(ddim, tmp_path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.new("L", (28, 28), 50 * i).save(tmp_path / "a" / f"{i}.png")
    command = ("evaluate", "a", "--reference", "mnist", "--device", "cpu", "-q", "--keep-reference", "kept.npz")
    for _ in range(2):
        assert ddim(*command).exit_code == 0
    arrays = dict(np.load(tmp_path / "kept.npz"))
    assert sorted(arrays) == ["extractor", "features", "images", "mu", "sigma"]
    np.savez(tmp_path / "kept.npz", **arrays)
    assert ddim(*command).exit_code == 2
    assert ddim(*command, "--overwrite").exit_code == 0
    assert zipfile.ZipFile(tmp_path / "kept.npz").comment


def test_a_page_is_told_from_others(ddim, tiny_model, tmp_path):
    assert ddim("sample", "-m", tiny_model, "--steps", 1, "-n", 1, "-o", "out", "-q").exit_code == 0
    (tmp_path / "page.html").write_text("<html>mine</html>")
    assert ddim("report", "out", "-o", "page.html").exit_code == 2
    assert ddim("report", "out", "-o", "page.html", "--overwrite").exit_code == 0
    assert ddim("report", "out", "-o", "page.html").exit_code == 0


def test_config_init_writes_to_stdout(ddim, tmp_path):
    result = ddim("config", "init", "-")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert os.listdir(tmp_path) == []
    assert ddim("config", "init", "run.toml").exit_code == 0
    assert (tmp_path / "run.toml").read_text() == result.stdout


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device there")


@needs_full
@pytest.mark.parametrize(
    "command", [NAMING[name] for name in NAMING if name.startswith(("schedule", "config"))], ids=" ".join
)
def test_a_full_disk_is_a_failed_run(ddim, command):
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    result = ddim(*command, "/dev/full")
    assert result.exit_code == 1
    assert "/dev/full: cannot be written: No space left on device" in result.stderr
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@needs_full
def test_an_array_for_a_full_disk(ddim, tiny_model):
    command = ("sample", "-m", tiny_model, "--steps", 1, "-n", 1, "-o", "out", "--json")
    result = ddim(*command, "--npz", "/dev/full")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "--npz /dev/full: cannot be written: No space left on device"
    assert json.loads(ddim(*command).stdout)["present"] == 1


@needs_full
@pytest.mark.parametrize("as_json", [False, True])
def test_bench_says_what_it_measured_before_its_plot_fails(ddim, tiny_model, quick_bench, as_json):
    pytest.importorskip("matplotlib")
    result = ddim("bench", "-m", tiny_model, "--plot", "/dev/full", *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert "--plot /dev/full: cannot be written: No space left on device" in result.stderr
    assert "device_name" in result.stdout
    if as_json:
        assert json.loads(result.stdout)["results"] == []


def test_what_goes_to_stdout_goes_after_what_is_there(start, tmp_path):
    """In a process of its own, whose stdout is a file."""
    process = start("config", "init", "/dev/stdout", "--overwrite", before="print('first', flush=True)")
    assert process.wait() == 0
    assert process.stdout.startswith("first\n")
    assert "[sampling]" in process.stdout


def test_a_fifo_is_written_to(start, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    process = start("config", "init", "fifo")
    read = subprocess.run(["cat", tmp_path / "fifo"], capture_output=True, timeout=60, check=True).stdout
    assert process.wait() == 0
    assert b"[sampling]" in read
    assert (tmp_path / "fifo").is_fifo()


@pytest.mark.slow
@pytest.mark.parametrize("most", [500, 20000], ids=["the first file", "the weights"])
def test_convert_on_a_full_disk(start, tiny_model, tmp_path, most):
    """The kernel lets no file grow beyond so many bytes."""
    process = start(
        *("convert", tiny_model, "out", "--json"),
        before="import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))",
    )
    assert process.wait() == 1, process.stderr
    assert os.listdir(tmp_path) == []
    assert process.stderr.startswith("error: out: cannot be written: ")
    assert "File too large" in json.loads(process.stdout)["error"]


@pytest.mark.parametrize("name", [".", ".."])
def test_convert_makes_a_directory_of_its_own(ddim, tiny_model, name, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = ddim("convert", tiny_model, name, "--overwrite")
    assert result.exit_code == 2
    assert "name a directory to make" in result.stderr
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize(
    "command",
    [
        *(" ".join((*words, "")) for words in NAMING.values()),
        *("schedule -c ", "sample --latents ", "sample --log-file ", "compare golden ", "compare a b --diff-dir "),
        *("verify ", "report ", "convert mnist ", "replay --check ", "invert ", "evaluate ", "sweep -c "),
    ],
)
def test_an_empty_name_is_no_folder(ddim, command, tmp_path):
    """As of a shell's variable that is not set; `Path` would take the current folder."""
    result = ddim(*command.split(" "), "--json") if "config" not in command else ddim(*command.split(" "))
    assert result.exit_code == 2
    assert "the name is empty; name a file or a folder" in result.stderr
    if "config" not in command:
        assert "the name is empty" in json.loads(result.stdout)["error"]
    assert os.listdir(tmp_path) == []
