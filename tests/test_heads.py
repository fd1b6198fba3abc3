"""Heads: outputs for any size, what belongs to which group, losses against independent forms."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import xt_models as xm
from xt_kernels.regions import RegionGrid
from xt_models.heads.base import Trunk, _spans
from xt_models.heads.classification import ClassificationHead
from xt_models.heads.dense import DenseHead

pytestmark = pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")
SMALL = {"region": 64, "dim": 32, "depth": 2, "num_heads": 2, "chunk_regions": 2, "residual": False}
DENSE = {"kind": "dense", "classes": 3, "output_stride": 4}


def small(heads, context="xl", **kwargs):
    return xm.create_model("convnext_atto", context=context, heads=heads, **SMALL | kwargs)


def image(height, width, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def forward(model, pixels):
    with torch.inference_mode():
        return model(pixels)


def trunk(stride=8, dim=16):
    return Trunk(dim, dim, stride, (4, 8), (2, 4))


@pytest.mark.parametrize("size", [(1, 1), (64, 128), (65, 130), (31, 200), (200, 97)])
def test_dense_map_has_the_size_of_the_image(size):
    model = small({"ground": DENSE, "pixels": {"kind": "dense", "classes": 2, "loss": "bce"}})
    out = forward(model, image(*size, batch=2))
    cells = [-(-n // 4) for n in size]
    assert out.heads["ground"].shape == (2, 3, *cells)
    assert out.heads["pixels"].shape == (2, 2, *size)
    assert model.heads["ground"].predict(out.heads["ground"]).shape == (2, *cells)
    scores = model.heads["pixels"].predict(out.heads["pixels"])
    assert scores.shape == (2, 2, *size) and 0 <= scores.min() and scores.max() <= 1


def test_dense_cells_lie_over_their_tokens():
    """Against the head's own layers, applied to one token by hand."""
    model = small({"ground": DENSE})
    out = forward(model, image(100, 150))
    head = model.heads["ground"]
    tokens = out.tokens.unflatten(1, (4, 5))
    for row, col in ((0, 0), (1, 3), (3, 4)):
        with torch.inference_mode():
            cells = head.proj(F.layer_norm(
                tokens[0, row, col], (32,), head.norm.weight, head.norm.bias, 1e-5
            )).view(3, 8, 8)  # fmt: skip
        ours = out.heads["ground"][0, :, row * 8 : row * 8 + 8, col * 8 : col * 8 + 8]
        expected = cells[:, : ours.shape[1], : ours.shape[2]]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "decoder, encoder, output_stride",
    [("unet", "convnext_atto", 1), ("unet", "hiera_tiny_224", 8), ("fpn", "convnext_atto", 2),
     ("upernet", "convnext_atto", 4)],
)  # fmt: skip
def test_decoders_for_any_size(decoder, encoder, output_stride):
    options = {"kind": "segmentation", "classes": 3, "decoder": decoder}
    options["output_stride"] = output_stride
    region = 96 if encoder.startswith("hiera") else 64
    heads = {"ground": options}
    model = xm.create_model(encoder, heads=heads, **SMALL | {"region": region})
    for size in ((1, 1), (100, 203)):
        out = forward(model, image(*size, batch=2)).heads["ground"]
        assert out.shape == (2, 3, *(-(-n // output_stride) for n in size))
        assert out.std() > 0


def test_unet_learns_from_tokens_and_from_every_stage():
    options = {"kind": "segmentation", "classes": 2, "decoder_channels": [16, 16, 8, 8, 8]}
    model = small({"ground": options}).train()
    seen = {}
    head = model.heads["ground"]
    plain = head.forward

    def forward(tokens, stages):
        seen.update(stages, tokens=tokens)
        for feature in seen.values():
            feature.retain_grad()
        return plain(tokens, stages)

    head.forward = forward
    out = model(image(64, 128))
    head.loss(out.heads["ground"], torch.randint(0, 2, (1, 64, 128))).backward()
    assert [seen[i].shape[1:] for i in range(3)] == [(40, 16, 16), (80, 8, 8), (160, 4, 4)]
    assert all(feature.grad.abs().sum() > 0 for feature in seen.values())


def test_groups_decide_what_a_decoder_sees():
    """A pixel changes the map of its group, and, without context, of no other."""
    options = {"kind": "segmentation", "classes": 2, "group": 2}
    model = small({"ground": options}, context=None)
    pixels = image(128, 64 * 5)
    before = forward(model, pixels).heads["ground"]
    pixels[0, :, 10, 10] = 255 - pixels[0, :, 10, 10]
    changed = (forward(model, pixels).heads["ground"] != before).any(1)[0]
    changed = changed.view(2, 64, 5, 64).any(1).any(2)
    assert changed[0].tolist() == [True, True, False, False, False] and changed[1, :2].any()
    # The last group is columns 3 and 4, and column 3 belongs to the one before it.
    pixels[0, :, 10, 64 * 4 + 10] = 255 - pixels[0, :, 10, 64 * 4 + 10]
    again = forward(model, pixels).heads["ground"]
    changed = (again != before).any(1)[0, :, 64 * 2 :].view(128, 3, 64).any(0).any(1)
    assert changed.tolist() == [False, False, True]


def test_heads_leave_the_rest_of_the_model_as_it_is():
    plain, more = small({}, num_classes=4), small({"ground": DENSE}, num_classes=4)
    assert set(more.state_dict()) - set(plain.state_dict()) == {
        f"heads.ground.{n}" for n in ("norm.weight", "norm.bias", "proj.weight", "proj.bias")
    }
    pixels = image(70, 150)
    ours, expected = forward(more, pixels), forward(plain, pixels)
    assert torch.equal(ours.logits, expected.logits) and expected.heads == {}


def test_several_heads_learn_at_once():
    heads = {"ground": DENSE, "tags": {"kind": "classification", "classes": 5, "multi_label": True}}
    model = small(heads, num_classes=4).train()
    out = model(image(64, 128, batch=2))
    loss = model.head.loss(out.logits, torch.tensor([1, 3]))
    loss = loss + model.heads["ground"].loss(out.heads["ground"], torch.randint(0, 3, (2, 16, 32)))
    loss = loss + model.heads["tags"].loss(out.heads["tags"], torch.rand(2, 5) > 0.5)
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


HEADS_OF_GRADIENTS = {
    "dense": DENSE,
    "fcos": {"kind": "fcos", "classes": 2, "dim": 32, "group": 2},
    "unet": {"kind": "segmentation", "classes": 3, "output_stride": 4, "decoder_channels": [8] * 3},
}


@pytest.mark.parametrize("name", HEADS_OF_GRADIENTS)
def test_recompute_gives_the_same_gradients(name):
    grads = []
    for recompute in (None, 3):
        model = small({"ground": HEADS_OF_GRADIENTS[name]})  # in evaluation mode: batch norm
        model.recompute = recompute
        boxes = [{"boxes": torch.tensor([[9.0, 9.0, 99.0, 80.0]]), "labels": torch.tensor([1])}]
        target = boxes * 2 if name == "fcos" else torch.zeros(2, 25, 38, dtype=torch.int64)
        out = model(image(100, 150, batch=2))
        model.heads["ground"].loss(out.heads["ground"], target).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for key, expected in grads[0].items():
        torch.testing.assert_close(grads[1][key], expected, rtol=1e-3, atol=1e-5)


def test_recompute_counts_once_in_running_statistics():
    statistics = []
    for recompute in (None, 100):  # all regions at once
        model = small({"ground": HEADS_OF_GRADIENTS["unet"]}).train()
        model.recompute = recompute
        out = model(image(100, 150))
        head = model.heads["ground"]
        head.loss(out.heads["ground"], torch.zeros(1, 25, 38, dtype=torch.int64)).backward()
        statistics.append([b for n, b in head.named_buffers() if "running" in n])
    assert len(statistics[0]) > 4
    for ours, expected in zip(*statistics, strict=True):
        torch.testing.assert_close(ours, expected)


def test_save_and_load_with_heads(tmp_path):
    model = small({"ground": DENSE})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["heads"] == {"ground": DENSE}
    loaded = xm.XT.from_pretrained(str(tmp_path)).eval()
    pixels = image(70, 100)
    assert torch.equal(
        forward(loaded, pixels).heads["ground"], forward(model, pixels).heads["ground"]
    )


@pytest.mark.parametrize("count, side, overlap", [
    (1, 1, 0), (5, 2, 0), (5, 2, 1), (7, 3, 1), (4, 9, 2), (6, None, 0), (9, 4, 3),
])  # fmt: skip
def test_groups_cover_every_region_and_cores_every_place_once(count, side, overlap):
    spans = _spans(count, side, overlap)
    owned = [i for s in spans for i in range(s.own, s.start + s.size)]
    assert owned == list(range(count))
    assert len({s.size for s in spans}) == 1
    assert spans[0].low == float("-inf") and spans[-1].high == float("inf")
    for before, after in pairwise(spans):
        assert before.high == after.low
        assert after.start <= before.high <= before.start + before.size
        assert after.start + overlap <= before.start + before.size


def test_groups_of_an_image():
    grid = RegionGrid(300, 500, 100)
    head = DenseHead(trunk(), classes=2)
    assert [g.own for g in head.groups(grid)] == [
        (row, col, 1, 1) for row in range(3) for col in range(5)
    ]
    assert head.groups(grid)[6].core == (100, 100, 200, 200)


def test_dense_losses_against_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).float()
    target = torch.randint(0, 3, (2, 4, 5), generator=generator)
    target[0, :2] = 255
    ours = DenseHead(trunk(), classes=3).loss(logits, target)
    chosen = logits.log_softmax(1).gather(1, target.clamp(max=2)[:, None])[:, 0]
    torch.testing.assert_close(ours, -chosen[target != 255].mean())

    shares = torch.rand(2, 3, 4, 5, generator=generator)
    p = logits.sigmoid()
    ours = DenseHead(trunk(), classes=3, loss="bce", pos_weight=4.0).loss(logits, shares)
    expected = -(4 * shares * p.log() + (1 - shares) * (1 - p).log()).mean()
    torch.testing.assert_close(ours, expected)

    hard = shares > 0.5
    ours = DenseHead(trunk(), classes=3, loss="focal").loss(logits, hard)
    expected = torch.where(
        hard, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
    ).mean()  # equation 5 of Lin et al. 2017, alpha 0.25, gamma 2
    torch.testing.assert_close(ours, expected)


def test_all_cells_ignored_is_no_loss():
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    loss = DenseHead(trunk(), classes=2).loss(logits, torch.full((1, 3, 3), 255))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_classification_losses_against_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator)
    labels = torch.tensor([0, 2, 1, 1])
    head, tags = ClassificationHead(8, 3), ClassificationHead(8, 3, multi_label=True)
    soft = F.one_hot(labels, 3).float() * 0.7 + 0.1
    torch.testing.assert_close(
        head.loss(logits, labels, label_smoothing=0.3), head.loss(logits, soft)
    )
    torch.testing.assert_close(
        head.loss(logits, soft), -(soft * logits.log_softmax(1)).sum(1).mean()
    )
    p = logits.sigmoid()
    torch.testing.assert_close(
        tags.loss(logits, soft), -(soft * p.log() + (1 - soft) * (1 - p).log()).mean()
    )
    torch.testing.assert_close(head.predict(logits).sum(1), torch.ones(4))
    torch.testing.assert_close(tags.predict(logits), p)


def dense_loss(target, **options):
    head = DenseHead(trunk(), **{"classes": 3} | options)
    return head.loss(torch.zeros(1, head.classes, 4, 4), target)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: small({"a b": DENSE}), "names of heads must be identifiers other .* got 'a b'"),
        (lambda: small({"keys": DENSE}), "names of heads must be identifiers other .* got 'keys'"),
        (lambda: small({"run": DENSE}), "other than embedding, journal, preview, run, tokens"),
        (lambda: small(["dense"]), r"heads must be a dict, name -> options, got \['dense'\]"),
        (lambda: small({"a": {"kind": "unet"}}), "must have a kind of classification, dense"),
        (lambda: small({"a": "dense"}), r"heads\['a'\] must have a kind of .* got 'dense'"),
        (lambda: small({"a": {"kind": "dense"}}), "lacks option classes; it takes classes, loss"),
        (
            lambda: small({"a": DENSE | {"colour": 1}}),
            "has unknown option colour; it takes classes",
        ),
        (lambda: small({"a": DENSE | {"classes": 0}}), "classes must be at least 1, got 0"),
        (
            lambda: small({"a": DENSE | {"output_stride": 5}}),
            "divide the encoder's stride 32, got 5",
        ),
        (
            lambda: small({"a": DENSE | {"loss": "l2"}}),
            "loss must be one of cross_entropy, bce, focal",
        ),
        (
            lambda: small({"a": DENSE | {"pos_weight": 2.0}}),
            "pos_weight must be positive, and None",
        ),
        (
            lambda: dense_loss(torch.zeros(1, 4, 5, dtype=int)),
            r"target must be \[B, h, w\] = \[1, 4, 4\]",
        ),
        (lambda: dense_loss(torch.full((1, 4, 4), 3)), r"hold labels in \[0, 3\), or 255 .* got 3"),
        (
            lambda: dense_loss(torch.full((1, 4, 4), -1)),
            r"hold labels in \[0, 3\), or 255 .* got -1",
        ),
        (
            lambda: dense_loss(torch.zeros(1, 4, 4)),
            "hold integers, the numbers of classes, got torch.fl",
        ),
        (lambda: dense_loss(torch.zeros(1, 2, 4, 4), loss="bce"), r"= \[1, 3, 4, 4\], got"),
        (
            lambda: dense_loss(torch.full((1, 3, 4, 4), 1.5), loss="bce"),
            r"numbers in \[0, 1\], got 1.5",
        ),
        (lambda: dense_loss(torch.full((1, 3, 4, 4), float("nan")), loss="bce"), "got nan"),
        (
            lambda: small({"a": DENSE | {"kind": "segmentation", "decoder": "psp"}}),
            "decoder must be one of unet, fpn, upernet, got 'psp'",
        ),
        (
            lambda: small({"a": DENSE | {"kind": "segmentation", "decoder_channels": [8]}}),
            r"one number for each of 3 blocks, from stride 32 to 4, got \(8,\)",
        ),
        (
            lambda: small(
                {"a": {"kind": "segmentation", "classes": 2, "decoder": "fpn", "output_stride": 8}}
            ),
            "output_stride must be at most 4 for 'fpn', got 8",
        ),
        (
            lambda: small({"a": {"kind": "segmentation", "classes": 2, "group": 0}}),
            "group must be at least 1 region, or None, got 0",
        ),
        (
            lambda: ClassificationHead(8, 3).loss(torch.zeros(2, 3), torch.tensor([0, 3])),
            r"ClassificationHead: target must hold labels in \[0, 3\), got 3",
        ),
        (
            lambda: ClassificationHead(8, 3).loss(torch.zeros(2, 3), torch.tensor([0])),
            r"target must be \[B\] = \[2\], got \[1\]",
        ),
        (
            lambda: ClassificationHead(8, 3, multi_label=True).loss(
                torch.zeros(2, 3), torch.tensor([0, 1])
            ),
            r"target must be \[B, classes\] = \[2, 3\], got \[2\]",
        ),
    ],
)
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_example_of_the_page_runs():
    page = (Path(__file__).parent.parent / "docs" / "heads.md").read_text()
    values = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, values)
    assert set(values["found"]) == {"boxes", "scores", "labels"}
    assert (
        values["model"].heads["boxes"].pyramid.get_submodule("layer_blocks.0.0").weight.grad
        is not None
    )


@pytest.mark.parametrize(
    "kind, library, extra",
    [("segmentation", "segmentation_models_pytorch.base", "seg"), ("detr", "transformers", "det")],
)
def test_a_missing_library_is_named_with_its_extra(kind, library, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"pip install 'xt-kernels\[{extra}\]'"):
        small({"a": {"kind": kind, "classes": 2}})
