"""The operations on tables, one room each: the native call, the same in jax.numpy, the rule for `vmap` and what sharded operands mean.

They work under every transformation and on sharded arrays, and check nothing: that is the callers' business.
"""

from dualbin.jax._ops.average import average
from dualbin.jax._ops.bag import lookup_bag
from dualbin.jax._ops.bag_gradient import bag_counts, bag_gradient, bag_weight_gradient
from dualbin.jax._ops.lookup import linked_lookup, linked_rows, lookup, row_values
from dualbin.jax._ops.operation import replicate, sum_over_devices
from dualbin.jax._ops.planes import fewer_scale
from dualbin.jax._ops.sums import reduce_rows, row_sums
from dualbin.jax._ops.unsummed import name_rows, unsummed
from dualbin.jax._ops.update import masks, set_rows, update, xor_rows

__all__ = [
    "average",
    "bag_counts",
    "bag_gradient",
    "bag_weight_gradient",
    "fewer_scale",
    "linked_lookup",
    "linked_rows",
    "lookup",
    "lookup_bag",
    "masks",
    "name_rows",
    "reduce_rows",
    "replicate",
    "row_sums",
    "row_values",
    "set_rows",
    "sum_over_devices",
    "unsummed",
    "update",
    "xor_rows",
]
