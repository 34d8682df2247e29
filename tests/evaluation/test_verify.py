import json
import shutil

import numpy as np
import pytest
from PIL import Image
from records import RECORD

from ddim_cli.errors import UsageError
from ddim_cli.evaluation.verify import verify
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.picture import encode_png
from ddim_cli.outputs.sidecar import describe_picture, identity


def fill(path, seeds, subdirs=False, record=RECORD):
    folder = OutputFolder(path, subdirs)
    folder.create()
    folder.start(seeds, record, complete=False)
    draw = np.random.default_rng(0)
    for seed in seeds:
        pixels = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        folder.write(seed, describe_picture(record, seed, pixels), pixels, 0.1, identity(record))
    folder.finish(len(seeds), 1.0, grid=True)
    return path


def edit(path, **changes):
    record = json.loads(path.read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            record[section][name] = value
        else:
            record[section] = value
    path.write_text(json.dumps(record))


def resave(path, **others):
    """The PNG again, with the same text inside unless another is given."""
    with Image.open(path) as image:
        image.load()
        text = others.get("text", image.text["ddim"])
        path.write_bytes(encode_png(others.get("image", image), text))


@pytest.mark.parametrize("subdirs", [True, False])
def test_a_folder_as_it_was_written_is_well(tmp_path, subdirs):
    path = fill(tmp_path / "out", [0, 5, 1500, 12345678], subdirs)
    # What is nobody's business.
    for name in ("report.html", "all.npz", "notes.json", "run.log", "movie.gif", "1.png", ".000001.png.abc.tmp"):
        (path / name).write_text("x")
    (path / "2024").mkdir()
    (path / "2024" / "20240101.png").write_text("a photo")
    found = verify(path)
    assert (found.images, found.problems) == (4, ())


HARM = {
    "is missing": lambda p: [(p / f"000002.{kind}").unlink() for kind in ("png", "json")],
    "is missing, its sidecar is there": lambda p: (p / "000002.png").unlink(),
    "has no sidecar": lambda p: (p / "000002.json").unlink(),
    "does not parse": lambda p: (p / "000002.json").write_text("{"),
    "something is missing": lambda p: edit(p / "000002.json", image={}),
    "says seed 1": lambda p: shutil.copy(p / "000001.json", p / "000002.json"),
    "does not decode": lambda p: (p / "000002.png").write_bytes((p / "000002.png").read_bytes()[:-30]),
    "other pixels": lambda p: resave(p / "000002.png", image=Image.new("RGB", (4, 4))),
    "is 5 x 4 RGB": lambda p: resave(p / "000002.png", image=Image.new("RGB", (5, 4))),
    "is 4 x 4 L": lambda p: resave(p / "000002.png", image=Image.new("L", (4, 4))),
    "no text 'ddim'": lambda p: resave(p / "000002.png", text=None),
    "something else inside": lambda p: edit(p / "000002.json", scheduler__beta_start=0.1, runtime__batch_size=4),
    "was made with sampling.eta = 1.0": lambda p: edit(p / "000002.json", sampling__eta=1.0),
    "bytes, its sidecar says": lambda p: (p / "000002.png").open("ab").write(b"more"),
    "is there twice": lambda p: (
        [(p / "000000").mkdir()] + [shutil.copy(p / f"000002.{kind}", p / "000000") for kind in ("png", "json")]
    ),
}


@pytest.mark.parametrize("says", HARM)
def test_harm_is_found_and_named(tmp_path, says):
    path = fill(tmp_path / "out", range(4))
    if says == "something else inside":
        edit(path / "000002.json", runtime__batch_size=4)
    else:
        HARM[says](path)
    [problem] = verify(path).problems
    assert (problem.file, problem.seed) == ("000002.png", 2)
    assert says in problem.text


def test_extra_pairs_and_files_of_the_run(tmp_path):
    path = fill(tmp_path / "out", range(3))
    fill(tmp_path / "other", [7])
    for kind in ("png", "json"):
        shutil.copy(tmp_path / "other" / f"000007.{kind}", path)
    (path / "grid.png").write_bytes(b"x")
    assert sorted(p.file for p in verify(path).problems) == ["000007.json", "000007.png", "grid.png"]
    (path / "run.json").unlink()
    assert [(p.file, p.seed) for p in verify(path).problems] == [("run.json", None), ("grid.png", None)]
    for text in ("[]", '{"schema": "ddim-cli/run/1"}', '{"schema": "ddim-cli/run/1", "seeds": "9-1"}'):
        (path / "run.json").write_text(text)
        assert verify(path).problems[0].file == "run.json"


def test_what_is_no_output_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path, says in ((tmp_path, "neither run.json"), (tmp_path / "none", "no such"), (tmp_path / "file", "not a")):
        with pytest.raises(UsageError, match=says):
            verify(path)


def test_the_command(ddim, tmp_path):
    path = fill(tmp_path / "out", range(3))
    result = ddim("verify", "out")
    assert (result.exit_code, result.stdout) == (0, "3 images: all is well\n")
    (path / "000001.png").unlink()
    result = ddim("verify", "out")
    assert result.exit_code == 3
    assert result.stdout == "out/000001.png: is missing, its sidecar is there\n3 images: 1 problem\n"
    found = json.loads(ddim("verify", "out", "--json").stdout)
    assert (found["ok"], found["images"], found["problems"][0]["seed"]) == (False, 3, 1)
    result = ddim("verify", "none", "--json")
    assert (result.exit_code, json.loads(result.stdout)["exit_code"]) == (2, 2)
