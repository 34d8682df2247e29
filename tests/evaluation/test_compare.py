import json
import math

import numpy as np
import pytest
from PIL import Image

from ddim_cli.evaluation.pixels import largest_difference, psnr_db


def save(folder, pictures):
    folder.mkdir(exist_ok=True)
    for seed, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{seed:06d}.png")


def grey(value, size=(8, 8, 3)):
    return np.full(size, value, np.uint8)


def test_psnr_in_closed_form():
    a, b = grey(100), grey(110)
    assert largest_difference(a, b) == largest_difference(b, a) == 10
    assert psnr_db(a, b) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr_db(a, a) == math.inf
    assert largest_difference(grey(0), grey(255)) == 255


@pytest.mark.parametrize(
    ("value", "options", "code"),
    [
        (100, [], 0),
        (101, [], 0),
        (102, [], 3),
        (101, ["--max-diff", 0], 3),
        (102, ["--max-diff", 2], 0),
        # 10 of 255 everywhere is 28.1 dB.
        (110, ["--max-diff", 10], 3),
        (110, ["--max-diff", 10, "--min-psnr", 28], 0),
        (110, ["--max-diff", 255, "--min-psnr", 28.2], 3),
    ],
)
def test_the_limits(ddim, tmp_path, value, options, code):
    save(tmp_path / "golden", {3: grey(100)})
    save(tmp_path / "new", {3: grey(value)})
    result = ddim("compare", "golden", "new", "--json", *options)
    assert result.exit_code == code
    found = json.loads(result.stdout)
    assert found["ok"] is (code == 0)
    assert found["images"][0]["max_diff"] == value - 100
    assert (found["images"][0]["psnr_db"] is None) == (value == 100)


def test_missing_and_extra_fail_and_foreign_files_do_not(ddim, tmp_path):
    same = {s: grey(s) for s in range(4)}
    save(tmp_path / "golden", same)
    save(tmp_path / "new", same)
    for name in ("grid.png", "a.png", "12.png"):
        (tmp_path / "new" / name).write_bytes(b"x")
    assert ddim("compare", "golden", "new").exit_code == 0
    (tmp_path / "new" / "000002.png").unlink()
    save(tmp_path / "new", {9: grey(1)})
    result = ddim("compare", "golden", "new")
    assert result.exit_code == 3
    assert "missing: 1 picture (seeds 2)" in result.stdout
    assert "extra: 1 picture (seeds 9)" in result.stdout
    found = json.loads(ddim("compare", "golden", "new", "--json").stdout)
    assert (found["missing"], found["extra"], found["failed"]) == ([2], [9], 0)


def test_either_layout_is_matched(ddim, tmp_path):
    save(tmp_path / "golden", {1500: grey(1)})
    (tmp_path / "new").mkdir()
    save(tmp_path / "new" / "001000", {1500: grey(1)})
    assert ddim("compare", "golden", "new").exit_code == 0


def test_pictures_that_cannot_be_compared(ddim, tmp_path):
    save(tmp_path / "golden", {0: grey(0), 1: grey(0), 2: grey(0)})
    save(tmp_path / "new", {0: grey(0, (8, 9, 3)), 1: grey(0, (8, 8))})
    (tmp_path / "new" / "000002.png").write_bytes(b"x")
    found = json.loads(ddim("compare", "golden", "new", "--json").stdout)
    problems = [image["problem"] for image in found["images"]]
    assert problems[:2] == ["is 9 x 8 RGB, the golden one 8 x 8 RGB", "is 8 x 8 grey, the golden one 8 x 8 RGB"]
    assert "000002.png cannot be read" in problems[2]
    assert ddim("compare", "golden", "new").exit_code == 3


