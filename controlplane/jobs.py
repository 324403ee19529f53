"""Containers that answer at once and work on: which requests begin a job, and which ask after one. Pure.

What the answers mean is read on the nodes (nodedaemon/job_rules.py), by the same rules.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import unquote, unquote_plus

from msgspec.structs import asdict

from controlplane.spec import JobRule

#: The requests that begin a job, if a rule does not say.
START: Final = "POST /*"
POLL_S: Final = 1.0

PRESETS: Final[Mapping[str, JobRule]] = {
    "ngpu-classic": JobRule(
        start=START,
        id=("/task_id", "/taskID", "/taskId"),
        ask="GET {path}?taskID={id}",
        state="/result_code",
        # The first answer says of a job that it is begun what a later one says of it when it is done.
        accepted=("100", "200"),
        done=("100", "200"),
        waiting=("101",),
        running=("102",),
        failed=("104",),
        busy=("203",),
        message="/msg",
        poll_s=POLL_S,
    ),
    "": JobRule(start=START, poll_s=POLL_S),
}


def resolved(rule: JobRule) -> JobRule:
    """With its preset's values in place of those it leaves out. An unknown preset adds nothing."""
    given = {name: value for name, value in asdict(rule).items() if value}
    return JobRule(**(asdict(PRESETS.get(rule.preset) or PRESETS[""]) | given))


def begun_by(rules: Iterable[JobRule], method: str, path: str) -> JobRule | None:
    """The rule for a request that may begin a job."""
    for rule in rules:
        wanted, _, pattern = rule.start.partition(" ")
        if wanted == method and (path.startswith(pattern[:-1]) if pattern.endswith("*") else path == pattern):
            return rule
    return None


class Question(NamedTuple):
    """A request that asks after a job. `method`: with which the container is asked.

    `partial`: what is recorded of it is only a part of the container's answer.
    """

    job_id: str
    method: str
    partial: bool


def question_of(rules: Iterable[JobRule], method: str, path: str, query: str) -> Question | None:
    """The job that a request asks after, by the request's form; None: it asks after none.

    GET and POST alike, as envelopes only come by POST: so whether it is a question is known once its job is.
    """
    for rule in rules:
        wanted, path_form, query_form = _form_of(rule.ask, rule.start)
        if method not in {wanted, "GET", "POST"} or (match := path_form.fullmatch(path)) is None:
            continue
        ids = {unquote(found) for found in match.groupdict().values()}
        given = dict(_pairs(query))
        for name, form in query_form:
            within = form.fullmatch(given.get(name, ""))
            ids |= {""} if within is None else set(within.groupdict().values())
        if len(ids) == 1 and (job_id := ids.pop()):
            return Question(job_id, wanted, bool(rule.output))
    return None


@lru_cache(maxsize=1024)
def _form_of(ask: str, start: str) -> tuple[str, re.Pattern[str], tuple[tuple[str, re.Pattern[str]], ...]]:
    """Method, pattern of the path, and patterns of parameters by name."""
    method, _, target = ask.partition(" ")
    path, _, query = target.partition("?")
    begun_path = start.partition(" ")[2]
    begun = re.escape(begun_path[:-1]) + ".*" if begun_path.endswith("*") else re.escape(begun_path)
    pairs = tuple((name, re.compile(_pattern(value, "", ".+"))) for name, value in _pairs(query))
    return method, re.compile(_pattern(path, begun, "[^/]+")), pairs


def _pattern(form: str, path: str, job_id: str) -> str:
    named = re.escape(form).replace(re.escape("{path}"), path)
    return named.replace(re.escape("{id}"), f"(?P<id>{job_id})", 1).replace(re.escape("{id}"), "(?P=id)")


def _pairs(query: str) -> Iterable[tuple[str, str]]:
    for piece in query.split("&"):
        name, _, value = piece.partition("=")
        if name:
            yield unquote_plus(name), unquote_plus(value)
