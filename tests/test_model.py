"""XT in memory: architecture, layouts, padding, how far a pixel reaches, saving and loading."""

import dataclasses
import json
from itertools import pairwise

import pytest
import timm
import torch

import xt_models as xm
from xt_kernels.regions import RegionGrid
from xt_models.grid import visit_order, walk
from xt_models.model import XT, XTConfig, map_index
from xt_models.region_encoder import RegionEncoder
from xt_models.registry import CONTEXT_DEFAULTS, ENCODERS, RandomWeightsWarning

pytestmark = pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")
SMALL = {"region": 64, "dim": 32, "depth": 2, "num_heads": 2, "chunk_regions": 2, "residual": False}


def small(context="xl", **kwargs):
    options = SMALL | kwargs
    if options["chunk_regions"] is None:
        options.setdefault("pool", "token")
    return xm.create_model("convnext_atto", context=context, **options)


def image(height, width, bands=3, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (batch, bands, height, width), dtype=torch.uint8, generator=generator
    )


def forward(model, pixels):
    with torch.inference_mode():
        return model(pixels)


@pytest.mark.parametrize(
    "size, plain, hyper, mamba",
    [
        ("tiny", 30.82, 47.27, 43.48),
        ("small", 52.20, 68.65, 64.86),
        ("base", 92.26, 106.78, 102.99),
        ("large", 206.40, 215.48, 211.69),
    ],
)
def test_parameter_counts_are_those_of_the_paper(size, plain, hyper, mamba):
    for context, millions in ((None, plain), ("hyper", hyper), ("mamba", mamba)):
        config = XTConfig(
            encoder=ENCODERS[f"swinv2_{size}"][0],
            num_classes=284,
            context=context,
            **CONTEXT_DEFAULTS[context],
            **({"mamba_form": "released", "chunk_regions": None} if context == "mamba" else {}),
        )
        with torch.device("meta"):
            model = XT(config)
        count = sum(p.numel() for p in model.parameters())
        # The class token (768) is not in the paper's two decimals.
        assert round(count / 1e6, 2) == pytest.approx(millions, abs=0.0101)


def test_satellite_form_has_the_papers_parameter_count():
    with torch.device("meta"):
        model = XT(XTConfig(context="xl", **CONTEXT_DEFAULTS["xl"]))
    context = [model.context, model.input_proj, model.output_proj]
    assert round(sum(p.numel() for m in context for p in m.parameters()) / 1e6, 2) == 4.59


