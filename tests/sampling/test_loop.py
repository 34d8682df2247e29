"""The loop's ways of running: step by step, captured as on a GPU, a batch ahead, and when memory runs out."""

import contextlib
import json

import pytest
import torch
from PIL import Image

from ddim_cli import sample
from ddim_cli.config.layers import merge, table_layer
from ddim_cli.diffusion.solvers import solver_of
from ddim_cli.diffusion.step import X0Treatment, ddim_step
from ddim_cli.errors import RunError
from ddim_cli.models.describe import describe_model
from ddim_cli.models.load import load_sampling_network
from ddim_cli.sampling import loop
from ddim_cli.sampling.items import Choices, Inversion, Item, SeedItems
from ddim_cli.sampling.loop import (
    NOT_CAPTURED,
    STEPS_AHEAD,
    Denoiser,
    Pace,
    Sampler,
    Stepper,
    denoise,
    run_batches,
)
from ddim_cli.sampling.network import Networks
from ddim_cli.sampling.noise import BatchNoise
from ddim_cli.sampling.resolve import settle
from ddim_cli.sampling.sampler import make_sampler

CPU, SHAPE = torch.device("cpu"), (3, 8, 8)


def run_of(tiny_model, **sampling):
    settings = {"model": {"source": str(tiny_model)}, "sampling": {"steps": 6, **sampling}}
    resolved = merge([table_layer(settings, "test")])
    return settle(resolved, describe_model(resolved.config.model))


def network_of(tiny_model):
    return load_sampling_network(run_of(tiny_model).model)


def sampler_of(tiny_model, network=None, **sampling):
    run = run_of(tiny_model, **sampling)
    network = network or load_sampling_network(run.model)
    return make_sampler(run, network, CPU, torch.float32, SHAPE)


def pictures_of(sampler, seeds, batch_size, **callbacks):
    batches = run_batches(Denoiser(sampler), SeedItems(tuple(seeds)), batch_size, **callbacks)
    return [picture for batch in batches for picture in batch]


@torch.inference_mode()
def by_hand(run, network, seeds, classes=None):
    """The same pictures by a loop of its own: no buffers, the step a number on the host, a generator a row.

    ``network`` is called with the states, the number of the step, and classes where there are some.
    """
    config = run.config
    solver = solver_of(config.sampling)
    table = solver.table(config.scheduler, config.sampling, run.timesteps)
    treatment = X0Treatment.of(config.scheduler, config.sampling)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw():
        return torch.stack([torch.randn(SHAPE, generator=generator) for generator in generators])

    x, before = draw(), []
    for i in range(len(run.timesteps)):
        given = () if classes is None else (torch.tensor([classes[seed % len(classes)] for seed in seeds]),)
        output = network(x, i, *given)
        c, noise = table.row(i), draw() if config.sampling.eta > 0 else None
        if config.sampling.order == 1:
            x, _ = ddim_step(x, output, c, treatment, noise)
            continue
        before.append(treatment.apply(c.x0_from_x * x + c.x0_from_output * output))
        x = c.from_x * x + c.from_now * before[-1]
        for weight, then in zip((c.from_last, c.from_before_last), before[-2::-1], strict=False):
            x = x + weight * then
        x = x if noise is None else x + c.sigma * noise
    return x


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@torch.inference_mode()
def test_the_step_in_place_is_the_same_step(eta, order, tiny_model):
    """What a CUDA graph records, run here without one: static buffers, and the step counted on the device."""
    asked = {"eta": eta, "order": order}
    run, network, sampler = run_of(tiny_model, **asked), network_of(tiny_model), sampler_of(tiny_model, **asked)
    # All at once, as a run does: one by one they are rounded differently.
    projections = network.project(torch.tensor(run.timesteps))
    stepper, done = Stepper(sampler, sampler.down, 3, ()), []
    # The second batch is one short, and its last row padding.
    for seeds, rows in (((0, 1, 2), (0, 1, 2)), ((7, 8), (7, 8, 8))):
        noise = BatchNoise(SeedItems(seeds), 3, SHAPE, CPU)
        begun = sampler.beginnings().of(SeedItems(seeds), 3, noise, {})
        way = sampler.way_down(0, None, masked=False)
        found = denoise(stepper, way, begun.states, (), noise, done.append).clone()
        expected = by_hand(run, lambda x, i: network.body(x, projections[i : i + 1]), rows)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert done == [1, 2, 3, 4, 5, 6] * 2


def test_the_step_in_place_takes_each_batch_its_classes(tiny_model):
    def network(x, t, classes):
        return x * 0.1 + classes.view(-1, 1, 1, 1) * 0.05

    settings = {"sampling": {"steps": 6, "classes": "0,3,5"}}
    run = settle(merge([table_layer(settings, "test")]))
    sampler = make_sampler(run, network, CPU, torch.float32, SHAPE)
    denoiser = Denoiser(sampler)
    for seeds in ((0, 1), (4, 5)):
        [pictures] = run_batches(denoiser, SeedItems(seeds, Choices((0, 3, 5))), 2)
        expected = by_hand(run, network, seeds, classes=(0, 3, 5))
        torch.testing.assert_close(torch.stack([p.x0 for p in pictures]), expected)


class Observer:
    """Remembers copies of all it is shown."""

    def __init__(self, items, decoder):
        self.states, self.predictions = [], []

    def begin(self, x):
        self.states.append(x.clone())

    def step(self, i, x, x0):
        assert i == len(self.predictions)
        self.states.append(x.clone())
        self.predictions.append(x0.clone())

    def seen(self, row):
        return [x[row] for x in self.states], [x[row] for x in self.predictions]


def test_an_observer_sees_every_state_and_prediction(tiny_model):
    sampler = sampler_of(tiny_model)
    plain = pictures_of(sampler, range(3), 2)
    watched = [p for batch in run_batches(Denoiser(sampler, Observer), SeedItems(range(3)), 2) for p in batch]
    for picture, expected in zip(watched, plain, strict=True):
        states, predictions = picture.seen
        assert (len(states), len(predictions)) == (7, 6)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(picture.item.seed))
        assert torch.equal(states[0], noise)
        assert torch.equal(states[-1], expected.x0)
        # Without noise, the last step goes to its prediction.
        torch.testing.assert_close(predictions[-1], expected.x0)
        assert not torch.equal(predictions[0], states[1])


