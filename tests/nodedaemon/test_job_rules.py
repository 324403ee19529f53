"""What an answer says about a job, by the rule of its workspace."""

import json
from typing import Any

import pytest
from ngpu.v1 import workspace_pb2

from nodedaemon.job_rules import ID_CHARS, WORDS_CHARS, Stand, first, later, output_of, target

#: As the control plane resolves the preset (controlplane/jobs.py).
CLASSIC = workspace_pb2.JobRule(
    id=["/task_id", "/taskID", "/taskId"],
    ask="GET {path}?taskID={id}",
    state="/result_code",
    accepted=["100", "200"],
    done=["100", "200"],
    waiting=["101"],
    running=["102"],
    failed=["104"],
    busy=["203"],
    message="/msg",
)
MODERN = workspace_pb2.JobRule(
    id=["/job/id"],
    ask="GET /jobs/{id}",
    state="/job/status",
    done=["succeeded"],
    running=["running"],
    waiting=["queued", "HTTP 202"],
    failed=["failed", "HTTP 410"],
    busy=["HTTP 503"],
    output="/job/result",
)


@pytest.mark.parametrize(
    ("rule", "status", "answer", "stand", "job_id"),
    [
        (CLASSIC, 200, {"result_code": 100, "task_id": "a-1"}, Stand.BEGUN, "a-1"),
        (
            CLASSIC,
            200,
            {"result_code": 100, "taskID": "20230423_11_23_05_10279"},
            Stand.BEGUN,
            "20230423_11_23_05_10279",
        ),
        (CLASSIC, 200, {"result_code": "100", "task_id": 17}, Stand.BEGUN, "17"),
        (CLASSIC, 200, {"result_code": 200, "task_id": "a"}, Stand.BEGUN, "a"),
        (CLASSIC, 200, {"result_code": 101, "task_id": "a"}, Stand.BEGUN, "a"),
        (CLASSIC, 200, {"task_id": "37a41eba"}, Stand.BEGUN, "37a41eba"),
        (CLASSIC, 200, {"result_code": 203, "msg": "busy"}, Stand.BUSY, ""),
        (CLASSIC, 200, {"result_code": 203, "task_id": "a"}, Stand.BUSY, ""),
        (CLASSIC, 200, {"result_code": 104, "msg": "no face"}, Stand.FAILED, ""),
        # Those that are not asynchronous at all say 100 as well.
        (CLASSIC, 200, {"result_code": 100, "image_url": "u"}, Stand.DONE, ""),
        (CLASSIC, 200, {"result_code": 100, "task_id": ""}, Stand.DONE, ""),
        (CLASSIC, 200, {"result_code": 100, "task_id": None}, Stand.DONE, ""),
        (CLASSIC, 200, {"result_code": 100, "task_id": ["a"]}, Stand.DONE, ""),
        (CLASSIC, 200, {"result_code": 100, "task_id": "x" * (ID_CHARS + 1)}, Stand.DONE, ""),
        (CLASSIC, 200, {"result_code": 100, "task_id": "a\nb"}, Stand.DONE, ""),
        (CLASSIC, 422, {"result_code": 100, "task_id": "a"}, Stand.ANSWER, ""),
        (CLASSIC, 500, {"result_code": 203}, Stand.ANSWER, ""),
        (CLASSIC, 200, {"result_code": 105}, Stand.ANSWER, ""),
        (CLASSIC, 200, ["no", "object"], Stand.ANSWER, ""),
        (CLASSIC, 200, "text", Stand.ANSWER, ""),
        (MODERN, 202, {"job": {"id": "j", "status": "queued"}}, Stand.BEGUN, "j"),
        (MODERN, 201, {"job": {"id": "j"}}, Stand.BEGUN, "j"),
        (MODERN, 200, {"job": {"id": "j", "status": "succeeded", "result": 1}}, Stand.DONE, ""),
        (MODERN, 503, {"detail": "later"}, Stand.BUSY, ""),
        (MODERN, 400, {"job": {"id": "j"}}, Stand.ANSWER, ""),
    ],
)
def test_first_answer(rule: workspace_pb2.JobRule, status: int, answer: Any, stand: Stand, job_id: str) -> None:
    finding = first(rule, status, json.dumps(answer).encode())
    assert (finding.stand, finding.job_id) == (stand, job_id)


