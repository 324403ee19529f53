"""Image references: which are one, and which name the same image."""

import pytest
from ngpu.image import allowed, comparable, normalised

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("reference", "full"),
    [
        ("x", "docker.io/library/x:latest"),
        ("x:1.2", "docker.io/library/x:1.2"),
        ("docker.io/x", "docker.io/library/x:latest"),
        ("index.docker.io/library/x:latest", "docker.io/library/x:latest"),
        ("docker.io/library/x:latest", "docker.io/library/x:latest"),
        ("team/x", "docker.io/team/x:latest"),
        ("ghcr.io/team/x", "ghcr.io/team/x:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/team/x:2", "localhost:5000/team/x:2"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        (f"x@{DIGEST}", f"docker.io/library/x@{DIGEST}"),
        (f"x:2@{DIGEST}", f"docker.io/library/x@{DIGEST}"),
        (DIGEST, DIGEST),
    ],
)
def test_a_reference_in_full(reference: str, full: str) -> None:
    assert normalised(reference) == full
    assert normalised(full) == full


@pytest.mark.parametrize(
    "text", ["", " ", "X", "a b", "x:", "x@", "a//b", "/a", "a/", "x:1:2", "http://x", "x@sha256:12", "a" * 600, "x\n"]
)
def test_no_reference(text: str) -> None:
    with pytest.raises(ValueError, match="no image reference"):
        normalised(text)
    assert comparable(text) == text


@pytest.mark.parametrize(
    ("reference", "patterns", "may"),
    [
        ("x", (), True),
        ("x", ("docker.io/library/*",), True),
        ("x", ("x",), False),
        ("ghcr.io/acme/x:1", ("docker.io/*", "ghcr.io/acme/*"), True),
        ("ghcr.io/acme.evil/x", ("ghcr.io/acme/*",), False),
        ("evil.io/ghcr.io/acme/x", ("ghcr.io/acme/*",), False),
        ("no reference!", ("docker.io/*",), False),
    ],
)
def test_which_images_are_allowed(reference: str, patterns: tuple[str, ...], may: bool) -> None:
    assert allowed(reference, patterns) is may
