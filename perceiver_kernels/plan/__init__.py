"""How a problem is computed: tiles, splits and workspace as frozen results of pure functions of sizes and device facts."""

from perceiver_kernels.plan.attention import AttentionPlan, KeySplits, Resident, Slices, StoredScores, plan_attention
from perceiver_kernels.plan.cross_attention import CrossAttentionPlan, plan_cross_attention
from perceiver_kernels.plan.output_attention import OutputCrossAttentionPlan, plan_output_cross_attention
from perceiver_kernels.plan.pack import PackPlan, plan_pack
from perceiver_kernels.plan.rotary import RotaryPlan, plan_rotary
from perceiver_kernels.plan.shared_kv import SharedKVPlan, WidePlan, plan_shared_kv
from perceiver_kernels.plan.splits import WEIGHTS_BYTES

__all__ = [
    "WEIGHTS_BYTES", "AttentionPlan", "CrossAttentionPlan", "KeySplits", "OutputCrossAttentionPlan", "PackPlan", "Resident",
    "RotaryPlan", "SharedKVPlan", "Slices", "StoredScores", "WidePlan", "plan_attention", "plan_cross_attention",
    "plan_output_cross_attention", "plan_pack", "plan_rotary", "plan_shared_kv",
]  # fmt: skip
