"""How well the bundled ``mnist-text`` model draws what it is asked for: the figures of its card.

    python -m ddim_cli.evaluation.judge_mnist_text mnist.npz

Says how well the shipped digit classifier does on the test images. Then draws every digit by its name, with and without
guidance, and says how many pictures the classifier takes for the digit asked for. Then draws pairs from the same
noise, bold and thin, slanted and upright, and says in how many the one has more ink, or leans further, than the other.
``--sheet FILE`` draws the sheet of the card besides: a row of pictures for each of a few prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor

from ddim_cli.evaluation.digits import load_classifier, probabilities
from ddim_cli.evaluation.judge_mnist import figures, print_real_figures
from ddim_cli.models.bundled.captions import DIGITS, Traits, full_caption, ink, shear
from ddim_cli.outputs.sweep_sheet import Block, Panel, draw_sweep
from ddim_cli.sampling.api import sample

Draw = Callable[[Sequence[str], int, float], Tensor]
# What is measured, and the two traits that should differ in it, the greater first.
OPPOSITES = (
    (ink, Traits("bold", None), Traits("thin", None)),
    (shear, Traits(None, "slanted"), Traits(None, "upright")),
)

SHEET_PROMPTS = (
    *DIGITS,
    *(
        "a bold three",
        "a thin three",
        "a slanted four",
        "an upright four",
        "a thin slanted eight",
        "a photo of a bold 2",
    ),
)
SHEET_SEEDS = 10


def drawn_as_asked(found: Tensor) -> dict[str, object]:
    """Of [N, 10] probabilities of pictures of the digits in turn, 0 to 9 and again: how many are what was asked for."""
    asked = torch.arange(len(found)) % len(DIGITS)
    right = found.argmax(1) == asked
    by_digit = [round(right[asked == digit].float().mean().item(), 4) for digit in range(len(DIGITS))]
    return {**figures(found), "as_asked": round(right.float().mean().item(), 4), "as_asked_by_digit": by_digit}


def ordered_pairs(draw: Draw, count: int, guidance: float) -> dict[str, float]:
    """For each pair of opposites, such as "bold > thin": in what share of ``count`` pairs the first has more of it."""
    shares = {}
    for measure, more, less in OPPOSITES:
        prompts = [[full_caption(digit, traits) for digit in range(len(DIGITS))] for traits in (more, less)]
        first, second = (measure(draw(each, count, guidance)) for each in prompts)
        words = [next(word for word in traits if word is not None) for traits in (more, less)]
        shares[" > ".join(words)] = round((first > second).float().mean().item(), 4)
    return shares


def draw_sheet(draw: Draw, guidance: float) -> Image.Image:
    """A row for each of SHEET_PROMPTS, its prompt beside it, of seeds 0 to SHEET_SEEDS - 1; RGB."""
    drawn = [draw([prompt], SHEET_SEEDS, guidance) for prompt in SHEET_PROMPTS]
    pixels = [((x[:, 0] + 1) * 127.5).round().byte().numpy() for x in drawn]
    blocks = [[Block([Image.fromarray(each) for each in row])] for row in pixels]
    caption = f"mnist-text: seeds 0 to {SHEET_SEEDS - 1}, guidance {guidance:g}"
    return draw_sweep([Panel(blocks, [""], SHEET_PROMPTS)], caption, SHEET_SEEDS)


def judge(
    data: Annotated[Path, typer.Argument(help="An .npz with x_test, y_test.")],
    model: Annotated[str, typer.Option("--model", "-m", help="What to judge.")] = "mnist-text",
    num_images: Annotated[int, typer.Option("--num-images", "-n")] = 1000,
    pairs: Annotated[int, typer.Option(help="Pairs of bold and thin, and of slanted and upright.")] = 200,
    steps: Annotated[int, typer.Option()] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is judged besides.")] = 2.0,
    sheet: Annotated[Path | None, typer.Option(help="Draw pictures of a few prompts into this PNG file.")] = None,
) -> None:
    """Print the figures of a model that draws digits by name as JSON."""
    network = load_classifier()
    print_real_figures(network, data)

    def draw(prompts: Sequence[str], count: int, scale: float) -> Tensor:
        """Pictures [count, 1, 32, 32] in [-1, 1] of seeds from 0; a seed's prompt is prompts[seed mod their number]."""
        config = {
            "sampling": {
                "num_images": count,
                "steps": steps,
                "eta": 0.0,
                "prompt": list(prompts),
                "guidance_scale": scale,
            }
        }
        return torch.stack([picture.tensor.clamp(-1, 1) for picture in sample(config, model=model)])

    if sheet is not None:
        draw_sheet(draw, guidance).save(sheet, optimize=True)
    for scale in dict.fromkeys((guidance, 1.0)):
        found = probabilities(network, draw(DIGITS, num_images, scale))
        print(json.dumps({f"guidance {scale:g}": drawn_as_asked(found)}), flush=True)
    print(json.dumps({f"pairs at guidance {guidance:g}": ordered_pairs(draw, pairs, guidance)}), flush=True)


if __name__ == "__main__":
    typer.run(judge)
