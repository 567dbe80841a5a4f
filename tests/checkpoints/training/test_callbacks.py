"""Signals that stop a run, and what is written of a step."""

import io
import signal
import time
import types
from unittest import mock

import pytest
from accelerate import Accelerator
from rich.console import Console
from transformers import TrainerControl, TrainerState

from parscale.checkpoints.training.callbacks import Interruption, RunMonitor
from parscale.checkpoints.training.run_folder import Run
from parscale.checkpoints.training.trainer import StreamsTrainer


@pytest.fixture
def hangup():
    """Sets what SIGHUP does, for the test."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_twice_asks_once(hangup):
    """Another signal after it stops the run immediately."""
    hangup(signal.SIG_DFL)
    heard = Interruption()
    with heard.listening():
        try:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
        except KeyboardInterrupt:  # it would end pytest
            pytest.fail("the second one stopped the run")
        assert heard.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.parametrize(("processes", "stops"), [(1, True), (2, False)])
def test_a_second_signal_stops_a_process_that_trains_alone(processes, stops):
    """With several, a scheduler and the launcher may both send one to each."""
    heard = Interruption()
    heard.trainer = mock.Mock(spec=StreamsTrainer, accelerator=mock.Mock(spec=Accelerator, num_processes=processes))
    stopped = False
    with heard.listening():
        signal.raise_signal(signal.SIGTERM)
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:  # it would end pytest
            stopped = True
    assert heard.asked
    assert stopped == stops


def test_a_signal_while_processes_ask_each_other_is_heard_after_the_next_step():
    heard, told = Interruption(), []
    accelerator = mock.Mock(spec=Accelerator, num_processes=2)
    heard.trainer = mock.Mock(spec=StreamsTrainer, accelerator=accelerator)
    accelerator.set_trigger.side_effect = lambda: told.append(True)

    def check():
        if not told:
            signal.raise_signal(signal.SIGTERM)
        return bool(told)

    accelerator.check_trigger.side_effect = check
    control, state = TrainerControl(), TrainerState(global_step=1, max_steps=9)
    with heard.listening():
        heard.on_step_end(None, state, control)
        assert not control.should_training_stop
        heard.on_step_end(None, state, control)
    assert control.should_training_stop
    assert control.should_save


def test_a_hangup_that_is_ignored_stays_ignored(hangup):
    """As under `nohup`."""
    hangup(signal.SIG_IGN)
    with Interruption().listening():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_the_speed_is_that_of_the_steps(tmp_path, monkeypatch):
    """Steps of 64 tokens and two seconds; what is done between them takes five."""
    monitor, now = RunMonitor(Run(tmp_path), 64, Console(file=io.StringIO())), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    state = types.SimpleNamespace(global_step=0, max_steps=2, is_world_process_zero=True)
    for state.global_step in (1, 2):
        monitor.on_step_begin(None, state, None)
        now[0] += 2
        monitor.on_step_end(None, state, None)
        monitor.on_log(None, state, None, {"loss": 1.0})
        now[0] += 5
    assert [line["tokens_per_second"] for line in monitor.run.metrics()] == [32.0, 32.0]
    assert monitor.tokens_per_second == 32.0
