"""Markdown tables of several results of `factormix bench`, one a model.

python benchmarks/speed_table.py smollm2-*.json tinyllama-*.json > speed.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from factormix.evaluate.speed_table import speed_table


def main(files: list[str]) -> None:
    """Print the runs of all files, in their order, a table for each model that was timed."""
    results = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    for model in dict.fromkeys(each["settings"]["model"] for each in results):
        of = [each for each in results if each["settings"]["model"] == model]
        made_on = sorted({f"{each['settings']['machine']}, torch {each['settings']['torch']}" for each in of})
        print(f"**{model}** ({'; '.join(made_on)})\n")
        print("\n".join(speed_table([run for each in of for run in each["runs"]])), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
