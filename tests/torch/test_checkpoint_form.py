"""States of another form than that of the table and of this version, which would fit by their sizes alone."""

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import dualbin.torch as dbt
from dualbin import io
from dualbin.rules import Counter
from xor_steps import everything, train

V, D = 40, 20
ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def make(planes, bits, scale_lr=3e-3):
    module = dbt.BinaryEmbedding(V, D, planes=planes)
    return module, dbt.XOR([module.weight], rule=Counter(bits, norm="rms"), scale_lr=scale_lr)


@pytest.fixture
def two():
    """Two planes of 8 bits, and one plane of 7: the counters of both have 6 planes."""
    (module, optimizer), other = make(2, 8), make(1, 7)
    train(module.weight, optimizer, range(2))
    return module, optimizer, *other


MESSAGE = "is the state of a table of 2 planes, but this table has 1: its counters are the bits below those planes"


def test_a_state_of_other_planes_is_refused(two, tmp_path):
    module, optimizer, other, target = two
    exported = optimizer.export_state({"emb": module.weight})
    with pytest.raises(ValueError, match=rf"states\['emb'\] {MESSAGE}"):
        target.import_state(exported, {"emb": other.weight})
    io.save(tmp_path / "t.safetensors", {"emb": module.weight}, exported)
    _, states = io.load(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=rf"states\['emb'\] {MESSAGE}"):
        target.import_state(states, {"emb": other.weight})
    with pytest.raises(ValueError, match=rf"state\['emb'\] {MESSAGE}"):
        io.save(tmp_path / "u.safetensors", {"emb": other.weight}, exported)
    assert not (tmp_path / "u.safetensors").exists()
    assert not target.state
    with pytest.raises(ValueError, match=r"state 'counter' must be"):
        target.load_state_dict(optimizer.state_dict())
    same, again = make(2, 8)
    for given in (exported, states, {"emb": dict(exported["emb"])}):  # of a plain dict nothing is known
        again.import_state(given, {"emb": same.weight})
        np.testing.assert_array_equal(again.state[same.weight]["counter"], optimizer.state[module.weight]["counter"])


@ALONE
def test_a_checkpoint_of_other_planes_is_refused(two, tmp_path):
    module, optimizer, other, target = two
    dcp.save({"xor": dbt.XORCheckpoint(module, optimizer)}, checkpoint_id=tmp_path / "c", no_dist=True)
    before = everything(other.weight, target)
    with pytest.raises(Exception, match=rf"state_dict\['weight'\] {MESSAGE}"):
        dcp.load({"xor": dbt.XORCheckpoint(other, target)}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert before.keys() == everything(other.weight, target).keys()
    same, again = make(2, 8)
    dcp.load({"xor": dbt.XORCheckpoint(same, again)}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert torch.equal(again.state[same.weight]["counter"], optimizer.state[module.weight]["counter"])


@ALONE
def test_a_checkpoint_with_its_planes_in_the_opposite_order_is_refused(tmp_path):
    """The first version wrote a counter's least significant plane first, and with a frozen scale all sizes are as they are now."""
    module, optimizer = make(1, 8, scale_lr=0.0)
    train(module.weight, optimizer, range(2))
    state = dbt.XORCheckpoint(module, optimizer).state_dict()["weight"]
    old = {name: state[name] for name in ("step", "counter")}
    other, target = make(1, 8, scale_lr=0.0)
    checkpoint = dbt.XORCheckpoint(other, target)
    with pytest.raises(ValueError, match=r"state_dict\['weight'\] is of a version of dualbin .* opposite order.*dualbin.io.save there"):
        checkpoint.load_state_dict({"weight": old})
    dcp.save({"xor": {"weight": old}}, checkpoint_id=tmp_path / "c", no_dist=True)
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*weight.format_version"):
        dcp.load({"xor": checkpoint}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert not target.state
