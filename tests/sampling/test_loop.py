"""The loop's ways of running: step by step, in place as a GPU's graph does, a batch ahead, and when memory runs out."""

import json

import pytest
import torch

from ddim_cli.config.schema import Config
from ddim_cli.errors import RunError
from ddim_cli.models.describe import describe_model
from ddim_cli.models.load import load_sampling_network
from ddim_cli.sampling import loop
from ddim_cli.sampling.loop import STEPS_AHEAD, Denoiser, Pace, StepInPlace, run_batches, trajectory
from ddim_cli.sampling.resolve import Run, judge
from ddim_cli.sampling.run import make_sampler

CPU = torch.device("cpu")


def sampler_of(tiny_model, network=None, classes=None, **sampling):
    from ddim_cli.config.layers import merge, table_layer

    settings = {"model": {"source": str(tiny_model)}, "sampling": {"steps": 6, **sampling}}
    resolved = merge([table_layer(settings, "test")])
    model = describe_model(resolved.config.model)
    run: Run = judge(resolved, model)
    return make_sampler(run, network or load_sampling_network(model), CPU, torch.float32, (3, 8, 8))


def final(sampler, seeds):
    with torch.inference_mode():
        *_, (x, _) = trajectory(sampler, seeds)
    return x


@pytest.mark.parametrize("eta", [0.0, 1.0])
@torch.inference_mode()
def test_the_step_in_place_is_the_same_step(eta, tiny_model):
    """What a CUDA graph records, run here without one: static buffers, and the step counted on the device."""
    sampler = sampler_of(tiny_model, eta=eta)
    in_place, done = StepInPlace(sampler, 3), []
    for seeds in ((0, 1, 2), (7, 8, 8)):
        found = in_place.denoise(seeds, done.append).clone()
        torch.testing.assert_close(found, final(sampler, seeds), rtol=0, atol=1e-6)
    assert done == [1, 2, 3, 4, 5, 6] * 2


@torch.inference_mode()
def test_the_step_in_place_takes_each_batch_its_classes(tiny_model):
    from dataclasses import replace

    def network(x, i, classes):
        return x * 0.1 + classes.view(-1, 1, 1, 1) * 0.05

    sampler = replace(sampler_of(tiny_model), network=network, classes=(0, 3, 5))
    in_place = StepInPlace(sampler, 2)
    for seeds in ((0, 1), (4, 5)):
        torch.testing.assert_close(in_place.denoise(seeds, lambda done: None), final(sampler, seeds))


def test_pictures_are_the_same_a_batch_ahead(tiny_model, monkeypatch):
    """As on a GPU: in place, with a batch in flight while the one before is fetched."""
    sampler = sampler_of(tiny_model, eta=1.0)
    expected = [p for batch in run_batches(sampler, range(7), 3) for p in batch]

    steps = {}

    class Ahead(Denoiser):
        def _in_place(self, batch_size):
            with torch.inference_mode():
                return steps.setdefault(batch_size, StepInPlace(sampler, batch_size))

    class Gpu:
        type = "cuda"

    class Sampler:
        device = Gpu()

        def __getattr__(self, name):
            return getattr(sampler, name)

    monkeypatch.setattr(loop, "Denoiser", lambda wrapped: Ahead(sampler))
    found = [p for batch in run_batches(Sampler(), range(7), 3) for p in batch]
    assert [p.seed for p in found] == list(range(7))
    assert all((a.pixels == b.pixels).all() for a, b in zip(found, expected, strict=True))


def test_the_bar_follows_the_device_not_the_host(monkeypatch):
    waited, shown = [], []

    class Event:
        def record(self, stream):
            self.number = len(made)
            made.append(self)

        def synchronize(self):
            waited.append(self.number)

    made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    pace = Pace(CPU, shown.append)
    for done in range(1, 13):
        pace(done)
    assert waited == [0, 1, 2, 3], "it waits for steps that lie behind, never for the last"
    assert shown == [12 - STEPS_AHEAD - 3 + i for i in range(4)] == [1, 2, 3, 4]


def greedy(network, most):
    """A network that has no memory for more than ``most`` rows."""

    class Network:
        project = staticmethod(network.project)

        @staticmethod
        def body(x, projections):
            if len(x) > most:
                raise torch.OutOfMemoryError("tried to allocate 1 GiB")
            return network.body(x, projections)

    return Network()


def test_a_batch_is_halved_until_memory_suffices(tiny_model):
    plain = sampler_of(tiny_model)
    expected = {p.seed: p.pixels for batch in run_batches(plain, range(10), 8) for p in batch}
    network = load_sampling_network(describe_model(Config.model_validate({"model": {"source": str(tiny_model)}}).model))
    sampler, halved = sampler_of(tiny_model, greedy(network, 3)), []
    found = [p for batch in run_batches(sampler, range(10), 8, on_halved=halved.append) for p in batch]
    assert halved == [4, 2]
    assert [p.seed for p in found] == list(range(10))
    assert {p.batch_size for p in found} == {2}
    assert all(abs(p.pixels.astype(int) - expected[p.seed]).max() <= 1 for p in found)


def test_no_memory_for_one_image_ends_the_run(tiny_model):
    network = load_sampling_network(describe_model(Config.model_validate({"model": {"source": str(tiny_model)}}).model))
    sampler = sampler_of(tiny_model, greedy(network, 0))
    with pytest.raises(RunError, match="out of memory on cpu, even for a single image"):
        list(run_batches(sampler, range(4), 4))


def test_a_halved_run_finishes_and_says_so(ddim, tiny_model, tmp_path, monkeypatch):
    from ddim_cli.sampling import run as run_module

    whole = run_module.load_run_network
    monkeypatch.setattr(run_module, "load_run_network", lambda *a: (greedy(whole(*a)[0], 2), False))
    done = ddim("sample", "-m", tiny_model, "-n", 6, "-b", 6, "--steps", 2, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("out of memory; going on with batches of 3") == 1
    assert done.stderr.count("out of memory; going on with batches of 1") == 1
    sidecars = [json.loads((tmp_path / "out" / f"{seed:06d}.json").read_text()) for seed in range(6)]
    assert {s["runtime"]["batch_size"] for s in sidecars} == {1}
    assert ddim("sample", "-m", tiny_model, "-n", 6, "--steps", 2, "-o", tmp_path / "out", "--json").exit_code == 0
