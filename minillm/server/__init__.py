"""The online door: an OpenAI-compatible HTTP server (needs the extra `serve`)."""

from __future__ import annotations

from minillm.errors import MissingExtraError

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise MissingExtraError("minillm serve", "serve") from error
