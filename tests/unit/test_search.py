"""Generation through the split is transformers' generation: token for token, caches or none.

Shapes: n rows, T tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.platform.caches import Caches
from fellray.platform.config import RunConfig
from fellray.platform.desk import WritingDesk, write
from fellray.platform.host import TrunkHost
from fellray.platform.ledger import total
from fellray.platform.messages import Activation, Continuation
from fellray.platform.peft_export import export
from fellray.platform.rounds import Rounds
from fellray.platform.run import Run
from fellray.platform.script import pack_ids
from fellray.platform.span import Trip, take_turns
from fellray.platform.storage import Storage
from fellray.platform.writing import Writing

FAMILIES = ("llama", "qwen2", "qwen3")
LIMIT = 8
"""Tokens of an answer."""
Make = Callable[..., RunConfig]


@dataclass
class Setting:
    """A run of one round; what its first learner writes, and its model put together by peft."""

    config: RunConfig
    plant: Plant
    whole: Any

    @property
    def client(self) -> Any:
        return self.plant._clients.members[0]  # type: ignore[attr-defined]

    @property
    def host(self) -> TrunkHost:
        (host,) = self.plant._servers.pool.members  # type: ignore[attr-defined]
        return host

    def prompts(self) -> list[list[int]]:
        """Of different lengths."""
        desk = self.desk
        history = np.full((3, 6), -1)
        for row, items in enumerate(([3], [1, 8, 12, 20, 28, 5], [17, 2])):
            history[row, 6 - len(items) :] = items
        return desk.script.prompts(history)

    @property
    def desk(self) -> WritingDesk:
        (desk,) = self.client._crews._sit(("c0",))
        assert isinstance(desk, WritingDesk)
        return desk

    @torch.no_grad()
    def write(self, beams: int, end: int, limit: int = LIMIT) -> list[list[int]]:
        client, prompts = self.client, self.prompts()
        rule = self.config.model.generation.model_copy(
            update={"beams": beams, "max_new_tokens": limit}
        )
        slot = client._slots.hold(1, ["c0"])[torch.zeros(len(prompts), dtype=torch.int64)]
        none = np.empty((0, 0), np.float32)
        owners = np.zeros(len(prompts), np.int32)
        header = Activation("tiny", 1, 0, None, ("c0",), owners, owners, none)
        writing = Writing(
            client._crews._tower(), header, slot, client._span.extend, client._crews._wire, 16
        )
        trip: Trip[Any] = write(writing, self.desk.head, *pack_ids(prompts), rule, end)
        (found,) = take_turns([trip])
        return found

    @torch.no_grad()
    def generate(self, beams: int, end: int, limit: int = LIMIT) -> list[list[int]]:
        found = []
        for prompt in self.prompts():
            ids = self.whole.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                num_beams=beams,
                do_sample=False,
                max_new_tokens=limit,
                eos_token_id=end,
                pad_token_id=end,
            )[0, len(prompt) :].tolist()
            found.append(ids[: ids.index(end) + 1] if end in ids else ids)
        return found


@pytest.fixture(scope="module")
def setting(tiny_writer: Make, play: Callable[..., Any]) -> Iterator[Callable[[str], Setting]]:
    """`setting("qwen3")`: trained adapters, exported and loaded by peft into the whole model."""
    known: dict[str, Setting] = {}

    def make(family: str) -> Setting:
        if family not in known:
            torch.set_num_threads(1)
            config = tiny_writer(
                family, train={"rounds": 1, "learning_rate": 0.1}, evaluation={"max_users": 1}
            )
            play(config)
            storage = Storage(config.storage).sub(config.name)
            folder = Path(export(Run(config, storage=storage), 1, ["c0"])[0])
            base = AutoModelForCausalLM.from_pretrained(config.model.name)
            whole = peft.PeftModel.from_pretrained(base, folder).eval()
            plant = Plant.inline(config, survey(config), Rounds(storage))
            known[family] = Setting(config, plant, whole)
        return known[family]

    yield make
    for one in known.values():
        one.plant.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_through_the_split(family: str, setting: Callable[[str], Setting]) -> None:
    """Greedy and beams, texts that end early and texts that do not, trained adapters."""
    s = setting(family)
    never = s.desk.script.wording.end
    plain = s.generate(1, never)
    assert s.write(1, never) == plain
    with s.whole.disable_adapter():
        assert s.generate(1, never) != plain, "the adapters matter"
    assert len({tuple(text) for text in plain}) > 1
    end = plain[0][3]
    found = s.write(4, end)
    assert found == s.generate(4, end)
    assert s.write(1, end) == s.generate(1, end)
    assert any(len(text) < LIMIT for text in s.write(1, end)), "one ended early"


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_any_beams_and_ends(family: str, setting: Callable[[str], Setting]) -> None:
    s = setting(family)
    never = s.desk.script.wording.end
    plain = s.generate(1, never, 12)
    for end in {never, plain[0][3], plain[-1][6], plain[1][1]}:
        for beams in (2, 3, 4, 8):
            for limit in (1, 2, 12):
                wanted = s.generate(beams, end, limit)
                assert s.write(beams, end, limit) == wanted, (end, beams, limit)


def sent(s: Setting, work: Callable[[], Any]) -> tuple[Any, dict[str, int], int]:
    """What came of it, bytes by kind, and what the transport counted."""
    s.client.close_ledger()
    remote = s.client._span.remote
    before = remote.bytes
    found = work()
    return found, total(s.client.close_ledger()), remote.bytes - before


def test_a_lost_cache_is_written_anew(
    setting: Callable[[str], Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None kept, dropped in between by a restart, too large for the budget: the same tokens."""
    s = setting("qwen3")
    end = s.desk.script.wording.end
    wanted, kinds, carried = sent(s, lambda: s.write(4, end))
    assert sum(kinds.values()) == carried
    assert set(kinds) == {"evaluation_activation", "evaluation_output", "envelope"}
    monkeypatch.setattr(s.host._texts, "caches", Caches(0))
    found, without, carried = sent(s, lambda: s.write(4, end))
    assert found == wanted
    assert sum(without.values()) == carried
    assert without["evaluation_activation"] > 4 * kinds["evaluation_activation"]

    monkeypatch.setattr(s.host._texts, "caches", Caches(2**20))
    sound, calls = TrunkHost.extend, [0]

    def extend(self: TrunkHost, continuations: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            self._texts.caches.clear()
        return sound(self, continuations)

    monkeypatch.setattr(TrunkHost, "extend", extend)
    assert s.write(4, end) == wanted
    assert calls[0] == LIMIT + 1, "one token was asked for twice"


def test_caches_are_bounded_and_dropped(setting: Callable[[str], Setting]) -> None:
    s = setting("llama")
    s.write(2, s.desk.script.wording.end)
    caches = s.host._texts.caches
    assert 0 < caches.used <= s.config.server.cache_mib * 2**20
    s.host.begin("tiny", 2, ["c0"])
    assert caches.used == 0, "whoever trains has other adapters after that"
    s.host.forget()


def test_longest_unused_go_first() -> None:
    class Sized:
        nbytes = 10

    caches: Any = Caches(25)
    for name in "abc":
        caches.put(name, Sized())
    assert caches.used == 20
    assert caches.take("a") is None
    caches.put("b", caches.take("b"))
    caches.put("d", Sized())
    assert [caches.take(name) is None for name in "bcd"] == [False, True, False]


def test_messages_that_do_not_add_up(setting: Callable[[str], Setting]) -> None:
    s = setting("llama")
    one, h = np.ones(2, np.int32), np.zeros((2, 32), np.float32)
    few = Activation("tiny", 1, 0, None, ("c0",), one * 0, one, h)
    good = Continuation(few, "text", -one, one * 0, False, True)
    (answer,) = s.host.extend([good])
    assert answer.shape == (2, 32)
    for parents, held in ((-one, one), (one * 0, one * 0), (-one[:1], one), (one - [2, 1], one)):
        (refusal,) = s.host.extend([replace(good, parent_N=parents, held_N=held)])
        assert "does not add up" in str(refusal)
    # held by name, but not what was sent before
    for parents, held in ((one * 0, one * 2), (one * 7, one)):
        s.host.extend([good])
        (lost,) = s.host.extend([replace(good, parent_N=parents, held_N=held)])
        assert lost.shape == (0, 32)


def test_messages_of_many_share_a_batch(setting: Callable[[str], Setting]) -> None:
    """Merged with strangers, with and without adapters: the same bits as alone."""
    s = setting("qwen2")
    draw = np.random.default_rng(1)

    def text(name: str, sizes: list[int], plain: bool) -> list[Continuation]:
        rows = np.zeros(len(sizes), np.int32)

        def call(lengths: np.ndarray, parent: np.ndarray, held: np.ndarray) -> Continuation:
            h = draw.normal(size=(int(lengths.sum()), 32)).astype(np.float32)
            few = Activation("tiny", 1, 0, None, (f"c{len(sizes) % 3}",), rows, lengths, h)
            return Continuation(few, name, parent, held, plain, True)

        first = np.array(sizes, np.int32)
        parents = np.arange(len(sizes), dtype=np.int32)[::-1].copy()
        return [call(first, rows - 1, rows), call(rows + 1, parents, first[::-1].copy())]

    texts = [text("a", [3, 40], False), text("b", [17], False), text("c", [5, 5, 9], True)]
    together = [s.host.extend([own[step] for own in texts]) for step in (0, 1)]
    for at, own in enumerate(texts):
        for step in (0, 1):
            (alone,) = s.host.extend([own[step]])
            assert len(alone)
            np.testing.assert_array_equal(alone, together[step][at])
