"""Job files: their formats, what is refused, and that a large one takes little memory."""

import io
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_cli.config.job_file import STDIN, job_of, read_job_file, seed_of
from ddim_cli.config.rows import KEYS, LONGEST_NAME, Row
from ddim_cli.errors import ConfigError, UsageError


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(tmp_path, name, text):
    job = read_job_file(write(tmp_path / name, text))
    return [job[number] for number in range(len(job))]


def refused(tmp_path, name, text):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, name, text)
    return str(error.value).removeprefix(f"{tmp_path}/")


ROWS = [
    Row("a cat", 7, 'a cat, "sitting"', "dogs", None, None),
    Row(None, None, "über\nzwei Zeilen", None, None, None),
    Row("x", 2**63 - 1, None, None, 3, "some where.safetensors"),
]
JSONL = """{"name": "a cat", "seed": 7, "prompt": "a cat, \\"sitting\\"", "negative_prompt": "dogs", "class": null}

{"prompt": "über\\nzwei Zeilen"}
  {"latent": "some where.safetensors", "class": 3, "seed": 9223372036854775807, "name": "x"}"""
CSV = """name,seed,prompt,negative_prompt,class,latent
a cat,7,"a cat, ""sitting""\",dogs,,
,,"über
zwei Zeilen"

x, 9223372036854775807 ,,,3,some where.safetensors
"""


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", JSONL), ("a.NDJSON", JSONL), ("a.json", JSONL), ("a.csv", CSV), ("a.tsv", CSV.replace(",", "\t"))],
)
def test_every_format_says_the_same(tmp_path, name, text, ends, mark):
    expected = ROWS
    if name.endswith("tsv"):
        expected = [ROWS[0]._replace(prompt='a cat\t "sitting"'), *ROWS[1:]]
    found = read(tmp_path, name, mark + text.replace("\n", ends).encode())
    assert [row._replace(prompt=row.prompt and row.prompt.replace("\r", "")) for row in found] == expected


