import pytest
import tomli

from ddim_cli.config.layers import flags_layer, merge, parse_set, read_file
from ddim_cli.config.schema import KEYS, Config
from ddim_cli.config.write import render_resolved, render_starter, toml_value
from ddim_cli.errors import ConfigError


@pytest.fixture
def toml(tmp_path):
    def write(text, name="run.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_later_layer_wins_and_origins_say_so(toml):
    one = read_file(toml("[sampling]\nsteps = 10\neta = 0.1\nnum_images = 3\n", "one.toml"))
    two = read_file(toml("[sampling]\nsteps = 20\neta = 0.2\n", "two.toml"))
    resolved = merge([one, two, parse_set(["sampling.eta=0.3"]), flags_layer({"sampling.steps": ("--steps", 40)})])
    assert (resolved.config.sampling.steps, resolved.config.sampling.eta) == (40, 0.3)
    assert resolved.config.sampling.num_images == 3
    assert resolved.origin("sampling.steps") == "--steps"
    assert resolved.origin("sampling.eta") == "--set"
    assert resolved.origin("sampling.num_images").endswith("one.toml:4")
    assert resolved.origin("sampling.seed") == "default"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[sampling]\nstepz = 3\n", "run.toml:2: unknown key sampling.stepz; did you mean sampling.steps?"),
        ("steps = 3\n", "run.toml:1: unknown key steps; did you mean sampling.steps?"),
        ("[samplin]\nsteps = 3\n", "unknown table [samplin]; did you mean [sampling]?"),
        ("[samplin]\n", "unknown table [samplin]"),
        ("sampling = 3\n", "run.toml:1: sampling is a table"),
        ('[sampling]\nsteps = "50"\n', 'run.toml:2: sampling.steps = "50" is not allowed; it takes an integer'),
        ("[sampling]\nsteps = 2.0\n", "it takes an integer from 1 to 1000000"),
        ("[sampling]\nsteps = true\n", "it takes an integer from 1 to 1000000"),
        (
            "[sampling]\n\nsteps = 0\n",
            "run.toml:3: sampling.steps = 0 is not allowed; it takes an integer from 1",
        ),
        ("[sampling]\neta = -1\n", "it takes a number of at least 0"),
        ("[sampling]\neta = nan\n", "it takes a number of at least 0"),
        ('[scheduler]\ntimestep_spacing = "leadin"\n', "did you mean leading?"),
        ('[scheduler]\ntrained_betas = [0.1, "x"]\n', "it takes a list of numbers"),
        ('[sampling]\nseeds = "5-2"\n', "the range 5-2 runs backwards"),
        ('[runtime]\ndevice = "gpu"\n', "it takes auto, cpu, cuda, cuda:N or mps"),
        ("[sampling]\nbatch_size = 0\n", 'it takes an integer of at least 1 or "auto"'),
        ("[output]\ngrid = 1\n", "it takes true or false"),
        (
            "[scheduler]\nclip_sample = {a = 1}\n",
            'scheduler.clip_sample = {"a": 1} is not allowed; it takes true or false',
        ),
        ('[sampling]\nseed = 1\nseeds = "3"\n', "say the same thing in two ways"),
        ("[sampling]\nsteps = 1\ntimesteps = [3]\n", "say the same thing in two ways"),
        ("[sampling]\nsteps = = 3\n", "line 2, column 9"),
        ('"sampling.steps" = 30\n', 'run.toml:1: unknown key "sampling.steps"'),
        ('[sampling]\n"" = 1\n', 'run.toml:2: unknown key sampling.""'),
        ("[sampling]\n\nsteps.x = 1\n", "run.toml:3: sampling.steps"),
        (f"[sampling]\nsteps = {'9' * 5000}\n", "not valid TOML"),
        ("[scheduler]\nclip_sample_range = 1e300\n", "scheduler.clip_sample_range"),
        ("[model]\nema_ = true\n", "did you mean model.ema?"),
    ],
)
def test_what_is_wrong_in_a_file(toml, text, says):
    with pytest.raises(ConfigError) as caught:
        read_file(toml(text))
    assert says in str(caught.value)
    assert "run.toml" in str(caught.value)
    assert len(caught.value.problems) == 1


