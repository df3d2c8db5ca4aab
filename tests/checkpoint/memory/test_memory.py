"""Slots, parity, messages and the rounds: what snapshots in memory rest on, without JAX."""

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.memory import parity, slots
from checkpoint.memory.rounds import Rounds
from checkpoint.memory.slots import HEADER, Slots
from sharding.errors import UsageError


def write(memory: Slots, step: int, content: bytes) -> int:
    slot = memory.begin(step)
    memory.put(slot, HEADER, content)
    memory.commit(slot, step, HEADER + len(content), {"size": len(content)})
    return slot


@pytest.fixture
def memory():
    made = Slots.create(10_000)
    yield made
    made.close()


def test_another_mapping_sees_what_was_committed(memory):
    assert memory.held() == {} and memory.committed == -1
    slot = write(memory, 7, b"seven" * 1000)
    seen = Slots.attach(memory.path)
    assert seen.held() == {7: slot} and bytes(seen.data(slot)[HEADER : HEADER + 5]) == b"seven"
    assert seen.index(slot) == memory.index(slot) != None  # noqa: E711
    memory.next = 9
    assert seen.next == 9


def test_the_step_that_counts_is_never_overwritten(memory):
    write(memory, 1, b"one")
    memory.committed = 1
    for step in range(2, 20):
        write(memory, step, b"more")
        assert memory.held().keys() == {1, step}
    memory.committed = 19
    write(memory, 20, b"more")
    assert memory.held().keys() == {19, 20}


def test_what_was_not_finished_is_not_held(memory):
    """Wherever a writer is killed, the step before is held and its own is not."""
    write(memory, 1, b"one")
    memory.committed = 1
    slot = write(memory, 2, b"two")
    whole = bytes(memory.data(slot)[:HEADER])
    for kept in range(HEADER):
        memory.data(slot)[:HEADER] = whole[:kept] + bytes(HEADER - kept)
        assert memory.held().keys() == ({1, 2} if kept >= 40 or not any(whole[kept:40]) else {1})
    memory.begin(2)
    assert memory.held().keys() == {1}


def test_a_flipped_bit_of_header_or_index_shows(memory):
    slot = write(memory, 3, b"three")
    draw = random.Random(0)
    for _ in range(200):
        place = draw.choice([*range(36), *range(HEADER + 5, HEADER + 12)])
        memory.data(slot)[place] ^= 1 << draw.randrange(8)
        assert 3 not in memory.held() or memory.index(slot) is None
        write(memory, 3, b"three")


def test_memory_that_is_not_there_is_refused_with_numbers(monkeypatch):
    with pytest.raises(UsageError, match=r"two snapshots of 1048576\.00 GiB do not fit into \d"):
        Slots.create(2**50)
    monkeypatch.setattr(slots, "free_memory", lambda: 2**30)
    with pytest.raises(UsageError, match=r"0\.50 GiB do not fit into 1\.00 GiB of free memory"):
        Slots.create(2**29)
    assert slots.free_memory() == 2**30


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.data())
def test_any_one_host_is_rebuilt_from_the_others(n, data):
    host = st.lists(st.integers(0, 100), min_size=1, max_size=3)
    some = st.lists(host, min_size=n, max_size=n).filter(lambda hosts: any(map(sum, hosts)))
    sizes = data.draw(some)
    images = [[memoryview(bytearray(os.urandom(size))) for size in parts] for parts in sizes]
    chunk = parity.chunk_size([sum(parts) for parts in sizes])

    def sent(owner: int, keeper: int) -> memoryview:
        start = parity.chunk_number(owner, keeper) * chunk
        return memoryview(b"".join(parity.cut(images[owner], start, chunk)))

    kept = []
    for host in range(n):
        held = bytearray(chunk)
        for other in range(n):
            if other != host:
                parity.add([memoryview(held)], 0, sent(other, host))
        kept.append(memoryview(held))
    lost = data.draw(st.integers(0, n - 1))
    rebuilt = [memoryview(bytearray(size)) for size in sizes[lost]]
    for host in range(n):
        if host != lost:
            start = parity.chunk_number(lost, host) * chunk
            parity.add(rebuilt, start, kept[host])
            for other in range(n):
                if other not in (lost, host):
                    parity.add(rebuilt, start, sent(other, host))
    assert b"".join(rebuilt) == b"".join(images[lost])


