"""How the small tasks train: one schedule, and the curve that it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

LEARNING_RATE, WARM_UP, CLIP = 4e-3, 0.1, 1.0


class Point(NamedTuple):
    """A point of a learning curve: steps done, mean loss since the point before, score (%); at the
    end perhaps more scores, by name."""

    step: int
    loss: float
    score: float
    more: dict[str, float] = {}  # noqa: RUF012 (nobody changes it)


def learn(
    model: nn.Module,
    loss: Callable[[], torch.Tensor],
    score: Callable[[], float],
    steps: int,
    every: int,
    on_steps: Callable[[int], object],
    learning_rate: float = LEARNING_RATE,
) -> Iterator[Point]:
    """Trains a model and yields its curve, a point every so many steps and one at the end.

    loss: of a new batch. score: percent. on_steps: called with the steps just done.

    AdamW, warm-up over a tenth, cosine to zero, gradients clipped at norm 1.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    for step in range(1, steps + 1):
        found = loss()
        optimizer.zero_grad()
        torch.autograd.backward(found)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(found.item())
        on_steps(1)
        if step == steps or step % every == 0:
            yield Point(step, sum(losses) / len(losses), score())
            losses.clear()
