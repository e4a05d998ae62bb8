"""How one of several processes ends."""

from __future__ import annotations

import atexit
import gc
import sys

import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401 (imported later, its default arguments would hold the group)
from torch.distributed.device_mesh import DeviceMesh


def leave_at_exit() -> None:
    """Have this process leave its process group when it ends, while Python still runs.

    Threads of gloo let go of a collective's tensors a moment after it has ended, and need Python for it. A Python that is
    being taken down ends such a thread, and with it the process ("terminate called without an active exception"), though
    all is written. Only the group's destructor joins them, so nothing may hold the group any more.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    failed = hasattr(sys, "last_value")  # then threads may wait for other processes, as long as the group's timeout
    if failed or not (dist.is_available() and dist.is_initialized()):
        return
    dist.destroy_process_group()
    for mesh in [each for each in gc.get_objects() if type(each) is DeviceMesh]:  # many caches of torch hold them
        vars(mesh).get("_pg_registry", {}).clear()
    gc.collect()  # models that were wrapped, of trainers that are gone
