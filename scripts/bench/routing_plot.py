"""The share of tasks that took longer over response time as a PNG: curves as JSON on stdin, the file's name given.

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
    figure, panels = pyplot.subplots(1, len(curves), figsize=(11, 4.8), layout="constrained", sharey=True)
    for axes, (load, routers) in zip(panels, curves.items(), strict=True):
        for name, times in routers.items():
            longer = [1 - index / len(times) for index in range(len(times))]
            style = {"linewidth": 2.4 if name.startswith("ngpu") else 1.3}
            axes.plot(times, longer, label=name, linestyle=":" if name == "oracle" else "-", **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(0.1, 100)
        axes.set_ylim(0.004, 1)
        axes.set_title(f"load {load}")
        axes.set_xlabel("response time, in mean service times")
        axes.grid(visible=True, which="major", alpha=0.3)
    panels[0].set_ylabel("share of tasks that took longer")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
