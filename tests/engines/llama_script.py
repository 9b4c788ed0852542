"""Run a .gguf file in llama.cpp, by its own server on loopback; started by the tests with the engine's Python.

    python llama_script.py MODEL.gguf < request.json > answer.json

Request: {"prompts": [[ids]], "new_tokens": n, "text": [ids], "threads": n}; without "text" there is no perplexity.
Answer: {"version", "tokens": [[ids]], "perplexity", "prefill", "decode": [tokens/s, one a prompt]}; perplexity is that
of `text` after its first token. The server tells the log-probability, before any bias, of the token it says: so it is
made to say each token of the text by a bias.
"""

import json
import math
import sys
import urllib.request
from typing import Any

import xllamacpp

BIAS = 1e6  # above any logit


def post(address: str, **values: Any) -> dict[str, Any]:
    body = json.dumps(values).encode()
    request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def main() -> None:
    asked = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 1024, 1, asked.get("threads", 1)
    params.warmup = False
    server = xllamacpp.Server(params)
    address = server.listening_address
    common = {"temperature": 0.0, "cache_prompt": True, "samplers": ["top_k"], "top_k": 1}
    tokens, prefill, decode = [], [], []
    for prompt in asked["prompts"]:
        said = post(
            address, prompt=prompt, n_predict=asked["new_tokens"], return_tokens=True, ignore_eos=True, **common
        )
        tokens.append(said["tokens"])
        prefill.append(said["timings"]["prompt_per_second"])
        decode.append(said["timings"]["predicted_per_second"])
    nll, text = 0.0, asked.get("text", [])
    for end in range(1, len(text)):
        said = post(address, prompt=text[:end], n_predict=1, n_probs=1, logit_bias=[[text[end], BIAS]], **common)
        told = said["completion_probabilities"][0]
        assert told["id"] == text[end], told
        nll -= told["logprob"]
    perplexity = math.exp(nll / (len(text) - 1)) if len(text) > 1 else None
    answer = {"version": xllamacpp.__version__, "tokens": tokens, "perplexity": perplexity}
    json.dump({**answer, "prefill": prefill, "decode": decode}, sys.stdout)


if __name__ == "__main__":
    main()
