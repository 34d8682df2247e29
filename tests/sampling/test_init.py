"""Pictures to begin from, masks, and noise that is turned: what comes of them, and what is remembered of it."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_cli import load_model, sample
from ddim_cli.diffusion.slerp import slerp

DIGITS = Path(__file__).parents[1] / "data" / "digits"
NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
STEPS = ("--steps", 10, "--no-compile")
INIT = ("--init", "p.png", "--strength", 0.5)


@pytest.fixture(autouse=True)
def files(tmp_path):
    """``p.png`` has twice the network's size, ``q.png`` its size; ``m.png`` is white at the top and grey below."""
    Image.fromarray(NOISE).save(tmp_path / "p.png")
    Image.fromarray(NOISE[:8, :8]).save(tmp_path / "q.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:3], mask[3] = 255, 100
    Image.fromarray(mask).save(tmp_path / "m.png")


@pytest.fixture
def tiny(ddim, tiny_model):
    """Pictures of the tiny model in ``out``; the result of the command is checked."""

    def run(out, *args, code=0):
        result = ddim("sample", "-m", tiny_model, *STEPS, "-o", out, *args)
        assert result.exit_code == code, result.stderr
        return result

    return run


def pixels(folder):
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in Path(folder).glob("0*.png")}


def same(one, other, most=0):
    """Whether two folders have the same pictures, no value further apart than ``most``."""
    a, b = pixels(one), pixels(other)
    assert a.keys() == b.keys()
    return all(abs(a[name] - b[name]).max() <= most for name in a)


def sidecar(path):
    return json.loads(Path(path).read_text())


def replayed(ddim, *args):
    result = ddim("replay", *args, "--check", "--json")
    return all(p["equal_hash"] for p in json.loads(result.stdout)["pictures"]) if result.exit_code == 0 else result


# Where pictures begin


@pytest.mark.parametrize("count", [10, 50])
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
def test_the_last_steps_of_the_grid_run(ddim, tiny_model, count, strength):
    args = ("--steps", count, "--init", "q.png", "--strength", strength, "--dry-run", "--json")
    plan = json.loads(ddim("sample", "-m", tiny_model, *args).stdout)
    assert len(plan["timesteps"]) == count
    assert plan["start_timestep"] == plan["timesteps"][count - int(count * strength)]


def test_without_a_strength_pictures_change_by_0_8_and_beside_a_mask_wholly(tiny):
    for more, strength, start in (((), 0.8, 700), (("--mask", "m.png"), 1.0, 900)):
        plan = json.loads(tiny("out", "--init", "q.png", *more, "--dry-run", "--json").stdout)
        assert (plan["strength"], plan["start_timestep"]) == (strength, start)


def shows_states(x, t):
    """A network that takes its state for the picture."""
    return x


def begun(shape=(3, 8, 8), **sampling):
    """What pictures begin from: a single step, to what the network was given. Two seeds from 5 on."""
    config = {
        "sampling": {"timesteps": [600], "seed": 5, "num_images": 2, "batch_size": 1, **sampling},
        "scheduler": {"prediction_type": "sample", "clip_sample": False},
    }
    return [s.tensor for s in sample(config, shows_states, shape=shape)]


def noise(seed):
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_noise_of_the_seed_is_added_as_the_forward_process_has_it(tmp_path):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)[600].item()
    x0 = torch.from_numpy(NOISE[:8, :8].transpose(2, 0, 1) / 127.5 - 1)
    for n, found in enumerate(begun(init=str(tmp_path / "q.png"), strength=1.0)):
        expected = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise(5 + n)
        torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=0)


def test_the_less_strength_the_nearer_is_the_picture():
    model, x0 = load_model("mnist"), torch.from_numpy(np.asarray(Image.open(DIGITS / "3.png")) / 127.5 - 1)

    def made(strength, seed=0):
        settings = {
            "steps": 20,
            "batch_size": 1,
            "init": str(DIGITS / "3.png"),
            "strength": strength,
            "seed": seed,
            "num_images": 1,
        }
        return next(iter(sample({"sampling": settings}, model))).tensor[0]

    distances = [float((made(strength) - x0).abs().mean()) for strength in (0.05, 0.3, 0.6, 1)]
    assert distances == sorted(distances)
    assert distances[0] < 0.02 < 0.1 < distances[-1], distances
    assert (made(0.6) - made(0.6, seed=1)).abs().mean() > 0.02


# What is remembered


