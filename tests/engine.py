"""The machine's Docker engine, as tests find it."""

import gc
import warnings

import docker
import pytest


def connected() -> docker.DockerClient:
    """A client of it, to be closed. Skips where none answers."""
    try:
        return docker.from_env(timeout=60)
    except docker.errors.DockerException as error:
        why = str(error)
    # The SDK leaves the socket of a connection that is refused to the garbage collector, which would complain in the
    # midst of another test.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    pytest.skip(f"no Docker engine answers: {why}")
