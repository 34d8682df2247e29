"""Stdout in an encoding that lacks what is printed, as a pipe has on Windows."""

import json
import shutil

import pytest

CP1252 = "import sys; sys.stdout = open(1, 'w', encoding='cp1252', closefd=False)"
ASCII = "import sys; sys.stdout = open(1, 'w', encoding='ascii', errors='surrogateescape', closefd=False)"


@pytest.mark.parametrize("narrow", [CP1252, ASCII], ids=["cp1252", "ascii"])
def test_inspect_draws_its_tree_with_what_there_is(start, narrow):
    process = start("inspect", "mnist", before=narrow)
    assert process.wait() == 0, process.stderr
    assert "blocks: | DownBlock2D" in process.stdout
    assert "  ` UpBlock2D" in process.stdout


def test_names_of_files_are_escaped(start, bundled, tmp_path):
    shutil.copytree(bundled, tmp_path / "жар")
    process = start("inspect", "жар", before=CP1252)
    assert process.wait() == 0, process.stderr
    assert r"\u0436\u0430\u0440" in process.stdout
    process = start("inspect", "жар", "--json", before=CP1252)
    assert process.wait() == 0, process.stderr
    assert json.loads(process.stdout)["source"] == "жар"


def test_in_utf_8_nothing_is_replaced(start):
    process = start("inspect", "mnist", before="import sys; sys.stdout = open(1, 'w', encoding='utf-8', closefd=False)")
    assert process.wait() == 0, process.stderr
    assert "blocks: ├ DownBlock2D" in process.stdout
