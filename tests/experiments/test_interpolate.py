"""``ddim interpolate``: its ends are sample's own pictures, its noises lie on the arc, and it goes on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_cli.diffusion.slerp import slerp
from ddim_cli.experiments.between import Between
from ddim_cli.experiments.interpolate import animation_order, strip_rows

SHAPE = (3, 8, 8)


def noise(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def pixels(path):
    return np.asarray(Image.open(path))


def command(model, *more, between="3,8", steps=5):
    return ("interpolate", "-m", model, "--between", between, "-b", 4, "--steps", steps, "-o", "out", *more)


def test_the_ends_begin_at_the_seeds_own_noise():
    for plan in (Between.parse("3,8,5", 4), Between.parse("1,2,3,4", 3, square=True)):
        for frame, item in zip(plan.frames(), plan.items(None), strict=True):
            state = item.start.state(SHAPE)
            assert state.shape == SHAPE
            if frame.seed is not None:
                assert torch.equal(state, noise(frame.seed))


def test_a_square_is_interpolated_to_the_right_and_then_down():
    across, down = 1 / 3, 2 / 3
    start = Between.parse("1,2,3,4", 4, square=True).items(None)[2 * 4 + 1].start
    assert start.weights == (across, down)
    expected = slerp(slerp(noise(1), noise(2), across), slerp(noise(3), noise(4), across), down)
    assert torch.equal(start.state(SHAPE), expected)


@pytest.mark.parametrize(("between", "more"), [("3,8", []), ("3,8,5", []), ("1,2,3,4", ["--square"])])
def test_at_the_seeds_frames_are_the_pictures_of_sample(ddim, tiny_model, tmp_path, between, more):
    result = ddim(*command(tiny_model, "--frames", 3, *more, between=between))
    assert result.exit_code == 0, result.stderr
    sample = ddim("sample", "-m", tiny_model, "--seeds", between, "-b", 4, "--steps", 5, "-o", "pictures")
    assert sample.exit_code == 0
    seeds = {
        n: frame.seed
        for n, frame in enumerate(Between.parse(between, 3, bool(more)).frames())
        if frame.seed is not None
    }
    assert set(seeds.values()) == set(map(int, between.split(",")))
    for n, seed in seeds.items():
        own = pixels(tmp_path / "pictures" / f"{seed:06d}.png")
        assert np.array_equal(pixels(tmp_path / "out" / f"frame_{n:03d}.png"), own), (n, seed)


def test_a_frame_between_is_the_noise_on_the_arc_denoised(ddim, tiny_model, tmp_path):
    """By diffusers' own network and pipeline, from noise that is interpolated here by hand."""
    from diffusers import DDIMScheduler, UNet2DModel

    assert ddim(*command(tiny_model, "--frames", 5)).exit_code == 0
    a, b = noise(3).double(), noise(8).double()
    theta = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    x = ((torch.sin(0.75 * theta) * a + torch.sin(0.25 * theta) * b) / torch.sin(theta)).float()[None]
    unet = UNet2DModel.from_pretrained(tiny_model, subfolder="unet").eval()
    scheduler = DDIMScheduler.from_pretrained(tiny_model, subfolder="scheduler")
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, eta=0.0).prev_sample
    expected = (x[0] / 2 + 0.5).clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
    assert abs(pixels(tmp_path / "out" / "frame_001.png") - expected).max() <= 1


def test_what_a_frame_says_of_itself(ddim, tiny_model, tmp_path):
    found = json.loads(ddim(*command(tiny_model, "--json")).stdout)
    assert (found["shape"], found["seeds"], found["frames"], found["made"]) == ("path", [3, 8], 11, 11)
    assert found["files"] == [f"out/frame_{n:03d}.png" for n in range(11)]
    assert found["animation"] is None
    sidecar = json.loads((tmp_path / "out" / "frame_003.json").read_text())
    assert sidecar["seed"] is None
    assert sidecar["sampling"]["between"] == {"seeds": [3, 8], "weight": 0.3}
    assert sidecar["image"]["file"] == "frame_003.png"
    assert sidecar["runtime"]["batch_size"] == 4
    shown = ddim("inspect", "out/frame_003.png")
    assert "between: the noises of seeds 3, 8, at 0.3" in shown.stdout
    assert "pixels: as they were made" in shown.stdout