@pytest.mark.parametrize(
    ("rule", "status", "answer", "stand"),
    [
        (CLASSIC, 200, {"result_code": 101}, Stand.UNDER_WAY),
        (CLASSIC, 200, {"result_code": 102}, Stand.UNDER_WAY),
        (CLASSIC, 200, {"result_code": 102.0}, Stand.UNDER_WAY),
        (CLASSIC, 200, {"result_code": 100}, Stand.DONE),
        (CLASSIC, 200, {"result_code": 200}, Stand.DONE),
        (CLASSIC, 200, {"result_code": 104}, Stand.FAILED),
        (CLASSIC, 200, {"result_code": 203}, Stand.BUSY),
        (CLASSIC, 200, {"result_code": True}, Stand.UNCLEAR),
        (CLASSIC, 200, {}, Stand.UNCLEAR),
        (CLASSIC, 404, {"result_code": 100}, Stand.UNCLEAR),
        (CLASSIC, 500, {"result_code": 102}, Stand.UNCLEAR),
        (MODERN, 202, {"job": {"status": "succeeded"}}, Stand.DONE),
        (MODERN, 202, {}, Stand.UNDER_WAY),
        (MODERN, 410, {}, Stand.FAILED),
        (MODERN, 503, {}, Stand.BUSY),
    ],
)
def test_later_answer(rule: workspace_pb2.JobRule, status: int, answer: Any, stand: Stand) -> None:
    assert later(rule, status, json.dumps(answer).encode()).stand is stand


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff\xfe", b"[" * 100_000, b'{"result_code": 1'])
def test_answer_that_is_no_json_says_nothing(body: bytes) -> None:
    assert first(CLASSIC, 200, body).stand is Stand.ANSWER
    assert later(CLASSIC, 200, body).stand is Stand.UNCLEAR


def test_words_of_the_container_are_told_and_cut() -> None:
    assert later(CLASSIC, 200, b'{"result_code": 104, "msg": "no face found"}').words == "no face found"
    assert later(CLASSIC, 200, b'{"result_code": 104, "why": 7}').words == '{"result_code": 104, "why": 7}'
    assert later(CLASSIC, 404, b"gone").words == "HTTP 404: gone"
    assert len(later(CLASSIC, 200, b"x" * 100_000).words) == WORDS_CHARS


@pytest.mark.parametrize(
    ("pointer", "data", "kind"),
    [
        ("/job/result", b'{"n":[1,"\xc3\xa4"]}', b"application/json"),
        ("/job/result/n/1", "ä".encode(), b"text/plain; charset=utf-8"),
        ("/job/result/n/0", b"1", b"application/json"),
        ("/a~1b/m~0n", b"null", b"application/json"),
        ("/job/none", None, None),
        ("/job/result/n/2", None, None),
        ("/job/result/n/-1", None, None),
        ("/job/result/n/1/0", None, None),
    ],
)
def test_output_is_what_the_pointer_leads_to(pointer: str, data: bytes | None, kind: bytes | None) -> None:
    document = {"job": {"result": {"n": [1, "ä"]}}, "a/b": {"m~n": None}}
    found = output_of(pointer, document)
    assert (found.data, found.kind) == (data, kind) if found else data is None


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("GET {path}?taskID={id}", ("GET", "/a/removeBG", "taskID=x%2F%3F%26y")),
        ("POST /jobs/{id}/status", ("POST", "/jobs/x%2F%3F%26y/status", "")),
        ("GET /q?verbose=1&id={id}", ("GET", "/q", "verbose=1&id=x%2F%3F%26y")),
    ],
)
def test_id_is_escaped_where_it_is_put(template: str, wanted: tuple[str, str, str]) -> None:
    assert target(template, "/a/removeBG", "x/?&y") == wanted
