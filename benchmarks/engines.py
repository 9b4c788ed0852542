"""A dense model and its sparse export in the same engine: tokens per second, in turn; the export against transformers.

    python benchmarks/engines.py llama .venv-llama/bin/python --dense dense-f16.gguf --sparse moe-f16.gguf --threads 1
    python benchmarks/engines.py vllm .venv-vllm/bin/python --sparse moe --stock moe --text held.txt

The engine runs in its own environment (`make test-engines` makes them). Without --dense nothing is timed. --stock is
the exported directory, which transformers loads in float32: 64 greedy tokens on each of three prompts and, for
llama.cpp, the perplexity of 256 tokens of --text are held against it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPTS = Path(__file__).resolve().parents[1] / "tests" / "engines"
PROMPTS = ("The capital of France is", "Once upon a time there was a", "The committee met on Monday and")
PROMPT, NEW, TEXT, ROUNDS, REPEATS = 256, 64, 256, 3, 3


def ask(arguments: argparse.Namespace, model: str, **request: Any) -> dict[str, Any]:
    """What the engine's script answers of one model, in a process of its own."""
    command = [arguments.python, str(SCRIPTS / f"{arguments.engine}_script.py"), model]
    request = {**request, "threads": arguments.threads, "new_tokens": NEW}
    done = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-3000:])
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def time_both(arguments: argparse.Namespace) -> None:
    """Dense and sparse in turn, each on random prompts; the first of a process warms it up."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 40000, (1 + REPEATS, PROMPT), generator=generator).tolist()
    speeds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in ("dense", "sparse")}
    for _ in range(arguments.rounds):
        for name, found in speeds.items():
            answer = ask(arguments, getattr(arguments, name), prompts=prompts)
            for phase in found:
                found[phase] += answer[phase][1:]
    print(f"{arguments.engine} {answer['version']}, {arguments.threads} thread(s), tokens/s: dense, sparse, ratio")
    for phase, size in (("prefill", PROMPT), ("decode", NEW)):
        dense, sparse = (statistics.median(speeds[name][phase]) for name in ("dense", "sparse"))
        print(f"{phase} {size:<4} {dense:8.1f} {sparse:8.1f} {sparse / dense:6.2f}")


@torch.inference_mode()
def against_transformers(arguments: argparse.Namespace) -> None:
    """Greedy tokens, and for llama.cpp perplexity."""
    stock = AutoModelForCausalLM.from_pretrained(arguments.stock, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.stock)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    text = tokenizer(Path(arguments.text).read_text(encoding="utf-8"))["input_ids"][:TEXT] if arguments.text else []
    answer = ask(arguments, arguments.sparse, prompts=prompts, text=text)
    never = tokenizer.eos_token_id if arguments.engine == "llama" else None  # it is told to go on
    for prompt, said in zip(prompts, answer["tokens"]):
        logits = stock(input_ids=torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]  # (N, V)
        if never is not None:
            logits[:, never] = -torch.inf
        differ = (logits.argmax(-1) != torch.tensor(said)).nonzero()[:, 0].tolist()
        print(repr(tokenizer.decode([*prompt, *said])))
        if differ:
            row, token = logits[differ[0]], said[differ[0]]
            gap = float(row.max() - row[token])
            print(f"  differs first at token {differ[0]} of {len(said)}: the two are {gap:.4f} nats apart")
        else:
            print(f"  all {len(said)} tokens are transformers'")
    if answer.get("perplexity"):
        logits = stock(input_ids=torch.tensor([text])).logits[0, :-1]  # (L - 1, V)
        own = float(torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:])).exp())
        print(f"perplexity {answer['perplexity']:.3f}, transformers {own:.3f} ({answer['perplexity'] / own - 1:+.2%})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("llama", "vllm"))
    parser.add_argument("python", help="of the engine's environment")
    parser.add_argument("--dense", help="a .gguf file, or a directory for vLLM")
    parser.add_argument("--sparse", required=True, help="likewise")
    parser.add_argument("--stock", help="the exported directory, for transformers")
    parser.add_argument("--text", help="for the perplexity")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    if given.stock:
        against_transformers(given)
    if given.dense:
        time_both(given)
