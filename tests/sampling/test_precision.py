import json

import pytest
import torch

from ddim_cli.config.layers import table_layer
from ddim_cli.config.schema import ModelSettings, RuntimeSettings
from ddim_cli.errors import UsageError
from ddim_cli.models.describe import describe_model
from ddim_cli.models.device import choose_device, choose_dtype
from ddim_cli.models.inspect import activation_bytes
from ddim_cli.sampling import precision
from ddim_cli.sampling.items import SeedItems
from ddim_cli.sampling.job import make_job
from ddim_cli.sampling.noise import BatchNoise
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.resolve import resolve

CPU = torch.device("cpu")


@pytest.fixture
def mnist():
    return describe_model(ModelSettings())


def test_auto_takes_what_memory_allows(mnist, monkeypatch):
    one = activation_bytes(mnist, 4)
    for images_that_fit, count, expected in ((5, 100, 5), (5, 12, 4), (1000, 7, 7), (0, 9, 1)):
        monkeypatch.setattr(precision, "total_memory", lambda d, n=images_that_fit: int(2 * n * one))
        assert precision.choose_batch_size("auto", count, mnist, CPU, torch.float32) == expected
    assert precision.choose_batch_size(7, 10, mnist, CPU, torch.float32) == 7


@pytest.mark.parametrize("asked", ["auto", 1_000_000])
def test_a_batch_is_at_most_the_whole_plan_also_of_a_shard(monkeypatch, tmp_path, asked):
    monkeypatch.chdir(tmp_path)
    run = resolve([table_layer({"sampling": {"num_images": 16, "steps": 10, "batch_size": asked}}, "test")])
    assert make_job(run).batch_size == make_job(run, shard=Shard(1, 4)).batch_size == 16


def test_a_batch_that_memory_cannot_hold_is_halved_before_it_is_tried(ddim, tiny_model, tmp_path, monkeypatch):
    """A CPU's memory is promised and not had: the process that used it would be killed."""
    tiny = describe_model(ModelSettings(source=str(tiny_model)))
    free = tiny.parameters * 4 + 2 * 3 * activation_bytes(tiny, 4)
    monkeypatch.setattr(precision, "free_memory", lambda: free)
    done = ddim("sample", "-m", tiny_model, "-n", 14, "-b", 14, "--steps", 2, "-o", "out")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("out of memory; going on with batches of 3") == 1
    assert "14 images in 5 batches of 3" in done.stderr
    for name in ("run.json", "000000.json", "000013.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["runtime"]["batch_size"] == 3
    done = ddim("trajectory", "--seeds", "0-5", "-m", tiny_model, "-b", 6, "--steps", 2, "-o", "strips")
    assert (done.exit_code, "going on with batches of 3" in done.stderr) == (0, True), done.stderr
    # A GPU says itself when it has no more.
    assert precision.halve_to_fit(14, tiny, torch.device("cuda"), torch.float32) == 14
    monkeypatch.setattr(precision, "free_memory", lambda: 0)
    assert precision.halve_to_fit(14, tiny, CPU, torch.float32) == 1


def switches():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture
def restored():
    before = switches()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("before", [(False, True), (True, False)])
def test_tf32_is_off_unless_asked_for_and_the_callers_otherwise(before, restored):
    from ddim_cli import sample

    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    seen = []

    def network(x, t):
        seen.append(switches())
        return 0.1 * x

    for allowed in (True, False):
        config = {"sampling": {"steps": 4, "num_images": 2, "batch_size": 1}, "runtime": {"tf32": allowed}}
        pictures = sample(config, model=network, shape=(1, 4, 4))
        assert switches() == before, "a plan sets nothing"
        for _ in pictures:
            assert switches() == before, "between two pictures, the caller's own program runs"
        assert switches() == before
        assert set(seen) == {(allowed, allowed)}
        seen.clear()
    assert RuntimeSettings().tf32 is False


def test_tf32_where_a_program_uses_torchs_newer_switches(start):
    """Torch then refuses to read the older ones."""
    process = start(
        "--version",
        before="""
import torch
from ddim_cli.sampling.precision import tf32
def switches():
    return [s.fp32_precision for s in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)]
torch.backends.fp32_precision = "tf32"
before = switches()
with tf32(False):
    assert switches() == ["ieee"] * 3, switches()
    with tf32(True):
        assert switches() == ["tf32"] * 3, switches()
assert switches() == before, switches()
""",
    )
    assert process.wait() == 0, process.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_devices_that_are_not_there():
    assert choose_device("auto").type in ("cpu", "mps")
    for name in ("cuda", "cuda:3"):
        with pytest.raises(UsageError, match=f"device {name}: there is none here"):
            choose_device(name)
    for name in ("gpu", "cuda:x", "meta"):
        with pytest.raises(UsageError, match=f"device {name}: is none of auto, cpu"):
            choose_device(name)
    assert choose_dtype("auto", CPU) == torch.float32


def test_noise_is_the_generators_whatever_else_is_drawn():
    batch = BatchNoise(SeedItems([7, 3]), 3, (2, 4, 4), CPU)
    first, second = batch.draw(), batch.draw()
    generator = torch.Generator().manual_seed(3)
    for drawn in (first, second):
        expected = torch.randn(1, 2, 4, 4, generator=generator)[0]
        assert torch.equal(drawn[1], expected)
        assert torch.equal(drawn[2], expected)


def test_only_the_network_runs_in_the_chosen_dtype():
    from ddim_cli import sample

    seen = set()

    def network(x, t):
        seen.add(x.dtype)
        return 0.1 * x

    for dtype in ("bfloat16", "float32"):
        config = {"sampling": {"steps": 4, "num_images": 1, "eta": 1.0}, "runtime": {"dtype": dtype}}
        [picture] = sample(config, model=network, shape=(1, 4, 4))
        assert picture.tensor.dtype == torch.float32
        # Rounded to bfloat16 anywhere on its way, the state would be its own rounding.
        assert not torch.equal(picture.tensor, picture.tensor.bfloat16().float())
    assert seen == {torch.bfloat16, torch.float32}


def test_noise_starts_where_an_item_says_and_steps_draw_from_its_own_stream():
    from ddim_cli.models.decoders import Decoder
    from ddim_cli.sampling.begin import Beginnings, Canvases
    from ddim_cli.sampling.items import Item, Noise

    shape = (1, 2, 2)

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator) for _ in range(2)]

    items = [Item("a", "", Noise(7)), Item("b", "", Noise(7), noise_seed=3), Item("c", "", Noise(7), noise_seed=7)]
    noise = BatchNoise(items, 4, shape, CPU)
    # Of the table only masks and pictures have a use.
    begun = Beginnings(shape, CPU, Canvases(Decoder(), shape), None).of(items, 4, noise, {})
    assert torch.equal(begun.states, torch.stack([drawn(7)[0]] * 4))
    own = [torch.zeros(shape), drawn(3)[1], drawn(7)[1]]
    assert torch.equal(noise.draw(), torch.stack([*own, own[-1]]))
