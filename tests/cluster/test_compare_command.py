"""`fellray compare` with methods and seeds, by the real command; what is trained already stays."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
from driver import Driver

from fellray.platform import config as configs
from fellray.platform.config import RunConfig

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]
RUNS = {"fellrec": ["tiny", "tiny-fellrec-s1"], "local": ["tiny-local-s0", "tiny-local-s1"]}


def test_methods_are_set_side_by_side(
    tiny_config: Callable[..., RunConfig], launch: Callable[..., Driver], tmp_path: Path
) -> None:
    config = tiny_config(train={"rounds": 2})
    path = tmp_path / "tiny.yaml"
    path.write_text(configs.dump(config))
    storage = Path(config.storage)

    def compare() -> str:
        asked = ("compare", str(path), "--methods", ",".join(RUNS), "--seeds", "0,1")
        status, out, err = launch("-m", "fellray.jobs.cli", *asked).finish(600)
        assert status == 0, out + err
        return out

    out = compare()
    summaries = {
        method: [json.loads((storage / run / "summary.json").read_text()) for run in runs]
        for method, runs in RUNS.items()
    }
    table = json.loads((storage / "tiny-compare" / "compare.json").read_text())
    assert set(table) == {"popularity", "prior", "untrained", *RUNS}
    for method, seeds in summaries.items():
        assert table[method]["ndcg@10"]["values"] == [one["test"]["ndcg@10"] for one in seeds]
        assert table[method]["ndcg@10"]["mean"] == fmean(one["test"]["ndcg@10"] for one in seeds)
    best = "; ".join(
        f"{method} {', '.join(str(one['best_round']) for one in seeds)}"
        for method, seeds in summaries.items()
    )
    assert f"by seed: {best}\n" in out
    assert best in (storage / "tiny-compare" / "compare.html").read_text()

    written = {p: p.stat().st_mtime_ns for p in storage.glob("*/rounds/**/*") if p.is_file()}
    assert written
    compare()
    assert {
        p: p.stat().st_mtime_ns for p in storage.glob("*/rounds/**/*") if p.is_file()
    } == written
