"""Random weights as a safetensors file, drawn a tensor at a time: gigabytes of them never lie in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch


def write_random(shapes: Mapping[str, torch.Size], path: Path, seed: int) -> tuple[Path, ...]:
    """Weights of these names and shapes in float32, the same for the same seed.

    Uniform up to 1 / sqrt(fan-in), as torch draws them, so that a network of any depth stays finite; but for ones where
    a norm scales, zeros for biases, and small embeddings.
    """
    header, offset = dict[str, object](), 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            stream.write(_draw(name, shape, generator).numpy().data)
    return (path,)


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    tensor = torch.empty(shape)
    if len(shape) < 2:
        return tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    if "embedding" in name and "time_embedding" not in name:
        bound = 0.03
    else:
        bound = math.sqrt(1 / math.prod(shape[1:]))
    return tensor.uniform_(-bound, bound, generator=generator)
