"""``ddim invert``: the way up is the way down backwards as the steps grow, on the same grid; and what it leaves."""

import json
import math
import os
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ddim_cli.config.layers import merge, table_layer
from ddim_cli.diffusion.betas import make_alpha_bars
from ddim_cli.experiments.invert import reconstruction_error
from ddim_cli.sampling.items import Inversion, Item
from ddim_cli.sampling.loop import Denoiser
from ddim_cli.sampling.resolve import settle
from ddim_cli.sampling.sampler import make_sampler

DIGITS = Path(__file__).parents[1] / "data" / "digits"
SHAPE = (1, 2, 2)
MU, S = 0.3, 0.5


def pixels(path):
    return np.asarray(Image.open(path))


def draw(path, seed=0, size=(8, 8), mode="RGB"):
    """A picture of random colours."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(values[:, :, 0] if channels == 1 else values, mode).save(path)
    return path


@pytest.fixture
def pictures(tmp_path):
    """A folder of five pictures of the tiny model's size."""
    (tmp_path / "pictures").mkdir()
    for i, name in enumerate("abcde"):
        draw(tmp_path / "pictures" / f"{name}.png", i)
    return tmp_path / "pictures"


def command(model, *more, steps=5, out="out"):
    return ("invert", "-m", model, "pictures", "-b", 4, "--steps", steps, "-o", out, *more)


class Gaussian:
    """The best prediction of epsilon for data N(MU, S^2); remembers the timesteps it was asked at."""

    def __init__(self, run):
        self.alpha_bar = make_alpha_bars(run.config.scheduler)
        self.asked = []

    def __call__(self, x, timesteps):
        [t] = set(timesteps.tolist())
        self.asked.append(t)
        a = self.alpha_bar[t].item()
        return math.sqrt(1 - a) * (x - math.sqrt(a) * MU) / (a * S**2 + 1 - a)


def there_and_back(x0, steps, refine=0, **scheduler):
    """(latent, what comes back, alpha_bar of the latent's level, timesteps up, timesteps down, the grid)."""
    values = {"sampling": {"steps": steps, "refine": refine}, "scheduler": {"clip_sample": True, **scheduler}}
    run = settle(merge([table_layer(values, "test")]))
    network = Gaussian(run)
    sampler = make_sampler(run, network, torch.device("cpu"), torch.float32, SHAPE)
    # Clipping is off on the way up whatever the settings say.
    assert (sampler.up.treatment.clip, sampler.down.treatment.clip) == (None, 1.0)
    off = settle(merge([table_layer({**values, "scheduler": {**scheduler, "clip_sample": False}}, "test")]))
    sampler = make_sampler(off, network, torch.device("cpu"), torch.float32, SHAPE)
    network.asked.clear()
    items = [Item(f"{n}.recon", "", Given(picture)) for n, picture in enumerate(x0)]
    pictures = Denoiser(sampler).launch(items, len(items)).collect()
    latent, x = (torch.stack([getattr(p, name) for p in pictures]) for name in ("latent", "x0"))
    asked, steps = network.asked, len(run.timesteps)
    if refine:
        assert all(p.residual > 0 for p in pictures)
        asked = [t for i in range(steps) for t in asked[i * (1 + refine) : i * (1 + refine) + 1]] + asked[-steps:]
    return latent, x, network.alpha_bar[run.timesteps[0]].item(), asked[:steps], asked[steps:], list(run.timesteps)


class Given(Inversion):
    """An inversion of a picture that is given, and not read from a file."""

    def state(self, shape):
        return self.path


def some_data():
    return MU + S * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
def test_latents_and_reconstructions_approach_the_exact_solution_of_the_ode(spacing):
    """For Gaussian data the probability flow keeps quantiles, so its latents are known; both err by about 1/N."""
    x0, counts = some_data(), (10, 50, 250)
    latents, returned = [], []
    for steps in counts:
        latent, x, a, *_ = there_and_back(x0, steps, timestep_spacing=spacing)
        exact = math.sqrt(a) * MU + math.sqrt(a * S**2 + 1 - a) * (x0 - MU) / S
        latents.append((latent - exact).abs().max().item())
        returned.append((x - x0).abs().max().item())
    for errors in (latents, returned):
        assert errors[-1] < 0.02
        for (n, before), (m, after) in pairwise(zip(counts, errors, strict=True)):
            assert after * m == pytest.approx(before * n, rel=0.4), errors


