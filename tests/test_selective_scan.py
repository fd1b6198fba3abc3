"""`selective_scan`: the definition, the kernels, the CPU form, the public op, the carried state."""

import math
import sys
import types
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import xt_kernels as xk
from xt_kernels import reference
from xt_kernels.selective_scan import eager, ops
from xt_kernels.testing import (
    GpuCase,
    assert_no_worse,
    check_mutants,
    honest_interpreter,
    make,
    sparse,
    with_gaps,
)

pytest.importorskip("triton")
from xt_kernels.selective_scan import kernels

LOW = [torch.float16, torch.bfloat16, torch.float32]
INPUTS = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"]
NAMES = ["out", "last_state", *INPUTS]
SMALL = kernels.Config(8, 2)
TINY = kernels.Config(2, 4)
CHUNK = 4  # of the kernels here; short sequences then span several

# batch, D, N, L, groups
SHAPES = [(1, 13, 12, 11, 1), (2, 12, 5, 8, 2), (1, 7, 16, 7, 1)]


def inputs(shape, dtype, device="cpu", kind="normal", seed=0):
    """The op's tensors in the order of INPUTS, and their fp64 copies."""
    batch, dim, states, length, groups = shape
    wide = torch.promote_types(dtype, torch.float32)
    channels, projection = (batch, dim, length), (batch, groups, states, length)
    sizes = {
        "u": channels,
        "delta": channels,
        "A": (dim, states),
        "B": projection,
        "C": projection,
        "D": (dim,),
        "z": channels,
        "delta_bias": (dim,),
        "initial_state": (batch, dim, states),
    }
    low, exact = [], []
    for i, (name, size) in enumerate(sizes.items()):
        of = dtype if name in ("u", "delta", "B", "C", "z") else wide
        one, two = make(size, of, seed + i, device, kind if name in ("u", "B", "C") else "normal")
        if name == "A":
            one, two = -one.abs() * 2, -two.abs() * 2
        low.append(one)
        exact.append(two)
    return low, exact


def grads_of(shape, dtype, device="cpu"):
    """Gradients of out and of the last state, and their fp64 copies."""
    batch, dim, states, length, _ = shape
    out = make((batch, dim, length), dtype, 20, device)
    wide = torch.promote_types(dtype, torch.float32)
    last = make((batch, dim, states), wide, 21, device)
    return [out[0], last[0]], [out[1], last[1]]


def results(function, tensors, grads, **options):
    """(out, last state, gradients of tensors) by autograd."""
    tensors = [t if t is None else t.detach().requires_grad_() for t in tensors]
    out, last = function(*tensors, **options)
    loss = (out * grads[0]).sum() + (last * grads[1]).sum()
    wanted = [t for t in tensors if t is not None]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [out.detach(), last.detach(), *found]


def form(function):
    def call(*tensors, delta_softplus=True):
        return function(
            *tensors[:8], delta_softplus, return_last_state=True, initial_state=tensors[8]
        )

    return call


dense, public = form(reference.selective_scan), form(xk.selective_scan)


