"""`xl_attention`: the definition, the kernels, the CPU form, the public op."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import xt_kernels as xk
from xt_kernels import reference
from xt_kernels.testing import (
    GpuCase,
    assert_no_worse,
    check_mutants,
    honest_interpreter,
    make,
    sparse,
    with_gaps,
)
from xt_kernels.xl_attention import eager, ops

pytest.importorskip("triton")
from xt_kernels.xl_attention import kernels

LOW = [torch.float16, torch.bfloat16, torch.float32]
NAMES = ["out", "lse", "query", "key", "value", "memory_key", "memory_value"]
# Small tiles, so that short sequences span several; 16 is the least that a dot takes.
SMALL = (kernels.Config(16, 16, 4, 1),) * 3

# batch, heads, key heads, L, Lk, M, D
SHAPES = [
    (1, 2, 2, 33, 33, 20, 16),
    (2, 4, 2, 40, 40, 0, 24),
    (1, 2, 1, 34, 50, 33, 32),
    (1, 1, 1, 50, 35, 17, 40),
]


def inputs(shape, dtype, device="cpu", kind="normal", seed=0):
    """(query, key, value, memory_key, memory_value) and their fp64 copies."""
    batch, heads, key_heads, length, num_keys, num_memory, head_dim = shape
    sizes = [(heads, length), *[(key_heads, num_keys)] * 2, *[(key_heads, num_memory)] * 2]
    made = [
        make((batch, *size, head_dim), dtype, seed + i, device, kind)
        for i, size in enumerate(sizes)
    ]
    return [low for low, _ in made], [wide for _, wide in made]


def grads_of(shape, dtype, device="cpu"):
    """Gradients of out and of lse, and their fp64 copies."""
    batch, heads, _, length, _, _, head_dim = shape
    wide = torch.promote_types(dtype, torch.float32)
    out = make((batch, heads, length, head_dim), dtype, 10, device)
    lse = make((batch, heads, length), wide, 11, device)
    return [out[0], lse[0]], [out[1], lse[1]]


def results(function, tensors, grads, **options):
    """(out, lse, gradients of tensors) of a form that returns (out, lse), by autograd."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, lse = function(*tensors, **options)
    loss = (out * grads[0]).sum()
    if grads[1] is not None:
        # A row without keys has lse = -inf, which no loss may touch.
        loss = loss + (lse.masked_fill(lse.isneginf(), 0.0) * grads[1]).sum()
    found = torch.autograd.grad(loss, tensors)
    return [out.detach(), lse.detach(), *found]


def dense(*tensors, **options):
    return reference.xl_attention(*tensors, **options, enable_gqa=True, return_lse=True)


def public(*tensors, **options):
    return xk.xl_attention(*tensors, **options, enable_gqa=True, return_lse=True)


def fused(query, key, value, memory_key, memory_value, scale=None, is_causal=False):
    """PyTorch's own attention on the concatenation; it has no lse, so the dense form's is given."""
    keys, values = torch.cat([memory_key, key], 2), torch.cat([memory_value, value], 2)
    mask = None
    if is_causal:
        place = torch.arange(query.shape[2], device=query.device) + keys.shape[2] - query.shape[2]
        mask = torch.arange(keys.shape[2], device=query.device) <= place[:, None]
        mask[:, : memory_key.shape[2]] = True
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )
    inputs_ = (query, key, value, memory_key, memory_value)
    return out, dense(*inputs_, scale=scale, is_causal=is_causal)[1]


def by_kernel(
    tensors, grads, *, scale=None, is_causal=False, needs_memory=True, configs=(None, None, None)
):
    """(out, lse, gradients) by the kernels, on a GPU or interpreted."""
    scale = tensors[0].shape[3] ** -0.5 if scale is None else scale
    out, lse = kernels.launch_forward(*tensors, scale, is_causal, configs[0])
    found = kernels.launch_backward(
        *tensors, out, lse, *grads, scale, is_causal, needs_memory, *configs[1:]
    )
    return [out, lse, *found]


