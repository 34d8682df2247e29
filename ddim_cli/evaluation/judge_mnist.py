"""How good the bundled ``mnist`` model is: the figures of its card.

    python -m ddim_cli.evaluation.judge_mnist mnist.npz

Says how well the shipped digit classifier does on the test images, then samples and says of how many
pictures it is sure, and how the digits are distributed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from ddim_cli.evaluation.digits import load_classifier, probabilities
from ddim_cli.models.bundled.training import load_images, to_model_range
from ddim_cli.sampling.api import sample

SURE = 0.9


def figures(found: Tensor) -> dict[str, object]:
    """Of [N, 10] probabilities: the share that is sure of its digit, and the smallest and largest share of a digit."""
    confidence, digit = found.max(1)
    shares = torch.bincount(digit, minlength=10) / len(found)
    return {
        "images": len(found),
        "sure": round((confidence >= SURE).float().mean().item(), 4),
        "digits": [round(share, 4) for share in shares.tolist()],
    }


def print_real_figures(network: nn.Module, data: Path) -> None:
    """Print how well the classifier does on the test digits of an .npz file, as a line of JSON."""
    images, labels = load_images(data, "test")
    real = probabilities(network, to_model_range(images))
    accuracy = (real.argmax(1) == labels).float().mean().item()
    print(json.dumps({"classifier": {"test_accuracy": round(accuracy, 4)}, "real digits": figures(real)}), flush=True)


def judge(
    data: Annotated[Path, typer.Argument(help="An .npz with x_test, y_test.")],
    model: Annotated[str, typer.Option("--model", "-m", help="What to judge.")] = "mnist",
    num_images: Annotated[int, typer.Option("--num-images", "-n")] = 1000,
    steps: Annotated[int, typer.Option()] = 50,
) -> None:
    """Print the figures of a digit model as JSON."""
    network = load_classifier()
    print_real_figures(network, data)
    config = {"sampling": {"num_images": num_images, "steps": steps}}
    pictures = torch.stack([picture.tensor.clamp(-1, 1) for picture in sample(config, model=model)])
    print(json.dumps({"sampled": figures(probabilities(network, pictures))}), flush=True)


if __name__ == "__main__":
    typer.run(judge)
