import json
import sys

import pytest
from rich.console import Console

QUICK = ("--batch-sizes", "2,1", "--repeats", 2, "--steps", 3, "--spacing", "trailing", "--device", "cpu")


@pytest.fixture(scope="module")
def result(tiny_model):
    from typer.testing import CliRunner

    from ddim_cli.cli.app import app

    args = ["bench", "-m", tiny_model, *QUICK, "--against", "diffusers", "--json"]
    done = CliRunner().invoke(app, list(map(str, args)))
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_json_is_one_object(result):
    assert result["schema"] == "ddim-cli/bench/1"
    assert [r["batch_size"] for r in result["results"]] == [1, 2]
    assert len(result["sampling"]["timesteps"]) == 3
    assert result["machine"]["versions"]["diffusers"]
    assert list(result["against"]) == ["diffusers"]
    for r in result["results"]:
        assert r["against"]["diffusers"]["largest_difference"] <= 1


@pytest.mark.slow
def test_plain_lines_where_there_is_no_terminal(ddim, tiny_model):
    done = ddim("bench", "-m", tiny_model, *QUICK, "--no-files")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("batch 1: images/s: ")
    assert lines[1].startswith("batch 2: images/s: ")
    for text in ("ms an image and step", "peak memory, MiB", "outside the UNet, %", "of the matrix peak, %"):
        assert text in lines[0]
    assert "from seeds to pictures in memory" in done.stdout
    assert "diffusers, images/s" not in done.stdout


@pytest.mark.slow
def test_bfloat16_against_diffusers(ddim, tiny_model):
    done = ddim("bench", "-m", tiny_model, *QUICK, "--dtype", "bfloat16", "--against", "diffusers", "--psnr-images", 2)
    assert done.exit_code == 0, done.stderr
    assert "x diffusers: " in done.stdout
    assert "diffusers: the loop over UNet and scheduler of its documentation" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("PSNR against float32")


@pytest.mark.slow
def test_what_is_done_is_told_where_there_is_no_terminal(ddim, tiny_model):
    done = ddim("bench", "-m", tiny_model, *QUICK)
    assert "measuring the device's matrix peak\nbatch 1: loading, and the first batch\n" in done.stderr


@pytest.mark.slow
def test_quiet_prints_the_numbers_alone(ddim, tiny_model):
    done = ddim("bench", "-m", tiny_model, *QUICK, "--against", "diffusers", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    first, second, last = done.stdout.splitlines()
    assert (first[:9], second[:9]) == ("batch 1: ", "batch 2: ")
    assert last.startswith("the pictures differ from diffusers' by ")


@pytest.mark.slow
def test_a_stride_that_differs_is_told(ddim, tiny_model):
    command = ("bench", "-m", tiny_model, *QUICK[:-2], "--spacing", "linspace", "--against", "diffusers")
    assert "is not the next timestep of this linspace grid" in ddim(*command).stdout
    same = ddim(*command, "--set", "scheduler.previous_timestep=diffusers").stdout
    assert "is not the next timestep" not in same
    assert "differ from diffusers' by 0/255" in same or "by 1/255" in same


@pytest.mark.parametrize("width", [80, 140])
def test_a_table_that_a_person_can_read(result, width, monkeypatch, capsys):
    from ddim_cli.cli import bench, console

    monkeypatch.setattr(console, "stdout", lambda: Console(force_terminal=True, width=width, color_system=None))
    bench.show(result)
    shown = capsys.readouterr().out
    table = shown[: shown.index("╘") if "╘" in shown else shown.index("└")]
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= width
    row = next(line for line in table.splitlines() if "x diffusers" in line)
    median = result["results"][0]["against"]["diffusers"]["ratio"]["median"]
    assert f"{median:#.3g}" in row
    assert "the pictures differ from diffusers' by" in shown


def test_numbers_are_plain():
    from ddim_cli.cli.bench import _digits

    assert [_digits(v) for v in (12345.6, 100.2, 99.94, 1.0, 0.0123)] == ["12,346", "100", "99.9", "1.00", "0.0123"]


def test_architecture(ddim):
    done = ddim("bench", "--architecture", "mnist", "--steps", 2, "--batch-sizes", 1, "--repeats", 1, "--spacing",
                "trailing", "--json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"]["kind"] == "architecture"
    assert found["model"]["parameters"] > 1e6


@pytest.mark.slow
def test_plot(ddim, tiny_model, tmp_path):
    pytest.importorskip("matplotlib")
    done = ddim("bench", "-m", tiny_model, *QUICK, "--plot", "speed.png")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote speed.png" in done.stderr


@pytest.mark.slow
def test_nothing_is_left_in_the_working_directory(ddim, tiny_model, tmp_path):
    assert ddim("bench", "-m", tiny_model, *QUICK, "-q").exit_code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch-sizes", "0,x"], "'0' is no batch size"),
        (["--batch-sizes", ""], "'' is no batch size"),
        (["--batch-sizes", "1,²"], "'²' is no batch size"),
        (["--batch-sizes", "999999999"], "is no batch size"),
        (["--repeats", 0], "--repeats"),
        (["--against", "difusers"], "did you mean diffusers?"),
        (["--architecture", "cifar"], "did you mean cifar10?"),
        (["--architecture", "cifar10", "-m", "mnist"], "give one"),
        (["--architecture", "lsun256", "--image-size", 100], "multiples of 32"),
        (["--against", "diffusers", "--spacing", "quadratic"], "quadratic"),
        (["--plot", "nowhere/speed.png"], "there is no folder nowhere"),
        (["--plot", "."], "is a folder"),
        (["--seed", 2**63 - 1], "leaves no room"),
        (["-m", "nothing/of/this"], "not found"),
        (["--classes", 3], "not class-conditional"),
        (["--dtype", "float8"], "float8"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_wrong_input_is_one_sentence(args, message, ddim):
    done = ddim("bench", *args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_plot_without_matplotlib_says_so_before_anything_is_measured(ddim, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = ddim("bench", "--plot", "speed.png")
    assert done.exit_code == 2
    assert "pip install 'ddim-cli[plot]'" in done.stderr


def test_no_compiler_for_the_compiled_rival(ddim, monkeypatch, tiny_model):
    monkeypatch.setattr("ddim_cli.sampling.compiled.shutil.which", lambda name: None)
    done = ddim("bench", "-m", tiny_model, "--against", "diffusers+")
    assert done.exit_code == 2
    assert "C++ compiler" in done.stderr
