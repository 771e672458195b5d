"""units/integer.py: every opcode against Python's own integers."""

from __future__ import annotations

import numpy as np
import pytest
from fragments import evaluate

from hotloop.emulator import UnsupportedPTX

EDGES = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    33,
    0x7FFFFFFF,
    0x80000000,
    0x80000001,
    0xFFFFFFFF,
    0xDEADBEEF,
    0x12345678,
    0xFFFF0000,
    255,
]
A = np.array([a for a in EDGES for _ in EDGES], np.uint32)
B = np.array(EDGES * len(EDGES), np.uint32)
C = np.random.default_rng(0).integers(0, 2**32, len(A), np.uint32)
WIDE = [0, 1, 3, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 0xDEADBEEFCAFEF00D, 0x0123456789ABCDEF, 77]
A64 = np.array([a for a in WIDE for _ in WIDE], np.uint64)
B64 = np.array(WIDE * len(WIDE), np.uint64)


def signed(x: int, bits: int = 32) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def truncated(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


def clamp(x: int) -> int:
    return max(-(2**31), min(2**31 - 1, x))


BINARY = {
    "add.u32": lambda a, b: a + b,
    "add.s32": lambda a, b: a + b,
    "add.sat.s32": lambda a, b: clamp(signed(a) + signed(b)),
    "sub.u32": lambda a, b: a - b,
    "sub.sat.s32": lambda a, b: clamp(signed(a) - signed(b)),
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "mul24.lo.u32": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "mul24.lo.s32": lambda a, b: signed(a, 24) * signed(b, 24),
    "div.u32": lambda a, b: a // b if b else 0xFFFFFFFF,
    "div.s32": lambda a, b: truncated(signed(a), signed(b)) if b else -1,
    "rem.u32": lambda a, b: a % b if b else a,
    "rem.s32": lambda a, b: signed(a) - truncated(signed(a), signed(b)) * signed(b) if b else signed(a),
    "min.u32": min,
    "max.u32": max,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.s32": lambda a, b: max(signed(a), signed(b)),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
}


@pytest.mark.parametrize("opcode", BINARY)
def test_two_operands(opcode):
    got = evaluate(f"{opcode} %d, %a0, %a1;", [A, B])
    want = [BINARY[opcode](int(a), int(b)) & 0xFFFFFFFF for a, b in zip(A, B, strict=True)]
    np.testing.assert_array_equal(got, np.array(want, np.uint32))


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add.u64", lambda a, b: a + b),
        ("sub.s64", lambda a, b: a - b),
        ("mul.lo.u64", lambda a, b: a * b),
        ("mul.hi.u64", lambda a, b: a * b >> 64),
        ("mul.hi.s64", lambda a, b: signed(a, 64) * signed(b, 64) >> 64),
        ("min.s64", lambda a, b: min(signed(a, 64), signed(b, 64))),
        ("max.u64", max),
        ("xor.b64", lambda a, b: a ^ b),
        ("div.u64", lambda a, b: a // b if b else 2**64 - 1),
        ("rem.s64", lambda a, b: signed(a, 64) - truncated(signed(a, 64), signed(b, 64)) * signed(b, 64) if b else a),
    ],
)
def test_two_operands_of_64_bits(opcode, function):
    got = evaluate(f"{opcode} %d, %a0, %a1;", [A64, B64], "b64", into=np.uint64)
    want = [function(int(a), int(b)) & (2**64 - 1) for a, b in zip(A64, B64, strict=True)]
    np.testing.assert_array_equal(got, np.array(want, np.uint64))


@pytest.mark.parametrize("opcode", ["shl.b64", "shr.u64", "shr.s64"])
def test_shifts_of_64_bits(opcode):
    amounts = np.resize(np.array([0, 1, 31, 32, 63, 64, 65, 0xFFFFFFFF], np.uint32), len(A64))
    got = evaluate(f"{opcode} %d, %a0, %a1;", [A64, amounts], "b64", into=np.uint64)
    by = {
        "shl.b64": lambda a, n: a << n if n < 64 else 0,
        "shr.u64": lambda a, n: a >> n if n < 64 else 0,
        "shr.s64": lambda a, n: signed(a, 64) >> min(n, 63),
    }[opcode]
    want = [by(int(a), int(n)) & (2**64 - 1) for a, n in zip(A64, amounts, strict=True)]
    np.testing.assert_array_equal(got, np.array(want, np.uint64))


