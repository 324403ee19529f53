"""Runs the few PTX instructions that the kernels of the GPU test are made of, one thread after the other."""

import re
import struct
from fractions import Fraction
from typing import Final

WORD: Final = 0xFFFFFFFF
DOUBLE_WORD: Final = 0xFFFFFFFFFFFFFFFF


def run(ptx: str, kernel: str, *parameters: int, blocks: int, threads: int) -> dict[int, int]:
    """What the kernel writes: words by address. Raises KeyError for an instruction that is not known here."""
    names, lines = _kernel(ptx, kernel)
    values = dict(zip(names, parameters, strict=True))
    memory: dict[int, int] = {}
    for block in range(blocks):
        for thread in range(threads):
            special = {"%ntid.x": threads, "%nctaid.x": blocks, "%ctaid.x": block, "%tid.x": thread}
            _thread(lines, values | special, memory)
    return memory


def _kernel(ptx: str, kernel: str) -> tuple[list[str], list[str]]:
    found = re.search(rf"\.entry {kernel}\((.*?)\)\s*{{(.*?)^}}", ptx, re.DOTALL | re.MULTILINE)
    assert found, kernel
    names = re.findall(r"\.param \.\w+ (\w+)", found[1])
    lines = [line.strip().removesuffix(";") for line in found[2].splitlines()]
    return names, [line for line in lines if line and not line.startswith(".reg")]


def _thread(lines: list[str], known: dict[str, int], memory: dict[int, int]) -> None:
    labels = {line.removesuffix(":"): at for at, line in enumerate(lines) if line.endswith(":")}
    registers = dict(known)

    def value(operand: str) -> int:
        if operand in registers:
            return registers[operand]
        # 0f3F800000: a number by its bits.
        return int(operand.replace("0f", "0x"), 0)

    at = 0
    while lines[at] != "ret":
        line = lines[at]
        at += 1
        if line.endswith(":"):
            continue
        if line.startswith("@"):
            condition, line = line.split(maxsplit=1)
            if not registers[condition[1:]]:
                continue
        instruction, _, rest = line.partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        if instruction == "bra":
            at = labels[operands[0]]
        elif instruction == "st.global.u32":
            memory[value(operands[0].strip("[]"))] = value(operands[1])
        else:
            given = [value(operand.strip("[]")) for operand in operands[1:]]
            registers[operands[0]] = _computed(instruction, given)


def _computed(instruction: str, given: list[int]) -> int:
    match instruction, given:
        case "ld.param.u64" | "ld.param.u32" | "cvta.to.global.u64" | "mov.u32" | "mov.b32" | "mov.f32", [a]:
            return a
        case "mad.lo.u32", [a, b, c]:
            return (a * b + c) & WORD
        case "mul.lo.u32", [a, b]:
            return a * b & WORD
        case "mul.wide.u32", [a, b]:
            return a * b
        case "add.u32", [a, b]:
            return (a + b) & WORD
        case "add.u64", [a, b]:
            return (a + b) & DOUBLE_WORD
        case "sub.u32", [a, b]:
            return (a - b) & WORD
        case "and.b32", [a, b]:
            return a & b
        case "or.b32", [a, b]:
            return a | b
        case "xor.b32", [a, b]:
            return a ^ b
        case "shr.u32", [a, b]:
            return a >> b
        case "setp.ge.u32", [a, b]:
            return int(a >= b)
        case "setp.ne.u32", [a, b]:
            return int(a != b)
        case "fma.rn.f32", [a, b, c]:
            return _rounded(_number(a) * _number(b) + _number(c))
        case _:
            raise KeyError(instruction)


def _number(bits: int) -> Fraction:
    number: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return Fraction(number)


def _rounded(exact: Fraction) -> int:
    """The nearest single-precision number, the even one of two, as bits; for 1 and more."""
    exponent = 0
    while exact >= 1 << (exponent + 1):
        exponent += 1
    return ((exponent + 127) << 23) + round((exact / (1 << exponent) - 1) * (1 << 23))
