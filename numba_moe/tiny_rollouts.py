"""Routing replay on the small model: it samples text, and a training pass has the experts of the sampling.

Sampling is in bfloat16, as servers do it, and the training pass in float32. So its own routers would choose some other
experts, and the probabilities of what was sampled would differ by more than rounding.
"""

from typing import NamedTuple

import numpy as np
import torch

from numba_moe.tiny import Settings, TinyModel, text
from numba_moe.training.replay import RoutingReplay

PROMPT = 4  # a prompt is this part of a sequence's length


class Rollouts(NamedTuple):
    """What sequences were sampled, and how far the training pass is off in the logarithms of their probabilities."""

    tokens: torch.Tensor  # int64 [sequences, length]
    differing: float  # share of picks that the training pass would choose otherwise
    own: float  # the mean difference with the pass' own experts
    replayed: float  # the same with those of the sampling


def _scores(model: TinyModel, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Return the logarithms of the probabilities of tokens from `first` on, each given those before."""
    logits = model(tokens[:, :-1]).float()
    return logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[:, first - 1 :, 0]


def replay_rollouts(model: TinyModel, settings: Settings, device: str, sequences: int) -> Rollouts:
    """Sample sequences, record their experts, and train on them with those, without a step of the optimiser."""
    length, first = settings.length, max(1, settings.length // PROMPT)
    rng, generator = np.random.default_rng(settings.seed), torch.Generator(device).manual_seed(settings.seed)
    corpus = text()
    starts = rng.integers(0, len(corpus) - first, sequences)
    tokens = torch.from_numpy(np.stack([corpus[start : start + first] for start in starts]).astype(np.int64)).to(device)
    replay = RoutingReplay(settings.layers, sequences * length, settings.top_k, settings.experts, device=device)
    replay.attach(model)
    sampled = []
    for place in range(first, length):
        with torch.no_grad(), replay.recording(), torch.autocast(device, torch.bfloat16):
            scores = model(tokens)[:, -1].float().log_softmax(-1)
        begin = 0 if place == first else place - 1  # the prompt at once, then what was sampled last
        for sequence in range(sequences):
            replay.put(sequence, place - begin, row=sequence * place + begin, first_token=begin)
        chosen = scores.exp().multinomial(1, generator=generator)
        sampled.append(scores.gather(1, chosen))
        tokens = torch.cat([tokens, chosen], 1)
    wanted, count = torch.cat(sampled, 1), sequences * (length - 1)
    with torch.no_grad(), replay.recording():
        own = _scores(model, tokens, first)
    choices = [replay.ids[:, :count].sort(-1).values.clone()]
    replay.fill(range(sequences), [length - 1] * sequences)
    choices.append(replay.ids[:, :count].sort(-1).values)
    with replay.replaying():
        again = _scores(model, tokens, first)
        again.mean().neg().backward()
    replay.detach(model)
    differing = (choices[0] != choices[1]).float().mean().item()
    return Rollouts(tokens, differing, *((found - wanted).abs().mean().item() for found in (own, again.detach())))