def pairs(u, delta, A, B, C, D, z, bias, start, delta_softplus=True):
    """h_t = exp(A s_t) h_0 + sum_{j <= t} exp(A (s_t - s_j)) d_j u_j B_j, s the sum of d; O(L^2).

    exp is exp2 with log2(e) folded into A, as in mamba_ssm's CUDA kernel.
    """
    dtype, wide, (_, dim, length) = u.dtype, A.dtype, u.shape
    u, delta = u.to(wide), delta.to(wide)
    A = A * math.log2(math.e)
    b, c = (t.to(wide).repeat_interleave(dim // t.shape[1], 1) for t in (B, C))  # [B, D, N, L]
    step = delta if bias is None else delta + bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    total = step.cumsum(-1)
    seen = torch.ones(length, length, dtype=torch.bool, device=u.device).tril()
    between = (total[..., :, None] - total[..., None, :]) * seen  # [B, D, t, j]
    decay = (A[:, :, None, None] * between[:, :, None]).exp2() * seen  # [B, D, N, t, j]
    states = (decay @ ((step * u)[:, :, None] * b)[..., None])[..., 0]
    if start is not None:
        states = states + (A[..., None] * total[:, :, None]).exp2() * start[..., None]
    out = (states * c).sum(2)
    out = out if D is None else out + D[:, None] * u
    out = out if z is None else out * F.silu(z.to(wide))
    return out.to(dtype), states[..., -1]


def by_kernel(tensors, grads, *, softplus=True, config=SMALL, segments=1, chunk=CHUNK):
    """(out, last state, gradients) by the kernels, on a GPU or interpreted."""
    configs = config if isinstance(config, tuple) else (config, config)
    out, last, kept = kernels.launch_forward(*tensors, softplus, True, chunk, configs[0], segments)
    found = kernels.launch_backward(*tensors, kept, *grads, softplus, chunk, configs[1], segments)
    return [out, last, *found]


def references(low, wide, grads, wide_grads, **options):
    """(plain, truth) of each result; plain is the further of PyTorch's two forms from the truth.

    In fp32 both are off by the order of few sums alone; which is nearer varies.
    """
    truth = results(dense, wide, wide_grads, **options)
    forms = (dense, pairs) if 0 < low[0].shape[2] <= 32 else (dense,)
    plains = [results(form, low, grads, **options) for form in forms]
    found = []
    for exact, *several in zip(truth, *plains, strict=True):
        errors = [(plain.double() - exact).abs().sum() for plain in several]
        found.append((several[errors.index(max(errors))], exact))
    return found


def no_worse(ours, low, *others, **options):
    """Each of ours is about as near the truth as plain PyTorch."""
    names = NAMES[:2] + [name for name, t in zip(INPUTS, low, strict=True) if t is not None]
    pairs_ = references(low, *others, **options)
    for name, mine, (plain, exact) in zip(names, ours, pairs_, strict=True):
        assert_no_worse(mine, plain.to(mine.dtype), exact, name)


def close(ours, truth):
    """Equal to the default precision of `torch.testing` for the dtype of ours."""
    assert len(ours) == len(truth)
    for name, mine, exact in zip(NAMES, ours, truth, strict=False):
        torch.testing.assert_close(mine, exact.to(mine.dtype), msg=lambda m, name=name: name + m)


# 1. Is the definition right?


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_definition_is_the_sum_over_all_tokens_before(shape):
    _, wide = inputs(shape, torch.float64)
    grads, _ = grads_of(shape, torch.float64)
    close(results(dense, wide, grads), results(pairs, wide, grads))


def test_the_definition_without_options_is_a_running_sum():
    u = torch.arange(1.0, 6)[None, None]
    ones = torch.ones(1, 1, 5)
    out = reference.selective_scan(u, ones, torch.zeros(1, 1), ones, ones)
    assert out.tolist() == [[[1, 3, 6, 10, 15]]]


# 2. Is the kernel as right as plain PyTorch?


@pytest.mark.parametrize(
    ("shape", "segments"), [(SHAPES[0], 1), (SHAPES[0], 3), (SHAPES[1], 2), (SHAPES[2], 1)]
)
@pytest.mark.parametrize("dtype", LOW)
def test_kernels_are_no_worse_than_eager(honest, poisoned_empty, device, dtype, shape, segments):
    low, wide = inputs(shape, dtype, device)
    grads, wide_grads = grads_of(shape, dtype, device)
    no_worse(by_kernel(low, grads, segments=segments), low, wide, grads, wide_grads)


def every_config():
    tables = (kernels.FORWARD, kernels.BACKWARD, kernels.BACKWARD_ANY)
    for number, table in enumerate(tables):
        place = min(number, 1)
        for states, found in table.items():
            for config in found:
                name = f"{('fwd', 'bwd', 'any')[number]}-{states}-{config.channels}x{config.tokens}"
                yield pytest.param(place, states, config, id=name)


@pytest.mark.parametrize(("place", "states", "config"), list(every_config()))
def test_every_config(honest, device, place, states, config):
    # A tile of channels and one more; two chunks of tokens and one token more.
    shape = (1, config.channels + 1, states, 2 * config.tokens + 1, 1)
    configs = tuple(config if i == place else kernels.Config(32, config.tokens) for i in range(2))
    low, wide = inputs(shape, torch.bfloat16, device)
    grads, wide_grads = grads_of(shape, torch.bfloat16, device)
    ours = by_kernel(low, grads, config=configs, segments=2, chunk=config.tokens)
    no_worse(ours, low, wide, grads, wide_grads)


@pytest.mark.parametrize("softplus", [False, True])
def test_options_can_be_left_out(honest, poisoned_empty, device, softplus):
    """D, z, bias and the initial state, each alone and all."""
    low, wide = inputs(SHAPES[2], torch.float32, device)
    grads, wide_grads = grads_of(SHAPES[2], torch.float32, device)
    if not softplus:  # negative steps would let states grow
        low[1], wide[1] = low[1].abs(), wide[1].abs()
        low[7], wide[7] = low[7].abs(), wide[7].abs()
    for left in ((5,), (6,), (7,), (8,), (5, 6, 7, 8)):
        some, exact = ([None if i in left else t for i, t in enumerate(ts)] for ts in (low, wide))
        truth = results(dense, exact, wide_grads, delta_softplus=softplus)
        for segments in (1, 2)[len(left) == 1 :]:
            close(by_kernel(some, grads, softplus=softplus, segments=segments), truth)
        close(results(public, some, grads, delta_softplus=softplus), truth)


def test_the_bound_sees_planted_faults(honest, device):
    """A lost carry, a start that is not there, a wrong sign, a lost gradient of the last state."""
    low, wide = inputs(SHAPES[0], torch.bfloat16, device)
    grads, wide_grads = grads_of(SHAPES[0], torch.bfloat16, device)
    good = by_kernel(low, grads)
    no_worse(good, low, wide, grads, wide_grads)
    zero = torch.zeros_like(low[8])
    faults = [
        by_kernel([*low[:8], zero], grads),
        by_kernel([*low[:2], -low[2] / 2, *low[3:]], grads),
        by_kernel(low, [grads[0], torch.zeros_like(grads[1])]),
        [*good[:2], good[2] * 1.02, *good[3:]],
        [*good[:5], good[5].roll(1, -1), *good[6:]],
        [good[0], good[1].flip(1), *good[2:]],
    ]
    for bad in faults:
        with pytest.raises(AssertionError):
            no_worse(bad, low, wide, grads, wide_grads)


def test_tiny_steps_keep_their_precision(honest, device):
    """softplus(-12) = 6e-6: log(1 + x) would lose 1 % there."""
    low, _ = inputs((1, 2, 2, 4, 1), torch.float32, device)
    low = [t - 12 if i == 1 else t for i, t in enumerate(low)]
    low[5:] = [None] * 4
    truth = dense(*(t if t is None else t.double() for t in low))[0]
    out = kernels.launch_forward(*low, True, False, CHUNK, SMALL)[0]
    # exp(-12) is known to 12 roundings of its argument.
    assert ((out - truth).abs() <= 16 * torch.finfo(torch.float32).eps * truth.abs().max()).all()


def test_kernels_repeat_bit_by_bit_in_any_order_of_programs(device):
    if device == "cuda":
        pytest.skip("test_the_public_op_on_a_gpu does this")
    low, _ = inputs(SHAPES[1], torch.bfloat16)
    grads, _ = grads_of(SHAPES[1], torch.bfloat16)
    found = []
    for seed in (1, 2):
        with honest_interpreter(shuffle_seed=seed):
            found.append(by_kernel(low, grads, segments=2))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# On a CPU without the interpreter.

# More than a chunk; several rows, so that the largest error is not that of a few sums.
LONG = (2, 24, 16, 520, 2)


@pytest.mark.parametrize("one_by_one", [1, 2**30], ids=["one by one", "tree"])
@pytest.mark.parametrize("shape", [*SHAPES, LONG])
@pytest.mark.parametrize("dtype", LOW)
def test_the_cpu_form_is_no_worse_than_the_definition(dtype, shape, one_by_one, monkeypatch):
    monkeypatch.setattr(eager, "_ONE_BY_ONE", one_by_one)
    low, wide = inputs(shape, dtype)
    grads, wide_grads = grads_of(shape, dtype)
    no_worse(results(public, low, grads), low, wide, grads, wide_grads)


def test_the_cpu_form_over_many_chunks(monkeypatch):
    monkeypatch.setattr(eager, "_ELEMENTS", 1)
    _, wide = inputs((2, 4, 3, 71, 2), torch.float64)
    grads, _ = grads_of((2, 4, 3, 71, 2), torch.float64)
    close(results(public, wide, grads), results(dense, wide, grads))


def most_held(run):
    """Bytes that `run` holds at once, at most."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_memory_on_a_cpu_is_that_of_a_chunk():
    """A tensor of a chunk's states is 4 MiB; the op must not hold the 128 MiB of all tokens."""
    low, _ = inputs((1, 512, 16, 4096, 1), torch.float32)
    whole = 512 * 16 * 4096 * 4
    most = most_held(lambda: public(*low))
    assert low[0].nbytes <= most < low[0].nbytes + whole / 4
    tensors = [t.requires_grad_() for t in low]
    out, last = public(*tensors)
    loss = out.sum() + last.sum()
    most = most_held(lambda: torch.autograd.grad(loss, tensors))
    grads = sum(t.nbytes for t in low)
    assert grads <= most < grads + low[0].nbytes + whole / 4


@pytest.mark.parametrize("length", [1, 2, 70])
def test_tokens_one_by_one_in_one_call_and_in_a_loop(monkeypatch, length):
    """PyTorch that took the tensors of a call in another order would be noticed, and not asked."""
    shape = (2, 160, 16, length, 2)
    low, _ = inputs(shape, torch.float32)
    assert 2 * 160 * 16 >= eager._ONE_BY_ONE and eager._is_in_order()
    tensors = [t.requires_grad_() for t in low]

    def run():
        out, last = public(*tensors)
        loss = out.square().sum() + last.square().sum()
        return [out, last, *torch.autograd.grad(loss, tensors)]

    def out_of_order(sums, factors, others):
        for a, b, c in reversed(list(zip(sums, factors, others, strict=True))):
            a.addcmul_(b, c)

    found = run()
    monkeypatch.setattr(torch, "_foreach_addcmul_", out_of_order)
    eager._is_in_order.cache_clear()
    assert not eager._is_in_order()
    assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))
    eager._is_in_order.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_on_a_cpu_is_right_to_a_few_roundings(dtype):
    from decimal import Decimal, localcontext

    x = torch.cat([torch.linspace(-80, 80, 641), torch.logspace(-30, 0, 61)]).to(dtype)
    with localcontext(prec=60):
        exact = [(1 + Decimal(v).exp()).ln() for v in x.tolist()]
        found = [Decimal(v) for v in eager._softplus(x).tolist()]
        worst = max(abs(a - b) / b for a, b in zip(found, exact, strict=True))
    assert worst <= 4 * torch.finfo(dtype).eps
    edges = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30], dtype=dtype)
    expected = torch.tensor([math.inf, 0, math.nan, 1e30, 0], dtype=dtype)
    torch.testing.assert_close(eager._softplus(edges), expected, rtol=0, atol=0, equal_nan=True)


