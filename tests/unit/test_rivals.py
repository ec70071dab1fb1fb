"""That a rival's job is our training: the same rows, the same start, the same losses and adapters.

The frameworks themselves are not installed here; what their clients compute is.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs import rivals
from fellray.jobs.plain_learner import Job
from fellray.jobs.process_tree import Watch, list_tree, read_cpu, read_pss
from fellray.jobs.rival_job import export_rival_job, rank, to_rival_order
from fellray.jobs.tiny_encoder import make_encoder
from fellray.platform.config import RunConfig
from fellray.platform.encoder import load_backbone, load_tokenizer, tokenize
from fellray.platform.errors import FellrayError
from fellray.platform.rounds import Rounds
from fellray.platform.storage import Storage

Play = Callable[..., Any]


def _export(config: RunConfig, folder: Path, per_round: int) -> Job:
    sampling = config.sampling.model_copy(update={"per_round": per_round})
    export_rival_job(config.model_copy(update={"sampling": sampling}), folder, cores=1)
    return Job(str(folder))


def test_a_plain_learner_trains_what_our_clients_train(
    tiny_config: Callable[..., RunConfig], play: Play, tmp_path: Path
) -> None:
    """Two rounds of FedAvg: each client's loss, and the mean that everybody gets."""
    config = tiny_config(method={"kind": "fedavg"}, train={"rounds": 2})
    job = _export(config, tmp_path / "job", per_round=5)
    played = play(config)
    theta_P = job.start_P
    for t in (1, 2):
        ours = played.losses(t)
        assert tuple(job.cohorts[t - 1]) == tuple(ours)
        trained = {client: job.train(theta_P, client, t) for client in ours}
        gaps = [abs(ours[client] - loss) for client, (_, loss) in trained.items()]
        assert max(gaps) < 1e-5 * 10 ** (t - 1)
        theta_P = np.mean([theta for theta, _ in trained.values()], axis=0, dtype=np.float64)
        theta_P = theta_P.astype(np.float32)
        held = played.rounds.load(t, ["c0"], ["client.values", "trunk.values"])
        ours_P = torch.cat([held["client.values"][0], held["trunk.values"][0]])
        ours_P = to_rival_order(config, survey(config), ours_P)
        moved = np.abs(theta_P - job.start_P).max()
        assert moved > 0.01
        assert np.abs(ours_P.numpy() - theta_P).max() < 0.01 * moved * 10 ** (t - 1)


def test_a_cohort_has_the_rows_of_its_rounds_and_no_others(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tiny_config(method={"kind": "fedavg"}, train={"rounds": 3})
    job = _export(config, tmp_path, per_round=2)
    clients = {c for cohort in job.cohorts for c in cohort}
    assert {p.stem for p in (tmp_path / "clients").iterdir()} == clients
    for t, cohort in enumerate(job.cohorts, 1):
        assert len(cohort) == 2
        for client in cohort:
            (ids_NT, lengths_N, target_N), _ = job.read(client, t)
            assert len(ids_NT) == len(lengths_N) == len(target_N) == 12
            assert ((ids_NT != 0).sum(1) == lengths_N).all()  # 0 is this model's padding
    absent = next(c for c in clients if c not in job.cohorts[0])
    with pytest.raises(KeyError, match=r"1\.lengths_N"):
        job.read(absent, 1)


def test_ranking_is_the_plants(
    tiny_config: Callable[..., RunConfig], play: Play, tmp_path: Path
) -> None:
    config = tiny_config(method={"kind": "fedavg"}, train={"rounds": 1})
    play(config)
    world = survey(config)
    rounds = Rounds(Storage(config.storage).sub(config.name))
    with Plant.inline(config, world, rounds) as plant:
        expected = plant.evaluate(1, 2)
    held = rounds.load(1, ["c0"], ["client.values", "trunk.values"])
    ours_P = torch.cat([held["client.values"][0], held["trunk.values"][0]])
    assert rank(config, world, to_rival_order(config, world, ours_P)) == expected
    start_P = _export(config, tmp_path, 5).start_P
    assert rank(config, world, torch.from_numpy(start_P)) != expected


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("train.clip", {"train": {"clip": 1.0}}),
        ("train.moments", {"train": {"moments": "keep"}}),
        ("train.share", {"train": {"share": "trunk_only"}}),
        ("server.shared_adapter", {"server": {"shared_adapter": True}}),
        ("method", {"method": {"kind": "fedavg", "weighting": "samples"}}),
    ],
)
def test_what_a_plain_learner_lacks_is_refused(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, name: str, changed: dict[str, Any]
) -> None:
    config = tiny_config(**({"method": {"kind": "fedavg"}} | changed))
    with pytest.raises(FellrayError, match=name):
        export_rival_job(config, tmp_path / "job", cores=1)
    assert not (tmp_path / "job").exists()


