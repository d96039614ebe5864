"""URLs with secrets: what is sent to a server, and what is shown and stored.

Urllib takes a user and a password before the host for a part of the host's name, so they are sent as a header. Neither
they nor a query string, such as the signature of a signed URL, are logged or stored.
"""

import re
from base64 import b64encode
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlsplit, urlunsplit

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)((?:[^\s'\"\\]|['\"\\](?=(?:(?!://)\S)*@))*)")
"""Quotes and backslashes end a URL, except before an @, since a password may have them."""
SIGNATURE = re.compile(
    r"x-(amz|goog|oss|cos)-.*|q-.*|expires|signature|policy|key-pair-id|(aws|oss)accesskeyid|googleaccessid"
    r"|security-token|(access_)?token|download|s[vtrepsi]|sig|sip|srt|spr|skoid|sktid|skt|ske|sks|skv",
    re.IGNORECASE,
)
"""Parameters of a query string that sign a URL (AWS, CloudFront, Google, Azure, OSS) or do not select the file."""
QUOTED_ALREADY = "!#$%&'()*+,-./:;=?@[]_~"
"""Characters of a path and a query that are sent as they are: the address may be percent-encoded already."""


class HttpAddress(NamedTuple):
    """What is sent for a URL."""

    url: str
    """In ASCII, without user and password."""
    authorization: str | None
    """The value of the header Authorization."""


def split_credentials(address: str) -> HttpAddress:
    """Raises ValueError, without the secrets in it, if the address of kind http(s) is not valid."""
    try:
        parts = urlsplit(address)
        valid = bool(parts.hostname) and parts.port != 0
    except ValueError:  # its text would show a password that was taken for a port
        valid = False
    if not valid:
        raise ValueError(
            f"{hide_secrets(address)} is not a valid URL; it must be https://host/path, with a port from 1 to 65535 if "
            f"any, and with /, @, ?, # and : of a password percent-encoded."
        )
    user, _, host = parts.netloc.rpartition("@")
    rest = (quote(part, QUOTED_ALREADY) for part in (parts.path, parts.query))
    url = urlunsplit((parts.scheme, host, *rest, ""))
    if not user:
        return HttpAddress(url, None)
    name, _, password = user.partition(":")
    return HttpAddress(url, f"Basic {b64encode(unquote_to_bytes(name) + b':' + unquote_to_bytes(password)).decode()}")


def hide_secrets(text: str) -> str:
    """A URL, or a text with URLs, such as a command, without users, passwords and query strings in the URLs."""
    return URL.sub(lambda match: match[1] + _hidden(match[2]), text)


def without_signatures(text: str) -> str:
    """Like `hide_secrets`, but with the parameters in query strings that select the file. Not to be shown or stored."""
    return URL.sub(lambda match: match[1] + _hidden(match[2], _unsigned), text)


def _unsigned(query: str) -> str:
    """A query string without the parameters of a signature; "..." if it has no others."""
    remaining = (part for part in query.split("&") if not SIGNATURE.fullmatch(part.partition("=")[0]))
    return "&".join(remaining) or "..."


def _hidden(address: str, show: Callable[[str], str] = lambda query: "...") -> str:
    """address: a URL without its scheme; show: what replaces its query string."""
    server = re.split(r"[/?#]", address, maxsplit=1)[0]
    if "@" in server:
        address = address[server.rindex("@") + 1 :]
    elif "@" in address and not re.fullmatch(r"[^:]*(:\d*)?", server):  # a password with a slash that is not encoded
        address = address[address.rindex("@") + 1 :]
    path, question, query = address.partition("?")
    return f"{path}?{show(query)}" if question else path
