"""Names the rank that hangs, with host, process, step and stacks, and ends the others: the launcher can then start the job again.

Two daemon threads in each process; the main thread does nothing for them. `_watch` looks at the main thread from outside and never
touches the network. `_talk` exchanges reports through the process group's store and may block there for ever, when the process that
serves the store is the one that stopped. Nobody compares clocks: what stands still is counted in looks, so neither skew between hosts nor
a pause of the observer accuses anybody, and no verdict is reached while the main thread of any rank that answers still moves.
"""

import faulthandler
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from pydantic import Field

from pipeline.config import Strict
from pipeline.distributed.comm import Comm
from pipeline.distributed.stacks import Watched, py_spy

EXIT = 75  # sysexits' EX_TEMPFAIL: nothing is wrong with the command, start it again
SILENT = 5  # looks at an unchanged report until its rank counts as one that does not answer
NAMED = 16  # ranks that get a line of their own: two nodes
LAST_WORDS = 5.0  # seconds that a rank leaves the one which writes; the first exit makes the launcher kill all the others


class WatchdogConfig(Strict):
    """When a run counts as hung."""

    timeout: float | None = Field(
        300.0,
        gt=0,
        description="seconds without any movement (no step, no forward, always the same line) after which the rank that holds up the others is "
        "named, and the job ends with exit code 75. More than any single call takes, less than torch's own 600 for NCCL, "
        "which does not say who. None: never",
    )


class Report(NamedTuple):
    """What a rank says about its main thread."""

    tick: int  # of its own count
    step: int
    still: float  # seconds without movement, by its own looks
    waits: bool  # inside of a collective
    lines: list[int]  # line numbers of the stack from the outermost frame on: in one program the smaller is behind
    host: str
    process: int
    stack: str  # empty while it moves


def hung(reports: list[Report], silent: set[int], still: float) -> list[int]:
    """The ranks that hold up the others; none while one that answers has moved in the last `still` seconds.

    Those that do not answer; else, of those that do not wait in a collective, the ones that are behind in the program.
    """
    answer = [rank for rank in range(len(reports)) if rank not in silent]
    if any(reports[rank].still < still for rank in answer):
        return []
    place = {rank: (reports[rank].step, reports[rank].waits, reports[rank].lines) for rank in answer}
    return sorted(silent) or [rank for rank in answer if place[rank] == min(place.values())]


def words(rank: int, report: Report, step: int, silent: bool, all_of_them: bool) -> str:
    """One line about a hung rank."""
    who = f"watchdog: rank {rank} hangs at step {step}: host {report.host}, process {report.process}; "
    if silent:
        return who + "it does not answer: the process is stopped or gone, or a call in C keeps the interpreter's lock"
    if all_of_them:
        return who + "so do all others, at the same place: look at the network and the devices"
    return who + ("it waits in a collective that the others are past" if report.waits else "it answers, but its main thread stands still")


def say(text: str) -> None:
    """To stderr without its lock, which the main thread may hold."""
    os.write(2, text.encode())


