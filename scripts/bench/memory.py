"""Memory of the three processes: idle, with large bodies, after minutes of mixed load, with long lists of tasks.

  bodies: 8 at once of 64 MiB each way, through the envelope, and through the raw pass-through where there is one.
  load: small synchronous (c=16), small asynchronous (c=8) and 4 MiB calls (2 a second) for --minutes; what it was after
        the first sixth beside what it was in the last, the growth between them over an hour, and what stays after it.
  list: queryTaskList of the whole of a long list beside a short one's.
  page: queryTaskList with limit=1000 in a table of many tasks beside one of 1,000; the rows are copies of one that the
        product made, put in by SQL.

Memory is resident memory of control plane, node daemon and bridge together, looked at every 50 ms.
"""

import argparse
import concurrent.futures
import http.client
import json
import sqlite3
import statistics
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from scripts.bench import loads, product, sheet
from scripts.bench.loads import MIB, Memory, rss_mib
from scripts.bench.sheet import Goal
from scripts.programs import Failed

BODIES = 8
IDLE_S = 5.0
PAGE_ROWS = 1000
PAGES_READ = 15
SHORT_TABLE = 1_000
#: Rows put in at once: the control plane writes too, and waits only so long for its turn.
ROWS_AT_ONCE = 20_000
#: In the mixed load, between two large calls of a connection.
LARGE_WAIT_MS = 1000
#: So that ten minutes of it fit on a disk. It also has retention at work.
BODY_RETENTION = {"NGPU_CONTROLPLANE_BODY_RETENTION": "30s"}

GOALS = (
    Goal("idle", "idle_mib", 250, 200, most=True, unit="MiB"),
    Goal("8 x 64 MiB through the envelope, over before", "envelope_growth_mib", 150, 100, most=True, unit="MiB"),
    Goal("8 x 64 MiB through /run, over before", "raw_growth_mib", 150, 100, most=True, unit="MiB"),
    Goal("at rest after mixed load", "load_rest_mib", 250, 200, most=True, unit="MiB"),
    Goal("growth an hour under mixed load (flat)", "load_mib_per_hour", 60, 20, most=True, unit="MiB"),
    Goal("whole list of many over list of 1,000: growth", "list_growth_mib", 16, 4, most=True, unit="MiB"),
    Goal("first page of many to first of 1,000", "page_first_ms", 3, 1.5, to="page_of_1000_ms", most=True),
    Goal("page in the middle to first of 1,000", "page_middle_ms", 3, 1.5, to="page_of_1000_ms", most=True),
)


