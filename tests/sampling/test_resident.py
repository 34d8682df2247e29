"""Rows that come one by one: the same pictures as those of a job file, and an answer to each, whatever is in it."""

import errno
import io
import json
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ddim_cli.cli.options import build_layers
from ddim_cli.errors import InterruptedRunError, RunError, UsageError
from ddim_cli.evaluation.verify import verify
from ddim_cli.models.unet import UNet
from ddim_cli.outputs import store
from ddim_cli.sampling import resident
from ddim_cli.sampling.loop import Denoiser
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.resident import Source, UnheardError, serve
from ddim_cli.sampling.resolve import resolve

# Pictures of processes of their own are compared with those made here.
pytestmark = pytest.mark.usefixtures("one_thread")


class Driver(io.RawIOBase):
    """Writes rows, and waits for answers between them where it wants: ``script`` yields rows, lines, or lists of them.

    `until` waits for so many answers.
    """

    def __init__(self, script):
        self.answers, self._changed = [], threading.Condition()
        self._script = iter(script(self) if callable(script) else script)

    def read(self, size=-1):
        said = next(self._script, b"")
        many = said if isinstance(said, list) else [said]
        return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in many)

    def tell(self, answer):
        with self._changed:
            self.answers.append(json.loads(json.dumps(answer)))
            self._changed.notify_all()

    def until(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.answers) >= count, 60), self.answers
            return self.answers[-1]

    @property
    def errors(self):
        return {answer["row"]: answer["error"] for answer in self.answers if "error" in answer}

    @property
    def made(self):
        return [answer["name"] for answer in self.answers if answer.get("present") is False]

    @property
    def hashes(self):
        return {a["name"]: a["pixels_sha256"] for a in self.answers if "error" not in a}


class Told(Reporter):
    """Keeps what a run warns of, and how many images each batch had."""

    def __init__(self):
        self.warned, self.batches, self.halvings = [], [], []

    def warn(self, text):
        self.warned.append(text)

    def batch(self, images):
        self.batches.append(images)

    def halved(self, batch_size):
        self.halvings.append(batch_size)


@pytest.fixture
def run(tiny_model, tmp_path, monkeypatch):
    """Serve a script into ``out`` in three steps, in batches of three; the driver, and what `serve` returned."""
    monkeypatch.chdir(tmp_path)

    def serve_script(script, *assignments, model=tiny_model, out="out", tell=None, **options):
        driver, told = Driver(script), Told()
        settings = ["sampling.steps=3", "sampling.batch_size=3", "runtime.compile=false", f'output.dir="{out}"']
        layers = build_layers([], [*settings, f'model.source="{model}"', *assignments], {})
        options = {"reporter": told, "waits": 0.0, **options}
        served = serve(
            resolve(layers, conditions_follow=True), Source(driver, folder=tmp_path), tell or driver.tell, **options
        )
        driver.served, driver.told = served, told
        return driver

    return serve_script


