"""Tokenizers: text to ids and back, and what a manifest records about them.

Bytes need no file and are the default. The others are read from a local file, never fetched by
name, and the file is copied into every dataset written with it. A document is stored as BOS
followed by its tokens: BOS is read but never predicted, so every byte is predicted exactly once and
the summed loss / ln 2 is the number of bits that the text takes.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np

from checkpoint.files import read_bytes, read_json, read_text
from checkpoint.steps import folder_path, is_remote
from sharding.errors import StorageError, UsageError, install_hint, nearest
from trainer.data.chat import ChatTemplate

LIMIT = 2**28  # bytes of a definition; the largest published ones have some 2**25


@dataclass(frozen=True)
class TokenizerSpec:
    """What a manifest says about the tokenizer that wrote a dataset."""

    kind: str
    vocab_size: int
    bos: int
    eos: int
    pad: int
    sha256: str  # of the definition: two tokenizers with one hash give the same ids

    def document(self, ids: np.ndarray) -> np.ndarray:
        """Returns the ids of a text as a document of a dataset: BOS, the text, EOS."""
        return np.concatenate(([self.bos], ids, [self.eos]))


class Tokenizer(Protocol):
    """What every tokenizer offers. A kind has `decode` of its own, or `decode_bytes`."""

    spec: TokenizerSpec

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns int32 ids of `text`, without specials; specials spelled out are plain text.

        Bytes that are no UTF-8 are replaced where the kind knows text only.
        """
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Returns `encode` of each text, on all cores where the library can."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes of `ids`; specials and padding ids are left out."""
        return self.decode(ids).encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, broken UTF-8 replaced; what was normalised away stays away."""
        return self.decode_bytes(ids).decode(errors="replace")

    def files(self) -> dict[str, bytes]:
        """Returns the files that define it, by name: a dataset folder holds them."""
        ...


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes, then BOS, EOS and PAD."""

    BOS, EOS, PAD = 256, 257, 258
    VOCAB_SIZE = 259

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
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = np.asarray(_list(ids), np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

    def files(self) -> dict[str, bytes]:
        return {}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, as Hugging Face `tokenizers` reads and writes it.

    BOS and EOS are those of the `tokenizer_config.json` beside it, else the first of the usual
    names that the vocabulary has; one of the two stands in for the other.
    """

    def __init__(self, definition: bytes, names: dict[str, str] | None = None) -> None:
        import tokenizers

        self._definition = definition
        self._tokenizer = tokenizers.Tokenizer.from_str(definition.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._names = {"bos_token": None, "eos_token": None} | (names or {})
        self._config = json.dumps(self._names).encode()
        self._chat: ChatTemplate | None = None  # compiled when the first conversation comes
        bos = self._special(self._names["bos_token"], _BOS_NAMES)
        eos = self._special(self._names["eos_token"], _EOS_NAMES)
        pad = self._special(self._names.get("pad_token"), _PAD_NAMES)
        self.spec = _spec(
            "huggingface",
            [definition, self._config],
            1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values()),
            (bos, eos, pad),
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_batch([_text(text)])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in found]

    def chat_text(self, messages: list[dict], now: datetime | None = None) -> str:
        """Returns a conversation as the chat template of the tokenizer's config spells it.

        `now` is the time that the template is told (the time of the call).

        Raises:
          UsageError: there is no template, or it cannot be read.
          Rejected: the template refuses the conversation.
        """
        if self._chat is None:
            template = self._names.get("chat_template")
            if not template:
                raise UsageError(
                    f"a conversation needs a chat_template, and the {_CONFIG} beside "
                    "tokenizer.json has none"
                )
            specials = {key: self._names[key] for key in _SPECIALS if self._names.get(key)}
            self._chat = ChatTemplate(template, specials)
        # The BOS of a document is written by whoever stores it.
        return self._chat.render(messages, now).removeprefix(self._names["bos_token"] or "")

    def encode_chat(self, text: str) -> np.ndarray:
        """Returns int32 ids of `chat_text`, in which specials spelled out are specials."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_list(ids), skip_special_tokens=True)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._definition, _CONFIG: self._config}

    def _special(self, name: str | None, usual: tuple[str, ...]) -> int | None:
        if name is not None:
            found = self._tokenizer.token_to_id(name)
            if found is None:
                raise UsageError(f"tokenizer_config.json names {name!r}, tokenizer.json has none")
            return found
        ids = (self._tokenizer.token_to_id(each) for each in usual)
        return next((found for found in ids if found is not None), None)


_BOS_NAMES = ("<|bos|>", "<bos>", "<s>", "<|begin_of_text|>", "[BOS]", "<|startoftext|>")
_EOS_NAMES = ("<|eos|>", "<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "[EOS]")
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file; its own BOS, EOS and padding ids."""

    def __init__(self, definition: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._definition = definition
        self._model = SentencePieceProcessor(model_proto=definition)
        specials = (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        bos, eos, pad = (None if number < 0 else number for number in specials)
        self.spec = _spec("sentencepiece", [definition], len(self._model), (bos, eos, pad))

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.asarray(self._model.encode(_text(text)), np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(ids, np.int32) for ids in self._model.encode(texts, num_threads=-1)]

    def decode(self, ids: Iterable[int]) -> str:
        size = len(self._model)
        return self._model.decode([number for number in map(int, _list(ids)) if number < size])

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._definition}


class TiktokenTokenizer(Tokenizer):
    """A file of BPE ranks (`base64 rank` lines), as tiktoken's public encodings come.

    The file does not say how text is split before merging nor what the specials are: both follow
    from the number of ranks, for the encodings in `_TIKTOKEN`.
    """

    def __init__(self, definition: bytes) -> None:
        import tiktoken

        self._definition = definition
        pairs = (line.split() for line in definition.splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        if len(ranks) not in _TIKTOKEN:
            known = ", ".join(f"{count:,} ({name})" for count, (name, *_) in _TIKTOKEN.items())
            raise UsageError(
                f"{len(ranks):,} BPE ranks belong to no known encoding: {known}; "
                "give its tokenizer.json instead"
            )
        name, pattern, bos, eos, size = _TIKTOKEN[len(ranks)]
        self._ranks = len(ranks)
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.spec = _spec("tiktoken", [definition], size, (bos, eos, None))

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.asarray(self._encoding.encode_ordinary(_text(text)), np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(ids, np.int32) for ids in self._encoding.encode_ordinary_batch(texts)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes([n for n in map(int, _list(ids)) if n < self._ranks])

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.tiktoken": self._definition}


def _pieces(word: str, line_ends: str, blank: str = "") -> str:
    """Spells the splitting rule that the newer public encodings share."""
    return (
        rf"{word}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+{line_ends}|{blank}\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = "|".join(
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]{first}[{_LOWER}]{rest}{_CONTRACTION}?"
    for first, rest in (("*", "+"), ("+", "*"))
)
_TIKTOKEN = {
    50_256: (
        "gpt2",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        50_256,
        50_256,
        50_257,
    ),
    100_256: ("cl100k", _pieces(_LETTERS, r"[\r\n]*", r"\s+$|"), 100_257, 100_257, 100_277),
    128_000: ("llama3", _pieces(_LETTERS, r"[\r\n]*"), 128_000, 128_001, 128_256),
    199_998: ("o200k", _pieces(_CASED, r"[\r\n/]*"), 199_999, 199_999, 200_019),
}
"""Ranks in the file → name, split pattern, BOS, EOS, vocabulary with specials."""

_CONFIG = "tokenizer_config.json"
_SPECIALS = tuple(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
_KINDS = {
    "bytes": None,
    "huggingface": "tokenizer.json",
    "sentencepiece": "tokenizer.model",
    "tiktoken": "tokenizer.tiktoken",
}
"""The file that defines each kind, as a dataset folder holds it."""


def open_tokenizer(reference: str) -> Tokenizer:
    """Returns the tokenizer that `reference` names: `bytes`, a definition file, or its folder.

    File and folder may be in object storage.

    Raises:
      UsageError: nothing there, or a file that is no tokenizer.
    """
    if reference == "bytes":
        return ByteTokenizer()
    path = folder_path(reference) if is_remote(reference) else Path(reference).expanduser()
    if path.is_dir():
        names = [name for name in _KINDS.values() if name and (path / name).is_file()]
        if not names:
            wanted = ", ".join(name for name in _KINDS.values() if name)
            raise UsageError(f"tokenizer {reference}: the folder has none of {wanted}")
        path = path / names[0]
    try:
        definition = read_bytes(path, LIMIT)
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"tokenizer {reference!r}: {reason}; give `bytes`, a tokenizer.json, a "
            f"SentencePiece .model or a .tiktoken file{nearest(reference, _KINDS)}"
        ) from None
    return _build(_kind_of(path, definition), definition, path)


def load_tokenizer(spec: TokenizerSpec | dict, folder: Path | None = None) -> Tokenizer:
    """Returns the tokenizer that the manifest in `folder` names.

    Raises:
      UsageError: an unknown kind, or a definition that is not the one that wrote the dataset.
    """
    wanted = asdict(spec) if isinstance(spec, TokenizerSpec) else dict(spec)
    kind = str(wanted.get("kind"))
    if kind not in _KINDS:
        raise UsageError(
            f"tokenizer kind {kind!r} is unknown: choose {', '.join(_KINDS)}{nearest(kind, _KINDS)}"
        )
    file = _KINDS[kind]
    if file is None:
        tokenizer: Tokenizer = ByteTokenizer()
    elif folder is None:
        raise UsageError(f"tokenizer {kind!r} lives in the dataset's folder, none was given")
    else:
        try:
            definition = read_bytes(folder / file, LIMIT)
        except OSError as error:
            raise UsageError(f"dataset {folder}: {file}: {error.strerror}") from None
        tokenizer = _build(kind, definition, folder / file)
    for field, have in asdict(tokenizer.spec).items():
        if wanted.get(field, have) != have:
            raise UsageError(
                f"tokenizer {kind!r}: the dataset was written with {field} = {wanted[field]}, "
                f"{file or 'this version'} has {have}; prepare the dataset again"
            )
    return tokenizer


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give a text the same ids, tried on one with many kinds of text.

    Their files may differ: a vocabulary comes in several formats.
    """
    return np.array_equal(one.encode(_PROBE), other.encode(_PROBE))


_PROBE = (
    "The quick brown fox, it's said, jumped over 13 lazy dogs in 1984; 3.14159 times?\n\n"
    "def f(x_1, *args):\n\treturn {'key': x_1 ** 2}  # comment\nNaïve façade, Größe, œuvre. "
    "Привет, мир! 東京都は日本の首都です。 مرحبا بالعالم 🙂 <p>&amp;</p> ANOTHER camelCaseWord"
)


def definition_files(kind: str) -> tuple[str, ...]:
    """Returns the names of the files that a dataset folder holds for a kind of tokenizer."""
    names = (_KINDS.get(kind), _CONFIG if kind == "huggingface" else None)
    return tuple(name for name in names if name)


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE of `vocab_size` ids, learned from `texts`; 3 of them are specials.

    Byte-pair encoding as in Radford et al. 2019 (GPT-2), section 2.2: merges stay inside words, and
    every text comes back byte for byte.

    Raises:
      UsageError: fewer ids than bytes and specials.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = [_BOS_NAMES[0], _EOS_NAMES[0], _PAD_NAMES[0]]
    if vocab_size < 256 + len(specials):
        raise UsageError(
            f"a BPE vocabulary of {vocab_size}: at least {256 + len(specials)}, the bytes and "
            f"{len(specials)} specials"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(tokenizer.to_str().encode())


def _kind_of(path: Path, definition: bytes) -> str:
    if path.suffix == ".json":
        return "huggingface"
    # Llama 3 ships ranks under SentencePiece's name; a SentencePiece model is binary.
    first = definition[:64].split(b"\n")[0].split(b" ")
    return "tiktoken" if len(first) == 2 and first[1].isdigit() else "sentencepiece"


def _build(kind: str, definition: bytes, path: Path) -> Tokenizer:
    try:
        if kind == "huggingface":
            return HuggingFaceTokenizer(definition, _special_names(path.parent))
        if kind == "sentencepiece":
            return SentencePieceTokenizer(definition)
        return TiktokenTokenizer(definition)
    except UsageError as error:
        raise UsageError(f"tokenizer {path}: {error}") from None
    except ModuleNotFoundError as error:
        raise UsageError(
            f"tokenizer {path}: reading it needs {error.name}; {install_hint('data')}"
        ) from None
    except Exception as error:  # the libraries raise bare Exception on files they cannot read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"tokenizer {path} cannot be read: {reason}") from None


def _special_names(folder: Path) -> dict[str, str]:
    """Returns the special tokens and the chat template that are named beside a tokenizer.json."""
    path, names = folder / _CONFIG, {}
    content = read_json(path) if path.is_file() else {}
    template, file = content.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    if file.is_file():
        template = read_text(file)
    if template:
        if not isinstance(template, str):
            raise UsageError(f"the chat_template in {_CONFIG} is not text")
        names["chat_template"] = template
    for key in _SPECIALS:
        value = content.get(key)
        if isinstance(value, dict):  # an AddedToken, written out
            value = value.get("content")
        if value is not None:
            names[key] = str(value)
    return names


def _spec(
    kind: str, definition: list[bytes], size: int, specials: tuple[int | None, ...]
) -> TokenizerSpec:
    bos, eos, pad = specials
    if bos is None and eos is None:
        raise UsageError(
            "it has neither a BOS nor an EOS token, and documents must begin with one: name it as "
            "bos_token in a tokenizer_config.json beside it"
        )
    bos = eos if bos is None else bos
    eos = bos if eos is None else eos
    digest = hashlib.sha256(b"\0".join(definition)).hexdigest()
    # Padding is segment 0, whatever the id: any id will do.
    return TokenizerSpec(kind, size, bos, eos, eos if pad is None else pad, digest)


def _text(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode(errors="replace")


def _list(ids: Iterable[int]) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
