"""Studies: what is run for them, how arms are told apart, and the page and the plot."""

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

from fellray.platform.config import load
from fellray.platform.contrast import contrast
from fellray.platform.errors import FellrayError
from fellray.platform.paired import adjust, lowest_p, weigh_signs
from fellray.platform.study import (
    Study,
    Trial,
    choose,
    count_tries,
    is_study,
    list_arms,
    list_seeds,
    list_tries,
    load_study,
)
from fellray.platform.study_page import digest, render_study
from fellray.platform.study_plot import draw_arms
from fellray.platform.study_values import choose_height, name_height, read_values

ROOT = Path(__file__).resolve().parents[2]
TREE: dict[str, Any] = {
    "study": "small",
    "results": "results.md",
    "seeds": [3, 4],
    "tune": {"train.learning_rate": [0.1, 0.2], "train.batch_size": [8]},
    "sets": {"demo": {"config": str(ROOT / "jobs/demo.yaml"), "set": ["train.rounds=2"]}},
    "parts": [
        {
            "title": "Methods",
            "sets": ["demo"],
            "arms": {"fellrec": [], "fedavg": ["method.kind=fedavg", "train.learning_rate=0.3"]},
        },
        {"title": "Again", "sets": ["demo"], "arms": {"fellrec": []}},
    ],
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(TREE | changes, sort_keys=False))
    return path


def summary(ndcg: list[float], loss: float = 0.0, baseline: float = 0.01) -> dict[str, Any]:
    """Of a run whose clients have these values."""
    clients = {f"c{at}": {"users": 10, "ndcg@10": value} for at, value in enumerate(ndcg)}
    mean = sum(ndcg) / len(ndcg)
    return {
        "test": {"ndcg@10": mean, "recall@10": 2 * mean},
        "validation": {"ndcg@10": mean - loss},
        "per_client": clients,
        "balance": {"min": min(ndcg), "cv": 0.1},
        "bytes": {"activation": 4_000_000, "evaluation_activation": 9_000_000},
        "clients": 2,
        "rounds": 2,
        "hashes": {"c0": "a" * 64},
        "popularity": {"ndcg@10": baseline},
        "prior": {"ndcg@10": baseline / 2},
        "untrained": {"ndcg@10": baseline / 2},
    }


