"""Methods, the digits-world LLaVA, and small random siblings of the supported families, by name."""

import functools
from typing import TYPE_CHECKING, Any

from attn_core.catalog import Catalog, Entry

if TYPE_CHECKING:  # a command's --help does without what it imports
    from vlm_tools.intervention.method import Method

METHODS: "Catalog[Method]" = Catalog("vlm_tools.methods", kind="method", caller="method_of")


class _Everything(Catalog[Any]):
    """The networks of this folder, and the methods, which are as much what the package offers."""

    @functools.cached_property
    def entries(self) -> dict[str, Entry[Any]]:
        networks: Catalog[Any] = Catalog(self.folder)
        return dict(sorted({**METHODS.entries, **networks.entries}.items()))


CATALOG = _Everything("vlm_tools.models")
list_models = CATALOG.names
create_model = CATALOG.create
card = CATALOG.card
method_of = METHODS.create
