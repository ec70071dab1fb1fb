"""The other methods, their seats, and a method in a user's own file."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fellray.platform.aggregation import Meta, Method, describe
from fellray.platform.config import parse
from fellray.platform.errors import FellrayError
from fellray.platform.fellrec import Fellrec
from fellray.platform.methods import Central, FedAvg, FromFile, Local

MINE = '''
import torch
from fellray.platform.aggregation import Meta, Method, Plan

class Ring(Method):
    """Everyone takes a share of its neighbour."""
    share: float = 0.5

    def seat(self, clients):
        return {"pair": tuple(clients)}

    def plan(self, meta: Meta) -> Plan:
        eye = torch.eye(len(meta.clients), dtype=torch.float64)
        return Plan((1 - self.share) * eye + self.share * eye.roll(1, dims=1))

class Other:
    pass
'''


def meta(samples: list[int]) -> Meta:
    names = [f"c{i:02d}" for i in range(len(samples))]
    theta = torch.ones(len(samples), 3)
    return describe(1, names, [1.0] * len(samples), samples, theta, theta)


def test_fedavg_uniform_and_by_samples() -> None:
    assert FedAvg().plan(meta([1, 3])).mixing_CC.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    weighted = FedAvg(weighting="samples").plan(meta([1, 3])).mixing_CC
    assert weighted.tolist() == [[0.25, 0.75], [0.25, 0.75]]


@pytest.mark.parametrize(
    ("method", "compared"),
    [
        (FedAvg(), []),
        (Local(), []),
        (Central(), []),
        (Fellrec(), ["update"]),
        (Fellrec(similarity="raw"), ["raw"]),
        (Fellrec(as_published=True), ["raw"]),
    ],
    ids=repr,
)
def test_a_method_plans_from_what_it_says_it_compares(method: Method, compared: list[str]) -> None:
    assert list(method.compares()) == compared
    theta = torch.eye(3)
    args = (1, ["a", "b", "c"], [1.0, 2.0, 3.0], [1, 2, 3], theta, 0.5 * theta.roll(1))
    little, everything = describe(*args, method.compares()), describe(*args)
    assert torch.equal(method.plan(little).mixing_CC, method.plan(everything).mixing_CC)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=20))
def test_fedavg_rows_are_one_row_that_sums_to_one(samples: list[int]) -> None:
    mixing = FedAvg(weighting="samples").plan(meta(samples)).mixing_CC
    assert torch.equal(mixing, mixing[:1].expand_as(mixing))
    assert mixing[0].sum().item() == pytest.approx(1.0, abs=1e-12)


def test_local_is_the_identity() -> None:
    assert Local().plan(meta([1, 2, 3])).mixing_CC.tolist() == torch.eye(3).tolist()


@pytest.mark.parametrize("method", [FedAvg(), FedAvg(weighting="samples"), Local(), Central()])
def test_nobody_left_is_a_plan_for_nobody(method: Method) -> None:
    assert method.plan(meta([])).mixing_CC.shape == (0, 0)


@pytest.mark.parametrize("method", [Fellrec(), FedAvg(), Local()])
def test_a_federated_method_seats_every_client_alone(method: Method) -> None:
    assert method.seat(["a", "b"]) == {"a": ("a",), "b": ("b",)}


def test_central_seats_everyone_together() -> None:
    assert Central().seat(["a", "b"]) == {"central": ("a", "b")}
    assert Central().plan(meta([5])).mixing_CC.tolist() == [[1.0]]


def named(kind: str, **options: Any) -> Method:
    method: Method = parse({"method": {"kind": kind, **options}}, "test").method
    return method


LOOKING = ("fellrec", "qffl")
BLIND = (
    *("fedavg", "fedprox", "ditto", "fedamp", "ffa_lora", "fedadam", "fedsa_lora", "fedex_lora"),
    *("fedex_lora_bounded", "shrinkage", "local", "central"),
)


@pytest.mark.parametrize("kind", [*LOOKING, *BLIND])
def test_who_looks_at_losses_says_so(kind: str) -> None:
    """Losses that are not sent are NaN: they must not be found in what is mixed."""
    method, theta = named(kind), torch.eye(3)
    seen = describe(1, ["a", "b", "c"], [math.nan] * 3, [1, 2, 3], theta, 0.5 * theta.roll(1))
    assert method.reads_losses() == (kind in LOOKING)
    assert bool(method.plan(seen).mixing_CC.isfinite().all()) == (kind in BLIND)


@pytest.mark.parametrize("kind", ["fedex_lora", "fedex_lora_bounded", "shrinkage"])
def test_who_does_not_look_at_losses_goes_with_privacy(kind: str) -> None:
    config = parse({"method": {"kind": kind}, "privacy": {"clip": 1.0, "sigma": 2.0}}, "test")
    assert config.method.kind == kind
    with pytest.raises(FellrayError, match="looks at the clients' losses"):
        parse({"method": {"kind": "qffl"}, "privacy": {"clip": 1.0, "sigma": 2.0}}, "test")


def test_a_config_names_a_method() -> None:
    assert named("fedavg", weighting="samples") == FedAvg(weighting="samples")
    assert isinstance(named("local"), Local)
    assert isinstance(named("central"), Central)
    assert parse({}, "test").method == Fellrec()
    assert parse({"method": {"alpha": 0.3}}, "test").method == Fellrec(alpha=0.3)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def test_a_users_method_from_a_users_file(mine: Path) -> None:
    method = named("file", path=str(mine), name="Ring", options={"share": 0.25})
    assert method.plan(meta([1, 1])).mixing_CC.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    assert method.seat(["a", "b"]) == {"pair": ("a", "b")}
    assert sorted(method.compares()) == ["raw", "update"], "it may look at anything"


def test_a_users_method_may_say_what_it_compares(mine: Path) -> None:
    says = '    def compares(self):\n        return ["raw"]\n'
    mine.write_text(MINE.replace("    def seat", f"{says}\n    def seat"))
    assert named("file", path=str(mine), name="Ring").compares() == ["raw"]


def test_a_users_method_survives_being_sent_and_written(mine: Path) -> None:
    from ray import cloudpickle

    from fellray.platform.config import dump, load

    config = parse(
        {"method": {"kind": "file", "path": str(mine), "name": "Ring", "options": {"share": 0.25}}},
        "test",
    )
    sent = cloudpickle.loads(cloudpickle.dumps(config))
    written = mine.with_name("config.json")
    written.write_text(dump(config))
    for other in (sent, load(written)):
        assert other.method.plan(meta([1, 1])).mixing_CC.tolist() == [[0.75, 0.25], [0.25, 0.75]]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"name": "Rong"}, "'Rong' must be a subclass"),
        ({"name": "Other"}, "'Other' must be a subclass"),
        ({"path": "nowhere.py"}, "nowhere.py: there is no such Python file"),
        ({"path": "notes.txt"}, "notes.txt: there is no such Python file"),
        ({"options": {"shore": 1}}, "options do not fit Ring"),
    ],
)
def test_what_is_wrong_with_a_users_method_is_named(
    mine: Path, change: dict[str, Any], wanted: str
) -> None:
    given = {"path": str(mine), "name": "Ring", **change}
    with pytest.raises(FellrayError, match=wanted):
        FromFile(**given)
    with pytest.raises(FellrayError, match=wanted):
        named("file", **given)


def test_a_method_without_a_plan_is_unfinished() -> None:
    with pytest.raises(NotImplementedError):
        Method().plan(meta([1]))
