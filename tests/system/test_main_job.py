"""The main job with three real processes: a workspace is deployed and called as documented."""

import base64
import json
import re
import signal

from scripts.programs import Platform
from tests.system.conftest import Callers, Rest, until


def test_synchronous_call_reaches_the_container_and_its_answer_comes_back(echo: Rest) -> None:
    answer = echo.ok("POST", "/user/img2img?style=3", {"btc_address": "", "data": {"prompt": "a cat"}})
    assert json.loads(answer["data"]) == {"prompt": "a cat"}
    assert re.fullmatch(r"\d{8}_\d\d_\d\d_\d\d_\d{20}", answer["taskID"])


def test_a_string_goes_to_the_container_byte_for_byte(echo: Rest) -> None:
    text = '{"b": 1,   "a": "é\\u00e9"}\n'
    assert echo.ok("POST", "/user/echo", {"data": text})["data"] == text


def test_task_is_queued_found_listed_and_detailed(echo: Rest) -> None:
    accepted = echo.ok("POST", "/user/schedulingTask?paramUrl=sdapi/v1/img2img&paramPort=8080", {"data": "hello"})
    task = accepted["taskID"]
    assert accepted["taskId"] == accepted["task_id"] == task

    done = echo.ended(task)
    assert (done["result_code"], done["data"], done["result_size"]) == (200, "hello", 5)
    assert task in echo.ok("GET", "/user/queryTaskList")["taskIds"]

    info = echo.ok("GET", f"/user/getDetailed?taskID={task}")["taskInfo"]
    assert (info["state"], info["request"], info["response"]) == (3, "hello", "hello")
    assert re.fullmatch("0x[0-9a-fA-F]{40}", info["nodeaddr"])
    assert info["requrl"] == "/user/schedulingTask?paramUrl=sdapi/v1/img2img&paramPort=8080"
    assert info["workspaceid"] == echo.bearer


def test_literal_ampersand_form_and_no_header_open_a_result(echo: Rest) -> None:
    task = echo.ok("POST", "/user/schedulingTask?paramUrl=echo", {"data": "x"})["taskID"]
    echo.ended(task)
    stranger = Rest(echo.url)
    assert stranger.ok("GET", f"/user/queryTask&taskID={task}")["data"] == "x"
    info = stranger.ok("GET", f"/user/getDetailed&taskID={task}")["taskInfo"]
    assert (info["workspaceid"], info["userip"], info["userkey"]) == ("", "", "")


def test_published_route_needs_no_credential(echo: Rest, platform: Platform) -> None:
    stranger = Rest(echo.url)
    assert stranger.call("POST", "/user/img2img", {"data": "x"})[0] == 401
    platform.ngpu("route", "publish", "img2img", "--workspace", "echo", "--path", "/sdapi/v1/img2img")
    assert stranger.ok("POST", "/user/img2img", {"data": "x"})["data"] == "x"


def test_container_error_is_an_answer(echo: Rest) -> None:
    status, answer = echo.call("POST", "/user/status?code=503", {"data": ""})
    assert (status, answer["result_code"], answer["data"]) == (502, 503, "as you wish")
    status, answer = echo.call("POST", "/user/status?code=422", {"data": ""})
    assert (status, answer["result_code"], answer["data"]) == (422, 422, "as you wish")


def test_bodies_of_several_mebibytes_come_back_identical(echo: Rest) -> None:
    body = base64.b64encode(bytes(range(256)) * 12_000).decode()  # 4 MiB
    assert echo.ok("POST", "/user/echo", {"data": body})["data"] == body
    task = echo.ok("POST", "/user/schedulingTask?paramUrl=echo", {"data": body})["taskID"]
    assert echo.ended(task)["result_size"] == len(body)
    assert echo.ok("GET", f"/user/getDetailed?taskID={task}")["taskInfo"]["request"] == body


def test_binary_body_passes_and_comes_back_as_base64(echo: Rest) -> None:
    image = b"\x89PNG\r\n\x1a\n\xff\xfe\x00"
    status, _, answer = echo.raw("POST", "/user/echo", image, {"Content-Type": "image/png"})
    assert status == 200
    assert json.loads(answer)["data_encoding"] == "base64"
    assert base64.b64decode(json.loads(answer)["data"]) == image


def test_platform_credentials_never_reach_the_container(echo: Rest) -> None:
    status, _, body = echo.raw("POST", "/user/about", b'{"data": ""}', {"X-Mine": "yes", "X-NGPU-Secret": "no"})
    assert status == 200
    names = {name.lower() for name, _ in json.loads(json.loads(body)["data"])["headers"]}
    assert "x-mine" in names
    assert not names & {"authorization", "x-ngpu-secret"}
    assert echo.bearer not in body.decode()


def test_restart_of_the_control_plane_loses_nothing(echo: Rest, platform: Platform) -> None:
    slow = [echo.ok("POST", "/user/schedulingTask?paramUrl=sleep%3Fs=3", {"data": ""})["taskID"] for _ in range(2)]
    queued = [echo.ok("POST", "/user/schedulingTask?paramUrl=echo", {"data": str(n)})["taskID"] for n in range(20)]
    platform.controlplane.kill()
    platform.start_controlplane()
    until(lambda: echo.call("GET", f"/user/queryTask?taskID={queued[0]}")[0] == 200)
    for number, task in enumerate(queued):
        assert echo.ended(task)["data"] == str(number)
    for task in slow:
        echo.ended(task)
        attempts = platform.ngpu("task", "show", task)["attempts"]
        assert len(attempts) == 1, "a restart of the control plane must not run anything again"


def test_every_program_stops_in_order_under_load(echo: Rest, platform: Platform) -> None:
    callers = Callers(lambda n: echo.call("POST", "/user/echo", {"data": str(n)}), 4)
    until(lambda: len(callers.answers) > 20)
    callers.stop()
    for program in reversed(platform.programs):
        program.signal(signal.SIGTERM)
        assert program.process.wait(30) == 0, program.log.read_text()[-2000:]
