"""Context encoders: exactness, memory carried by value, and how far context reaches."""

import pytest
import torch

from xt_models.context_encoder import ContextEncoder, Memory, XLContextEncoder


def make(depth=2, memory_chunks=1, dtype=torch.float64, **options):
    torch.manual_seed(0)
    cls = XLContextEncoder if memory_chunks else ContextEncoder
    encoder = cls(32, depth, 2, 2.0, memory_chunks=memory_chunks, **options)
    return encoder.to(dtype).eval()


def pieces(lengths, batch=2):
    return [torch.randn(batch, n, 32, dtype=torch.float64) for n in lengths]


def run(encoder, chunks):
    memory, outs = None, []
    for chunk in chunks:
        out, memory = encoder(chunk, memory)
        outs.append(out)
    return outs, memory


def unrolled(encoder, chunks):
    """The recurrence written from its equation: plain softmax over the concatenation."""
    m = encoder.memory_chunks
    run_of = {
        "stop": lambda k: k,
        "through": lambda k: 0,
        "truncated": lambda k: k // encoder.gradient_chunks,
    }[encoder.gradient]
    inputs = [list(chunks)]
    for layer in encoder.layers:
        attention, current = layer.mixer, inputs[-1]
        outs = []
        for k, x in enumerate(current):
            past = [
                current[j] if run_of(j) == run_of(k) else current[j].detach()
                for j in range(max(0, k - m), k)
            ]
            seen = torch.cat([*past, x], dim=1)
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


