"""The map families: one a file, behind one interface, in one registry.

Everything that depends on which families there are reads it from here: the modes of the estimator and of recipes, the
candidates of ``auto``, the arrays of stored parameters, the ops of a bundle.  docs/extending/mode.md says how to add one.
"""

from __future__ import annotations

from cat_plugin.cluster_affine.families.diagonal import Diagonal
from cat_plugin.cluster_affine.families.family import AffineMap, Budget, Candidate, Family, Problem, Terms
from cat_plugin.cluster_affine.families.full import Full
from cat_plugin.cluster_affine.families.identity import Identity
from cat_plugin.cluster_affine.families.lowrank import LowRank
from cat_plugin.cluster_affine.families.paper import Paper
from cat_plugin.errors import CATValueError

__all__ = [
    "FAMILIES",
    "MAPS",
    "AffineMap",
    "Budget",
    "Candidate",
    "Family",
    "Problem",
    "Terms",
    "mode_names",
    "register",
    "unregister",
]

#: The families by name.
FAMILIES: dict[str, Family] = {}
#: The maps of the families by the name that stored parameters have for them.
MAPS: dict[str, AffineMap] = {}


def register(family: Family) -> None:
    """Make a family known.

    Parameters
    ----------
    family : Family
        An instance; from then on its name is a mode, and ``auto`` compares its candidates.

    Raises
    ------
    CATValueError
        If there is a family of that name, or another map with the name or the op of its map.
    """
    if family.name in FAMILIES or family.name == "auto":
        raise CATValueError(f"there is a map family {family.name!r} already; give yours another name.")
    for known in MAPS.values():
        if known is not family.map and (known.mode == family.map.mode or known.op == family.map.op):
            raise CATValueError(
                f"the map of {family.name!r} is {family.map.mode!r} with the op {family.map.op!r}, and there is "
                f"{known.mode!r} with {known.op!r}; give yours another mode and op, or share that map."
            )
    FAMILIES[family.name] = family
    MAPS[family.map.mode] = family.map


def unregister(name: str) -> None:
    """Remove a family that :func:`register` has made known, with its map if no other family has it."""
    removed = FAMILIES.pop(name)
    if all(family.map is not removed.map for family in FAMILIES.values()):
        del MAPS[removed.map.mode]


def mode_names() -> tuple[str, ...]:
    """Return the values that ``mode`` can have, ``auto`` first."""
    return ("auto", *(name for name, family in FAMILIES.items() if family.is_mode))


for _family in (Identity(), Paper(), Diagonal(), LowRank(), Full()):
    register(_family)
