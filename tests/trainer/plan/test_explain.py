"""The page of a program: its parts, what the timeline adds up to, and the memory over it."""

import html
import itertools
import re

import pytest

from tests.trainer.plan.test_cost import MESH, TINY, stored
from tests.trainer.plan.test_hlo import LOOPS
from trainer.plan.cost import time_step
from trainer.plan.explain import write_page
from trainer.plan.hlo import parse
from trainer.plan.memory import memory_at_peak, memory_course


@pytest.fixture(scope="module", params=["042", "051"])
def text(request):
    return stored(request.param)


def test_spans_fill_the_step(text):
    """What computes or waits in the entry, loops with all their turns included, is the step."""
    timing, module = time_step(parse(text), TINY), parse(text)
    spans = timing.spans[module.entry.name]
    held = sum(s.end - s.start for s in spans if s.stream in ("compute", "wait"))
    assert held == pytest.approx(timing.seconds["estimate"], rel=1e-6)
    for name, inside in timing.spans.items():
        steps = [s for s in inside if s.stream in ("compute", "wait")]
        assert all(a.end <= b.start + 1e-12 for a, b in itertools.pairwise(steps)), name


def test_memory_over_the_schedule_has_its_peak(text):
    module = parse(text)
    course = memory_course(module)
    assert max(course.values()) == memory_at_peak(module).peak
    assert {op for name, op in course if name == module.entry.name} == set(module.entry.ops)


PLAN = {"config": "tiny <x>", "slice": "v5e-4", "mesh": MESH, "remat": "attention,gate",
        "needed": 2**30, "capacity": 2**34, "forecast": {"findings": [dict(
            rule="padding", what="2 < 3", seconds=0.5, bytes=1, source="a.py:1", cure="none")]},
        }  # fmt: skip


def titles_of(page: str) -> list[str]:
    return [html.unescape(title) for title in re.findall("<h2>(.*?)</h2>", page)]


def test_a_loop_has_a_picture_of_one_turn():
    page = write_page(LOOPS.replace("STEP", "2"), PLAN, TINY).decode()
    assert titles_of(page)[1:3] == ["The step", "One of 16 turns of body"]


def test_the_page(text):
    page = write_page(text, PLAN, TINY).decode()
    titles = titles_of(page)
    assert titles[:2] == ["Roofline", "The step"] and titles[-2:] == ["Collectives", "Audit"]
    assert "tiny &lt;x&gt; on v5e-4" in page and "nothing ran on a TPU" in page
    assert "500.0 ms</th><td>padding: 2 &lt; 3<br>a.py:1; none" in page
    assert page.count("<svg") == len(titles) - 2
    loaded = re.findall(r'(?:src|href)="(?!#)([^"]*)"|url\((?!#)([^)]*)\)', page)
    assert not loaded, "the page must need nothing else"
    collectives = page[page.index("<h2>Collectives") : page.index("<h2>Audit")]
    assert "over tensor" in collectives and "over fsdp" in collectives
