"""``ddim sweep``: its cells are what ``ddim sample`` makes, and it goes on where it was stopped."""

import json
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from ddim_cli.outputs.sweep_sheet import Block, Panel, draw_sweep, pictures_in_a_cell

CONFIG = """
[model]
source = "{model}"
[sampling]
num_images = 5
batch_size = 2
[sweep]
steps = [3, 4]
variant = [{{ eta = 0.0 }}, {{ label = "large variance", variance = "large" }}]
[[sweep.override]]
when = {{ steps = 4 }}
set = {{ num_images = 3, "scheduler.timestep_spacing" = "trailing" }}
"""
CELLS = {
    "steps=3,eta=0.0": ("--steps", 3, "-n", 5),
    "steps=3,large-variance": ("--steps", 3, "-n", 5, "--set", "sampling.variance=large"),
    "steps=4,eta=0.0": ("--steps", 4, "-n", 3, "--spacing", "trailing"),
    "steps=4,large-variance": ("--steps", 4, "-n", 3, "--spacing", "trailing", "--set", "sampling.variance=large"),
}


@pytest.fixture
def config(tmp_path, tiny_model):
    path = tmp_path / "sweep.toml"
    path.write_text(CONFIG.format(model=tiny_model))
    return path


def hashes(folder):
    return {p.name: json.loads(p.read_text())["image"]["pixels_sha256"] for p in folder.glob("0*.json")}


def test_a_cell_is_the_same_settings_run_alone(ddim, config, tiny_model, tmp_path):
    result = ddim("sweep", "-c", config, "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["made"], found["present"], found["left"], found["finished"]) == (16, 0, 0, True)
    assert {cell["folder"] for cell in found["cells"]} == set(CELLS)
    for name, args in CELLS.items():
        assert ddim("sample", "-m", tiny_model, "-b", 2, "-o", f"alone/{name}", *args).exit_code == 0
        assert hashes(tmp_path / "alone" / name) == hashes(tmp_path / "out" / name) != {}
        assert ddim("verify", f"out/{name}").exit_code == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*CELLS, "sweep.json", "sweep.png"}


def test_sweep_json(ddim, config, tmp_path):
    assert ddim("sweep", "-c", config, "-o", "out").exit_code == 0
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["schema"] == "ddim-cli/sweep/1"
    assert (found["seeds"], found["images"], found["sheet"]) == ("0-4", 5, "sweep.png")
    assert [axis["name"] for axis in found["axes"]] == ["steps", "variant"]
    assert [value["label"] for value in found["axes"][1]["values"]] == ["eta=0.0", "large variance"]
    cell = found["cells"][3]
    assert (cell["at"], cell["folder"], cell["seeds"], cell["images"]) == ([1, 1], "steps=4,large-variance", "0-2", 3)
    assert cell["set"]["sampling.variance"] == "large"
    assert cell["finished"] is True
    assert cell["images_per_second"] > 0


def test_the_same_command_goes_on(ddim, config, tmp_path):
    out = tmp_path / "out"
    first = ddim("sweep", "-c", config, "-o", "out")
    assert first.exit_code == 0
    assert "steps: 3, variant: large variance, images: 5" in first.stdout
    written = [p for p in out.rglob("*") if p.is_file() and p.name != "run.json"]
    before = {p: p.stat().st_mtime_ns for p in written}
    again = ddim("sweep", "-c", config, "-o", "out")
    assert "nothing to do: all 16 are there already" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in written} == before
    (out / "steps=4,eta=0.0" / "000001.png").unlink()
    (out / "sweep.png").unlink()
    # What a killed sweep left half written goes.
    (out / ".sweep.json.0123456789ab.tmp").write_bytes(b"half")
    found = json.loads(ddim("sweep", "-c", config, "-o", "out", "--json").stdout)
    assert (found["made"], found["present"]) == (1, 15)
    assert (out / "sweep.png").exists()
    assert not (out / ".sweep.json.0123456789ab.tmp").exists()
    # Another value on an axis adds cells, and other settings are refused before anything is made.
    more = json.loads(ddim("sweep", "-c", config, "--axis", "steps=3,4,5", "-o", "out", "--json").stdout)
    assert (more["made"], more["present"]) == (10, 16)
    refused = ddim("sweep", "-c", config, "--no-clip-sample", "--axis", "steps=2,4", "-o", "out")
    assert refused.exit_code == 2
    assert "was made with scheduler.clip_sample = true" in refused.stderr
    assert not (out / "steps=2,eta=0.0").exists()
    assert ddim("sweep", "-c", config, "--no-clip-sample", "-o", "out", "--overwrite").exit_code == 0


