"""``--order`` from outside: what is made, what its sidecar says, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from ddim_cli.models.unet import UNet


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def sidecar(path):
    return json.loads(path.read_text())


def sample(ddim, *args, out="out", code=0):
    result = ddim("sample", "--steps", 5, "-n", 3, "-b", 3, "--no-compile", "-o", out, *args)
    assert result.exit_code == code, result.stderr
    return result


@pytest.mark.parametrize("order", [2, 3])
def test_as_many_calls_of_the_network_as_steps(order, ddim, monkeypatch):
    calls, body = [], UNet.body
    monkeypatch.setattr(UNet, "body", lambda self, *args: calls.append(1) or body(self, *args))
    said = sample(ddim, "--order", order).stderr
    assert len(calls) == 5
    assert f"5 steps of order {order} each" in said


def test_order_1_is_the_default_and_says_nothing_of_itself(ddim, tmp_path):
    sample(ddim, out="default")
    sample(ddim, "--order", 1, out="one")
    for name in ("000000.png", "000001.png", "grid.png"):
        assert (tmp_path / "default" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    found = sidecar(tmp_path / "one" / "000000.json")
    assert "order" not in {**found["sampling"], **found["config"]["sampling"]}


def test_the_sidecar_says_it_and_replay_makes_it_again(ddim, tmp_path):
    sample(ddim, "--order", 2, "--eta", 0.3, "--spacing", "logsnr")
    sample(ddim, "--eta", 0.3, "--spacing", "logsnr", out="one")
    found = sidecar(tmp_path / "out" / "000001.json")
    assert (found["sampling"]["order"], found["config"]["sampling"]["order"]) == (2, 2)
    assert found["scheduler"]["timestep_spacing"] == "logsnr"
    assert abs(pixels(tmp_path / "out" / "000001.png") - pixels(tmp_path / "one" / "000001.png")).max() > 1
    assert ddim("replay", "out/000001.png", "--check").exit_code == 0
    assert "order" in ddim("inspect", "out/000001.png").stdout


def test_another_order_is_another_folder(ddim, tmp_path):
    folders = set()
    for order in (1, 2, 3):
        result = ddim("sample", "--steps", 3, "-n", 1, "--order", order, "--json", "--no-compile")
        folders.add(json.loads(result.stdout)["folder"])
    assert len(folders) == 3
    sample(ddim, "--order", 2)
    refused = sample(ddim, "--order", 3, code=2)
    assert "made with sampling.order = 2" in refused.stderr


def test_orders_are_an_axis_of_a_sweep(ddim, tmp_path):
    result = ddim("sweep", "--axis", "order=1,2,3", "--axis", "steps=3,5", "-n", 2, "-o", "s", "--no-compile", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert len(found["cells"]) == 6
    for order in (1, 2, 3):
        said = sidecar(tmp_path / "s" / f"order={order},steps=5" / "000000.json")["sampling"]
        assert said.get("order", 1) == order


def test_a_latent_brings_its_order_along(ddim, tmp_path):
    Image.fromarray(np.full((32, 32), 128, dtype=np.uint8)).save(tmp_path / "grey.png")
    for order in (1, 2):
        up = ddim("invert", "grey.png", "--steps", 6, "--order", order, "-o", f"up{order}", "--no-compile")
        assert up.exit_code == 0, up.stderr
        again = ddim("sample", "--latents", f"up{order}", "-o", f"down{order}", "--no-compile")
        assert again.exit_code == 0, again.stderr
        recon, from_latent = f"up{order}/grey.recon.png", f"down{order}/grey.latent.png"
        assert (pixels(tmp_path / recon) == pixels(tmp_path / from_latent)).all()
    errors = [sidecar(tmp_path / f"up{order}" / "grey.recon.json")["inversion"]["error"] for order in (1, 2)]
    assert errors[1] < errors[0] / 2


def test_the_table_has_what_a_step_is_made_of(ddim):
    result = ddim("schedule", "--steps", 6, "--order", 3, "--spacing", "trailing", "--json")
    [found] = json.loads(result.stdout)["schedules"]
    rows = found["rows"]
    assert (found["order"], [row["order"] for row in rows]) == (3, [1, 2, 3, 3, 2, 1])
    for row in rows:
        weights = row["from_x"] * row["alpha_bar"] ** 0.5 + sum(
            row[key] for key in ("from_now", "from_last", "from_before_last")
        )
        # Of one x0 alone a step is exact.
        assert weights == pytest.approx(row["previous_alpha_bar"] ** 0.5, abs=1e-12)
    assert [row["from_last"] != 0 for row in rows] == [False, True, True, True, True, False]
    shown = ddim("schedule", "--steps", 6, "--order", 2).stdout
    for word in ("order", "x_t", "x0", "x0 -1", "sigma"):
        assert word in shown
    plain = ddim("schedule", "--steps", 6, "--json")
    assert "from_x" not in json.loads(plain.stdout)["schedules"][0]["rows"][0]


def test_a_dry_run_names_the_order(ddim):
    plan = json.loads(ddim("sample", "--order", 2, "--dry-run", "--json").stdout)
    assert plan["order"] == 2
    assert "order" in ddim("sample", "--order", 2, "--dry-run").stdout
    assert "order" not in ddim("sample", "--dry-run").stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--order", 4), "sampling.order = 4 is not allowed; it takes an integer from 1 to 3"),
        (("--order", 0), "it takes an integer from 1 to 3"),
        (("--order", 3, "--steps", 2), "sampling.order = 3 needs a grid of 3 steps or more, and this one has 2"),
        (("--order", 2, "--steps", 1), "needs a grid of 2 steps or more"),
        (
            ("--order", 2, "--set", "sampling.use_clipped_model_output=true"),
            "epsilon always follows from the clipped x0; leave it out",
        ),
        (("--order", 2, "--set", 'sampling.variance="large"'), "no SDE adds that noise; use eta 1"),
        (("--order", 2, "--set", 'scheduler.previous_timestep="diffusers"'), "is for order 1"),
        (("--order", 2, "--eta", 9), "asks for more noise than x_prev may hold"),
    ],
)
def test_refused_in_a_sentence(args, says, ddim, tmp_path):
    result = ddim("sample", "-n", 1, "-o", "out", *args)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
