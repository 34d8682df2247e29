"""What jumping back up gives beside a mask (RePaint, arXiv:2201.09865): half of real digits made anew, and read.

    python tests/benchmarks/repaint.py mnist.npz --sheet repaint.png

Takes as many test digits of each class from the .npz (x_test, y_test), makes a half of each anew with the bundled
model, and counts how often the shipped classifier sees in the result the digit that it was. Prints a table in Markdown
over sampling.resample and eta; each cell goes to stderr, too, as soon as it is known. A step takes 4 to 5 ms a digit on
one core, so that all of it takes some 7 s a digit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddim_cli import sample
from ddim_cli.diffusion.resampling import stretches
from ddim_cli.evaluation.digits import SIZE, load_classifier, probabilities
from ddim_cli.models.bundled.training import load_images, to_model_range
from ddim_cli.outputs.strip import Row, draw_strip

ETAS = (0.0, 1.0)
# Of a sheet: a digit of each class, without jumps and with, by DDPM's steps as in RePaint.
SHOWN, SHOWN_RESAMPLE, SHOWN_ETA = 10, (1, 5), 1.0


def chosen(data: Path, count: int) -> tuple[Tensor, Tensor]:
    """``count`` test digits, 0 to 9 by turns, [N, 1, 32, 32] in [-1, 1], and what they are; fewer are the first."""
    images, labels = load_images(data, "test")
    rng = np.random.default_rng(0)
    by_class = [rng.permutation(np.flatnonzero(labels.numpy() == digit)) for digit in range(10)]
    order = np.stack([numbers[: -(-count // 10)] for numbers in by_class], axis=1).flatten()[:count]
    return to_model_range(images[order]), labels[order]


def mask_of(half: str) -> np.ndarray:
    """White where the picture is made anew, uint8 [32, 32]."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[(slice(None), slice(SIZE // 2, None)) if half == "right" else slice(SIZE // 2, None)] = 255
    return mask


def to_image(x: Tensor) -> Image.Image:
    """[1, 32, 32] in [-1, 1] as a grey picture."""
    return Image.fromarray(((x[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())


def written(digits: Tensor, mask: np.ndarray, folder: Path) -> list[dict]:
    """Rows of a job, one a digit, over files in ``folder``."""
    Image.fromarray(mask).save(folder / "mask.png")
    rows = []
    for n, digit in enumerate(digits):
        to_image(digit).save(folder / f"{n}.png")
        rows.append({"init": str(folder / f"{n}.png"), "mask": str(folder / "mask.png"), "seed": n})
    return rows


def made(rows: list[dict], steps: int, resample: int, eta: float, batch_size: int) -> Tensor:
    """The pictures [N, 1, 32, 32] in [-1, 1]."""
    config = {"sampling": {"steps": steps, "eta": eta, "resample": resample, "batch_size": batch_size}}
    return torch.stack([picture.tensor.clamp(-1, 1) for picture in sample(config, model="mnist", items=rows)])


def draw(digits: Tensor, labels: Tensor, mask: np.ndarray, results: dict[int, tuple[Tensor, Tensor]]) -> Image.Image:
    """A column a digit: what it was, what was kept, and each result with the digit that the classifier sees."""
    kept = digits.masked_fill(torch.from_numpy(mask) > 0, 0.0)
    rows = [
        Row([to_image(x) for x in digits], [f"a {label}" for label in labels.tolist()]),
        Row([to_image(x) for x in kept], ["kept"] * len(digits)),
    ]
    for resample, (pictures, seen) in results.items():
        labels_below = [f"R = {resample}: a {digit}" for digit in seen.tolist()]
        rows.append(Row([to_image(x) for x in pictures], labels_below))
    return draw_strip(rows, "Half of a digit made anew: without jumps (R = 1), and with each step run R times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="MNIST.npz")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="digits, as many of each class [200]")
    parser.add_argument("--half", choices=("right", "lower"), default="right", help="what is made anew [right]")
    parser.add_argument("--resample", type=int, nargs="+", default=[1, 2, 5, 10], metavar="R")
    parser.add_argument("--eta", type=float, nargs="+", default=list(ETAS), metavar="X")
    parser.add_argument("--steps", type=int, default=50, metavar="N")
    parser.add_argument("--batch-size", type=int, default=20, metavar="N")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="a digit of each class, as eta 1 made it")
    given = parser.parse_args()

    (digits, labels), mask = chosen(given.data, given.count), mask_of(given.half)
    classifier = load_classifier()
    shown: dict[int, tuple[Tensor, Tensor]] = {}

    def right(pictures: Tensor) -> str:
        correct = (probabilities(classifier, pictures).argmax(1) == labels).sum().item()
        return f"{100 * correct / len(labels):.1f} %"

    black = digits.masked_fill(torch.from_numpy(mask) > 0, -1.0)
    print(
        f"{len(digits)} digits, the {given.half} half made anew in {given.steps} steps; the classifier sees the digit"
    )
    print(f"in {right(digits)} of the originals, and in {right(black)} with that half black.\n")
    print(f"| R | steps that run | {' | '.join(f'eta {eta:g}' for eta in given.eta)} |")
    print("|---" * (len(given.eta) + 2) + "|")
    with tempfile.TemporaryDirectory() as folder:
        rows = written(digits, mask, Path(folder))
        for resample in given.resample:
            cells = []
            for eta in given.eta:
                started = time.perf_counter()
                pictures = made(rows, given.steps, resample, eta, given.batch_size)
                cells.append(right(pictures))
                seconds = time.perf_counter() - started
                print(f"R {resample}, eta {eta:g}: {cells[-1]}, {seconds:.0f} s", file=sys.stderr, flush=True)
                if eta == SHOWN_ETA and resample in SHOWN_RESAMPLE:
                    first = pictures[:SHOWN]
                    shown[resample] = first, probabilities(classifier, first).argmax(1)
            count = sum(map(len, stretches(given.steps, resample)))
            print(f"| {resample} | {count} | {' | '.join(cells)} |", flush=True)
    if given.sheet is not None:
        draw(digits[:SHOWN], labels[:SHOWN], mask, shown).save(given.sheet)


if __name__ == "__main__":
    main()
