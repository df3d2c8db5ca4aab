"""A fingerprint of every array: what says that the bits read back are the bits that were saved.

Two sums modulo 2**32 over all elements, each of a hash of the element's bits and its position in
the whole array. Sums of integers come out the same in any order, so the fingerprint does not depend
on mesh, process count or device kind; a hash keyed by position sees moved values too. A change of
one element always shows; any other change goes unseen with a chance of about 2**-64. It guards
against storage and transport, not against someone who wants to deceive.
"""

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from checkpoint.tree import flatten

Tree = Any

_U32 = jnp.uint32
_PLACE, _ROW = 0x9E3779B1, 0x85EBCA77  # odd: multiplying by them loses no bits of a position
# LLVM keeps to 256 bits where there are 512; with these hashing takes 0.87 to 0.96 of the time.
_WIDE = {"xla_cpu_prefer_vector_width": 512}
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # bytes an element → word


def fingerprints(tree: Tree) -> jax.Array:
    """Returns uint32 (arrays, 2): one fingerprint per leaf of `tree`, in the order of `flatten`.

    Computed on the devices that hold the arrays, in one program; does not wait for it.
    """
    leaves = list(flatten(tree).values())
    platforms = {d.platform for x in leaves if isinstance(x, jax.Array) for d in x.devices()}
    return _on_host(leaves) if platforms == {"cpu"} else _fingerprints(leaves)


def as_text(found: jax.Array, names: list[str]) -> dict[str, str]:
    """Returns name → 16 hexadecimal digits, for the names of the leaves; waits for the device."""
    words = np.asarray(jax.device_get(found)).tolist()
    return {name: sums_text(sums) for name, sums in zip(names, words, strict=True)}


def part_sums(part: np.ndarray, first: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Returns uint32 (2,): what a part of an array of `shape` adds to the array's fingerprint.

    On the host, without a copy if the part begins at 64 bytes; may be called by several threads.

    Args:
      part: has all axes of the array and lies in it in one piece: whole rows, or some of one row.
      first: index of the part's first element.
    """
    whole = next((axis for axis, size in enumerate(part.shape) if size != 1), part.ndim)
    if part.shape[whole + 1 :] != shape[whole + 1 :]:
        raise ValueError(f"a part {part.shape} of {shape} that is not in one piece")
    words = _host_words(part)
    each = words.size // max(1, part.size)
    width = each * math.prod(shape[1:]) if shape else 1  # words in a row
    rows = part.shape[0] if shape else words.size
    strides = [math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
    inner = each * sum(i * n for i, n in zip(first[1:], strides, strict=True))
    numbers = (np.uint32(n % 2**32) for n in (first[0] if shape else 0, inner, width))
    return np.asarray(_sums_of_rows(words.reshape(rows, -1), *numbers))


def box_sums(box: np.ndarray, first: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Returns uint32 (2,): what a box of an array of `shape` adds to the array's fingerprint.

    On the host, also where the job computes elsewhere; does not wait for it.

    Args:
      first: index of the box's first element.
    """
    program = box_program(box.shape, box.dtype, shape)
    return program(box, np.asarray(first, np.int64).astype(np.uint32))


@cache
def box_program(
    box: tuple[int, ...], dtype: np.dtype, shape: tuple[int, ...]
) -> jax.stages.Compiled:
    """Compiles what `box_sums` runs for boxes of this kind, which takes a tenth of a second."""
    first = jax.ShapeDtypeStruct((len(shape),), _U32)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        program = jax.jit(partial(array_sums, shape=shape))
        return program.lower(jax.ShapeDtypeStruct(box, dtype), first).compile(_WIDE)


def rows_sums(
    part: np.ndarray, lead: tuple[int, ...], start: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns what array[lead][start:], as far as `part` goes, adds to the fingerprint."""
    whole = part.reshape((1,) * (len(shape) - part.ndim) + part.shape)
    return part_sums(whole, (*lead, start, *(0 for _ in shape))[: len(shape)], shape)


def sums_text(sums: np.ndarray) -> str:
    """Returns the fingerprint whose parts add up to `sums`."""
    return f"{sums[0]:08x}{sums[1]:08x}"


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sums_of_leaf(leaf) for leaf in leaves])


_on_host = jax.jit(_fingerprints, compiler_options=_WIDE)


@jax.jit
def _sums_of_leaf(leaf: jax.Array) -> jax.Array:
    return array_sums(leaf)  # traced once for all leaves of a kind: a restart waits for it


@partial(jax.jit, compiler_options=_WIDE)
def _sums_of_rows(
    words: jax.Array, row: jax.Array, inner: jax.Array, width: jax.Array
) -> jax.Array:
    """The two sums of some words of each of some rows; `row`, `inner` are the first one's place."""
    row = row + lax.broadcasted_iota(_U32, words.shape, 0)
    place = row * width + inner + lax.broadcasted_iota(_U32, words.shape, 1)
    return _sums(words.astype(_U32), place * _U32(_PLACE) ^ row * _U32(_ROW))


def _host_words(part: np.ndarray) -> np.ndarray:
    """The bits of the elements as unsigned integers; `_bits` on the host."""
    if part.dtype.name in ("int4", "int2"):
        part = part.astype(np.int8)
    elif part.dtype.name in ("uint4", "uint2"):
        part = part.astype(np.uint8)
    word = min(part.dtype.itemsize, 4)
    return np.ascontiguousarray(part).reshape(-1).view(f"u{word}")


def array_sums(
    x: jax.Array, first: jax.Array | None = None, shape: tuple[int, ...] = ()
) -> jax.Array:
    """Returns uint32 (2,), to be traced: the sums of an array, or of one shard as if it were all.

    With `first` what a box that begins there adds to the sums of an array of `shape`.
    """
    bits = _bits(x)
    whole = bits.shape if first is None else shape + bits.shape[len(shape) :]
    # Rows of the first dimension are told apart by a term of their own, so that positions stay
    # distinct in arrays of more than 2**32 elements too.
    key = jnp.zeros((), _U32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        place = lax.broadcasted_iota(_U32, bits.shape, axis)
        if first is not None and axis < len(shape):
            place = place + first[axis]
        key = key + place * _U32(stride * _PLACE % 2**32)
        if axis == 0:
            key = key ^ (place * _U32(_ROW))
        stride *= whole[axis]
    return _sums(bits, key)


def _sums(bits: jax.Array, key: jax.Array) -> jax.Array:
    first = _mix(bits * _U32(0xC2B2AE3D) ^ _mix(key))
    second = (first ^ (first >> 13)) * _U32(0x27D4EB2F)
    # One reduction of both, not two sums: XLA:CPU reads and hashes the array once, 6 times as fast.
    zeros, axes = (_U32(0), _U32(0)), tuple(range(bits.ndim))
    return jnp.stack(lax.reduce((first, second ^ (second >> 16)), zeros, _add, axes))


def _add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return a[0] + b[0], a[1] + b[1]


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits that spreads each over all (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * _U32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * _U32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32; elements of 8 bytes become two along a new last axis."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_ or jnp.dtype(x.dtype).name in ("int4", "uint4", "int2", "uint2"):
        x = x.astype(jnp.uint8)
    return lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(_U32)
