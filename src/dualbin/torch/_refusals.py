"""What a table says to an operation that it does not have: why, and which call does what was meant."""

from __future__ import annotations

import torch

_LOOKUP = "Look rows up with dualbin.torch.lookup, BinaryEmbedding or BinaryEmbeddingBag"
_DENSE = "call .dequantize() for a float copy"

_RANKS = (
    "for data-parallel training call tables = dualbin.torch.prepare_ddp(module) before DistributedDataParallel wraps it (or before "
    "fully_shard, which gets ignored_params=set(tables)) and dualbin.torch.sync_row_grads(tables) after backward()"
)

_ALTERNATIVES = {
    "distribute": f"a table can be neither flattened nor sent as floats: {_RANKS}; {_DENSE}",
    "look up": (
        "call dualbin.torch.lookup(table, ids), which takes jagged ids, too; BinaryEmbeddingBag combines rows; torch.func.grad, vjp, "
        "jacrev and vmap cannot take a table as what they transform: take its gradient with backward() or torch.autograd.grad"
    ),
    "transform": (
        "a table has no forward-mode derivatives, and vmap cannot stack tables. Take gradients with backward() or torch.autograd.grad "
        "(with create_graph=True for second derivatives), and look one table up for each model of an ensemble"
    ),
    "initialise": (
        "a new table is random already, so leave this line out. The size of its rows is scale=, a row of zeros padding_idx= "
        "(arguments of BinaryEmbedding), reset_parameters() draws new bits, and BinaryEmbedding.from_float packs weights of your own"
    ),
    "multiply": (
        f"a matrix product with a packed table is not there yet. Untie an output layer from its table (with transformers: "
        f"dualbin.torch.hf.pack_input_embeddings), or {_DENSE}"
    ),
    "pick": (
        "its rows cannot be picked out or written one by one. table[ids] is dualbin.torch.lookup(table, ids), which BinaryEmbedding calls; "
        f"a row of zeros is padding_idx=, rows that must not change are dualbin.torch.freeze_rows; {_DENSE}"
    ),
    "combine": (
        "a packed weight is +1 or -1. Train the table with dualbin.torch.XOR (give other optimizers the other parameters only), average "
        f"two tables (EMA, SWA) with dualbin.torch.average or torch.lerp, change the size of rows with .scale.mul_(factor), and {_DENSE}"
    ),
}

_KINDS = {
    "distribute": "allgather_ allreduce_ allreduce_coalesced_ broadcast_ flatten reduce_ reshape view _unsafe_view all_reduce broadcast",
    "look up": "embedding embedding_bag _embedding_bag _embedding_bag_forward_only",
    "transform": "is_same_size stack",
    "initialise": ("bernoulli_ cauchy_ erfinv_ exponential_ eye fill_ geometric_ log_normal_ normal_ random_ uniform_ zero_"),
    "multiply": "addmm bmm linear matmul mm mv numpy_T permute t transpose",
    "pick": "gather index index_add_ index_copy_ index_fill_ index_put index_put_ index_select masked_fill_ masked_select scatter_ select "
    "select_scatter slice_scatter take unbind",
    "combine": (
        "_foreach_add_ _foreach_addcdiv_ _foreach_mul_ _foreach_sub_ add add_ addcdiv_ addcmul_ clamp_ div div_ mul mul_ neg sub sub_ where"
    ),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def refusal(func: object, case: str = "") -> NotImplementedError:
    """The error of an operation that needs the dense values of a table; `case` says when it does."""
    name = str(func).split(".")[1] if str(func).count(".") > 1 else str(func)
    what = f"{func} on a BinaryTable{' ' + case if case else ''}"
    if kind := _KIND_OF.get(name):
        return NotImplementedError(f"{what}: {_ALTERNATIVES[kind]}")
    return NotImplementedError(
        f"{what} would need its dense [V, D] values, which do not exist. {_LOOKUP}, train the table with dualbin.torch.XOR "
        f"(give other optimizers the other parameters only), and {_DENSE}"
    )


def gradient_refusal(func: object, case: str = "") -> NotImplementedError:
    """The same of a row gradient."""
    what = f"{func} on a RowGrad{' ' + case if case else ''} would need the dense [V, D] gradient of a BinaryTable"
    if "c10d" in str(func) or str(func) == "aten.view.default":
        return NotImplementedError(f"{what}. Row gradients are averaged over ranks by a call of their own: {_RANKS}")
    return NotImplementedError(
        f"{what}. Train the table with dualbin.torch.XOR; to look at the gradient use .ids and .rows, or .coalesce() for one summed row "
        "per id; to change it, scale it, change .rows, or assign a RowGrad(ids, rows, shape) to table.grad"
    )


def check_not_transformed(table: object) -> None:
    """Raise where torch.func has wrapped a table, which is then a plain tensor that nobody can look rows up in."""
    if torch.compiler.is_compiling():  # which does not know the question, and refuses such transforms itself
        return
    if isinstance(table, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(table):
        msg = "torch.func.grad, vjp, jacrev and vmap cannot take a table as what they transform: leave it out of their arguments (of the "
        msg += "dict that functional_call gets, say), and take its gradient with backward() or torch.autograd.grad"
        raise NotImplementedError(msg)
