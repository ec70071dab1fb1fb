"""FedPA on the split language model: its gate, its groups, what leaves a client, whole runs.

Shapes: C clients, P parameters of one, N rows, T tokens, d width.
"""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from fellray.actors import client as clients
from fellray.actors import plant as plants
from fellray.actors.pool import InlinePool
from fellray.actors.world import survey
from fellray.platform.adapters import Pair, Site, views
from fellray.platform.aggregation import Meta, describe, reduce
from fellray.platform.client_groups import describe_groups, group_learners, number_groups
from fellray.platform.config import RunConfig, parse
from fellray.platform.errors import FellrayError
from fellray.platform.fedpa_lora import CLIENTS, FedpaLora
from fellray.platform.fellrec import Fellrec
from fellray.platform.in_process import InProcess
from fellray.platform.levels import GatedLinear, level_of, spread_levels, weigh
from fellray.platform.model_config import AdapterLevels
from fellray.platform.reader import Reader
from fellray.platform.report import render
from fellray.platform.shards import Dataset
from fellray.platform.span import Answer
from fellray.platform.split import plan_cut
from fellray.serve.blends import Blends, find_private, name_blend

Make = Callable[..., RunConfig]
Play = Callable[..., Any]

GROUPS = {"c0": "a", "c1": "a", "c2": "b", "c3": "b", "c4": "b"}
ALL = ["bottom", "trunk", "top"]


@pytest.fixture(scope="module")
def make(tiny_config: Make) -> Make:
    """`make(gate="private", over={...})`: the method's settings, and the run's."""

    def config(over: dict[str, Any] | None = None, **method: Any) -> RunConfig:
        own = {"kind": "fedpa_lora", "groups": GROUPS, "min_group_size": 2}
        return tiny_config(method=own | method, **{"evaluation": {"every": 9}, **(over or {})})

    return config


def held(played: Any, round: int, part: str = "client") -> Tensor:
    name = f"{part}.values"
    rows: Tensor = played.rounds.load(round, played.learners, [name])[name]
    return rows


def both(played: Any, round: int) -> Tensor:
    """Whole rows [C, P] as they are sent, with what is not sent in its place."""
    return torch.cat([held(played, round), held(played, round, "trunk")], dim=1)


def columns(played: Any, level: str) -> Tensor:
    """Of a level's blocks."""
    blocks = played.outcomes[1].reports.blocks
    spans = [torch.arange(c.start, c.stop) for name, c in blocks.items() if level_of(name) == level]
    return torch.cat(spans)


# --- the gate -----------------------------------------------------------------------------------


