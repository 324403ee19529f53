"""Throughput and latency over concurrency as a PNG: curves as JSON on stdin, the file's name as argument.

Runs in the virtualenv that has matplotlib (tools.py).
"""

# mypy: disable-error-code="import-not-found"

import json
import sys

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot  # the backend is chosen before


def main() -> None:
    curves = json.load(sys.stdin)
    figure, (throughput, latency) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for curve in curves:
        style = {"marker": "o", "linewidth": 2.4 if curve["name"].startswith("ngpu") else 1.4, "label": curve["name"]}
        (line,) = throughput.plot(curve["concurrency"], curve["rps"], **style)
        latency.plot(curve["concurrency"], curve["p50_ms"], **style)
        latency.plot(curve["concurrency"], curve["p99_ms"], color=line.get_color(), linestyle=":", linewidth=1)
    for axes, label in ((throughput, "requests a second"), (latency, "ms: p50, and p99 dotted")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("connections")
        axes.set_ylabel(label)
        axes.set_xticks(curves[0]["concurrency"], [str(c) for c in curves[0]["concurrency"]])
        axes.grid(visible=True, which="major", alpha=0.3)
    figure.suptitle("W1: 300 B in and out, no work")
    figure.legend(*throughput.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(curves))
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
