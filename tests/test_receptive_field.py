"""How far context reaches: arithmetic, trial and gradient agree, and `xt erf` tells them."""

import json
import re

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner
from PIL import Image

import xt_models as xm
from xt_models.cli import main
from xt_models.context_encoder import ContextEncoder, XLContextEncoder
from xt_models.output import FIELD_DECADES, write_receptive_fields
from xt_models.receptive_field import (
    centre_token,
    context_length,
    effective_receptive_field,
    model_context_length,
    receptive_field_numbers,
    token_region,
    visible_chunks,
    visible_image_chunks,
)

pytestmark = pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")
DEPTHS_AND_MEMORIES = [(depth, memory) for depth in (1, 2, 3, 4) for memory in (1, 2, 3)]


def small(context="xl", **options):
    defaults = {"region": 64, "dim": 32, "depth": 2, "num_heads": 2, "residual": False}
    if context == "xl":
        defaults["chunk_regions"] = 1
    return xm.create_model("convnext_atto", context=context, **(defaults | options))


def noise(height, width, count=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 3, height, width, generator=generator, dtype=dtype))


def mask(model, height, width, chunks):
    """Pixels of some chunks of the walk, as booleans `[H, W]`."""
    grid = model.grid(height, width)
    steps = [step for step in model.walk(grid) if step.emit]
    out = np.zeros((height, width), dtype=bool)
    for chunk in chunks:
        for top, left, rows, cols in map(grid.box, steps[chunk].regions):
            out[top : top + rows, left : left + cols] = True
    return out


# Arithmetic


@pytest.mark.parametrize(
    "region, layers, chunk_regions, pixels",
    [  # "xT" (Gupta et al. 2024), table 1, column "context": Swin-B (xT) XL
        (256, 1, 1, 131_072),  # 512/256, 1 XL layer
        (256, 2, 1, 196_608),  # 512/256, 2 XL layers
        (256, 2, 4, 786_432),  # 4096/256, 2 XL layers
        (256, 0, 1, 65_536),  # Swin-B alone
    ],
)
def test_context_length_is_that_of_table_1(region, layers, chunk_regions, pixels):
    assert context_length(region, layers=layers, chunk_regions=chunk_regions) == pixels


@pytest.mark.parametrize(
    "context, options, pixels",
    [
        ("xl", {"depth": 2, "chunk_regions": 3}, 3 * 3 * 64**2),
        ("xl", {"depth": 2, "chunk_regions": 3, "memory_chunks": 2}, 5 * 3 * 64**2),
        ("xl", {"depth": 4, "chunk_regions": 16}, 640 * 320),  # 80 regions of the 50 there are
        ("xl", {"chunk_regions": None}, 640 * 320),
        ("vit", {}, 640 * 320),
        ("hyper", {"chunk_regions": 3, "memory_chunks": 2}, 3 * 64**2),
        (None, {"residual": False}, 64**2),
    ],
)
def test_context_length_of_a_model(context, options, pixels):
    assert model_context_length(small(context, **options), 640, 320) == pixels


@pytest.mark.parametrize(
    "options, message",
    [
        ({"region": 0}, "region must be at least 1, got 0"),
        ({"layers": -1}, "layers must be at least 0, got -1"),
        ({"chunk_regions": 0}, "chunk_regions must be at least 1, got 0"),
        ({"memory_chunks": -1}, "memory_chunks must be at least 0, got -1"),
    ],
)
def test_context_length_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        context_length(**({"region": 8, "layers": 1} | options))


# Trial


