"""No engine: local processes in place of containers."""

from pathlib import Path


class ProcessEngine:
    """Processes of one node (`node_addr`); see Engine.

    `images` is the directory of image directories, `state_dir` keeps logs.
    """

    def __init__(self, node_addr: str, *, images: Path, state_dir: Path, limit_address_space: bool = False) -> None:
        raise NotImplementedError
