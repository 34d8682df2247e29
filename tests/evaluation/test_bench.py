import contextlib
import io
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddim_cli.config.layers import table_layer
from ddim_cli.config.schema import ModelSettings
from ddim_cli.errors import RunError, UsageError
from ddim_cli.evaluation import architectures, random_weights, text_architectures
from ddim_cli.evaluation import bench as bench_module
from ddim_cli.evaluation.architectures import NAMES, describe_architecture
from ddim_cli.evaluation.baselines import (
    DiffusersLoop,
    describe_baseline,
    make_baseline,
    pipeline_name,
    step_note,
)
from ddim_cli.evaluation.bench import Bench, Benchmark, Ours, largest_difference, psnr, ratio, speeds
from ddim_cli.evaluation.gauges import NetworkClock, PeakMemory, matrix_peak, network_alone, seconds_on_cuda, spread
from ddim_cli.models.inspect import flops
from ddim_cli.models.load import build_network, load_described
from ddim_cli.sampling.items import SeedItems, seed_item
from ddim_cli.sampling.job import make_job
from ddim_cli.sampling.loop import Denoiser, Picture
from ddim_cli.sampling.network import Networks
from ddim_cli.sampling.resolve import resolve

CPU = torch.device("cpu")


def run_of(model, batch_size=3, scheduler=None, **sampling):
    settings = {"steps": 4, "batch_size": batch_size, "num_images": batch_size, **sampling}
    table = {"model": {"source": str(model)}, "sampling": settings, "runtime": {"device": "cpu", "dtype": "float32"}}
    table["scheduler"] = scheduler or {}
    return resolve([table_layer(table, "test")])


@pytest.mark.parametrize(
    ("name", "millions"), [("cifar10", 35.746307), ("celeba64", 78.700803), ("lsun256", 113.673219)]
)
def test_architectures_have_the_published_sizes(name, millions, tmp_path):
    model = describe_architecture(name, tmp_path)
    assert sum(p.numel() for p in build_network(model).parameters()) == round(millions * 1e6)
    assert list(tmp_path.iterdir()) == [], "weights are drawn when they are asked for"


def test_the_cost_of_the_cifar10_network(tmp_path):
    # 12.1 of convolutions and projections, and of each of five attention layers 4 x 256 positions^2 x 256 channels.
    assert flops(describe_architecture("cifar10", tmp_path)) == pytest.approx(12.1e9 + 5 * 4 * 256**3, rel=0.005)


def test_random_weights_are_the_same_every_time(tmp_path):
    state = torch.get_rng_state()
    models = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        models.append(describe_architecture("mnist", folder))
    first, again = (load_described(model).network.state_dict() for model in models)
    assert torch.equal(state, torch.get_rng_state()), "nobody else's random numbers change"
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert models[0].sha256 == models[1].sha256 != describe_architecture("cifar10", tmp_path).sha256


def test_spread():
    found = spread([3.0, 1.0, 2.0, 10.0, 4.0])
    assert (found["median"], found["min"], found["max"], found["quartiles"]) == (3, 1, 10, [2, 4])
    assert found["all"] == [3, 1, 2, 10, 4]
    assert spread([5.0])["quartiles"] == [5, 5]


def test_speeds_are_consistent():
    found = speeds([2.0, 4.0, 3.0], images=6, steps=5)
    assert found["seconds"]["median"] == 3
    assert found["images_per_second"]["all"] == [3, 1.5, 2]
    assert found["ms_per_image_and_step"]["median"] * 6 * 5 / 1000 == pytest.approx(3)


def test_a_ratio_is_of_rounds_that_belong_together():
    # Each round was three times as slow as the one before, for both: the ratio does not see it.
    assert ratio([1.0, 3.0, 9.0], [2.0, 6.0, 18.0])["all"] == [2, 2, 2]
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_psnr():
    def picture(value):
        return Picture(seed_item(0), np.zeros((2, 2, 1), np.uint8), torch.full((1, 2, 2), value), None, 0.0, 1)

    # 0.2 of [-1, 1] is 0.1 of [0, 1]: 20 dB.
    assert psnr([picture(0.2)], [picture(0.0)]) == pytest.approx([20.0])
    assert psnr([picture(7.0)], [picture(1.0)]) == [200.0], "what no picture shows does not count"


