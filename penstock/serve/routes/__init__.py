"""The endpoints, a file for those that belong together."""

from __future__ import annotations

from typing import Final

from penstock.serve import openapi
from penstock.serve.routes import chat, completions, embeddings, health, models, tokenize
from penstock.serve.serving import Endpoint

ROUTES: Final[tuple[Endpoint, ...]] = (
    *completions.ROUTES, *chat.ROUTES, *embeddings.ROUTES, *health.ROUTES, *models.ROUTES, *tokenize.ROUTES,
    *openapi.ROUTES,
)  # fmt: skip
