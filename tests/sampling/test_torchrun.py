import pytest

from ddim_cli.errors import UsageError
from ddim_cli.sampling import torchrun
from ddim_cli.sampling.torchrun import Ranks, wait_for_others

VARIABLES = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_torchrun_is_known_by_its_own_variable():
    ranks = Ranks.of(VARIABLES)
    assert (ranks.shard.index, ranks.shard.count, ranks.local) == (3, 8, 1)
    assert Ranks.of({k: v for k, v in VARIABLES.items() if k != "TORCHELASTIC_RUN_ID"}) is None
    assert Ranks.of({}) is None


@pytest.mark.parametrize("wrong", [{"RANK": "x"}, {"RANK": "8"}, {"LOCAL_RANK": ""}, {"WORLD_SIZE": "0"}])
def test_half_set_variables_are_refused(wrong):
    with pytest.raises(UsageError, match="RANK"):
        Ranks.of({**VARIABLES, **wrong})


def test_the_local_rank_picks_the_gpu(monkeypatch):
    import torch

    picked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", picked.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: picked[-1])
    Ranks(3, 8, 1).pick_gpu()
    from ddim_cli.models.device import choose_device

    assert [str(choose_device(name)) for name in ("auto", "cuda", "cuda:0")] == ["cuda:1", "cuda:1", "cuda:0"]
    with pytest.raises(UsageError, match="this machine shows 2"):
        Ranks(3, 8, 2).pick_gpu()


def test_ranks_on_a_cpu_ask_for_no_gpu(ddim, tiny_model, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)

    def no_gpu(self):
        raise UsageError("there are too few")

    monkeypatch.setattr(Ranks, "pick_gpu", no_gpu)
    assert ddim("sample", "-m", tiny_model, "--dry-run", "--device", "cpu").exit_code == 0
    assert ddim("sample", "-m", tiny_model, "--dry-run").exit_code == 2


def test_rank_0_waits_as_long_as_images_appear(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(torchrun.time, "monotonic", lambda: clock[0])

    def pause(seconds):
        clock[0] += seconds

    # An image every 50 seconds is slow, but goes on.
    assert wait_for_others(lambda: int(clock[0] // 50), 10, 1.0, pause)
    assert 500 <= clock[0] < 502
    # Nobody makes the last one: the folder of another machine, say.
    began = clock[0]
    assert not wait_for_others(lambda: 9, 10, 1.0, pause)
    assert 60 <= clock[0] - began < 62
    # Batches of a minute need more patience.
    began = clock[0]
    assert not wait_for_others(lambda: 9, 10, 60.0, pause)
    assert 600 <= clock[0] - began < 602


def test_a_shard_within_torchrun_is_refused(ddim, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    result = ddim("sample", "--shard", "0/2", "--json")
    assert result.exit_code == 2
    assert "each rank is a shard already (3/8 here)" in result.stderr
    # Rank 0 alone prints the one document.
    assert result.stdout == ""
    monkeypatch.setenv("RANK", "0")
    assert '"exit_code": 2' in ddim("sample", "--shard", "0/2", "--json").stdout
