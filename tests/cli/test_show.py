"""``sample --show``: the pictures in the terminal."""

import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ddim_cli.cli import console, show

ROOT = Path(__file__).parents[2]


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns that takes 24-bit colours and no pixels; what is printed on it."""
    renderable = pytest.importorskip("textual_image.renderable")
    monkeypatch.setattr(renderable, "Image", renderable.HalfcellImage)
    screen = io.StringIO()
    monkeypatch.delenv("NO_COLOR")
    own = Console(file=screen, force_terminal=True, color_system="truecolor", width=80, highlight=False)
    monkeypatch.setattr(console, "stdout", lambda: own)
    return screen


def pixels_of(text: str) -> np.ndarray:
    """The pixels that half blocks show: the colour of a character above, its ground below."""
    rows = []
    for line in text.splitlines():
        found = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m(▀+)", line)
        cells = [[int(v) for v in own[:6]] for own in found for _ in own[6]]
        if cells:
            rows += [[c[:3] for c in cells], [c[3:] for c in cells]]
    return np.array(rows, np.uint8)


def test_small_pictures_are_shown_pixel_by_pixel(ddim, tiny_model, terminal, tmp_path):
    result = ddim("sample", "-m", tiny_model, "-n", 3, "--steps", 2, "-o", "out", "--show")
    assert result.exit_code == 0, result.stderr
    shown = pixels_of(terminal.getvalue())
    for i in range(3):
        expected = np.asarray(Image.open(tmp_path / "out" / f"00000{i}.png"))
        assert np.array_equal(shown[:8, 9 * i : 9 * i + 8], expected)
    assert shown.shape == (10, 26, 3)


def test_a_finished_folder_is_shown_too_and_no_more_than_can_be_recognised(ddim, tiny_model, terminal):
    args = ("sample", "-m", tiny_model, "-n", 20, "--steps", 2, "--no-grid", "-o", "out")
    assert ddim(*args).exit_code == 0
    assert ddim(*args, "--show", "--quiet").exit_code == 0
    assert pixels_of(terminal.getvalue()).shape == (18, 9 * 9 - 1, 3)
    assert "the first 16 of 20 images" in terminal.getvalue()


@pytest.mark.parametrize(
    ("size", "count", "columns", "expected"),
    [
        # 32 pixels go four times into 80 columns only when they are made smaller.
        ((32, 32), 16, 80, (79, 80)),
        ((32, 32), 16, 200, (197, 100)),
        ((512, 256), 4, 80, (79, 12)),
        ((32, 32), 2, 80, (39, 20)),
        ((32, 32), 3, 10, (10, 34)),
    ],
)
def test_the_sheet_fits_the_terminal(size, count, columns, expected):
    sheet = show.block_sheet([Image.new("L", size, 200)] * count, columns)
    assert sheet.size == expected
    assert sheet.width <= columns
    assert sheet.height % 2 == 0


@pytest.mark.parametrize("size", [(24, 80), (0, 0)])
@pytest.mark.parametrize("stdin", ["terminal", "none"])
def test_a_terminal_that_answers_nothing(ddim, tiny_model, tmp_path, size, stdin):
    """As under ``script``: it tells neither its size in pixels nor what it takes, and half blocks need neither."""
    pytest.importorskip("textual_image")
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    args = ("sample", "-m", tiny_model, "-n", 1, "--steps", 2, "-o", "out", "-q")
    assert ddim(*args).exit_code == 0
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "TERMINAL_WIDTH", "NO_COLOR")}
    code = "import sys; from pathlib import Path; from ddim_cli.cli.show import show_pictures"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; show_pictures([Path('out/000000.png')])"],
        stdin=theirs if stdin == "terminal" else subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**environment, "COLORTERM": "truecolor", "TERM": "xterm", "PYTHONPATH": str(ROOT)},
    )
    os.close(theirs)
    shown = b""
    # Read as it is written: of an ended process's terminal nothing more can be read.
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
    assert np.array_equal(pixels_of(shown.decode())[:8], np.asarray(Image.open(tmp_path / "out" / "000000.png")))


def test_a_terminal_that_takes_pixels_but_not_these(ddim, tiny_model, terminal, monkeypatch):
    from textual_image import renderable

    class Failing:
        def __init__(self, *args, **more):
            pass

        def __rich_console__(self, *args):
            raise ZeroDivisionError

    monkeypatch.setattr(renderable, "SixelImage", Failing)
    monkeypatch.setattr(renderable, "Image", Failing)
    assert ddim("sample", "-m", tiny_model, "-n", 3, "--steps", 2, "-o", "out", "--show").exit_code == 0
    assert pixels_of(terminal.getvalue()).shape == (10, 26, 3)


def test_without_a_terminal_nothing_is_shown(ddim, tiny_model):
    result = ddim("sample", "-m", tiny_model, "-n", 1, "--steps", 2, "-o", "out", "--show")
    assert result.exit_code == 0
    assert "stdout is not a terminal" in result.stderr
    assert "▀" not in result.stdout


def test_what_cannot_be_shown_is_said_before_anything_is_made(ddim, tiny_model, monkeypatch, tmp_path):
    args = ("sample", "-m", tiny_model, "-n", 1, "-o", "out", "--show")
    both = ddim(*args, "--json")
    assert both.exit_code == 2
    assert "both want stdout" in both.stderr
    monkeypatch.setattr(show, "find_spec", lambda name: None)
    missing = ddim(*args)
    assert missing.exit_code == 2
    assert "pip install 'ddim-cli[show]'" in missing.stderr
    assert not (tmp_path / "out").exists()
