"""XOR on tables of several planes, the norms of Counter, and the numbers that a row has in its state."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import dualbin.torch as dbt
from dualbin import reference, rules
from dualbin.rules import Counter
from xor_steps import assert_same, batch, everything, train

V, D = 40, 20
ADAGRAD, RMS = Counter(8, norm="adagrad"), Counter(8, norm="rms")
PAIRS = [(1, 1), (2, 2), (4, 2), (8, 1), (8, 2), (8, 4), (8, 8)]


def make(planes=1, seed=0):
    w = torch.randn(V, D, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(dbt.BinaryTable.from_float(w, padding_idx=V - 1, planes=planes))


def bytes_of(optimizer, table):
    return {name: value.nbytes for name, value in optimizer.state[table].items() if isinstance(value, torch.Tensor)}


# ---- bits of the reference ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "planes"), PAIRS)
@pytest.mark.parametrize("scale_lr", [3e-3, 0.0])
@pytest.mark.parametrize("options", [{}, {"norm": "rms"}, {"norm": "adagrad", "every": 2}], ids=str)
def test_steps_give_the_bits_of_the_reference(bits, planes, scale_lr, options):
    table, rule = make(planes), Counter(bits, **options)
    packed, scale = table.bits.numpy().copy(), table.scale.numpy().copy()
    before, state = packed.copy(), reference.init_state(rule, V, D, scale_lr=scale_lr, planes=planes)
    optimizer = dbt.XOR([table], lr=0.7, rule=rule, scale_lr=scale_lr, seed=5)
    for step in range(6):
        ids, dy = batch(step)
        dbt.lookup(table, ids).backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        numbers = {"rule": rule, "dim": D, "planes": planes, "lr": 0.7, "scale_lr": scale_lr, "seed": 5}
        stats = reference.update(packed, scale, state, ids.numpy(), dy.numpy(), **numbers)
    np.testing.assert_array_equal(table.bits.numpy(), packed)
    np.testing.assert_array_equal(table.scale.numpy(), scale)
    assert not np.array_equal(packed, before)
    assert optimizer.stats(table) == stats._asdict()
    exported = optimizer.export_state()["0"]
    assert exported.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


@pytest.mark.parametrize(("bits", "planes"), PAIRS)
@pytest.mark.parametrize("scale_lr", [3e-3, 0.0])
def test_memory_is_bits_of_a_weight_and_twenty_bytes_of_a_row(bits, planes, scale_lr):
    for norm in rules.NORMS:
        table = make(planes)
        optimizer = dbt.XOR([table], rule=Counter(bits, norm=norm), scale_lr=scale_lr)
        train(table, optimizer, range(2))
        rule, width = rules.resolve(Counter(bits, norm=norm), planes, D), 3
        state = {"counter": V * (bits - planes) * width} if bits > planes else {}
        if scale_lr:
            state["record"] = V * 16
        else:
            state |= {"count": V * 4} if rule.anneal else {}
            state |= {"squares": V * 4} if norm == "adagrad" else {}
        assert bytes_of(optimizer, table) == state
        row = (table.nbytes + sum(state.values())) / V
        assert table.bits.nbytes + state.get("counter", 0) == V * bits * width
        assert row - bits * width == 4 + (16 if scale_lr else 4 * len(state.keys() & {"count", "squares"})) <= 20


# ---- refused before anything changes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Counter(2), "bits of Counter must be at least the planes of the table, got 2 bits for a table of 3 planes"),
        (Counter(8, center=True), "center must be False for a table of 3 planes"),
        (rules.Bop(), r"rule must be a Counter for a table of 3 planes, got Bop\("),
        (rules.Sign(), r"rule must be a Counter for a table of 3 planes, got Sign\("),
    ],
)
def test_rules_that_cannot_train_a_table(rule, message):
    first, table = make(1), make(3)
    with pytest.raises(ValueError, match=message):
        dbt.XOR([table], rule=rule)
    optimizer = dbt.XOR([first])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [table], "rule": rule})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [table]})
    optimizer.param_groups[1]["rule"] = rule
    kept = first.detach().clone(), table.detach().clone()
    for each in (first, table):
        dbt.lookup(each, torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(first, kept[0])
    assert torch.equal(table, kept[1])
    assert not optimizer.state
    saved = dbt.XOR([make(1)], rule=rule).state_dict()
    with pytest.raises(ValueError, match=message):
        dbt.XOR([table]).load_state_dict(saved)


def test_a_state_of_other_planes_is_refused():
    tables = [make(1), make(2)]
    optimizers = [dbt.XOR([table], rule=ADAGRAD) for table in tables]
    for table, optimizer in zip(tables, optimizers, strict=True):
        train(table, optimizer, range(2))
    with pytest.raises(ValueError, match=r"state 'counter' must be a contiguous tensor, uint8 of shape \[40, 18\], got .* \[40, 21\]"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    with pytest.raises(ValueError, match=r"states\['0'\] is the state of a table of 1 planes, but this table has 2"):
        optimizers[1].import_state(optimizers[0].export_state())


# ---- what a rule leaves open -------------------------------------------------------------------------------------------------------------


def test_the_state_dict_holds_the_rule_as_it_was_resolved():
    tables = [make(k) for k in (1, 2, 2)]
    optimizer = dbt.XOR(
        [{"params": tables[:1]}, {"params": tables[1:2], "rule": Counter(4)}, {"params": [make(1), tables[2]], "rule": Counter(4)}]
    )
    groups = optimizer.state_dict()["param_groups"]
    assert groups[0]["rule"] == rules.to_plain(rules.resolve(Counter(8), 1, D))
    assert groups[0]["rule"]["Counter"]["norm"] == "adagrad"
    assert groups[1]["rule"] == rules.to_plain(rules.resolve(Counter(4), 2, D))
    assert groups[2]["rule"] == rules.to_plain(Counter(4))
    assert groups[2]["resolved"] == [((k, D), rules.to_plain(rules.resolve(Counter(4), k, D))) for k in (1, 2)]
    assert optimizer.param_groups[0]["rule"] == Counter(8)
    other = dbt.XOR([{"params": [make()]}, {"params": [make(2)], "rule": Counter(2)}, {"params": [make(1), make(2)]}])
    other.load_state_dict(optimizer.state_dict())
    assert [group["rule"] for group in other.param_groups] == [rules.resolve(Counter(8), 1, D), rules.resolve(Counter(4), 2, D), Counter(4)]
    damaged = optimizer.state_dict()
    damaged["param_groups"][2]["resolved"][1][1]["Counter"]["eta"] = 5.0
    with pytest.raises(ValueError, match="for tables of 2 planes and 20 columns, but this version's defaults make"):
        other.load_state_dict(damaged)


# ---- the numbers of a row ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [ADAGRAD, RMS, Counter(4)], ids=str)
def test_a_scale_that_is_frozen_and_trained_again(rule):
    """Frozen, the numbers that the rule reads go on in arrays of their own; trained again, moments begin at zero."""
    table = make()
    optimizer = dbt.XOR([table], rule=rule)
    train(table, optimizer, range(3))
    trained, resolved = optimizer.export_state()["0"], rules.resolve(rule, 1, D)
    optimizer.param_groups[0]["scale_lr"] = 0.0
    loaded = dbt.XOR([copy.deepcopy(table)], rule=rule)
    loaded.load_state_dict(optimizer.state_dict())  # saved before a step, with the record
    frozen = optimizer.export_state()["0"]
    names = ["count"] * resolved.counts_rows + ["squares"] * resolved.sums_squares
    assert list(frozen) == ["step", "counter", *names]
    for name in frozen:
        np.testing.assert_array_equal(frozen[name], trained[name])
    scale = table.scale.clone()
    state = {name: np.copy(value) for name, value in frozen.items()} | {"step": 3}
    bits = table.bits.numpy().copy()
    ids, dy = batch(3)
    reference.update(bits, scale.numpy().copy(), state, ids.numpy(), dy.numpy(), rule=rule, dim=D, scale_lr=0.0)
    train(table, optimizer, [3])
    np.testing.assert_array_equal(table.bits.numpy(), bits)
    assert torch.equal(table.scale, scale)
    assert set(optimizer.state[table]) == {"step", "counter", *names}
    other = loaded.param_groups[0]["params"][0]
    train(other, loaded, [3])
    assert_same(everything(table, optimizer), everything(other, loaded))
    optimizer.param_groups[0]["scale_lr"] = 3e-3
    again = optimizer.export_state()["0"]
    for name, value in again.items():
        before = optimizer.state[table].get(name)
        expected = np.zeros_like(value) if before is None else np.asarray(before)
        np.testing.assert_array_equal(value, expected, err_msg=name)
    train(table, optimizer, [4])
    assert set(optimizer.state[table]) == {"step", "counter", "record"}
    assert optimizer.export_state()["0"]["scale_v"].any()


def test_import_takes_moments_that_a_frozen_scale_does_not_need():
    a, b = make(), make()
    first, second = dbt.XOR([a], rule=ADAGRAD), dbt.XOR([b], rule=ADAGRAD, scale_lr=0.0)
    train(a, first, range(2))
    second.import_state(first.export_state())
    assert set(second.state[b]) == {"step", "counter", "squares"}
    third = dbt.XOR([make()], rule=ADAGRAD)
    with pytest.raises(ValueError, match=r"state must hold .*'scale_m', 'scale_v'.* got"):
        third.import_state(second.export_state())


def test_before_the_first_step_any_norm_will_do():
    table = make()
    exported = dbt.XOR([table], rule=RMS, scale_lr=0.0).export_state()
    optimizer = dbt.XOR([table], rule=ADAGRAD, scale_lr=0.0)
    optimizer.import_state(exported)
    train(table, optimizer, range(2))
    assert optimizer.state[table]["squares"].any()


# ---- the ways of a training loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", [2, 8])
@pytest.mark.parametrize("rule", [Counter(8), Counter(8, every=3)], ids=str)
def test_saved_and_loaded_states_go_on_with_the_same_bits(planes, rule):
    a, b, c = (make(planes) for _ in range(3))
    first, second, third = dbt.XOR([a], rule=rule, seed=3), dbt.XOR([b]), dbt.XOR([c], rule=rule, seed=3)
    train(a, first, range(4))
    for other in (b, c):
        with torch.no_grad():
            other.copy_(a)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    third.import_state(first.export_state())
    for table, optimizer in ((a, first), (b, second), (c, third)):
        train(table, optimizer, range(4, 8))
    assert_same(everything(a, first), everything(b, second))
    assert_same(everything(a, first), everything(c, third))


def test_capturable():
    outcomes = []
    for capturable in (False, True):
        table = make(2)
        optimizer = dbt.XOR([table], seed=1, capturable=capturable)
        train(table, optimizer, range(4))
        outcomes.append((table.bits, table.scale, optimizer.export_state()["0"]))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    for name, value in outcomes[0][2].items():
        np.testing.assert_array_equal(outcomes[1][2][name], value)


def test_frozen_rows_keep_their_planes_and_their_numbers():
    table = make(4)
    optimizer = dbt.XOR([table], rule=ADAGRAD)
    train(table, optimizer, range(2))
    kept = everything(table, optimizer)
    dbt.freeze_rows(table, [1, 5, 7])
    train(table, optimizer, range(2, 6))
    now, rows = everything(table, optimizer), torch.tensor([1, 5, 7])
    for name in ("bits", "scale", "counter", "record"):
        assert torch.equal(now[name][rows], kept[name][rows])
        assert not torch.equal(now[name], kept[name])


@pytest.mark.parametrize("planes", [1, 4])
def test_training_lowers_the_loss(planes):
    torch.manual_seed(0)
    target = torch.randn(200, 16)
    module = dbt.BinaryEmbedding(200, 16, planes=planes, scale=0.8)
    optimizer = dbt.XOR([module.weight], rule=Counter(8))
    losses = []
    for _ in range(60):
        loss = (module(torch.arange(200)) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    best = float((dbt.BinaryTable.from_float(target, planes=planes).dequantize() - target).pow(2).mean())
    assert losses[-1] < best + 0.15, (losses[0], losses[-1], best)
    assert losses[-1] < 0.6 * losses[0]


def test_an_xor_checkpoint_names_the_numbers_of_a_row():
    module = nn.Sequential(dbt.BinaryEmbedding(V, D, planes=2))
    optimizer = dbt.XOR([module[0].weight])
    train(module[0].weight, optimizer, range(2))
    state = dbt.XORCheckpoint(module, optimizer).state_dict()["0.weight"]
    exported = optimizer.export_state()["0"]
    assert exported.keys() == {"step", "counter", "count", "squares", "scale_m", "scale_v"}
    assert state.keys() == exported.keys() | {"format_version", "planes"}
    for name, value in exported.items():
        np.testing.assert_array_equal(np.asarray(state[name]), value)
    record = optimizer.state[module[0].weight]["record"]
    assert state["squares"].untyped_storage().data_ptr() == record.untyped_storage().data_ptr()
    other = nn.Sequential(dbt.BinaryEmbedding(V, D, planes=2))
    fresh = dbt.XOR([other[0].weight])
    checkpoint = dbt.XORCheckpoint(other, fresh)
    checkpoint.load_state_dict({"0.weight": copy.deepcopy(state)})
    assert torch.equal(fresh.state[other[0].weight]["record"], record)
    with pytest.raises(ValueError, match=r"state_dict\['0.weight'\]: state 'squares' must be .*float32 of shape \[40\]"):
        checkpoint.load_state_dict({"0.weight": {**state, "squares": torch.zeros(V, 2)}})
    with pytest.raises(ValueError, match="state must hold"):
        checkpoint.load_state_dict({"0.weight": {name: value for name, value in state.items() if name != "scale_m"}})
    with pytest.raises(ValueError, match="is the state of a table of 3 planes, but this table has 2: its counters are the bits below"):
        checkpoint.load_state_dict({"0.weight": {**state, "planes": 3}})
