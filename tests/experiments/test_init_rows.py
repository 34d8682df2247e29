"""``ddim sample --items`` with rows that begin from pictures, each with a strength and a mask of its own."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddim_cli import sample
from ddim_cli.errors import ConfigError
from ddim_cli.sampling.loop import Denoiser

ROWS = [
    {"name": "half", "seed": 3, "init": "p.png", "strength": 0.5},
    {"name": "noise", "seed": 3},
    {"name": "masked", "seed": 4, "init": "q.png", "mask": "m.png"},
    {"name": "both", "seed": 5, "init": "p.png", "mask": "m.png", "strength": 0.7},
    {"name": "plain", "seed": 3, "init": "p.png"},
    {"name": "other", "seed": 4, "init": "q.png", "strength": 0.5},
]


@pytest.fixture(autouse=True)
def files(tmp_path):
    random = np.random.default_rng(0)
    for name in ("p.png", "q.png", "r.png"):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name)
    white, black = Image.new("L", (8, 8), 255), Image.new("L", (8, 8))
    black.save(tmp_path / "black.png")
    black.paste(white.crop((0, 0, 8, 4)))
    black.save(tmp_path / "m.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")


@pytest.fixture
def run(ddim, tiny_model):
    return lambda *args: ddim("sample", "-m", tiny_model, "--steps", 10, "--no-compile", "--json", *args)


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ("seed", "init", "strength", "name", "mask"))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def job(run, tmp_path):
    """Make the pictures of rows in the folder ``out``; how many were made, there and left."""

    def make(out, rows, *more, file="a.jsonl"):
        result = run("--items", write(tmp_path / file, rows), "-o", out, *more)
        assert result.exit_code == 0, result.stderr
        told = json.loads(result.stdout)
        return told["made"], told["present"], told["left"]

    return make


def pixels(folder):
    return {p.stem: np.asarray(Image.open(p)).astype(int) for p in Path(folder).glob("*.png") if p.stem != "grid"}


def same(one, other, most=0):
    """Whether the pictures that two folders both have are the same, no value further apart than ``most``."""
    a, b = pixels(one), pixels(other)
    assert set(b) <= set(a)
    return all(abs(a[name] - b[name]).max() <= most for name in b)


def sampling(folder, name):
    return json.loads((Path(folder) / f"{name}.json").read_text())["sampling"]


def test_each_row_is_as_a_command_of_its_own(run, job, tmp_path):
    """Whatever the order, the file's format, the other rows and the batch size."""
    (tmp_path / "alone").mkdir()
    for row in ROWS:
        flags = [x for key in ("init", "strength", "mask") if key in row for x in (f"--{key}", row[key])]
        assert run("--seeds", row["seed"], "-b", 1, "-o", row["name"], *flags).exit_code == 0
        shutil.copy(f"{row['name']}/{row['seed']:06d}.png", f"alone/{row['name']}.png")
    assert job("jsonl", ROWS, "-b", 1) == (6, 0, 0)
    assert job("csv", ROWS[::-1], "-b", 1, file="a.csv") == (6, 0, 0)
    assert same("jsonl", "alone")
    assert same("csv", "alone")
    assert job("three", ROWS, "-b", 3) == (6, 0, 0)
    assert same("three", "alone", most=1)
    assert job("few", ROWS[::2], "-b", 1) == (3, 0, 0)
    assert same("alone", "few")
    starts = {row["name"]: sampling("csv", row["name"]).get("start_timestep") for row in ROWS}
    assert starts == {"half": 400, "noise": None, "masked": 900, "both": 600, "plain": 700, "other": 400}
    assert sampling("csv", "half") | {"row": None} == sampling("half", "000003") | {"row": None}


def test_rows_that_begin_alike_share_batches(job, monkeypatch):
    launched, launch = [], Denoiser.launch

    def told(self, items, *args):
        launched.append([item.name for item in items])
        return launch(self, items, *args)

    monkeypatch.setattr(Denoiser, "launch", told)
    kinds = ({"init": "p.png", "strength": 0.3}, {}, {"init": "q.png", "strength": 0.35}, {"init": "p.png"})
    rows = [{"name": f"r{n}", **kinds[n % 4]} for n in range(8)]
    assert job("out", rows, "-b", 4) == (8, 0, 0)
    assert launched == [["r0", "r2", "r4", "r6"], ["r1", "r5"], ["r3", "r7"]]


