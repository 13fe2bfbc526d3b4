import importlib.util
import inspect
from contextlib import suppress
from functools import partial
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F

from minillm.cache.block_pool import BlockPool
from minillm.course.checks import CheckError, check_close, check_equal, unchanged, without
from minillm.errors import InvalidRequestError
from minillm.training.translator import Translator
from minillm.transformer import attention
from minillm.transformer.attention import dot_product_attention

RIGHT = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (None, "should be a tensor of shape (2, 3), not None (is a return missing?)"),
        (RIGHT.T, "scores has shape (3, 2), and should have (2, 3)"),
        (RIGHT.double(), "scores is float64, and should be float32"),
        (RIGHT + torch.tensor([[0, 0, 0], [0, 0.5, 0.5]]), "scores[1, 1] is 4.5, and should be 4 (2 of 6 numbers"),
        (RIGHT * float("nan"), "scores[0, 0] is nan, and should be 0"),
    ],
)
def test_a_wrong_tensor_is_told_where_it_is_wrong(got, message):
    with pytest.raises(CheckError) as caught:
        check_close(got, RIGHT, "scores", hint="Divide by √d.")
    assert message in str(caught.value)
    assert str(caught.value).endswith("Divide by √d.")


def test_right_answers_pass():
    check_close(RIGHT + 1e-6, RIGHT)
    check_close(torch.tensor([-torch.inf]), torch.tensor([-torch.inf]))
    check_close(torch.tensor(1), torch.tensor(1))
    check_equal([1, 2], [1, 2])


@pytest.mark.parametrize(
    ("got", "expected", "message"),
    [
        ([1, 3], [1, 2], "blocks[1] is 3, and should be 2"),
        ([1], [1, 2], "blocks has 1 items, and should have 2"),
        (None, 3, "blocks is None (is a return missing?), and should be 3"),
        (True, 1, "blocks is True, and should be 1"),
    ],
)
def test_a_wrong_value_is_told_where_it_is_wrong(got, expected, message):
    with pytest.raises(CheckError, match="blocks") as caught:
        check_equal(got, expected, "blocks")
    assert message in str(caught.value)


ATTENTION = "minillm.transformer.attention:dot_product_attention"
POOL = "minillm.cache.block_pool:BlockPool"
FUSED = "torch.nn.functional:scaled_dot_product_attention"
Q = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))

copied = FunctionType(inspect.unwrap(dot_product_attention).__code__, attention.__dict__)
copied.__kwdefaults__ = inspect.unwrap(dot_product_attention).__kwdefaults__
second = importlib.util.module_from_spec(importlib.util.spec_from_file_location("second", attention.__file__))
second.__spec__.loader.exec_module(second)
softmax, fused = torch.softmax, torch.nn.functional.scaled_dot_product_attention


class MyPool(BlockPool):
    pass


WAYS = {
    "an alias": (ATTENTION, lambda: dot_product_attention(Q, Q, Q)),
    "its module": (ATTENTION, lambda: attention.dot_product_attention(Q, Q, Q)),
    "a partial": (ATTENTION, partial(dot_product_attention, Q, Q, Q)),
    "a copy of its code": (ATTENTION, lambda: copied(Q, Q, Q, None)),
    "a module loaded twice": (ATTENTION, lambda: second.dot_product_attention(Q, Q, Q)),
    "what calls it": (ATTENTION, lambda: attention.attend(Q[:, :, :1], Q, Q)),
    "a class": (POOL, lambda: BlockPool(4, 2)),
    "a subclass": (POOL, lambda: MyPool(4, 2)),
    "torch's own": (
        "torch.nn.functional:scaled_dot_product_attention",
        lambda: F.scaled_dot_product_attention(Q, Q, Q),
    ),
    "torch's under an alias": (FUSED, lambda: fused(Q, Q, Q)),
    "a partial of torch's": ("torch:softmax", partial(softmax, Q, dim=-1)),
    "a tensor's method": ("torch:Tensor.softmax", lambda: Q.softmax(dim=-1)),
    "a method under an alias": ("torch:Tensor.softmax", lambda: SOFTMAX_OF(Q, -1)),
}
SOFTMAX_OF = torch.Tensor.softmax


@pytest.mark.parametrize("way", WAYS)
def test_what_is_closed_cannot_be_called_however_it_was_got_and_opens_again(way):
    name, call = WAYS[way]
    before = call()
    with pytest.raises(CheckError, match=name.partition(":")[2]), without(name):
        call()
    after = call()
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    assert "softmax" not in vars(torch.Tensor)


def test_several_are_closed_at_once_and_all_else_works():
    with without(ATTENTION, POOL, "torch:softmax"):
        torch.testing.assert_close(Q.softmax(-1).sum(-1), torch.ones(1, 2, 3))
    for call in (lambda: BlockPool(4, 2), lambda: torch.softmax(Q, -1)):
        with pytest.raises(CheckError), without(ATTENTION, POOL, "torch:softmax"):
            call()


def test_who_catches_the_refusal_gets_it_again():
    with pytest.raises(CheckError, match="dot_product_attention"), without(ATTENTION), suppress(Exception):
        dot_product_attention(Q, Q, Q)


def test_a_module_that_is_loaded_anew_is_noticed():
    reference = importlib.import_module("minillm.cache.reference")
    with pytest.raises(CheckError, match="paged_attention"), without("minillm.cache.reference:paged_attention"):
        importlib.reload(reference)


def test_a_students_own_error_is_not_hidden():
    with pytest.raises(ValueError, match="of their own"), without(ATTENTION):
        int("a piece of their own")


def test_what_is_given_must_stay_as_it_is():
    q, holes = torch.zeros(3), torch.tensor([1.0, torch.nan])
    with unchanged(q=q, holes=holes):
        q + 1
    with pytest.raises(CheckError, match="holes was changed"), unchanged(q=q, holes=holes):
        holes[1] = 0


def test_closing_nothing_is_an_error():
    with pytest.raises(InvalidRequestError, match=r"no 'minillm\.cache:nothing'"), without("minillm.cache:nothing"):
        pass


def test_a_class_method_is_closed_and_nothing_else_is_noticed():
    with without("minillm.training.translator:Translator.load"):
        pass
    with pytest.raises(CheckError, match=r"Translator\.load"), without("minillm.training.translator:Translator.load"):
        Translator.load()