def references(low, wide, grads, wide_grads, **options):
    """(plain, truth) of each result; plain is the further of PyTorch's two forms from the truth.

    In fp32 both are off by the rounding of lse and the order of sums alone; which is nearer varies.
    The fused form has no gradient of lse.
    """
    truth = results(dense, wide, wide_grads, **options)
    forms = (dense, fused) if grads[1] is None else (dense,)
    plains = [results(form, low, grads, **options) for form in forms]
    found = []
    for exact, *several in zip(truth, *plains, strict=True):
        errors = [(p.double() - exact).nan_to_num(posinf=0, neginf=0).abs().sum() for p in several]
        found.append((several[errors.index(max(errors))], exact))
    return found


def no_worse(ours, *arguments, **options):
    """Each of ours is about as near the truth as plain PyTorch."""
    pairs = references(*arguments, **options)
    for name, mine, (plain, exact) in zip(NAMES, ours, pairs, strict=True):
        assert_no_worse(mine, plain.to(mine.dtype), exact, name)


def close(ours, truth):
    """Equal to the default precision of `torch.testing` for the dtype of ours."""
    for name, mine, exact in zip(NAMES, ours, truth, strict=False):
        torch.testing.assert_close(mine, exact.to(mine.dtype), msg=lambda m, name=name: name + m)
    assert len(ours) == len(truth)


# 1. Is the definition right?


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_definition_equals_attention_on_the_concatenation(shape, is_causal):
    _, wide = inputs(shape, torch.float64)
    out, lse = dense(*wide, is_causal=is_causal)
    torch.testing.assert_close(out, fused(*wide, is_causal=is_causal)[0])
    # With a column of ones among the values and the rest zero, exp(lse) is the sum of weights.
    query, key, *_ = wide
    keys = torch.cat([wide[3], key], 2).repeat_interleave(shape[1] // shape[2], 1)
    scores = query @ keys.mT * shape[6] ** -0.5
    if not is_causal:
        torch.testing.assert_close(lse, scores.exp().sum(-1).log())


def test_the_definition_of_causality_score_by_score():
    _, (query, key, value, mk, mv) = inputs((1, 1, 1, 4, 3, 2, 16), torch.float64)
    out, lse = dense(query, key, value, mk, mv, is_causal=True, scale=0.5)
    for i in range(4):
        seen = [(mk, mv, j) for j in range(2)] + [(key, value, j) for j in range(3) if j <= i - 1]
        scores = torch.stack([0.5 * query[0, 0, i] @ k[0, 0, j] for k, _, j in seen])
        values = torch.stack([v[0, 0, j] for _, v, j in seen])
        torch.testing.assert_close(out[0, 0, i], scores.softmax(0) @ values)
        torch.testing.assert_close(lse[0, 0, i], scores.logsumexp(0))


def test_where_the_memory_ends_does_not_matter():
    _, (query, key, value, *_) = inputs((1, 2, 2, 9, 30, 0, 16), torch.float64)
    whole = public(query, key, value)
    for split in (0, 1, 17, 30):
        parts = [key[:, :, split:], value[:, :, split:], key[:, :, :split], value[:, :, :split]]
        for form in (public, dense):
            for got, want in zip(form(query, *parts), whole, strict=True):
                torch.testing.assert_close(got, want)


# 2. Is the kernel as right as plain PyTorch?


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", LOW)
def test_kernels_are_no_worse_than_eager(honest, poisoned_empty, device, dtype, shape, is_causal):
    low, wide = inputs(shape, dtype, device)
    grads, wide_grads = grads_of(shape, dtype, device)
    if dtype == torch.float32:
        grads[1] = wide_grads[1] = None
    ours = by_kernel(low, grads, is_causal=is_causal, configs=SMALL)
    no_worse(ours, low, wide, grads, wide_grads, is_causal=is_causal)


@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_compute_the_definition(honest, device, dtype, is_causal, scale):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("fp64 is for the interpreter")
    for shape in (SHAPES[2], SHAPES[3]):
        low, wide = inputs(shape, dtype, device)
        grads, wide_grads = grads_of(shape, dtype, device)
        ours = by_kernel(low, grads, is_causal=is_causal, scale=scale, configs=SMALL)
        close(ours, results(dense, wide, wide_grads, is_causal=is_causal, scale=scale))


def every_config():
    for place, table in enumerate((kernels.FORWARD, kernels.QUERY, kernels.KEY)):
        for kind, sizes in table.items():
            for head_dim, found in sizes.items():
                for config in found:
                    tile = f"{config.block_m}x{config.block_n}x{config.num_warps}"
                    name = f"{('fwd', 'dq', 'dkv')[place]}-{kind}-{head_dim}-{tile}"
                    yield pytest.param(place, kind, head_dim, config, id=name)


@pytest.mark.parametrize(("place", "kind", "head_dim", "config"), list(every_config()))
def test_every_config(honest, device, place, kind, head_dim, config):
    # A tile and one more on both axes, and causal, so that every loop runs.
    shape = (1, 1, 1, config.block_m + 1, config.block_n + 1, config.block_n + 1, head_dim)
    dtype = torch.float32 if kind in ("wide", "tf32") else torch.bfloat16
    low, wide = inputs(shape, dtype, device)
    grads, wide_grads = grads_of(shape, dtype, device)
    configs = tuple(config if i == place else small for i, small in enumerate(SMALL))
    ours = by_kernel(low, grads, is_causal=True, configs=configs)
    if dtype == torch.float32:
        close(ours, results(dense, wide, wide_grads, is_causal=True))
    else:
        no_worse(ours, low, wide, grads, wide_grads, is_causal=True)


@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_shipped_configs_at_other_head_dims(honest, poisoned_empty, device, head_dim):
    shape = (1, 2, 1, 33, 33, 40, head_dim)
    low, wide = inputs(shape, torch.bfloat16, device)
    grads, wide_grads = grads_of(shape, torch.bfloat16, device)
    no_worse(by_kernel(low, grads), low, wide, grads, wide_grads)


def test_tf32_where_pytorch_allows_it(honest, device):
    shape = (1, 1, 1, 33, 33, 33, 64)
    low, wide = inputs(shape, torch.float32, device)
    before = torch.get_float32_matmul_precision()
    found = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found[precision] = kernels.launch_forward(*low, 0.125, False, SMALL[0])[0]
    finally:
        torch.set_float32_matmul_precision(before)
    truth = dense(*wide)[0]
    errors = {k: (v.double() - truth).abs().max().item() for k, v in found.items()}
    assert errors["highest"] < 2e-6 < 1e-4 < errors["high"] < 1e-2


def test_the_bound_sees_planted_faults(honest, device):
    """A lost key, a wrong sign, memory that is not there, a lost rescale, a lost lse gradient."""
    low, wide = inputs(SHAPES[0], torch.bfloat16, device)
    grads, wide_grads = grads_of(SHAPES[0], torch.bfloat16, device)
    good = by_kernel(low, grads, configs=SMALL)
    no_worse(good, low, wide, grads, wide_grads)
    query, key, value, mk, mv = low
    lost = by_kernel((query, key[:, :, :-1], value[:, :, :-1], mk, mv), grads, configs=SMALL)
    faults = [
        lost[:2] + good[2:],
        by_kernel(low, grads, scale=-(16**-0.5), configs=SMALL),
        by_kernel((query, key, value, None, None), grads, needs_memory=False, configs=SMALL)
        + good[5:],
        [good[0] * 1.02, *good[1:]],
        by_kernel(low, [grads[0], None], configs=SMALL),
        [*good[:3], good[3].roll(1, 2), *good[4:]],
    ]
    for bad in faults:
        with pytest.raises(AssertionError):
            no_worse(bad, low, wide, grads, wide_grads)


def test_kernels_repeat_bit_by_bit_in_any_order_of_programs(device):
    if device == "cuda":
        pytest.skip("test_the_public_op_on_a_gpu does this")
    low, _ = inputs(SHAPES[2], torch.bfloat16)
    grads, _ = grads_of(SHAPES[2], torch.bfloat16)
    found = []
    for seed in (1, 2):
        with honest_interpreter(shuffle_seed=seed):
            found.append(by_kernel(low, grads, configs=SMALL))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# On a CPU without the interpreter.


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 2, 300, 600, 700, 64)])
@pytest.mark.parametrize("dtype", LOW[:2])
def test_the_cpu_form_is_no_worse_than_plain_attention(dtype, shape, is_causal):
    """fp32 is below: PyTorch's own CPU attention is up to 3 times as far off as the dense form."""
    low, wide = inputs(shape, dtype)
    grads, wide_grads = grads_of(shape, dtype)
    for grad_lse in (grads[1], None):
        pair = [grads[0], grad_lse], [wide_grads[0], grad_lse]
        ours = results(public, low, pair[0], is_causal=is_causal)
        no_worse(ours, low, wide, *pair, is_causal=is_causal)


@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cpu_form_computes_the_definition(dtype, is_causal, scale):
    for shape in [*SHAPES, (1, 2, 2, 300, 600, 700, 64)]:
        low, wide = inputs(shape, dtype)
        grads, wide_grads = grads_of(shape, dtype)
        ours = results(public, low, grads, is_causal=is_causal, scale=scale)
        close(ours, results(dense, wide, wide_grads, is_causal=is_causal, scale=scale))


# 3. Are the gradients the derivatives?


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 1, 4, 6, 3, 16), (2, 1, 1, 5, 3, 2, 16)])
def test_gradcheck(shape, is_causal):
    _, wide = inputs(shape, torch.float64)

    def attention(*tensors):
        out, lse = public(*tensors, is_causal=is_causal)
        return out, lse

    assert torch.autograd.gradcheck(attention, [t.requires_grad_() for t in wide], fast_mode=True)


def test_gradcheck_of_the_kernels(device):
    if device == "cuda":
        pytest.skip("fp64 is for the interpreter")

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            out, lse = kernels.launch_forward(*tensors, 0.3, True, SMALL[0])
            ctx.save_for_backward(*tensors, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, *grads):
            return tuple(
                kernels.launch_backward(*ctx.saved_tensors, *grads, 0.3, True, True, *SMALL[1:])
            )

    _, wide = inputs((1, 2, 1, 5, 6, 3, 16), torch.float64)
    with honest_interpreter():
        assert torch.autograd.gradcheck(
            Attention.apply, [t.requires_grad_() for t in wide], fast_mode=True
        )


def test_a_second_derivative_fails_clearly():
    low, _ = inputs(SHAPES[0], torch.float32)
    query = low[0].requires_grad_()
    out = xk.xl_attention(*low)
    (grad,) = torch.autograd.grad((out**2).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="xl_attention_bwd"):
        grad.sum().backward()


def test_detached_memory_costs_no_backward_work(monkeypatch):
    low, _ = inputs(SHAPES[0], torch.float32)
    asked = []
    original = eager.backward

    def spy(*args):
        asked.append(args[-1])
        return original(*args)

    monkeypatch.setattr(eager, "backward", spy)
    for needs in [(True, True), (True, False), (False, False)]:
        tensors = [
            t.detach().requires_grad_(n)
            for t, n in zip(low, (True, True, True, *needs), strict=True)
        ]
        xk.xl_attention(*tensors).sum().backward()
        assert [t.grad is not None for t in tensors[3:]] == list(needs)
    assert asked == [True, True, False]


def test_detached_memory_skips_a_launch(honest, device, monkeypatch):
    launches = []

    class Spy:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid):
            launches.append(self.name)
            return self.kernel[grid]

    for name in ("fwd", "bwd_query", "bwd_key"):
        name = f"_xl_attention_{name}_kernel"
        monkeypatch.setattr(kernels, name, Spy(name))
    low, _ = inputs(SHAPES[0], torch.float32, device)
    grads, _ = grads_of(SHAPES[0], torch.float32, device)
    with_memory = by_kernel(low, grads, configs=SMALL)
    assert [n[14:-7] for n in launches] == ["fwd", "bwd_query", "bwd_key", "bwd_key"]
    launches.clear()
    without = by_kernel(low, grads, needs_memory=False, configs=SMALL)
    assert [n[14:-7] for n in launches] == ["fwd", "bwd_query", "bwd_key"]
    assert len(without) == 5
    assert all(torch.equal(a, b) for a, b in zip(without, with_memory, strict=False))


