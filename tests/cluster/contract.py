"""schemathesis against a service: what its OpenAPI document says, with all checks."""

import os
import re
import subprocess
import sys
from pathlib import Path

CONFIG = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 429]
"""
"""A body that is too large is refused before it is read: 413 is a rejection too."""


def run_schemathesis(
    port: int, token: str, folder: Path, seed: int, cases: int, *options: str
) -> tuple[int, str]:
    """How many cases it made, and its report; empty if nothing was found. Args: cases: of each
    operation."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    hooks = Path(__file__).with_name("contract_hooks.py")
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config)),
            *("run", f"http://127.0.0.1:{port}/openapi.json", "--checks=all", f"--seed={seed}"),
            *(f"--max-examples={cases}", "--continue-on-failure", "--suppress-health-check=all"),
            *("--no-shrink", f"--header=Authorization: Bearer {token}", *options),
        ],
        cwd=folder,
        env=os.environ | {"SCHEMATHESIS_HOOKS": hooks.stem, "PYTHONPATH": str(hooks.parent)},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    made = re.search(r"(\d+) generated", said)
    assert made, said
    return int(made[1]), said if done.returncode else ""
