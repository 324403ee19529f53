"""`ngpu node`: the machines that take part, and what they may take."""

from collections import Counter
from datetime import UTC, datetime
from typing import Annotated

import typer
from ngpu.v1 import fleet_pb2 as pb
from ngpu.v1 import node_pb2
from rich.console import Group, RenderableType
from rich.text import Text

from controlplane.ctl.command import connected
from controlplane.ctl.output import cell, counted, facts, short, table
from controlplane.ctl.session import Session
from controlplane.ctl.units import age_text, duration_text, size_text, time_text
from controlplane.ctl.workspaces import confirm

app = typer.Typer(no_args_is_help=True, help="Nodes: the machines that take part.")

Which = Annotated[str, typer.Argument(metavar="NODE", help="Its name or address.")]

_GRADES = {pb.GRADE_OK: "green", pb.GRADE_DEGRADED: "yellow", pb.GRADE_QUARANTINED: "red"}


@app.command("list")
@connected
def list_(
    session: Session,
    revoked: Annotated[bool, typer.Option("--revoked", help="Also those that were revoked.")] = False,
) -> None:
    """List nodes by name, with their GPUs and what they run."""
    answer = session.pages(session.fleet.ListNodes, pb.ListNodesRequest(revoked=revoked))
    session.out.answer(answer, lambda: _listed(answer, session.now), [node.name or node.addr for node in answer.nodes])


def _listed(answer: pb.ListNodesResponse, now: datetime) -> RenderableType:
    if not answer.nodes:
        return cell("No node has joined. Make a token for one: ngpu token create --role node", "dim")
    rows = [
        (
            node.name,
            _state(node),
            _gpus(node),
            node.replicas,
            node.running_tasks,
            node.inventory.engine,
            "now" if node.connected else age_text(node.last_seen_time, now),
            short(node.addr) if node.name else node.addr,
        )
        for node in answer.nodes
    ]
    columns = ("NAME", "STATE", "GPUS", "REPLICAS", "TASKS", "ENGINE", "SEEN", "ADDRESS")
    return table(*columns, rows=rows, right=("REPLICAS", "TASKS"))


def _state(node: pb.Node) -> Text:
    if node.revoked:
        return cell("revoked", "red")
    words = {pb.AVAILABILITY_CORDONED: "cordoned", pb.AVAILABILITY_DRAINING: "draining"}
    availability = words.get(node.availability, "")
    if not node.connected:
        return cell(", ".join(filter(None, ("away", availability))), "red")
    return cell(availability or "open", "yellow" if availability else "green")


def _gpus(node: pb.Node) -> str:
    models = Counter(gpu.model for gpu in node.inventory.gpus)
    if not models:
        return "none"
    free = len(node.inventory.gpus) - len(set(node.gpu_ids_in_use))
    bad = sum(health.grade == pb.GRADE_QUARANTINED for health in node.gpu_health)
    text = ", ".join(f"{count} x {_brief(model)}" for model, count in models.items())
    return f"{text} ({free} free{f', {bad} quarantined' if bad else ''})"


def _brief(model: str) -> str:
    return model.removeprefix("NVIDIA ").removeprefix("GeForce ")


@app.command()
@connected
def show(session: Session, node: Which) -> None:
    """Show a node: what is built in, how well it is, what it runs."""
    answer = session.call(session.fleet.GetNode, pb.GetNodeRequest(node=node))
    session.out.answer(answer, lambda: _shown(answer.node, session.now), [answer.node.addr])


def _shown(node: pb.Node, now: datetime) -> RenderableType:
    has = node.inventory
    versions = {"driver": has.driver_version, "CUDA": has.cuda_version, "daemon": has.daemon_version, "on": has.os}
    lines: list[tuple[str, object]] = [
        ("address", node.addr),
        ("state", _state(node)),
        (
            "machine",
            f"{counted(has.cpus, 'CPU')}, {size_text(has.memory_bytes)}, {size_text(has.disk_free_bytes)} of disk free",
        ),
        ("engine", f"{has.engine} {has.engine_version}".strip()),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)),
        ("images", ", ".join(has.allowed_images) or "all are allowed"),
        ("volumes", f"up to {size_text(has.volume_limit_bytes)}" if has.volume_limit_bytes else "not allowed"),
        ("GPUs", has.gpu_message or ("none" if not has.gpus else "")),
        ("runs", f"{counted(node.replicas, 'replica')}, {counted(node.running_tasks, 'task')}"),
        ("enrolled", f"{time_text(node.enroll_time)} ({age_text(node.enroll_time, now)})"),
        ("seen", f"{age_text(node.last_seen_time, now)}{f' from {node.ip}' if node.ip else ''}"),
    ]
    head = facts(node.name or node.addr, lines)
    if not has.gpus:
        return head
    health = {one.gpu_id: one for one in node.gpu_health}
    rows = []
    for gpu in has.gpus:
        one = health.get(gpu.id, pb.GpuHealth())
        grade = pb.Grade.Name(one.grade).removeprefix("GRADE_").lower() if one.grade else "unknown"
        use = "in use" if gpu.id in node.gpu_ids_in_use else "free"
        rows.append(
            (
                gpu.index,
                gpu.model,
                size_text(gpu.memory_bytes),
                use,
                cell(grade, _GRADES.get(one.grade, "dim")),
                why(one, now),
                gpu.id,
            )
        )
    columns = ("GPU", "MODEL", "MEMORY", "USE", "HEALTH", "WHY", "ID")
    return Group(head, "", table(*columns, rows=rows, right=("GPU",)))


def why(health: pb.GpuHealth, now: datetime) -> str:
    """Why a GPU is as it is, and how it stands with its tests."""
    test = health.test
    words = [health.reason] if health.reason else []
    if test.last == node_pb2.GPU_TEST_STATE_PASSED and not words:
        words.append(f"passed its test {age_text(test.last_end_time, now)} ({test.words})")
    if test.HasField("next_time"):
        left = (test.next_time.ToDatetime(UTC) - now).total_seconds()
        words.append(f"next test in {duration_text(left)}" if left > 0 else "its next test is due")
    return "; ".join(words)


@app.command("test")
@connected
def have_tested(
    session: Session,
    node: Which,
    gpu: Annotated[str, typer.Argument(metavar="GPU", help="Its number or id; else all in quarantine.")] = "",
) -> None:
    """Have GPUs that are in quarantine after an Xid tested now, without the wait that follows an earlier test.

    The node writes most of the GPU's memory full and reads it back, and has it compute. A GPU that passes takes
    replicas again by itself. It is tested once nothing runs on it; `ngpu node show NODE` tells how it stands.

    \b
    Examples:
      ngpu node test node-7
      ngpu node test node-7 0
    """
    request = pb.TestGpusRequest(node=node)
    if gpu:
        there = session.call(session.fleet.GetNode, pb.GetNodeRequest(node=node)).node
        request.gpu_ids.append(next((one.id for one in there.inventory.gpus if str(one.index) == gpu), gpu))
    answer = session.call(session.fleet.TestGpus, request)
    name = answer.node.name or answer.node.addr
    session.out.answer(answer, lambda: cell(f"{name} is asked: ngpu node show {name}"))


@app.command()
@connected
def drain(session: Session, node: Which) -> None:
    """Take nothing new, move the replicas elsewhere, let running tasks finish. Undo with `uncordon`.

    \b
    Examples:
      ngpu node drain node-7 && watch ngpu node show node-7
    """
    _set(session, node, pb.AVAILABILITY_DRAINING, "is draining: its replicas are replaced elsewhere, then stop")


@app.command()
@connected
def cordon(session: Session, node: Which) -> None:
    """Place no new replicas here; what runs goes on and takes tasks. Undo with `uncordon`."""
    _set(session, node, pb.AVAILABILITY_CORDONED, "is cordoned: no new replicas are placed on it")


@app.command()
@connected
def uncordon(session: Session, node: Which) -> None:
    """Let a node take everything again, after `cordon` or `drain`.

    It is also your word that its GPUs were tested: those in quarantine after an Xid take replicas again.
    """
    _set(session, node, pb.AVAILABILITY_OPEN, "takes replicas again")


def _set(session: Session, node: str, availability: pb.Availability.ValueType, effect: str) -> None:
    request = pb.SetNodeAvailabilityRequest(node=node, availability=availability)
    answer = session.call(session.fleet.SetNodeAvailability, request)
    session.out.answer(answer, lambda: cell(f"{answer.node.name or answer.node.addr} {effect}."))


@app.command()
@connected
def revoke(
    session: Session,
    node: Which,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Cut a node off for good: its key is refused, its work moves. To let the machine join again, give it a new key."""
    confirm(f"Cut the node {node} off for good?", yes=yes)
    answer = session.call(session.fleet.RevokeNode, pb.RevokeNodeRequest(node=node))
    session.out.answer(answer, lambda: cell(f"{node} is revoked."))
