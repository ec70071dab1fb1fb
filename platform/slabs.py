"""Inner products and mixtures of client vectors, one slab of columns after the other.

Memory is a few slabs, whatever the stack's size, and the stack may lie in a file. Every product
is one matrix product on one thread, of a shape that follows from C and P alone; several threads
work on different ones. So the bits depend on the constants below and on nothing else: not on
threads, not on how many shards share the work, not on where the stack lies. What the products are
for is not this file's business.

Shapes: C clients, P parameters of one client, D rows of a mixing matrix that differ, W columns of
a slab.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from fellray.platform.stack_file import StackFile

SLAB = 4096
"""Columns of a slab. Within one the matrix product sums, over several fp64 does."""
TILE = 256
"""Rows of a task: inner products are symmetric, and only tiles on and above the diagonal exist."""
SPANS = 8
"""Leaves of the reduction tree: the columns in eight runs of slabs. A shard is a subtree."""
EXACT = 128
"""Up to so many clients all products are taken in fp64, which costs them nothing that is felt;
with more, in the stack's own precision."""

Stack = Tensor | StackFile
"""Vectors [C, P] in memory or in a file."""


def gram(theta: Stack, start: Stack | None = None) -> Tensor:
    """Inner products [C, C] in fp64 of ``theta - start``, or of theta."""
    return unpack(gram_part(theta, start), theta.shape[0])


def gram_part(theta: Stack, start: Stack | None = None, shard: int = 0, shards: int = 1) -> Tensor:
    """One shard's share of the inner products: its upper tiles one after the other, fp64.

    Args:
        theta: sent weights [C, P].
        start: what is taken off them.
        shard: which share, from 0.
        shards: how many there are: 1, 2, 4 or 8.
    """
    assert start is None or start.shape == theta.shape, "one start per client"
    with _crew(len(_blocks(theta.shape[0]))) as (crew, _):
        return _subtree(crew, theta, start, _spans(shard, shards))


def join(parts: Sequence[Tensor]) -> Tensor:
    """All shards' shares as one, added pairwise: the upper end of the tree."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return join(parts[:half]) + join(parts[half:])


def unpack(packed: Tensor, num_clients: int) -> Tensor:
    """The whole symmetric matrix [C, C] from its upper tiles."""
    whole_CC = torch.empty(num_clients, num_clients, dtype=packed.dtype)
    for i, j, tile in _tiles(packed, num_clients):
        # the two halves of a tile on the diagonal are summed by different lanes of the processor
        tile = tile.triu() + tile.triu(1).T if i == j else tile
        whole_CC[i, j] = tile
        whole_CC[j, i] = tile.T
    return whole_CC


def mix(
    mixing_CC: Tensor,
    source: Stack,
    target: Stack,
    shard: int = 0,
    shards: int = 1,
    columns: slice | None = None,
) -> None:
    """``target = M @ source`` on one shard's columns; target may be the source itself.

    Rows of M that are equal are computed once. A row that is one for its own client and zero for
    all others is not computed at all: the client's weights are copied.

    Args:
        mixing_CC: M, fp64.
        source: what is mixed [C, P].
        target: where the mixtures go, of the same type; with fewer rows, those of the first ones.
        shard: which share of the columns, from 0.
        shards: how many there are: 1, 2, 4 or 8.
        columns: of which the shares are taken; the others stay as they are. None: all.
    """
    num_clients = source.shape[0]
    mixed_columns = slice(0, source.shape[1]) if columns is None else columns
    first, num_parameters = mixed_columns.start, mixed_columns.stop - mixed_columns.start
    dtype = _working(source)
    alone_C = (mixing_CC.diagonal() == 1) & (mixing_CC.count_nonzero(dim=1) == 1)
    everyone, nobody = bool(alone_C.all()), not bool(alone_C.any())
    if everyone and source is target:
        return
    weights_DC, place_C = _distinct(mixing_CC, alone_C, dtype)
    blocks = _blocks(num_clients)
    width = min(SLAB, num_parameters)

    slabs = [
        slice(first + slab.start, first + slab.stop)
        for span in _spans(shard, shards)
        for slab in _slabs(num_parameters, span)
    ]
    with _crew(len(slabs)) as (crew, workers):
        idle: SimpleQueue[tuple[Tensor, Tensor]] = SimpleQueue()
        for _ in range(workers):
            idle.put((_room(num_clients, width, dtype), _room(len(weights_DC), width, dtype)))

        def work(columns: slice) -> None:
            rooms = idle.get()
            heard_CW, mixed_DW = (_cut(room, columns) for room in rooms)
            for rows in blocks:
                heard_CW[rows] = _read(source, rows, columns)
            torch.mm(weights_DC, heard_CW, out=mixed_DW)
            for rows in _blocks(target.shape[0]):
                if everyone:
                    mixed = _read(source, rows, columns)
                else:
                    one_each = len(mixed_DW) == num_clients
                    mixed = mixed_DW[rows] if one_each else mixed_DW[place_C[rows]]
                    mixed = mixed.to(source.dtype)
                    if not nobody:
                        own = _read(source, rows, columns)
                        mixed = torch.where(alone_C[rows, None], own, mixed)
                _write(target, rows, columns, mixed)
            idle.put(rooms)

        for done in [crew.submit(work, columns) for columns in slabs]:
            done.result()


def _subtree(crew: Executor, theta: Stack, start: Stack | None, spans: range) -> Tensor:
    if len(spans) > 1:
        half = len(spans) // 2
        left = _subtree(crew, theta, start, spans[:half])
        if any(_slabs(theta.shape[1], span) for span in spans[half:]):
            left += _subtree(crew, theta, start, spans[half:])
        return left
    num_clients, num_parameters = theta.shape
    blocks = _blocks(num_clients)
    sizes = [(b.stop - b.start) for b in blocks]
    size = sum(m * sum(sizes[at:]) for at, m in enumerate(sizes))
    packed = torch.zeros(size, dtype=torch.float64)
    tiles = list(_tiles(packed, num_clients))
    slabs = _slabs(num_parameters, spans[0])
    if not slabs:
        return packed
    dtype, width = _working(theta), min(SLAB, num_parameters)
    rooms = [_room(num_clients, width, dtype) for _ in slabs[:2]]

    def load(into_CW: Tensor, rows: slice, columns: slice) -> None:
        block = _read(theta, rows, columns).to(dtype)
        if start is None:
            into_CW[rows] = block
        else:
            torch.sub(block, _read(start, rows, columns).to(dtype), out=into_CW[rows])

    def add(slab_CW: Tensor, i: slice, j: slice, tile: Tensor) -> None:
        tile += slab_CW[i] @ slab_CW[j].T

    def begin_loading(turn: int) -> tuple[Tensor, list[Future[None]]]:
        slab_CW = _cut(rooms[turn % 2], slabs[turn])
        return slab_CW, [crew.submit(load, slab_CW, rows, slabs[turn]) for rows in blocks]

    slab_CW, loading = begin_loading(0)
    for turn in range(len(slabs)):
        for future in loading:
            future.result()
        adding = [crew.submit(add, slab_CW, i, j, tile) for i, j, tile in tiles]
        if turn + 1 < len(slabs):  # whoever finds no tile left begins on the next slab
            slab_CW, loading = begin_loading(turn + 1)
        for future in adding:
            future.result()
    return packed


def _distinct(mixing_CC: Tensor, alone_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows of those who listen to others, each once, and where each client's stands in them."""
    weights_CC = mixing_CC.to(dtype, copy=True)
    weights_CC += 0.0  # a zero has a sign, which is not to tell rows apart
    known: dict[bytes, int] = {}
    first: list[int] = []
    place: list[int] = []
    for client, (row, alone) in enumerate(zip(weights_CC.numpy(), alone_C.tolist(), strict=True)):
        if alone:
            place.append(0)
            continue
        digest = hashlib.sha256(row.data).digest()
        if digest not in known:
            known[digest] = len(first)
            first.append(client)
        place.append(known[digest])
    if len(first) == len(weights_CC):
        return weights_CC, torch.tensor(place)
    return weights_CC[first], torch.tensor(place)


