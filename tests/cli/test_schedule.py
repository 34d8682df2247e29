import io
import json
import math
import sys

import numpy as np
import pytest
from PIL import Image


def rows(result):
    assert result.exit_code == 0, result.stderr
    [found] = json.loads(result.stdout)["schedules"]
    return found["rows"]


def test_the_table_is_the_papers_formulas(ddim):
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.append(np.cumprod(1 - betas), 1.0)
    found = rows(ddim("schedule", "--steps", 7, "--spacing", "linspace", "--eta", 0.5, "--json"))
    assert [r["timestep"] for r in found] == [999, 832, 666, 500, 333, 166, 0]
    assert [r["previous_timestep"] for r in found] == [832, 666, 500, 333, 166, 0, None]
    for r in found:
        a = alpha_bar[r["timestep"]]
        previous = alpha_bar[-1 if r["previous_timestep"] is None else r["previous_timestep"]]
        assert r["alpha_bar"] == pytest.approx(a)
        assert r["sigma"] == pytest.approx(0.5 * math.sqrt((1 - previous) / (1 - a) * (1 - a / previous)), abs=1e-12)
        assert r["snr_db"] == pytest.approx(10 * math.log10(a / (1 - a)))


def test_what_a_person_sees(ddim):
    shown = ddim("schedule", "--steps", 40, "--spacing", "quadratic").stdout
    assert "39 steps, 40 asked for" in shown
    for word in ("800", "end", "alpha_bar", "sigma", "SNR (dB)"):
        assert word in shown


def test_each_file_is_a_schedule_of_its_own(ddim, tmp_path):
    (tmp_path / "a.toml").write_text("[sampling]\nsteps = 5\n")
    (tmp_path / "b.toml").write_text('[model]\nsource = "not/there"\n[scheduler]\nbeta_schedule = "scaled_linear"\n')
    result = ddim("schedule", "-c", "a.toml", "-c", "b.toml", "--json")
    found = json.loads(result.stdout)["schedules"]
    assert [(s["name"], s["steps"]) for s in found] == [("a.toml", 5), ("b.toml", 50)]
    assert "b.toml: checked without the model's own" in result.stderr


def test_plot(ddim, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.toml").write_text('[scheduler]\ntimestep_spacing = "trailing"\nrescale_betas_zero_snr = true\n'
                                     'prediction_type = "v_prediction"\n')  # fmt: skip
    (tmp_path / "b.toml").write_text('[scheduler]\nbeta_schedule = "squaredcos_cap_v2"\n')
    assert ddim("schedule", "-c", "a.toml", "-c", "b.toml", "--plot", "p.png").exit_code == 0
    image = np.asarray(Image.open(io.BytesIO((tmp_path / "p.png").read_bytes())).convert("RGB")).reshape(-1, 3)
    for colour in ((31, 119, 180), (255, 127, 14)):
        assert (abs(image - np.array(colour)).max(1) < 12).sum() > 500, "a curve is missing"
    assert ddim("schedule", "--plot", "none/p.png").exit_code == 2


def test_plot_without_matplotlib_says_what_to_install(ddim, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = ddim("schedule", "--plot", "p.png")
    assert result.exit_code == 2
    assert "pip install 'ddim-cli[plot]'" in result.stderr
    assert list(tmp_path.iterdir()) == []
