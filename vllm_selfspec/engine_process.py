"""One vLLM engine in a process of its own, driven over a pipe.

Why a process each: two engines can be compared in alternation without sharing an interpreter, a CPU engine gets the
preloaded libraries that it wants, and Ctrl-C reaches this side only, which then ends the engines in an orderly way.

The parent writes JSON lines to the child's standard input, and reads JSON lines from a pipe of its own; whatever vLLM
prints goes to a log file. The child answers `generate` with one `sample` per finished sample and a closing `done`, and
ends by itself when the parent is gone. It answers `call` with the result of a function of this package that is given
the engine; `prepare` is a function that runs before the engine is built.
"""

import contextlib
import importlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vllm_selfspec.engine_env import engine_environment, is_cpu_platform
from vllm_selfspec.errors import EngineError, UsageError
from vllm_selfspec.prompts import encode_prompt

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 15.0


class EngineProcess:
    """The parent's side: start an engine, have it generate, end it. A context manager."""

    def __init__(
        self,
        name: str,
        engine_args: dict[str, Any],
        log_path: Path,
        *,
        prepare: tuple[str, dict[str, Any]] | None = None,
        one_process: bool = False,
    ) -> None:
        """Start the process; `wait_ready` tells when the engine is up.

        Args:
            name: what the user knows this engine by, for messages.
            engine_args: keyword arguments of `vllm.LLM`.
            log_path: file that gets everything the engine prints.
            prepare: `module:function` and its keyword arguments, called before the engine is built.
            one_process: have vLLM's scheduler and model run in that process too, not in processes below it, so that
                `call` reaches them.
        """
        self.name = name
        self.log_path = log_path
        read_fd, write_fd = os.pipe()
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                # -P: a file in the current folder that has the name of some library must not be imported for it.
                [sys.executable, "-P", "-m", "vllm_selfspec.engine_process", str(write_fd)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(engine_args, one_process),
                pass_fds=[write_fd],
                start_new_session=True,  # a Ctrl-C in the terminal must reach the parent alone
            )
        os.close(write_fd)
        self._fd = read_fd
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(read_fd, selectors.EVENT_READ)
        self._send({"engine_args": engine_args, "prepare": prepare})

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def wait_ready(self) -> float:
        """Return the engine's start-up time in seconds.

        Raises:
            UsageError: when the engine refuses its arguments.
            EngineError: when it fails to start for another reason.
        """
        return float(self._receive("ready")["seconds"])

    def generate(self, requests: list[dict[str, Any]], sampling: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Run all requests at once.

        Args:
            requests: each with `id` (str) and one of `prompt` (str), `messages` (list of role/content dicts) and
                `prompt_token_ids` (list of int).
            sampling: keyword arguments of `vllm.SamplingParams` that hold for all.

        Yields:
            `{"event": "sample", "id", "token_ids", "text", "finish_reason", "seconds"}` as each finishes, then one
            `{"event": "done", "seconds", "counters", "timeline"}`.

        Raises:
            UsageError: when a request does not fit the engine.
            EngineError: when the engine dies.
        """
        self._send({"requests": requests, "sampling": sampling})
        while True:
            event = self._receive("sample", "done")
            yield event
            if event["event"] == "done":
                return

    def call(self, function: str, **arguments: Any) -> Any:
        """Run a function of this package beside the engine.

        Args:
            function: `module:name`; it is called with the child's `vllm.LLM` and the arguments.
            arguments: what JSON can carry, as is the result.

        Raises:
            UsageError: when the function raises a ValueError.
            EngineError: when it raises anything else, or the engine dies.
        """
        self._send({"call": function, "arguments": arguments})
        return self._receive("result")["result"]

    def stop(self) -> None:
        """End the engine and everything that it started; safe to call twice."""
        if self._fd < 0:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # end of input is the child's sign to leave
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # vLLM's own child processes are in the same process group; none may outlive this call.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._selector.close()
            os.close(self._fd)
            self._fd = -1

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self, *expected: str) -> dict[str, Any]:
        event = json.loads(self._read_line())
        if event["event"] == "error":
            if event["usage"]:
                raise UsageError(event["message"])
            raise self._death(event["message"])
        if event["event"] not in expected:
            raise EngineError(f"the {self.name} engine sent {event['event']!r} where {expected} was due")
        return event

    def _read_line(self) -> bytes:
        while b"\n" not in self._buffer:
            if self._selector.select(_POLL_SECONDS):
                chunk = os.read(self._fd, 1 << 16)
                if not chunk:
                    raise self._death()
                self._buffer += chunk
            elif self._process.poll() is not None:
                raise self._death()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _death(self, message: str | None = None) -> EngineError:
        reason = _root_cause(self.log_path) or message or "it ended without a word"
        return EngineError(f"the {self.name} engine failed: {reason} (log: {self.log_path})")


def _environment(engine_args: dict[str, Any], one_process: bool) -> dict[str, str]:
    env = dict(os.environ) | engine_environment()
    env.pop("VLLM_SELFSPEC", None)  # the arguments alone say which engine this is; a plain one stays plain
    if is_cpu_platform():
        # Idle OpenMP threads of one engine would otherwise spin on the cores that another one needs.
        env.setdefault("KMP_BLOCKTIME", "1")
    if one_process:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if Path(engine_args["model"]).is_dir():
        env.setdefault("HF_HUB_OFFLINE", "1")
    return env


def _root_cause(log_path: Path) -> str | None:
    """Return the first exception message in the log: vLLM's later ones only say that a process below has failed."""
    for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines():
        _, found, message = line.rpartition("Error: ")
        if found and "Traceback" not in line and message.strip():
            return message.strip()
    return None


# --- the child's side -------------------------------------------------------------------------------------------------


def _main() -> None:
    events = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    commands: queue.Queue[dict[str, Any] | None] = queue.Queue()
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_read_commands, args=(commands,), daemon=True).start()
    try:
        if order["prepare"] is not None:
            function, arguments = order["prepare"]
            _function(function)(**arguments)
        _serve(order["engine_args"], commands, events)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        pass  # the parent is gone
    except Exception as error:
        usage = isinstance(error, ValueError)
        _emit(events, event="error", usage=usage, message=_one_sentence(error))
        raise