def random_pairs(rows: int, r: int, i: int, o: int, seed: int) -> list[Pair]:
    """Of a group's adapter, a user's and a gate, all of them away from zero."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [((rows, r, i), (rows, o, r))] * 2 + [((rows, r, i + 1), (rows, 3, r))]
    return [
        (
            torch.randn(a, generator=draw).requires_grad_(),
            torch.randn(b, generator=draw).requires_grad_(),
        )
        for a, b in sizes
    ]


def token_by_token(x: Tensor, layer: GatedLinear, pairs: Sequence[Pair]) -> Tensor:
    """The formula, for one token of one row at a time, in fp64."""
    weight, bias = layer.base.weight.double(), layer.base.bias.double()
    rows = []
    for n, tokens in enumerate(x.double()):
        (ga, gb), (ua, ub), (g1, g2) = [(a[n].double(), b[n].double()) for a, b in pairs]
        out = []
        for token in tokens:
            logits = g2 @ torch.clamp(g1[:, :-1] @ token + g1[:, -1], min=0)
            share = logits.exp() / logits.exp().sum()
            group, user = (layer.scaling * (b @ (a @ token)) for a, b in ((ga, gb), (ua, ub)))
            out.append(weight @ token + bias + 3 * (share[1] * group + share[2] * user))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def test_a_gated_projection_is_its_formula_token_by_token() -> None:
    torch.manual_seed(0)
    layer, x = GatedLinear(nn.Linear(5, 4), 0.7), torch.randn(3, 6, 5, requires_grad=True)
    pairs = random_pairs(3, 2, 5, 4, seed=1)
    leaves = [x, *(leaf for pair in pairs for leaf in pair)]
    layer.pairs = tuple(pairs)
    shares = weigh(x, pairs[2])
    assert shares.std(dim=1).min() > 0.01, "tokens of one row have weights of their own"
    torch.testing.assert_close(shares.sum(2), torch.full((3, 6), 3.0))
    pull = torch.randn(3, 6, 4)
    found = layer(x)
    torch.testing.assert_close(layer(x[:, 4:]), found[:, 4:])  # a text can be read on
    wanted = token_by_token(x, layer, pairs)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((found * pull).sum(), leaves)
    theirs = torch.autograd.grad((wanted * pull).sum(), leaves)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.abs().max() > 1e-3
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


def test_a_gate_begins_as_if_adapters_were_added_up() -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(5, 4), torch.randn(3, 6, 5)
    layer, pairs = GatedLinear(base, 0.7), random_pairs(3, 2, 5, 4, seed=1)
    start = [*pairs[:2], (pairs[2][0], torch.zeros_like(pairs[2][1]))]
    layer.pairs = tuple(start)
    added = base(x) + sum(0.7 * torch.bmm(torch.bmm(x, a.mT), b.mT) for a, b in pairs[:2])
    torch.testing.assert_close(layer(x), added)
    layer.pairs = tuple((a, torch.zeros_like(b)) for a, b in start)
    assert torch.equal(layer(x), base(x)), "the start is the pretrained model, bit for bit"
    layer.pairs = ()
    assert torch.equal(layer(x), base(x))


def test_levels_are_sites_of_one_projection() -> None:
    plain = [Site("x.query", 8, 6), Site("x.value", 8, 6)]
    levels = AdapterLevels(user=("bottom",), group=("bottom", "trunk"), gated=True)
    bottom = spread_levels(plain, "bottom", levels)
    assert [site.name for site in bottom] == [
        f"x.{p}.{level}" for level in ("group", "user", "gate") for p in ("query", "value")
    ]
    assert [(s.d_in, s.d_out) for s in bottom] == [(8, 6)] * 4 + [(9, 3)] * 2
    assert {site.level for site in spread_levels(plain, "trunk", levels)} == {"group"}
    assert spread_levels(plain, "top", levels) == []


# --- the plan -----------------------------------------------------------------------------------

BLOCKS = {"w.group.lora_A": slice(0, 1), "w.user.lora_A": slice(1, 2), "w.gate.lora_A": slice(2, 3)}
SENT = torch.tensor([[1.0, 0, 10], [3.0, 0, 30], [7.0, 0, 70]])
START = torch.tensor([[0.0, 0, 9], [3.0, 0, 20], [9.0, 0, 69]])
MADE = {"a": 0, "b": 1}


def meta(of: str = "aab") -> Meta:
    groups = {CLIENTS: torch.tensor([MADE[g] for g in of])}
    names, samples = ["c0", "c1", "c2"], [1, 3, 4]
    losses = [1.0, 2.0, 3.0]
    return describe(1, names, losses, samples, SENT, START, blocks=BLOCKS, groups=groups)


@pytest.mark.parametrize(
    ("gate", "weighting", "wanted"),
    [
        ("everyone", "uniform", [[2, 110 / 3], [2, 110 / 3], [7, 110 / 3]]),
        ("everyone", "samples", [[2.5, 47.5], [2.5, 47.5], [7, 47.5]]),
        ("group", "samples", [[2.5, 25], [2.5, 25], [7, 70]]),
        ("private", "uniform", [[2, 10], [2, 30], [7, 70]]),
    ],
)
def test_a_plan_by_hand(gate: Any, weighting: Any, wanted: list[list[float]]) -> None:
    """Two clients in one group, one alone."""
    method = FedpaLora(gate=gate, weighting=weighting)
    plan = method.plan(meta())
    mixed = reduce(plan, SENT, BLOCKS)
    torch.testing.assert_close(mixed[:, [0, 2]], torch.tensor(wanted, dtype=torch.float32))
    assert torch.equal(mixed[:, 1], SENT[:, 1])
    assert plan.blocks["w.user.lora_A"].mixing_CC.tolist() == torch.eye(3).tolist()
    assert [method.sends(b) for b in BLOCKS] == [True, False, gate != "private"]


def test_fellrecs_matrix_within_a_group() -> None:
    """M = mask x FELLRec's, divided by what is left of each row."""
    known, rule = meta("aba"), Fellrec(alpha=0.9, beta=1.0)
    plan, theirs = FedpaLora(mixture=rule).plan(known), rule.plan(known).mixing_CC
    found = plan.blocks["w.group.lora_A"].mixing_CC
    for c, row in enumerate(theirs):
        fellows = [k for k in range(3) if "aba"[k] == "aba"[c]]
        left = sum(row[k] for k in fellows)
        for k in range(3):
            assert found[c, k] == pytest.approx(row[k] / left if k in fellows else 0.0)
    assert 0 < found[0, 2] < 0.5 < found[0, 0], "not the mean"
    assert plan.notes.keys() == {"learning_degree"}
    one = FedpaLora(mixture=rule).plan(meta("aaa"))
    torch.testing.assert_close(one.blocks["w.group.lora_A"].mixing_CC, theirs)