# 4. Is it a good citizen?


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype, memory):
    low, _ = inputs(SHAPES[2], dtype, device)
    grads, _ = grads_of(SHAPES[2], dtype, device)
    # Stored [B, L, heads, D], as projections give them.
    low = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in low]
    if not memory:
        low[3:] = [None, None]
    wanted = [t if t is None else t.clone().requires_grad_() for t in low]
    torch.library.opcheck(ops.forward, (*wanted, 0.2, True))
    out, lse = ops.forward(*low, 0.2, True)
    torch.library.opcheck(ops.backward, (*low, out, lse, *grads, 0.2, True, memory))
    torch.library.opcheck(ops.backward, (*low, out, lse, grads[0], None, 0.2, False, False))


@pytest.mark.parametrize("return_lse", [False, True])
def test_compile_without_graph_break(device, return_lse):
    low, _ = inputs(SHAPES[0], torch.float32, device)

    def layer(query, key, value, memory_key, memory_value):
        found = xk.xl_attention(
            query * 2, key, value, memory_key.detach(), memory_value, return_lse=return_lse
        )
        return found[0].sin() + found[1].cos()[..., None] if return_lse else found.sin()

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    tensors = [t.requires_grad_() for t in low]
    both = []
    for form in (compiled, layer):
        out = form(*tensors)
        wanted = [tensors[i] for i in (0, 1, 2, 4)]
        both.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for ours, plain in zip(*both, strict=True):
        torch.testing.assert_close(ours, plain)


def test_autocast_casts_first(device):
    low, _ = inputs(SHAPES[0], torch.float32, device)
    low[1] = low[1].to(torch.bfloat16)
    query = low[0].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out, lse = public(*low)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    out.sum().backward()
    assert query.grad.dtype == torch.float32
    low = [t.to(torch.bfloat16) for t in low]
    assert torch.equal(out, public(*low)[0])


def test_strides_of_every_kind_and_inputs_untouched(honest, poisoned_empty, device):
    low, wide = inputs(SHAPES[2], torch.bfloat16, device)
    grads, wide_grads = grads_of(SHAPES[2], torch.bfloat16, device)
    gaps = [with_gaps(t) for t in low]
    gap_grads = [with_gaps(t) for t in grads]
    ours = by_kernel(gaps, gap_grads)
    no_worse(ours, low, wide, grads, wide_grads)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in low]
    no_worse(by_kernel(transposed, grads), low, wide, grads, wide_grads)
    expanded = [grads[0][:1, :1, :1, :1].expand_as(grads[0]), None]
    ours = by_kernel(low, expanded)
    no_worse(ours, low, wide, expanded, [expanded[0].double(), None])
    for kept, tensor in zip([*gaps, *gap_grads], [*low, *grads], strict=True):
        assert torch.equal(kept, tensor)


def test_strides_of_every_kind_on_a_cpu():
    low, wide = inputs(SHAPES[2], torch.float64)
    grads, _ = grads_of(SHAPES[2], torch.float64)
    truth = results(dense, wide, grads)
    gaps = [with_gaps(t) for t in low]
    close(results(public, gaps, [with_gaps(t) for t in grads]), truth)
    close(results(public, [t.mT.contiguous().mT for t in low], grads), truth)
    assert all(torch.equal(a, b) for a, b in zip(gaps, low, strict=True))


