"""One client actor in this process: training, installing, ranking."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fellray.actors import client as actors_client
from fellray.actors import crews
from fellray.actors.client import Client
from fellray.actors.plant import Plant
from fellray.actors.world import World, survey
from fellray.jobs.train import one_round
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.host import TrunkHost
from fellray.platform.messages import Installation, StaleLease, Update
from fellray.platform.metrics import Evaluator, Score
from fellray.platform.reader import Reader
from fellray.platform.retrieval import Scorer
from fellray.platform.rounds import Rounds
from fellray.platform.shards import Dataset
from fellray.platform.span import Trip
from fellray.platform.split import cut_model
from fellray.platform.storage import Storage
from fellray.platform.tower import encode_texts

Make = Callable[..., RunConfig]


class Stand:
    """A plant of two actors, three clients and two, at round 0."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.world = survey(config)
        self.rounds = Rounds(Storage(config.storage).sub(config.name))
        self.plant = Plant.inline(config, self.world, self.rounds)
        self.rounds.commit(0, self.plant.stage_start(), {})

    @property
    def client(self) -> Client:
        """Of c0, c1 and c2."""
        member: Client = self.plant._clients.members[0]  # type: ignore[attr-defined]
        return member

    def again(self) -> Client:
        """The same actor after a restart."""
        seats = {c: self.world.seats[c] for c in self.client.learners}
        near, far = self.world.client_side(self.config), self.client._span.remote
        return Client(self.config, 0, seats, near, self.world.catalogue, far, self.rounds)


@pytest.fixture
def stand(tiny_config: Make) -> Callable[..., Stand]:
    def make(**overrides: Any) -> Stand:
        clients = {"per_actor": 3} | overrides.pop("clients", {})
        return Stand(tiny_config(clients=clients, **overrides))

    return make


def theta(update: Update) -> bytes:
    return update.theta_SP.tobytes()


def sent(update: Update) -> Update:
    """As it arrives at the driver: a copy."""
    arrived: Update = pickle.loads(pickle.dumps(update))
    return arrived


def mixture(update: Update, round: int = 1, **more: Any) -> Installation:
    return Installation(round, update.clients, update.theta_SP * np.float32(0.5), **more)


def test_an_update_says_what_was_trained(stand: Callable[..., Stand]) -> None:
    client = stand().client
    update = client.fit(1, client.learners)
    assert update.clients == client.learners == ("c0", "c1", "c2")
    assert update.theta_SP.dtype == np.float32
    # two blocks (bottom, top), two projections each, rank 2, width 32
    assert update.theta_SP.shape == (3, 2 * 2 * 2 * (32 + 32))
    assert len({row.tobytes() for row in update.theta_SP}) == 3
    assert all(0 < loss < 20 for loss in update.losses)
    assert update.samples == (12, 12, 12)
    assert update.refused == {}


@pytest.mark.parametrize("share", ["trunk_only", "none"])
def test_what_is_not_shared_has_no_columns(share: str, stand: Callable[..., Stand]) -> None:
    client = stand(train={"share": share}).client
    update = client.fit(1, client.learners)
    assert update.theta_SP.shape == (3, 0)
    assert all(np.isfinite(update.losses))


def test_the_loss_is_the_mean_over_the_rounds_histories(stand: Callable[..., Stand]) -> None:
    """Steps of unequal size weigh by their rows."""
    client = stand(train={"local_samples": 10, "batch_size": 4}, clients={"crews": 1}).client
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    sound = client._crews._step

    def heard(desk: Any, batch: Any, *args: Any) -> Trip[torch.Tensor]:
        loss = yield from sound(desk, batch, *args)
        steps.append((loss, torch.bincount(batch.slot_N)))
        return loss

    client._crews._step = heard  # type: ignore[method-assign]
    update = client.fit(1, client.learners)
    assert [rows.tolist() for _, rows in steps] == [[4] * 3, [4] * 3, [2] * 3]
    weighted = sum(loss * rows for loss, rows in steps) / 10
    assert update.losses == pytest.approx(weighted.tolist(), rel=1e-12)


@pytest.mark.parametrize("crews", [2, 3, 8])
def test_crews_decide_no_bit(crews: int, stand: Callable[..., Stand]) -> None:
    found = []
    for many in (1, crews):
        one = stand(clients={"crews": many})
        scores = one.client.evaluate(0, 1, None, one.client.learners)
        update = one.client.fit(1, one.client.learners)
        rows = one.client.close_ledger()
        found.append((theta(update), update.losses, update.samples, rows, scores))
    assert found[0] == found[1]