def test_what_the_run_says_holds_for_rows_that_do_not(job):
    rows = [
        {"name": "a"},
        {"name": "b", "init": "q.png"},
        {"name": "c", "strength": 0.3},
        {"name": "d", "mask": "m.png"},
    ]
    said = {"init": "p.png", "strength": 0.6}
    assert job("run", rows, *(x for key, value in said.items() for x in (f"--{key}", value)), "-b", 1) == (4, 0, 0)
    assert job("rows", [{**said, **row} for row in rows], "-b", 1) == (4, 0, 0)
    assert same("run", "rows")
    assert all(sampling("run", name) == sampling("rows", name) for name in "abcd")
    # Strength and mask for the pictures of rows; those without one begin from noise.
    rows = [{"name": "a"}, {"name": "b", "init": "q.png"}]
    assert job("noise", rows, "--strength", 0.6, "--mask", "m.png", "-b", 1) == (2, 0, 0)
    assert "strength" not in sampling("noise", "a")
    assert (sampling("noise", "b")["strength"], sampling("noise", "b")["mask"]["file"]) == (0.6, "m.png")
    assert job("rows2", [rows[0], {**rows[1], "strength": 0.6, "mask": "m.png"}], "-b", 1) == (2, 0, 0)
    assert same("noise", "rows2")


def test_shards_resume_verify_and_replay(ddim, job, tmp_path):
    more = ("-b", 2, "--variation-seed", 9, "--variation-strength", 0.2, "--eta", 0.5)
    assert job("whole", ROWS, *more) == (6, 0, 0)
    assert job("out", ROWS, *more, "--shard", "1/2") == (3, 0, 3)
    assert job("out", ROWS, *more, "--shard", "0/2") == (3, 0, 0)
    assert same("whole", "out")
    (tmp_path / "out" / "both.png").unlink()
    assert job("out", ROWS, *more) == (1, 5, 0)
    assert same("whole", "out", most=1)
    assert ddim("verify", "out").stdout == "6 images: all is well\n"
    (tmp_path / "away").mkdir()
    for name in ("p", "q", "m"):
        shutil.move(f"{name}.png", f"away/{name}.png")
    sidecars = [f"whole/{row['name']}.json" for row in ROWS]
    gone = ddim("replay", *sidecars, "--check")
    assert (gone.exit_code, "whole/half.json: the picture that it began from, p.png, is not there" in gone.stderr) == (
        2,
        True,
    )
    again = ddim("replay", *sidecars, "--check", "--init", "away")
    assert (again.exit_code, "6 with equal hashes" in again.stdout) == (0, True), again.stdout + again.stderr


def test_another_picture_under_a_name_is_refused_and_the_same_elsewhere_is_not(run, job, tmp_path):
    rows = [{"name": "a"}, {"name": "b", "init": "p.png", "strength": 0.5}]
    assert job("out", rows) == (2, 0, 0)
    shutil.copy("p.png", "copy.png")
    assert job("out", [rows[0], {**rows[1], "init": "copy.png"}]) == (0, 2, 0)
    for change, told in (
        ({"init": "q.png"}, "sampling.init = a picture of the pixels"),
        ({"strength": 0.6}, "sampling.strength = 0.5, this run has 0.6"),
        ({"mask": "m.png"}, "sampling.mask = null, this run has a picture of the pixels"),
        ({"init": None, "strength": None}, "this run has null"),
    ):
        result = run("--items", write(tmp_path / "a.jsonl", [rows[0], {**rows[1], **change}]), "-o", "out")
        assert (result.exit_code, f"{tmp_path}/a.jsonl:2: out/b.json was made with" in result.stderr) == (2, True)
        assert told in result.stderr


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_paths_lead_from_the_job_file(run, tmp_path, ending):
    (tmp_path / "jobs" / "in").mkdir(parents=True)
    for name in ("p.png", "m.png"):
        shutil.move(name, f"jobs/in/{name}")
    absolute = str(tmp_path / "large.png")
    rows = [{"name": "a", "init": "in/p.png", "mask": "in/m.png"}, {"name": "b", "init": absolute, "strength": 0.3}]
    write(tmp_path / "jobs" / f"a.{ending}", rows)
    result = run("--items", f"jobs/a.{ending}", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0] == f"{absolute}: resized from 16 x 16 to 8 x 8"
    assert [sampling("out", "a")[key]["path"] for key in ("init", "mask")] == [
        str(tmp_path / "jobs" / "in" / name) for name in ("p.png", "m.png")
    ]


