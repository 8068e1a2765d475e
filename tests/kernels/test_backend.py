"""Picking a backend: what a machine can run, forcing one, and the one line that says why it can't."""

import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import yaongi.kernels
from yaongi.kernels import backend, info, symmetric_product, use_backend


@pytest.fixture
def machine() -> Iterator[None]:
    """Forgets what is known of this machine, before and after a test that pretends to be on another."""
    backend.unavailable.cache_clear()
    yield
    backend.unavailable.cache_clear()


def pretend(available: bool, capability: tuple[int, int] = (9, 0)) -> mock._patch_dict:
    """A machine with or without a GPU of some capability."""
    return mock.patch.multiple(torch.cuda, is_available=lambda: available, get_device_capability=lambda *_: capability)


def test_info_lists_every_op_on_every_backend() -> None:
    rows = info()
    assert len(rows) == len(backend.OPS) * 3
    assert all(row.reason is None for row in rows if row.backend == "reference")
    assert {row.op for row in rows} >= {"symmetric_product", "causal_conv1d", "moe", "mamba_scan", "newton_schulz"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_says_so() -> None:
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError) as caught:
            use_backend(name)
        assert str(caught.value) == f'use_backend: "{name}" can\'t run here: no CUDA GPU is visible to torch'


@pytest.mark.usefixtures("machine")
def test_another_gpu_than_hopper_says_so() -> None:
    with pretend(True, (8, 0)):
        assert backend.unavailable("triton") is None
        with pytest.raises(RuntimeError) as caught:
            use_backend("cuda")
    assert str(caught.value) == (
        'use_backend: "cuda" can\'t run here: built for compute capability 9.0 (H100, H200) alone, got 8.0'
    )


@pytest.mark.usefixtures("machine")
def test_a_missing_library_says_how_to_build_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pretend(True), mock.patch.object(backend, "LIBRARY_FILE", tmp_path / "_C.so"):
        assert backend.unavailable("cuda") == (
            "yaongi/_C.so is not built: `YAONGI_CUDA=1 pip install -e .` builds it or says why it can't"
        )


@pytest.mark.usefixtures("machine")
def test_a_broken_library_says_so(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "_C.so").write_bytes(b"no library")
    with pretend(True), mock.patch.object(backend, "LIBRARY_FILE", tmp_path / "_C.so"):
        assert backend.unavailable("cuda").startswith("yaongi/_C.so does not load: ")  # type: ignore[union-attr]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^use_backend: backend must be one of cuda, triton, reference or None, got 'gpu'$"
    ):
        use_backend("gpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^use_backend: op must be one of .*symmetric_product.*, got 'matmul'$"):
        use_backend("reference", op="matmul")


def test_a_forced_backend_is_never_replaced() -> None:
    """Forcing one that can't take CPU tensors is an error, though the reference could."""
    with mock.patch.dict(backend._forced, {"symmetric_product": "cuda"}):
        with pytest.raises(RuntimeError) as caught:
            symmetric_product(torch.ones(8, 8))
    assert str(caught.value) == (
        'symmetric_product: use_backend("cuda") needs tensors on a GPU, got tensors on the CPU'
    )


def test_a_choice_ends_with_its_block_and_nests() -> None:
    with use_backend("reference"):
        with use_backend("reference", op="symmetric_product"):
            assert backend._forced == {None: "reference", "symmetric_product": "reference"}
        assert backend._forced == {None: "reference"}
    assert backend._forced == {}


def test_a_choice_outside_a_block_stays_until_it_is_undone() -> None:
    use_backend("reference")
    assert backend._forced == {None: "reference"}
    use_backend(None)
    assert backend._forced == {}


def test_the_shortcut_past_the_dispatcher_takes_only_plain_calls() -> None:
    """A gradient, a mode or a tensor without memory must reach torch's dispatcher."""
    x = torch.ones(8, 8)
    assert not backend._dispatcher_needed((x, None, 1.0))
    assert backend._dispatcher_needed((x.clone().requires_grad_(), None))
    assert backend._dispatcher_needed((x.to("meta"), None))
    with torch.no_grad():
        assert not backend._dispatcher_needed((torch.nn.Parameter(x), None))
    with FlopCounterMode(display=False):
        assert backend._dispatcher_needed((x,))
    seen = []

    def look(t: torch.Tensor) -> torch.Tensor:
        seen.append(backend._dispatcher_needed((t,)))
        return t

    torch.func.vmap(look)(x)
    assert seen == [True]


def test_only_a_plain_call_has_a_layout() -> None:
    """A choice, checked mode, a gradient, a mode or another kind of tensor: the call gets a closer look."""
    x = torch.ones(8, 8)
    assert backend.layout(x, None) == backend.layout(x + 1, None) != backend.layout(x.T[:4], None)
    assert backend.layout(x, x) != backend.layout(x, None)
    assert backend.layout(x.clone().requires_grad_()) is None
    assert backend.layout(2.0) is None
    with torch.no_grad():
        assert backend.layout(torch.nn.Parameter(x)) == backend.layout(x)
    with use_backend("reference"):
        assert backend.layout(x) is None
    with FlopCounterMode(display=False):
        assert backend.layout(x) is None
    yaongi.kernels.check_values(True)
    assert backend.layout(x) is None
    yaongi.kernels.check_values(False)
    assert torch.func.vmap(lambda t: t if backend.layout(t) is None else t + 1)(x).equal(x)


@pytest.mark.gpu
def test_a_known_call_goes_straight_to_the_launcher() -> None:
    """The second call of a layout gives the same bits; a gradient, a choice and bad arguments still count."""
    x = torch.randn(3, 64, 128, device="cuda", dtype=torch.float16)
    first, op = symmetric_product(x), backend.OPS["symmetric_product"]
    assert backend.layout(x, None, None) in op.direct
    with mock.patch.object(backend.Op, "__call__", side_effect=AssertionError("not straight")):
        second = symmetric_product(x)
    assert second.shape == (3, 64, 64)
    assert second.is_contiguous()
    assert torch.equal(first, second)
    assert symmetric_product(x.clone().requires_grad_()).requires_grad
    with use_backend("reference"):
        assert not torch.equal(symmetric_product(x, alpha=1e-3), symmetric_product(x))
    with pytest.raises(ValueError, match="alpha must be finite"):
        symmetric_product(x, alpha=float("nan"))


def test_the_command_prints_the_table() -> None:
    done = subprocess.run([sys.executable, "-m", "yaongi.kernels"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"yaongi {yaongi.__version__}, torch {torch.__version__}")
    assert all(op in done.stdout for op in backend.OPS)
    if not torch.cuda.is_available():
        assert "cuda can't run here: no CUDA GPU is visible to torch" in done.stdout
