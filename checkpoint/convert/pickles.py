"""Pickles as data: a reader that calls nothing, and a writer of the same values.

Python's unpickler looks up what a file names and calls it. This machine has no names to look up: it
builds numbers, strings, tuples, lists and dicts, and for a class or function a record of what the
file says would be called with what. Names that are not on the caller's list end the reading. Only
the opcodes that writers of checkpoints emit are known; sizes are checked before anything is made,
and what a pickle makes of itself is bounded: a few bytes can name one large value many times over.
"""

import pickletools
import struct
import sys
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

from sharding.errors import UnsafeInputError

LIMIT = 64 * 2**20  # bytes of a pickle
MEMORY = 640 * 2**20  # bytes that the values of a pickle may take, by the estimates below
_OPCODE, _MEMO = 80, 48  # bytes: of what an opcode makes, and more where it is put into the memo


@dataclass(frozen=True)
class Global:
    """The name of a class or function, "module.name"; it is never looked up."""

    name: str


@dataclass(eq=False, repr=False)
class Inert:
    """What a pickle would have made by calling `name` with `args`, and the state given to it.

    `new`, for the writer: an instance is made without calling its class.
    """

    name: str
    args: tuple = ()
    state: Any = None
    new: bool = False

    def __repr__(self) -> str:
        return f"<{self.name}>"  # arguments may hold themselves many times over

    def get(self, field: str, default: Any = None) -> Any:
        """Returns an attribute of the state."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return state.get(field, default) if isinstance(state, dict) else default


@dataclass(frozen=True)
class Persistent:
    """A reference to something outside of the pickle, for the writer."""

    pid: tuple


def is_key(value: Any) -> bool:
    """Whether a dict may have this key: its hash is computed at once, and differs from others'.

    Hashing a tuple that holds itself many times over takes forever, and so do integers that are
    made to have one hash.
    """
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**60)


class _Refused(Exception):
    """Why a pickle is not read."""


def loads(
    data: bytes,
    where: str,
    allowed: Set[str],
    rebuild: Callable[[str, tuple], Any] = Inert,
    persistent: Callable[[Any], Any] = Persistent,
) -> Any:
    """Returns the value of a pickle.

    Args:
      data: the whole pickle.
      where: begins every message.
      allowed: the names, "module.name", that may occur.
      rebuild: makes the value of a call, from the name of what is called and the arguments.
      persistent: makes the value of a reference to something outside.

    Raises:
      UnsafeInputError: it names something else, is damaged, or uses what no checkpoint needs.
    """
    if len(data) > LIMIT:
        raise UnsafeInputError(f"{where}: a pickle of {len(data):,} bytes; the limit is {LIMIT:,}")
    machine = _Machine(allowed, rebuild, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.spend(_OPCODE)
            if opcode.name in _LITERALS:
                machine.spend(sys.getsizeof(argument))
                machine.stack.append(argument)
            elif step := _STEPS.get(opcode.name):
                step(machine, argument)
            elif opcode.name == "STOP":
                return machine.result()
            elif opcode.name not in ("PROTO", "FRAME"):
                raise _Refused(f"opcode {opcode.name} is not one that checkpoints use")
    except _Refused as error:
        raise UnsafeInputError(f"{where}: {error}; nothing of it was run") from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UnsafeInputError(f"{where} is not a sound pickle: {reason}") from error
    raise UnsafeInputError(f"{where} is not a sound pickle: it does not end")


class _Machine:
    """The stack, the marks and the memo of a pickle being read."""

    def __init__(self, allowed: Set[str], rebuild: Callable, persistent: Callable) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self._allowed, self._rebuild, self._persistent = allowed, rebuild, persistent
        self._left = MEMORY

    def spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _Refused(f"its values take more than {MEMORY >> 20} MiB")

    def result(self) -> Any:
        if len(self.stack) != 1 or self.marks:
            raise ValueError("something is left on the stack")
        return self.stack[0]

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("an opcode takes what lies below a mark")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"a {type(self.stack[-1]).__name__} is used as a {kind.__name__}")
        return self.stack[-1]

    def name(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}"
        if full not in self._allowed:
            raise _Refused(f"it names `{full[:100]}`, which no checkpoint needs")
        self.stack.append(Global(full))

    def stack_name(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def call(self, _: Any) -> None:
        args, called = self.pop(), self.pop()
        if not isinstance(called, Global) or not isinstance(args, tuple):
            raise _Refused("it calls what is not a name")
        # What is called may copy its arguments, the entries of a list of pairs among them.
        self.spend(sum(128 * len(a) for a in args if isinstance(a, tuple | list | dict)))
        self.stack.append(self._rebuild(called.name, args))

    def build(self, _: Any) -> None:
        state = self.pop()
        made = self.stack[-1]
        if isinstance(made, Inert):
            made.state = state
        elif not isinstance(made, dict):  # attributes of a dict, as of a module's: not needed
            raise TypeError(f"a {type(made).__name__} is given attributes")

    def reference(self, _: Any) -> None:
        self.stack.append(self._persistent(self.pop()))

    def put(self, index: Any) -> None:
        self.spend(_MEMO)
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def set_items(self, values: list[Any]) -> None:
        into = self.top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not (is_key(key) or isinstance(key, float | None | Global | Inert)):
                raise TypeError(f"a {type(key).__name__} is a key")
            into[key] = value


def _tuple(count: int) -> Callable:
    def make(machine: _Machine, _: Any) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return make


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _set_items(machine: _Machine, _: Any) -> None:
    machine.set_items(machine.since_mark())


def _append(machine: _Machine, _: Any) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _appends(machine: _Machine, _: Any) -> None:
    values = machine.since_mark()
    machine.top(list).extend(values)


_LITERALS = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
})  # fmt: skip
# Sets are lists here, as nothing asks whether something is in them.
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.pop(),
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_TUPLE": _tuple(0), "TUPLE1": _tuple(1), "TUPLE2": _tuple(2), "TUPLE3": _tuple(3),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "EMPTY_LIST": lambda m, _: m.stack.append([]), "APPEND": _append, "APPENDS": _appends,
    "EMPTY_SET": lambda m, _: m.stack.append([]), "ADDITEMS": _appends,
    "EMPTY_DICT": lambda m, _: m.stack.append({}), "SETITEM": _set_item, "SETITEMS": _set_items,
    "BINPUT": _Machine.put, "LONG_BINPUT": _Machine.put, "MEMOIZE": _Machine.put,
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "GLOBAL": lambda m, names: m.name(*names.split(" ", 1)), "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.call, "NEWOBJ": _Machine.call, "BUILD": _Machine.build,
    "BINPERSID": _Machine.reference,
}  # fmt: skip


# ---------------------------------------------------------------- writing


def dumps(value: Any) -> bytes:
    """Returns the pickle, protocol 2, of plain values and the records above."""
    return b"\x80\x02" + b"".join(_emit(value)) + b"."


def _emit(value: Any) -> Iterator[bytes]:
    if value is None or isinstance(value, bool):
        yield {None: b"N", True: b"\x88", False: b"\x89"}[value]
    elif isinstance(value, int):
        short = -(2**31) <= value < 2**31
        wide = value.to_bytes(16, "little", signed=True)
        yield b"J" + struct.pack("<i", value) if short else b"\x8a\x10" + wide
    elif isinstance(value, float):
        yield b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        text = value.encode()
        yield b"X" + struct.pack("<I", len(text)) + text
    elif isinstance(value, tuple):
        yield b"(" + b"".join(b for v in value for b in _emit(v)) + b"t"
    elif isinstance(value, list):
        yield b"](" + b"".join(b for v in value for b in _emit(v)) + b"e"
    elif isinstance(value, dict):
        yield b"}(" + b"".join(b for pair in value.items() for v in pair for b in _emit(v)) + b"u"
    elif isinstance(value, Global):
        yield f"c{value.name.rpartition('.')[0]}\n{value.name.rpartition('.')[2]}\n".encode()
    elif isinstance(value, Persistent):
        yield from (*_emit(value.pid), b"Q")
    elif isinstance(value, Inert):
        yield from (*_emit(Global(value.name)), *_emit(value.args), b"\x81" if value.new else b"R")
        if value.state is not None:
            yield from (*_emit(value.state), b"b")
    else:
        raise TypeError(f"{type(value).__name__} is not pickled here")
