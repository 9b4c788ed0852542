"""One Markdown table of several results of `factormix bench`.

python benchmarks/speed_table.py smollm2-*.json > speed.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from factormix.evaluate.speed_table import speed_table


def main(files: list[str]) -> None:
    """Print the runs of all files, in their order, as one table; which machine they ran on above it."""
    results = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    made_on = {(each["settings"]["machine"], each["settings"]["torch"]) for each in results}
    print("; ".join(f"{machine}, torch {torch}" for machine, torch in sorted(made_on)))
    print()
    print("\n".join(speed_table([run for each in results for run in each["runs"]])))


if __name__ == "__main__":
    main(sys.argv[1:])