def test_the_strip_and_the_animation(ddim, tiny_model, tmp_path):
    assert ddim(*command(tiny_model, "--frames", 4, "--gif")).exit_code == 0
    strip = pixels(tmp_path / "out" / "strip.png")
    last = pixels(tmp_path / "out" / "frame_003.png").repeat(12, 0).repeat(12, 1)
    top = 10 + 22 + 3
    assert strip.shape[1] == 2 * 10 + 4 * 96 + 3 * 6
    assert np.array_equal(strip[top : top + 96, -106:-10], last)
    with Image.open(tmp_path / "out" / "strip.gif") as animation:
        # There and back; the seeds' own pictures stay for longer.
        assert animation.n_frames == 6
        waits = []
        for n in range(6):
            animation.seek(n)
            waits.append(animation.info["duration"])
    assert waits == [900, 120, 120, 900, 120, 120]


def test_rows_and_the_order_of_the_animation():
    def rows(plan):
        return [(list(row.images), list(row.labels), row.above) for row in strip_rows(plan, range(len(plan)))]

    assert rows(Between.parse("3,8,5", 3)) == [
        ([0, 1, 2], ["seed 3", "0.5", "seed 8"], False),
        ([2, 3, 4], ["seed 8", "0.5", "seed 5"], False),
    ]
    assert [len(images) for images, *_ in rows(Between.parse("3,8", 20))] == [10, 10]
    square = Between.parse("1,2,3,4", 3, square=True)
    assert rows(square) == [
        ([0, 1, 2], ["seed 1", "", "seed 2"], True),
        ([3, 4, 5], [], False),
        ([6, 7, 8], ["seed 3", "", "seed 4"], False),
    ]
    assert animation_order(square) == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert animation_order(Between.parse("3,8", 3)) == [0, 1, 2, 1]
    assert animation_order(Between.parse("3,8,3", 2)) == [0, 1], "a closed path goes round"


def test_the_same_command_goes_on(ddim, tiny_model, tmp_path):
    out = tmp_path / "out"

    def times():
        return {p.name: p.stat().st_mtime_ns for p in out.iterdir()}

    assert ddim(*command(tiny_model)).exit_code == 0
    before = times()
    again = ddim(*command(tiny_model))
    assert (again.exit_code, "nothing to do" in again.stdout) == (0, True)
    assert times() == before
    # A frame that is half there is made again, and alone; the strip with it.
    whole = (out / "frame_004.png").read_bytes()
    (out / "frame_004.png").write_bytes(whole[:50])
    found = json.loads(ddim(*command(tiny_model, "--json")).stdout)
    assert (found["made"], found["present"]) == (1, 10)
    assert (out / "frame_004.png").read_bytes() == whole
    assert {n for n in before if times()[n] != before[n]} == {"frame_004.png", "frame_004.json", "strip.png"}
    # Only what is missing beside the frames.
    (out / "strip.png").unlink()
    assert json.loads(ddim(*command(tiny_model, "--gif", "--json")).stdout)["made"] == 0
    assert (out / "strip.png").exists()
    assert (out / "strip.gif").exists()
    # A longer path goes on from the shorter one, and strip and animation show it.
    assert json.loads(ddim(*command(tiny_model, "--json", between="3,8,5")).stdout)["made"] == 10
    assert Image.open(out / "strip.gif").n_frames == 40


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--frames", 6], "was made with sampling.between = "),
        (["--clip-sample", "--set", "scheduler.clip_sample_range=0.5"], "scheduler.clip_sample_range = 1.0"),
        (["--frames", 3, "--set", "sampling.steps=4"], "this run has"),
    ],
)
def test_a_folder_of_other_frames_is_refused_and_replaced(ddim, tiny_model, tmp_path, more, text):
    assert ddim(*command(tiny_model)).exit_code == 0
    (tmp_path / "out" / "frame_099.json").write_text("{}")
    refused = ddim(*command(tiny_model, *more))
    assert refused.exit_code == 2
    assert text in refused.stderr
    assert ddim(*command(tiny_model, *more, "--overwrite")).exit_code == 0
    left = {p.name for p in (tmp_path / "out").glob("frame_*.png")}
    assert len(left) == (more[1] if more[0] == "--frames" else 11)
    assert (tmp_path / "out" / "frame_099.json").exists(), "what is not ours stays"


def test_a_shorter_one_does_not_leave_the_longer_ones_rest(ddim, tiny_model):
    assert ddim(*command(tiny_model, between="3,8,5")).exit_code == 0
    refused = ddim(*command(tiny_model))
    assert refused.exit_code == 2
    assert "out/frame_011.json is of a longer interpolation than these 11 frames" in refused.stderr


def test_frames_in_a_folder_of_pictures_are_no_problem(ddim, tiny_model):
    assert ddim("sample", "-m", tiny_model, "-n", 3, "--steps", 5, "-o", "out").exit_code == 0
    assert ddim(*command(tiny_model)).exit_code == 0
    assert ddim("verify", "out").exit_code == 0


