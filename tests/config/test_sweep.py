"""[sweep] and --axis: axes, cells, overrides, and what is refused."""

import re

import pytest
import tomli

from ddim_cli.config.layers import flags_layer, read_file, table_layer
from ddim_cli.config.sweep import parse_sweep
from ddim_cli.errors import ConfigError
from ddim_cli.experiments.cells import resolve_sweep


def sweep_of(text: str, *axes: str):
    return parse_sweep([table_layer(tomli.loads(text), "run.toml")], axes)


def settings(sweep):
    return [cell.values for cell in sweep.cells()]


def test_the_product_of_the_axes_the_last_fastest():
    sweep = sweep_of('[sweep]\n"sampling.steps" = [10, 20]\neta = [0.0, 1]')
    assert [axis.name for axis in sweep.axes] == ["steps", "eta"]
    assert [cell.at for cell in sweep.cells()] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [cell.title for cell in sweep.cells()] == [
        "steps=10, eta=0.0",
        "steps=10, eta=1",
        "steps=20, eta=0.0",
        "steps=20, eta=1",
    ]
    assert settings(sweep)[2] == {"sampling.steps": 20, "sampling.eta": 0.0}


def test_an_unquoted_dotted_key_is_the_same_axis():
    quoted = sweep_of('[sweep]\n"scheduler.timestep_spacing" = ["leading", "quadratic"]')
    assert settings(quoted) == settings(sweep_of('[sweep]\nscheduler.timestep_spacing = ["leading", "quadratic"]'))
    assert settings(quoted)[1] == {"scheduler.timestep_spacing": "quadratic"}


def test_an_axis_of_several_keys():
    sweep = sweep_of(
        '[sweep]\nvariant = [{ eta = 0.0 }, { label = "noisy", variance = "large", scheduler.clip_sample = false }]'
    )
    assert [cell.title for cell in sweep.cells()] == ["eta=0.0", "noisy"]
    assert settings(sweep)[1] == {"sampling.variance": "large", "scheduler.clip_sample": False}


def test_lists_as_values_have_labels_of_their_own():
    sweep = sweep_of(
        "[sweep]\ntimesteps = [[900, 0], [900, 800, 700, 600, 500, 400, 0], [900, 1, 2, 3, 4, 5, 6, 7, 0]]"
    )
    labels = [value.label for value in sweep.axes[0].values]
    assert labels[0] == "900-0"
    assert len(set(labels)) == 3


def test_axes_of_the_command_line_replace_those_of_the_file():
    sweep = sweep_of("[sweep]\nsteps = [10, 20]\neta = [0.5]", "sampling.steps=3", "scheduler.beta_schedule=linear,exp")
    assert [(axis.name, len(axis.values)) for axis in sweep.axes] == [("steps", 1), ("eta", 1), ("beta_schedule", 2)]
    assert settings(sweep)[0]["sampling.steps"] == 3


def test_values_on_the_command_line_are_toml_or_bare_words():
    [axis] = sweep_of("", "sampling.timesteps=[900,0],[500,0]").axes
    assert [value.layer.values["sampling.timesteps"] for value in axis.values] == [[900, 0], [500, 0]]
    [axis] = sweep_of("", "model.source=\"a,b\",'c'").axes
    assert [value.label for value in axis.values] == ["a,b", "c"]


def test_axes_of_a_python_program():
    sweep = parse_sweep([], {"steps": range(2, 4), "scheduler.timestep_spacing": ("leading", "trailing")})
    assert settings(sweep) == settings(sweep_of("", "steps=2,3", "scheduler.timestep_spacing=leading,trailing"))
    for axes in ({"eta": 0.5}, {"eta": "0.5"}, {"eta": []}):
        with pytest.raises(ConfigError, match="axis eta: eta in a sweep takes a list of values"):
            parse_sweep([], axes)


def test_an_override_changes_single_cells():
    sweep = sweep_of(
        """
        [sweep]
        steps = [10, 20, 50]
        variant = [{ eta = 0.0 }, { variance = "large" }]
        [[sweep.override]]
        when = { steps = [20, 50], variance = "large" }
        set = { num_images = 3 }
        [[sweep.override]]
        when = { steps = 50 }
        set = { num_images = 2, scheduler.timestep_spacing = "trailing" }
        """
    )
    assert [found.get("sampling.num_images") for found in settings(sweep)] == [None, None, None, 3, 2, 2]
    assert settings(sweep)[4]["scheduler.timestep_spacing"] == "trailing"


