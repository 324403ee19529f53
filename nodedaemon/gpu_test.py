"""The process that tests one GPU, in place of the daemon (see gpu_tests.py). The only file that calls CUDA.

`python -m nodedaemon.gpu_test GPU_ID MEMORY_S COMPUTE_S`: how long each part may take. It writes JSON lines: what it is
`at`, and last its `state` (PASSED, FAILED, UNABLE) and the `words` to it. Everything that the GPU wrote is compared
here, by the processor: a GPU that computes wrongly must not be asked whether it does.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from nodedaemon import gpu_kernels

#: Of the memory that is free, what is tested; and of all there is, what must be.
SHARE: Final = 0.95
LEAST_SHARE: Final = 0.5
#: What is written and read back in one go; and how much of it at most.
CHUNK_BYTES: Final = 8 * 1024**2
CHUNKS: Final = 32 * 1024
#: Written into every word, one after the other; None: a pattern that differs from word to word.
PATTERNS: Final = (0x55555555, 0xAAAAAAAA, None)
#: Blocks of threads for each multiprocessor: several times what fits, so that all have work.
BLOCKS: Final = 32
#: The rest of the machine goes first.
NICE: Final = 10
PR_SET_PDEATHSIG: Final = 1
GIB: Final = 1024**3

OUT_OF_MEMORY: Final = 2
#: Errors of CUDA that say nothing of the GPU: out of memory, library without a driver, held by somebody, none there, or
#: a driver that does not fit, is not permitted, or does not compile. Every other one is the GPU's.
NOT_THE_GPUS: Final = frozenset(
    {OUT_OF_MEMORY, 34, 46, 100, 101, 200, 209, 218, 221, 222, 223, 500, 800, 801, 803, 804, 805}
)
#: Attributes of a device.
MULTIPROCESSOR_COUNT: Final = 16
INTEGRATED: Final = 18


class Unable(Exception):
    """The test cannot be run; the message says why."""


class Failed(Exception):
    """The GPU is not well; the message says how."""


class CudaError(Exception):
    """CUDA answered with an error."""

    def __init__(self, function: str, number: int, name: str) -> None:
        super().__init__(f"{function}: {name}")
        self.number = number


class Cuda:
    """The driver's own API, as far as a test needs it, for one GPU."""

    def __init__(self, gpu_id: str) -> None:
        """Find it. Raises Unable, CudaError."""
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise Unable("there is no CUDA driver on this machine (no libcuda.so.1)") from None
        self._call("cuInit", 0)
        device = self._find(gpu_id)
        if self._attribute(device, INTEGRATED):
            raise Unable("it has no memory of its own, and all else on the machine needs that which it uses")
        self.multiprocessors = self._attribute(device, MULTIPROCESSOR_COUNT)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(gpu_kernels.PTX.encode()))
        self._fill, self._work = self._function(module, b"fill"), self._function(module, b"work")

    def _call(self, function: str, *arguments: Any) -> None:
        try:
            called = getattr(self._library, function)
        except AttributeError:
            raise Unable(f"the CUDA driver is too old: it has no {function}") from None
        if number := called(*arguments):
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(number, ctypes.byref(name))
            raise CudaError(function, number, (name.value or b"an unknown error").decode() + f" ({number})")

    def _find(self, gpu_id: str) -> ctypes.c_int:
        count, device, found = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        # With its older name it says the same, save of parts of a GPU.
        uuid_of = "cuDeviceGetUuid_v2" if hasattr(self._library, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
        for index in range(count.value):
            self._call("cuDeviceGet", ctypes.byref(device), index)
            self._call(uuid_of, ctypes.byref(found), device)
            if bytes(found).hex() == gpu_id.removeprefix("GPU-").replace("-", ""):
                return device
        raise Unable("CUDA does not find the GPU")

    def _attribute(self, device: ctypes.c_int, number: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    def _function(self, module: ctypes.c_void_p, name: bytes) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(name))
        return function

    def memory(self) -> tuple[int, int]:
        """Bytes free, and in all."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> ctypes.c_uint64:
        """Memory of the GPU."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address

    def free(self, address: ctypes.c_uint64) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", address)

    def allocate_here(self, size: int) -> ctypes.c_void_p:
        """Memory of the machine that the GPU writes into."""
        address = ctypes.c_void_p()
        self._call("cuMemAllocHost_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address

    def set(self, address: ctypes.c_uint64, word: int, words: int) -> None:
        """Write a word many times."""
        self._call("cuMemsetD32_v2", address, ctypes.c_uint(word), ctypes.c_size_t(words))

    def fill(self, address: ctypes.c_uint64, words: int, first: int) -> None:
        """Write the pattern from its word `first` on."""
        self._launch(self._fill, self.multiprocessors * 8, address, ctypes.c_uint(words), ctypes.c_uint(first))

    def work(self, address: ctypes.c_uint64, blocks: int) -> None:
        """Compute, and write what came of it."""
        self._launch(self._work, blocks, address, ctypes.c_uint(gpu_kernels.ROUNDS))

    def _launch(self, function: ctypes.c_void_p, blocks: int, *values: Any) -> None:
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        shape = (blocks, 1, 1, gpu_kernels.THREADS, 1, 1)
        self._call("cuLaunchKernel", function, *map(ctypes.c_uint, shape), ctypes.c_uint(0), None, pointers, None)

    def wait(self) -> None:
        """Until all is done."""
        self._call("cuCtxSynchronize")

    def read(self, here: ctypes.c_void_p, address: ctypes.c_uint64, size: int) -> None:
        """Copy into the machine's memory."""
        self._call("cuMemcpyDtoH_v2", here, address, ctypes.c_size_t(size))


def main() -> None:
    """Test the GPU. Arguments: its id; seconds for the memory, and for the arithmetic."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(NICE)
    gpu_id, memory_s, compute_s = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    state, words = "PASSED", ""
    try:
        _say(at="the start of CUDA")
        cuda = Cuda(gpu_id)
        _say(at="its arithmetic")
        launches = arithmetic(cuda, compute_s)
        _say(at="its memory")
        words = f"{launches} times its arithmetic, {memory(cuda, memory_s)}"
    except Unable as fault:
        state, words = "UNABLE", str(fault)
    except Failed as fault:
        state, words = "FAILED", str(fault)
    except CudaError as error:
        state, words = "UNABLE" if error.number in NOT_THE_GPUS else "FAILED", str(error)
    _say(state=state, words=words)
    # Without the library's own clean-up, in which a sick driver may hang.
    os._exit(0)


def arithmetic(cuda: Cuda, limit_s: float) -> int:
    """Have every multiprocessor compute, again and again; how often. Raises Failed, CudaError."""
    blocks = cuda.multiprocessors * BLOCKS
    size = blocks * gpu_kernels.THREADS * 4
    due = gpu_kernels.results() * (size // (gpu_kernels.LANES * 4))
    here, launches, end_s = cuda.allocate_here(size), 0, time.monotonic() + limit_s
    with _allocated(cuda, [size]) as (there,):
        while not launches or time.monotonic() < end_s:
            cuda.set(there, 0, size // 4)
            cuda.work(there, blocks)
            cuda.wait()
            cuda.read(here, there, size)
            launches += 1
            if (at := differs(here, due, size)) is not None:
                raise Failed(f"it computes wrongly: thread {at // 4} {_gave(here, due, at)}")
    return launches


def memory(cuda: Cuda, limit_s: float, now: Callable[[], float] = time.monotonic) -> str:
    """Write most of the memory full and read it back, once with each pattern; how much of it, in words.

    All is written before anything is read, so that two addresses that are one place are found. Each pattern has its
    part of the time and begins elsewhere: what it leaves unread another reads. Raises Failed, Unable, CudaError.
    """
    begun_s = now()
    free, total = cuda.memory()
    count = min(int(free * SHARE) // CHUNK_BYTES, CHUNKS)
    words = CHUNK_BYTES // 4
    here = cuda.allocate_here(CHUNK_BYTES)
    with _allocated(cuda, [CHUNK_BYTES] * count) as chunks:
        if len(chunks) * CHUNK_BYTES < min(LEAST_SHARE * total, CHUNKS * CHUNK_BYTES):
            raise Unable(
                f"only {_gib(free)} of {_gib(total)} GiB of its memory are free: something else holds the rest"
            )
        table = gpu_kernels.pattern(words + len(chunks))
        read = 0
        for number, constant in enumerate(PATTERNS):
            due = table if constant is None else constant.to_bytes(4, "little") * words
            for index, chunk in enumerate(chunks):
                if constant is None:
                    cuda.fill(chunk, words, index)
                else:
                    cuda.set(chunk, constant, words)
            cuda.wait()
            end_s = begun_s + limit_s * (number + 1) / len(PATTERNS)
            begin = number * len(chunks) // len(PATTERNS)
            for index in (*range(begin, len(chunks)), *range(begin)):
                if now() >= end_s:
                    break
                cuda.read(here, chunks[index], CHUNK_BYTES)
                read += 1
                skip = 4 * index if constant is None else 0
                if (at := differs(here, due, CHUNK_BYTES, skip)) is not None:
                    where = f"byte {index * CHUNK_BYTES + at} of those tested"
                    raise Failed(f"its memory does not keep what is written: {where} {_gave(here, due, at, skip)}")
    if read < len(chunks):
        raise Unable(f"only {_gib(read * CHUNK_BYTES)} GiB of its memory could be read back in {limit_s:g} s")
    whole = len(PATTERNS) * len(chunks)
    part = "" if read == whole else f" ({read * 100 // whole} % of it, as time allowed)"
    return f"{_gib(len(chunks) * CHUNK_BYTES)} of {_gib(total)} GiB of memory with {len(PATTERNS)} patterns{part}"


@contextmanager
def _allocated(cuda: Cuda, sizes: list[int]) -> Iterator[list[ctypes.c_uint64]]:
    """Memory of the GPU, as many of these pieces as there are; at least one. Raises CudaError."""
    pieces: list[ctypes.c_uint64] = []
    for size in sizes:
        try:
            pieces.append(cuda.allocate(size))
        except CudaError as error:
            if error.number != OUT_OF_MEMORY or not pieces:
                raise
            break
    yield pieces
    for piece in pieces:
        cuda.free(piece)


_LIBC: Final = ctypes.CDLL(None)
_LIBC.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def differs(here: ctypes.c_void_p, due: bytes, left: int, skip: int = 0) -> int | None:
    """Where `left` bytes `here` differ from `due` after its first `skip` bytes, to the word; None: nowhere."""
    begin, wanted = here.value or 0, ctypes.cast(ctypes.c_char_p(due), ctypes.c_void_p).value or 0
    if not _LIBC.memcmp(begin, wanted + skip, left):
        return None
    at = 0
    while left > 4:
        half = (left // 8) * 4
        if _LIBC.memcmp(begin + at, wanted + skip + at, half):
            left = half
        else:
            at, left = at + half, left - half
    return at


def _gave(here: ctypes.c_void_p, due: bytes, at: int, skip: int = 0) -> str:
    said = int.from_bytes(ctypes.string_at((here.value or 0) + at, 4), "little")
    return f"gave 0x{said:08X} in place of 0x{int.from_bytes(due[skip + at : skip + at + 4], 'little'):08X}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
