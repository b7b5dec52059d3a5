"""Self-speculative decoding with vLLM's own `LLM` class: one argument more, and the same distribution of samples.

    eval "$(python -m vllm_selfspec.engine_env)"    # on a CPU: the libraries and the threads that vLLM wants
    python examples/offline.py [MODEL]

MODEL is a checkpoint folder or a hub id; by default the embedded SmolLM2-135M.
"""

import sys

from vllm import LLM, SamplingParams

from vllm_selfspec.models import DEFAULT_MODEL, resolve_model


def main() -> None:
    """Draw four samples of two prompts, and say how well the model drafted for itself."""
    llm = LLM(
        model=resolve_model(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_MODEL, print),
        speculative_config={"method": "selfspec"},
        max_num_seqs=8,
        disable_log_stats=False,  # for the counters below
    )
    conversations = [
        [{"role": "user", "content": "Mia buys 4 notebooks at 3 euros each. How much does she pay?"}],
        [{"role": "user", "content": "Write a haiku about the sea."}],
    ]
    for output in llm.chat(conversations, SamplingParams(n=4, temperature=1.0, max_tokens=64)):
        for completion in output.outputs:
            print(f"- {completion.text.strip()!r}")

    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    drafted = counters["vllm:spec_decode_num_draft_tokens"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    print(f"{accepted} of {drafted} drafted tokens were accepted")


if __name__ == "__main__":  # vLLM starts its engine in a process that imports this file again
    main()
