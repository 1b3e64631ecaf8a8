from prometheus_client.parser import text_string_to_metric_families

from deepseek.distributed.collective_ledger import CollectiveLedger
from deepseek.distributed.communication_metrics import render_metrics


def test_prometheus_reads_what_is_written():
    ledger = CollectiveLedger()
    for seconds in (2e-5, 5e-3, 1e4):
        ledger.latencies["all_reduce(SUM)"].observe(seconds)
    ledger.sent_bytes["all_reduce(SUM)", "across"] = 77
    families = {family.name: family for family in text_string_to_metric_families(render_metrics(ledger, 3))}
    samples = {
        (sample.name, sample.labels.get("le")): sample.value for sample in families["ds_communication_latency"].samples
    }
    assert samples["ds_communication_latency_count", None] == 3
    assert samples["ds_communication_latency_sum", None] == 2e-5 + 5e-3 + 1e4
    buckets = [value for (name, _), value in samples.items() if name.endswith("_bucket")]
    assert buckets == sorted(buckets)  # they are cumulative
    assert samples["ds_communication_latency_bucket", "0.01"] == 2
    assert samples["ds_communication_latency_bucket", "+Inf"] == 3
    (sent,) = families["ds_communication_sent_bytes"].samples
    assert (sent.value, sent.labels) == (77, {"operation": "all_reduce(SUM)", "link": "across", "rank": "3"})