# 3. Are the gradients the derivatives, and is a split the same as one call?


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck(groups, softplus):
    _, wide = inputs((2, 2, 2, 5, groups), torch.float64)
    tensors = [t.requires_grad_() for t in wide]
    assert torch.autograd.gradcheck(
        lambda *t: public(*t, delta_softplus=softplus), tensors, fast_mode=True
    )


class ByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, segments, *tensors):
        out, last, kept = kernels.launch_forward(*tensors, True, True, 4, SMALL, segments)
        ctx.save_for_backward(*tensors, kept)
        ctx.segments = segments
        return out, last

    @staticmethod
    def backward(ctx, *grads):
        found = kernels.launch_backward(*ctx.saved_tensors, *grads, True, 4, SMALL, ctx.segments)
        return None, *found


@pytest.mark.parametrize("segments", [1, 2])
def test_gradcheck_of_the_kernels(device, segments):
    if device == "cuda":
        pytest.skip("fp64 is for the interpreter")
    _, wide = inputs((1, 2, 2, 7, 1), torch.float64)
    tensors = [t.requires_grad_() for t in wide]
    with honest_interpreter():
        assert torch.autograd.gradcheck(
            lambda *t: ByKernel.apply(segments, *t), tensors, fast_mode=True
        )


def test_a_second_derivative_fails_clearly():
    low, _ = inputs(SHAPES[0], torch.float32)
    u = low[0].requires_grad_()
    (grad,) = torch.autograd.grad((public(*low)[0] ** 2).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan_bwd"):
        grad.sum().backward()


def in_pieces(scan, cuts):
    """`scan` over the pieces between cuts, each from the last state of the one before."""

    def call(u, delta, A, B, C, D, z, bias, state):
        outs = []
        for begin, end in pairwise(cuts):
            part = slice(begin, end)
            gate = None if z is None else z[..., part]
            out, state = scan(
                u[..., part], delta[..., part], A, B[..., part], C[..., part], D, gate, bias, state
            )
            outs.append(out)
        return torch.cat(outs, -1), state

    return call


def cuts_of(pieces, length, seed):
    """Random places, some pieces empty."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(length + 1, (pieces - 1,), generator=generator).sort().values.tolist()
    return [0, *inner, length]


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 16, 33, 64])
def test_any_split_equals_one_call(pieces):
    shape = (2, 6, 4, 150, 2)
    low, wide = inputs(shape, torch.bfloat16)
    grads, wide_grads = grads_of(shape, torch.bfloat16)
    split = in_pieces(public, cuts_of(pieces, 150, pieces))
    close(results(split, wide, wide_grads), results(public, wide, wide_grads))
    ours = results(split, low, grads)
    # Gradients of inputs that all pieces share are summed by autograd, in fp32.
    no_worse(ours, low, wide, grads, wide_grads)


@pytest.mark.parametrize("pieces", [2, 5])
def test_any_split_of_the_kernels_equals_one_call(device, pieces):
    shape = (1, 3, 2, 11, 1)
    low, wide = inputs(shape, torch.float32, device)
    grads, wide_grads = grads_of(shape, torch.float32, device)

    def scan(*tensors):
        return ByKernel.apply(1, *tensors)

    split = in_pieces(scan, cuts_of(pieces, 11, pieces))
    if device == "cuda":
        no_worse(results(split, low, grads), low, wide, grads, wide_grads)
        return
    with honest_interpreter():
        whole, parts = results(scan, wide, wide_grads), results(split, wide, wide_grads)
    close(parts, whole)
    close(parts, results(dense, wide, wide_grads))


# 4. Is it a good citizen?


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype, full):
    low, _ = inputs(SHAPES[1], dtype, device)
    grads, _ = grads_of(SHAPES[1], dtype, device)
    if not full:
        low[5:] = [None] * 4
    wanted = [t if t is None else t.clone().requires_grad_() for t in low]
    torch.library.opcheck(ops.forward, (*wanted, True, True))
    kept = ops.forward(*low, True, True)[2]
    torch.library.opcheck(ops.backward, (*low, kept, *grads, True))
    torch.library.opcheck(ops.backward, (*low, kept, grads[0], None, False))


def test_compile_without_graph_break(device):
    low, _ = inputs(SHAPES[1], torch.float32, device)

    def layer(*tensors):
        out, last = public(tensors[0] * 2, *tensors[1:])
        return out.sin(), last.cos()

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    grads = [torch.ones((), device=device)] * 2
    for ours, plain in zip(results(compiled, low, grads), results(layer, low, grads), strict=True):
        torch.testing.assert_close(ours, plain)


def test_without_gradient_no_states_are_kept(monkeypatch):
    low, _ = inputs(SHAPES[0], torch.float32)
    kept = []
    original = ops.forward

    def spy(*arguments):
        found = original(*arguments)
        kept.append(found[2].shape[1])
        return found

    monkeypatch.setattr(ops, "forward", spy)
    public(*low)
    low[0].requires_grad_()
    public(*low)
    with torch.no_grad():
        public(*low)
    assert kept == [0, 1, 0]


def test_autocast_casts_first(device):
    low, _ = inputs(SHAPES[0], torch.float32, device)
    low[1] = low[1].to(torch.bfloat16)
    u = low[0].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out, last = public(*low)
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    out.sum().backward()
    assert u.grad.dtype == torch.float32
    cast = [t.to(torch.bfloat16) if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(low)]
    assert torch.equal(out, public(*cast)[0])


def test_strides_of_every_kind_and_inputs_untouched(honest, poisoned_empty, device):
    low, wide = inputs(SHAPES[1], torch.bfloat16, device)
    grads, wide_grads = grads_of(SHAPES[1], torch.bfloat16, device)
    gaps, gap_grads = [with_gaps(t) for t in low], [with_gaps(t) for t in grads]
    for segments in (1, 2):
        ours = by_kernel(gaps, gap_grads, segments=segments)
        no_worse(ours, low, wide, grads, wide_grads)
    no_worse(results(public, gaps, gap_grads), low, wide, grads, wide_grads)
    channels_last = [t.mT.contiguous().mT if t.dim() > 1 else t for t in low]
    no_worse(by_kernel(channels_last, grads), low, wide, grads, wide_grads)
    expanded = [grads[0][:1, :1, :1].expand_as(grads[0]), grads[1]]
    truth = [expanded[0].double(), wide_grads[1]]
    no_worse(by_kernel(low, expanded), low, wide, expanded, truth)
    for kept, tensor in zip([*gaps, *gap_grads], [*low, *grads], strict=True):
        assert torch.equal(kept, tensor)


def test_b_and_c_need_no_group_axis():
    low, _ = inputs(SHAPES[0], torch.float32)
    squeezed = [t[:, 0] if i in (3, 4) else t for i, t in enumerate(low)]
    for a, b in zip(public(*low), public(*squeezed), strict=True):
        assert torch.equal(a, b)


def test_in_pieces_are_rows_that_the_compiler_knows_to_be_aligned():
    """Triton knows of a stride that 16 divides it, in elements, and of nothing else."""
    base = torch.zeros(2, 3, 64, dtype=torch.bfloat16)
    assert kernels._in_pieces(base) and kernels._in_pieces(base[:, 1:, :48])
    assert kernels._in_pieces(base[..., 8:])  # 16 bytes in
    assert not kernels._in_pieces(base[..., 4:])
    assert not kernels._in_pieces(base[..., ::2])
    assert not kernels._in_pieces(base.mT)
    assert not kernels._in_pieces(torch.zeros(2, 3, 24, dtype=torch.bfloat16))  # rows of 48 bytes
    assert not kernels._in_pieces(torch.zeros(2, 3, 63))
    odd = torch.zeros(2, 3, 40)
    assert kernels.backward_table(base, base) is kernels.BACKWARD
    assert kernels.backward_table(base, odd) is kernels.BACKWARD_ANY


# 5. Edges


@pytest.mark.parametrize("length", [0, 1, 2, CHUNK, CHUNK + 1, 15, 16, 17])
def test_lengths(honest, poisoned_empty, device, length):
    shape = (1, 3, 2, length, 1)
    low, wide = inputs(shape, torch.float32, device)
    grads, wide_grads = grads_of(shape, torch.float32, device)
    truth = results(dense, wide, wide_grads)
    close(by_kernel(low, grads, segments=3), truth)
    close(results(public, low, grads), truth)
    if not length:
        assert torch.equal(public(*low)[1], low[8])
        assert not public(*low[:8], None)[1].any()


def test_no_batch_and_no_channels(device):
    for shape in [(0, 4, 2, 5, 1), (2, 0, 2, 5, 1)]:
        low, _ = inputs(shape, torch.float32, device)
        found = results(public, low, [torch.ones((), device=device)] * 2)
        assert [f.shape for f in found[2:]] == [t.shape for t in low]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_channel_and_batch_item(honest, device, value):
    shape = (2, 6, 2, 9, 1)
    low, _ = inputs(shape, torch.float32, device)
    grads, _ = grads_of(shape, torch.float32, device)
    clean = by_kernel(low, grads), results(public, low, grads)
    low[0][1, 2, 4] = value
    for before, after in zip(
        clean, (by_kernel(low, grads), results(public, low, grads)), strict=True
    ):
        assert not after[0][1, 2, 4:].isfinite().any()
        after[0][1, 2, 4:] = before[0][1, 2, 4:]
        after[1][1, 2] = before[1][1, 2]
        for a, b in zip(after[:2], before[:2], strict=True):
            torch.testing.assert_close(a, b)
        for name in ("u", "delta", "B", "initial_state"):
            i = NAMES.index(name)
            torch.testing.assert_close(after[i][0], before[i][0])


def test_extreme_steps(honest, device):
    """Steps that forget everything at once: no NaN."""
    low, wide = inputs((1, 2, 2, 12, 1), torch.float32, device)
    low[1][..., ::3], wide[1][..., ::3] = 1e4, 1e4
    grads, wide_grads = grads_of((1, 2, 2, 12, 1), torch.float32, device)
    no_worse(by_kernel(low, grads), low, wide, grads, wide_grads)
    no_worse(results(public, low, grads), low, wide, grads, wide_grads)


STEPS = (2**30 + 1, 2**30 + 4, 2**29 + 16, 2**28 + 1024)


def far(values):
    """The same values in sparse memory, under strides of 2**28 to 2**30 elements."""
    view = sparse(values.shape, STEPS[: values.dim()], values.dtype)
    view.copy_(values)
    return view


@pytest.mark.skipif(torch.cuda.is_available(), reason="sparse memory is for the interpreter")
class TestOffsetsPast2To31:
    """Every product of an index and a stride passes 2**31 with both factors below it."""

    # Nine states, so that the last one's offset passes at a stride of 2**28; two chunks.
    shape = (3, 3, 9, 5, 3)

    @pytest.fixture(autouse=True)
    def far_results(self, monkeypatch):
        monkeypatch.setattr(kernels, "_like", lambda t: sparse(t.shape, STEPS[:3], t.dtype))
        monkeypatch.setattr(
            kernels, "_wide", lambda A, *shape: sparse(shape, STEPS[: len(shape)], A.dtype)
        )
        monkeypatch.setattr(
            kernels, "_scratch", lambda A, *shape: sparse(shape, (2**30, 1), A.dtype)
        )
        low, _ = inputs(self.shape, torch.float32)
        grads, _ = grads_of(self.shape, torch.float32)
        self.near, self.expected = low, results(dense, low, grads)
        # The launcher makes vectors contiguous.
        self.low = [t if t.dim() == 1 else far(t) for t in low]
        self.grads = [far(t) for t in grads]

    def forward(self, segments):
        with honest_interpreter():
            found = kernels.launch_forward(*self.low, True, True, CHUNK, TINY, segments)
        close([t.clone() for t in found[:2]], self.expected[:2])
        if segments == 1:
            # The state before the second chunk: where the first four tokens end.
            first = [t[..., :4] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(self.near)]
            torch.testing.assert_close(found[2][:, 1].mT.clone(), dense(*first)[1])

    def backward(self, segments):
        with honest_interpreter():
            found = by_kernel(self.low, self.grads, segments=segments, config=TINY)
        close([t.clone() for t in found], self.expected)

    def test_forward(self):
        name = "_selective_scan_fwd_kernel"
        assert check_mutants(kernels, name, lambda: self.forward(1)) >= 8

    def test_segments(self):
        name = "_selective_scan_segment_kernel"
        assert check_mutants(kernels, name, lambda: self.backward(2)) >= 5

    def test_carry(self):
        name = "_selective_scan_carry_kernel"
        assert check_mutants(kernels, name, lambda: self.forward(2)) >= 3

    def test_backward(self):
        name = "_selective_scan_bwd_kernel"
        assert check_mutants(kernels, name, lambda: self.backward(1)) >= 15


# 6. Does it refuse well?

U, P, STATE = torch.zeros(2, 6, 5), torch.zeros(2, 4, 5), torch.zeros(2, 6, 4)
G = P[:, None].expand(-1, 3, -1, -1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"u": U[0]}, r"u must be \[B, D, L\], got shape \[6, 5\]"),
        ({"u": U.to("meta")}, "u must be on a cpu or cuda device, got meta"),
        ({"u": U.int()}, "u must be of dtype float16, .* got int32"),
        ({"delta": U[..., :4]}, r"delta must be \[B, D, L\] = \[2, 6, 5\], got \[2, 6, 4\]"),
        ({"delta": U.half()}, "delta must be of dtype float32 for u in float32, got float16"),
        ({"A": torch.zeros(6, 4, dtype=torch.complex64)}, "A must be real: complex .* complex64"),
        ({"A": torch.zeros(4, 6)}, r"A must be \[D, N\] = \[6, \*\], got \[4, 6\]"),
        ({"A": torch.zeros(6, 4).half()}, "A must be of dtype float32 for u in float32"),
        ({"A": torch.zeros(6, 65)}, "A must have 1 to 64 states N a channel, got 65"),
        ({"B": torch.zeros(6, 4)}, r"B must vary over tokens, .* got shape \[6, 4\]"),
        ({"B": P[:, :3]}, r"B must be \[B, N, L\] = \[2, 4, 5\], got \[2, 3, 5\]"),
        ({"C": G[:, :, :3]}, r"C must be \[B, G, N, L\] = \[2, \*, 4, 5\], got \[2, 3, 3, 5\]"),
        ({"B": G}, "C must have the groups of B = 3, got 1"),
        (
            {"B": G[:, :1].expand(-1, 4, -1, -1)},
            "B must have a number of groups that divides D = 6, got 4",
        ),
        ({"D": torch.zeros(5)}, r"D must be \[D\] = \[6\], got \[5\]"),
        ({"delta_bias": torch.zeros(6).half()}, "delta_bias must be of dtype float32"),
        ({"z": U.to("meta")}, "z must be on the device of u = cpu, got meta"),
        (
            {"initial_state": STATE.mT},
            r"initial_state must be \[B, D, N\] = \[2, 6, 4\], got \[2, 4, 6\]",
        ),
        ({"initial_state": STATE.half()}, "initial_state must be of dtype float32 for u"),
        ({"backend": "cuda"}, "backend must be one of xt, mamba_ssm, got 'cuda'"),
        (
            {"backend": "mamba_ssm", "initial_state": STATE},
            'initial_state must be None with backend="mamba_ssm", which takes none',
        ),
        ({"backend": "mamba_ssm"}, 'u must be on a cuda device with backend="mamba_ssm", got cpu'),
    ],
)
def test_refuses(options, message, monkeypatch):
    stub = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    stub.selective_scan_fn = None
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    options = {"u": U, "delta": U, "A": torch.zeros(6, 4), "B": P, "C": P, **options}
    with pytest.raises(ValueError, match=f"^selective_scan: {message}"):
        xk.selective_scan(**options)


# On a GPU: full sizes, shipped configs, determinism


def gpu_cases(device: str, full: bool) -> Iterator[GpuCase]:
    """Launches for `scripts/gpu_run.py`; one batch item of few channels makes several segments."""
    sizes = [(1, 96, 16, 1000, 1), (2, 192, 16, 520, 2), (1, 40, 64, 300, 1)]
    if not full:
        sizes = [(1, 12, 8, 5, 1)]
    for shape in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            low, wide = inputs(shape, dtype, device)
            grads, wide_grads = grads_of(shape, dtype, device)

            def run(config, low=low, grads=grads):
                table = kernels.FORWARD, kernels.BACKWARD
                config = config or tuple(kernels.configs(t, low[2])[0] for t in table)
                chunk = ops.CHUNK if full else 4
                return by_kernel(low, grads, config=config, segments=None, chunk=chunk)

            def expected(low=low, wide=wide, grads=grads, wide_grads=wide_grads):
                return references(low, wide, grads, wide_grads)

            several = [kernels.configs(t, low[2]) for t in (kernels.FORWARD, kernels.BACKWARD)]
            most = max(map(len, several))
            configs = [tuple(c[min(i, len(c) - 1)] for c in several) for i in range(most)]
            yield GpuCase(f"n{shape[2]}-d{shape[1]}-{str(dtype)[6:]}", run, configs, expected)

    # More than 2**31 elements in u, delta, out and their gradients; the last sequences are judged.
    batch, dim, states, length = (16_200, 1024, 8, 130) if full else (3, 12, 8, 5)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size, dtype=torch.bfloat16):
        return torch.randn(size, dtype=dtype, device=device, generator=generator)

    low = [drawn(batch, dim, length) for _ in range(2)]
    low += [-2 * drawn(dim, states, dtype=torch.float32).abs()]
    low += [drawn(batch, 1, states, length) for _ in range(2)] + [None] * 4
    grads = [drawn(batch, dim, length), drawn(batch, dim, states, dtype=torch.float32)]

    def run(config, low=low, grads=grads):
        table = kernels.FORWARD, kernels.BACKWARD
        config = tuple(kernels.configs(t, low[2])[0] for t in table)
        return by_kernel(low, grads, config=config, segments=None, chunk=64 if full else 4)

    def few(outputs):
        # Without the gradient of A, a sum over all sequences.
        return [t[-2:] for i, t in enumerate(outputs) if i != 4]

    def expected(low=low, grads=grads):
        part = [t if t is None or t.dim() == 2 else t[-2:] for t in low]
        ends = [t[-2:] for t in grads]
        wide, wide_ends = ([None if t is None else t.double() for t in x] for x in (part, ends))
        pairs = references(part, wide, ends, wide_ends)
        return [pair for i, pair in enumerate(pairs) if i != 4]

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
    shape = (2, 96, 16, 3000, 1)
    low, wide = inputs(shape, torch.bfloat16, "cuda")
    grads, wide_grads = grads_of(shape, torch.bfloat16, "cuda")
    first = results(public, low, grads)
    no_worse(first, low, wide, grads, wide_grads)
    for _ in range(20):
        again = results(public, low, grads)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    split = in_pieces(public, cuts_of(16, 3000, 0))
    no_worse(results(split, low, grads), low, wide, grads, wide_grads)