class FakeCuda:
    """What the loop asks of torch.cuda, without a GPU; a graph replays the step that was made while it captured."""

    def __init__(self, monkeypatch):
        self.current, self.capturing, self.graphs = "the program's", None, []
        monkeypatch.setattr(Sampler, "runs_ahead", True)
        step, fake = Stepper._step, self

        def counted(stepper):
            if fake.capturing is not None:
                fake.capturing.step = lambda: step(stepper)
            step(stepper)

        monkeypatch.setattr(Stepper, "_step", counted)

        class Stream:
            def __init__(self, device, name="a side stream"):
                self.name = name

            def wait_stream(self, other):
                pass

        class Event:
            def record(self, stream):
                pass

            def synchronize(self):
                pass

        class Graph:
            def __init__(self):
                self.replays = 0
                fake.graphs.append(self)

            def replay(self):
                self.replays += 1
                self.step()

        for name, value in {
            "CUDAGraph": Graph,
            "Stream": Stream,
            "Event": Event,
            "stream": self.stream,
            "graph": self.capture,
            "current_stream": lambda device: Stream(device, fake.current),
            "synchronize": lambda device: None,
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def capture(self, graph, stream, capture_error_mode):
        self.capturing = graph
        with self.stream(stream):
            yield
        self.capturing = None


class FailingCapture(FakeCuda):
    """A GPU on which no step can be captured, for the reason ``error``."""

    def __init__(self, monkeypatch, error):
        super().__init__(monkeypatch)
        step, fake = Stepper._step, self

        def fails(stepper):
            if fake.capturing is not None:
                raise error
            step(stepper)

        monkeypatch.setattr(Stepper, "_step", fails)

    @contextlib.contextmanager
    def capture(self, graph, stream, capture_error_mode):
        self.current, self.capturing = stream.name, graph
        try:
            yield
        except RuntimeError:
            # As torch does: an error that says nothing, and the current stream stays what it was within.
            self.capturing = None
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904


@pytest.mark.parametrize("order", [1, 3])
def test_on_a_gpu_one_graph_serves_every_step_of_every_batch(order, tiny_model, monkeypatch):
    """A batch is in flight while the one before is fetched."""
    sampler = sampler_of(tiny_model, eta=1.0, order=order)
    expected = pictures_of(sampler, range(7), 3)
    cuda, calls = FakeCuda(monkeypatch), []
    launch, collect = Denoiser.launch, loop.Launched.collect
    monkeypatch.setattr(Denoiser, "launch", lambda self, *args: calls.append("launch") or launch(self, *args))
    monkeypatch.setattr(loop.Launched, "collect", lambda self: calls.append("collect") or collect(self))
    found = pictures_of(sampler, range(7), 3)
    assert [p.item.seed for p in found] == list(range(7))
    assert all((a.pixels == b.pixels).all() for a, b in zip(found, expected, strict=True))
    assert [graph.replays for graph in cuda.graphs] == [6 * 3]
    assert calls == ["launch", "launch", "collect", "launch", "collect", "collect"]
    assert cuda.current == "the program's"


def inversions(tmp_path, count):
    items = []
    for i in range(count):
        noise = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        path = tmp_path / f"{i}.png"
        Image.fromarray(noise.numpy()).save(path)
        items.append(Item(f"{i}", f"{i}.png", Inversion(path)))
    return items


@pytest.mark.parametrize("asked", [{}, {"order": 2}, {"refine": 2}], ids=str)
def test_an_inversion_is_captured_up_and_down_and_counted_as_one_way(asked, tiny_model, tmp_path, monkeypatch):
    sampler, items, done = sampler_of(tiny_model, **asked), inversions(tmp_path, 3), []
    expected = [p for batch in run_batches(Denoiser(sampler), items, 2, done.append) for p in batch]
    assert done == [*range(1, 13)] * 2
    assert [p.latent.shape for p in expected] == [SHAPE] * 3
    cuda, paced = FakeCuda(monkeypatch), []
    found = [p for batch in run_batches(Denoiser(sampler), items, 2, paced.append) for p in batch]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.latent, b.latent)
        assert torch.equal(a.x0, b.x0)
        assert a.residual == b.residual
        assert (a.residual is not None) == ("refine" in asked)
    assert [graph.replays for graph in cuda.graphs] == [6 * 2] * 2
    assert paced == [*range(1, 13 - STEPS_AHEAD)] * 2


def test_a_step_that_cannot_be_captured_runs_as_it_is_and_that_is_said_once(tiny_model, tmp_path, monkeypatch):
    sampler, items = sampler_of(tiny_model), inversions(tmp_path, 3)
    expected = [p for batch in run_batches(Denoiser(sampler), items, 2) for p in batch]
    cuda = FailingCapture(monkeypatch, RuntimeError("operation not permitted when stream is capturing\nand more"))
    said = []
    denoiser = Denoiser(sampler, on_slower=lambda what, why: said.append((what, why)))
    found = [p for batch in run_batches(denoiser, items, 2) for p in batch]
    assert all(torch.equal(a.x0, b.x0) for a, b in zip(found, expected, strict=True))
    assert said == [(NOT_CAPTURED, "operation not permitted when stream is capturing")]
    assert len(cuda.graphs) == 2, "up and down were both tried, once for all batches"
    assert cuda.current == "the program's"


