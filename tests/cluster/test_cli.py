"""The command line: what a user gets wrong is named, with the file, the field and the way out.

Errors end with status 2 and a message without a traceback, and leave nothing half written.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from driver import Driver

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs import cli
from fellray.jobs.display import Display
from fellray.jobs.finish import finish
from fellray.jobs.train import one_round
from fellray.platform import config as configs
from fellray.platform.config import RunConfig
from fellray.platform.run import open_run
from fellray.platform.storage import Storage

pytestmark = pytest.mark.timeout(600)
CLUSTER = pytest.mark.cluster
COMMANDS = (
    *("init", "doctor", "prepare", "plan", "train", "evaluate", "compare", "runs", "recommend"),
    *("scale", "serve", "token", "promote", "rollback", "continue", "bench"),
)
ROWS = [(user, item, 10 * user + at) for user in range(12) for at, item in enumerate("abcdef")]
"""Twelve users, each of whom met the same six items."""

EVEN = """
import torch

from fellray.platform.aggregation import Meta, Method, Plan


class Even(Method):
    def plan(self, meta: Meta) -> Plan:
        num_clients = len(meta.clients)
        return Plan(torch.full((num_clients, num_clients), 1 / num_clients, dtype=torch.float64))
"""
"""A method of the user's own: everybody receives the mean."""

Configure = Callable[..., RunConfig]


@dataclass(frozen=True)
class Answer:
    """What a command printed and how it ended."""

    status: int
    out: str
    err: str


Fellray = Callable[..., Answer]


@pytest.fixture
def fellray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fellray:
    """`fellray("train", path)`: the command in this process. A traceback would end the test."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["fellray", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        status = ended.value.code
        return Answer(status if isinstance(status, int) else 0, *capsys.readouterr())

    return call


def refused(answer: Answer, *words: object) -> str:
    """Exit status 2 and one message that holds all the words."""
    assert answer.status == 2, answer
    assert answer.err.startswith("fellray: "), answer.err
    assert "Traceback" not in answer.err
    assert "\x1b" not in answer.err
    missing = [str(word) for word in words if str(word) not in answer.err]
    assert missing == [], answer.err
    return answer.err


@pytest.fixture
def written(tmp_path: Path, tiny_config: Configure) -> Path:
    """A good config on disk."""
    path = tmp_path / "good.yaml"
    path.write_text(configs.dump(tiny_config()))
    return path


def trained_in_this_process(config: RunConfig) -> Path:
    """A finished run, and its folder."""
    world = survey(config)
    with (
        open_run(config, world.data_sha256) as run,
        Plant.inline(config, world, run.rounds) as plant,
        Display(config, "", run.to_go()) as display,
    ):
        for t in run.to_go():
            outcome = plant.replayed(one_round, t, config)
            run.commit(t, outcome, plant.close_ledger(), plant.take_events())
        finish(run, plant, world, display)
    return Path(config.storage) / config.name


@pytest.fixture(scope="module")
def trained(tiny_config: Configure) -> Path:
    """A finished run's folder, to be looked at only."""
    return trained_in_this_process(tiny_config(name="trained", clients={"per_actor": 2}))


@pytest.fixture
def own_copy(trained: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / trained.name))


def csv(folder: Path, rows: list[tuple[object, ...]], header: str = "user,item,ts") -> Path:
    """A file of interactions whose titles are its items' names."""
    file = folder / "shop.csv"
    lines = [f"{header},title", *(",".join(map(str, [*row, f"title {row[1]}"])) for row in rows)]
    file.write_text("\n".join(lines) + "\n")
    return file


COLUMNS = "data.columns={user_id: user, item_id: item, timestamp: ts, title: title}"


@pytest.fixture
def prepare(fellray: Fellray, written: Path, tmp_path: Path) -> Callable[..., Answer]:
    """`fellray prepare` of a CSV file into a folder of its own, k-core 1 and two clients."""

    def call(source: Path, *overrides: str) -> Answer:
        mine = [
            f"data.path={tmp_path / 'prepared'}",
            f"data.source={source}",
            "data.k_core=1",
            "data.partition.num_clients=2",
        ]
        return fellray("prepare", written, *mine, COLUMNS, *overrides)

    return call


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, fellray: Fellray) -> None:
    answer = fellray(command, "--help")
    assert answer.status == 0
    assert f"fellray {command}" in answer.out
    assert answer.err == ""