def test_every_problem_of_a_file_is_named(toml):
    with pytest.raises(ConfigError) as caught:
        read_file(toml("[sampling]\nstepz = 1\neta = -1\nsteps = 'x'\n"))
    assert len(caught.value.problems) == 3


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_file(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_file(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"a = '\xe9'")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_file(tmp_path / "latin.toml")


def test_a_higher_layer_replaces_the_pair():
    low = parse_set(["sampling.seed=5", "sampling.num_images=2", "sampling.timesteps=[9, 3]"])
    high = flags_layer({"sampling.seeds": ("--seeds", "0-9"), "sampling.steps": ("--steps", 4)})
    up, down = merge([low, high]).config, merge([high, low]).config
    assert up.seeds() == tuple(range(10))
    assert (up.sampling.steps, up.sampling.timesteps) == (4, None)
    assert down.seeds() == (5, 6)
    assert down.sampling.timesteps == (9, 3)


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("1", 1.0), (" 0.25 ", 0.25)])
def test_set_takes_toml_values(text, value):
    assert merge([parse_set([f"sampling.eta={text}"])]).config.sampling.eta == value


def test_set_takes_bare_words_as_strings():
    resolved = merge([parse_set(["model.source=path/to-it", 'scheduler.timestep_spacing="trailing"'])])
    assert resolved.config.model.source == "path/to-it"


@pytest.mark.parametrize("assignment", ["sampling.steps", "=3", "sampling.steps=[1", "sampling.eta=1\nx=2", "a.b=1"])
def test_set_refuses(assignment):
    with pytest.raises(ConfigError, match="--set"):
        parse_set([assignment])


def test_a_seed_list_may_be_a_list(toml):
    config = merge([read_file(toml("[sampling]\nseeds = [4, 2, 3]\n"))]).config
    assert config.seeds() == (4, 2, 3)


def test_a_byte_order_mark_is_no_syntax_error(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[sampling]\r\nsteps = 4\r\n")
    resolved = merge([read_file(path)])
    assert resolved.config.sampling.steps == 4
    assert resolved.origin("sampling.steps").endswith("run.toml:2")


def test_settings_are_frozen():
    with pytest.raises(ValueError):
        Config().sampling.steps = 3


def test_what_show_prints_reads_back_as_the_same_settings(toml):
    resolved = merge([parse_set(["sampling.seeds='3-5'", "scheduler.beta_start=1e-05", "output.dir='a \"b\" \\ é'"])])
    text = render_resolved(resolved)
    assert merge([read_file(toml(text))]).config == resolved.config
    assert "# replaced by sampling.seeds" in text


def test_the_starter_names_every_key_and_changes_nothing(toml):
    text = render_starter({})
    assert merge([read_file(toml(text))]).config == Config()
    for key in KEYS:
        assert f"# {key.split('.')[1]} =" in text, key


def test_the_starter_sets_what_it_is_given(toml):
    text = render_starter({"scheduler.trained_betas": [0.1, 0.2], "scheduler.num_train_timesteps": 2})
    config = merge([read_file(toml(text))]).config
    assert config.scheduler.trained_betas == (0.1, 0.2)


@pytest.mark.parametrize("value", [1e-05, 1.0, 3, True, 'a\n"b"\x7f', [1, 2], 1e22])
def test_toml_values(value):
    assert tomli.loads(f"v = {toml_value(value)}")["v"] == value


@pytest.mark.parametrize("key", ["prompt", "negative_prompt"])
def test_a_prompt_that_is_no_text_is_refused(key):
    """A terminal may hand over any bytes; a sidecar is UTF-8."""
    with pytest.raises(ConfigError, match=f"sampling.{key} = .*is no UTF-8 text"):
        flags_layer({f"sampling.{key}": (f"--{key}", "\udcff a")})
