"""Which signals ask a run to save and end, and which end it at once."""

import signal

import pytest

from trainer.recovery.progress import VARIABLE
from trainer.signals import StopSignals


def test_schedulers_repeat_sigterm_and_it_still_saves():
    with StopSignals() as signals:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert signals.name == "SIGTERM" and signals.stop_at_step(3)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_persons_second_ctrl_c_ends_at_once(first):
    with StopSignals() as signals, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(first)
        assert signals.name == first.name
        signal.raise_signal(signal.SIGINT)


def test_a_supervised_trainer_leaves_it_to_its_supervisor(monkeypatch):
    monkeypatch.setenv(VARIABLE, "page")
    with StopSignals() as signals:
        for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert signals.name == "SIGUSR2"


def test_what_was_there_before_is_there_again():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    with StopSignals():
        pass
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
