"""GET /, the page, and GET /live, what its gauges show."""

from __future__ import annotations

import base64
import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from penstock.errors import TokenizerError
from penstock.serve.answers import answer
from penstock.serve.link import EngineUnready
from penstock.serve.live import Live
from penstock.serve.serving import Endpoint, Serving

_FOLDER: Final = Path(__file__).parents[1] / "page"


def endpoints(live: Live) -> tuple[Endpoint, ...]:
    """The page is the same for everybody and holds nothing of the server; all else it asks for, with a key."""
    body, headers = _page()

    async def page(request: Request, serving: Serving) -> Response:
        return Response(body, headers=headers)

    async def now(request: Request, serving: Serving) -> Response:
        told = {**live.answer(), "chat": await _chats(serving)}
        if names := serving.model_names:
            told["model"] = names[0]
        return answer(told, headers={"cache-control": "no-store"})

    return (
        Endpoint("GET", "/", page, "A page to try the model.", gives="text/html"),
        Endpoint("GET", "/live", now, "What the engine does right now: the page's gauges.", gives="application/json"),
    )


async def _chats(serving: Serving) -> bool | None:
    """Whether the model has a chat template; None until it is known."""
    with suppress(EngineUnready, TokenizerError):
        return (await serving.texts()).template is not None
    return None


def _page() -> tuple[bytes, dict[str, str]]:
    """The page in one, and headers that let it run its own script, ask its own server, and nothing else."""
    html, css, js = ((_FOLDER / name).read_text("utf-8") for name in ("index.html", "page.css", "page.js"))
    html = html.replace("/* page.css */", css).replace("/* page.js */", js)
    allowed = {
        "default-src": "'none'",
        "script-src": _hash(js),
        "style-src": _hash(css),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return html.encode(), {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in allowed.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
