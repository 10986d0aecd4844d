"""What a table says to an operation that it does not have: why, and which call does what was meant."""

from __future__ import annotations

_LOOKUP = "Look rows up with dualbin.torch.lookup, BinaryEmbedding or BinaryEmbeddingBag"
_DENSE = "call .dequantize() for a float copy"

_ALTERNATIVES = {
    "initialise": (
        "a new table is random already, so leave this line out. The size of its rows is scale=, a row of zeros padding_idx= "
        "(arguments of BinaryEmbedding), reset_parameters() draws new bits, and BinaryEmbedding.from_float packs weights of your own"
    ),
    "multiply": (
        f"a matrix product with a packed table is not there yet. Untie an output layer from its table (with transformers: "
        f"dualbin.torch.hf.pack_input_embeddings), or {_DENSE}"
    ),
    "pick": (
        f"its rows cannot be picked out or written one by one. {_LOOKUP}; a row of zeros is padding_idx=, "
        f"rows that must not change are dualbin.torch.freeze_rows; {_DENSE}"
    ),
    "combine": (
        "a packed weight is +1 or -1. Train the table with dualbin.torch.XOR (give other optimizers the other parameters only), average "
        f"two tables (EMA, SWA) with dualbin.torch.average, change the size of rows with .scale.mul_(factor), and {_DENSE}"
    ),
}

_KINDS = {
    "initialise": ("bernoulli_ cauchy_ erfinv_ exponential_ eye fill_ geometric_ log_normal_ normal_ random_ uniform_ zero_"),
    "multiply": "addmm bmm linear matmul mm mv numpy_T permute t transpose",
    "pick": "gather index index_add_ index_copy_ index_fill_ index_put index_put_ index_select masked_fill_ masked_select scatter_ select "
    "select_scatter slice_scatter take unbind",
    "combine": (
        "_foreach_add_ _foreach_addcdiv_ _foreach_lerp_ _foreach_mul_ _foreach_sub_ add add_ addcdiv_ addcmul_ clamp_ div div_ lerp lerp_ "
        "mul mul_ neg sub sub_ where"
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
