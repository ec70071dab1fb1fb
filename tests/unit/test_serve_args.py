"""The application's arguments, and the file for `serve deploy` that ships with fellray."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from certificate import write_certificate
from cryptography.hazmat.primitives import serialization
from pydantic import ValidationError
from test_recommender import train

from fellray.jobs.deploy import Door, deploy, main, read_args
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.shards import Dataset
from fellray.serve.args import Args

FILE = Path(__file__).resolve().parents[2] / "serve/application.yaml"


# Ray 2.60's own use of pydantic
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_file_is_one_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    tree = yaml.safe_load(FILE.read_text())
    schema = ServeDeploySchema.model_validate(tree)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "fellray.serve.app:build"
    args = Args.model_validate(application.args)
    assert args.model_dump(exclude_unset=True) == application.args


def test_arguments_from_words() -> None:
    args = read_args("runs/demo", ["round=latest", "threads=2", "most_trunks=3", "rate=0.5"])
    assert args.run == str(Path("runs/demo").absolute())
    assert (args.round, args.threads, args.most_trunks, args.rate) == ("latest", 2, 3, 0.5)
    assert read_args("s3://b/runs/demo").run == "s3://b/runs/demo"
    assert read_args("runs/demo", ["round=7"]).round == 7
    for words, named in (("rounds=3", "rounds"), ("round=last", "round"), ("rows=0", "rows")):
        with pytest.raises(FellrayError, match=f"^{named}: "):
            read_args("runs/demo", [words])
    with pytest.raises(FellrayError, match="write key=value"):
        read_args("runs/demo", ["latest"])
    with pytest.raises(ValidationError, match="most_trunks=1 is less than trunks=2"):
        Args(run="x", trunks=2, most_trunks=1)


def test_doors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = write_certificate(tmp_path)
    assert Door().options() == {"host": "127.0.0.1", "port": 8000}
    assert Door().address == "http://127.0.0.1:8000"
    with pytest.raises(FellrayError, match="HTTPS needs both"):
        Door(tls_key=key).options()
    tls = Door(tls_key=key, tls_certificate=certificate)
    assert tls.options()["ssl_keyfile"] == str(key)
    assert tls.options()["ssl_certfile"] == str(certificate)
    assert tls.address == "https://127.0.0.1:8000"
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(FellrayError, match="HAProxy speaks no TLS"):
        tls.options()


def test_a_door_that_would_not_open(tmp_path: Path) -> None:
    key, certificate = write_certificate(tmp_path)
    (tmp_path / "other").mkdir()
    other, _ = write_certificate(tmp_path / "other")
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    kind, secret = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    locked.write_bytes(loaded.private_bytes(serialization.Encoding.PEM, kind, secret))
    for given, said in [
        ((tmp_path / "typo", certificate), "typo: cannot be read"),
        ((key, tmp_path / "typo"), "typo: cannot be read"),
        ((tmp_path, certificate), "cannot be read"),
        ((other, certificate), "are no certificate and its key"),
        ((certificate, key), "are no certificate and its key"),
        ((locked, certificate), "key without a password"),
    ]:
        with pytest.raises(FellrayError, match=said):
            Door(tls_key=given[0], tls_certificate=given[1]).options()


def test_nothing_is_made_for_a_run_that_is_none(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(FellrayError, match="holds no run"):
        deploy(read_args(str(tmp_path / "typo")), Door(), said.append)
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_as_a_job_it_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python jobs/deploy.py` takes what `fellray serve` takes, and ends in one line."""
    run = str(tmp_path / "typo")
    for words, said in [
        ([run, "--port=8001", "--host=0.0.0.0"], f"fellray: {run}: holds no run"),
        ([run, "--tls-key=key"], "HTTPS needs both"),
        ([run, "rounds=3"], "fellray: rounds: "),
        ([], "Missing argument 'RUN'"),
    ]:
        monkeypatch.setattr("sys.argv", ["deploy.py", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_what_is_shown_is_what_a_shell_can_ask(
    tiny_config: Callable[..., RunConfig], tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line, through a shell in which curl writes down what it was given."""
    folder = train(tiny_config(train={"rounds": 0})).folder
    said: list[str] = []

    @contextmanager
    def served(*_: object) -> Iterator[None]:
        yield
        raise AssertionError("it goes on")

    class Ended:
        def wait(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("fellray.jobs.deploy.serving", served)
    monkeypatch.setattr("fellray.jobs.deploy.threading.Event", Ended)
    monkeypatch.setattr("fellray.jobs.deploy.signal.signal", lambda *_: None)
    for _ in range(2):
        deploy(read_args(folder), Door(), said.append)
    made = said[0].rpartition(" ")[2]
    script = 'curl() { printf "%s\n" "$@"; }; TOKEN=secret;'
    for line, token in ((said[2], made), (said[4], "secret")):
        shell = subprocess.run(["sh", "-c", script + line], capture_output=True, check=True)
        words = shell.stdout.decode().splitlines()
        assert f"Authorization: Bearer {token}" in words
        body = json.loads(words[-1])
        assert body == {"client": "c0", "history": Dataset(tiny_data).titles[:1]}
