"""The kinds of variant, and the packed differences that they store."""

from byom.variants.base.delta import WHOLE, Delta, Parts, Served, Shared
from byom.variants.base.variant import PackingVariant, Preparation, Variant

__all__ = ["WHOLE", "Delta", "PackingVariant", "Parts", "Preparation", "Served", "Shared", "Variant"]
