"""The page at `/` of a served run, as a headless browser shows it."""

from dataclasses import dataclass, field

from browser import Page

from fellray.platform.shards import Dataset

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
"""Texts less than 4.5 times as light or dark as what is behind them, as WCAG 2.2 counts it."""


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