def cells_of(folder):
    """Folder name -> whether it is finished, as sweep.json has it."""
    found = json.loads((folder / "sweep.json").read_text())
    assert found["sheet"] == "sweep.png"
    return {cell["folder"]: cell["finished"] for cell in found["cells"]}


def test_another_sweep_is_refused_in_the_folder_of_one(ddim, tiny_model, tmp_path):
    """Its sweep.json would no longer name the cells of the first."""
    args = ("sweep", "-m", tiny_model, "-n", 1, "-o", "out")
    assert ddim(*args, "--axis", "steps=2,3").exit_code == 0
    before = (tmp_path / "out" / "sweep.json").read_bytes()
    for axes in (("steps=3,4",), ("eta=0.0,1.0",), ("steps=2,3", "eta=0.0,1.0")):
        for more in ((), ("--dry-run",)):
            refused = ddim(*args, *(word for axis in axes for word in ("--axis", axis)), *more)
            assert refused.exit_code == 2
            assert "out/sweep.json is of another sweep, with a cell steps=2 that this one lacks" in refused.stderr
    assert (tmp_path / "out" / "sweep.json").read_bytes() == before
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"steps=2", "steps=3", "sweep.json", "sweep.png"}
    assert ddim(*args, "--axis", "steps=3,4", "--overwrite").exit_code == 0
    assert cells_of(tmp_path / "out") == {"steps=3": True, "steps=4": True}


def test_fewer_values_keep_the_cells_of_the_others(ddim, tiny_model, tmp_path):
    args = ("sweep", "-m", tiny_model, "-o", "out")
    assert ddim(*args, "-n", 1, "--axis", "steps=2,3,4").exit_code == 0
    sheet = (tmp_path / "out" / "sweep.png").read_bytes()
    found = json.loads(ddim(*args, "-n", 2, "--axis", "steps=4,3", "--json").stdout)
    assert (found["made"], found["present"], found["sheet"]) == (2, 2, "out/sweep.png")
    assert (tmp_path / "out" / "sweep.png").read_bytes() == sheet
    kept = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (kept["seeds"], kept["images"]) == ("0-1", 2)
    assert [(c["folder"], c["at"], c["images"]) for c in kept["cells"]] == [
        ("steps=2", [0], 1),
        ("steps=3", [1], 2),
        ("steps=4", [2], 2),
    ]


@pytest.mark.parametrize(("axis", "code"), [("steps=3,4", 2), ("steps=2,3,4", 0)])
def test_a_sweep_that_begins_while_another_runs(ddim, tiny_model, tmp_path, monkeypatch, axis, code):
    """Between the first one's cells: one with other cells is refused, one with more keeps those of both."""
    from ddim_cli.experiments import sweep as room

    whole, calls, args = room.execute, [], ("sweep", "-m", tiny_model, "-n", 1, "-o", "out", "--axis")

    def execute(job, *more, **others):
        calls.append(job)
        if len(calls) == 2:
            assert ddim(*args, axis).exit_code == code
        return whole(job, *more, **others)

    monkeypatch.setattr(room, "execute", execute)
    assert ddim(*args, "steps=2,3").exit_code == 0
    expected = ("steps=2", "steps=3") if code else ("steps=2", "steps=3", "steps=4")
    assert cells_of(tmp_path / "out") == dict.fromkeys(expected, True)


def test_two_sweeps_that_begin_at_once(ddim, tiny_model, tmp_path, monkeypatch):
    """The second has looked into the empty folder when the first begins, and is refused before it makes anything."""
    from ddim_cli.experiments import sweep as room

    whole, args = room.pending_images, ("sweep", "-m", tiny_model, "-n", 1, "-o", "out", "--axis")

    def pending_images(*more):
        found = whole(*more)
        monkeypatch.setattr(room, "pending_images", whole)
        assert ddim(*args, "eta=0.0,1.0", "--steps", 2).exit_code == 0
        return found

    monkeypatch.setattr(room, "pending_images", pending_images)
    assert ddim(*args, "steps=2,3").exit_code == 2
    assert cells_of(tmp_path / "out") == {"eta=0.0": True, "eta=1.0": True}
    assert not (tmp_path / "out" / "steps=2").exists()


