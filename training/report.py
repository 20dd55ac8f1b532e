"""Figures 3 (middle, right), 5 and 6 of the paper from the logs of runs, and one page of Markdown that shows them.

    python training/report.py RUN [RUN ...] [--names LABEL ...] --output_dir DIR

RUN is the folder of a run of train_joint.py, finished or not. The same logs give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from figures.logged_runs import read_logged_runs
from figures.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--names", nargs="+", metavar="LABEL", help="names of the runs, in their order")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the figures and report.md")
    parser.add_argument(
        "--last_evaluations",
        type=int,
        default=1,
        metavar="K",
        help="average the loss over time over the last K evaluations (default 1). They use the same held-out "
        "sequences and noise: what averages out is how the weights move",
    )
    options = parser.parse_args()
    runs = read_logged_runs(options.runs, options.names)
    print(write_report(runs, options.output_dir, options.last_evaluations))
    print(options.output_dir / "report.md")


if __name__ == "__main__":
    main()