def test_shift_by_a_constant():
    np.testing.assert_array_equal(evaluate("shl.b32 %d, %a0, 5;", [A]), A << np.uint32(5))
    np.testing.assert_array_equal(evaluate("shr.s32 %d, %a0, 40;", [A]), (A.view(np.int32) >> 31).view(np.uint32))


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("mad.lo.s32", lambda a, b, c: a * b + c),
        ("mad.hi.u32", lambda a, b, c: (a * b >> 32) + c),
        ("mad24.lo.s32", lambda a, b, c: signed(a, 24) * signed(b, 24) + c),
        ("sad.s32", lambda a, b, c: c + abs(signed(a) - signed(b))),
        ("sad.u32", lambda a, b, c: c + abs(a - b)),
        ("lop3.b32", lambda a, b, c: (a & b) | (~a & c)),
        ("shf.l.wrap.b32", lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32),
        ("shf.r.wrap.b32", lambda a, b, c: (b << 32 | a) >> (c & 31)),
        ("shf.l.clamp.b32", lambda a, b, c: ((b << 32 | a) << min(c, 32)) >> 32),
        ("shf.r.clamp.b32", lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    ],
)
def test_three_operands(opcode, function):
    c = np.resize(np.array([0, 1, 8, 31, 32, 33, 64, 0xFFFFFFFF], np.uint32), len(A)) if "shf" in opcode else C
    tail = ", 0xCA" if "lop3" in opcode else ""  # 0xCA: a ? b : c
    got = evaluate(f"{opcode} %d, %a0, %a1, %a2{tail};", [A, B, c])
    want = [function(int(x), int(y), int(z)) & 0xFFFFFFFF for x, y, z in zip(A, B, c, strict=True)]
    np.testing.assert_array_equal(got, np.array(want, np.uint32))


@pytest.mark.parametrize("kind", ["u", "s"])
def test_wide_products(kind):
    got = evaluate(f"mul.wide.{kind}32 %d, %a0, %a1;", [A, B], "b64", into=np.uint64)
    as_int = signed if kind == "s" else int
    want = [as_int(int(a)) * as_int(int(b)) & (2**64 - 1) for a, b in zip(A, B, strict=True)]
    np.testing.assert_array_equal(got, np.array(want, np.uint64))


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("neg.s32", lambda a: -a),
        ("abs.s32", lambda a: abs(signed(a))),
        ("not.b32", lambda a: ~a),
        ("cnot.b32", lambda a: int(a == 0)),
        ("popc.b32", lambda a: bin(a).count("1")),
        ("clz.b32", lambda a: 32 - a.bit_length()),
        ("brev.b32", lambda a: int(f"{a:032b}"[::-1], 2)),
        ("bfind.u32", lambda a: a.bit_length() - 1),
        ("bfind.s32", lambda a: (a if signed(a) >= 0 else ~a & 0xFFFFFFFF).bit_length() - 1),
        ("bfind.shiftamt.u32", lambda a: 32 - a.bit_length() if a else -1),
    ],
)
def test_one_operand(opcode, function):
    got = evaluate(f"{opcode} %d, %a0;", [C])
    np.testing.assert_array_equal(got, np.array([function(int(a)) & 0xFFFFFFFF for a in C], np.uint32))
    got = evaluate(f"{opcode} %d, %a0;", [A])
    np.testing.assert_array_equal(got, np.array([function(int(a)) & 0xFFFFFFFF for a in A], np.uint32))


@pytest.mark.parametrize("opcode", ["popc", "clz", "brev"])
def test_one_operand_of_64_bits(opcode):
    out, into = ("b64", np.uint64) if opcode == "brev" else ("b32", np.uint32)
    by = {
        "popc": lambda a: bin(a).count("1"),
        "clz": lambda a: 64 - a.bit_length(),
        "brev": lambda a: int(f"{a:064b}"[::-1], 2),
    }[opcode]
    got = evaluate(f"{opcode}.b64 %d, %a0;", [A64], out, into=into)
    np.testing.assert_array_equal(got, np.array([by(int(a)) for a in A64], into))


FIELDS = [(p, n) for p in (0, 1, 5, 16, 31, 32, 40, 255, 256 + 3) for n in (0, 1, 7, 8, 16, 31, 32, 33, 255)]


@pytest.mark.parametrize("kind", ["u", "s"])
@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_extract(kind, bits):
    """The ISA's own loop: bit i of the field is bit position + i, or the sign beyond the field and the width."""
    values = (A if bits == 32 else A64)[: len(FIELDS)]
    position, length = (np.array(v, np.uint32) for v in zip(*FIELDS, strict=True))

    def want(a: int, p: int, n: int) -> int:
        p, n = p & 0xFF, n & 0xFF
        sign = 0
        if kind == "s" and n:
            sign = a >> min(p + n - 1, bits - 1) & 1
        field = 0
        for i in range(bits):
            bit = a >> (p + i) & 1 if i < n and p + i < bits else sign
            field |= bit << i
        return field

    into = np.uint32 if bits == 32 else np.uint64
    got = evaluate(f"bfe.{kind}{bits} %d, %a0, %a1, %a2;", [values, position, length], f"b{bits}", into=into)
    expected = [want(int(a), int(p), int(n)) for a, p, n in zip(values, position, length, strict=True)]
    np.testing.assert_array_equal(got, np.array(expected, into))


