"""The ledger by hand: bytes, messages and digests by client and kind."""

import hashlib

import numpy as np

from fellray.platform.ledger import Ledger, payload_bytes, total
from fellray.platform.messages import Activation, Gradient, Lease, LedgerRow

H = np.arange(12, dtype=np.float32).reshape(6, 2)


def message(clients: tuple[str, ...] = ("a", "b"), h: np.ndarray = H) -> Activation:
    """Rows of 1, 2 and 3 tokens; the first and last are b's."""
    return Activation(
        run="r",
        round=1,
        step=0,
        lease=Lease("s", 1),
        clients=clients,
        row_client_N=np.array([1, 0, 1], np.int32),
        lengths_N=np.array([1, 2, 3], np.int32),
        h_Ld=h,
    )


def digest(*payloads: np.ndarray) -> str:
    hashed = hashlib.sha256()
    for payload in payloads:
        hashed.update(payload.tobytes())
    return hashed.hexdigest()[:32]


def test_entries_by_hand() -> None:
    ledger, x = Ledger(), np.arange(3, dtype=np.float32)
    ledger.enter("b", "loss", x)
    ledger.enter("a", "loss", x)
    ledger.enter("b", "loss", x + 1)
    ledger.enter("b", "adapter_up", x[:0])
    assert ledger.close() == [
        LedgerRow("a", "loss", 1, 12, digest(x)),
        LedgerRow("b", "adapter_up", 1, 0, digest()),
        LedgerRow("b", "loss", 2, 24, digest(x, x + 1)),
    ]
    assert ledger.close() == [], "a new page"


def test_a_packed_tensor_is_entered_row_by_row_under_its_client() -> None:
    ledger = Ledger()
    ledger.enter_rows(message(), "activation", H)
    assert ledger.close() == [
        LedgerRow("a", "activation", 1, 16, digest(H[1:3])),
        LedgerRow("b", "activation", 2, 32, digest(H[:1], H[3:])),
    ]


def test_a_clients_digest_does_not_depend_on_its_company() -> None:
    together, alone = Ledger(), Ledger()
    together.enter_rows(message(), "activation", H)
    lone = Activation(
        "r",
        1,
        0,
        None,
        ("b",),
        np.array([0, 0], np.int32),
        np.array([1, 3], np.int32),
        np.concatenate([H[:1], H[3:]]),
    )
    alone.enter_rows(lone, "activation", lone.h_Ld)
    together.enter_envelope(message())
    alone.enter_envelope(lone)
    assert [row for row in together.close() if row.client == "b"] == alone.close()


def test_the_sum_is_what_the_message_holds() -> None:
    ledger, sent = Ledger(), message()
    ledger.enter_rows(sent, "activation", sent.h_Ld)
    ledger.enter_envelope(sent)
    rows = ledger.close()
    assert total(rows) == {"activation": 48, "envelope": 24}
    assert sum(row.bytes for row in rows) == payload_bytes(sent)


def test_a_client_without_rows_in_the_step_is_not_entered() -> None:
    ledger, sent = Ledger(), message(clients=("a", "b", "idle"))
    ledger.enter_rows(sent, "activation", sent.h_Ld)
    ledger.enter_envelope(sent)
    assert {row.client for row in ledger.close()} == {"a", "b"}


def test_the_transports_count_by_hand() -> None:
    gradient = Gradient("r", 1, 0, np.zeros((6, 2), np.float32))
    assert payload_bytes(gradient) == 48
    assert payload_bytes(message()) == 48 + 12 + 12
    assert payload_bytes(message(), gradient, np.zeros(3)) == 72 + 48 + 24


def test_a_round_begun_again_becomes_a_kind_of_its_own() -> None:
    ledger, x = Ledger(), np.arange(3, dtype=np.float32)
    for client in ("a", "b"):
        ledger.enter(client, "activation", x)
        ledger.enter(client, "loss", x[:1])
    ledger.void()
    ledger.enter("a", "activation", x + 1)
    rows = ledger.close()
    assert [(r.client, r.kind, r.messages, r.bytes) for r in rows] == [
        ("a", "activation", 1, 12),
        ("a", "replayed", 2, 16),
        ("b", "replayed", 2, 16),
    ]
    assert rows[0].digest == digest(x + 1)
    assert rows[1].digest == rows[2].digest, "the same was sent"


def test_begun_again_twice_adds_up() -> None:
    ledger, x = Ledger(), np.arange(3, dtype=np.float32)
    for _ in range(3):
        ledger.enter("a", "activation", x)
        ledger.void()
    (row,) = ledger.close()
    assert (row.kind, row.messages, row.bytes) == ("replayed", 3, 36)
    ledger.void()
    assert ledger.close() == []


def test_the_digest_tells_another_order_and_takes_any_layout() -> None:
    one, other, strided = Ledger(), Ledger(), Ledger()
    x, y = H[:, :1].copy(), H[:, 1:].copy()
    one.enter("a", "k", x)
    one.enter("a", "k", y)
    other.enter("a", "k", y)
    other.enter("a", "k", x)
    strided.enter("a", "k", H[:, :1])
    strided.enter("a", "k", H[:, 1:])
    rows = [ledger.close() for ledger in (one, other, strided)]
    assert rows[0] != rows[1]
    assert rows[0] == rows[2]


def test_the_same_payload_of_many_is_entered_as_if_one_by_one() -> None:
    payload = np.arange(6, dtype=np.float32)
    single, many = Ledger(), Ledger()
    for ledger in (single, many):
        ledger.enter("b", "k", payload[:2])
    for client in ("a", "b", "c"):
        single.enter(client, "k", payload)
    many.enter_each(("a", "b", "c"), "k", payload)
    many.enter("c", "k", payload[1:])
    single.enter("c", "k", payload[1:])
    assert many.close() == single.close()
