"""Bench: what the split, the merged batch, the protocol and the engine cost, with MiniLM's weights.

Every figure is a ratio of two arms that were timed in turn in one run with equal, stated threads on
the same two cores. It trains on the demo data, in a folder that is gone afterwards.

Shapes: L tokens of a message, d width, C clients, P parameters of one client.
"""

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from fellray.actors.client import Client
from fellray.actors.plant import Plant
from fellray.actors.pool import Demand, RayPool, Shared
from fellray.actors.remote import RayRemote
from fellray.actors.server import Server, make_host
from fellray.actors.session import connect
from fellray.actors.world import World, survey
from fellray.jobs.display import console
from fellray.jobs.prepare import prepare
from fellray.jobs.timings import BUSY, Taken, interleave, load_average, ratios, spread
from fellray.jobs.train import one_round
from fellray.jobs.whole import Whole
from fellray.platform import config as configs
from fellray.platform.aggregation import cosine, describe, reduce
from fellray.platform.config import RunConfig
from fellray.platform.encoder import locate
from fellray.platform.fellrec import Fellrec
from fellray.platform.ledger import total
from fellray.platform.messages import Activation, Gradient
from fellray.platform.reader import Reader
from fellray.platform.retrieval import Scorer, mean_losses
from fellray.platform.rounds import Rounds
from fellray.platform.shards import Dataset
from fellray.platform.split import PARTS, plan_cut
from fellray.platform.storage import Storage
from fellray.platform.trunk import InProcess, TrunkHost

CORES = 2
"""Every process of the run is held on this many cores."""
TURNS = 5
"""Timed turns of each arm, at least."""
CLIENTS = 5
NEVER = 1_000_000
"""A round that does not come: nothing is evaluated in between."""

Figure = dict[str, Any]
"""`name`, `ratio`, `goal`, `arms` with their seconds, and what else there is to say."""