def _read_commands(commands: "queue.Queue[dict[str, Any] | None]") -> None:
    """Queue the parent's commands; when it closes the pipe, also stop a generation that is under way."""
    for line in sys.stdin:
        commands.put(json.loads(line))
    commands.put(None)
    os.kill(os.getpid(), signal.SIGINT)


def _emit(events: IO[str], **event: Any) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


def _serve(engine_args: dict[str, Any], commands: "queue.Queue[dict[str, Any] | None]", events: IO[str]) -> None:
    started = time.monotonic()
    from vllm import LLM

    llm = LLM(**engine_args)
    _warm_up(llm)
    _emit(events, event="ready", seconds=time.monotonic() - started)
    while (command := commands.get()) is not None:
        if "call" in command:
            _emit(events, event="result", result=_function(command["call"])(llm, **command["arguments"]))
        else:
            _generate(llm, command["requests"], command["sampling"], events)


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _warm_up(llm: Any) -> None:
    """Have the first, slower steps (lazy compilation, first touch of buffers) behind the engine before it is timed."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [token] * 8} for token in range(1, 5)]
    llm.generate(prompts, SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True), use_tqdm=False)


def _generate(llm: Any, requests: list[dict[str, Any]], sampling: dict[str, Any], events: IO[str]) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
    prompts = [prompt_token_ids(llm, request) for request in requests]
    # Every round starts without what an earlier one left in the prefix cache.
    llm.reset_prefix_cache()
    started = time.monotonic()
    timeline = _Timeline(llm)
    for request, prompt in zip(requests, prompts, strict=True):
        engine.add_request(request["id"], {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            completion = output.outputs[0]
            _emit(
                events,
                event="sample",
                id=output.request_id,
                token_ids=list(completion.token_ids),
                text=completion.text,
                finish_reason=completion.finish_reason,
                seconds=time.monotonic() - started,
            )
        timeline.look(time.monotonic() - started)
    seconds = time.monotonic() - started
    counts = _counters(llm.get_metrics()).minus(timeline.before)
    moments = [moment.model_dump(mode="json") for moment in timeline.moments]
    _emit(events, event="done", seconds=seconds, counters=counts.model_dump(mode="json"), timeline=moments)


class _Timeline:
    """Looks at an engine's metrics now and then; a long round is looked at less often, so that it stays short."""

    _MAX_MOMENTS = 200

    def __init__(self, llm: Any) -> None:
        from vllm_selfspec.results import Moment

        self._llm = llm
        self._interval = 0.5
        self._next = 0.0
        self.before = _counters(llm.get_metrics())
        self.moments: list[Moment] = []

    def look(self, seconds: float) -> None:
        """Add a moment, if it is time."""
        from vllm_selfspec.results import Moment

        if seconds < self._next:
            return
        metrics = self._llm.get_metrics()
        running = sum(int(metric.value) for metric in metrics if metric.name == "vllm:num_requests_running")
        lengths = _counters(metrics).minus(self.before).draft_lengths
        steps, total = sum(lengths.values()), sum(length * count for length, count in lengths.items())
        moment = Moment(seconds=round(seconds, 3), running=running, steps=steps, draft_length_sum=total)
        self.moments.append(moment)
        if len(self.moments) > self._MAX_MOMENTS:
            self.moments = self.moments[::2]
            self._interval *= 2
        self._next = seconds + self._interval


