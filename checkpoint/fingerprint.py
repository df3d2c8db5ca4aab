"""A fingerprint of every array: what says that the bits read back are the bits that were saved.

Two sums modulo 2**32 over all elements, each of a hash of the element's bits and its position in
the whole array. Sums of integers come out the same in any order, so the fingerprint does not depend
on mesh, process count or device kind; a hash keyed by position sees moved values too. A change of
one element always shows; any other change goes unseen with a chance of about 2**-64. It guards
against storage and transport, not against someone who wants to deceive.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from checkpoint.tree import flatten

Tree = Any

_U32 = jnp.uint32
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # bytes an element → word


def fingerprints(tree: Tree) -> jax.Array:
    """Returns uint32 (arrays, 2): one fingerprint per leaf of `tree`, in the order of `flatten`.

    Computed on the devices that hold the arrays, in one program; does not wait for it.
    """
    return _fingerprints(list(flatten(tree).values()))


def as_text(found: jax.Array, names: list[str]) -> dict[str, str]:
    """Returns name → 16 hexadecimal digits, for the names of the leaves; waits for the device."""
    words = np.asarray(jax.device_get(found)).tolist()
    return {name: f"{high:08x}{low:08x}" for name, (high, low) in zip(names, words, strict=True)}


def of_parts(shape: tuple[int, ...], parts: Iterable[tuple[tuple[int, ...], np.ndarray]]) -> str:
    """Returns the fingerprint of an array of `shape` that comes in parts, in any order.

    Args:
      parts: (index of the part's first element, part); a part has all axes of the array.
    """
    total = np.zeros(2, np.uint32)
    for first, part in parts:
        total += np.asarray(_fingerprint_of_part(part, [_U32(i) for i in first], shape))
    return f"{total[0]:08x}{total[1]:08x}"


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_fingerprint(leaf) for leaf in leaves])


@partial(jax.jit, static_argnums=2)
def _fingerprint_of_part(x: jax.Array, first: list[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    return _fingerprint(x, first, shape)


def _fingerprint(
    x: jax.Array, first: list[jax.Array] | None = None, shape: tuple[int, ...] = ()
) -> jax.Array:
    """The two sums of an array, or of a part at index `first` of an array of `shape`."""
    bits = _bits(x)
    shape = (*(shape or x.shape), *bits.shape[x.ndim :])
    # Rows of the first dimension are told apart by a term of their own, so that positions stay
    # distinct in arrays of more than 2**32 elements too.
    key = jnp.zeros((), _U32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        place = lax.broadcasted_iota(_U32, bits.shape, axis)
        if first is not None and axis < len(first):
            place = place + first[axis]
        key = key + place * _U32(stride * 0x9E3779B1 % 2**32)
        if axis == 0:
            key = key ^ (place * _U32(0x85EBCA77))
        stride *= shape[axis]
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