@pytest.mark.parametrize("spacing", ["leading", "trailing", "quadratic"])
def test_as_many_steps_up_as_down_on_the_same_grid(spacing):
    """Each step up asks at the level where it starts; the first of them starts at no noise, and asks at timestep 0."""
    *_, up, down, grid = there_and_back(some_data(), 20, timestep_spacing=spacing)
    assert down == grid
    assert len(up) == len(down)
    assert up == [0, *reversed(grid[1:])]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
def test_refined_steps_are_undone_by_the_steps_down(spacing):
    """In ten steps: each iteration brings what comes back nearer, and ten of them to it, up to float32."""
    x0, errors = some_data(), []
    for refine in (0, 1, 3, 10, 20):
        _, x, _, up, down, grid = there_and_back(x0, 10, refine, timestep_spacing=spacing)
        assert (up, down) == ([0, *reversed(grid[1:])], grid)
        errors.append((x - x0).abs().max().item())
    assert all(after < before / 2 for before, after in pairwise(errors[:4])), errors
    assert errors[-1] < 1e-5, errors


def refined(values, network, x0):
    """The pictures of an inversion with these settings, whose start is ``x0``."""
    run = settle(merge([table_layer(values, "test")]))
    sampler = make_sampler(run, network, torch.device("cpu"), torch.float32, SHAPE)
    return Denoiser(sampler).launch([Item("a.recon", "", Given(x0))], 1).collect()


def test_a_state_that_moves_further_stays_where_it_was():
    """A network so steep that iterations run away: one is taken, as good as any, and what is told is that one's."""

    def steep(x, timesteps):
        return 30 * torch.sin(20 * x)

    scheduler = {"clip_sample": False, "timestep_spacing": "trailing"}
    for refine in (1, 50):
        values = {"sampling": {"steps": 5, "refine": refine}, "scheduler": scheduler}
        [picture] = refined(values, steep, torch.full(SHAPE, 0.3))
        assert picture.latent.isfinite().all()
        assert 0 < picture.residual < 1000


def test_at_a_level_of_no_signal_it_is_x0_that_is_iterated():
    """There x_t is nothing but epsilon, and every x_t would be its own: only what x0 it leads to tells them apart."""
    scheduler = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}

    def network(x, timesteps):
        # x0 = tanh(x) / 2 + 0.1 at alpha_bar 0, where v = -x0, and about that below.
        return -torch.tanh(x) / 2 - 0.1

    errors = []
    for refine in (0, 30):
        values = {"sampling": {"steps": 4, "refine": refine}, "scheduler": {**scheduler, "clip_sample": False}}
        x0 = torch.tensor([[[0.4, -0.2], [0.1, 0.0]]])
        [picture] = refined(values, network, x0)
        errors.append((picture.x0 - x0).abs().max().item())
    assert errors[1] < 1e-4 < errors[0]


