"""The digit classifier that ships: its network and its weights. Its card is README.md beside this file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ddim_cli.errors import ModelError
from ddim_cli.models.weights import read_tensors

FOLDER = Path(__file__).parent
# Its weights, and what the MNIST test digits look like in its features.
WEIGHTS, REFERENCE = FOLDER / "classifier.safetensors", FOLDER / "mnist_test.npz"
SIZE, FEATURES = 32, 64


class Classifier(nn.Module):
    """[N, 1, 32, 32] in [-1, 1] -> logits [N, 10]; 0.13 M parameters. Scores are taken in its `features`."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels_in: int, channels_out: int) -> list[nn.Module]:
            convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

        self.trunk = nn.Sequential(
            *block(1, 16),
            nn.MaxPool2d(2),
            *block(16, 32),
            nn.MaxPool2d(2),
            *block(32, 64),
            *block(64, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """[N, 1, 32, 32] in [-1, 1] -> [N, 64]."""
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def load_classifier(weights: Path = WEIGHTS) -> Classifier:
    """The shipped classifier in float32, for use."""
    network = Classifier()
    missing, unknown = network.load_state_dict({name: t.float() for name, t in read_tensors(weights)}, strict=False)
    if unknown or any(not name.endswith("num_batches_tracked") for name in missing):
        raise ModelError(f"{weights}: not the weights of the digit classifier")
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def probabilities(network: nn.Module, x: Tensor) -> Tensor:
    """[N, 1, 32, 32] in [-1, 1] -> [N, 10]."""
    return torch.cat([network(part).softmax(1) for part in x.split(500)])