class Measured:
    """What is measured; of two starts of the product, because what one work leaves behind is not another's."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.minutes: float = options.minutes
        self.listed: int = options.listed
        self.rows: int = options.rows
        self.figures = sheet.Figures()
        #: Of each program, in words.
        self.each = ""
        self.peaks: dict[str, str] = {}

    def run(self, state: Path) -> None:
        """All of it."""
        with product.up(state / "first", settings=BODY_RETENTION) as self.ours:
            self.idle()
            self.load()
        with product.up(state / "second") as self.ours:
            self.lists()
            if self.ours.has_raw():
                self.bodies("raw", self.ours.raw_url)
            self.bodies("envelope", self.ours.url)

    def idle(self) -> None:
        """After the start, one call made."""
        sheet.progress("idle")
        time.sleep(IDLE_S)
        self.figures.keep("idle_mib", rss_mib(self.ours.pids))
        self.each = shares([rss_mib([pid]) for pid in self.ours.pids])

    def bodies(self, name: str, url: str) -> None:
        """BODIES calls at once with 64 MiB each way."""
        sheet.progress(f"{BODIES} x 64 MiB: {name}")
        with Memory(self.ours.pids) as memory, concurrent.futures.ThreadPoolExecutor(BODIES) as callers:
            began = time.monotonic()
            done = [callers.submit(call_huge, url + "w64", self.ours.bearer) for _ in range(BODIES)]
            failed = [error for error in (future.exception() for future in done) if error]
        self.figures.keep(f"{name}_growth_mib", memory.growth_mib)
        self.figures.keep(f"{name}_failed", len(failed))
        self.peaks[name] = shares(memory.peaks_mib)
        self.figures.keep(f"{name}_mib_per_s", 2 * (BODIES - len(failed)) * 64 / (time.monotonic() - began))
        if failed:
            print(f"{name}: {len(failed)} of {BODIES} calls failed: {failed[0]}\n")

    def load(self) -> None:
        """Minutes of mixed load."""
        ours, seconds = self.ours, self.minutes * 60
        submit = ["/user/schedulingTask?paramUrl=w1&paramPort=8080", "/user/queryTask?wait=30&taskID="]
        sheet.progress(f"mixed load for {self.minutes:g} min")
        commands = (
            loads.wrk_command(ours.url + "w1", 16, seconds, [str(ours.small), "0", ours.bearer]),
            loads.wrk_command(ours.url + "w3", 2, seconds, [str(ours.large), str(LARGE_WAIT_MS), ours.bearer]),
            loads.wrk_command(ours.platform.url, 8, seconds, [str(ours.small), *submit, ours.bearer], "durable.lua"),
        )
        with Memory(ours.pids) as memory, loads.running(*commands) as running:
            said = [process.communicate()[0] for process in running]
        answers = [json.loads(text.strip().splitlines()[-1]) for text in said]
        self.figures.keep("load_requests", sum(answer["requests"] for answer in answers))
        self.figures.keep("load_errors", sum(answer["errors"] for answer in answers))
        # Of a sixth of the time the lowest tenth: what a moment holds in flight is not growth, and a large call is in
        # flight for about half of it, so that the median jumps with the machine's pace.
        sixth = max(1, len(memory.samples) // 6)
        early, late = memory.samples[sixth : 2 * sixth], memory.samples[-sixth:]
        before, after = (statistics.quantiles((mib for _, mib in part), n=10)[0] for part in (early, late))
        hours = (late[0][0] - early[0][0]) / 3600
        self.figures.keep("load_early_mib", before)
        self.figures.keep("load_late_mib", after)
        self.figures.keep("load_peak_mib", memory.peak_mib)
        time.sleep(IDLE_S)
        self.figures.keep("load_rest_mib", rss_mib(ours.pids))
        if self.minutes >= 2:
            self.figures.keep("load_mib_per_hour", (after - before) / hours)

    def lists(self) -> None:
        """Whole lists and pages, in tables that grow."""
        self.ours.ended_task()
        for size in sorted({SHORT_TABLE, self.listed, self.rows}):
            sheet.progress(f"{size:,} tasks in the table")
            fill(self.ours.platform.state / "controlplane" / "ngpu.db", size)
            if size == SHORT_TABLE:
                self._page("page_of_1000_ms", "")
                self.figures.keep("list_short_mib", self._whole_list(size))
            if size == self.listed:
                self.figures.keep("list_long_mib", self._whole_list(size))
                grown = self.figures["list_long_mib"] - self.figures["list_short_mib"]
                self.figures.keep("list_growth_mib", grown)
        self._page("page_first_ms", "")
        # The rows are a second apart, from FIRST_TIME on.
        middle = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(FIRST_TIME_S + self.rows // 2))
        self._page("page_middle_ms", "&startTime=" + urllib.parse.quote(middle))

    def _page(self, name: str, query: str) -> None:
        for _ in range(PAGES_READ):
            began = time.perf_counter()
            answer = self.ours.get(f"/user/queryTaskList?limit={PAGE_ROWS}{query}")
            self.figures.keep(name, (time.perf_counter() - began) * 1e3)
            if answer["result_size"] != PAGE_ROWS:
                raise Failed(f"a page of {PAGE_ROWS} has {answer['result_size']}")

    def _whole_list(self, size: int) -> float:
        """Peak memory while a list is read, in MiB; what it holds is thrown away."""
        # What other works have left behind is not this one's.
        self._page("page_warm_ms", "")
        listed = 0
        began = time.monotonic()
        with Memory(self.ours.pids) as memory:
            for chunk in read(self.ours.platform.url + "/user/queryTaskList", self.ours.bearer):
                listed += chunk.count(b'","')
        if listed < size - 1:
            raise Failed(f"{listed} tasks listed of {size}")
        self.figures.keep(f"list_{size}_s", time.monotonic() - began)
        return memory.peak_mib


#: 2020-09-13 12:26:40, when the rows put in by SQL begin.
FIRST_TIME_S = 1_600_000_000


def fill(database: Path, size: int) -> None:
    """Have `size` tasks in the table at least: copies of its last one, a second apart, each with an id of its own."""
    with sqlite3.connect(database, timeout=60, isolation_level=None) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(task)")]
        (count,) = connection.execute("SELECT count(*) FROM task").fetchone()
        (template,) = connection.execute("SELECT max(number) FROM task WHERE state = 3").fetchone()
        own = {
            "number": "NULL",
            "idempotency_key": "NULL",
            "id": "strftime('%Y%m%d_%H_%M_%S_', :time + n, 'unixepoch') || printf('%020d', abs(random()))",
            "create_time": "(:time + n) * 1000000",
            "start_time": "(:time + n) * 1000000 + 1000",
            "end_time": "(:time + n) * 1000000 + 2000",
        }
        chosen = ", ".join(own.get(column, f'"{column}"') for column in columns)
        # What is put in are the table's own column names.
        statement = (
            "WITH RECURSIVE steps(n) AS (SELECT :first UNION ALL SELECT n + 1 FROM steps WHERE n + 1 < :last) "  # noqa: S608
            f"INSERT INTO task SELECT {chosen} FROM steps, task WHERE task.number = :template"
        )
        for first in range(count, size, ROWS_AT_ONCE):
            last = min(size, first + ROWS_AT_ONCE)
            connection.execute(statement, {"time": FIRST_TIME_S, "first": first, "last": last, "template": template})
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")


def call_huge(url: str, bearer: str) -> None:
    """POST 64 MiB in pieces, read what comes back. Raises Failed."""
    size = product.HUGE_BYTES
    start, end = b'{"data":"', b'"}'

    def pieces() -> Iterator[bytes]:
        yield start
        left = size - len(start) - len(end)
        piece = b"x" * (256 * 1024)
        while left:
            yield piece[: min(left, len(piece))]
            left -= min(left, len(piece))
        yield end

    answered = 0
    headers = {"Content-Type": "application/json", "Content-Length": str(size)}
    for chunk in read(url, bearer, pieces(), headers):
        answered += len(chunk)
    if answered < size:
        raise Failed(f"{answered} of {size} bytes came back")


def read(
    url: str, bearer: str, body: Iterator[bytes] | None = None, headers: dict[str, str] | None = None
) -> Iterator[bytes]:
    """The pieces of an answer as they come; GET, or POST with a body. Raises Failed unless it is 200."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=300)
    try:
        name, value = bearer.split(": ")
        connection.request("POST" if body else "GET", parts.path, body, {name: value} | (headers or {}))
        answer = connection.getresponse()
        if answer.status != 200:
            raise Failed(f"{url}: HTTP {answer.status}: {answer.read(500).decode(errors='replace')}")
        while chunk := answer.read(MIB):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{url}: {error!r}") from None
    finally:
        connection.close()