def test_diffusers_stride_is_gone_back_by_its_own_levels():
    *_, up, _, grid = there_and_back(some_data(), 7, timestep_spacing="trailing", previous_timestep="diffusers")
    assert up == [max(t, 0) for t in (t - 1000 // 7 for t in reversed(grid))]


def test_the_error_is_a_mean_over_dimensions_of_pictures_in_0_to_1():
    x0 = torch.tensor([[[[-1.0, 1.0]]], [[[0.0, 0.0]]]])
    x = torch.tensor([[[[1.0, 1.0]]], [[[0.5, 1.5]]]])
    errors = [reconstruction_error(*pair) for pair in zip(x0, x, strict=True)]
    assert errors == pytest.approx([0.5, (0.25**2 + 0.75**2) / 2])


def test_against_a_loop_by_hand(ddim, tiny_model, pictures, tmp_path):
    """Equation 13 written out, with diffusers' network: latent, reconstruction and error."""
    from diffusers import UNet2DModel

    found = json.loads(ddim(*command(tiny_model, "--json")).stdout)
    unet = UNet2DModel.from_pretrained(tiny_model, subfolder="unet").eval()
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    grid = [0, 200, 400, 600, 800]
    levels = [1.0, *alpha_bar[grid].tolist()]
    x0 = torch.tensor(pixels(pictures / "c.png")).permute(2, 0, 1)[None] / 127.5 - 1

    def step(x, t, a, b):
        with torch.no_grad():
            eps = unet(x, t).sample
        return math.sqrt(b / a) * x + (math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a)) * eps

    x = x0
    for t, a, b in zip([0, *grid[:-1]], levels[:-1], levels[1:], strict=True):
        x = step(x, t, a, b)
    latent = load_file(tmp_path / "out" / "c.latent.safetensors")["latent"]
    assert latent.dtype == torch.float32
    torch.testing.assert_close(latent, x[0], rtol=1e-4, atol=1e-4)
    for t, a, b in zip(grid[::-1], levels[:0:-1], levels[-2::-1], strict=True):
        x = step(x, t, a, b)
    expected = (x[0] / 2 + 0.5).clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
    assert abs(pixels(tmp_path / "out" / "c.recon.png") - expected).max() <= 1
    error = ((x - x0) / 2).square().mean().item()
    assert found["pictures"][2]["error"] == pytest.approx(error, rel=1e-3)
    assert found["mean_error"] == pytest.approx(np.mean([p["error"] for p in found["pictures"]]))


def error_of(ddim, steps, digits):
    files = [DIGITS / f"{digit}.png" for digit in digits]
    args = ("invert", *files, "--steps", steps, "-o", f"out{steps}", "--device", "cpu", "--json")
    result = ddim(*args)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["mean_error"]


@pytest.mark.slow
def test_the_error_falls_as_the_steps_grow(ddim):
    """The paper's table 2 in shape, of three digits, by the bundled model."""
    errors = [error_of(ddim, steps, (2, 3, 4)) for steps in (10, 20, 50)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[-1]
    assert errors[-1] < 0.008


@pytest.mark.slow
def test_the_error_goes_on_falling(ddim):
    errors = [error_of(ddim, steps, range(4)) for steps in (50, 100, 200)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[-1]


def test_refined_inversions_of_digits_return(ddim, tmp_path):
    """In 20 steps, with three iterations each, to a quarter of the error or less."""
    plain = error_of(ddim, 20, (2, 3))
    result = ddim("invert", DIGITS / "2.png", DIGITS / "3.png", "--steps", 20, "--refine", 3, "-o", "r", "--json")
    found = json.loads(result.stdout)
    assert found["mean_error"] < plain / 4
    for picture in found["pictures"]:
        sidecar = json.loads(Path(picture["reconstruction"]).with_suffix(".json").read_text())
        assert sidecar["inversion"]["residual"] == picture["residual"]
        assert 0 < picture["residual"] < 0.1
        assert sidecar["sampling"]["refine"] == sidecar["config"]["sampling"]["refine"] == 3
    assert "iterations" in ddim("inspect", "r/2.recon.png").stdout
    # Another number of iterations leads to another latent.
    assert ddim("invert", DIGITS / "2.png", "--steps", 20, "--refine", 2, "-o", "r").exit_code == 2


@pytest.mark.parametrize(
    "spacing", ["trailing", *(pytest.param(s, marks=pytest.mark.slow) for s in ("linspace", "logsnr"))]
)
def test_refining_never_harms_in_few_steps(spacing, ddim):
    """Grids that begin where next to nothing is signal, and whose steps are long."""
    for steps in (1, 3):
        errors = []
        for refine in (0, 1, 8):
            args = ("--steps", steps, "--spacing", spacing, "--refine", refine, "-o", f"{steps}-{refine}", "--json")
            found = json.loads(ddim("invert", DIGITS / "3.png", *args).stdout)
            errors.append(found["mean_error"])
            assert refine == 0 or found["pictures"][0]["residual"] > 0
        assert max(errors[1:]) <= errors[0] * 1.5, (steps, errors)


def test_what_is_not_inverted_is_not_refined(ddim, tmp_path):
    """A config that both commands share: the setting is no part of other pictures, nor of their folder's name."""
    (tmp_path / "c.toml").write_text("[sampling]\nrefine = 2\nsteps = 3\n")
    plans = [
        json.loads(ddim("sample", *args, "--dry-run", "--json").stdout) for args in (("-c", "c.toml"), ("--steps", 3))
    ]
    assert plans[0]["folder"] == plans[1]["folder"]
    assert ddim("invert", DIGITS / "3.png", "-c", "c.toml", "-o", "up").exit_code == 0
    assert ddim("sample", "--latents", "up", "-o", "down").exit_code == 0
    assert "refine" not in json.loads((tmp_path / "down" / "3.latent.json").read_text())["sampling"]
    assert json.loads((tmp_path / "up" / "3.recon.json").read_text())["sampling"]["refine"] == 2
    refused = ddim("sweep", "--axis", "refine=0,3")
    assert refused.exit_code == 2
    assert "is for ddim invert" in refused.stderr


@pytest.mark.slow
def test_refined_inversions_in_more_steps_and_with_guidance(ddim):
    plain = error_of(ddim, 50, range(8))
    args = ("invert", DIGITS, "--steps", 50, "--json")
    found = json.loads(ddim(*args, "--refine", 3, "-o", "r").stdout)
    assert found["mean_error"] < plain / 10
    guided = (*args, "-m", "mnist-text", "--prompt", "a seven", "--guidance-scale", 2)
    errors = [json.loads(ddim(*guided, "--refine", k, "-o", f"g{k}").stdout)["mean_error"] for k in (0, 3)]
    assert errors[1] < errors[0] / 10


def test_what_is_said_in_the_end_reads_as_no_failure(ddim, tiny_model, pictures):
    """A line that begins with "error:" is an error."""
    result = ddim(*command(tiny_model))
    assert result.exit_code == 0
    assert re.search(r"^squared difference: a.png +\d+\.\d{6}$", result.stdout, re.M)
    assert "error" not in result.stdout + result.stderr
    (pictures / "f.png").write_bytes((pictures / "a.png").read_bytes())
    quiet = ddim(*command(tiny_model, "-q"))
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_what_lands_on_disk(ddim, tiny_model, pictures, tmp_path):
    result = ddim(*command(tiny_model, "--json"))
    assert "turned off, as a step with it has no inverse: scheduler.clip_sample" in result.stderr
    assert "5 steps up and as many down" in result.stderr
    found = json.loads(result.stdout)
    assert (found["made"], found["present"], found["steps"]) == (5, 0, 5)
    assert found["turned_off"] == ["scheduler.clip_sample"]
    first = found["pictures"][0]
    assert (first["file"], first["latent"]) == ("pictures/a.png", "out/a.latent.safetensors")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    kinds = ("latent.safetensors", "recon.png", "recon.json")
    assert names == {f"{name}.{kind}" for name in "abcde" for kind in kinds} | {"inverted.png"}
    sidecar = json.loads((tmp_path / "out" / "a.recon.json").read_text())
    assert sidecar["seed"] is None
    assert sidecar["scheduler"]["clip_sample"] is False
    assert sidecar["inversion"]["error"] == first["error"]
    inverted = sidecar["sampling"]["inverted"]
    assert (inverted["file"], inverted["conversion"]) == ("a.png", [])
    shown = ddim("inspect", "out/a.recon.png").stdout
    assert "inverted: a.png" in shown
    assert f"error: {first['error']:.6f}" in shown
    assert "again: ddim sample --latents out/a.latent.safetensors" in shown
    told = json.loads(ddim("inspect", "out/a.latent.safetensors", "--json").stdout)
    assert (told["sampling"], told["pixels_unchanged"]) == (sidecar["sampling"], True)
    assert ddim("verify", "out").exit_code == 0
    assert "1 with equal hashes" in ddim("replay", "out/a.recon.png", "--check").stdout


def test_verify_sees_a_latent_that_was_exchanged(ddim, tiny_model, pictures, tmp_path):
    assert ddim(*command(tiny_model)).exit_code == 0
    (tmp_path / "out" / "a.latent.safetensors").write_bytes((tmp_path / "out" / "b.latent.safetensors").read_bytes())
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "c.recon.png")
    result = ddim("verify", "out")
    assert result.exit_code == 3
    assert "out/a.recon.png: its latent a.latent.safetensors is missing, or is not" in result.stdout
    assert "out/c.recon.png: has other pixels than its sidecar says" in result.stdout


def test_the_sheet_shows_original_latent_and_reconstruction(ddim, tiny_model, pictures, tmp_path):
    assert ddim(*command(tiny_model)).exit_code == 0
    sheet = pixels(tmp_path / "out" / "inverted.png")
    assert sheet.shape[1] == 2 * 10 + 5 * (96 + 6) - 6
    top = 10 + 22 + 3 + 20
    for row, path in ((0, pictures / "b.png"), (2, tmp_path / "out" / "b.recon.png")):
        expected = pixels(path).repeat(12, 0).repeat(12, 1)
        y, x = top + row * 102, 10 + 102
        assert np.array_equal(sheet[y : y + 96, x : x + 96], expected), row


def test_the_same_command_goes_on(ddim, tiny_model, pictures, tmp_path):
    out = tmp_path / "out"

    def times():
        return {p.name: p.stat().st_mtime_ns for p in out.iterdir()}

    assert ddim(*command(tiny_model)).exit_code == 0
    before = times()
    again = ddim(*command(tiny_model))
    assert (again.exit_code, "nothing to do" in again.stdout) == (0, True)
    assert times() == before
    # What is half there is made again, and alone; the sheet with it.
    whole = (out / "b.latent.safetensors").read_bytes()
    (out / "b.latent.safetensors").write_bytes(whole[:-4])
    (out / "c.recon.png").unlink()
    found = json.loads(ddim(*command(tiny_model, "--json")).stdout)
    assert (found["made"], found["present"]) == (2, 3)
    assert (out / "b.latent.safetensors").read_bytes() == whole
    changed = {n for n in before if times()[n] != before[n]}
    assert changed == {
        "inverted.png",
        *(f"{n}.{k}" for n in "bc" for k in ("latent.safetensors", "recon.png", "recon.json")),
    }
    # More pictures go into the same folder.
    draw(pictures / "f.png", 9)
    assert json.loads(ddim(*command(tiny_model, "--json")).stdout)["made"] == 1


def test_other_settings_and_other_pictures_are_refused_and_replaced(ddim, tiny_model, pictures):
    assert ddim(*command(tiny_model)).exit_code == 0
    refused = ddim(*command(tiny_model, "--spacing", "trailing"))
    assert refused.exit_code == 2
    assert "out/a.recon.json was made with sampling.timesteps" in refused.stderr
    draw(pictures / "b.png", 77)
    refused = ddim(*command(tiny_model))
    assert refused.exit_code == 2
    assert "pictures/b.png: out/b.recon.png is of another picture; choose another folder" in refused.stderr
    assert json.loads(ddim(*command(tiny_model, "--overwrite", "--json")).stdout)["made"] == 5
    assert ddim("verify", "out").exit_code == 0


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--eta", "0.5"], "sampling.eta = 0.5 (--eta): inversion needs eta 0"),
        (["--set", 'sampling.variance="large"'], "inversion needs eta 0"),
        (["nowhere.png"], "nowhere.png: no such file"),
        (["empty"], "empty: there are no pictures in this folder"),
        (["text.png"], "text.png: cannot be read as a picture"),
        (["pictures/sub/a.jpg"], "would both become a.recon.png"),
        (["--prediction-type", "sample"], "set scheduler.set_alpha_to_one = false"),
        (["--clip-sample"], "No such option"),
        (
            ["--order", "2", "--refine", "1"],
            "sampling.refine is for order 1, and sampling.order = 2: it undoes single steps",
        ),
    ],
)
def test_mistakes_are_told_before_anything_runs(ddim, tiny_model, pictures, tmp_path, args, text):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (pictures / "sub").mkdir()
    draw(pictures / "sub" / "a.jpg")
    result = ddim(*command(tiny_model, *args))
    assert result.exit_code == 2
    assert text in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_clipping_of_a_config_is_turned_off_too(ddim, tiny_model, pictures):
    args = command(tiny_model, "--set", "scheduler.thresholding=true", "--json")
    result = ddim(*args)
    assert json.loads(result.stdout)["turned_off"] == ["scheduler.clip_sample", "scheduler.thresholding"]
    assert "scheduler.thresholding (on by --set)" in result.stderr


