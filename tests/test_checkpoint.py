"""Saved models, and the converter of the paper's released checkpoints."""

import json
import math
import os
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

import xt_models as xm
from xt_models import released
from xt_models.cli import main
from xt_models.model import IMAGENET_MEAN, IMAGENET_STD

pytestmark = pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")

WIDTHS = {"tiny": 96, "small": 96, "base": 128, "large": 192}
DEPTHS = {
    "tiny": (2, 2, 6, 2),
    "small": (2, 2, 18, 2),
    "base": (2, 2, 18, 2),
    "large": (2, 2, 18, 2),
}
HEADS = {"tiny": 3, "small": 3, "base": 4, "large": 6}
MILLIONS = {
    "plain": {"tiny": 30.82, "small": 52.20, "base": 92.26, "large": 206.40},
    "hyper": {"tiny": 47.27, "small": 68.65, "base": 106.78, "large": 215.48},
    "mamba": {"tiny": 43.48, "small": 64.86, "base": 102.99, "large": 211.69},
}


def layout(size, context, classes=284, dim=768):
    """Names and shapes of a released checkpoint."""
    out = {}

    def linear(name, rows, cols, bias=True):
        out[f"{name}.weight"] = (rows, cols)
        if bias:
            out[f"{name}.bias"] = (rows,)

    def norm(name, width, bias=True):
        out[f"{name}.weight"] = (width,)
        if bias:
            out[f"{name}.bias"] = (width,)

    width, heads = WIDTHS[size], HEADS[size]
    out["encoder.model.patch_embed.proj.weight"] = (width, 3, 4, 4)
    out["encoder.model.patch_embed.proj.bias"] = (width,)
    norm("encoder.model.patch_embed.norm", width)
    for stage, depth in enumerate(DEPTHS[size]):
        prefix = f"encoder.model.layers_{stage}"
        if stage:
            linear(f"{prefix}.downsample.reduction", 2 * width, 4 * width, bias=False)
            width, heads = 2 * width, 2 * heads
            norm(f"{prefix}.downsample.norm", width)
        for i in range(depth):
            block = f"{prefix}.blocks.{i}"
            out[f"{block}.attn.logit_scale"] = (heads, 1, 1)
            out[f"{block}.attn.q_bias"] = out[f"{block}.attn.v_bias"] = (width,)
            linear(f"{block}.attn.cpb_mlp.0", 512, 2)
            linear(f"{block}.attn.cpb_mlp.2", heads, 512, bias=False)
            linear(f"{block}.attn.qkv", 3 * width, width, bias=False)
            linear(f"{block}.attn.proj", width, width)
            norm(f"{block}.norm1", width)
            linear(f"{block}.mlp.fc1", 4 * width, width)
            linear(f"{block}.mlp.fc2", width, 4 * width)
            norm(f"{block}.norm2", width)
    if context == "plain":
        linear("decoder.layers.0", 4 * width, width)
        norm("decoder.layers.2", 4 * width)
        linear("decoder.layers.3", classes, 4 * width)
        return out
    out["decoder.cls_token"] = (1, 1, dim)
    linear("decoder.input_proj", dim, width)
    norm("decoder.cls.0", dim)
    linear("decoder.cls.1", classes, dim)
    for i in range(2 if context == "hyper" else 4):
        layer = f"decoder.layers.{i}"
        if context == "hyper":
            linear(f"{layer}.attn.qkv", 3 * dim, dim)
            linear(f"{layer}.attn.proj", dim, dim)
            norm(f"{layer}.input_layernorm", dim, bias=False)
            norm(f"{layer}.post_attention_layernorm", dim, bias=False)
            linear(f"{layer}.mlp.gate_proj", 4 * dim, dim, bias=False)
            linear(f"{layer}.mlp.up_proj", 4 * dim, dim, bias=False)
            linear(f"{layer}.mlp.down_proj", dim, 4 * dim, bias=False)
        else:
            inner = 2 * dim
            norm(f"{layer}.norm", dim)
            out[f"{layer}.mixer.A_log"] = (inner, 16)
            out[f"{layer}.mixer.D"] = (inner,)
            linear(f"{layer}.mixer.in_proj", 2 * inner, dim, bias=False)
            out[f"{layer}.mixer.conv1d.weight"] = (inner, 1, 4)
            out[f"{layer}.mixer.conv1d.bias"] = (inner,)
            linear(f"{layer}.mixer.x_proj", 48 + 32, inner, bias=False)
            linear(f"{layer}.mixer.dt_proj", inner, 48)
            linear(f"{layer}.mixer.out_proj", dim, inner, bias=False)
    return out


