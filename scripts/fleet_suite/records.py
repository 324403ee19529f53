"""What a run is judged by besides the API: the database's own account, in one consistent look, and the processes'."""

import json
import sqlite3
import statistics
from pathlib import Path
from typing import Any

import msgspec

from controlplane.spec import Spec
from scripts.fleet_suite.audit import WHOLE, Has, Held


def held(database: Path) -> tuple[list[Held], dict[str, Has]]:
    """What replicas hold that are not known to be gone, and what nodes have; both of one moment."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        connection.execute("BEGIN")
        rows = connection.execute(
            "SELECT r.id, r.node_addr, r.gpu_ids_json, w.spec_json FROM replica r"
            " JOIN workspace w ON w.uid = r.workspace_uid WHERE r.gone_time IS NULL"
        ).fetchall()
        nodes = connection.execute("SELECT addr, name, inventory_json FROM node").fetchall()
    connection.close()
    specs: dict[bytes, Spec] = {}
    found = []
    for replica, node, gpu_ids, spec_json in rows:
        # Its size stays when a workspace is updated here: the last description says what each of its replicas holds.
        spec = specs.setdefault(spec_json, msgspec.json.decode(spec_json, type=Spec))
        share = spec.gpu.share or WHOLE
        found.append(Held(replica, node, tuple(json.loads(gpu_ids)), share, spec.cpus, spec.memory_bytes))
    return found, {addr: _has(name, json.loads(inventory)) for addr, name, inventory in nodes}


def _has(name: str, inventory: dict[str, Any]) -> Has:
    gpus = frozenset(gpu["id"] for gpu in inventory.get("gpus", []))
    return Has(name, gpus, inventory.get("cpus", 0.0), inventory.get("memory_bytes", 0))


def shortages(database: Path) -> dict[str, tuple[int, int]]:
    """Of living workspaces that lack replicas, by name: how many are wanted, and how many are on no node."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute(
            "SELECT w.name, w.spec_json, count(r.id) FROM workspace w LEFT JOIN replica r ON r.workspace_uid = w.uid"
            " AND r.drain_time IS NULL AND r.stop_time IS NULL AND r.gone_time IS NULL"
            " WHERE w.delete_time IS NULL GROUP BY w.uid"
        ).fetchall()
    connection.close()
    wanted = [(name, msgspec.json.decode(spec_json, type=Spec).replicas, active) for name, spec_json, active in rows]
    return {name: (replicas, replicas - active) for name, replicas, active in wanted if active < replicas}


def leaving(database: Path) -> list[str]:
    """Replicas that are to go and are not known to be gone; in words."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute(
            "SELECT id FROM replica WHERE gone_time IS NULL AND (drain_time IS NOT NULL OR stop_time IS NOT NULL)"
        ).fetchall()
    connection.close()
    return [f"{replica} was to go and is still there" for (replica,) in rows]


def replicas_ever(database: Path) -> int:
    """How many replicas were placed in all."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        (count,) = connection.execute("SELECT count(*) FROM replica").fetchone()
    connection.close()
    return int(count)


def placed_after_s(database: Path) -> tuple[float, float]:
    """From a workspace's creation to the placement of its first replica, in seconds: median and 99th percentile."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute(
            "SELECT min(r.create_time) - w.create_time FROM workspace w"
            " JOIN replica r ON r.workspace_uid = w.uid GROUP BY w.uid"
        ).fetchall()
    connection.close()
    took = sorted(row[0] / 1e6 for row in rows) or [0.0]
    return statistics.median(took), took[int(len(took) * 0.99)]
