"""GPUs in use over GPUs asked for, by policy and trace, as a PNG: curves as JSON on stdin, the file's name as argument.

Runs in the virtualenv that has matplotlib (tools.py).
"""

# mypy: disable-error-code="import-not-found"

import json
import sys

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot  # the backend is chosen before

#: Below, all place all.
FROM = 75.0


def main() -> None:
    curves = json.load(sys.stdin)
    traces = list(dict.fromkeys(curve["trace"] for curve in curves))
    figure, all_axes = pyplot.subplots(1, len(traces), figsize=(13, 4.6), layout="constrained", sharey=True)
    for axes, trace in zip(all_axes, traces, strict=True):
        for curve in curves:
            if curve["trace"] == trace:
                points = [point for point in curve["points"] if point[0] >= FROM]
                width = 2.4 if curve["policy"] == "ngpu" else 1.3
                axes.plot(*zip(*points, strict=True), linewidth=width, label=curve["policy"])
        axes.set_title(trace)
        axes.set_xlabel("GPUs asked for, % of all")
        axes.grid(visible=True, which="major", alpha=0.3)
    all_axes[0].set_ylabel("GPUs in use, % of all")
    figure.suptitle("openb trace, requests in random order")
    figure.legend(*all_axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=6)
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
