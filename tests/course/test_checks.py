import pytest
import torch
import torch.nn.functional as F

from minillm.cache.block_pool import BlockPool
from minillm.course.checks import CheckError, check_close, check_equal, without
from minillm.errors import InvalidRequestError
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


def test_what_is_closed_cannot_be_called_under_any_name_and_opens_again():
    mine, q = dot_product_attention, torch.randn(1, 2, 3, 4)
    attention = "minillm.transformer.attention:dot_product_attention"
    with without(attention, "torch.nn.functional:scaled_dot_product_attention", "minillm.cache.block_pool:BlockPool"):
        with pytest.raises(CheckError, match="dot_product_attention"):
            mine(q, q, q)
        with pytest.raises(CheckError, match="scaled_dot_product_attention"):
            F.scaled_dot_product_attention(q, q, q)
        with pytest.raises(CheckError, match="BlockPool"):
            BlockPool(4, 2)
    torch.testing.assert_close(mine(q, q, q), F.scaled_dot_product_attention(q, q, q))
    assert BlockPool(4, 2).num_free == 4


def test_closing_nothing_is_an_error():
    with pytest.raises(InvalidRequestError, match=r"no 'minillm\.cache:nothing'"), without("minillm.cache:nothing"):
        pass
