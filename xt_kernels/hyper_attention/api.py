"""`hyper_attention`: approximate attention over very long sequences, and the plan behind it."""

from __future__ import annotations

import torch

from .. import _checks as checks
from .. import xl_attention as exact
from . import ops
from . import plan as plans
from .plan import Choices, Plan, Spec

OP = "hyper_attention"
WINDOWS = ("lsh", "cluster", "tile")
RESIDUALS = ("sample", "mean", "uniform", "none")


def hyper_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    block_size: int = 256,
    sample_size: int = 256,
    lsh_num_projs: int = 7,
    min_seq_len: int = 4096,
    window: str = "lsh",
    residual: str = "sample",
    memory_key: torch.Tensor | None = None,
    memory_value: torch.Tensor | None = None,
    plan: Plan | None = None,
    seed: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in O(L): exact over a window of alike keys, estimated over all the others.

        out_i = sum_j w_ij exp(scale q_i . k_j) v_j / sum_j w_ij exp(scale q_i . k_j)

    with w_ij = 1 for the `block_size` keys of the query's window. `sample_size` residual keys stand
    for those outside, means of neighbours or samples, and weigh as many (Han et al. 2023, arXiv
    2310.05869; how it differs: docs/hyper_attention.md). With at most `min_seq_len` keys, or a
    budget block_size + sample_size that covers all, it is exact attention.

    query: `[B, heads, L, D]`, fp16, bf16, fp32 (or fp64 on a CPU), any strides, D a multiple of 8
        in 16..256, L any number, zero included.
    key, value: `[B, heads, Lk, D]`, dtype and device of query; with enable_gqa `[B, groups, Lk, D]`
        with groups that divides heads.
    attn_mask, dropout_p: for calls written for `scaled_dot_product_attention`; must stay unset.
    is_causal: query i sees all memory, and current keys j <= i + (Lk - L): the last query sees the
        last key. (`scaled_dot_product_attention` has the first query see the first key instead;
        for L = Lk it is the same.) Triangles on the diagonal are exact: the sequence halved until
        it is at most min_seq_len, but at least 256 and rounded up to tiles of 256 tokens. Below
        them, segments of queries meet whole segments of keys with a window and a residual each
        (algorithm 4). Which of the keys it may see a query meets depends on later tokens too,
        unless the window is "tile" and the residual fixed by a seed or a mean.
    scale: factor of the scores before the softmax; default D ** -0.5.
    enable_gqa: allow fewer key heads than query heads.
    block_size: keys of a window, at least 1. 128 neighbouring queries share a window.
    sample_size: residual keys, at least 1; of samples at most 65,536.
    lsh_num_projs: hyperplanes of the hash, 1 to 8: 2 to 256 buckets, or as many clusters.
    min_seq_len: keys, memory included, up to which attention is exact.
    window: "lsh": queries and keys that hash alike meet. "cluster": those of one cluster of keys
        meet. "tile": queries meet the keys around the same place, for tokens whose order is spatial
        (`stitch_regions(order="tile")`).
    residual: "sample": one key of each stratum of the ordered keys. "mean": mean key and value of
        each stratum; every key gets a gradient. "uniform": keys drawn with replacement, as
        published. "none": the window alone.
    memory_key, memory_value: `[B, heads or groups, M, D]`, both or neither; attended like other
        keys, never concatenated. Their gradients are computed only if either requires one.
    plan: what `make_plan` returned for tensors of these sizes; its choices replace is_causal,
        block_size, sample_size, lsh_num_projs, min_seq_len, window, residual and seed.
    seed: of hyperplanes and samples, at least 0. The same seed gives the same result.
    return_lse: also return the log of the denominator.

    Returns out `[B, heads, L, D]` in the dtype of query, and with return_lse (out, lse), lse
    `[B, heads, L]`, fp32 (fp64 for fp64), natural log. A query that sees no key gives out 0, lse
    -inf and no gradient. Under autocast tensors are cast to its dtype first. Softmax and sums are
    fp32 (fp64 for fp64). Gradients are the exact derivatives for a fixed plan, also through lse,
    and deterministic; there is no second derivative. Kept for backward: the inputs, the plan, out
    and lse. Raises ValueError if arguments disagree.
    """
    if attn_mask is not None:
        rule = "be None: use is_causal, or scaled_dot_product_attention for other masks"
        checks.fail(OP, "attn_mask", rule, type(attn_mask).__name__)
    if dropout_p != 0.0:
        rule = "be 0: apply torch.nn.functional.dropout to the result"
        checks.fail(OP, "dropout_p", rule, dropout_p)
    query, key, value, memory_key, memory_value = checks.attention_inputs(
        OP, query, key, value, memory_key, memory_value, enable_gqa
    )
    factor = checks.attention_scale(OP, query, scale)
    if plan is None:
        spec = spec_of(is_causal, block_size, sample_size, min_seq_len, window, residual)
        check_hash(lsh_num_projs, seed)
        choices = _choices(spec, query, key, memory_key, lsh_num_projs, None, seed, None)
    else:
        spec, choices = checked(plan, query, key, memory_key), plan.choices
    if choices is None:
        return exact.xl_attention(
            query, key, value, memory_key, memory_value, scale=factor, is_causal=spec.is_causal,
            enable_gqa=enable_gqa, return_lse=return_lse,
        )  # fmt: skip
    inputs = (query, key, value, memory_key, memory_value)
    out, lse = ops.forward(*inputs, list(choices), factor, *spec)
    return (out, lse) if return_lse else out


def make_plan(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    memory_key: torch.Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    block_size: int = 256,
    sample_size: int = 256,
    lsh_num_projs: int = 7,
    min_seq_len: int = 4096,
    window: str = "lsh",
    residual: str = "sample",
    projections: torch.Tensor | None = None,
    seed: int = 0,
    draw: torch.Tensor | None = None,
) -> Plan:
    """What `hyper_attention` would decide for these tensors: orders, windows, residual keys.

    Arguments are those of `hyper_attention`, and:

    projections: `[D, bits]` or `[groups, D, bits]`, the random hyperplanes that are weighted by the
        covariance of the keys, or that sort the clusters; bits 1 to 8. Default: lsh_num_projs
        standard normal ones from seed.
    draw: an int64 scalar on the CPU, the seed of samples instead of `seed`: what torch.randint
        gave, so that a compiled model can draw anew in each call.

    Returns a `Plan`, which carries no gradient. Raises ValueError if arguments disagree.
    """
    query, key, _, memory_key, _ = checks.attention_inputs(
        OP, query, key, key, memory_key, memory_key, enable_gqa
    )
    spec = spec_of(is_causal, block_size, sample_size, min_seq_len, window, residual)
    check_hash(lsh_num_projs, seed)
    if projections is not None:
        groups, head_dim = key.shape[1], key.shape[3]
        if projections.dim() == 2:
            projections = projections[None]
        shape = list(projections.shape)
        fits = len(shape) == 3 and shape[0] in (1, groups) and shape[1] == head_dim
        if not fits or not 1 <= shape[2] <= plans.MAX_PROJECTIONS:
            rule = f"be [D, bits] or [groups, D, bits] = [{groups}, {head_dim}, 1 to 8]"
            checks.fail(OP, "projections", rule, str(shape))
        checks.check_device(OP, "projections", projections, "query", query)
    with torch.no_grad():
        choices = _choices(spec, query, key, memory_key, lsh_num_projs, projections, seed, draw)
    num_memory = 0 if memory_key is None else memory_key.shape[2]
    sizes = query.shape[2], key.shape[2], num_memory
    return Plan(spec, *sizes, choices, lsh_num_projs, projections, seed)


def spec_of(
    is_causal: bool,
    block_size: int,
    sample_size: int,
    min_seq_len: int,
    window: str,
    residual: str,
) -> Spec:
    """The choices, checked."""
    checks.check_count(OP, "block_size", block_size, 1)
    checks.check_count(OP, "sample_size", sample_size, 1)
    checks.check_count(OP, "min_seq_len", min_seq_len, 0)
    for name, value, known in (("window", window, WINDOWS), ("residual", residual, RESIDUALS)):
        if value not in known:
            checks.fail(OP, name, f"be one of {', '.join(known)}", repr(value))
    return Spec(bool(is_causal), block_size, sample_size, min_seq_len, window, residual)


def check_hash(lsh_num_projs: int, seed: int) -> None:
    """What hashing and sampling take."""
    checks.check_count(OP, "lsh_num_projs", lsh_num_projs, 1, plans.MAX_PROJECTIONS)
    checks.check_count(OP, "seed", seed, 0, plans.MAX_SEED)


def check_samples(spec: Spec) -> None:
    """Samples that a program of the kernels can hold, where attention is not exact."""
    if spec.residual in ("sample", "uniform") and spec.sample_size > plans.MAX_SAMPLES:
        rule = f"be at most {plans.MAX_SAMPLES:,} for residual {spec.residual!r}"
        checks.fail(OP, "sample_size", rule, spec.sample_size)


def checked(
    plan: Plan, query: torch.Tensor, key: torch.Tensor, memory_key: torch.Tensor | None
) -> Spec:
    """The choices of a plan that is for these tensors."""
    if not isinstance(plan, Plan):
        checks.fail(OP, "plan", "be what make_plan returned", type(plan).__name__)
    plan.check(OP, query, key, memory_key)
    if plan.choices is not None:
        checks.check_device(OP, "plan", plan.choices.window_start, "query", query)
    return plan.spec


def _choices(
    spec: Spec,
    query: torch.Tensor,
    key: torch.Tensor,
    memory_key: torch.Tensor | None,
    lsh_num_projs: int,
    projections: torch.Tensor | None,
    seed: int,
    draw: torch.Tensor | None,
) -> Choices | None:
    """The plan's tensors, None where attention is exact."""
    num_memory = 0 if memory_key is None else memory_key.shape[2]
    if spec.is_exact(key.shape[2], num_memory):
        return None
    check_samples(spec)
    memory_key = None if memory_key is None else memory_key.detach()
    projections = None if projections is None else projections.detach().float()
    inputs = (query.detach(), key.detach(), memory_key, projections, lsh_num_projs, seed, draw)
    return Choices(*ops.make_choices(*inputs, *spec))
