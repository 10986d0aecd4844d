"""Write the Python examples of README.md as files, each with what a type checker has to know of them: typed_examples.py FOLDER.

`make lint` gives them to mypy, tests/test_types.py to basedpyright.
"""

import re
import sys
from pathlib import Path

#: framework of a block -> what is asserted of the names in it
KNOWN = {
    "torch": """
from typing import assert_type

assert_type(emb, dbt.BinaryEmbedding)
assert_type(emb.weight, dbt.BinaryTable)
assert_type(emb.weight.bits, torch.Tensor)
assert_type(emb.weight.dim, int)
assert_type(emb.weight.dequantize(), torch.Tensor)
assert_type(dbt.BinaryEmbeddingBag(4, 8).weight, dbt.BinaryTable)
share: float = xor.stats(emb.weight)["flips"] / emb.weight.dim
""",
    "jax": """
from typing import assert_type

table = dbj.BinaryTable.create(jax.random.key(0), 10_000, 128)
assert_type(table, dbj.BinaryTable)
assert_type(table[ids_of_a_batch], jax.Array)
assert_type(table.shape, tuple[int, ...])
""",
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        framework = next(name for name in KNOWN if f"import {name}, " in block)
        known = KNOWN[framework].replace("ids_of_a_batch", "jnp.arange(3)")
        (folder / f"typed_{framework}.py").write_text(block + known, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
