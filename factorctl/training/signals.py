"""Ctrl-C and SIGTERM during training: finish the step, save, then end as the signal would have."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Which signal asked for an end, if any did."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # the second one: at once
            self._pass_on(number, frame)
        self.signal = number

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number, signal.SIG_DFL)
        signal.signal(number, previous)
        if callable(previous):
            previous(number, frame)
        else:
            signal.raise_signal(number)

    def obey(self) -> None:
        """End as the signal would have, had nobody caught it."""
        if self.signal is not None:
            self._pass_on(self.signal, None)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch the signals while the block runs. Outside of the main thread nothing can be caught, and nothing is."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    for number in map(int, SIGNALS):
        request._previous[number] = signal.signal(number, request._receive)
    try:
        yield request
    finally:
        for number, previous in request._previous.items():
            signal.signal(number, previous)
