"""Where the service answers, for its face and its clients."""

from typing import Final

SCORE: Final = "/v1/score"
STATUS: Final = "/v1/status"
HEALTH: Final = "/healthz"
OPENAPI: Final = "/v1/openapi.json"
DOCS: Final = "/docs"
