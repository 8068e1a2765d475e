"""Compile every config of every Triton launcher for sm_90 without a GPU; check registers, spills and code."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from aot import Compiled, compile_launcher

from yaongi.kernels.attention_step import cached_attention
from yaongi.kernels.causal_conv1d import conv_backward, conv_forward, step
from yaongi.kernels.cross_entropy import loss_kernels as cross_entropy
from yaongi.kernels.likeliest import two_stages
from yaongi.kernels.linear_step import few_rows_linear
from yaongi.kernels.moe import experts_backward as moe_gradients
from yaongi.kernels.moe import experts_forward, routing
from yaongi.kernels.moe_step import token_experts
from yaongi.kernels.newton_schulz import passes as newton_schulz
from yaongi.kernels.newton_schulz import teon
from yaongi.kernels.newton_schulz.op import POLAR_EXPRESS


@dataclass(frozen=True)
class Launch:
    """One call of a launcher with one config of its table."""

    launcher: Callable[..., Any]
    arguments: tuple[Any, ...]
    module: Any
    table: str
    config: Any

    def compile(self) -> list[Compiled]:
        with mock.patch.object(self.module, self.table, {"long": self.config, "short": self.config}):
            return compile_launcher(self.launcher, *self.arguments)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(("D", "dtype"), [(64, torch.bfloat16), (256, torch.float16)])
def test_attention_step(D: int, dtype: torch.dtype) -> None:
    """Keys go through asynchronous copies to tensor cores, without spills."""
    q, k, cache = meta(64, 32, D, dtype=dtype), meta(64, 8, D, dtype=dtype), meta(64, 8, 512, D, dtype=dtype)
    rows = meta(64, 512, dtype=torch.bool), meta(64, dtype=torch.int64)
    (kernel,) = compile_launcher(cached_attention.attention_step_triton, q, k, k, cache, cache, *rows, 256)
    assert kernel.spilled_bytes == 0
    assert kernel.early_loads == 0
    assert "HMMA" in kernel.sass
    assert re.search(r"LDGSTS\.E\S*\.128", kernel.sass)


def causal_conv1d_launches() -> Iterator[Any]:
    """Yield launches of both directions, without and with all options, in bf16 and fp32."""
    for dtype in (torch.bfloat16, torch.float32):
        x = meta(8, 4096, 10304, dtype=dtype)[..., 4096:]
        weight, bias, state = meta(6208, 4), meta(6208), meta(8, 6208, 3, dtype=dtype)
        ids = meta(8, 4096, dtype=torch.int32)
        for extras in ((None, None), (ids, state)):
            inputs, everything = (x, weight, bias, *extras, "silu"), extras[0] is not None
            calls = {
                "FORWARD": (conv_forward, conv_forward.causal_conv1d_triton, (*inputs, everything)),
                "BACKWARD": (conv_backward, conv_backward.causal_conv1d_backward_triton, (x, extras[1], *inputs)),
            }
            for table, (module, launcher, arguments) in calls.items():
                for name, config in getattr(module, table).items():
                    yield pytest.param(
                        Launch(launcher, arguments, module, table, config),
                        id=f"{table.lower()}-{name}-{dtype}-{'all' if everything else 'plain'}".replace("torch.", ""),
                    )


@pytest.mark.parametrize("launch", list(causal_conv1d_launches()))
def test_causal_conv1d(launch: Launch) -> None:
    """Wide loads, no spills, and registers that leave room for enough warps."""
    kernel, *sums = launch.compile()
    assert [k.name for k in sums] == ([] if launch.table == "FORWARD" else ["_column_sums_kernel"])
    assert all(k.spilled_bytes == 0 for k in (kernel, *sums))
    assert kernel.registers <= (128 if launch.table == "FORWARD" else 255)
    assert "LDG.E.64" in kernel.sass or "LDG.E.128" in kernel.sass


@pytest.mark.parametrize("phases", [(), (3,)], ids=["plain", "dilated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_causal_conv1d_step(dtype: torch.dtype, phases: tuple[int, ...]) -> None:
    """Nothing spills, and the step of a whole layer is one kernel."""
    x, state = meta(64, 10304, dtype=dtype)[:, 4096:10240], meta(64, *phases, 6144, 3, dtype=dtype)
    inputs = x, state, meta(6144, 4), meta(6144), "silu", meta(64, dtype=torch.int64) if phases else None
    (kernel,) = compile_launcher(step.causal_conv1d_step_triton, *inputs)
    assert kernel.spilled_bytes == 0
    assert kernel.early_loads == 0
    assert kernel.registers <= 64


@pytest.mark.parametrize("hidden", [*(pytest.param(h, marks=pytest.mark.long) for h in (256, 1024, 1856)), 512])
def test_moe(hidden: int) -> None:
    """The stages of the flagship's layer and similar ones use tensor cores and TMA where expected, without spills."""
    T, D, E, K = 32768, 2048, 64, 6
    x, w_up, w_down, a = meta(T, D), meta(E, hidden, D), meta(E, D, hidden), meta(T * K, hidden)
    ids, weights = meta(T, K, dtype=torch.int32), meta(T, K, dtype=torch.float32)
    kernels = compile_launcher(experts_forward.moe_triton, x, w_up, w_down, ids, weights)
    backward = (x, x, w_up, w_down, ids, weights, a)
    kernels += compile_launcher(moe_gradients.moe_backward_triton, *backward)
    sums = [meta(*w.shape, dtype=torch.float32) for w in (w_up, w_down)]
    adding = compile_launcher(moe_gradients.moe_backward_accumulate_triton, *backward, *sums)
    assert ["UTMAREDG" in kernel.sass for kernel in adding if kernel.name == "_moe_dw_kernel"] == [True, True]
    kernels += adding
    assert {k.name for k in kernels} >= {
        "_moe_up_kernel",
        "_moe_grouped_gemm_kernel",
        "_moe_dh_kernel",
        "_moe_dw_kernel",
    }
    for kernel in kernels:
        assert kernel.spilled_bytes == 0, kernel.name
        if kernel.name in ("_moe_up_kernel", "_moe_grouped_gemm_kernel", "_moe_dh_kernel"):
            assert "HGMMA" in kernel.sass
            assert "UTMALDG" in kernel.sass
        if kernel.name == "_moe_dw_kernel":
            assert "HGMMA" in kernel.sass


