"""Where threads and processes stand, seen from outside: a thread of this process look by look, another process by py-spy."""

import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

# where a thread waits for other ranks; DDP broadcasts buffers in its own forward and adds gradients up inside of autograd's
COLLECTIVES = ("torch/distributed/", "torch/autograd/", "torch/nn/parallel/distributed.py", "deepspeed/", "pipeline/distributed/comm.py")


class Watched:
    """The thread that made it, seen from other threads. It moves when `progress()` changes, or what it executes."""

    def __init__(self, progress: Callable[[], tuple[int, ...]]) -> None:
        self.progress, self.still, self.step = progress, 0, 0  # still: looks without movement
        self.waits, self.lines = False, []
        self._thread, self._seen = threading.get_ident(), None

    def look(self) -> None:
        """Compares with the look before. Keeps code objects and offsets but no frames: those would hold the locals, and so memory."""
        frame, place, lines = sys._current_frames().get(self._thread), [], []
        while frame is not None:
            place.append((frame.f_code, frame.f_lasti))
            lines.append(frame.f_lineno)
            frame = frame.f_back
        progress = self.progress()
        seen = (progress, place)
        self.still = self.still + 1 if seen == self._seen else 0
        self.step, self.lines, self._seen = progress[0], lines[::-1], seen
        self.waits = bool(place) and any(part in place[0][0].co_filename for part in COLLECTIVES)

    def stack(self) -> str:
        """As in a traceback, the innermost call last."""
        return "".join(traceback.format_stack(sys._current_frames().get(self._thread)))


def py_spy(process: int) -> str:
    """The stack of a process of this host that does not answer, or why there is none."""
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.is_file() else shutil.which("py-spy")
    if not Path(f"/proc/{process}").exists() and Path("/proc/self").exists():
        return f"stack of process {process}: none, it has ended\n"
    if found is None:
        return f"stack of process {process}: none, py-spy is not installed; pip install py-spy\n"
    try:
        done = subprocess.run(
            [found, "dump", "--nonblocking", "--pid", str(process)], capture_output=True, text=True, timeout=20, check=False
        )
        return f"stack of process {process} by py-spy:\n{done.stdout}{done.stderr}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"stack of process {process}: none, py-spy failed ({error})\n"