def test_a_sidecar_says_where_a_picture_began(tiny, tmp_path):
    tiny("out", *INIT, "-n", 1)
    said = sidecar(tmp_path / "out" / "000000.json")["sampling"]
    assert said["init"] == {
        "file": "p.png",
        "pixels_sha256": hashlib.sha256(NOISE.tobytes()).hexdigest(),
        "conversion": ["resized from 16 x 16 to 8 x 8"],
        "path": str(tmp_path / "p.png"),
    }
    assert (said["strength"], said["start_timestep"], said["steps"]) == (0.5, 400, 10)
    assert sidecar(tmp_path / "out" / "run.json")["sampling"]["init"] == said["init"]


def test_what_is_there_is_known_by_the_pixels_and_not_by_their_place(tiny, tmp_path):
    tiny("out", *INIT, "-n", 2)
    (tmp_path / "sub").mkdir()
    for place in ("sub/p.png", "sub/other.png"):
        shutil.copy("p.png", place)
        assert "nothing to do" in tiny("out", "--init", place, "--strength", 0.5, "-n", 2).stdout
    tiny("out", *INIT, "-n", 3)
    assert len(pixels("out")) == 3
    Image.fromarray(255 - NOISE).save(tmp_path / "p.png")
    before, now = (hashlib.sha256(values.tobytes()).hexdigest()[:8] for values in (NOISE, 255 - NOISE))
    init = f"sampling.init = a picture of the pixels {before}, this run has"
    for args, told in (
        (INIT, f"{init} a picture of the pixels {now};"),
        ((), f"{init} null;"),
        (("--init", "sub/p.png", "--strength", 0.6), "sampling.strength = 0.5, this run has 0.6;"),
        (("--init", "sub/p.png", "--strength", 0.5, "--mask", "m.png"), "sampling.mask = null, this run has"),
    ):
        assert f"error: out/run.json was made with {told}" in tiny("out", *args, "-n", 3, code=2).stderr


@pytest.mark.parametrize(
    "more", [(), ("--mask", "m.png", "--steps", 14, "--resample", 2, "--eta", 0.5)], ids=["picture", "mask"]
)
def test_replay_makes_it_again_wherever_it_lies(ddim, tiny, tmp_path, more):
    tiny("out", *INIT, *more, "-n", 2, "-b", 2)
    assert replayed(ddim, "out/000000.json", "out/000001.png") is True
    (tmp_path / "away").mkdir()
    shutil.move("p.png", "away/p.png")
    gone = replayed(ddim, "out/000001.json")
    assert gone.exit_code == 2
    assert "the picture that it began from, p.png, is not there any more" in gone.stderr
    assert "say where it is with --init" in gone.stderr
    assert replayed(ddim, "out/000000.json", "out/000001.json", "--init", "away") is True
    shutil.copy("away/p.png", "out/p.png")
    assert replayed(ddim, "out/000000.json") is True, "it lies beside the picture"
    (tmp_path / "out" / "p.png").unlink()
    # Under another name; and what is there now under its own is another picture, or none.
    shutil.move("away/p.png", "renamed.png")
    for change in (lambda: Image.fromarray(255 - NOISE).save("p.png"), lambda: Path("p.png").write_text("none")):
        change()
        changed = replayed(ddim, "out/000000.json")
        assert (changed.exit_code, "p.png, has changed since: " in changed.stderr) == (2, True), changed.stderr
    assert replayed(ddim, "out/000001.json", "--init", "renamed.png") is True


def test_a_mask_that_is_gone(ddim, tiny):
    tiny("out", *INIT, "--mask", "m.png", "-n", 1)
    shutil.move("m.png", "n.png")
    gone = replayed(ddim, "out/000000.png")
    assert (gone.exit_code, "it began from, m.png, is not there any more" in gone.stderr) == (2, True)
    assert replayed(ddim, "out/000000.png", "--init", "n.png") is True


@pytest.mark.parametrize("more", [(), ("--mask", "m.png", "--eta", 1)], ids=["picture", "mask"])
def test_shards_and_batches_change_nothing(tiny, more):
    tiny("whole", *INIT, *more, "-n", 5, "-b", 2)
    for shard in ("0/2", "1/2"):
        tiny("shards", *INIT, *more, "-n", 5, "-b", 2, "--shard", shard)
    assert same("whole", "shards")
    tiny("one", *INIT, *more, "-n", 5, "-b", 5)
    assert same("whole", "one", most=1)


# Solvers of higher order


@pytest.mark.parametrize("order", [2, 3])
def test_a_higher_order_runs_the_rest_of_the_grid_as_a_grid_of_its_own(ddim, tiny, tiny_model, order):
    tiny("out", *INIT, "--order", order, "-n", 2)
    rest = ("--set", "sampling.timesteps=[400,300,200,100,0]", "--init", "p.png", "--strength", 1, "--order", order)
    assert ddim("sample", "-m", tiny_model, "--no-compile", "-o", "rest", "-n", 2, *rest).exit_code == 0
    assert len(sidecar("rest/000000.json")["sampling"]["timesteps"]) == 5
    assert same("out", "rest")
    tiny("first", *INIT, "-n", 2)
    assert not same("out", "first", most=1)


