"""How well a plan fits: softmax mass found on a sample of queries, sizes of buckets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from .plan import QUERY_BLOCK, Choices, Plan, buckets, random_projections


@dataclass(frozen=True)
class Description:
    """What `Plan.describe` found; `print` it.

    mass: `[B, heads]` mean softmax mass of the keys that a query attends to one by one, the rest
        being estimated; share: the share of keys that these are.
    key_buckets: `[B, groups, buckets]` keys in each bucket, in Gray order; None for the window
        "tile" and for exact attention.
    """

    mass: torch.Tensor
    share: float
    key_buckets: torch.Tensor | None

    def __str__(self) -> str:
        mean = self.mass.mean().item() if self.mass.numel() else 0.0
        text = f"windows hold {mean:.1%} of the softmax mass with {self.share:.2%} of the keys"
        if self.key_buckets is None or not self.key_buckets.numel():
            return text
        sizes = self.key_buckets
        used = (sizes > 0).float().mean().item() * sizes.shape[2]
        return (
            f"{text}; {used:.0f} of {sizes.shape[2]} buckets are used, "
            f"the largest has {sizes.max().item():,} of {sizes[0, 0].sum().item():,} keys"
        )


def describe(
    plan: Plan,
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    memory_key: torch.Tensor | None = None,
    scale: float | None = None,
    num_sampled: int = 64,
) -> Description:
    """How well the plan fits these tensors, from a sample of queries.

    query, key, memory_key: as `hyper_attention` takes them. num_sampled: evenly spaced queries
        whose softmax is computed over all keys, in O(num_sampled (M + Lk)) for each head.

    Raises ValueError if the plan is for other sizes.
    """
    plan.check("Plan.describe", query, key, memory_key)
    if plan.choices is None:
        return Description(torch.ones(query.shape[:2], device="cpu"), 1.0, None)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    # A look at a plan, not a path of the model: all on the CPU.
    query, key = query.detach().cpu(), key.detach().cpu()
    group = query.shape[1] // max(1, key.shape[1])
    count = min(num_sampled, plan.num_queries)
    chosen = torch.arange(count, device="cpu") * plan.num_queries // max(count, 1)
    mass = torch.zeros(query.shape[:2], device="cpu")
    share = 0.0
    is_ordered = plan.spec.is_ordered
    choices = Choices(*(t.cpu() for t in plan.choices))
    random = plan.projections
    if random is None:
        device = torch.device("cpu")
        random = random_projections(key.shape[3], plan.lsh_num_projs, plan.seed, device)
    random = random.cpu().float().expand(key.shape[1], -1, -1)
    sizes = torch.zeros((*key.shape[:2], 2 ** random.shape[2]), dtype=torch.long, device="cpu")
    for b, h in product(range(query.shape[0]), range(query.shape[1])):
        g = h // group
        memory = None if memory_key is None else memory_key[b, g].detach().cpu()
        keys = key[b, g] if memory is None else torch.cat([memory, key[b, g]])
        scores = query[b, h, chosen].float() @ keys.float().mT * scale
        attended, allowed = _attended(plan, choices, b, h, g, chosen)
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num()
        mass[b, h] = (weights * attended).sum() / max(count, 1)
        share += attended.sum().item() / max(allowed.sum().item(), 1) / mass.numel()
        if is_ordered:
            _, codes = buckets(plan.spec, query[b, h], key[b, g], memory, random[g])
            sizes[b, g] = torch.bincount(codes, minlength=sizes.shape[2])
    return Description(mass, share, sizes if is_ordered else None)


def _attended(
    plan: Plan, choices: Choices, b: int, h: int, g: int, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys that queries `chosen` attend to one by one, keys that they may), `[n, M + Lk]`."""
    shape = len(chosen), plan.num_memory + plan.num_keys
    attended = torch.zeros(shape, dtype=torch.bool, device="cpu")
    allowed = torch.zeros_like(attended)
    for level in plan.levels:
        for segment in range(level.segments):
            rows, columns = level.queries(segment), level.keys(segment)
            for i, token in enumerate(chosen.tolist()):
                if not rows.start <= token < rows.stop:
                    continue
                place = token - rows.start
                seen = slice(
                    columns.start, columns.start + place + 1 if level.is_causal else columns.stop
                )
                allowed[i, seen] = True
                if level.is_exact:
                    attended[i, seen] = True
                    continue
                keys = torch.arange(columns.start, columns.stop, device="cpu")
                if plan.spec.is_ordered:
                    q_place, k_place = level.order(segment)
                    place = int((choices.query_order[b, h, q_place] == token).nonzero())
                    keys = choices.key_order[b, g, k_place].long()
                block = level.blocks(segment).start + place // QUERY_BLOCK
                start = int(choices.window_start[b, h, block])
                attended[i, keys[start : start + level.width]] = True
    return attended, allowed
