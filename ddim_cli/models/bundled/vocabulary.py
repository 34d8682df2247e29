"""A tokenizer for a few dozen words, in the files of CLIP's: byte-pair encoding (Sennrich et al., arXiv:1508.07909)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

START, END = "<|startoftext|>", "<|endoftext|>"
# Marks the last piece of a word.
WORD_END = "</w>"


def merge(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """``pieces`` with ``pair`` joined wherever it stands, from left to right."""
    joined: list[str] = []
    for piece in pieces:
        # Only an unjoined left half takes its right half: the joined one has become another piece.
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def merges_for(words: Sequence[str]) -> list[tuple[str, str]]:
    """The merges that make one token of each word, in the order they are to be made.

    A later word's merges cannot break an earlier one: earlier merges come first wherever both would apply.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + WORD_END]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            known = next((pair for pair in merges if pair in pairs), None)
            if known is None:
                known = pairs[0]
                merges.append(known)
            pieces = merge(pieces, known)
    return merges


def write_tokenizer(words: Sequence[str], length: int, directory: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, which ``CLIPTokenizer.from_pretrained`` reads.

    Any text can be told: a word that is not among ``words`` is taken apart, down to its bytes if need be. ``length`` is
    the number of tokens of a prompt, start and end included; what is longer is cut, and what is shorter is padded with
    the end.
    """
    alphabet = sorted(ByteLevel.alphabet())
    merges = merges_for(words)
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *(a + b for a, b in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, indent=0) + "\n", "utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