def test_the_default_folder_names_the_seeds(ddim, tiny_model):
    args = ("interpolate", "-m", tiny_model, "--between", "3,8", "--frames", 2, "--steps", 2, "--json")
    found = json.loads(ddim(*args).stdout)
    assert found["folder"].startswith("outputs/tiny-2steps-")
    assert found["folder"].endswith("-between-3-8-frames2")


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (["--eta", "0.5"], ["sampling.eta = 0.5 (--eta): interpolation needs eta 0", "fresh noise"]),
        (["--set", 'sampling.variance="large"'], ["sampling.variance", "implies eta 1", "interpolation needs eta 0"]),
        (["--between", "3"], ["name at least two seeds"]),
        (["--frames", "1"], ["at least 2"]),
        (["--square"], ["four different seeds"]),
    ],
)
def test_mistakes_are_told_before_anything_runs(ddim, tiny_model, tmp_path, args, texts):
    result = ddim(*command(tiny_model, *args))
    assert result.exit_code == 2
    assert all(text in result.stderr for text in texts), result.stderr
    assert not (tmp_path / "out").exists()


def test_seeds_of_several_classes_have_none_between_them():
    from ddim_cli.config.layers import merge, table_layer
    from ddim_cli.errors import UsageError
    from ddim_cli.sampling.items import Choices

    def config(classes):
        return merge([table_layer({"sampling": {"classes": classes}}, "test")]).config

    assert Choices.of(config("7")).of_all((3, 8)).class_number == 7
    assert Choices.of(config("0-4")).of_all((3, 8)).class_number == 3
    with pytest.raises(UsageError, match="the seeds 3 and 8 have the classes 3 and 8, and there is none between"):
        Choices.of(config("0-9")).of_all((3, 8))


def test_all_frames_take_the_one_class(ddim, tmp_path):
    from diffusers import UNet2DModel

    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, num_class_embeds=5, **blocks
    ).save_pretrained("conditional")
    assert ddim(*command("conditional", "--classes", "4", "--frames", 3)).exit_code == 0
    sidecar = json.loads((tmp_path / "out" / "frame_001.json").read_text())
    assert (sidecar["sampling"]["classes"], sidecar["sampling"]["class"]) == ("4", 4)
    sample = ("sample", "-m", "conditional", "--seeds", "8", "-b", 4, "--steps", 5, "--classes", "4", "-o", "pictures")
    assert ddim(*sample).exit_code == 0
    assert np.array_equal(pixels(tmp_path / "out/frame_002.png"), pixels(tmp_path / "pictures/000008.png"))
    refused = ddim(*command("conditional", "--classes", "0-3"))
    assert refused.exit_code == 2
    assert "there is none between them; name one class" in refused.stderr


def test_between_is_needed(ddim):
    assert ddim("interpolate").exit_code == 2


def prompts(model, *more, steps=5):
    plain = ("-b", 4, "--steps", steps, "--frames", 5, "--no-compile", "-o", "out")
    return ("interpolate", "-m", model, "--prompt", "a thin one", "--to-prompt", "a bold seven", *plain, *more)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_at_the_prompts_frames_are_the_pictures_of_sample(ddim, tiny_text_model, tmp_path, eta):
    more = ("--eta", eta, "--negative-prompt", "thick")
    result = ddim(*prompts(tiny_text_model, "--seed", 3, *more))
    assert result.exit_code == 0, result.stderr
    for frame, prompt in ((0, "a thin one"), (4, "a bold seven")):
        command = ("sample", "-m", tiny_text_model, "--prompt", prompt, "--seeds", "3,5,6,7", "-b", 4, "--steps", 5)
        assert ddim(*command, *more, "--no-compile", "-o", prompt).exit_code == 0
        own = pixels(tmp_path / prompt / "000003.png")
        assert np.array_equal(pixels(tmp_path / "out" / f"frame_{frame:03d}.png"), own)


def test_a_frame_between_prompts_is_of_the_embedding_between(ddim, tiny_text_model, tmp_path):
    """By diffusers' own pipeline, from embeddings that are interpolated here by hand."""
    from diffusers import StableDiffusionPipeline

    assert ddim(*prompts(tiny_text_model, "--seed", 3)).exit_code == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_text_model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        embeddings = [pipeline.encode_prompt(p, "cpu", 1, True) for p in ("a thin one", "a bold seven")]
    [(first, empty), (second, _)] = embeddings
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    made = pipeline(
        prompt_embeds=0.75 * first + 0.25 * second,
        negative_prompt_embeds=empty,
        latents=latents,
        num_inference_steps=5,
        guidance_scale=7.5,
        output_type="np",
    ).images[0]
    assert abs(pixels(tmp_path / "out" / "frame_001.png") - (made * 255).round()).max() <= 1


