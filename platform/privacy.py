"""What a client does to its upload before it leaves: clip, then noise. Local differential privacy.

It works on a round's delta, sent minus start, one client's row at a time and in fp64, so that
nobody's bits depend on who shares an actor. It must not know what the numbers are for, nor what the
noise is worth: that is the accountant's question.

Noise is a function of (key, client, round, the clipped delta), drawn from SHAKE-128. The delta is
in it so that no two different uploads ever have the same noise: their difference would be bare.

Shapes: S clients, P numbers of one client's upload.
"""

import hashlib
import json
import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.privacy_config import GaussianNoise, NoPrivacy, PaperLikeNoise

Stage = GaussianNoise | PaperLikeNoise
"""What an upload goes through."""
_KEY_BYTES = 32
_INSIDE = 1 - 1e-12
"""A norm just below its bound stays there when it is taken again, in any order of adding."""


def find_key(config: RunConfig) -> bytes:
    """The secret that the noise is drawn from, or, where none is named, what follows from the seed.

    Raises:
        FellrayError: the file cannot be read or is too short.
    """
    path = None if isinstance(config.privacy, NoPrivacy) else config.privacy.key
    if path is None:
        return hashlib.sha256(f"fellray noise {config.seed}".encode()).digest()
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise FellrayError(
            f"privacy.key {path}: cannot be read ({error.strerror}); every client's machine needs "
            f"one: head -c {_KEY_BYTES} /dev/urandom > {path}"
        ) from None
    if len(secret) < _KEY_BYTES:
        raise FellrayError(
            f"privacy.key {path}: has {len(secret)} bytes, {_KEY_BYTES} are needed: "
            f"head -c {_KEY_BYTES} /dev/urandom > {path}"
        )
    return hashlib.sha256(secret).digest()


def privatise(
    delta_SP: Tensor, stage: Stage, key: bytes, round: int, clients: Sequence[str]
) -> Tensor:
    """What clients may send instead of their deltas [S, P], fp32.

    `GaussianNoise`: each row is brought to an L2 norm of at most `clip` and every number gets
    N(0, (sigma * clip)^2). What is sent lies on a grid of about a thousandth of that deviation, so
    that the last bits of a float tell nothing (Mironov, CCS 2012). `PaperLikeNoise`: every number
    gets Laplace(0, scale), and that is all.

    Args:
        delta_SP: sent minus start.
        key: see `find_key`.
        round: t = 1, 2, ...
        clients: ids, one per row.

    Raises:
        ValueError: a row holds a NaN or an infinity: noise would not hide it.
    """
    delta = delta_SP.detach().cpu().numpy()
    sent = np.empty(delta.shape, np.float32)
    for row, client in enumerate(clients):
        own_P = delta[row].astype(np.float64)
        if not np.isfinite(own_P).all():
            raise ValueError(f"the update of {client} holds a NaN or an infinity")
        if isinstance(stage, GaussianNoise):
            own_P = clip_row(own_P, stage.clip)
            sent[row] = _blur(own_P, stage.sigma * stage.clip, key, ["delta", round, client])
        else:
            uniform_P = _draw(own_P, len(own_P), key, ["paper_like", round, client]) - 0.5
            noise_P = -np.sign(uniform_P) * np.log1p(-2 * np.abs(uniform_P))
            sent[row] = own_P + stage.scale * noise_P
    return torch.from_numpy(sent)


def privatise_round(
    start_SP: Tensor,
    whole_SP: Tensor,
    losses: Sequence[float],
    stage: Stage,
    key: bytes,
    round: int,
    clients: Sequence[str],
    refused: Collection[str],
) -> tuple[Tensor, list[float]]:
    """What clients send at a round's end instead of their weights [S, P] and losses.

    Of who is refused nothing but the start is sent.
    """
    sent_SP = start_SP.clone()
    rows = [i for i, client in enumerate(clients) if client not in refused]
    names = [clients[i] for i in rows]
    delta_SP = whole_SP[rows].double() - start_SP[rows].double()
    sent_SP[rows] += privatise(delta_SP, stage, key, round, names)
    sent = [math.nan] * len(losses)
    noised = privatise_losses([losses[i] for i in rows], stage, key, round, names)
    for row, loss in zip(rows, noised, strict=True):
        sent[row] = loss
    return sent_SP, sent


def privatise_losses(
    losses: Sequence[float], stage: Stage, key: bytes, round: int, clients: Sequence[str]
) -> tuple[float, ...]:
    """What clients may send instead of their losses: clipped and noised, NaN where nothing is sent.

    `PaperLikeNoise` leaves them as they are.
    """
    if not isinstance(stage, GaussianNoise):
        return tuple(losses)
    if stage.loss_clip is None or stage.loss_sigma is None:
        return (math.nan,) * len(losses)
    clipped = np.clip(np.asarray(losses, np.float64), 0.0, stage.loss_clip)
    deviation = stage.loss_sigma * stage.loss_clip
    return tuple(
        float(_blur(clipped[at : at + 1], deviation, key, ["loss", round, client])[0])
        for at, client in enumerate(clients)
    )


def clip_row(delta_P: np.ndarray, bound: float) -> np.ndarray:
    """The row, scaled to an L2 norm of at most `bound` where its own is larger; fp64."""
    norm = math.sqrt(np.square(delta_P).sum())
    return delta_P * (bound * _INSIDE / norm) if norm > bound * _INSIDE else delta_P


def _blur(exact_P: np.ndarray, deviation: float, key: bytes, place: list[str | int]) -> np.ndarray:
    """With Gaussian noise, on its grid."""
    half = (len(exact_P) + 1) // 2
    uniform = _draw(exact_P, 2 * half, key, place)
    # Box and Muller: two uniform numbers are two normal ones
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    grid = 2.0 ** (math.floor(math.log2(deviation)) - 10)
    blurred: np.ndarray = np.rint((exact_P + deviation * normal[: len(exact_P)]) / grid) * grid
    return blurred


def _draw(exact_P: np.ndarray, count: int, key: bytes, place: list[str | int]) -> np.ndarray:
    """Numbers between 0 and 1, neither of the two."""
    stream = hashlib.shake_128(key + json.dumps(place).encode())
    stream.update(exact_P.tobytes())
    words = np.frombuffer(stream.digest(8 * count), "<u8")
    uniform: np.ndarray = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return uniform
