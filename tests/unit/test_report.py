"""The pages hold what they were given, escaped, whole, and drawn inside their frames."""

import copy
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fellray.platform.charts import _shorten
from fellray.platform.comparison import render_comparison
from fellray.platform.drawing import fit_axis
from fellray.platform.metrics import balance
from fellray.platform.report import render
from fellray.platform.words import format_size

EVIL = '<script>alert("1")</script>&\''
NAMES = [f"{m}@{k}" for m in ("recall", "ndcg", "mrr", "hit", "coverage") for k in (5, 10, 20)]


class Page(HTMLParser):
    """Checks the nesting of a page and keeps its elements, its texts and its ids."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert not self.open
        self.ids = [own["id"] for _, own in self.tags if "id" in own]
        self.text = " ".join(self.texts)
        self.rows = [
            re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
            for row in re.findall(r"<tr>(.*?)</tr>", html)
        ]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def row(self, first):
        """The cells of the first row of this name."""
        return next(row[1:] for row in self.rows if row[0] == first)


def metric_values(ndcg):
    return {name: ndcg * (2 if name.startswith("recall") else 1) for name in NAMES}


def a_run(clients=3, rounds=4, names=None):
    names = names or [f"shop-{i}" for i in range(clients)]
    per_client = {
        name: metric_values(0.01 * (i + 1)) | {"users": 10} for i, name in enumerate(names)
    }
    metrics = [
        {
            "round": number,
            "loss": 7.0 - number,
            "losses": {name: 7.0 - number + i / 10 for i, name in enumerate(names)},
            "seconds": 2.5,
            "samples_per_second": 38.0,
            "bytes": 2048,
            "own_weight": dict.fromkeys(names, 0.5),
            "learning_degree": dict.fromkeys(names, 0.9),
            "validation": metric_values(0.03 + number / 1000),
            "worst_ndcg@10": 0.01,
        }
        for number in range(1, rounds + 1)
    ]
    summary = {
        "run": "first",
        "method": "fellrec",
        "seed": 7,
        "rounds": rounds,
        "best_round": rounds,
        "clients": clients,
        "test": metric_values(0.05),
        "validation": metric_values(0.06),
        "per_client": per_client,
        "balance": balance({name: row["ndcg@10"] for name, row in per_client.items()}),
        "bytes": {"activations": 3 * 2**20, "loss": 96},
        "hashes": dict.fromkeys(names, "ab" * 32),
        "popularity": metric_values(0.03),
        "prior": metric_values(0.04),
        "untrained": metric_values(0.02),
        "data": {"path": "data/x", "sha256": "cd" * 32, "counts": {"users": 30, "items": 9}},
        "model": {"name": "tiny", "sha256": "ef" * 32},
        "environment": {"torch": "2.13"},
        "events": ["round 2 replayed"],
    }
    return summary, metrics, {"name": "first", "seed": 7}, costs(["k=0", "k=2", "whole"])


def costs(arms):
    """What `costs.json` holds, as far as the page reads it; of two halves of the whole."""
    measured = ("peak_bytes", "model_bytes", "step_s", "own_s", "bytes")
    held = {name: {"median": 2.0**20} for name in measured} | {"frozen": 1e6, "trained": 2000}
    row = held | {"ratio": dict.fromkeys(held, 0.5)}
    return {
        "rows": [row | {"arm": arm} for arm in arms],
        "turns": 3,
        "tokens_per_step": 640.0,
        "threads": 1,
        "imports_bytes": {"median": 2.0**28},
        "busy": True,
    }


def check(html):
    """What every page must be: well nested, from here alone, with words for every chart."""
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids)
    drawings = [own for tag, own in page.tags if tag == "svg" and own.get("role") == "img"]
    for drawing in drawings:
        assert set(drawing["aria-labelledby"].split()) <= set(page.ids)
    assert len(drawings) == html.count("<desc")
    assert not {"script", "link", "img", "iframe", "a"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import|\bnan\b|\binf\b|None", html)
    for tag, own in page.tags:
        for name in ("x", "x1", "x2", "cx"):
            assert tag == "meta" or -0.01 <= float(own.get(name, 0)) <= 360, (tag, own)
    return page


def test_a_run_shows_what_it_was_given():
    page = check(render(*a_run()))
    assert page.row("NDCG@10")[:5] == ["0.0500", "0.0300", "0.0400", "0.0200", "0.0600"]
    assert "25.0% above the strongest baseline (prior, 0.0400)" in page.text
    assert "over 30 users" in page.text
    assert page.row("shop-0") == ["10", "0.0100", "0.0200", *["0.0100"] * 3, "ab" * 6]
    assert page.row("lowest client") == ["0.0100"]
    assert page.row("4")[:5] == ["3.0000", "3.0000", "3.2000", "0.0340", "0.0100"]
    assert "round 2 replayed" in page.text
    for word in ("fellrec", "seed 7", "cd" * 32, "2.13", "data/x", '"seed": 7'):
        assert word in page.text
    titles = [own for tag, own in page.tags if tag == "svg" and own.get("role") == "img"]
    assert len(titles) == 5


def test_bytes_are_shared_over_client_rounds_that_took_place():
    summary, metrics, *rest = a_run(clients=3, rounds=2)
    del metrics[0]["losses"]["shop-2"]  # 5 client-rounds are left
    assert check(render(summary, metrics, *rest)).row("all")[1] == "3,145,824"
    summary["bytes"] = {"loss": 5 * 2048}
    page = check(render(summary, metrics, *rest))
    assert page.row("loss") == ["10.0 KiB", "10,240", "100.0%", "2.0 KiB"]


def test_what_a_client_needs_stands_beside_the_whole_model():
    page = check(render(*a_run()))
    assert page.row("k=2")[:3] == ["1.0 (50%)", "2.0 (50%)", "1 (50%)"]
    assert "read the shares" in page.text


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (0.02, "50.0% below the strongest"),
        (0.04, "level with the strongest"),
        (0.06, "50.0% above the strongest"),
    ],
)
def test_the_lead_says_on_which_side_of_the_baseline(own, words):
    summary, *rest = a_run()
    summary["test"] = metric_values(own)
    assert words in check(render(summary, *rest)).text


def test_every_text_is_escaped():
    summary, metrics, *_ = a_run(names=[EVIL, "b", "c"])
    metrics[0]["refused"] = {EVIL: EVIL}
    for key in ("run", "method"):
        summary[key] = EVIL
    summary["events"] = [EVIL]
    summary["data"] = {EVIL: EVIL, "path": EVIL}
    page = check(render(summary, metrics, {EVIL: EVIL}, costs([EVIL])))
    assert f"round 1: {EVIL} refused: {EVIL}" in page.text
    cell = {"mean": 0.1, "std": 0.0, "values": [0.1]}
    methods = {EVIL: {"ndcg@10": cell, "balance/min": cell, EVIL: cell}}
    check(render_comparison(methods, {EVIL: {EVIL: balance({"a": 0.1})}}, {"name": EVIL}))


@pytest.mark.parametrize(("clients", "rounds"), [(1, 1), (1, 0), (40, 1), (100, 60), (3000, 2)])
def test_any_number_of_clients_and_rounds(clients, rounds):
    html = render(*a_run(clients, rounds))
    page = check(html)
    assert len(html) < 200_000
    assert page.row("shop-0")
    if clients == 3000:
        assert "the 100 lowest and the 100 highest of 3000" in page.text
        assert "shop-1500" not in {row[0] for row in page.rows}


@pytest.mark.parametrize(
    "missing",
    [
        "popularity",
        "validation",
        "balance",
        "hashes",
        "events",
        "environment",
        "per_client",
        "best_round",
        "data",
        "model",
        "test",
        "bytes",
    ],
)
def test_parts_of_the_summary_may_be_missing(missing):
    summary, metrics, config, _ = a_run()
    del summary[missing]
    check(render(summary, metrics, config, None))


def test_optional_columns_may_be_missing():
    summary, metrics, config, _ = a_run()
    for name in ("own_weight", "learning_degree", "validation", "worst_ndcg@10"):
        for row in metrics:
            del row[name]
    summary["events"] = []
    page = check(render(summary, metrics, config, None))
    assert "Own weight" not in page.text
    assert "worst client" not in page.text
    assert "No refused client, replay or restart is recorded." in page.text
    assert "What a client needs" not in page.text


def test_a_client_without_users_is_listed_but_not_drawn():
    summary, *rest = a_run()
    summary["per_client"]["empty"] = {"users": 0}
    page = check(render(summary, *rest))
    assert page.row("empty")[:2] == ["0", "–"]
    assert "3 clients; lowest shop-0" in page.text


def test_clients_may_be_a_list_and_validation_sparse():
    summary, metrics, *rest = a_run()
    summary["clients"] = ["a", "b"]
    del metrics[1]["validation"], metrics[1]["worst_ndcg@10"]
    page = check(render(summary, metrics, *rest))
    assert "2 clients" in page.text
    assert page.row("2")[3:5] == ["–", "–"]


def test_a_refusal_told_twice_is_listed_once():
    summary, metrics, *rest = a_run()
    metrics[0]["refused"] = {"shop-0": "NaN"}
    summary["events"] = ["round 1: shop-0 refused: NaN"]
    assert check(render(summary, metrics, *rest)).text.count("shop-0 refused") == 1


def test_the_last_row_of_a_round_counts():
    summary, metrics, *rest = a_run(rounds=2)
    again = metrics[0] | {"loss": 1.25}
    page = check(render(summary, [*metrics, again], *rest))
    assert page.row("1")[0] == "1.2500"


def test_same_input_same_bytes_and_input_untouched():
    given_run = a_run()
    before = copy.deepcopy(given_run)
    assert render(*given_run) == render(*given_run)
    assert given_run == before


def methods_of(**values):
    """method -> (pooled values, lowest-client values) as compare.json has it."""

    def cell(seeds):
        return {"mean": sum(seeds) / max(1, len(seeds)), "std": 0.001, "values": list(seeds)}

    return {
        method: {"ndcg@10": cell(pooled), "balance/min": cell(low), "balance/cv": cell(low)}
        for method, (pooled, low) in values.items()
    }


def test_comparison_says_whether_the_spread_overlaps():
    compare = methods_of(
        one=([0.40, 0.42], [0.10, 0.20]),
        two=([0.30, 0.39], [0.15, 0.19]),
        three=([0.1, 0.2], [0, 0]),
    )
    page = check(render_comparison(compare, {}, {"name": "all", "seeds": [0, 1]}))
    assert "Pooled test NDCG@10: one has the highest mean, 0.4100 over 2 seeds." in page.text
    assert "does not overlap" in page.text
    assert "NDCG@10 of the lowest client: two has the highest mean, 0.1700" in page.text
    assert "The spread overlaps with that of one: these seeds" in page.text
    assert page.row("clients: lowest client")[1] == "<b>0.1700 ± 0.0010</b>"
    assert page.row("clients: standard deviation / mean")[2] == "<b>0.0000 ± 0.0010</b>"
    assert ["NDCG@10", "0.4000 0.4200", "0.3000 0.3900", "0.1000 0.2000"] in page.rows


def test_comparison_claims_nothing_from_one_seed_or_one_method():
    compare = methods_of(one=([0.4], [0.1]), two=([0.3], [0.1]))
    page = check(render_comparison(compare, {}, {}))
    assert "not yet evidence of a difference" in page.text
    assert page.row("clients: lowest client") == ["<b>0.1000</b>", "<b>0.1000</b>"]
    compare["sasrec"] = methods_of(sasrec=([0.35], [0.3]))["sasrec"]
    page = check(render_comparison(compare, {}, {}))
    assert (
        "one has the highest mean, 0.4000 (next: two, 0.3000)" in page.text
    )  # sasrec is no method
    assert "2 methods: one, two" in page.text
    assert "sasrec 0.3500; 1 of 2 methods are above the best of them" in page.text
    del compare["sasrec"]
    alone = check(render_comparison({"one": compare["one"]}, {}, {}))
    assert "nothing to compare" in alone.text


def test_baselines_are_shown_but_not_ranked_among_the_methods():
    compare = methods_of(one=([0.4, 0.5], [0.1, 0.2]), two=([0.2, 0.2], [0.1, 0.1]))
    compare["prior"] = methods_of(prior=([0.3, 0.3], []))["prior"]
    del compare["prior"]["balance/min"], compare["prior"]["balance/cv"]
    page = check(render_comparison(compare, {}, {}))
    assert "2 methods: one, two" in page.text
    assert "Strongest baseline: prior, 0.3000; 1 of 2 methods are above it" in page.text
    assert page.row("clients: lowest client")[2] == "–"
    del compare["two"]
    assert "nothing to compare" in check(render_comparison(compare, {}, {})).text


def test_comparison_takes_the_lowest_client_from_balances_where_compare_lacks_it():
    compare = methods_of(one=([0.4, 0.5], [0, 0]), two=([0.3, 0.2], [0, 0]))
    for table in compare.values():
        del table["balance/min"]
    seeds = {"0": balance({"a": 0.25, "b": 0.5}), "1": balance({"a": 0.75, "b": 0.8})}
    page = check(render_comparison(compare, {"one": seeds, "two": seeds}, {}))
    assert ["one", "0.4500", "0.5000", "2"] in page.rows
    assert page.row("one, seed 0")[3] == "0.2500"


@given(
    st.lists(st.floats(-1e6, 1e6).map(lambda v: round(v, 6)), min_size=1, max_size=9),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_an_axis_holds_its_values(values, whole):
    values = [round(value) for value in values] if whole else values
    axis = fit_axis(values, 10, 110, whole)
    assert all(9.99 <= axis.at(value) <= 110.01 for value in values)
    assert all(9.99 <= axis.at(tick) <= 110.01 for tick in axis.ticks)
    assert 1 <= len(axis.ticks) <= 8
    labels = [axis.label(tick) for tick in axis.ticks]
    assert len(set(labels)) == len(labels)
    assert not whole or all(tick == int(tick) for tick in axis.ticks)


def test_sizes_in_words():
    words = ["0 B", "1,023 B", "1.0 KiB", "1.5 MiB", "1,024.0 TiB"]
    assert [format_size(count) for count in (0, 1023, 1024, 1.5 * 2**20, 2**50)] == words


def test_long_names_are_cut_for_the_chart():
    assert _shorten("shop-1") == "shop-1"
    assert _shorten("x" * 14) == "x" * 14
    assert _shorten("x" * 15) == "x" * 13 + "…"
    assert _shorten("書" * 8) == "書" * 6 + "…"
