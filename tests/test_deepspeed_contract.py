"""What `scalemlo.engines.deepspeed.partition` uses of DeepSpeed exists; a new version that renames it fails here."""

import inspect

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'scalemlo[deepspeed]'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

COMMON = ["clear_backward_seen_flag", "set_gradient_accumulation_boundary", "backward_epilogue", "zero_grad"]
COMMON += ["overlapping_partition_gradients_reduce_epilogue", "ipg_buckets"]
BY_STAGE = {
    3: ["fp16_groups", "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "micro_step_id"]
    + ["grad_partitions_flat_buffer", "_partition_all_parameters", "_unflatten_partitioned_parameters"]
    + ["invalidate_secondary_tensor"],
    2: ["bit16_groups", "single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups", "bit16_groups_flat"]
    + ["real_dp_process_group", "nccl_start_alignment_factor", "allgather_bucket_size", "all_grad_tensors"]
    + ["reduce_gradients", "setup_buckets", "averaged_gradients", "finalize_gradient_accumulation_boundary"],
}
BY_STAGE[1] = BY_STAGE[2]
OFFLOADED = {
    3: ["grad_partitions_flat_buffer"],
    2: ["accumulated_grads_in_cpu", "_offload_accumulated_param_ids", "micro_step_id"],
}
OFFLOADED[1] = OFFLOADED[2]


def partitioned(stage: int, **options):
    from scalemlo.engines import DeepSpeed

    module = nn.Linear(5, 3)
    spec = DeepSpeed(stage=stage, **options)
    return spec.wrap(module, name="linear", device=torch.device("cpu"), may_skip_parameters=False)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_names_exist(stage):
    def body(rank, world_size):
        linear = torch.nn.functional.linear
        engine = partitioned(stage)
        partition = engine._partition
        optimizer, wrapped = partition._optimizer, partition._engine
        missing = [n for n in COMMON + BY_STAGE[stage] if not hasattr(optimizer, n)]
        assert not missing, missing
        assert wrapped._running_engine_backward is False
        assert callable(wrapped.zero_optimization_partition_gradients)
        assert all(master.dtype == torch.float32 for master in partition.masters)
        assert torch.nn.functional.linear is linear, "DeepSpeed replaced torch's linear in the whole process"
        for p in engine.module.parameters():
            names = ["ds_tensor", "ds_shape", "ds_numel", "partition_numel"] if stage == 3 else []
            assert not [n for n in names if not hasattr(p, n)]
        for bucket in optimizer.ipg_buckets.values():
            assert {"params", "elements"} <= set(vars(bucket))

        offloaded = partitioned(stage, offload_optimizer=True)._partition
        missing = [n for n in OFFLOADED[stage] if not hasattr(offloaded._optimizer, n)]
        assert not missing, missing
        assert offloaded.is_offloaded and not partition.is_offloaded
        assert stage == 3 or all(master.grad.dtype == torch.float32 for master in offloaded.masters)
        low = partitioned(stage, dtype="bf16")  # a class of its own at stage 1, if DeepSpeed may choose
        assert type(low._partition._optimizer) is type(optimizer)

    run_ranks(body, 1)


def test_deepspeeds_own_adam_calls_one_kernel():
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    assert "self.ds_opt_adam.adam_update(" in inspect.getsource(DeepSpeedCPUAdam.step)


def test_functions_take_what_they_are_given():
    from deepspeed.runtime.utils import all_gather_dp_groups

    given = {"groups_flat", "partitioned_param_groups", "dp_process_group", "start_alignment_factor"}
    assert given | {"allgather_bucket_size"} <= set(inspect.signature(all_gather_dp_groups).parameters)