@pytest.fixture
def of_a_file(ddim, tiny_model, tmp_path):
    """The hashes of what ``ddim sample --items FILE`` makes of rows."""

    def hashes(rows, *more):
        (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ("sample", "-m", tiny_model, "--items", "jobs.jsonl", "--steps", 3, "-b", 3, "--no-compile")
        result = ddim(*command, "-o", "of-a-file", *more)
        assert result.exit_code == 0, result.stderr
        sidecars = [json.loads(p.read_text()) for p in (tmp_path / "of-a-file").glob("*.json") if p.stem != "run"]
        return {s["image"]["file"].removesuffix(".png"): s["image"]["pixels_sha256"] for s in sidecars}

    return hashes


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for name in ("p", "q"):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(255 - mask).save(tmp_path / "n.png")


ROWS = [
    {"name": "a", "seed": 5},
    {"name": "b", "init": "p.png", "strength": 0.7},
    {},
    {"name": "c", "seed": 2**63 - 1},
    {"name": "d", "init": "q.png", "mask": "m.png"},
    {"seed": 9},
    {"name": "e", "init": "q.png"},
    {"name": "f", "seed": 5},
]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_pictures_are_those_of_a_job_file_to_the_bit_however_rows_come(run, of_a_file, pictures, tmp_path, eta):
    expected = of_a_file([*ROWS, *({"name": f"more {i}"} for i in range(3))], "--eta", eta)
    eta_of = f"sampling.eta={eta}"

    def in_lock_step(driver):
        for number, row in enumerate(ROWS, start=1):
            yield row
            driver.until(number)

    scripts = {"at once": [ROWS], "one by one": ROWS, "in lock-step": in_lock_step}
    for out, script in scripts.items():
        driver = run(script, eta_of, out=out)
        assert driver.errors == {}
        assert len(driver.hashes) == len(ROWS)
        assert driver.hashes == {name: expected[name] for name in driver.hashes}
        assert verify(tmp_path / out)[:2] == (len(ROWS), ())
    assert [answer["row"] for answer in driver.answers] == list(range(len(ROWS)))
    assert driver.told.batches == [1] * len(ROWS)


def test_what_waits_shares_a_batch_up_to_its_size_and_of_its_kind(run, pictures):
    """Those that wait are made when their batch is whole, and at the end of the input."""
    rows = [{"seed": i} if i % 2 else {"seed": i, "init": "p.png"} for i in range(10)]
    driver = run([rows], waits=3600.0)
    assert sorted(driver.told.batches) == [2, 2, 3, 3]
    assert len(driver.hashes) == 10


def test_a_row_waits_no_longer_than_is_said(run):
    def script(driver):
        yield [{}, {}]
        driver.until(2)
        yield {}

    assert run(script, waits=0.01).told.batches in ([2, 1], [1, 1, 1])


class Given:
    """An inbox whose lines are all there."""

    def __init__(self, stream, label):
        content, self._lines = iter(lambda: stream.read(), b""), []
        self._lines = [line for chunk in content for line in chunk.splitlines()]

    def take(self, until=None):
        return resident.Line(self._lines.pop(0), 0.0) if self._lines else None

    @property
    def ended(self):
        return not self._lines

    def wake(self):
        pass


def test_without_waiting_all_that_is_there_is_taken(run, monkeypatch, pictures):
    """Also where it is past the time of the first. With rows of many kinds not all are read before one is made."""
    monkeypatch.setattr(resident, "Inbox", Given)
    assert run([[{} for _ in range(7)]]).told.batches == [3, 3, 1]
    kinds = [{"init": "p.png", "strength": strength} for strength in (0.4, 0.7, 1.0)]
    monkeypatch.setattr(resident, "MOST_WAITING", 1)
    assert run([[{}, *kinds, {}, {}]], out="kinds").told.batches == [1, 1, 1, 1, 2]


def test_the_answer(run, tmp_path):
    """It has what a driver needs, and is told when both files are there."""
    there = []

    def tell(answer):
        there.append((os.path.exists(answer["file"]), os.path.exists(answer["file"][:-3] + "json"), answer))

    run([{"name": "a b", "seed": 4, "id": "x"}, {}], tell=tell)
    [(png, sidecar, answer), (_, _, other)] = sorted(there, key=lambda each: each[2]["row"])
    assert (png, sidecar) == (True, True)
    assert list(answer) == ["row", "id", "name", "seed", "file", "present", "pixels_sha256", "seconds", "record"]
    assert (answer["row"], answer["id"], answer["name"], answer["seed"]) == (0, "x", "a b", 4)
    assert (answer["file"], answer["present"]) == ("out/a b.png", False)
    record = json.loads((tmp_path / "out" / "a b.json").read_text())
    assert answer["record"] == record
    assert "id" not in str(record["sampling"])
    assert answer["pixels_sha256"] == record["image"]["pixels_sha256"]
    assert (other["row"], other["name"], other["seed"], "id" in other) == (1, "000001", 1, False)


@pytest.mark.parametrize("value", [None, 0, 1.5, "", "ü\ud800", [1, [2]], {"a": {"b": None}}, 2**80, True])
def test_an_id_comes_back_as_it_was(run, value):
    """Also with an error."""
    driver = run([{"id": value, "name": "a"}, {"id": value, "seed": -1}, {"id": value, "name": "a"}])
    assert all("id" in answer and answer["id"] == value for answer in driver.answers)
    assert [type(answer["id"]) for answer in driver.answers] == [type(value)] * 3


WRONG = [
    (b"{", "not valid JSON: Expecting property name"),
    (b"[1]", "is a list, and a row is an object"),
    (b'{"name": "\xff"}', "not UTF-8 text (byte 11 of the line)"),
    ({"sed": 1}, 'unknown key "sed"; did you mean seed?'),
    ({"seed": "1"}, 'seed = "1" is no integer'),
    ({"name": "../a"}, 'the name "../a" holds a path separator'),
    (b'{"seed": 1, "seed": 2}', 'the key "seed" is there twice'),
    ({"id": float("inf")}, "id holds a number that is not finite"),
    (b'{"id": 1e999}', "id holds a number that is not finite"),
    ({"prompt": "x"}, "prompt is for text-to-image models, such as mnist-text; tiny takes no text"),
    ({"class": 1}, "has a class, and tiny is not class-conditional"),
    ({"latent": "none.safetensors"}, "none.safetensors: no such file"),
    ({"latent": "l.safetensors"}, "l.safetensors: is 1 x 8 x 8 (C x H x W), and tiny takes 3 x 8 x 8"),
    ({"init": "none.png"}, "none.png: no such file"),
    ({"init": "p.png", "strength": 0.1}, "sampling.strength = 0.1 leaves none of the 3 steps of the grid"),
    ({"mask": "m.png"}, "has a mask and no init"),
    ({"latent": "x" * 5000}, "File name too long"),
    ({"init": "x" * 5000}, "x: cannot be read as a picture"),
    *((b'{"name": ' + b"[" * depth + b"]" * depth + b"}", "") for depth in (500, 900, 980, 1000, 5000)),
    *((b'{"id": ' + b"[" * depth + b"]" * depth + b', "x": 1}', "") for depth in (500, 900, 980, 1000, 5000)),
]


def test_what_is_wrong_with_a_row_is_its_answer(run, pictures, tmp_path):
    save_file({"latent": torch.zeros(1, 8, 8)}, tmp_path / "l.safetensors")
    rows = [row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in WRONG]
    driver = run([[*(row + b"\n" for row in rows), b'{"name": "right"}\n']])
    assert sorted(driver.errors) == list(range(len(WRONG)))
    for number, (_, told) in enumerate(WRONG):
        assert told in driver.errors[number]
        assert "items[0]" not in driver.errors[number]
    assert driver.hashes.keys() == {"right"}
    assert driver.served.refused == len(WRONG)
    assert (driver.served.summary.made, driver.served.summary.left) == (1, 0)
    assert verify(tmp_path / "out")[:2] == (1, ())


def test_a_name_that_is_known_is_in_the_error(run):
    driver = run([{"name": "n", "sed": 1}, {"name": 3}, {"prompt": "x"}])
    assert [answer.get("name") for answer in driver.answers] == ["n", None, "000002"]


def test_twenty_rows_with_a_bad_one(run, of_a_file, tmp_path):
    """A bad row has a number of its own: those behind it are what they would be, were it right."""
    rows = [{} for _ in range(20)]
    expected = of_a_file(rows)
    rows[7] = {"seed": 7, "colour": "red"}
    driver = run([rows])
    del expected["000007"]
    assert driver.hashes == expected
    assert driver.errors == {7: 'unknown key "colour"'}
    assert len(driver.answers) == 20
    assert verify(tmp_path / "out")[:2] == (19, ())
    assert (tmp_path / "out" / "grid.png").exists()


def test_the_same_stream_again_makes_nothing(run, tmp_path):
    rows = [{"name": f"n{i}", "seed": i} for i in range(5)]
    first = run([rows])
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").iterdir()}
    again = run([rows])
    assert ([answer["present"] for answer in again.answers], again.made) == ([True] * 5, [])
    assert again.hashes == first.hashes
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").iterdir()} == before
    more = run([[*rows, {"name": "more"}]])
    assert (more.made, more.served.summary.present) == (["more"], 5)
    assert verify(tmp_path / "out")[:2] == (6, ())


def test_what_is_there_is_planned_again_where_the_plan_was_lost(run, tmp_path):
    rows = [{"name": f"n{i}", "seed": i} for i in range(4)]
    run([rows])
    (tmp_path / "out" / "items.jsonl").unlink()
    assert run([rows]).made == []
    assert verify(tmp_path / "out")[:2] == (4, ())


def test_a_name_comes_again(run):
    """With the same settings it is answered by the picture, also while that is being made; with others, or in other
    letters, it is taken. A row without a name can find its number taken."""
    rows = [
        *({"name": "a", "seed": 1}, {"name": "a", "seed": 1}, {"name": "a", "seed": 2}, {"name": "A", "seed": 1}),
        *({"name": "000006", "seed": 3}, {"name": "000007", "seed": 7}, {}, {}),
    ]
    driver = run([rows], waits=3600.0)
    assert [answer["row"] for answer in driver.answers if answer.get("present")] == [1, 7]
    assert sorted(driver.made) == ["000006", "000007", "a"]
    assert driver.errors == {
        2: "the name 'a' is taken: out/a.json was made with seed 1, this run has 2; give the row another name",
        3: "the name 'A' is taken but for the case of its letters: 'a'",
        6: "the name '000006' is taken: out/000006.json was made with seed 3, this run has 6; give the row another "
        "name",
    }


def test_replacing_what_is_there(run, tmp_path):
    """Each name once, and what the stream does not name stays; pictures of other settings go."""
    first = run([{"name": "a", "seed": 1}, {"name": "b", "seed": 1}])
    again = run([[{"name": "a", "seed": 2}, {"name": "a", "seed": 2}]], overwrite=True)
    assert [answer["present"] for answer in again.answers] == [False, True]
    assert again.hashes["a"] != first.hashes["a"]
    assert verify(tmp_path / "out")[:2] == (2, ())
    with pytest.raises(UsageError, match=r"run.json was made with sampling.eta = 0.0, this run has 1"):
        run([{"name": "a"}], "sampling.eta=1.0")
    run([{"name": "c"}], "sampling.eta=1.0", overwrite=True)
    assert verify(tmp_path / "out")[:2] == (1, ())


def test_a_folder_of_a_job_file_and_rows_that_come_add_up(run, of_a_file, ddim, tmp_path):
    rows = [{"name": f"n{i}", "seed": i} for i in range(4)]
    of_a_file(rows)
    driver = run([*rows[1:], {"name": "more"}], out="of-a-file")
    assert (driver.made, driver.served.summary.present) == (["more"], 3)
    assert verify(tmp_path / "of-a-file")[:2] == (5, ())
    of_a_file([*rows, {"name": "last"}])
    assert verify(tmp_path / "of-a-file")[:2] == (6, ())


def test_a_result_that_is_not_finite_is_answered_and_ends_nothing(run, tmp_path):
    save_file({"latent": torch.full((3, 8, 8), 3e38)}, tmp_path / "huge.safetensors")
    rows = [{"name": name, "seed": 1} for name in "abcde"]
    expected = run([rows], out="without").hashes
    rows.insert(1, {"name": "huge", "latent": "huge.safetensors", "id": 7})
    driver = run([rows], waits=3600.0)
    assert driver.hashes == expected
    assert list(driver.errors) == [1]
    assert driver.errors[1].startswith("huge (row 1): NaN at step 1 of 3 (timestep 666)")
    assert (tmp_path / "out" / "items.jsonl").read_text().count("huge") == 0
    assert verify(tmp_path / "out")[:2] == (5, ())


def test_out_of_memory_is_answered_and_ends_nothing(run, monkeypatch, tmp_path):
    launch = Denoiser.launch

    def short_of_memory(self, items, rows, *more):
        if rows > 1 or any(item.name == "large" for item in items):
            raise torch.OutOfMemoryError("out of memory")
        return launch(self, items, rows, *more)

    monkeypatch.setattr(Denoiser, "launch", short_of_memory)
    rows = [{"name": name} for name in ("a", "large", "b", "c")]
    driver = run([rows], waits=3600.0)
    assert driver.hashes.keys() == {"a", "b", "c"}
    assert driver.errors == {1: "out of memory on cpu, even for a single image"}
    assert driver.told.halvings == [1]
    assert {answer["record"]["runtime"]["batch_size"] for answer in driver.answers if "record" in answer} == {1}
    assert verify(tmp_path / "out")[:2] == (3, ())


def test_files_that_change_between_rows_are_read_again(run, pictures, tmp_path):
    """A driver may write each picture, mask and latent under the same name."""

    def script(driver):
        for number in range(4):
            for name, others in (("init.png", "pq"), ("mask.png", "mn")):
                other = others[number // 2] if name == "mask.png" else others[number % 2]
                (tmp_path / name).write_bytes((tmp_path / f"{other}.png").read_bytes())
            latent = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(number))
            save_file({"latent": latent}, tmp_path / "l.safetensors")
            yield [
                {"name": f"i{number}", "seed": 1, "init": "init.png", "mask": "mask.png"},
                {"name": f"l{number}", "latent": "l.safetensors"},
            ]
            driver.until(2 * number + 2)

    def fixed():
        for number in range(4):
            init, mask = "pq"[number % 2], "mn"[number // 2]
            yield {"name": f"i{number}", "seed": 1, "init": f"{init}.png", "mask": f"{mask}.png"}
            yield {"name": f"l{number}", "seed": number}

    driver = run(script)
    assert driver.hashes == run(fixed(), out="fixed").hashes
    assert len(set(driver.hashes.values())) == 8


@pytest.mark.parametrize("name", ["init.png", "mask.png"])
def test_a_file_that_changes_while_its_row_waits_is_the_answer(run, pictures, tmp_path, monkeypatch, name):
    for to, of in (("init.png", "p.png"), ("mask.png", "m.png")):
        (tmp_path / to).write_bytes((tmp_path / of).read_bytes())
    launch = Denoiser.launch

    def late(self, *args):
        (tmp_path / name).write_bytes((tmp_path / {"init.png": "q.png", "mask.png": "n.png"}[name]).read_bytes())
        return launch(self, *args)

    monkeypatch.setattr(Denoiser, "launch", late)
    driver = run([{"name": "a", "init": "init.png", "mask": "mask.png"}, {"name": "b"}])
    assert driver.errors == {0: f"{tmp_path}/{name}: has changed since it was first read; run the same command again"}
    assert driver.made == ["b"]


def test_what_rows_begin_from_is_read_once(run, pictures, monkeypatch):
    read, count = resident.read_init, []
    monkeypatch.setattr(resident, "read_init", lambda *args: count.append(args[2]) or read(*args))
    run([{"init": "p.png", "strength": s} for s in (0.5, 0.5, 1.0, 0.5)])
    assert len(count) == 2


def test_prompts_and_what_to_lead_away_from(run, tiny_text_model):
    """A row without a prompt has the run's; what has no effect is said once."""
    rows = [{"name": "a", "prompt": "ab", "negative_prompt": "c"}, {"name": "b", "negative_prompt": "c"}, {"name": "c"}]
    text = {"model": tiny_text_model, "waits": 3600.0}
    driver = run([rows], "sampling.guidance_scale=1.0", 'sampling.prompt="xy"', **text)
    assert [line for line in driver.told.warned if "negative" in line] == [
        "row 0: a negative prompt has no effect at a guidance scale of 1, which turns guidance off"
    ]
    found = {answer["name"]: answer["record"]["sampling"] for answer in driver.answers}
    assert {name: facts["prompt"] for name, facts in found.items()} == {"a": "ab", "b": "xy", "c": "xy"}
    driver = run([[{"prompt": "a"}, {}, {"prompt": "b", "class": 1}]], out="others", **text)
    assert driver.errors[1].startswith("has no prompt, and tiny-text takes text; give the row one")
    assert driver.errors[2] == "has a class, and tiny-text takes a prompt, not a class"
    assert driver.made == ["000000"]


def test_settings_that_some_rows_have_no_use_for(run, pictures):
    """Rows that begin from pictures may come, or not."""
    driver = run([{"name": "a"}, {"name": "b", "init": "p.png", "mask": "m.png"}], "sampling.resample=2")
    assert driver.errors == {}
    assert driver.hashes.keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("setting", "rows"), [('"auto"', 4), ("1", 1), ("5", 5)], ids=["a few unless somebody says", "one", "five"]
)
def test_how_many_rows_the_network_sees(run, monkeypatch, setting, rows):
    """As many as are asked for, though one is there."""
    body, seen = UNet.body, set()
    monkeypatch.setattr(UNet, "body", lambda self, x, *more: seen.add(len(x)) or body(self, x, *more))
    [answer] = run([{}], f"sampling.batch_size={setting}").answers
    assert (answer["record"]["runtime"]["batch_size"], seen) == (rows, {rows})


def test_no_rows(run, tmp_path):
    driver = run([b"\n"])
    assert (driver.answers, driver.served.summary.made, driver.served.summary.sheet) == ([], 0, None)
    assert verify(tmp_path / "out")[:2] == (0, ())
    assert "totals" in json.loads((tmp_path / "out" / "run.json").read_text())


def test_a_full_disk_ends_it(run, monkeypatch, tmp_path):
    """Though rows may still come."""
    write = store.write_atomically

    def fail(path, data, fsync=False):
        if path.name == "b.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data, fsync)

    monkeypatch.setattr(store, "write_atomically", fail)
    stay, drivers = threading.Event(), []

    def script(driver):
        drivers.append(driver)
        yield {"name": "a"}
        driver.until(1)
        yield {"name": "b"}
        stay.wait(60)
        drivers.append("waited for ever")

    with pytest.raises(RunError, match=r"out/b.png: cannot be written: No space left on device"):
        run(script)
    assert [driver.made for driver in drivers] == [["a"]]
    stay.set()
    assert verify(tmp_path / "out")[:2] == (1, ())


def test_nobody_reads_any_more(run, tmp_path):
    """Whether it is told of a picture or of an error; rows may still come."""
    for rows in ([{}, {}], [{"seed": -1}]):
        stay, waited = threading.Event(), []

        def script(driver, rows=rows, stay=stay, waited=waited) -> Iterator:
            yield rows
            stay.wait(60)
            waited.append("for ever")

        def gone(answer):
            raise UnheardError

        with pytest.raises(UnheardError):
            run(script, tell=gone)
        assert not waited
        stay.set()
    assert verify(tmp_path / "out").problems == ()


def test_ctrl_c_finishes_what_is_being_written(run, monkeypatch, tmp_path):
    """Batches are made one after the other; in the third comes Ctrl-C."""
    launch, count = Denoiser.launch, []

    def interrupted(self, *args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return launch(self, *args)

    monkeypatch.setattr(Denoiser, "launch", interrupted)
    answers = []
    with pytest.raises(InterruptedRunError, match=r"interrupted: 6 images were made and are in out; the same rows"):
        run([[{} for _ in range(20)]], tell=answers.append, waits=3600.0)
    assert len(answers) == 6
    assert verify(tmp_path / "out")[:2] == (6, ())