def test_every_command_has_its_help_tested(fellray: Fellray) -> None:
    named = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    assert named | {"bench"} == set(COMMANDS)
    answer = fellray("--help")
    assert [command for command in COMMANDS if command not in answer.out] == []


def test_the_real_command_ends_with_status_2(tmp_path: Path) -> None:
    driver = Driver.python(
        *("-m", "fellray.jobs.cli", "train", "nowhere.yaml"), log=tmp_path / "log"
    )
    try:
        answer = Answer(*driver.finish(60))
    finally:
        driver.end()
    refused(answer, "nowhere.yaml", "fellray init")
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1


# the config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trian.rounds=3", ["unknown key 'trian'", "did you mean 'train'?"]),
        ("train.round=3", ["unknown key 'train.round'", "did you mean 'rounds'?"]),
        ("model.lora.rank=4", ["unknown key 'model.lora.rank'", "known here: ", "r, "]),
        ("method.temprature=1", ["temprature", "did you mean"]),
        ("train.rounds=many", ["train.rounds", "'many'"]),
        ("train.rounds=-1", ["train.rounds", "-1"]),
        ("train.learning_rate=0", ["train.learning_rate"]),
        ("model.max_tokens=50", ["max_tokens (50)", "pad_multiple"]),
        ("server.engine=tensorflow", ["server.engine", "deepspeed", "torch"]),
        ("method.kind=fedsgd", ["method", "fedsgd", "fellrec", "fedavg"]),
        ("name=a/b", ["name", "a/b"]),
        ("rounds", ["override 'rounds'", "key=value"]),
        ("name.first=x", ["override 'name.first=x'", "is a value"]),
        ("train.rounds=[", ["train.rounds=["]),
        ("method={kind: file, path: nowhere.py, name: Mine}", ["nowhere.py", "no such"]),
    ],
)
def test_settings_that_do_not_fit(
    override: str, words: list[str], fellray: Fellray, written: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    refused(fellray("train", written, override), *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {rounds: 3", ["bad.yaml", "is not YAML"]),
        ("- train\n- rounds", ["bad.yaml", "mapping"]),
        ("train:\n  rouds: 3\n", ["bad.yaml", "train.rouds", "did you mean 'rounds'?"]),
        ("\0", ["bad.yaml", "is not YAML"]),
    ],
)
def test_files_that_are_no_config(
    text: str, words: list[str], fellray: Fellray, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    refused(fellray("prepare", tmp_path / "bad.yaml"), *words)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("class Other: pass", ["method.name 'Mine'", "subclass"]),
        (
            "from fellray.platform.aggregation import Method\nclass Mine(Method):\n    a: int = 1",
            ["method.options", "Mine"],
        ),
        ("import nowhere_to_be_found", ["nowhere_to_be_found"]),
        ("class Mine(", ["never closed"]),
    ],
)
def test_a_method_file_that_cannot_be_used(
    code: str, words: list[str], fellray: Fellray, written: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(code + "\n")
    method = f"method={{kind: file, path: {file}, name: Mine, options: {{b: 2}}}}"
    refused(fellray("train", written, method), file, *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.cut=5"], ["model.cut=5", "5 blocks", "cut + top <= 4"]),
        (["model.cut=3", "model.top=2"], ["model.cut=3", "model.top=2", "cut + top <= 4"]),
        (["model.lora.target_modules=[q_proj]"], ["model.lora.target_modules", "q_proj", "query"]),
        (["model.name=./nowhere"], ["model.name ./nowhere", "all-MiniLM-L6-v2"]),
        (["data.path=nowhere"], ["nowhere", "fellray prepare", "data.path"]),
    ],
)
def test_models_and_data_that_do_not_fit(
    overrides: list[str], words: list[str], fellray: Fellray, written: Path, tiny_config: Configure
) -> None:
    storage = Path(tiny_config().storage)
    answer = fellray("train", written, f"storage={storage}", *overrides)
    refused(answer, *words)
    assert list(storage.iterdir()) == []


