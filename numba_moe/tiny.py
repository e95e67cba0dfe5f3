"""A small language model with experts, that learns from the text which ships with Python.

It shows that `MoEBlock` learns what a plain torch block of the same parameters learns, and how long a step takes; and
it leaves a trace of which experts a trained router chooses: `scripts/train_tiny_moe.py`.
"""

import math
import pydoc_data.topics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu

from numba_moe.block import MoEBlock, Routed, Router
from numba_moe.reference.gating import TopK
from numba_moe.runtime import checks
from numba_moe.training.balance import update_correction_bias
from numba_moe.training.losses import load_balancing_loss

BYTES = 256
# Of its parameters: drawn on the CPU and then moved, so that a seed means the same on every device.
KIND: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
WARM_UP = 0.05  # of the steps, in which the rate of learning rises
LAST = 50  # steps over which the loss is averaged
BALANCES = ("none", "loss", "bias")
TRIMMED_TOKENS = 1024
TRIMMED_STEPS = 4


class Settings(NamedTuple):
    """Sizes of the model and of its training."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    experts: int = 32
    top_k: int = 4
    width: int = 256
    length: int = 256
    batch: int = 32
    steps: int = 2000
    rate: float = 1e-3
    seed: int = 0
    plain: bool = False
    traced_steps: int = 8
    balance: str = "none"
    coefficient: float = 0.1  # of the load balancing loss
    bias_rate: float = 0.003  # by which biases move at a step


class Report(NamedTuple):
    """What came of a training; the trace holds `topk_ids` and `topk_weights` [steps, layers, tokens, top_k].

    The loss is that of the text alone; `busiest` [steps, layers] is the load of the busiest expert over the mean.
    """

    losses: list[float]
    step_ms: float
    trace: dict[str, np.ndarray]
    busiest: np.ndarray
    model: Any

    @property
    def loss(self) -> float:
        """The mean of the last steps."""
        return mean(self.losses[-LAST:])

    @property
    def load(self) -> float:
        """The busiest expert's load over the mean, of the last steps and the layer where it is most."""
        return float(self.busiest[-LAST:].mean(axis=0).max(initial=0.0))


def text() -> np.ndarray:
    """Return the bytes of Python's own documentation, licence and library, the same for one version of Python."""
    library = Path(sysconfig.get_path("stdlib"))
    topics = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    sources = [path.read_bytes() for path in sorted(library.glob("*.py"))]
    return np.frombuffer(b"\n".join([topics.encode(), *sources]), np.uint8)


class PlainBlock(MoEBlock):
    """The same block in torch alone: a loop over the experts."""

    def forward(self, hidden_states: torch.Tensor, return_router_logits: bool | None = None) -> Any:
        """Return the sum of what the experts of each token make of it."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = linear(rows, self.router.weight)
        scores = logits.float().softmax(-1)
        weights, ids = scores.topk(self.router.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        combined = torch.zeros_like(rows, dtype=torch.float32)
        for expert, (gate_up_proj, down_proj) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            tokens, choice = torch.where(ids == expert)
            gate, up = linear(rows[tokens], gate_up_proj).chunk(2, dim=-1)
            down = linear(silu(gate) * up, down_proj) * weights[tokens, choice, None]
            combined = combined.index_add(0, tokens, down.float())
        combined = combined.to(hidden_states.dtype).reshape(hidden_states.shape)
        return (combined, logits) if return_router_logits else combined


class Layer(torch.nn.Module):
    """Attention to earlier bytes, then experts, each added to what came in."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.heads = settings.heads
        self.before_attention, self.before_experts = (torch.nn.RMSNorm(settings.hidden, **KIND) for _ in range(2))
        self.qkv = torch.nn.Linear(settings.hidden, 3 * settings.hidden, bias=False, **KIND)
        self.out = torch.nn.Linear(settings.hidden, settings.hidden, bias=False, **KIND)
        block: Any = PlainBlock if settings.plain else MoEBlock
        sizes = settings.hidden, settings.width, settings.experts, settings.top_k
        options: dict[str, Any] = {
            "count_tokens": not settings.plain,
            "correction_bias": settings.balance == "bias",
            "return_router_logits": settings.balance == "loss",
        }
        self.experts = block(*sizes, renormalize=True, **options, **KIND)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = states.shape
        qkv = self.qkv(self.before_attention(states)).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.out(attended.transpose(1, 2).reshape(batch, length, hidden))
        found = self.experts(self.before_experts(states))
        return states + (found[0] if self.experts.return_router_logits else found)


