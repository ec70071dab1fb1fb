"""What the command says after a training: the report, a next step that works, its status."""

from pathlib import Path
from typing import Any

import pytest

from fellray.jobs import cli
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
    monkeypatch.setattr("sys.argv", ["fellray", "train", config, "storage=runs"])
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
