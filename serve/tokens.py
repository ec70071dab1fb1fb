"""Bearer tokens: who may ask for whom. On storage lie only their hashes.

A token is 256 random bits, so its plain SHA-256 tells nothing about it and cannot be searched for.
This file must not know HTTP.
"""

import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from fellray.platform.errors import FellrayError
from fellray.platform.storage import Storage
from fellray.platform.strict_json import to_json
from fellray.serve.args import Args

FILE = "tokens.json"
LOCK = "tokens"
LOCK_S = 10.0
"""How long one who adds a token waits for another."""
_PREFIX = "fellray_"
_VERSION = 1
_log = logging.getLogger("fellray.serve")


@dataclass(frozen=True)
class Caller:
    """Whose token a request carries."""

    client: str | None
    """None: the operator, who may ask for every client."""
    digest: str
    """Names the token in the file."""

    def may_ask_for(self, client: str) -> bool:
        """Whether this client's users and adapters are the caller's own."""
        return self.client is None or self.client == client


class Tokens:
    """The tokens of one file, as it was when it was read."""

    def __init__(self, callers: Mapping[str, Caller]):
        """Args: callers: digest -> caller."""
        self._callers = dict(callers)

    def __len__(self) -> int:
        return len(self._callers)

    def find(self, token: str) -> Caller | None:
        """Whose token this is; None: nobody's."""
        return self._callers.get(_digest(token))


def token_storage(args: Args) -> Storage:
    """The folder that holds an application's tokens."""
    return Storage(args.tokens or args.run)


def read_tokens(storage: Storage) -> Tokens:
    """The tokens in a folder; none where no file is.

    Raises:
        FellrayError: the file is damaged.
    """
    return Tokens({caller.digest: caller for caller, _ in _read(storage)})


def new_token(storage: Storage, client: str | None) -> str:
    """Make a token of a client, or of the operator (None), and add its hash to the folder's file.

    Returns:
        The token itself, which is kept nowhere.

    Raises:
        FellrayError: the file is damaged or cannot be written, or somebody else adds to it for too
            long.
    """
    token = _PREFIX + secrets.token_urlsafe(32)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    with storage.lock(LOCK, LOCK_S) as still_held:
        entries = [*_read(storage), (Caller(client, _digest(token)), since)]
        tree = {
            "version": _VERSION,
            "tokens": [
                {"sha256": caller.digest, "client": caller.client, "since": since}
                for caller, since in entries
            ],
        }
        still_held()
        storage.write(FILE, f"{to_json(tree, f'{storage}/{FILE}', indent=2)}\n".encode())
    return token


class TokenFile:
    """The tokens of a folder, read again when they change."""

    def __init__(self, storage: Storage, poll_s: float):
        """Raises:
        FellrayError: as `read_tokens`.
        """
        self._storage = storage
        self._poll_s = poll_s
        self.tokens = read_tokens(storage)
        """Those that count now."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tokens", daemon=True)

    def start(self) -> None:
        """Look again every `poll_s` seconds, in a thread."""
        self._thread.start()

    def _work(self) -> None:
        while not self._ended.wait(self._poll_s):
            try:
                self.tokens = read_tokens(self._storage)
            except FellrayError as error:
                _log.warning("the tokens stay as they are: %s", error)

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()


class Bucket:
    """A token bucket for each client, and for each token of an operator: so many queries at once,
    then so many a second."""

    def __init__(self, rate: float, burst: int):
        self._rate = rate
        self._burst = float(burst)
        self._held: dict[str, tuple[float, float]] = {}
        """Whose -> what was left, and when."""

    def take(
        self, caller: Caller, queries: int = 1, counted: int = 0, now: float | None = None
    ) -> float:
        """Seconds until such a request would pass; 0: this one does, and its queries are counted.

        What is more than fits into the bucket passes when it is full, and is paid for later.

        Args:
            counted: those of the request that were counted before; given back if it does not pass.
        """
        now = time.monotonic() if now is None else now
        whose = caller.digest if caller.client is None else f"client {caller.client}"
        left, at = self._held.get(whose, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate + counted)
        needed = min(queries, self._burst)
        passes = left >= needed
        self._held[whose] = (left - queries if passes else left, now)
        return 0.0 if passes else (needed - left) / self._rate


def _read(storage: Storage) -> list[tuple[Caller, str]]:
    if not storage.exists(FILE):
        return []
    try:
        tree = json.loads(storage.read(FILE))
        if tree["version"] != _VERSION:
            raise ValueError
        entries = [(Caller(e["client"], e["sha256"]), e["since"]) for e in tree["tokens"]]
        if not all(
            isinstance(caller.client, str | None) and len(bytes.fromhex(caller.digest)) == 32
            for caller, _ in entries
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise FellrayError(
            f"{storage}/{FILE}: is damaged; delete it and make new tokens with `fellray token`"
        ) from None
    return entries


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()
