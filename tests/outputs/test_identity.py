"""What decides a picture: every setting, unless it is named as one that cannot change it."""

import json
from pathlib import Path

import pytest

from ddim_cli.config.layers import merge, table_layer
from ddim_cli.config.schema import KEYS, SECTIONS
from ddim_cli.outputs.sidecar import CANNOT_CHANGE_A_PICTURE, identity
from ddim_cli.sampling.record import make_record
from ddim_cli.sampling.resolve import settle, with_init

DIGITS = Path(__file__).parent.parent / "data" / "digits"
# Another value of each key that has no other bool or number near its default.
OTHER = {
    "scheduler.beta_schedule": "scaled_linear",
    "scheduler.trained_betas": [0.001 * (t + 1) for t in range(10)],
    "scheduler.prediction_type": "v_prediction",
    "scheduler.timestep_spacing": "trailing",
    "scheduler.previous_timestep": "diffusers",
    "scheduler.num_train_timesteps": 900,
    "scheduler.dynamic_thresholding_ratio": 0.9,
    "sampling.timesteps": [999, 3],
    "sampling.variance": "large",
    "sampling.classes": "3",
    "sampling.prompt": "seven",
    "sampling.negative_prompt": "thin",
    "sampling.init": str(DIGITS / "3.png"),
    "sampling.strength": 0.3,
    "sampling.mask": str(DIGITS / "4.png"),
    "sampling.variation_seed": 3,
    "sampling.variation_strength": 0.5,
}
# Without these, settings of a beginning have no effect, or are refused.
INIT = {"init": OTHER["sampling.init"]}
BESIDE = {
    "strength": INIT,
    "mask": INIT,
    "resample": {**INIT, "mask": OTHER["sampling.mask"]},
    "variation_seed": {"variation_strength": 0.5},
    "variation_strength": {"variation_seed": 3},
}


def record_of(table):
    run = with_init(settle(merge([table_layer(table, "test")])), (1, 32, 32))
    return make_record(run, {"dtype": "float32", "tf32": False})


def changed(key):
    section, name = key.split(".")
    default = SECTIONS[section].model_fields[name].default
    value = OTHER.get(key, not default if isinstance(default, bool) else None)
    if value is None:
        value = default + 1 if isinstance(default, int) else default + 0.01
    table = {section: {name: value}}
    if key == "scheduler.trained_betas":
        table["scheduler"]["num_train_timesteps"] = 10
        table["sampling"] = {"steps": 2}
    if key.startswith(("sampling.guidance", "sampling.negative")):
        # Without guidance it has no effect.
        table["sampling"] = {"guidance_scale": 3.0, **table["sampling"]}
    if name in BESIDE:
        table["sampling"] |= BESIDE[name]
    return table


def without(key):
    """What `changed` is compared with: the same without this key."""
    section, name = key.split(".")
    beside = BESIDE.get(name, {})
    return {section: {k: v for k, v in beside.items() if not k.startswith("variation")}}


@pytest.mark.parametrize(
    "key", [k for k in KEYS if k.split(".")[0] in ("sampling", "scheduler") and k.split(".")[1] not in
            CANNOT_CHANGE_A_PICTURE[k.split(".")[0]]]
)  # fmt: skip
def test_every_setting_that_can_change_a_picture_is_part_of_its_identity(key):
    assert identity(record_of(changed(key))) != identity(record_of(without(key)))


def test_a_new_setting_is_inside_until_it_is_taken_out(monkeypatch):
    """In any section, where it is not its default: so that it changes nothing of what was made before it came."""
    from pydantic.fields import FieldInfo

    record = record_of({})
    before = identity(record)
    for section in ("sampling", "scheduler", "model", "runtime"):
        monkeypatch.setitem(SECTIONS[section].model_fields, "novel", FieldInfo(default=1, annotation=int))
        for value in (1, 2):
            inner = record if section in ("sampling", "scheduler") else record["config"]
            place = {**inner, section: {**inner[section], "novel": value}}
            whole = place if inner is record else {**record, "config": place}
            assert (identity(whole) == before) is (value == 1), section
        monkeypatch.undo()


def test_identities_are_those_of_the_first_version():
    """The flat keys that folders made by 0.1.0 are held to, in JSON as it is hashed."""
    flat = identity(record_of({}))
    assert sorted(flat) == sorted(
        [
            *("sampling.eta", "sampling.timesteps", "sampling.variance", "sampling.use_clipped_model_output"),
            *(f"scheduler.{name}" for name in SECTIONS["scheduler"].model_fields),
            *("model.sha256", "model.config_sha256", "runtime.dtype", "runtime.tf32"),
        ]
    )
    assert json.dumps(flat["sampling.eta"]) == "0.0"