@pytest.mark.parametrize("memory", ["hidden", "kv"])
@pytest.mark.parametrize("depth, memory_chunks", DEPTHS_AND_MEMORIES)
def test_an_encoder_sees_as_far_as_the_arithmetic_says(depth, memory_chunks, memory):
    torch.manual_seed(0)
    encoder = XLContextEncoder(
        32, depth, 2, 2.0, memory_chunks=memory_chunks, memory=memory, causal=depth == 2
    )
    for num_chunks in (depth * memory_chunks + 3, depth * memory_chunks + 1, 1):
        seen = visible_chunks(encoder, num_chunks, length=3)
        in_pixels = context_length(7, layers=depth, chunk_regions=2, memory_chunks=memory_chunks)
        count = min(in_pixels // (2 * 7**2), num_chunks)
        assert seen == list(range(num_chunks - count, num_chunks))


def test_trial_finds_an_encoder_that_sees_other_than_it_should():
    torch.manual_seed(0)

    class Forgetful(XLContextEncoder):
        def forward(self, tokens, memory=None):
            return super().forward(tokens, None)

    class Hoarding(XLContextEncoder):
        def forward(self, tokens, memory=None):
            out, new = super().forward(tokens, None if memory is None else memory[0])
            first = tokens if memory is None else memory[1]
            return out + first[:, :1], (new, first)

    assert visible_chunks(ContextEncoder(32, 2, 2), 4) == [3]
    assert visible_chunks(XLContextEncoder(32, 2, 2), 6) == [3, 4, 5]
    assert visible_chunks(Forgetful(32, 2, 2), 6) == [5]
    assert visible_chunks(Hoarding(32, 2, 2), 6) == [0, 3, 4, 5]


def test_trial_leaves_the_encoder_as_it_was():
    encoder = XLContextEncoder(32, 2, 2).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert visible_chunks(encoder, 3) == [0, 1, 2]
    assert encoder.training
    for name, value in encoder.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])
    with pytest.raises(ValueError, match="at least 1, got 0, 4"):
        visible_chunks(encoder, 0)


@pytest.mark.parametrize(
    "depth, memory_chunks, chunk_regions, memory",
    [(1, 1, 2, "hidden"), (2, 1, 1, "kv"), (1, 3, 1, "kv"), (2, 2, 1, "hidden"), (4, 1, 1, "kv")],
)
def test_a_model_sees_as_many_pixels_as_the_arithmetic_says(
    depth, memory_chunks, chunk_regions, memory
):
    model = small(
        depth=depth, memory_chunks=memory_chunks, chunk_regions=chunk_regions, memory=memory,
        tiling="zigzag",
    )  # fmt: skip
    reach = depth * memory_chunks
    height, width = 64 * 2, 64 * chunk_regions * -(-(reach + 2) // 2)
    seen = visible_image_chunks(model, height, width)
    pixels = mask(model, height, width, seen).sum()
    assert pixels == model_context_length(model, height, width) < height * width
    assert seen == list(range(seen[-1] - reach, seen[-1] + 1))


def test_trial_on_a_chunk_in_the_middle():
    model = small(depth=1)
    assert visible_image_chunks(model, 64, 256, 2) == [1, 2]
    assert visible_image_chunks(model, 64, 256, -4) == [0]


def test_trial_on_other_models_and_sizes():
    assert visible_image_chunks(small(None, chunk_regions=1, residual=False), 70, 130) == [5]
    assert visible_image_chunks(small("vit"), 70, 130) == [0]
    assert visible_image_chunks(small("vit", chunk_regions=2), 70, 130) == [2]
    with pytest.raises(ValueError, match="below the 1 there are, got 1"):
        visible_image_chunks(small("vit"), 70, 130, 1)


# Gradient


def test_without_context_only_the_own_region_counts():
    model = small(None, residual=False)
    field = effective_receptive_field(model, noise(150, 210))
    assert field.shape == (150, 210) and field.dtype == np.float32
    own = np.zeros_like(field, dtype=bool)
    own[128:, 192:] = True  # the last region, 22 x 18 px of it
    np.testing.assert_array_equal(field != 0, own)
    numbers = receptive_field_numbers(model, field)
    assert numbers["region_share"] == numbers["chunk_share"] == pytest.approx(1)
    assert numbers["outside_share"] == 0
    assert numbers["nonzero"] == 22 * 18 / (150 * 210)
    assert numbers["context_px"] == 64**2


@pytest.mark.parametrize("memory", ["hidden", "kv"])
@pytest.mark.parametrize("tiling, residual", [("row", True), ("zigzag", False)])
def test_through_memory_the_gradient_is_nonzero_exactly_where_a_change_is_seen(
    tiling, residual, memory
):
    model = small(tiling=tiling, residual=residual, memory=memory)
    field = effective_receptive_field(model, noise(100, 300))  # 2 x 5 regions, none of them whole
    seen = visible_image_chunks(model, 100, 300)
    assert len(seen) == 3
    np.testing.assert_array_equal(field != 0, mask(model, 100, 300, seen))
    numbers = receptive_field_numbers(model, field)
    assert numbers["region_share"] == numbers["chunk_share"] < 1
    assert numbers["chunk_share"] + numbers["outside_share"] == pytest.approx(1)


@pytest.mark.parametrize("context", ["vit", "hyper"])
def test_a_whole_image_chunk_reaches_every_pixel(context):
    model = small(context)
    field = effective_receptive_field(model, noise(100, 150))
    assert (field > 0).all()
    numbers = receptive_field_numbers(model, field)
    assert numbers["chunk_share"] == pytest.approx(1) and numbers["region_share"] < 1
    assert numbers["nonzero"] == 1 and numbers["context_px"] == 100 * 150


@pytest.mark.parametrize("token, region", [((0, 0), 0), ((1, 2), 1), ((3, 4), 5)])
def test_the_token_that_is_asked_for(token, region):
    model = small(None, residual=False)
    field = effective_receptive_field(model, noise(100, 150), token=token)
    assert token_region(model, 100, 150, token) == region
    top, left, rows, cols = model.grid(100, 150).box(region)
    assert (field[top : top + rows, left : left + cols] > 0).all()
    assert np.count_nonzero(field) == rows * cols


def test_by_default_the_token_is_the_centre_of_the_last_region():
    assert centre_token(small(), 128, 256) == (3, 7)
    assert centre_token(small(), 100, 150) == (2, 4)  # 36 x 22 px: 2 x 1 tokens
    assert centre_token(small(tiling="zigzag"), 128, 256) == (3, 1)
    model, images = small(), noise(128, 256)
    asked = effective_receptive_field(model, images, token=(3, 7))
    np.testing.assert_array_equal(effective_receptive_field(model, images), asked)


def test_the_map_is_the_derivative():
    model = small(depth=1).double()
    (image,) = noise(64, 192, dtype=torch.float64)
    field = effective_receptive_field(model, [image], seed=3)
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (model.num_features,), generator=generator) * 2 - 1
    row, col = centre_token(model, 64, 192)

    @torch.inference_mode()
    def value(pixels):
        return float((model(pixels).tokens[0, row * 6 + col] * signs).sum())

    for y, x in ((5, 70), (40, 130), (33, 161), (10, 20)):
        total, step = 0.0, 1e-4
        for band in range(3):
            ends = []
            for sign in (1, -1):
                moved = image.clone()
                moved[band, y, x] += sign * step
                ends.append(value(moved))
            total += abs(ends[0] - ends[1]) / (2 * step)
        assert field[y, x] == pytest.approx(total, rel=1e-4, abs=1e-12), (y, x)
    assert field[10, 20] == 0