class TinyModel(torch.nn.Module):
    """Predicts each byte from those before."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.bytes = torch.nn.Embedding(BYTES, settings.hidden, **KIND)
        self.places = torch.nn.Embedding(settings.length, settings.hidden, **KIND)
        self.layers = torch.nn.Sequential(*(Layer(settings) for _ in range(settings.layers)))
        self.norm = torch.nn.RMSNorm(settings.hidden, **KIND)
        self.head = torch.nn.Linear(settings.hidden, BYTES, bias=False, **KIND)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.bytes(ids) + self.places(torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device))
        return self.head(self.norm(self.layers(states)))


def batches(settings: Settings, device: str) -> Iterator[torch.Tensor]:
    """Yield random passages of the text, [batch, length + 1], the same for a seed."""
    corpus = torch.from_numpy(text().astype(np.int64)).to(device)
    rng = np.random.default_rng(settings.seed)
    within = torch.arange(settings.length + 1, dtype=torch.int64, device=device)
    for _ in range(settings.steps):
        starts = rng.integers(0, len(corpus) - settings.length - 1, settings.batch)
        yield corpus[torch.from_numpy(starts).to(device)[:, None] + within]


class Tracer:
    """Keeps what routers choose at some of the steps."""

    def __init__(self, model: TinyModel, settings: Settings) -> None:
        self.settings = settings
        self.steps: list[int] = []
        self.chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._wanted = set(np.linspace(0, settings.steps - 1, settings.traced_steps).astype(int).tolist())
        self._on = False
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self._keep)

    def begin(self, step: int) -> None:
        self._on = step in self._wanted
        if self._on:
            self.steps.append(step)

    def _keep(self, _router: Any, _arguments: Any, chosen: TopK) -> None:
        if self._on:
            self.chosen.append((chosen.topk_weights.detach(), chosen.topk_ids))

    def result(self) -> dict[str, np.ndarray]:
        """Return the trace; a plain block has no router that is asked, and leaves none."""
        if not self.chosen:
            return {}
        weights, ids = (torch.stack(parts).cpu().numpy() for parts in zip(*self.chosen, strict=True))
        shape = (len(self.steps), self.settings.layers, *ids.shape[1:])
        return {
            "topk_ids": ids.reshape(shape).astype(np.int16),
            "topk_weights": weights.reshape(shape).astype(np.float16),
            "steps": np.array(self.steps),
            "num_experts": np.array(self.settings.experts),
        }


class Balancer:
    """Balances the experts of a model in one of three ways, and measures how busy the busiest is."""

    def __init__(self, model: TinyModel, settings: Settings, group: Any = None) -> None:
        checks.choice("balance", settings.balance, BALANCES)
        self.settings, self.group = settings, group
        self.busiest: list[torch.Tensor] = []
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self._routed: list[Routed] = []
        if settings.balance == "loss":
            for router in self.routers:
                router.register_forward_hook(lambda _router, _given, routed: self._routed.append(routed))

    def loss(self) -> torch.Tensor | float:
        """Return what is added to the loss of a step."""
        if not self._routed:
            return 0.0
        logits, ids = (tuple(getattr(one, name) for one in self._routed) for name in ("router_logits", "topk_ids"))
        self._routed.clear()
        pairs = zip(logits, ids, strict=True)
        coefficient = self.settings.coefficient * (1 if self.group is None else self.group.size())  # gradients' mean
        return sum(load_balancing_loss(*pair, coefficient=coefficient, group=self.group) for pair in pairs)

    def after_step(self) -> None:
        """Move biases, and begin to count anew."""
        counts = [router.tokens_per_expert for router in self.routers if router.tokens_per_expert is not None]
        for count in counts if self.group is not None else ():
            dist.all_reduce(count, group=self.group)
        if counts:
            loads = torch.stack(counts).float()
            self.busiest.append(loads.amax(1) / loads.mean(1))
        for router in self.routers:
            if router.tokens_per_expert is not None and router.correction_bias is not None:
                update_correction_bias(router.correction_bias, router.tokens_per_expert, self.settings.bias_rate)
        for count in counts:
            count.zero_()

    def result(self) -> np.ndarray:
        """Return the busiest expert's load over the mean, [steps, layers]."""
        return torch.stack(self.busiest).cpu().numpy() if self.busiest else np.zeros((0, self.settings.layers))


def trim(trace: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a trace of fewer tokens and steps, the last among them, that is small enough for a repository."""
    steps = np.unique(np.linspace(0, len(trace["steps"]) - 1, TRIMMED_STEPS).astype(int))
    few = {name: trace[name][steps][:, :, :TRIMMED_TOKENS] for name in ("topk_ids", "topk_weights")}
    return {**trace, **few, "steps": trace["steps"][steps]}


def share_of_rate(step: int, steps: int) -> float:
    """Return what is used of the rate of learning: it rises, then falls along a cosine.

    >>> [round(share_of_rate(step, 100), 2) for step in (0, 4, 5, 52, 99)]
    [0.2, 1.0, 1.0, 0.51, 0.0]
    """
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, steps - rising))


def shard(model: TinyModel, device: str) -> None:
    """Spread the parameters of a model over the ranks of the process group (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)


def train(settings: Settings, device: str, sharded: bool = False) -> Report:
    """Train a model from its seed; on a GPU the matrices multiply in bfloat16, and parameters stay float32.

    With `sharded` the ranks of the process group train one model (FSDP2), each with its part of every batch.
    """
    torch.manual_seed(settings.seed)
    with torch.device("cpu"):
        model = TinyModel(settings)
    model.to(device=device, dtype=torch.float32)
    group, rank, ranks = None, 0, 1
    if sharded:
        group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        checks.holds("batch", f"a multiple of the {ranks} ranks", settings.batch % ranks == 0, settings.batch)
        shard(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, settings.steps))
    tracer, balancer = Tracer(model, settings), Balancer(model, settings, group)
    losses, times = [], []
    for step, whole in enumerate(batches(settings, device)):
        passages = whole.chunk(ranks)[rank]
        tracer.begin(step)
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(passages[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1).float(), passages[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + balancer.loss()).backward()
        optimizer.step()
        balancer.after_step()
        schedule.step()
        reported = loss.detach() / ranks
        if group is not None:
            dist.all_reduce(reported, group=group)
        losses.append(reported.item())  # waits for the step
        times.append(time.perf_counter() - begin)
    return Report(losses, 1e3 * median(times), tracer.result(), balancer.result(), model)