@pytest.mark.parametrize(("T", "D", "N"), [(2, 2048, 10304), (16, 4096, 2048), (8, 2048, 32768), (2, 2048, 64)])
def test_linear_step(T: int, D: int, N: int) -> None:
    """Weights go through asynchronous copies of 16 bytes to tensor cores."""
    wide = N == 64
    inputs = meta(T, D), meta(N, D), None if wide else meta(T, N)
    (kernel,) = compile_launcher(few_rows_linear.linear_step_triton, *inputs, "squared_relu", wide, True)
    assert kernel.spilled_bytes == 0
    assert kernel.early_loads == 0
    assert kernel.registers <= 128
    assert re.search("HMMA|HGMMA", kernel.sass)
    assert re.search(r"LDGSTS\.E\S*\.128", kernel.sass)


@pytest.mark.parametrize(("D", "N", "loads"), [(2048, 10304, 8), (4096, 2048, 16), (2048, 64, 2)])
def test_linear_step_of_one_row(D: int, N: int, loads: int) -> None:
    """A program's loads of a settled weight are under way before it waits for the kernel ahead."""
    inputs = meta(1, D), meta(N, D), meta(1, N)
    (kernel,) = compile_launcher(few_rows_linear.linear_step_triton, *inputs, "squared_relu", False, True)
    assert kernel.spilled_bytes == 0
    assert kernel.registers <= 128
    assert kernel.early_loads == loads
    assert len(re.findall(r"LDG\.E\S*\.128", kernel.sass)) > loads
    (kernel,) = compile_launcher(few_rows_linear.linear_step_triton, *inputs, "squared_relu", False, False)
    assert kernel.early_loads == 0


