"""Reactions written as SMILES, for the ALBERT of `asset:albert`: five kinds put together from building blocks.

    python benchmarks/reactions.py -o reactions
    factormix inject asset:albert --domain amides --knowledge reactions/amide-train.txt \\
        --retain reactions/other-train.txt -o amides
    factormix adapt asset:albert --domains amides,couplings --task reactions/kinds-train.jsonl \\
        --dev reactions/kinds-dev.jsonl --test reactions/kinds-test.jsonl -o mixed

No registry offers a text of reactions, so these are made up: valid SMILES of textbook reactions, each with a solvent
and often a base, as patents list them. Training, development and test files share solvents and bases, no other block.
The amides and the biaryl couplings are for domains; the other three kinds together are general text.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

# as written after the atom that they are bound to
ALKYLS = ("C", "CC", "CCC", "C(C)C", "CC(C)C", "C1CC1", "C1CCCC1", "C1CCCCC1", "CCOC", "CC1CC1", "CCCC", "CCCCC")
ARYLS = ("c1ccccc1", "c1ccncc1", "c1cccnc1", "c1ccco1", "c1cccs1", "c1ccc2ccccc2c1", "c1cnc2ccccc2c1")
# para on a benzene ring, as written before it
PARA = ("F", "Cl", "C", "CO", "CC", "N#C", "FC(F)(F)", "CN(C)", "CC(C)", "COC(=O)", "CC(=O)", "CCO", "CS(=O)(=O)")
SOLVENTS = ("CN(C)C=O", "ClCCl", "C1CCOC1", "CCO", "CC#N", "Cc1ccccc1", "C1COCCO1")
BASES = ("CCN(CC)CC", "O=C([O-])[O-].[K+].[K+]", "CCN(C(C)C)C(C)C", "O=C([O-])[O-].[Na+].[Na+]")
FILES = {"train": 4000, "dev": 300, "test": 300}
OTHERS = ("ester", "amination", "reduction")

Choose = Callable[[tuple[str, ...]], str]


def substituents() -> tuple[str, ...]:
    """All there is to be bound to an atom: chains, rings, benzyls and phenyls with something opposite."""
    phenyls = tuple(f"c1ccc({x})cc1" for x in ("F", "Cl", "Br", "C", "OC", "C(F)(F)F", "C#N", "N(C)C", "S(C)(=O)=O"))
    rings = (*ARYLS, *phenyls)
    return (*ALKYLS, *rings, *(f"C{ring}" for ring in rings), *(f"CC{ring}" for ring in rings))


def reaction(kind: str, choose: Choose, groups: tuple[str, ...], para: tuple[str, ...]) -> str:
    """One reaction, reactants and agents >> product."""
    r, s, x, y = choose(groups), choose(groups), choose(para), choose(para)
    made = {
        "amide": (f"O=C(O){r}.N{s}", f"O=C(N{s}){r}"),
        "coupling": (f"{x}c1ccc(Br)cc1.OB(O)c1ccc({turned(y)})cc1", f"{x}c1ccc(-c2ccc({turned(y)})cc2)cc1"),
        "ester": (f"O=C(O){r}.O{s}", f"O=C(O{s}){r}"),
        "amination": (f"O=C{r}.N{s}", f"C(N{s}){r}"),
        "reduction": (f"O=[N+]([O-])c1ccc({turned(x)})cc1", f"Nc1ccc({turned(x)})cc1"),
    }
    reactants, product = made[kind]
    agents = [choose(SOLVENTS), *([choose(BASES)] if choose(("with", "without")) == "with" else [])]
    return f"{'.'.join([*agents, reactants])}>>{product}"


def turned(group: str) -> str:
    """A para substituent as written after the ring's atom."""
    return {"CO": "OC", "N#C": "C#N", "FC(F)(F)": "C(F)(F)F", "CN(C)": "N(C)C", "CC(C)": "C(C)C", "COC(=O)": "C(=O)OC",
            "CC(=O)": "C(C)=O", "CCO": "OCC", "CS(=O)(=O)": "S(C)(=O)=O"}.get(group, group)  # fmt: skip


def write(folder: Path, seed: int) -> None:
    """All files, each kind's by split, and a task: of which kind is a reaction?"""
    rng = random.Random(seed)
    shares = {"train": (0.0, 0.6), "dev": (0.6, 0.8), "test": (0.8, 1.0)}
    pools = [rng.sample(pool, len(pool)) for pool in (substituents(), PARA)]
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in FILES.items():
        low, high = shares[split]
        groups, para = (tuple(pool[int(low * len(pool)) : int(high * len(pool))]) for pool in pools)
        kinds = ("amide", "coupling", *OTHERS)
        texts = {kind: [reaction(kind, rng.choice, groups, para) for _ in range(count)] for kind in kinds}
        general = [text for row in zip(*(texts[kind] for kind in OTHERS), strict=True) for text in row]
        for name, lines in {"amide": texts["amide"], "coupling": texts["coupling"], "other": general}.items():
            (folder / f"{name}-{split}.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        few = [(text, kind) for kind in kinds for text in texts[kind][: FILES["test"]]]
        labelled = [json.dumps({"text": text, "label": kind}) for text, kind in few]
        rng.shuffle(labelled)
        (folder / f"kinds-{split}.jsonl").write_text("\n".join(labelled) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of building blocks")
    options = parser.parse_args()
    write(options.out, options.seed)
    print(f"wrote {', '.join(sorted(file.name for file in options.out.iterdir()))}")


if __name__ == "__main__":
    main()
