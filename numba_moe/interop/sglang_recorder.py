"""SGLang's expert distribution recorder by its names: the recorder, the one of a process, options of a server.

`numba_moe.interop.sglang_srt` has these names too, and what tells the recorder.
"""

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from numba_moe import recorder
from numba_moe.recorder.hooks import Setting
from numba_moe.runtime import checks

# SGLang's names of modes, and ours.
MODES = {"none": None, "raw": "per_token", **{mode: mode for mode in ("stat", "stat_approx", "per_pass", "per_token")}}
DIRECTORY = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"


class ExpertDistributionRecorder(recorder.ExpertDistributionRecorder):
    """`numba_moe.recorder.ExpertDistributionRecorder` under SGLang's names and with its defaults.

    Modes are also called "none" and "raw", which is "per_token". `start_record` forgets what was recorded before.
    `dump_record` writes CSV unless asked otherwise, into SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR or the working
    directory; recording goes on after it, and `reset` ends it.

    Examples
    --------
    >>> found = ExpertDistributionRecorder(2, 3, mode="stat", device="cpu")
    >>> set_global_expert_distribution_recorder(found)
    >>> found.start_record()
    >>> found.set_current_layer(1)
    >>> found.record_new_token(torch.tensor([[0, 2], [2, -1]]))
    >>> found.dump_record(output_mode="object").logical_count.tolist()
    [[[0, 0, 0], [1, 0, 2]]]
    >>> set_global_expert_distribution_recorder(None)
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        mode: str | None,
        top_k: int | None = None,
        buffer_size: int | None = None,
        device: torch.device | str | None = None,
        process_group: Any = None,
        physical_to_logical_map: Any = None,
        num_gpus: int | None = None,
    ) -> None:
        if mode is not None:
            checks.choice("mode", mode, tuple(MODES))
        super().__init__(
            *(num_layers, num_experts),
            mode=None if mode is None else MODES[mode],
            top_k=top_k,
            buffer_size=buffer_size,
            device=device,
            process_group=process_group,
            physical_to_logical_map=physical_to_logical_map,
            num_gpus=num_gpus,
        )

    def set_current_layer(self, layer: int) -> None:
        """Take hooks from here on as those of a layer; inside `with_current_layer` they are that one's."""
        self._layer = checks.integer("layer", layer, 0, self.num_layers - 1, f"num_layers - 1 = {self.num_layers - 1}")

    def with_current_layer(self, layer_idx: int) -> Setting:
        """Let the hooks inside count for a layer."""
        return super().with_current_layer(layer_idx)

    def with_forward_pass(
        self, forward_pass_id: int, forward_batch: Any = None
    ) -> contextlib.AbstractContextManager[None]:
        """Take what is counted inside as one forward pass, of a number of tokens or of SGLang's batch.

        A batch has that number as `num_token_non_padded_cpu`; one that has none says nothing of padding.
        """
        is_number = forward_batch is None or isinstance(forward_batch, int)
        tokens = forward_batch if is_number else getattr(forward_batch, "num_token_non_padded_cpu", None)
        return super().with_forward_pass(forward_pass_id, tokens)

    def record_new_token(self, topk_ids: Any) -> None:
        """Record the experts of tokens: `on_select_experts`."""
        self.on_select_experts(topk_ids)

    def on_deepep_dispatch_normal(
        self,
        local_physical_count_of_layer: Sequence[int],
        num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None,
        num_tokens_per_expert: Any = None,
    ) -> None:
        """Record how many tokens came to each of this rank's slots; only "stat_approx" has a use for it.

        The others are of tokens before they are sent, which no mode counts, here as there.
        """
        self.on_dispatch_counts(local_physical_count_of_layer)

    def on_deepep_dispatch_low_latency(self, local_physical_count_of_layer: torch.Tensor) -> None:
        """Record the same from an array on the device."""
        self.on_dispatch_counts(local_physical_count_of_layer)

    def start_record(self) -> None:
        """Forget what was recorded, and record from here on, or from the next pass on if one is open."""
        super().reset()
        super().start_record()

    def reset(self) -> None:
        """Forget what was recorded, and stop recording."""
        super().reset()
        if self.recording:
            self.stop_record()

    def dump_record(
        self, output_mode: str = "file", *, format: str = "csv", directory: Any = None
    ) -> Path | recorder.Dump | None:
        """Give out what was recorded, and forget it: `numba_moe.recorder.ExpertDistributionRecorder.dump_record`."""
        where = os.environ.get(DIRECTORY, ".") if directory is None else directory
        return super().dump_record(output_mode, format=format, directory=where)


class NoRecorder:
    """A recorder that records nothing: its hooks do nothing, and its control methods say what is missing."""

    recording = False

    def with_current_layer(self, *_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        """Do nothing."""
        return contextlib.nullcontext()

    with_debug_name = with_forward_pass = disable_this_region = with_current_layer

    def on_select_experts(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    set_current_layer = record_new_token = on_select_experts
    on_deepep_dispatch_normal = on_deepep_dispatch_low_latency = on_select_experts

    def start_record(self, *_: Any, **__: Any) -> None:
        """Raise RuntimeError."""
        raise RuntimeError("`set_global_expert_distribution_recorder` must be called with a recorder first")

    stop_record = reset = dump_record = start_record


_recorder: Any = NoRecorder()


def get_global_expert_distribution_recorder() -> Any:
    """Return the recorder of this process, or one that records nothing."""
    return _recorder


def set_global_expert_distribution_recorder(value: ExpertDistributionRecorder | None) -> None:
    """Make a recorder that of this process; None for none."""
    global _recorder
    _recorder = NoRecorder() if value is None else value


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add SGLang's options of the recorder, ``--expert-distribution-recorder-mode`` and ``-buffer-size``, to a parser.

    Examples
    --------
    >>> parser = argparse.ArgumentParser()
    >>> add_cli_args(parser)
    >>> args = parser.parse_args(["--expert-distribution-recorder-mode", "stat"])
    >>> recorder_from_args(args, num_layers=2, num_experts=4, device="cpu").mode
    'stat'
    """
    parser.add_argument(
        "--expert-distribution-recorder-mode",
        choices=tuple(MODES),
        help="what is recorded of the experts of tokens; nothing by default",
    )
    parser.add_argument(
        "--expert-distribution-recorder-buffer-size",
        type=int,
        help="passes that are kept, the last ones; all by default, and with -1",
    )


def recorder_from_args(
    args: argparse.Namespace,
    num_layers: int,
    num_experts: int,
    *,
    top_k: int | None = None,
    device: torch.device | str | None = None,
    process_group: Any = None,
    physical_to_logical_map: Any = None,
) -> ExpertDistributionRecorder:
    """Return the recorder that the options of `add_cli_args` ask for."""
    size = args.expert_distribution_recorder_buffer_size
    return ExpertDistributionRecorder(
        *(num_layers, num_experts),
        mode=args.expert_distribution_recorder_mode,
        top_k=top_k,
        buffer_size=None if size == -1 else size,
        device=device,
        process_group=process_group,
        physical_to_logical_map=physical_to_logical_map,
    )
