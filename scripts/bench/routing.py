"""How well tasks are routed: the product's own queue, plan and estimates on a simulated fleet, beside what others do.

32 replicas of speeds 1, 1, 2 and 4 with neighbours that come and go, service times as measured on image generation
(lognormal), Poisson arrivals. Every router sees the same tasks, replicas and neighbours. Response times are in units
of the mean service time on an undisturbed replica of speed 1. Of the figures only the plan's cost is the machine's.

A second table has a round trip between router and replicas, which a slot that holds one task ahead need not wait for.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from scripts.bench import loads, sheet
from scripts.bench.routing_fleet import Router, simulate
from scripts.bench.routing_ours import Product
from scripts.bench.routing_rivals import C3, CentralQueue, LeastOutstanding, Oracle, PeakEwma, PowerOfTwo, Random
from scripts.bench.sheet import Goal
from scripts.bench.tools import INSTRUMENTS
from scripts.programs import Failed

#: None of them was used while constants were chosen.
SEEDS = (101, 102, 103, 104, 105)
TASKS = 20_000
QUICK_SEEDS = SEEDS[:3]
QUICK_TASKS = 12_000
#: Of the plot.
PLOT_LOADS = (0.8, 0.95)
POINTS = 400

ROUTERS: dict[str, Callable[[], Router]] = {
    "random": Random,
    "power of two": PowerOfTwo,
    "peak-EWMA of two": PeakEwma,
    "least outstanding": LeastOutstanding,
    "C3, full view": C3,
    "central queue": CentralQueue,
    "ngpu": Product,
    "ngpu, learnt sizes": Product,
    "oracle": Oracle,
}
#: Where requests tell of their size; elsewhere they do not.
TOLD = "ngpu, learnt sizes"
BESIDE = "least outstanding"
MEAN_BESIDE = "C3, full view"
QUICK = (BESIDE, MEAN_BESIDE, "ngpu", TOLD)

#: Where replicas are far: the round trip in mean service times, at this load.
TRIPS = (0.05, 0.1, 0.2)
QUICK_TRIPS = (0.1,)
FAR_LOAD = 0.8
FAR_ROUTERS: dict[str, Callable[[], Router]] = {
    BESIDE: LeastOutstanding,
    "central queue": CentralQueue,
    "ngpu, none ahead": lambda: Product(ahead=False),
    "ngpu": Product,
}

#: By load: of the p99 to least outstanding's, of the mean to C3's.
REACH = {0.5: (0.50, 1.0), 0.8: (0.68, 1.0), 0.95: (0.62, 1.1)}
GOALS = [
    goal
    for load, (p99, mean) in REACH.items()
    for goal in (
        Goal(
            f"p99 at load {load} to least outstanding's",
            f"p99_vs_least_outstanding_{load}",
            None,
            p99,
            most=True,
            unit="x",
        ),
        Goal(f"mean at load {load} to C3's", f"mean_vs_c3_{load}", None, mean, most=True, unit="x"),
    )
]
GOALS.append(Goal("CPU of all plans, a task, at load 0.95", "plan_us", None, 100, most=True, unit="us"))


def measure(_state: Path, options: argparse.Namespace, busy: float) -> sheet.Figures:
    """Every router at every load, with every seed."""
    seeds: Sequence[int] = QUICK_SEEDS if options.quick else SEEDS
    count = QUICK_TASKS if options.quick else TASKS
    names = QUICK if options.quick else tuple(ROUTERS)
    figures = sheet.Figures()
    curves: dict[float, dict[str, list[float]]] = {load: {} for load in PLOT_LOADS}
    for seed in seeds:
        for load in REACH:
            for name in names:
                sheet.progress(f"seed {seed}, load {load}: {name}")
                router = ROUTERS[name]()
                times = simulate(router, load=load, seed=seed, count=count, told=name == TOLD)
                figures.keep(f"p50 {name} {load}", times[len(times) // 2])
                figures.keep(f"p99 {name} {load}", times[int(len(times) * 0.99)])
                figures.keep(f"mean {name} {load}", statistics.fmean(times))
                if isinstance(router, Product):
                    figures.keep(f"plan_us {name} {load}", router.plan_s / count * 1e6)
                if load in curves and seed == seeds[0]:
                    curves[load][name] = times[:: max(1, len(times) // POINTS)]
    trips = QUICK_TRIPS if options.quick else TRIPS
    _measure_far(figures, trips, seeds, count)
    sheet.progress("")
    told = sheet.Figures()
    for trip in trips:
        for what in ("p99", "mean"):
            ahead, none = figures[f"far {what} ngpu {trip}"], figures[f"far {what} ngpu, none ahead {trip}"]
            told.keep(f"{what}_ahead_vs_none_trip_{trip}", ahead / none)
    for load in REACH:
        for key, name in (("", "ngpu"), ("_sized", TOLD)):
            p99, mean = figures[f"p99 {name} {load}"], figures[f"mean {name} {load}"]
            told.keep(f"p99{key}_{load}", p99)
            told.keep(f"p99{key}_vs_least_outstanding_{load}", p99 / figures[f"p99 {BESIDE} {load}"])
            told.keep(f"mean{key}_vs_c3_{load}", mean / figures[f"mean {MEAN_BESIDE} {load}"])
    told.keep("plan_us", figures["plan_us ngpu 0.95"])
    told.keep("plan_sized_us", figures[f"plan_us {TOLD} 0.95"])
    print(sheet.where(busy), f"{len(seeds)} seeds of {count:,} tasks, medians.\n")
    print(_table(figures, names))
    print(f"\nWith a round trip of so many mean service times, load {FAR_LOAD}:\n")
    print(_far_table(figures, trips))
    print()
    print(sheet.goals_table(GOALS, told))
    if options.plot:
        _plot(curves, options.plot)
    return told


def _measure_far(figures: sheet.Figures, trips: Sequence[float], seeds: Sequence[int], count: int) -> None:
    for trip, seed in product(trips, seeds):
        for name, make in FAR_ROUTERS.items():
            sheet.progress(f"seed {seed}, round trip {trip}: {name}")
            times = simulate(make(), load=FAR_LOAD, seed=seed, count=count, trip=trip)
            figures.keep(f"far p99 {name} {trip}", times[int(len(times) * 0.99)])
            figures.keep(f"far mean {name} {trip}", statistics.fmean(times))


def _table(figures: sheet.Figures, names: Sequence[str]) -> str:
    columns = [(what, load) for load in REACH for what in ("p50", "p99", "mean")]
    head = ["router", *(f"p50 at {load}" if what == "p50" else what for what, load in columns)]
    rows = [[name, *(f"{figures[f'{what} {name} {load}']:.2f}" for what, load in columns)] for name in names]
    return sheet.markdown(head, rows)


def _far_table(figures: sheet.Figures, trips: Sequence[float]) -> str:
    columns = [(what, trip) for trip in trips for what in ("p99", "mean")]
    head = ["router", *(f"p99, trip {trip}" if what == "p99" else what for what, trip in columns)]
    rows = [[name, *(f"{figures[f'far {what} {name} {trip}']:.2f}" for what, trip in columns)] for name in FAR_ROUTERS]
    return sheet.markdown(head, rows)


def _plot(curves: dict[float, dict[str, list[float]]], path: Path) -> None:
    INSTRUMENTS.install()
    command = [INSTRUMENTS.python, str(loads.HERE / "routing_plot.py"), str(path)]
    done = subprocess.run(command, input=json.dumps(curves), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"the plot: {done.stderr}")


def main() -> int:
    """Run the benchmark. Gives the exit status."""
    parser = loads.options("routing", __doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also response times as curves, a PNG")
    return loads.main("routing", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