def test_bit_field_insert():
    position, length = (np.array(v, np.uint32) for v in zip(*FIELDS, strict=True))
    a, b = C[: len(FIELDS)], C[-len(FIELDS) :]

    def want(x: int, y: int, p: int, n: int) -> int:
        p, n = p & 0xFF, n & 0xFF
        for i in range(n):
            if p + i < 32:
                y = (y & ~(1 << (p + i))) | ((x >> i & 1) << (p + i)) if i < 32 else y & ~(1 << (p + i))
        return y

    got = evaluate("bfi.b32 %d, %a0, %a1, %a2, %a3;", [a, b, position, length])
    expected = [want(*(int(v) for v in row)) for row in zip(a, b, position, length, strict=True)]
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))


def test_byte_permute():
    selector = np.random.default_rng(1).integers(0, 2**16, len(A)).astype(np.uint32)

    def want(a: int, b: int, s: int) -> int:
        pair, out = (b << 32 | a).to_bytes(8, "little"), 0
        for i in range(4):
            pick = s >> 4 * i & 15
            byte = pair[pick & 7]
            out |= ((0xFF if byte & 0x80 else 0) if pick & 8 else byte) << 8 * i
        return out

    got = evaluate("prmt.b32 %d, %a0, %a1, %a2;", [A, C, selector])
    expected = [want(int(a), int(b), int(s)) for a, b, s in zip(A, C, selector, strict=True)]
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))


@pytest.mark.parametrize(
    ("mode", "picks"),
    [
        ("f4e", [(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)]),
        ("b4e", [(0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)]),
        ("rc8", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)]),
        ("ecl", [(0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)]),
        ("ecr", [(0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)]),
        ("rc16", [(0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)]),
    ],
)
def test_byte_permute_modes(mode, picks):
    a, b = np.full(4, 0x33221100, np.uint32), np.full(4, 0x77665544, np.uint32)
    got = evaluate(f"prmt.b32.{mode} %d, %a0, %a1, %a2;", [a, b, np.arange(4, dtype=np.uint32)])
    want = [sum(0x11 * p << 8 * i for i, p in enumerate(row)) for row in picks]
    np.testing.assert_array_equal(got, np.array(want, np.uint32))


@pytest.mark.parametrize("kinds", ["u32.u32", "s32.s32", "u32.s32", "s32.u32"])
def test_byte_dot_product(kinds):
    def part(x: int, i: int, kind: str) -> int:
        byte = x >> 8 * i & 255
        return signed(byte, 8) if kind == "s32" else byte

    ka, kb = kinds.split(".")
    got = evaluate(f"dp4a.{kinds} %d, %a0, %a1, %a2;", [A, C, B])
    want = [
        (sum(part(int(a), i, ka) * part(int(b), i, kb) for i in range(4)) + int(c)) & 0xFFFFFFFF
        for a, b, c in zip(A, C, B, strict=True)
    ]
    np.testing.assert_array_equal(got, np.array(want, np.uint32))


def test_sixteen_bits():
    a, b = A.astype(np.uint16), B.astype(np.uint16)
    np.testing.assert_array_equal(evaluate("add.s16 %d, %a0, %a1;", [a, b], "b16", into=np.uint16), a + b)
    np.testing.assert_array_equal(
        evaluate("mul.wide.u16 %d, %a0, %a1;", [a, b]), a.astype(np.uint32) * b.astype(np.uint32)
    )
    np.testing.assert_array_equal(
        evaluate("mul.hi.s16 %d, %a0, %a1;", [a, b], "b16", into=np.int16),
        ((a.view(np.int16).astype(np.int32) * b.view(np.int16).astype(np.int32)) >> 16).astype(np.int16),
    )


@pytest.mark.parametrize("kind", ["u16x2", "s16x2"])
@pytest.mark.parametrize(("opcode", "function"), [("add", lambda a, b: a + b), ("min", min), ("max", max)])
def test_pairs_of_16_bits(opcode, function, kind):
    found = evaluate(f"{opcode}.{kind} %d, %a0, %a1;", [A, C], target="sm_90")

    def half(x: int, at: int) -> int:
        x = x >> at & 0xFFFF
        return signed(x, 16) if kind == "s16x2" else x

    expected = [
        sum((function(half(a, at), half(b, at)) & 0xFFFF) << at for at in (0, 16))
        for a, b in zip(A.tolist(), C.tolist(), strict=True)
    ]
    assert found.tolist() == expected


def test_saturated_pairs_are_refused():
    with pytest.raises(UnsupportedPTX, match=r"saturation and \.relu of pairs"):
        evaluate("add.sat.u16x2 %d, %a0, %a1;", [A, C], target="sm_90")
