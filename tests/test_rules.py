"""The conversion engine: it finds every problem, and import and export are inverse to each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import DATA, REFERENCES, as_float32

from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import (
    CONV1D,
    CONV2D,
    CONV3D,
    COUNTER,
    IDENTITY,
    LINEAR,
    Rule,
    TensorSpec,
    assign,
    chain,
    check,
    export,
    flat_parameters,
    load,
    make_plan,
    permute,
    reshape,
)
from fantasy_jax.errors import ConversionError
from fantasy_jax.weights.detect import detect

RULES = [
    Rule("embed.weight", "embed/embedding"),
    Rule("blocks.{layer}.linear.weight", "blocks/linear/kernel", LINEAR),
    Rule("blocks.{layer}.modulation", "blocks/modulation", reshape((1, 6, 2), (6, 2))),
    Rule("heads.{i}.bias", "heads/{i}/bias"),
]
SHAPES = {
    "embed/embedding": (7, 4),
    "blocks/linear/kernel": (3, 4, 5),
    "blocks/modulation": (3, 6, 2),
    "heads/0/bias": (2,),
    "heads/1/bias": (3,),
}


def target():
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}


def tensors():
    """A file that fits; every value is another one."""
    shapes = {"embed.weight": (7, 4), "heads.0.bias": (2,), "heads.1.bias": (3,)}
    for layer in range(3):
        shapes[f"blocks.{layer}.linear.weight"] = (5, 4)
        shapes[f"blocks.{layer}.modulation"] = (1, 6, 2)
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}


def specs(values):
    return {key: TensorSpec(value.shape, value.dtype) for key, value in values.items()}


def problems(values, rules=RULES, **options):
    """Kind, key and path of each problem; all of them, and the shapes, are part of the message."""
    found = make_plan(rules, specs(values), target(), **options).problems
    for problem in found:
        for part in (problem.kind, problem.key, problem.path):
            assert part in str(problem)
        assert "\n" not in str(problem)
    return [(problem.kind, problem.key, problem.path) for problem in found]


def test_a_file_that_fits_has_no_problems_and_loads_into_place():
    values = tensors()
    plan = make_plan(RULES, specs(values), target())
    assert plan.problems == []
    assert check(plan) is plan
    loaded = load(plan, values.__getitem__)
    assert {path: value.shape for path, value in loaded.items()} == SHAPES
    np.testing.assert_array_equal(
        loaded["blocks/linear/kernel"][2], values["blocks.2.linear.weight"].T, strict=True
    )
    np.testing.assert_array_equal(loaded["blocks/modulation"][1], values["blocks.1.modulation"][0])
    assert load(plan, values.__getitem__, dtype=jnp.bfloat16)["embed/embedding"].dtype == jnp.bfloat16


def test_layers_are_ordered_as_numbers_whatever_the_order_of_the_file():
    values = {f"blocks.{i}.scale": np.full(2, i, np.float32) for i in map(int, np.argsort(np.sin(range(12))))}
    shapes = {"blocks/scale": jax.ShapeDtypeStruct((12, 2), jnp.float32)}
    plan = make_plan([Rule("blocks.{layer}.scale", "blocks/scale")], specs(values), shapes)
    loaded = load(plan, values.__getitem__)["blocks/scale"]
    np.testing.assert_array_equal(loaded[:, 0], np.arange(12))


def test_missing_tensor_and_missing_layer():
    values = tensors()
    del values["embed.weight"], values["blocks.1.linear.weight"]
    assert problems(values) == [
        ("missing", "", "embed/embedding"),
        ("missing", "", "blocks/linear/kernel[1]"),
    ]


def test_a_stack_without_any_layer_is_missing():
    values = {key: value for key, value in tensors().items() if "modulation" not in key}
    assert problems(values) == [("missing", "", "blocks/modulation")]


def test_unexpected_tensor_extra_layer_and_a_place_that_the_model_lacks():
    extra = {
        "head.weight": np.zeros((2, 2)),
        "blocks.3.modulation": np.zeros((1, 6, 2)),
        "heads.2.bias": np.zeros(2),
    }
    assert problems(tensors() | extra) == [
        ("unexpected", "head.weight", ""),
        ("unexpected", "blocks.3.modulation", "blocks/modulation"),
        ("unexpected", "heads.2.bias", "heads/2/bias"),
    ]


def test_a_key_that_matches_two_rules_is_ambiguous():
    rules = [*RULES, Rule("heads.1.bias", "embed/embedding")]
    assert problems(tensors(), rules) == [
        ("ambiguous", "heads.1.bias", ""),
        ("missing", "", "heads/1/bias"),
    ]


def test_a_parameter_that_two_keys_fill_is_ambiguous():
    rules = [*RULES, Rule("shared.weight", "embed/embedding")]
    values = tensors() | {"shared.weight": np.zeros((7, 4))}
    assert problems(values, rules) == [("ambiguous", "embed.weight", "embed/embedding")]


def test_two_spellings_of_one_layer_are_ambiguous():
    values = tensors() | {"blocks.01.modulation": np.zeros((1, 6, 2))}
    assert problems(values) == [("ambiguous", "blocks.1.modulation", "blocks/modulation[1]")]


@pytest.mark.parametrize(
    ("key", "shape", "place", "wanted"),
    [
        ("embed.weight", (4, 7), "embed/embedding", [7, 4]),
        ("blocks.2.linear.weight", (4, 5), "blocks/linear/kernel[2]", [5, 4]),
        ("blocks.2.linear.weight", (5, 4, 1), "blocks/linear/kernel[2]", [5, 4]),
        # A reshape would accept any shape of the same size.
        ("blocks.0.modulation", (6, 1, 2), "blocks/modulation[0]", [1, 6, 2]),
        ("blocks.0.modulation", (12,), "blocks/modulation[0]", [1, 6, 2]),
        ("blocks.0.modulation", (1, 6, 3), "blocks/modulation[0]", [1, 6, 2]),
        ("heads.0.bias", (), "heads/0/bias", [2]),
    ],
)
def test_wrong_shape(key, shape, place, wanted):
    values = tensors() | {key: np.zeros(shape)}
    assert problems(values) == [("wrong shape", key, place)]
    (problem,) = make_plan(RULES, specs(values), target()).problems
    assert str(list(shape)) in str(problem)
    assert str(wanted) in str(problem)


def test_all_problems_are_listed_at_once_and_nothing_is_read():
    values = tensors() | {"unknown": np.zeros(1), "heads.0.bias": np.zeros(9)}
    del values["embed.weight"]
    plan = make_plan(RULES, specs(values), target())

    def read(key):
        raise AssertionError("weights were read")

    with pytest.raises(ConversionError) as caught:
        load(plan, read)
    assert sorted(x.kind for x in caught.value.problems) == ["missing", "unexpected", "wrong shape"]
    with pytest.raises(ConversionError) as caught:
        check(plan, "a/file")
    assert all(line.startswith("a/file: ") for line in str(caught.value).splitlines())


def test_ignored_keys_are_named_by_their_pattern_and_leave_their_place_unfilled():
    values = tensors() | {"textual.a.weight": np.zeros(3), "textual.b": np.zeros(())}
    plan = make_plan(RULES, specs(values), target(), ignore=("textual.*", "heads.0.*"))
    assert plan.ignored == {
        "heads.0.bias": "heads.0.*",
        "textual.a.weight": "textual.*",
        "textual.b": "textual.*",
    }
    assert [(x.kind, x.path) for x in plan.problems] == [("missing", "heads/0/bias")]


def test_a_template_is_no_regular_expression():
    plan = make_plan(
        [Rule("a.b", "x")],
        specs({"aXb": np.zeros(1)}),
        {"x": jax.ShapeDtypeStruct((1,), jnp.float32)},
    )
    assert len(plan.problems) == 2


def test_two_positions_in_one_stack_are_an_error_of_the_table():
    with pytest.raises(ValueError, match="stack"):
        problems({"a.0.b.1.c": np.zeros(1)}, [Rule("a.{i}.b.{j}.c", "a/c")])


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (IDENTITY, (3, 2)),
        (LINEAR, (3, 2)),
        (CONV1D, (2, 3, 4)),
        (CONV2D, (2, 3, 4, 5)),
        (CONV3D, (2, 3, 4, 5, 6)),
        (permute(2, 0, 1), (2, 3, 4)),
        (reshape((1, 6, 2), (6, 2)), (1, 6, 2)),
        (chain(permute(2, 0, 1), reshape((4, 2, 3), (4, -1))), (2, 3, 4)),
    ],
)
def test_a_transform_and_its_inverse_are_the_identity(transform, shape):
    value = np.arange(np.prod(shape)).reshape(shape)
    changed = transform.forward(value)
    assert transform is IDENTITY or changed.shape != value.shape or not np.array_equal(changed, value)
    np.testing.assert_array_equal(transform.inverse(changed), value, strict=True)


def test_export_undoes_load():
    values = tensors()
    loaded = load(make_plan(RULES, specs(values), target()), values.__getitem__)
    exported = dict(export(RULES, loaded))
    assert exported.keys() == values.keys()
    for key, value in values.items():
        np.testing.assert_array_equal(exported[key], value, strict=True)


def test_integers_keep_their_dtype_and_are_int64_in_files():
    shapes = {"count": jax.ShapeDtypeStruct((), jnp.int32), "scale": jax.ShapeDtypeStruct((2,), jnp.float32)}
    rules = [Rule("tracked", "count", COUNTER), Rule("weight", "scale")]
    values = {"tracked": np.array(2**31 - 1), "weight": np.ones(2, np.float32)}
    loaded = load(make_plan(rules, specs(values), shapes), values.__getitem__, dtype=jnp.bfloat16)
    assert {path: x.dtype for path, x in loaded.items()} == {"count": jnp.int32, "scale": jnp.bfloat16}
    exported = dict(export(rules, loaded))
    np.testing.assert_array_equal(exported["tracked"], values["tracked"], strict=True)


@pytest.mark.parametrize(("path", "kind"), [("unknown", "missing"), ("embed/embedding", "ambiguous")])
def test_export_needs_exactly_one_rule_for_a_parameter(path, kind):
    with pytest.raises(ConversionError) as caught:
        dict(export([*RULES, Rule("shared", "embed/embedding")], {path: np.zeros((7, 4))}))
    assert [(x.kind, x.path) for x in caught.value.problems] == [(kind, path)]


@pytest.mark.networks
def test_assign_needs_every_parameter_of_the_module():
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    values = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}
    assign(module, values)
    for path, value in flat_parameters(module).items():
        np.testing.assert_array_equal(value, values[path])
    with pytest.raises(ConversionError, match="missing: bias"):
        assign(module, {"kernel": values["kernel"]})
    with pytest.raises(ConversionError, match="unexpected: scale"):
        assign(module, values | {"scale": np.ones(3, np.float32)})


@pytest.mark.networks
@pytest.mark.parametrize("name", REFERENCES)
def test_every_table_carries_a_network_there_and_back_bit_for_bit(name):
    for found in detect(open_weights(DATA / name)):
        source = found.weights
        ignored = found.component.ignored(found.config)
        parameters = flat_parameters(found.plan()[0])
        plan = make_plan(found.rules, source.specs, parameters, ignore=ignored)
        values = load(plan, source.read)
        exported = dict(export(found.rules, values))
        assert exported.keys() == source.specs.keys() - plan.ignored.keys()
        for key, value in exported.items():
            np.testing.assert_array_equal(value, as_float32(source.read(key)), strict=True)

        for layout in found.component.layouts:
            rules = layout.rules(found.config)
            other = dict(export(rules, values))
            again = load(make_plan(rules, specs(other), parameters), other.__getitem__)
            assert again.keys() == values.keys()
            for path, value in again.items():
                np.testing.assert_array_equal(value, values[path], strict=True)
