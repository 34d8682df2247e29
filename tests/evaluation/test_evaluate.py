"""Scores of pictures, as a Judge gives them and as the command line tells them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ddim_cli.errors import UsageError
from ddim_cli.evaluation import digits
from ddim_cli.evaluation.frechet import Moments, frechet_distance
from ddim_cli.evaluation.pictures import open_pictures
from ddim_cli.evaluation.reference import read_statistics, spread_out
from ddim_cli.evaluation.score import Judge
from ddim_cli.outputs.contact_sheet import GAP


def save(folder, pictures, ending="png"):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:06d}.{ending}" for i in range(len(pictures))]
    for path, pixels in zip(paths, pictures, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def samples(bundled):
    """The 36 digits on the bundled model's card."""
    sheet = np.asarray(Image.open(bundled / "samples.png").convert("L"))
    # They are enlarged by three there.
    starts = [GAP + i * (96 + GAP) for i in range(6)]
    assert sheet.shape == (starts[-1] + 96 + GAP, starts[-1] + 96 + GAP)
    return [sheet[y : y + 96 : 3, x : x + 96 : 3] for y in starts for x in starts]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A feature network of the user's own: the mean colours of the four quarters."""
    path = tmp_path_factory.mktemp("network") / "colours.pt"
    torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())).save(str(path))
    return path


def test_what_ships_is_small_and_belongs_together():
    files = [digits.WEIGHTS, digits.REFERENCE]
    assert sum(path.stat().st_size for path in files) < 1 << 20
    reference = Judge.open("mnist").reference
    assert reference.gaussian.count == 10_000
    # Its features are of some of the pictures that its Gaussian is of.
    some = Moments()
    some.add(reference.features)
    assert len(reference.features) == 2000
    assert frechet_distance(some.gaussian(), reference.gaussian) < 2


def test_noise_is_far_from_the_digits(samples, tmp_path):
    judge = Judge.open("mnist")
    drawn = judge.score(save(tmp_path / "drawn", samples))
    noisy = judge.score(save(tmp_path / "noise", noise(36, 32, 32)))
    assert drawn.value * 20 < noisy.value
    assert drawn.kid.mean * 20 < noisy.kid.mean
    assert drawn.label == "Frechet distance (mnist-digits)"
    assert "FID" not in json.dumps(drawn.as_json())
    assert drawn.warning == (
        "few pictures for 64 features (36 pictures; 640 would do): the distance is too large, and may be compared only "
        "with one of as many pictures"
    )


def test_blurred_digits_are_further_away_than_sharp_ones(samples, tmp_path):
    judge = Judge.open("mnist")
    blurred = [np.asarray(Image.fromarray(p).resize((8, 8), Image.BOX).resize((32, 32))) for p in samples]
    sharp = judge.score(save(tmp_path / "sharp", samples))
    assert judge.score(save(tmp_path / "blurred", blurred)).value > 1.5 * sharp.value


def test_neither_order_nor_batches_matter(samples, tmp_path):
    paths = save(tmp_path / "drawn", samples)
    first = Judge.open("mnist").score(paths)
    assert Judge.open("mnist").score(paths[::-1]).value == pytest.approx(first.value, rel=1e-6)
    for size in (1, 7):
        assert Judge.open("mnist", batch_size=size).score(paths).value == pytest.approx(first.value, rel=1e-5)


def test_digits_without_their_border_score_the_same(samples, tmp_path):
    cut = [np.pad(p[2:30, 2:30], 2) for p in samples]
    judge = Judge.open("mnist")
    whole = judge.score(save(tmp_path / "whole", cut))
    bare = judge.score(save(tmp_path / "bare", [p[2:30, 2:30] for p in samples]))
    assert bare.value == pytest.approx(whole.value, rel=1e-6)
    doubled = judge.score(save(tmp_path / "doubled", [np.kron(p, np.ones((2, 2), np.uint8)) for p in samples]))
    assert "pictures were resized from 64 x 64 to 32 x 32" in doubled.warning