def shares(each_mib: list[float]) -> str:
    """What each of the three has."""
    return ", ".join(f"{name} {sheet.number(mib)}" for name, mib in zip(product.PROGRAMS, each_mib, strict=True))


def table(measured: Measured) -> str:
    """What was measured, in words."""
    figures = measured.figures
    rows = [["idle", f"{sheet.number(figures['idle_mib'])} MiB", measured.each]]
    for name, words in (("envelope", "through the envelope"), ("raw", "through /run")):
        if figures.get(f"{name}_growth_mib") is not None:
            rows.append(
                [
                    f"{BODIES} x 64 MiB both ways {words}",
                    f"+{sheet.number(figures[f'{name}_growth_mib'])} MiB",
                    f"{measured.peaks[name]}; {sheet.number(figures[f'{name}_mib_per_s'])} MiB/s, "
                    f"{figures[f'{name}_failed']:.0f} failed",
                ]
            )
    rows.append(
        [
            f"{measured.minutes:g} min of mixed load",
            f"{sheet.number(figures['load_early_mib'])} -> {sheet.number(figures['load_late_mib'])} MiB",
            f"peak {sheet.number(figures['load_peak_mib'])}, at rest {sheet.number(figures['load_rest_mib'])}; "
            f"{figures['load_requests']:,.0f} calls, {figures['load_errors']:.0f} failed",
        ]
    )
    long, short = measured.listed, SHORT_TABLE
    rows.append(
        [
            f"list of {long:,} tasks",
            f"{sheet.number(figures['list_long_mib'])} MiB",
            f"of {short:,}: {sheet.number(figures['list_short_mib'])}; {sheet.number(figures[f'list_{long}_s'])} s",
        ]
    )
    rows.append(
        [
            f"page of 1,000 in a table of {measured.rows:,}",
            f"{sheet.number(figures['page_first_ms'])} ms",
            f"in the middle {sheet.number(figures['page_middle_ms'])} ms; "
            f"in a table of {short:,}: {sheet.number(figures['page_of_1000_ms'])} ms",
        ]
    )
    return sheet.markdown(["memory", "measured", "with"], rows)


def measure(state: Path, options: argparse.Namespace, busy: float) -> sheet.Figures:
    """All of it."""
    options.minutes = options.minutes or (0.2 if options.quick else 10)
    options.rows = options.rows or (20_000 if options.quick else 1_000_000)
    options.listed = min(options.rows, 100_000)
    print(sheet.where(busy) + "\n")
    measured = Measured(options)
    measured.run(state)
    sheet.progress("")
    print(table(measured))
    print()
    print(sheet.goals_table(GOALS, measured.figures))
    return measured.figures


def main() -> int:
    """Run the benchmark. Gives the exit status."""
    parser = loads.options("memory", __doc__)
    parser.add_argument("--minutes", type=float, metavar="M", help="of mixed load; default 10; with --quick 0.2")
    parser.add_argument(
        "--rows", type=int, metavar="N", help="of the large table; default 1,000,000; with --quick 20,000"
    )
    product.add_note(parser)
    return loads.main("memory", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
