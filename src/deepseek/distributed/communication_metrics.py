"""Metrics of the collectives in the Prometheus text format: `ds_communication_latency` and bytes by class of link.

Written by hand and not with prometheus-client, which belongs to serving: a training rank has no server, and the text
goes to a node exporter's folder, a push gateway, or whatever reads the events of a run.
"""

from __future__ import annotations

from itertools import accumulate

from deepseek.distributed.collective_ledger import LATENCY_BOUNDS_S, CollectiveLedger


def render_metrics(ledger: CollectiveLedger, rank: int) -> str:
    """Return the sums of a ledger as Prometheus reads them.

    >>> print(render_metrics(CollectiveLedger(), 0).splitlines()[0])
    # HELP ds_communication_latency Seconds from entering a collective to leaving it.
    """
    lines = [
        "# HELP ds_communication_latency Seconds from entering a collective to leaving it.",
        "# TYPE ds_communication_latency histogram",
    ]
    for operation, histogram in sorted(ledger.latencies.items()):
        labels = f'operation="{operation}",rank="{rank}"'
        bounds = [*(f"{bound:g}" for bound in LATENCY_BOUNDS_S), "+Inf"]
        for bound, count in zip(bounds, accumulate(histogram.counts), strict=True):
            lines.append(f'ds_communication_latency_bucket{{{labels},le="{bound}"}} {count}')
        lines.append(f"ds_communication_latency_sum{{{labels}}} {histogram.total_s!r}")
        lines.append(f"ds_communication_latency_count{{{labels}}} {sum(histogram.counts)}")
    lines += [
        "# HELP ds_communication_sent_bytes_total Bytes that this rank sent, by class of link.",
        "# TYPE ds_communication_sent_bytes_total counter",
    ]
    for (operation, link), num_bytes in sorted(ledger.sent_bytes.items()):
        labels = f'operation="{operation}",link="{link}",rank="{rank}"'
        lines.append(f"ds_communication_sent_bytes_total{{{labels}}} {num_bytes}")
    return "\n".join(lines) + "\n"
