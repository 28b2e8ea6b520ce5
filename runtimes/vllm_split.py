"""What a rank of vLLM holds of the experts: the sum over the ranks is the whole block."""

import torch
from torch import Tensor


def narrow(loaded: Tensor, part: str, rank: int, ranks: int) -> Tensor:
    """Return a rank's share of one expert's stored tensor; w2's bias is zero beyond rank 0: the sum has it once.

    Rows of w13 are gate and up in turns, so neighbouring rows are whole neurons, the same as neighbouring columns of
    w2.
    """
    if part == "w2_bias":
        return loaded if rank == 0 else torch.zeros_like(loaded)
    dim = 0 if part.startswith("w13") else 1
    size = loaded.shape[dim] // ranks
    return loaded.narrow(dim, rank * size, size)


def localize(index: Tensor, weight: Tensor, expert_map: Tensor) -> tuple[Tensor, Tensor]:
    """Return choices by this rank's numbering [T, K]; those of other ranks' experts have weight 0."""
    local = expert_map[index.long()]
    elsewhere = local < 0
    # the Triton kernels skip an index below 0, the C++ ones know no such index
    return local if index.is_cuda else local.masked_fill(elsewhere, 0), weight.masked_fill(elsewhere, 0)
