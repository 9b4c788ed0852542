"""Two domains gated together against one, none, and each other, on few-shot tasks: `factormix adapt`, cell by cell.

    python benchmarks/mixture.py --domains pubmed,reviews --task asset:pubmed-sections --task asset:foods -o mixture

Every cell (a task, a set of domains, a seed) is one run of `factormix adapt` with K shots and a K-shot development set,
scored on at most --test-examples of the test file. Its JSON is kept in the output directory, so the same command goes
on where it stopped. Arguments after ``--`` go to `factormix adapt`. Prints accuracy, mean and standard deviation over
the seeds, and the gates' mean weights on the test examples.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from itertools import product
from pathlib import Path
from typing import Any

from factormix.cli.models import locate_text
from factormix.cli.sweep import run_command


def domain_sets(domains: list[str]) -> dict[str, list[str]]:
    """What is compared: no domain, each alone, all of them."""
    alone = {Path(domain).name: [domain] for domain in domains}
    return {"none": [], **alone, "both" if len(domains) == 2 else "all": domains}


def some(name: str, count: int, folder: Path) -> Path:
    """A fixed random part of a test file."""
    file = locate_text([name])[0]
    lines = file.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    part = folder / file.name
    part.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    return part


def cell(
    options: argparse.Namespace, task: str, test: Path, domains: list[str], seed: int, name: str
) -> dict[str, Any]:
    """The metrics of one run, from its file if it is there."""
    file = options.out / f"{name}.json"
    if not file.is_file():
        made = options.out / name
        command = ["adapt", options.model]
        command += ["--task", f"{task}-train", "--test", str(test), "--shots", str(options.shots), "--seed", str(seed)]
        command += ["--domains", ",".join(domains)] if domains else []
        run_command([*command, "-o", str(made), "--json", f"{file}.new", "--quiet", *options.rest])
        Path(f"{file}.new").rename(file)
        shutil.rmtree(made)
    metrics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["metrics"]
    return metrics


def gates_of(runs: list[dict[str, Any]]) -> str:
    """Mean weight of each domain over tokens, sites and seeds."""
    means = [run["test"]["gates"]["mean"] for run in runs]
    names = [name for name in means[0] if name != "ffn"]
    return ", ".join(f"{name} {statistics.mean(mean[name] for mean in means):.2f}" for name in names)


def main(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    sets = domain_sets(options.domains.split(","))
    tests = {task: some(f"{task}-test", options.test_examples, options.out) for task in options.task}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed, task, (label, domains) in product(range(options.seeds), options.task, sets.items()):
        name = f"{task.removeprefix('asset:')}.{label}.{seed}"
        metrics = cell(options, task, tests[task], domains, seed, name)
        found.setdefault((task, label), []).append(metrics)
        print(f"{name}: {metrics['test']['accuracy']:.3f}", flush=True)
    for (task, label), runs in found.items():
        accuracy = [run["test"]["accuracy"] for run in runs]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        print(f"{task:<24}{label:<12}{100 * statistics.mean(accuracy):6.1f} ± {100 * spread:.1f}  {gates_of(runs)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="asset:smollm2")
    parser.add_argument("--domains", required=True, metavar="DIR,DIR")
    parser.add_argument("--task", action="append", required=True, metavar="STEM", help="STEM-train and STEM-test")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test-examples", type=int, default=500)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("rest", nargs="*", help="more options of `factormix adapt`")
    main(parser.parse_args())
