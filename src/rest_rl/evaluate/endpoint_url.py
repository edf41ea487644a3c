"""Addresses of servers: what is asked, what may be shown, and the secrets that they may hold."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlsplit

SHORTEST_SECRET = 4
"""Letters of a query's value that is struck out of messages: shorter ones are no keys, and stand in every text."""


def base_url(url: str) -> str:
    """The address under which `/completions` and `/chat/completions` lie, from one with or without them and `/v1`.

    It has neither query nor fragment; `query_of` has the first, the other is never sent.
    """
    try:
        parts = urlsplit(url.strip())
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, is_usable = None, False
    if parts is None or not is_usable:
        raise ValueError(f"got the endpoint {public_url(url)!r}, expected a URL; write http://HOST:PORT/v1")
    plain = parts._replace(query="", fragment="").geturl()
    short = plain.rstrip("/").removesuffix("/completions").removesuffix("/chat").rstrip("/")
    return short if urlsplit(short).path else f"{short}/v1"


def query_of(url: str) -> dict[str, str]:
    """The query of a URL, which goes with every request: some servers take the key or a version of their API there."""
    return dict(parse_qsl(urlsplit(url.strip()).query, keep_blank_values=True))


def public_url(url: str) -> str:
    """A URL without the user and password, the query and the fragment that it may hold."""
    try:
        parts = urlsplit(url.strip())
        _ = parts.port  # part of a password with a # or ? in it is no number
    except ValueError:
        shown = re.sub(r"//.*@", "//", url.strip())
        return re.split(r"[?#]", shown)[0]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def secrets_of(url: str) -> list[str]:
    """User and password in a URL and the values of its query, as written and as meant; the longest first."""
    parts = urlsplit(url.strip())
    account, _, _ = parts.netloc.rpartition("@")
    password = account.partition(":")[2]
    written = [value for pair in parts.query.split("&") if (value := pair.partition("=")[2])]
    values = [value for value in (*written, *query_of(url).values()) if len(value) >= SHORTEST_SECRET]
    return sorted({secret for secret in (account, password, unquote(password), *values) if secret}, key=len)[::-1]