def prompt_token_ids(llm: Any, request: dict[str, Any]) -> list[int]:
    """The tokens of a request's prompt.

    Raises:
        ValueError: when the model has no chat template for `messages`, or the prompt is too long for the engine.
    """
    token_ids = request.get("prompt_token_ids")
    if token_ids is None:
        token_ids = encode_prompt(llm.get_tokenizer(), request)
    limit = llm.model_config.max_model_len
    if len(token_ids) >= limit:
        raise ValueError(
            f"prompt {request['id'].partition('-')[0]} has {len(token_ids)} tokens, but the engine takes fewer than "
            f"{limit}; shorten it"
        )
    return list(token_ids)


def _counters(metrics: list[Any]) -> Any:
    """Return the speculative decoding counters among vLLM's metrics, which only ever grow."""
    from vllm_selfspec.metrics import draft_length_counts
    from vllm_selfspec.results import SpecCounts

    values = {metric.name: getattr(metric, "value", None) for metric in metrics}
    vectors = {metric.name: getattr(metric, "values", None) for metric in metrics}
    lengths: Counter[int] = Counter()
    decisions: Counter[str] = Counter()
    for (length, reason), steps in draft_length_counts(metrics).items():
        lengths[length] += steps
        decisions[reason] += steps
    return SpecCounts(
        num_drafts=values.get("vllm:spec_decode_num_drafts") or 0,
        num_draft_tokens=values.get("vllm:spec_decode_num_draft_tokens") or 0,
        num_accepted_tokens=values.get("vllm:spec_decode_num_accepted_tokens") or 0,
        accepted_per_position=vectors.get("vllm:spec_decode_num_accepted_tokens_per_pos") or [],
        draft_lengths=dict(lengths),
        decisions=dict(decisions),
    )


def _one_sentence(error: Exception) -> str:
    """Return the part of an error message that tells a person what to mend."""
    if hasattr(error, "errors"):  # pydantic's ValidationError lists its problems
        return "; ".join(str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors())
    return " ".join(str(error).split())


if __name__ == "__main__":
    _main()
