"""Pre-training and distillation, on clicks made on the spot."""

import json
from pathlib import Path

import pytest
import torch
from attribute_clicks import make_config, write_source
from safetensors.torch import load_file

from fellray.jobs.attributes import prepare_attributes
from fellray.platform.attribute_model import Shape, predict, read_backbone, start_backbone
from fellray.platform.click_data import ClickData
from fellray.platform.errors import FellrayError

STUDENT = {"dim": 2, "layers": [6], "temperature": 3.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("pretraining") / "source", users=120)


def test_sizes_by_hand() -> None:
    """A feature of 4 and one of 5 rows, width 3, one layer of 2: 27 rows, 6 * 2 + 2, 2 + 1."""
    shape = Shape((4,), (5,), 3, (2,))
    assert shape.count()["backbone"] == 27 + 14 + 3
    assert shape.flops() == 2 * (6 * 2 + 2)
    backbone = start_backbone(shape, torch.Generator().manual_seed(0))
    assert sum(t.numel() for t in backbone.parameters) == 44


def test_pretraining_learns_keeps_the_best_epoch_and_repeats_itself(
    source: Path, tmp_path: Path
) -> None:
    opened = {"open": {"inside": 0.6}}
    manifests = []
    for name in ("a", "b"):
        config = make_config(
            source, tmp_path, attributes=opened, data={"path": str(tmp_path / name)}
        )
        manifests.append(prepare_attributes(config))
    assert manifests[0] == manifests[1]
    told = manifests[0]["teacher"]
    assert told["held_out"]["auc"] > 0.52
    assert 1 <= told["epoch"] <= 6
    assert manifests[0]["counts"]["open_users"] == 72
    assert manifests[0]["counts"]["clients"] == 48
    tuned = make_config(
        source, tmp_path, attributes={**opened, "epochs": 1}, data={"path": str(tmp_path / "c")}
    )
    assert prepare_attributes(tuned)["teacher"]["held_out"]["auc"] <= told["held_out"]["auc"]


def test_a_student_is_smaller_listens_to_its_teacher_and_is_exported(
    source: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prepared"
    more = {"open": {"inside": 0.6}, "student": STUDENT}
    config = make_config(source, tmp_path, attributes=more, data={"path": str(path)})
    manifest = prepare_attributes(config)
    student, teacher = manifest["student"], manifest["teacher"]
    assert student["parameters"] < teacher["parameters"]
    assert student["flops_per_sample"] < teacher["flops_per_sample"]
    assert student["test"]["auc"] > 0.5
    data = ClickData(path)
    used = data.backbone()
    assert used.shape.dim == 2
    assert used.shape.layers == (6,)
    tree = json.loads((path / "student.json").read_text())
    assert tree["parameters"] == student["parameters"]
    names = ([f["name"] for f in tree[side]] for side in ("user_features", "item_features"))
    tensors = load_file(path / "student.safetensors")
    assert sum(t.numel() for t in tensors.values()) == student["parameters"]
    exported = read_backbone(tensors, *names, "student")
    users, items = data.users()[:20], data.items()[:20]
    assert torch.equal(predict(exported, users, items), predict(used, users, items))


@pytest.mark.parametrize("student", [{"dim": 3, "layers": [16, 8]}, {"dim": 2, "layers": [64, 32]}])
def test_a_student_that_is_no_smaller_is_refused(
    student: dict[str, object], source: Path, tmp_path: Path
) -> None:
    more = {"student": student, "epochs": 1}
    config = make_config(source, tmp_path, attributes=more, data={"path": str(tmp_path / "p")})
    with pytest.raises(FellrayError, match=r"attributes\.student: a student of dim .* its teacher"):
        prepare_attributes(config)
    assert not (tmp_path / "p" / "attributes.json").exists()


def test_a_changed_backbone_is_refused(source: Path, tmp_path: Path) -> None:
    config = make_config(
        source, tmp_path, attributes={"epochs": 1}, data={"path": str(tmp_path / "p")}
    )
    prepare_attributes(config)
    file = tmp_path / "p" / "backbone.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(FellrayError, match=r"backbone\.safetensors: is not what was prepared"):
        ClickData(tmp_path / "p").backbone()
