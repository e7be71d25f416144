"""What every map family has in common: the map that its op applies, and how it is fitted and compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.geometry import Geometry
from cat_plugin.cluster_affine.rows import Rows, Scaling
from cat_plugin.cluster_affine.statistics import ClusterStatistics

if TYPE_CHECKING:
    from cat_plugin.cluster_affine.parameters import AffineParameters

__all__ = ["AffineMap", "Budget", "Candidate", "Family", "Problem", "Terms"]

#: A matrix per cluster is affordable up to this many columns.
_FULL_COLUMNS: Final = 256
_COUNTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Terms:
    """What a map adds up to in cluster k: ``slope_k * z + (x @ matrix_k) @ right + offset_k``.

    Everything that applies a map by standard operations (the numpy reference, an exporter) reads it from here.  At
    least one of `slope` and `matrix` is given.

    Parameters
    ----------
    offset : ndarray of shape (K, C)
        Added in each cluster.
    slope : ndarray of shape (K, C), optional
        Factor of each logit; left out, the logits themselves have no term.
    matrix : ndarray of shape (K, D, r), optional
        Multiplied from the right to a row x; left out, there is no such term.
    right : ndarray of shape (r, C), optional
        Multiplied to the result; left out, ``r = C``.
    projected : bool, default=False
        Whether x is the projection of the row rather than the row (its logits, followed by the features).
    """

    offset: FloatArray
    slope: FloatArray | None = None
    matrix: FloatArray | None = None
    right: FloatArray | None = None
    projected: bool = False


@dataclass(frozen=True, eq=False)
class AffineMap:
    """A map as an op applies it: its name, its arrays, and what it computes.

    Parameters
    ----------
    mode : str
        Name of the map in stored parameters.
    op : str
        Name of the ``torch.library`` op that applies it, without the namespace ``cat``.
    shapes : mapping of str to str
        The map's own arrays in the op's order, ``beta`` of shape KC among them, with a letter for each extent: K
        clusters, C classes, P columns of a row, D coordinates of its projection (P without one); any other letter is
        free, and the same wherever it stands.
    terms : callable
        Takes the arrays by name, returns the :class:`Terms`.
    takes_features : bool, default=False
        Whether features may follow the logits; the op then takes them as its second argument.
    """

    mode: str
    op: str
    shapes: Mapping[str, str]
    terms: Callable[[Mapping[str, FloatArray]], Terms]
    takes_features: bool = False

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays, in the order in which the op takes them."""
        return ("mean", "components", "centroids", *self.shapes)

    def expected_shapes(self, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes that :attr:`arrays` must have, given those they have, to fit each other."""
        axes = (given["components"] or (0,))[0]
        columns = (given["mean"] or (0,))[0]
        classes = given["beta"][-1] if given["beta"] else 0
        clusters, width = (*given["centroids"], 0, 0)[:2]
        inputs = max(columns, classes) if self.takes_features else classes
        extents = {"K": clusters, "C": classes, "P": inputs, "D": axes or inputs}
        expected = {
            "mean": (inputs,),
            "components": (axes, inputs),
            "centroids": (clusters, min(width, axes) if axes else inputs),
        }
        for name, letters in self.shapes.items():
            for letter, extent in zip(letters, given[name], strict=False):
                extents.setdefault(letter, extent)
            expected[name] = tuple(extents.get(letter, 0) for letter in letters)
        return expected


@dataclass(frozen=True)
class Candidate:
    """One way to correct logits, before it is fitted.

    Parameters
    ----------
    family : str
        Name of the map family.
    n_clusters : int, default=1
        K.
    n_components : int or None, default=None
        Principal components used for clustering (and, for ``lowrank``, for the map); None: the logits themselves.
    alpha : float, default=1
        Blending factor.
    rank : int, default=0
        Rank of the part shared by the clusters (``lowrank``).
    temperature : float, default=0
        Temperature of the refinement by divergence, in units of the logits' spread; 0: least squares alone.
    strength : float, default=0
        How strongly the refinement is held to the least-squares maps.
    tuned_rows : bool, default=True
        Whether rows that the quantizer was tuned on are used for fitting.
    use_features : bool, default=True
        Whether the features are regressors, where there are any (``full``).
    """

    family: str
    n_clusters: int = 1
    n_components: int | None = None
    alpha: float = 1.0
    rank: int = 0
    temperature: float = 0.0
    strength: float = 0.0
    tuned_rows: bool = True
    use_features: bool = True


@dataclass(frozen=True, eq=False)
class Problem:
    """A candidate to be fitted, and what is known before statistics are collected.

    Parameters
    ----------
    candidate : Candidate
        What is to be fitted.
    geometry : Geometry
        Its clusters of the logits.
    scaling : Scaling
        Size of the columns.
    n_features : int
        Feature columns.
    """

    candidate: Candidate
    geometry: Geometry
    scaling: Scaling
    n_features: int


@dataclass(frozen=True)
class Budget:
    """What the rows at hand can afford, and what the user asked for.

    Parameters
    ----------
    n_classes : int
        C.
    n_features : int
        Feature columns.
    n_rows : int
        Rows that are left for fitting when a fold is held out.
    n_clusters : int
        Upper bound of K.
    n_components : int or None
        Principal components for clustering; None: several are tried.
    alpha : float
        Blending factor tried beside a few others.
    """

    n_classes: int
    n_features: int
    n_rows: int
    n_clusters: int
    n_components: int | None
    alpha: float

    @property
    def n_columns(self) -> int:
        """Columns of the logits and the features together."""
        return self.n_classes + self.n_features

    @property
    def takes_matrices(self) -> bool:
        """Whether a matrix per cluster is affordable."""
        return self.n_columns <= _FULL_COLUMNS

    @property
    def alphas(self) -> list[float]:
        """Blending factors to try."""
        return sorted({float(self.alpha), 0.7, 1.0})

    @property
    def axes(self) -> list[int | None]:
        """Numbers of principal components to cluster in."""
        classes = self.n_classes
        if self.n_components is not None:
            return [min(self.n_components, classes)]
        if classes <= 64:
            return [None, classes // 2] if classes >= 6 else [None]
        return [min(50, classes // 2, max(1, self.n_rows // 8))]

    def cluster_counts(self, rows_each: int, most: int | None = None) -> list[int]:
        """Return numbers of clusters that can be given `rows_each` rows; `most` is a bound beside the user's."""
        limit = self.n_clusters if most is None else min(self.n_clusters, most)
        top = max(1, min(limit, self.n_rows // rows_each))
        return sorted({k for k in _COUNTS if k <= top} | ({limit} if limit <= top else set()))

    def clusterings(self, rows_each: int, most: int | None = None) -> list[tuple[int | None, int]]:
        """Return pairs of principal components and clusters; a single cluster needs no second projection."""
        counts = self.cluster_counts(rows_each, most)
        return [(d, k) for d in self.axes for k in counts if k > 1 or d == self.axes[0]]


class Family(ABC):
    """One kind of map: what it is fitted from, how, and what of it is worth trying.

    A family holds no state; :func:`cat_plugin.cluster_affine.families.register` makes it known.

    Attributes
    ----------
    name : str
        What users call it: a value of ``mode``.
    map : AffineMap
        What the op applies; families may share one.
    is_mode : bool, default=True
        Whether users can ask for it by name.
    precedence : int, default=9
        Of candidates that score the same, the one of the family with the lowest wins; the simplest come first.
    sorts_rows : bool, default=True
        Whether k-means sees the rows sorted by content, so that their order does not matter.
    n_init : int, default=1
        Initialisations of k-means.
    """

    name: ClassVar[str]
    map: ClassVar[AffineMap]
    is_mode: ClassVar[bool] = True
    precedence: ClassVar[int] = 9
    sorts_rows: ClassVar[bool] = True
    n_init: ClassVar[int] = 1

    def candidate(self, n_clusters: int, n_components: int | None, alpha: float, n_classes: int) -> Candidate:
        """Return what is fitted when the user asks for this family by name; `n_clusters` is at most the rows."""
        d = None if n_components is None else min(n_components, n_classes)
        return Candidate(self.name, n_clusters, d, alpha)

    @abstractmethod
    def candidates(self, budget: Budget) -> Iterable[Candidate]:
        """Return what is compared in ``auto`` mode, the simplest first."""

    def n_regressors(self, problem: Problem) -> int:
        """Return how many columns :meth:`regressors` has; 0, the default, if there are none."""
        return 0

    def regressors(self, problem: Problem, rows: Rows, position: FloatArray) -> FloatArray | None:
        """Return the columns (N, D) that the map is fitted from, beside each logit itself, or None.

        `position` is the projection of the rows, of shape (N, d).
        """
        return None

    @abstractmethod
    def fit(self, problem: Problem, statistics: ClusterStatistics) -> tuple[Geometry, dict[str, FloatArray]]:
        """Return the geometry of the columns that the map takes, and the map's own arrays by name.

        The statistics were collected with the problem's geometry and the family's regressors.
        """

    def refine(
        self, problem: Problem, fitted: AffineParameters, rows: Rows, temperature_unit: float
    ) -> AffineParameters:
        """Improve what :meth:`fit` made on the rows themselves, for candidates that ask for it.

        `temperature_unit` is the spread of the full-precision logits.
        """
        return fitted
