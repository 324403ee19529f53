"""How the bridge logs: one line per event on stderr, JSON where nobody watches, readable on a terminal.

Event names are constants, data are fields. Never a body, a credential or a whole address; no line per request.
"""

import logging
import sys
from typing import Literal

import structlog

Format = Literal["auto", "json", "console"]


def set_up(level: str = "info", format_: Format = "auto") -> None:
    """Configure structlog, and bring the libraries' own logging into the same lines.

    `auto`: by whether stderr is a terminal.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    console = format_ == "console" or (format_ == "auto" and sys.stderr.isatty())
    last: list[structlog.typing.Processor] = (
        # The default prints local variables, which can be bodies and credentials.
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *last],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        # Drops what is below the level before any work is done for it.
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # What aiohttp and grpc say at "info" is about single connections.
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
