"""Staging and committing: a round is put down file by file, and then it happened.

It must not know what was put down before, nor what becomes of it later.

Legend: S rows of a stacked tensor, one per client.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fellray.platform import pages
from fellray.platform.errors import FellrayError
from fellray.platform.manifest import Manifest, Staged, check_claims, decode
from fellray.platform.shelf import MANIFEST, SUFFIX, Shelf, folder
from fellray.platform.storage import Storage
from fellray.platform.verdicts import Verdicts

_HOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class Staging:
    """The way into a run's rounds."""

    def __init__(self, storage: Storage, shelf: Shelf, verdicts: Verdicts) -> None:
        """`storage` is the run's folder."""
        self._storage = storage
        self._shelf = shelf
        self._verdicts = verdicts

    def stage(
        self,
        round: int,
        holder: str,
        clients: Sequence[str],
        tensors: Mapping[str, torch.Tensor],
    ) -> Staged:
        """See `Rounds.stage`."""
        assert _HOLDER.fullmatch(holder), holder
        assert len(set(clients)) == len(clients), "a client has one row"
        for name, tensor in tensors.items():
            assert not clients or tensor.shape[:1] == (len(clients),), (name, tensor.shape)
        data, identity = pages.encode(clients, tensors)
        one = Staged(
            f"{holder}{SUFFIX}", identity, len(data), tuple(clients), tuple(sorted(tensors))
        )
        self._refuse_committed(round, one)
        self._storage.write(f"{folder(round)}/{one.file}", data)
        return one

    def commit(self, round: int, staged: Sequence[Staged], facts: Mapping[str, Any]) -> None:
        """See `Rounds.commit`."""
        self._refuse_committed(round)
        files = sorted(staged, key=lambda s: s.file)
        check_claims(files)
        sizes = self._shelf.clear(round, [one.file for one in files])
        for one in files:
            if sizes.get(one.file) != one.bytes:
                raise FellrayError(
                    f"{self._storage}/{folder(round)}/{one.file}: has "
                    f"{sizes.get(one.file, 'no')} bytes where {one.bytes} were staged, so round "
                    f"{round} is not committed; every actor must reach the same `storage`: use a "
                    "shared folder or a URI, then resume"
                )
        self._verdicts.drop(round)
        self._shelf.write(Manifest(round, tuple(files), dict(facts)))

    def _refuse_committed(self, round: int, restored: Staged | None = None) -> None:
        path = f"{folder(round)}/{MANIFEST}"
        if not self._storage.exists(path):
            return
        latest = self._shelf.latest()
        if latest is None or latest < round:
            # files staged anew could make a broken round's old manifest look whole again
            self._storage.delete(path)
            return
        where = f"{self._storage}/{path}"
        if restored and restored in decode(self._storage.read(path), round, where).files:
            return
        raise FellrayError(
            f"{where}: round {round} is committed already and stays as it is; "
            "resume the run, which goes on after its last committed round"
        )
