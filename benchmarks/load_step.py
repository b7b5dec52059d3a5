"""A server whose load steps from one request to many and back: does drafting go off and on again, and how fast?

    eval "$(python -m vllm_selfspec.engine_env)"
    python benchmarks/load_step.py MODEL --out load_step.json

Starts vLLM's OpenAI-compatible server with `method: selfspec` (adaptive), keeps one streaming chat going, adds
`--clients` - 1 more for a while, takes them away again, and reads the server's own counters all the time. For each
change of the load it reports the seconds until the decisions were the new ones, counted from the moment when the engine
ran the new number of requests, and how many requests failed.
"""

import argparse
import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import httpx
import openai
from result_file import new_out, save

from vllm_selfspec.prompts import embedded_prompts
from vllm_selfspec.provenance import provenance


@dataclass
class Reading:
    """The server's counters at one moment: seconds since the start, running requests, steps by draft length."""

    seconds: float
    running: int
    drafting: int
    plain: int


def read(text: str, seconds: float) -> Reading:
    """Parse the Prometheus text of the server."""
    steps = {0: 0, 1: 0}
    for length, value in re.findall(r'vllm:selfspec_steps_total\{.*?num_draft_tokens="(\d+)".*?\} (\S+)', text):
        steps[min(1, int(length))] += int(float(value))
    running = sum(int(float(v)) for v in re.findall(r"^vllm:num_requests_running\{.*?\} (\S+)", text, re.MULTILINE))
    return Reading(seconds, running, steps[1], steps[0])


class Load:
    """Clients that ask one chat after another."""

    def __init__(self, address: str, tokens: int) -> None:
        self.client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        self.prompts = [prompt["messages"] for prompt in embedded_prompts()]
        self.tokens = tokens
        self.answered = self.failed = 0

    async def one(self, number: int, stop: asyncio.Event) -> None:
        """Ask until `stop`; the request that is under way then is cancelled, as a user who leaves would."""
        while not stop.is_set():
            try:
                stream = await self.client.chat.completions.create(
                    model="demo",
                    messages=self.prompts[number % len(self.prompts)],
                    max_tokens=self.tokens,
                    temperature=1.0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                async for _ in stream:
                    if stop.is_set():
                        await stream.close()
                        return
                self.answered += 1
            except openai.OpenAIError as error:
                self.failed += 1
                print(f"request failed: {error}", file=sys.stderr)


def settled(readings: list[Reading], running: range, drafting: bool) -> float | None:
    """Seconds from the first reading with that many running requests to the start of two seconds of new decisions.

    Two seconds in which more than four steps of five are decided the new way: probes are decisions, too.
    """
    since = next((r.seconds for r in readings if r.running in running), None)
    if since is None:
        return None
    for number, first in enumerate(readings):
        last = next((r for r in readings[number:] if r.seconds >= first.seconds + 2.0), None)
        if first.seconds < since or last is None:
            continue
        drafted, plain = last.drafting - first.drafting, last.plain - first.plain
        if (drafted if drafting else plain) > 0.8 * (drafted + plain):
            return first.seconds - since
    return None


async def measure(address: str, clients: int, tokens: int, phase: float) -> dict[str, object]:
    """Run the three phases of `phase` seconds each."""
    readings: list[Reading] = []
    start = time.perf_counter()
    done = asyncio.Event()

    async def watch() -> None:
        async with httpx.AsyncClient() as http:
            while not done.is_set():
                text = (await http.get(f"{address}/metrics")).text
                readings.append(read(text, time.perf_counter() - start))
                await asyncio.sleep(0.1)

    load = Load(address, tokens)
    watcher = asyncio.create_task(watch())
    stop_first, stop_rest = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(load.one(0, stop_first))
    await asyncio.sleep(phase)
    up = time.perf_counter() - start
    rest = [asyncio.create_task(load.one(number, stop_rest)) for number in range(1, clients)]
    await asyncio.sleep(phase)
    down = time.perf_counter() - start
    stop_rest.set()
    await asyncio.gather(*rest)
    await asyncio.sleep(phase)
    stop_first.set()
    await first
    done.set()
    await watcher
    parts = ([r for r in readings if r.seconds < up], [r for r in readings if up <= r.seconds < down])
    last = [r for r in readings if r.seconds >= down]
    shares = []
    for part in (*parts, last):
        drafted, plain = part[-1].drafting - part[0].drafting, part[-1].plain - part[0].plain
        shares.append(round(drafted / max(1, drafted + plain), 3))
    return {
        "share_of_steps_that_draft": dict(zip(("one", "many", "one again"), shares, strict=True)),
        "seconds_until_off": settled(parts[1], range(clients - 1, clients + 1), drafting=False),
        "seconds_until_on_again": settled(last, range(2), drafting=True),
        "answered": load.answered,
        "failed": load.failed,
        "readings": [asdict(reading) for reading in readings],
    }


def main() -> None:
    """Start the server, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--phase", type=float, default=30.0, help="seconds of each phase")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--out", default="load_step.json")
    args = parser.parse_args()
    args.out = new_out(parser, args.out)
    origin = provenance()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    command += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048"]
    command += ["--max-num-seqs", str(args.clients), "--no-enable-log-requests"]
    command += ["--speculative-config", '{"method": "selfspec"}']
    command += ["--enforce-eager"] if args.enforce_eager else []
    address = f"http://127.0.0.1:{port}"
    with open(f"{args.out}.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))
        try:
            print("waiting for the server", file=sys.stderr)
            while True:
                if server.poll() is not None:
                    sys.exit(f"the server ended: see {args.out}.log")
                try:
                    httpx.get(f"{address}/health", timeout=5)
                    break
                except httpx.HTTPError:
                    time.sleep(1)
            result = asyncio.run(measure(address, args.clients, args.tokens, args.phase))
        finally:
            server.terminate()
            server.wait(60)
    save(args.out, {**result, "arguments": vars(args), **origin})
    print(json.dumps({name: value for name, value in result.items() if name != "readings"}))


if __name__ == "__main__":
    main()