def test_a_round_is_a_function_of_the_committed_state(stand: Callable[..., Stand]) -> None:
    one = stand(train={"moments": "keep"})
    first = one.client.fit(1, one.client.learners)
    kept = theta(first)
    again = one.client.fit(1, one.client.learners)
    assert (theta(again), again.losses) == (kept, first.losses)
    assert again.lives == first.lives
    assert theta(one.again().fit(1, one.client.learners)) == kept
    one.client.forget()
    assert theta(one.client.fit(1, one.client.learners)) == kept


def test_an_update_stays_what_it_was_when_the_client_goes_on(stand: Callable[..., Stand]) -> None:
    client = stand().client
    update = client.fit(1, client.learners)
    kept = theta(update)
    client.install(mixture(update))
    assert theta(update) == kept


def test_a_mixture_becomes_the_rounds_state(stand: Callable[..., Stand]) -> None:
    one = stand()
    update = sent(one.client.fit(1, one.client.learners))
    order = [2, 0, 1]
    shuffled = Installation(
        1, tuple(update.clients[i] for i in order), update.theta_SP[order] * np.float32(0.5)
    )
    staged = one.client.install(shuffled)
    assert [(s.file, s.clients) for s in staged] == [
        ("clients-00000.safetensors", shuffled.clients)
    ]
    assert one.client.install(shuffled) == staged, "asked twice"
    one.rounds.commit(1, staged, {})
    held = one.rounds.load(1, update.clients, ["client.values"])["client.values"]
    assert torch.equal(held, torch.from_numpy(update.theta_SP) * 0.5)


def test_a_refused_client_goes_back_to_the_rounds_start(stand: Callable[..., Stand]) -> None:
    one = stand(train={"moments": "keep"})
    update = one.client.fit(1, one.client.learners)
    one.rounds.commit(1, one.client.install(mixture(update, refused=("c1",))), {})
    for name in ("values", "moment1", "moment2", "steps"):
        start, end = (
            one.rounds.load(t, update.clients, [f"client.{name}"])[f"client.{name}"] for t in (0, 1)
        )
        assert torch.equal(start[1], end[1]), name
        assert not torch.equal(start[[0, 2]], end[[0, 2]]), name


def test_without_sharing_everyone_keeps_what_it_trained(stand: Callable[..., Stand]) -> None:
    one = stand(train={"share": "none"})
    update = one.client.fit(1, one.client.learners)
    trained = one.client._slots.values(update.clients)
    one.rounds.commit(1, one.client.install(Installation(1, update.clients, update.theta_SP)), {})
    held = one.rounds.load(1, update.clients, ["client.values"])["client.values"]
    assert torch.equal(held, trained)


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_an_average_is_what_a_client_trains_on(moments: str, stand: Callable[..., Stand]) -> None:
    """In memory as after a restart, with moments of its own or without."""
    one = stand(train={"moments": moments}, method={"kind": "fedavg"})
    for t in (1, 2):
        outcome = one_round(one.plant, t, one.config)
        one.rounds.commit(t, outcome.staged, {})
    found = [client.fit(3, client.learners) for client in (one.client, one.again())]
    assert theta(found[0]) == theta(found[1])


def test_a_restarted_client_does_not_install_what_it_did_not_train(
    stand: Callable[..., Stand],
) -> None:
    one = stand()
    update = one.client.fit(1, one.client.learners)
    with pytest.raises(StaleLease, match="clients-00000 was restarted"):
        one.again().install(mixture(update))
    one.client.forget()
    with pytest.raises(StaleLease):
        one.client.install(mixture(update))


class Clock:
    """Goes on by one with every step that the server takes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0
        backward = TrunkHost.backward

        def step(host: TrunkHost, sent: Any) -> Any:
            self.now += 1
            return backward(host, sent)

        patch.setattr(TrunkHost, "backward", step)
        for module in (actors_client, crews):
            patch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("kind", "done", "more"), [("fedavg", 1, 2), ("fedavg", 2, 1), ("ditto", 1, 1), ("ditto", 0, 2)]
)
def test_at_the_deadline_all_stop(
    kind: str, done: int, more: int, stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the next client's training, or of its anchor's; and nothing of it stays."""
    clock = Clock(monkeypatch)
    one = stand(clients={"slots": 1}, method={"kind": kind})
    client = one.client
    whole = client.fit(1, client.learners)
    steps, rest = divmod(clock.now, 3)
    assert (rest, steps > more) == (0, True)
    began = clock.now
    update = client.fit(1, client.learners, done * steps + more - 0.5)
    assert clock.now - began == done * steps + more
    assert update.clients == client.learners[:done]
    assert update.seconds == tuple(steps * (i + 1) for i in range(done))
    assert np.array_equal(update.theta_SP, whole.theta_SP[:done])
    one.rounds.commit(1, client.install(mixture(update)), {})
    assert theta(client.fit(2, client.learners)) == theta(one.again().fit(2, client.learners))