def test_data_of_another_encoder(
    fellray: Fellray, written: Path, tiny_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "prepared"))
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["encoder"]["sha256"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(manifest))
    refused(fellray("train", written, f"data.path={data}"), data, "another encoder", "prepare")


# the interactions


def test_a_missing_column(prepare: Callable[..., Answer], tmp_path: Path) -> None:
    source = csv(tmp_path, ROWS, "user,product,ts")
    refused(prepare(source), source, "'item' (item_id)", "product", "data.columns.item_id=")
    assert not (tmp_path / "prepared").exists()


def test_an_unknown_item(prepare: Callable[..., Answer], tmp_path: Path) -> None:
    items = tmp_path / "items.csv"
    items.write_text("item,title\n" + "".join(f"{name},title {name}\n" for name in "abcde"))
    source = csv(tmp_path, ROWS)
    refused(prepare(source, f"data.items={items}"), source, "item_id 'f' (1 in all)", items)
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        (0, 1.5, ["user_id", "double", "whole numbers or text"]),
        (2, "noon", ["timestamp", "string", "unix seconds"]),
        (0, "", ["user_id", "null or empty", "row 4 "]),
    ],
)
def test_a_wrong_type(
    column: int, value: object, words: list[str], prepare: Callable[..., Answer], tmp_path: Path
) -> None:
    rows = [list(row) for row in ROWS]
    rows[3][column] = value
    source = csv(tmp_path, [tuple(row) for row in rows])
    refused(prepare(source), source, *words)
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("rows", "overrides", "words"),
    [
        (ROWS, ["data.k_core=50"], ["no interaction is left", "data.k_core=50", "lower"]),
        (ROWS, ["data.min_rating=4"], ["data.min_rating", "no ratings"]),
        (
            [row for row in ROWS if row[1] in "ab"],
            [],
            ["leave_one_out", "at least 3 interactions", "has 2"],
        ),
        (ROWS, ["data.partition.num_clients=13"], ["num_clients=13", "only 12 users", "lower"]),
        (
            [row for row in ROWS if row[1] in "abc"],
            ["data.partition={kind: per_user}"],
            ["client u", "nothing to train on", "data.k_core"],
        ),
        ([], [], ["has no rows"]),
    ],
)
def test_too_few_interactions_and_empty_clients(
    rows: list[tuple[object, ...]],
    overrides: list[str],
    words: list[str],
    prepare: Callable[..., Answer],
    tmp_path: Path,
) -> None:
    refused(prepare(csv(tmp_path, rows), *overrides), *words)
    assert not (tmp_path / "prepared").exists()


def test_a_source_that_is_not_there(prepare: Callable[..., Answer], tmp_path: Path) -> None:
    refused(prepare(tmp_path / "nowhere.csv"), "nowhere.csv", "does not exist", "data.source")


def test_prepare_spares_what_it_did_not_write(
    prepare: Callable[..., Answer], tmp_path: Path
) -> None:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared/thesis.tex").write_text("mine")
    refused(prepare(csv(tmp_path, ROWS)), tmp_path / "prepared", "no prepared folder")
    assert (tmp_path / "prepared/thesis.tex").read_text() == "mine"