def test_linear_steps_of_one_row() -> None:
    """Three weights in one launch, read as early and as widely as one; a weight of one row compiles, too."""
    x, weights = meta(1, 2048), [meta(2048, 2048), meta(512, 2048), meta(512, 2048)]
    (kernel,) = compile_launcher(few_rows_linear.linear_steps_triton, x, weights, True)
    assert kernel.spilled_bytes == 0
    assert kernel.registers <= 64
    assert kernel.early_loads == 8
    assert set(re.findall(r"LDG\.E\S*", kernel.sass)) == {"LDG.E.128"}
    (kernel,) = compile_launcher(
        few_rows_linear.linear_steps_triton, x, [meta(1, 2048), weights[1], meta(1, 2048)], False
    )
    assert kernel.early_loads == 0


@pytest.mark.parametrize("B", [1, 64])
def test_likeliest(B: int) -> None:
    """Logits are read widely, and nothing is read early: the kernel ahead makes it."""
    parts, row = compile_launcher(two_stages.likeliest_triton, meta(B, 32768))
    assert [kernel.spilled_bytes for kernel in (parts, row)] == [0, 0]
    assert [kernel.early_loads for kernel in (parts, row)] == [0, 0]
    assert "LDG.E.128" in parts.sass


@pytest.mark.parametrize(("T", "hidden"), [(1, 512), (64, 512), pytest.param(8, 1856, marks=pytest.mark.long)])
def test_moe_of_few_tokens(T: int, hidden: int) -> None:
    """Weights go through asynchronous copies of 16 bytes to tensor cores; several programs fit an SM."""
    D, E, K = 2048, 64, 6
    routing = meta(T, K, dtype=torch.int32), meta(T, K, dtype=torch.float32)
    kernels = compile_launcher(experts_forward.moe_triton, meta(T, D), meta(E, hidden, D), meta(E, D, hidden), *routing)
    assert [k.name for k in kernels] == ["_moe_few_up_kernel", "_moe_few_down_kernel", "_moe_combine_kernel"]
    for kernel in kernels:
        assert kernel.spilled_bytes == 0, kernel.name
        assert kernel.early_loads == 0, kernel.name
        assert kernel.registers <= (128 if T == 64 else 168), kernel.name
        assert kernel.shared_bytes <= 113 * 1024, kernel.name
    for kernel in kernels[:2]:
        assert re.search("HMMA|HGMMA", kernel.sass)
        assert re.search(r"LDGSTS\.E\S*\.128", kernel.sass)


@pytest.mark.parametrize(("D", "hidden"), [(2048, 512), pytest.param(4096, 1856, marks=pytest.mark.long)])
def test_moe_step(D: int, hidden: int) -> None:
    """The shared expert's weights are under way before a program waits; the routed ones' loads go out together."""
    E, K, routing = 64, 6, (meta(1, 6, dtype=torch.int32), meta(1, 6, dtype=torch.float32))
    weights = meta(E, hidden, D), meta(E, D, hidden), meta(2 * hidden, D), meta(D, 2 * hidden)
    up, down = compile_launcher(token_experts.moe_step_triton, meta(1, D), *weights, *routing, True)
    for kernel in (up, down):
        assert kernel.spilled_bytes == 0, kernel.name
        assert kernel.early_loads > 0, kernel.name
    if D == 2048:
        assert up.registers <= 64
        assert down.registers <= 128
        assert len(re.findall(r"LDG\.E\S*\.128", down.sass)) >= 2 * (K + 2)


@pytest.mark.parametrize("T", [1, 1024])
def test_moe_route(T: int) -> None:
    """With 256 experts and 16 per token, nothing spills."""
    logits, ids = meta(T, 256, dtype=torch.float32), meta(T, 16, dtype=torch.int32)
    weights, bias = meta(T, 16, dtype=torch.float32), meta(256, dtype=torch.float32)
    kernels = compile_launcher(routing.moe_route_triton, logits, bias, 16, 2.5)
    kernels += compile_launcher(routing.moe_route_backward_triton, weights, logits, ids, 2.5)
    assert [kernel.spilled_bytes for kernel in kernels] == [0, 0]
    assert T > 128 or kernels[0].early_loads == 0


