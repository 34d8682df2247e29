"""``--format tar``: pictures in shards, read back by other programs and by this one."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

PLAN = ("--steps", 2, "-b", 4, "--device", "cpu", "--no-compile")
TAR = ("--format", "tar", "--set", "output.shard_size=10")


@pytest.fixture
def sample(ddim, tiny_model):
    def run(*args, plan=("-n", 25), to="out", shards=TAR):
        return ddim("sample", "-m", tiny_model, *PLAN, *plan, *shards, "-o", to, *args)

    return run


@pytest.fixture
def shards(sample, tmp_path):
    """25 pictures in three shards."""
    assert sample("--eta", 0.5).exit_code == 0
    return tmp_path / "out"


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tars(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def members(folder) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            found |= {info.name: archive.extractfile(info).read() for info in archive}
    return found


def test_a_run_writes_whole_shards_and_nothing_else(shards):
    assert names(shards) == [
        "000000.index.json", "000000.tar", "000001.index.json", "000001.tar", "000002.index.json", "000002.tar",
        "grid.png", "run.json",
    ]  # fmt: skip
    manifest = json.loads((shards / "run.json").read_text())
    assert manifest["output"] == {"format": "tar", "shard_size": 10}
    assert (manifest["seeds"], manifest["images"], manifest["totals"]["images"]) == ("0-24", 25, 25)
    assert list(members(shards)) == [f"{seed:06d}.{kind}" for seed in range(25) for kind in ("png", "json")]


def test_shards_hold_what_files_hold(shards, sample, tmp_path):
    assert sample("--eta", 0.5, to="files", shards=()).exit_code == 0
    inside = members(shards)
    for seed in range(25):
        png, sidecar = inside[f"{seed:06d}.png"], json.loads(inside[f"{seed:06d}.json"])
        assert png == (tmp_path / "files" / f"{seed:06d}.png").read_bytes()
        other = json.loads((tmp_path / "files" / f"{seed:06d}.json").read_text())
        assert sidecar == {key: value for key, value in other.items() if key not in ("timing", "created")}
    assert (shards / "grid.png").read_bytes() == (tmp_path / "files" / "grid.png").read_bytes()


def test_webdataset_reads_them(shards):
    webdataset = pytest.importorskip("webdataset")
    found = list(webdataset.WebDataset(str(shards / "{000000..000002}.tar"), shardshuffle=False))
    assert [each["__key__"] for each in found] == [f"{seed:06d}" for seed in range(25)]
    picture = found[7]
    assert json.loads(picture["json"])["seed"] == 7
    assert Image.open(io.BytesIO(picture["png"])).size == (8, 8)


def test_the_same_command_does_nothing(sample, shards):
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    result = sample("--eta", 0.5, "--json")
    assert json.loads(result.stdout)["made"] == 0
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before


@pytest.mark.parametrize("count", [2, 3, 5])
def test_parts_are_whole_shards_and_give_the_same_bytes(sample, shards, tmp_path, count):
    for part in range(count):
        result = sample("--eta", 0.5, "--shard", f"{part}/{count}", "--json", to="parts")
        told = json.loads(result.stdout)
        assert told["made"] == sum(size for shard, size in enumerate((10, 10, 5)) if shard % count == part)
        assert told["finished"] == (part == min(count, 3) - 1 or part > 2)
    assert tars(tmp_path / "parts") == tars(shards)
    assert names(tmp_path / "parts") == names(shards)


def test_a_shard_that_is_lost_or_cut_is_made_again(sample, shards):
    before = tars(shards)
    (shards / "000000.index.json").unlink()
    (shards / "000001.tar").unlink()
    with (shards / "000002.tar").open("r+b") as tar:
        tar.truncate(3000)
    assert json.loads(sample("--eta", 0.5, "--json").stdout)["made"] == 25
    assert tars(shards) == before


def test_a_plan_grows_at_its_end(sample, shards, tmp_path):
    result = sample("--eta", 0.5, "--json", plan=("-n", 43))
    assert json.loads(result.stdout)["made"] == 18
    assert sample("--eta", 0.5, plan=("-n", 43), to="at-once").exit_code == 0
    assert tars(shards) == tars(tmp_path / "at-once")
    # A shorter plan is there already, and the longer one stays.
    assert json.loads(sample("--eta", 0.5, "--json", plan=("-n", 12)).stdout)["made"] == 0
    assert json.loads((shards / "run.json").read_text())["seeds"] == "0-42"


@pytest.mark.parametrize("plan", [("--seeds", "5-30"), ("--seeds", "0-9,11-40"), ("--seed", 100)])
def test_a_plan_of_other_seeds_is_refused(sample, shards, plan):
    before = tars(shards)
    result = sample("--eta", 0.5, plan=plan)
    assert result.exit_code == 2
    assert "has shards of the seeds 0-24, and a plan in shards can only grow at its end" in result.stderr
    assert tars(shards) == before


def test_seeds_lie_in_the_order_of_the_plan(sample, tmp_path):
    assert sample(plan=("--seeds", "100-105,7,0-6")).exit_code == 0
    assert [name for name in members(tmp_path / "out") if name.endswith(".png")][5:8] == [
        "000105.png", "000007.png", "000000.png",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seeds"] == "100-105,7,0-6"
    assert json.loads(sample("--json", plan=("--seeds", "100-105,7,0-6")).stdout)["made"] == 0


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        ((), 'with output.format = "files", this run has "tar"'),
        (("--format", "tar"), "with output.shard_size = 1000, this run has 10"),
        ((*TAR, "--image-format", "webp"), 'with output.image_format = "webp", this run has "png"'),
        ((*TAR, "--steps", "3"), "with sampling.timesteps"),
    ],
)
def test_a_folder_holds_one_kind(sample, tmp_path, shards, said):
    assert sample(to="other", shards=shards).exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    result = sample(to="other")
    assert result.exit_code == 2
    assert said in result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before
    assert sample("--overwrite", to="other").exit_code == 0
    assert sample(to="fresh").exit_code == 0
    assert tars(tmp_path / "other") == tars(tmp_path / "fresh")
    assert names(tmp_path / "other") == names(tmp_path / "fresh")


def test_files_do_not_go_into_a_folder_of_shards(sample, shards):
    result = sample("--eta", 0.5, shards=())
    assert result.exit_code == 2
    assert 'with output.format = "tar", this run has "files"' in result.stderr
    assert sample("--eta", 0.5, "--overwrite", shards=()).exit_code == 0
    assert not list(shards.glob("*.tar"))
    assert not list(shards.glob("*.index.json"))
    assert len(list(shards.glob("*.png"))) == 26


def test_overwrite_makes_a_part_anew(sample, shards):
    before = tars(shards)
    result = sample("--eta", 0.5, "--overwrite", "--shard", "1/3", "--json")
    assert json.loads(result.stdout)["made"] == 10
    assert tars(shards) == before


def test_subdirs_have_no_place(sample):
    result = sample("--subdirs")
    assert result.exit_code == 2
    assert "output.subdirs is for files" in result.stderr


def test_a_dry_run_names_members(sample, tmp_path):
    told = json.loads(sample("--dry-run", "--json").stdout)
    assert told["files"][24] == "out/000002.tar/000024.png"
    assert not (tmp_path / "out").exists()


def test_rows_of_a_job_file(sample, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    rows = [{"name": f"picture {n}", "seed": 100 - n} if n % 3 else {"seed": n} for n in range(12)]
    jobs.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert sample("--items", jobs, plan=()).exit_code == 0
    out = tmp_path / "out"
    inside = members(out)
    assert json.loads(inside["picture 5.json"])["seed"] == 95
    # The file grows.
    jobs.write_text(jobs.read_text() + '{"name": "last", "seed": 3}\n')
    assert json.loads(sample("--items", jobs, "--json", plan=()).stdout)["made"] == 1
    assert list(members(out))[-2:] == ["last.png", "last.json"]
    assert [json.loads(line)["name"] for line in (out / "items.jsonl").read_text().splitlines()][10:] == [
        "picture 10", "picture 11", "last",
    ]  # fmt: skip
    # Not in its middle.
    jobs.write_text(jobs.read_text().replace('"seed": 95', '"seed": 96'))
    result = sample("--items", jobs, plan=())
    assert result.exit_code == 2
    assert f"{jobs}:6: output folder out has another row at this place" in result.stderr


def test_rows_of_several_kinds_lie_in_their_order(sample, tmp_path):
    Image.new("RGB", (8, 8), (200, 30, 60)).save(tmp_path / "red.png")
    jobs = tmp_path / "jobs.jsonl"
    rows = [{"seed": n, "init": "red.png", "strength": (0.5, 1.0)[n % 2]} if n % 5 else {"seed": n} for n in range(23)]
    jobs.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert sample("--items", jobs, plan=()).exit_code == 0
    assert sample("--items", jobs, plan=(), to="files", shards=()).exit_code == 0
    inside = members(tmp_path / "out")
    assert list(inside) == [f"{number:06d}.{kind}" for number in range(23) for kind in ("png", "json")]
    for number in range(23):
        assert inside[f"{number:06d}.png"] == (tmp_path / "files" / f"{number:06d}.png").read_bytes()


def test_a_name_with_a_dot_is_refused(sample, tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"name": "a"}\n{"name": "b.c"}\n')
    result = sample("--items", "jobs.jsonl", plan=())
    assert result.exit_code == 2
    assert "jobs.jsonl:2: the name 'b.c' has a dot, and WebDataset takes what is before it for the key" in result.stderr


# What reads them.


def test_verify_finds_nothing_wrong(ddim, shards):
    result = ddim("verify", "out")
    assert (result.exit_code, result.stdout) == (0, "25 images: all is well\n")


def damaged(path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def test_verify_tells_which_members_a_cut_tar_has_lost(ddim, shards):
    entries = json.loads((shards / "000001.index.json").read_text())["items"]
    with (shards / "000001.tar").open("r+b") as tar:
        tar.truncate(entries[6]["json_offset"] + 5)
    result = ddim("verify", "out", "--json")
    assert result.exit_code == 3
    told = json.loads(result.stdout)
    assert [each["file"] for each in told["problems"]] == ["000001.tar"]
    assert "is cut short" in told["problems"][0]["problem"]
    assert "000016 to 000019" in told["problems"][0]["problem"]


@pytest.mark.parametrize("what", ["picture", "sidecar", "hash", "gone", "no index", "extra", "order"])
def test_verify_finds_what_is_wrong(ddim, shards, what):
    index = json.loads((shards / "000001.index.json").read_text())
    entry = index["items"][3]
    if what == "picture":
        damaged(shards / "000001.tar", entry["offset"] + 60, b"????")
        file = "000001.tar/000013.png"
    elif what == "sidecar":
        damaged(shards / "000001.tar", entry["json_offset"] + 60, b"\0\0\0\0")
        file = "000001.tar/000013.png"
    elif what == "hash":
        entry["pixels_sha256"] = "0" * 64
        (shards / "000001.index.json").write_text(json.dumps(index))
        file = "000001.tar/000013.png"
    elif what == "gone":
        (shards / "000001.tar").unlink()
        file = "000001.tar"
    elif what == "no index":
        (shards / "000001.index.json").unlink()
        file = "000001.tar"
    elif what == "extra":
        for kind in ("tar", "index.json"):
            shutil.copy(shards / f"000001.{kind}", shards / f"000003.{kind}")
        file = "000003.tar"
    else:
        for kind in ("tar", "index.json"):
            (shards / f"000000.{kind}").replace(shards / "kept")
            (shards / f"000001.{kind}").replace(shards / f"000000.{kind}")
            (shards / "kept").replace(shards / f"000001.{kind}")
        file = "000000.tar"
    result = ddim("verify", "out", "--json")
    assert result.exit_code == 3
    assert file in [each["file"] for each in json.loads(result.stdout)["problems"]]


def test_inspect_and_replay_take_members(ddim, shards):
    told = json.loads(ddim("inspect", "out/000001.tar/000013.png", "--json").stdout)
    assert (told["seed"], told["pixels_unchanged"]) == (13, True)
    assert "000013" in ddim("inspect", "out/000001.tar/000013.json").stdout
    result = ddim("replay", "out/000001.tar/000013.json", "out/000000.tar/000002.png", "--check")
    assert result.exit_code == 0
    assert result.stdout == "2 pictures made again: 2 with equal hashes\n"


def test_replay_takes_a_whole_shard(ddim, shards):
    assert ddim("replay", "out/000002.tar", "--check").stdout == "5 pictures made again: 5 with equal hashes\n"


def test_inspect_tells_what_a_shard_holds(ddim, shards):
    told = json.loads(ddim("inspect", "out/000002.tar", "--json").stdout)
    assert (told["images"], told["first"], told["last"]) == (5, "000020", "000024")
    assert "5 images, 000020 to 000024" in ddim("inspect", "out/000002.tar").stdout


def test_compare_and_npz_read_them(ddim, sample, shards, tmp_path):
    assert sample("--eta", 0.5, "--npz", "files.npz", to="files", shards=()).exit_code == 0
    assert sample("--eta", 0.5, "--npz", "shards.npz").exit_code == 0
    assert np.array_equal(np.load(tmp_path / "files.npz")["arr_0"], np.load(tmp_path / "shards.npz")["arr_0"])
    for pair in (("files", "out"), ("out", "files")):
        result = ddim("compare", *pair)
        assert result.exit_code == 0, result.stdout
        assert "25" in result.stdout
    result = sample(to="other")
    assert ddim("compare", "out", "other").exit_code == 3


def test_evaluate_reads_them(ddim, sample, shards):
    network = pytest.importorskip("torch").nn.Flatten()
    import torch

    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 8, 8)), "flat.pt")
    assert sample("--eta", 0.5, to="files", shards=()).exit_code == 0
    scores = [
        json.loads(ddim("evaluate", folder, "--reference", "files", "--extractor", "flat.pt", "--json").stdout)
        for folder in ("files", "out")
    ]
    assert scores[0]["images"] == scores[1]["images"] == 25
    assert scores[0]["value"] == scores[1]["value"]


def test_report_shows_them(ddim, shards):
    result = ddim("report", "out", "--json")
    assert result.exit_code == 0
    page = (shards / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 25
    assert ddim("verify", "out").exit_code == 0


def test_a_latent_has_no_place_in_shards(ddim, sample, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"latent": torch.randn(3, 8, 8)}, tmp_path / "mine.safetensors")
    result = sample("--latents", "mine.safetensors", plan=())
    assert result.exit_code == 2
    assert "--format tar" in result.stderr


@pytest.mark.parametrize("rows", [False, True])
def test_a_shard_that_is_only_begun_is_left_for_others(sample, tmp_path, rows):
    """Another part has written all of its pictures, and was killed before it could put them into place."""
    plan = ("-n", 15)
    if rows:
        (tmp_path / "jobs.jsonl").write_text("".join(f'{{"name": "row {n}"}}\n' for n in range(15)))
        plan = ("--items", "jobs.jsonl")
    assert sample(plan=plan, to="whole").exit_code == 0
    assert sample("--shard", "0/2", plan=plan).exit_code == 0
    out = tmp_path / "out"
    (out / "000000.tar").replace(out / ".000000.tar.spool")
    (out / "000000.index.json").unlink()
    # Whoever comes next puts it there.
    told = json.loads(sample("--shard", "1/2", "--json", plan=plan).stdout)
    assert (told["made"], told["finished"]) == (5, True)
    assert tars(out) == tars(tmp_path / "whole")
