"""`dadpo` on the CPU under engines that accelerate starts on GPUs only.

accelerate decides from the device whether FSDP applies; here that decision is overruled, and nothing else.
"""

import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from dadpo_kernels.cli import main

_init = AcceleratorState.__init__


def fsdp_on_cpu(self, *args, fsdp_plugin=None, **kwargs):
    known = self.initialized
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and not known:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = fsdp_on_cpu

if __name__ == "__main__":
    sys.exit(main())
