"""The page at `/` of a served run, in a real headless browser."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browse, find_browser
from served import Service

from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage
from fellray.serve.client import Client, ServiceError
from fellray.serve.listings import NewItem
from fellray.serve.schema import ByHistory
from fellray.serve.tokens import new_token

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        find_browser() is None,
        reason="no Chromium on this machine: install one (Debian: apt-get install chromium), or "
        "name it in the environment's CHROMIUM",
    ),
]
MARKUP = "<script>window.hurt=1</script><img src=x onerror=window.hurt=1> word07"
"""A title that must stay a text."""


@dataclass
class Shown:
    """A served run and a page of it."""

    page: Page
    url: str
    data: Dataset
    tokens: dict[str, str] = field(repr=False)

    def enter(self, token: str) -> None:
        """Load the page anew and type a token."""
        self.page.open(self.url)
        self.page.complaints.clear()
        self.page.type(self.tokens.get(token, token))
        self.page.press("Enter")
        # the focus moves when all is there
        ready = "['client', 'user'].includes(document.activeElement.id)"
        self.page.wait(f"{ready} || {text('door-problem')} !== ''")

    def read(self, id: str) -> str:
        """The text of an element."""
        found: str = self.page.run(text(id))
        return found

    def rows(self) -> list[list[str]]:
        """The ranking: place, title, score."""
        found: list[list[str]] = self.page.run(
            "[...document.querySelectorAll('#ranking tbody tr')]"
            ".map(row => [...row.children].map(cell => cell.textContent))"
        )
        return found


def text(id: str) -> str:
    return f"document.getElementById('{id}').textContent.trim()"


def hidden(id: str) -> str:
    return f"document.getElementById('{id}').hidden"


@pytest.fixture(scope="module")
def shown(
    service: Service, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shown]:
    tokens = {"operator": service.operator, "c0": service.own}
    tokens["c1"] = new_token(Storage(service.folder), "c1")
    program = find_browser()
    assert program
    with browse(program, tmp_path_factory.mktemp("browser")) as page:
        page.look(1400, 900, calm=True)
        yield Shown(page, service.url, Dataset(tiny_data), tokens)


def test_a_user_of_a_client(shown: Shown, tmp_path: Path) -> None:
    page = shown.page
    shown.enter("operator")
    assert page.run("document.activeElement.id") == "client"
    user = str(shown.data.shard("c0").users[0])
    assert page.run("[client.value, user.value]") == ["c0", user]
    # by keyboard alone: another client from the list, then the button
    page.press("ArrowDown", "ArrowDown")
    active = "client.getAttribute('aria-activedescendant')"
    page.wait(f"{active} === 'client-options-1'")
    page.press("Enter")
    page.wait("client.value === 'c1'")
    user = str(shown.data.shard("c1").users[0])
    page.wait(f"user.value === '{user}'")
    page.press("Tab", "Tab", "Tab", "Tab")
    assert page.run("document.activeElement.textContent") == "Recommend"
    page.press("Enter")
    page.wait(f"!{hidden('past')}")
    rows = shown.rows()
    with Client(shown.url, shown.tokens["c1"]) as client:
        answer = client.recommend("c1", user_id=int(user))
        past = client.past("c1", int(user))
    assert rows == [[str(p.rank), p.title, f"{p.score:.3f}"] for p in answer.items]
    assert f"10 items for user {user} of c1" in shown.read("status")
    assert f"the client's own adapters of round {answer.round}" in shown.read("status")
    chosen = "document.querySelector('#ladder [aria-current]').textContent"
    assert page.run(chosen) == "own adapters"
    met = page.run("[...document.querySelectorAll('#past-items li')].map(e => e.textContent)")
    assert met == [item.title for item in past.items]
    assert page.run("document.querySelectorAll('#quality-chart rect').length") == 5
    page.wait("Number(document.querySelectorAll('#live-figures dd')[1].textContent) > 0")
    assert page.complaints == []
    assert {address for address in page.requests if not address.startswith(shown.url)} == set()
    token = shown.tokens["operator"]
    assert not any(token in address for address in page.requests)
    kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    assert page.run(kept) == '[{},{},""]'
    page.shoot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_history_and_a_title_that_is_markup(shown: Shown) -> None:
    page = shown.page
    with Client(shown.url, shown.tokens["operator"]) as client:
        added = client.add_items([NewItem(item_id=2**60 + 1, title=MARKUP)])
        assert added.items == len(shown.data.titles) + 1
        assert client.item(2**60 + 1).title == MARKUP
        known = client.items("word07")[0]
    shown.enter("operator")
    page.run("document.getElementById('by-history').focus()")
    page.press(" ", "Tab", "Tab")
    assert page.run("document.activeElement.id") == "title"
    page.type("<script")
    page.wait("document.querySelectorAll('#title-options li').length === 1")
    page.press("ArrowDown", "Enter")  # an id that JavaScript's numbers cannot hold
    page.type("word09 word08")
    page.press("Enter")
    page.type("word07")
    page.wait("document.querySelectorAll('#title-options li').length > 1")
    page.press("ArrowDown", "Enter")
    entries = "[...document.querySelectorAll('#history li span')].map(e => e.textContent)"
    assert page.run(entries) == [MARKUP, "word09 word08", known.title]
    page.run("document.getElementById('seen').click()")
    page.run("document.getElementById('k').value = 60")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait("document.querySelectorAll('#ranking tbody tr').length > 20")
    assert "for this history at c0" in shown.read("status")
    with Client(shown.url, shown.tokens["operator"]) as client:
        history: list[int | str] = [2**60 + 1, "word09 word08", known.item_id]
        query = ByHistory(client="c0", history=history, k=60, filters={"seen": False})
        (answer,) = client.recommend_batch([query])
    assert [row[1] for row in shown.rows()] == [place.title for place in answer.items]
    assert MARKUP in [row[1] for row in shown.rows()]
    assert page.run("window.hurt") is None
    assert page.run("document.querySelectorAll('main img, main script').length") == 0
    # even a slip of the page's own would not make markup of it
    slip = "try { document.body.innerHTML = '<b>x</b>'; 'made' } catch (e) { e.name }"
    assert page.run(slip) == "TypeError"
    page.press("Shift+Tab")
    assert shown.page.complaints[1:] == []  # the policy says once that it refused the slip


def test_tokens_that_open_less(shown: Shown) -> None:
    page = shown.page
    shown.enter("wrong")
    assert "This token opens nothing" in shown.read("door-problem")
    assert page.run(f"{hidden('inside')} && document.activeElement.id") == "token"
    shown.enter("c1")
    assert page.complaints == []
    assert page.run("[client.value, client.readOnly]") == ["c1", True]
    assert page.run("document.querySelectorAll('#quality-chart rect').length") == 1
    assert "operator's token" in shown.read("live-words")
    page.run("client.readOnly = false; client.value = 'c0'")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"{text('problem')} !== ''")
    assert "another client's" in shown.read("problem")
    page.run("client.value = 'c1'; user.value = '999'")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"{text('problem')}.includes('no such user')")
    page.run("user.value = 'x'")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"{text('problem')}.includes('whole numbers')")
    assert page.run("user.getAttribute('aria-invalid')") == "true"
    page.run("document.getElementById('leave').click()")
    assert page.run(f"{hidden('inside')} && token.value") == ""
    assert shown.rows() == []
    with Client(shown.url, "wrong") as client, pytest.raises(ServiceError, match="401") as told:
        client.runs()
    assert told.value.code == "wrong_token"


@pytest.mark.parametrize(
    ("status", "words"), [(429, "in 7 s"), (422, "no sense (k)"), (0, "reach")]
)
def test_what_the_service_says_is_told(shown: Shown, status: int, words: str) -> None:
    """Answers that a test cannot cause at will are put in the network's place."""
    page = shown.page
    shown.enter("c0")
    error = {"error": {"code": "x", "message": "no sense", "field": "k"}}
    answer = f"""new Response({json.dumps(json.dumps(error))},
        {{status: {status}, headers: {{"Retry-After": "7"}}}})"""
    page.run(
        f"window.fetch = async () => {{ {f'return {answer}' if status else 'throw TypeError()'} }}"
    )
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"{text('problem')} !== ''")
    assert words in shown.read("problem")


