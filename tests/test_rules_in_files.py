"""Files tell which rule made a state, as it was resolved, and imports hold it against the rule that is to go on."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_io import assert_same, make_state, make_table

from dualbin import io
from dualbin._state_checks import ExportedState
from dualbin.rules import Bop, Counter, Sign, resolve, to_plain

V, D = 5, 9
RULES = [
    Counter(8),
    Counter(1),
    Counter(2, eta=0.1, dead_zone=0.3, every=3),
    Counter(4, norm="adagrad"),
    Counter(3, center=True),
    Bop(gamma=1e-3, every=2),
    Sign(),
]


def metadata(path):
    with safe_open(path, "numpy") as file:
        return file.metadata()


def exported(rule, planes=1, train_scale=True):
    return ExportedState(make_state(V, D, resolve(rule, planes, D), train_scale=train_scale, planes=planes), planes, rule)


@pytest.mark.parametrize("train_scale", [True, False])
@pytest.mark.parametrize(("rule", "planes"), [*((rule, 1) for rule in RULES), (Counter(8), 2), (Counter(2), 2)], ids=str)
def test_round_trip(tmp_path, rule, planes, train_scale):
    state = exported(rule, planes, train_scale)
    io.save(tmp_path / "t", {"a.b": make_table(V, D, planes=planes)}, {"a.b": state})
    resolved = resolve(rule, planes, D)
    assert json.loads(metadata(tmp_path / "t")["a.b.rule"]) == to_plain(resolved)
    (loaded,) = io.load(tmp_path / "t")[1].values()
    assert (loaded.rule, loaded.planes) == (resolved, planes)
    assert_same(state, loaded)
    io.save(tmp_path / "u", {"a.b": make_table(V, D, planes=planes)}, {"a.b": loaded})
    assert metadata(tmp_path / "u") == metadata(tmp_path / "t")


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 2**22), st.floats(0, 256), st.floats(0, 2**22), st.integers(1, 10**30))
def test_numbers_come_back_to_the_last_bit(tmp_path_factory, eta, dead_zone, anneal, every):
    path, rule = tmp_path_factory.mktemp("rules") / "t", Counter(8, eta, dead_zone, every, anneal, center=False, norm="adagrad")
    io.save(path, {"emb": make_table(V, D)}, {"emb": ExportedState(make_state(V, D, rule), 1, rule)})
    assert io.load(path)[1]["emb"].rule == rule


def test_a_file_without_a_rule_loads_as_ever(tmp_path):
    io.save(tmp_path / "t", {"emb": make_table(V, D)}, {"emb": dict(exported(Counter(8)))})
    assert "emb.rule" not in metadata(tmp_path / "t")
    assert io.load(tmp_path / "t")[1]["emb"].rule is None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (ExportedState(exported(Counter(7, norm="rms")), 1, Counter(8)), r"state\['emb'\] is no state of its rule, Counter\(bits=8"),
        (ExportedState(exported(Counter(8)), 1, Bop()), r"state\['emb'\] is no state of its rule, Bop\(.*'ema'"),
        (ExportedState(exported(Counter(8)), 1, Counter(8, every=10**1000)), r"state\['emb'\].rule must be the JSON text of a rule"),
    ],
)
def test_a_rule_that_did_not_make_the_state_is_not_written(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        io.save(tmp_path / "t", {"emb": make_table(V, D)}, {"emb": state})
    assert not (tmp_path / "t").exists()


# ---- hostile files -----------------------------------------------------------------------------------------------------------------------

GOOD = to_plain(resolve(Counter(8), 1, D))["Counter"]


def counter(**changes):
    return json.dumps({"Counter": GOOD | changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be the JSON text of a rule, got ''"),
        ("{", "must be the JSON text of a rule, got '{'"),
        ("[" * 999, "must be the JSON text of a rule|must be an object of one rule"),
        (" " * 1001, "of at most 1000 characters, got 1001 characters"),
        ("[" * 10**6, "of at most 1000 characters, got 1000000 characters"),
        ("null", "must be an object of one rule, Counter or Bop or Sign"),
        ("[]", "must be an object of one rule"),
        ("{}", "must be an object of one rule"),
        ('{"Adam": {"every": 1}}', "must be an object of one rule"),
        ('{"Sign": null}', "must be an object of one rule"),
        ('{"Sign": {"every": 1}, "Bop": {"every": 1}}', "must be an object of one rule"),
        ('{"Sign": {"every": 1}, "Sign": {"every": 2}}', "a name occurs twice"),
        ('{"Sign": {"every": 1, "every": 2}}', "a name occurs twice"),
        ('{"Sign": {}}', r"must give all options of Sign, every, and no other, got \[\]"),
        ('{"Sign": {"every": 1, "self": 2}}', "must give all options of Sign, every, and no other"),
        (json.dumps({"Counter": {name: GOOD[name] for name in GOOD if name != "eta"}}), "must give all options of Counter"),
        (counter(more=1), "must give all options of Counter"),
        (counter(eta=None), "must have a value for every option"),
        (counter(eta="8"), "eta must be a number, got '8'"),
        (counter(eta=True), "eta must be a number, got True"),
        (counter(eta=float("nan")), "eta must be finite"),
        (counter(eta=float("inf")), "eta must be finite"),
        (counter(eta=10**400), "eta must be finite"),
        (counter(bits=8.0), "bits must be an integer, got 8.0"),
        (counter(bits=9), "bits must be between 1 and 8, got 9"),
        (counter(bits=[8]), "bits must be an integer"),
        (counter(center=1), "center must be True or False"),
        (counter(norm=["rms"]), "norm must be one of"),
        (counter(norm={}), "norm must be one of"),
        (counter(every=0), "every must be at least 1"),
        (counter(bits=7), r"emb is no state of its rule, Counter\(bits=7"),
        ('{"Sign": {"every": 1}}', r"emb is no state of its rule, Sign\("),
    ],
)
def test_load_refuses(tmp_path, text, message):
    path = tmp_path / "t.safetensors"
    io.save(path, {"emb": make_table(V, D)}, {"emb": exported(Counter(8))})
    save_file(load_file(path), path, metadata(path) | {"emb.rule": text})
    with pytest.raises(ValueError, match=message) as error:
        io.load(path)
    assert str(path) in str(error.value)
    assert "emb" in str(error.value)
    assert len(str(error.value)) < 1000


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NAMES = st.sampled_from(["Counter", "Sign", "every", "bits"])


@settings(deadline=None, max_examples=50)
@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6))
def test_whatever_json_holds(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("hostile") / "t"
    io.save(path, {"emb": make_table(V, D)}, {"emb": exported(Counter(8))})
    save_file(load_file(path), path, metadata(path) | {"emb.rule": json.dumps(value)})
    with pytest.raises(ValueError, match=r"metadata 'emb.rule'|emb is no state of its rule"):
        io.load(path)


def test_a_rule_of_no_state_and_of_no_table(tmp_path):
    path = tmp_path / "t"
    io.save(path, {"emb": make_table(V, D)})
    kept = load_file(path), metadata(path)
    for change, message in [
        ({"emb.rule": counter()}, "metadata 'emb.rule' belongs to no state"),
        ({"other.rule": counter()}, "metadata 'other.dim' is missing"),
        ({".rule": counter()}, "metadata '.rule' is "),
    ]:
        save_file(kept[0], path, kept[1] | change)
        with pytest.raises(ValueError, match=message):
            io.load(path)


# ---- imports -----------------------------------------------------------------------------------------------------------------------------

OTHERS = [(Counter(8), Counter(7)), (Counter(8), Bop()), (Sign(), Counter(1, norm="rms")), (Bop(), Sign())]


def in_torch(rule, planes=1):
    torch, dbt = pytest.importorskip("torch"), pytest.importorskip("dualbin.torch")
    table = make_table(V, D, planes=planes)
    parameter = torch.nn.Parameter(dbt.BinaryTable(torch.from_numpy(table.bits), torch.from_numpy(table.scale), D, planes=planes))
    optimizer = dbt.XOR([parameter], rule=rule)
    return (lambda: optimizer.export_state({"emb": parameter})), (lambda states: optimizer.import_state(states, {"emb": parameter}))


def in_jax(rule, planes=1):
    pytest.importorskip("jax")
    dbj = pytest.importorskip("dualbin.jax")
    table = dbj.BinaryTable(**make_table(V, D, planes=planes)._asdict())
    fresh = dbj.xor(1.0, rule).init({"emb": table})
    return (lambda: dbj.export_state(fresh, rule)), (lambda states: dbj.import_state(fresh, states, rule))


FRONTENDS = pytest.mark.parametrize("make", [in_torch, in_jax])


def through_a_file(path, state, planes=1):
    io.save(path, {"emb": make_table(V, D, planes=planes)}, state)
    return io.load(path)[1]


@FRONTENDS
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_frontends_write_their_rule(tmp_path, make, rule):
    export, take = make(rule)
    states = through_a_file(tmp_path / "t", export())
    assert states["emb"].rule == resolve(rule, 1, D)
    take(states)


@FRONTENDS
@pytest.mark.parametrize(("mine", "saved"), OTHERS, ids=str)
def test_a_state_of_another_rule_is_refused(tmp_path, make, mine, saved):
    export, take = make(mine)
    before = export()
    state = exported(saved)
    for given_states in ({"emb": state}, through_a_file(tmp_path / "t", {"emb": state})):
        name = type(mine).__name__
        with pytest.raises(ValueError, match=rf"emb'\] is the state of {type(saved).__name__}\(.*, which {name}\(.* cannot go on with"):
            take(given_states)
    assert_same(before["emb"], export()["emb"])


@FRONTENDS
def test_other_rates_and_windows_are_the_users_right(tmp_path, make):
    _, take = make(Counter(8, eta=1.0, dead_zone=0.5, every=1, norm="adagrad"))
    export, _ = make(Counter(8, eta=2.0, anneal=3.0, norm="adagrad"))
    take(through_a_file(tmp_path / "t", export()))
    export, _ = make(Bop(tau=0.5))
    make(Bop(gamma=0.5))[1](through_a_file(tmp_path / "t", export()))


def test_jax_takes_no_rule_that_is_not_that_of_the_state():
    jax, dbj = pytest.importorskip("jax"), pytest.importorskip("dualbin.jax")
    table = dbj.BinaryTable.create(jax.random.key(0), V, D)
    rule = Counter(4, norm="rms")
    states = {"a": dbj.init_state(table, rule), "b": dbj.init_state(table, Counter(2, every=2))}
    rules = {"a": rule, "b": Counter(2, every=2)}
    assert {name: state.rule for name, state in dbj.export_state(states, rules).items()} == rules
    assert all(state.rule is None for state in dbj.export_state(states).values())
    for given_rules, error, message in [
        ({"a": rule}, ValueError, r"rule must be one rule, or one for each of the tables \['a', 'b'\], got rules for \['a'\]"),
        (rule, ValueError, "rule of 'b' must be the one that its state was made for, with counter, record, a window of every, got Counter"),
        (rules | {"a": Counter(4, norm="adagrad")}, ValueError, "rule of 'a' must be .* which has counter, record, sums of squares"),
        (rules | {"a": Bop()}, ValueError, "rule of 'a' must be .* which has ema, record"),
        (rules | {"a": "Counter"}, TypeError, "rule must be a dualbin.rules.Counter, Bop or Sign, got str"),
        ("Counter", TypeError, "rule must be a dualbin.rules.Counter, Bop or Sign, got str"),
    ]:
        with pytest.raises(error, match=message):
            dbj.export_state(states, given_rules)
        with pytest.raises(error, match=message):
            dbj.import_state(states, dbj.export_state(states), given_rules)


def test_pytrees_of_states_keep_the_rule():
    jax = pytest.importorskip("jax")
    pytest.importorskip("dualbin.jax")
    state = exported(Counter(8))
    copied = jax.tree.map(np.copy, {"emb": state})["emb"]
    assert (copied.rule, copied.planes, copied.keys()) == (state.rule, 1, state.keys())