def test_every_arm_tries_alike_and_a_run_is_a_command(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    assert [(name, arm) for name, arm, _ in list_arms(study)] == [
        ("demo", "fellrec"),
        ("demo", "fedavg"),
    ]
    tries = list_tries(study, "demo", "fellrec")
    assert [trial.tuned for trial in tries] == [
        ("train.learning_rate=0.1", "train.batch_size=8"),
        ("train.learning_rate=0.2", "train.batch_size=8"),
    ]
    # what an arm fixes is not tuned
    (fixed,) = list_tries(study, "demo", "fedavg")
    assert fixed.tuned == ("train.batch_size=8",)
    first, second = list_seeds(study, tries[1])
    assert (first, second.seed) == (tries[1], 4)
    assert second.name == "small-demo-fellrec-0.2-8-s4"
    assert second.command.startswith("fellray train ")
    assert "train.learning_rate=0.2 train.batch_size=8 seed=4 name=small" in second.command
    config = second.settle()
    assert (config.seed, config.train.rounds, config.train.learning_rate) == (4, 2, 0.2)


def test_an_arm_or_a_set_may_try_something_else(tmp_path: Path) -> None:
    own = {"train.learning_rate": [0.5, 2.0]}
    sets = TREE["sets"] | {"plain": {**TREE["sets"]["demo"], "tune": {}}}
    part = {"title": "x", "sets": ["demo", "plain"], "arms": {"fellrec": [], "other": []}}
    study = load_study(write(tmp_path, tune_arms={"other": own}, sets=sets, parts=[part]))

    def tuned(name: str, arm: str) -> list[tuple[str, ...]]:
        return [trial.tuned for trial in list_tries(study, name, arm)]

    assert tuned("demo", "other") == [("train.learning_rate=0.5",), ("train.learning_rate=2.0",)]
    assert len(tuned("demo", "fellrec")) == 2
    assert tuned("plain", "fellrec") == [()]
    assert tuned("plain", "other") == tuned("demo", "other")
    values = {arm: [[0.2, 0.3], [0.2, 0.3]] for arm in ("fellrec", "other")}
    page = render(study, results_of(study, values))
    assert "(instead: `other` `train.learning_rate` of 0.5, 2.0; on plain nothing)." in page


def test_validation_chooses_not_test(tmp_path: Path) -> None:
    first, second = list_tries(load_study(write(tmp_path)), "demo", "fellrec")
    results = {first: summary([0.3, 0.3], loss=0.2), second: summary([0.2, 0.2])}
    assert choose(results, "ndcg@10") == second
    assert choose({first: summary([0.3]), second: summary([0.3])}, "ndcg@10") == first


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sedes": [1]}, "sedes"),
        ({"parts": [{"title": "x", "sets": ["nowhere"], "arms": {"a": []}}]}, "no set 'nowhere'"),
        ({"parts": [{"title": "x", "sets": ["demo"], "arms": {"a": ["train.runds=1"]}}]}, "rounds"),
        ({"parts": [{"title": "x", "sets": ["demo"], "arms": {"a": []}, "champion": "b"}]}, "'b'"),
        ({"tune": {"train.learning_rate": [-1]}}, "learning_rate"),
        ({"tune_arms": {"felrec": {"seed": [1, 2]}}}, "'felrec', which is no arm"),
        ({"tune_arms": {"fellrec": {"seed": [1]}}}, "would have 1 tries, the others 2"),
        ({"tune_arms": {"fellrec": {"seed": [1, 2, 3]}}}, "would have 3 tries, the others 2"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(FellrayError, match=told):
        load_study(write(tmp_path, **changes))


def test_one_name_is_one_arm(tmp_path: Path) -> None:
    other = {"title": "x", "sets": ["demo"], "arms": {"fellrec": ["train.rounds=3"]}}
    with pytest.raises(FellrayError, match="means two things"):
        load_study(write(tmp_path, parts=[*TREE["parts"], other]))


def test_the_studies_that_come_along_are_whole() -> None:
    for path in sorted((ROOT / "jobs").glob("*.yaml")):
        assert is_study(path) == path.name.startswith("study"), path
        if is_study(path):
            # configs in it are named from the root, where commands are given
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(ROOT)
                load_study(path)
    assert not is_study(ROOT / "nothing.yaml")


def test_signs_are_weighed_exactly() -> None:
    """Against all 2^n sign patterns, counted by hand."""
    first, second = [0.5, 0.4, 0.7, 0.1, 0.6], [0.3, 0.5, 0.2, 0.05, 0.1]
    d = [a - b for a, b in zip(first, second, strict=True)]
    assert weigh_signs(d) == pytest.approx(_count_signs(d))
    assert weigh_signs([0.0] * 5) == 1.0
    assert weigh_signs([1.0]) == 1.0
    assert weigh_signs([0.1, 0.2, 0.3]) == lowest_p(3) == 0.25


def test_holm_by_hand() -> None:
    assert adjust([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert adjust([0.9, 0.8]) == [1.0, 1.0]
    assert adjust([]) == []


def render(study: Study, results: Any, *more: Any) -> str:
    configs = {name: load(own.config, own.set) for name, own in study.sets.items()}
    return render_study(study, results, {}, configs, *more)


def results_of(study: Study, values: dict[str, list[list[float]]]) -> Any:
    found: dict[tuple[str, str], dict[Trial, Any]] = {}
    for name, arm, _ in list_arms(study):
        best = list_tries(study, name, arm)[0]
        seeds = list_seeds(study, best)
        found[name, arm] = {t: summary(v) for t, v in zip(seeds, values[arm], strict=True)}
    return found


def test_clients_are_what_a_contrast_counts() -> None:
    """Seeds of one client are one part of the difference, and users weigh it, as in the table."""

    def run(*values: float) -> dict[str, Any]:
        users = [30, 10, 10, 10, 10]
        own = {
            f"c{at}": {"users": n, "ndcg@10": v}
            for at, (n, v) in enumerate(zip(users, values, strict=True))
        }
        pooled = sum(n * v for n, v in zip(users, values, strict=True)) / sum(users)
        return {"per_client": own, "test": {"ndcg@10": pooled}}

    first = [run(0.5, 0.1, 0.1, 0.1, 0.1)] * 3
    # lower where most users are, higher at all others: lower in the mean over users
    other = [run(0.3, 0.11, 0.11, 0.11, 0.11), run(0.3, 0.12, 0.12, 0.12, 0.12), first[0]]
    one = contrast(first, {"other": other}, "ndcg@10")["other"]
    assert one.difference == pytest.approx(-(30 * 0.4 - 40 * 0.03) / 3 / 70)
    assert (one.seeds, one.clients) == ((0, 3), (4, 5))
    # 16 of 32 sign patterns: the large client's part decides
    assert one.p == pytest.approx(_count_signs([-30 * 0.4 / 3] + [10 * 0.03 / 3] * 4))
    both = contrast(first, {"a": other, "b": other}, "ndcg@10")
    assert both["a"].p == pytest.approx(min(1.0, 2 * one.p))
    # always one sign: as low as five clients allow, whatever the number of seeds
    above = [run(0.6, 0.2, 0.2, 0.2, 0.2)] * 3
    assert contrast(first, {"above": above}, "ndcg@10")["above"].p == pytest.approx(2 / 32)


def _count_signs(parts: list[float]) -> float:
    sums = [
        abs(sum(s * x for s, x in zip(signs, parts, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(parts))
    ]
    return sum(one >= abs(sum(parts)) - 1e-12 for one in sums) / len(sums)


def test_the_page_says_what_a_set_is_and_what_was_not_kept(tmp_path: Path) -> None:
    demo = TREE["sets"]["demo"] | {"note": "Drawn users.", "prepare": "fellray prepare x"}
    study = load_study(write(tmp_path, sets={"demo": demo}))
    results = results_of(study, {"fellrec": [[0.2], [0.2]], "fedavg": [[0.1], [0.1]]})
    losing = list_tries(study, "demo", "fellrec")[1]
    page = render(study, results, {losing: summary([0.17])})
    assert "- **demo**: 2 clients; 2 rounds, each validated, the best kept." in page
    assert "Drawn users. `fellray prepare x`" in page
    assert f"| 0.1700, not kept | `{losing.command}` |" in page
    assert "has the highest mean in 1 of 1 tables, in 0 of them with p < 0.05" in page
    assert "It does not win" not in page


def test_the_page_begins_with_who_does_not_win(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    low, high = [[0.10, 0.12], [0.11, 0.12]], [[0.20, 0.22], [0.21, 0.25]]
    page = render(study, results_of(study, {"fellrec": low, "fedavg": high}))
    found = page.split("## What was found")[1].split("##")[0]
    assert "- The first arm of a table has the highest mean in 0 of 1 tables" in found
    assert "**It does not win in: Methods, demo.**" in found
    assert "`fellrec` does not win: 0.1125, `fedavg` 0.2200" in found
    assert "Its lowest client has 0.1050, with `fedavg` 0.2050" in found
    assert "alone in its table" in found
    page = render(study, results_of(study, {"fellrec": high, "fedavg": low}))
    assert "`fellrec` has the highest mean: 0.2200, `fedavg` 0.1125" in page
    assert "All are above the rows without training (popularity 0.0100)" in page
    row = next(line for line in page.splitlines() if line.startswith("| `fedavg`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "0.1125 ± 0.0035"
    # two clients: no p is below .5, however clear the difference
    assert cells[5:] == ["-0.1075", "0/2 seeds, 0/2 clients", "0.500", "8", "1.0"]
    # every run with its command and its hash
    for trials in results_of(study, {"fellrec": high, "fedavg": low}).values():
        for trial, own in trials.items():
            value = own["validation"]["ndcg@10"]
            assert f"| `{digest(own)}` | {value:.4f} | `{trial.command}` |" in page


def test_arms_below_a_baseline_are_named(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    tiny = [[0.001, 0.002], [0.001, 0.002]]
    page = render(study, results_of(study, {"fellrec": tiny, "fedavg": tiny}))
    assert "Not above popularity (0.0100): `fellrec`, `fedavg`" in page
    assert "So few clients or seeds cannot tell arms apart: p is 0.5 at least." in page


def click_summary(auc: float) -> dict[str, Any]:
    """Of a run on attributes: no clients' values, no balance, no popularity."""
    return {
        "test": {"auc": auc, "gauc": auc - 0.1},
        "validation": {"auc": auc},
        "untrained": {"auc": 0.6, "gauc": 0.55},
        "embedding_only": {"auc": 0.7},
        "bytes": {"adapter_up": 65_000},
        "clients": 2,
        "rounds": 2,
        "hashes": {"u1": "a" * 64},
    }


def test_runs_on_attributes_have_a_table_of_their_own(tmp_path: Path) -> None:
    clicks = {"config": str(ROOT / "jobs/fedpa.yaml")}
    part = {
        "title": "FedPA",
        "sets": ["clicks"],
        "metric": "auc",
        "columns": ["gauc"],
        "arms": {"corrected": [], "published": ["method.as_published=true"]},
    }
    more = {"tune": {}, "sets": TREE["sets"] | {"clicks": clicks}, "parts": [part]}
    study = load_study(write(tmp_path, **more))
    found: Any = {}
    for name, arm, _ in list_arms(study):
        values = [0.72, 0.71] if arm == "corrected" else [0.69, 0.7]
        trials = list_seeds(study, list_tries(study, name, arm)[0])
        found[name, arm] = {t: click_summary(v) for t, v in zip(trials, values, strict=True)}
    page = render(study, found)
    assert "**FedPA, clicks**, AUC: `corrected` has the highest mean: 0.7150" in page
    assert "Not above embedding only (0.7000): `published`." in page
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert table[0] == "|  | AUC | GAUC | difference | above it | p | MB a client and round |"
    assert "| embedding only | 0.7000 |  |  |  |  |  |" in table
    assert "| untrained | 0.6000 | 0.5500 |  |  |  |  |" in table
    (row,) = [line for line in table if line.startswith("| `published`")]
    told = "| -0.0200 | 0/2 seeds | 0.500 | 0.016 |"
    assert row == f"| `published` | 0.6950 ± 0.0071 | 0.5950 ± 0.0071 {told}"


def test_a_plot_sets_against_what_runs_tell() -> None:
    clicks, ranked = [click_summary(0.7)], [summary([0.2, 0.3])]
    assert choose_height("auc", clicks) == "gauc"
    assert choose_height("gauc", clicks) == "auc"
    assert choose_height("ndcg@10", ranked) == "balance/min"
    assert choose_height("ndcg@10", [*ranked, ranked[0] | {"balance": {}}]) is None
    assert read_values([*ranked, *clicks], "balance/min") == [0.2]
    assert name_height("balance/min") == "NDCG@10 of the lowest client"
    assert name_height("gauc") == "GAUC, test"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metric": "acu"}, "on clicks: runs have no metric 'acu'; there are auc, gauc"),
        ({"metric": "ndcg@10"}, "no metric 'ndcg@10'"),
        ({"metric": "auc", "columns": ["recall@10"]}, "no metric 'recall@10'"),
        ({"metric": "log_loss"}, "more is not better"),
        ({"metric": "auc", "sets": ["clicks", "demo"]}, "on demo: runs have no metric 'auc'"),
    ],
)
def test_a_metric_that_no_run_has_is_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    clicks = {"config": str(ROOT / "jobs/fedpa.yaml")}
    part = {"title": "x", "sets": ["clicks"], "arms": {"a": []}} | changes
    more = {"tune": {}, "sets": TREE["sets"] | {"clicks": clicks}, "parts": [part]}
    with pytest.raises(FellrayError, match=told):
        load_study(write(tmp_path, **more))


def test_rows_for_orientation_stand_beside_the_arms(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, orientation=True))
    assert count_tries(study) == 2

    def central(first: float, second: float) -> dict[str, Any]:
        seeds = [
            {"test": {"ndcg@10": v, "recall@10": 2 * v}, "balance": {"min": v / 2, "cv": 0.25}}
            for v in (first, second)
        ]
        return {
            "settings": {"k": 20, "loss": "bce"},
            "tried": [{"settings": {"k": k, "loss": "bce"}} for k in (100, 20)],
            "seeds": [own | {"hash": "ab"} for own in seeds],
            "command": "python -m somewhere --rows x",
        }

    results = results_of(study, {"fellrec": [[0.2], [0.2]], "fedavg": [[0.1], [0.1]]})
    rows = {"item_knn": central(0.1, 0.2), "sasrec": central(0.12, 0.14)}
    page = render(study, results, {}, {"demo": rows})
    assert "| item_knn | 0.1500 ± 0.0707 | 0.3000 ± 0.1414 | 0.0750 ± 0.0354 | 0.2500" in page
    assert "|  |  |  | k 20 |  |" in page  # the loss was the same in both tries
    found = page.split("## What was found")[1].split("##")[0]
    assert "item_knn 0.1500, sasrec 0.1300; 1 of 2 arms are above item_knn." in found
    assert page.count("`python -m somewhere --rows x` |") == 1  # one command makes both
    assert "`item_knn`" not in page  # no arm
    assert "everybody" not in render(study, results)


def test_the_plot_is_a_file_of_its_own() -> None:
    across = {f"arm {at} <b>": [0.1 + at / 100, 0.11 + at / 100] for at in range(30)}
    up = {arm: [value / 2 for value in values] for arm, values in across.items()}
    drawn = draw_arms("Methods", across, up, "arm 3 <b>", "right", "high")
    root = ElementTree.fromstring(drawn)
    name = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{name}circle")) == 30
    words = [(one.text, float(one.attrib["y"])) for one in root.findall(f"{name}text")]
    places = sorted(y for text, y in words if text and text.startswith("arm "))
    assert len(places) == 30
    assert min(b - a for a, b in itertools.pairwise(places)) >= 12.9  # no two names overlap
    assert places[-1] <= float(root.attrib["height"])
    assert drawn == draw_arms("Methods", across, up, "arm 3 <b>", "right", "high")
