"""Mixtures of experts, trained and timed.

python -m benchmarks.experts train --seeds 0 1 2 --out benchmarks/results/experts_cpu.json
python -m benchmarks.experts speed --out benchmarks/results/experts_speed_h100.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import speed, training


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in (("train", training), ("speed", speed)):
        command = commands.add_parser(name, help=module.__doc__, description=module.__doc__)
        command.add_argument(
            "--out", type=Path, required=True, help="JSON file; what it holds already is not run again"
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
