"""Histories and texts of every kind, as a stranger may send them: mostly valid, never polite."""

import json
import random
from typing import Any

PLANES = (
    (0x20, 0x7E),  # ASCII
    (0x00, 0x1F),  # control characters
    (0x80, 0xFF),
    (0x300, 0x36F),  # combining marks
    (0x590, 0x6FF),  # right to left
    (0x900, 0xDFF),  # scripts of India
    (0x2000, 0x206F),  # spaces without width, directions
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xE000, 0xF8FF),
    (0xFFF0, 0xFFFF),
    (0x1F300, 0x1FAFF),
    (0x20000, 0x2A6DF),
    (0x10FF00, 0x10FFFF),
)
HALVES = (0xD800, 0xDFFF)
"""Of a pair: JSON can spell them, UTF-8 cannot."""
NUMBERS = (0, -1, 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 10**30, 1.0, 0.5, 1e308)


def draw_text(draw: random.Random, most: int) -> str:
    """Characters of one plane or of all of them."""
    planes = PLANES if draw.random() < 0.5 else (draw.choice(PLANES),)
    if draw.random() < 0.02:
        planes += (HALVES,)
    length = int(most ** draw.random())
    return "".join(chr(draw.randint(*draw.choice(planes))) for _ in range(length))


def draw_query(draw: random.Random, titles: list[str], item_ids: list[int]) -> bytes:
    """The body of `/v1/recommend`: a history of titles, ids and texts, now and then more."""

    def entry() -> Any:
        kind = draw.random()
        if kind < 0.3:
            return draw.choice(titles)
        if kind < 0.5:
            return draw.choice(item_ids)
        if kind < 0.99:
            return draw_text(draw, 600)
        return draw.choice([*NUMBERS, None, True, [], {}, ""])

    query: dict[str, Any] = {
        "client": "c0",
        "history": [entry() for _ in range(draw.randint(0, 12))],
    }
    if draw.random() < 0.1:
        query["client"] = draw_text(draw, 80)
    if draw.random() < 0.2:
        query["k"] = draw.choice([5, *NUMBERS])
    if draw.random() < 0.1:
        query["candidates"] = [draw.choice([*item_ids, *NUMBERS]) for _ in range(3)]
    if draw.random() < 0.1:
        query["filters"] = {"categories": [draw_text(draw, 20)]}
    body = json.dumps(query, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.05:  # cut anywhere, or a byte more
        at = draw.randrange(len(body))
        return body[:at] if draw.random() < 0.5 else body[:at] + b"\xc3" + body[at:]
    return body
