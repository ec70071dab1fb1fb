"""Messages are closed types: there is no field in which a token or a label could travel."""

import dataclasses
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

from fellray.platform import messages
from fellray.platform.messages import Activation, Gradient, Installation, Lease, StaleLease, Update

FIELDS = {
    "Lease": ("server", "number"),
    "Activation": (
        "run",
        "round",
        "step",
        "lease",
        "clients",
        "row_client_N",
        "lengths_N",
        "h_Ld",
        "names_NB",
        "sent_N",
    ),
    "Gradient": ("run", "round", "step", "g_Ld", "done"),
    "Continuation": ("activation", "text", "parent_N", "held_N", "plain", "goes_on"),
    "LedgerRow": ("client", "kind", "messages", "bytes", "digest"),
    "Update": ("lives", "clients", "theta_SP", "losses", "samples", "seconds", "refused"),
    "Installation": ("round", "clients", "theta_SP", "refused", "common"),
}
"""Every message and every field. To add one is to decide that it may be sent: see design, what
"private" means here."""


def types() -> dict[str, Any]:
    return {
        name: cls
        for name, cls in inspect.getmembers(messages, inspect.isclass)
        if cls.__module__ == messages.__name__ and not issubclass(cls, Exception)
    }


def samples() -> list[Any]:
    lease, x = Lease("s", 1), np.zeros((2, 3), np.float32)
    few = np.array([0, 0], np.int32)
    return [
        lease,
        Activation("r", 1, 0, lease, ("a",), few, few + 1, x),
        Gradient("r", 1, 0, x),
        Update(("s",), ("a",), x, (0.5,), (8,), (0.1,), {"a": "NaN"}),
        Installation(1, ("a",), x),
    ]


def test_the_fields_are_these_and_no_others() -> None:
    found = {n: tuple(f.name for f in dataclasses.fields(c)) for n, c in types().items()}
    assert found == FIELDS


def test_messages_are_frozen() -> None:
    assert all(cls.__dataclass_params__.frozen for cls in types().values())
    for message in samples():
        name = dataclasses.fields(message)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, name, "other")


def test_a_message_arrives_as_it_was_sent() -> None:
    for message in samples():
        arrived = pickle.loads(pickle.dumps(message))
        for field in dataclasses.fields(message):
            sent, got = getattr(message, field.name), getattr(arrived, field.name)
            np.testing.assert_array_equal(got, sent)
    assert str(pickle.loads(pickle.dumps(StaleLease("too late")))) == "too late"


def test_a_mixture_for_everyone_travels_once() -> None:
    row = np.arange(10_000, dtype=np.float32)[None]
    clients = tuple("abcdefgh")
    sent = Installation(3, clients, np.broadcast_to(row, (8, 10_000)), ("b",), common=True)
    packed = pickle.dumps(sent)
    assert len(packed) < 1.1 * row.nbytes
    came = pickle.loads(packed)
    assert came.theta_SP.shape == (8, 10_000)
    assert (came.theta_SP == row).all()
    assert (came.round, came.clients, came.refused, came.common) == (3, clients, ("b",), True)
    own = Installation(3, clients, np.arange(8, dtype=np.float32)[:, None])
    assert (pickle.loads(pickle.dumps(own)).theta_SP == own.theta_SP).all()
