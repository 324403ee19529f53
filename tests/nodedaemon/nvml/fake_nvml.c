/* A stand-in for NVIDIA's libnvidia-ml.so.1, as far as nodedaemon/gpus.py asks it.
 *
 * Every answer is read anew from the file that the environment variable FAKE_NVML names, so that a test changes it while the library is
 * loaded. A line is `key value`; keys: driver, cuda, count, init, and for GPU n: n.uuid, n.name, n.memory, n.used, n.utilization,
 * n.temperature, n.power, n.clocks, n.ecc, n.remap_pending, n.remap_failed, n.recovery, n.process (`pid bytes`, any number of lines), n.xid
 * (any number of lines; each is told once, by its position). Instead of a value: `!N` returns NVML error N, `hang` never returns, `crash`
 * ends the process. A key that is not there is NVML_ERROR_NOT_SUPPORTED (3).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, MAX_GPUS = 64 };

typedef struct { int index; } device;
static device devices[MAX_GPUS];
static int xids_told[MAX_GPUS];
static int registered[MAX_GPUS];

/* The nth value of a key, 0 if there is none. */
static int find(const char *key, int nth, char *value, size_t size) {
    FILE *file = fopen(getenv("FAKE_NVML") ? getenv("FAKE_NVML") : "/nonexistent", "r");
    char line[512];
    int found = 0;
    if (!file) return 0;
    while (!found && fgets(line, sizeof line, file)) {
        char *space = strchr(line, ' ');
        if (!space) continue;
        *space = 0;
        if (strcmp(line, key) || nth-- > 0) continue;
        char *text = space + 1;
        text[strcspn(text, "\n")] = 0;
        snprintf(value, size, "%s", text);
        found = 1;
    }
    fclose(file);
    return found;
}

static int get(const char *key, char *value, size_t size) {
    if (!find(key, 0, value, size)) return NOT_SUPPORTED;
    if (!strcmp(value, "hang")) for (;;) pause();
    if (!strcmp(value, "crash")) abort();
    if (value[0] == '!') return atoi(value + 1);
    return SUCCESS;
}

static int text(const char *key, char *out, unsigned size) { return get(key, out, size); }

static int number(const char *key, unsigned long long *out) {
    char value[64];
    int result = get(key, value, sizeof value);
    if (result == SUCCESS) *out = strtoull(value, NULL, 0);
    return result;
}

static const char *of(device *d, const char *name) {
    static char key[64];
    snprintf(key, sizeof key, "%d.%s", d->index, name);
    return key;
}

static int small(device *d, const char *name, unsigned *out) {
    unsigned long long value = 0;
    int result = number(of(d, name), &value);
    if (result == SUCCESS) *out = (unsigned)value;
    return result;
}

int nvmlInitWithFlags(unsigned flags) {
    char value[64];
    (void)flags;
    int result = get("init", value, sizeof value);
    return result == NOT_SUPPORTED ? SUCCESS : result;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int result) {
    switch (result) {
    case SUCCESS: return "Success";
    case NOT_SUPPORTED: return "Not Supported";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    case 999: return "Unknown Error";
    default: return "Some Error";
    }
}

int nvmlSystemGetDriverVersion(char *version, unsigned length) { return text("driver", version, length); }
int nvmlSystemGetCudaDriverVersion(int *version) {
    unsigned long long value = 0;
    int result = number("cuda", &value);
    *version = (int)value;
    return result;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }

int nvmlDeviceGetCount_v2(unsigned *count) {
    unsigned long long value = 0;
    int result = number("count", &value);
    *count = (unsigned)value;
    return result;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **out) {
    char value[64];
    devices[index].index = (int)index;
    *out = &devices[index];
    int result = get(of(*out, "handle"), value, sizeof value);
    return result == NOT_SUPPORTED ? SUCCESS : result;
}
int nvmlDeviceGetUUID(device *d, char *uuid, unsigned length) { return text(of(d, "uuid"), uuid, length); }
int nvmlDeviceGetName(device *d, char *name, unsigned length) { return text(of(d, "name"), name, length); }

