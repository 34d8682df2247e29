"""`ddim_cli.Sampler` in a real Ray Data, on this machine."""

import json

import numpy as np
import pytest
from PIL import Image

from ddim_cli import Sampler

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")]


@pytest.fixture(scope="module")
def data():
    """Ray Data with two workers, for the tests of this file."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray.data
    ray.shutdown()


def command_of(rows, ddim, folder, *flags):
    """The pictures and sidecars that ``ddim sample --items`` makes of rows, by their names."""
    (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = ddim("sample", "--items", "jobs.jsonl", *flags, "-o", "out")
    assert result.exit_code == 0, result.stderr
    out = folder / "out"
    return {
        row["name"]: (
            np.asarray(Image.open(out / f"{row['name']}.png")).astype(int),
            json.loads((out / f"{row['name']}.json").read_text()),
        )
        for row in rows
    }


def check_same(found, expected):
    assert sorted(row["name"] for row in found) == sorted(expected)
    for row in found:
        pixels, sidecar = expected[row["name"]]
        assert np.abs(row["image"].reshape(pixels.shape).astype(int) - pixels).max() <= 1
        record = json.loads(row["record"])
        for section in ("schema", "seed", "sampling", "scheduler", "model", "config"):
            assert record[section] == sidecar[section], section
        assert record["image"]["pixels_sha256"] == row["pixels_sha256"]


@pytest.mark.parametrize("batch_size", [5, None])
def test_two_actors_make_what_the_command_makes(data, ddim, tiny_model, tmp_path, batch_size):
    """Of seeds and of names, with a column of another's, however Ray cuts them into batches."""
    rows = [{"name": f"row {n}", **({"seed": 100 + n} if n % 2 else {})} for n in range(23)]
    expected = command_of(rows, ddim, tmp_path, "-m", tiny_model, "--steps", 4, "--eta", 0.5, "-b", 4)
    items = [{**row, "seed": row.get("seed"), "of": row["name"] * 2} for row in rows]
    # In so many blocks from the start: the actors leave no CPU for a task that would cut them.
    made = data.from_items(items, override_num_blocks=4).map_batches(
        Sampler,
        fn_constructor_args=({"sampling": {"steps": 4, "eta": 0.5, "batch_size": 4}}, str(tiny_model)),
        batch_size=batch_size,
        compute=data.ActorPoolStrategy(size=2),
    )
    found = made.take_all()
    check_same(found, expected)
    assert all(row["of"] == row["name"] * 2 for row in found)


def test_prompts_and_latents_and_parquet(data, ddim, tmp_path):
    """What is written out is what was made; a latent may be a column of tensors, and the model one of text."""
    values = np.random.default_rng(0).standard_normal((6, 1, 32, 32)).astype(np.float32)
    made = data.from_items([{"name": f"{n}", "latent": values[n]} for n in range(6)]).map_batches(
        Sampler,
        fn_constructor_kwargs={"config": {"sampling": {"steps": 5, "batch_size": 3}}, "model": "mnist"},
        batch_size=3,
        compute=data.ActorPoolStrategy(size=1),
    )
    made.select_columns(["name", "image", "record", "pixels_sha256"]).write_parquet(str(tmp_path / "pictures"))
    found = data.read_parquet(str(tmp_path / "pictures")).take_all()
    alone = Sampler({"sampling": {"steps": 5, "batch_size": 3}}, "mnist")({"latent": values})
    for row in found:
        assert np.abs(row["image"].astype(int) - alone["image"][int(row["name"])]).max() <= 1

    rows = [{"name": f"row {n}", "seed": n, "prompt": prompt} for n, prompt in enumerate(["a bold seven", "a three"])]
    expected = command_of(rows, ddim, tmp_path, "-m", "mnist-text", "--steps", 5, "-b", 2)
    made = data.from_items(rows).map_batches(
        Sampler,
        fn_constructor_args=({"sampling": {"steps": 5, "batch_size": 2}}, "mnist-text"),
        compute=data.ActorPoolStrategy(size=1),
    )
    check_same(made.take_all(), expected)


def test_a_row_that_cannot_be_made_is_named(data, tiny_model):
    import ray

    made = data.from_items([{"seed": 1}, {"seed": -5}]).map_batches(
        Sampler,
        fn_constructor_args=({"sampling": {"steps": 2}}, str(tiny_model)),
        compute=data.ActorPoolStrategy(size=1),
    )
    with pytest.raises(ray.exceptions.RayError, match=r"seed = -5 is not from 0"):
        made.take_all()
