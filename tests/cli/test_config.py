import json

from ddim_cli.config.layers import merge, read_file


def test_show_names_origins(ddim, tmp_path):
    (tmp_path / "a.toml").write_text("[sampling]\nsteps = 7\n")
    result = ddim("config", "show", "-c", "a.toml", "--eta", 0.25, "--set", "output.grid=false")
    assert result.exit_code == 0
    lines = dict(
        line.split("  # ") for line in (" ".join(x.split(" ")) for x in result.stdout.splitlines()) if "  # " in line
    )
    origins = {key.split(" = ")[0].strip(): origin for key, origin in lines.items()}
    assert origins["steps"] == "a.toml:2"
    assert origins["eta"] == "--eta"
    assert origins["grid"] == "--set"
    assert origins["beta_end"] == "mnist's scheduler_config.json"
    assert origins["device"] == "default"


def test_what_show_prints_is_a_config(ddim, tmp_path):
    (tmp_path / "shown.toml").write_text(ddim("config", "show", "--steps", 9).stdout)
    assert merge([read_file(tmp_path / "shown.toml")]).config.sampling.steps == 9
    assert ddim("config", "check", "shown.toml").exit_code == 0


def test_check_names_every_problem_of_every_file(ddim, tmp_path):
    (tmp_path / "good.toml").write_text("[sampling]\nsteps = 7\n")
    (tmp_path / "bad.toml").write_text("[sampling]\nstepz = 7\neta = -1\n")
    (tmp_path / "grid.toml").write_text("[sampling]\nsteps = 1001\n")
    result = ddim("config", "check", "good.toml", "bad.toml", "grid.toml")
    assert result.exit_code == 2
    assert "good.toml: ok" in result.stdout
    for text in ("bad.toml:2: ", "bad.toml:3: ", "grid.toml: sampling.steps = 1001"):
        assert text in result.stderr
    found = json.loads(ddim("config", "check", "good.toml", "bad.toml", "--json").stdout)
    assert [f["ok"] for f in found["files"]] == [True, False]


def test_check_finds_what_only_the_coefficients_tell(ddim, tmp_path):
    (tmp_path / "eta.toml").write_text("[sampling]\neta = 1.2\n")
    rescale = "beta_start = 0.0\nbeta_end = 0.0\nrescale_betas_zero_snr = true\nprediction_type = 'v_prediction'\n"
    (tmp_path / "rescale.toml").write_text(f"[scheduler]\n{rescale}")
    (tmp_path / "large.toml").write_text('[sampling]\nvariance = "large"\neta = 0.0\n')
    for name, says in (("eta", "at most"), ("rescale", "leave rescaling out"), ("large", "implies eta 1")):
        result = ddim("config", "check", f"{name}.toml")
        assert result.exit_code == 2
        assert says in result.stderr


def test_init_writes_a_starter_and_never_over_a_file(ddim, tmp_path):
    assert ddim("config", "init", "run.toml").exit_code == 0
    assert ddim("config", "check", "run.toml").exit_code == 0
    (tmp_path / "run.toml").write_text("mine")
    assert ddim("config", "init", "run.toml").exit_code == 2
    assert (tmp_path / "run.toml").read_text() == "mine"
    assert ddim("config", "init", "run.toml", "--overwrite").exit_code == 0
    assert ddim("config", "init", "none/run.toml").exit_code == 2


def test_init_from_a_models_scheduler(ddim, tmp_path):
    scheduler = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "variance_type": "fixed_small",
        "trained_betas": None,
        "clip_sample": False,
    }
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    result = ddim("config", "init", "run.toml", "--from", "scheduler_config.json")
    assert result.exit_code == 0
    assert "variance_type" in result.stderr
    found = merge([read_file(tmp_path / "run.toml")]).config.scheduler
    assert (found.beta_schedule, found.beta_end) == ("squaredcos_cap_v2", 0.012)
    assert (found.prediction_type, found.clip_sample) == ("v_prediction", False)
    for text in ("{", "[1]", '{"beta_end": "x"}'):
        (tmp_path / "scheduler_config.json").write_text(text)
        assert ddim("config", "init", "other.toml", "--from", "scheduler_config.json").exit_code == 2
    assert ddim("config", "init", "other.toml", "--from", "none.json").exit_code == 2


def test_schema_is_one_that_editors_can_use(ddim):
    schema = json.loads(ddim("config", "schema").stdout)
    sampling = schema["$defs"]["SamplingSettings"]["properties"]
    assert sampling["steps"]["minimum"] == 1
    assert sampling["eta"]["description"]
    assert schema["$defs"]["SamplingSettings"]["additionalProperties"] is False