def test_a_text_has_a_prompt_a_line(tmp_path):
    text = "a cat\n\n  # no comment \r\n{}\nname,seed"
    assert [row.prompt for row in read(tmp_path, "a.txt", text)] == ["a cat", "# no comment", "{}", "name,seed"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (' \n{"seed": 3}', [Row(seed=3)]),
        ("seed,name\n3,a", [Row(seed=3, name="a")]),
        ("a cat, name\nb", [Row(prompt="a cat, name"), Row(prompt="b")]),
    ],
)
def test_stdin_is_told_by_what_it_holds(text, expected, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    job = read_job_file(Path(STDIN))
    assert ([job[n] for n in range(len(job))], job.stem, job.label) == (expected, "items", "stdin")


REFUSED = {
    "unknown key": ("a.jsonl", '{"seed": 1}\n{"promt": "x"}', ':2: unknown key "promt"; did you mean prompt?'),
    "unknown column": ("a.csv", "name,sed\na,1", ':1: unknown column "sed"; did you mean seed?'),
    "semicolons": ("a.csv", "name;seed\na;1", ':1: unknown column "name;seed"; separate columns with commas'),
    "column twice": ("a.csv", "seed,seed\n1,2", ":1: the column seed is there twice"),
    "key twice": ("a.jsonl", '{"seed": 1, "seed": 2}', ':1: the key "seed" is there twice'),
    "Latin-1": ("a.csv", "prompt\nok\nüber\nmöhre\n".encode("latin-1"), ":3: not UTF-8 text (byte 1 of the line)"),
    "Latin-1 in JSON": ("a.jsonl", '{"prompt": "ü"}\n'.encode("latin-1") * 20, ":1: not UTF-8 text (byte 13"),
    "UTF-16": ("a.txt", "a cat\n".encode("utf-16"), ":1: not UTF-8 text"),
    "nothing": ("a.jsonl", "", ": holds no rows"),
    "blanks": ("a.txt", " \n\n", ": holds no rows"),
    "a header alone": ("a.csv", "name,seed\n", ": holds no rows"),
    "name twice": ("a.csv", "name\na\nb\na\n", ":4: the name 'a' is that of {0}:2 already"),
    "in another case": ("a.csv", "name\nÄ\nä\n", ":3: the name 'ä' is that of {0}:2 already, but for the case"),
    "a number's": ("a.jsonl", '{}\n{}\n{"name": "000001"}', ":3: the name '000001' is that of {0}:2 already"),
    "no integer": ("a.jsonl", '{"seed": 1.0}', ":1: seed = 1.0 is no integer"),
    "truth": ("a.jsonl", '{"seed": true}', ":1: seed = true is no integer"),
    "words": ("a.csv", "seed\n1_0\n", ':2: seed = "1_0" is no integer'),
    "negative": ("a.csv", "seed\n-1\n", ':2: seed = "-1" is no integer'),
    "below": ("a.jsonl", '{"seed": -1}', ":1: seed = -1 is not from 0 to 9223372036854775807"),
    "above": ("a.csv", "seed\n9223372036854775808", ":2: seed = 9223372036854775808 is not from 0"),
    "far above": ("a.jsonl", '{"seed": 1%s}' % ("0" * 4000), ":1: seed = a huge number is not from 0"),
    "too far above": ("a.jsonl", '{"seed": 1%s}' % ("0" * 9000), ":1: not valid JSON: a number of thousands"),
    "deep": ("a.jsonl", "[" * 100_000, ":1: not valid JSON"),
    "class": ("a.jsonl", '{"class": "3"}', ':1: class = "3" is no integer'),
    "prompt": ("a.jsonl", '{"prompt": ["x"]}', ':1: prompt = ["x"] is no text'),
    "negative prompt": ("a.jsonl", '{"negative_prompt": 3}', ":1: negative_prompt = 3 is no text"),
    "latent": ("a.jsonl", '{"latent": ""}', ":1: latent is empty"),
    "surrogate": ("a.jsonl", '{"prompt": "\\ud800"}', ":1: prompt holds half of a surrogate pair"),
    "null character": ("a.txt", "a\0b", ":1: prompt holds a null character"),
    "name's type": ("a.jsonl", '{"name": 7}', ":1: name = 7 is no text"),
    "list": ("a.jsonl", "[1]", ":1: is a list, and a row is an object"),
    "array of rows": ("a.json", '[{"seed": 1}]', ":1: is a list, and a row is an object"),
    "null": ("a.jsonl", "{}\nnull", ":2: is null"),
    "invalid": ("a.jsonl", '{}\n{"seed": }', ":2: not valid JSON: Expecting value (column 10)"),
    "many fields": ("a.csv", "seed,prompt\n1,a, b\n", ":2: has 3 fields, and the header 2; a text with a ','"),
    "open quote": ("a.csv", 'seed,prompt\n1,"a\n2,b\n', ":2: not valid CSV: unexpected end of data"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_named_by_file_and_line(tmp_path, kind):
    name, text, expected = REFUSED[kind]
    said = refused(tmp_path, name, text)
    assert said.startswith(f"{name}{expected.format(tmp_path / name)}"), said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "holds a path separator") for name in ("a/b", "..\\a", "/etc/x")),
        *((name, "begins with a dot") for name in (".", "..", ".hidden")),
        *((name, "holds the character") for name in ("a\nb", "a\tb", "\x7f", "\x85", "a\u2028b", "a\ud800b")),
        *((name, "is empty, or begins or ends with a space") for name in ("", " a", "a ", " ")),
        *((name, "is that of another file") for name in ("grid", "Strip", "run", "inverted", "sweep", "items", "RUN")),
        *((name, "is too long for a file") for name in ("x" * (LONGEST_NAME + 1), "ü" * LONGEST_NAME)),
        *((name, "is one of a strip") for name in ("000003.x0", "123456.xt")),
        ("0000003", "is a number with leading zeros; write 000003"),
    ],
)  # fmt: skip
def test_a_name_has_to_be_good_for_a_file(tmp_path, name, reason):
    assert reason in refused(tmp_path, "a.jsonl", json.dumps({"name": name}))


