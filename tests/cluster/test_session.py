"""A Ray of one's own: begun, ended, and begun again."""

from collections.abc import Callable

import pytest
from driver import Driver

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

TWICE = """
from fellray.actors.session import connect, ray
from fellray.platform.config import RunConfig

for _ in range(2):
    with connect(RunConfig(), actors=1):
        open_port = ray.nodes()[0]["MetricsExportPort"] != -1
        print(int(ray.cluster_resources()["CPU"]) >= 2, open_port, flush=True)
"""


@pytest.mark.long
def test_one_process_may_train_twice(
    launch: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that calls `train` for several configs starts a Ray for each; none opens metrics."""
    monkeypatch.delenv("RAY_enable_metrics_collection", raising=False)
    driver = launch("-c", TWICE)
    status, out, err = driver.finish(120)
    assert status == 0, err
    assert out.split() == ["True", "False"] * 2
    assert driver.left(30) == []