def test_init_spares_what_is_there(fellray: Fellray, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine")
    refused(fellray("init", tmp_path / "mine.yaml"), "mine.yaml", "exists already")
    assert (tmp_path / "mine.yaml").read_text() == "name: mine"


def test_init_leaves_a_gap_for_what_it_cannot_guess(
    fellray: Fellray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = csv(tmp_path, ROWS, "who,what,when")
    answer = fellray("init", "my shop.yaml", "--source", source)
    assert answer.status == 0, answer
    assert "No column looks like user_id or item_id:" in answer.out
    assert "No column looks like a timestamp" in answer.out
    assert answer.out.endswith("Next: fellray prepare 'my shop.yaml'\n")
    refused(fellray("prepare", "my shop.yaml"), source, "'?' (user_id)", "data.columns.user_id=")


def test_init_where_nothing_can_be_written(fellray: Fellray, tmp_path: Path) -> None:
    refused(fellray("init", tmp_path / "nowhere/mine.yaml"), "nowhere/mine.yaml", "cannot be")


# what lies on disk was changed by somebody else


def damage(file: Path) -> None:
    """One bit in the middle; the size stays."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@CLUSTER
@pytest.mark.long
def test_a_damaged_shard(
    fellray: Fellray, written: Path, tiny_data: Path, tmp_path: Path, local_ray: None
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "prepared"))
    damage(data / "clients/c3.parquet")
    answer = fellray("train", written, f"data.path={data}")
    message = refused(answer, data / "clients/c3.parquet", "fellray prepare")
    assert len(message) < 1000


def test_a_damaged_manifest_of_the_data(
    fellray: Fellray, written: Path, tiny_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "prepared"))
    (data / "manifest.json").write_bytes((data / "manifest.json").read_bytes()[:-100])
    refused(fellray("train", written, f"data.path={data}"), data / "manifest.json", "prepare")


@pytest.mark.parametrize("file", ["clients-00002.safetensors", "trunk-00000.safetensors"])
def test_a_damaged_checkpoint_is_not_served(file: str, fellray: Fellray, own_copy: Path) -> None:
    damage(own_copy / "rounds/000002" / file)
    answer = fellray("recommend", own_copy, "--client", "c0", "--history", "x", "--round", 2)
    refused(answer, f"rounds/000002/{file}", "is damaged", "committed rounds: 0, 1", "resume")


@CLUSTER
@pytest.mark.long
def test_training_goes_on_beside_a_damaged_checkpoint(
    fellray: Fellray, own_copy: Path, tmp_path: Path, local_ray: None
) -> None:
    damage(own_copy / "rounds/000002/clients-00000.safetensors")
    path = tmp_path / "longer.yaml"
    shutil.copy(own_copy / "config.json", path)
    answer = fellray("train", path, f"storage={own_copy.parent}", "train.rounds=3")
    assert answer.status == 0, answer
    event = "rounds/000002/clients-00000.safetensors is damaged: back goes client"
    assert event in " ".join(answer.out.split())
    (said,) = json.loads((own_copy / "summary.json").read_text())["events"]
    assert said.startswith(event)
    assert said.endswith("to round 1")


@pytest.mark.parametrize("command", ["recommend", "evaluate"])
def test_a_damaged_config_of_a_run(command: str, fellray: Fellray, own_copy: Path) -> None:
    file = own_copy / "config.json"
    file.write_bytes(file.read_bytes()[:-100])
    options = ["--client", "c0", "--history", "x"] if command == "recommend" else []
    refused(fellray(command, own_copy, *options), file)


@pytest.mark.parametrize("file", ["config.json", "summary.json"])
def test_a_damaged_run_does_not_hide_the_others(
    file: str, fellray: Fellray, own_copy: Path
) -> None:
    shutil.copytree(own_copy, own_copy.with_name("whole"))
    (own_copy / file).write_bytes((own_copy / file).read_bytes()[:-100])
    answer = fellray("runs", own_copy.parent)
    assert answer.status == 0, answer
    assert " damaged " in answer.out
    assert " finished " in answer.out


# runs


def test_a_run_goes_on_with_its_own_config(
    fellray: Fellray, own_copy: Path, tmp_path: Path
) -> None:
    path = tmp_path / "changed.yaml"
    shutil.copy(own_copy / "config.json", path)
    before = {file: file.read_bytes() for file in own_copy.rglob("*.*")}
    place = f"storage={own_copy.parent}"
    answer = fellray("train", path, place, "train.batch_size=8", "seed=3", "train.rounds=5")
    message = refused(answer, own_copy, "seed, train.batch_size", "another name")
    assert "train.rounds" not in message
    assert {file: file.read_bytes() for file in own_copy.rglob("*.*")} == before


def test_a_run_keeps_its_data(
    fellray: Fellray, own_copy: Path, tiny_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "prepared"))
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["data"]["seed"] = 99
    (data / "manifest.json").write_text(json.dumps(manifest))
    tree = json.loads((own_copy / "config.json").read_text())
    tree["data"]["path"] = str(data)
    for file in (own_copy / "config.json", tmp_path / "same.yaml"):
        file.write_text(json.dumps(tree))
    answer = fellray("train", tmp_path / "same.yaml", f"storage={own_copy.parent}")
    refused(answer, own_copy, f"the prepared data in {data}")


def test_one_process_at_a_time(fellray: Fellray, own_copy: Path) -> None:
    with Storage(own_copy).lock("train"):
        answer = fellray("train", own_copy / "config.json", f"storage={own_copy.parent}")
    refused(answer, own_copy, f"locked by process {os.getpid()}", "since")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "nowhere/run"], ["nowhere/run", "fellray runs"]),
        (["evaluate", "RUN", "--split", "train"], ["split 'train'", "valid, test"]),
        (["evaluate", "RUN", "--round", "7"], ["no round 7", "0, 1, 2", "keep_last"]),
        (
            ["recommend", "RUN", "--client", "c9", "--history", "x"],
            ["client 'c9'", "it has c0, c1"],
        ),
        (
            ["recommend", "RUN", "--client", "c0", "--history", " ; "],
            ["titles", "--history is empty"],
        ),
        (["recommend", "RUN", "--client", "c0", "--history", "x", "--k", "0"], ["k=0", "1 to"]),
        (["compare", "CONFIG", "--methods", "fedavg,fedfoo"], ["fedfoo", "fellrec"]),
        (["compare", "CONFIG", "--seeds", "0,one"], ["seeds", "one"]),
    ],
)
def test_questions_without_an_answer(
    arguments: list[str], words: list[str], fellray: Fellray, trained: Path
) -> None:
    stand_for = {"RUN": str(trained), "CONFIG": str(trained / "config.json")}
    refused(fellray(*(stand_for.get(a, a) for a in arguments)), *words)


def test_no_runs(fellray: Fellray, tmp_path: Path) -> None:
    answer = fellray("runs", tmp_path / "nowhere")
    assert answer.status == 0
    assert "nowhere holds no runs" in answer.out
    assert not (tmp_path / "nowhere").exists()


def test_a_run_that_is_held_is_running(fellray: Fellray, own_copy: Path) -> None:
    (own_copy / "summary.json").unlink()
    storage = own_copy.parent
    with Storage(own_copy).lock("train"):
        held = fellray("runs", storage).out
    assert "running" in held
    assert "interrupted" not in held
    ended = fellray("runs", storage).out
    assert " interrupted " in ended
    assert "goes on with the command that began it" in ended
    assert max(map(len, ended.splitlines())) <= 80


@pytest.mark.parametrize("command", ["prepare", "train", "compare"])
def test_ctrl_c_says_what_comes_of_it(
    command: str, fellray: Fellray, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fellray.jobs.{command}.{command}", stop)
    answer = fellray(command, written)
    assert answer.status == 130
    assert answer.err.startswith("fellray: interrupted; ")
    assert len(answer.err.splitlines()) == 1


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("a full disk needs the right to mount a small one")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_prepare_on_a_full_disk(
    prepare: Callable[..., Answer], tiny_disk: Path, tmp_path: Path
) -> None:
    (tiny_disk / "ballast").write_bytes(bytes(250 * 1024))
    source = csv(tmp_path, ROWS)
    answer = prepare(source, f"data.path={tiny_disk / 'prepared'}")
    refused(answer, tiny_disk / "prepared", "No space left", "data.path")
    assert [file.name for file in tiny_disk.iterdir()] == ["ballast"]


@CLUSTER
@pytest.mark.long
def test_train_on_a_full_disk_goes_on_when_there_is_room(
    fellray: Fellray, tiny_disk: Path, tiny_config: Configure, trained: Path, local_ray: None
) -> None:
    """No round happens by half: with room the run ends where the undisturbed one did."""
    config = tiny_config(name="trained", storage=str(tiny_disk), clients={"per_actor": 2})
    path = trained.parent / "full.yaml"
    path.write_text(configs.dump(config))
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(190 * 1024))
    refused(fellray("train", path), f"{tiny_disk}/trained", "no space is left")
    assert not (tiny_disk / "trained/summary.json").exists()
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(tiny_disk)], check=True)
    assert fellray("train", path).status == 0
    for key in ("final_hashes", "test"):
        ours = json.loads((tiny_disk / "trained/summary.json").read_text())[key]
        assert ours == json.loads((trained / "summary.json").read_text())[key]


@CLUSTER
@pytest.mark.long
def test_a_run_that_diverges_says_so(
    fellray: Fellray, written: Path, tiny_config: Configure, local_ray: None
) -> None:
    """Every client's round is refused: all stay where they were, and the run goes on."""
    storage = Path(tiny_config().storage)
    settings = ["train.learning_rate=1e38", "name=wild"]
    answer = fellray("train", written, f"storage={storage}", *settings)
    assert answer.status == 0, answer
    told = [line for line in answer.out.splitlines() if "refused" in line]
    assert len(told) == 10
    assert "round 1: c0 refused: training loss is nan" in " ".join(answer.out.split())
    rows = [json.loads(line) for line in (storage / "wild/metrics.jsonl").read_text().splitlines()]
    assert [sorted(row.get("refused", {})) for row in rows[1:]] == 2 * [[f"c{i}" for i in range(5)]]
    summary = json.loads((storage / "wild/summary.json").read_text())
    assert summary["test"] == summary["untrained"]
    assert "No round beat the untrained model on validation" in answer.out
    assert len(set(summary["final_hashes"].values())) == 1


# the whole path


@CLUSTER
def test_from_a_file_to_a_recommendation(
    fellray: Fellray,
    tiny_data: Path,
    tiny_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    local_ray: None,
) -> None:
    """init, prepare, train with a method of one's own, runs, evaluate, recommend."""
    source = tiny_data.parent / "source.csv"
    monkeypatch.chdir(tmp_path)
    config = Path("shop.yaml")
    begun = fellray("init", config, "--source", source)
    assert begun.status == 0, begun
    assert "fellray prepare shop.yaml" in begun.out
    text = config.read_text().replace("all-MiniLM-L6-v2  ", f"{tiny_encoder}  ")
    text = text.replace("rounds: 10", "rounds: 2").replace("local_samples: 96", "local_samples: 24")
    text = text.replace("engine: deepspeed", "engine: torch")
    text = text.replace("{kind: fellrec} ", "{kind: file, path: mine.py, name: Even} ")
    Path("mine.py").write_text(EVEN)
    config.write_text(text)

    prepared = fellray("prepare", config, "data.k_core=1")
    assert prepared.status == 0, prepared
    assert "40 users, 50 items" in " ".join(prepared.out.split())
    trained = fellray("train", config, "data.k_core=1")
    assert trained.status == 0, trained
    run = Path("runs/source")
    for file in ("summary.json", "report.html", "config.json", "environment.json"):
        assert (run / file).stat().st_size, file
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == "file"
    assert len(set(summary["final_hashes"].values())) == 1
    assert f"Report: {run}/report.html" in " ".join(trained.out.split())
    assert f"{summary['test']['ndcg@10']:.4f}" in trained.out

    listed = fellray("runs")
    assert "source" in listed.out
    assert "finished" in listed.out
    scores = json.loads(fellray("evaluate", run, "--json").out)
    assert scores["pooled"] == summary["test"]
    assert {
        c: {"users": summary["per_client"][c]["users"], **m}
        for c, m in scores["per_client"].items()
    } == summary["per_client"]
    title = source.read_text().splitlines()[1].split(",")[2]
    answer = fellray("recommend", run, "--client", "c1", "--history", f"{title}; word01", "--k", 3)
    assert answer.status == 0, answer
    assert answer.out.count("word") >= 3