def test_a_plan_of_nobody_and_of_no_groups() -> None:
    nobody = describe(
        1, [], [], [], SENT[:0], SENT[:0], blocks=BLOCKS, groups=number_groups(GROUPS, [])
    )
    assert FedpaLora().plan(nobody).mixing_CC.shape == (0, 0)
    unknown = describe(1, ["a"], [1.0], [1], SENT[:1], SENT[:1], blocks=BLOCKS)
    with pytest.raises(ValueError, match="groups are not known"):
        FedpaLora().plan(unknown)


# --- two clients against the whole model, by autograd -------------------------------------------


class Twin:
    """One client with transformers' whole model, row by row in fp64, under plain SGD."""

    def __init__(self, config: RunConfig, client: str):
        world = survey(config)
        self.config = config
        self.sites = [s for part in ("bottom", "top", "trunk") for s in self._sites(world, part)]
        data = Dataset(config.data.path)
        shard = data.shard(client)
        self.reader = Reader(config, world.catalogue.tokens, {client: [shard]})
        self.items = torch.from_numpy(world.catalogue.vectors_Id).double()
        counts = torch.from_numpy(shard.counts(len(self.items)))
        self.prior = counts.double().log1p()
        self.model = AutoModel.from_pretrained(config.model.name, add_pooling_layer=False)
        self.model = self.model.double().eval().requires_grad_(False)
        self.held: dict[str, Pair] = {}
        for path in {site.path for site in self.sites}:
            self.model.get_submodule(path).register_forward_hook(self._hook(path))

    def _sites(self, world: Any, part: str) -> list[Site]:
        return plan_cut(world.backbone, self.config.model).sites[part]

    def _hook(self, path: str) -> Callable[..., Tensor]:
        def adapt(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            (x,) = args[0]
            weight = {"group": torch.ones(len(x), 1), "user": torch.ones(len(x), 1)}
            if f"{path}.gate" in self.held:
                g1, g2 = self.held[f"{path}.gate"]
                inner = torch.cat([x, torch.ones(len(x), 1).double()], 1) @ g1.T
                share = 3 * (inner.clamp(min=0) @ g2.T).softmax(1)
                weight = {"group": share[:, 1:2], "user": share[:, 2:3]}
            for level, w in weight.items():
                if f"{path}.{level}" in self.held:
                    a, b = self.held[f"{path}.{level}"]
                    y = y + self.config.model.lora.scaling * w * (x @ a.T @ b.T)
            return y

        return adapt

    def fit(self, theta_P: Tensor, round: int) -> Tensor:
        """The client's row after a round's steps."""
        flat, model = theta_P.double().requires_grad_(), self.config.model
        for batch, target_N in self.reader.steps(round):
            pairs = views(flat[None], self.sites, model.lora.r)
            self.held = {s.name: (a[0], b[0]) for s, (a, b) in zip(self.sites, pairs, strict=True)}
            losses = []
            for ids, target in zip(
                batch.ids_L.split(batch.rows.lengths_N.tolist()), target_N, strict=True
            ):
                mean = self.model(input_ids=ids[None]).last_hidden_state[0].mean(0)
                scores = self.items @ (mean / mean.norm()) / model.temperature + self.prior
                losses.append(scores.logsumexp(0) - scores[target])
            (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), flat)
            rate = self.config.train.learning_rate
            flat = (flat - rate * gradient).detach().requires_grad_()
        return flat.detach()


