"""What scripts/up runs once the machine is set up: three programs, a deployed workspace, two REST calls."""

import argparse
import base64
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

from scripts.programs import BIN, ROOT, Failed, Platform, end_process

DEMO = ROOT / "examples" / "img2img"
READY_LIMIT = "120s"
CALL_LIMIT_S = 60.0


class Interrupted(Exception):
    """The user wants it to stop."""


def show(text: str = "") -> None:
    """Print at once."""
    print(text, flush=True)


def call(method: str, url: str, bearer: str, body: object = None) -> dict[str, Any]:
    """The JSON answer of the REST API. Raises Failed with its message."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {bearer}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310  # our own http URL
    try:
        with urllib.request.urlopen(request, timeout=CALL_LIMIT_S) as response:  # noqa: S310
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise Failed(f"{method} {url}: HTTP {error.code}: {error.read().decode(errors='replace')}") from None


def picture(answer: dict[str, Any], target: Path) -> str:
    """Keep the picture of an answer, and say what it is. Raises Failed unless the network doubled the sample."""
    if answer["result_code"] != 200:
        raise Failed(f"result_code {answer['result_code']}: {answer['msg']}")
    result = json.loads(answer["data"])
    target.write_bytes(base64.b64decode(result["images"][0]))
    before, after = size_of(DEMO / "sample.png"), size_of(target)
    if after != (2 * before[0], 2 * before[1]):
        raise Failed(f"the picture should have been doubled: {before} became {after}")
    info = json.loads(result["info"])
    return f"{before[0]}x{before[1]} -> {after[0]}x{after[1]} by {info['model']} in {info['seconds']} s: {target}"


def size_of(path: Path) -> tuple[int, int]:
    """Width and height in the header of a PNG file."""
    head = path.read_bytes()[:24]
    if head[:8] != b"\x89PNG\r\n\x1a\n":
        raise Failed(f"{path} is not a PNG picture")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def bring_up(platform: Platform, engine: str, port: int) -> None:
    """Start node and bridge beside the control plane."""
    show(f"control plane   gRPC {platform.server}, metrics http://{platform.metrics}/metrics")
    images = platform.state / "images"
    if engine == "process":
        show("building the demo workspace for local processes ...")
        command = [str(ROOT / "scripts" / "demo-image"), "process", str(images)]
        subprocess.run(
            command, check=True, env=platform.environment | {"PYTHON": sys.executable}, stdout=subprocess.DEVNULL
        )
    platform.start_node("node", "--engine", engine, "--process-images", str(images), "--stop-containers")
    show(f"node            joined, engine {engine}")
    platform.start_bridge(port=port)
    show(f"bridge          {platform.url} (documentation: {platform.url}/docs)")


def demonstrate(platform: Platform) -> str:
    """Deploy the workspace and call it both ways. Gives the workspace's id."""
    known = platform.ngpu("workspace", "list").get("workspaces", [])
    if not any(workspace["spec"]["name"] == "img2img" for workspace in known):
        platform.ngpu("workspace", "create", str(DEMO / "workspace.toml"))
    show("\ndeploying the workspace img2img")
    command = [str(BIN / "ngpu"), "workspace", "show", "img2img", "--wait", "--timeout", READY_LIMIT]
    if subprocess.run(command, env=platform.environment, check=False).returncode:
        raise Failed("the workspace did not come up: the lines above and the logs say why")
    platform.ngpu("route", "publish", "img2img", "--workspace", "img2img", "--path", "/sdapi/v1/img2img")
    bearer: str = platform.ngpu("workspace", "show", "img2img")["workspace"]["id"]
    body = {"data": {"init_images": [base64.b64encode((DEMO / "sample.png").read_bytes()).decode()]}}

    url = f"{platform.url}/user/sdapi/v1/img2img"
    show(f"\nsynchronous     POST {url}")
    answer = call("POST", url, bearer, body)
    show(f"  result_code {answer['result_code']}, taskID {answer['taskID']}")
    show(f"  {picture(answer, platform.state / 'result-sync.png')}")

    url = f"{platform.url}/user/schedulingTask?paramUrl=sdapi/v1/img2img&paramPort=8080"
    show(f"asynchronous    POST {url}")
    answer = call("POST", url, bearer, body)
    task = answer["taskID"]
    show(f"  result_code {answer['result_code']}, taskID {task}: {answer['msg']}")
    answer = call("GET", f"{platform.url}/user/queryTask?taskID={task}&wait=30", bearer)
    show(f"  queryTask: result_code {answer['result_code']}, result_size {answer['result_size']}")
    show(f"  {picture(answer, platform.state / 'result-async.png')}")
    return bearer


def verify_recorded(platform: Platform, bearer: str) -> None:
    """Raise Failed unless both tasks are on record, completed, on a node, and the placement is explained."""
    listed = call("GET", f"{platform.url}/user/queryTaskList", bearer)
    if listed["result_size"] != len(listed["taskIds"]) or listed["result_size"] < 2:
        raise Failed(f"two tasks should be listed: {listed}")
    for task in listed["taskIds"]:
        info = call("GET", f"{platform.url}/user/getDetailed?taskID={task}", bearer)["taskInfo"]
        if info["state"] != 3 or not info["nodeaddr"]:
            raise Failed(f"task {task} should be completed on a node: state {info['state']}, node {info['nodeaddr']!r}")
    if not platform.ngpu("explain", "workspace", "img2img").get("summary"):
        raise Failed("the placement of the workspace should be explained")


def stay(platform: Platform, bearer: str) -> NoReturn:
    """Say how to go on, and wait for Ctrl-C."""
    envelope = """'{"data": {"init_images": ["'$(base64 -w0 examples/img2img/sample.png)'"]}}'"""
    show(f"""
All is up. In another terminal:

  . .venv/bin/activate
  export NGPU_SERVER={platform.server} NGPU_TOKEN_FILE={platform.environment["NGPU_TOKEN_FILE"]}
  ngpu node list
  ngpu workspace show img2img
  ngpu explain workspace img2img

  # the documented REST API; the published route img2img needs no credential
  curl -s {platform.url}/user/img2img -d {envelope}
  curl -s -H 'Authorization: Bearer {bearer}' '{platform.url}/user/queryTaskList'

  REST API    {platform.url}   ({platform.url}/docs)
  gRPC        {platform.server}
  metrics     http://{platform.metrics}/metrics
  state       {platform.state}   (database, keys, logs, result pictures)

Ctrl-C stops everything.""")
    while True:
        signal.pause()


def _interrupt(_number: int, _frame: object) -> NoReturn:
    # Once: what follows is the orderly stop, which a second Ctrl-C must not cut short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted


def main() -> int:
    """Run the demo. Gives the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/up", description=__doc__)
    parser.add_argument("--engine", choices=["docker", "process"], required=True)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--port", type=int)
    parser.add_argument("--grpc-port", type=int)
    parser.add_argument("--state-dir", type=Path)
    parser.add_argument("--stop-pid", type=int, help="a Docker engine to stop at the end")
    options = parser.parse_args()
    port = options.port if options.port is not None else 0 if options.check else 8080
    grpc_port = options.grpc_port if options.grpc_port is not None else 0 if options.check else 50051
    temporary = options.check and options.state_dir is None
    state = Path(tempfile.mkdtemp(prefix="ngpu-up-")) if temporary else (options.state_dir or ROOT / ".ngpu")
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    with contextlib.ExitStack() as at_end:
        if options.stop_pid:
            at_end.callback(end_process, options.stop_pid)
        try:
            with Platform(state, grpc_port=grpc_port) as platform:
                bring_up(platform, options.engine, port)
                bearer = demonstrate(platform)
                if not options.check:
                    stay(platform, bearer)
                verify_recorded(platform, bearer)
            show("\nall is well; everything is stopped")
        except Interrupted:
            show("\nstopped; nothing is left running")
        except Failed as error:
            show(f"\nscripts/up: {error}\nlogs: {state / 'logs'}")
            return 1
    if temporary:
        shutil.rmtree(state, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
