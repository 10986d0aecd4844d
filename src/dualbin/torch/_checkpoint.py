"""Optimizer state for torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dualbin._state_checks import ExportedState, check_state_planes
from dualbin.torch import _state
from dualbin.torch._optim import XOR
from dualbin.torch._sharded import ShardedTable, as_dtensor
from dualbin.torch._table import BinaryTable

#: Beside the arrays of a state, so that none of another form is taken for one: a checkpoint without them misses keys that are to be loaded.
_VERSION, _PLANES = "format_version", "planes"
_FORMAT_VERSION = 2  #: of counters, their most significant plane first


class XORCheckpoint:
    """What `torch.distributed.checkpoint` saves and loads of an :class:`XOR` optimizer, with any number of ranks on either side.

    `dcp.save({"model": model, "xor": XORCheckpoint(model, optimizer)}, checkpoint_id=path)`, and the same with `dcp.load`. The state of a
    table is stored under its parameter's name; that of a shard, and with `shard_state`, as DTensors over the ranks that share it. The
    options (rule, lr, scale_lr, seed) are the optimizer's own: make it with the same ones.

    Args:
        module: has the tables of the optimizer among its parameters.
        optimizer: the optimizer.

    Raises:
        ValueError: a table of the optimizer is no parameter of the module.
    """

    def __init__(self, module: nn.Module, optimizer: XOR) -> None:
        if not isinstance(module, nn.Module):
            msg = f"module must be an nn.Module, got a {type(module).__name__}"
            raise TypeError(msg)
        if not isinstance(optimizer, XOR):
            msg = f"optimizer must be an XOR, got a {type(optimizer).__name__}"
            raise TypeError(msg)
        parameters = {id(p): name for name, p in module.named_parameters()}
        self._optimizer = optimizer
        self._tables: dict[str, BinaryTable] = {}
        for where, _, table in optimizer._tables():
            if id(table) not in parameters:
                msg = f"optimizer must train tables of the module only, but {where} is none of its parameters"
                raise ValueError(msg)
            self._tables[parameters[id(table)]] = table
        #: of tables whose state is divided: how many rows there are, and over which ranks
        self._shards = {
            id(part.weight): (part.num_embeddings, part.process_group) for part in module.modules() if isinstance(part, ShardedTable)
        }
        if (replicas := optimizer._replicas) is not None:
            self._shards |= {id(table): (table.shape[0], replicas.group) for table in self._tables.values()}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """name -> the table's state, complete also before the first step; tensors share their memory with it.

        Raises:
            ValueError: a window of `every=K` is open. Its rows have another number at every step, so save when it is closed.
        """
        return {name: self._state_of(name, table) for name, table in self._tables.items()}

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from a state that was loaded into what :meth:`state_dict` returned.

        Raises:
            TypeError, ValueError: a state is missing or does not fit its table and rule. Nothing has changed then.
        """
        checked: dict[Tensor, _state.State] = {}
        groups = {id(table): group for _, group, table in self._optimizer._tables()}
        for name, table in self._tables.items():
            if name not in state_dict:
                msg = f"state_dict must hold {name!r}, got {sorted(state_dict)}"
                raise ValueError(msg)
            group, table_here = groups[id(table)], self._optimizer._part(table)
            state = {key: _local(value) for key, value in state_dict[name].items()}
            self._check_form(f"state_dict[{name!r}]", state.pop(_VERSION, 1), state.pop(_PLANES, 1), table)
            if group["rule"].every > 1:
                state |= _state.no_pending(table)
            where = f"state_dict[{name!r}]"
            state = _state.joined(where, state, table_here)
            checked[table] = _state.checked(where, state, group["rule"], table_here, group["scale_lr"] > 0)
        self._optimizer._take(checked)

    def _state_of(self, name: str, table: BinaryTable) -> dict[str, Any]:
        group = next(group for _, group, mine in self._optimizer._tables() if mine is table)
        here = self._optimizer._part(table)
        state = _state.completed(name, self._optimizer.state.get(table, {}), group["rule"], here, group["scale_lr"] > 0)
        if state.get("pending_steps"):
            msg = f"{name} has an open window of every={group['rule'].every}: save after a multiple of {group['rule'].every} steps"
            raise ValueError(msg)
        arrays: dict[str, Any] = {_VERSION: _FORMAT_VERSION, _PLANES: table.planes}
        arrays |= {key: value for key, value in _state.named(state).items() if not key.startswith("pending_")}
        shard = self._shards.get(id(table))
        if shard is None:
            return arrays
        return {key: as_dtensor(value, *shard) if isinstance(value, Tensor) else value for key, value in arrays.items()}

    @staticmethod
    def _check_form(where: str, version: int, planes: int, table: BinaryTable) -> None:
        if version != _FORMAT_VERSION:
            msg = f"{where} is of a version of dualbin that kept the planes of counters in the opposite order: write tables and state with "
            msg += "dualbin.io.save there, and go on with import_state"
            raise ValueError(msg)
        check_state_planes(where, ExportedState({}, planes), table.planes)


def _local(value: Any) -> Any:
    """The part of a DTensor that is here, contiguous as the optimizer keeps it."""
    value = value.to_local() if hasattr(value, "to_local") else value
    return value.contiguous() if isinstance(value, Tensor) else value
