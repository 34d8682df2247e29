"""items.jsonl: what a job file's rows add up to in a folder."""

import json

import pytest
from records import OF_ROWS as RECORD
from records import lines

from ddim_cli.errors import UsageError
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.row_plan import RowPlan


def claim(path, planned, record=RECORD, complete=False):
    folder = OutputFolder(path)
    folder.create()
    names = {line["name"] for line in planned}
    with RowPlan(folder).claimed(planned, names.__contains__, record, complete):
        pass
    return RowPlan(folder)


def manifest(path):
    return json.loads((path / "run.json").read_text())


def test_plans_add_up_by_name_in_the_order_of_the_last(tmp_path):
    assert list(claim(tmp_path, lines(*"abc"))) == lines(*"abc")
    assert list(claim(tmp_path, [*lines("x"), *lines("b", seed=2)])) == [
        *lines("x"),
        *lines("b", seed=2),
        *lines(*"ac"),
    ]
    assert (manifest(tmp_path)["items"], manifest(tmp_path)["images"]) == (4, 4)


def test_what_is_planned_already_stays_as_it_is(tmp_path):
    plan = claim(tmp_path, lines(*"abcd"))
    before = plan.version
    for planned in ("abcd", "ab"):
        assert list(claim(tmp_path, lines(*planned))) == lines(*"abcd")
        assert plan.version == before
        assert manifest(tmp_path)["items"] == 4


def test_a_run_json_older_than_its_plan_is_put_right(tmp_path):
    """As a process leaves it that was killed between the two."""
    claim(tmp_path, lines(*"ab"))
    old = (tmp_path / "run.json").read_bytes()
    claim(tmp_path, lines(*"abcde"))
    (tmp_path / "run.json").write_bytes(old)
    claim(tmp_path, lines(*"abcde"))
    assert manifest(tmp_path)["items"] == 5


def test_a_plan_of_other_settings_of_which_nothing_came_is_replaced(tmp_path):
    claim(tmp_path, lines(*"abc"))
    other = {**RECORD, "scheduler": {"beta_end": 0.03}}
    assert list(claim(tmp_path, lines("z"), other)) == lines("z")
    assert manifest(tmp_path)["items"] == 1


def test_while_a_process_is_at_work_other_settings_are_refused(tmp_path):
    folder = OutputFolder(tmp_path)
    with RowPlan(folder).claimed(lines("a"), "a".__eq__, RECORD, False):
        claim(tmp_path, lines("b"))
        with pytest.raises(UsageError, match=r"run.json was made with scheduler.beta_end = 0.02"):
            claim(tmp_path, lines("c"), {**RECORD, "scheduler": {"beta_end": 0.03}})
        seeds = {**RECORD, "sampling": {**RECORD["sampling"]}}
        del seeds["sampling"]["row"]
        with pytest.raises(UsageError, match=r"run.json was made from a job file"):
            folder.start([1], seeds, complete=False)
    assert list(RowPlan(folder)) == lines(*"ba")


def test_a_plan_that_grows_while_it_is_finished_is_not(tmp_path):
    plan = claim(tmp_path, lines("a"))
    version = plan.version
    claim(tmp_path, lines("b"))
    plan.finish(1, 1.0, False, version)
    assert "totals" not in manifest(tmp_path)
    plan.finish(1, 1.0, False, plan.version)
    assert manifest(tmp_path)["totals"]["images"] == 2


def test_damaged_lines_are_left_out(tmp_path):
    plan = claim(tmp_path, lines(*"ab"))
    with (tmp_path / "items.jsonl").open("ab") as stream:
        stream.write(b'\xff\n[]\n{"seed": 1}\n')
    assert list(plan) == lines(*"ab")
