"""Figures and values as a person reads them, the same in a table, on a sheet and on a page."""

from __future__ import annotations

from ddim_cli.config.labels import label_of


def distance_text(value: float) -> str:
    """A distance with two decimals, as papers give it; a small one with three digits."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def speed_text(rate: float) -> str:
    """Images a second, three digits of them."""
    return f"{rate:.3g} images/s" if rate < 1000 else f"{rate:,.0f} images/s"


def quoted(prompt: str, most: int = 60) -> str:
    """A prompt in a caption: in quotes, on one line, and not too long."""
    return f'"{label_of(prompt, most)}"'


def shortened(text: str, most: int) -> str:
    """``text``, its end left out if it is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
