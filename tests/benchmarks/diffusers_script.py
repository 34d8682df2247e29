"""What a user of diffusers would write to get the pictures of ``ddim sample``: the other side of cold_start.py.

python tests/benchmarks/diffusers_script.py MODEL_DIRECTORY OUT --images 64 --steps 50
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDIMPipeline

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out", type=Path)
parser.add_argument("--images", type=int, default=16)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()

pipeline = DDIMPipeline.from_pretrained(args.model).to(args.device)
args.out.mkdir(parents=True, exist_ok=True)
for first in range(0, args.images, args.batch):
    seeds = range(first, min(first + args.batch, args.images))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    images = pipeline(batch_size=len(seeds), generator=generators, num_inference_steps=args.steps).images
    for seed, image in zip(seeds, images, strict=True):
        image.save(args.out / f"{seed:06d}.png")
