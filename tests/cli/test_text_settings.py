"""Commands that make no picture know text-to-image models without a prompt."""

import json
import subprocess
import sys

import pytest


def test_config_show_tells_the_guidance_and_where_it_is_from(ddim, tiny_text_model):
    result = ddim("config", "show", "-m", tiny_text_model)
    assert result.exit_code == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if line.startswith("guidance_scale")]
    assert line.split("#") == [line.split("#")[0], " default of text-to-image models"]
    assert line.split("=")[1].split("#")[0].strip() == "7.5"
    found = json.loads(ddim("config", "show", "-m", tiny_text_model, "--guidance-scale", 3, "--json").stdout)
    assert found["config"]["sampling"]["guidance_scale"] == 3
    assert found["origins"]["sampling.guidance_scale"] == "--guidance-scale"


def test_config_check_and_schedule(ddim, tiny_text_model, tmp_path):
    (tmp_path / "run.toml").write_text(f'[model]\nsource = "{tiny_text_model}"\n[sampling]\nsteps = 10\n')
    assert ddim("config", "check", "run.toml").stdout == "run.toml: ok\n"
    [schedule] = json.loads(ddim("schedule", "-c", "run.toml", "--json").stdout)["schedules"]
    # The offset of 1 is the scheduler's that came with the model.
    assert [row["timestep"] for row in schedule["rows"]] == list(range(901, 0, -100))
    with (tmp_path / "run.toml").open("a") as stream:
        stream.write('classes = "3"\n')
    result = ddim("config", "check", "run.toml")
    assert result.exit_code == 2
    assert "takes a prompt, not a class" in result.stderr


def test_config_init_from_a_text_models_scheduler(ddim, tiny_text_model, tmp_path):
    source = tiny_text_model / "scheduler" / "scheduler_config.json"
    assert ddim("config", "init", "run.toml", "--from", source).exit_code == 0
    assert ddim("config", "check", "run.toml").exit_code == 0
    assert 'beta_schedule = "scaled_linear"' in (tmp_path / "run.toml").read_text()


def test_sample_still_wants_a_prompt(ddim, tiny_text_model):
    result = ddim("sample", "-m", tiny_text_model)
    assert result.exit_code == 2
    assert "--prompt" in result.stderr


def test_env_lists_transformers(ddim):
    from importlib import metadata

    assert json.loads(ddim("env", "--json").stdout)["transformers"] == metadata.version("transformers")


@pytest.mark.parametrize("arguments", [["sample", "-m", "MODEL", "--prompt", "a"], ["bench", "--architecture", "sd15"]])
def test_without_transformers_a_sentence_says_what_to_install(arguments, tiny_text_model, tmp_path):
    code = (
        "import importlib.util as u, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'transformers' else find(name, *more)\n"
        "sys.modules['transformers'] = None\n"
        "from ddim_cli.__main__ import main\n"
        "main()\n"
    )
    given = [str(tiny_text_model) if word == "MODEL" else word for word in arguments]
    done = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "text-to-image models need the package transformers: pip install 'ddim-cli[text]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
