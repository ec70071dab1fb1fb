"""What a study's page says of the rows for orientation: item-kNN, BPR-MF, SASRec.

It must not know how they were trained, nor what else is on the page.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fellray.platform.words import ORIENTATION

Central = Mapping[str, Mapping[str, Any]]
"""Row -> `settings`, `tried`, `seeds` (what each came to) and the `command` that makes it."""
EXPLAINED = (
    "For orientation, since no method may see data so: "
    + "; ".join(f"{row}: {what}" for row, what in ORIENTATION.items())
    + ". Settings are chosen on validation, in as many tries as an arm has at most."
)
"""Words below the tables."""


def list_values(found: Mapping[str, Any], metric: str) -> list[float]:
    """A row's value for each seed; `balance/min` and the like are over clients."""
    kind, slash, key = metric.partition("/")
    values = (own[kind].get(key) if slash else own["test"].get(metric) for own in found["seeds"])
    return [float(value) for value in values if value is not None]


def tell_choice(found: Mapping[str, Any]) -> str:
    """What tuning chose, of the settings in which the tries differ."""
    tried = [own["settings"] for own in found["tried"]]
    return ", ".join(
        f"{key} {value}"
        for key, value in found["settings"].items()
        if any(own[key] != value for own in tried)
    )


def tell_central(central: Central, metric: str, arms: Sequence[float]) -> str:
    """A sentence for the top of the page. Args: arms: each arm's mean."""
    means = {row: fmean(list_values(found, metric)) for row, found in central.items()}
    if not means:
        return ""
    best = max(means, key=lambda row: means[row])
    above = sum(mean > means[best] for mean in arms)
    told = ", ".join(f"{row} {mean:.4f}" for row, mean in means.items())
    place = f"{above} of {len(arms)} arms are above {best}"
    return f" With everybody's data in one place: {told}; {place}."


def digest_central(found: Mapping[str, Any]) -> str:
    """Twelve digits that stand for every score that was given in the test."""
    told = json.dumps([own["hash"] for own in found["seeds"]])
    return hashlib.sha256(told.encode()).hexdigest()[:12]
