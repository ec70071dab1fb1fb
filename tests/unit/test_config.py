"""The config tree: strict about what it is told, and clear about what was wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fellray.platform.config import RunConfig, dump, load, parse
from fellray.platform.errors import FellrayError
from fellray.platform.fellrec import Fellrec
from fellray.platform.model_config import LoraSpec
from fellray.platform.section import Section

EVERYTHING: dict[str, Any] = {
    "name": "try-1",
    "seed": 4,
    "data": {
        "path": "data/x",
        "source": "x.csv",
        "columns": {"user_id": "u"},
        "split": {"kind": "temporal", "valid": 0.2},
        "partition": {"kind": "per_user"},
    },
    "model": {"cut": 2, "top": 0, "lora": {"r": 4, "target_modules": ["key"], "use_rslora": True}},
    "method": {"kind": "fedavg", "weighting": "samples"},
    "train": {"learning_rate": "1e-3", "clip": 1.5, "moments": "keep", "share": "trunk_only"},
    "clients": {"per_actor": 100, "gpu_denominator": 4},
    "server": {"engine": "torch", "shared_adapter": True},
    "evaluation": {"select": "worst_ndcg@10"},
}


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("tree", [{}, EVERYTHING])
def test_round_trip(tree: dict[str, Any], tmp_path: Path) -> None:
    config = parse(tree, "test")
    text = dump(config)
    assert parse(json.loads(text), "again") == config
    assert load(write(tmp_path, text)) == config, "JSON is YAML: a run's own config can be run"
    assert dump(load(write(tmp_path, text))) == text


def test_a_value_reaches_its_place() -> None:
    config = parse(EVERYTHING, "test")
    assert config.train.learning_rate == 1e-3
    assert config.data.split.kind == "temporal"
    assert config.data.partition.kind == "per_user"
    assert config.model.lora.target_modules == ("key",)
    assert config.method.kind == "fedavg"


def test_a_config_is_frozen() -> None:
    config = parse({}, "test")
    with pytest.raises(ValidationError, match="frozen"):
        config.train.rounds = 3  # type: ignore[misc]


def test_every_field_says_what_it_is() -> None:
    schema = RunConfig.model_json_schema()
    silent = [
        f"{owner}.{name}"
        for owner, body in {"RunConfig": schema, **schema["$defs"]}.items()
        for name, field in body["properties"].items()
        if name != "kind" and "$ref" not in field and not field.get("description")
    ]
    # a section is described by its own class; these four by their names
    sections = {"RunConfig.name", "RunConfig.method"}
    assert set(silent) - sections == set()
    assert issubclass(RunConfig, Section)


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        ({"tarin": {}}, "unknown key 'tarin'; did you mean 'train'?"),
        ({"train": {"learning_rat": 1}}, "'train.learning_rat'; did you mean 'learning_rate'?"),
        ({"model": {"lora": {"alpha": 1}}}, "'model.lora.alpha'; did you mean 'lora_alpha'?"),
        ({"method": {"alhpa": 1}}, "alhpa'; did you mean 'alpha'?"),
        ({"method": {"kind": "fedavg", "weights": "samples"}}, "did you mean 'weighting'?"),
        ({"data": {"split": {"kind": "temporal", "vaild": 0.2}}}, "did you mean 'valid'?"),
        ({"data": {"partition": {"clients": 3}}}, "did you mean 'num_clients'?"),
        ({"evaluation": {"zzz": 1}}, "known here: clients, every, max_users, select"),
    ],
)
def test_a_misspelt_key_is_refused_and_the_nearest_named(tree: dict[str, Any], wanted: str) -> None:
    with pytest.raises(FellrayError) as error:
        parse(tree, "mine.yaml")
    assert wanted in str(error.value)
    assert str(error.value).startswith("mine.yaml: unknown key")


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        ({"train": {"rounds": "many"}}, "mine.yaml: train.rounds: "),
        ({"train": {"rounds": -1}}, "greater than or equal to 0 (got -1)"),
        ({"train": {"share": "some"}}, "'all', 'trunk_only' or 'none' (got 'some')"),
        ({"train": 3}, "mine.yaml: train: "),
        ({"method": {"kind": "fedsgd"}}, "mine.yaml: method: "),
        ({"model": {"max_tokens": 40}}, "max_tokens (40) must be a multiple of pad_multiple (16)"),
        ({"model": {"pad_multiple": 12}}, "mine.yaml: model.pad_multiple: "),
        ({"name": "../up"}, "mine.yaml: name: "),
        ({"server": {"zero_stage": 2}}, "mine.yaml: server.zero_stage: "),
    ],
)
def test_a_wrong_value_names_its_place(tree: dict[str, Any], wanted: str) -> None:
    with pytest.raises(FellrayError) as error:
        parse(tree, "mine.yaml")
    assert wanted in str(error.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(FellrayError) as error:
        parse({"train": {"rounds": -1}, "seeed": 1, "model": {"cut": "x"}}, "mine.yaml")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train: [", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("just words", "must be a mapping"),
    ],
)
def test_a_file_that_is_no_config(text: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(FellrayError, match=wanted) as error:
        load(write(tmp_path, text))
    assert "run.yaml" in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FellrayError, match=r"gone.yaml: cannot be read .*fellray init"):
        load(tmp_path / "gone.yaml")
    with pytest.raises(FellrayError, match="cannot be read"):
        load(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: caf\xe9")
    with pytest.raises(FellrayError, match="is not YAML"):
        load(latin)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}"])
def test_an_empty_file_means_the_defaults(text: str, tmp_path: Path) -> None:
    assert load(write(tmp_path, text)) == RunConfig() == load()


def test_overrides_reach_any_depth_and_win(tmp_path: Path) -> None:
    file = write(tmp_path, "train: {rounds: 7, batch_size: 2}")
    overrides = [
        "train.rounds=3",
        "model.lora.r=16",
        "model.lora.target_modules=[query, key]",
        "method.kind=fellrec",
        "method.beta=1",
        "train.learning_rate=1e-4",
        "train.clip=null",
        "name=a=b".replace("=b", "-b"),
    ]
    config = load(file, overrides)
    assert (config.train.rounds, config.train.batch_size) == (3, 2)
    assert config.model.lora == LoraSpec(r=16, target_modules=("query", "key"))
    assert config.method == Fellrec(beta=1)
    assert config.train.learning_rate == 1e-4
    assert config.name == "a-b"


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.rounds", "write key=value"),
        ("=3", "write key=value"),
        ("seed.x=3", "seed is a value, not a section"),
        ("train.ruonds=3", "did you mean 'rounds'?"),
        ("train.rounds=[", "train.rounds"),
        ("name=a: b: c", "name"),
    ],
)
def test_a_bad_override_is_told(override: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(FellrayError) as error:
        load(write(tmp_path, "seed: 1"), [override])
    assert wanted in str(error.value)


def test_an_override_may_fill_a_section_left_empty(tmp_path: Path) -> None:
    """`train:` with every line below it commented out is a section without keys."""
    assert load(write(tmp_path, "train:\n"), ["train.rounds=3"]).train.rounds == 3


def test_lora_scaling() -> None:
    assert LoraSpec(r=8, lora_alpha=16).scaling == 2.0
    assert LoraSpec(r=16, lora_alpha=16, use_rslora=True).scaling == 4.0


def test_clients_per_actor_is_a_number_or_auto() -> None:
    assert parse({"clients": {"per_actor": "50"}}, "test").clients.together == 50
    assert parse({"clients": {"per_actor": "auto"}}, "test").clients.per_actor == "auto"
    for wrong in (0, -1, 1.5, "many", None, [4]):
        with pytest.raises(FellrayError, match="1 or more, or auto") as refusal:
            parse({"clients": {"per_actor": wrong}}, "test")
        assert len(str(refusal.value).splitlines()) == 1
