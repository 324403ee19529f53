"""What a user might pick instead, doing the same work; each file runs alone in a virtualenv that has that peer."""

from pathlib import Path

HERE = Path(__file__).resolve().parent


def environment(container: str) -> dict[str, str]:
    """What a peer is started with: the URL of the container that it passes its work on to, or nothing."""
    return {"CONTAINER_URL": container, "PYTHONPATH": str(HERE)}
