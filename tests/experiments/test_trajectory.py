"""``ddim trajectory``: what its frames are, and that it goes on where it was stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_cli.config.layers import merge, table_layer
from ddim_cli.experiments.trajectory import Strips, chosen_steps, select
from ddim_cli.models.describe import describe_model
from ddim_cli.models.load import load_sampling_network
from ddim_cli.outputs.picture import encode_png
from ddim_cli.sampling.items import Choices, SeedItems
from ddim_cli.sampling.loop import Denoiser, run_batches, to_uint8
from ddim_cli.sampling.resolve import resolve, settle
from ddim_cli.sampling.sampler import make_sampler

CPU = torch.device("cpu")


def run_of(tiny_model, **sampling):
    settings = {"model": {"source": str(tiny_model)}, "sampling": {"steps": 6, **sampling}}
    resolved = merge([table_layer(settings, "test")])
    return settle(resolved, describe_model(resolved.config.model))


def sampler_of(run):
    return make_sampler(run, load_sampling_network(run.model), CPU, torch.float32, (3, 8, 8))


def watched(run, sampler, show, every, seeds, rows):
    """The frames of seeds, sampled as one batch."""
    selection = select(run, show, every)
    denoiser = Denoiser(sampler, Strips(selection).watch)
    return denoiser.launch(SeedItems(seeds), rows).collect()


@pytest.mark.parametrize(
    ("count", "every", "x0", "xt"),
    [
        (50, None, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 49], [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]),
        (10, 4, [0, 4, 8, 9], [0, 4, 8]),
        (3, 100, [0, 2], [0]),
        (1, None, [0], [0]),
    ],
)
def test_which_steps_are_shown(count, every, x0, xt):
    assert list(chosen_steps("x0", every, count)) == x0
    assert list(chosen_steps("xt", every, count)) == xt


@pytest.mark.parametrize("source", ["tiny_model", "tiny_text_model"])
@pytest.mark.parametrize("show", ["x0", "xt"])
def test_with_a_mask_the_last_frame_is_the_picture_too(source, show, request, tmp_path):
    """And the first is of the step at which it begins."""
    model = request.getfixturevalue(source)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)).save(tmp_path / "picture.png")
    inside = {"init": str(tmp_path / "picture.png"), "mask": str(tmp_path / "mask.png"), "strength": 0.7}
    prompt = {"prompt": "a"} if source == "tiny_text_model" else {}
    settings = {"model": {"source": str(model)}, "sampling": {"steps": 6, **inside, **prompt}}
    # So that the last x0 is the result.
    settings["scheduler"] = {"set_alpha_to_one": True}
    run = resolve([table_layer(settings, "test")])
    sampler = make_sampler(run, load_sampling_network(run.model), CPU, torch.float32)
    selection = select(run, show, 2)
    items = SeedItems((4, 5), Choices.of(run.config), run.begins)
    for picture in Denoiser(sampler, Strips(selection).watch).launch(items, 2).collect():
        assert np.array_equal(picture.seen[-1], picture.pixels)
        assert len(picture.seen) == len(selection.labels())
    assert selection.steps[0] == 2


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("show", ["x0", "xt"])
def test_the_last_frame_is_the_picture_that_sample_makes(tiny_model, show, eta):
    run = run_of(tiny_model, eta=eta)
    sampler = sampler_of(run)
    frames = [picture.seen for picture in watched(run, sampler, show, 2, (4, 5), 3)]
    [pictures] = run_batches(Denoiser(sampler), SeedItems((4, 5)), 3)
    for of_a_seed, picture in zip(frames, pictures, strict=True):
        assert np.array_equal(of_a_seed[-1], picture.pixels)
    assert not np.array_equal(frames[0][0], frames[0][-1])


def test_frames_are_the_state_and_the_prediction_in_closed_form(tiny_model):
    """A network that predicts no noise: x0 is x_T / sqrt(alpha_bar_T), clipped, at every step, and x_t is
    sqrt(alpha_bar_t) of that."""
    run = run_of(tiny_model, steps=5)
    sampler = sampler_of(run)
    sampler = replace(sampler, down=replace(sampler.down, network=lambda x, i: torch.zeros_like(x)))
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(9))
    signal = sampler.down.table.alpha_bar.sqrt().float()
    x0 = (noise / signal[0]).clamp(-1, 1)

    def frames(show):
        return np.stack(watched(run, sampler, show, 1, (9,), 1)[0].seen).astype(int)

    def expected(states):
        return to_uint8(torch.stack(states)).numpy().astype(int)

    assert abs(frames("x0") - expected([x0] * 5)).max() <= 1
    assert abs(frames("xt") - expected([noise, *(s * x0 for s in signal[1:]), x0])).max() <= 1


def command(tiny_model, *more):
    return ("trajectory", "-m", tiny_model, "--seeds", "0-2", "-b", 2, "--steps", 12, "-o", "out", *more)


def test_a_strip_a_seed(ddim, tiny_model, tmp_path):
    result = ddim(*command(tiny_model, "--every", 4, "--gif", "--json"))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["strips"], found["made"], found["present"], found["show"]) == (3, 3, 0, "x0")
    timesteps = [11 * 83, 7 * 83, 3 * 83, 0]
    assert found["timesteps"] == timesteps
    expected = {f"{seed:06d}.x0.{kind}" for seed in range(3) for kind in ("png", "gif")}
    assert {p.name for p in (tmp_path / "out").iterdir()} == expected
    with Image.open(tmp_path / "out" / "000001.x0.png") as strip:
        strip.load()
        # Four frames of 8 pixels, enlarged twelve times.
        assert strip.width == 2 * 10 + 4 * 96 + 3 * 6
        text = json.loads(strip.text["ddim"])
    assert (text["seed"], text["strip"]) == (1, {"show": "x0", "timesteps": timesteps})
    with Image.open(tmp_path / "out" / "000001.x0.gif") as animation:
        assert animation.n_frames == 4
        assert animation.info["loop"] == 0
    shown = ddim("inspect", "out/000001.x0.png").stdout
    assert "strip: the predicted x0 at timesteps 913, 581, 249, 0" in shown
    assert "again" not in shown


def test_the_last_tile_of_a_strip_is_the_picture(ddim, tiny_model, tmp_path):
    assert ddim(*command(tiny_model)).exit_code == 0
    assert ddim("sample", *command(tiny_model)[1:-1], "pictures").exit_code == 0
    strip = np.asarray(Image.open(tmp_path / "out" / "000002.x0.png"))
    picture = np.asarray(Image.open(tmp_path / "pictures" / "000002.png")).repeat(12, 0).repeat(12, 1)
    top = 10 + 22 + 3
    assert np.array_equal(strip[top : top + 96, -106:-10], picture)


def test_the_same_command_goes_on(ddim, tiny_model, tmp_path):
    out = tmp_path / "out"
    assert ddim(*command(tiny_model)).exit_code == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    again = ddim(*command(tiny_model))
    assert (again.exit_code, "nothing to do" in again.stdout) == (0, True)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    (out / "000001.x0.png").write_bytes(b"half")
    found = json.loads(ddim(*command(tiny_model, "--json")).stdout)
    assert (found["made"], found["present"]) == (1, 2)
    assert {p.name for p in out.iterdir() if p.stat().st_mtime_ns != before[p.name]} == {"000001.x0.png"}
    # Other steps, or an animation beside them, are made anew; other settings need another folder.
    assert json.loads(ddim(*command(tiny_model, "--every", 3, "--json")).stdout)["made"] == 3
    assert json.loads(ddim(*command(tiny_model, "--every", 3, "--gif", "--json")).stdout)["made"] == 3
    refused = ddim(*command(tiny_model, "--eta", 1))
    assert refused.exit_code == 2
    assert "was made with sampling.eta = 0.0, this run has 1.0" in refused.stderr
    assert ddim(*command(tiny_model, "--eta", 1, "--overwrite")).exit_code == 0


def test_strips_in_a_folder_of_pictures_are_no_problem(ddim, tiny_model):
    assert ddim("sample", *command(tiny_model)[1:]).exit_code == 0
    assert ddim(*command(tiny_model)).exit_code == 0
    assert ddim("verify", "out").exit_code == 0


def test_verify_looks_at_strips(ddim, tiny_model, tmp_path):
    """They have no sidecars: by the text and the pixels of their own."""
    out = tmp_path / "out"
    assert ddim(*command(tiny_model)).exit_code == 0
    well = ddim("verify", "out")
    assert (well.exit_code, well.stdout) == (0, "3 images: all is well\n")

    def text_of(path):
        with Image.open(path) as image:
            return image.text["ddim"]

    strips = [out / f"00000{i}.x0.png" for i in range(3)]
    with Image.open(strips[0]) as image:
        strips[0].write_bytes(encode_png(image.point(lambda v: 255 - v), text_of(strips[0])))
    strips[1].write_bytes(strips[1].read_bytes()[:-40])
    strips[2].rename(out / "000009.x0.png")
    found = json.loads(ddim("verify", "out", "--json").stdout)
    assert (found["ok"], found["images"]) == (False, 3)
    assert [(p["file"], p["problem"].partition(" ")[2]) for p in found["problems"]] == [
        ("000000.x0.png", "has other pixels than its text says"),
        ("000001.x0.png", "does not decode"),
        ("000009.x0.png", "has a text that says seed 2"),
    ]
    Image.new("RGB", (4, 4)).save(strips[1])
    assert "000001.x0.png: has no text 'ddim' inside of a strip" in ddim("verify", "out").stdout


def test_strips_of_other_settings_do_not_belong_to_a_run(ddim, tiny_model, tmp_path):
    assert ddim("sample", *command(tiny_model)[1:]).exit_code == 0
    assert ddim(*command(tiny_model, "--eta", 1, "-o", "other")).exit_code == 0
    (tmp_path / "other" / "000001.x0.png").rename(tmp_path / "out" / "000001.x0.png")
    result = ddim("verify", "out")
    assert result.exit_code == 3
    assert "out/000001.x0.png: was made with sampling.eta = 1.0, the run with 0.0" in result.stdout


def test_what_takes_pictures_says_what_this_folder_is(ddim, tiny_model):
    assert ddim(*command(tiny_model)).exit_code == 0
    result = ddim("evaluate", "out", "--reference", "mnist")
    assert result.exit_code == 2
    assert "out: is a folder of ddim trajectory" in result.stderr
    assert "ddim sample" in result.stderr
    result = ddim("replay", "out", "--check")
    assert result.exit_code == 2
    assert "out: is a folder; name its strips, for example out/0*.png" in result.stderr


def test_by_default_the_folder_is_not_that_of_sample(ddim, tiny_model):
    found = json.loads(ddim("trajectory", "-m", tiny_model, "-n", 1, "--steps", 2, "--json").stdout)
    assert found["folder"].startswith("outputs/tiny-2steps-")
    assert found["folder"].endswith("-trajectory")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--every", "0"], "--every 0: it takes an integer of at least 1"),
        (["--show", "noise"], "xt"),
        (["--seeds", "3-1"], "runs backwards"),
    ],
)
def test_mistakes(ddim, tiny_model, args, text, tmp_path):
    result = ddim(*command(tiny_model, *args))
    assert result.exit_code == 2
    assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_network_that_fails_is_named_by_its_seed(ddim, tiny_model, monkeypatch):
    from ddim_cli.sampling import executor

    def broken(*args, **more):
        sampler = make_sampler(*args, **more)
        return replace(sampler, down=replace(sampler.down, network=lambda x, i: x * float("nan")))

    monkeypatch.setattr(executor, "make_sampler", broken)
    result = ddim(*command(tiny_model))
    assert result.exit_code == 1
    assert "seed 0: NaN at step 1 of 12 (timestep 913)" in result.stderr


def test_a_latent_model_shows_decoded_pictures_and_the_prompt(ddim, tiny_text_model, tmp_path):
    # With the model's own alpha the last step leaves a little noise, and its x0 is not quite the picture.
    plain = ("-m", tiny_text_model, "--prompt", "a seven", "--seeds", "3", "--steps", 4, "--no-compile")
    plain = (*plain, "--set", "scheduler.set_alpha_to_one=true")
    assert ddim("trajectory", *plain, "-o", "out").exit_code == 0
    assert ddim("sample", *plain, "-o", "own").exit_code == 0
    with Image.open(tmp_path / "out" / "000003.x0.png") as strip, Image.open(tmp_path / "own" / "000003.png") as own:
        assert set(strip.info) == {"ddim"}
        assert json.loads(strip.info["ddim"])["sampling"]["prompt"] == "a seven"
        # Four frames of 64 pixels doubled, under a caption; the last is the picture itself.
        assert strip.size[0] == 2 * 10 + 4 * 128 + 3 * 6
        last = np.asarray(strip)[35 : 35 + 128, -138:-10]
        assert np.array_equal(last, np.asarray(own).repeat(2, 0).repeat(2, 1))
    checked = ddim("replay", "out/000003.x0.png", "--check")
    assert "1 with equal hashes" in checked.stdout
