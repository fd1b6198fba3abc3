"""Mamba as context encoder: mamba_ssm's parameters, carried state, gradient through it."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

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
    ],
)
def test_the_convolution_refuses(change, message):
    given = {"x": torch.zeros(2, 3, 5), "weight": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=f"^causal_conv: {message}"):
        causal_conv(**given)


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
        ({"expand": 0}, "expand must be at least 1, got 0"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        MambaContextEncoder(**{"dim": 16} | options)


def test_refuses_foreign_memory():
    encoder, x = make(), pieces((4,))[0]
    _, memory = encoder(x)
    with pytest.raises(ValueError, match=r"= \[2, 1, 32, 7\], got \[2, 2, 32, 7\]"):
        encoder(x[:1], memory)
    with pytest.raises(ValueError, match=r"= \[2, 2, 32, 7\], got \[3, 2, 32, 7\]"):
        encoder(x, make(depth=3)(x)[1])
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