@pytest.mark.parametrize(
    "name, region, in_chans",
    [("swinv2_tiny_window16_256", 64, 3), ("hiera_tiny_224", 96, 2), ("convnext_atto", 64, 5)],
)
def test_one_layout_for_every_backbone(name, region, in_chans):
    torch.manual_seed(0)
    encoder = RegionEncoder(name, region=region, in_chans=in_chans).eval()
    x = torch.randn(2, in_chans, region, region)
    with torch.inference_mode():
        stages, raw = encoder.forward_stages(x), encoder.model(x)
        last = encoder(x)
    side = region // 32
    assert last.shape == (2, side, side, encoder.num_features) and encoder.stride == 32
    for ours, theirs, channels, stride in zip(
        stages, raw, encoder.channels, encoder.strides, strict=True
    ):
        assert ours.shape == (2, region // stride, region // stride, channels)
        same = theirs if theirs.shape == ours.shape else theirs.permute(0, 2, 3, 1)
        assert torch.equal(ours, same)


def test_random_weights_are_noticed_and_reproducible():
    state = torch.random.get_rng_state()
    with pytest.warns(RandomWeightsWarning, match="random weights .seed 3."):
        first = small(seed=3)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was moved"
    pixels = image(100, 70)
    assert torch.equal(forward(first, pixels).tokens, forward(small(seed=3), pixels).tokens)
    assert not torch.equal(forward(first, pixels).tokens, forward(small(seed=4), pixels).tokens)


def test_pretrained_without_network_is_one_sentence(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="Pretrained weights of 'convnext_atto' could not be"):
        small(pretrained=True)


@pytest.mark.parametrize("context", ["xl", "hyper", "mamba", "vit", None])
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (65, 130), (31, 200), (200, 97)])
def test_shapes_for_any_size(context, size):
    chunk = None if context in ("hyper", "vit") else 2
    model = small(context, num_classes=7, chunk_regions=chunk)
    out = forward(model, image(*size, batch=2))
    rows, cols = -(-size[0] // 32), -(-size[1] // 32)
    assert out.tokens.shape == (2, rows * cols, model.num_features)
    assert out.logits.shape == (2, 7)
    assert all(torch.isfinite(t).all() for t in (out.tokens, out.logits, out.embedding))
    if chunk is not None:
        torch.testing.assert_close(out.embedding, out.tokens.mean(1))
    if context == "xl":
        assert out.memory.states.shape[:2] == (2, 2) and len(out.memory.lengths) == 1


@pytest.mark.parametrize("context", ["xl", "vit"])
def test_padding_never_leaks(context, monkeypatch):
    chunk = 3 if context == "xl" else None
    model = small(context, chunk_regions=chunk, num_classes=3)
    pixels = image(70, 150)
    expected = forward(model, pixels)
    plain_encode = model.encode

    def encode(regions):
        encoded = plain_encode(regions)
        features = encoded.features
        placement = model.grid(70, 150).placement(None, model.stride)
        for region, (_, _, height, width, _, _) in enumerate(placement.table.tolist()):
            features[region, height:] = float("nan")
            features[region, :, width:] = float("nan")
        assert features.isnan().any()
        return encoded

    monkeypatch.setattr(model, "encode", encode)
    spoiled = forward(model, pixels)
    for a, b in zip(expected[:3], spoiled[:3], strict=True):
        assert torch.equal(a, b)


def test_pixels_beside_the_window_are_never_read():
    model = small()
    canvas = image(200, 300)
    inside = canvas[:, :, 20:120, 30:160]
    expected = forward(model, inside.clone()).tokens
    canvas[:, :, :20] = 255
    canvas[:, :, :, 160:] = 0
    assert torch.equal(forward(model, inside).tokens, expected)


@pytest.mark.parametrize("depth, memory_chunks", [(1, 1), (2, 1), (1, 2), (3, 1)])
def test_a_pixel_reaches_as_many_chunks_as_the_depth_says(depth, memory_chunks):
    model = small(depth=depth, memory_chunks=memory_chunks, chunk_regions=2)
    pixels = image(64, 64 * 2 * 6)  # six chunks of two regions
    before = forward(model, pixels).tokens
    pixels[0, :, 10, 10] = 255 - pixels[0, :, 10, 10]  # in chunk 0
    changed = (forward(model, pixels).tokens != before).any(-1).view(2, 6, 4).any(0).any(-1)
    assert changed.tolist() == [k <= depth * memory_chunks for k in range(6)]


def test_two_stream_lets_early_chunks_see_late_ones():
    options = {"depth": 1, "chunk_regions": 1}
    row, two = small(**options), small(tiling="two-stream", **options)
    pixels = image(64, 64 * 5)
    first = [forward(m, pixels).tokens[:, :2] for m in (row, two)]
    pixels[..., -1] = 255 - pixels[..., -1]
    moved = [
        not torch.equal(forward(m, pixels).tokens[:, :2], f)
        for m, f in zip((row, two), first, strict=True)
    ]
    assert moved == [False, True]


def test_two_stream_first_pass_over_the_reach_equals_a_whole_first_pass(monkeypatch):
    model = small(tiling="two-stream", depth=2, chunk_regions=1)
    pixels = image(64, 64 * 6)
    short = forward(model, pixels).tokens
    grid = model.grid(64, 64 * 6)
    assert [s.emit for s in model.walk(grid)] == [False] * 2 + [True] * 6
    monkeypatch.setattr(model, "walk", lambda g: walk(g, 1, "two-stream", 6))
    assert torch.equal(forward(model, pixels).tokens, short)


def test_hyper_and_vit_differ_only_in_causality():
    models = [small(c, chunk_regions=None, causal=False) for c in ("hyper", "vit")]
    a, b = (forward(m, image(90, 150)).tokens for m in models)
    assert torch.equal(a, b)
    causal = forward(small("hyper", chunk_regions=None, causal=True), image(90, 150)).tokens
    assert not torch.equal(a, causal)


def test_batch_companions_change_nothing():
    model = small(num_classes=4)
    pixels = image(100, 150, batch=3)
    together, alone = forward(model, pixels), forward(model, pixels[1:2])
    torch.testing.assert_close(together.tokens[1:2], alone.tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.logits[1:2], alone.logits, rtol=1e-5, atol=1e-5)


def test_integers_are_normalised_and_floats_taken_as_they_are():
    model = small()
    pixels = image(70, 70)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = forward(model, pixels).tokens
    torch.testing.assert_close(
        forward(model, (pixels / 255 - mean) / std).tokens, expected, rtol=1e-4, atol=1e-4
    )
    wide = (pixels.to(torch.int32) * 257).to(torch.uint16)
    torch.testing.assert_close(forward(model, wide).tokens, expected, rtol=1e-4, atol=1e-4)
    own = small(mean=(0.1, 0.2, 0.3), std=(2.0, 2.0, 2.0))
    shifted = (pixels / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 2
    torch.testing.assert_close(
        forward(own, pixels).tokens, forward(model, shifted).tokens, rtol=1e-4, atol=1e-4
    )


def test_gradients_reach_encoder_context_and_head():
    model = small(num_classes=4, residual=True, depth=1).train()
    model(image(64, 200)).logits.sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_save_and_load(tmp_path):
    model = small(num_classes=4, mean=(0.1, 0.2, 0.3), tiling="zigzag")
    model.save_pretrained(tmp_path)
    loaded = xm.XT.from_pretrained(str(tmp_path)).eval()
    assert loaded.config == model.config
    pixels = image(100, 200)
    assert torch.equal(forward(loaded, pixels).logits, forward(model, pixels).logits)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {"colour": 1}))
    with pytest.raises(ValueError, match="unknown field colour"):
        xm.XT.from_pretrained(str(tmp_path))


