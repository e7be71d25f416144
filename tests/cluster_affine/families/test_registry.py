"""A family that is added: everything that lists families knows it, and what is not its own stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat_plugin.cluster_affine import AffineParameters, ClusterAffine, families
from cat_plugin.cluster_affine.families import AffineMap, Candidate, Family, Terms
from cat_plugin.cluster_affine.validation import MODE_NAMES
from cat_plugin.errors import CATValueError

#: ``z + alpha * (gamma_k * z + beta_k - z + left_k @ (right @ z))``: the low-rank map on the row itself.
BENT = AffineMap(
    mode="bent",
    op="cluster_affine_bent",
    shapes={"gamma": "KC", "beta": "KC", "left": "KPS", "shared": "SC"},
    terms=lambda arrays: Terms(arrays["beta"], arrays["gamma"], arrays["left"], arrays["shared"]),
)


class Bent(Family):
    """Offsets, and a pull of every logit towards the mean logit."""

    name = "bent"
    map = BENT

    def candidates(self, budget):
        return [Candidate(self.name, k, d) for d, k in budget.clusterings(8)]

    def fit(self, problem, statistics):
        clusters, classes = statistics.mean_q.shape
        left, shared = np.full((clusters, classes, 1), 1.0 / classes), np.full((1, classes), 0.25)
        moved = statistics.mean_q + (statistics.mean_q[:, None] @ left @ shared)[:, 0]
        ones = np.ones((clusters, classes))
        beta = statistics.mean_fp - moved
        return problem.geometry, {"gamma": ones, "beta": beta, "left": left, "shared": shared}


@pytest.fixture
def bent():
    families.register(Bent())
    yield
    families.unregister("bent")
    assert families.mode_names() == MODE_NAMES
    assert "bent" not in families.MAPS


def test_the_modes_are_those_of_the_registry():
    assert MODE_NAMES == ("auto", "paper", "diagonal", "lowrank", "full")
    assert list(families.MAPS) == ["diagonal", "lowrank", "full"]


def test_an_added_family_is_a_mode_and_a_candidate(bent, logits):
    z_q, z_fp = logits
    options = {"n_clusters": 3, "alpha": 1.0, "random_state": 0}
    fitted = ClusterAffine(mode="bent", **options).fit(z_q, z_fp)
    given = fitted.parameters_
    row, k = z_q[7], given.assign(z_q[7:8])[0]
    expected = row + given.beta[k] + 0.25 * row.mean()
    np.testing.assert_allclose(fitted.predict(z_q[7:8])[0], expected, rtol=1e-12)
    for cluster in range(3):
        mine = given.assign(z_q) == cluster
        np.testing.assert_allclose(fitted.predict(z_q[mine]).mean(axis=0), z_fp[mine].mean(axis=0))
    # Streams and features come with the interface.
    streamed = ClusterAffine(mode="bent", **options).fit_batches(
        [(z_q[:300], z_fp[:300]), (z_q[300:], z_fp[300:])]
    )
    np.testing.assert_allclose(streamed.predict(z_q), fitted.predict(z_q), rtol=1e-9)
    wide = ClusterAffine(mode="bent", **options).fit(z_q, z_fp, features=z_q[:, :2] * 9)
    assert wide.parameters_.mode == "full"
    np.testing.assert_allclose(
        wide.predict(z_q, features=z_q[:, :2]), fitted.predict(z_q), rtol=1e-9, atol=1e-9
    )
    tried = ClusterAffine(n_clusters=4, random_state=0).fit(z_q[:200], z_fp[:200]).cv_results_["param_family"]
    assert "bent" in tried


def test_its_parameters_are_stored_and_checked(bent, logits):
    given = ClusterAffine(mode="bent", n_clusters=2, random_state=0).fit(*logits).parameters_
    again = AffineParameters.from_arrays("bent", given.to_arrays())
    np.testing.assert_array_equal(again.apply(logits[0]), given.apply(logits[0]))
    with pytest.raises(CATValueError, match=r"'shared' has shape \(2, 6\); .*must have \(1, 6\)"):
        given.replace(shared=np.zeros((2, 6)))


def test_its_op_is_called_by_the_module_and_may_end_a_bundle(bent, logits):
    from cat_plugin.graph import ClusterAffineModule
    from cat_plugin.graph.manifest import corrections

    @torch.library.custom_op("cat::cluster_affine_bent", mutates_args=())
    def op(
        logits: torch.Tensor, mean: torch.Tensor, components: torch.Tensor, centroids: torch.Tensor,
        gamma: torch.Tensor, beta: torch.Tensor, left: torch.Tensor, shared: torch.Tensor, alpha: float,
    ) -> torch.Tensor:  # fmt: skip
        label = torch.cdist(logits, centroids).argmin(dim=1)
        image = gamma[label] * logits + beta[label] + (logits[:, None] @ left[label] @ shared)[:, 0]
        return logits + alpha * (image - logits)

    given = ClusterAffine(mode="bent", n_clusters=2, random_state=0).fit(*logits).parameters_
    z = logits[0].astype(np.float32)
    got = ClusterAffineModule(given)(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(got, given.apply(z), rtol=1e-4, atol=1e-4)
    assert corrections()["cluster_affine_bent"] is BENT


def test_names_are_taken_once():
    with pytest.raises(CATValueError, match="'diagonal' already"):
        families.register(families.FAMILIES["diagonal"])

    class Twin(Bent):
        name = "twin"
        map = AffineMap("twin", "cluster_affine", BENT.shapes, BENT.terms)

    with pytest.raises(CATValueError, match="the map of 'twin' is 'twin' with the op 'cluster_affine'"):
        families.register(Twin())
    assert "twin" not in families.FAMILIES