def test_largest_difference():
    a, b = np.array([[[250]]], np.uint8), np.array([[[5]]], np.uint8)
    assert largest_difference([a, b], [b, b]) == 245


def test_the_clock_counts_the_network_alone(monkeypatch):
    now = itertools.count(step=2.0)
    monkeypatch.setattr("ddim_cli.evaluation.gauges.time.perf_counter", lambda: next(now))

    def network(x):
        return x + 1

    clock = NetworkClock(network)
    assert [clock(1), clock(2)] == [2, 3]
    assert clock.seconds == 4


def test_peak_memory_sees_an_allocation():
    gauge = PeakMemory(CPU)
    before = gauge.read()
    held = torch.ones(50_000_000, dtype=torch.uint8)
    assert gauge.read() - before > 40e6
    assert "resident" in gauge.meaning
    del held
    if "since" not in gauge.meaning:
        assert PeakMemory(CPU).read() < before + 40e6, "a new gauge starts anew"


def test_matrix_peak_is_a_speed(monkeypatch):
    monkeypatch.setattr("ddim_cli.evaluation.gauges.MATRIX_SIDE", {"cpu": 128})
    assert 1e6 < matrix_peak(CPU, torch.float32, seconds=0.01) < 1e15


def test_the_peak_of_an_emulated_dtype_is_that_of_float32(monkeypatch):
    """Torch's own product in such a dtype is a plain loop, slower than any network: no peak."""
    from ddim_cli.evaluation import gauges

    made = []
    randn = torch.randn
    monkeypatch.setattr(gauges, "MATRIX_SIDE", {"cpu": 32})
    monkeypatch.setattr(gauges, "is_emulated", lambda device, dtype: dtype == torch.float16)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: Remembered(randn(*shape, **options), made))
    for dtype in (torch.float16, torch.bfloat16):
        matrix_peak(CPU, dtype, seconds=0.0)
    assert made == [torch.float32] * 2 + [torch.bfloat16] * 2


class Remembered:
    """A tensor that notes which dtype is asked of it."""

    def __init__(self, tensor, made):
        self._tensor, self._made = tensor, made

    def to(self, dtype):
        self._made.append(dtype)
        return self._tensor.to(dtype)


def test_float16_on_a_cpu_without_it_warns(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("ddim_cli.evaluation.gauges.MATRIX_SIDE", {"cpu": 64})
    for name in ("ddim_cli.evaluation.gauges.is_emulated", "ddim_cli.evaluation.bench.is_emulated"):
        monkeypatch.setattr(name, lambda device, dtype: dtype == torch.float16)
    warnings = []
    run = run_of(tiny_model)
    runtime = run.config.runtime.model_copy(update={"dtype": "float16"})
    run = replace(run, resolved=replace(run.resolved, config=run.config.model_copy(update={"runtime": runtime})))
    found = Bench(Benchmark(run, (1,), tmp_path, repeats=1, psnr_images=0), warn=warnings.append).measure()
    assert len(warnings) == 1
    assert "float16, and emulates it" in warnings[0]
    assert found["machine"]["emulated"] is True


def pictures_of(contestant, seeds, batch_size, folder=None):
    return [picture for batch in contestant.batches(seeds, batch_size, folder) for picture in batch]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["diffusers", "diffusers+"])
def test_all_contestants_make_the_same_pictures(name, eta, tiny_model, tmp_path, monkeypatch):
    # Compiling takes a minute, and what is compiled is the same network.
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    run = run_of(tiny_model, eta=eta, seed=5)
    ours_folder, theirs_folder = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours_folder, theirs_folder):
        folder.mkdir()
    ours = pictures_of(Ours(make_job(run)), range(5, 11), 3, ours_folder)
    other = make_baseline(name, run, CPU, torch.float32)
    theirs = pictures_of(other, range(5, 11), 3, theirs_folder)
    other.close()
    assert len(ours) == len(theirs) == 6
    assert largest_difference(ours, theirs) <= 1
    assert largest_difference(ours[:1], ours[1:2]) > 1, "they are pictures of different seeds"
    names = sorted(p.name for p in theirs_folder.iterdir())
    assert names == sorted(p.name for p in ours_folder.glob("*.png")) == [f"{s:06d}.png" for s in range(5, 11)]
    assert len(list(ours_folder.glob("*.json"))) == 6
    for seed, mine, his in zip(range(5, 11), ours, theirs, strict=True):
        for folder, pixels in ((ours_folder, mine), (theirs_folder, his)):
            assert np.array_equal(np.asarray(Image.open(folder / f"{seed:06d}.png")), pixels)