def weights(size, context, seed=0, **options):
    """Random released weights: norms near one, so that every part of the model is heard."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in layout(size, context, **options).items():
        scale = 0.3 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        value = scale * torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and re.search(r"norm\w*\.weight|cls\.0\.w|layers\.2\.w", name)
        out[name] = value + 1 if is_norm else value
        if name.endswith("A_log"):
            out[name] = torch.arange(1.0, 17).log().repeat(shape[0], 1)
    return out


def write(path, state, **entries):
    entries = {"epoch": 99, "optimizer_state_dict": {}, "metrics": {"top1": 0.6}} | entries
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} | entries, path)
    return path


class Released(nn.Module):
    """The released model, written down from its description, in plain PyTorch."""

    def __init__(self, context, state):
        super().__init__()
        self.context, self.state = context, state
        self.encoder = timm.create_model("swinv2_tiny_window16_256", features_only=True).eval()
        prefix = "encoder.model."
        self.encoder.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def layer_norm(self, x, name):
        w, b = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, w.shape, w, b, 1e-5)

    def rms_norm(self, x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * self.state[f"{name}.weight"]

    def forward(self, pixels):
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        x = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
        rows = [
            torch.cat([self.encoder(part)[-1] for part in row.split(256, 3)], 2)
            for row in x.split(256, 2)
        ]
        x = torch.cat(rows, 1)  # [B, rows, cols, C]
        if self.context == "plain":
            x = F.gelu(self.linear(x.mean((1, 2)), "decoder.layers.0"))
            return self.linear(self.layer_norm(x, "decoder.layers.2"), "decoder.layers.3")
        x = self.linear(x, "decoder.input_proj")
        rows, cols, dim = x.shape[1:]
        w = 10000 ** (-torch.arange(dim // 4) / (dim // 4))
        px, py = torch.arange(cols)[:, None] * w, torch.arange(rows)[:, None] * w
        px, py = px[None].expand(rows, -1, -1), py[:, None].expand(-1, cols, -1)
        x = (x + torch.cat([px.sin(), px.cos(), py.sin(), py.cos()], -1)).flatten(1, 2)
        x = torch.cat([x, self.state["decoder.cls_token"].expand(len(x), -1, -1)], 1)
        mix = self.hyper if self.context == "hyper" else self.mamba
        for i in range(2 if self.context == "hyper" else 4):
            x = mix(x, f"decoder.layers.{i}", i)
        return self.linear(self.layer_norm(x[:, -1], "decoder.cls.0"), "decoder.cls.1")

    def hyper(self, x, name, i):
        batch, length, _ = x.shape
        qkv = self.linear(self.rms_norm(x, f"{name}.input_layernorm"), f"{name}.attn.qkv")
        q, k, v = qkv.reshape(batch, length, 3, 6, 128).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT) * 128**-0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        x = x + self.linear(
            (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj"
        )
        y = self.rms_norm(x, f"{name}.post_attention_layernorm")
        gate = F.gelu(self.linear(y, f"{name}.mlp.gate_proj"))
        return x + self.linear(
            gate * self.linear(y, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj"
        )

    def mamba(self, x, name, i):
        if i % 2 == 0:
            return self.mamba(x.flip(1), name, 1).flip(1)
        h = self.layer_norm(x, f"{name}.norm")
        mixer = f"{name}.mixer"
        u, z = self.linear(h, f"{mixer}.in_proj").mT.chunk(2, 1)  # [B, inner, L]
        w, b = self.state[f"{mixer}.conv1d.weight"], self.state[f"{mixer}.conv1d.bias"]
        u = F.silu(F.conv1d(F.pad(u, (3, 0)), w, b, groups=len(b)))
        step, B, C = self.linear(u.mT, f"{mixer}.x_proj").split([48, 16, 16], -1)
        delta = F.softplus(self.linear(step, f"{mixer}.dt_proj"))  # [B, L, inner]
        A = -self.state[f"{mixer}.A_log"].exp()
        state, ys = torch.zeros(len(x), *A.shape), []
        for t in range(x.shape[1]):
            d = delta[:, t, :, None]
            state = (d * A).exp() * state + d * B[:, t, None] * u[:, :, t, None]
            ys.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
        y = (torch.stack(ys, -1) + self.state[f"{mixer}.D"][:, None] * u) * F.silu(z)
        return h + self.linear(y.mT, f"{mixer}.out_proj")


@pytest.fixture(scope="module", params=released.CONTEXTS)
def converted(request, tmp_path_factory):
    """(context, released weights, folder of the converted model) of a Swin-T with 284 classes."""
    folder = tmp_path_factory.mktemp("released")
    state = weights("tiny", request.param)
    file = write(folder / "checkpoint.pth", state)
    result = CliRunner().invoke(main, ["convert-checkpoint", str(file), "-o", f"{folder}/model"])
    assert result.exit_code == 0, result.output
    file.unlink()
    assert f"SwinV2 tiny, context {request.param}" in result.output
    assert f"{MILLIONS[request.param]['tiny']:.2f} M" in result.output
    assert "left behind  epoch, metrics, optimizer_state_dict" in result.output
    return request.param, state, folder / "model"


@pytest.mark.parametrize("context", released.CONTEXTS)
@pytest.mark.parametrize("size", WIDTHS)
def test_every_released_layout_is_built_exactly(size, context):
    names = {}
    for name, shape in layout(size, context).items():
        ours = [re.sub(a, b, name) for a, b in released.NAMES if re.fullmatch(a, name)]
        names[ours[0]] = shape
    with torch.device("meta"):
        model = xm.XT(released.released_config(size, context))
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == names
    count = sum(map(math.prod, names.values())) / 1e6
    # Two decimals of a number that the paper's table was typed from, class token aside.
    assert count == pytest.approx(MILLIONS[context][size], abs=0.0058)


def test_a_converted_model_computes_what_the_released_one_does(converted):
    """Two regions side by side, so the order of tokens over the whole map counts."""
    context, state, folder = converted
    model = xm.XT.from_pretrained(folder)
    assert model.config == released.released_config("tiny", context)
    pixels = torch.randint(0, 256, (1, 3, 256, 512), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, theirs = (
            model(pixels.to(torch.uint8)).logits,
            Released(context, state)(pixels.float()),
        )
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def empty(context="hyper"):
    """A Swin-T layout of zeros that take no room, in memory or in a file."""
    return {name: torch.zeros(()).expand(s) for name, s in layout("tiny", context).items()}


NORM = "encoder.model.patch_embed.norm.weight"


def without(name, context="hyper"):
    state = empty(context)
    del state[name]
    return state


@pytest.mark.parametrize(
    "state, message",
    [
        (without(NORM), r"1 missing \(region_encoder.model.patch_embed.norm.weight\)"),
        (empty() | {"decoder.extra": torch.zeros(3)}, r"1 unexpected \(decoder.extra\)"),
        (
            empty() | {"decoder.cls.1.weight": torch.zeros(284, 512)},
            r"1 of another shape \(head.1.weight \[284, 512\] for \[284, 768\]\)",
        ),
        (empty() | {NORM: torch.zeros(96).to_sparse()}, f"{NORM} must be a dense .* sparse_coo"),
        (empty() | {NORM: torch.zeros(96, device="meta")}, f"{NORM} must be a dense .* on meta"),
        (empty() | {NORM: torch.zeros(96).long()}, f"{NORM} must hold real numbers, .*int64"),
        (empty() | {NORM: torch.zeros(96) * 1j}, f"{NORM} must hold real numbers, .*complex64"),
        (
            empty() | {NORM: torch.full((96,), math.nan)},
            "hold weights finite in fp32, .*norm.weight",
        ),
        (
            empty() | {NORM: torch.full((96,), 1e300, dtype=torch.float64)},
            "hold weights finite in fp32, .*norm.weight",
        ),
        (
            empty() | {"region_encoder.model.patch_embed.norm.weight": torch.ones(96)},
            "one tensor a weight, found two of region_encoder.model.patch_embed.norm.weight",
        ),
        (empty() | {NORM: 3.0}, f"{NORM} must be a tensor, found float"),
        (
            {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(10, 512)},
            "must be a released xT .*, found 2 tensors such as conv1.weight, fc.weight",
        ),
        (
            empty() | {"encoder.model.patch_embed.proj.weight": torch.zeros(64, 3, 4, 4)},
            "must be a released xT classification checkpoint",
        ),
        ({}, "must hold a state dict, found dict"),
        (
            empty() | {"encoder.model.layers_0.blocks.1.attn_mask": torch.zeros(64, 49, 49)},
            "attn_mask must be the table of a released window size, found another",
        ),
    ],
)
def test_refuses_what_is_no_released_checkpoint(state, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        released.convert_checkpoint(write(tmp_path / "file.pth", state), tmp_path / "out")
    assert os.listdir(tmp_path) == ["file.pth"]


def test_refuses_a_weight_by_two_names(tmp_path):
    state = {f"module.{name}": tensor for name, tensor in empty().items()}
    torch.save({"state_dict": state | {NORM: torch.ones(96)}}, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match=f"one tensor a weight, found two of {NORM}"):
        released.convert_checkpoint(tmp_path / "twice.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tables_of_older_timm_may_be_there(tmp_path):
    state, window = empty("plain"), torch.arange(-15.0, 16) / 15 * 8
    window = window.sign() * (window.abs() + 1).log2() / 3
    table = torch.stack(torch.meshgrid(window, window, indexing="ij"), -1)[None]
    state["encoder.model.layers_0.blocks.0.attn.relative_coords_table"] = table
    state["encoder.model.layers_0.blocks.0.attn.k_bias"] = torch.zeros(96)
    file = write(tmp_path / "file.pth", state)
    found = released.convert_checkpoint(file, tmp_path / "out")
    assert found[:4] == ("tiny", "plain", 284, 30_817_862)


class Planted:
    """Makes a folder when it is unpickled by a reader that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_run_code_does_not(form, tmp_path):
    file, trap = tmp_path / "file.pth", tmp_path / "trap"
    payload = {"state_dict": empty(), "metrics": Planted(trap)}
    if form == "pickle":
        file.write_bytes(pickle.dumps({"metrics": Planted(trap)}))
    else:
        torch.save(payload, file, _use_new_zipfile_serialization=form == "zip")
    result = CliRunner().invoke(main, ["convert-checkpoint", str(file), "-o", f"{tmp_path}/out"])
    assert result.exit_code == 1 and result.output.count("Error: ") == 1
    named = "its pickle has others" if form == "pickle" else r"it names \w+\.mkdir"
    assert re.search(rf"plain values only, but {named}; nothing of it was run", result.output)
    assert os.listdir(tmp_path) == ["file.pth"]
    if form == "pickle":
        with file.open("rb") as stream:  # the trap is a real one
            pickle.load(stream)
        assert trap.is_dir()


