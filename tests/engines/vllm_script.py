"""Serve an exported directory in vLLM, by its OpenAI-compatible server on loopback; started by the tests with the
engine's Python.

    python vllm_script.py MODEL < request.json > answer.json

Request: {"prompts": [[ids]], "new_tokens": n}. Answer: {"version", "tokens": [[ids]], "tokens_per_s": [one a prompt]}.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
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
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", sys.argv[1], "--served-model-name", "m",
         "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024"],
        stdout=sys.stderr,
    )  # fmt: skip
    try:
        wait(server, address)
        tokens, speeds = [], []
        for prompt in asked["prompts"]:
            start = time.perf_counter()
            said = post(address, model="m", prompt=prompt, max_tokens=asked["new_tokens"], temperature=0.0,
                        ignore_eos=True, return_token_ids=True)  # fmt: skip
            speeds.append(asked["new_tokens"] / (time.perf_counter() - start))
            tokens.append(said["choices"][0]["token_ids"])
    finally:
        server.terminate()
        server.wait()
    json.dump({"version": vllm.__version__, "tokens": tokens, "tokens_per_s": speeds}, sys.stdout)


if __name__ == "__main__":
    main()
