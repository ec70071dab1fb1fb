"""A replay: a round in which an actor was lost, or a page is damaged, is done again.

What is to be done is decided elsewhere (`platform/faults.py`, `platform/mending.py`); this file
does it. It must not know what a round is, nor what its actors hold.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from fellray.platform.errors import FellrayError
from fellray.platform.faults import Stop, decide
from fellray.platform.messages import Damaged, StaleLease

Answer = TypeVar("Answer")


def replay(
    work: Callable[[], Answer],
    mend: Callable[[Damaged], list[str]],
    forget: Callable[[], None],
    events: list[str],
) -> Answer:
    """Do the work; where something was lost or damaged in it, everyone goes back to its start and
    it is done again.

    Args:
        mend: decides on a damaged file: what was decided, in words, or nothing where it is whole by
            now; raises what it cannot decide.
        forget: everyone goes back.
        events: what happened is added, in words.

    Raises:
        FellrayError: it was lost too often, or what is damaged cannot be replaced.
    """
    tries = 1
    while True:
        mended: list[str] = []
        damaged = False
        try:
            return work()
        except StaleLease as lost:
            reason = str(lost)
        except Damaged as damage:
            damaged, reason = True, str(damage)
            mended = mend(damage)
        events += mended
        if not mended:  # whoever decides finds new damage each time, so that it has an end
            decision = decide(tries, False, reason, damaged)
            if isinstance(decision, Stop):
                raise FellrayError(f"{decision.reason}; `fellray train` resumes the run")
            events.append(f"the round was begun again: {reason}")
            time.sleep(decision.pause_s)
            tries += 1
        forget()
