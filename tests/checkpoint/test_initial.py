"""A model without values still knows how each of its parameters would have begun."""

from __future__ import annotations

import torch
from torch import nn

from opensora_like.checkpoint.initial import InitialValues
from tests.models.test_mmdit import TINY, MMDiT


class Odd(nn.Module):
    """Parameters made in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 8) / 8**0.5 + 1000)
        self.joined = nn.Parameter(torch.cat([torch.zeros(2), torch.ones(2)]))
        self.partly = nn.Parameter(torch.ones(4))
        nn.init.zeros_(self.partly[:2])
        self.late = nn.Linear(3, 4)
        nn.init.normal_(self.late.weight, std=0.1)
        self.cut = nn.Parameter(torch.empty(5, 5))
        nn.init.trunc_normal_(self.cut, std=0.1)
        nn.init.constant_(self.late.bias, 7.0)


def recorded(build) -> tuple[InitialValues, dict[str, nn.Parameter]]:
    initial = InitialValues(3)
    with torch.device("meta"), initial:
        model = build()
    return initial, dict(model.named_parameters())


def test_constants_are_those_of_a_usual_build_and_draws_are_of_its_distribution() -> None:
    """For an MMDiT: equal where two usual builds are equal, and like them in size elsewhere."""
    initial, parameters = recorded(lambda: MMDiT(**TINY, cond_embed=True))
    usual = [dict(MMDiT(**TINY, cond_embed=True).named_parameters()) for _ in range(2)]
    for name, parameter in parameters.items():
        found = initial.maker(name, parameter)()
        assert torch.equal(found, initial.maker(name, parameter)())
        if torch.equal(usual[0][name], usual[1][name]):
            assert torch.equal(found, usual[0][name]), name
        else:
            assert found.shape == usual[0][name].shape
            assert found.abs().max() <= 1.3 * usual[0][name].abs().max() + 0.05, name
    assert not initial.maker("cond_in.weight", parameters["cond_in.weight"])().any()


def test_what_cannot_be_repeated_is_known() -> None:
    """Values from several tensors, or changed in part, are refused rather than wrong."""
    initial, parameters = recorded(Odd)
    known = {name for name, parameter in parameters.items() if initial.knows(parameter)}
    assert known == {"table", "late.weight", "late.bias"}
    assert (initial.maker("table", parameters["table"])() - 1000).abs().mean() < 1
    assert [name for name in sorted(known) if initial.is_drawn(parameters[name])] == ["late.weight", "table"]
    assert (initial.maker("late.bias", parameters["late.bias"])() == 7).all()
    assert 0.03 < initial.maker("late.weight", parameters["late.weight"])().std() < 0.2
