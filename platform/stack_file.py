"""A stack of client vectors in a file: for federations that do not fit into memory.

The file is safetensors with one fp32 tensor, so anything that reads safetensors reads it. Blocks
are read and written at their place in the file, one call per row: a memory map would count every
page that was ever touched as this process's memory, and would fetch four times what is asked for.
What is done with the numbers is not this file's business.

Shapes: C clients, P parameters of one client.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fellray.platform.errors import FellrayError

NAME = "theta"
_ALIGNED = 4096
"""Where the numbers begin is a multiple of this: a row's piece then lies on few pages."""
_MAX_HEADER = 1 << 20


@dataclass(frozen=True)
class StackFile:
    """Where the vectors [C, P] lie. It holds nothing open, so it travels to other processes."""

    path: Path
    shape: tuple[int, int]
    offset: int
    """Bytes before the first number."""
    stride: int
    """Bytes from one client's first number to the next one's."""

    @property
    def dtype(self) -> torch.dtype:
        """As in the file."""
        return torch.float32

    @classmethod
    def create(cls, path: Path, num_clients: int, num_parameters: int) -> "StackFile":
        """A file of zeros that takes up disk as rows are written.

        Raises:
            FileExistsError: there is such a file.
        """
        size = 4 * num_clients * num_parameters
        shape = [num_clients, num_parameters]
        tree = {NAME: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
        header = json.dumps(tree).encode()
        header += b" " * (-(8 + len(header)) % _ALIGNED)
        with path.open("xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        return cls(path, (num_clients, num_parameters), 8 + len(header), 4 * num_parameters)

    @classmethod
    def open(cls, path: Path) -> "StackFile":
        """A file that is there.

        Raises:
            FellrayError: it is no stack, or not whole.
        """
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, _MAX_HEADER))
        try:
            entry = json.loads(header)[NAME]
            kind, (num_clients, num_parameters) = entry["dtype"], map(int, entry["shape"])
        except (ValueError, KeyError, TypeError):
            raise FellrayError(
                f"{path}: is no stack of clients: it must be a safetensors file with one tensor "
                f"{NAME!r} [clients, parameters]; make it anew"
            ) from None
        found = path.stat().st_size
        wanted = 8 + length + 4 * num_clients * num_parameters
        if kind != "F32" or found != wanted:
            raise FellrayError(
                f"{path}: {NAME!r} is {kind} in {found} bytes where F32 in {wanted} bytes was "
                "expected; make it anew"
            )
        return cls(path, (num_clients, num_parameters), 8 + length, 4 * num_parameters)

    def narrow(self, columns: slice) -> "StackFile":
        """Some columns of everybody, as a stack of their own in the same file."""
        width = columns.stop - columns.start
        return replace(self, shape=(self.shape[0], width), offset=self.offset + 4 * columns.start)

    def read(self, rows: slice, columns: slice) -> Tensor:
        """A block of the stack."""
        block = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for place, row in zip(self._places(rows, columns), block, strict=True):
                if os.preadv(descriptor, [row.data], place) != row.nbytes:
                    raise FellrayError(f"{self.path}: ends before row {rows.stop}; make it anew")
        finally:
            os.close(descriptor)
        return torch.from_numpy(block)

    def write(self, rows: slice, columns: slice, values: Tensor) -> None:
        """Put a block in its place."""
        block = values.contiguous().numpy()
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            for place, row in zip(self._places(rows, columns), block, strict=True):
                rest = row.data.cast("B")
                while rest:
                    written = os.pwrite(descriptor, rest, place)
                    rest, place = rest[written:], place + written
        finally:
            os.close(descriptor)

    def _places(self, rows: slice, columns: slice) -> range:
        first = self.offset + 4 * columns.start
        return range(first + rows.start * self.stride, first + rows.stop * self.stride, self.stride)