def test_difference_pictures_show_where(ddim, tmp_path):
    spot = grey(100)
    spot[2, 3] = 104
    save(tmp_path / "golden", {0: grey(100), 1: grey(100)})
    save(tmp_path / "new", {0: spot, 1: grey(100)})
    assert ddim("compare", "golden", "new", "--diff-dir", "a/diffs").exit_code == 3
    [path] = (tmp_path / "a" / "diffs").iterdir()
    with Image.open(path) as image:
        # Three panels of 96 pixels, a picture's pixel being 12 of them.
        assert image.size == (3 * 102 + 6, 108)
        left = 6 + 2 * 102
        assert image.getpixel((left + 3 * 12 + 1, 6 + 2 * 12 + 1)) == (255, 255, 255)
        assert image.getpixel((left + 1, 7)) == (0, 0, 0)


def test_difference_pictures_of_before_go_and_nothing_else(ddim, tmp_path):
    command = ("compare", "golden", "new", "--diff-dir", "diffs")
    save(tmp_path / "golden", {0: grey(100), 1: grey(100)})
    save(tmp_path / "new", {0: grey(104), 1: grey(104)})
    assert ddim(*command).exit_code == 3
    (tmp_path / "diffs" / "notes.png").write_bytes((tmp_path / "diffs" / "000000.png").read_bytes())
    (tmp_path / "diffs" / "notes.txt").write_text("mine")
    save(tmp_path / "new", {0: grey(100)})
    assert ddim(*command).exit_code == 3
    assert sorted(p.name for p in (tmp_path / "diffs").iterdir()) == ["000001.png", "notes.png", "notes.txt"]
    save(tmp_path / "new", {1: grey(100)})
    assert ddim(*command).exit_code == 0
    assert sorted(p.name for p in (tmp_path / "diffs").iterdir()) == ["notes.png", "notes.txt"]


def test_pictures_of_others_are_no_difference_pictures(ddim, tmp_path):
    save(tmp_path / "golden", {0: grey(100)})
    save(tmp_path / "new", {0: grey(104)})
    before = (tmp_path / "new" / "000000.png").read_bytes()
    result = ddim("compare", "golden", "new", "--diff-dir", "new")
    assert result.exit_code == 2
    assert "--diff-dir new: 000000.png in there is no difference picture of ddim compare" in result.stderr
    assert (tmp_path / "new" / "000000.png").read_bytes() == before
    assert ddim("compare", "golden", "new", "--diff-dir", "new/000000.png").exit_code == 2
    assert ddim("compare", "golden", "new", "--diff-dir", "new/000000.png/a").exit_code == 2


def test_the_table_is_short_and_the_worst_come_first(ddim, tmp_path):
    save(tmp_path / "golden", {s: grey(100) for s in range(60)})
    save(tmp_path / "new", {s: grey(100 + (s == 7) + 9 * (s == 50)) for s in range(60)})
    lines = ddim("compare", "golden", "new").stdout.splitlines()
    assert "000050" in lines[2]
    assert "differs by 9, PSNR 29.0 dB" in lines[2]
    assert "000007" in lines[3]
    assert "... and 27 more that pass" in lines
    assert lines[-1] == "60 pictures compared, 1 beyond the limits"


def test_other_settings_are_named(ddim, tiny_model):
    for eta, out in ((0.0, "golden"), (1.0, "new")):
        assert ddim("sample", "-m", tiny_model, "--steps", 4, "-n", 2, "--eta", eta, "-o", out).exit_code == 0
    assert "note: sampling.eta is 1.0, in the golden pictures 0.0" in ddim("compare", "golden", "new").stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["none", "new"], "no such folder"),
        (["golden", "none"], "no such folder"),
        (["file", "new"], "not a folder"),
        (["empty", "new"], "no numbered pictures"),
        (["golden", "new", "--min-psnr", "inf"], "give a number"),
        (["golden", "new", "--max-diff", "-1"], "max-diff"),
        (["golden"], "DIR"),
    ],
)
def test_bad_input(ddim, tmp_path, args, says):
    save(tmp_path / "golden", {0: grey(0)})
    save(tmp_path / "new", {0: grey(0)})
    save(tmp_path / "empty", {})
    (tmp_path / "file").write_text("")
    result = ddim("compare", *args, "--json")
    assert result.exit_code == 2
    assert says in result.stderr
    assert json.loads(result.stdout)["exit_code"] == 2