def test_what_a_frame_between_prompts_says(ddim, tiny_text_model, tmp_path):
    told = json.loads(ddim(*prompts(tiny_text_model, "--seed", 3, "--json", "--gif")).stdout)
    assert told["prompts"] == ["a thin one", "a bold seven"]
    assert (told["shape"], told["seed"], told["frames"], told["made"]) == ("prompts", 3, 5, 5)
    assert (tmp_path / "out" / "strip.gif").exists()
    sidecar = json.loads((tmp_path / "out" / "frame_001.json").read_text())
    assert sidecar["seed"] == 3
    assert sidecar["sampling"]["between_prompts"] == {"prompts": ["a thin one", "a bold seven"], "weight": 0.25}
    assert "prompt" not in sidecar["sampling"]
    checked = ddim("replay", *(f"out/frame_00{n}.json" for n in range(5)), "--check")
    assert "5 with equal hashes" in checked.stdout
    assert ddim("verify", "out").exit_code == 0
    # Another seed, or another prompt, is of another folder.
    assert "frame_000.json was made with" not in ddim(*prompts(tiny_text_model, "--seed", 3)).stderr
    other = ddim(*prompts(tiny_text_model, "--seed", 3, "--to-prompt", "a third"))
    assert (other.exit_code, "sampling.prompts" in other.stderr) == (2, True)


def test_another_seed_is_not_taken_for_the_frames_that_are_there(ddim, tiny_text_model):
    assert ddim(*prompts(tiny_text_model, "--seed", 3)).exit_code == 0
    other = ddim(*prompts(tiny_text_model, "--seed", 4))
    assert (other.exit_code, "seed 3" in other.stderr) == (2, True), other.stderr


def test_seeds_with_one_prompt(ddim, tiny_text_model, tmp_path):
    model = ("-m", tiny_text_model, "--prompt", "seven", "--steps", 3, "-b", 4, "--no-compile")
    assert ddim("interpolate", *model, "--between", "3,8", "--frames", 3, "-o", "out").exit_code == 0
    assert ddim("sample", *model, "--seeds", "3,8,9,10", "-o", "own").exit_code == 0
    for frame, seed in ((0, 3), (2, 8)):
        own = pixels(tmp_path / "own" / f"{seed:06d}.png")
        assert np.array_equal(pixels(tmp_path / "out" / f"frame_{frame:03d}.png"), own)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "say between what: seeds, --between 3,8; pictures, --between a.png,b.png; or prompts"),
        (("--between", "3,8", "--prompt", "a", "--to-prompt", "b"), "keep one"),
        (("--between", "3,8", "--seed", 4), "--seed is for frames between prompts"),
        (("--to-prompt", "b"), "needs the one prompt to begin with, as --prompt, and none is given"),
        (("--prompt", "a", "--prompt", "c", "--to-prompt", "b"), "and 2 are given"),
        (("--prompt", "a", "--to-prompt", "a"), "from a prompt to itself there is nothing to see"),
        (("--prompt", "a", "--to-prompt", "b", "--square"), "--square is of four seeds"),
        (("--prompt", "a", "--to-prompt", "b", "--frames", 1), "it takes at least 2"),
        (("--prompt", "a", "--to-prompt", "b", "--frames", 10_001), "10,000 is the most"),
        (("--prompt", "a", "--to-prompt", "b", "--seed", -1), "--seed: sampling.seed = -1 is not allowed"),
        (("--prompt", "a", "--to-prompt", "b"), "is for text-to-image models"),
    ],
)
def test_what_makes_no_way_between_prompts(ddim, args, message):
    refused = ddim("interpolate", *args)
    assert refused.exit_code == 2
    assert message in refused.stderr


def test_between_prompts_from_python(tiny_text_model, tmp_path):
    from ddim_cli.errors import UsageError
    from ddim_cli.experiments.interpolate import interpolate

    config = {"sampling": {"steps": 2, "seed": 7}, "runtime": {"compile": False}}
    found = interpolate(prompts=("a", "b", "c"), frames=3, config=config, model=tiny_text_model, out=tmp_path / "out")
    assert [frame.name for frame in found.frames] == [f"frame_{n:03d}.png" for n in range(5)]
    sidecars = [json.loads(frame.with_suffix(".json").read_text()) for frame in found.frames]
    assert {sidecar["seed"] for sidecar in sidecars} == {7}
    between = [sidecar["sampling"]["between_prompts"] for sidecar in sidecars]
    assert [(b["prompts"], b["weight"]) for b in between] == [
        (["a", "b"], 0.0), (["a", "b"], 0.5), (["a", "b"], 1.0), (["b", "c"], 0.5), (["b", "c"], 1.0),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="at least two prompts"):
        interpolate(prompts=("a",), config=config, model=tiny_text_model)
