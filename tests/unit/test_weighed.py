"""What Linux says of a process, read as its own memory and what it shares."""

import mmap
import os

import pytest
import torch

from fellray.jobs.measured import STATUS
from fellray.jobs.weighed import Scale, read_weight

STATUS_TEXT = """Name:\tpython
VmHWM:\t  900 kB
VmRSS:\t  800 kB
RssAnon:\t  500 kB
RssFile:\t  200 kB
RssShmem:\t  100 kB
Threads:\t7
"""


def test_what_is_shared_is_not_a_process_s_own() -> None:
    assert read_weight(STATUS_TEXT) == (600 * 1024, 200 * 1024)


def test_a_scale_sees_what_came_and_went_since_it_was_last_asked() -> None:
    assert STATUS.exists()
    scale = Scale()
    scale.weigh()
    before = scale.weigh()
    assert before.process == os.getpid()
    # 64 MiB, given back at once: not torch's, whose allocator may keep what it frees
    with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:: mmap.PAGESIZE] = b"x" * (len(memory) // mmap.PAGESIZE)
    during = scale.weigh()
    after = scale.weigh()
    assert 60 * 2**20 < during.own_bytes - before.own_bytes < 80 * 2**20
    assert during.own_bytes - after.own_bytes > 50 * 2**20


def test_a_gpu_that_the_process_does_not_use_weighs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To ask CUDA for its memory would take some of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    weight = Scale().weigh()
    assert (weight.gpu_bytes, weight.gpu_has) == (0, 0)
