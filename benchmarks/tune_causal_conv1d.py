"""Time every config of the causal convolution on this GPU: `python -m benchmarks.tune_causal_conv1d`.

It prints milliseconds of forward and backward, without and with documents. The fastest configs go into the tables of
yaongi/kernels/causal_conv1d/conv_*.py, with the date.
"""

import itertools

import torch
from triton.testing import do_bench

from yaongi.kernels.causal_conv1d import conv_backward, conv_forward
from yaongi.kernels.causal_conv1d.conv_backward import causal_conv1d_backward_triton
from yaongi.kernels.causal_conv1d.conv_forward import Config, causal_conv1d_triton

SHAPES = {"long": (8, 4096, 6144), "short": (1, 512, 6144)}


def median_ms(call) -> float:  # type: ignore[no-untyped-def]
    """Return the median time of a call in milliseconds."""
    return do_bench(call, warmup=10, rep=50, return_mode="median")


def main() -> None:
    """Time all configs of both regimes and print one line per config."""
    for regime, (batch, length, channels) in SHAPES.items():
        x = torch.randn(batch, length, channels + 4096, device="cuda", dtype=torch.bfloat16)[..., 4096:]
        dy = torch.randn(batch, length, channels, device="cuda", dtype=torch.bfloat16)
        weight, bias = torch.randn(channels, 4, device="cuda"), torch.randn(channels, device="cuda")
        documents = (torch.rand(batch, length, device="cuda") < 1 / 600).cumsum(1).int()
        for rows, block_c, warps in itertools.product((8, 16, 32, 64, 128, 256), (128, 256, 512), (1, 2, 4)):
            if not 2 <= block_c // (32 * warps) <= 8 or (regime == "long") != (rows >= 32):
                continue
            config = Config(rows, block_c, warps)
            conv_forward.FORWARD = conv_backward.BACKWARD = {"long": config, "short": config}
            times = []
            for ids in (None, documents):
                inputs = (x, weight, bias, ids, None, "silu")
                times.append(median_ms(lambda: causal_conv1d_triton(*inputs, False)))  # noqa: B023
                times.append(median_ms(lambda: causal_conv1d_backward_triton(dy, None, *inputs)))  # noqa: B023
            fwd, bwd, fwd_documents, bwd_documents = (f"{t:.4f}" for t in times)
            print(f"{regime:6}{config}  forward {fwd} ({fwd_documents})  backward {bwd} ({bwd_documents})", flush=True)


if __name__ == "__main__":
    main()