def test_two_clients_two_rounds_by_hand(make: Make, play: Play) -> None:
    """The whole model's autograd, the group's mean between the rounds, users' rows left alone."""
    sgd = {"optimizer": "sgd", "learning_rate": 0.3}
    config = make(gate="group", group=ALL, over={"train": sgd})
    played = play(config)
    start, sent = both(played, 0), columns(played, "group")
    shared = torch.cat([sent, columns(played, "gate")])
    twins = [Twin(config, client) for client in ("c0", "c1")]
    rows = start[:2].double()
    for t in (1, 2):
        rows = torch.stack([twin.fit(row, t) for twin, row in zip(twins, rows, strict=True)])
        torch.testing.assert_close(
            rows[:, sent].float(), played.outcomes[t].reports.theta_CP[:2, sent], rtol=0, atol=1e-5
        )
        rows[:, shared] = rows[:, shared].mean(0)
        found = both(played, t)[:2]
        torch.testing.assert_close(found.double(), rows, rtol=0, atol=1e-5)
    moved = (found - start[:2]).abs()
    for level in ("group", "user", "gate"):
        assert moved[:, columns(played, level)].max() > 3e-3, f"{level}: far beyond the tolerance"


# --- whole runs ---------------------------------------------------------------------------------


def test_members_share_their_groups_adapters_and_nobody_a_users(make: Make, play: Play) -> None:
    played = play(make(group=ALL))
    group, user, gate = (columns(played, level) for level in ("group", "user", "gate"))
    assert len(group) + len(user) + len(gate) == both(played, 0).shape[1]
    start = both(played, 0)
    assert not torch.equal(start[0, group[: len(user)]], start[0, user]), "each A is its own"
    for t in (1, 2):
        rows, sent = both(played, t), played.outcomes[t].reports.theta_CP
        assert not sent[:, user].any(), "users' adapters stay at home"
        for fellows in ([0, 1], [2, 3, 4]):
            mean = sent[fellows][:, group].double().mean(0).float()
            torch.testing.assert_close(rows[fellows[0], group], mean, rtol=0, atol=1e-7)
            assert all(torch.equal(rows[f, group], rows[fellows[0], group]) for f in fellows)
        assert not torch.equal(rows[0, group], rows[2, group])
        assert len({row.numpy().tobytes() for row in rows[:, user]}) == 5
        assert len({row.numpy().tobytes() for row in rows[:, gate]}) == 1
        assert (rows[:, user] - start[:, user]).norm() > 0.1
    sizes = {r.bytes for r in played.ledger[1] if r.kind == "adapter_up"}
    width = held(played, 1).shape[1]
    assert sizes == {4 * (sum(c < width for c in group.tolist()) + len(gate))}


@pytest.mark.parametrize("common", ["everyone", "group"])
def test_who_is_absent_begins_from_its_groups_adapters(common: str, make: Make, play: Play) -> None:
    """A group of which nobody took part keeps its own; users' adapters of absentees stay."""
    over = {"seed": 5, "sampling": {"per_round": 2}, "train": {"rounds": 3}}
    played = play(make(group=ALL, gate=common, over=over))
    group, user, gate = (columns(played, level) for level in ("group", "user", "gate"))
    if common == "group":
        group = torch.cat([group, gate])
    idle, first_time, seen = 0, 0, set[str]()
    for t in (1, 2, 3):
        before, rows, reports = both(played, t - 1), both(played, t), played.outcomes[t].reports
        took = list(reports.meta.clients)
        if common == "everyone":
            everyone = reports.theta_CP[:, gate].double().mean(0).float()
            torch.testing.assert_close(rows[:, gate], everyone.expand(5, -1), rtol=0, atol=1e-7)
        for name in ("a", "b"):
            members = [i for i, c in enumerate(played.learners) if GROUPS[c] == name]
            at = [took.index(c) for c in took if GROUPS[c] == name]
            if not at:
                idle += 1
                assert torch.equal(rows[members][:, group], before[members][:, group])
                continue
            mean = reports.theta_CP[at][:, group].double().mean(0).float()
            wanted = mean.expand(len(members), -1)
            torch.testing.assert_close(rows[members][:, group], wanted, rtol=0, atol=1e-7)
            absent = [i for i in members if played.learners[i] not in took]
            assert torch.equal(rows[absent][:, user], before[absent][:, user])
            first_time += any(played.learners[i] not in seen for i in absent)
        seen |= set(took)
    assert idle == 2, "the draw leaves a group out"
    assert first_time > 0, "and has absentees who never trained"


