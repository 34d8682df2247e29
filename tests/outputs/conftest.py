"""Folders for pages: a run, a sweep."""

import json

import pytest
from typer.testing import CliRunner

from ddim_cli.cli.app import app


def sample(*args):
    result = CliRunner().invoke(app, ["sample", *map(str, args), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def run_folder(tiny_model, tmp_path_factory):
    """Twelve pictures, seeds 0-9 and 100-101."""
    folder = tmp_path_factory.mktemp("run") / "a run"
    sample("-m", tiny_model, "--steps", 2, "--seeds", "0-9,100-101", "-b", 12, "-o", folder)
    return folder


@pytest.fixture(scope="session")
def sweep_folder(tiny_model, tmp_path_factory):
    """steps 1, 2, 3 x eta 0 and the large variance; in the last column fewer images, in the last cell none yet."""
    root = tmp_path_factory.mktemp("sweep") / "sweep"
    steps = [(1, {"sampling.steps": 1}), (2, {"sampling.steps": 2}), (3, {"sampling.steps": 3})]
    variants = [("eta=0.0", {"sampling.eta": 0.0}), ("variance=large", {"sampling.variance": "large"})]
    cells = []
    for i, (count, _) in enumerate(steps):
        for j, (label, own) in enumerate(variants):
            name, images = f"steps={count}, {label}", 4 if count == 3 else 6
            settings = [f"--set={key}={json.dumps(value)}" for key, value in own.items()]
            made = (i, j) != (2, 1)
            if made:
                sample(
                    "-m", tiny_model, "--steps", count, "-n", images, "-b", 6, *settings, "--no-grid", "-o", root / name
                )
            score = {
                "metric": "Frechet distance",
                "label": "Frechet distance (mnist-digits)",
                "value": 30.5 / (i + 1) + 100 * j,
                "kid": {"mean": 0.0123, "std": 0.001},
                "images": images,
                "extractor": {"name": "mnist-digits"},
                "reference": {"source": "mnist", "images": 10000},
                "warning": "6 images are few",
            }
            cells.append(
                {
                    "at": [i, j],
                    "folder": name,
                    "seeds": f"0-{images - 1}",
                    "images": images,
                    "set": {"sampling.steps": count, **own},
                    "finished": made,
                    "images_per_second": 12.3 * (i + 1) if made else None,
                    "score": score if made else None,
                }
            )
    model = json.loads((root / cells[0]["folder"] / "run.json").read_text())["model"]
    sweep = {
        "schema": "ddim-cli/sweep/1",
        "created": "2026-01-02T03:04:05Z",
        "model": model,
        "seeds": "0-5",
        "images": 6,
        "axes": [
            {"name": "steps", "values": [{"label": str(count), "set": own} for count, own in steps]},
            {"name": "variant", "values": [{"label": label, "set": own} for label, own in variants]},
        ],
        "overrides": [{"when": {"steps": 3}, "set": {"num_images": 4}}],
        "cells": cells,
        "sheet": "sweep.png",
    }
    (root / "sweep.json").write_text(json.dumps(sweep))
    return root
