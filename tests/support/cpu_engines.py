"""The program that tests start with `accelerate launch`: `dadpo` on CPUs, under engines that accelerate starts on
GPUs.

It overrules two decisions that depend on the device. accelerate applies FSDP on accelerators only, and DeepSpeed
compiles a shared-memory collective for CPUs, which takes a minute.
"""

import os
import sys
from importlib import import_module

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, is_deepspeed_available

from dadpo_kernels.cli.main import main

_init = AcceleratorState.__init__


def fsdp_on_cpu(self, *args, fsdp_plugin=None, **kwargs):
    known = bool(self._shared_state)  # not `initialized`, which is true once there is a PartialState
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and not known:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type != DistributedType.FSDP:
        raise RuntimeError(f"FSDP is not on, but {self.distributed_type}")


AcceleratorState.__init__ = fsdp_on_cpu
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and is_deepspeed_available():
    # Not as an attribute: `deepspeed.comm.torch` is PyTorch there.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None

if __name__ == "__main__":
    sys.exit(main())