P = {"init": "p.png"}
WRONG = {
    "strength 0": ([{}, {**P, "strength": 0}], (), ":{}: strength = 0"),
    "strength above 1": ([{}, {**P, "strength": 1.5}], (), ":{}: strength = 1.5 is not above 0 and at most 1"),
    "no number": ([{}, {**P, "strength": "a"}], (), ':{}: strength = "a" is no number'),
    "no step": ([{}, {**P, "strength": 0.01}], (), ":{}: sampling.strength = 0.01 leaves none of the 10 steps"),
    "order": ([{}, {**P, "strength": 0.1}], ("--order", 2), ":{}: sampling.strength = 0.1 leaves 1 of the 10 steps"),
    "mask alone": ([{}, {"mask": "m.png"}], (), ":{}: has a mask and no init, the picture that it is about"),
    "strength alone": ([{}, {"strength": 0.5}], (), ":{}: has a strength and no init, the picture that it is about"),
    "missing": ([{}, {"init": "none.png"}], (), ":{}: none.png: no such file"),
    "missing mask": ([{}, {**P, "mask": "none.png"}], (), ":{}: none.png: no such file"),
    "no home": ([{}, {"init": "~nobody-of-this-name/p.png"}], (), ":{}: ~nobody-of-this-name/p.png: "),
    "black": ([{}, {**P, "mask": "black.png"}], (), ":{}: black.png: the mask is black everywhere"),
    "no picture": ([{}, {"init": "text.png"}], (), ":{}: text.png: cannot be read as a picture"),
}


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_rows_are_refused_with_their_place(run, tmp_path, kind, ending):
    rows, more, told = WRONG[kind]
    write(tmp_path / f"a.{ending}", [{"seed": n, **row} for n, row in enumerate(rows)])
    result = run("--items", f"a.{ending}", "-o", "out", *more)
    assert result.exit_code == 2
    # A header is a line too.
    line = 3 if ending == "csv" else 2
    assert json.loads(result.stdout)["error"].startswith(f"a.{ending}{told.format(line)}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        ([{}, {**P, "strength": True}], (), "a.jsonl:2: strength = true is no number"),
        ([{}, {**P, "latent": "l.safetensors"}], (), "a.jsonl:2: has a latent and an init; a picture begins from one"),
        ([{}, {"latent": "l.safetensors"}], ("--init", "p.png"), "a.jsonl:2: has a latent and an init"),
        ([{"init": ""}], (), "a.jsonl:1: init is empty; leave it out, or name a file"),
        ([{"init": 3}], (), "a.jsonl:1: init = 3 is no text"),
        ([{}, P], ("--resample", 2), "sampling.resample = 2 is for rows with a mask, and none has one"),
        ([{}], ("--strength", 0.5), "sampling.strength is for rows that begin from a picture, and none does"),
        ([{}], ("--mask", "m.png"), "sampling.mask is for rows that begin from a picture, and none does"),
    ],
    ids=str,
)
def test_what_rows_cannot_say(run, tmp_path, rows, more, told):
    write(tmp_path / "a.jsonl", rows)
    result = run("--items", "a.jsonl", "-o", "out", *more)
    assert (result.exit_code, json.loads(result.stdout)["error"].startswith(told)) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()


def test_from_python(tmp_path):
    """A network of one's own, which gives back the state that it sees; paths are as a program has them."""
    config = {"sampling": {"timesteps": [600, 300], "resample": 2}, "scheduler": {"prediction_type": "sample"}}
    items = [{"seed": 1}, {"seed": 1, "init": tmp_path / "p.png", "strength": 0.5}, {"seed": 1, "init": "p.png"}]
    items[2]["mask"] = tmp_path / "m.png"
    with pytest.raises(ConfigError, match=r"items\[2\]: p\.png: no such file"):
        sample(config, lambda x, t: x, shape=(3, 8, 8), items=items)
    items[2]["init"] = str(tmp_path / "p.png")
    found = list(sample(config, lambda x, t: x, shape=(3, 8, 8), items=items))
    assert [s.metadata["sampling"].get("start_timestep") for s in found] == [None, 300, 600]
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert np.array_equal(np.asarray(found[2].image)[4:], picture[4:])
    assert not np.array_equal(np.asarray(found[1].image), np.asarray(found[0].image))
