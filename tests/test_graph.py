"""Order, dependencies and their errors, read from the signatures of the losses."""

from functools import partial

import pytest
import torch
from torch import nn

import scalemlo as mlo

DATA = [torch.ones(4, 1)]


def level(name, loss, **options):
    """A level whose loss has the signature of `loss`, a function of self."""
    kind = type("Test", (mlo.Level,), {"loss": loss})
    return kind(name, nn.Linear(1, 1), optimizer=partial(torch.optim.SGD, lr=0.1), **options)


def bilevel(upper=None, lower=None, **lower_options):
    return [
        level("top", upper or (lambda self, low: None)),
        level("low", lower or (lambda self, top: None), **lower_options),
    ]


def test_position_decides_who_stands_above():
    graph = mlo.LevelGraph(
        [
            level("a", lambda self, b, c: None),
            level("b", lambda self, batch, a, c: None, data=DATA),
            level("c", lambda self, a, b: None),
        ]
    )
    assert graph.order == ["a", "b", "c"]
    assert (graph.uppers("a"), graph.lowers("a")) == ([], ["b", "c"])
    assert (graph.uppers("b"), graph.lowers("b")) == (["a"], ["c"])
    assert (graph.uppers("c"), graph.lowers("c")) == (["a", "b"], [])
    assert [graph.reads_batch(n) for n in "abc"] == [False, True, False]
    assert graph.ancestors("c") == {"a", "b"}
    assert graph.below("a") == ["b", "c"]
    assert [graph.depends_on_best_responses(n) for n in "abc"] == [True, True, False]


def test_ancestors_pass_through_levels():
    graph = mlo.LevelGraph(
        [
            level("a", lambda self, c: None),
            level("b", lambda self, a: None),
            level("c", lambda self, b: None),
        ]
    )
    assert graph.ancestors("c") == {"a", "b"}
    assert graph.depends_on_best_responses("a")
    assert not graph.depends_on_best_responses("b")


def test_a_level_read_from_above_is_not_its_upper():
    """Reading a lower level alone does not make its best response depend on the reader."""
    graph = mlo.LevelGraph(
        [
            level("a", lambda self, b, c: None),
            level("b", lambda self: None),
            level("c", lambda self, a: None),
        ]
    )
    assert graph.below("a") == ["b", "c"]
    assert graph.ancestors("b") == set()
    assert graph.ancestors("c") == {"a"}


def test_annotations_override_the_order():
    def lower(self, top: mlo.Upper):
        pass

    def upper(self, low: mlo.Lower):
        pass

    graph = mlo.LevelGraph([level("low", lower), level("top", upper)])
    assert graph.order == ["top", "low"]
    assert graph.uppers("low") == ["top"]
    assert graph.lowers("top") == ["low"]


def test_annotations_may_be_strings():
    def lower(self, top: "mlo.Upper"):
        pass

    assert mlo.LevelGraph([level("low", lower), level("top", lambda self, low: None)][::-1]).uppers("low") == ["top"]

    def upper(self, low: "mlo.Lower"):
        pass

    assert mlo.LevelGraph([level("low", lower), level("top", upper)]).order == ["top", "low"]


def test_other_annotations_leave_the_order_alone():
    def lower(self, top: nn.Module) -> torch.Tensor:
        pass

    assert mlo.LevelGraph(bilevel(lower=lower)).uppers("low") == ["top"]


def test_a_circle_names_its_levels():
    def above(self, b: mlo.Upper):
        pass

    def below(self, a: mlo.Upper):
        pass

    with pytest.raises(ValueError, match=r"circle: (a above b above a|b above a above b)\. Check the annotations"):
        mlo.LevelGraph([level("a", above), level("b", below)])


def test_a_longer_circle_names_all_its_levels():
    def loss_of(upper):
        namespace: dict = {}
        exec(f"def loss(self, {upper}: Upper): pass", {"Upper": mlo.Upper}, namespace)
        return namespace["loss"]

    with pytest.raises(ValueError, match="circle") as error:
        mlo.LevelGraph([level("first", loss_of("third")), level("second", loss_of("first")),
                        level("third", loss_of("second"))])  # fmt: skip
    assert all(name in str(error.value) for name in ("first", "second", "third"))