@pytest.mark.parametrize(("width", "dark"), [(320, False), (700, True), (1400, True)])
def test_it_fits_and_can_be_read(shown: Shown, width: int, dark: bool) -> None:
    """320 pixels are 1,280 at 400 %; 700 are 1,400 at 200 %. Contrast as WCAG 2.2 AA counts it."""
    page = shown.page
    page.look(width, 450, dark=dark)
    shown.enter("operator")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"!{hidden('past')}")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run(CONTRAST) == []
    page.look(1400, 900, calm=True)


CONTRAST = """(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const shine = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility() || element.closest("title,desc")) continue;
    const style = getComputedStyle(element);
    const svg = element.closest("svg");
    const [a, b] = [shine(parse(svg ? style.fill : style.color)), shine(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push([element.textContent.slice(0, 30), ratio.toFixed(2)]);
  }
  return poor;
})()"""


def test_everything_is_in_reach_of_a_keyboard(shown: Shown) -> None:
    """Tab goes through all controls, in the order in which they stand, and each has a name."""
    page = shown.page
    shown.enter("operator")
    page.run("document.getElementById('ask-form').requestSubmit()")
    page.wait(f"!{hidden('past')}")
    page.run("document.body.tabIndex = -1; document.body.focus()")
    met: list[Any] = []
    for _ in range(20):
        page.press("Tab")
        name = "((e) => e === document.body ? null : [e.tagName, e.id || e.textContent.trim()])"
        if (found := page.run(f"{name}(document.activeElement)")) is None or found in met:
            break
        met.append(found)
    assert met == [
        ["BUTTON", "leave"],
        ["INPUT", "by-user"],
        ["INPUT", "client"],
        ["INPUT", "user"],
        ["INPUT", "k"],
        ["INPUT", "seen"],
        ["BUTTON", "Recommend"],
        ["SUMMARY", "As a table"],
        ["A", "The API"],
    ]
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "combobox", "textbox", "spinbutton", "checkbox", "radio", "table", "image"}
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node["ignored"]
        and node["role"]["value"] in roles
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []
