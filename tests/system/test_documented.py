"""The original documents' own requests, word for word, against the real platform; answers compared key by key."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.programs import Platform
from tests.system.conftest import Rest, workspace_file

ADDRESS = "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus"
BODY = b"""{
    "btc_address": "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus",
    "data": ""
}"""
ORIGINAL = """{
    "image_url": "https://ngpu.ai/image/1683730315image.jpeg",
    "prompt": "manicured claws, score_9, score_8_up, score_7_up, score_6_up, score_5_up, score_4_up, 1girl, realistic"
}"""


@pytest.fixture
def documented(tmp_path: Path, images: Path) -> Iterator[Rest]:
    """A platform as the documents assume it: img2img published, the documented address holding 100 AINN."""
    ledger = tmp_path / "ledger.json"
    ledger.write_text(json.dumps({ADDRESS: {"AINN": "100"}}))
    config = tmp_path / "controlplane.toml"
    config.write_text(f'[[assets.providers]]\nkind = "ledger"\npath = "{ledger}"\n')
    with Platform(tmp_path, settings={"NGPU_CONTROLPLANE_CONFIG": str(config)}) as platform:
        platform.start_node("node", "--engine", "process", "--process-images", str(images), "--stop-containers")
        platform.start_bridge()
        platform.ngpu(
            *("workspace", "create", workspace_file(tmp_path, "echo", "echo", concurrency=4)),
            *("--wait", "--timeout", "60s"),
        )
        platform.ngpu("route", "publish", "img2img", "--workspace", "echo")
        yield Rest(platform.url, platform.ngpu("workspace", "show", "echo")["workspace"]["id"])


def test_synchronous_img2img(documented: Rest) -> None:
    status, _, answer = Rest(documented.url).raw("POST", "/user/img2img", BODY)
    reply = json.loads(answer)
    assert status == 200
    assert set(reply) == {"result_code", "msg", "data", "taskID"}
    assert (reply["result_code"], reply["data"]) == (200, "")


def test_original_request_body_passes_through_data(documented: Rest) -> None:
    body = json.dumps({"btc_address": ADDRESS, "data": ORIGINAL}).encode()
    reply = json.loads(Rest(documented.url).raw("POST", "/user/img2img", body)[2])
    assert reply["data"] == ORIGINAL


def test_asynchronous_scheduling_then_query(documented: Rest) -> None:
    status, _, answer = documented.raw("POST", "/user/schedulingTask?paramUrl=sdapi/v1/img2img&paramPort=8080", BODY)
    reply = json.loads(answer)
    assert status == 200
    assert {"result_code", "msg", "taskID"} <= set(reply)
    assert reply["msg"] == "SUCCESS! The task is currently in the queue waiting to be processed"
    documented.ended(reply["taskID"])
    found = json.loads(Rest(documented.url).raw("GET", f"/user/queryTask&taskID={reply['taskID']}")[2])
    assert {"result_code", "msg", "taskID", "data"} <= set(found)
    assert (found["result_code"], found["taskID"]) == (200, reply["taskID"])


def test_brc20_check(documented: Rest) -> None:
    status, _, answer = Rest(documented.url).raw("GET", f"/brc20/checkAddress&address={ADDRESS}")
    reply = json.loads(answer)
    assert status == 200
    assert (reply["exists"], reply["names"], reply["balances"]) == (True, ["AINN"], [100])
    stranger = "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4"
    assert json.loads(Rest(documented.url).raw("GET", f"/brc20/checkAddress?address={stranger}")[2])["exists"] is False
    status, _, answer = documented.raw("POST", "/user/echo", json.dumps({"btc_address": stranger, "data": ""}).encode())
    assert (status, json.loads(answer)["result_code"]) == (403, 403)


def test_task_list_between_dates(documented: Rest) -> None:
    task = documented.ok("POST", "/user/schedulingTask?paramUrl=create", {"data": ""})["taskID"]
    status, _, answer = documented.raw("GET", "/user/queryTaskList?startTime=2024-04-11&endTime=2099-04-20")
    reply = json.loads(answer)
    assert status == 200
    assert set(reply) == {"result_code", "msg", "result_size", "taskIds"}
    assert (reply["result_code"], reply["msg"], reply["result_size"], reply["taskIds"]) == (200, "success", 1, [task])
    empty = documented.ok("GET", "/user/queryTaskList?startTime=2024-04-11&endTime=2024-04-20")
    assert (empty["result_size"], empty["taskIds"]) == (0, [])


def test_details(documented: Rest) -> None:
    task = documented.ok("POST", "/user/schedulingTask?paramUrl=create", {"data": "{}"})["taskID"]
    documented.ended(task)
    reply = documented.ok("GET", f"/user/getDetailed?taskID={task}")
    integers = "id state recordDursion videodursion gpudursion"
    strings = (
        "userkey btcaddress workspaceid taskid requrl method userip nodeip nodeaddr requesttime responsetime "
        "request response watermarktime watermarkres"
    )
    kinds = dict.fromkeys(integers.split(), int) | dict.fromkeys(strings.split(), str)
    info = reply["taskInfo"]
    assert set(info) - {"ext"} == set(kinds)
    assert {name: type(info[name]) for name in kinds} == kinds
    assert (info["requrl"], info["method"], info["state"]) == (
        "/user/schedulingTask?paramUrl=create",
        "schedulingTask",
        3,
    )
