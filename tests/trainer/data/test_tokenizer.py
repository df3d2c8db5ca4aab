"""Every kind of tokenizer: read from a file, exact round trips, and what is refused."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import UsageError
from trainer.data import tokenizer as tokenizers
from trainer.data.clean import Rejected
from trainer.data.shards import DatasetWriter, TokenShards
from trainer.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
    open_tokenizer,
    train_bpe,
)

TEXTS = [
    "def main():\n    return 1\n",
    "naïve café — 東京 🙂",
    "",
    " \t\n\n  x  ",
    "<|bos|> <|eos|>",
] * 20


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(iter(TEXTS), 400)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sp")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:3] * 20), model_prefix=str(folder / "m"), vocab_size=320,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "m.model"


def tiktoken_file(folder: Path) -> Path:
    """A rank file of GPT-2's size: the bytes, then made-up pairs that merge letters."""
    singles = [bytes([b]) for b in range(256)]
    pairs = [a + b for a in singles for b in singles][: 50_256 - 256]
    lines = [base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(singles + pairs)]
    path = folder / "gpt2.tiktoken"
    path.write_bytes(b"".join(lines))
    return path


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_bpe_gives_every_text_back(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.decode_bytes(ids) == text.encode()
    assert not np.isin(ids, [bpe.spec.bos, bpe.spec.eos, bpe.spec.pad]).any()


def test_bpe_is_the_same_every_time(bpe: Tokenizer) -> None:
    assert train_bpe(iter(TEXTS), 400).spec == bpe.spec
    assert bpe.spec.vocab_size <= 400


@pytest.mark.parametrize("kind", ["bytes", "huggingface", "sentencepiece", "tiktoken"])
def test_a_dataset_carries_its_tokenizer(
    kind: str, tmp_path: Path, bpe: Tokenizer, sentencepiece_file: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "tokenizer.json").write_bytes(bpe.files()["tokenizer.json"])
    references = {
        "bytes": "bytes",
        "huggingface": str(tmp_path / "in"),
        "sentencepiece": str(sentencepiece_file),
        "tiktoken": str(tiktoken_file(tmp_path)),
    }
    made = open_tokenizer(references[kind])
    assert made.spec.kind == kind
    texts = ["def main():\n    return 1\n", "naïve café", "x <|eos|> y"]
    batch = made.encode_batch(texts)
    with DatasetWriter(tmp_path / "set", made) as writer:
        for text, ids in zip(texts, batch, strict=True):
            assert made.encode(text).tolist() == ids.tolist()
            writer.add("train", np.concatenate(([made.spec.bos], ids)), len(text.encode()))
    shards = TokenShards(tmp_path / "set", "train")
    read = load_tokenizer(shards.manifest.tokenizer, shards.folder)
    assert read.spec == made.spec
    assert [read.decode(shards.document(i)) for i in range(3)] == texts
    assert [read.decode_bytes(shards.document(i)) for i in range(3)] == [t.encode() for t in texts]


def test_another_definition_in_the_folder_is_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    for name, content in train_bpe(iter(TEXTS), 300).files().items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="was written with vocab_size"):
        load_tokenizer(bpe.spec, tmp_path)


def test_specials_are_those_the_config_names(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bpe.files()["tokenizer.json"])
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<|pad|>"}, "eos_token": None}))
    spec = open_tokenizer(str(tmp_path)).spec
    assert spec.bos == bpe.spec.pad
    assert spec.eos == bpe.spec.eos
    config.write_text(json.dumps({"bos_token": "<begin>"}))
    with pytest.raises(UsageError, match="names '<begin>'"):
        open_tokenizer(str(tmp_path))


def test_refusals_name_the_file_and_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'byte': No such file.*did you mean `bytes`"):
        open_tokenizer("byte")
    with pytest.raises(UsageError, match=r"has none of tokenizer\.json"):
        open_tokenizer(str(tmp_path))
    for name, content in (
        ("t.json", b"{}"),
        ("m.model", b"\x00rubbish"),
        ("r.tiktoken", b"YQ== 0\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            open_tokenizer(str(tmp_path / name))
    with pytest.raises(UsageError, match="1 BPE ranks belong to no known encoding"):
        open_tokenizer(str(tmp_path / "r.tiktoken"))
    with pytest.raises(UsageError, match="at least 259"):
        train_bpe(iter(TEXTS), 200)


def test_without_bos_and_eos_is_refused() -> None:
    from tokenizers import Tokenizer, models

    definition = Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).to_str()
    with pytest.raises(UsageError, match="neither a BOS nor an EOS"):
        HuggingFaceTokenizer(definition.encode())


@pytest.mark.parametrize("name", ["gpt2", "cl100k", "o200k"])
def test_text_is_split_as_the_public_encodings_split_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library spells the rules for speed; ours must cut every text in the same places."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(public, loader, lambda *args, **options: {})
    theirs = {
        "gpt2": public.gpt2, "cl100k": public.cl100k_base, "o200k": public.o200k_base
    }[name]()["pat_str"]  # fmt: skip
    ours = next(pattern for found, pattern, *_ in tokenizers._TIKTOKEN.values() if found == name)

    @given(st.text(alphabet="aAbB zé東1 0'sS tlLve\n\r\t  .,/!?_-ǅʰ́🙂", max_size=40))
    @settings(max_examples=1500, deadline=None)
    def same(text: str) -> None:
        assert regex.findall(ours, text) == regex.findall(theirs, text)

    same()


def test_byte_tokenizer_round_trip():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("naïve €")
    assert tokenizer.decode([tokenizer.BOS, *ids.tolist(), tokenizer.EOS, 300]) == "naïve €"
    assert tokenizer.decode(ids[:3]).endswith("\N{REPLACEMENT CHARACTER}")
    assert tokenizer.encode("").size == 0
    assert load_tokenizer(tokenizer.spec).spec == tokenizer.spec
    with pytest.raises(UsageError, match=r"kind 'byte' is unknown.*; did you mean `bytes`"):
        load_tokenizer({"kind": "byte"})
    with pytest.raises(UsageError, match=r"was written with vocab_size = 99, this version has 259"):
        load_tokenizer({"kind": "bytes", "vocab_size": 99})


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'tool' %}"
    "{{ raise_exception('no tools') }}{% endif %}\n<|eos|>{{ m.role }}: {{ m.content | trim }}\n"
    "{% endfor %}"
)
CHAT = [{"role": "user", "content": " 2 + 2? "}, {"role": "assistant", "content": "4 <|pad|>"}]


def test_a_conversation_is_written_as_transformers_writes_it(tmp_path: Path, bpe: Tokenizer):
    transformers = pytest.importorskip("transformers")
    config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer.json").write_bytes(bpe.files()["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made = open_tokenizer(str(tmp_path))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    text = made.chat_text(CHAT)
    assert f"<|bos|>{text}" == theirs.apply_chat_template(CHAT, tokenize=False)
    ids = [made.spec.bos, *made.encode_chat(text)]
    assert ids == theirs.apply_chat_template(CHAT, return_dict=False)
    assert ids.count(made.spec.eos) == 2
    assert made.spec.eos not in made.encode(text)
    with pytest.raises(Rejected, match="chat_refused"):
        made.chat_text([{"role": "tool", "content": "x"}])
    with pytest.raises(UsageError, match=r"needs a chat_template.*has none"):
        bpe.chat_text(CHAT)