def test_shards_need_no_meeting_point(ddim, config, tmp_path):
    first = json.loads(ddim("sweep", "-c", config, "-o", "out", "--shard", "0/2", "--json").stdout)
    assert (first["finished"], first["sheet"]) == (False, None)
    assert first["left"] == 16 - first["made"]
    second = json.loads(ddim("sweep", "-c", config, "-o", "out", "--shard", "1/2", "--json").stdout)
    assert second["finished"] is True
    assert first["made"] + second["made"] == 16
    assert (tmp_path / "out" / "sweep.png").exists()


def test_a_shard_that_ends_last_finds_what_the_other_finished(ddim, config, tmp_path, monkeypatch):
    """The other shard runs whole between this one's first and second cell."""
    from ddim_cli.experiments import sweep as room

    whole, calls = room.execute, []

    def execute(job, *args, **more):
        calls.append(job)
        if len(calls) == 2:
            assert ddim("sweep", "-c", config, "-o", "out", "--shard", "1/2", "-q").exit_code == 0
        return whole(job, *args, **more)

    monkeypatch.setattr(room, "execute", execute)
    found = json.loads(ddim("sweep", "-c", config, "-o", "out", "--shard", "0/2", "--json").stdout)
    assert (found["finished"], found["left"]) == (True, 0)
    manifest = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert all(cell["finished"] for cell in manifest["cells"])
    assert (tmp_path / "out" / "sweep.png").exists()


def test_ranks_are_refused(ddim, config, monkeypatch, tmp_path):
    from ddim_cli import sweep
    from ddim_cli.errors import UsageError

    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    result = ddim("sweep", "-c", config, "-o", "out")
    assert result.exit_code == 2
    assert "--shard I/N makes a part of every cell" in result.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="sweep runs in one process"):
        sweep({"steps": [2]})


def test_the_network_is_loaded_once(ddim, tiny_model, monkeypatch, tmp_path):
    from ddim_cli.sampling import network as room

    loads, whole = [], room.load_sampling_network
    monkeypatch.setattr(room, "load_sampling_network", lambda *which: loads.append(which) or whole(*which))
    args = ["sweep", "-m", tiny_model, "--axis", "steps=2,3", "--axis", "sampling.batch_size=1,2", "-n", 2]
    assert ddim(*args, "-o", "out").exit_code == 0
    assert len(loads) == 1
    assert ddim(*args, "-o", "other", "--axis", f"model.source='{tiny_model}','mnist'").exit_code == 2
    assert ddim(*args[:1], *args[3:], "-o", "other", "--axis", f"model.source='{tiny_model}','mnist'").exit_code == 0
    assert [which[0].name for which in loads[1:]] == [
        "tiny",
        "mnist",
        "tiny",
        "mnist",
        "tiny",
        "mnist",
        "tiny",
        "mnist",
    ]


def test_cells_are_scored_as_evaluate_does(ddim, tmp_path, monkeypatch):
    args = ("sweep", "--axis", "steps=1,2", "-n", 4, "-b", 4, "--reference", "mnist", "-o", "out", "--json")
    found = json.loads(ddim(*args).stdout)
    for cell in found["cells"]:
        alone = json.loads(ddim("evaluate", f"out/{cell['folder']}", "--reference", "mnist", "--json").stdout)
        assert cell["score"]["value"] == pytest.approx(alone["value"])
        assert cell["score"]["label"] == alone["label"] == "Frechet distance (mnist-digits)"
    assert found["cells"][0]["score"]["value"] != found["cells"][1]["score"]["value"]
    # What was scored is not scored again, unless its pictures are new or the reference is another.
    from ddim_cli.evaluation.score import Judge

    whole, calls = Judge.score, []
    monkeypatch.setattr(Judge, "score", lambda self, files: calls.append(files[0].parent.name) or whole(self, files))
    again = json.loads(ddim(*args).stdout)
    assert [cell["score"] for cell in again["cells"]] == [cell["score"] for cell in found["cells"]]
    assert calls == []
    (tmp_path / "out" / "steps=2" / "000003.png").unlink()
    assert ddim(*args).exit_code == 0
    assert calls == ["steps=2"]
    other = json.loads(ddim(*args, "--reference", "out/steps=1", "--extractor", "mnist").stdout)
    assert calls == ["steps=2", "steps=1", "steps=2"]
    # A sweep that is stopped early keeps what is known of its finished cells.
    from ddim_cli.experiments import sweep as room

    def stopped(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "execute", stopped)
        assert ddim(*args, "--axis", "steps=1,2,3").exit_code == 130
    kept = json.loads((tmp_path / "out" / "sweep.json").read_text())["cells"]
    assert [cell["finished"] for cell in kept] == [True, True, False]
    assert kept[0]["score"] == other["cells"][0]["score"]
    assert kept[0]["images_per_second"]
    assert other["cells"][0]["score"]["value"] == pytest.approx(0, abs=1e-6)
    assert "few pictures for 64 features" in ddim(*args[:-1]).stderr


