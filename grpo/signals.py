"""SIGTERM and Ctrl-C end a run between two steps, with all that was learned, and not in the middle of one."""

import signal
from contextlib import AbstractContextManager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """`number` is that of the signal which some process of the run was sent; `exit_status` as shells have it."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.exit_status = number, 128 + number


class StopSignals(AbstractContextManager):
    """While it is entered, in the main thread, the first signal is only noted in `number`, which is 0 before.

    SIGTERM may come any number of times: launchers pass on what schedulers send to all processes. After Ctrl-C no
    handler is left, so the next one, or the SIGTERM that torchrun makes of it, ends the process at once.
    """

    def __init__(self):
        self.number = 0

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind, *_) -> None:
        """Raises Stopped for a signal that came too late for any step to hear of it."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is None:
            self.check(self.number)

    def check(self, *numbers: int) -> None:
        """Raises Stopped if any of the numbers, one from each process, is that of a signal."""
        if any(numbers):
            raise Stopped(max(numbers))

    def _note(self, number: int, _frame) -> None:
        self.number = self.number or number
        if number == signal.SIGINT:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
