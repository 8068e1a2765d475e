"""Choosing a backend: what a machine can run, forcing one, and the one-line reason why one can't run."""

import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from op_cases import cases, run
from torch.utils.flop_counter import FlopCounterMode

import yaongi.kernels
from yaongi.kernels import backend, info, symmetric_product, use_backend


@pytest.fixture
def machine() -> Iterator[None]:
    """Clear cached facts about this machine before and after a test that simulates another one."""
    backend.unavailable.cache_clear()
    yield
    backend.unavailable.cache_clear()


def pretend(available: bool, capability: tuple[int, int] = (9, 0)) -> mock._patch_dict:
    """Patch torch to report a machine with or without a GPU of some capability."""
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
    """Forcing a backend that can't take CPU tensors is an error, though the reference could take them."""
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
    """A mode, a transform or a tensor without memory must reach torch's dispatcher."""
    x = torch.ones(8, 8)
    assert not backend._dispatcher_needed((x, None, 1.0))
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


@pytest.mark.parametrize("op", [op for op, case in cases().items() if case.wanted])
def test_gradients_past_the_dispatcher_are_its_gradients(op: str) -> None:
    case = cases()[op]
    direct = run(op, case.on("cpu", torch.float32), case.wanted)
    with mock.patch.object(backend, "_dispatcher_needed", return_value=True):
        dispatched = run(op, case.on("cpu", torch.float32), case.wanted)
    assert direct.keys() == dispatched.keys()
    for name, result in direct.items():
        assert torch.equal(result, dispatched[name]), name


def test_the_command_prints_the_table() -> None:
    done = subprocess.run([sys.executable, "-m", "yaongi.kernels"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"yaongi {yaongi.__version__}, torch {torch.__version__}")
    assert all(op in done.stdout for op in backend.OPS)
    if not torch.cuda.is_available():
        assert "cuda can't run here: no CUDA GPU is visible to torch" in done.stdout
