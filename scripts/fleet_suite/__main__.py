"""A simulated fleet against a real control plane and bridge, on this machine, for some minutes; then the audit.

Workspaces of many sizes come, are scaled, updated and deleted, and are called through the REST API; nodes die and
return, are silent, slow, lose GPUs, report Xids; containers exit, pulls fail. All the while it is looked whether more
of any GPU or node is promised than there is, whether any replica stands still without a word, and whether each one that
is nowhere is explained. Then all is mended, and what fits must be ready. Exit status 1: something of this did not hold.
"""

import argparse
import json
import os
import platform
import secrets
import sys
import tempfile
from pathlib import Path

from scripts.fleet_suite.run import Run, Size, words


def size_of(nodes: int, gpus: int, minutes: float, seed: int) -> Size:
    """The long form, in proportion to its nodes."""
    return Size(
        nodes=nodes,
        gpus=gpus,
        seconds=minutes * 60,
        seed=seed,
        rate=nodes / 100,
        calls=nodes / 10,
        faults_a_minute=nodes / 4,
        patience_s=30.0,
        unsaid_s=10.0,
        calm_s=90.0,
        pull_s=5.0,
        start_s=1.0,
    )


def quick(seed: int) -> Size:
    """Half a minute, for every day: as many customers and faults as there are in a minute, and shorter patience."""
    settings = {
        "HEARTBEAT_INTERVAL": "0.5s",
        "NODE_TIMEOUT": "3.5s",
        "RECONNECT_GRACE": "4.5s",
    }
    return Size(
        nodes=20,
        gpus=80,
        seconds=12.0,
        seed=seed,
        rate=2.0,
        calls=10.0,
        faults_a_minute=60.0,
        patience_s=8.0,
        unsaid_s=4.0,
        calm_s=30.0,
        pull_s=0.3,
        start_s=0.2,
        settings={f"NGPU_CONTROLPLANE_{name}": value for name, value in settings.items()},
    )


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/fleet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=200, help="simulated nodes [200]")
    parser.add_argument("--gpus", type=int, default=800, help="GPUs of all nodes together [800]")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long it goes on before it is calm [5]")
    parser.add_argument("--seed", type=int, default=None, help="of all chance [a new one]")
    parser.add_argument("--quick", action="store_true", help="20 nodes with 80 GPUs, half a minute")
    parser.add_argument("--keep", type=Path, help="an empty directory for databases and logs, kept")
    given = parser.parse_args()
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    size = quick(seed) if given.quick else size_of(given.nodes, given.gpus, given.minutes, seed)
    machine = f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"
    print(f"seed {seed}, {size.nodes} nodes, {size.gpus} GPUs, {size.seconds:g} s, {machine}", flush=True)
    with tempfile.TemporaryDirectory(prefix="ngpu-fleet-") as directory:
        findings = Run(given.keep or Path(directory), size).do()
    print("\n".join(words(findings)))
    verdict = "all is as it must be" if not findings.wrong else f"{len(findings.wrong)} FAULTS"
    print(f"\nseed {seed}: {verdict}")
    figures = {**findings.figures, "faults": dict(findings.faults), "wrong": list(findings.wrong), "seed": seed}
    print(json.dumps(figures))
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
