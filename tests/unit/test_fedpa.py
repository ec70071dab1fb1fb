"""FedPA on attributes: what is trained, who receives what, and what never leaves."""

import os
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribute_clicks import make_config, write_source
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fellray.actors import attribute_plant as plants
from fellray.actors.attribute_client import COMMON, PRIVATE, AttributeClient, name_values
from fellray.actors.attribute_plant import AttributePlant
from fellray.actors.attribute_world import AttributeWorld
from fellray.actors.pool import InlinePool
from fellray.jobs import attributes as attributes_job
from fellray.jobs.attributes import prepare_attributes
from fellray.jobs.train import one_round
from fellray.platform import config as configs
from fellray.platform.accountant import compute_epsilon, open_account
from fellray.platform.adaptation import Layout, Rows, pack, score, train, unpack
from fellray.platform.aggregation import Meta, reduce
from fellray.platform.attribute_model import Shape, predict, start_backbone
from fellray.platform.attributes import Bins
from fellray.platform.click_data import ClickData
from fellray.platform.clicks import TEST
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.features import learn_features
from fellray.platform.fedpa import OTHER, Fedpa, Rates, form_groups, group_clients
from fellray.platform.ledger import total
from fellray.platform.messages import LedgerRow
from fellray.platform.methods import FedAvg
from fellray.platform.outcome import Outcome, pool
from fellray.platform.rounds import EVERYONE, Rounds
from fellray.platform.run import Run, open_run, read_run
from fellray.platform.storage import Storage

