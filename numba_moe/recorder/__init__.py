"""Which experts are chosen while a model runs, and what that says about where they should live."""

from numba_moe import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "ops.record": "add_expert_counts",
        "recorder.all_ranks": "follow",
        "recorder.control": "ExpertDistributionRecorder attach attached",
        "recorder.dump_files": "Dump load",
        "recorder.exports": "PrometheusExport TensorBoardExport",
        "recorder.http": "make_app",
        "recorder.merging": "merge",
        "recorder.metrics": "Metrics coactivation expert_entropy logical_counts traffic_matrix utilization",
    },
)
