"""Docker as our engine. The only file that imports docker."""

from pathlib import Path


class DockerEngine:
    """Containers of one node (`node_addr`) on one Docker engine; see Engine. Made without contact: an engine that is down is EngineDown at each call.

    `url` as in DOCKER_HOST; None: as the environment says. `allow_root`: containers may run as root if their image says so.
    `state_dir` keeps which cached images were pulled with whose credentials.
    """

    def __init__(
        self,
        node_addr: str,
        *,
        state_dir: Path,
        url: str | None = None,
        network: str = "ngpu",
        allow_root: bool = False,
    ) -> None:
        raise NotImplementedError
