"""The streaming engine on a GPU: nothing waits, and memory is flat and foretold.

Apart from the other tests of the engine because a GPU machine may lack zarr and imagecodecs.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
import xt_models as xm
from xt_models.streaming import stream_chunks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::xt_models.registry.RandomWeightsWarning"),
]


def small(**kwargs):
    sizes = {"region": 64, "dim": 32, "depth": 2, "num_heads": 2, "chunk_regions": 3}
    return xm.create_model("convnext_atto", context="xl", residual=False, **sizes | kwargs)


def scene(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def tokens_of(model, source, **options):
    return {c.regions: c.tokens.clone() for c in stream_chunks(model, source, **options)}


@pytest.mark.parametrize("compile", [False, True])
def test_nothing_waits_for_the_gpu_between_batches(compile):
    model, source = small().cuda().eval(), xm.open_image(scene(640, 960))
    expected = tokens_of(model, source, compile=compile)  # and all is set up
    for other in (scene(640, 960, seed=1), scene(640, 960)):
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = tokens_of(model, xm.open_image(other), compile=compile)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for chunk, tokens in expected.items():
        assert torch.equal(ours[chunk], tokens)
    with torch.inference_mode():
        whole = model(torch.from_numpy(scene(640, 960)).permute(2, 0, 1).cuda())
    embedding = xm.stream(model, source, compile=compile).embedding
    np.testing.assert_allclose(embedding, whole.embedding[0].cpu().numpy(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("written", [False, True])
def test_memory_of_the_gpu_is_flat_and_foretold(tmp_path, written):
    if written:
        pytest.importorskip("zarr")
    model, peaks = small(memory="kv").cuda(), []
    for side in (640, 640, 2560):
        torch.cuda.reset_peak_memory_stats()
        source = xm.open_image(scene(side, side))
        folder = {"out": tmp_path / str(len(peaks)), "checkpoint_seconds": 0} if written else {}
        xm.stream(model, source, compile=False, **folder)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] < 1.1 * peaks[1]
    plan = xm.plan(model, source, compile=False)
    base = torch.cuda.memory_allocated()
    assert plan.memory == pytest.approx(peaks[2] - base, rel=0.15)