def test_a_reconstruction_never_replaces_a_picture_that_is_inverted(ddim, tiny_model, pictures, tmp_path):
    draw(pictures / "a.recon.png", 5)
    result = ddim("invert", "-m", tiny_model, "pictures/a.png", "pictures/a.recon.png", "--steps", 2, "-o", "pictures")
    assert result.exit_code == 2
    assert "pictures/a.recon.png: the reconstruction of pictures/a.png would replace it" in result.stderr
    # Beside its pictures it is welcome; of a folder, what came of it before is left out.
    assert ddim(*command(tiny_model, "--overwrite", out="pictures", steps=2)).exit_code == 0
    assert json.loads(ddim(*command(tiny_model, "--json", out="pictures", steps=2)).stdout)["present"] == 5


def test_the_sheet_never_replaces_a_picture(ddim, tiny_model, pictures):
    draw(pictures / "inverted.png", 5)
    before = (pictures / "inverted.png").read_bytes()
    for given in ("pictures/inverted.png", "pictures/a.png"):
        result = ddim("invert", "-m", tiny_model, given, "--steps", 2, "-o", "pictures")
        assert result.exit_code == 2
        assert "pictures/inverted.png: is no sheet of ddim invert" in result.stderr
        assert (pictures / "inverted.png").read_bytes() == before


