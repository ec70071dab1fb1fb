"""cluster.yaml, read by Ray's own code: no cloud is asked anything."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from fellray.platform.places import Demand, pack
from fellray.platform.plant_config import ClientsConfig, ServerConfig
from fellray.serve.args import Args

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written() -> Any:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def filled(written: Any) -> Any:
    """What the launcher works with: defaults in, commands merged, schema held."""
    from ray.autoscaler._private import util

    config = util.prepare_config(copy.deepcopy(written))
    util.validate_config(config)
    return config


def test_ray_accepts_it(filled: Any) -> None:
    assert filled["head_node_type"] in filled["available_node_types"]
    workers = [t for name, t in filled["available_node_types"].items() if name != "head"]
    assert all(0 <= t["min_workers"] <= t["max_workers"] for t in workers)
    assert sum(t["max_workers"] for t in workers) <= filled["max_workers"]


def test_ray_would_notice_a_misspelt_key(written: Any) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private import util

    wrong = copy.deepcopy(written)
    wrong["available_node_types"]["client"]["max_worker"] = 3
    with pytest.raises(ValidationError, match="max_worker"):
        util.validate_config(util.prepare_config(wrong))


def test_every_node_asks_for_the_token(filled: Any) -> None:
    for part in ("head", "worker"):
        starts = [c for c in filled[f"{part}_start_ray_commands"] if "ray start" in c]
        assert len(starts) == 1
        assert starts[0].startswith("RAY_AUTH_MODE=token ")
    assert "/home/ray/.ray/auth_token" in filled["file_mounts"]
    assert "-e RAY_AUTH_MODE=token" in filled["docker"]["run_options"]


def test_every_node_installs_what_was_tried(written: Any) -> None:
    types = written["available_node_types"].values()
    own = [t["worker_setup_commands"] for t in types if "worker_setup_commands" in t]
    for commands in (written["setup_commands"], *own):
        (install,) = [c for c in commands if c.startswith("pip install")]
        assert "-c /home/ray/fellray/constraints.txt" in install
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    (ray,) = [line.removeprefix("ray==") for line in pinned if line.startswith("ray==")]
    images = [written["docker"]["image"]]
    images += [t["docker"]["worker_image"] for t in types if "docker" in t]
    assert all(image.startswith(f"rayproject/ray:{ray}-py311-") for image in images)


def test_no_client_finds_room_beside_the_server(written: Any) -> None:
    types = written["available_node_types"]
    server, client = ServerConfig(gpus=1), ClientsConfig()
    demands = [
        Demand("server", 1, server.cpus, server.gpus),
        Demand("client", 1000, client.cpus, 0.0),
    ]
    alone = pack(demands, [types["head"]["resources"], types["server"]["resources"]])
    assert alone == {"server": 1, "client": 0}
    node = types["client"]["resources"]
    assert pack(demands, [node, types["server"]["resources"]]) == {"server": 1, "client": 16}
    assert pack(demands, [node])["server"] == 0


@pytest.fixture(scope="module")
def ray_job() -> Any:
    return yaml.safe_load((ROOT / "k8s/ray-job.yaml").read_text(encoding="utf-8"))


def test_the_ray_job_fits_the_rest(ray_job: Any) -> None:
    """Nothing here knows KubeRay's schema: only what we say ourselves is held against itself."""
    cluster = ray_job["spec"]["rayClusterSpec"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert f"ray=={cluster['rayVersion']}" in pinned
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]["rayStartParams"]
    assert float(head["num-cpus"]) == ServerConfig().cpus
    (client,) = cluster["workerGroupSpecs"]
    assert client["minReplicas"] == client["replicas"] == 0
    told = ray_job["spec"]["entrypoint"].split()
    assert (ROOT / f"{told[2].removeprefix('fellray.').replace('.', '/')}.py").is_file()
    asked = dict(zip(told[4::2], told[5::2], strict=True))
    assert asked["--node-cpus"] == client["rayStartParams"]["num-cpus"]
    assert int(asked["--nodes"]) <= client["maxReplicas"]
    for group in (cluster["headGroupSpec"], client):
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert told[3].startswith(container["volumeMounts"][0]["mountPath"] + "/")


def test_the_ray_service_serves_what_serve_takes() -> None:
    """Nothing here knows KubeRay's schema; Serve's part of it is read by Serve's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Serve's own fields, at its first import
        from ray.serve.schema import ServeDeploySchema

    written = yaml.safe_load((ROOT / "k8s/ray-service.yaml").read_text(encoding="utf-8"))["spec"]
    ours = yaml.safe_load((ROOT / "serve/application.yaml").read_text(encoding="utf-8"))
    (told,) = ServeDeploySchema(**yaml.safe_load(written["serveConfigV2"])).applications
    assert told.import_path == ours["applications"][0]["import_path"]
    args = Args(**told.args)
    cluster = written["rayClusterConfig"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert f"ray=={cluster['rayVersion']}" in pinned
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    cpus = float(workers["rayStartParams"]["num-cpus"])
    least = args.cpus * (args.recommenders + args.trunks)
    most = args.cpus * ((args.most_recommenders or 0) + (args.most_trunks or 0))
    assert least <= workers["minReplicas"] * cpus
    assert most <= workers["maxReplicas"] * cpus
    for group in (cluster["headGroupSpec"], workers):
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert args.run.startswith(container["volumeMounts"][0]["mountPath"] + "/")
            (porter,) = [e["value"] for e in container["env"] if "PROXY" in e["name"]]
            assert porter == "fellray.serve.porter.place_porter"
