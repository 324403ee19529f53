/* A stand-in for NVIDIA's libcuda.so.1, as far as nodedaemon/gpu_test.py calls it.
 *
 * It reads the same file as fake_nvml.c. Keys: `cuda.FUNCTION` (`!N`: return error N from then on, `hang`, `crash`), and for GPU n, beside
 * n.uuid and n.memory: n.free (bytes; all, if it is not there), n.stuck (the byte at which bit 1 reads as set), n.alias (an address line that
 * does nothing: a power of two), n.wrong (the thread whose result has a wrong bit), n.copy_ms (how long a copy takes), n.integrated (1: its memory is the machine's).
 * Of the GPUs those are there that CUDA_VISIBLE_DEVICES names. Kernels are known by their names and computed here.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OUT_OF_MEMORY = 2, INVALID_PTX = 218, MULTIPROCESSORS = 2, BASE = 1 << 20 };

static int gpu = -1;
static uint8_t *arena;
static uint64_t size, allocated, alias, stuck;
static const char *kernels[] = {"fill", "work"};

static int find(const char *key, char *value) {
    FILE *file = fopen(getenv("FAKE_NVML") ? getenv("FAKE_NVML") : "/nonexistent", "r");
    char line[512];
    int found = 0;
    if (!file) return 0;
    while (!found && fgets(line, sizeof line, file)) {
        char *space = strchr(line, ' ');
        if (!space) continue;
        *space = 0;
        if (strcmp(line, key)) continue;
        space[1 + strcspn(space + 1, "\n")] = 0;
        snprintf(value, 64, "%s", space + 1);
        found = 1;
    }
    fclose(file);
    return found;
}

static uint64_t number(const char *name, uint64_t otherwise) {
    char key[64], value[64];
    snprintf(key, sizeof key, "%d.%s", gpu, name);
    return find(key, value) ? strtoull(value, NULL, 0) : otherwise;
}

static int called(const char *function) {
    char key[64], value[64];
    snprintf(key, sizeof key, "cuda.%s", function);
    if (!find(key, value)) return 0;
    if (!strcmp(value, "hang")) for (;;) pause();
    if (!strcmp(value, "crash")) abort();
    return atoi(value + 1);
}
#define CALLED do { int error = called(__func__); if (error) return error; } while (0)

int cuGetErrorName(int error, const char **name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 214 ? "CUDA_ERROR_ECC_UNCORRECTABLE" : NULL;
    return *name ? 0 : 1;
}

int cuInit(unsigned flags) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    char key[64], uuid[64];
    (void)flags;
    CALLED;
    for (int n = 0; visible && n < 64; n++) {
        snprintf(key, sizeof key, "%d.uuid", n);
        if (find(key, uuid) && !strcmp(uuid, visible)) gpu = n;
    }
    if (gpu < 0) return 100;
    size = number("memory", 0);
    alias = number("alias", 0);
    stuck = number("stuck", UINT64_MAX);
    arena = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return arena == MAP_FAILED ? 999 : 0;
}
int cuDeviceGetCount(int *count) { CALLED; *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { CALLED; *device = index; return 0; }
int cuDeviceGetUuid_v2(uint8_t *out, int device) {
    char key[64], uuid[64], *at = uuid + 4;
    (void)device;
    CALLED;
    snprintf(key, sizeof key, "%d.uuid", gpu);
    find(key, uuid);
    for (int i = 0; i < 16; i++, at += 2) {
        unsigned byte = 0;
        if (*at == '-') at++;
        sscanf(at, "%2x", &byte);
        out[i] = (uint8_t)byte;
    }
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    CALLED;
    *value = attribute == 16 ? MULTIPROCESSORS : attribute == 18 ? (int)number("integrated", 0) : 0;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; CALLED; *context = arena; return 0; }
int cuCtxSetCurrent(void *context) { CALLED; return context == arena ? 0 : 201; }
int cuCtxSynchronize(void) { CALLED; return 0; }
int cuModuleLoadData(void **module, const char *image) {
    CALLED;
    *module = arena;
    return strncmp(image, ".version ", 9) ? INVALID_PTX : 0;
}
int cuModuleGetFunction(const char **function, void *module, const char *name) {
    (void)module;
    CALLED;
    for (int i = 0; i < 2; i++)
        if (!strcmp(kernels[i], name)) {
            *function = kernels[i];
            return 0;
        }
    return 500;
}
int cuMemGetInfo_v2(size_t *available, size_t *total) {
    CALLED;
    *total = size;
    *available = number("free", size) - allocated;
    return 0;
}
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    CALLED;
    if (allocated + bytes > number("free", size)) return OUT_OF_MEMORY;
    *address = BASE + allocated;
    allocated += bytes;
    return 0;
}
/* All is given back before more is asked for. */
int cuMemFree_v2(uint64_t address) { CALLED; allocated = address == BASE ? 0 : allocated; return 0; }
int cuMemAllocHost_v2(void **address, size_t bytes) { CALLED; *address = malloc(bytes); return 0; }

static uint8_t *cell(uint64_t address) { return arena + ((address - BASE) & ~alias); }

int cuMemsetD32_v2(uint64_t address, uint32_t word, size_t words) {
    CALLED;
    uint32_t *at = (uint32_t *)cell(address);
    for (size_t i = 0; i < words; i++) at[i] = word;
    return 0;
}
static void work(uint32_t *out, uint32_t threads, uint32_t rounds) {
    for (uint32_t lane = 0; lane < 32; lane++) {
        uint32_t x = lane * 2654435761u, bits = 0x3F800000;
        float a = 1, g;
        for (uint32_t left = rounds; left; left--) {
            x = x * 1664525u + 1013904223u;
            bits = x >> 9 | 0x3F800000;
            memcpy(&g, &bits, 4);
            a = fmaf(g, a, g);
            memcpy(&bits, &a, 4);
            x ^= bits;
            bits = (bits & 0x007FFFFF) | 0x3F800000;
            memcpy(&a, &bits, 4);
        }
        for (uint32_t i = lane; i < threads; i += 32) out[i] = x ^ bits;
    }
    uint64_t wrong = number("wrong", UINT64_MAX);
    if (wrong < threads) out[wrong] ^= 1u << 17;
}
int cuLaunchKernel(const char *kernel, unsigned blocks, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz, unsigned shared,
                   void *stream, void **parameters, void **extra) {
    (void)y, (void)z, (void)ty, (void)tz, (void)shared, (void)stream, (void)extra;
    CALLED;
    uint32_t *at = (uint32_t *)cell(*(uint64_t *)parameters[0]), first = *(uint32_t *)parameters[1];
    if (kernel == kernels[1]) {
        work(at, blocks * threads, first);
    } else {
        uint32_t words = first, from = *(uint32_t *)parameters[2];
        for (uint32_t i = 0; i < words; i++) at[i] = (from + i) * 2654435761u;
    }
    return 0;
}
int cuMemcpyDtoH_v2(void *here, uint64_t address, size_t bytes) {
    CALLED;
    memcpy(here, cell(address), bytes);
    uint64_t offset = address - BASE, pause_ms = number("copy_ms", 0);
    if (offset <= stuck && stuck < offset + bytes) ((uint8_t *)here)[stuck - offset] |= 2;
    if (pause_ms) usleep((useconds_t)(pause_ms * 1000));
    return 0;
}
