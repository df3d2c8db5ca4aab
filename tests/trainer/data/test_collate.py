import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from sharding.errors import UsageError
from trainer.data.collate import ends_with
from trainer.data.config import CollateConfig, DataConfig
from trainer.data.dataset import open_dataset
from trainer.data.shards import DatasetWriter
from trainer.data.tokenizer import ByteTokenizer, TokenizerSpec

PRE, SUF, MID, END = SENTINELS = (300, 301, 302, 303)
ASK, ANSWER, STOP = 310, (311, 312), (313,)


def collated(folder, kind, *, seq_len=32, seed=0, split="train", **values):
    collate = CollateConfig(kind, **values)
    return open_dataset(DataConfig(str(folder), seq_len=seq_len, seed=seed, collate=collate), split)


def segments(batch):
    """Yields the arrays of every segment of a batch, without padding."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            mine = batch["segment_ids"][row] == segment
            yield {name: array[row][mine] for name, array in batch.items()}


def epoch_of(dataset, number=0):
    rows = dataset.rows_per_epoch
    return dataset.rows(number * rows + np.arange(rows))


def pieces_of(dataset, number=0):
    rows = dataset.rows_per_epoch
    return dataset.plan.rows(number * rows + np.arange(rows))


def refilled(segment):
    """Undoes fill-in-the-middle: returns the tokens of the piece as they were, and the kind."""
    whole = np.append(segment["tokens"], segment["targets"][-1])
    if len(whole) < 6 or whole[1] != PRE:
        return whole, "plain"
    assert whole[-1] == END and (whole == END).sum() == (whole == MID).sum() == 1
    middle = int(np.flatnonzero(whole == MID)[0])
    if whole[2] == SUF:
        return np.concatenate([whole[:1], whole[middle + 1 : -1], whole[3:middle]]), "spm"
    suffix = int(np.flatnonzero(whole == SUF)[0])
    parts = whole[:1], whole[2:suffix], whole[middle + 1 : -1], whole[suffix + 1 : middle]
    return np.concatenate(parts), "psm"


@pytest.mark.parametrize(("rate", "spm"), [(0.5, 0.5), (1.0, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_fill_in_the_middle_rearranges_and_loses_nothing(make_dataset, rate, spm):
    dataset = collated(make_dataset(), "fim", rate=rate, spm=spm, sentinels=SENTINELS)
    kinds = []
    for epoch in (0, 1):
        batch, pieces = epoch_of(dataset, epoch), pieces_of(dataset, epoch)
        for segment, document, start, own in zip(
            segments(batch),
            pieces.documents,
            pieces.starts,
            pieces.counts - pieces.added,
            strict=True,
        ):
            tokens, kind = refilled(segment)
            kinds.append(kind)
            original = dataset.shards.document(document)[start : start + own + 1]
            np.testing.assert_array_equal(tokens, original)
            np.testing.assert_array_equal(segment["tokens"][1:], segment["targets"][:-1])
    assert dataset.bytes_per_token() is None
    share = {kind: kinds.count(kind) / len(kinds) for kind in ("plain", "psm", "spm")}
    if rate == 0.5:
        assert min(share.values()) > 0.05
    elif rate == 1:  # tails of long documents stay as they are
        other, asked = ("psm", "spm") if spm else ("spm", "psm")
        assert share[other] < (0.2 if other == "spm" else 1e-9)  # without a prefix they look alike
        assert share[asked] > 0.3
    else:
        assert share["plain"] == 1


def test_fill_in_the_middle_is_a_function_of_the_row(make_dataset):
    folder = make_dataset()
    one, two = (collated(folder, "fim", rate=0.9, sentinels=SENTINELS) for _ in range(2))
    ids = np.random.default_rng(0).permutation(3 * one.rows_per_epoch)[:25]
    whole = one.rows(ids)
    for place, number in enumerate(ids.tolist()):
        for columns in (slice(0, 32), slice(5, 17), slice(31, 32)):
            part = two.rows(np.asarray([number]), columns)
            for name in part:
                np.testing.assert_array_equal(part[name][0], whole[name][place, columns])
    other = collated(folder, "fim", rate=0.9, sentinels=SENTINELS, seed=1)
    assert not np.array_equal(other.rows(ids)["tokens"], whole["tokens"])
    # Held-out text is read as it is, so that losses compare.
    held_out = collated(folder, "fim", rate=1.0, sentinels=SENTINELS, split="val")
    assert not np.isin(epoch_of(held_out)["tokens"], SENTINELS).any()
    assert held_out.bytes_per_token() is not None


@pytest.fixture
def conversations(tmp_path):
    """Documents of turns: BOS, then question and answer, some longer than a row."""
    random = np.random.default_rng(0)

    def text(most):
        return random.integers(0, 256, random.integers(0, most)).tolist()

    documents = []
    for most in (3, 12, 60):
        for turns in (0, 1, 2, 5):
            document = [ByteTokenizer.BOS, *text(5)]
            for _ in range(turns):
                document += [ASK, *text(most), *ANSWER, *text(most), *STOP]
            documents.append(document)
    documents.append([ByteTokenizer.BOS, *ANSWER, 1, 2, 3])  # an answer without its end
    chat = SimpleNamespace(spec=TokenizerSpec("chat", 384, 256, 257, 258, ""), files=dict)
    with DatasetWriter(tmp_path / "chat", chat) as writer:
        for document in documents:
            writer.add("train", np.asarray(document), len(document))
    return tmp_path / "chat", documents


def answers(document):
    """The tokens that carry loss, by a plain walk."""
    inside, carries = False, []
    for place, token in enumerate(document):
        carries.append(inside)
        if token == STOP[0]:
            inside = False
        if tuple(document[place - 1 : place + 1]) == ANSWER:
            inside = True
    return carries


def test_instruction_puts_loss_on_answers_alone(conversations):
    folder, documents = conversations
    dataset = collated(folder, "instruction", begin=ANSWER, end=STOP, seq_len=16)
    batch, pieces = epoch_of(dataset), pieces_of(dataset)
    for segment, document, start, count in zip(
        segments(batch), pieces.documents, pieces.starts, pieces.counts, strict=True
    ):
        tokens, carries = documents[document], answers(documents[document])
        expected = [tokens[i] if carries[i] else -1 for i in range(start + 1, start + count + 1)]
        np.testing.assert_array_equal(segment["targets"], expected)
        np.testing.assert_array_equal(segment["tokens"], tokens[start : start + count])
    assert (batch["targets"] >= 0)[batch["segment_ids"] > 0].sum() == sum(
        sum(answers(document)) for document in documents
    )
    assert not (batch["targets"][batch["segment_ids"] == 0]).any()
    assert (pieces.starts > 0).sum() > 5  # pieces that begin inside an answer were among them


def test_prefix_lm_marks_the_prompt(conversations):
    folder, documents = conversations
    dataset = collated(folder, "prefix", begin=ANSWER, seq_len=16)
    batch, pieces = epoch_of(dataset), pieces_of(dataset)
    assert batch["prefix"].dtype == np.int32
    for segment, document, start, count in zip(
        segments(batch), pieces.documents, pieces.starts, pieces.counts, strict=True
    ):
        tokens = documents[document]
        pairs = list(itertools.pairwise(tokens))
        prompt = pairs.index(ANSWER) + 2 if ANSWER in pairs else 0
        place = np.arange(start, start + count)
        np.testing.assert_array_equal(segment["prefix"], place < prompt)
        np.testing.assert_array_equal(
            segment["targets"], np.where(place + 1 < prompt, -1, tokens[start + 1 :][:count])
        )


def test_prefix_lm_without_a_mark_draws_the_place(make_dataset):
    dataset = collated(make_dataset(), "prefix")
    lengths = []
    for segment in segments(epoch_of(dataset)):
        prompt = segment["prefix"].sum()
        assert 1 <= prompt <= len(segment["prefix"])
        assert segment["prefix"][:prompt].all()
        assert (segment["targets"] == -1).sum() == prompt - 1
        lengths.append(prompt / len(segment["prefix"]))
    assert 0.3 < np.mean(lengths) < 0.8 and np.std(lengths) > 0.1


def test_ends_with():
    found = ends_with(np.asarray([1, 2, 1, 2, 2]), (1, 2))
    assert found.tolist() == [False, True, False, True, False]
    assert ends_with(np.asarray([1]), (1, 2)).tolist() == [False]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"kind": "fmi"}, r"kind = 'fmi': choose none, fim, prefix, instruction; did you mean"),
        ({"rate": 1.5}, r"collate\.rate = 1\.5: a share"),
        ({"kind": "fim", "sentinels": (1, 2, 3, 3)}, r"give four different token ids"),
        ({"begin": (-1,)}, r"-1 is not a token id"),
        ({"kind": "instruction", "begin": (1,)}, r"instruction needs begin and end"),
    ],
)
def test_bad_collate_is_refused(values, text):
    with pytest.raises(UsageError, match=text):
        DataConfig(collate=CollateConfig(**values)).validate()
    with pytest.raises(UsageError, match=r"'fim' needs packing bestfit .*got concat"):
        fim = CollateConfig("fim", sentinels=SENTINELS)
        DataConfig(packing="concat", collate=fim).validate()


def test_sentinels_must_be_in_the_vocabulary(make_dataset):
    dataset = collated(make_dataset(), "fim", sentinels=(300, 301, 302, 400))
    with pytest.raises(
        UsageError, match=r"largest token is 400, .* has 384: set .*model.vocab=401"
    ):
        dataset.check_vocab(384)
    dataset.check_vocab(401)


def test_the_identity_of_a_collate_function_is_pinned():
    """Checkpoints hold it."""
    config = CollateConfig("instruction", begin=(1, 2), end=(3,))
    assert config.identity() == (
        '{"kind": "instruction", "rate": 0.5, "spm": 0.5, "sentinels": [], "begin": [1, 2], '
        '"end": [3]}'
    )
