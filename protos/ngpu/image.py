"""Image references, as `docker pull` takes them: what is one, when two name the same image, and which are allowed."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Final

#: Longest reference accepted.
REFERENCE_LENGTH: Final = 512
#: Most patterns of images that a node's operator may give.
PATTERNS: Final = 100

# The grammar of github.com/distribution/reference.
_HOST = (
    r"(?:(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
    r"(?:\.(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9]))*|\[[a-fA-F0-9:]+\])"
)
_DOMAIN = rf"{_HOST}(?::[0-9]+)?"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:(?P<domain>{_DOMAIN})/)?(?P<path>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}))?",
    re.ASCII,
)
_ID = re.compile(r"sha256:[0-9a-f]{64}")


@lru_cache(maxsize=4096)
def normalised(reference: str) -> str:
    """The reference in full: `x` is `docker.io/library/x:latest`. Raises ValueError if it is none.

    With a digest the tag says nothing, so it is left out; an image's bare id stays as it is.
    """
    if _ID.fullmatch(reference):
        return reference
    match = _REFERENCE.fullmatch(reference) if len(reference) <= REFERENCE_LENGTH else None
    if match is None:
        raise ValueError(f"{reference[:80]!r} is no image reference: write NAME, NAME:TAG or REGISTRY/NAME:TAG")
    domain, path, tag, digest = match["domain"], match["path"], match["tag"], match["digest"]
    # As Docker has it: the first part is a registry only if it looks like a host.
    if domain and not ("." in domain or ":" in domain or domain == "localhost" or domain != domain.lower()):
        domain, path = None, f"{domain}/{path}"
    if domain in (None, "docker.io", "index.docker.io"):
        domain, path = "docker.io", path if "/" in path else f"library/{path}"
    return f"{domain}/{path}@{digest}" if digest else f"{domain}/{path}:{tag or 'latest'}"


def directory(reference: str) -> str:
    """The directory that stands for an image where there is no engine for images (the node's process engine)."""
    return reference.replace("/", "_").replace(":", "_")


def comparable(reference: str) -> str:
    """`normalised` for what others say: one that is no reference stays as it is."""
    try:
        return normalised(reference)
    except ValueError:
        return reference


def allowed(reference: str, patterns: Sequence[str]) -> bool:
    """Does a pattern (`*` is anything) match the reference in full? Without patterns all are allowed."""
    return not patterns or any(fnmatchcase(comparable(reference), pattern) for pattern in patterns)
