"""A round's manifest: which files make the round, and the bytes that say so.

The same bytes are a round's pages file, once it is given up. It must not know where the files lie,
nor when a round is begun. The prepared folder's manifest is another one, in `shards`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fellray.platform.errors import FellrayError
from fellray.platform.messages import Damaged
from fellray.platform.strict_json import to_json

VERSION = 1


class Uncommitted(FellrayError):
    """Why a round does not count: it has no manifest."""


@dataclass(frozen=True)
class Staged:
    """One file of a round, as the driver hears of it."""

    file: str
    """Its name in the round's folder."""
    sha256: str
    bytes: int
    clients: tuple[str, ...]
    """Whose rows, in order; empty where the tensors belong to nobody."""
    tensors: tuple[str, ...]
    """Names, sorted."""


@dataclass(frozen=True)
class Manifest:
    """A committed round."""

    round: int
    files: tuple[Staged, ...]
    facts: dict[str, Any]
    """Plain JSON data kept with the round."""


def encode(manifest: Manifest, where: str) -> bytes:
    """The file of a manifest, with a digest of what it says.

    Raises:
        FellrayError: a fact is not finite; `where` and the fact are named.
    """
    # through JSON once, so that the digest is taken of what a reader will see
    tree = json.loads(to_json({"version": VERSION, **asdict(manifest)}, where))
    return to_json({**tree, "sha256": _digest(tree)}, where, indent=1).encode()


def decode(data: bytes, round: int, where: str) -> Manifest:
    """The manifest of a round, from the file at `where`.

    Raises:
        Damaged: it is not whole, or is another round's.
        FellrayError: it is of another version.
    """
    try:
        tree = json.loads(data)
        whole = tree.pop("sha256") == _digest(tree) and tree["round"] == round
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise Damaged(f"{where}: is truncated or changed", round, where.rpartition("/")[2])
    if tree["version"] != VERSION:
        # not Damaged: a run that took it for nothing would train over it
        raise FellrayError(
            f"{where}: has version {tree['version']}, this fellray reads "
            f"{VERSION}; use the fellray that wrote the run"
        )
    files = (
        Staged(**{**one, "clients": tuple(one["clients"]), "tensors": tuple(one["tensors"])})
        for one in tree["files"]
    )
    return Manifest(round, tuple(files), tree["facts"])


def check_claims(files: Sequence[Staged]) -> None:
    """That no tensor of a client, or of nobody, lies in two files.

    Raises:
        ValueError: two files claim the same, or a file is there twice.
    """
    claims: dict[tuple[str | None, str], str] = {}
    for one in files:
        for client in one.clients or (None,):
            for name in one.tensors:
                other = claims.setdefault((client, name), one.file)
                if other != one.file:
                    owner = "nobody" if client is None else f"client {client!r}"
                    raise ValueError(f"{other} and {one.file} both claim {name!r} of {owner}")
    if len({one.file for one in files}) != len(files):
        raise ValueError("a file was staged twice")


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
