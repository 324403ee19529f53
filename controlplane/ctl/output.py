"""What a command prints: answers on stdout, as text, as JSON or bare; everything said beside them on stderr."""

import contextlib
import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

#: Where no terminal sets it, lines are as long as they need to be: whoever reads them there counts fields, not columns.
_UNLIMITED: Final = 100_000


def plain(value: object) -> str:
    """Text of others, safe for a terminal: no escape sequences, no line breaks."""
    return "".join(c if c.isprintable() or c == " " else _visible(c) for c in str(value))


def _visible(character: str) -> str:
    return " " if character in "\n\r\t" or unicodedata.category(character).startswith("Z") else "\ufffd"


def cell(value: object, style: str = "") -> Text:
    """A table cell."""
    return Text(plain(value), style)


def counted(number: float, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def short(address: str) -> str:
    """A node's address, enough of it to tell it from others: `0xCac10F…c669`."""
    return f"{address[:8]}…{address[-4:]}" if len(address) > 16 else address


def table(*headers: str, rows: Iterable[Iterable[object]], right: Iterable[str] = ()) -> Table:
    """Columns without lines; `right` names those of numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        made.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(value if isinstance(value, Text) else cell(value) for value in row))
    return made


def facts(title: str, lines: Iterable[tuple[str, object]]) -> RenderableType:
    """A heading and what there is to say, a line each; what is empty is left out."""
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(style="dim")
    made.add_column(overflow="fold")
    for name, value in lines:
        shown = value if isinstance(value, Text) else cell(value)
        if shown.plain:
            made.add_row(f"  {name}", shown)
    return Group(cell(title, "bold"), made)


def as_json(message: Message) -> str:
    """protobuf's JSON, with the names of the .proto files, and every field there even if it is zero."""
    content = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    # Whoever reads this has the whole list: see Session.pages.
    content.pop("cursor", None)
    return json.dumps(content, indent=2, ensure_ascii=False)


class Output:
    """Where a command prints. `json` and `quiet` are the options of that name."""

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self.json = json
        self.quiet = quiet
        self._stdout = _console(stderr=False)
        self.stderr = _console(stderr=True)

    def answer(self, message: Message, human: Callable[[], RenderableType], bare: Iterable[str] = ()) -> None:
        """The answer of the control plane: as JSON, or `bare` lines (`--quiet`), or what `human` makes of it."""
        if self.json:
            self.write(as_json(message))
        elif self.quiet:
            for line in bare:
                self.write(line)
        else:
            self.show(human())

    def show(self, renderable: RenderableType) -> None:
        """More of a human answer."""
        if self._stdout.is_terminal:
            self._stdout.print(renderable)
            return
        # rich fills every line of a table up with spaces, which nobody wants in a file.
        with self._stdout.capture() as captured:
            self._stdout.print(renderable)
        for line in captured.get().splitlines():
            self.write(line.rstrip())

    def write(self, line: str) -> None:
        """A line on stdout as it is."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[Callable[[str], None]]:
        """Shows, on a terminal, what is waited for: call it with every news, and with "" when the waiting is over."""
        if self.quiet or not self.stderr.is_terminal:
            yield lambda _: None
            return
        with self.stderr.status("") as status:
            yield lambda text: status.update(cell(text)) if text else status.stop()

    def say(self, text: str, style: str = "") -> None:
        """A line on stderr, unless `--quiet`: progress, hints, what to do next."""
        if not self.quiet:
            self.stderr.print(Text(text, style))


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = _UNLIMITED
    return console
