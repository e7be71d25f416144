"""The sections of a report in their order: each takes the content and says either something or why it cannot."""

from __future__ import annotations

from collections.abc import Callable

from cat_plugin.report.content import Content, Section
from cat_plugin.report.sections.accuracy import accuracy
from cat_plugin.report.sections.clusters import clusters
from cat_plugin.report.sections.correction import correction
from cat_plugin.report.sections.labels import labels
from cat_plugin.report.sections.layers import layers
from cat_plugin.report.sections.library import library
from cat_plugin.report.sections.origin import origin
from cat_plugin.report.sections.outliers import outliers
from cat_plugin.report.sections.reconstruction import reconstruction
from cat_plugin.report.sections.trials import trials

__all__ = ["SECTIONS"]

SECTIONS: tuple[Callable[[Content], Section], ...] = (
    accuracy,
    labels,
    layers,
    outliers,
    reconstruction,
    clusters,
    correction,
    trials,
    library,
    origin,
)
"""The parts of a page in their order."""
