"""The figures of aggregation at scale, at a size at which they say nothing."""

from pathlib import Path

import pytest

from fellray.jobs.scale_aggregation import METHODS, measure_in_memory, measure_on_disk
from fellray.platform.slabs import SLAB


@pytest.mark.parametrize("own_starts", [False, True])
def test_a_ratio_and_memory_are_measured(own_starts: bool) -> None:
    found = measure_in_memory(METHODS["top_k"], 150, 3 * SLAB, 2, own_starts)
    assert len(found["ours"]["wall"]) == len(found["bare"]["wall"]) == 2
    assert found["ratio"] > 0
    assert found["extra_mib"] > 4, "two buffers of 150 x 4096 numbers at least"


def test_a_few_slabs_of_a_file_stand_for_all(tmp_path: Path) -> None:
    found = measure_on_disk(METHODS["affine"], 150, 40 * SLAB, 2, tmp_path)
    each = (found["parts"]["describe"] + found["parts"]["reduce"]) / 2
    assert found["slab_seconds"] == each
    assert found["whole_hours"] == pytest.approx((40 * each + found["parts"]["plan"]) / 3600)
    assert found["own_weight"] == pytest.approx(2 / 152, rel=0.2), "1 / (1 + w C / 2), w near 1"
