"""The engine: token ids in, a stream of token ids out. Knows tensors; nothing of HTTP, JSON, Azure or text."""

from mptserve.engine.engine import Engine, EngineStats, Job, MPTEngine
from mptserve.engine.sequence import Generation, SamplingParams, Sequence, Token, TokenQueue, TokenSink

__all__ = [
    "Engine",
    "EngineStats",
    "Generation",
    "Job",
    "MPTEngine",
    "SamplingParams",
    "Sequence",
    "Token",
    "TokenQueue",
    "TokenSink",
]
