"""A price table: what it adds up to, and what is refused."""

from pathlib import Path

import pytest

from fellray.platform.errors import FellrayError
from fellray.platform.prices import EXAMPLE, Prices, load_prices


def test_node_seconds_are_priced_by_the_hour() -> None:
    prices = Prices(currency="EUR", per_hour={"head": 0.5, "client": 2.0})
    assert prices.price({"head": 3600, "client": 1800}) == pytest.approx(1.5)
    assert prices.price({}) == 0


def test_the_example_has_the_kinds_of_cluster_yaml() -> None:
    assert load_prices(EXAMPLE).per_hour.keys() == {"head", "client", "server"}


def test_a_kind_without_a_price_is_named() -> None:
    with pytest.raises(FellrayError, match=r"'spot' have no price \(known: head\)"):
        Prices(currency="EUR", per_hour={"head": 1}).price({"spot": 1.0})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("currency: EUR", "per_hour: Field required"),
        ("{currency: EUR, per_hour: {head: -1}}", "per_hour.head"),
        ("{currency: EUR, per_hour: {head: 1}, per_day: {}}", "per_day"),
        ("{", "is not YAML"),
        ("- 1", "the file"),
    ],
)
def test_what_is_no_table_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(FellrayError, match=words) as refusal:
        load_prices(file)
    assert "mine.yaml" in str(refusal.value)
    with pytest.raises(FellrayError, match="cannot be read"):
        load_prices(tmp_path / "nowhere.yaml")
