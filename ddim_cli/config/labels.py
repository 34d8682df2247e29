"""Sentences, such as prompts, where there is room for a few words."""

from __future__ import annotations


def label_of(text: str, most: int = 40) -> str:
    """``text`` on one line of at most ``most`` characters, its middle left out: prompts often differ at their end."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    end = (most - 2) // 3
    return f"{line[: most - 2 - end].rstrip()}..{line[len(line) - end :].lstrip()}"
