"""The application's arguments, and the file for `serve deploy` that ships with fellray."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from fellray.jobs.deploy import Door, read_args
from fellray.platform.errors import FellrayError
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


def test_doors(tmp_path: Path) -> None:
    key = tmp_path / "key"
    assert Door().options() == {"host": "127.0.0.1", "port": 8000}
    assert Door().address == "http://127.0.0.1:8000"
    with pytest.raises(FellrayError, match="HTTPS needs both"):
        Door(tls_key=key).options()
    tls = Door(tls_key=key, tls_certificate=key)
    assert tls.options()["ssl_keyfile"] == tls.options()["ssl_certfile"] == str(key)
    assert tls.address == "https://127.0.0.1:8000"
