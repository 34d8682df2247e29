"""How often ``ddim edit`` does what it was asked for, on thin test digits and the bundled ``mnist-text``.

    python tests/benchmarks/edits.py mnist.npz

Of each class it takes the same number of test digits among the third with the least ink, and makes of each "a thin
seven" a bold one, and a thin one of another name. A row a guidance scale: in how many the edit to "bold" has more ink
than the original, and is still taken for its digit by the shipped classifier; in how many the other name is seen; and
how far the bold ones are from the originals (root mean square, 0 to 1).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddim_cli import edit
from ddim_cli.evaluation.digits import load_classifier, probabilities
from ddim_cli.models.bundled.captions import DIGITS, Thirds, ink


def thin_digits(data: Path, count: int) -> dict[int, torch.Tensor]:
    """Of each class ``count`` test digits that are thin, [N, 1, 32, 32] in [-1, 1]."""
    with np.load(data) as arrays:
        images, labels = torch.from_numpy(arrays["x_test"]), torch.from_numpy(arrays["y_test"]).long()
    x = torch.nn.functional.pad(images.float().unsqueeze(1) / 127.5 - 1, (2, 2, 2, 2), value=-1)
    traits, rng = Thirds.of(x, labels).traits(x, labels), np.random.default_rng(0)
    is_thin = torch.tensor([each.ink == "thin" for each in traits])
    chosen = {}
    for digit in range(10):
        places = (is_thin & (labels == digit)).nonzero()[:, 0].numpy()
        chosen[digit] = x[rng.permutation(places)[:count]]
    return chosen


def read(path: Path) -> torch.Tensor:
    """A picture, [1, 32, 32] in [-1, 1]."""
    return torch.from_numpy(np.asarray(Image.open(path), np.float32))[None] / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="an .npz with x_test and y_test")
    parser.add_argument("--count", type=int, default=200, help="digits in all [200]")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--refine", type=int, default=0)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 7.5])
    parser.add_argument("--keep", type=Path, help="keep what is made in this folder")
    args = parser.parse_args()
    classifier, rng = load_classifier(), np.random.default_rng(1)
    found: dict[float, list[tuple[bool, bool, bool, float]]] = {scale: [] for scale in args.guidance}
    errors = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        for digit, originals in thin_digits(args.data, args.count // 10).items():
            inputs = folder / f"thin-{digit}"
            inputs.mkdir(parents=True, exist_ok=True)
            for n, x in enumerate(originals):
                Image.fromarray(((x[0] + 1) * 127.5).round().byte().numpy()).save(inputs / f"{n:03d}.png")
            other = (digit + int(rng.integers(1, 10))) % 10
            bold, renamed = f"a bold {DIGITS[digit]}", f"a thin {DIGITS[other]}"
            settings = {"steps": args.steps, "refine": args.refine, "strength": args.strength}
            result = edit(
                [inputs],
                f"a thin {DIGITS[digit]}",
                [bold, renamed],
                {"sampling": settings},
                "mnist-text",
                folder / f"edits-{digit}",
                args.guidance,
            )
            for x, picture in zip(originals, result.pictures, strict=True):
                errors.append(picture.error)
                for scale, path, path_renamed in zip(
                    args.guidance, picture.edits, picture.edits[len(args.guidance) :], strict=False
                ):
                    made, named = read(path), read(path_renamed)
                    seen, seen_renamed = probabilities(classifier, torch.stack([made, named])).argmax(1).tolist()
                    more = bool(ink(made[None]) > ink(x[None]))
                    distance = ((made - x) / 2).square().mean().sqrt().item()
                    found[scale].append((more, seen == digit, seen_renamed == other, distance))
            print(f"{DIGITS[digit]} done", flush=True)
    print(f"mean squared error of the reconstructions: {np.mean(errors):.2g}\n")
    print("| guidance | more ink | still its digit | another name seen | distance |\n|---|---|---|---|---|")
    for scale, rows in found.items():
        more, same, changed, distance = (np.mean([row[i] for row in rows]) for i in range(4))
        print(f"| {scale:g} | {100 * more:.1f} % | {100 * same:.1f} % | {100 * changed:.1f} % | {distance:.3f} |")


if __name__ == "__main__":
    main()
