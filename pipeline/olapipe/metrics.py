"""Figures for Prometheus, by way of Ray's own exporter. Nothing is sent anywhere unless the cluster exports them."""

from __future__ import annotations

from olapipe.tally import ShardResult, Tally


class WorkerMetrics:
    """Counters of one worker; rates over them are images per second, device wait and so on."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter

        self._images = Counter("olapipe_images", "Images with a verdict.", tag_keys=("teacher", "status"))
        self._seconds = Counter(
            "olapipe_stage_seconds",
            "Seconds by stage; `wait` is the device waiting for pixels, `forward` is its work.",
            tag_keys=("stage",),
        )

    def shard(self, result: ShardResult) -> None:
        """Count a finished shard."""
        for status, counts in (("ok", result.ok), ("failed", result.failed)):
            for name, count in counts.items():
                if count:
                    self._images.inc(count, {"teacher": name, "status": status})
        for stage, spent in result.seconds.items():
            if spent > 0 and stage != "wall":
                self._seconds.inc(spent, {"stage": stage})


class JobMetrics:
    """Gauges of the driver."""

    def __init__(self) -> None:
        from ray.util.metrics import Gauge

        self._shards = Gauge("olapipe_shards", "Shards of the running job by state.", tag_keys=("state",))
        self._workers = Gauge("olapipe_workers", "Workers that have loaded their teachers.")

    def show(self, tally: Tally, waiting: int) -> None:
        """Set the gauges; `waiting` shards are known and not given to a worker yet."""
        states = {"in_flight": tally.in_flight, "waiting": waiting, "done": tally.shards, "lost": len(tally.lost)}
        for state, count in states.items():
            self._shards.set(count, {"state": state})
        self._workers.set(tally.workers)
