"""The int4 experts of gpt-oss inside vLLM: parameters as they are stored, one operator for the block.

`vLLM`'s runner routes, calls `apply`, and adds up the ranks (`moe_kernel` stays None). With tensor parallelism a rank
holds neighbouring neurons: rows of w13, the same columns of w2, and w2's bias on rank 0 only. With expert parallelism
it holds whole experts; choices of other ranks' experts add nothing here.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform

from gptoss_quantize.errors import InputError
from gptoss_quantize.kernels import experts_op, native
from gptoss_quantize.layouts import INT4
from gptoss_quantize.packed_experts import stored_parts
from gptoss_quantize.runtimes import vllm_rules as rules
from gptoss_quantize.runtimes.vllm_split import localize, narrow

# what `GptOssForCausalLM.load_weights` names them, in the operator's order
PARTS = stored_parts(INT4)
# biases are stored in 16 bits or in float32, and few: float32 holds each of them
DTYPES = dict(zip(PARTS, (torch.int32, torch.bfloat16, torch.float32) * 2, strict=True))

logger = init_logger(f"vllm.{__name__}")


def method_for(layer: Any, prefix: str, described: dict[str, Any], group_size: int) -> Any:
    """Return what runs a layer's experts: vLLM's own method on humming, else ours."""
    moe = layer.moe_config
    backend = moe.moe_backend
    if current_platform.is_cpu():
        if backend != "auto":
            raise InputError(f"--moe-backend {backend} on a CPU: leave it out, our C++ kernels run the experts there")
        logger.info_once("gptoss-quantize: int4 experts by %s", experts_op.kernel_report("cpu", moe.in_dtype))
        if not native.available():
            logger.warning_once("gptoss-quantize: install a C++ compiler for fast experts: %s", native.problem())
        return Int4Experts(moe, group_size)
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    humming = current_platform.is_cuda() and importlib.util.find_spec("humming") is not None
    who = rules.card_backend(backend, humming, None if capability is None else capability.to_int())
    if who == "vLLM":
        from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
            CompressedTensorsConfig,
        )

        # its own choice on most cards drops the biases without a word
        moe.moe_backend = "humming" if backend == "auto" else backend
        logger.info_once("gptoss-quantize: int4 experts by vLLM's %s", moe.moe_backend)
        return CompressedTensorsConfig.from_config(described).get_quant_method(layer, prefix)
    why = experts_op.kernel_report("cuda", moe.in_dtype)
    if not why.startswith("Triton"):
        raise InputError(
            f"the int4 experts have no kernel on this card: {why}; pip install triton or humming-kernels"
        )
    logger.info_once("gptoss-quantize: int4 experts by our %s", why)
    return Int4Experts(moe, group_size)


class Int4Experts(FusedMoEMethodBase):
    """Packed experts as kernels.experts.PackedExperts has them, this rank's share."""

    def __init__(self, moe: Any, group_size: int):
        super().__init__(moe)
        self.group_size = group_size

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *rest: Any
    ) -> tuple[int, int]:
        """Return the sizes as they are: the kernels take every multiple of the group size."""
        return hidden_size, intermediate_size_per_partition

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **others: Any,
    ) -> None:
        """Add the six parameters, empty; `load` fills them."""
        parallel = self.moe.moe_parallel_config
        D, F, g = hidden_size, intermediate_size_per_partition, self.group_size
        rules.check_split(F * parallel.tp_size, parallel.tp_size, g)
        shapes = ((2 * F, D // 8), (2 * F, D // g), (2 * F,), (D, F // 8), (D, F // g), (D,))
        for part, shape in zip(PARTS, shapes, strict=True):
            empty = torch.empty(num_experts, *shape, dtype=DTYPES[part])
            parameter = torch.nn.Parameter(empty, requires_grad=False)
            parameter.weight_loader = self.load  # type: ignore[attr-defined]
            layer.register_parameter(part, parameter)
        self.ranks = (parallel.tp_rank, parallel.tp_size)
        self.local = layer._map_global_expert_id_to_local_expert_id
        self.placed: set[tuple[int, str]] = set()

    def load(
        self,
        parameter: Tensor,
        loaded: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        """Copy this rank's share of one expert's tensor; return whether the expert is here."""
        expert = self.local(expert_id)
        if expert == -1:
            return False
        part = weight_name.rsplit(".", 1)[-1]
        share = narrow(loaded, part, *self.ranks)
        there = parameter.data[expert]
        where = f"{weight_name} of expert {expert_id}"
        if share.shape != there.shape:
            raise InputError(
                f"{where}: shape {tuple(share.shape)}, expected {tuple(there.shape)}; the file is damaged"
            )
        there.copy_(share)
        if there.is_floating_point() and not torch.equal(there.to(share.dtype), share.to(there.device)):
            raise InputError(
                f"{where} is {loaded.dtype} or not finite, and {there.dtype} cannot hold it; quantize the source"
            )
        self.placed.add((expert, part))
        return True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse a layer with an expert's tensor missing: vLLM's loader would serve whatever memory held."""
        wanted = {(e, part) for e in range(len(layer.w13_bias)) for part in PARTS}
        if missing := sorted(wanted - self.placed):
            expert, part = missing[0]
            raise InputError(
                f"{layer.layer_name}: {len(missing)} expert tensors were not in the checkpoint, first {part} of "
                f"local expert {expert}; download or copy it again"
            )

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return nothing: vLLM's modular kernels are not used."""
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Return this rank's part of the block output [T, D]."""
        if layer.expert_map is not None:
            topk_ids, topk_weights = localize(topk_ids, topk_weights, layer.expert_map)
        parts = (getattr(layer, part) for part in PARTS)
        return experts_op.experts(x, topk_ids, topk_weights, *parts, rules.LIMIT, rules.ALPHA)
