"""The fields of a batch and who reads them: all readers of one field share its decoder, so they must want the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pipeline.config import ConfigError
from pipeline.data.decode import Decoder


def join(readers: Mapping[str, Mapping[str, Decoder]], followers: Mapping[str, Mapping[str, Decoder]] | None = None) -> dict[str, Decoder]:
    """Field -> decoder, over all readers, by what they are called (`towers.student`).

    `followers` are frozen teachers: they take a field as augmented for the readers, and fields of their own without augmentation.
    Raises ConfigError where two want one field made differently; it names both.
    """
    found: dict[str, tuple[str, Decoder]] = {}
    for who, decoders in readers.items():
        for field, decoder in decoders.items():
            first, known = found.setdefault(field, (who, decoder))
            _agree(field, (first, known.settings()), (who, decoder.settings()))
    for who, decoders in (followers or {}).items():
        for field, decoder in decoders.items():
            first, known = found.setdefault(field, (who, Unaugmented(decoder)))
            _agree(field, (first, _made(known)), (who, _made(decoder)))
    return {field: decoder for field, (_, decoder) in found.items()}


class Unaugmented:
    """A decoder that is given no seed: a crop in the middle, the first caption. What a cache holds as well."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.extensions, self.optional = decoder, decoder.extensions, getattr(decoder, "optional", False)

    def __call__(self, data: bytes, extension: str, seed: int | None) -> Any:
        return self.decoder(data, extension, None)

    def collate(self, items: Sequence[Any]) -> Tensor:
        """As the decoder does."""
        return self.decoder.collate(items)

    def settings(self) -> dict[str, str]:
        """The decoder's."""
        return self.decoder.settings()


def _made(decoder: Decoder) -> dict[str, str]:
    return {name: value for name, value in decoder.settings().items() if name != "augmentation"}


def _agree(field: str, one: tuple[str, dict[str, str]], other: tuple[str, dict[str, str]]) -> None:
    (first, wants), (second, also) = one, other
    differing = [name for name in sorted(wants.keys() | also.keys()) if wants.get(name) != also.get(name)]
    if differing:
        sides = "; ".join(f"{who} with {', '.join(f'{n} {values.get(n)}' for n in differing)}" for who, values in (one, other))
        raise ConfigError(
            f"{first} and {second} both read the field {field!r}, made differently: {sides}. Give them the same settings, or one of them "
            f"a field of its own (its `field`, or a teacher's `fields`) that data.modalities reads from the same members"
        )
