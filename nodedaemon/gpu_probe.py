"""The process that asks the NVIDIA driver, in place of the daemon (see gpus.py). The only file that imports pynvml.

`python -m nodedaemon.gpu_probe [INDEX...]`, indexes being those of GPUs to leave out. It writes JSON lines: first
what is built in (`inventory`), then, for each line it reads, how each GPU is (`readings`, with the fields of
gpus.GpuReading and `processes`, a list of pid and bytes). Before it asks the driver about a GPU it writes which
(`at`): that one hung, if nothing follows. It imports little, because it is in memory for as long as the daemon is.
"""

import contextlib
import json
import sys
from typing import Any

import pynvml as nvml

#: NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, which bindings of before 2025 do not name.
RECOVERY_ACTION = 230
XIDS_AT_ONCE = 64
#: What a driver or a card does not offer, or not to us.
ABSENT = (
    nvml.NVML_ERROR_NOT_SUPPORTED,
    nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    nvml.NVML_ERROR_NO_PERMISSION,
    nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
)


def main() -> None:
    """List the GPUs, then answer each line on stdin with their readings. Arguments: indexes to leave out."""
    left_out = {int(index) for index in sys.argv[1:]}
    try:
        nvml.nvmlInit()
        inventory, handles = _list(left_out)
    except nvml.NVMLError as error:
        missing = error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND
        words = "there is no NVIDIA driver on this machine (no libnvidia-ml.so.1)" if missing else f"NVML: {error}"
        _say(inventory={"gpus": [], "driver": "", "cuda": "", "message": words})
        return
    _say(inventory=inventory)
    events = _events(handles)
    for _ in sys.stdin:
        _say(at=None)
        xids = _xids(events)
        readings = []
        for index, (gpu_id, handle) in handles.items():
            _say(at=index)
            reading: dict[str, Any] = {"gpu_id": gpu_id, "xids": xids.get(gpu_id, [])}
            try:
                reading.update(_reading(handle))
            except nvml.NVMLError as error:
                reading["error"] = str(error)
            readings.append(reading)
        _say(readings=readings)


def _say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _list(left_out: set[int]) -> tuple[dict[str, Any], dict[int, tuple[str, Any]]]:
    gpus, handles, faults = [], {}, []
    for index in range(nvml.nvmlDeviceGetCount()):
        if index in left_out:
            continue
        _say(at=index)
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            gpu = {
                "id": nvml.nvmlDeviceGetUUID(handle),
                "model": nvml.nvmlDeviceGetName(handle),
                "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(handle).total,
                "index": index,
                "pci_bus_id": nvml.nvmlDeviceGetPciInfo(handle).busId,
            }
        except nvml.NVMLError as error:
            faults.append(f"GPU {index}: {error}")
            continue
        gpus.append(gpu)
        handles[index] = (gpu["id"], handle)
    _say(at=None)
    if not gpus and not faults and not left_out:
        faults.append("the NVIDIA driver is here and sees no GPU")
    cuda = nvml.nvmlSystemGetCudaDriverVersion()
    inventory = {
        "gpus": gpus,
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "message": "; ".join(faults),
    }
    return inventory, handles


def _reading(handle: Any) -> dict[str, Any]:
    def ask(name: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, name)(handle, *arguments)
        except nvml.NVMLError as error:
            if error.value in ABSENT:
                return None
            raise

    memory, utilization = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetUtilizationRates")
    power, remapped = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetRemappedRows")
    compute, graphics = ask("nvmlDeviceGetComputeRunningProcesses"), ask("nvmlDeviceGetGraphicsRunningProcesses")
    recovery = ask("nvmlDeviceGetFieldValues", [RECOVERY_ACTION])
    clocks = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if clocks is None:
        # Its name before driver 530.
        clocks = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    return {
        "memory_used_bytes": memory and memory.used,
        "utilization": utilization and utilization.gpu,
        "temperature_c": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "power_w": None if power is None else power / 1000,
        "clocks_event_reasons": clocks,
        "ecc_uncorrected": ask(
            "nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        "row_remap_pending": None if remapped is None else bool(remapped[2]),
        "row_remap_failed": None if remapped is None else bool(remapped[3]),
        "recovery_action": recovery[0].value.uiVal if recovery and recovery[0].nvmlReturn == 0 else None,
        "processes": None
        if compute is None
        else sorted({p.pid: p.usedGpuMemory for p in [*compute, *(graphics or ())]}.items()),
    }


def _events(handles: dict[int, tuple[str, Any]]) -> Any:
    with contextlib.suppress(nvml.NVMLError):
        events = nvml.nvmlEventSetCreate()
        for _, handle in handles.values():
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
        return events
    return None


def _xids(events: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    if events is None:
        return found
    # Ends with NVML_ERROR_TIMEOUT when there are no more.
    with contextlib.suppress(nvml.NVMLError):
        for _ in range(XIDS_AT_ONCE):
            event = nvml.nvmlEventSetWait_v2(events, 0)
            found.setdefault(nvml.nvmlDeviceGetUUID(event.device), []).append(event.eventData)
    return found


if __name__ == "__main__":
    main()
