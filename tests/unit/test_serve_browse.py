"""Lists, look-ups and the page's files over ASGI: what each token sees, and no more."""

import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_recommender import train
from test_serve_api import Asked, open_api, refusal

from fellray.platform.config import RunConfig
from fellray.platform.run import read_run
from fellray.serve import page
from fellray.serve.args import Args
from fellray.serve.whole import open_whole

SERVE = Path(page.__file__).parent
LAST = 1
FORBIDDEN = (
    *("innerHTML", "outerHTML", "insertAdjacent", "document.write", "DOMParser", "Fragment"),
    *("eval(", "Function(", "import(", "setAttributeNS"),
    *("localStorage", "sessionStorage", "indexedDB", "cookie", "location", "caches", "pushState"),
)
"""What makes markup or code of text, or keeps something."""


@pytest.fixture(scope="module")
def asked(tiny_config: Callable[..., RunConfig]) -> Iterator[Asked]:
    folder = train(tiny_config(train={"rounds": LAST})).folder
    args = Args(run=folder, round="latest", burst=10_000)
    recommender = open_whole(args)
    yield open_api(folder, recommender, args)
    recommender.close()


def got(asked: Asked, path: str, token: str = "operator") -> Any:
    status, body = asked("GET", path, token=token)
    assert status == 200, body
    return body


def test_clients_that_a_token_opens(asked: Asked) -> None:
    every = got(asked, "/v1/clients")
    names = [one["client"] for one in every["clients"]]
    assert (every["operator"], every["total"], names) == (True, 5, list(asked.data.clients))
    assert every["clients"][0]["users"] == len(asked.data.shard("c0").users)
    few = got(asked, "/v1/clients?prefix=c&after=c1&limit=2")
    assert ([one["client"] for one in few["clients"]], few["total"]) == (["c2", "c3"], 5)
    assert got(asked, "/v1/clients?prefix=x")["clients"] == []
    own = got(asked, "/v1/clients", "c1")
    assert (own["operator"], own["total"]) == (False, 1)
    assert [one["client"] for one in own["clients"]] == ["c1"]
    assert got(asked, "/v1/clients?prefix=c0", "c1")["total"] == 0
    assert got(asked, "/v1/clients", "nobody")["clients"] == []


def test_users_and_their_past(asked: Asked) -> None:
    shard = asked.data.shard("c1")
    users = got(asked, "/v1/clients/c1/users", "c1")
    assert [one["user_id"] for one in users["users"]] == shard.users.tolist()
    assert sum(one["interactions"] for one in users["users"]) == len(shard.items)
    prefix = str(shard.users[-1])[0]
    found = got(asked, f"/v1/clients/c1/users?prefix={prefix}&limit=1000")
    expected = [user for user in shard.users.tolist() if str(user).startswith(prefix)]
    assert ([one["user_id"] for one in found["users"]], found["total"]) == (
        expected,
        len(expected),
    )
    after = got(asked, f"/v1/clients/c1/users?after={shard.users[0]}&limit=1")
    assert [one["user_id"] for one in after["users"]] == [int(shard.users[1])]
    past = got(asked, f"/v1/clients/c1/users/{shard.users[0]}?limit=2", "c1")
    met = shard.items[: shard.offsets[1]][::-1]
    assert past["interactions"] == len(met)
    assert past["items"] == [
        {"item_id": int(asked.data.item_ids[at]), "title": asked.data.titles[at]} for at in met[:2]
    ]


def test_a_token_sees_its_own_client_only(asked: Asked) -> None:
    user = int(asked.data.shard("c0").users[0])
    for path in ("/v1/clients/c0/users", f"/v1/clients/c0/users/{user}", "/v1/clients/zz/users"):
        assert refusal(asked("GET", path, token="c1")) == (403, "not_allowed", "id")
    assert refusal(asked("GET", "/v1/live", token="c1")) == (403, "not_allowed", None)
    assert refusal(asked("GET", "/v1/clients/zz/users")) == (404, "unknown_client", "id")
    assert refusal(asked("GET", "/v1/clients/nobody/users", token="nobody"))[0] == 404
    assert refusal(asked("GET", f"/v1/clients/c1/users/{user}"))[1] == "unknown_user"
    quality = got(asked, "/v1/quality", "c1")
    assert [one["client"] for one in quality["clients"]] == ["c1"]
    for path in ("/v1/clients", "/v1/items?title=x", "/v1/quality", "/v1/live"):
        assert refusal(asked("GET", path, token=None)) == (401, "no_token", None)


