"""`train_joint.py` with FSDP over CPU processes, which accelerate's own switches only offer for accelerators."""

from __future__ import annotations

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from ldlm_hf.training import launch
from ldlm_hf.training.devices import build_accelerator
from ldlm_hf.training.recipes.joint import JointRecipe
from ldlm_hf.training.settings import LoopSettings


def build_sharded_accelerator(settings: LoopSettings) -> Accelerator:
    accelerator = build_accelerator(settings)
    # as in training/accelerate/fsdp.yaml
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


launch.build_accelerator = build_sharded_accelerator
launch.run(JointRecipe, __doc__)