@pytest.mark.parametrize("change", [None, "transposed", "padded"])
def test_aligned_tensors_get_the_fast_configs(device, change):
    query = torch.zeros(2, 4, 64, 64, dtype=torch.bfloat16, device=device)
    if change == "transposed":
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    if change == "padded":
        query = F.pad(query, (0, 3))[..., :64]
    kind = "any" if change == "padded" else "fast"
    if kind == "fast" and device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        kind = "ampere"
    assert kernels.configs(kernels.FORWARD, (query,)) is kernels.FORWARD[kind][64]


# 5. Edges

EDGES = [
    # L, Lk, M
    (1, 1, 1),
    (1, 0, 0),
    (5, 0, 0),
    (5, 0, 9),
    (0, 5, 3),
    (0, 0, 0),
    (5, 1, 0),
    (1, 40, 0),
    (16, 16, 16),
    (17, 17, 17),
    (15, 31, 1),
    (40, 7, 0),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", EDGES)
def test_lengths(honest, poisoned_empty, device, lengths, is_causal):
    shape = (1, 2, 1, *lengths, 16)
    low, wide = inputs(shape, torch.float32, device)
    grads, wide_grads = grads_of(shape, torch.float32, device)
    truth = results(dense, wide, wide_grads, is_causal=is_causal)
    close(by_kernel(low, grads, is_causal=is_causal, configs=SMALL), truth)
    close(results(public, low, grads, is_causal=is_causal), truth)
    if not lengths[2]:
        current = [t.float() for t in truth[:2]]
        for got, want in zip(public(*low[:3], is_causal=is_causal), current, strict=True):
            torch.testing.assert_close(got, want)


def test_queries_without_keys_give_zero(honest, device):
    low, _ = inputs((1, 1, 1, 40, 7, 0, 16), torch.float32, device)
    grads, _ = grads_of((1, 1, 1, 40, 7, 0, 16), torch.float32, device)
    for out, lse, query, *_ in (
        by_kernel(low, grads, is_causal=True, configs=SMALL),
        results(public, low, grads, is_causal=True),
    ):
        assert (out[:, :, :33] == 0).all() and (query[:, :, :33] == 0).all()
        assert lse[:, :, :33].isneginf().all() and lse[:, :, 33:].isfinite().all()


def test_no_batch_and_no_heads(device):
    for shape in [(0, 2, 2, 5, 6, 7, 16), (2, 0, 0, 5, 6, 7, 16)]:
        low, _ = inputs(shape, torch.float32, device)
        found = results(public, low, [torch.ones((), device=device), None])
        assert [f.shape for f in found] == [low[0].shape, low[0].shape[:3], *[t.shape for t in low]]


@pytest.mark.parametrize("dtype", LOW)
def test_huge_logits(honest, device, dtype):
    """Scores of several thousand: no overflow, and gradients within their own rounding.

    Where one key takes all the weight, ds = dout . v - dout . out is 0 by exact cancellation in the
    dense form, and the rounding of two sums times k and q of size 64 in ours (as in any attention
    that keeps out and lse alone): in fp32 up to 2.4 times the dense form's error.
    """
    low, wide = inputs(SHAPES[0], dtype, device, "huge")
    grads, wide_grads = grads_of(SHAPES[0], dtype, device)
    ours = by_kernel(low, grads, configs=SMALL)
    truth = results(dense, wide, wide_grads)
    plain = results(dense, low, grads)
    for name, mine, p, t in list(zip(NAMES, ours, plain, truth, strict=True))[:2]:
        assert_no_worse(mine, p.to(mine.dtype), t, name)
    assert all(x.isfinite().all() for x in ours)
    assert all(x.isfinite().all() for x in results(public, low, grads))


STEPS = (2**30 + 1, 2**30 + 4, 2**29 + 16, 2**28 + 1024)


def far(values):
    """The same values in sparse memory, under strides of 2**28 to 2**30 elements."""
    view = sparse(values.shape, STEPS[: values.dim()], values.dtype)
    view.copy_(values)
    return view


@pytest.mark.skipif(torch.cuda.is_available(), reason="sparse memory is for the interpreter")
class TestOffsetsPast2To31:
    """Every product of an index and a stride passes 2**31 with both factors below it."""

    # Three heads, so that the last one's offset passes; a whole tile of keys and a rest.
    shape = (3, 3, 3, 17, 18, 17, 16)

    @pytest.fixture(autouse=True)
    def far_results(self, monkeypatch):
        monkeypatch.setattr(
            kernels, "_like", lambda t: sparse(t.shape, STEPS, t.dtype), raising=True
        )
        monkeypatch.setattr(
            kernels, "row_values", lambda q: sparse(q.shape[:3], STEPS[:3], torch.float32)
        )
        low, _ = inputs(self.shape, torch.float32)
        grads, _ = grads_of(self.shape, torch.float32)
        self.expected = results(dense, low, grads)
        self.low, self.grads = [far(t) for t in low], [far(t) for t in grads]

    def forward(self):
        with honest_interpreter():
            found = kernels.launch_forward(*self.low, 0.25, False, SMALL[0])
        close([t.clone() for t in found], self.expected[:2])

    def backward(self):
        out, lse = (far(t) for t in self.expected[:2])
        with honest_interpreter():
            found = kernels.launch_backward(
                *self.low, out, lse, *self.grads, 0.25, False, True, *SMALL[1:]
            )
        close([t.clone() for t in (out, lse, *found)], self.expected)

    def test_forward(self):
        assert check_mutants(kernels, "_xl_attention_fwd_kernel", self.forward) >= 10

    def test_query_gradient(self):
        assert check_mutants(kernels, "_xl_attention_bwd_query_kernel", self.backward) >= 10

    def test_key_gradient(self):
        assert check_mutants(kernels, "_xl_attention_bwd_key_kernel", self.backward) >= 8


# 6. Does it refuse well?

Q, K, MEM = torch.zeros(2, 8, 5, 64), torch.zeros(2, 8, 6, 64), torch.zeros(2, 8, 7, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": Q[0]}, r"query must be \[B, heads, L, D\], got shape \[8, 5, 64\]"),
        ({"query": Q.to("meta")}, "query must be on a cpu or cuda device, got meta"),
        ({"query": Q.int()}, "query must be of dtype float16, .* got int32"),
        ({"query": Q[..., :12]}, "query must have a head dim in 16..256 .* of 8, got 12"),
        ({"query": Q[..., :8]}, "query must have a head dim in 16..256 .* of 8, got 8"),
        ({"query": torch.zeros(1, 1, 1, 264)}, "query must have a head dim .* got 264"),
        (
            {"key": K[:, :4]},
            r"key must be \[B, heads, Lk, D\] = \[2, 8, \*, 64\] to match query, "
            r"got \[2, 4, 6, 64\]\.",
        ),
        ({"key": K[0]}, r"key must be \[B, heads, L, D\], got shape \[8, 6, 64\]"),
        ({"key": K.half()}, "key must be of the dtype of query = float32, got float16"),
        ({"key": K.to("meta")}, "key must be on the device of query = cpu, got meta"),
        (
            {"value": K[:, :, :5]},
            r"value must be \[B, heads, Lk, D\] = \[2, 8, 6, 64\] to match key, "
            r"got \[2, 8, 5, 64\]",
        ),
        (
            {"key": K[:, :3], "value": K[:, :3], "enable_gqa": True},
            "key must have a number of heads that divides that of query = 8, got 3",
        ),
        (
            {"memory_key": MEM[:, :4], "memory_value": MEM},
            r"memory_key must be \[B, heads, M, D\] = \[2, 8, \*, 64\] to match query, "
            r"got \[2, 4, 7, 64\]\.",
        ),
        (
            {"memory_key": MEM, "memory_value": MEM[:, :, :3]},
            r"memory_value must be \[B, heads, M, D\] = \[2, 8, 7, 64\] to match memory_key, "
            r"got \[2, 8, 3, 64\]",
        ),
        (
            {"memory_key": MEM},
            "memory_key and memory_value must come together, got memory_key alone",
        ),
        (
            {"memory_value": MEM},
            "memory_key and memory_value must come together, got memory_value alone",
        ),
        (
            {"memory_key": MEM.double(), "memory_value": MEM},
            "memory_key must be of the dtype of query = float32, got float64",
        ),
        ({"scale": math.nan}, "scale must be finite, got nan"),
    ],
)
def test_refuses(options, message):
    options = {"query": Q, "key": K, "value": K, **options}
    with pytest.raises(ValueError, match=f"^xl_attention: {message}"):
        xk.xl_attention(options.pop("query"), options.pop("key"), options.pop("value"), **options)


