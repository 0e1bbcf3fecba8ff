"""Checks the address of an inference server and its API key. No message shows what may be a secret."""

import httpx2

_LAST_PORT = 65535


def server_url(url: str) -> str:
    """The URL of a server without `/v1` and slashes at its end.

    Raises:
        ValueError: it is not `http://HOST:PORT` or `https://HOST:PORT` with an optional path. A user, a password, a
            query or a fragment is refused, because URLs are printed and logged.
    """
    url = url.strip()
    if set(url) & set("@?#"):
        raise ValueError(
            "the server's URL must not hold a user, a password, a query or a fragment (it has one of the characters @ "
            "? # and is not shown): give http://HOST:PORT, and a key by --api-key-env or api_key"
        )
    try:
        parsed = httpx2.URL(url)
        parsed.host.encode("idna")  # which sockets do
    except (httpx2.InvalidURL, UnicodeError):
        parsed = httpx2.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or not 0 < (parsed.port or 80) <= _LAST_PORT:
        raise ValueError(f"the server's URL must begin with http:// or https:// and name a host, got {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def clean_key(name: str, key: str) -> str:
    """An API key without white space around it, such as the newline of the file that it was read from.

    Args:
        name: what holds the key, for the message.

    Raises:
        ValueError: nothing is left, or it has characters that an HTTP header cannot hold.
    """
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        problem = "is empty" if not key else "has control or non-ASCII characters, which an HTTP header cannot hold"
        raise ValueError(f"{name} {problem}: set it to the key alone")
    return key


def without_secrets(url: httpx2.URL) -> str:
    """Scheme, host, port and path of a URL that a server sent."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))
