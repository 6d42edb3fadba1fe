"""hypothesis searches all constructor arguments, param groups and overrides for a value that is not checked."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

from am_lightning import AMSGD, AMAdamW, am_adamw, am_sgd
from tests.examples import examples
from tests.generic.arguments import ARGUMENTS, names_value

each_class = pytest.mark.parametrize("cls", [AMAdamW, AMSGD], ids=lambda cls: cls.__name__)
each_factory = pytest.mark.parametrize(
    ("factory", "cls"), [(am_adamw, AMAdamW), (am_sgd, AMSGD)], ids=["am_adamw", "am_sgd"]
)
each_argument = pytest.mark.parametrize(
    ("cls", "name"),
    [
        pytest.param(cls, name, id=f"{cls.__name__}-{name}")
        for cls, arguments in ARGUMENTS.items()
        for name in arguments
    ],
)
each_group_option = pytest.mark.parametrize(
    ("cls", "name"),
    [
        pytest.param(cls, name, id=f"{cls.__name__}-{name}")
        for cls, arguments in ARGUMENTS.items()
        for name, argument in arguments.items()
        if argument.per_group
    ],
)
calm = examples(60)


def _params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(torch.tensor(value, dtype=dtype)) for value in ([1.0, -2.0, 3.0], 0.5, [[1e-3], [2.0]])]


def _give_gradients(params: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def _check_text(error: BaseException, name: str, value: Any, words: tuple[str, ...]) -> None:
    message = str(error)
    assert name in message
    assert names_value(message, value)
    for word in words:
        assert word in message


def _allowed_together(cls: type, kwargs: dict[str, Any]) -> bool:
    """Return whether the constructors allow the pair; test_errors.py tests the pairs that they refuse."""
    tensor_lr = isinstance(kwargs.get("lr"), Tensor)
    if tensor_lr and kwargs.get("foreach") and not kwargs.get("capturable"):
        return False
    if kwargs.get("fused") and kwargs.get("foreach"):
        return False
    return not (kwargs.get("loss_gap") == "exact" and kwargs.get("scope", "global") != "global")


@each_class
def test_the_table_holds_every_argument(cls: type) -> None:
    assert set(inspect.signature(cls).parameters) - {"params"} == set(ARGUMENTS[cls])


@each_argument
@calm
@given(data=st.data())
def test_bad_argument(cls: type, name: str, data: st.DataObject) -> None:
    argument = ARGUMENTS[cls][name]
    value = data.draw(argument.bad)
    with pytest.raises((ValueError, TypeError)) as caught:
        cls(_params(), **{name: value})
    _check_text(caught.value, name, value, argument.words)


@each_class
@examples(300)
@given(data=st.data())
def test_good_arguments_make_finite_steps(cls: type, data: st.DataObject) -> None:
    kwargs = data.draw(st.fixed_dictionaries({}, optional={n: a.good for n, a in ARGUMENTS[cls].items()}))
    assume(_allowed_together(cls, kwargs))
    if kwargs.get("loss_gap") == "exact":
        assume(not 0 < float(kwargs.get("lr", 1)) < 1e-30)  # gap / lr overflows, and such a step is skipped
    params = _params(data.draw(st.sampled_from([torch.float32, torch.float64])))
    optimizer = cls(params, **kwargs)
    for step in range(3):
        _give_gradients(params, seed=step)
        optimizer.step(lambda step=step: torch.tensor(1.0 / (step + 1)))
        assert not optimizer.last_step_skipped
        assert all(torch.isfinite(param).all() for param in params)
        cap = float(kwargs["betas"][0]) if "betas" in kwargs else float(kwargs.get("beta_max", 0.9))
        assert all(0 <= float(beta) <= cap + 1e-6 for beta in optimizer.momentum().values())


@each_class
@calm
@given(name=st.from_regex(r"[a-z_]{1,12}", fullmatch=True), value=st.floats() | st.text(max_size=3) | st.none())
def test_unknown_argument(cls: type, name: str, value: Any) -> None:
    assume(name not in inspect.signature(cls).parameters)
    with pytest.raises(TypeError, match=rf"\b{name}\b"):
        cls(_params(), **{name: value})


@each_class
def test_arguments_after_the_star_are_keywords_only(cls: type) -> None:
    positional = [p for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    with pytest.raises(TypeError, match="positional"):
        cls(_params(), *[p.default for p in positional[1:]], 0.1)


@each_group_option
@calm
@given(data=st.data())
def test_bad_option_of_an_added_group(cls: type, name: str, data: st.DataObject) -> None:
    """The error is the constructor's; the optimizer stays as it was and continues."""
    argument = ARGUMENTS[cls][name]
    value = data.draw(argument.bad)
    params = _params()
    optimizer = cls(params[:2])
    with pytest.raises((ValueError, TypeError)) as caught:
        optimizer.add_param_group({"params": params[2:], name: value})
    _check_text(caught.value, name, value, argument.words)
    assert len(optimizer.param_groups) == 1
    _give_gradients(params, seed=0)
    optimizer.step()
    optimizer.add_param_group({"params": params[2:]})  # the refused parameters are not remembered


