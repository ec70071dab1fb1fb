"""A study by the real command, twice at once, on rankings and clicks; then nothing is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from attribute_clicks import make_config, write_source
from driver import Driver

from fellray.jobs.attributes import prepare_attributes
from fellray.platform import config as configs
from fellray.platform.config import RunConfig
from fellray.platform.run_list import list_runs

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1500)]
ARMS = {
    "ranked": ("fellrec", "fedavg"),
    "clicks": ("corrected", "published"),
}


def read_tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with the time it was written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def write_config(config: RunConfig, method: tuple[str, ...]) -> str:
    """Of its method only what is named, so that arms can change the rest."""
    tree = json.loads(configs.dump(config))
    tree["method"] = {key: tree["method"][key] for key in method}
    path = Path(config.storage) / f"{config.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def compare(launch: Callable[..., Driver], study: Path) -> tuple[int, str, str]:
    return launch("-m", "fellray.jobs.cli", "compare", str(study)).finish(700)


def test_a_study_over_rankings_and_clicks(
    tiny_config: Callable[..., RunConfig],
    launch: Callable[..., Driver],
    tmp_path: Path,
) -> None:
    clicks = make_config(
        write_source(tmp_path / "source"),
        tmp_path / "config",
        name="clicks",
        train={"rounds": 1},
        clients={"per_actor": 21, "cpus": 0.5},
    )
    prepare_attributes(clicks)
    ranked = tiny_config(name="ranked", train={"rounds": 1}, clients={"per_actor": 3})
    tree: dict[str, Any] = {
        "study": "both",
        "storage": str(tmp_path / "runs"),
        "results": str(tmp_path / "page" / "results.md"),
        "seeds": [0, 1],
        "sets": {
            "ranked": {"config": write_config(ranked, ())},
            "clicks": {"config": write_config(clicks, ("kind", "groups", "rank", "gate_dim"))},
        },
        "parts": [
            {
                "title": "Methods",
                "sets": ["ranked"],
                "arms": {"fellrec": [], "fedavg": ["method.kind=fedavg"]},
            },
            {
                "title": "FedPA",
                "sets": ["clicks"],
                "metric": "auc",
                "columns": ["gauc"],
                "arms": {
                    "corrected": ["method.as_published=false"],
                    "published": ["method.as_published=true"],
                },
            },
        ],
    }
    study = tmp_path / "study.yaml"

    misspelt = {**tree["parts"][1], "arms": {"corrected": [], "odd": ["method.as_publised=true"]}}
    study.write_text(
        yaml.safe_dump(tree | {"parts": [tree["parts"][0], misspelt]}, sort_keys=False)
    )
    status, out, err = compare(launch, study)
    assert status == 2, err
    assert "arm 'odd' on clicks" in err
    assert "as_publised" in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists(), out
    assert not (tmp_path / "page").exists()

    study.write_text(yaml.safe_dump(tree, sort_keys=False))
    command = ("-m", "fellray.jobs.cli", "compare", str(study))
    ends = [one.finish(900) for one in [launch(*command), launch(*command)]]
    assert min(status for status, _, _ in ends) == 0, ends
    for status, _, err in ends:
        assert status == 0 or "both-study: locked by process" in err, err
    taken = [out.count("fellray train") - out.count("another process trains") for _, out, _ in ends]
    assert sum(taken) == 8, ends
    assert min(taken) > 0
    states = {row[0]: row for row in list_runs(str(tmp_path / "runs"))}
    assert set(states) == {
        f"both-{name}-{arm}-s{seed}"
        for name, arms in ARMS.items()
        for arm in arms
        for seed in (0, 1)
    }
    assert {row[-1] for row in states.values()} == {"finished"}
    written = read_tree(tmp_path / "page")
    assert set(written) == {"results.md", "results-1-ranked.svg", "results-2-clicks.svg"}
    page = written["results.md"][1].decode()
    for name, arms in ARMS.items():
        title, metric = ("FedPA", "AUC") if name == "clicks" else ("Methods", "NDCG@10")
        assert f"- **{title}, {name}**, {metric}: `{arms[0]}`" in page
        assert page.count(f"name=both-{name}-{arms[1]}-s1") == 1
    assert "| `published` | 0." in page
    assert "GAUC, test" in written["results-2-clicks.svg"][1].decode()
    trained = read_tree(tmp_path / "runs")
    assert len([name for name in trained if name.endswith("/report.html")]) == 8

    status, out, err = compare(launch, study)
    assert status == 0, err
    assert "fellray train" not in out
    again = read_tree(tmp_path / "runs")
    assert again.keys() == trained.keys()
    held, listed = "both-study/locks/page", "both-study/study.json"
    assert {n for n in again if again[n][1] != trained[n][1]} <= {held}
    touched = {n for n in again if again[n][0] != trained[n][0]}
    assert touched <= {held, listed}, "nothing is trained"
    pages = read_tree(tmp_path / "page")
    assert {n: content for n, (_, content) in pages.items()} == {
        n: content for n, (_, content) in written.items()
    }