def _spans(shard: int, shards: int) -> range:
    assert shards in (1, 2, 4, SPANS), f"{shards} shards are no subtrees of {SPANS} spans"
    assert 0 <= shard < shards, (shard, shards)
    each = SPANS // shards
    return range(shard * each, (shard + 1) * each)


def _slabs(num_parameters: int, span: int) -> list[slice]:
    count = -(-num_parameters // SLAB)
    first, last = count * span // SPANS, count * (span + 1) // SPANS
    return [slice(s * SLAB, min((s + 1) * SLAB, num_parameters)) for s in range(first, last)]


def _blocks(num_clients: int) -> list[slice]:
    return [slice(at, min(at + TILE, num_clients)) for at in range(0, num_clients, TILE)]


def _tiles(packed: Tensor, num_clients: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Views of the tiles on and above the diagonal, row after row."""
    blocks, at = _blocks(num_clients), 0
    for place, i in enumerate(blocks):
        for j in blocks[place:]:
            shape = (i.stop - i.start, j.stop - j.start)
            yield i, j, packed[at : at + shape[0] * shape[1]].view(shape)
            at += shape[0] * shape[1]


def _working(stack: Stack) -> torch.dtype:
    if stack.shape[0] <= EXACT or stack.dtype == torch.float64:
        return torch.float64
    return torch.float32


def _room(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, width, dtype=dtype)


def _cut(room: Tensor, columns: slice) -> Tensor:
    """The room at the width of a slab, its rows still one behind the other."""
    width = columns.stop - columns.start
    return room.view(-1)[: len(room) * width].view(len(room), width)


def _read(stack: Stack, rows: slice, columns: slice) -> Tensor:
    return stack[rows, columns] if isinstance(stack, Tensor) else stack.read(rows, columns)


def _write(stack: Stack, rows: slice, columns: slice, values: Tensor) -> None:
    if isinstance(stack, Tensor):
        stack[rows, columns] = values
    else:
        stack.write(rows, columns, values)


class _Here(Executor):
    """Does at once what it is given: a few tiny products are not worth a thread."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*args, **more))
        return done


@contextmanager
def _crew(tasks: int) -> Iterator[tuple[Executor, int]]:
    """Workers that compute on one thread each: as many as this thread may use, or find work."""
    threads = torch.get_num_threads()
    count = min(threads, tasks)
    try:
        if count > 1:
            with ThreadPoolExecutor(count, "slab", torch.set_num_threads, (1,)) as crew:
                yield crew, count
        else:
            torch.set_num_threads(1)
            yield _Here(), 1
    finally:
        torch.set_num_threads(threads)  # workers change what later threads begin with, too
