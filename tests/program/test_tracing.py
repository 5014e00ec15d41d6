"""Turns of threads that call models and threads that trace one."""

from __future__ import annotations

import threading

import pytest

from quantkit.program import tracing


def test_a_trace_waits_for_calls_and_calls_for_the_trace() -> None:
    order: list[str] = []
    inside = threading.Event()

    def trace() -> None:
        with tracing.tracing():
            order.append("traced")

    with tracing.calling():
        thread = threading.Thread(target=trace)
        thread.start()
        inside.wait(0.05)
        with tracing.calling():  # nested: it does not wait for the one that waits for it
            order.append("called")
    thread.join(10)
    assert order == ["called", "traced"]


def test_who_is_interrupted_while_waiting_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tracing._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), tracing.tracing():
            pass
    assert not tracing._tracers
