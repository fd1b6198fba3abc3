"""Mamba as context encoder: mamba_ssm's parameters, carried state, gradient through it."""

import math
import subprocess
import sys
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from xt_kernels import selective_scan
from xt_kernels.causal_conv import causal_conv
from xt_models.context_encoder import Memory
from xt_models.mamba import MambaContextEncoder, MambaMixer


def make(depth=2, dtype=torch.float64, dim=16, **options):
    torch.manual_seed(0)
    return MambaContextEncoder(dim, depth, d_state=4, **options).to(dtype).eval()


def pieces(lengths, batch=2, dim=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, n, dim, dtype=torch.float64, generator=generator) for n in lengths]


def run(encoder, chunks):
    memory, outs = None, []
    for chunk in chunks:
        out, memory = encoder(chunk, memory)
        outs.append(out)
    return outs, memory


# The convolution


@pytest.mark.parametrize("cuts", [[0, 9], [0, 4, 9], [0, 1, 2, 2, 9], [0, 0, 9]])
def test_the_convolution_in_parts_is_the_whole(cuts):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    whole = F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=3))
    state, outs = None, []
    for begin, end in pairwise(cuts):
        out, state = causal_conv(x[..., begin:end], weight, bias, state, silu=True)
        outs.append(out)
    parts = torch.cat(outs, -1)
    torch.testing.assert_close(parts, whole)
    assert torch.equal(state, x[..., -3:])
    for a, b in zip(
        *(torch.autograd.grad(t.square().sum(), x) for t in (parts, whole)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 4)}, r"x must be \[B, D, L\]"),
        ({"weight": torch.zeros(4, 2)}, r"weight must be \[D, K\] = \[3, \*\], got \[4, 2\]"),
        ({"bias": torch.zeros(4)}, r"bias must be \[D\] = \[3\], got \[4\]"),
        ({"state": torch.zeros(2, 3, 4)}, r"state must be \[B, D, K - 1\] = \[2, 3, 3\], got"),
        ({"x": torch.zeros(2, 3, 5).int()}, "x must be of dtype float16, .* got int32"),
        ({"weight": torch.zeros(3, 0)}, "weight must have a width K of at least 1, got 0"),
        (
            {"weight": torch.zeros(3, 4).double()},
            "weight must be of dtype float32 for x in float32, got float64",
        ),
        ({"bias": torch.zeros(3).half()}, "bias must be of dtype float32 for x .* got float16"),
        (
            {"state": torch.zeros(2, 3, 3).half()},
            "state must be of dtype float32 for x in float32, got float16",
        ),
        ({"weight": torch.zeros(3, 4, device="meta")}, "weight must be on the device of x = cpu"),
    ],
)
def test_the_convolution_refuses(change, message):
    given = {"x": torch.zeros(2, 3, 5), "weight": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=f"^causal_conv: {message}"):
        causal_conv(**given)


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 5), (2, 0, 5)])
def test_a_convolution_over_nothing(shape):
    batch, dim, length = shape
    state = torch.randn(batch, dim, 3)
    out, last = causal_conv(torch.zeros(shape), torch.zeros(dim, 4), torch.zeros(dim), state)
    assert list(out.shape) == [batch, dim, length]
    assert torch.equal(last, torch.cat([state, torch.zeros(shape)], -1)[..., length:])


def test_the_convolution_under_autocast():
    torch.manual_seed(0)
    given = torch.randn(2, 3, 9), torch.randn(3, 4), torch.randn(3), torch.randn(2, 3, 3)
    low = [t.bfloat16() for t in given]
    with torch.autocast("cpu", torch.bfloat16):
        out, last = causal_conv(low[0], *given[1:])
    for a, b in zip((out, last), causal_conv(*low), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b)