FLAT = [value for step in POLAR_EXPRESS for value in step]


def compile_newton_schulz(fused_up_to: int, launcher: Callable[..., Any], *arguments: Any) -> dict[str, Compiled]:
    """Return the kernels of a call by name, with or without a fused last product; assert that none spills."""
    with mock.patch.object(newton_schulz, "FUSED_UP_TO", fused_up_to):
        kernels = compile_launcher(launcher, *arguments)
    assert [kernel.name for kernel in kernels if kernel.spilled_bytes] == []
    return {kernel.name: kernel for kernel in kernels}


@pytest.mark.parametrize("fused_up_to", [0, 512], ids=["apart", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 512, 2048), (64, 2048, 512)], ids=str)
def test_newton_schulz(shape: tuple[int, ...], dtype: torch.dtype, fused_up_to: int) -> None:
    """The passes around the products, with or without transposing: wide accesses, and few enough registers."""
    kernels = compile_newton_schulz(
        fused_up_to, newton_schulz.newton_schulz_triton, meta(*shape, dtype=dtype), FLAT, "gram"
    )
    last = kernels.pop("_newton_schulz_last_product_kernel", None)
    if fused_up_to:
        assert last is not None
        assert last.registers <= 128
        assert "HGMMA" in last.sass
        assert "UTMALDG" in last.sass
    names = {"_newton_schulz_norm_kernel", "_newton_schulz_divisors_kernel", "_newton_schulz_normalise_kernel"}
    assert kernels.keys() == (names if fused_up_to else names | {"_newton_schulz_result_kernel"})
    kernels.pop("_newton_schulz_divisors_kernel")
    for name, kernel in kernels.items():
        assert kernel.registers <= 128, name
        assert "LDG.E.128" in kernel.sass or "LDG.E.64" in kernel.sass, name
        assert "STG.E.128" in kernel.sass or name == "_newton_schulz_norm_kernel", name


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("fused_up_to", [0, 512], ids=["apart", "fused"])
@pytest.mark.parametrize("shape", [(64, 512, 2048), (64, 2048, 512)], ids=str)
def test_teon_update(shape: tuple[int, ...], fused_up_to: int, idle: bool) -> None:
    """float32 gradients and master weights, bfloat16 momenta and parameters: pointer tables keep 16-byte accesses."""
    wide, narrow = (lambda: [meta(*shape, dtype=torch.float32)]), (lambda: [meta(*shape)])
    settings = (1, 0.02, 0.95, True, 0.1, FLAT, meta(1, shape[0], dtype=torch.bool) if idle else None)
    kernels = compile_newton_schulz(fused_up_to, teon.teon_update_triton, narrow(), wide(), narrow(), wide(), *settings)
    last = "_teon_last_product_kernel" if fused_up_to else "_teon_weight_kernel"
    for name, registers in (("_teon_momentum_kernel", 128), (last, 255 if fused_up_to else 128)):
        assert kernels[name].registers <= registers, name
        assert "LDG.E.128" in kernels[name].sass, name
        assert "STG.E.128" in kernels[name].sass, name
    assert ("HGMMA" in kernels[last].sass) == bool(fused_up_to)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_entropy(dtype: torch.dtype) -> None:
    """With the presets' vocabulary: wide loads and stores, no spills."""
    logits, rows = torch.empty(4096, 32768, dtype=dtype, device="meta"), torch.empty(4096, device="meta")
    targets = torch.empty(4096, dtype=torch.int64, device="meta")
    kernels = compile_launcher(cross_entropy.cross_entropy_triton, logits, targets)
    kernels += compile_launcher(cross_entropy.cross_entropy_backward_triton, rows, rows, logits, targets, rows)
    for kernel in kernels:
        assert kernel.spilled_bytes == 0, kernel.name
        assert kernel.registers <= 64, kernel.name
        assert "LDG.E.128" in kernel.sass, kernel.name
    assert "STG.E.128" in kernels[1].sass
