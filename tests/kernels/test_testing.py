"""The oracle that judges all kernels must itself reject what is wrong."""

import pytest
import torch

from hotloop.kernels.testing import LAYOUTS, VALUES, assert_no_worse, draw_values, lay_out

TRUTH = torch.linspace(-2, 2, 30, dtype=torch.float64).view(5, 6)


def test_accepts_what_is_as_accurate_as_pytorch():
    same = TRUTH.bfloat16()
    assert_no_worse(same, same, TRUTH)
    assert_no_worse(TRUTH.float(), TRUTH.float() + 1e-3, TRUTH)
    assert_no_worse(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64))


def test_rejects_an_error_above_pytorchs_and_names_the_element():
    actual = TRUTH.float()
    actual[3, 4] += 1e-4
    with pytest.raises(AssertionError, match=r"dW: error \S+ at \(3, 4\) exceeds"):
        assert_no_worse(actual, TRUTH.float(), TRUTH, name="dW")


def test_rejects_many_errors_each_of_which_pytorch_has_once():
    same = TRUTH.float()
    same[0, 0] += 1e-4
    with pytest.raises(AssertionError, match="root mean square"):
        assert_no_worse(TRUTH.float() + 1e-4, same, TRUTH)


def test_ulps_are_of_the_dtype_and_the_scale():
    eps = torch.finfo(torch.float32).eps
    assert_no_worse((TRUTH + 1.5 * eps).float(), TRUTH.float(), TRUTH)
    with pytest.raises(AssertionError):
        assert_no_worse((TRUTH + 16 * eps).float(), TRUTH.float(), TRUTH)


def test_dim_judges_rows_by_their_own_scale():
    truth = torch.cat((TRUTH * 1e6, TRUTH))
    actual = truth.float()
    actual[7] += 1e-3  # nothing beside the first rows, much in its own
    assert_no_worse(actual, truth.float(), truth)
    with pytest.raises(AssertionError, match=r"at \(7, "):
        assert_no_worse(actual, truth.float(), truth, dim=-1)


@pytest.mark.parametrize(
    ("truth", "actual"),
    [
        (1.0, float("nan")),
        (float("nan"), 1.0),
        (float("inf"), float("-inf")),
        (float("inf"), 1e30),
        (1.0, float("inf")),
    ],
)
def test_rejects_differences_in_being_finite(truth: float, actual: float):
    wide, narrow = TRUTH.clone(), TRUTH.float()
    wide[2, 1], narrow[2, 1] = truth, actual
    with pytest.raises(AssertionError, match=r"first at \(2, 1\)"):
        assert_no_worse(narrow, wide.float(), wide)
    assert_no_worse(wide.float(), wide.float(), wide)


def test_an_overflow_of_pytorchs_own_result_is_no_measure():
    truth = TRUTH.clone()
    truth[0, 0] = 1e5
    same = truth.half()
    assert same[0, 0].isinf()
    for value in (float("inf"), 65504.0, float("nan")):
        actual = truth.half()
        actual[0, 0] = value
        assert_no_worse(actual, same, truth)


def test_rejects_other_shapes_and_dtypes():
    with pytest.raises(AssertionError, match="shape"):
        assert_no_worse(TRUTH.float()[:4], TRUTH.float()[:4], TRUTH)
    with pytest.raises(AssertionError, match="dtype"):
        assert_no_worse(TRUTH.float(), TRUTH.bfloat16(), TRUTH)
    with pytest.raises(AssertionError, match="fp64_reference"):
        assert_no_worse(TRUTH.float(), TRUTH.float(), TRUTH.float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5), (7,), (), (0, 4), (3, 0)])
def test_layouts_keep_values_and_surround_them_with_nan(layout: str, shape: tuple[int, ...]):
    x = torch.randn(shape)
    y = lay_out(x, layout)
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr() or not x.numel()
    memory = torch.as_strided(y, (y.untyped_storage().nbytes() // 4,), (1,), 0)
    assert memory.isnan().sum() == memory.numel() - x.numel()
    if layout not in ("contiguous", "transposed") and len(shape) == 2 and x.numel():
        assert memory.numel() > x.numel()
    if layout in ("padded", "transposed", "strided") and shape == (4, 6):
        assert not y.is_contiguous()


def test_integers_are_surrounded_by_what_no_index_is():
    y = lay_out(torch.arange(6), "strided")
    assert torch.equal(y, torch.arange(6))
    assert torch.as_strided(y, (12,), (1,))[1].item() == torch.iinfo(torch.int64).max


@pytest.mark.parametrize("kind", VALUES)
def test_values_are_seeded(kind: str):
    x = draw_values((50, 50), kind, seed=3, dtype=torch.float32)
    assert torch.equal(x, draw_values((50, 50), kind, seed=3, dtype=torch.float32))
    size = {"normal": 1.0, "small": 1e-4, "large": 1e4, "equal": 0.5}[kind]
    assert 0.9 * size < x.double().square().mean().sqrt() < 1.1 * size


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="kind 'huge'"):
        draw_values((2,), "huge", dtype=torch.float32)
    with pytest.raises(ValueError, match="layout 'blocked'"):
        lay_out(torch.ones(2), "blocked")
