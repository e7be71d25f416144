"""The correction's options, declared and checked here and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cat_plugin.cluster_affine.families import mode_names
from cat_plugin.logits import Axis, OutputName, class_axis_option, logits_option
from cat_plugin.options import Count, Number, OneOf, Seed, Share, configuration, option

if TYPE_CHECKING:
    from cat_plugin.cluster_affine import ClusterAffine

__all__ = ["CorrectionOptions"]


@configuration
class CorrectionOptions:
    """What a configuration says about the correction, and about the rows that are kept for it.

    ::

        cat:
          mode: auto
          num_clusters: 64
          alpha: 0.4
          pca_dim: null
          seed: 0
          holdout: 0.25

    Raises
    ------
    CATValueError, CATTypeError
        On a value that cannot be used.
    """

    num_clusters: Count = option(
        default=64, doc="Clusters of logits; with mode ``auto`` at most so many.", since="0.1"
    )
    alpha: Share = option(
        default=0.4,
        doc="Blending factor, from 0 (no correction) to 1 (the whole of it); with mode ``auto`` one candidate among others.",
        since="0.1",
    )
    pca_dim: Count | None = option(
        default=None,
        doc="Principal components in which the cluster is found; null for the logits themselves.",
        since="0.1",
    )
    mode: Annotated[str, OneOf(mode_names())] = option(
        default="auto",
        doc="The map fitted in each cluster; ``auto`` compares all of them by cross-validation, ``paper`` is the published "
        "method.",
        since="0.1",
    )
    logits: OutputName | None = logits_option()
    class_axis: Axis | None = class_axis_option()
    seed: Seed = option(default=0, doc="Seed of every random choice, the engine's too.", since="0.1")
    holdout: Annotated[Number, Field(ge=0, lt=1)] = option(
        default=0.25,
        doc="Share of the calibration rows, from 512 on, that the engine is not given, so that the correction can be judged on "
        "rows that the quantized model was not tuned on.",
        since="0.1",
    )

    def estimator(self) -> ClusterAffine:
        """The estimator that is fitted; scikit-learn's names differ for three of the options."""
        from cat_plugin.cluster_affine import ClusterAffine

        return ClusterAffine(
            mode=self.mode,
            n_clusters=self.num_clusters,
            alpha=self.alpha,
            n_components=self.pca_dim,
            random_state=self.seed,
        )