@pytest.mark.parametrize(
    "name", ["a b", "v1.5", "-n", "000003", "1234567", "17", "日本", "grids", "a" * LONGEST_NAME, "x'\"*?"]
)
def test_other_names_are_good(tmp_path, name):
    job = read_job_file(write(tmp_path / "a.jsonl", json.dumps({"name": name})))
    assert (job.name(0), job.find(name), job.find("other")) == (name, 0, None)


def test_ten_problems_are_named_at_most(tmp_path):
    said = refused(tmp_path, "a.jsonl", '{"seed": -1}\n' * 50).splitlines()
    assert len(said) == 10
    assert ":10: seed = -1" in said[-1]


def test_a_file_that_is_not_there_or_a_folder(tmp_path):
    for path, reason in ((tmp_path / "none.csv", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ConfigError, match=reason):
            read_job_file(path)


def test_rows_are_found_by_their_names(tmp_path):
    text = "\n".join(json.dumps({"name": f"n{i}"} if i % 3 else {}) for i in range(300))
    job = read_job_file(write(tmp_path / "a.jsonl", text))
    for number in range(300):
        assert job.find(job.name(number)) == number
    assert [job.find(name) for name in ("n0", "N1", "000001", "0", "000300", "x")] == [None] * 6


def test_seeds_that_rows_do_not_name():
    """That of a row with a name does not depend on its place, so rows can come and go."""
    assert seed_of(Row(), 5, 100) == 105
    assert seed_of(Row(seed=3), 5, 100) == 3
    assert seed_of(Row(latent="x"), 5, 100) is None
    assert seed_of(Row(latent="x", seed=4), 5, 100) == 4
    named = seed_of(Row(name="a"), 5, 100)
    assert named == seed_of(Row(name="a"), 77, 100) == seed_of(Row(name="a"), 5, 0) + 100
    assert named != seed_of(Row(name="b"), 5, 100)
    assert seed_of(Row(), 5, 2**63 - 1) == 4


values = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=7, max_size=20),
        "seed": st.integers(0, 2**63 - 1),
        "prompt": st.text(st.characters(codec="utf-8", exclude_characters="\0")),
        "negative_prompt": st.text(st.characters(codec="utf-8", exclude_characters="\0")),
        "class": st.integers(0, 1000),
    },
)


@given(st.lists(values, min_size=1, max_size=6))
def test_what_python_gives_is_what_the_rows_say(items):
    try:
        job = job_of(items)
    except ConfigError:
        # The names of some are bad, or those of two are one.
        return
    assert [job[number] for number in range(len(job))] == [Row(*map(item.get, KEYS)) for item in items]
    assert [job.find(job.name(number)) for number in range(len(job))] == list(range(len(job)))


def test_rows_from_python(tmp_path):
    import numpy as np

    job = job_of([{"seed": np.int64(3)}, {"latent": tmp_path / "x"}])
    assert (job[0].seed, job[1].latent, job.where(1)) == (3, str(tmp_path / "x"), "items[1]")
    with pytest.raises(UsageError, match=r"items\[1\] is a int; a row is a mapping"):
        job_of([{}, 3])
    with pytest.raises(ConfigError, match=r"items\[1\]: seed = 0.5 is no integer"):
        job_of([{}, {"seed": 0.5}])
    with pytest.raises(UsageError, match=r"items\[0\]"):
        job_of([{"seed": object()}])
    with pytest.raises(ConfigError, match="items: holds no rows"):
        job_of([])


@pytest.mark.slow
def test_many_rows_take_little_more_than_their_file(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as stream:
        for i in range(100_000):
            stream.write(json.dumps({"name": f"picture {i}", "seed": i, "prompt": f"number {i} in oil"}) + "\n")
    tracemalloc.start()
    try:
        job = read_job_file(path)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(job) == 100_000
    assert kept < path.stat().st_size + 50 * len(job)
    assert most < path.stat().st_size + 150 * len(job)
    assert job[99_999].seed == job.find("picture 99999") == 99_999
