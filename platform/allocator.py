"""What becomes of freed memory: kept by this process for its next step, or given back.

By default the C library gives large blocks back at once, and every step pays for the same pages
again, a fifth of its time. What it cannot give back at once it keeps for good: free blocks between
others that are in use, soon more of them than of the others. It knows nothing of tensors.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""glibc's names for what `mallopt` sets, from malloc.h."""


def keep_freed_memory() -> bool:
    """Let this process hold on to memory up to 2 GiB that it freed; False where the C library is
    not glibc."""
    most = 2**31 - 1
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: most, _TOP_PAD: 2**26}
    return all(_call("mallopt", k, v) for k, v in settings.items())


def give_back_freed_memory() -> bool:
    """Give the pages of all free blocks back, for once; False where there were none, or the C
    library is not glibc."""
    return _call("malloc_trim", 0)


def _call(name: str, *numbers: int) -> bool:
    try:
        function = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return False
    answer: int = function(*numbers)
    return sys.platform == "linux" and answer == 1
