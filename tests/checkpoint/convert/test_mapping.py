"""The language of tables: what its notation means in plain numpy, and what the checker refuses."""

import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.convert import mapping
from checkpoint.convert.mapping import (
    Sizes,
    TableError,
    build,
    check,
    parse_rows,
    to_ours,
    to_theirs,
)
from sharding.errors import UsageError

SIZES = Sizes(
    dict(L=2, E=3, D=5, N=6, K=2, G=3, H=4, F=8, V=11, T=2, f=4, c=2, R=2), {"V": 16}
)  # fmt: skip


class Arrays:
    """Arrays in memory, as a source."""

    def __init__(self, arrays):
        self.arrays = arrays

    def read(self, name, lead, start, stop):
        return self.arrays[name][lead][start:stop].copy()


def ours_of(rows):
    rng = np.random.default_rng(0)
    shapes = {o.name: o.shape(SIZES.ours) for row in rows for o in row.ours}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def forward(rows, ours):
    return {
        e.name: build(e, Arrays(ours), np.dtype("float32"))
        for row in rows for e in to_theirs(row, SIZES)
    }  # fmt: skip


def backward(rows, theirs):
    shapes = {o.name: o.shape(SIZES.ours) for row in rows for o in row.ours}
    out = {name: np.full(shape, 9, np.float32) for name, shape in shapes.items()}
    for row in rows:
        for e in to_ours(row, SIZES):
            out[e.name][e.lead] = build(e, Arrays(theirs), np.dtype("float32"))
    return out


def round_trip(text, block=mapping.BLOCK):
    """Returns (ours, theirs) of a table, after proving it and coming back to the same bits."""
    rows = parse_rows(text)
    check(rows, SIZES)
    ours = ours_of(rows)
    theirs = forward(rows, ours)
    again = backward(rows, theirs)
    for name in ours:
        assert np.array_equal(again[name], ours[name]), name
    return ours, theirs


@pytest.fixture(params=["whole", "whole, by XLA", "one row at a time"])
def blocks(request, monkeypatch):
    if request.param != "whole":
        monkeypatch.setattr(mapping, "LARGE", 3)
    if request.param == "one row at a time":
        monkeypatch.setattr(mapping, "BLOCK", 1)


@pytest.mark.usefixtures("blocks")
class TestNotation:
    def test_linear_layers_hold_out_in(self):
        ours, theirs = round_trip("wq: L D N H = layers.{L}.q: (N H) D")
        for i in range(2):
            assert np.array_equal(theirs[f"layers.{i}.q"], ours["wq"][i].reshape(5, 24).T)

    def test_experts_are_one_more_index(self):
        ours, theirs = round_trip("up: L E D F = {L}.experts.{E}.w3: F D")
        for i, e in itertools.product(range(2), range(3)):
            assert np.array_equal(theirs[f"{i}.experts.{e}.w3"], ours["up"][i, e].T)

    def test_fused_projections_lie_one_after_the_other(self):
        ours, theirs = round_trip(
            "q: L D N H & k: L D K H & v: L D K H = {L}.qkv: D [(N H) | (K H) | (K H)]"
        )
        want = np.concatenate([ours[n][1].reshape(5, -1) for n in "qkv"], axis=1)
        assert np.array_equal(theirs["1.qkv"], want)

    def test_grouped_heads_lie_group_by_group(self):  # Megatron: (q q q k v) for each KV head
        ours, theirs = round_trip(
            "q: L D (K G) H & k: L D K H & v: L D K H = {L}.qkv: (K [(G H) | H | H]) D"
        )
        groups = []
        for k in range(2):
            groups += [ours["q"][0][:, k * 3 + g].T for g in range(3)]
            groups += [ours["k"][0][:, k].T, ours["v"][0][:, k].T]
        assert np.array_equal(theirs["0.qkv"], np.concatenate(groups))

    def test_ranks_of_gate_and_up(self):  # each tensor-parallel rank holds its gate, then its up
        ours, theirs = round_trip("gate: D (T f) & up: D (T f) = rank{T}.fc1: [f | f] D")
        for rank, part in enumerate((slice(0, 4), slice(4, 8))):
            want = np.concatenate([ours["gate"][:, part].T, ours["up"][:, part].T])
            assert np.array_equal(theirs[f"rank{rank}.fc1"], want)

    def test_rotary_order(self):  # pairs side by side, ours half and half
        ours, theirs = round_trip("wq: L D N (c R) = {L}.q: (N R c) D")
        half = ours["wq"][0].reshape(5, 6, 4)
        want = np.stack([half[..., :2], half[..., 2:]], axis=-1).reshape(5, 24).T
        assert np.array_equal(theirs["0.q"], want)

    def test_vocabulary_is_padded_with_zeros_and_stripped(self):
        rows = parse_rows("embedding: V D = wte: V D")
        theirs = {"wte": np.arange(55, dtype=np.float32).reshape(11, 5)}
        ours = backward(rows, theirs)["embedding"]
        assert ours.shape == (16, 5) and not ours[11:].any()
        assert np.array_equal(forward(rows, {"embedding": ours})["wte"], theirs["wte"])

    def test_offset_is_undone_exactly(self):
        rows = parse_rows("norm: D = scale: D + 1")
        theirs = {"scale": np.float32([-0.5, 0.25, 0.0, 2.0, 1.5])}
        ours = backward(rows, theirs)
        assert np.array_equal(ours["norm"], theirs["scale"] + 1)
        assert np.array_equal(forward(rows, ours)["scale"], theirs["scale"])