@pytest.mark.filterwarnings("ignore:the grid starts", "ignore:2 cells")
def test_from_python(ddim, config, tiny_model, tmp_path):
    """The same cells as the command's; the folder that it made is finished."""
    from ddim_cli import sweep
    from ddim_cli.errors import UsageError

    args = ("--axis", "steps=2,3", "--axis", "eta=0.0,1.0", "-n", 2, "-b", 2)
    assert ddim("sweep", "-m", tiny_model, *args, "-o", "out", "-q").exit_code == 0
    settings, axes = {"sampling": {"num_images": 2, "batch_size": 2}}, {"steps": [2, 3], "eta": (0.0, 1.0)}
    again = sweep(axes, settings, tiny_model, tmp_path / "out")
    assert (again.made, again.present, again.left, again.sheet) == (0, 8, 0, tmp_path / "out" / "sweep.png")
    found = sweep(axes, settings, str(tiny_model), "again", shard="0/1")
    assert [result.cell.settings.title for result in found.cells][1] == "steps=2, eta=1.0"
    for result in found.cells:
        assert hashes(result.cell.job.folder.path) == hashes(tmp_path / "out" / result.cell.name) != {}
    with pytest.raises(UsageError, match="is of another sweep"):
        sweep({"steps": [4]}, settings, tiny_model, "again")
    assert sweep({"steps": [4]}, settings, tiny_model, "again", overwrite=True).made == 2
    # The axes of a file.
    assert len(sweep(config=config, out="file").cells) == 4


class Counting:
    """A scorer of how many pictures there are."""

    facts: ClassVar = {"of": "numbers"}

    def score(self, pictures):
        return SimpleNamespace(as_json=lambda: {"value": float(len(pictures)), "label": "pictures", **self.facts})


def test_a_scorer_from_python(tiny_model, tmp_path):
    from ddim_cli import sweep

    settings = {"model": {"source": str(tiny_model)}, "sampling": {"num_images": 2}, "sweep": {"reference": "mnist"}}
    grid = {"timesteps": [(900, 0)]}
    with pytest.warns(UserWarning, match="no scorer is given: none is scored"):
        sweep(grid, settings, out=tmp_path / "out")
    found = sweep(grid, settings, out=tmp_path / "out", scorer=Counting())
    assert (found.made, found.cells[0].score) == (0, {"value": 2.0, "label": "pictures", "of": "numbers"})


def test_another_size_is_named_and_not_its_hash(ddim, tiny_model):
    args = ("sweep", "-m", tiny_model, "--axis", "steps=2", "-n", 1, "-o", "out")
    assert ddim(*args).exit_code == 0
    refused = ddim(*args, "--image-size", 16)
    assert refused.exit_code == 2
    assert "steps=2/run.json was made with images of 8 x 8, this run has 16 x 16" in refused.stderr
    assert "sha256" not in refused.stderr


def test_help_says_first_what_the_command_does(ddim):
    text = ddim("sweep", "--help").stdout
    assert (
        text.index("Sample the same seeds under many settings") < text.index("The axes come") < text.index("Examples")
    )


def test_dry_run_writes_nothing(ddim, config, tmp_path):
    result = ddim("sweep", "-c", config, "-o", "out", "--dry-run")
    assert result.exit_code == 0
    assert f"work: {3 * 5 * 2 + 4 * 3 * 2} steps of an image" in result.stdout
    assert not (tmp_path / "out").exists()


