"""The doctor: real surroundings, a real engine, and what they come to."""

import os
import sys
from pathlib import Path

import pytest

from fellray.jobs import cli
from fellray.jobs.doctor import check_engine, count_clients, examine, read_memory
from fellray.platform.config import RunConfig, parse

TORCH = {"server": {"engine": "torch"}}


@pytest.mark.long
def test_deepspeed_starts_without_a_compiler(tmp_path: Path) -> None:
    finding = check_engine(RunConfig(), {**os.environ, "PATH": str(tmp_path)})
    assert (finding.status, finding.way_out) == ("ok", ""), finding


@pytest.mark.long
def test_a_deepspeed_that_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text("raise ImportError('libaio is too old [here]')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    finding = check_engine(RunConfig(), {**os.environ, "PYTHONPATH": path})
    assert finding.status == "broken"
    assert "ImportError: libaio is too old [here]" in finding.found
    assert "server.engine=torch" in finding.way_out


def test_a_deepspeed_that_takes_too_long() -> None:
    finding = check_engine(RunConfig(), os.environ, limit_s=0.05)
    assert (finding.status, finding.found) == ("broken", "has not started after 0.05 s")


def test_an_engine_that_is_not_used_is_not_started() -> None:
    assert check_engine(parse(TORCH, "test"), {}, limit_s=0.0).status == "ok"


def test_clients_are_counted(tiny_data: Path, tmp_path: Path) -> None:
    here = {"path": str(tiny_data), "partition": {"kind": "per_user"}}
    assert count_clients(parse({"data": here}, "test")) == 5
    assert count_clients(parse({"data": here, "method": {"kind": "central"}}, "test")) == 1
    gone = {"path": str(tmp_path), "partition": {"num_clients": 9}}
    assert count_clients(parse({"data": gone}, "test")) == 9
    gone = {"path": str(tmp_path), "partition": {"kind": "per_user"}}
    assert count_clients(parse({"data": gone}, "test")) is None


@pytest.mark.parametrize(
    ("limit", "used", "wanted"),
    [(None, 0, (3000, 4000)), ("max", 5, (3000, 4000)), (2048_000, 1024_000, (1000, 2000))],
)
def test_a_container_has_less_memory(
    limit: object, used: int, wanted: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal: 4000 kB\nMemAvailable: 3000 kB\nHugePages: 0\n"
    )
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    if limit is not None:
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
    assert read_memory(tmp_path) == (wanted[0] * 1024, wanted[1] * 1024)


def test_this_machine_is_examined(tmp_path: Path) -> None:
    findings = examine(parse({**TORCH, "storage": str(tmp_path / "runs")}, "test"))
    names = [one.check for one in findings]
    assert len(names) == len(set(names)) == 15
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("storage", "status"), [("{}/runs", 0), ("{}/mine.yaml/runs", 1)])
def test_the_command(
    storage: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Warnings, which a busy machine has, do not count."""
    config = tmp_path / "mine.yaml"
    config.write_text(f"storage: {storage.format(tmp_path)}\nclients: {{per_actor: 5}}\n")
    monkeypatch.setattr(sys, "argv", ["fellray", "doctor", str(config), "server.engine=torch"])
    for name in [name for name in os.environ if name.startswith(("RAY_", "OMP_"))]:
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0) == status
    out = capsys.readouterr().out
    assert "what to do" in out
    assert f"{status} broken" in out
