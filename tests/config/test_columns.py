"""The cells of batches that engines hand out."""

import zlib

import numpy as np
import pytest

from ddim_cli.config.columns import columns_of, told_by
from ddim_cli.errors import UsageError

FIRST = 1000


def rows(batch):
    return told_by(columns_of(batch), FIRST).rows


@pytest.mark.parametrize(
    "seeds",
    [
        [7, 8],
        (7, 8),
        np.array([7, 8]),
        np.array([7, 8], np.uint8),
        # As pandas has integers where a cell is empty.
        np.array([7.0, 8.0]),
        np.array([7, np.int32(8)], object),
        [np.array(7), np.array(8)],
    ],
)
def test_numbers_of_every_kind_are_plain_ones(seeds):
    found = [row["seed"] for row in rows({"seed": seeds})]
    assert found == [7, 8]
    assert {type(seed) for seed in found} == {int}


def test_large_seeds_stay_exact():
    assert rows({"seed": np.array([2**63 - 1, 2**53 + 1])})[0] == {"seed": 2**63 - 1}
    with pytest.raises(UsageError, match=r"batch\[1\]: seed = 9007199254740994 is a floating-point number"):
        rows({"seed": np.array([1.0, 2.0**53 + 2])})


def test_a_float32_is_what_it_reads_as():
    assert rows({"seed": [1], "strength": np.array([0.6], np.float32)}) == [{"seed": 1, "strength": 0.6}]


@pytest.mark.parametrize("of_pandas", [False, True])
def test_empty_cells_say_nothing(of_pandas):
    nothing = [None, float("nan"), np.float32("nan"), ""]
    if of_pandas:
        pandas = pytest.importorskip("pandas")
        nothing = [pandas.NA, pandas.NaT]
    count = len(nothing)
    batch = {"seed": range(count), "prompt": nothing, "class": nothing, "latent": nothing, "strength": nothing}
    assert rows(batch) == [{"seed": seed} for seed in range(count)]


def test_a_name_stands_for_a_seed_wherever_its_row_is():
    """It need not be one for a file, nor differ from others."""
    batch = {"name": ["b/1.png", "a", "b/1.png"], "seed": [None, 5, None]}
    crc = FIRST + zlib.crc32(b"b/1.png")
    assert rows(batch) == [{"seed": crc}, {"seed": 5}, {"seed": crc}]
    assert rows({"name": ["b/1.png"]}) == [{"seed": crc}]


@pytest.mark.parametrize(
    "latent",
    [
        np.ones((1, 2, 2), np.float64),
        [[[1, 1], [1, 1]]],
        # As Arrow hands out lists of lists.
        np.array([np.array([np.array([1.0, 1.0]), np.array([1.0, 1.0])], dtype=object)], dtype=object),
    ],
)
def test_latents_come_as_arrays_and_as_lists_of_lists(latent):
    column = np.empty(2, object)
    column[0] = latent
    told = told_by(columns_of({"latent": column, "seed": [None, 3]}), FIRST)
    [(name, values)] = told.latents.items()
    assert told.rows == [{"latent": name}, {"seed": 3}]
    assert (values.dtype, values.shape, values.min()) == (np.float32, (1, 2, 2), 1)


def test_a_latent_that_is_a_path_stays_one():
    assert rows({"latent": ["a.safetensors"]}) == [{"latent": "a.safetensors"}]


def test_frames_and_tables():
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    cells = {"seed": [1, None], "name": [None, "b"]}
    expected = [{"seed": 1}, {"seed": FIRST + zlib.crc32(b"b")}]
    for batch in (cells, pandas.DataFrame(cells), arrow.table(cells), arrow.RecordBatch.from_pydict(cells)):
        assert rows(batch) == expected


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ([1, 2], "batch is a list; it must be a mapping of columns"),
        ({"seed": [1], "x": [1, 2]}, "different lengths: seed 1, x 2"),
        ({"seed": 5}, "the column seed is a int"),
        ({"seed": np.array(5)}, "the column seed is a ndarray"),
        ({"prompt": ["a"]}, r"batch\[0\]: has no seed, and neither a name"),
        ({"seed": [1, None]}, r"batch\[1\]: has no seed"),
        ({"name": [5]}, r"batch\[0\]: name = 5 is no text"),
        ({"latent": [["a", "b"]]}, r"batch\[0\]: latent is no array"),
        ({"latent": [[[1.0], [1.0, 2.0]]]}, r"batch\[0\]: latent is no array"),
    ],
)
def test_what_is_refused(batch, says):
    with pytest.raises(UsageError, match=says):
        rows(batch)
