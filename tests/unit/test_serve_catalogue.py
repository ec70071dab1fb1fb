"""Items that came after the training: embedded as the others, everywhere soon, no score moved."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_recommender import train
from test_serve_api import Asked, open_api, refusal

from fellray.platform.additions import Batch, list_batches, read_batch, write_batch
from fellray.platform.config import RunConfig
from fellray.platform.encoder import load_tokenizer
from fellray.platform.errors import FellrayError
from fellray.platform.run import read_run
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.serve import catalogue
from fellray.serve.args import Args
from fellray.serve.catalogue import Catalogue
from fellray.serve.items import Items
from fellray.serve.listings import NewItem
from fellray.serve.refusal import Refusal
from fellray.serve.whole import open_whole

TITLE = "word01 word02 word03"
NEW = {"item_id": -7, "title": TITLE, "categories": ["late", "a|b"]}


@pytest.fixture(scope="module")
def folder(tiny_config: Callable[..., RunConfig]) -> str:
    return train(tiny_config(train={"rounds": 1})).folder


@pytest.fixture
def clean(folder: str) -> Iterator[Storage]:
    """The run's folder, as it was after the training."""
    storage = Storage(folder)
    yield storage
    storage.delete("items")


@pytest.fixture
def asked(clean: Storage) -> Iterator[Asked]:
    args = Args(run=clean.uri, burst=10_000)
    recommender = open_whole(args)
    yield open_api(clean.uri, recommender, args)
    recommender.close()


def make_catalogue(storage: Storage) -> Catalogue:
    config = read_run(storage.uri).config
    data = Dataset(config.data.path)
    items = Items(data, load_tokenizer(config.model.name), config.model)
    return Catalogue(storage, items, config.model, data.manifest["encoder"]["sha256"], 1, 60.0)


def add(asked: Asked, *items: dict[str, Any], token: str = "operator") -> tuple[int, Any]:
    return asked("POST", "/v1/items", {"items": list(items)}, token=token)


def test_a_new_item_is_recommended_and_changes_nobodys_score(asked: Asked) -> None:
    queries: list[dict[str, Any]] = [
        {"client": "c0", "history": [f"{TITLE} word04"], "k": 60},
        {"client": "c1", "history": ["word09"], "k": 60},
        {"client": "c0", "user_id": int(asked.data.shard("c0").users[0]), "k": 60},
    ]
    before = [asked.recommend(**query)["items"] for query in queries]
    assert add(asked, NEW) == (200, {"added": 1, "items": 51, "everywhere_in_s": 1.0})
    after = [asked.recommend(**query)["items"] for query in queries]
    for old, new in zip(before, after, strict=True):
        scores = {place["item_id"]: place["score"] for place in new}
        assert scores.pop(-7)
        assert scores == {place["item_id"]: place["score"] for place in old}  # bit for bit
    # its prior is that of an item this client never met: log(1 + 0)
    twin = int(asked.data.item_ids[0])
    assert add(asked, {"item_id": 900, "title": asked.data.titles[0]})[0] == 200
    pair = asked.recommend(**queries[0], candidates=[twin, 900])["items"]
    score = {place["item_id"]: place["score"] for place in pair}
    prior = np.log1p(asked.data.shard("c0").counts(50)[0])
    assert score[twin] - score[900] == pytest.approx(prior, abs=1e-4)


def test_everything_that_knows_items_knows_it(asked: Asked) -> None:
    add(asked, NEW)
    assert asked("GET", "/v1/items/-7")[1] == {
        **NEW,
        "categories": ["a|b", "late"],
        "popularity": 0,
    }
    met = asked.recommend(client="c0", history=[-7], k=60)["items"]
    assert -7 not in [place["item_id"] for place in met]
    same = asked.recommend(client="c0", history=[TITLE.upper()], k=60)["items"]
    assert -7 not in [place["item_id"] for place in same]
    late = asked.recommend(client="c0", history=["word05"], filters={"categories": ["late"]})
    assert [place["item_id"] for place in late["items"]] == [-7]
    counts = asked.recommend(client="c0", history=[], k=60)
    assert (counts["layer"], counts["items"][-1]["item_id"]) == ("popularity", -7)
    stranger = asked.recommend(client="new shop", history=[-7], k=60)
    assert stranger["layer"] == "mean"  # nobody has met it
    found = asked("GET", "/v1/items", token="c1")
    assert found[0] == 422
    user = int(asked.data.shard("c0").users[0])
    for as_of in ("valid", "test"):  # the evaluation does not know it
        seen = asked.recommend(client="c0", user_id=user, k=60, as_of=as_of)["items"]
        assert -7 not in [place["item_id"] for place in seen]
        deny = {"deny": [-7]}
        assert (
            seen
            == asked.recommend(client="c0", user_id=user, k=60, as_of=as_of, filters=deny)["items"]
        )


def test_its_vector_is_the_one_that_prepare_would_make(clean: Storage) -> None:
    grown = make_catalogue(clean)
    data = Dataset(read_run(clean.uri).config.data.path)
    new = [NewItem(item_id=1000 + at, title=data.titles[at]) for at in range(20)]
    assert grown.add(new).result() == 20
    torch.testing.assert_close(grown.items.later_Jd, data.vectors[:20], atol=1e-6, rtol=0)
    grown.close()


