"""The example in CONTRIBUTING.md is a method that works."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from fellray.platform import config as configs
from fellray.platform.aggregation import Method, describe, reduce

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)
    return str(found)


@pytest.fixture
def example(tmp_path: Path) -> Method:
    tree = yaml.safe_load(block("yaml"))
    path = tmp_path / tree["method"]["path"]
    path.write_text(block("python"))
    tree["method"]["path"] = str(path)
    return configs.parse(tree, "CONTRIBUTING.md").method


def test_the_example_is_short() -> None:
    assert len(block("python").strip().splitlines()) <= 16


def test_neighbours_listen_to_their_own_kind(example: Method) -> None:
    start = torch.zeros(3, 2)
    theta = torch.tensor([[2.0, 0.0], [4.0, 1.0], [0.0, 8.0]])
    meta = describe(1, ["a", "b", "c"], [1.0, 1.0, 1.0], [4, 4, 4], theta, start)
    plan = example.plan(meta)
    assert plan.mixing_CC.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    assert reduce(plan, theta).tolist() == [[3.0, 0.5], [3.0, 0.5], [0.0, 8.0]]


def test_the_options_reach_the_example(example: Method) -> None:
    theta = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # cosine 0.6, the example asks for 0.7
    meta = describe(1, ["a", "b"], [1.0, 1.0], [4, 4], theta, torch.zeros(2, 2))
    assert example.plan(meta).mixing_CC.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_the_commands_exist() -> None:
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([a-z-]+)`", TEXT))
    assert targets
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []
