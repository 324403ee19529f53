"""What can go wrong for whoever typed the command: one line of text and an exit code."""

import enum


class Exit(enum.IntEnum):
    """Exit codes; documented in docs/cli.md."""

    OK = 0
    #: It was understood and tried, and did not come about.
    FAILED = 1
    #: The command, a file or a value is wrong; nothing was changed.
    USAGE = 2
    #: The control plane does not answer.
    UNREACHABLE = 3
    NOT_FOUND = 4
    #: No token, a wrong one, or one whose role may not do this.
    NOT_ALLOWED = 5
    #: `ngpu plan`: there is not room for all replicas.
    NO_ROOM = 6
    #: Ctrl-C, as shells number it.
    INTERRUPTED = 130


class Problem(Exception):
    """Ends a command; the text says what is wrong and what to do."""

    def __init__(self, text: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(text)
        self.code = code