def test_an_offset_that_would_lose_bits_is_refused():
    rows = parse_rows("norm: D = scale: D + 1")
    with pytest.raises(UsageError, match=r"`norm`: adding .1 in float32 loses bits"):
        backward(rows, {"scale": np.full(5, 1e-9, np.float32)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: D", "expected `ours: axes = theirs: axes`"),
        ("a D = b: D", "`a D` is not `name: axes`"),
        ("a: (D N = b: D N", r"`\)` is missing"),
        ("a: D ) = b: D", r"unexpected `\)`"),
        ("a: D = b: D Q", "letter Q has no size"),
        ("a: D N = b: D", "our letters D N are not theirs D"),
        ("a: D D = b: D D", "our letters D D are not theirs D D"),
        ("a: D & b: D = c: D", "2 arrays of ours for 1 parts"),
        ("a: D = c: [D | D]", "1 arrays of ours for 2 parts"),
        ("a: D = b: D \n a: D = c: D", "`a` is made by another row"),
        ("a: D = b: D \n c: D = b: D", "`b` is made by another row"),
        ("a: L D = x.{L}: D \n b: D = x.1: D", r"`x.1` is made by another row"),
        ("a: D = b: D \n x: N = y: N", "the model has"),
        ("b: D = a: D", "no row of the table makes `a`"),
        ("a: N = b: N", r"`a` would be \(6,\), the model has \(5,\)"),
    ],
)
def test_a_table_that_is_not_one_to_one_is_refused(text, message):
    with pytest.raises(TableError, match=message):
        check(parse_rows(text), SIZES, {"a": (5,)} if "model" in message or "makes `a`" in message
              else None)  # fmt: skip


def test_the_checker_catches_a_wrong_executor(monkeypatch):
    """The proof runs the code that converts, so a fault in it cannot pass."""
    rows = parse_rows("wq: L D N H = {L}.q: (N H) D")
    view = mapping.Layout.view
    monkeypatch.setattr(  # forgets the order of the letters on one side
        mapping.Layout, "view",
        lambda self, t, i, o: view(self, t, i, o) if len(self.axes) < 3
        else view(self, t, i, o)[:, ::-1],
    )  # fmt: skip
    check(rows, SIZES)  # reversed on the way out and on the way in: still one to one
    calls = itertools.count()
    monkeypatch.setattr(
        mapping.Layout, "view",
        lambda self, t, i, o: view(self, t, i, o)[:: -1 if next(calls) == 7 else 1],
    )  # fmt: skip
    with pytest.raises(TableError, match=r"does not lead back|drops or repeats"):
        check(rows, SIZES)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_grouping_and_order_equals_numpy(data):
    letters = data.draw(st.lists(st.sampled_from("DNHFE"), min_size=1, max_size=4, unique=True))
    order = data.draw(st.permutations(letters))
    cuts = data.draw(st.lists(st.booleans(), min_size=len(order) - 1, max_size=len(order) - 1))
    axes = order[0]
    for letter, cut in zip(order[1:], cuts, strict=True):
        axes += " " + letter if cut else "_" + letter
    text = " ".join(f"({a.replace('_', ' ')})" if "_" in a else a for a in axes.split())
    rows = parse_rows(f"a: {' '.join(letters)} = b: {text}")
    check(rows, SIZES)
    ours = ours_of(rows)
    with mock.patch.object(mapping, "LARGE", data.draw(st.sampled_from([3, mapping.LARGE]))):
        theirs = forward(rows, ours)["b"]
        again = backward(rows, {"b": theirs})["a"]
    want = ours["a"].transpose([letters.index(x) for x in order])
    assert np.array_equal(theirs.ravel(), want.ravel())
    assert np.array_equal(again, ours["a"])
