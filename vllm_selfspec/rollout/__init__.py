"""Rollouts on Ray: vLLM engines as workers, one pool that streams samples and follows the weights."""

from vllm_selfspec.rollout.dispatcher import Dispatcher
from vllm_selfspec.rollout.pool import RolloutPool, SampleStream
from vllm_selfspec.rollout.sink import SampleWriter, read_samples, write_samples
from vllm_selfspec.rollout.types import (
    GenerateRequest,
    InvalidRequestError,
    OutputFullError,
    PoolFailedError,
    PoolReport,
    RolloutError,
    Sample,
    WeightUpdateError,
    WorkerDeadError,
    WorkerReport,
    WorkerStats,
)
from vllm_selfspec.rollout.weights import register_weight_transfer
from vllm_selfspec.rollout.worker import DummyWorker, RolloutWorker

__all__ = [
    "Dispatcher",
    "DummyWorker",
    "GenerateRequest",
    "InvalidRequestError",
    "OutputFullError",
    "PoolFailedError",
    "PoolReport",
    "RolloutError",
    "RolloutPool",
    "RolloutWorker",
    "Sample",
    "SampleStream",
    "SampleWriter",
    "WeightUpdateError",
    "WorkerDeadError",
    "WorkerReport",
    "WorkerStats",
    "read_samples",
    "register_weight_transfer",
    "write_samples",
]
