"""A signal is remembered; at a step's end all ranks agree; then they save together and leave."""

import signal
import time
from collections.abc import Callable
from types import FrameType

from pydantic import Field

from pipeline.config import Strict
from pipeline.distributed.comm import Comm

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
LOOK_EVERY = 2.0  # seconds between looks at the run folder; one small file, on rank 0


class StopConfig(Strict):
    """When the ranks vote."""

    every: int = Field(1, ge=1, description="steps between votes; one small all-reduce each")


class Inbox:
    """What this process was asked: the first signal that says stop, and whether the ranks agreed to."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.agreed = False

    def remember(self, number: int, frame: FrameType | None) -> None:
        """A signal handler; a second SIGINT interrupts at once."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


_listening: Inbox | None = None


def listen() -> Inbox:
    """Remembers signals from now on, also those that come while a run is being built: it then stops after its first step.

    For a job that has to know afterwards whether it was stopped. Every later Stop of this process uses the inbox that is returned.
    """
    global _listening
    _listening = Inbox()
    for number in SIGNALS:
        signal.signal(number, _listening.remember)
    return _listening


def ignore() -> None:
    """From now on, also while the interpreter ends: nothing is left that a signal could stop, and an exit code is to say so."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stop:
    """Handlers for SIGTERM, SIGINT and SIGUSR2 while it is entered, which it may be within itself. `superseded` is asked on the rank that
    has it, now and then: a sentence means that a newer start of this job waits for the run folder. `failed` is asked on every rank at
    every vote: whether something beside the loop went wrong there, which the save that follows will tell all ranks."""

    def __init__(
        self,
        config: StopConfig,
        comm: Comm,
        superseded: Callable[[], str | None] | None = None,
        failed: Callable[[], bool] = lambda: False,
    ) -> None:
        self.every, self.comm, self.superseded, self.failed = config.every, comm, superseded, failed
        self.inbox = _listening or Inbox()
        self._looked = time.monotonic()
        self._before: list[dict[int, object]] = []

    def __enter__(self) -> "Stop":
        self._before.append({number: signal.signal(number, self.inbox.remember) for number in SIGNALS})
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.pop().items():
            signal.signal(number, handler)

    @property
    def received(self) -> str | None:
        """What asked this process to stop."""
        return self.inbox.received

    def agreed(self, step: int) -> bool:
        """Whether any rank was told to stop, or must; the same answer on every rank. Collective on the steps it votes."""
        if step % self.every:
            return False
        if self.superseded and time.monotonic() - self._looked > LOOK_EVERY:
            self._looked = time.monotonic()
            self.inbox.received = self.inbox.received or self.superseded()
        self.inbox.agreed = self.comm.any(self.inbox.received is not None or self.failed())
        return self.inbox.agreed
