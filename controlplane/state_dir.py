"""The state directory: locked by the one control plane on it, and the small files by which others find that one."""

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def alone(directory: Path, database: str) -> Iterator[None]:
    """Two control planes on one state directory or one SQLite file would undo each other's work. Raises OSError."""
    locks = [directory / "lock"]
    if database.startswith("sqlite:///"):
        locks.append(Path(f"{database.removeprefix('sqlite:///')}.lock"))
    with ExitStack() as stack:
        for lock in locks:
            file = stack.enter_context(lock.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"another control plane is running on {lock.parent} (it holds {lock})") from None
        yield


@contextmanager
def published(directory: Path, **addresses: str) -> Iterator[None]:
    """Each address in a file of its name, as long as it can be called there."""
    try:
        for name, address in addresses.items():
            if address:
                write_secret(directory / name, address + "\n")
        yield
    finally:
        for name in addresses:
            (directory / name).unlink(missing_ok=True)


def keep_secret(file: Path, secret: str, *, unless: Callable[[str], bool]) -> str:
    """The secret in the file; `secret`, written there, if there is none or it is one that will not do."""
    if file.exists() and (text := file.read_text().strip()) and not unless(text):
        return text
    write_secret(file, secret + "\n")
    return secret


def identity(directory: Path) -> str:
    """What tells this directory from all others: in its file `identity`, made if there is none, also by several."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = directory / "identity"
    draft = file.with_name(f"identity.{secrets.token_hex(8)}")
    if not file.exists():
        write_secret(draft, secrets.token_hex(16) + "\n")
        # Whoever comes second finds the first one's.
        with suppress(FileExistsError):
            os.link(draft, file)
        draft.unlink()
    return file.read_text().strip()


def write_secret(file: Path, text: str) -> None:
    """Write a file for our eyes only, wholly or not at all."""
    new = file.with_name(f"{file.name}.new")
    with open(os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as out:  # noqa: PTH123, Path has no mode
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    new.replace(file)