def test_a_name_that_is_no_text_is_refused(ddim, tiny_model, pictures):
    odd = os.fsencode(pictures) + b"/\xff.png"
    os.link(pictures / "a.png", odd)
    result = ddim("invert", "-m", tiny_model, "pictures", "--steps", 2, "-o", "out")
    assert result.exit_code == 2
    assert "its name is no UTF-8 text" in result.stderr


def test_the_default_folder(ddim, tiny_model, pictures):
    found = json.loads(ddim("invert", "-m", tiny_model, "pictures/a.png", "--steps", 2, "--json").stdout)
    assert found["folder"].startswith("outputs/tiny-2steps-")
    assert found["folder"].endswith("-invert")


def test_a_class_conditional_network_takes_one_class_for_all(ddim, pictures, tmp_path):
    from diffusers import UNet2DModel

    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, num_class_embeds=5, **blocks
    ).save_pretrained("conditional")
    assert ddim(*command("conditional", "--classes", "4")).exit_code == 0
    sidecar = json.loads((tmp_path / "out" / "a.recon.json").read_text())
    assert (sidecar["sampling"]["classes"], sidecar["sampling"]["class"]) == ("4", 4)
    # The class goes with the latent.
    assert ddim("sample", "--latents", "out", "-b", 4, "-o", "again").exit_code == 0
    assert np.array_equal(pixels(tmp_path / "out" / "e.recon.png"), pixels(tmp_path / "again" / "e.latent.png"))
    refused = ddim(*command("conditional", "--classes", "0-3"))
    assert refused.exit_code == 2
    assert "one class for all; name one" in refused.stderr


