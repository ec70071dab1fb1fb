"""What becomes of freed memory: kept by this process, so that the next step need not ask for it.

By default the C library gives large blocks back at once, and every step pays for the same pages
again, a fifth of its time. It knows nothing of tensors.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""glibc's names for what `mallopt` sets, from malloc.h."""


def keep_freed_memory() -> bool:
    """Let this process hold on to memory up to 2 GiB that it freed; False where the C library is
    not glibc."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    most = 2**31 - 1
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: most, _TOP_PAD: 2**26}
    return sys.platform == "linux" and all(mallopt(k, v) == 1 for k, v in settings.items())
