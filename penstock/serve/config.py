"""What `penstock serve` is told, checked before anything is started."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from penstock.errors import OptionError
from penstock.serve.tools.manner import check_parsers

MOST_SECONDS: Final = 1e9
_KEY_BYTES: Final = 8  # of the shortest API key
_LEVELS: Final = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class ServeConfig:
    """Of the server; the engine's own options are `engine`, the arguments of `LLM`.

    served_model_names: what requests may call the model, the first in answers; none: its own name. api_keys: any one
    opens all but /health and the page; none: no key is asked for. max_body_bytes, max_prompts, max_n, max_stop,
    max_logprobs: of one request. timeout, queue_timeout: seconds of a request that states none; None: for ever.
    drain_timeout: seconds that running requests have once the server is told to end. stall_timeout: seconds without a
    step, while there is work, behind which /health says 503; hang_timeout: behind which the engine process is ended
    and started again, 0: never. body_timeout: seconds in which a request has to be sent. cors_origins: web pages of
    other hosts that may call; none may.
    """

    engine: Mapping[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 8 << 20
    max_prompts: int = 256
    max_n: int = 128
    max_stop: int = 16
    max_logprobs: int = 20
    timeout: float | None = None
    queue_timeout: float | None = None
    drain_timeout: float = 30.0
    stall_timeout: float = 20.0
    hang_timeout: float = 120.0
    body_timeout: float = 60.0
    cors_origins: tuple[str, ...] = ()
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    log_format: str = "text"  # or "json"
    log_level: str = "info"
    otlp_traces_endpoint: str | None = None
    crash_dir: Path | None = None
    tool_call_parser: str = "auto"  # or one of tools.manner.TOOL_PARSERS
    reasoning_parser: str = "auto"  # the same

    def __post_init__(self) -> None:
        """Raises OptionError."""
        self._check_numbers()
        self._check_words()
        check_parsers(self.tool_call_parser, self.reasoning_parser)
        for key in self.api_keys:
            check_key(key)
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise OptionError("ssl_certfile and ssl_keyfile go together; give both, or neither for plain HTTP")

    def _check_numbers(self) -> None:
        if not 0 <= self.port <= 65535:
            raise OptionError(f"port={self.port} is no port; give 1 to 65535, or 0 for any that is free")
        for name in ("max_body_bytes", "max_prompts", "max_n", "max_stop", "max_logprobs"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)} lets nothing through; give at least 1")
        for name in ("drain_timeout", "stall_timeout", "hang_timeout", "body_timeout", "timeout", "queue_timeout"):
            value, least = getattr(self, name), 0.0 if name in ("drain_timeout", "hang_timeout") else 1e-3
            if value is not None and not least <= value <= MOST_SECONDS:  # NaN too
                raise OptionError(f"{name}={value} is no number of seconds; give {least:g} to {MOST_SECONDS:g}")

    def _check_words(self) -> None:
        if self.log_format not in ("text", "json"):
            raise OptionError(f"log_format={self.log_format!r} is neither 'text' nor 'json'")
        if self.log_level not in _LEVELS:
            raise OptionError(f"log_level={self.log_level!r} is not one of {', '.join(_LEVELS)}")
        if any(not name or not name.isprintable() for name in self.served_model_names):
            raise OptionError(f"served_model_name={self.served_model_names!r} holds one that is empty or unprintable")
        for origin in self.cors_origins:
            if origin != "*" and "://" not in origin:
                raise OptionError(f"cors_origin={origin!r} is no origin; give one like https://host, or *")

    @property
    def is_loopback(self) -> bool:
        """Whether no other machine can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def url_at(self, port: int) -> str:
        """Where a client on this machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http{'s' * (self.ssl_certfile is not None)}://{f'[{host}]' if ':' in host else host}:{port}"

    def tls(self) -> ssl.SSLContext | None:
        """Raises OptionError where the files are no certificate and its key."""
        if self.ssl_certfile is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # A key under a password would be asked for at the terminal.
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password="")
        except (OSError, ssl.SSLError, ValueError) as error:
            raise OptionError(
                f"ssl_certfile={str(self.ssl_certfile)!r} and ssl_keyfile={str(self.ssl_keyfile)!r} cannot be used: "
                f"{error}; give a certificate chain and its key in PEM, without a password"
            ) from error
        return context


def check_key(key: str) -> str:
    """An API key that a header can hold. Raises OptionError, which does not show it."""
    if len(key) < _KEY_BYTES or not key.isascii() or not key.isprintable() or " " in key:
        raise OptionError(
            f"an API key of {len(key)} characters cannot be used; give at least {_KEY_BYTES} printable ones of ASCII, "
            f"without spaces"
        )
    return key


def read_keys(path: Path) -> tuple[str, ...]:
    """A key a line; empty lines and those that begin with # say nothing. Raises OptionError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "it is no text"
        raise OptionError(
            f"api_key_file={str(path)!r} cannot be read: {reason}; give a file with a key a line"
        ) from error
    keys = tuple(check_key(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise OptionError(f"api_key_file={str(path)!r} holds no key; write one a line, or leave the option out")
    return keys
