"""Promise 9: kill anything, resume, and the hashes are those of a run that nobody disturbed."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cluster_tools import Driver, Launch, title, wait_until  # noqa: I001

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.jobs.display import Display
from fellray.jobs.finish import finish
from fellray.jobs.train import one_round, train
from fellray.platform.config import RunConfig
from fellray.platform.rounds import Rounds
from fellray.platform.run import open_run
from fellray.platform.storage import Storage
