"""Roofline: the server's step beside the products it is made of, and beside one call per client.

Random weights of BERT's shape; no data, no Ray. Each figure is a ratio of arms that took turns in
one run; a product of the same operations is one of them, so the machine's peak is measured beside
what is held against it.

Shapes: L tokens of a batch, d width, K clients, P parameters of one client.
"""

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fellray.actors.server import make_host
from fellray.jobs.display import console
from fellray.jobs.figures import Figure, figure, make_messages, train_step
from fellray.jobs.timings import BUSY, Taken, interleave, load_average, spread
from fellray.platform import config as configs
from fellray.platform.bank import Bank
from fellray.platform.config import RunConfig
from fellray.platform.encoder import Backbone
from fellray.platform.host import TrunkHost
from fellray.platform.journal import Journal
from fellray.platform.kernel import Loras
from fellray.platform.lanes import Lanes
from fellray.platform.messages import Activation, Gradient
from fellray.platform.model_config import LoraSpec, ModelConfig
from fellray.platform.packed import Batch, PackedBlocks
from fellray.platform.rounds import Rounds
from fellray.platform.split import cut_model
from fellray.platform.storage import Storage
from fellray.platform.train_config import TrainConfig

THREADS = 2
WIDTH, BLOCKS = 768, 2
"""BERT-base's width; its blocks are all alike."""
CLIENTS = 64
RANKS = (4, 8, 16, 64)
KEPT_MIB = 4096
Sent = list[tuple[Activation, Gradient]]


def measure_clients(backbone: Backbone, folder: Path, tokens: int, turns: int) -> Figure:
    """A row of each of 64 clients: one call per client, over one merged call."""
    hosts = {name: open_host(backbone, folder / name, KEPT_MIB) for name in ("alone", "merged")}
    sent = {name: send(host, CLIENTS, 1, tokens) for name, host in hosts.items()}
    calls = {"alone": [[one] for one in sent["alone"]], "merged": [sent["merged"]]}
    answers = {name: train_step(hosts[name], calls[name], 0) for name in hosts}
    outputs = [answers["alone"][0::2] + answers["alone"][1::2], answers["merged"]]
    taken = interleave({name: repeat(hosts[name], calls[name], first=1) for name in hosts}, turns)
    return _ratio(
        f"one call per client / merged, {CLIENTS} x {tokens} tokens",
        taken,
        ("alone", "merged"),
        (">=", 3.0 if tokens == 16 else 1.8),
        equal_bits=all(np.array_equal(a, b) for a, b in zip(*outputs, strict=True)),
    )


def measure_peak(backbone: Backbone, folder: Path, tokens: int, turns: int) -> list[Figure]:
    """The step's products alone, over the step: its share of the peak.

    A step that keeps its forward pass does two passes of products, one that computes it again does
    three; each is held against as many.
    """
    total = CLIENTS * tokens
    x_Ld, w = torch.randn(total, WIDTH), torch.randn(4 * WIDTH, WIDTH)

    def multiply(passes: int) -> None:
        for _ in range(3 * BLOCKS * passes):  # a block's six products are three of these
            F.linear(x_Ld, w)

    arms: dict[str, Callable[[], object]] = {
        "products twice": lambda: multiply(2),
        "products three times": lambda: multiply(3),
    }
    for name, kept in (("kept", KEPT_MIB), ("computed twice", 0)):
        host = open_host(backbone, folder / name, kept)
        arms[name] = repeat(host, [send(host, CLIENTS, 1, tokens)])
    taken = interleave(arms, turns)
    rate = 2 * 4 * WIDTH**2 * total * 3 * BLOCKS * 2 / spread(taken["products twice"].wall).median
    name = f"share of the GEMM peak, {total} tokens"
    return [
        _ratio(f"{name}, kept", taken, ("products twice", "kept"), (">=", 0.85), flops=rate),
        _ratio(
            f"{name}, computed twice",
            taken,
            ("products three times", "computed twice"),
            (">=", 0.85),
            flops=rate,
        ),
        _ratio(f"computed twice / kept, {total} tokens", taken, ("computed twice", "kept"), None),
    ]


def measure_adapters(backbone: Backbone, folder: Path, clients: int, turns: int) -> Figure:
    """As many rows of one client, over a row each of many."""
    one, many = (open_host(backbone, folder / n, KEPT_MIB, clients) for n in ("one", "many"))
    taken = interleave(
        {
            "one adapter": repeat(one, [send(one, 1, clients, 16)]),
            "many adapters": repeat(many, [send(many, clients, 1, 16)]),
        },
        turns,
    )
    return _ratio(
        f"one adapter / {clients} adapters, {16 * clients} tokens",
        taken,
        ("one adapter", "many adapters"),
        (">=", 0.95),
    )


