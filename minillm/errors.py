"""What a user can cause, as typed exceptions: each message says what was wrong and what to do."""

from __future__ import annotations


class MinillmError(Exception):
    """Base of every error that minillm raises on purpose."""


class ConfigError(MinillmError, ValueError):
    """A model configuration that contradicts itself or asks for what is not implemented."""


class UnsupportedModelError(ConfigError):
    """An architecture that minillm does not know."""


class CheckpointError(MinillmError):
    """Weights that are missing, unexpected, of the wrong shape, truncated or unsafe to read."""


class TokenizerError(MinillmError):
    """Tokenizer files that are missing or cannot be read, or a template that cannot be applied."""


class ModelNotFoundError(MinillmError):
    """A model name that is neither a file here nor a model that a hub knows."""


class DownloadError(MinillmError):
    """A download that failed, or whose result is not what was promised."""


class InvalidRequestError(MinillmError, ValueError):
    """A prompt or a sampling parameter outside what the model or the method allows."""


class CacheFullError(MinillmError):
    """A sequence that outgrows the room its key/value store has reserved."""


class OutOfMemoryError(MinillmError, MemoryError):
    """Weights or a key/value store larger than the device's free memory."""


class MissingExtraError(MinillmError, ImportError):
    """A feature whose optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: pip install 'minillm-engine[{extra}]'")


class RankError(MinillmError, RuntimeError):
    """One of several processes that run a model together has died, or does not answer."""


class OverloadedError(MinillmError):
    """More requests than the server keeps at a time."""


class ShuttingDownError(MinillmError):
    """A request to a server that takes no more, or that it could not finish before it ended."""


class EngineDeadError(MinillmError):
    """The engine failed between requests; nothing that was sent to it will be answered."""


class ServerError(MinillmError):
    """A server that cannot be reached, refuses a request, breaks an answer off, or says what no such server says."""


class AssignmentError(MinillmError):
    """An assignment's text, or what a student handed in, that cannot be processed."""
