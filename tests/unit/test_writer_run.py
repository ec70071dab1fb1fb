"""A run of a model that writes, held against the whole model: training, ranking, any grouping."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fellray.actors.client import Client
from fellray.actors.plant import Plant
from fellray.actors.world import survey
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.outcome import pool
from fellray.platform.peft_export import export
from fellray.platform.rounds import Rounds
from fellray.platform.run import Run
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage

Make = Callable[..., RunConfig]
Play = Callable[..., Any]
FEW = {"rounds": 1, "learning_rate": 0.05}


def first_client(plant: Plant) -> Client:
    member: Client = plant._clients.members[0]  # type: ignore[attr-defined]
    return member


def whole_of(config: RunConfig, round: int, learner: str) -> Any:
    """A learner's model, put together by peft."""
    storage = Storage(config.storage).sub(config.name)
    folder = Path(export(Run(config, storage=storage), round, [learner])[0])
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()


@pytest.mark.parametrize("on_inputs", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_step_is_a_step_of_the_whole_model(
    on_inputs: bool, tiny_writer: Make, play: Play
) -> None:
    """Loss, and all adapters after one AdamW step, against peft and transformers' own loss."""
    config = tiny_writer(
        "qwen3",
        method={"kind": "local"},
        # a large eps: the step follows the gradient, not its sign
        train={"rounds": 1, "local_samples": 4, "learning_rate": 0.05, "eps": 1.0},
        model={"generation": {"train_on_inputs": on_inputs, "beams": 1}},
        evaluation={"max_users": 1},
    )
    played = play(config)
    whole = whole_of(config, 0, "c1")
    with Plant.inline(config, survey(config), played.rounds) as plant:
        (desk,) = first_client(plant)._crews._sit(("c1",))
        ((batch, _),) = desk.reader.steps(1)
    lengths = batch.rows.lengths_N.tolist()
    summed, tokens = torch.tensor(0.0), 0
    for ids, labels in zip(batch.ids_L.split(lengths), batch.label_L.split(lengths), strict=True):
        logits = whole(ids[None]).logits[0]
        summed = summed + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        tokens += int((labels != -100).sum())
    assert (tokens == sum(lengths)) == on_inputs
    loss = summed / tokens
    assert played.losses(1)["c1"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    trained = [p for p in whole.parameters() if p.requires_grad]
    torch.optim.AdamW(trained, lr=0.05, eps=1.0, weight_decay=0.0).step()
    ours = {n: p for n, p in whole_of(config, 1, "c1").named_parameters() if p.requires_grad}
    theirs = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    assert len(ours) == 4 * 2 * 2
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=1e-6)
    assert any(p.detach().abs().max() > 1e-3 for n, p in theirs.items() if "lora_B" in n)


def test_a_ranking_is_that_of_the_whole_model(tiny_writer: Make, play: Play) -> None:
    """Generation by transformers, embeddings by transformers, distances one by one."""
    config = tiny_writer(
        "llama", train=FEW, evaluation={"max_users": 1}, model={"generation": {"beams": 3}}
    )
    played = play(config)
    data = Dataset(config.data.path)
    learner = max(data.clients, key=lambda client: len(data.shard(client).users))
    with Plant.inline(config, survey(config), played.rounds) as plant:
        found = plant.evaluate(1, 2)[learner].means()
        (desk,) = first_client(plant)._crews._sit((learner,))
    whole = whole_of(config, 1, learner)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)

    @torch.no_grad()
    def embed(title: str) -> np.ndarray:
        with whole.disable_adapter():
            ids = tokenizer(title, return_tensors="pt")["input_ids"]
            state = whole(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        return state.double().numpy()

    table, held = [embed(title) for title in data.titles], data.shard(learner).held_out(2)
    gains = []
    for history, seen, truth in zip(held.histories, held.seen, held.truth, strict=True):
        (prompt,) = desk.script.prompts(np.array([history[-6:]]))
        quoted = ", ".join(f'"{data.titles[item]}"' for item in history[-6:])
        assert tokenizer.decode(prompt) == f"<bos>Chosen:\n{quoted}\nResponse:\n"
        ids = torch.tensor([prompt])
        with torch.no_grad():
            answer = whole.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_beams=3,
                do_sample=False,
                max_new_tokens=8,
                eos_token_id=1,
                pad_token_id=1,
            )[0, len(prompt) :]
        text = tokenizer.decode(answer, skip_special_tokens=True).strip().strip('"').strip()
        written = embed(text)
        (true,) = truth.tolist()
        order = sorted(
            set(range(len(table))) - set(seen.tolist()),
            key=lambda item: (np.linalg.norm(table[item] - written), item),
        )
        alike = [item for item in order if data.titles[item] == data.titles[true]]
        place = order.index(alike[0]) + 1
        gains.append(1 / math.log2(place + 1) if place <= 20 else 0.0)
    assert len(gains) > 3
    assert sum(gains) > 0
    assert found["ndcg@20"] == pytest.approx(float(np.mean(gains)), abs=1e-9)


def test_any_grouping_gives_the_same_run(tiny_writer: Make, play: Play) -> None:
    """One client in an actor or three; their adapters and what they rank, and bytes to the last."""
    runs = []
    for actors in (1, 3):
        config = tiny_writer(
            "qwen2",
            clients={"per_actor": actors},
            train=FEW,
            server={"shared_adapter": True},
            evaluation={"max_users": 2},
            model={"generation": {"beams": 2, "max_new_tokens": 5}},
        )
        runs.append(play(config))
    one, other = runs
    assert len({*one.hashes(1).values()}) == 3
    for t in range(2):
        assert one.hashes(t) == other.hashes(t)
        assert one.outcomes[t].validation == other.outcomes[t].validation
        assert one.ledger[t] == other.ledger[t]
    kinds = {row.kind for row in one.ledger[1]}
    assert kinds >= {"activation", "gradient", "evaluation_activation", "evaluation_output"}
    assert pool(one.outcomes[0].validation)["coverage@5"] > 0


def test_what_cannot_be_written_is_refused(tiny_writer: Make, tmp_path: Path) -> None:
    config = tiny_writer("llama")
    own = tmp_path / "own.csv"
    own.write_text("client,cut\nc0,2\n")
    with pytest.raises(FellrayError, match=r"own\.csv: cuts of clients' own go with encoders only"):
        survey(tiny_writer("llama", clients={"own": str(own)}))
    with pytest.raises(FellrayError, match=r"max_tokens=16: the prompt without any title"):
        survey(tiny_writer("llama", model={"max_tokens": 16}))
    survey(config)


@pytest.mark.long
def test_a_run_that_learns_to_write(tiny_writer: Make, play: Play) -> None:
    """The loss on answers falls."""
    train = {"rounds": 3, "learning_rate": 0.02, "moments": "keep", "local_samples": 16}
    config = tiny_writer(
        "qwen3",
        train=train,
        evaluation={"every": 3, "max_users": 1},
        model={"generation": {"beams": 1, "max_new_tokens": 4}},
    )
    played = play(config)
    first, last = (sum(played.losses(t).values()) for t in (1, 3))
    assert last < first - 0.3
    assert Rounds(Storage(config.storage).sub(config.name)).latest() == 3
