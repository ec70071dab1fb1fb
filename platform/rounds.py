"""Committed rounds: what every holder of adapters put down, and the manifest that makes it count.

    rounds/000003/<holder>.safetensors    staged by each holder, in any order
    rounds/000003/manifest.json           written last, by the driver: now the round happened

A round without a whole manifest, or with a file of another size than the manifest says, did not
happen. This file must not know what the tensors are for, nor who trains them.

Legend: S rows of a stacked tensor, one per client.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch

from fellray.platform.errors import FellrayError
from fellray.platform.manifest import Manifest, Staged, Uncommitted, check_claims, decode, encode
from fellray.platform.storage import Storage

_MANIFEST = "manifest.json"
_HOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

assert sys.byteorder == "little", "hashes are taken over little-endian bytes"


class Rounds:
    """The rounds of one run. Rounds are numbered from 0; a client is named by its id."""

    def __init__(self, storage: Storage) -> None:
        """`storage` is the run's folder."""
        self._storage = storage
        self._verified: set[tuple[str, str]] = set()

    def stage(
        self,
        round: int,
        holder: str,
        clients: Sequence[str],
        tensors: Mapping[str, torch.Tensor],
    ) -> Staged:
        """Write one holder's tensors; they count only once the round is committed.

        Args:
            round: which round.
            holder: names the file; staging again under the same name replaces it.
            clients: S client ids, one for each row; empty for tensors that belong to nobody.
            tensors: each [S, ...], or of any shape where `clients` is empty.

        Raises:
            FellrayError: the round is committed already, or the storage refuses.
        """
        assert _HOLDER.fullmatch(holder), holder
        assert len(set(clients)) == len(clients), "a client has one row"
        for name, tensor in tensors.items():
            assert not clients or tensor.shape[:1] == (len(clients),), (name, tensor.shape)
        self._refuse_committed(round)
        # one key only: safetensors writes several in an order that changes from call to call
        data = safetensors.torch.save(
            {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            },
            metadata={"clients": json.dumps(list(clients))},
        )
        file = f"{holder}.safetensors"
        self._storage.write(f"{_folder(round)}/{file}", data)
        digest = hashlib.sha256(data).hexdigest()
        return Staged(file, digest, len(data), tuple(clients), tuple(sorted(tensors)))

    def commit(self, round: int, staged: Sequence[Staged], facts: Mapping[str, Any]) -> None:
        """Make the round happen. `facts` is plain JSON data kept with it.

        Raises:
            FellrayError: the round is committed already, a staged file is not there whole, a fact
                is not finite, or the storage refuses.
            ValueError: two files claim the same tensor of the same client.
        """
        self._refuse_committed(round)
        files = sorted(staged, key=lambda s: s.file)
        check_claims(files)
        folder = _folder(round)
        sizes = self._storage.sizes(folder)
        for one in files:
            if sizes.get(one.file) != one.bytes:
                raise FellrayError(
                    f"{self._storage}/{folder}/{one.file}: has {sizes.get(one.file, 'no')} bytes "
                    f"where {one.bytes} were staged, so round {round} is not committed; every "
                    "actor must reach the same `storage`: use a shared folder or a URI, then resume"
                )
        path = f"{folder}/{_MANIFEST}"
        data = encode(Manifest(round, tuple(files), dict(facts)), f"{self._storage}/{path}")
        self._storage.write(path, data)

    def committed(self) -> list[int]:
        """All committed rounds, oldest first. Sizes are checked here, checksums when loading."""
        return [number for number in self._numbers() if self._counts(number)]

    def latest(self) -> int | None:
        """The last committed round."""
        return next((n for n in reversed(self._numbers()) if self._counts(n)), None)

    def facts(self, round: int) -> dict[str, Any]:
        """What `commit` was given.

        Raises:
            FellrayError: the round is not committed.
        """
        return self._open(round).facts

    def clients(self, round: int) -> list[str]:
        """Sorted ids of all clients that have rows in a committed round."""
        return sorted({client for one in self._open(round).files for client in one.clients})

    def load(
        self, round: int, clients: Sequence[str], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """The rows of `clients`, in that order, gathered from whatever files hold them.

        Returns:
            name -> [len(clients), ...], on the CPU.

        Raises:
            FellrayError: the round is not committed, a file is damaged, or a client has no such
                tensor in it.
        """
        place = {client: at for at, client in enumerate(clients)}
        assert clients, "nothing to load"
        assert len(place) == len(clients), "a client has one row"
        gathered: dict[str, torch.Tensor] = {}
        lacking = {name: torch.ones(len(clients), dtype=torch.bool) for name in names}
        for one in self._open(round).files:
            held = [(place[c], row) for row, c in enumerate(one.clients) if c in place]
            here = [name for name in names if name in one.tensors]
            if not held or not here:
                continue
            tensors = self._read(round, one)
            to, rows = torch.tensor(held).T
            for name in here:
                tensor = tensors[name]
                target = gathered.setdefault(
                    name, tensor.new_empty((len(clients), *tensor.shape[1:]))
                )
                if (target.dtype, target.shape[1:]) != (tensor.dtype, tensor.shape[1:]):
                    raise FellrayError(
                        f"{self._storage}/{_folder(round)}/{one.file}: {name} has another shape or "
                        f"dtype than in the round's other files{self._way_out(round)}"
                    )
                target[to] = tensor[rows]
                lacking[name][to] = False
        for name in names:
            if lacking[name].any():
                lost = [clients[at] for at in lacking[name].nonzero().flatten().tolist()]
                raise FellrayError(
                    f"{self._storage}/{_folder(round)}: has no {name!r} for {len(lost)} of "
                    f"{len(clients)} clients, first {lost[0]!r}: the run was made with other "
                    "clients or another model; resume it with its own config"
                )
        return gathered

    def load_shared(self, round: int, name: str) -> torch.Tensor:
        """A tensor that belongs to nobody.

        Raises:
            FellrayError: the round is not committed, a file is damaged or there is no such tensor.
        """
        for one in self._open(round).files:
            if not one.clients and name in one.tensors:
                return self._read(round, one)[name]
        raise FellrayError(
            f"{self._storage}/{_folder(round)}: has no shared {name!r}: the run was made with "
            "another model or server; resume it with its own config"
        )

    def hashes(self, round: int, names: Sequence[str]) -> dict[str, str]:
        """For each client, sorted, the sha256 of its rows' little-endian bytes, in order of names.

        It does not depend on which file holds a client, nor on the round's other clients.

        Raises:
            FellrayError: as `load`.
        """
        clients = self.clients(round)
        if not clients:
            return {}
        digests = [hashlib.sha256() for _ in clients]
        loaded = self.load(round, clients, names)
        for name in names:
            tensor = loaded[name]
            flat = tensor.reshape(len(clients), math.prod(tensor.shape[1:]))
            for digest, row in zip(digests, flat.view(torch.uint8).numpy(), strict=True):
                digest.update(row)
        return {c: digest.hexdigest() for c, digest in zip(clients, digests, strict=True)}

    def prune(self, keep_last: int, keep: Collection[int] = ()) -> None:
        """Delete all but the last `keep_last` committed rounds and those in `keep`.

        What uncommitted rounds before the last committed one left behind goes too.
        """
        assert keep_last >= 1, keep_last
        committed = self.committed()
        kept = {*committed[-keep_last:], *keep}
        for number in self._numbers():
            folder = _folder(number)
            if number in kept:
                self._storage.sweep(folder)
            elif committed and number < committed[-1]:
                # manifest first: a round deleted by half must not count
                self._storage.delete(f"{folder}/{_MANIFEST}")
                self._storage.delete(folder)

    def _refuse_committed(self, round: int) -> None:
        path = f"{_folder(round)}/{_MANIFEST}"
        if not self._storage.exists(path):
            return
        if self._counts(round):
            raise FellrayError(
                f"{self._storage}/{path}: round {round} is committed already and stays as it is; "
                "resume the run, which goes on after its last committed round"
            )
        # files staged anew could make a broken round's old manifest look whole again
        self._storage.delete(path)

    def _numbers(self) -> list[int]:
        names = self._storage.list("rounds")
        return sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name))

    def _counts(self, round: int) -> bool:
        try:
            self._check(round)
        except Uncommitted:
            return False
        return True

    def _open(self, round: int) -> Manifest:
        try:
            return self._check(round)
        except Uncommitted as error:
            raise FellrayError(f"{error}{self._way_out(round)}") from None

    def _check(self, round: int) -> Manifest:
        folder = _folder(round)
        where = f"{self._storage}/{folder}"
        sizes = self._storage.sizes(folder)
        if _MANIFEST not in sizes:
            raise Uncommitted(f"{where}/{_MANIFEST}: is not there: round {round} never happened")
        data = self._storage.read(f"{folder}/{_MANIFEST}")
        manifest = decode(data, round, f"{where}/{_MANIFEST}")
        for one in manifest.files:
            if sizes.get(one.file) != one.bytes:
                raise Uncommitted(
                    f"{where}/{one.file}: has {sizes.get(one.file, 'no')} bytes where the manifest "
                    f"says {one.bytes}"
                )
        return manifest

    def _read(self, round: int, one: Staged) -> dict[str, torch.Tensor]:
        path = f"{_folder(round)}/{one.file}"
        data = self._storage.read(path)
        if (path, one.sha256) not in self._verified:
            if hashlib.sha256(data).hexdigest() != one.sha256:
                raise FellrayError(
                    f"{self._storage}/{path}: is damaged: its checksum is not the manifest's"
                    f"{self._way_out(round)}"
                )
            self._verified.add((path, one.sha256))
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(data)
        return tensors

    def _way_out(self, round: int) -> str:
        others = [str(number) for number in self.committed() if number != round]
        if not others:
            return "; no other round is committed: restore the file or start the run anew"
        return (
            f"; committed rounds: {', '.join(others)}: restore the file, or go back to one of them "
            "by deleting the folders of the later rounds and resuming"
        )


def _folder(round: int) -> str:
    assert round >= 0, round
    return f"rounds/{round:06d}"
