"""Tokenizers: text to ids and back, and what a manifest records about them.

Bytes need no file and are the default. A document is stored as BOS followed by its tokens: BOS is
read but never predicted, so every byte is predicted exactly once and, with the byte tokenizer, mean
loss / ln 2 is bits per byte.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from sharding.errors import UsageError, nearest


@dataclass(frozen=True)
class TokenizerSpec:
    """What a manifest says about the tokenizer that wrote a dataset."""

    kind: str
    vocab_size: int
    bos: int
    eos: int
    pad: int
    sha256: str  # of the definition: two tokenizers with one hash give the same ids


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    spec: TokenizerSpec

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns int32 ids of `text`, without specials."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of `ids`; specials and padding ids are left out."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns `decode_bytes` as text, broken UTF-8 replaced."""


class ByteTokenizer:
    """Ids 0..255 are the bytes, then BOS, EOS and PAD; the vocabulary is padded to 384."""

    BOS, EOS, PAD = 256, 257, 258
    VOCAB_SIZE = 384  # a multiple of 128 shards over tensor axes and fills TPU lanes

    def __init__(self) -> None:
        definition = f"bytes bos={self.BOS} eos={self.EOS} pad={self.PAD} vocab={self.VOCAB_SIZE}"
        self.spec = TokenizerSpec(
            kind="bytes",
            vocab_size=self.VOCAB_SIZE,
            bos=self.BOS,
            eos=self.EOS,
            pad=self.PAD,
            sha256=hashlib.sha256(definition.encode()).hexdigest(),
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns int32 ids of `text` (UTF-8 if str), without specials."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of `ids`; ids above 255 are left out."""
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, broken UTF-8 replaced."""
        return self.decode_bytes(ids).decode(errors="replace")


_KINDS = {"bytes": ByteTokenizer}


def load_tokenizer(spec: TokenizerSpec | dict) -> Tokenizer:
    """Returns the tokenizer that a manifest names.

    Raises:
      UsageError: an unknown kind, or a definition that is not the one that wrote the dataset.
    """
    wanted = asdict(spec) if isinstance(spec, TokenizerSpec) else dict(spec)
    kind = str(wanted.get("kind"))
    if kind not in _KINDS:
        raise UsageError(
            f"tokenizer kind {kind!r} is unknown: choose {', '.join(_KINDS)}{nearest(kind, _KINDS)}"
        )
    tokenizer = _KINDS[kind]()
    for field, have in asdict(tokenizer.spec).items():
        if wanted.get(field, have) != have:
            raise UsageError(
                f"tokenizer {kind!r}: the dataset was written with {field} = {wanted[field]}, "
                f"this version has {have}; prepare the dataset again"
            )
    return tokenizer
