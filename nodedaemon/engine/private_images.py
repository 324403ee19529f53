"""Whose credentials opened a cached image: a private image in the cache is not for every workspace that knows its name.

Kept on disk, as the cache is. Holds salted hashes, never credentials.
"""

import hashlib
import json
import os
import secrets
import threading
from pathlib import Path

from nodedaemon.engine import Credentials

#: Images remembered; the oldest are forgotten first, by when they were first opened.
LIMIT = 10_000


class PrivateImages:
    """Keys are image references and image ids. Called from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._salt = secrets.token_hex(16)
        self._openers: dict[str, list[str]] = {}
        if path.exists():
            kept = json.loads(path.read_text())
            self._salt, self._openers = kept["salt"], kept["openers"]

    def open_to(self, credentials: Credentials | None, *keys: str) -> bool:
        """May a workspace with these credentials use the cached image? Yes if it was never private."""
        mine = self._hash(credentials)
        with self._lock:
            return all(mine in self._openers[key] for key in keys if key in self._openers)

    def opened(self, credentials: Credentials | None, *keys: str) -> None:
        """It was pulled, or is about to be, with these credentials; None: with none, so that it is open to all."""
        mine = self._hash(credentials)
        with self._lock:
            for key in keys:
                if credentials is None:
                    self._openers.pop(key, None)
                elif mine not in self._openers.setdefault(key, []):
                    self._openers[key].append(mine)
            while len(self._openers) > LIMIT:
                del self._openers[next(iter(self._openers))]
            self._write()

    def refused(self, credentials: Credentials | None, key: str) -> None:
        """The pull that was announced under that key did not come about."""
        mine = self._hash(credentials)
        with self._lock:
            if mine in self._openers.get(key, ()):
                self._openers[key].remove(mine)
                if not self._openers[key]:
                    del self._openers[key]
                self._write()

    def _hash(self, credentials: Credentials | None) -> str:
        if credentials is None:
            return ""
        given = json.dumps([self._salt, credentials.username, credentials.password])
        return hashlib.sha256(given.encode()).hexdigest()

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123
            json.dump({"salt": self._salt, "openers": self._openers}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
