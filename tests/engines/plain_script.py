"""Run exported directories in plain transformers, in an environment without FactorMix; started by the tests.

    python plain_script.py LOGITS.safetensors MODEL ... < request.json > answer.json

Request: {"models": [{"prompts": [[ids]], "text": [ids]}, one a MODEL], "new_tokens": n}. Answer: {"version",
"tokens": [[[ids]]]}, greedy; the logits of `text`, (L, V) float32, are written as tensors "0", "1", ....
"""

import importlib.util
import json
import sys
from typing import Any

import torch
import transformers
from safetensors.torch import save_file


def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The most likely tokens one by one, through the cache; it goes on after an end-of-text token."""
    said: list[int] = []
    step, cache = prompt, None
    for _ in range(new_tokens):
        out = model(input_ids=torch.tensor([step]), past_key_values=cache, use_cache=True)
        step, cache = [int(out.logits[0, -1].argmax())], out.past_key_values
        said += step
    return said


@torch.inference_mode()
def main() -> None:
    if importlib.util.find_spec("factormix"):
        raise SystemExit("this environment has FactorMix; the point is to do without")
    asked = json.load(sys.stdin)
    logits, tokens = {}, []
    for number, (folder, wanted) in enumerate(zip(sys.argv[2:], asked["models"])):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        logits[str(number)] = model(input_ids=torch.tensor([wanted["text"]])).logits[0].contiguous()
        tokens.append([greedy(model, prompt, asked["new_tokens"]) for prompt in wanted["prompts"]])
    save_file(logits, sys.argv[1])
    json.dump({"version": transformers.__version__, "tokens": tokens}, sys.stdout)


if __name__ == "__main__":
    main()
