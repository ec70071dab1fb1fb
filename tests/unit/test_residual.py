"""FedEx-LoRA: clients go on from the exact mean of their models, whoever computes with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from fellray.actors.client import Client
from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.train import one_round
from fellray.platform.aggregation import describe, name_layers, reduce
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.fedex_lora import FedExLora
from fellray.platform.host import TrunkHost
from fellray.platform.peft_export import export
from fellray.platform.run import open_run
from fellray.platform.server_step import RESIDUAL, Snapshot
from fellray.serve.args import Args
from fellray.serve.whole import open_whole

Make = Callable[..., RunConfig]
Play = Callable[..., Any]
FEDEX: dict[str, Any] = {
    "method": {"kind": "fedex_lora"},
    "train": {"rounds": 2, "learning_rate": 0.05},
}


def test_two_clients_by_hand() -> None:
    """Rank 1, two inputs, two outputs; the mean of two products has rank 2 and is met exactly."""
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    theta = torch.cat([a, b], 1)  # one A [1, 2] and B [2, 1] each
    blocks = {"q.lora_A": slice(0, 2), "q.lora_B": slice(2, 4)}
    method = FedExLora(weighting="samples")
    meta = describe(1, ["a", "b"], [1.0, 1.0], [1, 3], theta, theta, (), blocks)
    plan = method.plan(meta)
    assert plan.common
    assert plan.step is not None
    mixed = reduce(plan, theta)[:1]
    before = {f"{RESIDUAL}q": torch.tensor([[0.0, 0.5], [0.0, 0.0]])}
    new, state = plan.step.take(Snapshot(theta[:1], mixed, theta, blocks, 1), before)
    assert new.tolist() == [[0.25, 1.5, 1.75, 0.25]]
    # a quarter of [[1, 0], [1, 0]] and three of [[0, 4], [0, 0]]: [[.25, 3], [.25, 0]],
    # less [1.75, .25] x [.25, 1.5]: [[.4375, 2.625], [.0625, .375]], and what was there
    wanted = [[0.25 - 0.4375, 3 - 2.625 + 0.5], [0.25 - 0.0625, -0.375]]
    assert state[f"{RESIDUAL}q"].tolist() == wanted
    assert before[f"{RESIDUAL}q"].tolist() == [[0.0, 0.5], [0.0, 0.0]], "read, not written"


def first_client(plant: Plant) -> Client:
    member: Client = plant._clients.members[0]  # type: ignore[attr-defined]
    return member


def weights_of(plant: Plant) -> dict[str, torch.Tensor]:
    """Projection -> its frozen weight, as the actors in this process have it."""
    host: TrunkHost = plant._servers.pool.members[0]  # type: ignore[attr-defined]
    held = first_client(plant)._residual._held | host._residual._held
    return {path: module.base.weight.detach().clone() for path, (module, _) in held.items()}


def test_the_next_round_begins_with_the_mean_of_models(tiny_config: Make) -> None:
    config = tiny_config(
        **FEDEX,
        clients={"per_actor": 5},
        server={"engine": "torch"},
        evaluation={"every": 9},
    )
    world = survey(config)
    with (
        open_run(config, world.data_sha256) as run,
        Plant.inline(config, world, run.rounds) as plant,
    ):
        run.commit(0, plant.replayed(one_round, 0, config), plant.close_ledger(), [])
        public = weights_of(plant)
        before = dict.fromkeys(public, torch.zeros(()))
        for t in (1, 2):
            outcome = plant.replayed(one_round, t, config)
            ledger = plant.close_ledger()
            run.commit(t, outcome, ledger, [])
            plant.evaluate(t, 2, 1)
            now, reports = weights_of(plant), outcome.reports
            sent, scale = reports.theta_CP.double(), config.model.lora.scaling
            pages = plant._pages.load(t, plant.learners[:1])[0].double()
            moved = 0.0
            for name in name_layers(reports.blocks):
                a, b = (reports.blocks[f"{name}.lora_{letter}"] for letter in "AB")
                made = sent[:, b].unflatten(1, (-1, 2)) @ sent[:, a].unflatten(1, (2, -1))
                wanted = public[name] + before[name] + scale * made.mean(0)
                kept = pages[b].unflatten(0, (-1, 2)) @ pages[a].unflatten(0, (2, -1))
                torch.testing.assert_close(
                    now[name] + scale * kept, wanted, atol=1e-6, rtol=1e-5, check_dtype=False
                )
                moved += float((now[name] - public[name]).norm())
                before[name] = now[name].double() - public[name]
            assert moved > 1e-3, "the residual is no rounding"
            paid = [row.bytes for row in ledger if row.kind == "residual_down"]
            outer = len(first_client(plant)._residual._held) * world.backbone.dim**2 * 4
            assert paid == ([] if t == 1 else [outer] * 5), "the first round has none"
        found = plant.evaluate(2, 2)
        plant.evaluate(0, 2, 1)
        assert all(torch.equal(weights_of(plant)[n], public[n]) for n in public), "and back"
        (desk,) = first_client(plant)._crews._sit(tuple(plant.learners))[:1]
        learner = plant.learners[0]
        folder = export(run, 2, [learner])[0]
        base = AutoModel.from_pretrained(Path(folder).parents[1] / "base")
        whole = peft.PeftModel.from_pretrained(base, folder).eval()
        public_base = AutoModel.from_pretrained(config.model.name)
        other = peft.PeftModel.from_pretrained(public_base, folder).eval()
        values: dict[str, list[float]] = {"whole": [], "other": []}
        for name, model in (("whole", whole), ("other", other)):
            evaluator = first_client(plant)._crews._evaluators(desk)[learner]
            for batch, seen, truth in desk.reader.held_out(2, None):
                if desk.reader.learners[int(batch.slot_N[0])] != learner:
                    continue
                rows = batch.ids_L.split(batch.rows.lengths_N.tolist())
                with torch.no_grad():
                    states = [model(input_ids=ids[None]).last_hidden_state[0] for ids in rows]
                u = torch.stack([F.normalize(state.mean(0), dim=0) for state in states])
                scores = desk.scorer.score(u, batch.shard_N)
                values[name] += scores.flatten().tolist()
                evaluator.add(scores, seen, truth)
            if name == "whole":
                assert evaluator.score().means() == pytest.approx(found[learner].means())
        assert values["whole"] != pytest.approx(values["other"], abs=1e-4)


def test_any_grouping_and_a_resumed_run_give_the_same_bits(tiny_config: Make, play: Play) -> None:
    found = []
    for per_actor, servers, ends in ((1, 2, (2,)), (5, 1, (1, 2))):
        config = tiny_config(
            **FEDEX,
            clients={"per_actor": per_actor},
            server={"engine": "torch", "count": servers},
        )
        for last in ends:  # the second call goes on from the disk, where nothing was evaluated yet
            played = play(config, last=last)
        shared = played.rounds.shared(2)
        assert len([name for name in shared if RESIDUAL in name]) == len(shared) > 0
        states = [played.rounds.load_shared(2, name) for name in shared]
        scores = {c: s.means() for c, s in played.outcomes[-1].validation.items()}
        found.append((played.hashes(2), states, scores))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert found[0][2] == found[1][2]


def test_what_frozen_weights_cannot_do(
    tiny_config: Make, tiny_writer: Make, play: Play, tmp_path: Path
) -> None:
    config = tiny_writer("qwen2", method={"kind": "fedex_lora"})
    with pytest.raises(FellrayError, match="fedex_lora changes frozen weights, and what"):
        survey(config)
    own = tmp_path / "own.csv"
    own.write_text("client,rank\nc0,1\n")
    with pytest.raises(FellrayError, match="compares products of A and B, which needs one"):
        survey(tiny_config(**FEDEX, clients={"own": str(own)}))
    config = tiny_config(method={"kind": "fedex_lora"}, train={"rounds": 1})
    world = survey(config)
    with (
        open_run(config, world.data_sha256) as run,
        Plant.inline(config, world, run.rounds) as plant,
    ):
        for t in (0, 1):
            outcome = plant.replayed(one_round, t, config)
            run.commit(t, outcome, plant.close_ledger(), [])
    with pytest.raises(
        FellrayError, match="has changed the frozen weights, which cannot be served"
    ):
        open_whole(Args(run=f"{config.storage}/{config.name}"))
