"""items.jsonl while rows come one by one: it grows, is healed, and is closed in the end."""

import json

import pytest
from records import OF_ROWS as RECORD
from records import lines

from ddim_cli.errors import UsageError
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.open_plan import Hashes, opened
from ddim_cli.outputs.row_plan import RowPlan


@pytest.fixture
def folder(tmp_path):
    return OutputFolder(tmp_path)


def manifest(folder):
    return json.loads(folder.manifest.read_text())


def claim(folder, planned):
    """What the plan of a whole job file does."""
    names = {line["name"] for line in planned}
    with RowPlan(folder).claimed(planned, names.__contains__, RECORD, False):
        pass


def test_it_grows_at_its_end(folder):
    with opened(folder, RECORD) as plan:
        assert (manifest(folder)["open"], plan.has("a")) == (True, False)
        plan.add(lines(*"ab"))
        inode = folder.items.stat().st_ino
        # One that is there already is not there twice.
        plan.add(lines(*"bc"))
        assert folder.items.stat().st_ino == inode
        assert [plan.has(name) for name in "abcd"] == [True, True, True, False]
        assert plan.has("A")
        assert plan.find("A") == lines("a")[0]
    assert list(RowPlan(folder)) == lines(*"abc")
    with opened(folder, RECORD) as plan:
        assert plan.has("c")
        plan.add(lines(*"abcd"))
    assert list(RowPlan(folder)) == lines(*"abcd")


def test_run_json_says_that_it_is_open_before_a_line_is_there(folder, monkeypatch):
    """Also where it was closed, and has totals."""
    with opened(folder, RECORD) as plan:
        plan.add(lines("a"))
        (folder.path / "a.json").touch()
        assert plan.close(1, 1.0, False) == 0
    assert ("open" in manifest(folder), manifest(folder)["items"], "totals" in manifest(folder)) == (False, 1, True)
    with opened(folder, RECORD) as plan:
        plan.add(lines("a"))
        assert "totals" in manifest(folder)

        def fail(*args):
            raise OSError(28, "full")

        monkeypatch.setattr("ddim_cli.outputs.open_plan.append", fail)
        with pytest.raises(OSError, match="full"):
            plan.add(lines("b"))
    assert (manifest(folder)["open"], "totals" in manifest(folder)) == (True, False)
    assert list(RowPlan(folder)) == lines("a")


@pytest.mark.parametrize("torn", [b'{"name": "c", "se', b'{"name": "c", "seed": 1}', b"{" * 10_000])
def test_a_line_that_is_cut_off_is_none_and_is_healed(folder, torn):
    with opened(folder, RECORD) as plan:
        plan.add(lines(*"ab"))
    with folder.items.open("ab") as stream:
        stream.write(torn)
    assert (list(RowPlan(folder)), len(RowPlan(folder))) == (lines(*"ab"), 2)
    with opened(folder, RECORD) as plan:
        assert not plan.has("c")
        plan.add(lines("d"))
    assert folder.items.read_text() == "".join(json.dumps(line) + "\n" for line in lines(*"abd"))


def test_a_row_that_is_planned_otherwise_takes_the_place_of_the_other(folder):
    with opened(folder, RECORD) as plan:
        plan.add(lines(*"abc"))
        plan.add([*lines("b", seed=2), *lines("d")])
        assert plan.has("d")
        plan.add(lines("e"))
    assert list(RowPlan(folder)) == [*lines("b", seed=2), *lines(*"dace")]


def test_other_processes_add_to_it_and_replace_it(folder):
    with opened(folder, RECORD) as one, opened(folder, RECORD) as other:
        one.add(lines(*"ab"))
        other.add(lines(*"bc"))
        one.add(lines(*"cd"))
        claim(folder, lines(*"xa"))
        # A process may still be at work.
        assert manifest(folder)["open"]
        other.add(lines("x", "e"))
        assert one.close(1, 1.0, False) == 6
    assert list(RowPlan(folder)) == lines(*"xabcde")
    assert manifest(folder)["open"]


def test_it_is_closed_once_all_have_their_pictures(folder):
    with opened(folder, RECORD) as plan:
        plan.add(lines(*"ab"))
        (folder.path / "a.json").touch()
        assert plan.close(1, 1.0, False) == 1
        assert manifest(folder)["open"]
        (folder.path / "b.json").touch()
        assert plan.close(1, 1.0, False) == 0
    found = manifest(folder)
    assert (found["items"], found["images"], found["totals"]["images"], "open" in found) == (2, 2, 2, False)


def test_of_no_rows_there_is_no_sheet(folder):
    with opened(folder, RECORD) as plan:
        assert plan.close(0, 0.0, True) == 0
    assert not folder.grid.exists()


def test_a_plan_of_other_settings_of_which_nothing_came_is_replaced(folder):
    other = {**RECORD, "scheduler": {"beta_end": 0.03}}
    with opened(folder, RECORD) as plan:
        plan.add(lines(*"abc"))
        with (
            pytest.raises(UsageError, match=r"run.json was made with scheduler.beta_end = 0.02"),
            opened(folder, other),
        ):
            pass
    with opened(folder, other) as plan:
        assert not plan.has("a")
        plan.add(lines("z"))
    assert list(RowPlan(folder)) == lines("z")


def test_hashes_of_many_texts_are_small_and_found():
    found = Hashes()
    for n in range(50_000):
        found.add(f"row {n}")
    assert all(f"row {n}" in found for n in range(0, 50_000, 7))
    assert not any(f"row {n}" in found for n in range(50_000, 60_000))
    assert found._sorted.nbytes + 64 * len(found._new) < 50_000 * 24