def test_an_override_of_a_replaced_value_holds_nowhere():
    text = "[sweep]\nsteps = [1, 2]\n[[sweep.override]]\nwhen = { steps = 2 }\nset = { num_images = 3 }"
    assert settings(sweep_of(text, "steps=1,4")) == [{"sampling.steps": 1}, {"sampling.steps": 4}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sweep]\nsteps = 10", "steps in a sweep takes a list"),
        ("[sweep]\nsteps = []", "takes a list"),
        ("[sweep]\nstepps = [10]", "unknown key stepps in a sweep; did you mean steps?"),
        ("[sweep]\nsteps = [10, 'x']", 'sampling.steps = "x" is not allowed'),
        ("[sweep]\nsteps = [10, 20, 10]", "steps has 10 twice"),
        ("[sweep]\nsteps = [10]\nv = [{ steps = 20 }]", "sampling.steps is on two axes, steps and v"),
        (
            "[sweep]\nsteps = [3, 4]\ntimesteps = [[900, 0], [800, 0]]",
            "sampling.timesteps and sampling.steps say the same thing in two ways, and are on two axes",
        ),
        ("[sweep]\nsteps = [3]\nv = [{ eta = 0.0 }, { timesteps = [9, 0] }]", "on two axes, v and steps"),
        ("[sweep]\nseeds = ['0-3']\nnum_images = [2]", "are on two axes, num_images and seeds"),
        (
            "[sweep]\nsteps = [1]\n[[sweep.override]]\nwhen = { steps = 1 }\nset = { timesteps = [5] }",
            "set names sampling.timesteps, which says what sampling.steps does",
        ),
        ("[sweep]\nv = [{ eta = 0.0 }, 3]", "v mixes tables and single values"),
        ("[sweep]\nv = [{ label = 'a' }]", "a table that sets nothing"),
        ("[sweep]\nv = [{ label = 3, eta = 0.0 }]", "it takes a text"),
        ("[sweep]\n'output.dir' = ['a', 'b']", "output.dir is the same for the whole sweep"),
        ("[sweep]\nreference = 3\nsteps = [1]", "reference in [sweep] takes a text"),
        ("[sweep]", "a sweep needs an axis"),
        ("sweep = 3", "sweep is a table"),
        ("[sweep]\nsteps = [1]\n[[sweep.override]]\nwhen = { eta = 1.0 }\nset = { num_images = 1 }", "is on no axis"),
        ("[sweep]\nsteps = [1]\n[[sweep.override]]\nwhen = { steps = 2 }\nset = { num_images = 1 }", "no cell has"),
        ("[sweep]\nsteps = [1]\n[[sweep.override]]\nwhen = { steps = 1 }\nset = { steps = 2 }", "is on an axis"),
        ("[sweep]\nsteps = [1]\n[[sweep.override]]\nwhen = { steps = 1 }", "takes when and set"),
        ("[sweep]\nsteps = [1]\noverride = 3", "takes when and set"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(ConfigError) as caught:
        sweep_of(text)
    assert message in str(caught.value)
    assert "run.toml" in str(caught.value) or "needs an axis" in message or "two axes" in message


def test_steps_and_timesteps_in_turn_on_one_axis():
    sweep = sweep_of("[sweep]\ngrid = [{ steps = 2 }, { timesteps = [900, 0] }]")
    assert [cell.title for cell in sweep.cells()] == ["steps=2", "timesteps=900-0"]


@pytest.mark.parametrize(
    ("axis", "flag"),
    [
        ("timesteps=[900,0],[800,0]", {"sampling.steps": ("--steps", 4)}),
        ("steps=3,4", {"sampling.timesteps": ("--set", [900, 0])}),
        ("seeds='0-3','0-4'", {"sampling.num_images": ("--num-images", 4)}),
    ],
)
def test_an_option_that_an_axis_would_replace_is_refused(tiny_model, axis, flag):
    layer = table_layer({"model": {"source": str(tiny_model)}}, "model")
    [(key, (option, _))] = flag.items()
    with pytest.raises(ConfigError, match=f"^{option}: {key} says what .* does, which is on an axis; leave it out"):
        resolve_sweep([layer, flags_layer(flag)], [axis])
    # In a file, which is of other runs too, it is replaced without a word, as by any higher layer.
    below = table_layer({"sampling": {key.partition(".")[2]: flag[key][1]}}, "run.toml")
    assert len(resolve_sweep([layer, below], [axis]).cells) == 2


def test_mistakes_name_the_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[sampling]\nsteps = 5\n\n[sweep]\neta = [0.0]\n"sampling.guidance_scale" = [1.0, -1.0]\n')
    with pytest.raises(ConfigError) as caught:
        parse_sweep([read_file(path)])
    assert "run.toml:6" in str(caught.value)


@pytest.mark.parametrize("text", ["steps", "steps=", "=3", "steps=10 20", "steps=a b"])
def test_axes_that_cannot_be_read(text):
    with pytest.raises(ConfigError):
        sweep_of("", text)


def sweep_run(tiny_model, text: str, *layers):
    layer = table_layer({"model": {"source": str(tiny_model)}}, "model")
    own = table_layer(tomli.loads(text), "run.toml")
    return resolve_sweep([layer, own, *layers])


def cells_of(*args):
    return sweep_run(*args).cells


def test_folder_names_are_safe_and_differ(tiny_model):
    cells = cells_of(
        tiny_model, "[sweep]\nv = [{ label = 'a/../b', steps = 3 }, { label = 'A ... b', steps = 4 }, { steps = 5 }]"
    )
    names = [own.name for own in cells]
    assert names == ["a-..-b", "A-...-b", "steps=5"]
    cells = cells_of(tiny_model, "[sweep]\nv = [{ label = 'a b', steps = 3 }, { label = 'A/b', steps = 4 }]")
    first, second = [own.name for own in cells]
    assert first == "a-b"
    assert re.fullmatch("A-b-[0-9a-f]{8}", second)
    cells = cells_of(
        tiny_model, f"[sweep]\nv = [{{ label = 'run.json', steps = 3 }}, {{ label = '{'字' * 110}', steps = 4 }}]"
    )
    assert all(len(own.name.encode()) < 140 and own.name != "run.json" for own in cells)


def test_an_override_takes_the_first_of_the_seeds_there_are(tiny_model):
    text = """
        [sweep]
        steps = [3, 4]
        [[sweep.override]]
        when = { steps = 4 }
        set = { num_images = 2, scheduler.timestep_spacing = "trailing" }
        """
    given = {"sampling.seeds": ("--seeds", "9-12"), "scheduler.timestep_spacing": ("--spacing", "linspace")}
    flags = flags_layer(given)
    cells = cells_of(tiny_model, text, flags)
    assert [own.seeds for own in cells] == [(9, 10, 11, 12), (9, 10)]
    # A flag wins over a file's override.
    assert {own.run.config.scheduler.timestep_spacing for own in cells} == {"linspace"}
    cells = cells_of(tiny_model, text, flags_layer({"sampling.num_images": ("--num-images", 1)}))
    assert [own.seeds for own in cells] == [(0,), (0,)]


def test_the_same_seeds_or_the_first_of_them(tiny_model):
    fewer = "[sweep]\nsteps = [3, 4]\n[[sweep.override]]\nwhen = { steps = 4 }\nset = { %s }"
    cells = cells_of(tiny_model, "[sampling]\nseeds = '4-7,20'\n" + fewer % "seeds = '4-6'")
    assert [own.seeds for own in cells] == [(4, 5, 6, 7, 20), (4, 5, 6)]
    with pytest.raises(ConfigError, match="cell steps=4: its seeds are not the first"):
        cells_of(tiny_model, fewer % "seed = 1, num_images = 2")


def test_what_cannot_work_names_the_cell(tiny_model):
    with pytest.raises(ConfigError, match=r"cell steps=5, variance=large: .*implies eta 1"):
        cells_of(tiny_model, "[sampling]\neta = 0.5\n[sweep]\nsteps = [5]\nvariance = ['ddim', 'large']")


def test_a_warning_is_told_once_with_its_cells(tiny_model):
    warnings = sweep_run(tiny_model, "[sweep]\nsteps = [3, 50]\neta = [0.0, 1.0]").warnings
    assert len(warnings) == 1
    assert warnings[0].startswith("2 cells, steps=3, eta=0.0 the first: the grid starts")
    warnings = sweep_run(tiny_model, "[sweep]\nsteps = [3]\neta = [0.0, 1.0]").warnings
    assert warnings[0].startswith("the grid starts")
