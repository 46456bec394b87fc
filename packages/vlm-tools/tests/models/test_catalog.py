"""Every name builds; unknown names and options are answered with the nearest."""

import pytest

from vlm_tools import create_model, list_models, method_of
from vlm_tools.models import card


def test_every_name_builds_and_mistakes_are_named() -> None:
    for name in list_models():
        assert create_model(name) is not None
        assert card(name).test.endswith(".py")
    with pytest.raises(ValueError, match="unknown model 'varr'; did you mean 'var'"):
        create_model("varr")
    with pytest.raises(ValueError, match="var has no option 'kep'; did you mean 'keep'"):
        method_of("var", kep=1)
    with pytest.raises(ValueError, match="unknown method 'digits'"):
        method_of("digits")