@pytest.mark.parametrize(
    ("lower", "message"),
    [
        (lambda self, topp: None, r"'low': its loss reads 'topp', which is no level.*\['top', 'low'\].*mean 'top'\?"),
        (lambda self, zzz, top: None, r"'low': its loss reads 'zzz', which is no level; levels are \['top', 'low'\]\."),
        (lambda self, data, top: None, r"'low': its loss reads 'data'.*The batch must be called 'batch'"),
        (lambda self, low, top: None, r"'low' reads itself; use self\.module"),
        (lambda self, top, *rest: None, r"'low': loss must name the levels it reads; \*rest"),
        (lambda self, top, **rest: None, r"'low': loss must name the levels it reads; \*rest"),
    ],
)
def test_signatures_that_say_nothing(lower, message):
    with pytest.raises(ValueError, match=message):
        mlo.LevelGraph(bilevel(lower=lower))


def test_unread_levels_are_named():
    with pytest.raises(ValueError, match=r"no loss reads level\(s\) \['idle'\]"):
        mlo.LevelGraph([*bilevel(), level("idle", lambda self, low: None)])
    # Two levels that ignore each other are two programs.
    with pytest.raises(ValueError, match=r"no loss reads level\(s\) \['a', 'b'\]"):
        mlo.LevelGraph([level("a", lambda self: None), level("b", lambda self: None)])


def test_a_level_alone_needs_no_reader():
    assert mlo.LevelGraph([level("alone", lambda self: None)]).ticks_per_step == 1


def test_duplicate_names():
    with pytest.raises(ValueError, match=r"twice there: \['top'\]"):
        mlo.LevelGraph([*bilevel(), level("top", lambda self: None)])


def test_no_levels():
    with pytest.raises(ValueError, match="at least one level"):
        mlo.LevelGraph([])


def test_a_hypergradient_without_effect():
    levels = bilevel()
    levels[0].hypergradient = mlo.SAMA()
    with pytest.raises(ValueError, match=r"'top': hypergradient=SAMA.*no effect.*no level above.*lower level"):
        mlo.LevelGraph(levels)


def test_unroll_steps_without_effect():
    levels = bilevel()
    levels[0].unroll_steps = 2
    with pytest.raises(ValueError, match="'top': unroll_steps=2 has no effect.*no level stands above"):
        mlo.LevelGraph(levels)


def test_options_with_effect_pass():
    levels = bilevel(unroll_steps=2, hypergradient=mlo.SAMA())
    assert mlo.LevelGraph(levels).period("top") == 2


def test_data_without_batch_and_the_reverse():
    with pytest.raises(ValueError, match="'low': data is given, but loss has no parameter 'batch'"):
        mlo.LevelGraph(bilevel(data=DATA))
    with pytest.raises(ValueError, match="'low': loss reads a batch, but data is None"):
        mlo.LevelGraph(bilevel(lower=lambda self, batch, top: None))


@pytest.mark.parametrize("name", ["two words", "batch", "self", "1st", ""])
def test_names_must_be_readable_as_parameters(name):
    with pytest.raises(ValueError, match=f"level name {name!r} must be a Python identifier"):
        level(name, lambda self: None)


def test_a_keyword_cannot_be_read_as_parameter():
    with pytest.raises(ValueError, match="level name 'lambda'"):
        level("lambda", lambda self: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(unroll_steps=0), "'low': unroll_steps=0 must be an integer of at least 1"),
        (dict(unroll_steps=1.5), "'low': unroll_steps=1.5"),
        (dict(gradient_accumulation_steps=-1), "'low': gradient_accumulation_steps=-1"),
        (dict(max_grad_norm=0.0), "'low': max_grad_norm=0.0 must be positive"),
        (dict(optimizer="adamw"), "'low': optimizer must be a torch optimizer or a function.*got str"),
        (dict(module=lambda x: x), "'low': module must be a torch.nn.Module, got function"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        mlo.Level("low", **dict(module=nn.Linear(1, 1), optimizer=partial(torch.optim.SGD, lr=0.1)) | options)


def test_loss_must_be_written():
    with pytest.raises(ValueError, match="'alone' has no loss: give loss=f"):
        mlo.Level("alone", nn.Linear(1, 1), optimizer=partial(torch.optim.SGD, lr=0.1))