class Package:
    """causal_conv1d_fn with the checks of the package's C++ and Python, computed by PyTorch."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
        self.calls += 1
        batch, dim, length = x.shape
        floats = torch.float16, torch.bfloat16, torch.float32
        assert activation in (None, "silu", "swish")
        assert x.dtype in floats and weight.dtype in floats
        assert x.stride(2) == 1 or x.stride(1) == 1
        assert list(weight.shape) == [dim, weight.shape[1]] and 2 <= weight.shape[1] <= 4
        if is_channel_last := x.stride(1) == 1 and x.stride(2) > 1:
            assert dim % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
        elif length * x.element_size() % 16 == 0:  # it then loads 16 bytes at a time
            steps = x.data_ptr(), *(s * x.element_size() for s in x.stride()[:2])
            assert all(step % 16 == 0 for step in steps)
        if bias is not None:
            assert bias.dtype == weight.dtype and list(bias.shape) == [dim] and bias.stride(0) == 1
        before = x.new_zeros(batch, dim, weight.shape[1] - 1)
        if initial_states is not None:
            assert is_channel_last and initial_states.dtype == x.dtype
            assert initial_states.shape == before.shape and initial_states.stride(1) == 1
            before = initial_states
        assert batch and dim and length  # a grid of nothing is an error of CUDA
        out = F.conv1d(torch.cat([before, x], -1), weight[:, None].to(x.dtype), bias, groups=dim)
        return out if activation is None else F.silu(out)


@pytest.fixture
def package(monkeypatch):
    """A CPU on which causal-conv1d is there."""
    from xt_kernels import causal_conv as room

    stub = Package()
    monkeypatch.setattr(room, "_package", lambda: stub)
    monkeypatch.setattr(room, "_PACKAGE_DEVICE", "cpu")
    return stub


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("shape", [(1, 64, 1), (2, 64, 1), (2, 6, 5), (1, 9, 16), (3, 8, 64)])
def test_the_package_takes_every_shape(package, shape, with_state):
    batch, dim, _ = shape
    torch.manual_seed(0)
    x = torch.randn(batch, 2 * dim, shape[2], requires_grad=True)
    weight, bias = torch.randn(dim, 4, requires_grad=True), torch.randn(dim)
    state = torch.randn(batch, dim, 3, requires_grad=True) if with_state else None
    wanted = [x, weight] + ([state] if with_state else [])
    found = []
    for layout in ("tokens", "channels"):
        part = x.chunk(2, 1)[0]  # as the mixer has it
        part = part if layout == "tokens" else part.mT.contiguous().mT
        results = causal_conv(part, weight, bias, state, silu=True)
        loss = results[0].square().sum() + results[1].sin().sum()
        found.append([*results, *torch.autograd.grad(loss, wanted)])
    assert package.calls == 2
    before = torch.zeros(batch, dim, 3) if state is None else state
    padded = torch.cat([before, x[:, :dim]], -1)
    out = F.silu(F.conv1d(padded, weight[:, None], bias, groups=dim))
    last = padded[..., -3:]
    loss = out.square().sum() + last.sin().sum()
    expected = [out, last, *torch.autograd.grad(loss, wanted)]
    for ours in found:
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_the_package_is_used_under_autocast_and_never_refuses(package):
    state, weight = torch.randn(2, 6, 3), torch.randn(6, 4)
    x = torch.randn(2, 6, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = causal_conv(x, weight, torch.randn(6), state)
    assert package.calls == 1 and out.dtype == torch.bfloat16
    # What it does not do is PyTorch's.
    causal_conv(x.double(), weight.double())
    causal_conv(x[..., :0], weight.bfloat16())
    for width in (1, 5):
        causal_conv(x, torch.randn(6, width, dtype=torch.bfloat16))
    assert package.calls == 1


def test_a_mixer_with_the_package_is_the_mixer_without(package, monkeypatch):
    from xt_kernels import causal_conv as room

    torch.manual_seed(0)
    mixer, tokens = MambaMixer(12, d_state=4), torch.randn(1, 7, 12)

    def walk():
        state, outs = None, []
        for part in tokens.split([3, 1, 3], 1):
            out, state = mixer(part, state)
            outs.append(out)
        return torch.cat(outs, 1), state

    ours = walk()
    assert package.calls == 3
    monkeypatch.setattr(room, "_PACKAGE_DEVICE", "cuda")
    for a, b in zip(ours, walk(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_package_is_found_where_it_is(monkeypatch):
    from xt_kernels import causal_conv as room

    stub = types.ModuleType("causal_conv1d")
    stub.causal_conv1d_fn = Package()
    for module, expected in ((None, None), (stub, stub.causal_conv1d_fn)):
        monkeypatch.setitem(sys.modules, "causal_conv1d", module)
        room._package.cache_clear()
        assert room._package() is expected
    room._package.cache_clear()


# The mixer


def test_parameters_are_those_of_mamba_ssm():
    """Names, shapes and first values of mamba_ssm.Mamba(768)."""
    torch.manual_seed(0)
    mixer = MambaMixer(768)
    assert {name: list(value.shape) for name, value in mixer.state_dict().items()} == {
        "A_log": [1536, 16],
        "D": [1536],
        "in_proj.weight": [3072, 768],
        "conv1d.weight": [1536, 1, 4],
        "conv1d.bias": [1536],
        "x_proj.weight": [80, 1536],
        "dt_proj.weight": [1536, 48],
        "dt_proj.bias": [1536],
        "out_proj.weight": [768, 1536],
    }
    assert torch.equal(mixer.A_log[5].exp().round(), torch.arange(1.0, 17))
    assert (mixer.D == 1).all()
    step = F.softplus(mixer.dt_proj.bias)
    assert 0.001 <= step.min() < 0.0011 and 0.09 < step.max() <= 0.1001
    assert mixer.dt_proj.weight.abs().max() <= 48**-0.5


class PublishedMamba(torch.nn.Module):
    """The parameters of mamba_ssm.Mamba in its published layout, and its first token by hand."""

    def __init__(self, d_model, inner, rank, states, width):
        super().__init__()
        shapes = {
            "A_log": (inner, states),
            "D": (inner,),
            "in_proj.weight": (2 * inner, d_model),
            "conv1d.weight": (inner, 1, width),
            "conv1d.bias": (inner,),
            "x_proj.weight": (rank + 2 * states, inner),
            "dt_proj.weight": (inner, rank),
            "dt_proj.bias": (inner,),
            "out_proj.weight": (d_model, inner),
        }
        for name, shape in shapes.items():
            *path, last = name.split(".")
            for part in path:
                if not hasattr(self, part):
                    self.add_module(part, torch.nn.Module())
            home = getattr(self, path[0]) if path else self
            home.register_parameter(last, torch.nn.Parameter(torch.randn(shape) / 4))

    def forward(self, token):
        """The first token of a sequence, `[C]`: the state before it is zero."""
        x, z = (self.in_proj.weight @ token).chunk(2)
        x = F.silu(self.conv1d.weight[:, 0, -1] * x + self.conv1d.bias)
        states = self.A_log.shape[1]
        delta, b, c = self.x_proj.weight.split([self.dt_proj.weight.shape[1], states, states])
        step = F.softplus(self.dt_proj.weight @ (delta @ x) + self.dt_proj.bias)
        y = step * x * ((b @ x) @ (c @ x)) + self.D * x
        return self.out_proj.weight @ (y * F.silu(z))


def test_a_state_dict_loads_both_ways():
    torch.manual_seed(0)
    published, other = (PublishedMamba(24, 48, 2, 5, 3) for _ in range(2))
    mixer, token = MambaMixer(24, d_state=5, d_conv=3), torch.randn(24)
    mixer.load_state_dict(published.state_dict())  # strict: all names, all shapes
    torch.testing.assert_close(mixer(token[None, None])[0][0, 0], published(token))
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(token), published(token))


def test_arguments_are_those_of_mamba_ssm():
    """In the order of its signature; what has no meaning here has no effect."""
    torch.manual_seed(0)
    like = False, 3, "cpu", torch.bfloat16
    mixer = MambaMixer(24, 5, 3, 1.5, 7, 0.01, 0.02, "constant", 2.0, 0.015, False, True, *like)
    assert mixer.in_proj.weight.shape == (72, 24) and mixer.dt_proj.weight.shape == (36, 7)
    assert mixer.conv1d.bias is None and mixer.out_proj.bias is not None
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log.dtype == mixer.D.dtype == torch.float32
    assert (mixer.dt_proj.weight == torch.tensor(2 / math.sqrt(7)).bfloat16()).all()
    step = F.softplus(mixer.dt_proj.bias.float())
    assert 0.0148 <= step.min() and 0.016 < step.max() <= 0.0203
    weight = MambaMixer(24, dt_rank=4, dt_scale=3.0).dt_proj.weight
    assert 1.3 < weight.abs().max() <= 1.5 and weight.min() < 0
    assert MambaMixer(8, device="meta").D.is_meta
    assert MambaMixer(8, dtype=torch.float64).A_log.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 65}, "d_state must be 1 to 64, got 65"),
        ({"d_state": 0}, "d_state must be 1 to 64, got 0"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
        ({"expand": 0.01}, "expand must make d_inner = expand d_model at least 1, got 0.01"),
        ({"dt_rank": "Auto"}, "dt_rank must be \"auto\" or an integer of at least 1, got 'Auto'"),
        ({"dt_rank": 0}, 'dt_rank must be "auto" or an integer of at least 1, got 0'),
        ({"dt_init": "zero"}, "dt_init must be one of random, constant, got 'zero'"),
        ({"backend": "foo"}, "backend must be one of xt, mamba_ssm, got 'foo'"),
    ],
)
def test_the_mixer_refuses_settings(options, message):
    with pytest.raises(ValueError, match=f"^MambaMixer: {message}"):
        MambaMixer(**{"d_model": 16} | options)


def test_the_mixer_refuses_inputs():
    mixer, tokens = MambaMixer(16, d_state=4), torch.zeros(2, 5, 16)
    _, state = mixer(tokens)
    for given, message in (
        ((tokens[0],), r"tokens must be \[B, L, C\] = \[\*, \*, 16\], got \[5, 16\]"),
        ((tokens[..., :8],), r"tokens must be .* got \[2, 5, 8\]"),
        ((tokens[:1], state), r"state must be .* = \[1, 32, 7\], got \[2, 32, 7\]"),
        ((tokens, state[..., 1:]), r"state must be .* = \[2, 32, 7\], got \[2, 32, 6\]"),
        ((tokens, state.bfloat16()), r"state must be torch.float32 on .* got torch.bfloat16"),
        ((tokens, state.to("meta")), r"state must be torch.float32 on .* cpu, got .* on meta"),
    ):
        with pytest.raises(ValueError, match=f"^MambaMixer: {message}"):
            mixer(*given)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", ["residual", "released"])
def test_training_reaches_the_scan_with_tokens_contiguous(monkeypatch, batch, form):
    """Only such tensors get the tuned backward, and only they are read in wide loads."""
    pytest.importorskip("triton")
    from xt_kernels.selective_scan import eager, kernels

    seen = []

    def spy(u, delta, A, B, C, D, z, bias, start, states, grad_out, *rest):
        seen.append(kernels.backward_table(u, delta, B, C, z, grad_out))
        return backward(u, delta, A, B, C, D, z, bias, start, states, grad_out, *rest)

    backward = eager.backward
    monkeypatch.setattr(eager, "backward", spy)
    encoder = MambaContextEncoder(32, 3, form=form, carry=False)
    tokens = torch.randn(batch, 48, 32, requires_grad=True)
    encoder(tokens)[0].square().sum().backward()
    assert len(seen) == 3 and all(table is kernels.BACKWARD for table in seen)


def test_the_mixer_is_the_formula_token_by_token():
    torch.manual_seed(0)
    mixer = MambaMixer(8, d_state=3, bias=True).double()
    tokens = torch.randn(1, 6, 8, dtype=torch.float64)
    out, state = mixer(tokens)
    w = {k: v.detach() for k, v in mixer.state_dict().items()}
    x, z = (tokens[0] @ w["in_proj.weight"].T + w["in_proj.bias"]).chunk(2, 1)  # [L, d_inner]
    h, outs = torch.zeros(16, 3, dtype=torch.float64), []
    for t in range(6):
        window = [x[s] if s >= 0 else torch.zeros_like(x[0]) for s in range(t - 3, t + 1)]
        mixed = sum(w["conv1d.weight"][:, 0, k] * window[k] for k in range(4)) + w["conv1d.bias"]
        a = F.silu(mixed)
        rank, b, c = (w["x_proj.weight"] @ a).split([1, 3, 3])
        step = F.softplus(w["dt_proj.weight"] @ rank + w["dt_proj.bias"])[:, None]
        h = torch.exp(-step * w["A_log"].exp()) * h + step * a[:, None] * b
        y = (h @ c + w["D"] * a) * F.silu(z[t])
        outs.append(w["out_proj.weight"] @ y + w["out_proj.bias"])
    torch.testing.assert_close(out[0], torch.stack(outs))
    torch.testing.assert_close(state[0], torch.cat([h, x[-3:].T], -1))


# The encoder


@pytest.mark.parametrize("lengths", [(1, 2, 30), (11, 11, 11), (0, 33), (5,) * 6 + (3,)])
def test_chunks_equal_the_whole_sequence_in_output_state_and_gradient(lengths):
    encoder = make(gradient="through")
    chunks = [c.requires_grad_() for c in pieces(lengths)]
    outs, memory = run(encoder, chunks)
    whole, last = encoder(torch.cat(chunks, 1))
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(memory.states, last.states, rtol=1e-10, atol=1e-12)
    wanted = [*chunks, *encoder.parameters()]
    both = [
        torch.autograd.grad(out.square().sum() + m.states.sin().sum(), wanted, retain_graph=True)
        for out, m in ((torch.cat(outs, 1), memory), (whole, last))
    ]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_bf16_chunks_are_as_right_as_the_whole():
    exact = make()
    encoder = make(dtype=torch.bfloat16)
    exact.load_state_dict({k: v.double() for k, v in encoder.state_dict().items()})
    tokens = pieces((64,))[0].bfloat16()
    truth = exact(tokens.double())[0]
    whole = encoder(tokens)[0]
    parts = torch.cat(run(encoder, tokens.split(7, 1))[0], 1)
    error, allowed = ((t.double() - truth).abs().mean() for t in (parts, whole))
    assert error <= 1.5 * allowed


@pytest.mark.parametrize("gradient", ["stop", "through", "truncated"])
def test_each_gradient_reaches_the_chunks_it_says(gradient):
    encoder = make(gradient=gradient, gradient_chunks=3)
    chunks = [c.requires_grad_() for c in pieces((4,) * 6)]
    last = run(encoder, chunks)[0][-1]
    grads = torch.autograd.grad(last.sum(), chunks, allow_unused=True)
    first = {"stop": 5, "through": 0, "truncated": 3}[gradient]
    assert [g is not None and bool(g.any()) for g in grads] == [k >= first for k in range(6)]


def test_through_keeps_tokens_and_state_of_a_chunk_only():
    def saved(count):
        encoder = make(depth=3, gradient="through")
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outs, last = run(encoder, pieces((40,) * count))
            loss = sum(out.sum() for out in outs)
        own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        del loss
        boundary = outs[0].nbytes + last.states.nbytes
        return sum(n for at, n in kept.items() if at not in own) / boundary

    few, many = saved(4), saved(12)
    assert (many - few) / 8 <= 1.01, (few, many)


def test_the_state_is_a_value(tmp_path):
    encoder = make()
    chunks = pieces((4, 5))
    _, memory = encoder(chunks[0])
    before = memory.states.clone()
    expected, _ = encoder(chunks[1], memory)
    assert torch.equal(before, memory.states)
    torch.save(memory, tmp_path / "memory.pt")
    loaded = torch.load(tmp_path / "memory.pt", weights_only=True)
    assert isinstance(loaded, Memory) and loaded.equal(memory) and loaded.seen == 1
    assert torch.equal(encoder(chunks[1], loaded)[0], expected)
    assert not memory.states.requires_grad


def test_without_carry_chunks_stand_alone():
    encoder = make(carry=False)
    chunk = pieces((4,))[0]
    out, memory = encoder(chunk)
    assert memory is None and encoder.reach == 0
    torch.testing.assert_close(out, make()(chunk)[0])


def test_the_released_form():
    """norm(x) + mixer(norm(x)), layers 0 and 2 reversed."""
    encoder = make(3, form="released", carry=False)
    x = tokens = pieces((9,))[0]
    for i, layer in enumerate(encoder.layers):
        normed = layer.norm(x)
        order = torch.arange(9) if i % 2 else torch.arange(8, -1, -1)
        x = normed + layer.mixer(normed[:, order])[0][:, order]
    torch.testing.assert_close(encoder(tokens)[0], x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"form": "post"}, "form must be one of residual, released, got 'post'"),
        ({"gradient": None}, "gradient must be one of stop, through, truncated, got None"),
        ({"gradient_chunks": 0}, "gradient_chunks must be at least 1, got 0"),
        ({"form": "released"}, "carry must be False with form 'released': .* choose form"),
        ({"expand": 0}, "MambaMixer: expand must make d_inner = .* at least 1, got 0"),
        ({"backend": "mamba_ssm"}, "carry must be False with backend 'mamba_ssm', .* got True"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        MambaContextEncoder(**{"dim": 16} | options)


def test_refuses_foreign_memory():
    encoder, x = make(), pieces((4,))[0]
    _, memory = encoder(x)
    with pytest.raises(ValueError, match=r"= \[2, 1, 32, 7\] of .*, got \[2, 2, 32, 7\]"):
        encoder(x[:1], memory)
    with pytest.raises(ValueError, match=r"= \[2, 2, 32, 7\] of .*, got \[3, 2, 32, 7\]"):
        encoder(x, make(depth=3)(x)[1])
    other = MambaContextEncoder(16, 2, d_state=5, d_conv=3).double()
    lengths = r"lengths \(N, d_conv - 1\) = \(4, 3\), got \[2, 2, 32, 7\] of lengths "
    with pytest.raises(ValueError, match=lengths + r"\(5, 2\)\.$"):
        encoder(x, other(x)[1])
    with pytest.raises(ValueError, match=lengths + r"\(32,\)\.$"):
        encoder(x, Memory(torch.zeros_like(memory.states), (32,), 1))
    with pytest.raises(ValueError, match=r"must be torch.float64 on the device of tokens, cpu"):
        encoder(x, memory.to(torch.float32))
    with pytest.raises(ValueError, match=r"must be a Memory, .* got Tensor"):
        encoder(x, memory.states)
    with pytest.raises(ValueError, match="must be None without carry"):
        make(carry=False)(x, memory)
    with pytest.raises(
        ValueError, match=r"tokens must be \[B, L, C\] = \[\*, \*, 16\], got \[4, 16\]"
    ):
        encoder(x[0])


# mamba_ssm's scan


@pytest.fixture
def mamba_ssm(monkeypatch):
    """A CPU on which mamba_ssm is there: its signature, and no gradient of the last state."""
    from xt_kernels import reference
    from xt_kernels.selective_scan import api

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
        return_last_state=False,
    ):  # fmt: skip
        calls.append(return_last_state)
        return reference.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
        )

    calls = []
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        module = types.ModuleType(name)
        module.__path__ = []
        module.selective_scan_fn = selective_scan_fn
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(api, "_PACKAGE_DEVICE", "cpu")
    return calls


@pytest.mark.parametrize("return_last_state", [False, True])
def test_the_scan_of_mamba_ssm(mamba_ssm, return_last_state):
    torch.manual_seed(0)
    u, delta = torch.randn(2, 2, 6, 9, requires_grad=True)
    A, B, C = -torch.rand(6, 4), *torch.randn(2, 2, 4, 9)
    given = (u, delta, A, B, C, torch.randn(6), torch.randn(2, 6, 9), torch.randn(6), True)
    theirs, ours = (
        selective_scan(*given, return_last_state, backend=name) for name in ("mamba_ssm", "xt")
    )
    assert mamba_ssm == [return_last_state]
    if return_last_state:
        (theirs, state), (ours, last) = theirs, ours
        torch.testing.assert_close(state, last)
        assert last.requires_grad and not state.requires_grad
    torch.testing.assert_close(theirs, ours)
    assert theirs.requires_grad


def test_a_model_on_the_scan_of_mamba_ssm(mamba_ssm):
    theirs, ours = (
        make(3, torch.float32, form="released", carry=False, backend=name)
        for name in ("mamba_ssm", "xt")
    )
    tokens = torch.randn(2, 9, 16)
    torch.testing.assert_close(theirs(tokens)[0], ours(tokens)[0])
    assert len(mamba_ssm) == 3
    mixer = MambaMixer(16, d_state=4, backend="mamba_ssm")
    out, state = mixer(tokens)
    assert out.requires_grad
    with pytest.raises(
        ValueError, match=r"^MambaMixer: state must be None with backend 'mamba_ssm'"
    ):
        mixer(tokens, state)


def test_mamba_ssm_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    message = r"^selective_scan: backend must be installed \(pip install mamba-ssm\), got backend="
    with pytest.raises(ValueError, match=message):
        MambaMixer(16, backend="mamba_ssm")(torch.zeros(1, 4, 16))


def test_doctor_says_whether_the_packages_import(tmp_path, monkeypatch):
    from xt_models import doctor

    assert "mamba-ssm         not installed: its CUDA scan" in doctor.report()
    for name, code in (
        ("causal_conv1d", "raise ImportError('causal_conv1d_cuda.so:\\n undefined symbol')"),
        ("mamba_ssm", ""),
        ("mamba_ssm/ops", ""),
        ("mamba_ssm/ops/selective_scan_interface", ""),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    for name in ("causal_conv1d", "mamba_ssm"):
        info = tmp_path / f"{name}-9.8.7.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: 9.8.7\n")
    monkeypatch.syspath_prepend(tmp_path)
    lines = doctor.report().splitlines()
    assert "  mamba-ssm         9.8.7" in lines
    assert (
        "  causal-conv1d     9.8.7, but does not import and is not used: ImportError: "
        "causal_conv1d_cuda.so: undefined symbol"
    ) in lines
    for name in [n for n in sys.modules if n.startswith(("mamba_ssm", "causal_conv1d"))]:
        monkeypatch.delitem(sys.modules, name)


def test_the_packages_are_not_imported_with_ours():
    code = (
        "import sys, xt_kernels, xt_models.mamba, xt_kernels.causal_conv; "
        "print([n for n in ('mamba_ssm', 'causal_conv1d') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# In a model


@pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")
def test_a_streamed_image_has_the_tokens_of_one_unchunked_sequence():
    import xt_models as xm
    from xt_models.model import map_index

    options = {"region": 32, "dim": 16, "depth": 2, "chunk_regions": 2}
    model = xm.create_model("convnext_atto", context="mamba", **options).double()
    pixels = torch.rand(1, 3, 100, 130, dtype=torch.float64)
    given = []
    model.context.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    with torch.no_grad():
        out = model(pixels)
        assert len(given) == 10 and out.memory.seen == 10
        sequence = torch.cat(given[:10], 1)
        whole, last = model.context(sequence)
    grid = model.grid(100, 130)
    places = [map_index(grid.placement(step.regions, 32), grid, 32) for step in model.walk(grid)]
    torch.testing.assert_close(out.tokens, whole[:, torch.cat(places).argsort()])
    torch.testing.assert_close(out.memory.states, last.states)


@pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")
def test_a_model_learns_through_the_state_and_keeps_its_options(tmp_path):
    import xt_models as xm

    options = {"region": 32, "dim": 16, "depth": 2, "chunk_regions": 1, "gradient": "through"}
    model = xm.create_model("convnext_atto", context="mamba", num_classes=3, **options)
    pixels = torch.rand(2, 3, 32, 96, requires_grad=True)
    model(pixels).tokens[:, -1].sum().backward()
    assert pixels.grad[..., :32].any()
    assert all(p.grad is not None for p in model.context.parameters())
    model.save_pretrained(tmp_path / "saved")
    again = xm.XT.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(pixels).tokens, model(pixels).tokens)


def test_reversed_layers_are_refused_where_an_image_comes_in_chunks():
    from xt_models.model import XTConfig

    with pytest.raises(ValueError, match=r"mamba_form must be 'residual' unless the whole image"):
        XTConfig(context="mamba", mamba_form="released")
    XTConfig(context="mamba", mamba_form="released", chunk_regions=None)


@pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")
def test_a_model_with_mixers_of_other_sizes(tmp_path):
    import xt_models as xm

    sizes = {"mamba_d_state": 5, "mamba_d_conv": 3, "mamba_expand": 1.5}
    options = {"region": 32, "dim": 16, "depth": 2, "chunk_regions": 1, **sizes}
    model = xm.create_model("convnext_atto", context="mamba", **options)
    pixels = torch.rand(1, 3, 32, 64)
    with torch.no_grad():
        out = model(pixels)
        assert out.memory.states.shape == (2, 1, 24, 7) and out.memory.lengths == (5, 2)
        model.save_pretrained(tmp_path / "saved")
        again = xm.XT.from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(again(pixels).tokens, out.tokens)


def test_a_config_of_before_has_the_usual_sizes():
    from dataclasses import asdict

    from xt_models.model import XTConfig

    saved = {k: v for k, v in asdict(XTConfig(context="mamba")).items() if "mamba_" not in k}
    config = XTConfig.from_dict(saved | {"mamba_form": "residual"})
    assert config == XTConfig(context="mamba")
    assert (config.mamba_d_state, config.mamba_d_conv, config.mamba_expand) == (16, 4, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mamba_d_state": 65}, "mamba_d_state must be 1 to 64, got 65"),
        ({"mamba_d_conv": 0}, "mamba_d_conv must be at least 1, got 0"),
        ({"mamba_expand": 0}, "mamba_expand must be at least 1 / dim, got 0"),
        ({"mamba_backend": "foo"}, "mamba_backend must be one of xt, mamba_ssm, got 'foo'"),
        ({"mamba_backend": "mamba_ssm"}, "mamba_backend must be 'xt' unless mamba_form is"),
    ],
)
def test_a_config_refuses(options, message):
    from xt_models.model import XTConfig

    with pytest.raises(ValueError, match=f"^XTConfig: {message}"):
        XTConfig(context="mamba", **options)


@pytest.mark.parametrize("option", [{"memory_chunks": 3}, {"memory": "kv"}])
def test_mamba_takes_no_memory_of_chunks(option):
    import xt_models as xm

    ((name, value),) = option.items()
    message = f"{name} must be left out with context 'mamba', whose state .* got {value!r}"
    with pytest.raises(ValueError, match=f"^create_model: {message}"):
        xm.create_model(context="mamba", **option)
