"""The page at `/`: its files, and under which rules a browser may run them.

Nothing is loaded from elsewhere, no script or style stands in the page itself, and no text can
become markup. It is there for everybody: what it shows it asks of the API, with a token that is
typed in. It must not know what the API answers.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

PATHS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(api: FastAPI) -> None:
    """Add the page's routes; its files are read once."""
    for path, (name, kind) in PATHS.items():
        body = Path(__file__).with_name(name).read_bytes()
        api.get(path, include_in_schema=False)(_show(Response(body, media_type=kind)))


def _show(answer: Response) -> Callable[[], Awaitable[Response]]:
    answer.headers.update(HEADERS)

    async def show() -> Response:
        return answer

    return show