@pytest.mark.parametrize("cut", [0, 10, 3000])
def test_a_damaged_file_is_one_error(cut, tmp_path):
    file = write(tmp_path / "file.pth", empty())
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(
        ValueError, match=r"file.pth must (be a whole file of torch.save|hold tens)"
    ):
        released.convert_checkpoint(file, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
        released.convert_checkpoint(tmp_path / "none.pth", tmp_path / "out")
    assert os.listdir(tmp_path) == ["file.pth"]


def test_released_config_refuses():
    with pytest.raises(ValueError, match="size must be one of tiny, small, base, large, got 'hug"):
        released.released_config("huge")
    with pytest.raises(ValueError, match="context must be one of plain, hyper, mamba, got 'xl'"):
        released.released_config("tiny", "xl")


def small(**options):
    settings = {"region": 64, "dim": 32, "num_heads": 2, "depth": 1, "chunk_regions": 2}
    return xm.create_model("test_convnext", **settings | options)


@pytest.mark.parametrize("context", ["xl", "mamba", None])
def test_every_setting_comes_back(context, tmp_path):
    options = {"num_classes": 4, "mean": (0.1, 0.2, 0.3), "tiling": "zigzag", "in_chans": 3}
    model = small(context=context, residual=False, **options)
    model.save_pretrained(tmp_path / "a" / "model")
    state = torch.random.get_rng_state()
    loaded = xm.XT.from_pretrained(tmp_path / "a" / "model")
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was moved"
    assert loaded.config == model.config and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    files = sorted(p.name for p in (tmp_path / "a" / "model").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    card = (tmp_path / "a" / "model" / "README.md").read_text()
    assert "library_name: xt-kernels" in card and f"context {context}" in card


def test_a_model_that_is_replaced_is_never_mixed(tmp_path, monkeypatch):
    """Whatever the step at which saving dies, the folder holds the old model, the new one or none,
    and no file that is half-written."""
    old, new = small(seed=1, mean=(0.1, 0.2, 0.3)), small(seed=2)
    real, seen = os.replace, set()
    for fatal in range(4):
        folder = tmp_path / str(fatal)
        old.save_pretrained(folder)
        calls = []

        def replace(source, target, calls=calls, fatal=fatal):
            if len(calls) == fatal:
                raise KeyboardInterrupt
            calls.append(target)
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                new.save_pretrained(folder)
            except KeyboardInterrupt:
                pass
        assert not [name for name in os.listdir(folder) if name.startswith(".part")]
        try:
            found = xm.XT.from_pretrained(folder)
        except ValueError as error:
            assert "must hold config.json, found none" in str(error)
            seen.add("none")
            continue
        model = new if found.config == new.config else old
        weights = (m.state_dict()["input_proj.weight"] for m in (found, model))
        assert torch.equal(*weights)
        seen.add("new" if model is new else "old")
    assert seen == {"none", "new"}


def test_a_save_that_fails_leaves_the_model_before(tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        small(seed=3).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_card_that_was_written_by_hand_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    small().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_loading_refuses(tmp_path, monkeypatch):
    from huggingface_hub import constants
    from safetensors.torch import load_file, save_file

    small(num_classes=4).save_pretrained(tmp_path)
    config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, state = config.read_text(), load_file(file)

    def refuses(message, error=ValueError, where=tmp_path):
        with pytest.raises(error, match=message):
            xm.XT.from_pretrained(str(where))

    config.write_text(json.dumps(json.loads(text) | {"dim": 64}))
    refuses(r"must hold the weights of this architecture, found tensors \d+ of another shape")
    config.write_text(json.dumps(json.loads(text) | {"context": None, "residual": False}))
    refuses(r"found tensors \d+ missing .*, \d+ unexpected \(context.layers.0")
    config.write_text(text[:-5])
    refuses("config.json of .* must be JSON")
    config.write_text(text)
    save_file({n: t for n, t in state.items() if n != "head.1.bias"}, file)
    refuses(r"1 missing \(head.1.bias\)")
    file.write_bytes(file.read_bytes()[:1000])
    refuses("model.safetensors must be a whole safetensors file")
    file.unlink()
    refuses("model.safetensors", FileNotFoundError)
    config.unlink()
    refuses("must hold config.json, found none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refuses("someone/model is no folder, and could not be had from the hub", ConnectionError,
            "someone/model")  # fmt: skip


def test_from_the_hub_by_name(tmp_path, monkeypatch):
    """A stand-in for the hub: what it is asked for, and that it may be asked nothing else."""
    model = small()
    model.save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, *, revision, **_):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **kw: download(**kw))
    monkeypatch.setattr("xt_models.checkpoint.hf_hub_download", download)
    loaded = xm.XT.from_pretrained("someone/model", revision="v1")
    assert loaded.config == model.config
    files = ("config.json", "model.safetensors", "classes.json")
    assert asked == [("someone/model", f, "v1") for f in files]
