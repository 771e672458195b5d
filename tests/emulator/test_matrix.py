"""units/matrix.py and units/wgmma.py: fragments laid out by the ISA's formulas, products compared with numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fragments import kernel, launch

from hotloop.emulator import Report, Uninitialised

TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}
RNG = np.random.default_rng(0)


def numbers(kind: str, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """(values as float64, bits as the kernel sees them)"""
    if kind in ("s8", "u8"):
        bits = RNG.integers(0, 256, shape).astype(np.uint8)
        return bits.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64), bits
    x = torch.from_numpy(RNG.standard_normal(shape))
    if kind == "tf32":
        bits = x.float().numpy().view(np.uint32) & np.uint32(0xFFFFE000)
        return bits.view(np.float32).astype(np.float64), bits | np.uint32(0x1ABC)  # the low bits are ignored
    half = x.to(TORCH[kind])
    return half.double().numpy(), half.view(torch.int16).numpy().view(np.uint16)


def words(bits: np.ndarray) -> np.ndarray:
    """Rows of bits as rows of 32-bit registers."""
    return np.ascontiguousarray(bits).view(np.uint32)


def a_fragment(bits: np.ndarray) -> np.ndarray:
    """(16, k) -> (lanes, registers): rows g, g + 8 for each quarter of the columns."""
    w = words(bits)
    lanes = np.arange(32)
    g, t = lanes // 4, lanes % 4
    columns = range(0, w.shape[1], 4)
    return np.stack([w[g + row, t + c] for c in columns for row in (0, 8)], 1)


def b_fragment(bits: np.ndarray) -> np.ndarray:
    """(8, k), the transpose of B -> (lanes, registers)"""
    w = words(bits)
    lanes = np.arange(32)
    return np.stack([w[lanes // 4, lanes % 4 + c] for c in range(0, w.shape[1], 4)], 1)


CASES = [
    ("m16n8k16", "bf16", "f32"),
    ("m16n8k16", "f16", "f32"),
    ("m16n8k16", "f16", "f16"),
    ("m16n8k8", "bf16", "f32"),
    ("m16n8k8", "f16", "f32"),
    ("m16n8k8", "tf32", "f32"),
    ("m16n8k4", "tf32", "f32"),
    ("m16n8k32", "s8", "s32"),
    ("m16n8k32", "u8", "s32"),
    ("m16n8k16", "s8", "s32"),
]


@pytest.mark.parametrize(("shape", "kind", "to"), CASES)
def test_mma(shape, kind, to):
    k = int(shape.split("k")[1])
    (a, a_bits), (b, b_bits) = numbers(kind, 16, k), numbers(kind, 8, k)
    ra, rb = a_fragment(a_bits), b_fragment(b_bits)
    count = 2 if to == "f16" else 4
    c = (
        np.round(RNG.standard_normal((16, 8)) * 4)
        if to != "s32"
        else RNG.integers(-100, 100, (16, 8)).astype(np.float64)
    )
    lanes = np.arange(32)
    rows, columns = lanes // 4, 2 * (lanes % 4)
    at = [(rows + r, columns + e) for r in (0, 8) for e in (0, 1)]
    if to == "f16":
        pairs = np.stack([c[i] for i in at], 1).astype(np.float16)
        rc = np.ascontiguousarray(pairs).view(np.uint32)
    else:
        rc = np.stack([c[i] for i in at], 1).astype(np.float32 if to == "f32" else np.int32).view(np.uint32)
    given = np.concatenate([ra, rb, rc], 1)
    n = given.shape[1]
    out = np.zeros((32, count), np.uint32)
    names = [f"%r{10 + j}" for j in range(n)]
    parts = names[: ra.shape[1]], names[ra.shape[1] : ra.shape[1] + rb.shape[1]], names[-count:]
    va, vb, vc = ("{" + ", ".join(p) + "}" for p in parts)
    code = f"""mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; mad.wide.u32 %rd1, %r1, {4 * n}, %rd1;
    ld.param.b64 %rd2, [p1]; mad.wide.u32 %rd2, %r1, {4 * count}, %rd2;"""
    code += "".join(f"ld.global.b32 {r}, [%rd1+{4 * j}];" for j, r in enumerate(names))
    code += f"mma.sync.aligned.{shape}.row.col.{to}.{kind}.{kind}.{to} {vc}, {va}, {vb}, {vc};"
    code += "".join(f"st.global.b32 [%rd2+{4 * j}], {r};" for j, r in enumerate(parts[2]))
    done = launch(kernel(code, ["u64", "u64"]), [given, out])
    want = a @ b.T + c
    d = np.zeros((16, 8))
    values = out.view(np.float16) if to == "f16" else out.view(np.float32 if to == "f32" else np.int32)
    for j, i in enumerate(at):
        d[i] = values[:, j]
    np.testing.assert_allclose(
        d, want, rtol=0 if to == "s32" else {"f16": 2e-3, "f32": 1e-5}[to], atol={"f16": 5e-3}.get(to, 1e-5)
    )
    assert done.counters["tensor_operations"] == 1
    assert done.counters["mma_m16n8k16"] == k / 16


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(count, transposed):
    """Lane i gives the address of row i; lane 4 g + t gets elements 2 t, 2 t + 1 of row g, or of column g."""
    trans = ".trans" if transposed else ""
    registers = "{" + ", ".join(f"%r{10 + j}" for j in range(count)) + "}"
    code = f""".shared .align 16 .b8 s[1024]; mov.u32 %r1, %tid.x; mov.u32 %r2, s; ld.param.b64 %rd1, [p0];
    mad.wide.u32 %rd2, %r1, 16, %rd1; ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd2]; mad.lo.u32 %r7, %r1, 16, %r2;
    st.shared.v4.b32 [%r7], {{%r3, %r4, %r5, %r6}}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r7];
    ld.param.b64 %rd3, [p1]; mad.wide.u32 %rd4, %r1, {4 * count}, %rd3;
    {"".join(f"st.global.b32 [%rd4+{4 * j}], %r{10 + j};" for j in range(count))} add.u32 %r8, %r7, 512;
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r8], {registers}; bar.sync 0;
    setp.lt.u32 %p1, %r1, {8 * count}; @!%p1 exit; ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r8];
    ld.param.b64 %rd5, [p2]; mad.wide.u32 %rd6, %r1, 16, %rd5; st.global.v4.b32 [%rd6], {{%r3, %r4, %r5, %r6}};"""
    x = RNG.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    got, back = np.zeros((32, count), np.uint32), np.zeros((count, 8, 8), np.uint16)
    done = launch(kernel(code, ["u64"] * 3, target="sm_90"), [x, got, back])
    matrices = x[:count].transpose(0, 2, 1) if transposed else x[:count]
    want = np.ascontiguousarray(matrices).view(np.uint32).reshape(count, 32).T
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(back, x[:count])
    assert done.counters["shared_bank_conflicts"] == 0


def test_undefined_elements_taint_their_warp():
    zero = " ".join(f"mov.f32 %f{j}, 0f00000000; mov.b32 %r{j}, 0;" for j in range(1, 5))
    code = f"""{zero} ld.param.b64 %rd1, [p0]; mov.u32 %r9, %tid.x; setp.eq.u32 %p1, %r9, 5;
    @%p1 ld.global.b32 %r1, [%rd1]; mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32
    {{%f1, %f2, %f3, %f4}}, {{%r1, %r2}}, {{%r3}}, {{%f1, %f2, %f3, %f4}};
    ld.param.b64 %rd2, [p1]; mad.wide.u32 %rd2, %r9, 4, %rd2; st.global.f32 [%rd2], %f1;"""
    found = launch(
        kernel(code, ["u64"] * 2),
        [Uninitialised(np.zeros(1, np.uint32)), np.zeros(32, np.float32)],
        on_report="collect",
    ).reports
    assert [(r.kind, r.count) for r in found] == [("uninitialised", 32)]


# ---------------------------------------------------------------------- wgmma
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # code in the descriptor: bytes of a row


def lay_out(x: np.ndarray, swizzle: int, element: int, transposed: bool) -> tuple[np.ndarray, int, int]:
    """(rows, 32 bytes of k) in the canonical layout: (bytes, leading offset, stride offset). From the ISA's atoms:
    8 rows of `span` bytes, 16-byte chunk c of row r at chunk c ^ (r % (span / 16))."""
    span = SWIZZLES[swizzle]
    rows, k = x.shape
    size = 65536
    memory = np.zeros(size, np.uint8)

    def put(atom: int, r: int, byte: int, value: np.ndarray) -> None:
        address = atom + r * span + byte
        mask = {0: 0, 1: 7, 2: 3, 3: 1}[swizzle]
        address ^= ((address >> 7) & mask) << 4
        memory[address : address + element] = np.frombuffer(value.tobytes(), np.uint8)

    if transposed:  # rows contiguous in memory: an atom holds span / element rows by 8 of k
        per = span // element
        leading, stride = 8 * span * (k // 8), 8 * span
        for r in range(rows):
            for c in range(k):
                put(r // per * leading + c // 8 * stride, c % 8, r % per * element, x[r, c])
        return memory, leading, stride
    if swizzle == 0:  # bricks of 8 rows by 16 bytes
        leading, stride = 128, 128 * (k * element // 16)
        for r in range(rows):
            for c in range(k):
                put(r // 8 * stride + c * element // 16 * leading, r % 8, c * element % 16, x[r, c])
        return memory, leading, stride
    leading, stride = 16, 8 * span
    for r in range(rows):
        for c in range(k):
            put(r // 8 * stride, r % 8, c * element, x[r, c])
    return memory, leading, stride


def wgmma_kernel(
    n: int, kind: str, swizzle: int, b: tuple[int, int, int], a: tuple[int, int, int] | None, *,
    transposed: bool = False, to: str = "f32",
    steps: tuple[str, ...] = ("fence.proxy.async;", "bar.sync 0;", "wgmma.fence.sync.aligned;"),
    after: tuple[str, ...] = ("wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"),
    between: str = "", scale: str = "0", start: str = "",
) -> str:  # fmt: skip
    """Copies p0 into shared memory, multiplies, stores the accumulators to p1. a, b: (offset, leading, stride)."""

    def descriptor(offset: int, leading: int, stride: int) -> int:
        return (offset >> 4) | (leading >> 4) << 16 | (stride >> 4) << 32 | swizzle << 62

    count = n // 2 if to == "f32" else n // 4
    prefix = "f" if to == "f32" else "r"
    d = "{" + ", ".join(f"%{prefix}{10 + j}" for j in range(count)) + "}"
    k = 8 if kind == "tf32" else 16
    tail = (
        "1, 1"
        if kind == "tf32"
        else f"1, 1, {int(transposed)}"
        if a is None
        else f"1, 1, {int(transposed)}, {int(transposed)}"
    )
    if a is None:
        source = "{%r60, %r61, %r62, %r63}"
        loads = f"ld.param.b64 %rd9, [p2]; mad.wide.u32 %rd9, %r1, 16, %rd9; ld.global.v4.b32 {source}, [%rd9];"
    else:
        source, loads = "%rd20", ""
    return f""".shared .align 1024 .b8 s[32768]; mov.u32 %r1, %tid.x; ld.param.b64 %rd1, [p0]; {loads}
    mov.u32 %r2, 0; copy: mad.lo.u32 %r3, %r2, 128, %r1; mad.wide.u32 %rd2, %r3, 16, %rd1;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd2];
    shl.b32 %r8, %r3, 4; st.shared.v4.b32 [%r8], {{%r4, %r5, %r6, %r7}};
    add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 16; @%p1 bra copy;
    mov.b64 %rd20, {descriptor(*a) if a else 0}; mov.b64 %rd21, {descriptor(*b)}; {start} {" ".join(steps)}
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{to}.{kind}.{kind} {d}, {source}, %rd21, {scale}, {tail};
    {between} {" ".join(after)}
    ld.param.b64 %rd3, [p1]; mad.wide.u32 %rd4, %r1, {4 * count}, %rd3;
    {"".join(f"st.global.b32 [%rd4+{4 * j}], %{prefix}{10 + j};" for j in range(count))}"""


def accumulators(out: np.ndarray, n: int, half: bool) -> np.ndarray:
    """(threads, registers) -> (64, n)"""
    d = np.zeros((64, n))
    thread = np.arange(128)
    row = 16 * (thread // 32) + thread % 32 // 4
    values = out.view(np.float16) if half else out.view(np.float32)
    for j in range(n // 2):
        d[row + 8 * (j >> 1 & 1), 8 * (j >> 2) + 2 * (thread % 4) + (j & 1)] = values[:, j]
    return d


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize(("kind", "transposed"), [("bf16", False), ("bf16", True), ("f16", False), ("tf32", False)])
@pytest.mark.parametrize("to", ["f32", "f16"])
def test_wgmma(swizzle, kind, transposed, to):
    if to == "f16" and kind != "f16":
        to = "f32"  # only f16 accumulates in f16
    n, k, element = 64 if transposed else 16, 8 if kind == "tf32" else 16, 4 if kind == "tf32" else 2
    (a, a_bits), (b, b_bits) = numbers(kind, 64, k), numbers(kind, n, k)
    a_memory, *a_offsets = lay_out(a_bits, swizzle, element, transposed)
    b_memory, *b_offsets = lay_out(b_bits, swizzle, element, transposed)
    shared = np.concatenate([a_memory[:16384], b_memory[:16384]])
    code = wgmma_kernel(n, kind, swizzle, (16384, *b_offsets), (0, *a_offsets), transposed=transposed, to=to)
    out = np.zeros((128, n // 2 if to == "f32" else n // 4), np.uint32)
    done = launch(kernel(code, ["u64", "u64"], target="sm_90a"), [shared, out], 128)
    np.testing.assert_allclose(
        accumulators(out, n, to == "f16"),
        a @ b.T,
        rtol=1e-5 if to == "f32" else 2e-3,
        atol=1e-5 if to == "f32" else 5e-3,
    )
    assert done.counters["mma_m16n8k16"] == 4 * n / 8 * k / 16


def test_wgmma_with_a_in_registers_and_accumulation():
    (a, a_bits), (b, b_bits) = numbers("bf16", 64, 16), numbers("bf16", 16, 16)
    b_memory, *offsets = lay_out(b_bits, 3, 2, False)
    fragments = np.concatenate([a_fragment(a_bits[16 * w : 16 * w + 16]) for w in range(4)])
    ones = " ".join(f"mov.f32 %f{10 + j}, 0f3F800000;" for j in range(8))
    code = wgmma_kernel(16, "bf16", 3, (0, *offsets), None, scale="1", start=ones)
    out = np.zeros((128, 8), np.uint32)
    launch(kernel(code, ["u64"] * 3, target="sm_90a"), [b_memory[:32768], out, np.ascontiguousarray(fragments)], 128)
    np.testing.assert_allclose(accumulators(out, 16, False), a @ b.T + 1, rtol=1e-5, atol=1e-5)


def wgmma_reports(**change) -> list[Report]:
    _, bits = numbers("bf16", 64, 16)
    memory, *offsets = lay_out(bits, 1, 2, False)
    code = wgmma_kernel(16, "bf16", 1, (0, *offsets), (0, *offsets), **change)
    out = np.zeros((128, 8), np.uint32)
    return launch(
        kernel(code, ["u64", "u64"], target="sm_90a"), [memory[:32768], out], 128, on_report="collect"
    ).reports


COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
FENCE, PROXY, SYNC = "wgmma.fence.sync.aligned;", "fence.proxy.async;", "bar.sync 0;"


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, set()),
        ({"steps": (SYNC, PROXY, FENCE)}, set()),
        ({"after": (COMMIT,)}, {"wgmma-in-flight"}),  # accumulators are stored while in flight
        ({"after": (WAIT,)}, {"wgmma-in-flight"}),  # what was never committed is not waited for
        ({"after": (COMMIT, "wgmma.wait_group.sync.aligned 1;")}, {"wgmma-in-flight"}),
        ({"between": "mov.f32 %f10, 0f00000000;"}, {"wgmma-in-flight"}),
        ({"between": "shl.b32 %r9, %r1, 4; st.shared.b32 [%r9], 0;"}, {"wgmma-in-flight"}),  # an operand is overwritten
        ({"between": "st.shared.b32 [%r8+16384], 0;"}, {"out-of-bounds"}),
        ({"steps": (PROXY, SYNC)}, {"wgmma-fence"}),
        ({"steps": (PROXY, SYNC, FENCE, "mov.f32 %f11, 0f00000000;")}, {"wgmma-fence"}),
        ({"steps": (SYNC, FENCE)}, {"proxy-fence"}),
        ({"steps": (PROXY, FENCE)}, {"shared-race"}),
    ],
)
def test_what_a_wgmma_needs(change, kinds):
    assert {r.kind for r in wgmma_reports(**change)} == kinds


def test_wgmma_by_part_of_a_warpgroup():
    found = wgmma_reports(start="setp.lt.u32 %p2, %r1, 64; @!%p2 exit;")
    assert "divergent-warp" in {r.kind for r in found}