def measure_ranks(backbone: Backbone, tokens: int, turns: int) -> Figure:
    """All clients of the mean rank, over clients of four ranks."""
    parts = cut_model(backbone, ModelConfig(cut=0, top=0))
    packed, sites = PackedBlocks(parts.trunk), parts.cut.sites["trunk"]
    h_Ld, g_Ld = torch.randn(2, CLIENTS * tokens, WIDTH)

    def step(ranks: Sequence[int]) -> Callable[[], object]:
        ranks_K = torch.tensor(ranks).repeat(CLIENTS // len(ranks))
        spec = LoraSpec(r=max(ranks))
        bank = Bank(sites, spec, TrainConfig(), CLIENTS)
        bank.set_ranks(torch.arange(CLIENTS), ranks_K.tolist())
        lengths_K = torch.full((CLIENTS,), tokens)

        def run() -> None:
            lanes = Lanes(lengths_K, torch.arange(CLIENTS), 16, ranks_K)
            loras = Loras(
                sites,
                lanes.stacks,
                [stack.rank for stack in lanes.stacks],
                spec.scaling_of,
                lanes.order_K,
                bank.values_SP,
                bank.gradient.total_SP,
            )
            batch = Batch(lanes, [loras])
            _, saved = packed.forward(lanes.spread(h_Ld), batch, keep=True)
            packed.backward(lanes.spread(g_Ld), saved, batch)
            bank.step(torch.arange(CLIENTS))

        return run

    mean = sum(RANKS) // len(RANKS)
    taken = interleave({"equal": step([mean]), "mixed": step(RANKS)}, turns)
    return _ratio(
        f"rank {mean} / ranks {', '.join(map(str, RANKS))}, {CLIENTS * tokens} tokens",
        taken,
        ("equal", "mixed"),
        (">=", 0.85),
    )


def measure_bf16(backbone: Backbone, folder: Path, turns: int) -> list[Figure]:
    """One call per client in fp32 over a merged one in bf16; and a product in either, which says
    whether the processor computes bf16 at all."""
    x_Ld, w = torch.randn(256, WIDTH), torch.randn(WIDTH, WIDTH)
    short, narrow = x_Ld.bfloat16(), w.bfloat16()
    arms = {"fp32": lambda: F.linear(x_Ld, w), "bf16": lambda: F.linear(short, narrow)}
    alone = open_host(backbone, folder / "fp32", KEPT_MIB)
    merged = open_host(backbone, folder / "bf16", KEPT_MIB, dtype="bfloat16")
    taken = interleave(
        {
            "alone": repeat(alone, [[one] for one in send(alone, CLIENTS, 1, 16)]),
            "merged": repeat(merged, [send(merged, CLIENTS, 1, 16)]),
        },
        turns,
    )
    return [
        _ratio("a product in fp32 / in bf16", interleave(arms, turns), ("fp32", "bf16"), None),
        _ratio(
            f"one call per client in fp32 / merged in bf16, {CLIENTS} x 16 tokens",
            taken,
            ("alone", "merged"),
            (">=", 5.0),
        ),
    ]


def make_backbone() -> Backbone:
    """Blocks of BERT-base's shape with random weights."""
    from transformers import BertConfig, BertModel

    shape = BertConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=WIDTH // 64,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=128,
    )
    draw = torch.Generator().manual_seed(0)
    tensors = BertModel(shape, add_pooling_layer=False).state_dict()
    arrays = {
        name: (torch.randn(t.shape, generator=draw) * 0.02 + ("LayerNorm.weight" in name)).numpy()
        for name, t in tensors.items()
        if t.is_floating_point()
    }
    return Backbone("random", "", shape.to_dict(), arrays)


def open_host(
    backbone: Backbone,
    folder: Path,
    kept_mib: int,
    clients: int = CLIENTS,
    dtype: str = "float32",
) -> TrunkHost:
    """A host that stands at round 0."""
    config = _config(kept_mib, dtype)
    rounds = Rounds(Storage(str(folder)))
    host = make_host(config, _names(clients), backbone, rounds)
    rounds.commit(0, host.stage_start(), {})
    return host


def send(host: TrunkHost, clients: int, rows: int, tokens: int) -> Sent:
    """A message from each of the first clients, under a lease of round 1."""
    names = _names(clients)
    config = _config(0)
    lease = host.begin(config.name, 1, names)
    return make_messages(config, lease, [(name,) for name in names], rows, tokens, WIDTH)


def repeat(host: TrunkHost, calls: Sequence[Sent], first: int = 0) -> Callable[[], object]:
    """A training step, the next at every call."""
    steps = itertools.count(first)
    return lambda: train_step(host, calls, next(steps))


def _ratio(
    name: str,
    taken: Mapping[str, Taken],
    of: tuple[str, str],
    goal: tuple[str, float] | None,
    **more: Any,
) -> Figure:
    """A figure, said as soon as it is known."""
    made = figure(name, taken, of, goal, **more)
    said = made["ratio"]["median"]
    console.print(f"{name}: {said:.2f} (processor time {made['ratio_cpu']:.2f})", soft_wrap=True)
    return made


def _config(kept_mib: int, dtype: str = "float32") -> RunConfig:
    server = {"engine": "torch", "threads": THREADS, "keep_graphs_mib": kept_mib, "dtype": dtype}
    tree = {"name": "roofline", "model": {"cut": 0, "top": 0}, "server": server}
    return configs.parse(tree, "roofline")


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"client{i:04d}" for i in range(count))


def main() -> None:
    """`python -m fellray.jobs.roofline [PATH [TURNS]]`: writes PATH, `runs/roofline.json` by
    default."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/roofline.json")
    turns = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    torch.set_num_threads(THREADS)
    backbone, before = make_backbone(), load_average()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = [
            measure_clients(backbone, folder / f"clients-{tokens}", tokens, turns)
            for tokens in (16, 64)
        ]
        for tokens in (16, 64):
            figures += measure_peak(backbone, folder / f"peak-{tokens}", tokens, turns)
        figures.append(measure_ranks(backbone, 16, turns))
        figures += measure_bf16(backbone, folder / "bf16", turns)
        figures.append(measure_adapters(backbone, folder / "adapters", 1000, turns))
    loads = [before, load_average()]
    results = {"threads": THREADS, "load_average": loads, "busy": max(loads) > BUSY}
    Journal(Storage(path.parent)).write_json(path.name, {**results, "figures": figures})
    console.print(
        f"Load average {loads[0]:.1f} before, {loads[1]:.1f} after. Written: {path}", soft_wrap=True
    )


if __name__ == "__main__":
    main()
