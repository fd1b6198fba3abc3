"""Detection heads: the libraries' own answers, groups and seams, targets, bad input."""

import pytest
import torch
from torch import nn

import xt_models as xm
from xt_kernels.regions import RegionGrid
from xt_models.heads.base import Trunk
from xt_models.heads.boxes import BoxHead, Detections
from xt_models.heads.detection import DetrHead, FcosHead

pytestmark = pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning")
SMALL = {"region": 64, "dim": 32, "depth": 1, "num_heads": 2, "chunk_regions": 2, "residual": False}
DETR = {"dim": 32, "num_queries": 8, "encoder_layers": 1, "decoder_layers": 2,
        "config": {"dropout": 0.0}}  # fmt: skip
TRUNK = Trunk(16, 16, 32, (4, 8, 12), (4, 8, 16))


def maps(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 16, height // 32, width // 32, generator=generator)
    stages = {
        i: torch.randn(count, c, height // s, width // s, generator=generator)
        for i, c, s in ((1, 8, 8), (2, 12, 16))
    }
    return tokens, stages


def targets(*images):
    """Each image a list of (left, top, right, bottom, label)."""
    return [
        {
            "boxes": torch.tensor([box[:4] for box in boxes]).view(-1, 4).float(),
            "labels": torch.tensor([int(box[4]) for box in boxes], dtype=torch.int64),
        }
        for boxes in images
    ]


def test_fcos_equals_torchvisions_own_model():
    """Boxes and loss of one group against `FCOS.forward` with the pyramid as its backbone."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    torch.manual_seed(0)
    head = FcosHead(TRUNK, classes=3, dim=32, group=None, score_threshold=0.1, overlap=0)
    nn.init.normal_(head.fcos.head.classification_head.cls_logits.weight, std=0.3)
    nn.init.normal_(head.fcos.head.regression_head.bbox_reg.weight, std=0.3)
    grid = RegionGrid(128, 192, 64)
    tokens, stages = maps(2, 128, 192)
    output = head.join(head(tokens, stages), head.groups(grid), grid)
    ours = head.predict(output)

    class Pyramid(nn.Module):
        out_channels = 32

        def forward(self, _):
            levels = {"0": stages[1], "1": stages[2], "2": tokens}
            return head.pyramid(levels)

    model = head.fcos
    model.backbone = Pyramid()
    model.transform = GeneralizedRCNNTransform(128, 192, [0.0] * 3, [1.0] * 3)
    images = [torch.zeros(3, 128, 192)] * 2
    with torch.no_grad():
        expected = model.eval()(images)
    for a, b in zip(ours, expected, strict=True):
        assert len(a["boxes"]) > 20
        nonempty = ((b["boxes"][:, 2:] - b["boxes"][:, :2]) > 0).all(1)
        for key in ("boxes", "scores", "labels"):
            torch.testing.assert_close(a[key], b[key][nonempty])

    target = targets([(10, 20, 90, 100, 0), (100, 30, 180, 60, 2)], [])
    losses = model.train()(images, target)
    torch.testing.assert_close(head.loss(output, target), sum(losses.values()))


def test_detr_equals_the_librarys_own_model():
    """Boxes and loss of one group against the library's forward with labels."""
    from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

    torch.manual_seed(0)
    head = DetrHead(TRUNK, classes=3, group=None, overlap=0, score_threshold=0.0, **DETR).eval()
    grid = RegionGrid(128, 192, 64)
    tokens, stages = maps(2, 128, 192)
    output = head.join(head(tokens, stages), head.groups(grid), grid)
    target = targets([(10, 20, 90, 100, 0), (100, 30, 180, 60, 2)], [])
    labels = [
        {"class_labels": t["labels"], "boxes": torch.tensor(boxes).view(-1, 4)}
        for t, boxes in zip(
            target,
            [[[50 / 192, 60 / 128, 80 / 192, 80 / 128], [140 / 192, 45 / 128, 80 / 192, 30 / 128]],
             []],
            strict=True,
        )
    ]  # fmt: skip
    head.levels.maps = [stages[1], stages[2], tokens]
    head.detr.loss_function = DeformableDetrForObjectDetectionLoss
    out = head.detr(tokens, labels=labels)
    torch.testing.assert_close(head.loss(output, target), out.loss)

    found = head.predict(output)[1]
    scores = out.logits[1].sigmoid()
    best = scores.max()
    query, label = divmod(int(scores.argmax()), 3)
    x, y, w, h = (out.pred_boxes[1, query] * torch.tensor([192, 128, 192, 128])).tolist()
    torch.testing.assert_close(found["scores"][0], best)
    assert found["labels"][0] == label
    expected = [max(x - w / 2, 0), max(y - h / 2, 0), min(x + w / 2, 192), min(y + h / 2, 128)]
    assert found["boxes"][0].tolist() == pytest.approx(expected, abs=1e-3)


class Recorder(BoxHead):
    """A head whose raw output is the boxes themselves, in pixels of the group: [left, top, right,
    bottom, score, label], and which keeps what its loss is given."""

    def __init__(self, **options):
        defaults = {"classes": 3, "group": 2, "overlap": 1, "min_stride": 8}
        defaults |= {"score_threshold": 0.0, "nms_threshold": 0.5, "max_boxes": 10}
        super().__init__(TRUNK, **defaults | options)

    def decode(self, raw, group, grid):
        rows = raw["rows"][0]
        rows = rows[rows[:, 4] > 0]
        left, top = group.col * grid.region, group.row * grid.region
        boxes = rows[:, :4] + torch.tensor([left, top, left, top])
        return {"boxes": boxes, "scores": rows[:, 4], "labels": rows[:, 5].long()}

    def group_loss(self, raw, targets, height, width):
        self.seen = targets, (height, width)
        return raw["rows"].sum()


def found_in(grid, boxes, **options):
    """What comes out where each group sees the part of each box that lies inside it."""
    head = Recorder(**options)
    groups, side = head.groups(grid), grid.region
    rows = torch.zeros(len(groups), len(boxes), 6)
    for i, g in enumerate(groups):
        top, left = g.row * side, g.col * side
        bottom, right = top + g.rows * side, left + g.cols * side
        for k, (x0, y0, x1, y1, label) in enumerate(boxes):
            part = [max(x0, left), max(y0, top), min(x1, right), min(y1, bottom)]
            if part[0] < part[2] and part[1] < part[3]:
                share = (part[2] - part[0]) * (part[3] - part[1]) / ((x1 - x0) * (y1 - y0))
                rows[i, k, :4] = torch.tensor(part) - torch.tensor([left, top, left, top])
                rows[i, k, 4:] = torch.tensor([share, label])
    return head.predict(head.join({"rows": rows}, groups, grid))[0]


def test_objects_within_half_of_the_overlap_are_found_once_and_whole():
    grid = RegionGrid(400, 700, 100)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(40, 2, generator=generator) * torch.tensor([600.0, 300.0])
    sizes = 10 + torch.rand(40, 2, generator=generator) * 80
    boxes = [
        (*c, *(c + s), float(i % 3)) for i, (c, s) in enumerate(zip(corners, sizes, strict=True))
    ]
    boxes = [tuple(float(v) for v in box) for box in boxes]
    for box in boxes:
        found = found_in(grid, [box])
        assert found["boxes"].tolist() == [pytest.approx(box[:4], abs=1e-3)]
        assert found["labels"].tolist() == [box[4]]


def test_boxes_are_suppressed_over_the_whole_image_by_class():
    grid = RegionGrid(100, 300, 100)
    same = [(95.0, 20.0, 155.0, 80.0, 0.0), (96.0, 21.0, 156.0, 80.0, 0.0)]
    assert len(found_in(grid, same)["boxes"]) == 1
    other = [same[0], (*same[1][:4], 1.0)]
    assert len(found_in(grid, other)["boxes"]) == 2
    padded = RegionGrid(100, 290, 100)
    assert found_in(padded, [(284.0, 10.0, 300.0, 40.0, 0.0)])["boxes"].tolist() == []
    edge = found_in(padded, [(270.0, 60.0, 300.0, 100.0, 0.0)])["boxes"]
    assert edge.tolist() == [[270, 60, 290, 100]], "boxes end with the image"


def test_the_part_inside_the_image_tells_whose_a_box_is():
    """A box of the first group that ends before the image does has its centre in the second."""
    grid = RegionGrid(100, 200, 100)
    head = Recorder(group=1, overlap=0)
    groups = head.groups(grid)
    rows = torch.tensor([-110.0, 10, 150, 90, 0.9, 0]).expand(2, 1, 6).clone()
    assert [(g.col, g.cols) for g in groups] == [(0, 1), (1, 1)]
    rows[1] -= torch.tensor([100.0, 0, 100, 0, 0, 0])
    found = [head.candidates({"rows": rows[i : i + 1]}, g, grid) for i, g in enumerate(groups)]
    # 20 as it stands, 75 inside the image.
    assert [f["boxes"].tolist() for f in found] == [[[0, 10, 150, 90]], []]
    rows[..., 2] += 80
    found = [head.candidates({"rows": rows[i : i + 1]}, g, grid) for i, g in enumerate(groups)]
    # 60 as it stands, 100 inside: another's, whose own answer counts.
    assert [f["boxes"].tolist() for f in found] == [[], [[0, 10, 200, 90]]]


def test_each_group_learns_the_boxes_whose_centre_lies_in_it():
    grid = RegionGrid(100, 300, 100)
    head = Recorder()
    groups = head.groups(grid)
    assert [(g.col, g.cols) for g in groups] == [(0, 2), (1, 2)]
    output = Detections({"rows": torch.ones(4, 1, 6)}, groups, grid)
    target = targets([(20, 10, 60, 50, 2), (120, 10, 170, 90, 1)], [(190, 0, 260, 40, 0)])
    assert head.loss(output, target) == 24
    seen, size = head.seen
    assert size == (100, 200)
    assert [t["boxes"].tolist() for t in seen] == [
        [[20, 10, 60, 50], [120, 10, 170, 90]], [[20, 10, 70, 90]], [], [[90, 0, 160, 40]],
    ]  # fmt: skip
    assert [t["labels"].tolist() for t in seen] == [[2, 1], [1], [], [0]]


@pytest.mark.parametrize("kind, options", [("fcos", {"dim": 32}), ("detr", DETR)])
def test_heads_learn_stream_and_are_saved(kind, options, tmp_path):
    # Nothing is suppressed: rounding may rank scores that are nearly equal in another order, and of
    # two such boxes another one would be left.
    options = {"kind": kind, "classes": 3, "group": 2, "score_threshold": 0.0,
               "nms_threshold": 1.0} | options  # fmt: skip
    model = xm.create_model("convnext_atto", heads={"boxes": options}, **SMALL)
    pixels = torch.randint(0, 256, (2, 3, 150, 230), dtype=torch.uint8)
    head = model.heads["boxes"]
    target = targets([(10, 10, 60, 70, 0), (100, 20, 225, 140, 2)], [])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = head.loss(model(pixels).heads["boxes"], target)
        optimizer.zero_grad()
        loss.backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.inference_mode():
        expected = head.predict(model(pixels[:1]).heads["boxes"])[0]
    model.save_pretrained(tmp_path)
    loaded = xm.XT.from_pretrained(str(tmp_path)).eval()
    found = xm.stream(loaded, xm.open_image(pixels[0].numpy(), axes="CHW")).heads["boxes"]
    assert len(expected["boxes"]) > 5 and found["boxes"].shape == expected["boxes"].shape
    ours = torch.from_numpy(found["boxes"])
    apart = (expected["boxes"][:, None] - ours[None]).abs().amax(-1)
    assert apart.min(0).values.max() < 0.01 and apart.min(1).values.max() < 0.01
    torch.testing.assert_close(
        torch.from_numpy(found["scores"]), expected["scores"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    "context, options, size",
    [
        ("xl", {"tiling": "two-stream"}, (130, 200)),
        ("xl", {"tiling": "zigzag"}, (1, 1)),
        ("hyper", {"chunk_regions": None}, (65, 63)),
        ("vit", {"chunk_regions": None}, (150, 230)),
        ("mamba", {}, (65, 130)),
        (None, {"tiling": "zigzag"}, (150, 190)),
    ],
)
def test_detr_streams_what_it_says_in_memory(context, options, size):
    heads = {"boxes": {"kind": "detr", "classes": 3, "group": 2, "score_threshold": 0.0,
                       "nms_threshold": 1.0} | DETR}  # fmt: skip
    model = xm.create_model("convnext_atto", context=context, heads=heads, **SMALL | options)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        expected = model.heads["boxes"].predict(model(pixels).heads["boxes"])[0]
    found = xm.stream(model, xm.open_image(pixels.numpy(), axes="CHW")).heads["boxes"]
    assert len(expected["boxes"]) == len(found["boxes"])
    ours, scores = (torch.from_numpy(found[name]) for name in ("boxes", "scores"))
    torch.testing.assert_close(scores, expected["scores"], rtol=1e-3, atol=1e-5)
    if len(ours):
        apart = (expected["boxes"][:, None] - ours[None]).abs().amax(-1)
        assert apart.min(0).values.max() < 0.01 and apart.min(1).values.max() < 0.01


def loss_of(boxes, labels, images=1):
    grid = RegionGrid(100, 300, 100)
    head = Recorder()
    groups = head.groups(grid)
    output = Detections({"rows": torch.ones(len(groups) * images, 1, 6)}, groups, grid)
    target = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}
    return head.loss(output, [target])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: loss_of([[0.0, 0.0, 10.0, 101.0]], [0]), "lie inside the image, 100 x 300 px"),
        (lambda: loss_of([[-1.0, 0.0, 10.0, 10.0]], [0]), r"got \[-1.0, 0.0, 10.0, 10.0\]"),
        (
            lambda: loss_of([[5.0, 5.0, 5.0, 9.0]], [0]),
            "boxes must have a width and a height above",
        ),
        (
            lambda: loss_of([[9.0, 5.0, 5.0, 9.0]], [0]),
            "boxes must have a width and a height above",
        ),
        (lambda: loss_of([[0.0, 0.0, float("nan"), 9.0]], [0]), "a width and a height above zero"),
        (lambda: loss_of([[0.0, 0.0, 5.0, 9.0]], [3]), r"hold labels in \[0, 3\), got 3"),
        (lambda: loss_of([[0.0, 0.0, 5.0, 9.0]], [0, 1]), r"labels must be \[N\] = \[1\]"),
        (lambda: loss_of([0.0, 0.0, 5.0, 9.0], [0]), r"boxes must be \[N, 4\] .left, top"),
        (lambda: loss_of([[0.0, 0.0, 5.0, 9.0]], [0], 2), "one dict an image = 2, got 1"),
        (lambda: Recorder(overlap=2), "overlap must be at least 0 and less than group = 2, got 2"),
        (lambda: Recorder(classes=0), "classes must be at least 1, got 0"),
        (lambda: Recorder(nms_threshold=1.5), r"nms_threshold must be in \[0, 1\], got 1.5"),
        (
            lambda: FcosHead(TRUNK, classes=2, dim=40),
            "dim must be a positive multiple of 32, got 40",
        ),
        (lambda: DetrHead(TRUNK, classes=2, dim=0), "dim must be a positive multiple of 32, got 0"),
    ],
)
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
