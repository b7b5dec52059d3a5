"""What `vllm-selfspec bench` runs inside its engine processes, apart from generating."""

from __future__ import annotations

from typing import Any

WORKER_EXTENSION = "vllm_selfspec.bench.engine_side.MendableWorker"


class MendableWorker:
    """Given to vLLM as `worker_extension_cls`: lets a worker without selfspec have its mends."""

    def selfspec_mend(self) -> None:
        """Apply this package's mends of upstream faults in the worker's process."""
        from vllm_selfspec.plugin import MENDS

        for mend in MENDS:
            mend.apply()


def mend(llm: Any) -> None:
    """Mend vLLM's faults in an engine that speculates without selfspec.

    On CPU vLLM 0.32 reads uninitialised memory as the temperature of speculated tokens (`compat/cpu_expand.py`):
    without the mend its own methods accept next to nothing at temperature > 0, and a comparison would be worth nothing.
    """
    llm.collective_rpc("selfspec_mend")


def use_synthetic_acceptance(rate: float) -> None:
    """From here on selfspec engines accept each draft token with probability `rate`, whatever the model says."""
    from vllm_selfspec import speculative_config
    from vllm_selfspec.bench.peers import synthetic_settings

    build = speculative_config.build

    def synthetic(*args: Any, **kwargs: Any) -> Any:
        config = build(*args, **kwargs)
        for name, value in synthetic_settings(rate, config.num_speculative_tokens).items():
            setattr(config, name, value)
        return config

    speculative_config.build = synthetic
