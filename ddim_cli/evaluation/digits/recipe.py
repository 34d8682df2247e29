"""The recipe that trained the shipped digit classifier, and took the statistics of the MNIST test digits.

    python -m ddim_cli.evaluation.digits.recipe mnist.npz --export-to DIR

A few minutes on one core. Writes classifier.safetensors, in float16, and mnist_test.npz, in the
features of the classifier as it was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn

from ddim_cli.evaluation import digits
from ddim_cli.evaluation.frechet import Moments
from ddim_cli.evaluation.reference import spread_out, write_statistics
from ddim_cli.models.bundled.training import load_images, to_model_range
from ddim_cli.models.hashing import file_sha256

# Of the test digits' features so many are kept for the kernel distance.
KEPT = 2000


def _minibatches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield from torch.randperm(count, generator=generator).split(size)


def train_classifier(images: Tensor, labels: Tensor, epochs: int, seed: int = 0) -> digits.Classifier:
    """Train on uint8 images [N, 1, 32, 32], each batch of them moved by up to two pixels."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = digits.Classifier().train()
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


def export_weights(network: nn.Module, path: Path) -> None:
    """Write the weights in float16; the batch norms' counters are left out."""
    kept = {name: t.half().contiguous() for name, t in network.state_dict().items() if t.is_floating_point()}
    save_file(kept, path)


@torch.inference_mode()
def export_reference(network: digits.Classifier, images: Tensor, path: Path, extractor: str) -> None:
    """Write what ``--reference mnist`` reads: statistics of uint8 images [N, 1, 32, 32] in the network's features."""
    features = torch.cat([network.features(to_model_range(part)) for part in images.split(500)]).numpy()
    moments = Moments()
    moments.add(features)
    write_statistics(path, moments.gaussian(), features[spread_out(len(features), KEPT)].astype("float16"), extractor)


def make(
    data: Annotated[Path, typer.Argument(help="An .npz with x_train, y_train, x_test, y_test.")],
    export_to: Annotated[Path, typer.Option(help="Write the files here.")] = digits.FOLDER,
    epochs: Annotated[int, typer.Option()] = 4,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train, write both files, and print how many test digits the written classifier gets right."""
    export_to.mkdir(parents=True, exist_ok=True)
    weights = export_to / digits.WEIGHTS.name
    export_weights(train_classifier(*load_images(data, "train"), epochs, seed), weights)
    network = digits.load_classifier(weights)
    images, labels = load_images(data, "test")
    export_reference(network, images, export_to / digits.REFERENCE.name, file_sha256(weights))
    found = digits.probabilities(network, to_model_range(images)).argmax(1)
    print(json.dumps({"test_accuracy": round((found == labels).float().mean().item(), 4)}))


if __name__ == "__main__":
    typer.run(make)