@each_group_option
@calm
@given(data=st.data())
def test_bad_option_of_a_group_given_to_the_constructor(cls: type, name: str, data: st.DataObject) -> None:
    argument = ARGUMENTS[cls][name]
    value = data.draw(argument.bad)
    params = _params()
    with pytest.raises((ValueError, TypeError)) as caught:
        cls([{"params": params[:2]}, {"params": params[2:], name: value}])
    _check_text(caught.value, name, value, argument.words)


@each_class
@examples(150)
@given(data=st.data())
def test_good_options_of_an_added_group(cls: type, data: st.DataObject) -> None:
    options = {name: argument.good for name, argument in ARGUMENTS[cls].items() if argument.per_group}
    group = data.draw(st.fixed_dictionaries({}, optional=options))
    assume(_allowed_together(cls, group))
    params = _params()
    optimizer = cls(params[:2], scope=data.draw(st.sampled_from(["tensor", "group", "global"])))
    optimizer.add_param_group({"params": params[2:], **group})
    for step in range(3):
        _give_gradients(params, seed=step)
        optimizer.step()
        assert not optimizer.last_step_skipped
        assert all(torch.isfinite(param).all() for param in params)


def _model() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, name) for cls, arguments in ARGUMENTS.items() for name in arguments if name != "replica_group"],
)
@calm
@given(data=st.data())
def test_bad_argument_of_a_factory(cls: type, name: str, data: st.DataObject) -> None:
    argument = ARGUMENTS[cls][name]
    value = data.draw(argument.bad)
    factory = am_adamw if cls is AMAdamW else am_sgd
    with pytest.raises((ValueError, TypeError)) as caught:
        factory(_model(), **{name: value})
    _check_text(caught.value, name, value, argument.words)


@each_group_option
@calm
@given(data=st.data())
def test_bad_option_of_an_override(cls: type, name: str, data: st.DataObject) -> None:
    argument = ARGUMENTS[cls][name]
    value = data.draw(argument.bad)
    factory = am_adamw if cls is AMAdamW else am_sgd
    with pytest.raises((ValueError, TypeError)) as caught:
        factory(_model(), overrides={"1.weight": {name: value}})
    _check_text(caught.value, name, value, argument.words)


@each_factory
@examples(100)
@given(data=st.data())
def test_good_overrides(factory: Any, cls: type, data: st.DataObject) -> None:
    options = {name: argument.good for name, argument in ARGUMENTS[cls].items() if argument.per_group}
    override = data.draw(st.fixed_dictionaries({}, optional=options))
    assume(_allowed_together(cls, override))
    model = _model()
    optimizer = factory(model, overrides={r"^3\.": override})
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert set(groups) == {name for name, _ in model.named_parameters()}
    for option, value in override.items():
        assert _equal(groups["3.weight"][option], value)
        assert _equal(groups["3.bias"][option], value)
    params = list(model.parameters())
    _give_gradients(params, seed=0)
    optimizer.step()
    assert all(torch.isfinite(param).all() for param in params)


@each_factory
def test_later_overrides_win(factory: Any, cls: type) -> None:
    optimizer = factory(_model(), overrides={r"weight": {"lr": 0.5, "lambd": 0.3}, r"^3\.": {"lr": 0.25}})
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert (groups["3.weight"]["lr"], groups["3.weight"]["lambd"]) == (0.25, 0.3)
    assert (groups["3.bias"]["lr"], groups["1.weight"]["lr"]) == (0.25, 0.5)


@each_factory
def test_norms_biases_and_vectors_have_no_weight_decay(factory: Any, cls: type) -> None:
    """This includes norms and biases of more than one dimension, and embeddings on request."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 4)
            self.norm = torch.nn.LayerNorm((2, 4))
            self.linear = torch.nn.Linear(4, 4)
            self.table_bias = torch.nn.Parameter(torch.zeros(3, 3))
            self.scale = torch.nn.Parameter(torch.ones(4))

    for decay_embeddings in (True, False):
        optimizer = factory(Model(), weight_decay=0.3, decay_embeddings=decay_embeddings)
        decayed = {n for group in optimizer.param_groups if group["weight_decay"] for n in group["param_names"]}
        assert decayed == {"linear.weight"} | ({"embed.weight"} if decay_embeddings else set())


def _equal(held: Any, given_value: Any) -> bool:
    if isinstance(given_value, (tuple, list)):
        return tuple(held) == tuple(float(value) for value in given_value)
    return bool(held == given_value)


@each_factory
@calm
@given(pattern=st.from_regex(r"[a-z]{3,8}", fullmatch=True))
def test_pattern_that_matches_nothing(factory: Any, cls: type, pattern: str) -> None:
    assume(not any(pattern in name for name, _ in _model().named_parameters()))
    with pytest.raises(ValueError, match=pattern):
        factory(_model(), overrides={pattern: {"lr": 0.1}})


@each_factory
@calm
@given(option=st.from_regex(r"[a-z_]{1,12}", fullmatch=True), value=st.floats(0, 1))
def test_unknown_option_of_an_override(factory: Any, cls: type, option: str, value: float) -> None:
    assume(option not in ARGUMENTS[cls] and option != "params")
    with pytest.raises((ValueError, TypeError), match=rf"\b{option}\b"):
        factory(_model(), overrides={"weight": {option: value}})


@each_factory
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("weight", ["overrides", "'weight'"]),
        ([("weight", {"lr": 0.1})], ["overrides"]),
        ({"(": {"lr": 0.1}}, ["overrides", "'('"]),
        ({3: {"lr": 0.1}}, ["overrides", "3"]),
        ({"weight": 0.1}, ["overrides", "0.1"]),
        ({"weight": None}, ["overrides", "None"]),
        ({"weight": {"params": []}}, ["params"]),
        ({"weight": {3: 0.1}}, ["3"]),
    ],
    ids=str,
)
def test_bad_overrides(factory: Any, cls: type, overrides: Any, words: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        factory(_model(), overrides=overrides)
    assert all(word in str(caught.value) for word in words)


@each_factory
@pytest.mark.parametrize("model", [None, 3, "model", [Parameter(torch.ones(2))], nn.Linear], ids=str)
def test_bad_model(factory: Any, cls: type, model: Any) -> None:
    with pytest.raises(TypeError, match=r"model.*Module"):
        factory(model)


@each_factory
@pytest.mark.parametrize("value", [None, 1, "yes", 0.0])
def test_bad_decay_embeddings(factory: Any, cls: type, value: Any) -> None:
    with pytest.raises(TypeError, match=r"decay_embeddings.*True.*False"):
        factory(_model(), decay_embeddings=value)


@each_factory
@calm
@given(name=st.from_regex(r"[a-z_]{1,12}", fullmatch=True))
def test_unknown_argument_of_a_factory(factory: Any, cls: type, name: str) -> None:
    assume(name not in ARGUMENTS[cls] and name not in inspect.signature(factory).parameters)
    with pytest.raises(TypeError, match=rf"\b{name}\b"):
        factory(_model(), **{name: 0.1})


@each_factory
def test_a_model_without_parameters(factory: Any, cls: type) -> None:
    with pytest.raises(ValueError, match="param"):
        factory(nn.ReLU())