def _found(losses: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {
        "losses": list(losses),
        "stamps": [100.0, 109.0, 110.0, 114.0, 116.0][: len(losses) + 1],
        "later_cpu_s": 0.5,
        "peak_pss_bytes": 3 * 2**20,
        "processes": 4,
        "load_average": [0.1, 0.2],
    }


def test_figures_of_an_arm() -> None:
    losses = [{"a": 3.0, "b": 1.0}] * 3 + [{"a": 2.0, "b": 1.0}]
    figures = rivals.summarize(_found(losses), 4, 0.5)
    assert figures["first_round_s"] == 9.0
    assert figures["round_s"] == 2.0
    assert figures["round_s_range"] == [1.0, 4.0]
    assert figures["updates_per_s"] == 1.0
    assert figures["cpu_ms_per_update"] == 250.0
    assert figures["peak_pss_mib"] == 3.0
    assert (figures["last_loss"], figures["ndcg@10"], figures["busy"]) == (1.5, 0.5, False)
    cut_short = rivals.summarize(_found(losses[:1]), 4, 0.5)
    assert (cut_short["last_loss"], cut_short["ndcg@10"], cut_short["round_s"]) == (None, None, 9.0)


def test_differences_of_losses() -> None:
    ours = _found([{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}])
    theirs = _found([{"b": 2.25, "a": 1.0}, {"a": 1.5, "b": 2.0}, {"a": 9.0, "b": 9.0}])
    assert rivals.compare_losses(ours, theirs) == {"round_1": 0.25, "any_round": 0.5, "rounds": 2}
    with pytest.raises(AssertionError, match="other clients"):
        rivals.compare_losses(ours, _found([{"a": 1.0, "c": 2.0}]))


def test_a_rival_gets_no_path_to_this_package(tmp_path: Path) -> None:
    script = (
        "import json, os, pathlib; pathlib.Path('flower.json').write_text(json.dumps("
        "{'python': [n for n in os.environ if n.startswith('PYTHON')], 'stamps': [0, 1]}))"
    )
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        found = rivals.run_arm("flower", [sys.executable, "-c", script], tmp_path)
    finally:
        os.chdir(before)
    assert found["python"] == []


def test_a_failed_arm_names_its_log(tmp_path: Path) -> None:
    (tmp_path / "flower.json").write_text("{}")  # of an earlier run
    with pytest.raises(FellrayError, match=r"ended with 3; see .*flower\.log"):
        rivals.run_arm("flower", [sys.executable, "-c", "print('why'); exit(3)"], tmp_path)
    assert (tmp_path / "flower.log").read_text() == "why\n"
    with pytest.raises(FellrayError, match="ended with 0"):  # but wrote nothing
        rivals.run_arm("flower", [sys.executable, "-c", ""], tmp_path)


def test_a_process_tree_is_weighed() -> None:
    grandchild = """
held = bytearray(b"x" * 2**26)
print("up", flush=True)
while True:
    pass
"""
    child = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]);p.wait()"
    )
    command = [sys.executable, "-c", child, grandchild]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        tree = list_tree(process.pid)
        assert tree[0] == process.pid
        assert len(tree) == 2
        assert read_pss(tree[1]) > 2**26
        with Watch(process.pid, every_s=0.01) as watch:
            began, used = time.perf_counter(), read_cpu(tree[1])
            assert used is not None
            while (
                now := read_cpu(tree[1]) or 0.0
            ) < used + 0.3 and time.perf_counter() < began + 60:
                time.sleep(0.01)
            ended = time.perf_counter()
            time.sleep(0.05)
        assert watch.peak_bytes > 2**26
        assert watch.processes == 2
        assert watch.cpu_between(began, ended) == pytest.approx(now - used, abs=0.15)
        assert watch.cpu_between(began, began) == 0
        os.kill(tree[1], 9)
    assert list_tree(process.pid) == [process.pid]
    assert read_pss(process.pid) == 0
    assert read_cpu(process.pid) is None


def test_a_small_encoder_knows_its_words_and_is_the_same_every_time(tmp_path: Path) -> None:
    texts = ["Alien (1979)", "Blade Runner; the cut"]
    folders = [make_encoder(tmp_path / n, texts, 2, 32, 48, seed=7) for n in ("a", "b")]
    other = make_encoder(tmp_path / "c", texts, 2, 32, 48, seed=8)
    a, b, c = (load_backbone(str(folder)) for folder in (*folders, other))
    assert a.sha256 == b.sha256 != c.sha256
    assert (a.num_blocks, a.dim) == (2, 32)
    tokenizer = load_tokenizer(str(folders[0]))
    tokens = tokenize(tokenizer, texts, 48)
    assert tokenizer.unk_token_id not in tokens.ids
    assert tokens.pad == 0
    assert np.diff(tokens.offsets).tolist() == [5, 6]


def test_a_job_is_plain_json(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(method={"kind": "fedavg"}, train={"rounds": 1})
    _export(config, tmp_path, per_round=2)
    facts = json.loads((tmp_path / "job.json").read_text())
    assert facts["clients"] == ["c0", "c1", "c2", "c3", "c4"]
    assert facts["sites"][0] == {
        "path": "encoder.layer.0.attention.self.query",
        "shape": [32, 32],
    }
    assert len(facts["sites"]) == 10
