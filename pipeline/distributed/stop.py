"""A signal is remembered; at a step's end all ranks agree; then they save together and leave."""

import signal
from types import FrameType

from pydantic import Field

from pipeline.config import Strict
from pipeline.distributed.comm import Comm

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopConfig(Strict):
    """When the ranks vote."""

    every: int = Field(1, ge=1, description="steps between votes; one small all-reduce each")


class Stop:
    """Handlers for SIGTERM, SIGINT and SIGUSR2 while it is entered; a second SIGINT interrupts at once."""

    def __init__(self, config: StopConfig, comm: Comm) -> None:
        self.every, self.comm = config.every, comm
        self.received: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self, step: int) -> bool:
        """Whether any rank was told to stop; the same answer on every rank. Collective on the steps it votes."""
        return step % self.every == 0 and self.comm.any(self.received is not None)