def test_what_is_asked_for_is_strict(asked: Asked) -> None:
    for path, place in [
        ("/v1/clients?limit=0", "limit"),
        ("/v1/clients?limit=1001", "limit"),
        ("/v1/clients?limit=x", "limit"),
        ("/v1/clients?x=1", "x"),
        ("/v1/clients/c0/users?after=x", "after"),
        ("/v1/items", "title"),
        ("/v1/items?title=%20", "title"),
        ("/v1/items?title=a&limit=101", "limit"),
        (f"/v1/clients/c0/users/{2**63}", "user_id"),
        ("/v1/clients/c0/users/x", "user_id"),
        ("/v1/clients/c0/users/1.5", "user_id"),
        ("/v1/items/1_0", "id"),
        ("/v1/items/%D9%A1", "id"),
        ("/v1/clients/c0/users?after=%D9%A1", "after"),
        (f"/v1/clients/c0/users?after={10**40}", "after"),
    ]:
        assert refusal(asked("GET", path)) == (422, "invalid", place), path
    assert got(asked, f"/v1/clients/c0/users?after={2**63 - 1}")["users"] == []


def test_items_by_how_their_titles_begin(asked: Asked) -> None:
    titles = asked.data.titles
    found = got(asked, "/v1/items?title=WORD0&limit=100", "c0")["items"]
    whole = [place for place, one in enumerate(found) if one["title"].startswith("word0")]
    assert whole == list(range(len(whole)))  # these come first
    assert {one["title"] for one in found} == {
        title for title in titles if any(word.startswith("word0") for word in title.split())
    }
    counts = [one["popularity"] for one in found[: len(whole)]]
    assert counts == sorted(counts, reverse=True)
    assert got(asked, "/v1/items?title=ord0")["items"] == []
    assert len(got(asked, "/v1/items?title=w&limit=3")["items"]) == 3


def test_quality_is_the_runs_own(asked: Asked) -> None:
    served = asked.recommender.served
    quality = got(asked, "/v1/quality")
    assert (quality["round"], quality["split"]) == (LAST, "valid")
    assert {one["client"]: one["ndcg_at_10"] for one in quality["clients"]} == served.validation
    run = read_run(asked.folder)
    rows = {client: {"ndcg@10": 0.5} for client in ("c0", "c1", "gone")}
    run.journal.write_json("summary.json", {"best_round": LAST, "per_client": rows})
    quality = got(asked, "/v1/quality")
    assert quality["split"] == "test"
    assert [(one["client"], one["ndcg_at_10"]) for one in quality["clients"]] == [
        ("c0", 0.5),
        ("c1", 0.5),
    ]
    for other in ({"best_round": 0, "per_client": rows}, {"best_round": LAST}):
        run.journal.write_json("summary.json", other)
        assert got(asked, "/v1/quality")["split"] == "valid"
    run.storage.write("summary.json", b"{")
    assert got(asked, "/v1/quality")["split"] == "valid"


def test_live_figures_are_about_rankings(asked: Asked) -> None:
    before = got(asked, "/v1/live")["requests"]
    for _ in range(3):
        asked.recommend(client="c0", history=["word01"])
    got(asked, "/v1/runs")
    live = got(asked, "/v1/live")
    assert (live["replica"], live["requests"]) == ("r", before + 3)
    assert 0 < live["p50_ms"] <= live["p99_ms"]
    assert live["per_second"] == pytest.approx(live["requests"] / live["window_s"])


def test_the_page_is_there_for_everybody_under_strict_rules(asked: Asked) -> None:
    for path, (name, kind) in page.PATHS.items():
        status, text = asked("GET", path, token=None)
        assert (status, text) == (200, (SERVE / name).read_text())
        heads = asked.heads[-1]
        assert heads["content-type"] == kind
        rules = dict(rule.split(" ", 1) for rule in heads["content-security-policy"].split("; "))
        assert rules["default-src"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert rules["require-trusted-types-for"] == "'script'"
        assert (heads["x-content-type-options"], heads["referrer-policy"]) == (
            "nosniff",
            "no-referrer",
        )


def test_no_text_can_become_markup() -> None:
    """Nor is anything kept in the browser, or loaded from elsewhere."""
    script = (SERVE / "page.js").read_text()
    for word in FORBIDDEN:
        assert word not in script, word
    for name, _ in page.PATHS.values():
        text = (SERVE / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|url\(|@import|//[a-z]", text), name


class Outline(HTMLParser):
    """Elements with their attributes, and ids."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.ids = [found["id"] for _, found in self.elements if "id" in found]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_the_page_can_be_read_by_machines() -> None:
    outline = Outline((SERVE / "page.html").read_text())
    tags = [tag for tag, _ in outline.elements]
    assert dict(outline.elements)["html"] == {"lang": "en"}
    assert [tags.count(tag) for tag in ("main", "header", "footer", "h1")] == [1, 1, 1, 1]
    assert len(outline.ids) == len(set(outline.ids))
    labelled = {found["for"] for tag, found in outline.elements if tag == "label"}
    inputs = {found["id"] for tag, found in outline.elements if tag == "input"}
    assert inputs == labelled
    for tag, found in outline.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((found.get(name) or "").split()) <= set(outline.ids)
        assert tag != "input" or "name" not in found or found["type"] == "radio"
        assert not [name for name in found if name == "style" or name.startswith("on")]
    script = (SERVE / "page.js").read_text()
    assert set(re.findall(r'find\("([^"]+)"\)', script)) <= set(outline.ids)
