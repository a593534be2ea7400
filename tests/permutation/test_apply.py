import pytest
import torch

from padst_cli.errors import PadstError
from padst_cli.permutation.apply import (
    check_permutation,
    compose,
    from_structure,
    identity,
    invert,
    permute_columns,
    random_permutation,
    to_structure,
)

OUT, IN = 7, 11


def perms(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return random_permutation(IN, generator), random_permutation(OUT, generator)


@pytest.mark.parametrize("use_in", [True, False])
@pytest.mark.parametrize("use_out", [True, False])
def test_dense_weight_computes_what_the_structured_layer_computes(use_in: bool, use_out: bool) -> None:
    perm_in, perm_out = perms()
    perm_in, perm_out = perm_in if use_in else None, perm_out if use_out else None
    s, x = torch.randn(OUT, IN), torch.randn(5, IN)
    y = (x if perm_in is None else x[:, perm_in]) @ s.T
    y = y if perm_out is None else y[:, perm_out]
    w = from_structure(s, perm_in, perm_out)
    torch.testing.assert_close(x @ w.T, y)
    assert torch.equal(to_structure(w, perm_in, perm_out), s)


def test_coordinates_are_those_of_the_design() -> None:
    perm_in, perm_out = perms(1)
    s = torch.randn(OUT, IN)
    assert torch.equal(from_structure(s, perm_in, None)[:, perm_in.long()], s)
    assert torch.equal(from_structure(s, None, perm_out), s[perm_out.long()])
    assert torch.equal(permute_columns(from_structure(s, perm_in, None), perm_in), s)


def test_invert_and_compose() -> None:
    first, then = perms(2)[0], perms(3)[0]
    x = torch.randn(IN)
    assert torch.equal(x[compose(first, then)], x[first][then])
    assert torch.equal(compose(first, invert(first)), identity(IN))
    assert invert(first).dtype == torch.int32


def test_random_permutation_is_a_seeded_bijection() -> None:
    one, other = perms(4)[0], perms(4)[0]
    assert torch.equal(one, other)
    assert not torch.equal(one, perms(5)[0])
    check_permutation(one, IN, "perm_in")


@pytest.mark.parametrize(
    ("perm", "says"),
    [
        (torch.tensor([0, 1, 1], dtype=torch.int32), "exactly once"),
        (torch.tensor([0, 1, 3], dtype=torch.int32), "exactly once"),
        (torch.tensor([0, -1, 2], dtype=torch.int32), "exactly once"),
        (torch.tensor([0, 1], dtype=torch.int32), r"expected torch.int32 \[3\]"),
        (torch.tensor([0, 1, 2]), "torch.int64"),
    ],
)
def test_what_is_no_permutation_is_refused_by_name(perm: torch.Tensor, says: str) -> None:
    with pytest.raises(PadstError, match=says) as caught:
        check_permutation(perm, 3, "h.0.perm_in")
    assert "h.0.perm_in" in str(caught.value)
