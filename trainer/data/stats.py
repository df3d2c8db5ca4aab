"""What a dataset holds, in numbers: lengths, repetitions, vocabulary, and how well rows fill."""

import itertools
from collections.abc import Callable

import numpy as np

from trainer.data.clean import digest
from trainer.data.plan import Plan
from trainer.data.shards import TokenShards
from trainer.data.tokenizer import Tokenizer

_BLOCK = 1 << 22  # tokens looked at together


def describe(
    shards: TokenShards,
    tokenizer: Tokenizer,
    seq_len: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, object]:
    """Reads one split and returns its figures, ready for JSON.

    `duplicates` counts documents whose tokens an earlier one has too, by 64-bit digests;
    `histogram` holds [first length, next bin's first, documents]; `padding` is the share of
    positions of rows of `seq_len` that would predict nothing.
    """
    lengths, vocab = shards.lengths, tokenizer.spec.vocab_size
    counts, digests = np.zeros(vocab, np.int64), np.zeros(len(lengths), np.uint64)
    cuts = np.searchsorted(shards.starts, np.arange(0, shards.starts[-1], _BLOCK))
    cuts = np.unique([*cuts, len(lengths)])
    for begin, end in itertools.pairwise(cuts.tolist()):
        chunk = [shards.document(number) for number in range(begin, end)]
        counts += np.bincount(np.concatenate(chunk), minlength=vocab)
        for number, tokens in enumerate(chunk, begin):
            digests[number] = digest(tokens.tobytes())
        advance(int(lengths[begin:end].sum()))
    shortest, longest = (int(end).bit_length() for end in (lengths.min(), lengths.max()))
    bins = (1 << np.arange(shortest, longest + 2)) >> 1  # powers of two, and 0 for empty documents
    order = np.argsort(-counts, kind="stable")[:10]
    plan = Plan(lengths, seq_len=seq_len, shuffle=False)
    tokens, text_bytes = int(lengths.sum()), shards.text_bytes
    return {
        "documents": len(lengths),
        "tokens": tokens,
        "text_bytes": text_bytes,
        "bytes_per_token": text_bytes / tokens,
        "lengths": {
            **{f"p{q}": int(np.percentile(lengths, q, method="lower")) for q in (50, 90, 99)},
            "max": int(lengths.max()),
        },
        "histogram": [
            [int(low), int(high), int(count)]
            for low, high, count in zip(
                bins[:-1], bins[1:], np.histogram(lengths, bins)[0], strict=True
            )
        ],
        "duplicates": len(digests) - len(np.unique(digests)),
        "ids_used": int(np.count_nonzero(counts)),
        "vocab_size": vocab,
        "most_frequent": [
            {"id": int(number), "count": int(counts[number]), "text": tokenizer.decode([number])}
            for number in order
            if counts[number]
        ],
        "seq_len": seq_len,
        "rows_per_epoch": plan.rows_per_epoch,
        "padding": plan.padding,
    }
