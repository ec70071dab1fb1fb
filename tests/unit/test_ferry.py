"""The ferry: who waits together crosses together, and one who gives up or fails stays alone."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch

from fellray.platform.errors import FellrayError
from fellray.serve.ends import Crossing, Ends, Question
from fellray.serve.ferry import Ferry
from fellray.serve.ranking import Choice, Ranking


class Sides:
    """Ends and trunk that only count; a learner called `gone` cannot be read."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.asked = self.loaded = 0
        self.free = threading.Event()
        self.free.set()

    def rise(self, questions: Sequence[Question]) -> list[tuple[Crossing, int] | Exception]:
        self.free.wait(10)
        self.batches.append([question.choice.k for question in questions])
        good = [question for question in questions if question.learner != "gone"]
        crossing = Crossing(cast(Any, good), good, cast(Any, None), [])
        places = iter(range(len(good)))
        return [
            FellrayError("gone") if q.learner == "gone" else (crossing, next(places))
            for q in questions
        ]

    def finish(self, crossing: Crossing, output: np.ndarray) -> list[Ranking]:
        return [Ranking(np.array([q.choice.k]), np.zeros(1)) for q in crossing.questions]

    async def forward(self, activation: Any) -> np.ndarray:
        await asyncio.sleep(0.01)
        return np.zeros(len(activation))

    async def ready(self) -> bool:
        return True


def ask(k: int, learner: str = "c0") -> Question:
    return Question(
        0, learner, torch.zeros(3, dtype=torch.int64), None, cast(Any, None), 0, Choice(k)
    )


def test_who_waits_together_crosses_together() -> None:
    sides = Sides()
    ferry = Ferry(lambda: cast(Ends, sides), sides, rows=4)

    async def go() -> list[Any]:
        sides.free.clear()
        first = asyncio.create_task(ferry.rank(ask(1)))
        await asyncio.sleep(0.05)  # it is alone on the engine thread
        later = [asyncio.create_task(ferry.rank(ask(k))) for k in range(2, 8)]
        quits = asyncio.create_task(ferry.rank(ask(8)))
        lost = asyncio.create_task(ferry.rank(ask(9, "gone")))
        await asyncio.sleep(0.05)
        quits.cancel()
        sides.free.set()
        return await asyncio.gather(first, *later, quits, lost, return_exceptions=True)

    *found, quits, lost = asyncio.run(go())
    assert [ranking.items.tolist() for ranking in found] == [[k] for k in range(1, 8)]
    assert isinstance(quits, asyncio.CancelledError)
    assert isinstance(lost, FellrayError)
    assert sides.batches == [[1], [2, 3, 4, 5], [6, 7, 9]]
    assert ferry.totals()["crossings"] == 3
    # a further loop, as a command has
    assert asyncio.run(ferry.rank(ask(3))).items.tolist() == [3]
    ferry.close()


def test_a_trunk_that_is_gone_is_everybodys_error_and_the_next_crosses() -> None:
    sides = Sides()
    ferry = Ferry(lambda: cast(Ends, sides), sides, rows=4)

    async def refuse(activation: Any) -> np.ndarray:
        raise FellrayError("no trunk")

    async def go() -> None:
        forward, sides.forward = sides.forward, refuse  # type: ignore[method-assign]
        found = await asyncio.gather(*(ferry.rank(ask(k)) for k in (1, 2)), return_exceptions=True)
        assert [str(one) for one in found] == ["no trunk"] * 2
        sides.forward = forward  # type: ignore[method-assign]
        assert (await ferry.rank(ask(5))).items.tolist() == [5]

    asyncio.run(go())
    ferry.close()


def test_an_end_that_breaks_is_told_to_all_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = Sides()
    ferry = Ferry(lambda: cast(Ends, sides), sides, rows=4)

    def fail(questions: Sequence[Question]) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(sides, "rise", fail)
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(ferry.rank(ask(1)))
    ferry.close()