def test_a_step_that_did_not_reach_all_is_followed_by_another_at_once():
    rounds = Rounds(2, 5)
    rounds.ready([0], 0, -1)
    assert rounds.ready([1], 0, -1) and rounds.next == 5
    assert not rounds.done([0], 5, 6)
    assert rounds.failed(5, 7) and rounds.next == 10 and rounds.committed == -1
    assert not rounds.failed(5, 7)  # the other host says so too


def test_ready_again_names_no_other_step_while_one_is_under_way():
    """A large snapshot takes longer than the silence after which trainers ask."""
    rounds = Rounds(2, 5)
    for rank in (0, 1):
        rounds.ready([rank], 0, -1)
    assert rounds.ready([1], 3, -1) and rounds.next == 5  # ahead of all: told once more
    rounds.done([0], 5, 6)
    assert rounds.ready([0], 30, -1) and rounds.next == 5  # it has done its part
    assert rounds.done([1], 5, 31) and rounds.committed == 5
    step = rounds.next
    assert rounds.ready([1], step + 1, 5) and rounds.next > step + 1  # its news were lost


def test_cached_files_of_a_control_group_are_free_memory(tmp_path, monkeypatch):
    group = tmp_path / "a"
    group.mkdir()
    monkeypatch.setattr(slots, "_groups", lambda: [group, tmp_path])
    for name, text in (
        ("memory.max", f"{2**24}\n"), ("memory.current", f"{2**23}\n"),
        ("memory.stat", f"anon {2**22}\ninactive_file {2**22}\nactive_file 5\n"),
    ):  # fmt: skip
        (group / name).write_text(text)
    assert slots.free_memory() == 2**24 - 2**23 + 2**22
    (group / "memory.stat").unlink()
    assert slots.free_memory() == 2**23
    (group / "memory.max").write_text("max\n")
    assert slots.free_memory() > 2**24


def test_alone_every_step_may_be_taken():
    rounds = Rounds(1, 1)
    assert rounds.ready([0], 5, -1) and rounds.next == 6
    for step in range(6, 12):
        assert rounds.done([0], step, step) and rounds.committed == step
        assert rounds.next == step + 1
    assert not rounds.done([0], 3, 20)
    assert rounds.done([0], 25, 26) and (rounds.committed, rounds.next) == (25, 27)


def test_the_look_ahead_after_misses_shrinks_again():
    """Each miss doubles it up to 64 steps; each snapshot that counts then takes one step off it."""
    rounds = Rounds(2, 1)
    rounds.ready([0, 1], 0, -1)
    for _ in range(8):
        rounds.missed(rounds.next, rounds.next)
    ahead = []
    for _ in range(70):
        step = rounds.next
        rounds.done([0, 1], step, step)
        ahead.append(rounds.next - step)
    assert ahead == [64 - n if n < 63 else 2 for n in range(70)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**32))
def test_processes_that_hear_late_still_agree(count, every, seed):
    """Each hears of the named step after a delay of its own and writes it, or says that it missed.

    Whatever the order, a step counts only if all hold it, and before long one does.
    """
    draw, rounds = random.Random(seed), Rounds(count, every)
    for rank in draw.sample(range(count), count):
        rounds.ready([rank], 0, -1)
    delays, ahead = ([draw.randrange(n) for _ in range(count)] for n in (4, 2))
    counted = 0
    heard = [[(0, rounds.next)] for _ in range(count)]
    tried, written = [-1] * count, [set() for _ in range(count)]
    for step in range(1, 300):
        for rank in draw.sample(range(count), count):
            at = step + ahead[rank]
            named = max(next for when, next in heard[rank] if when <= step)
            if named <= tried[rank] or at < named:
                continue
            tried[rank] = named
            if at == named or count == 1:
                written[rank].add(at)
                changed = rounds.done([rank], at, at)
            else:
                changed = rounds.missed(named, at)
            if changed:
                assert rounds.next % every == 0
                for other in range(count):
                    heard[other].append((step + delays[other], rounds.next))
            if rounds.committed > counted:
                counted = rounds.committed
                assert all(counted in steps for steps in written)
    assert counted > 150
