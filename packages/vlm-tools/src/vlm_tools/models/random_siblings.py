"""Catalogue entries of the random small siblings of `vlm_tools.testing.random_models`."""

from functools import partial

from attn_core.catalog import Card, Entry
from vlm_tools.testing.random_models import FAMILIES, random_model

CARD = Card(family="random sibling", paper="2304.08485", code="", license="", test="intervention/test_every_family.py")
ENTRIES = [Entry(name, partial(random_model, name), CARD(f"small sibling of {name.removeprefix('test_')}"))
           for name in FAMILIES]  # fmt: skip
