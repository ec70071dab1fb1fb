"""A file of pages: the rows of many clients, each checked by its own digest and read alone.

A safetensors file with one more tensor, `digests`: BLAKE2b of every tensor's bytes in every row.
What is hashed of the file as a whole is its head and the digests, so one page can be trusted
without reading its neighbours. It must not know rounds or storages.

Shapes: S rows, one per client (tensors that belong to nobody are one row whatever their shape),
T tensors in the order of their names.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch

from fellray.platform.errors import FellrayError

DIGESTS = "digests"
_SIZE = 16
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

ReadRanges = Callable[[Sequence[tuple[int, int]]], list[memoryview]]
"""Bytes at each (offset, size) of a file, which may be written to."""


class DamagedPages(FellrayError):
    """A file whose bytes are not those that were written."""

    def __init__(self, words: str, rows: Sequence[int] | None = None):
        """Args: rows: the pages that are damaged; None where the file cannot be trusted at all."""
        super().__init__(words)
        self.rows = rows


@dataclass(frozen=True)
class Field:
    """Where a tensor lies in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Head:
    """What is known of a file before any page is read."""

    clients: tuple[str, ...]
    """S ids; none where the tensors belong to nobody."""
    fields: Mapping[str, Field]
    digests: np.ndarray
    """uint8 [S, T, 16]; one row where the tensors belong to nobody."""
    identity: str
    """The digest that `encode` gave."""


def encode(clients: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, str]:
    """The file of S clients' rows, or of tensors that belong to nobody, and the digest of its head.

    Args:
        clients: S ids; empty for tensors that belong to nobody.
        tensors: each [S, ...], or of any shape where `clients` is empty.
    """
    assert DIGESTS not in tensors
    whole = {
        name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        for name in sorted(tensors)
    }
    rows = len(clients) or 1
    digests = np.empty((rows, len(whole), _SIZE), np.uint8)
    for column, tensor in enumerate(whole.values()):
        for row, data in enumerate(_bytes(tensor, rows)):
            digests[row, column] = np.frombuffer(_digest(data), np.uint8)
    # one metadata key only: safetensors writes several in an order that changes from call to call
    file: bytes = safetensors.torch.save(
        {**whole, DIGESTS: torch.from_numpy(digests)}, metadata={"clients": json.dumps([*clients])}
    )
    return file, _identity(file[: 8 + _length(file[:8])], digests)


def read_head(read: ReadRanges, identity: str | None) -> Head:
    """The head of a file, checked against the digest that `encode` gave.

    Args:
        identity: None where nobody knows it any more: then the head is as it says itself.

    Raises:
        DamagedPages: it is not the head that was written.
    """
    try:
        first = bytes(read([(0, 8)])[0])
        length = _length(first)
        text = bytes(read([(8, length)])[0])
        tree = json.loads(text)
        clients = tuple(json.loads(tree.pop("__metadata__")["clients"]))
        fields = {
            name: Field(
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in tree.items()
        }
        own = fields.pop(DIGESTS)
        (raw,) = read([(own.start, own.size)])
        digests = np.frombuffer(raw, np.uint8).reshape(own.shape).copy()  # it outlives the file
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError) as error:
        raise DamagedPages(f"is damaged: its head cannot be read ({error})") from None
    found = _identity(first + text, digests)
    if identity not in (None, found):
        raise DamagedPages("is damaged: its checksum is not the manifest's")
    return Head(clients, fields, digests, found)


def read_rows(read: ReadRanges, head: Head, rows: Sequence[int], name: str) -> torch.Tensor:
    """Rows [len(rows), ...] of a tensor, in the order asked, each checked; not to be written to.

    Raises:
        DamagedPages: a page is not the one that was written.
    """
    field = head.fields[name]
    size = field.size // len(head.digests)
    runs = _runs(rows)
    parts = read([(field.start + first * size, count * size) for first, count in runs])
    view = parts[0] if len(parts) == 1 else memoryview(bytearray().join(parts))
    place = {row: i for i, row in enumerate(sorted(set(rows)))}
    column = sorted(head.fields).index(name)
    bad = [
        row
        for row, i in place.items()
        if _digest(view[i * size : (i + 1) * size]) != head.digests[row, column].tobytes()
    ]
    if bad:
        raise DamagedPages(f"is damaged: a page of {name} is not what was written", bad)
    tensor = _tensor(view, field.dtype, (len(place), *field.shape[1:]))
    if len(place) == 1:
        return tensor.expand(len(rows), *field.shape[1:])
    return tensor if list(place) == list(rows) else tensor[torch.tensor([place[r] for r in rows])]


def read_shared(read: ReadRanges, head: Head, name: str) -> torch.Tensor:
    """A tensor that belongs to nobody, checked.

    Raises:
        DamagedPages: it is not the one that was written.
    """
    field = head.fields[name]
    (data,) = read([(field.start, field.size)])
    if _digest(data) != head.digests[0, sorted(head.fields).index(name)].tobytes():
        raise DamagedPages(f"is damaged: {name} is not what was written")
    return _tensor(data, field.dtype, field.shape)


def _tensor(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Distinct rows as (first, count) of neighbours: one read each."""
    places = np.unique(np.asarray(rows, np.int64))
    starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    counts = np.diff(starts, append=len(places))
    return list(zip(places[starts].tolist(), counts.tolist(), strict=True))


def _bytes(tensor: torch.Tensor, rows: int) -> list[memoryview]:
    if not tensor.numel():
        return [memoryview(b"")] * rows
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    size = len(view) // rows
    return [view[row * size : (row + 1) * size] for row in range(rows)]


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_SIZE).digest()


def _length(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _identity(head: bytes, digests: np.ndarray) -> str:
    return hashlib.sha256(head + digests.tobytes()).hexdigest()
