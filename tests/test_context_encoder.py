"""Context encoders: exactness, memory carried by value, and how far context reaches."""

import pytest
import torch

from xt_models.context_encoder import ContextEncoder, XLContextEncoder


def make(depth=2, memory_chunks=1, causal=False, dtype=torch.float64):
    torch.manual_seed(0)
    cls = XLContextEncoder if memory_chunks else ContextEncoder
    encoder = cls(32, depth, 2, 2.0, causal=causal, memory_chunks=memory_chunks)
    return encoder.to(dtype).eval()


def run(encoder, chunks):
    memory, outs = None, []
    for chunk in chunks:
        out, memory = encoder(chunk, memory)
        outs.append(out)
    return outs, memory


def unrolled(encoder, chunks):
    """The recurrence written from its equation: plain softmax over the concatenation."""
    m = encoder.memory_chunks
    inputs = [list(chunks)]
    for layer in encoder.layers:
        attention, current = layer.mixer, inputs[-1]
        outs = []
        for k, x in enumerate(current):
            seen = torch.cat([current[j].detach() for j in range(max(0, k - m), k)] + [x], dim=1)
            normed_x, normed = layer.norm1(x), layer.norm1(seen)
            w, b = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
            length, total = x.shape[1], seen.shape[1]

            def heads(t, number=attention.num_heads):
                return t.unflatten(-1, (number, -1)).transpose(1, 2)

            q, key, v = (
                heads(t @ wi.T + bi)
                for t, wi, bi in zip((normed_x, normed, normed), w, b, strict=True)
            )
            scores = q @ key.transpose(-1, -2) / q.shape[-1] ** 0.5
            if attention.causal:
                i = torch.arange(length)[:, None] + total - length
                scores = scores.masked_fill(torch.arange(total)[None] > i, float("-inf"))
            y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + attention.proj(y)
            outs.append(x + layer.mlp(layer.norm2(x)))
        inputs.append(outs)
    return inputs[-1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("depth, memory_chunks", [(1, 1), (2, 1), (3, 2), (2, 0)])
def test_equals_the_equation_in_output_and_gradient(depth, memory_chunks, causal):
    encoder = make(depth, memory_chunks, causal)
    chunks = [torch.randn(2, n, 32, dtype=torch.float64) for n in (5, 7, 3, 1)]
    ours, _ = run(encoder, chunks)
    ours_grad = torch.autograd.grad(ours[-1].square().sum(), encoder.parameters())
    truth = unrolled(encoder, chunks)
    truth_grad = torch.autograd.grad(truth[-1].square().sum(), encoder.parameters())
    for a, b in zip([*ours, *ours_grad], [*truth, *truth_grad], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("memory_chunks", [1, 2, 3])
def test_context_reaches_exactly_depth_times_memory_chunks_back(depth, memory_chunks):
    encoder = make(depth, memory_chunks)
    reach = depth * memory_chunks
    assert encoder.reach == reach
    chunks = [torch.randn(1, 3, 32, dtype=torch.float64) for _ in range(reach + 3)]
    with torch.no_grad():
        last = run(encoder, chunks)[0][-1]
        for back in range(1, reach + 3):
            changed = list(chunks)
            changed[-1 - back] = chunks[-1 - back] + 1
            moved = not torch.equal(run(encoder, changed)[0][-1], last)
            assert moved == (back <= reach), f"{back} chunks back"


def test_memory_is_a_value(tmp_path):
    encoder = make()
    chunks = [torch.randn(2, 4, 32, dtype=torch.float64) for _ in range(3)]
    _, memory = encoder(chunks[0])
    before = [m.clone() for m in memory]
    expected, _ = encoder(chunks[1], memory)
    assert all(torch.equal(a, b) for a, b in zip(before, memory, strict=True)), (
        "memory was written to"
    )
    torch.save(memory, tmp_path / "memory.pt")
    loaded = torch.load(tmp_path / "memory.pt", weights_only=True)
    assert torch.equal(encoder(chunks[1], loaded)[0], expected)
    assert not any(m.requires_grad for m in memory)


def test_weights_learn_through_memory_but_hidden_states_do_not():
    encoder = make(depth=1)
    x = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 4, 32, dtype=torch.float64)
    _, memory = encoder(x)
    out, _ = encoder(y, memory)
    out.sum().backward()
    assert x.grad is None
    with_memory = encoder.layers[0].mixer.qkv.weight.grad.clone()
    encoder.zero_grad()
    encoder(y)[0].sum().backward()
    assert not torch.equal(encoder.layers[0].mixer.qkv.weight.grad, with_memory)


def test_batch_companions_change_nothing():
    encoder = make()
    chunks = [torch.randn(3, 5, 32, dtype=torch.float64) for _ in range(2)]
    together = run(encoder, chunks)[0][-1]
    alone = run(encoder, [c[1:2] for c in chunks])[0][-1]
    torch.testing.assert_close(together[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        (
            {"num_heads": 3},
            "num_heads must divide dim 32 into heads of 16 to 256, a multiple of 8, got 3",
        ),
        ({"memory_chunks": -1}, "memory_chunks must be at least 0, got -1"),
    ],
)
def test_refuses_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ContextEncoder(**{"dim": 32, "num_heads": 2} | kwargs)
    if "memory_chunks" in kwargs:
        with pytest.raises(ValueError, match="memory_chunks must be at least 1"):
            XLContextEncoder(32, memory_chunks=0)


def test_refuses_foreign_memory():
    encoder = make()
    x = torch.randn(2, 4, 32, dtype=torch.float64)
    _, memory = encoder(x)
    with pytest.raises(ValueError, match=r"chunks \[depth, B, M, C\] = \[2, 1, \*, 32\]"):
        encoder(x[:1], memory)
    with pytest.raises(ValueError, match=r"\[2, 2, \*, 32\], got \[3, 2, 4, 32\]"):
        encoder(x, make(depth=3)(x)[1])
    with pytest.raises(ValueError, match=r"dtype and device of tokens, torch.float64"):
        encoder(x, tuple(m.float() for m in memory))
    with pytest.raises(ValueError, match="at most memory_chunks = 1 chunks, got 2"):
        encoder(x, memory * 2)
    with pytest.raises(ValueError, match="must hold chunks"):
        encoder(x, tuple(m[0, 0] for m in memory))
