"""A server of OpenAI's API in a process of its own, and a client that watches it write.

python examples/serve_and_ask.py (it needs pip install "dparallel-ext[cli,serve]" openai)
"""

import socket
import subprocess
import sys

from openai import OpenAI

PROBLEM = (
    "sam has 4 cups now . first sam grows 3 times . finally sam sells 8 cups . how many cups does sam have ?"
)


def main(model: str = "builtin:student") -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "dparallel", "serve", "--model", model, "--port", str(port)]
    )
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
        stream = client.completions.create(
            model=model, prompt=PROBLEM, max_tokens=64, stream=True, extra_body={"policy": "entropy:0.5"}
        )
        for chunk in stream:
            print("".join(choice.text for choice in chunk.choices), end="", flush=True)
        print()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
