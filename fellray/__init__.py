"""fellray: federated recommendation with language models, on Ray.

This folder only gives the repository's top-level folders one import name. Imports point one way::

    jobs/  ->  actors/  ->  platform/
    jobs/  ->  serve/   ->  platform/
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file():  # a checkout, not an installed wheel
    __path__.insert(0, str(_root))
