import os
import signal

import pytest

from grpo.signals import SIGNALS, Stopped, StopSignals


@pytest.fixture(autouse=True)
def handlers():
    """Those of before, which every test has to leave in place."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    after = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, before):
        signal.signal(number, handler)
    assert after == before


def send(number):
    os.kill(os.getpid(), number)


def test_nothing_happens_without_a_signal():
    with StopSignals() as signals:
        signals.check(signals.number, 0)


def test_the_first_signal_is_noted_and_sigterm_may_come_again():
    with pytest.raises(Stopped) as stopped, StopSignals() as signals:
        for _ in range(3):
            send(signal.SIGTERM)
        assert signals.number == signal.SIGTERM
        signals.check(0, signals.number)
    assert str(stopped.value) == "stopped by SIGTERM" and stopped.value.exit_status == 143


def test_after_ctrl_c_no_handler_is_left():
    with pytest.raises(Stopped, match="SIGINT") as stopped, StopSignals() as signals:
        send(signal.SIGINT)
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL, signal.SIG_DFL]
        signals.check(signals.number)
    assert stopped.value.exit_status == 130


def test_a_signal_of_another_process_stops_this_one():
    with pytest.raises(Stopped, match="SIGTERM"), StopSignals() as signals:
        signals.check(signals.number, signal.SIGTERM)


def test_a_signal_that_no_step_heard_of_is_not_forgotten():
    with pytest.raises(Stopped, match="SIGTERM"), StopSignals():
        send(signal.SIGTERM)


def test_a_failure_is_not_hidden_by_a_signal():
    with pytest.raises(KeyError), StopSignals():
        send(signal.SIGTERM)
        raise KeyError
