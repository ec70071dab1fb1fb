"""A stack of clients in a file: blocks at their place, and files that are no stacks."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from fellray.platform.errors import FellrayError
from fellray.platform.stack_file import NAME, StackFile


def test_blocks_are_read_and_written_at_their_place(tmp_path: Path) -> None:
    stack = StackFile.create(tmp_path / "theta.safetensors", 3, 5)
    assert (stack.shape, stack.dtype) == ((3, 5), torch.float32)
    stack.write(slice(1, 3), slice(2, 4), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    wanted = [[0.0] * 5, [0.0, 0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 3.0, 4.0, 0.0]]
    assert stack.read(slice(0, 3), slice(0, 5)).tolist() == wanted
    assert stack.read(slice(1, 2), slice(3, 5)).tolist() == [[2.0, 0.0]]
    assert safetensors.torch.load_file(stack.path)[NAME].tolist() == wanted


def test_a_transposed_block_is_written_as_it_looks(tmp_path: Path) -> None:
    stack = StackFile.create(tmp_path / "theta.safetensors", 2, 2)
    stack.write(slice(0, 2), slice(0, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T)
    assert stack.read(slice(0, 2), slice(0, 2)).tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_some_columns_are_a_stack_in_the_same_place(tmp_path: Path) -> None:
    stack = StackFile.create(tmp_path / "theta.safetensors", 2, 6)
    part = stack.narrow(slice(2, 5))
    assert part.shape == (2, 3)
    part.write(slice(0, 2), slice(1, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert stack.read(slice(0, 2), slice(0, 6)).tolist() == [
        [0.0, 0.0, 0.0, 1.0, 2.0, 0.0],
        [0.0, 0.0, 0.0, 3.0, 4.0, 0.0],
    ]


def test_a_stack_is_found_again(tmp_path: Path) -> None:
    made = StackFile.create(tmp_path / "theta.safetensors", 3, 5)
    assert StackFile.open(made.path) == made
    with pytest.raises(FileExistsError):
        StackFile.create(made.path, 3, 5)
    safetensors.torch.save_file({NAME: torch.ones(2, 3)}, tmp_path / "theirs.safetensors")
    theirs = StackFile.open(tmp_path / "theirs.safetensors")
    assert theirs.read(slice(0, 2), slice(0, 3)).tolist() == [[1.0] * 3] * 2


def test_a_stack_that_takes_no_room_yet(tmp_path: Path) -> None:
    """A file for ten thousand clients is made at once, and takes up what is written."""
    stack = StackFile.create(tmp_path / "theta.safetensors", 10_000, 100_000)
    status = stack.path.stat()
    assert status.st_size > 4 * 10**9
    assert status.st_blocks * 512 < 10**6


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "no stack"),
        (b"PK\3\4 whatever this is", "no stack"),
        ({"other": torch.ones(2, 3)}, "no stack"),
        ({NAME: torch.ones(3)}, "no stack"),
        ({NAME: torch.ones(2, 3, dtype=torch.float64)}, "F64"),
    ],
    ids=["empty", "foreign", "name", "shape", "type"],
)
def test_what_is_no_stack_is_refused(
    content: bytes | dict[str, torch.Tensor], word: str, tmp_path: Path
) -> None:
    path = tmp_path / "theta.safetensors"
    path.write_bytes(content if isinstance(content, bytes) else safetensors.torch.save(content))
    with pytest.raises(FellrayError, match=word):
        StackFile.open(path)


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    stack = StackFile.create(tmp_path / "theta.safetensors", 3, 5)
    with stack.path.open("r+b") as file:
        file.truncate(stack.offset + 50)
    with pytest.raises(FellrayError, match="make it anew"):
        StackFile.open(stack.path)
    with pytest.raises(FellrayError, match="ends before"):
        stack.read(slice(0, 3), slice(0, 5))