@pytest.mark.parametrize("gradient", ["stop", "through", "truncated"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("depth, memory_chunks", [(1, 1), (2, 1), (3, 2), (2, 0)])
def test_equals_the_equation_in_output_and_gradient(depth, memory_chunks, causal, gradient):
    encoder = make(depth, memory_chunks, causal=causal, gradient=gradient, gradient_chunks=2)
    chunks = [c.requires_grad_() for c in pieces((5, 7, 3, 3, 1))]
    wanted = [*encoder.parameters(), *chunks]
    ours, _ = run(encoder, chunks)
    loss = sum(out.square().sum() for out in ours)
    ours_grad = torch.autograd.grad(loss, wanted)
    truth = unrolled(encoder, chunks)
    truth_grad = torch.autograd.grad(sum(out.square().sum() for out in truth), wanted)
    for a, b in zip([*ours, *ours_grad], [*truth, *truth_grad], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradient", ["stop", "through", "truncated"])
def test_each_gradient_reaches_the_chunks_it_says(gradient):
    encoder = make(gradient=gradient, gradient_chunks=3)
    chunks = [c.requires_grad_() for c in pieces((4,) * 7)]
    last = run(encoder, chunks)[0][-2]  # number 5: the runs are 0 1 2, 3 4 5, 6
    grads = torch.autograd.grad(last.sum(), chunks, allow_unused=True)
    # Two layers with memory of one chunk: two chunks back, if the gradient goes there.
    back = {"stop": 0, "through": 2, "truncated": 2}[gradient]
    assert [g is not None and bool(g.any()) for g in grads] == [
        5 - back <= k <= 5 for k in range(7)
    ]
    if gradient == "truncated":
        fourth = run(encoder, chunks)[0][3]
        grads = torch.autograd.grad(fourth.sum(), chunks, allow_unused=True)
        assert [g is not None and bool(g.any()) for g in grads] == [k == 3 for k in range(7)]


@pytest.mark.parametrize("memory", ["hidden", "kv"])
def test_through_keeps_tokens_and_memory_of_a_chunk_only(memory):
    """Saved for backward: the boundary of each chunk, whatever its layers are."""

    def saved(count):
        encoder = make(depth=3, gradient="through", memory=memory)
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outs, last = run(encoder, pieces((6,) * count))
            loss = sum(out.sum() for out in outs)
        own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        del loss
        boundary = outs[0].nbytes + last.states.nbytes
        return sum(n for at, n in kept.items() if at not in own) / boundary

    few, many = saved(4), saved(12)
    assert (many - few) / 8 <= 1.01, (few, many)


@pytest.mark.parametrize("memory_chunks", [1, 2, 3])
def test_keys_and_values_remembered_equal_hidden_states_remembered(memory_chunks):
    chunks = pieces((5, 5, 5, 5, 5, 3, 5, 5, 5, 4, 4, 4, 4, 0, 2))
    hidden, kv = (make(3, memory_chunks, memory=m) for m in ("hidden", "kv"))
    expected, _ = run(hidden, chunks)
    recorded, _ = run(kv, chunks)
    with torch.no_grad():
        in_place, _ = run(kv, chunks)
    for a, b, c in zip(expected, recorded, in_place, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(c, a, rtol=1e-12, atol=1e-12)


def test_remembered_keys_and_values_learn_like_hidden_states_where_the_gradient_goes_through():
    chunks = pieces((4, 4, 3))
    grads = []
    for memory in ("hidden", "kv"):
        encoder = make(2, 2, memory=memory, gradient="through")
        loss = run(encoder, chunks)[0][-1].square().sum()
        grads.append(torch.autograd.grad(loss, encoder.parameters()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_full_ring_of_keys_and_values_is_overwritten_in_place():
    encoder = make(2, 3, memory="kv")
    chunks = pieces((4,) * 9)
    _, memory = run(encoder, chunks[:3])
    place = memory.states.data_ptr()
    for k, chunk in enumerate(chunks[3:]):
        kept = memory.states.clone()
        _, memory = encoder(chunk, memory)
        assert memory.states.data_ptr() == place
        changed = (kept != memory.states).flatten(0, 3).any(-1).any(0)  # a token each
        assert changed.nonzero().flatten().tolist() == [k % 3 * 4 + i for i in range(4)]
    assert memory.seen == 9 and memory.lengths == (4, 4, 4)


@pytest.mark.parametrize("memory", ["hidden", "kv"])
def test_gradient_recorded_or_not_the_values_are_the_same(memory):
    chunks = pieces((4, 4, 2))
    for gradient in ("stop", "through", "truncated"):
        encoder = make(memory=memory, gradient=gradient)
        a, b = run(encoder, chunks)
        with torch.no_grad():
            c, d = run(encoder, chunks)
        assert all(torch.equal(x, y) for x, y in zip(a, c, strict=True)) and b.equal(d)


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


@pytest.mark.parametrize("kind", ["hidden", "kv"])
def test_memory_is_a_value(tmp_path, kind):
    encoder = make(memory=kind)
    chunks = pieces((4, 4, 4))
    _, memory = encoder(chunks[0])
    before = memory.states.clone()
    expected, _ = encoder(chunks[1], memory)
    assert torch.equal(before, memory.states), "memory was written to"
    torch.save(memory, tmp_path / "memory.pt")
    loaded = torch.load(tmp_path / "memory.pt", weights_only=True)
    assert isinstance(loaded, Memory) and loaded.equal(memory)
    assert torch.equal(encoder(chunks[1], loaded)[0], expected)
    assert not memory.states.requires_grad
    assert memory.to(torch.float32).states.dtype == torch.float32
    assert not memory.equal(encoder(chunks[1])[1])
    through = make(memory=kind, gradient="through")(chunks[0])[1]
    assert through.states.requires_grad and not through.detach().states.requires_grad


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
        ({"gradient_chunks": 0}, "gradient_chunks must be at least 1, got 0"),
        ({"attention": "flash"}, "attention must be one of hyper, exact, got 'flash'"),
        ({"memory": "keys"}, "memory must be one of hidden, kv, got 'keys'"),
        ({"gradient": None}, "gradient must be one of stop, through, truncated, got None"),
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
    with pytest.raises(ValueError, match=r'"hidden" states \[depth, B, T, C\] = \[2, 1, 4, 32\]'):
        encoder(x[:1], memory)
    with pytest.raises(ValueError, match=r"\[2, 2, 4, 32\], got \[3, 2, 4, 32\]"):
        encoder(x, make(depth=3)(x)[1])
    with pytest.raises(ValueError, match=r"= \[2, 2, 4, 32\], got \[2, 2, 2, 2, 4, 16\]"):
        encoder(x, make(memory="kv")(x)[1])
    with pytest.raises(ValueError, match=r"dtype and device of tokens, torch.float64"):
        encoder(x, memory.to(torch.float32))
    with pytest.raises(ValueError, match="at most memory_chunks = 1 chunks, got 2"):
        encoder(x, make(memory_chunks=2)(x, make(memory_chunks=2)(x)[1])[1])
    with pytest.raises(ValueError, match="at most memory_chunks = 0 chunks, got 1"):
        make(memory_chunks=0)(x, memory)
    with pytest.raises(ValueError, match=r"must be a Memory, .* got Tensor"):
        encoder(x, memory.states)
    with pytest.raises(
        ValueError, match=r"tokens must be \[B, L, C\] = \[\*, \*, 32\], got \[4, 32\]"
    ):
        encoder(x[0])