class Watchdog:
    """One for a process; `over` watches a loop."""

    def __init__(self, config: WatchdogConfig, comm: Comm, folder: Path) -> None:
        self.timeout, self.comm, self.folder = config.timeout, comm, folder
        self.every = min(5.0, config.timeout / 20) if config.timeout else 0.0
        self._host, self._ending = socket.gethostname(), threading.Event()
        self._reports: dict[int, Report] = {}  # rank 0 reads all, the others rank 0's
        self._verdict: dict[str, Any] | None = None
        self._trouble = ""

    @contextmanager
    def over(self, progress: Callable[[], tuple[int, ...]]) -> Iterator[None]:
        """Watches this thread while it is inside. `progress`: the step, and counters that grow in a long phase; called by another thread.

        Collective. Uses the process's one faulthandler timer.
        """
        if self.timeout is None:
            yield
            return
        self._main, self._ending = Watched(progress), threading.Event()
        self._main.look()
        threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self.comm.size > 1:
            # a connection of its own: the default one may be held by a main thread that waits
            self._store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store().clone())
            self._store.set("verdict", "null")
            self._tick = time.time_ns()  # unlike the last one of a loop before this
            self._publish()
            self.comm.barrier()  # from here on every key is there, and a read does not wait
            self._read()
            threads.append(threading.Thread(target=self._talk, name="watchdog-talk", daemon=True))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending.set()
            for thread in threads:
                thread.join(1.0)  # _talk may be blocked; it is a daemon
            faulthandler.cancel_dump_traceback_later()

    @property
    def _still(self) -> float:
        return self._main.still * self.every

    def _report(self) -> Report:
        main = self._main
        stack = main.stack() if self._still > self.timeout / 2 else ""
        return Report(self._tick, main.step, self._still, main.waits, main.lines, self._host, os.getpid(), stack)

    def _publish(self) -> None:
        self._tick += 1
        self._store.set(str(self.comm.rank), json.dumps(self._report()))

    def _read(self) -> None:
        ranks = range(self.comm.size) if self.comm.rank == 0 else range(1)
        *reports, verdict = self._store.multi_get([*map(str, ranks), "verdict"])
        self._reports = {rank: Report(*json.loads(report)) for rank, report in zip(ranks, reports)}
        self._verdict = self._verdict or json.loads(verdict)

    def _talk(self) -> None:
        while not self._ending.wait(self.every):
            try:
                self._publish()
                if self._still > self.timeout / 2:  # until then nobody reads: a run that moves costs one small message
                    self._read()
                if self.comm.rank == 0 and self._verdict:
                    self._store.set("verdict", json.dumps(self._verdict))
            except Exception as error:  # the store ends with its process, and every library has its own error for that
                self._trouble = f" ({str(error).splitlines()[0]})"

    def _watch(self) -> None:
        unheard, ticks, said = dict.fromkeys(self._reports, 0), {}, False
        while not self._ending.wait(self.every):
            # the only one that can show a main thread which keeps the interpreter's lock: a C thread, set back as long as this one runs
            faulthandler.dump_traceback_later(self.timeout, file=2)
            self._main.look()
            reports = self._reports
            for rank, report in reports.items():
                fresh = report.tick != ticks.get(rank) or self._still <= self.timeout / 2
                unheard[rank] = 0 if fresh else unheard[rank] + 1
                ticks[rank] = report.tick
            if self._verdict:
                self._obey(self._verdict)
            elif self._still <= self.timeout:
                said = False
            elif self.comm.size == 1 and not said:
                said = True
                say(
                    f"watchdog: step {self._main.step} has not moved for {self._still:.0f} s (watchdog.timeout); process {os.getpid()} on "
                    f"{self._host} goes on waiting at\n{self._main.stack()}"
                )
            elif self.comm.size > 1:
                self._judge(reports, {rank for rank, looks in unheard.items() if looks >= SILENT})

    def _judge(self, reports: dict[int, Report], silent: set[int]) -> None:
        """Rank 0 speaks for all; the others only when it does not answer."""
        me = self.comm.rank
        if me == 0:
            reports = reports | {0: self._report()}
            silent = silent - {0}
            if found := hung([reports[rank] for rank in range(self.comm.size)], silent, 0.8 * self.timeout):
                self._speak(reports, found, silent)
        elif 0 in silent:
            text = words(0, reports[0], self._main.step, silent=True, all_of_them=False) + self._trouble + "\n"
            text += f"rank {me} on {self._host} stands still since {self._still:.0f} s (watchdog.timeout) at\n{self._main.stack()}"
            near = reports[0].host == self._host
            say(text)
            time.sleep(0 if near else 1)  # one that can look at the process writes first
            if self._write(reports[0], 0, text):
                looked = py_spy(reports[0].process) if near else self._advice(reports[0])
                say(looked)
                self._write(reports[0], 0, looked, more=True)
            else:
                time.sleep(LAST_WORDS)
            self._leave()

    def _speak(self, reports: dict[int, Report], found: list[int], silent: set[int]) -> None:
        """Rank 0: the message, the file, then the word to the others, who leave."""
        step, first = self._main.step, found[0]
        every = len(found) == self.comm.size
        lines = [words(rank, reports[rank], step, rank in silent, every) for rank in found[:NAMED]]
        lines += [f"and {len(found) - NAMED} more ranks, {found[NAMED]} to {found[-1]}"] if len(found) > NAMED else []
        lines.append(
            f"the run stands still since {self._still:.0f} s (watchdog.timeout {self.timeout:g}); all its ranks end, start it again"
        )
        stacks: dict[str, list[int]] = {}
        for rank, report in sorted(reports.items(), key=lambda item: item[0] not in found):
            if rank not in silent:
                stacks.setdefault(report.stack or "  moved a moment ago\n", []).append(rank)
        text = "\n".join(lines) + "\n" + "".join(f"stack of rank {', '.join(map(str, ranks))}:\n{s}" for s, ranks in stacks.items())
        say(text)
        self._write(reports[first], first, text)
        look: dict[str, int] = {}  # who looks at which process: one rank that answers on the same host
        for rank in silent:
            near = [r for r, report in reports.items() if r not in silent and report.host == reports[rank].host]
            if near:
                look[str(reports[rank].process)] = near[0]
            else:
                more = self._advice(reports[rank])
                say(more)
                self._write(reports[first], first, more, more=True)
        self._verdict = {"said": lines[0], "step": step, "rank": first, "look": look, "report": reports[first]}
        time.sleep(3 * self.every)  # they hear it
        self._obey(self._verdict)

    def _obey(self, verdict: dict[str, Any]) -> None:
        """Looks at the processes that were given to this rank, and leaves."""
        if self.comm.rank != 0:
            say(f"rank {self.comm.rank} on {self._host} ends with the others. {verdict['said']}\n")
        for process, rank in verdict["look"].items():
            if rank == self.comm.rank:
                looked = py_spy(int(process))
                say(looked)
                self._write(Report(*verdict["report"]), verdict["rank"], looked, more=True)
        if verdict["look"] and self.comm.rank not in verdict["look"].values():
            time.sleep(LAST_WORDS)
        self._leave()

    def _advice(self, report: Report) -> str:
        return f"no rank on {report.host} answers; look there with: py-spy dump --nonblocking --pid {report.process}\n"

    def _write(self, report: Report, rank: int, text: str, more: bool = False) -> bool:
        """Into the run folder; False where another rank has begun the file. Named after the process: a later hang has its own."""
        path = self.folder / f"hang-rank{rank:04d}-{report.host}-{report.process}.txt"
        try:
            with path.open("a" if more else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        except OSError as error:  # perhaps the very reason
            say(f"watchdog: {path}: could not be written ({error})\n")
        return True

    def _leave(self) -> None:
        """Ends the process beside its main thread, which would not."""
        for child in multiprocessing.active_children():
            child.kill()
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1.0)  # the main thread may hold its lock
        os._exit(EXIT)