# Masks


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--strength", 0.5),
        ("--eta", 1),
        ("--order", 2),
        ("--steps", 14, "--resample", 3),
        ("--set", "scheduler.set_alpha_to_one=false"),
    ],
    ids=lambda more: " ".join(map(str, more)) or "plain",
)
def test_what_is_black_stays_to_the_bit(ddim, tiny, more):
    tiny("out", "--init", "q.png", "--mask", "m.png", "-n", 2, *more)
    for found in pixels("out").values():
        assert np.array_equal(found[4:], NOISE[4:8, :8])
        assert (found[:3] != NOISE[:3, :8]).mean() > 0.9
        assert (found[3] != NOISE[3, :8]).any()
    assert ddim("verify", "out").stdout == "2 images: all is well\n"


def test_what_is_made_anew_is_led_by_what_is_kept(tiny, tmp_path):
    """At strength 1 nothing is seen of what was there before, which begins from noise alone; below it shows through."""
    white = np.arange(64).reshape(8, 8) < 24
    Image.fromarray(np.where(white, 255, 0).astype(np.uint8)).save(tmp_path / "m.png")
    Image.fromarray(np.where(white[..., None], 0, NOISE[:8, :8])).save(tmp_path / "below.png")
    Image.fromarray(np.where(white[..., None], NOISE[:8, :8], 0)).save(tmp_path / "around.png")

    def made(name, strength):
        tiny(f"{name} {strength}", "--init", f"{name}.png", "--mask", "m.png", "-n", 1, "--strength", strength)
        return pixels(f"{name} {strength}")["000000.png"][white]

    assert np.array_equal(made("q", 1), made("below", 1))
    assert abs(made("q", 0.5) - made("below", 0.5)).max() > 1
    assert abs(made("q", 1) - made("around", 1)).max() > 1


def test_what_is_black_stays_to_the_bit_though_an_autoencoder_would_change_it(ddim, tiny_latent_model, tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "p.png")
    white = np.zeros((64, 64), bool)
    white[10:40, 20:50] = True
    Image.fromarray(white).save(tmp_path / "m.png")
    args = ("--steps", 2, "-n", 1, "-o", "out", "--init", "p.png", "--mask", "m.png")
    assert ddim("sample", "-m", tiny_latent_model, *args).exit_code == 0
    found = pixels("out")["000000.png"]
    assert np.array_equal(found[~white], values[~white])
    assert (found[white] != values[white]).mean() > 0.9


# Variations


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_noise_lies_between_that_of_two_seeds(weight):
    for n, found in enumerate(begun(variation_seed=9, variation_strength=weight)):
        torch.testing.assert_close(found, slerp(noise(5 + n), noise(9), weight), atol=1e-6, rtol=0)


def test_variations_end_at_the_two_seeds_and_are_remembered(ddim, tiny):
    tiny("own", "--seeds", "0-2", "-b", 1)
    assert "nothing to do" in tiny("own", "--seeds", "0-2", "--variation-seed", 2).stdout
    between = ("--seeds", "0-1", "-b", 1, "--variation-strength", 0.3, "--variation-seed")
    tiny("v1", *between[:5], 1, "--variation-seed", 2)
    tiny("v2", *between, 2)
    tiny("v3", *between, 3)
    own, all_of_it, one, other = map(pixels, ("own", "v1", "v2", "v3"))
    for name in ("000000.png", "000001.png"):
        assert np.array_equal(all_of_it[name], own["000002.png"])
        for a, b in ((own, one), (all_of_it, one), (one, other)):
            assert abs(a[name] - b[name]).max() > 1
    said = sidecar("v2/000001.json")["sampling"]
    assert (said["variation_seed"], said["variation_strength"]) == (2, 0.3)
    assert replayed(ddim, "v2/000000.json", "v2/000001.png", "v3/000001.json") is True
    assert "sampling.variation_seed = 2, this run has 3" in tiny("v2", *between, 3, code=2).stderr


def test_a_variation_of_what_begins_from_a_picture(ddim, tiny):
    """The noise that is added to it is turned; steps go on drawing from the seed's own."""
    variation = ("--variation-seed", 7, "--variation-strength", 0.5)
    for out, more in (("plain", ()), ("turned", variation)):
        tiny(out, *INIT, "--mask", "m.png", "--eta", 1, "-n", 2, *more)
    assert not same("plain", "turned", most=1)
    assert replayed(ddim, "turned/000000.json", "turned/000001.json") is True
