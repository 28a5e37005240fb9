"""Looks through a tar shard without unpacking it: where every member lies, its checksum, and everything that is wrong with it."""

import os
import re
import tarfile
import zlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.data.errors import DataError

# webdataset's rule: the key ends at the first dot of the file name, the rest is the extension
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
PICKLES = ("pkl", "pickle", "pyd", "pt", "pth")
_REWRITE = "Write the shard again without it"


class Problem(NamedTuple):
    """One thing that is wrong."""

    where: str
    what: str
    expected: str
    mend: str
    fatal: bool = True  # False: the shard can still be indexed

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; expected {self.expected}. {self.mend}"


class Scan(NamedTuple):
    """What a shard holds. rows: `key`, `crc` and `<ext>.offset`, `<ext>.size` per sample, in order."""

    rows: pa.Table
    extensions: tuple[str, ...]
    problems: list[Problem]

    def checked(self) -> "Scan":
        """Itself, if it can be used. Raises DataError that names up to five problems."""
        fatal = [str(problem) for problem in self.problems if problem.fatal]
        if fatal:
            raise DataError("\n".join(fatal[:5] + ([f"... and {len(fatal) - 5} more"] if len(fatal) > 5 else [])))
        return self


class _Rows:
    """Groups members into samples: neighbours with one key are one sample."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.keys: list[str] = []
        self.crcs: list[int] = []
        self.members: dict[str, dict[int, tuple[int, int]]] = {}
        self.seen: dict[str, int] = {}
        self.problems: list[Problem] = []

    def add(self, name: str, offset: int, data: bytes) -> None:
        match = _NAME.match(name)
        if match is None or _META.match(name):
            return  # webdataset leaves these out too
        key, extension = match[1], match[2].lower()
        if not self.keys or self.keys[-1] != key:
            if key in self.seen:
                self.bad(
                    f"key {key!r} comes back at byte {offset} after sample {self.seen[key]}",
                    "each key once, its members side by side",
                    "Sort or rename the members",
                )
            self.seen[key] = len(self.keys)
            self.keys.append(key)
            self.crcs.append(0)
        row = len(self.keys) - 1
        if row in self.members.setdefault(extension, {}):
            self.bad(f"member {name!r} is there twice, again at byte {offset}", "each member once", _REWRITE)
        self.members[extension][row] = (offset, len(data))
        self.crcs[row] = zlib.crc32(data, self.crcs[row])
        if extension.rsplit(".", 1)[-1] in PICKLES:
            self.bad(f"pickle {name!r} at byte {offset}", "data, not code", "It is never loaded; store arrays as npy or json", fatal=False)

    def bad(self, what: str, expected: str, mend: str, fatal: bool = True) -> None:
        self.problems.append(Problem(self.where, what, expected, mend, fatal))

    def table(self) -> pa.Table:
        columns: dict[str, pa.Array] = {"key": pa.array(self.keys, pa.string()), "crc": pa.array(self.crcs, pa.uint32())}
        for extension in sorted(self.members):
            spans = np.full((2, len(self.keys)), -1, dtype=np.int64)
            rows = np.fromiter(self.members[extension], dtype=np.int64)
            spans[:, rows] = np.array(list(self.members[extension].values()), dtype=np.int64).T
            columns[f"{extension}.offset"], columns[f"{extension}.size"] = pa.array(spans[0]), pa.array(spans[1])
        return pa.table(columns)


def scan_tar(path: str, where: str) -> Scan:
    """Reads a local tar once from end to end; `where` names it in the problems. Nothing is unpacked, no link followed, nothing loaded."""
    found = _Rows(where)
    try:
        with tarfile.open(path, "r:") as tar:
            _members(tar, found)
            end = tar.offset  # where tarfile stopped: at the end mark, or at a header that it could not read, which it takes for an end
    except tarfile.TarError as error:
        at = f" after sample {found.keys[-1]!r}" if found.keys else ""
        with open(path, "rb") as file:
            packed = file.read(4)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")
        mend = "Unpack the compression: packed tars cannot be read at an offset" if packed else "Fetch or write the shard again"
        found.bad(f"no readable tar: {error}{at} (the file has {os.path.getsize(path)} bytes)", "a plain tar", mend)
        return Scan(found.table(), tuple(sorted(found.members)), found.problems)
    with open(path, "rb") as file:
        file.seek(end)
        mark = file.read(1024)
        if any(mark) and len(mark) < 512:
            found.bad(f"cut off at byte {end + len(mark)} inside a header", "a tar header of 512 bytes", "Fetch or write the shard again")
        elif any(mark):
            found.bad(f"damaged header at byte {end}", "a tar header or the end mark", "Fetch or write the shard again")
        elif len(mark) < 1024:
            found.bad(
                f"ends at byte {end + len(mark)} without the end mark, probably cut off",
                "1024 zero bytes at the end",
                "Fetch or write the shard again",
            )
    return Scan(found.table(), tuple(sorted(found.members)), found.problems)


def _members(tar: tarfile.TarFile, found: _Rows) -> None:
    for member in tar:
        name, offset = member.name, member.offset_data
        if member.isdir():
            continue
        if name.startswith("/") or ".." in name.split("/") or "\\" in name:
            found.bad(f"unsafe member name {name!r} at byte {offset}", "a relative name without '..'", _REWRITE)
        elif not member.isreg() or member.issparse():
            found.bad(f"member {name!r} at byte {offset} is a link, a device or a sparse file", "plain files", _REWRITE)
        else:
            data = tar.extractfile(member).read()
            if len(data) < member.size:
                found.bad(
                    f"cut off at byte {offset + len(data)} inside {name!r}", f"{member.size} bytes of it", "Fetch or write the shard again"
                )
                return
            found.add(name, offset, data)
