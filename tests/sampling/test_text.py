"""Text-to-image models: prompts, what a picture depends on, what its sidecar says, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipelines import make_text_pipeline

from ddim_cli.config.layers import layers_of
from ddim_cli.models.conditions import Blend, Conditioning, TextCondition
from ddim_cli.models.load import load_sampling_network
from ddim_cli.models.text import TextEncoder
from ddim_cli.sampling.api import sample
from ddim_cli.sampling.items import SeedItems
from ddim_cli.sampling.resolve import resolve
from ddim_cli.sampling.sampler import make_sampler

PROMPTS = ["a bold seven", "zero", "the thin one"]
FAST = {"steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tiny-text"
    make_text_pipeline(folder, limit=8)
    return folder


def pictures(model, runtime=None, **settings):
    config = {"sampling": {**FAST, **settings}, "runtime": runtime or {}}
    return list(sample(config, model=model))


def off(a, b):
    """The largest difference of two pictures, in 255ths."""
    return np.abs(np.asarray(a.image).astype(int) - np.asarray(b.image).astype(int)).max()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_no_batch_changes_a_picture(model, batch_size):
    together = pictures(model, prompt=PROMPTS, seeds="0-4", batch_size=3, eta=0.5, negative_prompt="a")
    again = pictures(model, prompt=PROMPTS, seeds="0-4", batch_size=batch_size, eta=0.5, negative_prompt="a")
    assert max(map(off, together, again)) <= 1


def test_a_picture_has_the_prompt_of_its_seed(model):
    listed = pictures(model, prompt=PROMPTS, seeds="0-4", batch_size=1)
    assert [each.metadata["sampling"]["prompt"] for each in listed] == [PROMPTS[s % 3] for s in range(5)]
    for each in listed:
        [alone] = pictures(model, prompt=PROMPTS[each.seed % 3], seeds=str(each.seed), batch_size=1)
        assert off(each, alone) == 0


def test_prompts_negative_prompts_and_guidance_change_pictures(model):
    made = [
        pictures(model, prompt="zero", seeds="3", **more)[0]
        for more in ({}, {"negative_prompt": "seven"}, {"guidance_scale": 5.0}, {"guidance_scale": 1.0})
    ]
    made.append(pictures(model, prompt="one", seeds="3")[0])
    hashes = {each.metadata["image"]["pixels_sha256"] for each in made}
    assert len(hashes) == len(made)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (3.0, 4)])
def test_the_network_sees_two_rows_an_image_only_where_there_is_guidance(model, monkeypatch, scale, rows):
    run = resolve(layers_of({"sampling": {"prompt": "zero", "guidance_scale": scale, "num_images": 2}}, model))
    network, seen = load_sampling_network(run.model), []
    whole = network.body

    def counting(x, projections, texts):
        seen.append(len(texts))
        return whole(x, projections, texts)

    monkeypatch.setattr(network, "body", counting)
    sampler = make_sampler(run, network, torch.device("cpu"), torch.float32)
    [condition] = sampler.conditions(SeedItems.of(run.config), 2)
    sampler.down.network(torch.zeros(2, *sampler.shape), torch.zeros(1, dtype=torch.int64), condition)
    assert seen == [rows]


def test_offloading_frees_both_parts_and_changes_nothing(model):
    here, freed = (pictures(model, {"offload": each}, prompt="zero", seeds="0-1") for each in (False, True))
    assert [off(a, b) for a, b in zip(here, freed, strict=True)] == [0, 0]
    run = resolve(layers_of({"sampling": {"prompt": "zero"}, "runtime": {"offload": True}}, model))
    sampler = make_sampler(run, load_sampling_network(run.model), torch.device("cpu"), torch.float32)
    sampler.condition.of([Conditioning(prompt="zero")], sampler.device)
    sampler.decoder.decode(torch.zeros(1, *sampler.shape))
    assert sampler.condition._encoder._network is None
    assert sampler.decoder._network is not None
    sampler.decoder.release()
    assert sampler.decoder._network is None


def test_a_blend_lies_between_the_embeddings_of_its_ends(model):
    description = resolve(layers_of({"sampling": {"prompt": ""}}, model)).model
    encoder = TextEncoder(description.latents.text)
    condition = TextCondition(encoder, lambda text: text, guided=False)

    def of(text):
        return condition.of([Conditioning(prompt=text)], torch.device("cpu"))[0]

    middle = of(Blend(("zero", "one"), 0.25))
    torch.testing.assert_close(middle, 0.75 * of("zero") + 0.25 * of("one"))
    assert torch.equal(of(Blend(("zero", "one"), 0.0)), of("zero"))
    assert torch.equal(of(Blend(("zero", "one"), 1.0)), of("one"))


def test_sidecars_say_prompts_and_tokens_and_replay_makes_the_same(ddim, model):
    command = ["sample", "-m", model, "--prompt", "a bold seven", "--prompt", "zero", "--negative-prompt", "thin"]
    assert ddim(*command, "--steps", 3, "-n", 3, "-o", "out", "-b", 2).exit_code == 0
    said = [json.loads(Path(f"out/00000{seed}.json").read_text())["sampling"] for seed in range(3)]
    assert [each["prompt"] for each in said] == ["a bold seven", "zero", "a bold seven"]
    assert [each["tokens"] for each in said] == [3, 1, 3]
    assert {each["negative_prompt"] for each in said} == {"thin"}
    assert {each["guidance_scale"] for each in said} == {7.5}
    inside = json.loads(Image.open("out/000001.png").text["ddim"])
    assert inside["sampling"]["prompt"] == "zero"
    for command in (["verify", "out"], ["replay", "--check", *(f"out/00000{seed}.json" for seed in range(3))]):
        result = ddim(*command)
        assert result.exit_code == 0, result.stderr


def test_shards_and_resumes_of_prompts_fit_together(ddim, model):
    command = ["sample", "-m", model, "--prompt", "zero", "--prompt", "one", "--steps", 3, "-n", 5]
    assert ddim(*command, "-o", "whole").exit_code == 0
    assert ddim(*command, "-o", "parts", "--shard", "0/2", "-b", 1).exit_code == 0
    assert ddim(*command, "-o", "parts", "--shard", "1/2", "-b", 3).exit_code == 0
    assert ddim("compare", "whole", "parts").exit_code == 0
    other = ddim(*command, "--prompt", "thin", "-o", "parts")
    assert other.exit_code == 2
    assert "sampling.prompts" in other.stderr


def test_a_prompt_that_is_too_long_is_told_once_with_what_was_left_out(ddim, model):
    result = ddim(
        "sample", "-m", model, "--prompt", "a bold seven the thin one zero zero", "--steps", 1, "-n", 2, "-b", 1
    )
    assert result.exit_code == 0
    text = " ".join(result.stderr.split())
    assert text.count("has no effect: 'zero zero'") == 1


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("mnist", ["--prompt", "seven"], "mnist takes no text"),
        ("mnist", ["--negative-prompt", "seven"], "mnist takes no text"),
        ("mnist", ["--set", "model.latent_scale=1.0"], "mnist has no autoencoder"),
        (None, [], "say what it is to show"),
        (None, ["--prompt", "zero", "--classes", "3"], "takes a prompt, not a class"),
        (None, ["--prompt", "zero", "--image-size", "33"], "must be multiples of 2"),
        (None, ["--prompt", "zero", "--set", "model.null_class=3"], "takes text"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(ddim, model, source, options, says):
    result = ddim("sample", "-m", source or model, *options, "-o", "out")
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
    assert not Path("out").exists()


def test_what_has_no_effect_or_makes_garbage_is_told(ddim, model):
    run = ["sample", "-m", model, "--prompt", "zero", "--steps", 1, "-n", 1]
    said = ddim(*run, "--negative-prompt", "one", "--guidance-scale", 1).stderr
    assert "sampling.negative_prompt has no effect" in " ".join(said.split())
    assert "bounds latents" in " ".join(ddim(*run, "--clip-sample").stderr.split())


def test_a_missing_extra_is_told(ddim, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = ddim("sample", "-m", model, "--prompt", "zero", "-o", "out")
    assert result.exit_code == 2
    assert "pip install 'ddim-cli[text]'" in " ".join(result.stderr.split())
    assert not Path("out").exists()
