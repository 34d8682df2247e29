"""How good the bundled ``mnist`` model is: the figures of its card.

    python -m ddim_cli.evaluation.judge_mnist mnist.npz

Trains a small digit classifier on the training images (a minute or two on two cores), says how well
it does on the test images, then samples and says of how many pictures it is sure, and how the
digits are distributed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from ddim_cli.models.bundled.recipe import load_images, to_model_range
from ddim_cli.sampling.api import sample

SURE = 0.9


def build_classifier() -> nn.Sequential:
    """[N, 1, 32, 32] in [-1, 1] -> logits [N, 10]; 0.1 M parameters."""

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16),
        nn.MaxPool2d(2),
        *block(16, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        *block(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 16, 10),
    )


def _minibatches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield from torch.randperm(count, generator=generator).split(size)


def train_classifier(images: Tensor, labels: Tensor, epochs: int, seed: int = 0) -> nn.Sequential:
    """Train on uint8 images [N, 1, 32, 32], each moved by up to two pixels."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = build_classifier().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for index in _minibatches(len(images), 128, generator):
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            x = to_model_range(images[index].roll(shift, (2, 3)))
            loss = nn.functional.cross_entropy(network(x), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.inference_mode()
def probabilities(network: nn.Module, x: Tensor) -> Tensor:
    """[N, 1, 32, 32] in [-1, 1] -> [N, 10]."""
    return torch.cat([network(part).softmax(1) for part in x.split(500)])


def figures(found: Tensor) -> dict[str, object]:
    """Of [N, 10] probabilities: the share that is sure of its digit, and the smallest and largest share of a digit."""
    confidence, digit = found.max(1)
    shares = torch.bincount(digit, minlength=10) / len(found)
    return {
        "images": len(found),
        "sure": round((confidence >= SURE).float().mean().item(), 4),
        "digits": [round(share, 4) for share in shares.tolist()],
    }


def judge(
    data: Annotated[Path, typer.Argument(help="An .npz with x_train, y_train, x_test, y_test.")],
    model: Annotated[str, typer.Option("--model", "-m", help="What to judge.")] = "mnist",
    num_images: Annotated[int, typer.Option("--num-images", "-n")] = 1000,
    steps: Annotated[int, typer.Option()] = 50,
    epochs: Annotated[int, typer.Option(help="Of the classifier's training.")] = 4,
    keep: Annotated[Path | None, typer.Option(help="Keep the classifier here, and take it from here.")] = None,
) -> None:
    """Print the figures of a digit model as JSON."""
    if keep is not None and keep.exists():
        network = build_classifier()
        network.load_state_dict(torch.load(keep, weights_only=True))
        network.eval()
    else:
        network = train_classifier(*load_images(data, "train"), epochs)
        if keep is not None:
            torch.save(network.state_dict(), keep)
    images, labels = load_images(data, "test")
    real = probabilities(network, to_model_range(images))
    accuracy = (real.argmax(1) == labels).float().mean().item()
    print(json.dumps({"classifier": {"test_accuracy": round(accuracy, 4)}, "real digits": figures(real)}), flush=True)
    config = {"sampling": {"num_images": num_images, "steps": steps}}
    pictures = torch.stack([picture.tensor.clamp(-1, 1) for picture in sample(config, model=model)])
    print(json.dumps({"sampled": figures(probabilities(network, pictures))}), flush=True)


if __name__ == "__main__":
    typer.run(judge)
