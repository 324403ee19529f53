"""Volumes of Docker: made, opened to whatever user a container runs as, measured, removed.

A volume's name has the workspace's uid and the node in it, so no other workspace comes by it; its labels say whose it
is, and without them nothing is touched. Nothing here imports docker: `api` is its APIClient.
"""

import hashlib
import io
import re
import tarfile
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from nodedaemon.engine import Assignment, EngineError, StartFailed, Volume

NODE: Final = "ngpu.node"
UID, NAME, HELPER = "ngpu.workspace-uid", "ngpu.volume", "ngpu.helper"
#: A container that only opens volumes is there for less than a second, unless its daemon was killed.
HELPER_S: Final = 300.0
#: Docker walks through all of them.
LIST_S: Final = 600.0
#: Later ones tell the sizes of volumes in another form.
LAST_API: Final = (1, 44)
_UID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")


def check(assignment: Assignment) -> None:
    """Uid and names end up in paths. Raises StartFailed."""
    for mount in assignment.mounts:
        if not _UID.fullmatch(assignment.workspace_uid) or not _NAME.fullmatch(mount.name):
            raise StartFailed(f"{mount.name[:80]!r} of workspace {assignment.workspace_uid[:80]!r} cannot be a volume")


def name_of(node: str, workspace_uid: str, name: str) -> str:
    """What Docker knows it by."""
    return f"ngpu-{workspace_uid}-{name}-{hashlib.sha256(node.encode()).hexdigest()[:8]}"


def labels_of(node: str, workspace_uid: str, name: str) -> dict[str, str]:
    """What tells whose it is."""
    return {NODE: node, UID: workspace_uid, NAME: name}


def mounts(node: str, assignment: Assignment) -> list[dict[str, Any]]:
    """Of a container's HostConfig."""
    return [_mount(node, assignment.workspace_uid, mount.name, mount.path) for mount in assignment.mounts]


def _mount(node: str, workspace_uid: str, name: str, path: str) -> dict[str, Any]:
    source = name_of(node, workspace_uid, name)
    # Not filled with what the image has there: a cache begins empty.
    return {"Type": "volume", "Source": source, "Target": path, "VolumeOptions": {"NoCopy": True}}


def prepare(api: Any, node: str, assignment: Assignment) -> None:
    """See that its volumes are there, and can be written to by whoever the container runs as. Blocks for some 150 ms.

    Raises StartFailed.
    """
    check(assignment)
    for mount in assignment.mounts:
        wanted = labels_of(node, assignment.workspace_uid, mount.name)
        name = name_of(node, assignment.workspace_uid, mount.name)
        if not wanted.items() <= (api.create_volume(name, driver="local", labels=wanted).get("Labels") or {}).items():
            raise StartFailed(f"there is a volume {name} on this machine that is not this daemon's")
    if assignment.mounts:
        _open(api, node, assignment)


def _open(api: Any, node: str, assignment: Assignment) -> None:
    """Docker makes a volume root's own. Through a container that is never started: so it takes neither root here, nor
    a Docker on this machine."""
    # Where no image has anything, such as a link.
    paths = {mount.name: f"{HELPER}/{mount.name}" for mount in assignment.mounts}
    mounted = [_mount(node, assignment.workspace_uid, name, f"/{path}") for name, path in paths.items()]
    helper = api.create_container_from_config(
        {
            "Image": assignment.image,
            "Entrypoint": ["none"],
            "Labels": {NODE: node, HELPER: assignment.replica_id},
            "HostConfig": {"Mounts": mounted},
        }
    )
    try:
        api.put_archive(helper["Id"], "/", _directories(paths.values()))
    finally:
        api.remove_container(helper["Id"], force=True)


def _directories(paths: Iterable[str]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in paths:
            directory = tarfile.TarInfo(path)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o777
            tar.addfile(directory)
    return archive.getvalue()


def listed(api: Any, node: str) -> list[Volume]:
    """This node's, with sizes as far as Docker tells them. Blocks for as long as it takes to walk through them."""
    for helper in api.containers(all=True, filters={"label": [f"{NODE}={node}", HELPER]}):
        if time.time() - helper["Created"] > HELPER_S:
            api.remove_container(helper["Id"], force=True)
    if not api.volumes(filters={"label": f"{NODE}={node}"}).get("Volumes"):
        return []
    # All volumes of the machine: there is no way to ask for the sizes of some.
    version = min(tuple(map(int, api.api_version.split("."))), LAST_API)
    answer = api.get(f"{api.base_url}/v{version[0]}.{version[1]}/system/df", params={"type": "volume"}, timeout=LIST_S)
    if not answer.ok:
        raise EngineError(f"Docker does not tell the sizes of volumes: {answer.text[:200]}")
    found = answer.json().get("Volumes") or []
    return [_read(volume) for volume in found if (volume.get("Labels") or {}).get(NODE) == node]


def _read(found: Mapping[str, Any]) -> Volume:
    usage = found.get("UsageData") or {}
    size, containers = usage.get("Size", -1), usage.get("RefCount", -1)
    return Volume(
        found["Labels"].get(UID, ""), found["Labels"].get(NAME, ""), size if size >= 0 else None, in_use=containers != 0
    )


def remove(api: Any, node: str, volume: Volume) -> None:
    """Raises docker's APIError: 404 if there is none, 409 if a container has it."""
    name = name_of(node, volume.workspace_uid, volume.name)
    if (api.inspect_volume(name).get("Labels") or {}).get(NODE) == node:
        api.remove_volume(name)
