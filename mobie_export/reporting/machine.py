"""Which machine are figures of?"""

import os
import platform
from contextlib import suppress
from typing import Any

from mobie_export.methods.base import cpus

# What distinguishes processors whose names a hypervisor hides ("AMD EPYC").
DETAILS = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}


def machine() -> dict[str, Any]:
    """cpu: its name; details: family and model as Linux numbers them, may be empty; cores: that this process may use;
    memory: bytes, or None; load: programs that wanted a core in the last minute, or None."""
    cpu, details = platform.processor() or platform.machine(), {}
    with suppress(OSError), open("/proc/cpuinfo") as info:
        for line in info:
            key, _, value = (x.strip() for x in line.partition(":"))
            if key == "model name":
                cpu = value
            elif key in DETAILS:
                details[DETAILS[key]] = value
            elif not line.strip():  # the first of the cores
                break
    return {
        "cpu": cpu,
        "details": ", ".join(f"{k} {v}" for k, v in details.items()),
        "cores": cpus(),
        "memory": memory(),
        "system": platform.system(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def memory() -> int | None:
    """Bytes that the machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
