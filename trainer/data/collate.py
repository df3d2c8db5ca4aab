"""Collate functions: what a piece of a document becomes in a row, and which tokens carry loss.

A position whose target is -1 predicts nothing. All that is random is drawn from the seed and the
piece's place in its dataset and epoch, so that a row stays a function of its number alone.
"""

from typing import ClassVar, Protocol

import numpy as np

from trainer.data.config import CollateConfig

SENTINELS = 4  # tokens that fill-in-the-middle adds to a piece


class Collate(Protocol):
    """Turns the tokens of a piece into arrays by field.

    Attributes:
      whole: whether a call is given the tokens of the whole document, not only the piece's.
      patterns: ids that documents have to hold in a row, by the field of the config that has them.
    """

    whole: bool
    patterns: dict[str, tuple[int, ...]]

    def added(self, documents: np.ndarray) -> np.ndarray:
        """Returns how many positions a whole piece of each document has more than its own."""
        ...

    def __call__(self, tokens: np.ndarray, at: int, count: int, added: int, draw: int) -> dict:
        """Returns arrays over the piece's positions: tokens, targets and perhaps prefix.

        Args:
          tokens: of the piece or of the whole document; the piece reads count + 1 from `at` on.
          count: positions of the document's own.
          added: positions to add.
          draw: 64 random bits of this piece.
        """
        ...


def make_collate(config: CollateConfig, seed: int) -> Collate | None:
    """Returns the collate function that a config names, None for "none"."""
    if config.kind == "fim":
        return FillInTheMiddle(config, seed)
    if config.kind == "prefix":
        return PrefixLM(config)
    return Instruction(config) if config.kind == "instruction" else None


class FillInTheMiddle:
    """Prefix, suffix, middle of whole documents and of the full pieces of longer ones."""

    whole = False
    patterns: ClassVar = {}

    def __init__(self, config: CollateConfig, seed: int) -> None:
        self._config = config
        self._seed = mix(np.asarray([seed], np.uint64))

    def added(self, documents: np.ndarray) -> np.ndarray:
        drawn = mix(self._seed + documents.astype(np.uint64)) >> np.uint64(32)
        return np.where(drawn < self._config.rate * 2**32, SENTINELS, 0)

    def __call__(self, tokens: np.ndarray, at: int, count: int, added: int, draw: int) -> dict:
        if added:
            first, text = tokens[:1], tokens[1:]
            cuts = ((bits & 0xFFFFFF) * (count + 1) >> 24 for bits in (draw >> 16, draw >> 40))
            prefix, middle, suffix = np.split(text, sorted(cuts))
            pre, suf, mid, end = ([token] for token in self._config.sentinels)
            if (draw & 0xFFFF) < self._config.spm * 2**16:
                parts = (first, pre, suf, suffix, mid, prefix, middle, end)
            else:
                parts = (first, pre, prefix, suf, suffix, mid, middle, end)
            tokens = np.concatenate(parts)
        return {"tokens": tokens[:-1], "targets": tokens[1:]}


class Instruction:
    """Loss on answers alone: after the ids `begin`, up to the ids `end` and with them."""

    whole = True

    def __init__(self, config: CollateConfig) -> None:
        self._begin, self._end = config.begin, config.end
        self.patterns = {"begin": config.begin, "end": config.end}

    def added(self, documents: np.ndarray) -> np.ndarray:
        return np.zeros_like(documents)

    def __call__(self, tokens: np.ndarray, at: int, count: int, added: int, draw: int) -> dict:
        place = np.arange(len(tokens))
        begun, ended = (
            np.maximum.accumulate(np.where(ends_with(tokens, ids), place, -1))
            for ids in (self._begin, self._end)
        )
        piece, answered = tokens[at : at + count + 1], (begun > ended)[at : at + count]
        return {"tokens": piece[:-1], "targets": np.where(answered, piece[1:], -1)}


class PrefixLM:
    """A prompt that is read in both directions and not predicted, and its continuation."""

    def __init__(self, config: CollateConfig) -> None:
        self._begin = config.begin
        self.whole = bool(config.begin)
        self.patterns = {"begin": config.begin} if config.begin else {}

    def added(self, documents: np.ndarray) -> np.ndarray:
        return np.zeros_like(documents)

    def __call__(self, tokens: np.ndarray, at: int, count: int, added: int, draw: int) -> dict:
        if self._begin:
            found = np.flatnonzero(ends_with(tokens, self._begin))
            prompt = found[0] + 1 - at if len(found) else 0
        else:
            prompt = 1 + ((draw >> 32) * count >> 32)
        place, piece = np.arange(count), tokens[at : at + count + 1]
        return {
            "tokens": piece[:-1],
            "targets": np.where(place + 1 < prompt, -1, piece[1:]),
            "prefix": place < prompt,
        }


def ends_with(tokens: np.ndarray, ids: tuple[int, ...]) -> np.ndarray:
    """Returns bool (len(tokens),): whether the tokens up to here end with `ids`."""
    found = np.zeros(len(tokens), bool)
    if len(tokens) >= len(ids):
        windows = np.lib.stride_tricks.sliding_window_view(tokens, len(ids))
        found[len(ids) - 1 :] = (windows == np.asarray(ids)).all(axis=1)
    return found


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
