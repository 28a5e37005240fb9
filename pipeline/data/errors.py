"""The kinds of trouble with data: what stops a run, also when it may pass by itself, and what costs one sample."""


class DataError(ValueError):
    """Shards, index or storage that cannot be used: says what, where, what was expected and how to mend it."""


class StorageError(DataError):
    """Storage that does not answer: nothing is wrong with the command, and the same one may work a little later."""


class BadSample(Exception):
    """One sample that its own bytes make unusable: counted by `cause`, skipped, and capped by `data.max_bad_fraction`."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