def test_default_folder_is_found_again(ddim, tiny_model):
    args = ("sweep", "-m", tiny_model, "--axis", "steps=2,3", "-n", 1, "--json")
    first, again = (json.loads(ddim(*args).stdout) for _ in range(2))
    assert first["folder"].startswith("outputs/tiny-sweep-")
    assert first["folder"] == again["folder"]
    assert again["made"] == 0
    assert json.loads(ddim(*args, "--eta", 1).stdout)["folder"] != first["folder"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--axis", "steps=2,3", "--steps", "4"], "--steps: sampling.steps is on an axis of the sweep"),
        ([], "a sweep needs an axis"),
        (["--axis", "steps=2", "--extractor", "x.pt"], "extractor without a reference"),
        (["--axis", "steps=2,1001"], "cell steps=1001: "),
    ],
)
def test_mistakes(ddim, tiny_model, tmp_path, args, message):
    result = ddim("sweep", "-m", tiny_model, "-o", "out", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_sample_is_refused(ddim, tiny_model):
    assert ddim("sample", "-m", tiny_model, "-n", 1, "--steps", 2, "-o", "out").exit_code == 0
    refused = ddim("sweep", "-m", tiny_model, "--axis", "steps=2", "-n", 1, "-o", "out")
    assert refused.exit_code == 2
    assert "holds pictures of ddim sample" in refused.stderr


def test_a_failing_cell_is_named(ddim, tiny_model, monkeypatch):
    from ddim_cli.errors import RunError
    from ddim_cli.experiments import sweep as room

    whole = room.execute

    def broken(job, *args, **more):
        if job.run.config.sampling.steps == 3:
            raise RunError("seed 0: the result is not finite")
        return whole(job, *args, **more)

    monkeypatch.setattr(room, "execute", broken)
    result = ddim("sweep", "-m", tiny_model, "--axis", "steps=2,3", "-n", 1, "-o", "out")
    assert result.exit_code == 1
    assert "cell steps=3: seed 0" in result.stderr


def test_sweep_elsewhere_is_left_out_with_a_warning(ddim, config):
    result = ddim("sample", "-c", config, "-n", 1, "--steps", 2, "-o", "out")
    assert result.exit_code == 0
    assert "[sweep] is for ddim sweep, and left out here" in result.stderr


def test_config_check_looks_into_every_cell(ddim, config):
    assert "ok, a sweep of 4 cells" in ddim("config", "check", config).stdout
    config.write_text(config.read_text().replace("steps = [3, 4]", "steps = [3, 4, 1001]"))
    result = ddim("config", "check", config)
    assert result.exit_code == 2
    assert "cell steps=1001, eta=0.0" in result.stderr


def plain(value):
    return Image.new("L", (32, 32), value)


def test_the_sheet_shows_the_cells_in_their_places():
    """Two columns, two rows, blocks of 2 x 2 pictures of one grey a cell."""
    greys = [[60, 90], [120, 200]]
    blocks = [[Block([plain(grey)] * 4) for grey in row] for row in greys]
    sheet = np.asarray(draw_sweep([Panel(blocks, ["steps=3", "steps=4"], ["eta=0", "eta=1"])], "caption", 2))
    for i, row in enumerate(greys):
        for j, grey in enumerate(row):
            found = np.argwhere((sheet == grey).all(2))
            assert len(found) == 4 * 64 * 64
            middle = found.mean(0)
            assert (middle[0] > sheet.shape[0] / 2) == bool(i)
            assert (middle[1] > sheet.shape[1] / 2) == bool(j)


@pytest.mark.parametrize(
    ("size", "columns", "several", "most", "expected"),
    [
        ((32, 32), 5, True, 2000, (3, 3)),
        ((32, 32), 5, True, 4, (2, 2)),
        ((32, 32), 5, True, 1, (1, 1)),
        ((256, 256), 5, True, 9, (2, 2)),
        ((256, 256), 20, True, 9, (1, 1)),
        ((32, 32), 1, False, 2000, (8, 1)),
        ((32, 32), 1, False, 3, (3, 1)),
    ],
)
def test_how_many_pictures_a_cell_shows(size, columns, several, most, expected):
    assert pictures_in_a_cell(size, columns, several, most) == expected


def test_the_sheet_of_a_sweep(ddim, config, tmp_path):
    """Every picture of the sheet is one of its cell, enlarged: eight pixels to 64."""
    assert ddim("sweep", "-c", config, "-o", "out").exit_code == 0
    sheet = np.asarray(Image.open(tmp_path / "out" / "sweep.png"))
    for name in CELLS:
        tile = np.asarray(Image.open(tmp_path / "out" / name / "000000.png")).repeat(8, 0).repeat(8, 1)
        rows, columns = range(sheet.shape[0] - 63), range(sheet.shape[1] - 63)
        corner = sheet[: len(rows), : len(columns), 0] == tile[0, 0, 0]
        places = [p for p in np.argwhere(corner) if np.array_equal(sheet[p[0] : p[0] + 64, p[1] : p[1] + 64], tile)]
        assert len(places) == 1, name


def test_three_axes_are_panels(ddim, tiny_model, tmp_path):
    args = ["--axis", "steps=2,3", "--axis", "eta=0.0,1.0", "--axis", "scheduler.clip_sample=true,false"]
    found = json.loads(ddim("sweep", "-m", tiny_model, "-n", 1, *args, "-o", "out", "--json").stdout)
    assert len(found["cells"]) == 8
    with Image.open(tmp_path / "out" / "sweep.png") as sheet:
        assert sheet.height > 4 * 64


LONG = "a seven, drawn with a thick pen on a large sheet of white paper"


def test_prompts_as_an_axis(ddim, tiny_text_model, tmp_path):
    """The model takes text, and only the axis says which."""
    model = ("-m", tiny_text_model, "--steps", 2, "-n", 2, "--no-compile")
    axes = ("--axis", f'prompt="{LONG}, bold","{LONG}, thin","a/../two"', "--axis", "guidance_scale=1,7.5")
    result = ddim("sweep", *model, *axes, "-o", "out", "--json")
    assert result.exit_code == 0, result.stderr
    cells = json.loads(result.stdout)["cells"]
    assert [cell["set"]["sampling.prompt"] for cell in cells[::2]] == [f"{LONG}, bold", f"{LONG}, thin", "a/../two"]
    folders = [cell["folder"] for cell in cells]
    assert folders[0] == "prompt=a-seven-drawn-with-a-thic..paper-bold,guidance_scale=1"
    assert len(set(folders)) == 6
    # Nothing lies outside the sweep's folder, or deeper.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*folders, "sweep.json", "sweep.png"}
    alone = ("sample", *model, "--prompt", f"{LONG}, thin", "--guidance-scale", 7.5, "-o", "alone")
    assert ddim(*alone).exit_code == 0
    assert hashes(tmp_path / "alone") == hashes(tmp_path / "out" / folders[3]) != {}
    again = json.loads(ddim("sweep", *model, *axes, "-o", "out", "--json").stdout)
    assert (again["made"], again["present"]) == (0, 12)


def test_negative_prompts_and_lists_of_prompts_are_axes_too(ddim, tiny_text_model, tmp_path):
    (tmp_path / "sweep.toml").write_text(
        '[sweep]\nprompt = [["a", "b"], ["c\\nd"]]\nnegative_prompt = ["", "thin, or bold"]\nguidance_rescale = [0.0]'
    )
    result = ddim("sweep", "-c", "sweep.toml", "-m", tiny_text_model, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    titles = [cell["title"] for cell in json.loads(result.stdout)["cells"]]
    assert titles == [
        'prompt=a | b, negative_prompt="", guidance_rescale=0.0',
        "prompt=a | b, negative_prompt=thin, or bold, guidance_rescale=0.0",
        'prompt=c d, negative_prompt="", guidance_rescale=0.0',
        "prompt=c d, negative_prompt=thin, or bold, guidance_rescale=0.0",
    ]


def test_prompts_whose_quotes_the_shell_took(ddim, tiny_text_model):
    refused = ddim("sweep", "-m", tiny_text_model, "--axis", "prompt=a seven,a two", "--dry-run")
    assert refused.exit_code == 2
    assert """--axis 'prompt="a seven","a two, bold"'""" in refused.stderr
    words = ddim("sweep", "-m", tiny_text_model, "--axis", "prompt=seven,two", "--dry-run", "--json")
    assert [cell["title"] for cell in json.loads(words.stdout)["cells"]] == ["prompt=seven", "prompt=two"]


def test_long_names_of_columns_are_wrapped():
    image = Image.new("L", (28, 28))
    short, long = (
        draw_sweep([Panel([[Block([image])]], [name], ["b"])], "caption", 1) for name in ("a=1", f"prompt={LONG}")
    )
    # Two lines more, each of thirteen pixels and seven between; the width is that of the pictures.
    assert (long.width, long.height) == (short.width, short.height + 2 * 20)