def test_maps_are_averaged_over_images():
    model, images = small(), noise(64, 128, count=2)
    single = [effective_receptive_field(model, [image]) for image in images]
    assert not np.array_equal(*single)
    both = effective_receptive_field(model, iter(images))
    np.testing.assert_allclose(both, (single[0] + single[1]) / 2, rtol=1e-6)


def test_integers_are_scaled_to_one_and_normalised_as_the_model_does():
    pixels = torch.randint(0, 256, (3, 64, 128), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.25, 0.25, 0.25)
    own, plain = small(mean=mean, std=std), small()
    normal = (pixels / 255 - torch.tensor(mean)[:, None, None]) / 0.25
    expected = effective_receptive_field(plain, [normal]) / 0.25
    for image in (pixels, (pixels.int() * 257).to(torch.uint16), pixels / 255):
        field = effective_receptive_field(own, [image])
        np.testing.assert_allclose(field, expected, rtol=1e-3, atol=1e-6 * expected.max())
    shifted = (pixels / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    assert effective_receptive_field(plain, [pixels]).sum() == pytest.approx(
        effective_receptive_field(plain, [shifted]).sum() / 0.225, rel=0.03
    )


def test_same_seed_same_map():
    fields = [effective_receptive_field(small(), noise(64, 128), seed=s) for s in (1, 1, 2)]
    np.testing.assert_array_equal(fields[0], fields[1])
    assert not np.array_equal(fields[0], fields[2])


@pytest.mark.parametrize("gradient", ["stop", "through", "truncated"])
def test_the_models_own_gradient_changes_nothing_and_comes_back(gradient):
    model = small(gradient=gradient, gradient_chunks=1).train()
    model.region_encoder.eval()  # as of a frozen backbone
    with torch.inference_mode():
        field = effective_receptive_field(model, noise(64, 256))
    np.testing.assert_array_equal(field, effective_receptive_field(small(), noise(64, 256)))
    assert model.context.gradient == gradient
    assert model.training and model.context.training and not model.region_encoder.training
    assert all(p.grad is None for p in model.parameters())

    def fail(count):
        assert model.context.gradient == "through" and not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        effective_receptive_field(model, noise(64, 128), progress=fail)
    assert model.context.gradient == gradient and model.training


def test_of_two_stream_the_second_pass_is_measured():
    model = small(depth=1, tiling="two-stream")
    field = effective_receptive_field(model, noise(64, 256), token=(0, 0))
    assert visible_image_chunks(model, 64, 256, 0) == [0, 3]
    np.testing.assert_array_equal(field != 0, mask(model, 64, 256, [0]))


def test_numbers_of_a_known_map():
    model = small(None, residual=False)
    field = np.zeros((64, 192), np.float32)
    field[15, 16] = 60  # half a pixel from the centre of token (0, 0), both ways
    field[15, 100] = 36
    field[0, 191] = 4
    numbers = receptive_field_numbers(model, field, (0, 0))
    assert numbers["region_share"] == pytest.approx(0.6)
    assert numbers["outside_share"] == pytest.approx(0.4)
    assert numbers["radius_50"] == pytest.approx(0.5**0.5)
    assert numbers["radius_95"] == pytest.approx((84.5**2 + 0.25) ** 0.5)
    assert numbers["nonzero"] == 3 / (64 * 192)
    chunked = receptive_field_numbers(small(chunk_regions=2), field, (0, 0))
    assert chunked["region_share"] == pytest.approx(0.6)
    assert chunked["chunk_share"] == pytest.approx(0.96)
    assert chunked["outside_share"] == pytest.approx(0.04)


@pytest.mark.parametrize(
    "images, token, message",
    [
        ([], None, "at least one image, got none"),
        ([torch.zeros(1, 3, 64, 64)], None, r"\[3, \*, \*\], got \[1, 3, 64, 64\]"),
        (
            [torch.randn(3, 64, 64), torch.randn(3, 64, 65)],
            None,
            r"\[3, 64, 64\], got \[3, 64, 65\]",
        ),
        ([torch.randn(2, 64, 64)], None, "C = 3, got"),
        ([torch.zeros(3, 64, 64, dtype=torch.int32)], None, "uint8, uint16 or float, got torch.i"),
        ([torch.randn(3, 64, 64)], (2, 0), r"token map of 2 x 2, got \(2, 0\)"),
        ([torch.randn(3, 64, 64)], (0, -1), r"token map of 2 x 2, got \(0, -1\)"),
        ([torch.full((3, 64, 64), torch.nan)], None, "gradient of the token is not finite"),
    ],
)
def test_measuring_refuses(images, token, message):
    with pytest.raises(ValueError, match=message):
        effective_receptive_field(small(), images, token=token)


def test_a_dead_model_is_told():
    model = small(None, residual=False)
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(ValueError, match="gradient of the token is zero everywhere"):
        effective_receptive_field(model, noise(64, 64))


# Picture and command


def test_picture(tmp_path):
    field = np.zeros((40, 60), np.float32)
    field[:, 30:] = np.logspace(-FIELD_DECADES - 2, 0, 30, dtype=np.float32)
    write_receptive_fields(tmp_path / "a.png", {"one": field, "two": field * 7}, (10, 5, 20, 15))
    picture = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    one, two = picture[28:68, :60], picture[28:68, 68:128]
    np.testing.assert_array_equal(one, two)  # each relative to its own peak
    assert (one[:8, :30] == 0).all()
    assert one[0, 59].tolist() == [253, 231, 37] and one[0, 30].tolist() == [68, 1, 84]
    assert (np.diff(one[0, 36:].sum(-1)) > 0).all()  # lighter step by step
    assert (one[[10, 29], 5:20] == 255).all() and (one[10:30, [5, 19]] == 255).all()
    assert (one[12:28, 7:18] == 0).all()


SMALL = ["--region", 64, "--size", 160, "--images", 2]


def xt(*words):
    return CliRunner().invoke(main, [str(w) for w in ("erf", *words)])


def test_command_writes_picture_numbers_and_maps(tmp_path):
    result = xt("-o", tmp_path / "out", *SMALL, "--token", "1,3", "--seed", 2)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("random weights (seed 2)") == 1 and "10/10" in result.stderr
    names = ["none", "xl", "hyper", "mamba", "vit"]
    rows = [line for line in result.stdout.splitlines() if line.split()[0] in names]
    assert [row.split()[0] for row in rows] == names
    assert re.search(r"none +100.00% +100.00% +0.00%.* 16.00% +4,096 px", rows[0])
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["erf.json", "erf.npz", "erf.png"]
    assert Image.open(out / "erf.png").size == (5 * 168 - 8, 160 + 3 * 28)
    record = json.loads((out / "erf.json").read_text())
    assert list(record["contexts"]) == names and record["pretrained"] is False
    assert record["token"] == [1, 3] and record["region_box"] == [0, 64, 64, 64]
    fields = np.load(out / "erf.npz")
    rng = np.random.default_rng(2)
    images = [rng.standard_normal((3, 160, 160), dtype=np.float32) for _ in range(2)]
    model = xm.create_model("convnext_atto", context="xl", region=64, chunk_regions=1, seed=2)
    field = effective_receptive_field(model, map(torch.from_numpy, images), token=(1, 3), seed=2)
    np.testing.assert_allclose(fields["xl"], field, rtol=1e-4, atol=1e-9)
    wanted = receptive_field_numbers(model, field, (1, 3))
    for name, value in wanted.items():
        assert record["contexts"]["xl"][name] == pytest.approx(value, rel=1e-4)
    assert record["contexts"]["xl"]["config"]["depth"] == 4


def test_command_on_a_photograph(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (170, 300), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "grey.tif", pixels, tile=(64, 64), photometric="minisblack")
    for name in ("a", "b"):
        result = xt("-o", tmp_path / name, *SMALL, "--image", tmp_path / "grey.tif",
                    "--context", "xl", "--chunk-regions", 2)  # fmt: skip
        assert result.exit_code == 0, result.output
    maps = [np.load(tmp_path / name / "erf.npz") for name in ("a", "b")]
    assert maps[0].files == ["xl"]
    np.testing.assert_array_equal(maps[0]["xl"], maps[1]["xl"])
    record = json.loads((tmp_path / "a" / "erf.json").read_text())
    assert record["image"].endswith("grey.tif")
    config = record["contexts"]["xl"]["config"]
    assert config["in_chans"] == 1 and config["chunk_regions"] == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["--size", 63], "--size: must be at least a region, 64 px, got 63"),
        (["--size", 5000], "5000 is not in the range 1<=x<=4096"),
        (["--token", "9,0"], r"token map of 5 x 5, got \(9, 0\)"),
        (["--token", "3"], "--token: expected two numbers like 3,5"),
        (["--token", "-1,0"], "numbers of at least 0"),
        (["--images", 0], "0 is not in the range"),
        (["--region", 65], "multiple of the stride 32"),
        (["--encoder", "no_such_net"], "must be a timm model"),
        (["--context", "lstm"], "'lstm' is not one of"),
        (["--image", "none.tif"], "none.tif"),
        (["--image", "low.tif"], r"low.tif: expected at least 160 x 160 px \(--size\), found 159"),
        (["--image", "nan.tif"], "nan.tif: expected finite pixels"),
        (["--image", "text.tif"], "text.tif"),
    ],
)
def test_command_refuses_in_one_sentence_and_leaves_nothing(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("low.tif", np.zeros((159, 300, 3), np.uint8), photometric="rgb")
    tifffile.imwrite("nan.tif", np.full((160, 160, 3), np.nan, np.float32), photometric="rgb")
    (tmp_path / "text.tif").write_text("no image at all\n" * 30)
    before = sorted(tmp_path.iterdir())
    result = xt("-o", "out", *SMALL, *words)
    assert result.exit_code != 0 and "Traceback" not in result.output
    assert re.search(message, result.output), result.output
    assert result.output.count("Error: ") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_command_does_not_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    result = xt("-o", tmp_path / "out", *SMALL)
    assert result.exit_code != 0 and "out exists already" in result.output
