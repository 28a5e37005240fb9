"""From the ids of a batch's rows to the batch: what a loader worker does."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.data.decode import Decoder, LabelDecoder, members_of
from pipeline.data.errors import BadSample, DataError
from pipeline.data.lanes import Rows
from pipeline.data.sources import Sources
from pipeline.hashing import hash_ids
from pipeline.types import Batch

_LABELS = 0x6C6162656C  # keeps the draw of labels apart from that of the augmentation
_READ_TOGETHER = 32  # samples; their bytes are in memory at a time


def labels_shown(seed: int, share: float, samples: np.ndarray) -> np.ndarray:
    """bool [n]: of which samples (int64 [n]) a run of this seed is shown the label, by data.labelled."""
    return hash_ids(seed, _LABELS, samples) < share * 2**63


class Fetch(Dataset):
    """One item is one whole batch: `Rows` in, `Batch` out. Holds nothing that changes, so any worker gives the same answer.

    `teachers`: by name, what was computed for every sample before: sample ids int64 [b] -> feature -> [b, ...]. A sample that one of
    those that are `needed` has not seen is a bad one.
    """

    def __init__(
        self,
        sources: Sources,
        decoders: dict[str, Decoder],
        seed: int | None,
        teachers: Mapping[str, Callable[[np.ndarray], dict[str, Tensor]]] | None = None,
        needed: Collection[str] = (),
    ) -> None:
        self.sources, self.seed, self.teachers, self.needed = sources, seed, teachers or {}, needed
        self.decoders = decoders if sources.classes is None else decoders | {"label": LabelDecoder(sources.classes)}
        given = sources.modalities
        self.members = {name: members_of(name, d, given[name].members if name in given else None) for name, d in self.decoders.items()}
        self.masked = [name for name in self.decoders if name in given and given[name].optional]
        self._check()

    def _check(self) -> None:
        """Raises DataError for a field that no sample has, as far as the index tells; evaluation may lack what is optional."""
        there = sorted({extension for index in self.sources.indices for extension in index.extensions})
        for name, members in self.members.items():
            if not set(members) & set(there) and (self.seed is not None or not self._optional(name)):
                raise DataError(
                    f"data: no sample has the modality {name!r}: it is read from {', '.join(members)}, the shards hold {', '.join(there)}. "
                    f"Name its members in data.modalities.{name}.members"
                )
        unread = [name for name in self.sources.modalities if name not in self.decoders]
        if unread and self.seed is not None:
            raise DataError(f"data.modalities: no tower and no teacher reads {', '.join(unread)}; they read {', '.join(self.decoders)}")

    def _optional(self, name: str) -> bool:
        return name in self.masked or getattr(self.decoders[name], "optional", False)

    def __getitem__(self, rows: Rows) -> Batch | DataError:
        """What stops the run comes as a value: raised in a worker, it would reach people inside of torch's traceback."""
        try:
            return self._batch(rows)
        except DataError as error:
            return error

    def _batch(self, rows: Rows) -> Batch:
        items: dict[str, list[Any]] = {name: [] for name in self.decoders}
        valid, bad = np.ones(len(rows.sample), bool), []
        seeds = hash_ids(self.seed, rows.sample, rows.visit).tolist() if self.seed is not None else [None] * len(rows.sample)
        for i, (found, seed) in enumerate(zip(self._read(rows.sample.tolist()), seeds)):
            try:
                decoded = self._decode(found, seed)
            except BadSample as error:
                decoded, valid[i] = dict.fromkeys(self.decoders), False
                bad.append((int(rows.sample[i]), error.cause))
            for name, item in decoded.items():
                items[name].append(item)
        fields: dict[str, Tensor] = {name: decoder.collate(items[name]) for name, decoder in self.decoders.items()}
        for name in self.masked:
            fields[f"{name}.present"] = torch.tensor([item is not None for item in items[name]])
        if self.seed is not None and self.sources.classes is not None and self.sources.labelled < 1:
            shown = torch.from_numpy(labels_shown(self.seed, self.sources.labelled, rows.sample))
            fields["label"] = fields["label"].masked_fill(~shown, -1)
        given = {f"{name}.{key}": value for name, read in self.teachers.items() for key, value in read(rows.sample).items()}
        for name in self.needed:
            for i in np.flatnonzero(valid & ~given[f"{name}.present"].numpy()):
                valid[i] = False
                bad.append((int(rows.sample[i]), "not_cached"))
        columns = map(torch.from_numpy, (rows.sample, rows.slot, rows.visit, valid))
        weight = None if rows.weight is None else torch.from_numpy(rows.weight)
        return Batch(*columns, fields=fields, teacher=given, bad=tuple(bad), skipped=rows.skipped, weight=weight)

    def _read(self, samples: list[int]) -> Iterator[dict[str, bytes] | BadSample]:
        """The members of each sample, or why it has none, a few samples ahead: between two decodings a read finds the caches of the
        processor taken, and costs 20 us instead of 8."""
        for first in range(0, len(samples), _READ_TOGETHER):
            found: list[dict[str, bytes] | BadSample] = []
            for sample in samples[first : first + _READ_TOGETHER]:
                try:
                    found.append(self.sources.members(sample))
                except BadSample as error:
                    found.append(error)
            yield from found

    def _decode(self, members: dict[str, bytes] | BadSample, seed: int | None) -> dict[str, Any]:
        if isinstance(members, BadSample):
            raise members
        out = {}
        for name, decoder in self.decoders.items():
            member = next((m for m in self.members[name] if m in members), None)
            if member is None and not self._optional(name):
                raise BadSample("missing_member", f"{name}: none of {', '.join(self.members[name])}")
            out[name] = None if member is None else decoder(members[member], member.rsplit(".", 1)[-1], seed)
        return out
