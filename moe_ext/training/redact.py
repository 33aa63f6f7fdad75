"""What others may see of a configuration and of a command line: neither passwords nor signatures."""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

SECRET_KEY = re.compile(r"(?i)(^|[_.-])(api_?key|key|token|secret|password|passwd|credentials?)$")
SECRET_IN_URL = (
    (re.compile(r"(?<=://)[^/@\s]+(?=@)"), "***"),
    (
        re.compile(r"(?i)([?&][^=&\s]*(?:signature|token|key|secret|credential)[^=&\s]*=)[^&\s]+"),
        r"\1***",
    ),
)


def without_secrets(value: Any, key: str = "") -> Any:
    """A configuration as others may see it: no text under a key that names a secret, no password and
    no signature in a URL."""
    if isinstance(value, dict):
        return {str(k): without_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(v, key) for v in value]
    if not isinstance(value, str) or not value:
        return value
    if SECRET_KEY.search(key):
        return "***"
    for pattern, instead in SECRET_IN_URL:
        value = pattern.sub(instead, value)
    return value


@contextlib.contextmanager
def clean_arguments() -> Iterator[None]:
    """Inside, sys.argv holds no secret: neither in an override `key=value` nor in a URL."""

    def clean(argument: str) -> str:
        key, is_override, value = argument.partition("=")
        return f"{key}={without_secrets(value, key)}" if is_override else without_secrets(argument)

    kept = sys.argv
    sys.argv = [*kept[:1], *map(clean, kept[1:])]
    try:
        yield
    finally:
        sys.argv = kept
