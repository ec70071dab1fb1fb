"""The page of a run on attributes: what it was given, in words that hold."""

import copy
from typing import Any

import numpy as np
import pytest
from test_report import EVIL, check

from fellray.platform.attribute_page import render_attributes
from fellray.platform.click_score import NOTHING, score_users
from fellray.platform.words import CLICK_METRICS, name_metric


def metric_values(auc: float) -> dict[str, float]:
    return dict.fromkeys(CLICK_METRICS, 0.3) | {"auc": auc, "gauc": auc - 0.1}


def a_run(rounds: int = 3) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    bins = [
        {"foretold": 0.05, "clicked": 0.01, "samples": 200},
        {"foretold": 0.55, "clicked": 0.6, "samples": 1},
    ]
    summary: dict[str, Any] = {
        "run": "taps",
        "method": "fedpa",
        "seed": 4,
        "rounds": rounds,
        "best_round": min(2, rounds),
        "clients": 8,
        "test": metric_values(0.7),
        "validation": metric_values(0.71),
        "untrained": metric_values(0.6),
        "embedding_only": metric_values(0.72),
        "reliability": {"test": bins, "untrained": bins[:1]},
        "adapter_norms": {"user.A": 2.0, "user.B": 0.25, "group.A": 1.5, "group.B": 0.0},
        "groups": {"age": 2},
        "group_sizes": {"age": {":other": 3, "=18-30": 5}},
        "bytes": {"adapter_up": 2048, "loss": 96},
        "privacy": {"mechanism": "none", "statement": "", "stopped_before": None},
        "hashes": {"u1": "ab" * 32},
        "data": {"path": "data/taps", "sha256": "cd" * 32},
        "environment": {"torch": "2.13"},
        "events": [],
    }
    metrics = [
        {
            "round": number,
            "validation": metric_values(0.6 + number / 100),
            "loss": 0.7 - number / 100 if number else None,
            "losses": {"u1": 0.7, "u2": 0.6} if number else {},
            "seconds": 1.0,
            "bytes": 1024,
        }
        for number in range(rounds + 1)
    ]
    return summary, metrics, {"name": "taps"}


def test_a_run_shows_what_it_was_given() -> None:
    page = check(render_attributes(*a_run()))
    assert page.row("AUC") == ["0.7000", "0.7200", "0.6000", "0.7100"]
    assert page.row("GAUC") == ["0.6000", "0.6200", "0.5000", "0.6100"]
    assert page.row("Log loss")[0] == "0.3000"
    assert "-0.0200 against private user embeddings alone, nothing sent (0.7200)" in page.text
    assert "+0.1000 against the pre-trained start, before the first round (0.6000)" in page.text
    assert "ranked no better" not in page.text
    assert "best round 2" in page.text
    assert page.row("2")[:3] == ["0.6800", "0.6200", "0.5200"]
    assert page.row("0.0–0.1") == ["0.0100", "200", "0.0100", "200"]
    assert page.row("0.5–0.6") == ["0.6000", "1", "–", "0"]
    assert page.row("user") == ["2", "0.25"]
    assert page.row("all others") == ["3"]
    assert page.row("18-30") == ["5"]
    assert page.row("loss") == ["96 B", "96", "4.5%", "16 B"]
    assert "Nothing was noised" in page.text
    assert "is not protected further" in page.text
    assert "the output layer as it trained them, and its loss;" in page.text
    assert "trunk" not in page.text
    drawings = [own for tag, own in page.tags if tag == "svg" and own.get("role") == "img"]
    assert len(drawings) == 4


def test_what_does_not_help_is_said() -> None:
    summary, *rest = a_run()
    summary["adapter_norms"] = {"user.A": 0.0, "user.B": 0.0}
    summary["untrained"]["gauc"] = 0.6
    summary["embedding_only"] = metric_values(0.70001)
    summary["privacy"] = {"mechanism": "gaussian", "statement": "a bound", "epsilon": 3.5}
    page = check(render_attributes(summary, *rest))
    assert "no adapter does anything" in page.text
    assert "ranked no better than before training" in page.text
    assert "level with private user embeddings alone" in page.text
    assert "A bound." in page.text
    assert "Nothing was noised" not in page.text


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ({"mechanism": "gaussian", "loss_clip": None}, "clipped and noised, and no loss;"),
        ({"mechanism": "gaussian", "loss_clip": 2.0}, "clipped and noised, and its loss noised;"),
        ({"mechanism": "paper_like"}, "with noise, and its loss without;"),
    ],
)
def test_under_privacy_the_page_says_what_is_sent_then(privacy: dict[str, Any], words: str) -> None:
    summary, *rest = a_run()
    summary["privacy"] = {"statement": "a bound", **privacy}
    page = check(render_attributes(summary, *rest))
    assert words in page.text
    assert "is not protected further" not in page.text
    assert "Noise is on what training sends and on nothing else" in page.text
    assert "A user's own rows and adapters are in no message" in page.text


@pytest.mark.parametrize("missing", ["reliability", "group_sizes", "embedding_only", "bytes"])
def test_parts_of_the_summary_may_be_missing(missing: str) -> None:
    summary, *rest = a_run(0)
    del summary[missing]
    check(render_attributes(summary, *rest))


def test_every_text_is_escaped_and_nothing_is_touched() -> None:
    summary, metrics, _ = a_run()
    summary |= {"run": EVIL, "group_sizes": {EVIL: {f"={EVIL}": 1}}, "events": [EVIL]}
    given = copy.deepcopy((summary, metrics, {EVIL: EVIL}))
    html = render_attributes(*given)
    check(html)
    assert html == render_attributes(summary, metrics, {EVIL: EVIL})
    assert given == (summary, metrics, {EVIL: EVIL})


def test_reliability_by_hand() -> None:
    logits = np.log([0.11 / 0.89, 0.19 / 0.81, 0.19 / 0.81, 0.95 / 0.05])
    (score,) = score_users(logits, np.array([0, 1, 0, 1]), np.zeros(4, np.int64), 1)
    low, high = score.reliability()
    assert (low["samples"], high["samples"]) == (3, 1)
    assert low["foretold"] == pytest.approx(0.49 / 3, abs=1 / 4096)
    assert low["clicked"] == pytest.approx(1 / 3)
    assert high["clicked"] == 1.0
    assert NOTHING.reliability() == []


def test_metrics_have_the_fields_names() -> None:
    assert [name_metric(m) for m in ("auc", "gauc", "log_loss", "ece", "ndcg@10", "recall@5")] == [
        *("AUC", "GAUC", "Log loss", "ECE", "NDCG@10", "Recall@5")
    ]
