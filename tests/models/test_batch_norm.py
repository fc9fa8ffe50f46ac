"""The gradients of norms of one image on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfstrat.models.batch_norm import AFFECTED, contiguous_gradients

SHAPES = {"2d": (8, 5, 5), "3d": (8, 3, 3, 3)}


@pytest.mark.parametrize("kind", AFFECTED)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_gradient_with_other_strides_is_read_right(kind: type[nn.Module], rows: int) -> None:
    """The same products as tokens `[B, N, C]` and as channels `[B, C, ...]` have the same gradient."""
    shape = SHAPES[kind.__name__[-2:]]
    norm = kind(8).double()
    undo = contiguous_gradients(nn.Sequential(norm))
    torch.manual_seed(0)
    given = torch.randn(rows, *shape, dtype=torch.double, requires_grad=True)
    weights = torch.randn(rows, *shape, dtype=torch.double)
    as_tokens = weights.flatten(2).transpose(1, 2).contiguous()
    (one,) = torch.autograd.grad((norm(given).flatten(2).transpose(1, 2) * as_tokens).sum(), given)
    (other,) = torch.autograd.grad((norm(given) * weights).sum(), given)
    assert torch.allclose(one, other, atol=1e-12)
    undo()
    assert not norm._forward_hooks
