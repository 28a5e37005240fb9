"""Icons of 140 sets in Iconify's collection (npm package @iconify/json), split by author; their names are captions. To train on there are
70,000 whose names five sets draw, and 236,000 in all."""

import argparse
import functools
import importlib.metadata
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.errors import BadSample, DataError
from tools.sources import icons
from tools.sources._packages import from_npm
from tools.sources.base import Pair, split_of

PACKAGE, VERSION = "@iconify/json", "2.2.535"
# by their SPDX names; what they ask for is at most the notice, with the author named
LICENCES = ("MIT", "ISC", "Apache-2.0", "BSD-3-Clause", "Unlicense", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0")
# in the name or category of a set or the category of an icon: pictures whose names do not say what is seen
_NO_WORDS = re.compile(r"\b(emojis?|flags?|logos?|brands?)\b", re.IGNORECASE)
_STYLES = ("-outline", "-outlined", "-filled", "-fill", "-solid", "-duotone", "-twotone")
# Authors who stand on one side of the split together: of the names that both draw (40 or more of 1,500 that were compared) a third or more
# have one drawing, cropped and scaled, by an overlap of 0.85 (any two authors: 8 % of them). The last two share a style and few names.
_FAMILIES = (
    ("Google", "Material Design Authors", "Pictogrammers"),
    ("480 Design", "REICON"),
    ("Ben Sperry", "Family"),
    ("Dave Gandy", "HackerNoon"),
    ("Lucide Contributors", "zkreations"),
    ("MingCute Design", "Zuzana Benova"),
    ("Refactoring UI Inc", "Andri Soone"),
)
_FAMILY = {author: family[0] for family in _FAMILIES for author in family}


class Icon(NamedTuple):
    """One drawing. pack: the prefix of its set. entry: its name there, such as bell-slash-bold. name: bell slash. box: left, top, width,
    height of what `body`, SVG elements, is drawn in."""

    pack: str
    entry: str
    name: str
    body: str
    box: tuple[float, float, float, float]

    @property
    def svg(self) -> str:
        """The whole drawing, black where its colour was left to the page."""
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {names} viewBox="{" ".join(map(str, self.box))}">{self.body.replace("currentColor", "#000")}</svg>'


class Source(icons.Source):
    """Icons of the authors of one split, drawn black on white."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--split",
            choices=sorted(icons.TOGETHER),
            default="train",
            help="which authors: a fifth of them, by a hash of the name, is test (default train); fit and choose divide train likewise",
        )
        parser.add_argument("--size", type=int, default=32, help="side of the square images in pixels (default 32)")
        parser.add_argument(
            "--min-count",
            type=int,
            default=5,
            help="only names that at least this many sets of the split that is trained on draw (default %(default)s)",
        )
        parser.add_argument(
            "--shared", action="store_true", help="only names that authors of both splits draw: a closed vocabulary for zero-shot"
        )
        parser.add_argument("--limit", type=int, help="a seeded subset of this many samples (default: all)")
        parser.add_argument(
            "--package",
            help=f"{PACKAGE} as a .tgz, or the folder unpacked from it (default: version {VERSION}, 104 MB, fetched by npm into the cache)",
        )

    def __init__(self, options: argparse.Namespace) -> None:
        self.split, self.size, self.min_count, self.limit = options.split, options.size, options.min_count, options.limit
        self.shared, self.seed = options.shared, options.seed
        icons.can_draw(self.size)
        given = Path(options.package).absolute() if options.package else None
        self.package = str(given or from_npm(PACKAGE, VERSION, "of each set its own", 104, "--package"))
        collection(self.package)

    def fingerprint(self) -> dict:
        version, about = collection(self.package)
        return {
            "source": "iconify",
            "package": version,
            "sets": {prefix: about[prefix].get("total") for prefix in packs(self.package, self.split)},
            **{name: getattr(self, name) for name in ("split", "size", "min_count", "limit", "shared")},
            "packages": {name: importlib.metadata.version(name) for name in ("resvg-py", "pillow")},
        }

    def every(self, split: str) -> tuple[Icon, ...]:
        return drawings(self.package, split)[0]

    def counts(self, found: Iterable[Icon]) -> Counter[str]:
        return Counter(name for name, _ in {(icon.name, icon.pack) for icon in found})

    def pairs(self, rows: np.ndarray) -> Iterator[Pair | BadSample]:
        every = self.every(self.split)
        for row in rows:
            icon = every[row]
            try:
                yield Pair("png", icons.draw(icon.svg, self.size), icon.name)
            except ValueError as error:
                yield BadSample("cannot_be_drawn", f"{icon.pack}:{icon.entry}: {error}")

    def notice(self) -> str:
        lines = ["The images are renderings of icons of these sets; their names are used as captions.", ""]
        for prefix in sorted({icon.pack for icon in self._chosen()}):
            about = collection(self.package)[1][prefix]
            author, licence = about["author"], about["license"]
            lines += [f"{about['name']} ({prefix}) by {author['name']} {author.get('url', '')}".rstrip()]
            lines += [f"    licence {licence['spdx']} {licence.get('url', '')}".rstrip(), ""]
        return "\n".join(lines)

    def about(self) -> str:
        found, left = self._chosen(), drawings(self.package, self.split)[1]
        counts = len({icon.name for icon in found}), len({icon.pack for icon in found})
        return f"{counts[0]} names of {counts[1]} sets; not taken of this split: " + ", ".join(
            f"{cause} {count}" for cause, count in sorted(left.items())
        )

    def _chosen(self) -> list[Icon]:
        every = self.every(self.split)
        return [every[row] for row in self.plan(self.seed, False, 0).rows]


def splits_of(author: str) -> tuple[str, ...]:
    """The splits that an author's sets are in: a rule by name alone, so that another version of the package moves nobody."""
    family = _FAMILY.get(author, author)
    return ("test",) if split_of(family) == "test" else ("train", "choose" if split_of(f"{family} of train") == "test" else "fit")


@functools.cache
def collection(package: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """(version, what collections.json says of each set, by prefix). Raises DataError."""
    found = dict(_members(package, ("package.json", "collections.json")))
    if len(found) < 2:
        raise DataError(
            f"--package {package}: has no package.json and collections.json; expected npm's {PACKAGE}, as a .tgz or the folder in it"
        )
    return found["package.json"]["version"], found["collections.json"]


@functools.cache
def packs(package: str, split: str) -> tuple[str, ...]:
    """The prefixes of the sets of a split that may be used, sorted."""
    about = collection(package)[1]
    return tuple(
        prefix
        for prefix, one in sorted(about.items())
        if split in splits_of(one["author"]["name"])
        and one["license"].get("spdx") in LICENCES
        and not one.get("palette")  # drawn in colours, which a grey image loses
        and not one.get("hidden")  # superseded by another set, whose copy it often is
        and not _NO_WORDS.search(f"{one['name']} {one.get('category', '')}")
    )


@functools.cache
def drawings(package: str, split: str) -> tuple[tuple[Icon, ...], Counter[str]]:
    """The icons of a split in a fixed order, and how many of its sets' were not taken, by cause. What is held out is without the
    drawings that are trained on, whoever copied them. Raises DataError."""
    found: list[Icon] = []
    left: Counter[str] = Counter()
    wanted = {f"json/{prefix}.json" for prefix in packs(package, split)}
    for name, one in _members(package, wanted):
        wanted.remove(name)
        found += _icons(one, left)
    if wanted:
        raise DataError(f"--package {package}: has no {sorted(wanted)[0]}, which its collections.json names; fetch the package anew")
    trained, held_out = icons.TOGETHER[split]
    if split == held_out:
        known = {icon.body for icon in drawings(package, trained)[0]}
        left["drawn_in_train_too"] = sum(icon.body in known for icon in found)
        found = [icon for icon in found if icon.body not in known]
    return tuple(sorted(found)), +left


def _icons(one: dict[str, Any], left: Counter[str]) -> Iterator[Icon]:
    """The icons of json/PREFIX.json that can be used."""
    unnamed = {name for category, names in one.get("categories", {}).items() if _NO_WORDS.search(category) for name in names}
    whole = [one.get(key, default) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
    for entry, icon in one["icons"].items():
        if icon.get("hidden"):
            left["old_drawings"] += 1
        elif entry in unnamed:
            left["logos_and_such"] += 1
        elif "<animate" in icon["body"] or "<set " in icon["body"]:
            left["animated"] += 1  # many begin with an empty page
        else:
            box = tuple(icon.get(key, value) for key, value in zip(("left", "top", "width", "height"), whole))
            yield Icon(one["prefix"], entry, _name(entry, one), icon["body"], box)


def _name(entry: str, one: dict[str, Any]) -> str:
    """Without the styles that the set declares for its names; without others where the set has the name alone, too."""
    name = entry
    for prefix in sorted(one.get("prefixes", {}), key=len, reverse=True):
        if prefix and name.startswith(f"{prefix}-"):
            name = name.removeprefix(f"{prefix}-")
            break
    for suffix in sorted(one.get("suffixes", {}), key=len, reverse=True):
        if suffix and name.endswith(f"-{suffix}"):
            name = name.removesuffix(f"-{suffix}")
            break
    for style in _STYLES:
        if name.endswith(style) and name.removesuffix(style) in one["icons"]:
            name = name.removesuffix(style)
    return name.replace("-", " ")


def _members(package: str, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(name, JSON value) of the files of the package that are there of those wanted. Raises DataError."""
    wanted, path = set(names), Path(package)
    try:
        if path.is_dir():
            yield from ((name, json.loads((path / name).read_bytes())) for name in sorted(wanted) if (path / name).is_file())
            return
        with tarfile.open(path) as archive:
            for member in archive:
                if (name := member.name.partition("/")[2]) in wanted and (file := archive.extractfile(member)):
                    yield name, json.load(file)
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        what = str(error).partition(":\n")[0]
        raise DataError(f"--package {package}: {what}; expected npm's {PACKAGE}, as a .tgz or the folder in it") from None