@pytest.mark.parametrize(("eta", "order"), [(0.0, 2), (1.0, 2)])
@pytest.mark.parametrize("name", ["diffusers", "diffusers+"])
def test_contestants_of_order_2_make_the_same_pictures(name, eta, order, tiny_model, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    run = run_of(tiny_model, eta=eta, order=order, scheduler={"clip_sample": False, "timestep_spacing": "trailing"})
    ours = pictures_of(Ours(make_job(run)), range(5, 11), 3)
    theirs = pictures_of(make_baseline(name, run, CPU, torch.float32), range(5, 11), 3)
    assert largest_difference(ours, theirs) <= 1
    of_order_1 = run_of(tiny_model, eta=eta, scheduler={"clip_sample": False, "timestep_spacing": "trailing"})
    assert largest_difference(pictures_of(Ours(make_job(of_order_1)), range(5, 11), 3), theirs) > 1
    assert step_note(run) is None
    assert "DPMSolverMultistepScheduler" in describe_baseline("diffusers", torch.float32, order=order)


@pytest.mark.parametrize(
    ("scheduler", "sampling", "says"),
    [
        ({"clip_sample": True}, {}, "does not clip x0, as ours does not with --no-clip-sample"),
        ({}, {"order": 3}, "weights the second difference of order 3 by half"),
        ({"timestep_spacing": "leading"}, {"steps": 10}, "takes no step of lower order where one is long"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {}, "at an alpha_bar of 2^-24"),
    ],
)
def test_what_diffusers_does_otherwise_of_order_2_is_told(scheduler, sampling, says, tiny_model):
    keys = {"clip_sample": False, "timestep_spacing": "trailing", **scheduler}
    assert says in step_note(run_of(tiny_model, scheduler=keys, **{"order": 2, **sampling}))


def test_the_baseline_in_bfloat16_is_the_pipeline_step_by_step(tiny_model, tmp_path):
    """DDIMPipeline cannot make pictures in bfloat16; what takes its place makes the same ones where both can."""
    run = run_of(tiny_model, eta=0.5)
    pipeline = make_baseline("diffusers", run, CPU, torch.float32)
    expected = pictures_of(pipeline, range(3), 3)
    pipeline.close()
    assert largest_difference(pictures_of(DiffusersLoop(run, CPU, torch.float32), range(3), 3), expected) <= 1
    found = pictures_of(make_baseline("diffusers", run, CPU, torch.bfloat16), range(3), 2, tmp_path)
    assert [p.shape for p in found] == [(8, 8, 3)] * 3
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert "DDIMPipeline as" in describe_baseline("diffusers", torch.float32)
    assert "loop over UNet and scheduler" in describe_baseline("diffusers", torch.bfloat16)


@pytest.mark.parametrize(
    ("spacing", "steps", "differs"),
    [("leading", 3, False), ("trailing", 10, False), ("trailing", 3, True), ("linspace", 10, True)],
)
def test_the_stride_of_diffusers_is_told(spacing, steps, differs, tiny_model):
    for stride in ("grid", "diffusers"):
        table = {
            "model": {"source": str(tiny_model)},
            "sampling": {"steps": steps},
            "scheduler": {"timestep_spacing": spacing, "previous_timestep": stride},
        }
        note = step_note(resolve([table_layer(table, "test")]))
        assert (note is not None) == (differs and stride == "grid")
        if note is not None:
            assert f"from t to t - {1000 // steps}, " in note


def test_diffusers_gets_the_same_weights_by_a_way_of_its_own(tiny_model):
    run = run_of(tiny_model)
    unet = make_baseline("diffusers", run, CPU, torch.float32)._pipeline.unet
    ours = load_described(run.model).network.state_dict()
    assert type(unet).__module__.startswith("diffusers.")
    for name, tensor in unet.state_dict().items():
        if name in ours:
            assert torch.equal(tensor, ours[name])


def test_the_network_alone_takes_as_many_calls_as_there_are_steps(tiny_model):
    calls = []

    def network(x, timesteps, *condition):
        calls.append((x.shape, timesteps.shape))
        return x

    sampler = bench_module.make_sampler(run_of(tiny_model), network, CPU, torch.float32, (3, 8, 8))
    assert network_alone(sampler, SeedItems((0, 1)), 3) > 0
    assert len(calls) == 4 + 1
    assert set(calls) == {((3, 3, 8, 8), (3,))}


class FakeGraph:
    """Remembers what was called while it captured, as CUDA graphs do."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.mark.parametrize("capturable", [True, False])
def test_on_cuda_the_network_is_replayed_or_else_called(capturable, monkeypatch):
    """The CUDA path without a GPU: its order of calls."""
    graph, calls, capturing, recorded = FakeGraph(), [], [], []

    @contextlib.contextmanager
    def capture(given, stream, capture_error_mode):
        assert given is graph
        assert capture_error_mode == "thread_local", "threads that write pictures go on meanwhile"
        capturing.append(True)
        yield
        if not capturable:
            raise RuntimeError("operation not permitted when stream is capturing")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(graph.replays + len(calls))

        def synchronize(self):
            recorded.append("synchronized")

        def elapsed_time(self, end):
            assert recorded[-1] == "synchronized"
            return 1000.0 * (recorded[1] - recorded[0])

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "CUDAGraph": lambda: graph,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda given: contextlib.nullcontext(),
        "graph": capture,
        "Event": Event,
        "synchronize": lambda device: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert seconds_on_cuda(lambda: calls.append(1), 7, CPU) == 7
    assert graph.replays == (8 if capturable else 0)
    assert capturing == [True]


@pytest.fixture(scope="module")
def measured(tiny_model, tmp_path_factory):
    told = []
    folder = tmp_path_factory.mktemp("scratch")
    benchmark = Benchmark(run_of(tiny_model), (1, 2), folder, repeats=3, batches=2, against=("diffusers",))
    found = Bench(benchmark, lambda text, one_of_many: told.append(text)).measure()
    return found, told, folder


@pytest.mark.slow
def test_what_is_measured(measured):
    found, told, folder = measured
    assert [r["batch_size"] for r in found["results"]] == [1, 2]
    assert [r["images"] for r in found["results"]] == [2, 4]
    assert found["psnr"] is None
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert any("round 3 of 3" in text for text in told)
    assert list(folder.iterdir()) == [], "nothing is left behind"


@pytest.mark.slow
def test_the_numbers_fit_together(measured):
    found, *_ = measured
    for r in found["results"]:
        rival = r["against"]["diffusers"]
        for speed in (r, rival):
            seconds = speed["seconds"]["median"]
            assert speed["images_per_second"]["median"] == pytest.approx(r["images"] / seconds)
            assert speed["ms_per_image_and_step"]["median"] * 4 * r["images"] == pytest.approx(1000 * seconds)
            assert len(speed["seconds"]["all"]) == 3
        by_hand = [b / a for a, b in zip(r["seconds"]["all"], rival["seconds"]["all"], strict=True)]
        assert rival["ratio"]["all"] == pytest.approx(by_hand)
        assert rival["largest_difference"] <= 1
        pairs = zip(r["seconds"]["all"], r["network_seconds"]["all"], strict=True)
        assert r["share_outside_network"]["all"] == pytest.approx([1 - n / s for s, n in pairs])
        assert all(0 < share < 1 for share in r["share_outside_network"]["all"])
        work = found["flops_per_image_and_step"] * 4 * r["images"]
        assert r["flops_per_second"] == pytest.approx(work / r["network_seconds"]["median"])
        peak = found["machine"]["matrix_peak_flops_per_second"]
        assert r["share_of_matrix_peak"] == pytest.approx(r["flops_per_second"] / peak)
        assert 0 < r["time_to_first_image_seconds"]["median"] < r["seconds"]["median"]
        assert r["peak_memory"]["bytes"] > 10e6


def test_guidance_is_two_rows_an_image(tmp_path, monkeypatch):
    """The same network time is twice the FLOP/s where each image is two rows."""
    from diffusers import UNet2DModel

    UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=3,
    ).save_pretrained(tmp_path / "classes")
    monkeypatch.setattr(bench_module, "matrix_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(Ours, "network_seconds", lambda self, seeds, batch_size: 1.0)
    speed = []
    for guidance in (1.0, 3.0):
        settings = {"steps": 2, "classes": "0", "guidance_scale": guidance}
        table = {
            "model": {"source": str(tmp_path / "classes"), **({"null_class": 2} if guidance != 1 else {})},
            "sampling": settings,
            "runtime": {"device": "cpu", "dtype": "float32"},
        }
        benchmark = Benchmark(resolve([table_layer(table, "test")]), (2,), tmp_path, repeats=1)
        speed.append(Bench(benchmark).measure()["results"][0]["flops_per_second"])
    assert speed[1] == pytest.approx(2 * speed[0])


def test_psnr_against_float32(tiny_model, tmp_path):
    run = resolve(
        [
            table_layer(
                {
                    "model": {"source": str(tiny_model)},
                    "sampling": {"steps": 3},
                    "runtime": {"device": "cpu", "dtype": "bfloat16"},
                },
                "test",
            )
        ]
    )
    found = Bench(Benchmark(run, (2,), tmp_path, repeats=1, files=False, psnr_images=3)).measure()
    assert found["psnr"]["images"] == 3
    assert 20 < found["psnr"]["worst_db"] <= found["psnr"]["median_db"] < 100
    assert "memory" in found["timed"]
    assert "psnr" not in found["results"][0]


@pytest.mark.parametrize(("where", "fails"), [(Networks, "load"), (Denoiser, "launch")])
def test_out_of_memory_names_the_batch_size(where, fails, tiny_model, tmp_path, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(where, fails, fail)
    with pytest.raises(RunError, match="batch of 7"):
        Bench(Benchmark(run_of(tiny_model), (7,), tmp_path, repeats=1)).measure()


@pytest.mark.parametrize(
    ("scheduler", "sampling", "word"),
    [
        ({"timestep_spacing": "quadratic"}, {}, "quadratic"),
        ({"beta_schedule": "sigmoid"}, {}, "sigmoid"),
        ({}, {"timesteps": [999, 500, 0]}, "list of timesteps"),
        ({}, {"variance": "large"}, "large"),
        ({}, {"order": 2, "eta": 0.5}, "an eta other than 0 and 1 with order 2"),
    ],
)
def test_what_diffusers_does_not_have_is_refused(scheduler, sampling, word, tiny_model, tmp_path):
    table = {"model": {"source": str(tiny_model)}, "scheduler": scheduler, "sampling": sampling}
    run = resolve([table_layer(table, "test")])
    with pytest.raises(UsageError, match=word):
        Bench(Benchmark(run, (1,), tmp_path, against=("diffusers",)))


def test_every_architecture_can_be_described(tmp_path):
    assert {name: describe_architecture(name, tmp_path).size[0] for name in NAMES} == {
        "cifar10": 32,
        "celeba64": 64,
        "lsun256": 256,
        "mnist": 32,
        "sd15": 512,
        "sd21": 768,
    }
    with pytest.raises(UsageError, match="did you mean cifar10"):
        describe_architecture("cifar", tmp_path)


def test_the_plot_has_every_curve():
    pytest.importorskip("matplotlib")
    from ddim_cli.outputs.bench_plot import SpeedCurve, draw_speeds

    curves = [
        SpeedCurve(name, [1, 8, 64], *([m * k * bar for m in (1, 6, 30)] for bar in (1, 0.9, 1.1)))
        for name, k in (("ddim", 3), ("diffusers", 1), ("diffusers+", 2))
    ]
    for shown in (curves, curves[:1]):
        image = np.asarray(Image.open(io.BytesIO(draw_speeds(shown, "title"))).convert("RGB")).reshape(-1, 3)
        for curve, colour in zip(curves, ((31, 119, 180), (217, 130, 43), (107, 122, 143)), strict=True):
            drawn = (abs(image.astype(int) - np.array(colour)).max(1) < 12).sum()
            assert (drawn > 500) == (curve in shown), curve.name


@pytest.mark.slow
def test_nothing_is_infinite(measured):
    def numbers(value):
        if isinstance(value, dict):
            for v in value.values():
                yield from numbers(v)
        elif isinstance(value, list):
            for v in value:
                yield from numbers(v)
        elif isinstance(value, float):
            yield value

    assert all(map(math.isfinite, numbers(measured[0])))


# No step of it is more than twice as long as the one before, but the last.
TRAILING = {"scheduler": {"timestep_spacing": "trailing"}}


def text_run(model, **sampling):
    return run_of(model, prompt="a seven", **sampling)


@pytest.mark.parametrize(
    ("guidance", "noise"), [(7.5, {"eta": 0.5}), (1.0, {"eta": 0.5}), (7.5, {"order": 2, **TRAILING})]
)
@pytest.mark.parametrize("name", ["diffusers", "diffusers+"])
def test_a_text_models_contestants_make_the_same_pictures(
    name, guidance, noise, tiny_text_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    run = text_run(tiny_text_model, guidance_scale=guidance, negative_prompt="thin", **noise)
    ours = pictures_of(Ours(make_job(run)), range(3), 2)
    other = make_baseline(name, run, CPU, torch.float32)
    assert type(other._pipeline).__name__ == pipeline_name(run.model) == "StableDiffusionPipeline"
    theirs = pictures_of(other, range(3), 2, tmp_path)
    assert largest_difference(ours, theirs) <= 1
    assert largest_difference(ours[:1], ours[1:2]) > 1
    assert other.clock.seconds > 0
    other.close()
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_an_unconditional_latent_models_contestants(tiny_latent_model):
    run = run_of(tiny_latent_model)
    other = make_baseline("diffusers", run, CPU, torch.float32)
    assert type(other._pipeline).__name__ == pipeline_name(run.model) == "LDMPipeline"
    theirs = pictures_of(other, range(3), 3)
    assert largest_difference(pictures_of(Ours(make_job(run)), range(3), 3), theirs) <= 1
    assert largest_difference(theirs[:1], theirs[1:2]) > 1


@pytest.mark.slow
def test_a_text_model_is_measured(tiny_text_model, tmp_path):
    run = text_run(tiny_text_model)
    found = Bench(Benchmark(run, (1, 2), tmp_path, repeats=2, against=("diffusers",))).measure()
    assert found["model"]["parameters"] == run.model.all_parameters
    assert (found["model"]["channels"], found["model"]["height"]) == (3, 64)
    assert found["against"]["diffusers"].startswith("StableDiffusionPipeline as its documentation")
    for result in found["results"]:
        rival = result["against"]["diffusers"]
        assert rival["largest_difference"] <= 1
        assert rival["peak_memory"]["bytes"] > 10e6
        pairs = zip(result["network_seconds"]["all"], rival["network_seconds"]["all"], strict=True)
        assert rival["network_ratio"]["all"] == pytest.approx([b / a for a, b in pairs])
        steps = 4 * result["images"]
        assert result["network_ms_per_image_and_step"]["median"] * steps == pytest.approx(
            1000 * result["network_seconds"]["median"]
        )
        work = found["flops_per_image_and_step"] * 2 * steps
        assert result["flops_per_second"] == pytest.approx(work / result["network_seconds"]["median"]), "guided"


@pytest.mark.parametrize(
    ("fixture", "sampling", "word"),
    [
        ("tiny_text_model", {"guidance_scale": 0.5}, "StableDiffusionPipeline does not have a guidance scale below 1"),
        ("tiny_text_model", {"use_clipped_model_output": True}, "use_clipped_model_output"),
        ("tiny_latent_model", {}, "LDMPipeline does not have bfloat16"),
        ("tiny_latent_model", {"eta": 0.5}, "LDMPipeline does not have noise of a seed"),
        ("tiny_latent_model", {"order": 2}, "LDMPipeline does not have the timesteps of order 2"),
    ],
)
def test_what_pipelines_of_latent_models_do_not_have(fixture, sampling, word, request, tmp_path):
    prompt = {"prompt": "a"} if fixture == "tiny_text_model" else {}
    run = run_of(request.getfixturevalue(fixture), **prompt, **sampling)
    if "bfloat16" in word:
        runtime = run.config.runtime.model_copy(update={"dtype": "bfloat16"})
        run = replace(run, resolved=replace(run.resolved, config=run.config.model_copy(update={"runtime": runtime})))
    with pytest.raises(UsageError, match=word):
        Bench(Benchmark(run, (1,), tmp_path, against=("diffusers",)))


@pytest.mark.parametrize(
    ("name", "millions", "width", "prediction"),
    [("sd15", (859.520964, 83.653863, 123.060480), 768, "epsilon"),
     ("sd21", (865.910724, 83.653863, 340.387840), 1024, "v_prediction")],
)  # fmt: skip
def test_text_architectures_have_the_published_sizes(name, millions, width, prediction, tmp_path):
    model = describe_architecture(name, tmp_path)
    parts = {"unet": None, **model.latents.weighted_parts()}
    folder = tmp_path
    assert list(folder.iterdir()) == [], "weights are drawn when they are asked for"
    counted = []
    for part in parts:
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            for module in (architectures, text_architectures):
                patch.setattr(module, "write_random", lambda shapes, path, seed, into=seen: into.append(shapes) or ())
            _ = (model if part == "unet" else parts[part]).weights
        counted.append(sum(shape.numel() for shape in seen[0].values()))
    assert counted == [round(each * 1e6) for each in millions]
    assert (model.latents.text.width, model.latents.text.limit) == (width, 77)
    assert model.scheduler["prediction_type"] == prediction
    assert model.size == {"sd15": (512, 512), "sd21": (768, 768)}[name]
    other = describe_architecture(name, tmp_path, ModelSettings(image_size=[512, 640]))
    assert other.state_shape == (4, 64, 80)
    assert other.sha256 != model.sha256


def test_random_weights_stay_finite_and_the_same(tmp_path):
    shapes = {"a.weight": torch.Size([40, 30]), "norm.weight": torch.Size([3]), "norm.bias": torch.Size([3])}
    for name in ("one", "two"):
        random_weights.write_random(shapes, tmp_path / name, seed=4)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    weights = load_file(tmp_path / "one")
    assert {name: tensor.shape for name, tensor in weights.items()} == shapes
    assert weights["norm.weight"].tolist() == [1, 1, 1]
    assert weights["norm.bias"].tolist() == [0, 0, 0]
    assert weights["a.weight"].var().item() == pytest.approx(1 / 90, rel=0.1)
    random_weights.write_random(shapes, tmp_path / "other", seed=5)
    assert not torch.equal(load_file(tmp_path / "other")["a.weight"], weights["a.weight"])


def test_the_tokenizer_made_on_the_spot_takes_prompts_in_ascii(tmp_path):
    from ddim_cli.models.parts import Tokenizer
    from ddim_cli.models.text import load_tokenizer

    files = text_architectures.write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(Tokenizer("here", lambda: files))
    assert tokenizer.model_max_length == 77
    found = tokenizer("A horse, 2 men!").input_ids
    assert len(found) == 2 + len("Ahorse,2men!")
    assert len(set(found[1:-1])) > 8
    assert found[-1] not in found[1:-1], "nothing is unknown"


@pytest.fixture
def small_shapes(monkeypatch):
    """The text architectures in miniature, which a test can run."""
    small = {"block_out_channels": [32, 32, 32, 32]}
    for table in (text_architectures._UNET, text_architectures._AUTOENCODER):
        monkeypatch.setattr(text_architectures, "_UNET" if table is text_architectures._UNET else "_AUTOENCODER",
                            {**table, **small})  # fmt: skip
    monkeypatch.setitem(text_architectures.UNETS, "sd15", {"sample_size": 8, "cross_attention_dim": 16})
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(text_architectures.TEXTS, "sd15", text)


@pytest.mark.slow
def test_a_text_architecture_can_be_measured(small_shapes, ddim):
    args = ("--batch-sizes", 1, "--steps", 2, "--repeats", 1, "--no-compile", "--against", "diffusers", "--json")
    result = ddim("bench", "--architecture", "sd15", *args)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["sampling"]["guidance_scale"] == 7.5
    [result] = found["results"]
    assert result["against"]["diffusers"]["largest_difference"] <= 1


def test_a_prompt_of_its_own_unless_there_is_one(ddim, tiny_text_model, monkeypatch):
    prompts = []

    class Fake:
        def __init__(self, benchmark, *others):
            prompts.append((benchmark.run.config.sampling.prompt, benchmark.run.resolved.origin("sampling.prompt")))

        def measure(self):
            raise UsageError("enough")

    monkeypatch.setattr(bench_module, "Bench", Fake)
    assert ddim("bench", "-m", tiny_text_model).exit_code == 2
    assert ddim("bench", "-m", tiny_text_model, "--prompt", "a cat").exit_code == 2
    assert prompts == [
        (text_architectures.DEFAULT_PROMPT, "default of ddim bench"),
        ("a cat", "--prompt"),
    ]
