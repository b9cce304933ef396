"""Stops a run between two steps when the process is asked to end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .loop import Trainer

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping_on_signals(trainer: Trainer) -> Iterator[None]:
    """In it the first SIGINT or SIGTERM lets ``trainer`` finish its step and say that it is stopping.

    The second one has its usual effect, for who cannot wait. Only the main thread can do this.
    """
    usual = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        trainer.stop_requested = True
        restore()

    for number in SIGNALS:
        signal.signal(number, request)
    try:
        yield
    finally:
        restore()