def test_another_replica_and_the_next_start_have_the_same(clean: Storage) -> None:
    one, other = make_catalogue(clean), make_catalogue(clean)
    assert one.add([NewItem(item_id=900, title=TITLE)]).result() == 1
    assert other.items.index(900) is None
    # the other one adds before it has looked
    assert other.add([NewItem(item_id=901, title="word04")]).result() == 1
    one.look()
    later = make_catalogue(clean)
    for items in (one.items, later.items):
        assert torch.equal(items.later_Jd, other.items.later_Jd)
        assert items.ids[50:].tolist() == [900, 901]
        assert items.index(901) == 51
    # twice the same, in one request too: once
    twins = [NewItem(item_id=902, title="word05"), NewItem(item_id=902, title="word05")]
    assert other.add(twins).result() == 1
    one.look()
    assert one.add([NewItem(item_id=901, title="word04")]).result() == 0
    assert list_batches(clean) == [f"00000{number}.safetensors" for number in (1, 2, 3)]
    for made in (one, other, later):
        made.close()


def test_many_at_once_from_two_replicas(clean: Storage) -> None:
    """Each item once, whoever was first."""
    both = make_catalogue(clean), make_catalogue(clean)
    batches = [[NewItem(item_id=n, title=f"word{n % 50:02d}")] for n in range(900, 910)]
    futures = [one.add(batch) for batch in batches for one in both]
    assert sum(future.result() for future in futures) == 10
    assert sorted(make_catalogue(clean).items.ids[50:].tolist()) == list(range(900, 910))
    for one in both:
        one.close()


def test_who_may_not_and_what_does_not_fit(asked: Asked, clean: Storage) -> None:
    assert refusal(add(asked, NEW, token="c0")) == (403, "not_allowed", None)
    assert refusal(add(asked, NEW, token="x"))[0] == 401
    known = {"item_id": int(asked.data.item_ids[3]), "title": asked.data.titles[3]}
    assert add(asked, known)[1]["added"] == 0
    for wrong, code, place in [
        ({**known, "title": "another"}, "item_exists", "items.1.item_id"),
        ({**known, "categories": ["x"]}, "item_exists", "items.1.item_id"),
        ({**NEW, "title": "another"}, "item_exists", "items.1.item_id"),
        ({"item_id": 1}, "invalid", "items.1.title"),
        ({"item_id": "1", "title": "x"}, "invalid", "items.1.item_id"),
        ({"item_id": 2**63, "title": "x"}, "invalid", "items.1.item_id"),
        ({"item_id": 900, "title": " "}, "invalid", "items.1.title"),
        ({"item_id": 900, "title": "x" * 1001}, "invalid", "items.1.title"),
        ({"item_id": 900, "title": "x", "vector": [1]}, "invalid", "items.1.vector"),
    ]:
        assert refusal(add(asked, NEW, wrong))[1:] == (code, place), wrong
    assert refusal(add(asked))[2] == "items"
    assert refusal(add(asked, *({"item_id": n, "title": "x"} for n in range(900, 965))))[0] == 422
    assert list_batches(clean) == []  # all or none


def test_there_is_an_end_to_them(clean: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "MOST_LATER", 2)
    grown = make_catalogue(clean)
    grown.add([NewItem(item_id=900, title="x"), NewItem(item_id=901, title="x")]).result()
    with pytest.raises(Refusal, match="at most 2"):
        grown.add([NewItem(item_id=902, title="x")]).result()
    grown.close()


def test_a_damaged_file_is_named(clean: Storage, asked: Asked, tmp_path: Path) -> None:
    add(asked, NEW)
    path = "items/000001.safetensors"
    whole = clean.read(path)
    newer = whole.replace(b'version\\": 1', b'version\\": 2')
    assert newer != whole
    wrong_width = Storage(tmp_path)
    write_batch(wrong_width, Batch(np.array([1]), ["x"], [()], torch.ones(1, 3)), "e")
    for raw in (b"", whole[:9], whole[:-1], newer):
        clean.write(path, raw)
        with pytest.raises(FellrayError, match=r"000001\.safetensors: is damaged; delete it"):
            make_catalogue(clean)
    clean.write(path, wrong_width.read(path))
    with pytest.raises(FellrayError, match="is damaged"):
        make_catalogue(clean)
    with pytest.raises(FellrayError, match="another encoder"):
        read_batch(wrong_width, "000001.safetensors", "f", 3)
    # who serves already goes on with what it has, and says so when it is asked to add
    asked.recommender.catalogue.look()
    assert asked.recommend(client="c0", history=[-7])["items"]
    clean.write("items/000002.safetensors", b"")
    assert refusal(add(asked, {**NEW, "item_id": 900})) == (503, "unavailable", None)


def test_it_is_there_without_being_asked(clean: Storage) -> None:
    """What one replica added, another one that only watches takes over."""
    watching = open_whole(Args(run=clean.uri, poll_s=0.05))
    watching.watch()
    adding = make_catalogue(clean)
    adding.add([NewItem(item_id=900, title=TITLE)]).result()

    async def wait() -> None:
        async with asyncio.timeout(5):
            while watching.items.index(900) is None:
                await asyncio.sleep(0.02)

    asyncio.run(wait())
    adding.close()
    watching.close()
