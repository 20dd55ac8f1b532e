"""Trains, evaluates and tabulates the paper's ablations: Tables 1, 2, 4, 5, 6 and 7 (configs/ablations.yaml).

    python training/ablate.py --table 1 --base openwebtext_128|demo [--rows ROW ...] [section.key=value ...]

Runs that are finished are reused, one that was stopped goes on from its last checkpoint, and one that fails takes only
those with it that need it. Overrides change the base; what a row sets wins over them. With `--print_commands` the
commands are printed for a cluster, each after those that it needs; the same call without it then writes the tables.
One call at a time works in a base's folder; a second one is refused.
"""

from __future__ import annotations

import sys

from ablations.conductor import main


if __name__ == "__main__":
    sys.exit(main(__doc__))
