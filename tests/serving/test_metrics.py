"""The numbers of a server, as a Prometheus server reads them."""

from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from mptserve.engine import EngineStats, SamplingParams, Sequence, Token
from mptserve.engine.sequence import Timings
from mptserve.metrics import Metrics


def read(metrics: Metrics) -> dict[str, float]:
    """Return every sample of the exposition, by its name and labels; the creation times left out."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode("utf-8")):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            if not sample.name.endswith("_created"):
                found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def without_buckets(samples: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in samples.items() if "_bucket{" not in name}


def sequence(n_out: int, timings: Timings) -> Sequence:
    seq = Sequence([1], SamplingParams(), (0,), None, None, lambda _: None, None)
    seq.out, seq.timings = [Token(1)] * n_out, timings
    return seq


def test_nothing_has_happened_yet() -> None:
    assert without_buckets(read(Metrics())) == {
        "mpt_request_seconds_count": 0,
        "mpt_request_seconds_sum": 0,
        "mpt_first_token_seconds_count": 0,
        "mpt_first_token_seconds_sum": 0,
        "mpt_token_seconds_count": 0,
        "mpt_token_seconds_sum": 0,
    }


def test_requests_are_counted_by_status_and_code() -> None:
    metrics = Metrics()
    for status, code, seconds in ((200, "", 0.5), (200, "", 1.5), (400, "wrong_type", 0.25), (429, "queue_full", 0.0)):
        metrics.request(status, code, seconds)
    found = read(metrics)
    assert {name: value for name, value in found.items() if name.startswith("mpt_requests_total")} == {
        "mpt_requests_total{code=,status=200}": 2,
        "mpt_requests_total{code=wrong_type,status=400}": 1,
        "mpt_requests_total{code=queue_full,status=429}": 1,
    }
    assert (found["mpt_request_seconds_count"], found["mpt_request_seconds_sum"]) == (4, 2.25)
    assert found["mpt_request_seconds_bucket{le=0.01}"] == 1
    assert found["mpt_request_seconds_bucket{le=0.5}"] == 3
    assert found["mpt_request_seconds_bucket{le=180.0}"] == 4


def test_sequence_gives_its_first_token_and_its_mean_gap() -> None:
    metrics = Metrics()
    metrics.sequence(sequence(5, Timings(submitted=10.0, admitted=10.25, first_token=10.5, finished=12.5)))
    metrics.sequence(sequence(2, Timings(submitted=20.0, admitted=20.0, first_token=21.0, finished=21.25)))
    found = without_buckets(read(metrics))
    assert (found["mpt_first_token_seconds_count"], found["mpt_first_token_seconds_sum"]) == (2, 1.5)
    assert (found["mpt_token_seconds_count"], found["mpt_token_seconds_sum"]) == (2, 0.75)


def test_buckets_reach_from_a_token_to_the_longest_request() -> None:
    found = [name for name in read(Metrics()) if "_bucket{" in name]
    seconds = [
        "0.01",
        "0.025",
        "0.05",
        "0.1",
        "0.25",
        "0.5",
        "1.0",
        "2.5",
        "5.0",
        "10.0",
        "25.0",
        "60.0",
        "180.0",
        "+Inf",
    ]
    gaps = ["0.001", "0.0025", "0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "+Inf"]
    edges = {"mpt_request_seconds": seconds, "mpt_first_token_seconds": seconds, "mpt_token_seconds": gaps}
    assert found == [f"{name}_bucket{{le={edge}}}" for name, of_name in edges.items() for edge in of_name]


def test_one_token_has_no_gap_and_no_token_has_no_first() -> None:
    metrics = Metrics()
    metrics.sequence(sequence(1, Timings(submitted=10.0, first_token=10.5, finished=10.5)))
    metrics.sequence(sequence(0, Timings(submitted=10.0, finished=30.0)))
    found = without_buckets(read(metrics))
    assert (found["mpt_first_token_seconds_count"], found["mpt_token_seconds_count"]) == (1, 0)


def test_engines_own_numbers_are_read_at_every_scrape() -> None:
    metrics = Metrics()
    stats = EngineStats(
        prompt_tokens=11,
        reused_tokens=12,
        generated_tokens=13,
        steps=14,
        step_seconds=1.5,
        preemptions=16,
        drafted_tokens=25,
        accepted_tokens=24,
        finished=Counter(eos=3, length=4),
        running=17,
        waiting=18,
        kv_blocks=19,
        kv_blocks_free=20,
        kv_blocks_cached=21,
    )
    metrics.watch(lambda: stats)
    expected = {
        "mpt_prompt_tokens_total": 11,
        "mpt_reused_tokens_total": 12,
        "mpt_generated_tokens_total": 13,
        "mpt_steps_total": 14,
        "mpt_step_seconds_total": 1.5,
        "mpt_preemptions_total": 16,
        "mpt_drafted_tokens_total": 25,
        "mpt_accepted_tokens_total": 24,
        "mpt_sequences_total{reason=eos}": 3,
        "mpt_sequences_total{reason=length}": 4,
        "mpt_running": 17,
        "mpt_waiting": 18,
        "mpt_kv_blocks": 19,
        "mpt_kv_blocks_free": 20,
        "mpt_kv_blocks_cached": 21,
    }
    nothing = without_buckets(read(Metrics()))
    assert without_buckets(read(metrics)) == nothing | expected
    stats.running, stats.finished = 0, Counter(eos=4)
    later = expected | {"mpt_running": 0, "mpt_sequences_total{reason=eos}": 4}
    del later["mpt_sequences_total{reason=length}"]
    assert without_buckets(read(metrics)) == nothing | later


def test_two_servers_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.request(200, "", 1.0)
    assert read(other)["mpt_request_seconds_count"] == 0


def test_every_metric_says_what_it_is() -> None:
    metrics = Metrics()
    metrics.watch(EngineStats)
    families = list(text_string_to_metric_families(metrics.exposition().decode("utf-8")))
    assert len(families) > 12
    assert [family.name for family in families if not family.documentation.endswith(".")] == []
