"""What Docker's answers mean: its progress in percent, its errors as ours. Pure.

Docker has no codes for most of what goes wrong, only text; the fragments here are those of moby 20.10 to 28 and of
runc.
"""

from collections.abc import Mapping
from typing import Any

from nodedaemon.engine import (
    GIB,
    CredentialsRefused,
    DiskFull,
    EngineError,
    GpuMissing,
    ImageMissing,
    OutOfMemory,
    PullFailed,
    RegistryUnreachable,
    StartFailed,
)

#: Share of a layer's work that is its download; the rest is unpacking.
DOWNLOAD_SHARE = 0.7

_UNREACHABLE = (
    "no such host",
    "connection refused",
    "connection reset",
    "i/o timeout",
    "no route to host",
    "network is unreachable",
    "handshake timeout",
    "context deadline exceeded",
    "awaiting headers",
    "waiting for connection",
    "server misbehaving",
    "name resolution",
    "gave http response to https client",
    "x509",
    ": eof",
    "bad gateway",
    "service unavailable",
)
_UNAUTHORIZED = ("no basic auth", "unauthorized", "authentication required", "denied", "incorrect")
_MISSING = ("manifest unknown", "name unknown", "not found", "repository does not exist", "not known to registry")

Rule = tuple[tuple[str, ...], type[EngineError], str]

#: The first rule of which a fragment is in the lower-case text; in its words, {image}, {text} and so on are filled in.
_OF_PULL: tuple[Rule, ...] = (
    (("no space left on device",), DiskFull, "the disk where Docker keeps its images is full; {image} does not fit"),
    (("toomanyrequests", "rate limit"), PullFailed, "the registry allows no more pulls for now: {text}"),
    (
        ("no matching manifest", "does not match the specified platform"),
        ImageMissing,
        "there is no {image} for this kind of machine: {text}",
    ),
    (("invalid reference", "repository name must"), ImageMissing, "{image} is not the name of an image: {text}"),
    # Docker Hub's answer, the same for both.
    (("pull access denied",), ImageMissing, "there is no image {image}, or it needs credentials that are not given"),
    (_UNAUTHORIZED, CredentialsRefused, "{refused}"),
    (_UNREACHABLE, RegistryUnreachable, "the registry of {image} cannot be reached: {text}"),
    (_MISSING, ImageMissing, "there is no image {image} in its registry"),
    (("",), PullFailed, "{image} could not be pulled: {text}"),
)

_OF_START: tuple[Rule, ...] = (
    (
        ("could not select device driver",),
        GpuMissing,
        "this Docker cannot give GPUs to containers: install the NVIDIA container toolkit",
    ),
    (("unknown device", "device error", "unresolvable cdi"), GpuMissing, "there is no such GPU: {text}"),
    (("nvidia-container-cli", "nvidia.com/gpu"), GpuMissing, "the NVIDIA container toolkit failed: {text}"),
    (("no space left on device",), DiskFull, "the disk where Docker keeps its containers is full: {text}"),
    (
        ("oom-killed", "oom killed", "cannot allocate memory"),
        OutOfMemory,
        "the container ran out of memory while it started (its limit is {memory:.3g} GiB)",
    ),
    (("exec:",), StartFailed, "the start command is not in the image, or is no program: {text}"),
    (("",), StartFailed, "the container could not be started: {text}"),
)


def pull_error(text: str, image: str, *, credentials: bool) -> EngineError:
    """The error that Docker's words about a pull mean. `credentials`: some were given."""
    refused = (
        f"the registry refuses the workspace's credentials for {image}"
        if credentials
        else f"{image} needs credentials, and the workspace gives none"
    )
    return _first(_OF_PULL, text, image=image, refused=refused)


def start_error(text: str, *, memory_bytes: int) -> EngineError:
    """The error that Docker's words about creating or starting a container mean."""
    return _first(_OF_START, text, memory=memory_bytes / GIB)


def _first(rules: tuple[Rule, ...], text: str, **filled: Any) -> EngineError:
    said = text.lower()
    error, words = next((e, w) for fragments, e, w in rules if any(fragment in said for fragment in fragments))
    return error(words.format(text=text, **filled))


class PullProgress:
    """Percent of a pull, from Docker's events; never falls, and is 100 only when told so.

    Sizes of layers become known one by one; one not yet known is taken to be as large as the mean of the known ones.
    """

    def __init__(self) -> None:
        self._layers: dict[str, float] = {}
        self._sizes: dict[str, int] = {}
        self._percent = 0

    def feed(self, event: Mapping[str, Any]) -> int:
        """Take one event in; returns percent, 0 to 99."""
        layer, status = event.get("id", ""), event.get("status", "")
        if status == "Pulling fs layer":
            self._layers.setdefault(layer, 0.0)
        elif layer in self._layers:
            self._advance(layer, status, event.get("progressDetail") or {})
        if self._layers:
            mean = sum(self._sizes.values()) / len(self._sizes) if self._sizes else 1.0
            sizes = {name: self._sizes.get(name, mean) for name in self._layers}
            done = sum(sizes[name] * share for name, share in self._layers.items())
            self._percent = max(self._percent, min(99, int(100 * done / (sum(sizes.values()) or 1))))
        return self._percent

    def _advance(self, layer: str, status: str, detail: Mapping[str, int]) -> None:
        current, total = detail.get("current", 0), detail.get("total", 0)
        share = 0.0
        if status == "Downloading" and total > 0:
            self._sizes[layer] = total
            share = DOWNLOAD_SHARE * current / total
        elif status in ("Verifying Checksum", "Download complete"):
            share = DOWNLOAD_SHARE
        elif status == "Extracting" and total > 0:
            share = DOWNLOAD_SHARE + (1 - DOWNLOAD_SHARE) * current / total
        elif status in ("Pull complete", "Already exists"):
            share = 1.0
        self._layers[layer] = max(self._layers[layer], min(1.0, share))
