"""What a recorder counts, for Prometheus and for TensorBoard: totals that dumps and resets do not change."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from numba_moe.recorder.control import ExpertDistributionRecorder
from numba_moe.recorder.hooks import MODES
from numba_moe.recorder.metrics import logical_counts
from numba_moe.recorder.passes import Record, to_device
from numba_moe.reference import recorder as reference
from numba_moe.runtime import checks

PREFIX = "numba_moe"


class Seen(NamedTuple):
    """What was counted until now."""

    passes: int
    counts: np.ndarray  # int64 [L, E]
    last: np.ndarray  # int64 [L, P], of the last pass


class Totals:
    """Adds the counts of finished passes on the device, without waiting for it."""

    def __init__(self, recorder: ExpertDistributionRecorder) -> None:
        checks.instance("recorder", recorder, ExpertDistributionRecorder)
        counts = recorder.mode in MODES[:3]
        checks.holds("recorder", "of a mode that counts", counts, f"one of {recorder.mode!r}")
        self.recorder, self._lock, self._passes = recorder, threading.Lock(), 0
        with torch.inference_mode(False):
            sizes = recorder.num_layers, recorder.num_experts
            self._total = torch.zeros(sizes, dtype=torch.int64, device=recorder.device)
            self._last = torch.zeros((sizes[0], recorder.num_slots), dtype=torch.int64, device=recorder.device)
        self._map: tuple[np.ndarray, torch.Tensor] | None = None
        self._changed: Any = None
        recorder.after_pass.append(self.add)

    def add(self, records: Sequence[Record]) -> None:
        with self._lock:
            for record in records:
                if record.counts is None:
                    continue
                if self._map is None or self._map[0] is not record.places:
                    self._map = record.places, to_device(record.places, self._total.device)
                self._total += logical_counts(record.counts, self._map[1], self.recorder.num_experts)
                self._last = record.counts
            self._passes += 1
            if self._total.is_cuda:
                self._changed = torch.cuda.current_stream(self._total.device).record_event()

    @property
    def passes(self) -> int:
        """Number of recorded passes."""
        return self._passes

    def read(self) -> Seen:
        """Return the totals; this waits for the device."""
        with self._lock:
            if self._changed is not None:
                torch.cuda.current_stream(self._total.device).wait_event(self._changed)
            return Seen(self._passes, self._total.cpu().numpy().copy(), self._last.cpu().numpy().copy())

    def close(self) -> None:
        if self.add in self.recorder.after_pass:
            self.recorder.after_pass.remove(self.add)


def what_counts_say(counts: np.ndarray, last: np.ndarray, num_gpus: int) -> dict[str, np.ndarray]:
    """Return what both exports have of each layer, by name: of counts, and of the last pass."""
    return {
        "balancedness": reference.utilization(last, num_gpus),
        "entropy": reference.expert_entropy(counts),
        "busiest_load": counts.max(axis=1) / np.maximum(counts.mean(axis=1), 1e-300),
    }


class PrometheusExport:
    """Metrics of a recorder for Prometheus, read when they are scraped.

    Parameters
    ----------
    recorder : ExpertDistributionRecorder
        Of a mode that counts. Passes count from here on while it records; dumps and resets change nothing.
    registry : prometheus_client.CollectorRegistry, optional
        By default that of the process.
    max_series : int
        The most series of a metric, at least the number of layers.
    layers, experts : sequence of int, optional
        Whose counts are series of their own, one for each expert of each layer. By default those of all, if they are
        at most `max_series`, and of none otherwise.

    Raises
    ------
    ImportError
        prometheus-client is not there.
    TypeError
        A number that is no integer.
    ValueError
        A mode without counts, more series than there may be, a number out of bounds, a name that is taken.

    Notes
    -----
    With a label ``layer`` there are ``numba_moe_slots_total``, ``numba_moe_balancedness`` (of the last pass),
    ``numba_moe_entropy`` (of all), ``numba_moe_busiest_expert`` (its id) and ``numba_moe_busiest_expert_load`` (over
    the mean). ``numba_moe_expert_slots_total`` has ``layer`` and ``expert``, and ``numba_moe_passes_total`` has none.
    Each rank exports what its own tokens chose. A pass takes a launch or two, and a scrape waits for the device.

    Examples
    --------
    >>> export = PrometheusExport(recorder)       # doctest: +SKIP
    >>> prometheus_client.start_http_server(9100)  # doctest: +SKIP
    """

    def __init__(
        self,
        recorder: ExpertDistributionRecorder,
        registry: Any = None,
        *,
        max_series: int = 2048,
        layers: Sequence[int] | None = None,
        experts: Sequence[int] | None = None,
    ) -> None:
        from prometheus_client import REGISTRY

        checks.instance("recorder", recorder, ExpertDistributionRecorder)
        num_layers, num_experts = recorder.num_layers, recorder.num_experts
        checks.integer("max_series", max_series, num_layers)
        self._layers = checks.subset("layers", layers, num_layers)
        self._experts = checks.subset("experts", experts, num_experts)
        series = len(self._layers) * len(self._experts)
        if series > max_series:
            fits = layers is None and experts is None
            checks.holds("max_series", f"at least {series}, one for each of `layers` and `experts`", fits, max_series)
            self._experts = []
        self._registry = REGISTRY if registry is None else registry
        self._totals = Totals(recorder)
        try:
            self._registry.register(self)
        except BaseException:
            self._totals.close()
            raise

    def describe(self) -> Iterator[Any]:
        """Yield the metrics without values, by which a registry knows their names without asking the device."""
        recorder = self._totals.recorder
        sizes = (recorder.num_layers, recorder.num_experts), (recorder.num_layers, recorder.num_slots)
        return self._families(Seen(0, *(np.zeros(size, np.int64) for size in sizes)))

    def collect(self) -> Iterator[Any]:
        """Yield the metrics as they are now."""
        return self._families(self._totals.read())

    def _families(self, seen: Seen) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counts = seen.counts
        yield CounterMetricFamily(f"{PREFIX}_passes", "Recorded forward passes.", value=seen.passes)
        balance, entropy, load = what_counts_say(counts, seen.last, self._totals.recorder.num_gpus).values()
        of_layers = [
            (CounterMetricFamily, "slots", "Slots of routing.", counts.sum(axis=1)),
            (GaugeMetricFamily, "balancedness", "Mean over busiest load of ranks, of the last pass.", balance),
            (GaugeMetricFamily, "entropy", "Entropy of choices over that of even ones.", entropy),
            (GaugeMetricFamily, "busiest_expert", "Id of the busiest expert.", counts.argmax(axis=1)),
            (GaugeMetricFamily, "busiest_expert_load", "Slots of the busiest expert over the mean.", load),
        ]
        for kind, name, text, values in of_layers:
            family = kind(f"{PREFIX}_{name}", text, labels=["layer"])
            for layer, value in enumerate(values.tolist()):
                family.add_metric([str(layer)], value)
            yield family
        if self._experts:
            family = CounterMetricFamily(f"{PREFIX}_expert_slots", "Slots of an expert.", labels=["layer", "expert"])
            for layer in self._layers:
                for expert in self._experts:
                    family.add_metric([str(layer), str(expert)], int(counts[layer, expert]))
            yield family

    def close(self) -> None:
        """Leave the registry and the recorder."""
        with contextlib.suppress(KeyError):  # it was closed before
            self._registry.unregister(self)
        self._totals.close()


class TensorBoardExport:
    """Metrics of a recorder for TensorBoard, written every few passes.

    Parameters
    ----------
    recorder : ExpertDistributionRecorder
        Of a mode that counts.
    writer : torch.utils.tensorboard.SummaryWriter
        Or anything with its `add_scalar` and `add_histogram`.
    every : int
        Recorded passes from one step to the next.
    max_layers : int
        The most layers with tags of their own, the first ones; means are of all.
    prefix : str
        What tags begin with.

    Raises
    ------
    TypeError
        A number that is no integer, a writer without these methods.
    ValueError
        A mode without counts, a number below 1.

    Notes
    -----
    The step is the number of recorded passes. Values are of the passes since the step before: entropy, and the load of
    the busiest expert over the mean; balancedness is of the last one. A step waits for the device.

    Examples
    --------
    >>> import torch, numba_moe
    >>> from numba_moe.recorder import attach
    >>> class Printer:
    ...     def add_scalar(self, tag, value, step):
    ...         print(tag, round(value, 2), step)
    ...     def add_histogram(self, tag, values, step):
    ...         print(tag, values.shape, step)
    >>> block = numba_moe.MoEBlock(16, 8, num_experts=4, top_k=4)
    >>> recorder = attach(block)
    >>> export = TensorBoardExport(recorder, Printer(), every=2, max_layers=0)
    >>> with recorder.recording():
    ...     for _ in range(2):
    ...         _ = block(torch.randn(5, 16))
    experts/balancedness 1.0 2
    experts/entropy 1.0 2
    experts/busiest_load 1.0 2
    >>> export.close()
    """

    def __init__(
        self,
        recorder: ExpertDistributionRecorder,
        writer: Any,
        *,
        every: int = 100,
        max_layers: int = 64,
        prefix: str = "experts",
    ) -> None:
        self._every = checks.integer("every", every, 1)
        self._max_layers = checks.integer("max_layers", max_layers, 0)
        for name in ("add_scalar", "add_histogram"):
            if not callable(getattr(writer, name, None)):
                raise TypeError(f"`writer` must be an object with {name}, got {type(writer).__name__}")
        self._writer, self._prefix = writer, prefix
        self._totals = Totals(recorder)
        self._before = self._totals.read()
        recorder.after_pass.append(self._after_pass)

    def _after_pass(self, _records: Sequence[Record]) -> None:
        if self._totals.passes % self._every == 0:
            self.write()

    def write(self) -> None:
        """Write a step now, of the passes since the one before, if there are any."""
        seen, recorder = self._totals.read(), self._totals.recorder
        if seen.passes == self._before.passes:
            return
        counts = seen.counts - self._before.counts
        self._before = seen
        values = what_counts_say(counts, seen.last, recorder.num_gpus)
        for name, of_layers in values.items():
            self._writer.add_scalar(f"{self._prefix}/{name}", float(of_layers.mean()), seen.passes)
        for layer in range(min(self._max_layers, len(counts))):
            for name, of_layers in values.items():
                self._writer.add_scalar(f"{self._prefix}/layer_{layer}/{name}", float(of_layers[layer]), seen.passes)
            self._writer.add_histogram(f"{self._prefix}/layer_{layer}/slots", counts[layer], seen.passes)

    def close(self) -> None:
        """Leave the recorder; the writer stays open."""
        recorder = self._totals.recorder
        if self._after_pass in recorder.after_pass:
            recorder.after_pass.remove(self._after_pass)
        self._totals.close()
