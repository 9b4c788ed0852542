"""Serve an exported directory in vLLM, by its OpenAI-compatible server on loopback; started by the tests with the
engine's Python.

    python vllm_script.py MODEL < request.json > answer.json

Request: {"prompts": [[ids]], "new_tokens": n, "threads": n}. Answer: {"version", "tokens": [[ids]], "prefill",
"decode": [tokens/s, one a prompt]}. Eager, because compiling takes minutes on a small machine.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import vllm

PATIENCE = 600.0  # seconds until the server answers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(server: subprocess.Popen[bytes], address: str) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"vLLM did not start (exit code {server.poll()})")


def post(address: str, **values: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(values).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def main() -> None:
    asked, port = json.load(sys.stdin), free_port()
    address = f"http://127.0.0.1:{port}"
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: asked.get("threads", 1)]))
    context = json.loads((Path(sys.argv[1]) / "config.json").read_text())["max_position_embeddings"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", sys.argv[1], "--served-model-name", "m",
         "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(min(1024, context)),
         "--enforce-eager", "--no-enable-prefix-caching"],
        stdout=sys.stderr, env=os.environ | settings,
    )  # fmt: skip
    try:
        wait(server, address)
        tokens, prefill, decode = [], [], []
        common = {"model": "m", "temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
        for prompt in asked["prompts"]:
            times = [time.perf_counter()]
            for length in (1, asked["new_tokens"]):
                said = post(address, prompt=prompt, max_tokens=length, **common)
                times.append(time.perf_counter())
            first, whole = times[1] - times[0], times[2] - times[1]
            prefill.append(len(prompt) / first)
            decode.append((asked["new_tokens"] - 1) / (whole - first))
            tokens.append(said["choices"][0]["token_ids"])
    finally:
        server.terminate()
        server.wait()
    answer = {"version": vllm.__version__, "tokens": tokens}
    json.dump({**answer, "prefill": prefill, "decode": decode}, sys.stdout)


if __name__ == "__main__":
    main()