def test_a_score_of_known_pictures_in_closed_form(network, tmp_path):
    """Every picture is one grey value, so all features are equal: the distance is that of twelve equal values."""
    a, b = [20, 40, 60, 80], [100, 110, 120, 130, 140]
    shape = np.ones((4, 4, 3), np.uint8)
    reference, paths = tmp_path / "a", save(tmp_path / "b", [shape * v for v in b])
    save(reference, [shape * v for v in a])
    score = Judge.open(str(reference), str(network)).score(paths)
    mean, deviation = (np.mean(a) - np.mean(b)) / 255, (np.std(a, ddof=1) - np.std(b, ddof=1)) / 255
    assert score.value == pytest.approx(12 * (mean**2 + deviation**2), rel=1e-5)
    assert (score.images, score.features, score.reference_images) == (5, 12, 4)


def test_a_reference_may_be_a_folder_an_array_or_kept_statistics(network, tmp_path):
    reference, paths = noise(30, 8, 8, 3), save(tmp_path / "b", noise(20, 8, 8, 3, seed=1) // 2)
    save(tmp_path / "a", reference)
    np.savez_compressed(tmp_path / "a.npz", arr_0=reference)
    judge = Judge.open(str(tmp_path / "a"), str(network), batch_size=8)
    judge.keep_reference(tmp_path / "kept.npz")
    expected = judge.score(paths)
    for name in ("a.npz", "kept.npz"):
        found = Judge.open(str(tmp_path / name), str(network), batch_size=8).score(paths)
        assert found.value == pytest.approx(expected.value, rel=1e-9)
        assert found.kid == pytest.approx(expected.kid, rel=1e-5)
        assert found.reference_images == 30
    with pytest.raises(UsageError, match=r"kept.npz: was made with another extractor .* than mnist-digits"):
        Judge.open(str(tmp_path / "kept.npz"), "mnist")


def test_statistics_of_other_tools_are_read(network, tmp_path):
    paths = save(tmp_path / "b", noise(20, 8, 8, 3))
    np.savez(tmp_path / "s.npz", mu=np.zeros(12), sigma=np.eye(12))
    score = Judge.open(str(tmp_path / "s.npz"), str(network)).score(paths)
    assert score.kid is None
    assert score.reference_images is None
    assert score.value > 12 * 0.4**2
    np.savez(tmp_path / "t.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UsageError, match=r"t.npz: is of 2048 features, and colours.pt gives 12"):
        Judge.open(str(tmp_path / "t.npz"), str(network)).score(paths)
    # With pictures beside them, statistics are Inception's, as in guided-diffusion's files; another network takes the
    # pictures.
    np.savez(tmp_path / "u.npz", mu=np.zeros(12), sigma=np.eye(12), arr_0=noise(20, 8, 8, 3))
    assert Judge.open(str(tmp_path / "u.npz"), str(network)).score(paths).value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu and sigma are \[3\] and \[4, 4\]"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "not finite"),
        ({"arr_0": np.zeros((3, 8, 8, 3), np.float32)}, r"arr_0 is float32 \[3, 8, 8, 3\]; expected uint8"),
        ({"arr_0": np.zeros((3, 8, 8, 4), np.uint8)}, r"arr_0 is uint8 \[3, 8, 8, 4\]"),
        ({"other": np.zeros(3)}, "holds no array arr_0"),
        ({"mu": np.array([{}], object), "sigma": np.eye(1)}, "not a whole .npz of statistics"),
    ],
)
def test_arrays_that_are_no_reference(network, tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        Judge.open(str(tmp_path / "a.npz"), str(network))


def test_a_cut_array_is_an_error(network, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=noise(20, 8, 8, 3))
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match="not a whole"):
        Judge.open(str(tmp_path / "a.npz"), str(network))


