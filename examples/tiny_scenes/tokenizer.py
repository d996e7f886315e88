"""A CLIP tokenizer in which every word of the captions is one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from .captions import VOCABULARY

MODEL_MAX_LENGTH = 48
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"

Pair = tuple[str, str]


def build_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding learned from ``VOCABULARY`` until each of its words is one token.

    Other text splits into shorter pieces, in the worst case into bytes. Padding is the end token.
    """
    merges = _learn_merges(VOCABULARY)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(symbol + _WORD_END for symbol in alphabet)]
    tokens += [left + right for left, right in merges]
    tokens += [_START, _END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MODEL_MAX_LENGTH)


def _learn_merges(words: Iterable[str]) -> list[Pair]:
    """Merge the most frequent pair everywhere until every word is a single symbol."""
    spellings = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges = []
    while pairs := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merge(spelling, best) for spelling in spellings]
    return merges


def _merge(spelling: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    joinable = False  # the last symbol is not itself the result of this merge
    for symbol in spelling:
        if joinable and (merged[-1], symbol) == pair:
            merged[-1] += symbol
            joinable = False
        else:
            merged.append(symbol)
            joinable = True
    return merged