def test_a_refused_client_keeps_its_own_and_takes_its_groups(
    make: Make, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        clients, "_refuse", lambda loss, finite: None if refused.pop("c0", None) is None else "sick"
    )
    refused = {"c0": 1}  # the first who is looked at
    played = play(make(group=ALL), last=1)
    assert played.outcomes[1].reports.refused == {"c0": "sick"}
    before, after = both(played, 0), both(played, 1)
    group, user = columns(played, "group"), columns(played, "user")
    assert torch.equal(after[0, group], after[1, group])
    assert not torch.equal(after[0, group], before[0, group])
    assert torch.equal(after[0, user], before[0, user])
    assert not torch.equal(after[1, user], before[1, user])


def test_a_run_with_fellrecs_mixture_within_groups(make: Make, play: Play) -> None:
    """A matrix for each projection, by similarity of products: all that FELLRec can be told."""
    mixture = {"similarity": "product", "per_layer": True, "beta": 1.0}
    played = play(make(group=ALL, mixture=mixture), last=1)
    reports, plan = played.outcomes[1].reports, played.outcomes[1].plan
    rows, matrices = both(played, 1), set[int]()
    for name, at in reports.blocks.items():
        if level_of(name) == "group":
            mixing_CC = plan.blocks[name].mixing_CC
            matrices.add(id(mixing_CC))
            assert not mixing_CC[:2, 2:].any()
            assert not mixing_CC[2:, :2].any()
            wanted = mixing_CC @ reports.theta_CP[:, at].double()
            torch.testing.assert_close(rows[:, at].double(), wanted, rtol=0, atol=1e-6)
    assert len(matrices) == 10, "two projections of five blocks"
    group = columns(played, "group")
    assert len({row.numpy().tobytes() for row in rows[:, group]}) == 5


def test_round_0_is_the_pretrained_model(make: Make, play: Play, tiny_config: Make) -> None:
    ours, plain = play(make(), last=0), play(tiny_config(), last=0)
    assert ours.outcomes[0].validation == plain.outcomes[0].validation


@pytest.fixture(scope="module")
def wanted(make: Make, play: Play) -> Any:
    """One actor for all, two rounds without a pause, who is absent and AdamW's moments included."""
    return play(make(**SPARSE))


SPARSE: dict[str, Any] = {
    "group": ALL,
    "over": {"sampling": {"per_round": 3}, "train": {"moments": "keep"}},
}


def sparse(**clients: Any) -> dict[str, Any]:
    return SPARSE | {"over": SPARSE["over"] | {"clients": clients}}


def equal(one: Any, other: Any) -> None:
    for t in (1, 2):
        assert one.hashes(t) == other.hashes(t)


