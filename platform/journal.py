"""A run's records: append-only lines of metrics and of the ledger, and its small documents.

Rows are written before their round is committed; `resume` takes back those whose round was not.
This file must not know what a row means beyond its `round`.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fellray.platform.errors import FellrayError
from fellray.platform.storage import Storage
from fellray.platform.strict_json import to_json

Kind = Literal["metrics", "ledger"]
_KINDS: tuple[Kind, ...] = ("metrics", "ledger")


class Journal:
    """The records of one run: `metrics.jsonl`, `ledger.jsonl` and documents beside them."""

    def __init__(self, storage: Storage) -> None:
        """`storage` is the run's folder."""
        self._storage = storage

    def record(self, kind: Kind, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, all or none; each has an int `round`. They are on the disk on return.

        Raises:
            FellrayError: a number is not finite, or the storage refuses.
        """
        lines = []
        for row in rows:
            assert type(row.get("round")) is int, f"a row of {kind} needs its round: {row}"
            where = f"{self._storage}/{_file(kind)}: round {row['round']}"
            lines.append(to_json(dict(row), where) + "\n")
        if lines:
            self._storage.append(_file(kind), "".join(lines).encode())

    def rows(self, kind: Kind) -> list[dict[str, Any]]:
        """All rows, oldest first; a torn line at the end is left out.

        Raises:
            FellrayError: a line before the last is not a row.
        """
        parsed = [_parse(line) for line in _split(self._read(kind))]
        for number, row in enumerate(parsed[:-1], start=1):
            if row is None:
                raise self._damaged(kind, number)
        return [row for row in parsed if row is not None]

    def resume(self, round: int | None) -> None:
        """Drop the rows of rounds later than `round`, the last committed one (None: of all).

        Torn lines after the last row that stays go too, and so do the temporary files of writers
        that were killed.

        Raises:
            FellrayError: a line before a row that stays is not a row.
        """
        for kind in _KINDS:
            data = self._read(kind)
            lines = _split(data)
            parsed = [_parse(line) for line in lines]
            stays = [
                row is not None and round is not None and row["round"] <= round for row in parsed
            ]
            last = max((at for at, stay in enumerate(stays) if stay), default=-1)
            for at, row in enumerate(parsed[: last + 1]):
                if row is None:
                    raise self._damaged(kind, at + 1)
            kept = b"".join(line + b"\n" for line, stay in zip(lines, stays, strict=True) if stay)
            if kept != data:
                self._storage.write(_file(kind), kept)
        self._storage.sweep()

    def write_json(self, name: str, value: Any) -> None:
        """Put a JSON document beside the records, whole or not at all.

        Raises:
            FellrayError: a number is not finite, or the storage refuses.
        """
        self.write_text(name, to_json(value, f"{self._storage}/{name}", indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Put a UTF-8 document beside the records, whole or not at all."""
        self._storage.write(name, text.encode())

    def _read(self, kind: Kind) -> bytes:
        return self._storage.read(_file(kind)) if self._storage.exists(_file(kind)) else b""

    def _damaged(self, kind: Kind, number: int) -> FellrayError:
        return FellrayError(
            f"{self._storage}/{_file(kind)}: line {number} is damaged while later ones are whole; "
            "delete that line, or restore the file, and resume"
        )


def _file(kind: Kind) -> str:
    return f"{kind}.jsonl"


def _split(data: bytes) -> list[bytes]:
    lines = data.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def _parse(line: bytes) -> dict[str, Any] | None:
    """A row, or None where the line is torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("round")) is int else None
