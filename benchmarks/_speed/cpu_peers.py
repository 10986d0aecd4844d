"""What else sums bags on a CPU: tables of 8, 4 and 2 bits of PyTorch and of FBGEMM."""

from __future__ import annotations

import torch
from torch import Tensor

from _speed.timing import Call
from _speed.torch_inputs import without_gradients
from _speed.workloads import ID_SETS

#: bits of a weight, and how PyTorch names their operators
LOW_BITS = {8: "byte", 4: "4bit", 2: "2bit"}


def quantized_bag(bits: int, shape: tuple[int, int], ids: list[Tensor], bounds: Tensor) -> Call:
    """torch.ops.quantized.embedding_bag_*: weights with a scale and a bias for each row, float32 sums.

    Args:
        ids, bounds: int64; the operators take them as int32.
    """
    name = LOW_BITS[bits]
    packed = getattr(torch.ops.quantized, f"embedding_bag_{name}_prepack")(torch.randn(shape))
    operator = getattr(torch.ops.quantized, f"embedding_bag_{name}_rowwise_offsets")
    short, offsets = [some.int() for some in ids], bounds.int()
    return without_gradients(lambda index: operator(packed, short[index % ID_SETS], offsets, include_last_offset=True))


def fbgemm_bag(bits: int, shape: tuple[int, int], ids: list[Tensor], bounds: Tensor) -> Call:
    """FBGEMM's tables for inference, with float32 sums."""
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    table = ("", *shape, getattr(SparseType, f"INT{bits}"), EmbeddingLocation.HOST)
    module = IntNBitTableBatchedEmbeddingBagsCodegen([table], device="cpu", pooling_mode=PoolingMode.SUM, output_dtype=SparseType.FP32)
    module.fill_random_weights()
    short, offsets = [some.int() for some in ids], bounds.int()
    return without_gradients(lambda index: module(short[index % ID_SETS], offsets))