def test_many_features_are_thinned_evenly():
    assert spread_out(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spread_out(10, 4).tolist() == [0, 2, 5, 7]


def test_folders_of_all_sorts_of_pictures(tmp_path):
    (tmp_path / "more").mkdir()
    grey, colours = noise(6, 4), noise(4, 6, 3, seed=1)
    Image.fromarray(colours).save(tmp_path / "a.png")
    Image.fromarray(colours).convert("P").save(tmp_path / "b.png")
    Image.fromarray(grey).save(tmp_path / "c.PNG", "PNG")
    Image.fromarray(grey).save(tmp_path / "more" / "d.jpg")
    Image.fromarray(np.dstack([colours, colours[:, :, :1]])).save(tmp_path / "more" / "e.png")
    (tmp_path / "notes.txt").write_text("no picture")
    # Neither hidden files nor what this tool makes of many pictures.
    for name in (".hidden.png", "strip.png", "strip.gif", "000003.x0.png"):
        (tmp_path / name).write_text("no picture")
    shapes = [batch.shape for batch in open_pictures(tmp_path).batches(4)]
    assert shapes == [(2, 4, 6, 3), (2, 6, 4, 1), (1, 4, 6, 3)]
    first = next(open_pictures(tmp_path, 1).batches(4))
    np.testing.assert_array_equal(first[0], colours)


def test_the_command_line_scores_a_folder_and_its_array_alike(ddim, tiny_model, network, tmp_path):
    save(tmp_path / "reference", noise(12, 8, 8, 3))
    sample = ["sample", "-m", tiny_model, "--steps", 2, "-n", 6, "-q"]
    assert ddim(*sample, "-o", "out", "--npz", "out.npz").exit_code == 0
    assert ddim(*sample, "-o", "subdirs", "--subdirs").exit_code == 0
    options = ["--reference", "reference", "--extractor", network, "--device", "cpu"]
    results = [ddim("evaluate", name, *options, "--json") for name in ("out", "out.npz", "subdirs")]
    found = [json.loads(result.stdout) for result in results]
    assert [each.pop("pictures") for each in found] == ["out", "out.npz", "subdirs"]
    assert found[0] == found[1] == found[2]
    assert found[0]["images"] == 6
    assert found[0]["metric"] == "Frechet distance"
    assert found[0]["label"] == "Frechet distance (colours.pt)"
    assert found[0]["extractor"]["name"] == "colours.pt"
    assert len(found[0]["reference"].pop("sha256")) == 64
    assert found[0]["reference"] == {"source": "reference", "images": 12}
    assert found[0]["kid"]["subset_size"] == 3
    assert "few pictures for 12 features (6 pictures and 12 in the reference; 120 would do)" in found[0]["warning"]
    assert "warning: few pictures" in results[0].stderr

    shown = ddim("evaluate", "out", *options)
    assert shown.exit_code == 0
    assert f"Frechet distance (colours.pt): {found[0]['value']:.3g}" in shown.stdout
    assert "FID" not in shown.stdout + shown.stderr
    assert "features: colours.pt, 12 of them, sha256" in shown.stdout
    assert "reference: reference (12 pictures)" in shown.stdout
    assert float(ddim("evaluate", "out", *options, "-q").stdout) == found[0]["value"]

    kept = ddim("evaluate", "out", *options, "--keep-reference", "kept.npz", "--json")
    again = ddim("evaluate", "out", "--reference", "kept.npz", "--extractor", network, "--json")
    assert json.loads(again.stdout)["value"] == json.loads(kept.stdout)["value"] == found[0]["value"]
    assert read_statistics(tmp_path / "kept.npz").gaussian.count == 12

    four = json.loads(ddim("evaluate", "out", *options, "-n", 4, "--json").stdout)
    assert four["images"] == 4
    (tmp_path / "out" / "000004.png").unlink()
    (tmp_path / "out" / "000004.json").unlink()
    assert json.loads(ddim("evaluate", "out", *options, "-n", 4, "--json").stdout)["value"] == four["value"]
    missing = ddim("evaluate", "out", *options)
    assert missing.exit_code == 2
    assert "out: lacks 1 of 6 pictures (seeds 4); make them with the command that began" in missing.stderr


def test_a_sweep_is_scored_cell_by_cell(ddim, tiny_model, network, tmp_path):
    save(tmp_path / "reference", noise(12, 8, 8, 3))
    axes = ["--axis", "steps=1,2", "--axis", "eta=0.0,1.0"]
    assert ddim("sweep", "-m", tiny_model, *axes, "-n", 4, "-o", "sweep", "-q").exit_code == 0
    before = (tmp_path / "sweep" / "sweep.json").read_bytes()
    options = ["--reference", "reference", "--extractor", network]
    found = json.loads(ddim("evaluate", "sweep", *options, "--json").stdout)
    assert found["axes"] == [{"name": "steps", "values": ["1", "2"]}, {"name": "eta", "values": ["0.0", "1.0"]}]
    assert [cell["at"] for cell in found["cells"]] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for cell in found["cells"]:
        alone = json.loads(ddim("evaluate", f"sweep/{cell['folder']}", *options, "--json").stdout)
        alone.pop("pictures")
        assert cell["score"] == alone
    shown = ddim("evaluate", "sweep", *options)
    values = [cell["score"]["value"] for cell in found["cells"]]
    assert f"eta \\ steps: 0.0, 1: {values[0]:.3g}, 2: {values[2]:.3g}\n" in shown.stdout
    assert f"eta \\ steps: 1.0, 1: {values[1]:.3g}, 2: {values[3]:.3g}\n" in shown.stdout
    assert (tmp_path / "sweep" / "sweep.json").read_bytes() == before

    manifest = json.loads(before)
    manifest["cells"][1]["finished"] = False
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(manifest))
    partly = json.loads(ddim("evaluate", "sweep", *options, "--json").stdout)
    assert [cell["score"] is None for cell in partly["cells"]] == [False, True, False, False]
    assert "3 cells, 1 not finished" in ddim("evaluate", "sweep", *options).stdout
    manifest["cells"][0]["seeds"] = "no seeds"
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(manifest))
    assert "sweep.json: names no seeds of a cell" in ddim("evaluate", "sweep", *options).stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none", "--reference", "mnist"], "none: there is no such folder or file"),
        (["empty", "--reference", "mnist"], "empty: holds no pictures"),
        (["a/notes.txt", "--reference", "mnist"], "a/notes.txt: is neither a folder of pictures nor an .npz"),
        (["a", "--reference", "none"], "none: there is no such folder or file"),
        (["a", "--reference", "mnist", "-n", 9], "a: holds 3 pictures, and -n asks for 9"),
        (["one", "--reference", "mnist"], "one: a distance needs at least two pictures, and here is 1"),
        (["broken", "--reference", "mnist"], "broken/000001.png: cannot be read as a picture"),
        (["deep", "--reference", "mnist"], "deep/a.png: has more than eight bits a channel"),
        (["a", "--reference", "mnist", "--extractor", "x.pt"], "are no use to another extractor"),
        (["a", "--reference", "a", "--extractor", "x.pt"], "--extractor x.pt: there is no such file"),
        (["a", "--reference", "mnist", "--inception", "x.pth"], "--inception is for Inception's weights"),
        (["a", "--reference", "a", "--inception", "x.pth"], "--inception x.pth: there is no such file"),
        (["a", "--reference", "mnist", "--keep-reference", "x.txt"], "the name must end in .npz"),
        (["a", "--reference", "mnist", "--keep-reference", "b/x.npz"], "there is no folder b"),
        (["a", "--reference", "mnist", "--keep-reference", "there.npz"], "there.npz: is there, and is no statistics"),
        (["a", "--reference", "mnist", "--device", "cuda:99"], "device cuda:99: there is n"),
        (["sweep", "--reference", "mnist"], "sweep/sweep.json: is not a sweep.json of ddim"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value)),
)
def test_what_cannot_be_scored_is_said_in_a_sentence(ddim, tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.npz").write_bytes(b"mine")
    save(tmp_path / "a", noise(3, 32, 32))
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    save(tmp_path / "one", noise(1, 32, 32))
    save(tmp_path / "broken", noise(3, 32, 32))
    (tmp_path / "broken" / "000001.png").write_bytes(b"\x89PNG no more")
    (tmp_path / "deep").mkdir()
    Image.fromarray(noise(8, 8).astype(np.uint16)).save(tmp_path / "deep" / "a.png")
    Image.fromarray(noise(8, 8).astype(np.uint16)).save(tmp_path / "deep" / "b.png")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    result = ddim("evaluate", *args, "--json")
    assert result.exit_code == 2
    assert message in result.stderr
    assert message in json.loads(result.stdout)["error"]
