"""How well replicas are placed, and what a decision costs: the product's placement beside others' ways.

Allocation: requests of the openb trace (scripts/bench/data/openb) arrive in random order until 130 % of all GPUs have
been asked for; how many of the GPUs are then in use. Churn: on a sixth of its GPU nodes over three weeks requests come
and go, a third of which name a GPU model, and nodes die, one in ten of them often; what had to be refused, and what was
lost. Decision: CPU of one at 10,000 nodes that are 85 % full. No figure but the last depends on the machine.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any, Final

from scripts.bench import loads, sheet
from scripts.bench.loads import HERE
from scripts.bench.placement_decisions import Cost, decisions
from scripts.bench.placement_loads import (
    DATA,
    TRACES,
    Churn,
    Machine,
    Pod,
    arrivals,
    capacity,
    deaths,
    inflated,
    machines,
    pods,
)
from scripts.bench.placement_ours import Ours
from scripts.bench.placement_rivals import Cheapest, Fgd, Fleet, Random, Rival, best_fit, dot_product
from scripts.bench.placement_runs import Contestant, Outcome, allocation, days
from scripts.bench.sheet import Goal
from scripts.bench.tools import INSTRUMENTS
from scripts.programs import Failed

#: Of the figures that are told; nothing was tuned with them.
SEEDS: Final = (101, 102, 103, 104, 105)
ARRIVED: Final = 1.3
#: By name: how to choose on these nodes, given the whole workload and a seed.
POLICIES: Final[dict[str, Callable[[Sequence[Machine], Sequence[Pod], int], Contestant]]] = {
    "ngpu": lambda nodes, _load, _seed: Ours(nodes),
    "FGD": lambda nodes, load, _: Rival(fleet := Fleet(nodes), Cheapest(fleet, Fgd(load).cost)),
    "best-fit": lambda nodes, _load, _: Rival(fleet := Fleet(nodes), Cheapest(fleet, best_fit)),
    "dot-product": lambda nodes, _load, _: Rival(fleet := Fleet(nodes), Cheapest(fleet, dot_product)),
    "random": lambda nodes, _load, seed: Rival(fleet := Fleet(nodes), Random(fleet, seed)),
}
CHURN: Final = Churn(days=21.0, load=0.9)
CHURN_TRACE: Final = "gpuspec33"
CHURN_POLICIES: Final = ("ngpu", "FGD", "best-fit")
#: One in so many of the GPU nodes.
CHURN_NODES: Final = 6

GOALS: Final = (
    Goal("default, GPUs in use", "alloc_default", None, 95.4, unit="%"),
    Goal("gpuspec33, GPUs in use", "alloc_gpuspec33", None, 94.7, unit="%"),
    Goal("multigpu50, GPUs in use", "alloc_multigpu50", None, 97.1, unit="%"),
    Goal("churn: GPUs refused, to FGD's", "churn_blocked", None, 0.72, to="churn_blocked_fgd", most=True),
    Goal("churn: replicas lost on bad nodes, to FGD's", "churn_lost", None, 0.8, to="churn_lost_fgd", most=True),
    Goal("CPU of a decision, 10,000 nodes 85 % full", "decision_ms_10k_nodes", None, 1.5, most=True, unit="ms"),
)

Curve = list[tuple[float, float]]


def run_allocation(data: Path, trace: str, policy: str, seed: int) -> Curve:
    """In a process of its own."""
    nodes, load = machines(data), pods(data, trace)
    contestant = POLICIES[policy](nodes, load, seed)
    return allocation(contestant, inflated(load, capacity(nodes), ARRIVED, seed), capacity(nodes))


def run_churn(data: Path, policy: str, seed: int) -> Outcome:
    """In a process of its own."""
    nodes = [node for node in machines(data) if node.gpus][::CHURN_NODES]
    load = pods(data, CHURN_TRACE)
    died, bad = deaths(nodes, CHURN, seed)
    contestant = POLICIES[policy](nodes, load, seed)
    return days(contestant, arrivals(load, nodes, CHURN, seed), died, bad, CHURN, whole=capacity(nodes))


def measure(_state: Path, options: argparse.Namespace, busy: float) -> sheet.Figures:
    """All three parts; prints the tables."""
    figures = sheet.Figures()
    policies = ["ngpu"] if options.quick else list(POLICIES)
    seeds = SEEDS[:1] if options.quick else SEEDS
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        tried = {
            (trace, policy, seed): pool.submit(run_allocation, options.data, trace, policy, seed)
            for trace in TRACES
            for policy in policies
            for seed in seeds
        }
        costs = pool.submit(decisions, options.data)
        churned = {
            (policy, seed): pool.submit(run_churn, options.data, policy, seed)
            for policy in ([] if options.quick else CHURN_POLICIES)
            for seed in seeds
        }
        curves = {key: future.result() for key, future in _told(tried.items())}
        outcomes = {key: future.result() for key, future in _told(churned.items())}
        cost = costs.result()
    sheet.progress("")
    for trace in TRACES:
        for policy in policies:
            figure = f"alloc_{trace}" + ("" if policy == "ngpu" else f"_{_plain(policy)}")
            figures.keep(figure, 100 * mean(curves[trace, policy, seed][-1][1] for seed in seeds))
    figures.keep("decision_ms_10k_nodes", cost.mean_ms)
    figures.keep("decision_p50_ms_10k_nodes", cost.p50_ms)
    figures.keep("decision_p99_ms_10k_nodes", cost.p99_ms)
    figures.keep("first_decision_ms_10k_nodes", cost.first_ms)
    for policy in {policy for policy, _ in outcomes}:
        of = [outcomes[policy, seed] for seed in seeds]
        suffix = "" if policy == "ngpu" else f"_{_plain(policy)}"
        figures.keep(f"churn_blocked{suffix}", 100 * sum(o.blocked for o in of) / sum(o.asked for o in of))
        figures.keep(f"churn_lost{suffix}", sum(o.lost_on_bad for o in of) / len(of))
    text = (
        f"{len(seeds)} orders of arrival (seeds {seeds[0]} to {seeds[-1]}), means." if len(seeds) > 1 else "One seed."
    )
    print(f"{sheet.where(busy)} {text}\n")
    print(_allocations(curves, policies, seeds))
    if outcomes:
        print("\n" + _churns(outcomes, seeds))
    print("\n" + _costs(cost))
    print("\n" + sheet.goals_table(GOALS, figures))
    if options.plot and not options.quick:
        plot(curves, policies, seeds, options.plot)
    return figures


def _told(futures: Iterable[tuple[Any, Any]]) -> Iterable[tuple[Any, Any]]:
    for key, future in futures:
        sheet.progress(" ".join(map(str, key)))
        yield key, future


def _plain(policy: str) -> str:
    return policy.lower().replace("-", "_")


def _allocations(curves: dict[tuple[str, str, int], Curve], policies: Sequence[str], seeds: Sequence[int]) -> str:
    rows = []
    for policy in policies:
        row = [policy]
        for trace in TRACES:
            ends = [100 * curves[trace, policy, seed][-1][1] for seed in seeds]
            row.append(f"{mean(ends):.2f}" + (f" ({min(ends):.2f} to {max(ends):.2f})" if len(ends) > 1 else ""))
        rows.append(row)
    return sheet.markdown(["% of GPUs in use when 130 % have been asked for", *TRACES], rows)


def _churns(outcomes: dict[tuple[str, int], Outcome], seeds: Sequence[int]) -> str:
    rows = []
    for policy in CHURN_POLICIES:
        of = [outcomes[policy, seed] for seed in seeds]
        blocked = [100 * each.blocked / each.asked for each in of]
        rows.append(
            [
                policy,
                f"{100 * sum(o.blocked for o in of) / sum(o.asked for o in of):.2f} % "
                f"({min(blocked):.2f} to {max(blocked):.2f})",
                f"{mean(each.lost_on_bad for each in of):.0f}",
                f"{mean(each.lost_on_good for each in of):.0f}",
                f"{100 * mean(each.held_share for each in of):.1f} %",
            ]
        )
    head = ["churn", "GPUs refused, of those asked for", "replicas lost on bad nodes", "on others", "GPUs in use"]
    return sheet.markdown(head, rows)


def _costs(cost: Cost) -> str:
    shown = [f"{value:.2f} ms" for value in (cost.mean_ms, cost.p50_ms, cost.p99_ms)]
    rows = [[f"{cost.count:,} decisions, {cost.new} of them for a shape not ranked yet", *shown]]
    rows.append(["of those for a shape not ranked yet", f"{cost.first_ms:.2f} ms", "-", "-"])
    return sheet.markdown(["CPU of a decision", "mean", "p50", "p99"], rows)


def plot(
    curves: dict[tuple[str, str, int], Curve], policies: Sequence[str], seeds: Sequence[int], target: Path
) -> None:
    """GPUs in use over GPUs asked for, as a PNG."""
    drawn = [
        {
            "trace": trace,
            "policy": policy,
            # Arrivals differ by seed, the steps do not.
            "points": [
                [100 * mean(axis) for axis in zip(*points, strict=True)]
                for points in zip(*(curves[trace, policy, seed] for seed in seeds), strict=False)
            ],
        }
        for trace in TRACES
        for policy in policies
    ]
    INSTRUMENTS.install()
    command = [INSTRUMENTS.python, str(HERE / "placement_plot.py"), str(target)]
    done = subprocess.run(command, input=json.dumps(drawn), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{target} was not made: {done.stderr}")


def main() -> int:
    """Run the benchmark. Gives the exit status."""
    parser = loads.options("placement", __doc__)
    parser.add_argument(
        "--data", type=Path, metavar="DIR", default=DATA, help="with the trace's CSV files; default: ours"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also GPUs in use over GPUs asked for, as this PNG")
    return loads.main("placement", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
