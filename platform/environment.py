"""The environment of a run: versions and cores. It must not know what depends on them."""

import os
import sys
from importlib.metadata import version
from typing import Any

import fellray

LIBRARIES = ("torch", "transformers", "peft", "ray", "deepspeed", "numpy", "pyarrow")


def environment() -> dict[str, Any]:
    """What the numbers may depend on besides the config."""
    return {
        "fellray": fellray.__version__,
        "python": sys.version.split()[0],
        **{name: version(name) for name in LIBRARIES},
        "cpus": os.cpu_count(),
    }
