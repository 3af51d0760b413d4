"""The kernels as Triton compiles them for GPUs that are not here: down to machine code, within their shared memory."""

from importlib.util import find_spec

import pytest
import torch

from solo.kernels.dispatch import interpreted, padded, tiles

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None or interpreted(), reason="needs Triton's compiler"),
]
MEMORY = {90: 232_448, 80: 166_912, 86: 101_376}
KINDS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, shape, capability, constants, **types):
    """The compiled kernel, whose arguments are pointers of ``types`` or, unnamed, float32 and int32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def variants(kind, shape, dtype, width, precision):
    """Each kernel with its constants and the types of its arguments."""
    from solo.kernels import triton_attention, triton_contrast, triton_nearest

    common = {"D": width, "BM": shape.rows, "BN": shape.columns, "BD": padded(width), "PRECISION": precision, "UPCAST": False}
    fp32, rows = "*fp32", KINDS[dtype]
    if kind == "attention":
        types = {"q": rows, "keys": rows, "scale": fp32, "lse": fp32, "mean": fp32}
        yield triton_attention._attend, {**common, "OWN": True}, types
    elif kind == "backward":
        types = {"a": rows, "b": rows, "out": fp32, "factor": "fp32", "lse_a": fp32, "lse_b": fp32}
        for of_a, of_b in ((True, False), (False, True), (True, True)):
            yield triton_contrast._backward, {**common, "OF_A": of_a, "OF_B": of_b, "OWN": True}, types
    elif kind == "forward":
        types = {"rows": rows, "keys": rows, "factor": "fp32", "lse": fp32}
        yield triton_contrast._forward, {**common, "OWN": True}, types
    else:
        exact = kind == "exact scan"
        types = {"x": fp32 if exact else "*bf16", "queue": rows, "best": fp32}
        yield triton_nearest._scan, {**common, "G": triton_nearest.GROUP, "EXACT": exact}, types


@pytest.mark.parametrize("kind", ["attention", "forward", "backward", "scan", "exact scan"])
@pytest.mark.parametrize("capability", MEMORY)
def test_fits(kind, capability):
    for dtype, precision in ((torch.bfloat16, "tf32"), (torch.float32, "tf32"), (torch.float32, "tf32x3")):
        if kind == "exact scan" and dtype != torch.float32 or kind == "scan" and precision == "tf32x3":
            continue
        shape = tiles(MEMORY[capability], 256, dtype, "" if kind == "scan" else precision, kind in ("attention", "backward"))
        for kernel, constants, types in variants(kind, shape, dtype, 256, precision):
            found = compiled(kernel, shape, capability, constants, **types)
            assert found.metadata.shared <= MEMORY[capability], (kind, dtype, precision, shape)


def test_select_fits():
    from solo.kernels import triton_nearest

    shape = tiles(MEMORY[90], 256, torch.float32, "tf32", False)
    constants = {"D": 256, "NG": 4096, "C": 8, "G": triton_nearest.GROUP, "k": 5, "BD": 32}
    types = {"x": "*fp32", "queue": "*fp32", "best": "*fp32", "index": "*i64"}
    assert compiled(triton_nearest._select, shape, 90, constants, **types).metadata.shared <= MEMORY[90]
