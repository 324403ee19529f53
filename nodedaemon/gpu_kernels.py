"""What the test of a GPU has it do, as PTX, and what must come of it, computed here. Pure.

The driver compiles PTX for the card there is, so this text serves every card since Maxwell (sm_50). Assembled with
NVIDIA's ptxas 12.9.86 (sm_50 to sm_121) and 13.0.88 (sm_75 to sm_121).
"""

import array
import itertools
import struct
from typing import Final

#: Threads of a block, and of a warp.
THREADS: Final = 256
LANES: Final = 32
#: Rounds of integer and floating-point arithmetic that each thread does, each on what the last one gave.
ROUNDS: Final = 16_384

_WORD: Final = 0xFFFFFFFF
#: Odd, so that every word of a pattern differs from every other.
_SPREAD: Final = 2654435761
_STEP: Final = 1664525
_SHIFT: Final = 1013904223

#: `fill` writes into `words` words, beginning `at`, the pattern of `pattern` from its word number `first` on.
#: `work` writes what each thread computed; the threads of every warp compute what `results` does.
PTX: Final = f"""\
.version 6.0
.target sm_50
.address_size 64

.visible .entry fill(.param .u64 at, .param .u32 words, .param .u32 first)
{{
    .reg .pred %end;
    .reg .b32 %words, %first, %threads, %block, %i, %stride, %value;
    .reg .b64 %base, %place;
    ld.param.u64 %base, [at];
    ld.param.u32 %words, [words];
    ld.param.u32 %first, [first];
    cvta.to.global.u64 %base, %base;
    mov.u32 %threads, %ntid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %i, %tid.x;
    mad.lo.u32 %i, %block, %threads, %i;
    mov.u32 %stride, %nctaid.x;
    mul.lo.u32 %stride, %stride, %threads;
NEXT:
    setp.ge.u32 %end, %i, %words;
    @%end bra DONE;
    add.u32 %value, %i, %first;
    mul.lo.u32 %value, %value, {_SPREAD};
    mul.wide.u32 %place, %i, 4;
    add.u64 %place, %base, %place;
    st.global.u32 [%place], %value;
    add.u32 %i, %i, %stride;
    bra NEXT;
DONE:
    ret;
}}

.visible .entry work(.param .u64 at, .param .u32 rounds)
{{
    .reg .pred %more;
    .reg .b32 %left, %threads, %block, %thread, %i, %x, %bits;
    .reg .f32 %a, %g;
    .reg .b64 %base, %place;
    ld.param.u64 %base, [at];
    ld.param.u32 %left, [rounds];
    cvta.to.global.u64 %base, %base;
    mov.u32 %threads, %ntid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %thread, %tid.x;
    mad.lo.u32 %i, %block, %threads, %thread;
    and.b32 %x, %thread, {LANES - 1};
    mul.lo.u32 %x, %x, {_SPREAD};
    mov.f32 %a, 0f3F800000;
ROUND:
    mad.lo.u32 %x, %x, {_STEP}, {_SHIFT};
    shr.u32 %bits, %x, 9;
    or.b32 %bits, %bits, 0x3F800000;
    mov.b32 %g, %bits;
    fma.rn.f32 %a, %g, %a, %g;
    mov.b32 %bits, %a;
    xor.b32 %x, %x, %bits;
    and.b32 %bits, %bits, 0x007FFFFF;
    or.b32 %bits, %bits, 0x3F800000;
    mov.b32 %a, %bits;
    sub.u32 %left, %left, 1;
    setp.ne.u32 %more, %left, 0;
    @%more bra ROUND;
    xor.b32 %x, %x, %bits;
    mul.wide.u32 %place, %i, 4;
    add.u64 %place, %base, %place;
    st.global.u32 [%place], %x;
    ret;
}}
"""


def pattern(words: int) -> bytes:
    """The first words of the pattern that `fill` writes: no two of the first 2**32 are the same."""
    values = itertools.accumulate(itertools.repeat(_SPREAD, words - 1), lambda a, b: (a + b) & _WORD, initial=0)
    return array.array("I", values).tobytes()


def results(rounds: int = ROUNDS) -> bytes:
    """What the threads of one warp write, LANES words.

    The sum of a product of two 24-bit numbers and a third of the same size is exact in double precision, so that
    rounding it once to single precision is what a fused multiply-add does.
    """
    single, word = struct.Struct("<f"), struct.Struct("<I")
    written = []
    for lane in range(LANES):
        x, bits = lane * _SPREAD & _WORD, 0x3F800000
        for _ in range(rounds):
            x = (x * _STEP + _SHIFT) & _WORD
            g = 1.0 + (x >> 9) * 2.0**-23
            (bits,) = word.unpack(single.pack(g * (1.0 + (bits & 0x007FFFFF) * 2.0**-23) + g))
            x ^= bits
        written.append(x ^ (bits & 0x007FFFFF | 0x3F800000))
    return struct.pack(f"<{LANES}I", *written)
