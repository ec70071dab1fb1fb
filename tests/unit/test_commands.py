"""What commands say: after a training the report, a next step that works, their status."""

import json
from pathlib import Path
from typing import Any

import pytest

import fellray
from fellray.jobs import cli
from fellray.jobs.console import SHOWN_CLIENTS
from fellray.jobs.finish import SPENT
from fellray.platform import config as configs
from fellray.platform.words import CLICK_METRICS

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("recall@10", "ndcg@10", "mrr@10", "recall@20", "coverage@10")
RANKED: dict[str, Any] = {
    "run": "demo",
    "method": "fellrec",
    "best_round": 1,
    "per_client": {"c0": {}},
    "privacy": {"mechanism": "none", "stopped_before": None},
    **{row: dict.fromkeys(METRICS, 0.1) for row in ("popularity", "prior", "untrained", "test")},
}
CLICKED: dict[str, Any] = {
    "run": "clicks",
    "method": "fedpa",
    "best_round": 1,
    "adapter_norms": {"user.B": 0.5},
    "test": dict.fromkeys(CLICK_METRICS, 0.7),
}


def told(
    summary: dict[str, Any],
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[str, object]:
    """What `fellray train` prints where the training ends with this summary, and its status."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("fellray.jobs.train.train", lambda _: summary)
    return run(["train", config, "storage=runs"], monkeypatch, capsys)


def run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, object]:
    """What the command prints, and its status."""
    monkeypatch.setattr("sys.argv", ["fellray", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return capsys.readouterr().out, ended.value.code


@pytest.mark.parametrize("generative", [False, True])
def test_the_next_command_takes_the_run(
    generative: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = RANKED | {"model": {"generative": generative}}
    out, status = told(summary, "jobs/demo.yaml", monkeypatch, capsys)
    assert status == 0
    name = configs.load("jobs/demo.yaml", []).name
    assert f"Report: runs/{name}/report.html" in out
    assert ("Next: fellray recommend" in out) != generative
    assert (f"Next: fellray evaluate runs/{name}" in out) == generative


def test_a_run_on_attributes_names_its_report_and_ends_with_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stopped, wanted in ((None, 0), (3, SPENT)):
        summary = CLICKED | {"privacy": {"mechanism": "none", "stopped_before": stopped}}
        out, status = told(summary, "jobs/fedpa.yaml", monkeypatch, capsys)
        assert status == wanted
        assert "Report: runs/fedpa/report.html" in out
        assert "Next" not in out


def test_which_version_this_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--version"], monkeypatch, capsys) == (f"fellray {fellray.__version__}\n", 0)


def test_an_evaluation_is_for_a_person_or_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clients: dict[str, dict[str, float]] = {
        f"c{i:02d}": dict.fromkeys(METRICS, (50 - i) / 300) for i in range(SHOWN_CLIENTS + 2)
    }
    clients["c00"] = {}  # no users in this part
    scores = {
        "run": "demo",
        "round": 3,
        "split": "test",
        "pooled": dict.fromkeys(METRICS, 1 / 3),
        "per_client": clients,
        "balance": {"mean": 2 / 3, "cv": 0.25, "jain": 0.5, "min": 0.1},
    }
    monkeypatch.setattr("fellray.jobs.evaluate.evaluate", lambda *_: scores)
    out, status = run(["evaluate", "runs/demo", "--json"], monkeypatch, capsys)
    assert (json.loads(out), status) == (scores, 0)
    out, status = run(["evaluate", "runs/demo"], monkeypatch, capsys)
    assert status == 0
    first, *rows = [
        [c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line
    ]
    assert first == ["all users", *["0.3333"] * len(METRICS)]
    assert [row[0] for row in rows] == ["c00", *(f"c{i:02d}" for i in range(21, 2, -1))]
    assert rows[0][1:] == ["–"] * len(METRICS)
    assert rows[1][1:] == ["0.0967"] * len(METRICS)
    assert "the lowest 20 of 22 clients by NDCG@10" in out
    assert "mean of clients 0.6667, standard deviation / mean 0.2500" in out
