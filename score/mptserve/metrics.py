"""Metrics of a running server in Prometheus' format: requests are counted, the engine's state is read on a scrape."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mptserve.engine import EngineStats, Sequence

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "mpt_requests",
            "Requests answered, by HTTP status and error code.",
            ["status", "code"],
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "mpt_request_seconds", "From body read to answer whole.", buckets=_SECONDS, registry=self.registry
        )
        self._first_token = Histogram(
            "mpt_first_token_seconds",
            "From submission to a sequence's first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._per_token = Histogram(
            "mpt_token_seconds",
            "Mean time between a sequence's tokens.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
            registry=self.registry,
        )

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Report the engine's own counters too, read at every scrape."""
        self.registry.register(_EngineCollector(stats))

    def request(self, status: int, code: str, seconds: float) -> None:
        self._requests.labels(str(status), code).inc()
        self._request_seconds.observe(seconds)

    def sequence(self, seq: Sequence) -> None:
        """Note a finished sequence."""
        t = seq.timings
        if t.first_token:
            self._first_token.observe(t.first_token - t.submitted)
        if len(seq.out) > 1:
            self._per_token.observe((t.finished - t.first_token) / (len(seq.out) - 1))

    def exposition(self) -> bytes:
        """Return the text that a Prometheus server scrapes."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        s = self._stats()
        for name, what, total in (
            ("mpt_prompt_tokens", "Prompt tokens computed.", s.prompt_tokens),
            ("mpt_reused_tokens", "Prompt tokens taken from the prefix cache.", s.reused_tokens),
            ("mpt_generated_tokens", "Tokens generated.", s.generated_tokens),
            ("mpt_steps", "Steps of the engine.", s.steps),
            ("mpt_step_seconds", "Time spent in steps.", s.step_seconds),
            (
                "mpt_preemptions",
                "Sequences preempted: computed again later, to make room for older ones.",
                s.preemptions,
            ),
            ("mpt_drafted_tokens", "Draft tokens of speculative decoding.", s.drafted_tokens),
            ("mpt_accepted_tokens", "Draft tokens that were accepted.", s.accepted_tokens),
        ):
            yield CounterMetricFamily(name, what, value=total)
        finished = CounterMetricFamily("mpt_sequences", "Sequences finished, by reason.", labels=["reason"])
        for reason, n in s.finished.items():
            finished.add_metric([reason], n)
        yield finished
        for name, what, value in (
            ("mpt_running", "Sequences being generated.", s.running),
            ("mpt_waiting", "Sequences in the queue.", s.waiting),
            ("mpt_kv_blocks", "KV cache blocks of 32 tokens.", s.kv_blocks),
            ("mpt_kv_blocks_free", "Blocks that a new sequence could have.", s.kv_blocks_free),
            ("mpt_kv_blocks_cached", "Blocks of reusable prefixes that nobody uses now.", s.kv_blocks_cached),
        ):
            yield GaugeMetricFamily(name, what, value=value)
