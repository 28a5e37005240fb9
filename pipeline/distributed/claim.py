"""One process group per run folder in an object store, which has no locks: numbered claims, a sign of life, and who came later."""

import json
import re
import secrets
import threading
import time
from typing import NamedTuple

from pipeline.config import ConfigError
from pipeline.data.errors import DataError
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.lock import Owner
from pipeline.distributed.store import Store

BEAT = 15.0  # seconds between signs of life; each is one small write
DEAD_AFTER = 4 * BEAT  # without one, by the clock of the process that looks
SETTLE = 3.0  # where a store has no conditional writes: until a claim that was written at the same time would be seen
FOLDER = "owners"


class Held(NamedTuple):
    """A claim as it stands in the store."""

    number: int
    owner: Owner
    token: str
    beat: int  # grows while its holder lives
    left: bool  # its holder has ended in order

    @property
    def name(self) -> str:
        """Its object."""
        return name_of(self.number)


def name_of(number: int) -> str:
    """The object of a claim."""
    return f"{FOLDER}/{number:06d}.json"


def newest(store: Store) -> Held | None:
    """The claim that counts: the one with the highest number."""
    numbers = [int(found[1]) for name in store.listing(FOLDER) if (found := re.fullmatch(rf"{FOLDER}/(\d+)\.json", name))]
    return _read(store, max(numbers)) if numbers else None


def _read(store: Store, number: int) -> Held:
    text = store.read(name_of(number))  # a store that does not answer says nothing about what is in it
    try:
        told = json.loads(text)
        return Held(number, Owner(*told["owner"]), told["token"], told["beat"], told["left"])
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{store.at(name_of(number))}: is no claim; find out who wrote it, and delete it") from None


class Claim:
    """Held by rank 0 of a run. The store gives what it guarantees: of two starts that create the next number, one succeeds.

    The holder rewrites its own claim every BEAT seconds and looks for a later one. A newer start of the same Slurm job, and one that can
    tell that the holder is gone (`gone`: the token of a claim that was made under a lock which this process has now), claims at once;
    another one watches: a sign of life is a ConfigError, DEAD_AFTER seconds without one is the end of the holder. A process that was only
    cut off, or stopped, finds the later claim before it writes the next object, and leaves. What this cannot prevent is the one object
    that it was writing at that moment; objects of a checkpoint are therefore created and never overwritten.
    """

    def __init__(self, store: Store, gone: str | None = None, beat: float = BEAT) -> None:
        self.store, self.owner, self.token, self._every = store, Owner.here(), secrets.token_hex(8), beat
        self._beats, self._left, self._later, self._ending = 0, False, None, threading.Event()
        while True:
            self.before = newest(store)
            if self.before and not self.before.left and self.before.token != gone:
                self._wait(self.before)
            self.number = self.before.number + 1 if self.before else 1
            if self._make():
                break
        self._thread = threading.Thread(target=self._live, name="claim", daemon=True)
        self._thread.start()

    def _wait(self, held: Held) -> None:
        """Returns when the holder has left, is dead, or is an older start of this job. Raises ConfigError when it lives."""
        if held.owner.job and held.owner.job == self.owner.job and held.owner.start < self.owner.start:
            return
        dead_after = 4 * self._every
        print(f"{self.store.url}: belongs to {held.owner}; looking for up to {dead_after:.0f} s whether it lives", flush=True)
        deadline = time.monotonic() + dead_after
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._every / 4))
            now = newest(self.store)
            if now is None or now.number != held.number or now.left:
                return  # __init__ judges whoever is there now when it cannot make its own claim
            if now.beat != held.beat:
                raise ConfigError(
                    f"{self.store.url}: {held.owner} is training in this run. Wait for it, stop it, or choose another folder with out="
                )

    def _make(self) -> bool:
        name, mine = name_of(self.number), self._content()
        if not self.store.create(name, mine):
            return False
        if not self.store.create(name, mine[:-1] + b" }"):
            return True  # refused, as it should be: the store keeps what is there
        time.sleep(SETTLE)  # this store takes whatever comes last
        return _read(self.store, self.number).token == self.token

    def _content(self) -> bytes:
        told = {"owner": self.owner, "token": self.token, "beat": self._beats, "left": self._left}
        return json.dumps(told).encode()

    def _live(self) -> None:
        store = self.store.once()
        while not self._ending.wait(self._every):
            try:
                self._beats += 1
                store.write(name_of(self.number), self._content())
                self.look(store)
            except (DataError, OSError):
                continue  # a store that does not answer tells nobody else either that this process lives; uploads say it

    def look(self, store: Store) -> None:
        """Asks the store for a later claim. Raises DataError where it does not answer."""
        if self._later is None and store.exists(name_of(self.number + 1)):
            self._later = str(newest(store).owner)

    def superseded(self) -> str | None:
        """Who has claimed the run since, in words, as of the last look; asks nobody."""
        return self._later

    def leave(self, store: Store | None = None) -> None:
        """Says that the next start need not wait. Raises DataError."""
        self._ending.set()
        self._thread.join(2 * self._every)
        self._beats, self._left = self._beats + 1, True
        (store or self.store).write(name_of(self.number), self._content())


def check(store: Store, number: int) -> None:
    """For any rank, before it writes: raises CheckpointError when there is a later claim than `number`, DataError without an answer."""
    if store.exists(name_of(number + 1)):
        raise CheckpointError(
            f"{store.url}: {newest(store).owner} has taken over this run, and this process writes nothing more to it. "
            f"Nothing that was committed is lost; look at the other process"
        )