typedef struct { unsigned long long total, free, used; } memory;
int nvmlDeviceGetMemoryInfo(device *d, memory *out) {
    int result = number(of(d, "memory"), &out->total);
    out->used = 0;
    if (result == SUCCESS) result = number(of(d, "used"), &out->used);
    out->free = out->total - out->used;
    return result;
}

typedef struct {
    char legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} pci;
int nvmlDeviceGetPciInfo_v3(device *d, pci *out) {
    memset(out, 0, sizeof *out);
    snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", d->index + 1);
    return SUCCESS;
}

typedef struct { unsigned gpu, memory; } utilization;
int nvmlDeviceGetUtilizationRates(device *d, utilization *out) {
    out->memory = 0;
    return small(d, "utilization", &out->gpu);
}
int nvmlDeviceGetTemperature(device *d, unsigned sensor, unsigned *out) {
    (void)sensor;
    return small(d, "temperature", out);
}
int nvmlDeviceGetPowerUsage(device *d, unsigned *milliwatts) { return small(d, "power", milliwatts); }
int nvmlDeviceGetCurrentClocksEventReasons(device *d, unsigned long long *out) { return number(of(d, "clocks"), out); }
int nvmlDeviceGetTotalEccErrors(device *d, unsigned type, unsigned counter, unsigned long long *out) {
    (void)type, (void)counter;
    return number(of(d, "ecc"), out);
}
int nvmlDeviceGetRemappedRows(device *d, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    *corrected = *uncorrected = 0;
    int result = small(d, "remap_pending", pending);
    return result == SUCCESS ? small(d, "remap_failed", failed) : result;
}

typedef union { double d; int si; unsigned ui; unsigned long ul; unsigned long long ull; long long sll; unsigned short us; } field_value;
typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    unsigned type;
    int result;
    field_value value;
} field;
int nvmlDeviceGetFieldValues(device *d, int count, field *fields) {
    for (int i = 0; i < count; i++) {
        fields[i].value.ull = 0;
        fields[i].type = 1; /* unsigned int */
        fields[i].result = fields[i].field == 230 ? small(d, "recovery", &fields[i].value.ui) : NOT_SUPPORTED;
    }
    return SUCCESS;
}

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} process;
static int processes(device *d, const char *key, unsigned *count, process *out) {
    char value[64];
    unsigned n = 0, room = *count;
    int result = get(of(d, key), value, sizeof value);
    if (result != SUCCESS && result != NOT_SUPPORTED) return result;
    for (; find(of(d, key), (int)n, value, sizeof value); n++)
        if (n < room && out) {
            memset(&out[n], 0, sizeof out[n]);
            sscanf(value, "%u %llu", &out[n].pid, &out[n].used);
        }
    *count = n;
    return n > room ? INSUFFICIENT_SIZE : SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v3(device *d, unsigned *count, process *out) { return processes(d, "process", count, out); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(device *d, unsigned *count, process *out) { return processes(d, "graphics", count, out); }

int nvmlEventSetCreate(void **set) {
    *set = registered;
    return SUCCESS;
}
int nvmlEventSetFree(void *set) {
    (void)set;
    return SUCCESS;
}
int nvmlDeviceRegisterEvents(device *d, unsigned long long types, void *set) {
    char value[64];
    (void)types, (void)set;
    int result = get(of(d, "events"), value, sizeof value);
    if (result != SUCCESS && result != NOT_SUPPORTED) return result;
    registered[d->index] = 1;
    return SUCCESS;
}
typedef struct {
    device *d;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} event;
int nvmlEventSetWait_v2(void *set, event *out, unsigned milliseconds) {
    char value[64];
    (void)set, (void)milliseconds;
    for (int i = 0; i < MAX_GPUS; i++)
        if (registered[i] && find(of(&devices[i], "xid"), xids_told[i], value, sizeof value)) {
            xids_told[i]++;
            memset(out, 0, sizeof *out);
            out->d = &devices[i];
            out->type = 8; /* nvmlEventTypeXidCriticalError */
            out->data = strtoull(value, NULL, 0);
            return SUCCESS;
        }
    return TIMEOUT;
}