def text_command(model, *more, out="out", steps=5):
    plain = ("-b", 4, "--steps", steps, "--no-compile", "-o", out)
    return ("invert", "-m", model, "pictures", "--prompt", "a seven", *plain, *more)


def test_a_latent_model_inverts_what_its_autoencoder_makes_of_a_picture(ddim, tiny_text_model, pictures, tmp_path):
    """By diffusers' own parts: the encoder's mode, times the scale, up the grid and what decodes from it."""
    from diffusers import StableDiffusionPipeline

    draw(pictures / "a.png", 1, (64, 64))
    result = ddim(*text_command(tiny_text_model, "--json"))
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["turned_off"] == ["sampling.guidance_scale"]
    latent = load_file(tmp_path / "out" / "a.latent.safetensors")["latent"]
    assert latent.shape == (4, 32, 32)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_text_model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    picture = torch.from_numpy(pixels(pictures / "a.png").astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        x = pipeline.vae.encode(picture).latent_dist.mode() * pipeline.vae.config.scaling_factor
        text, _ = pipeline.encode_prompt("a seven", "cpu", 1, False)
        alpha_bar = pipeline.scheduler.alphas_cumprod
        grid = [1, 201, 401, 601, 801]
        for lower, t in zip([None, *grid], grid, strict=False):
            # A step up asks the network at the level at which it starts.
            a = alpha_bar[0] if lower is None else alpha_bar[lower]
            epsilon = pipeline.unet(x, 0 if lower is None else lower, encoder_hidden_states=text).sample
            x0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
            x = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * epsilon
        # Five steps of float32, each with some hundred roundings of 6e-8.
        assert (latent - x[0]).abs().max() <= 1e-4 * x.abs().max()
        more = {"num_inference_steps": 5, "guidance_scale": 1.0, "output_type": "latent"}
        back = pipeline("a seven", latents=latent[None], **more).images / pipeline.vae.config.scaling_factor
        decoded = pipeline.vae.decode(back).sample
    # Of pictures, neither clipped nor rounded.
    [facts] = [p for p in told["pictures"] if p["file"].endswith("a.png")]
    assert facts["error"] == pytest.approx(((decoded - picture) / 2).square().mean().item(), rel=1e-3)


def test_guidance_of_an_inversion(ddim, tiny_text_model, pictures, tmp_path):
    usual = ddim(*text_command(tiny_text_model, steps=2))
    assert "turned off, as inversion with guidance drifts: sampling.guidance_scale" in usual.stderr
    sidecar = json.loads((tmp_path / "out" / "a.recon.json").read_text())
    assert "guidance_scale" not in sidecar["sampling"]
    assert sidecar["sampling"]["prompt"] == "a seven"
    asked = ddim(*text_command(tiny_text_model, "--guidance-scale", 3, out="guided", steps=2))
    assert (asked.exit_code, "turned off" in asked.stderr) == (0, False)
    assert "warning: inversion with guidance drifts" in asked.stderr
    sidecar = json.loads((tmp_path / "guided" / "a.recon.json").read_text())
    assert sidecar["sampling"]["guidance_scale"] == 3
    several = ddim(*text_command(tiny_text_model, "--prompt", "a two"))
    assert (several.exit_code, "--prompt names 'a seven' and 'a two'" in several.stderr) == (2, True)


def test_latents_of_a_latent_model_are_sampled_with_a_prompt(ddim, tiny_text_model, pictures, tmp_path):
    assert ddim(*text_command(tiny_text_model)).exit_code == 0
    plain = ("--no-compile", "-b", 4)
    assert ddim("sample", "--latents", "out", *plain, "-o", "same").exit_code == 0
    for name in "abcde":
        again, before = tmp_path / "same" / f"{name}.latent.png", tmp_path / "out" / f"{name}.recon.png"
        assert np.array_equal(pixels(again), pixels(before))
    other = ddim("sample", "--latents", "out", "--prompt", "a two", *plain, "-o", "other")
    assert "was made with sampling.prompt = a seven, and is sampled with a two" in other.stderr
    assert not np.array_equal(pixels(tmp_path / "other/a.latent.png"), pixels(tmp_path / "same/a.latent.png"))
    assert "3 x 64 x 64" not in ddim("sample", "--latents", "out", "-m", tiny_text_model, "--dry-run").stderr
    checked = ddim("replay", "out/a.recon.json", "other/a.latent.json", "--check", "--latents", "out")
    assert "2 with equal hashes" in checked.stdout


def test_latents_of_a_latent_model_are_drawn_as_colours(ddim, tiny_text_model, pictures, tmp_path):
    assert ddim(*text_command(tiny_text_model)).exit_code == 0
    sheet = pixels(tmp_path / "out" / "inverted.png")
    # A caption, names, then pictures of 64 pixels doubled, six pixels apart; latents are in the second of three rows.
    top = 10 + 22 + 3 + 20 + 128 + 6
    drawn = sheet[top : top + 128, 10 : 10 + 128]
    latent = load_file(tmp_path / "out" / "a.latent.safetensors")["latent"][:3]
    expected = ((latent / 3 / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(drawn, expected.repeat(4, 0).repeat(4, 1))


def test_a_latent_of_another_shape(ddim, tiny_text_model, tmp_path):
    """That of the pictures is not that of the states."""
    save_file({"latent": torch.zeros(3, 64, 64)}, tmp_path / "mine.safetensors")
    refused = ddim("sample", "-m", tiny_text_model, "--prompt", "a", "--latents", "mine.safetensors")
    assert refused.exit_code == 2
    assert "its latents are 3 x 64 x 64 (C x H x W), and tiny-text takes 4 x 32 x 32" in refused.stderr