def test_a_nan_is_refused_with_the_reason(stand: Callable[..., Stand]) -> None:
    client = stand().client
    client._crews._sit(client.learners)[0].scorer.prior_KI[0] = torch.nan
    update = client.fit(1, client.learners)
    assert dict(update.refused) == {"c0": "training loss is nan"}
    assert np.isnan(update.losses[0])
    assert np.isfinite(update.losses[1:]).all()
    assert np.isfinite(update.theta_SP[1:]).all()


def test_an_infinite_weight_is_refused_though_the_loss_is_finite(
    stand: Callable[..., Stand],
) -> None:
    client = stand().client
    client._slots.hold(0, client.learners)  # slots are dealt in this order
    bank = client._slots.bank
    sound = bank.step

    def overflown(slots: torch.Tensor) -> None:
        sound(slots)
        if bank.steps_S[2] == 3:
            bank.values_SP[2, 0] = torch.inf

    bank.step = overflown  # type: ignore[method-assign]
    assert dict(client.fit(1, client.learners).refused) == {
        "c2": "the update holds a NaN or an infinity"
    }


def whole_model(world: World, config: RunConfig, split: Any) -> dict[str, Score]:
    """Scores of the frozen encoder in one piece: what round 0 must rank."""
    data = Dataset(config.data.path)
    shards = [data.shard(c) for c in data.clients]
    parts, tokens = cut_model(world.backbone, config.model), world.catalogue.tokens
    scorer = Scorer(
        world.catalogue.vectors_Id, shards, config.model.temperature, config.model.prior
    )
    reader = Reader(config, tokens, {s.client: [s] for s in shards})
    found = {c: Evaluator(len(data.titles)) for c in data.clients}
    for batch, seen, truth in reader.held_out(split, None):
        u = encode_texts(parts, batch.rows, batch.ids_L, tokens.pad)
        client = data.clients[int(batch.shard_N[0])]
        found[client].add(scorer.score(u, batch.shard_N), seen, truth)
    return {client: evaluator.score() for client, evaluator in found.items()}


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("split", [1, 2])
def test_round_0_ranks_as_the_whole_frozen_encoder(
    split: Any, prior: bool, stand: Callable[..., Stand]
) -> None:
    """B starts at zero: through the cut, with adapters in place, nothing has changed yet."""
    one = stand(model={"prior": prior})
    wanted = whole_model(one.world, one.config, split)
    found = one.plant.evaluate(0, split)
    assert found == wanted
    assert sum(score.users for score in found.values()) == 40


def test_baselines_by_hand(stand: Callable[..., Stand]) -> None:
    one = stand()
    data = Dataset(one.config.data.path)
    found = one.plant.evaluate_baselines(2)
    for client in data.clients:
        shard = data.shard(client)
        held = shard.held_out(2)
        own = np.log1p(shard.counts(len(data.titles)))
        for name, scores in (("popularity", data.popularity), ("prior", own)):
            evaluator = Evaluator(len(data.titles))
            rows = torch.tensor(np.tile(scores, (len(held.users), 1)), dtype=torch.float32)
            evaluator.add(rows, held.seen, held.truth)
            assert found[name][client] == evaluator.score(), (name, client)


def test_few_users_are_ranked_where_few_are_asked_for(stand: Callable[..., Stand]) -> None:
    one = stand()
    scores = one.plant.evaluate(0, 1, 2)
    assert [score.users for score in scores.values()] == [2, 2, 2, 2, 1]


def test_a_round_that_never_happened_cannot_be_ranked(stand: Callable[..., Stand]) -> None:
    with pytest.raises((FellrayError, StaleLease)):
        stand().client.evaluate(3, 1, None, ("c0",))


def test_data_of_another_encoder_is_refused(tiny_config: Make, tiny_roberta: Any) -> None:
    config = tiny_config()
    other = config.model.model_copy(update={"name": str(tiny_roberta)})
    with pytest.raises(FellrayError, match=r"made with another encoder.*fellray prepare"):
        survey(config.model_copy(update={"model": other}))


def test_training_leaves_the_shared_world_alone(stand: Callable[..., Stand]) -> None:
    """Weights and catalogue lie read-only in shared memory on a cluster."""
    one = stand()
    frozen = [
        *one.world.backbone.arrays.values(),
        one.world.catalogue.vectors_Id,
        one.world.catalogue.tokens.ids,
    ]
    before = [array.tobytes() for array in frozen]
    one.plant.evaluate(0, 1, 2)
    one.plant.fit(1, one.plant.learners)
    assert [array.tobytes() for array in frozen] == before
