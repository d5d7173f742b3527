"""Hide passwords and signatures in addresses, so that no file, log or message contains one.

A fetch uses the address that the user gave. Everything that is written or printed has `HIDDEN` in its place.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "HIDDEN"
"""Stands for the name and the password before the host, and for values of a query."""
_HARMLESS_PARAMETERS = {
    "dir", "dl", "download", "file", "filename", "format", "generation", "id", "length", "name", "offset", "page", "part",
    "path", "prefix", "raw", "ref", "revision", "version", "versionid",
}  # fmt: skip
"""Parameters of a query whose values are shown, in lower case. Every other value may be a signature."""
_USER = re.compile(r"(?<=://)(?:[^\s/?#\"]*@|[^\s/?#:\"]*:(?!\d*(?:[\s/?#\"]|$))[^\s\"]*@)")
"""The part of an address before its host. The second form is a password with a / or # that should have been encoded."""
_QUERY = re.compile(r"(://[^\s?#\"<>]*)([?#][^\s\"<>]*)")
_PARAMETER = re.compile(r"([?#&])(?:([^=&#]*)(=))?([^&#]*?)(?=[&#]|[:;,.)'\]}\\]*$)")


def hide_secrets(text: str) -> str:
    """Replace what may be secret in every address of a text: `https://HIDDEN@host/file?sig=HIDDEN`."""
    if "://" not in text:
        return text
    return _QUERY.sub(lambda match: match[1] + _PARAMETER.sub(_hide_value, match[2]), _USER.sub(f"{HIDDEN}@", text))


def hide_secrets_in_tree(tree: Any) -> Any:
    """Apply `hide_secrets` to every text in dicts and lists."""
    if isinstance(tree, dict):
        return {key: hide_secrets_in_tree(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [hide_secrets_in_tree(value) for value in tree]
    return hide_secrets(tree) if isinstance(tree, str) else tree


def has_hidden_part(address: str) -> bool:
    """Return whether an address comes from `hide_secrets` and lacks what it hid."""
    return re.search(rf"://{HIDDEN}@|[=?#]{HIDDEN}([&#]|$)", address) is not None


def _hide_value(match: re.Match[str]) -> str:
    mark, name, equals, value = match.groups()
    if not value or (name is not None and name.lower() in _HARMLESS_PARAMETERS):
        return match[0]
    return f"{mark}{name or ''}{equals or ''}{HIDDEN}"