def test_no_memory_for_a_capture_halves_the_batch(tiny_model, monkeypatch):
    FailingCapture(monkeypatch, torch.OutOfMemoryError("tried to allocate 1 GiB"))
    halved, said = [], []
    denoiser = Denoiser(sampler_of(tiny_model), on_slower=lambda what, why: said.append(what))
    with pytest.raises(RunError, match="out of memory on cpu, even for a single image"):
        list(run_batches(denoiser, SeedItems(range(4)), 4, on_halved=halved.append))
    assert (halved, said) == ([2, 1], [])


def test_a_person_hears_of_a_failed_capture(ddim, tiny_model, monkeypatch):
    FailingCapture(monkeypatch, RuntimeError("operation not permitted when stream is capturing"))
    args = ("-m", tiny_model, "-n", 2, "-b", 1, "--steps", 2)
    for verbose, why in (((), "(--verbose: why)"), (("-v",), ": operation not permitted when stream is capturing")):
        done = ddim("sample", *args, *verbose, "-o", f"out{len(verbose)}")
        assert done.exit_code == 0, done.stderr
        assert done.stderr.count("cannot be captured as a CUDA graph") == 1
        assert f"{NOT_CAPTURED}{why if verbose else ' ' + why}" in done.stderr
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph, .* not permitted") as caught:
        list(sample({"sampling": {"steps": 4, "num_images": 3, "batch_size": 1}}, model=tiny_model))
    assert [warning.filename for warning in caught] == [__file__]


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


def test_what_goes_wrong_on_the_way_up_is_named(tiny_model, tmp_path):
    """At the noise levels of the grid 830, 664, 498, 332, 166, 0, a step up starts one lower than it ends."""

    def network(x, t):
        return torch.full_like(x, float("nan")) if t[0] == 166 else 0.1 * x

    sampler = sampler_of(tiny_model, network)
    with pytest.raises(RunError, match=r"0\.png: NaN at step 3 of 6 of the inversion \(timestep 332\); are"):
        list(run_batches(Denoiser(sampler), inversions(tmp_path, 1), 1))


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


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_batch_is_halved_until_memory_suffices(on_gpu, tiny_model, monkeypatch):
    expected = {p.item.seed: p.pixels for p in pictures_of(sampler_of(tiny_model), range(10), 8)}
    if on_gpu:
        FakeCuda(monkeypatch)
    sampler, halved = sampler_of(tiny_model, greedy(network_of(tiny_model), 3)), []
    found = pictures_of(sampler, range(10), 8, on_halved=halved.append)
    assert halved == [4, 2]
    assert [p.item.seed for p in found] == list(range(10))
    assert {p.batch_size for p in found} == {2}
    assert all(abs(p.pixels.astype(int) - expected[p.item.seed]).max() <= 1 for p in found)


def test_no_memory_for_one_image_ends_the_run(tiny_model):
    sampler = sampler_of(tiny_model, greedy(network_of(tiny_model), 0))
    with pytest.raises(RunError, match="out of memory on cpu, even for a single image"):
        pictures_of(sampler, range(4), 4)


def test_a_halved_run_finishes_and_says_so(ddim, tiny_model, tmp_path, monkeypatch):
    load = Networks.load
    monkeypatch.setattr(Networks, "load", lambda self, *args: (greedy(load(self, *args)[0], 2), False))
    done = ddim("sample", "-m", tiny_model, "-n", 6, "-b", 6, "--steps", 2, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("out of memory; going on with batches of 3") == 1
    assert done.stderr.count("out of memory; going on with batches of 1") == 1
    sidecars = [json.loads((tmp_path / "out" / f"{seed:06d}.json").read_text()) for seed in range(6)]
    assert {s["runtime"]["batch_size"] for s in sidecars} == {1}
    assert ddim("sample", "-m", tiny_model, "-n", 6, "--steps", 2, "-o", tmp_path / "out", "--json").exit_code == 0