# rows of the tables of KuaiRand-Pure's features, and those of the three binned ones
KUAIRAND = Shape(
    (9, 2, 2, 8, 9, 7, 8, 2, 7, 50, 16, 34, 3, 118, 7, 5, 5, 3, 3, 3, 3, 3, 3),
    (14, 6, 111, 100, 100, 100),
    8,
    (32, 8),
)
TWO_GROUPS = Fedpa(groups=("follow_user_num_range", "register_days_range"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_source(tmp_path_factory.mktemp("attributes") / "source")
    prepare_attributes(make_config(folder, folder.parent))
    return folder


@dataclass
class Played:
    config: RunConfig
    world: AttributeWorld
    rounds: Rounds
    outcomes: list[Outcome] = field(default_factory=list)
    ledger: list[list[LedgerRow]] = field(default_factory=list)
    events: list[list[str]] = field(default_factory=list)

    def state(self, round: int) -> tuple[Tensor, Tensor, Tensor]:
        """All private, group and common numbers at a round."""
        groups = [
            self.group(round, a, n)
            for a, names in self.world.groups.items()
            for n in sorted(set(names))
        ]
        return (
            self.rounds.load(round, self.world.clients, [PRIVATE])[PRIVATE],
            torch.cat(groups),
            self.rounds.load(round, [EVERYONE], [COMMON])[COMMON],
        )

    def group(self, round: int, attribute: str, name: str) -> Tensor:
        tensor = name_values(attribute)
        return self.rounds.load(round, [name], [tensor])[tensor]


def play(
    config: RunConfig, before: Callable[[AttributePlant, int], None] = lambda plant, t: None
) -> Played:
    """The driver's loop, in this process."""
    world, rounds = AttributeWorld(config), Rounds(Storage(config.storage).sub(config.name))
    played = Played(config, world, rounds)
    with AttributePlant.inline(config, world, rounds) as plant:
        for t in range(config.train.rounds + 1):
            before(plant, t)
            outcome = plant.replayed(one_round, t, config)
            rounds.commit(t, outcome.staged, {})
            played.outcomes.append(outcome)
            played.ledger.append(plant.close_ledger())
            played.events.append(plant.take_events())
    return played


# --- counts (methods' item 1) -------------------------------------------------------------------

COUNTS = {
    "backbone": 13_657,
    "frozen": 11_168,  # what is left of 13,657 without 2,480 user rows and 9 of the output
    "adapter": 1_216,
    "gate": 2_052,
    "private": 1_400,
    "upload": 4_493,
}


def test_the_counts_of_kuairand_pure() -> None:
    layout = Layout(KUAIRAND, TWO_GROUPS)
    assert layout.count() == COUNTS
    assert KUAIRAND.count()["user_tables"] == 2_480
    assert KUAIRAND.count()["item_tables"] == 3_448
    blocks = layout.blocks()
    assert {name: c.stop - c.start for name, c in blocks.items()} == {
        "group.follow_user_num_range": 1_216,
        "group.register_days_range": 1_216,
        "gate": 2_052,
        "output": 9,
    }


@pytest.mark.long
def test_the_counts_follow_from_kuairand_pures_own_tables() -> None:
    import json

    import pyarrow.parquet as pq

    named = os.environ.get("FELLRAY_KUAIRAND")
    if named is None:
        pytest.skip("FELLRAY_KUAIRAND names the folder of KuaiRand-Pure's feature tables")
    folder = Path(named)
    spec = json.loads((folder / "fedpa_feature_spec.json").read_text())
    bins = {
        name: Bins(low=b["log_p1"], high=b["log_p99"], edges=int(b["bins"]))
        for name, b in spec["video_feature_bins"].items()
    }
    users, items = (pq.read_table(folder / f"{name}.parquet") for name in ("users", "items"))
    shape = Shape(
        tuple(f.rows for f in learn_features(users, spec["selected_user_features"], bins, "u")),
        tuple(f.rows for f in learn_features(items, spec["selected_video_features"], bins, "i")),
        8,
        (32, 8),
    )
    assert shape == KUAIRAND
    assert Layout(shape, TWO_GROUPS).count() == COUNTS


# --- the model ----------------------------------------------------------------------------------


def random_state(layout: Layout, clients: int, seed: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {p.name: torch.randn(clients, *p.shape, generator=draw) * 0.5 for p in layout.parts}


def random_rows(shape: Shape, clients: int, rows: int, seed: int = 2) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    wide = shape.widths[0] - shape.user_width
    return Rows(
        torch.randn(clients, shape.user_width, generator=draw),
        torch.randn(clients, rows, wide, generator=draw),
        (torch.rand(clients, rows, generator=draw) < 0.5).float(),
        torch.ones(clients, rows),
    )


SMALL = Shape((4, 3), (5, 6), 3, (6, 4))
LAYERS = start_backbone(SMALL, torch.Generator().manual_seed(7)).layers


def by_hand(
    layout: Layout, own: dict[str, Tensor], base: Tensor, item: Tensor, constant: float
) -> Tensor:
    """Section 3 for one sample of one client, one vector after the other."""
    x = torch.cat([base + own["embedding"][0], item])
    scale = layout.method.alpha / layout.method.rank
    for at, layer in enumerate(LAYERS):
        hidden = torch.relu(own[f"gate.{at}.1"][:-1].T @ x + own[f"gate.{at}.1"][-1])
        pi = torch.softmax(own[f"gate.{at}.2"][:-1].T @ hidden + own[f"gate.{at}.2"][-1], 0)
        new = pi[0] * constant * torch.relu(layer[:-1].T @ x + layer[-1])
        for k, name in enumerate(["user", *(f"group.{g}" for g in layout.method.groups)]):
            new = new + pi[1 + k] * scale * (
                own[f"{name}.{at}.B"].T @ (own[f"{name}.{at}.A"].T @ x)
            )
        x = new
    return own["output"][:-1, 0] @ x + own["output"][-1, 0]


@pytest.mark.parametrize("published", [False, True])
def test_a_logit_is_that_of_the_formula(published: bool) -> None:
    method = Fedpa(groups=("a", "b"), rank=2, gate_dim=(3, 2), as_published=published)
    layout = Layout(SMALL, method)
    own, rows = random_state(layout, 2), random_rows(SMALL, 2, 16)
    found = score(layout, LAYERS, own, rows)
    constant = 1.0 if published else (np.exp(2.0) + 3) / np.exp(2.0)
    for client in range(2):
        theirs = {name: value[client] for name, value in own.items()}
        for at in (0, 15):
            item = rows.items_SBI[client, at]
            wanted = by_hand(layout, theirs, rows.base_SU[client], item, float(constant))
            assert found[client, at].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_training_is_adams_of_each_client_alone() -> None:
    """Against torch's Adam on the plain formula; two clients, two steps, a rate of each block's."""
    rates = {"embedding": 0.1, "user": 0.02, "group": 0.03, "gate": 0.0, "output": 0.05}
    method = Fedpa(groups=("a",), rank=2, gate_dim=(3, 2), rates=rates)
    layout = Layout(SMALL, method)
    own = random_state(layout, 2)
    batches = [random_rows(SMALL, 2, 16, seed) for seed in (3, 4)]
    after, told = train(layout, LAYERS, own, batches, 0.5)
    for client in range(2):
        theirs = {name: value[client].clone() for name, value in own.items()}
        moving = [p for p in layout.parts if p.rate]
        groups = [{"params": [theirs[p.name].requires_grad_()], "lr": p.rate * 0.5} for p in moving]
        adam, seen = torch.optim.Adam(groups), 0.0
        for rows in batches:
            logits = torch.stack(
                [
                    by_hand(layout, theirs, rows.base_SU[client], item, layout.scale)
                    for item in rows.items_SBI[client]
                ]
            )
            entropy = torch.nn.functional.binary_cross_entropy_with_logits
            loss = entropy(logits, rows.labels_SB[client])
            seen += loss.item() * 16
            adam.zero_grad()
            loss.backward()
            adam.step()
        assert told[client].item() == pytest.approx(seen, rel=1e-5)
        for part in layout.parts:
            torch.testing.assert_close(
                after[part.name][client], theirs[part.name].detach(), atol=2e-5, rtol=1e-4
            )
    assert torch.equal(after["gate.0.1"], own["gate.0.1"])


@pytest.mark.parametrize(("rows", "others"), [(16, 1), (16, 60), (128, 9)])
def test_whoever_trains_beside_changes_no_bit(rows: int, others: int) -> None:
    method = Fedpa(groups=("a",), rank=2, gate_dim=(3, 2))
    layout = Layout(SMALL, method)
    own, batch = random_state(layout, others + 1), random_rows(SMALL, others + 1, rows)
    last = torch.tensor([others, others])  # who is alone is there twice
    alone = Rows(*(v[last] for v in vars(batch).values()))
    crowd, crowd_loss = train(layout, LAYERS, own, [batch, batch], 1.0)
    single, loss = train(layout, LAYERS, {n: v[last] for n, v in own.items()}, [alone, alone], 1.0)
    assert torch.equal(crowd_loss[last], loss)
    for name, value in single.items():
        assert torch.equal(value, crowd[name][last]), name


def test_padding_has_no_weight() -> None:
    layout = Layout(SMALL, Fedpa(rank=2, gate_dim=(3, 2)))
    own, rows = random_state(layout, 2), random_rows(SMALL, 2, 16)
    weights = torch.zeros(2, 16)
    weights[:, :5] = 1
    other = rows.items_SBI.clone()
    other[:, 5:] = 9.0
    found = [
        train(layout, LAYERS, own, [Rows(rows.base_SU, items, rows.labels_SB, weights)], 1.0)
        for items in (rows.items_SBI, other)
    ]
    assert torch.equal(found[0][1], found[1][1])
    assert all(torch.equal(found[0][0][n], found[1][0][n]) for n in own)


# --- the start ----------------------------------------------------------------------------------


def test_round_0_predicts_as_the_pretrained_backbone(source: Path, tmp_path: Path) -> None:
    config = make_config(source, tmp_path, train={"rounds": 0})
    played = play(config)
    data = ClickData(config.data.path)
    backbone, world = data.backbone(), played.world
    client = AttributeClient(config, 0, 0, len(data.clients), backbone, world.groups, played.rounds)
    begin, size = client._find(data.clients, TEST)
    users, items = data.users(), data.items()
    for at in range(0, len(data.clients), 7):
        one = data.clients[at : at + 1]
        twice = [one[0], one[0]]
        rows = client._gather(twice, [begin[at] + np.arange(size[at])] * 2)
        own = client._pull(0, twice)
        adapted = score(world.layout, backbone.layers, own, rows)[0, : size[at]]
        places = torch.from_numpy(client._item_N[begin[at] : begin[at] + size[at]]).long()
        plain = predict(backbone, users[at].expand(len(places), -1), items[places])
        torch.testing.assert_close(adapted, plain, atol=1e-5, rtol=0)


def test_a_published_start_weakens_the_backbone() -> None:
    """A random gate over four branches leaves about a quarter of every layer."""
    backbone, spread = start_backbone(SMALL, torch.Generator().manual_seed(7)), []
    for published in (False, True):
        method = Fedpa(groups=("a", "b"), rank=2, gate_dim=(3, 2), as_published=published)
        layout = Layout(SMALL, method)
        private, groups, common = layout.start(0, backbone)
        own = unpack(layout.private, private.expand(2, -1))
        own |= unpack(layout.common, common.expand(2, -1))
        for attribute, parts in layout.groups.items():
            own |= unpack(parts, groups[attribute].expand(2, -1))
        spread.append(score(layout, backbone.layers, own, random_rows(SMALL, 2, 64)).std().item())
    assert 0 < spread[1] < 0.3 * spread[0]


# --- rounds -------------------------------------------------------------------------------------


def norms(layout: Layout, flat_SP: Tensor, groups: bool) -> dict[str, float]:
    """Of the median client: one whose layer is dead for all its samples moves nothing there."""
    parts = layout.groups["age"] if groups else layout.private
    own = unpack(parts, flat_SP)
    return {n: v.flatten(1).norm(dim=1).median().item() for n, v in own.items()}


def test_adapters_live(source: Path, tmp_path: Path) -> None:
    """B moves in the first round, which A's gradient needs; then A does."""
    played = play(make_config(source, tmp_path))
    layout = played.world.layout
    start, one, two = (played.state(t) for t in range(3))
    for at, groups in ((0, False), (1, True)):
        first = norms(layout, one[at] - start[at], groups)
        second = norms(layout, two[at] - one[at], groups)
        assert all(value > 0 for name, value in first.items() if name.endswith("B")), first
        assert all(value == 0 for name, value in first.items() if name.endswith("A")), first
        assert all(value > 0 for name, value in second.items() if name.endswith("A")), second
    assert not torch.equal(start[2], one[2])


def test_as_published_adapters_are_dead_and_a_step_has_the_size_of_the_rate(
    source: Path, tmp_path: Path
) -> None:
    played = play(make_config(source, tmp_path, method={"as_published": True}))
    layout = played.world.layout
    width = layout.shape.user_width
    for t in range(3):
        private, groups, _ = played.state(t)
        assert private[:, width:].abs().max().item() == 0.0
        assert groups.abs().max().item() == 0.0
    step = played.state(1)[0][:, :width].abs()
    assert step.max().item() == pytest.approx(0.1, abs=1e-4)
    assert not torch.equal(played.state(2)[2], played.state(1)[2])


def test_groups_receive_their_means(source: Path, tmp_path: Path) -> None:
    played = play(make_config(source, tmp_path, train={"rounds": 1}))
    reports, world = played.outcomes[1].reports, played.world
    assert reports is not None
    theta = reports.theta_CP.double()
    for attribute, names in world.groups.items():
        columns = reports.blocks[f"group.{attribute}"]
        assert len(set(names)) > 1
        for group in set(names):
            members = [i for i, name in enumerate(names) if name == group]
            wanted = theta[members, columns].mean(0)
            found = played.group(1, attribute, group)[0].double()
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    everyone = theta[:, reports.blocks["gate"].start :].mean(0)
    torch.testing.assert_close(played.state(1)[2][0].double(), everyone, atol=1e-6, rtol=1e-6)


def test_who_is_absent_keeps_what_is_theirs_and_a_group_without_members_its_copy(
    source: Path, tmp_path: Path
) -> None:
    played = play(make_config(source, tmp_path, sampling={"per_round": 2}))
    first, world = played.outcomes[1].reports, played.world
    assert first is not None
    assert len(first.meta.clients) == 2
    start, after = played.state(0), played.state(1)
    asked = [client in first.meta.clients for client in world.clients]
    same = [torch.equal(a, b) for a, b in zip(start[0], after[0], strict=True)]
    assert same == [not one for one in asked]
    groups = [name for names in world.groups.values() for name in sorted(set(names))]
    present = {names[i] for names in world.groups.values() for i, here in enumerate(asked) if here}
    assert 0 < len(present) < len(groups)
    kept = [torch.equal(a, b) for a, b in zip(start[1], after[1], strict=True)]
    assert kept == [name not in present for name in groups]


@pytest.mark.parametrize("per_actor", [5, 21])
def test_the_number_of_actors_changes_no_bit(per_actor: int, source: Path, tmp_path: Path) -> None:
    method = {"batch_size": 16, "epochs": 2}
    whole = play(make_config(source, tmp_path / "one", method=method))
    dealt = play(
        make_config(source, tmp_path / "n", clients={"per_actor": per_actor}, method=method)
    )
    assert -(-len(dealt.world.clients) // per_actor) > 1
    for t in range(3):
        for a, b in zip(whole.state(t), dealt.state(t), strict=True):
            assert torch.equal(a, b)
        found, wanted = dealt.outcomes[t].validation, whole.outcomes[t].validation
        assert found is not None
        assert wanted is not None
        assert len(wanted) == 1 < len(found)
        assert pool(found) == pool(wanted)
    assert dealt.ledger == whole.ledger


def test_the_order_of_arrival_changes_no_bit(source: Path, tmp_path: Path) -> None:
    """The pool hands updates over in the order of actors, whoever answered first."""
    config = make_config(source, tmp_path / "a", clients={"per_actor": 6})
    wanted = play(config)
    sound = InlinePool.map

    def backwards(pool: InlinePool, method: str, *columns: Sequence[Any], **few: Any) -> list[Any]:
        rows = list(zip(*columns, strict=True)) if columns else [()] * len(pool.members)
        calls = [(getattr(m, method), r) for m, r in zip(pool.members, rows, strict=True)]
        return [call(*row) for call, row in reversed(calls)][::-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlinePool, "map", backwards)
        found = play(make_config(source, tmp_path / "b", clients={"per_actor": 6}))
    assert sound is InlinePool.map
    for a, b in zip(wanted.state(2), found.state(2), strict=True):
        assert torch.equal(a, b)


def restart(plant: AttributePlant, member: int) -> None:
    """An actor that knows nothing but what lies on storage."""
    pool = plant._clients
    assert isinstance(pool, InlinePool)
    args = plants._client_args(plant._config, plant._world, plant._rounds, lambda _, value: value)
    pool.members[member] = AttributeClient(*args[member])


@pytest.mark.parametrize("when", ["between rounds", "after training"])
def test_a_lost_actor_costs_nothing(
    when: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    more: dict[str, Any] = {"clients": {"per_actor": 20}}
    wanted = play(make_config(source, tmp_path / "a", **more))
    lives = [1]
    if when == "between rounds":
        found = play(make_config(source, tmp_path / "b", **more), lambda p, t: restart(p, 1))
    else:
        sound = AttributePlant.install

        def strike(plant: AttributePlant, reports: Any, *args: Any) -> Any:
            if reports.meta.round == 2 and lives:
                lives.clear()
                restart(plant, 1)
            return sound(plant, reports, *args)

        monkeypatch.setattr(AttributePlant, "install", strike)
        found = play(make_config(source, tmp_path / "b", **more))
        assert not lives
        assert "begun again" in found.events[2][0]
    for t in range(3):
        for a, b in zip(wanted.state(t), found.state(t), strict=True):
            assert torch.equal(a, b)


def test_an_interrupted_run_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    wanted = play(make_config(source, tmp_path / "a"))
    config = make_config(source, tmp_path / "b")
    world = AttributeWorld(config)
    for last in (1, 2):
        with (
            open_run(config, world.data_sha256) as run,
            AttributePlant.inline(config, world, run.rounds) as plant,
        ):
            for t in run.to_go():
                outcome = plant.replayed(one_round, t, config)
                if t > last:
                    break  # staged, not committed
                row = run.commit(t, outcome, plant.close_ledger(), plant.take_events())
                assert row["validation"]["auc"] > 0
                assert "worst_ndcg@10" not in row
            assert run.rounds.latest() == last
    assert run.best_round() in (0, 1, 2)
    found = Played(config, world, run.rounds)
    for a, b in zip(wanted.state(2), found.state(2), strict=True):
        assert torch.equal(a, b)


def test_a_client_with_a_nan_is_refused_and_keeps_its_state(source: Path, tmp_path: Path) -> None:
    sound = AttributeClient._gather

    def poisoned(self: AttributeClient, clients: Sequence[str], rows: Any) -> Rows:
        found = sound(self, clients, rows)
        for at, client in enumerate(clients):
            if client == self.learners[2]:
                found.items_SBI[at] = torch.nan
        return found

    def before(plant: AttributePlant, t: int) -> None:
        if t == 1:
            patch.setattr(AttributeClient, "_gather", poisoned)
        if t == 2:
            patch.setattr(AttributeClient, "_gather", sound)

    with pytest.MonkeyPatch.context() as patch:
        config = make_config(source, tmp_path, evaluation={"every": 2})
        played = play(config, before)
    reports = played.outcomes[1].reports
    assert reports is not None
    assert list(reports.refused) == [played.world.clients[2]]
    start, one, two = (played.state(t) for t in range(3))
    assert torch.equal(start[0][2], one[0][2])
    assert not torch.equal(one[0][2], two[0][2])
    assert two[2].isfinite().all()


# --- what is sent -------------------------------------------------------------------------------


def pieces(values_SP: Tensor, width: int) -> list[bytes]:
    """Stretches of so many numbers that training has moved, as they would lie in a message.

    A first step of Adam is nearly the rate, up or down: four numbers may be alike by chance.
    """
    places = list(pairwise(range(0, values_SP.shape[1] + 1, width)))
    return [row[a:b].tobytes() for row in values_SP.numpy() for a, b in places if row[a:b].all()]


def test_private_blocks_are_in_no_message(source: Path, tmp_path: Path) -> None:
    blob: list[bytes] = []
    sound = InlinePool.map

    def recorded(pool: InlinePool, method: str, *columns: Sequence[Any], **few: Any) -> list[Any]:
        answers = sound(pool, method, *columns, **few)
        blob.extend(pickle.dumps(one) for column in columns for one in column)
        blob.extend(pickle.dumps(answer) for answer in answers)
        return answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlinePool, "map", recorded)
        played = play(make_config(source, tmp_path, clients={"per_actor": 7}))
    crossed = b"".join(blob)
    start, layout = played.state(0)[0], played.world.layout
    for t in (1, 2):
        private = played.state(t)[0]
        moved, width = (
            torch.where(private == start, torch.zeros(()), private),
            layout.shape.user_width,
        )
        secret = pieces(moved[:, :width], width) + pieces(moved[:, width:], 8)
        assert len(secret) > 50
        assert [one for one in secret if one in crossed] == []
        sent = played.outcomes[t].reports
        assert sent is not None
        open_ = pieces(sent.theta_CP[:, :40], 8)
        assert sum(one in crossed for one in open_) == len(open_), "the search finds what is sent"
    data = ClickData(played.config.data.path).samples(0, 5)
    for kind in (np.int32, np.int64):
        assert data["item"][:8].astype(kind).tobytes() not in crossed


def test_the_ledger_counts_what_the_method_says(source: Path, tmp_path: Path) -> None:
    played = play(make_config(source, tmp_path))
    clients, upload = len(played.world.clients), played.world.layout.count()["upload"]
    for t in (1, 2):
        reports = played.outcomes[t].reports
        assert reports is not None
        assert reports.theta_CP.shape == (clients, upload)
        assert total(played.ledger[t]) == {
            "adapter_up": reports.theta_CP.numel() * 4,
            "adapter_down": clients * upload * 4,
            "loss": clients * 8,
        }
    assert total(played.ledger[0]) == {"adapter_down": clients * upload * 4}


def test_with_embeddings_alone_nothing_is_sent(source: Path, tmp_path: Path) -> None:
    rates = dict.fromkeys(("user", "group", "gate", "output"), 0.0)
    played = play(make_config(source, tmp_path, method={"rates": rates}))
    reports = played.outcomes[1].reports
    assert reports is not None
    assert reports.theta_CP.shape[1] == 0
    assert total(played.ledger[1]).keys() == {"loss"}
    start, after = played.state(0), played.state(1)
    assert torch.equal(start[1], after[1])
    assert torch.equal(start[2], after[2])
    width = played.world.layout.shape.user_width
    assert not torch.equal(start[0][:, :width], after[0][:, :width])
    assert torch.equal(start[0][:, width:], after[0][:, width:])


def test_as_published_one_rate_that_is_given_leaves_the_others() -> None:
    given = Fedpa.model_validate({"as_published": True, "rates": {"embedding": 0}})
    assert given.rates == Rates(embedding=0, user=0.1, group=0.1, gate=0.1, output=0.1)
    assert (given.decay, given.min_group_size) == (1.0, 1)
    assert Fedpa(as_published=True, rates=Rates(gate=0.5)).rates == Rates(gate=0.5)
    assert Fedpa(as_published=True).rates.model_dump() == dict.fromkeys(Rates.model_fields, 0.1)
    assert Fedpa.model_validate({"rates": {"embedding": 0}}).rates == Rates(embedding=0)


# --- the plan and its groups --------------------------------------------------------------------


def meta(groups: list[int], samples: list[float]) -> Meta:
    return Meta(
        round=1,
        clients=tuple(f"u{i}" for i in range(len(groups))),
        losses_C=torch.zeros(len(groups), dtype=torch.float64),
        samples_C=torch.tensor(samples, dtype=torch.float64),
        gram={},
        blocks=("group.a", "gate", "output"),
        groups={"a": torch.tensor(groups)},
    )


def test_a_plan_is_a_mask_of_groups_and_one_mean() -> None:
    plan = Fedpa(groups=("a",)).plan(meta([4, 1, 4], [1.0, 5.0, 3.0]))
    assert plan.blocks["group.a"].mixing_CC.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
    assert plan.common
    assert plan.mixing_CC.tolist() == [[1 / 3] * 3] * 3
    weighted = Fedpa(groups=("a",), weighting="samples").plan(meta([4, 1, 4], [1.0, 5.0, 3.0]))
    assert weighted.blocks["group.a"].mixing_CC[0].tolist() == [0.25, 0, 0.75]
    assert weighted.mixing_CC[0].tolist() == pytest.approx([1 / 9, 5 / 9, 3 / 9])
    theta = torch.arange(9.0).view(3, 3)
    blocks = {"group.a": slice(0, 1), "gate": slice(1, 2), "output": slice(2, 3)}
    assert reduce(plan, theta, blocks).tolist() == [[3, 4, 5], [3, 4, 5], [3, 4, 5]]


def test_one_group_of_all_is_fedavg() -> None:
    told = meta([2, 2, 2, 2], [1.0, 2.0, 3.0, 4.0])
    plan = Fedpa(groups=("a",)).plan(told)
    theta = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    blocks = {"group.a": slice(0, 4), "gate": slice(4, 5), "output": slice(5, 6)}
    assert torch.equal(reduce(plan, theta, blocks), reduce(FedAvg().plan(told), theta))


def test_an_unknown_group_is_refused() -> None:
    told = meta([0, 1], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"group\.a.*has no groups"):
        Fedpa(groups=("a",)).plan(Meta(**{**vars(told), "groups": {}}))


def test_small_groups_are_merged() -> None:
    values = ["x"] * 5 + ["y"] * 2 + [None] + ["z"] * 3
    assert form_groups(values, 3) == {"x": "=x", "z": "=z", "y": OTHER, None: OTHER}
    # one alone is not enough: the smallest group joins it
    assert form_groups(["x"] * 5 + ["y"] + ["z"] * 3, 3) == {"x": "=x", "z": OTHER, "y": OTHER}
    assert form_groups(["x", "y"], 1) == {"x": "=x", "y": "=y"}


@given(st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1), st.integers(1, 8))
def test_no_group_is_too_small(values: list[str | None], least: int) -> None:
    (names,) = group_clients({"attribute": values}, least).values()
    sizes = [names.count(name) for name in set(names)]
    assert len(names) == len(values)
    assert min(sizes) >= min(least, len(values))


def test_who_was_never_there_has_the_groups_and_the_pretrained_rows(
    source: Path, tmp_path: Path
) -> None:
    played = play(make_config(source, tmp_path))
    fresh = played.rounds.load(2, ["u999"], [PRIVATE])[PRIVATE][0]
    width = played.world.layout.shape.user_width
    assert fresh[:width].abs().max() == 0
    assert torch.equal(fresh, played.state(0)[0][0])
    own = unpack(played.world.layout.private, fresh[None])
    assert all(value.abs().max() == 0 for name, value in own.items() if name.endswith("B"))


# --- what a user gets wrong ---------------------------------------------------------------------


def test_under_privacy_a_clipped_and_noised_update_is_all_that_leaves(
    source: Path, tmp_path: Path
) -> None:
    """The one kind of run whose epsilon can be stated."""
    stage = {"kind": "gaussian", "clip": 0.01, "sigma": 1e-4, "delta": 1e-5}
    private = play(make_config(source, tmp_path / "a", privacy=stage, train={"rounds": 1}))
    plain = play(make_config(source, tmp_path / "b", train={"rounds": 1}))
    reports, exact = (played.outcomes[1].reports for played in (private, plain))
    assert reports is not None
    assert exact is not None
    layout = private.world.layout
    clients = private.world.clients
    with AttributePlant.inline(private.config, private.world, private.rounds) as plant:
        assert isinstance(plant._clients, InlinePool)
        start = pack(layout.sent, plant._clients.members[0]._pull(0, clients))
    delta = reports.theta_CP - start
    width = delta.shape[1]
    assert delta.norm(dim=1).max() <= 0.01 + 5 * 1e-6 * width**0.5
    assert (exact.theta_CP - start).norm(dim=1).min() > 0.02  # the clip bites
    # what stays, stays exact
    assert torch.equal(private.state(1)[0], plain.state(1)[0])
    assert reports.meta.losses_C.isnan().all()
    assert "loss" in {row.kind for row in plain.ledger[1]}
    assert "loss" not in {row.kind for row in private.ledger[1]}
    account = open_account(private.config, [{"losses": reports.losses}])
    assert account.refusals == ()
    assert account.epsilon == compute_epsilon(1e-4 / 2, 1e-5)
    assert "per user" in account.describe()


@pytest.mark.parametrize("loss", [{}, {"loss_clip": 1.0, "loss_sigma": 2.0}])
def test_under_privacy_the_row_of_embeddings_alone_sends_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: dict[str, float]
) -> None:
    """The same data train it, and the epsilon beside it is of the run's own messages."""

    def turn(run: Run, plant: AttributePlant, display: object) -> None:
        for t in run.to_go():
            outcome = plant.replayed(one_round, t, run.config)
            run.commit(t, outcome, plant.close_ledger(), plant.take_events())

    monkeypatch.setattr(attributes_job, "connect", lambda *_: nullcontext())
    monkeypatch.setattr(AttributePlant, "on_ray", AttributePlant.inline)
    stage = {"kind": "gaussian", "clip": 0.01, "sigma": 2.0, "epsilon": 1000.0, **loss}
    config = make_config(source, tmp_path, privacy=stage, attributes={"baseline": True})
    summary = attributes_job.train_attributes(config, turn)
    assert summary["embedding_only"]["auc"] > 0.4
    own, alone = (
        read_run(f"{tmp_path}/runs/{name}").journal for name in ("tiny", "tiny-embedding-only")
    )
    for journal, told in ((own, bool(loss)), (alone, False)):
        rows = journal.rows("metrics")[1:]
        assert [len(row["losses"]) for row in rows] == [42, 42]
        losses = [value for row in rows for value in (row["loss"], *row["losses"].values())]
        assert all((value is not None) == told for value in losses)
    assert {row["kind"] for row in alone.rows("ledger")} == set()
    stated = summary["privacy"]["epsilon"]
    assert stated == open_account(config, own.rows("metrics")[1:]).epsilon


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": {"gate_dim": [3]}}, r"method\.gate_dim has 1 widths \[3\].*2 hidden layers"),
        ({"method": {"min_group_size": 500}}, r"min_group_size is 500, but there are \d+ clients"),
        ({"attributes": {"dim": 4}}, r"prepared with another attributes\.dim"),
        ({"data": {"path": "nowhere"}}, r"nowhere: holds no attributes\.json: run `fellray prep"),
    ],
)
def test_a_run_that_cannot_be(
    more: dict[str, Any], words: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(FellrayError, match=words):
        AttributeWorld(make_config(source, tmp_path, **more))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": {"groups": ["hair"]}}, r"method\.groups names 'hair', which attributes\.users"),
        ({"method": {"groups": ["age", "age"]}}, r"groups names 'age' twice"),
        ({"attributes": None}, r"method\.kind=fedpa needs the section attributes"),
        ({"evaluation": {"select": "ndcg@10"}}, r"evaluation\.select=auc or gauc"),
        ({"sampling": {"per_round": 3, "over_select": 2}}, r"has no sampling\.over_select"),
        ({"attributes": {"open": {"values": ["x"]}}}, r"attribute and values go together"),
        ({"attributes": {"bins": {"hair": {"low": 0, "high": 1}}}}, r"bins names 'hair'"),
    ],
)
def test_a_config_that_cannot_be(
    more: dict[str, Any], words: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(FellrayError, match=words):
        make_config(source, tmp_path, **more)


def test_other_methods_are_refused_on_attributes(source: Path, tmp_path: Path) -> None:
    tree = make_config(source, tmp_path).model_dump(mode="json")
    with pytest.raises(FellrayError, match=r"takes method\.kind=fedpa, not fedavg"):
        configs.parse({**tree, "method": {"kind": "fedavg"}}, "test")


def test_commands_for_language_models_say_so(source: Path, tmp_path: Path) -> None:
    from fellray.actors.world import survey

    with pytest.raises(FellrayError, match=r"tiny: is on attributes, not on a language model"):
        survey(make_config(source, tmp_path))