# On a GPU: full sizes, shipped configs, determinism


def gpu_cases(device: str, full: bool) -> Iterator[GpuCase]:
    """Launches for `scripts/gpu_run.py`."""
    sizes = [(1, 6, 6, 2048, 2048, 2048, 64), (1, 6, 2, 2000, 2100, 1111, 128)]
    if not full:
        sizes = [(1, 1, 1, 40, 40, 40, 64), (1, 2, 1, 35, 41, 13, 128)]
    sizes.append((1, 1, 1, *sizes[1][3:6], 256))
    for shape in sizes:
        # fp32 at D 256 is judged by `test_every_config`.
        for dtype in (torch.bfloat16, torch.float32)[: 1 if shape[6] == 256 else 2]:
            for is_causal in (False, True):
                low, wide = inputs(shape, dtype, device)
                grads, wide_grads = grads_of(shape, dtype, device)
                if dtype == torch.float32:
                    grads[1] = wide_grads[1] = None

                def run(config, low=low, grads=grads, is_causal=is_causal):
                    configs = config or (None, None, None)
                    return by_kernel(low, grads, is_causal=is_causal, configs=configs)

                def expected(
                    low=low, wide=wide, grads=grads, wide_grads=wide_grads, is_causal=is_causal
                ):
                    return references(low, wide, grads, wide_grads, is_causal=is_causal)

                def choices(table, low=low):
                    return kernels.configs(table, low)

                several = [choices(t) for t in (kernels.FORWARD, kernels.QUERY, kernels.KEY)]
                most = max(map(len, several))
                configs = [tuple(c[min(i, len(c) - 1)] for c in several) for i in range(most)]
                name = f"d{shape[6]}-{str(dtype)[6:]}{'-causal' if is_causal else ''}"
                yield GpuCase(name, run, configs, expected)

    # More than 2**31 elements in every tensor but lse; the last heads are judged.
    shape = (4100 if full else 2, 64 if full else 3, 128 if full else 20, 64)
    generator = torch.Generator(device).manual_seed(0)

    def drawn():
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    low, grads = [drawn() for _ in range(3)], [drawn(), None]
    low += [low[1][:, :, :0], low[1][:, :, :0]]

    def run(config, low=low, grads=grads):
        return by_kernel(low, grads, configs=config or (None, None, None))

    def few(tensors):
        return [None if t is None else t[-1:, -2:] for t in tensors]

    def expected(low=low, grads=grads):
        low, grads = few(low), few(grads)
        wide, wide_grads = ([None if t is None else t.double() for t in x] for x in (low, grads))
        return references(low, wide, grads, wide_grads)

    yield GpuCase("past-2-31", run, [], expected, few, repeats=10)


def test_gpu_cases_agree_with_their_references(honest, device):
    if device == "cuda":
        pytest.skip("test_full_size runs the same at full size")
    for case in gpu_cases(device, full=False):
        case.check(case.run(None))


@pytest.mark.gpu
def test_full_size():
    for case in gpu_cases("cuda", full=True):
        for config in case.configs:
            case.check(case.run(config))
        torch.cuda.empty_cache()


@pytest.mark.gpu
def test_the_public_op_on_a_gpu():
    shape = (2, 6, 3, 1000, 1000, 777, 64)
    low, wide = inputs(shape, torch.bfloat16, "cuda")
    grads, wide_grads = grads_of(shape, torch.bfloat16, "cuda")
    first = results(public, low, grads, is_causal=True)
    no_worse(first, low, wide, grads, wide_grads, is_causal=True)
    for _ in range(20):
        again = results(public, low, grads, is_causal=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
