"""When each of the things that this daemon keeps on disk was last used, kept on disk itself.

What is not in it is not ours: so it is written before a thing comes to be, and a crash in between is harmless.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger()

#: Things remembered; those unused for longest are forgotten first, and stay where they are.
LIMIT: Final = 10_000


class LastUse:
    """Keys are any text. `clock`: Unix seconds. Called from several threads."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._times: dict[str, float] = {}
        try:
            self._times = {str(key): float(at) for key, at in json.loads(path.read_text()).items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            # Then nothing is ours any more, and nothing of it is removed.
            log.warning("last_use_unreadable", path=str(path), reason=str(error))

    def touch(self, keys: Iterable[str]) -> None:
        """They are used now. Writes, so it blocks for some milliseconds."""
        with self._lock:
            now = self._clock()
            self._times.update(dict.fromkeys(keys, now))
            for key in self._oldest()[: max(0, len(self._times) - LIMIT)]:
                del self._times[key]
            self._write()

    def forget(self, keys: Iterable[str]) -> None:
        """They are no more, or not ours. Writes."""
        with self._lock:
            gone = [key for key in keys if self._times.pop(key, None) is not None]
            if gone:
                self._write()

    def oldest(self) -> list[str]:
        """All, unused for longest first."""
        with self._lock:
            return self._oldest()

    def idle_s(self, key: str) -> float:
        """For how long it was not used; 0 for what is not known, and when the clock has gone back."""
        now = self._clock()
        return max(0.0, now - self._times.get(key, now))

    def __contains__(self, key: str) -> bool:
        return key in self._times

    def _oldest(self) -> list[str]:
        return sorted(self._times, key=lambda key: (self._times[key], key))

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w") as file:
            json.dump(self._times, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
