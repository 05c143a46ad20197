"""Registries: discovery, errors that help, arguments checked against signatures."""

from __future__ import annotations

from typing import Literal

import pytest
from mmengine.registry import Registry

from opensora_like.registry import BOOSTERS, DATASETS, MODELS, SCHEDULERS, build, fit


def test_folders_fill_the_registries() -> None:
    """What a file in the folder registers is found without anybody importing it."""
    for registry, names in (
        (MODELS, {"mmdit", "flux", "patch", "t5", "clip"}),
        (DATASETS, {"video_text"}),
        (SCHEDULERS, {"flow_matching"}),
        (BOOSTERS, {"ddp", "colossalai"}),
    ):
        registry.import_from_location()
        assert names <= set(registry.module_dict)


TOYS = Registry("toy")


@TOYS.register_module("car")
class Car:
    def __init__(self, wheels: int, *, kind: Literal["old", "new"] = "old", speed: float = 1.0, seed: int = 0) -> None:
        self.wheels, self.kind, self.speed, self.seed = wheels, kind, speed, seed


def test_build_fits_arguments() -> None:
    """Arguments are checked by the signature; runtime arguments reach those that take them; the section stays."""
    section = {"type": "car", "wheels": 4.0, "speed": 3}
    car = build(section, TOYS, where="toy", seed=7, device="ignored by a car")
    assert (car.wheels, car.speed, car.seed) == (4, 3.0, 7) and isinstance(car.wheels, int)
    assert section == {"type": "car", "wheels": 4.0, "speed": 3}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "cra", "wheels": 1}, r"toy.type='cra': unknown toy 'cra'; did you mean \['car'\]"),
        ({"wheels": 1}, "has no 'type'"),
        ({"type": "car"}, r"'car' needs \['wheels'\]"),
        ({"type": "car", "wheel": 1}, r"did you mean \['wheels'\]"),
        ({"type": "car", "wheels": "four"}, "toy.wheels='four' must be int, not str"),
        ({"type": "car", "wheels": True}, "must be int, not bool"),
        ({"type": "car", "wheels": 1, "kind": "now"}, r"not one of \['old', 'new'\]"),
        ({"type": "car", "wheels": 1, "seed": 2}, "set by the program"),
        (3, "is not a dict"),
    ],
)
def test_mistakes_are_named(section: object, message: str) -> None:
    """Each error names the place and the remedy."""
    with pytest.raises(ValueError, match=message):
        build(section, TOYS, where="toy", seed=1)


@pytest.mark.parametrize(
    ("value", "hint", "fitted"),
    [
        (1e3, int, 1000),
        (2, float, 2.0),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((1, 2), list[float], [1.0, 2.0]),
        (None, int | None, None),
        ("resolution", float | Literal["resolution"] | None, "resolution"),
        (3, float | Literal["resolution"] | None, 3.0),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        (True, tuple[int, int] | bool | None, True),
    ],
)
def test_fit_converts_without_loss(value: object, hint: object, fitted: object) -> None:
    """Only lossless conversions are made, and the result has the asked type."""
    found = fit(value, hint, "x")
    assert found == fitted and type(found) is type(fitted)
