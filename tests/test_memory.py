"""Peak memory: no buffer of a parameter's size exists for an example."""

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no ru_maxrss on Windows")

MEGABYTES = 2**20 if sys.platform == "darwin" else 2**10
"""Units of ru_maxrss in a megabyte."""


def peak_growth(prepare, work):
    """Megabytes by which the peak of a fresh process grows in `work`."""
    script = f"""
import resource
import numpy as np, torch, whence
torch.manual_seed(0)
{textwrap.dedent(prepare)}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
{textwrap.dedent(work)}
print((peak() - before) / {MEGABYTES})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def recording(path, prepare, batches, size):
    """Megabytes by which the peak grows as `layer` and `x` are recorded."""
    return peak_growth(
        prepare,
        f"""
        with whence.record(layer, {str(path)!r}, weight_gradients=False) as rec:
            for batch in range({batches}):
                with rec.batch(range({size} * batch, {size} * batch + {size})):
                    layer(x).square().mean().backward()
        """,
    )


def test_recording_a_wide_layer_holds_no_gradient_of_an_example(tmp_path):
    # A gradient of one example has 64 MB, those of the batch 512 MB; the batch's own, with which
    # the first batches are compared, is one of them.
    layer = "layer = torch.nn.Linear(4096, 4096, bias=False)\nx = torch.randn(8, 20, 4096)"
    assert recording(tmp_path / "s", layer, batches=4, size=8) < 256


def test_recording_a_convolution_unfolds_in_blocks(tmp_path):
    # Unfolded, the batch's input has 1.1 GB; what a block of it may have is 64 MB.
    layer = "layer = torch.nn.Conv2d(32, 8, 3, padding=1)\nx = torch.randn(16, 32, 250, 250)"
    assert recording(tmp_path / "s", layer, batches=3, size=16) < 700


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_flat_gradients_are_not_copied(dtype):
    grown = peak_growth(
        f"g = torch.ones(4, 20_000_000, dtype=torch.{dtype})\nwhence.Sketch(dim=512)(g[:, :64])",
        """
        sketch = whence.Sketch(dim=512)
        sketch(g)
        sketch(g, [("a", (8_000_000,)), ("b", (3, 4 * 10**6))])
        """,
    )
    assert grown < 32