def test_names():
    assert "xt_swinv2_tiny_256" in xm.list_models()
    assert all(timm.is_model(name) for name, _ in ENCODERS.values())
    model = xm.create_model("xt_convnext_atto_64.vit", dim=32, num_heads=2)
    assert (model.config.region, model.config.context, model.config.pool) == (64, "vit", "token")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: xm.create_model("xt_swinv9_tiny_256"), "name must be one of xt_swinv2_tiny_256"),
        (
            lambda: xm.create_model("convnext_attto"),
            "must be a timm model, got 'convnext_attto'. Near",
        ),
        (
            lambda: small(context="lstm"),
            "context must be one of xl, hyper, mamba, vit or None, got 'lstm'",
        ),
        (lambda: small(colour=1), "unknown field colour"),
        (lambda: small(region=65), "multiple of the stride 32 of convnext_atto, got 65"),
        (lambda: small(tiling="spiral"), "tiling must be one of row, zigzag, two-stream"),
        (
            lambda: small("vit", chunk_regions=None, pool="mean", tiling="two-stream"),
            "tiling must be",
        ),
        (lambda: small(pool="token"), "pool must be 'mean' unless"),
        (lambda: small(mean=(0.5,)), "mean must be in_chans = 3 numbers"),
        (lambda: small(std=(0.5, 0.0, 1.0)), "std must be positive"),
        (lambda: small(None, residual=True), "residual must be False without"),
        (lambda: small()(torch.zeros(1, 4, 64, 64)), r"C = 3, got \[1, 4, 64, 64\]"),
        (lambda: small()(torch.zeros(1, 3, 0, 64)), "height must be at least 1 pixel, got 0"),
        (lambda: walk(RegionGrid(4, 4, 2), 0), "chunk_regions must be at least 1, got 0"),
    ],
)
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_walks_visit_every_region_once():
    grid = RegionGrid(5 * 32, 3 * 32 - 7, 32)
    for tiling in ("row", "zigzag"):
        order = visit_order(grid, tiling)
        assert sorted(order) == list(range(grid.num_regions))
        steps = walk(grid, 4, tiling)
        assert [i for s in steps for i in s.regions] == order
        assert [len(s.regions) for s in steps] == [4, 4, 4, 3]
    zigzag = visit_order(grid, "zigzag")
    assert all(abs(a - b) in (1, grid.cols) for a, b in pairwise(zigzag))
    assert zigzag[3:6] == [5, 4, 3]


def test_map_index_inverts_the_placement():
    grid = RegionGrid(70, 150, 32)
    index = map_index(grid.placement([7, 2, 9], 16), grid, 16)
    assert len(set(index.tolist())) == len(index) and (index.diff() > 0).all()
    assert index.max() < 5 * 10


def test_config_is_plain():
    assert XTConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(XTConfig())))) == XTConfig()
