"""JSON lines: some fields of every line as a table, and which line is wrong where one is.

It must not know what the fields mean.
"""

import gzip
import json
import zlib
from collections.abc import Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from fellray.platform.errors import FellrayError
from fellray.platform.tables import missing

_BLOCK = 1 << 25
"""Bytes that Arrow parses at once: no line may be longer."""


def read_first(file: Path) -> set[str]:
    """The fields of the first line; nothing where it is no JSON object.

    Raises:
        FellrayError: the file is missing, empty or damaged.
    """
    try:
        with _open(file) as lines:
            first = next((line for line in lines if line.strip()), b"")
    except FileNotFoundError:
        raise missing(file) from None
    except (OSError, EOFError, zlib.error) as error:
        raise FellrayError(f"{file}: cannot be read ({error}); download it again") from None
    if not first:
        raise FellrayError(f"{file}: is empty; a JSON object per line is expected")
    try:
        fields = json.loads(first)
    except ValueError:
        return set()
    return set(fields) if isinstance(fields, dict) else set()


def read_lines(file: Path, types: Mapping[str, pa.DataType], needed: tuple[str, ...]) -> pa.Table:
    """Some fields of every line; Arrow parses, and only an error is looked for line by line.

    Args:
        types: field -> type, a column each; others are skipped.
        needed: fields without which a line is an error; of the others null may come.

    Raises:
        FellrayError: the file is missing, empty, cut off, or a line does not fit; it is named.
    """
    try:
        table = pyarrow.json.read_json(
            file,
            pyarrow.json.ReadOptions(block_size=_BLOCK),
            pyarrow.json.ParseOptions(
                explicit_schema=pa.schema(types), unexpected_field_behavior="ignore"
            ),
        )
        table.validate(full=True)  # Arrow's parser lets bytes pass that are no UTF-8
    except FileNotFoundError:
        raise missing(file) from None
    except (pa.ArrowInvalid, OSError) as error:
        told = _find_fault(file, types, needed) or f"cannot be read ({error})"
        raise FellrayError(f"{file}: {told}; download it again, or mend the line") from None
    if not table.num_rows:
        raise FellrayError(f"{file}: is empty; a JSON object per line is expected")
    if any(_is_empty(table[name]) for name in needed):
        fault = _find_fault(file, types, needed)
        raise FellrayError(f"{file}: {fault}; mend or remove the line")
    return table.select(list(types))


def _is_empty(column: pa.ChunkedArray) -> bool:
    if pa.types.is_string(column.type):
        column = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), None, column)
    return bool(column.null_count)


def _find_fault(
    file: Path, types: Mapping[str, pa.DataType], needed: tuple[str, ...]
) -> str | None:
    """What is wrong with the first bad line, by its number."""
    at = 0
    try:
        with _open(file) as lines:
            for at, line in enumerate(lines, 1):
                try:
                    fields = json.loads(line) if line.strip() else None
                except ValueError as error:
                    return f"line {at} is not JSON ({error})"
                if line.strip() and (fault := _find_misfit(fields, types, needed)):
                    return f"line {at} {fault}"
    except (OSError, EOFError, zlib.error) as error:
        return f"is cut off or damaged after line {at} ({error})"
    return None


def _find_misfit(
    fields: Any, types: Mapping[str, pa.DataType], needed: tuple[str, ...]
) -> str | None:
    if not isinstance(fields, dict):
        return "is no JSON object"
    for name, kind in types.items():
        value = fields.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            if name in needed:
                return f"has no {name}"
        elif pa.types.is_list(kind):
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                return f"has a {name} that is no list of texts"
        elif pa.types.is_string(kind):
            if not isinstance(value, str):
                return f"has a {name} that is no text ({value!r})"
        elif isinstance(value, bool) or not isinstance(value, int | float):
            return f"has a {name} that is no number ({value!r})"
        elif pa.types.is_integer(kind) and not isinstance(value, int):
            return f"has a {name} that is no whole number ({value!r})"
    return None


def _open(file: Path) -> BufferedIOBase:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")
