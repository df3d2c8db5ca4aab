"""Which signals ask a run to save and end, and which end it at once."""

import signal

import pytest

from trainer.recovery.progress import VARIABLE
from trainer.recovery.supervisor import Options, Supervisor
from trainer.signals import StopSignals


def test_schedulers_repeat_sigterm_and_it_still_saves():
    with StopSignals() as signals:
        signals.remember()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert signals.name == "SIGTERM" and signals.stop_at_step(3)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_persons_second_ctrl_c_ends_at_once(first):
    with StopSignals() as signals, pytest.raises(KeyboardInterrupt):
        signals.remember()
        signal.raise_signal(first)
        assert signals.name == first.name
        signal.raise_signal(signal.SIGINT)


def test_a_supervised_trainer_leaves_it_to_its_supervisor(monkeypatch):
    monkeypatch.setenv(VARIABLE, "page")
    with StopSignals() as signals:
        signals.remember()
        for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert signals.name == "SIGUSR2"


def test_a_supervisor_waits_for_the_save_until_a_second_ctrl_c():
    supervisor = Supervisor(Options(["train"], "run", grace=60.0))
    for _ in range(3):
        supervisor._remember(signal.SIGTERM, None)
    assert (supervisor._signal, supervisor._options.grace) == (signal.SIGTERM, 60.0)
    supervisor._remember(signal.SIGINT, None)
    assert (supervisor._signal, supervisor._options.grace) == (signal.SIGTERM, 0.0)


def test_what_was_there_before_is_there_again():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before = [signal.getsignal(n) for n in numbers]
    with StopSignals() as signals:
        signals.remember()
        assert before != [signal.getsignal(n) for n in numbers]
    assert before == [signal.getsignal(n) for n in numbers]
