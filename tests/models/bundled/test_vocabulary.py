"""The tokenizer that is written for a few dozen words."""

from __future__ import annotations

from itertools import pairwise

import pytest
from transformers import CLIPTokenizer

from ddim_cli.models.bundled.captions import WORDS
from ddim_cli.models.bundled.vocabulary import merge, merges_for, write_tokenizer

LENGTH = 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> CLIPTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(WORDS, LENGTH, directory)
    return CLIPTokenizer.from_pretrained(directory)


def test_merge_goes_from_left_to_right():
    assert merge(["a", "a", "a", "b"], ("a", "a")) == ["aa", "a", "b"]


def test_later_words_do_not_break_earlier_ones():
    words = ("thin", "the", "three", "then", "inthe", "hint")
    merges = merges_for(words)
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pieces = merge(pieces, next(pair for pair in merges if pair in pairwise(pieces)))
        assert pieces == [word + "</w>"]


@pytest.mark.parametrize("word", [*WORDS, *"0123456789"])
def test_every_word_is_one_token(tokenizer, word):
    assert tokenizer.tokenize(word) == [f"{word}</w>"]


def test_round_trip(tokenizer):
    numbers = tokenizer("A  Bold slanted SEVEN").input_ids
    assert numbers[0] == tokenizer.bos_token_id
    assert numbers[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(numbers, skip_special_tokens=True).strip() == "a bold slanted seven"


@pytest.mark.parametrize(
    "text", ["quokka", "seventeen", "a 😀 seven", "日本", "ünïcode", "<|endoftext|>", "!?,.;", "\t\n"]
)
def test_any_text_is_told(tokenizer, text):
    numbers = tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(numbers) == LENGTH
    assert all(0 <= number < len(tokenizer) for number in numbers)


def test_unknown_words_are_taken_apart_and_the_rest_stands(tokenizer):
    tokens = tokenizer.tokenize("a zyx seven")
    assert tokens == ["a</w>", "z", "y", "x</w>", "seven</w>"]


def test_long_prompts_are_cut_and_short_ones_padded(tokenizer):
    cut = tokenizer("seven " * 40, padding="max_length", truncation=True).input_ids
    assert len(cut) == LENGTH
    assert cut[-1] == tokenizer.eos_token_id
    empty = tokenizer("", padding="max_length", truncation=True).input_ids
    assert empty == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (LENGTH - 1)
    assert tokenizer.model_max_length == LENGTH