def test_any_number_of_actors_and_any_order_gives_the_same_bits(
    wanted: Any, make: Make, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    equal(play(make(**sparse(per_actor=2))), wanted)

    def shuffled(pool: InlinePool, method: str, *columns: Sequence[Any], **_: Any) -> list[Any]:
        rows = list(zip(*columns, strict=True)) or [()] * len(pool.members)
        places = reversed(range(len(pool.members)))
        answers = {i: getattr(pool.members[i], method)(*rows[i]) for i in places}
        return [answers[i] for i in sorted(answers)]

    monkeypatch.setattr(InlinePool, "map", shuffled)
    equal(play(make(**sparse(per_actor=1))), wanted)


def test_an_interrupted_run_goes_on_to_the_same_bits(wanted: Any, make: Make, play: Play) -> None:
    config = make(**sparse(per_actor=5))
    play(config, last=1)
    equal(play(config), wanted)


def pieces(rows: Tensor, others: Tensor) -> list[bytes]:
    """Eight numbers at a time, where all of them are away from those of the start."""
    return [
        row[at : at + 8].tobytes()
        for row, was in zip(rows.numpy(), others.numpy(), strict=True)
        for at in range(0, len(row) - 7, 8)
        if (row[at : at + 8] != was[at : at + 8]).all()
    ]


@pytest.mark.parametrize("gate", ["private", "everyone"])
def test_private_blocks_are_in_no_message(
    gate: str, make: Make, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob: list[bytes] = []
    sound = InlinePool.map

    def recorded(pool: InlinePool, method: str, *columns: Sequence[Any], **few: Any) -> list[Any]:
        answers = sound(pool, method, *columns, **few)
        blob.extend(pickle.dumps(one) for column in columns for one in column)
        blob.extend(pickle.dumps(answer) for answer in answers)
        return answers

    class Recorder(InProcess):
        def forward(self, activation: Any) -> Answer:
            blob.append(pickle.dumps(activation))
            return super().forward(activation)

        def backward(self, activation: Any, gradient: Any) -> Answer:
            blob.append(pickle.dumps((activation, gradient)))
            return super().backward(activation, gradient)

    monkeypatch.setattr(InlinePool, "map", recorded)
    monkeypatch.setattr(plants, "InProcess", Recorder)
    trained: list[Tensor] = []
    fit = plants.Client.fit

    def noted(self: Any, round: int, clients: Sequence[str], *more: Any) -> Any:
        update = fit(self, round, clients, *more)
        trained.append(self._slots.values(clients))
        return update

    monkeypatch.setattr(plants.Client, "fit", noted)
    played = play(make(gate=gate))
    crossed, start = b"".join(blob), held(played, 0)
    kept = {"user", "gate"} if gate == "private" else {"user"}
    private = torch.cat([columns(played, level) for level in sorted(kept)])
    for rows in [*trained, held(played, 1), held(played, 2)]:
        secret = pieces(rows[:, private], start[:, private])
        assert len(secret) > 100
        assert [one for one in secret if one in crossed] == []
        sent = pieces(rows[:, columns(played, "group")], start[:, columns(played, "group")])
        assert sum(one in crossed for one in sent) == len(sent) > 100, (
            "the search finds what is sent"
        )


@pytest.mark.long
def test_a_model_that_writes_has_levels_too(tiny_writer: Make, play: Play) -> None:
    """The gate is by token, so that a text is read on with caches as it was read whole."""
    method = {"kind": "fedpa_lora", "group": ALL}
    played = play(tiny_writer("qwen3", method=method))
    assert held(played, 2)[:, columns(played, "user")].unique(dim=0).shape[0] == 3
    assert all(np.isfinite(list(played.losses(t).values())).all() for t in (1, 2))


# --- what becomes of a run ----------------------------------------------------------------------


def test_a_blend_for_strangers_has_nothing_of_a_users(make: Make, play: Play) -> None:
    played = play(make(gate="private"), last=1)
    config, world = played.config, survey(played.config)
    private = find_private(config, plan_cut(world.backbone, config.model).outer)
    rounds = Blends(played.rounds._storage, played.learners, private_p=private)
    name = "client.values"
    (blend,) = rounds.load(1, [name_blend(["c0", "c2"])], [name])[name]
    group = columns(played, "group")
    mean = held(played, 1)[[0, 2]].double().mean(0).float()
    assert torch.equal(blend[group], mean[group])
    for level in ("user", "gate"):
        assert not blend[columns(played, level)].any()
        assert mean[columns(played, level)].any()
    (whole,) = rounds.load(1, ["c0"], [name])[name]
    assert torch.equal(whole, held(played, 1)[0]), "a client's own answer is its own"


def test_the_report_names_groups_and_what_is_sent(make: Make) -> None:
    config = make(group=ALL)
    world = survey(config)
    groups = describe_groups(config, world.groups, plan_cut(world.backbone, config.model))
    assert groups["members"] == {"=a": ["c0", "c1"], "=b": ["c2", "c3", "c4"]}
    # two blocks of two projections, rank 2, width 32, on the client; three on the server
    assert groups["levels"] == {
        "group, client": {"parameters": 4 * 2 * 64, "sent": True},
        "user, client": {"parameters": 4 * 2 * 64, "sent": False},
        "gate, client": {"parameters": 4 * 2 * (33 + 3), "sent": True},
        "group, trunk": {"parameters": 6 * 2 * 64, "sent": True},
    }
    tested = {f"c{i}": {"users": 2 + i, "ndcg@10": 0.1 * i} for i in range(5)}
    page = render({"per_client": tested, "groups": groups}, [], {}, None)
    assert "c2, c3, c4" in page
    assert "<td>5</td>" in page, "users of group a"
    assert f"{(0.1 * 3) / 5:.4f}" in page, "their mean, by users"
    assert "never" in page
    assert "Groups" not in render({"per_client": tested}, [], {}, None)


# --- groups, and input that cannot be -----------------------------------------------------------


def shops(**values: Sequence[Any]) -> Any:
    """Data of clients c0, c1, ... whose users have these values of one attribute."""
    ids = iter(range(99))
    users = {client: [next(ids) for _ in theirs] for client, theirs in values.items()}
    table = {
        "user_id": [i for theirs in users.values() for i in theirs],
        "age": [v for theirs in values.values() for v in theirs],
    }
    return SimpleNamespace(
        clients=tuple(sorted(values)),
        users=pa.table(table),
        shard=lambda client: SimpleNamespace(users=np.array(users[client])),
    )


def test_groups_by_an_attribute_of_the_users(make: Make) -> None:
    data = shops(c0=[18, 18], c1=[18], c2=[25], c3=[25], c4=[50], c5=[None], c6=[18])
    config = make(groups="age")
    found = group_learners(config, data)
    assert found == dict.fromkeys(("c0", "c1", "c6"), "=18") | dict.fromkeys(
        ("c2", "c3"), "=25"
    ) | dict.fromkeys(("c4", "c5"), ":other")
    assert number_groups(found, ["c2", "c4", "c0"])[CLIENTS].tolist() == [2, 0, 1]
    with pytest.raises(FellrayError, match=r"client 'c0' have several values .*'18', '25'"):
        group_learners(config, shops(c0=[18, 25], c1=[18]))
    with pytest.raises(FellrayError, match="knows age; choose one"):
        group_learners(make(groups="gender"), data)


def test_groups_that_cannot_be(make: Make) -> None:
    with pytest.raises(FellrayError, match="says nothing of its users"):
        survey(make(groups="gender"))
    with pytest.raises(FellrayError, match=r"'c9' \(group 'a'\) is not among the 5.*nearest"):
        survey(make(groups={**GROUPS, "c9": "a"}))
    with pytest.raises(FellrayError, match="min_group_size=4 all 5 clients would be one group"):
        survey(make(min_group_size=4))
    assert set(survey(make(min_group_size=3, groups={})).groups.values()) == {"="}
    few = {"c0": "a", "c1": "a", "c2": "b", "c3": "c"}
    assert survey(make(groups=few)).groups == dict.fromkeys(("c0", "c1"), "=a") | dict.fromkeys(
        ("c2", "c3", "c4"), ":other"
    )


@pytest.mark.parametrize(
    ("method", "over", "why"),
    [
        ({"user": ["top", "trunk"]}, {}, "a round trip more for each; leave trunk to group"),
        ({"group": ALL, "min_group_size": 1}, {}, "two members at least"),
        ({"group": []}, {}, "at least 1 item"),
        ({"user": ["middle"]}, {}, "bottom"),
        ({"gate": "both"}, {}, "everyone"),
        ({}, {"train": {"share": "trunk_only"}}, "set train.share=all"),
        ({}, {"server": {"shared_adapter": True}}, "server.shared_adapter=false"),
    ],
)
def test_a_config_that_cannot_be(
    method: dict[str, Any], over: dict[str, Any], why: str, make: Make
) -> None:
    with pytest.raises(FellrayError, match=why):
        make(over=over, **method)


@pytest.mark.parametrize("column", ["rank", "cut"])
def test_own_ranks_and_cuts_are_refused(column: str, make: Make, tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    own.write_text(f"client,{column}\nc0,1\n")
    with pytest.raises(FellrayError, match="members share adapters; leave the columns out"):
        survey(make(over={"clients": {"own": str(own)}}))


def test_levels_follow_from_the_method_alone(tiny_config: Make) -> None:
    tree = tiny_config().model_dump(mode="json")
    assert "levels" not in tree["model"], "configs of earlier runs stay as they are"
    tree["model"]["levels"] = {"user": ["top"], "group": ["top"], "gated": True}
    assert parse(tree, "x").model.levels is None
    tree["method"] = {"kind": "fedpa_lora", "gate": "none", "user": ["top"]}
    assert parse(tree, "x").model.levels == AdapterLevels(user=("top",), group=("bottom", "top"))


def test_a_user_can_have_all_parts_without_the_group_and_the_other_way_round(
    make: Make, play: Play
) -> None:
    played = play(make(user=["top"], group=["bottom"]), last=1)
    names = list(played.outcomes[1].reports.blocks)
    assert {(name.split(".")[2], level_of(name)) for name in names} == {
        ("0", "group"),
        ("4", "user"),
    }
    assert isinstance(played.outcomes[1].plan.blocks[names[0]].mixing_CC, Tensor)
    assert held(played, 1, "trunk").shape == (5, 0)
