# SPDX-License-Identifier: MIT
"""The metrics against worked examples, other implementations, invariances and ill cases.

    python -m pytest tests/test_metrics.py
    python -m pytest tests/test_metrics.py -k worked
"""
import math
import warnings

import numpy as np
import pytest
import torch

from evaluate import (correlation, dci, dci_of_importance, match, mcc, mig,
                      mig_per_factor, modularity, modularity_of_information, mutual_information)

SCORES = (mig, mcc, modularity)


def grid(sizes, repeats):
    """Every combination of factor values, repeated, (N, K)."""
    cells = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), axis=-1)
    return np.repeat(cells.reshape(-1, len(sizes)), repeats, axis=0)


def noisy_code(n=2000, seed=0):
    """A code that knows three factors of 4, 5 and 6 values imperfectly, and mixes two of them."""
    rng = np.random.default_rng(seed)
    factors = np.stack([rng.integers(0, size, n) for size in (4, 5, 6)], axis=1)
    codes = factors + rng.normal(0, 0.4, factors.shape)
    codes[:, 2] += codes[:, 1]
    return np.hstack([codes, rng.normal(size=(n, 2))]), factors


# ---- worked examples ----

@pytest.fixture
def perfect():
    factors = grid((4, 5), 5)
    return np.hstack([factors, np.zeros((100, 1))]).astype(np.float32), factors


def test_worked_perfect_and_dead(perfect):
    codes, factors = perfect
    assert mig_per_factor(codes, factors) == pytest.approx([1, 1])
    assert [score(codes, factors) for score in SCORES] == pytest.approx([1, 1, 2 / 3])
    expected = [[math.log(4), 0], [0, math.log(5)], [0, 0]]
    np.testing.assert_allclose(mutual_information(codes, factors), expected, atol=1e-12)


def test_worked_labels_need_not_be_indices(perfect):
    codes, factors = perfect
    labels = factors.copy()
    labels[:, 1] = np.array([-3, 7, 10, 500, 1000000])[factors[:, 1]]
    assert [score(codes, labels) for score in SCORES] == pytest.approx([1, 1, 2 / 3])


def test_worked_duplicate_latent(perfect):
    factors = perfect[1]
    codes = factors[:, [0, 1, 0]].astype(float)
    assert mig_per_factor(codes, factors) == pytest.approx([0, 1])
    assert mig(codes, factors) == pytest.approx(0.5)


def test_worked_one_latent(perfect):
    factors = perfect[1]
    codes = factors[:, :1].astype(float)
    assert mig_per_factor(codes, factors) == pytest.approx([1, 0])
    assert [score(codes, factors) for score in SCORES] == pytest.approx([0.5, 0.5, 1])


def test_worked_sum():
    factors = grid((2, 2), 10)
    codes = np.stack([factors.sum(axis=1), factors[:, 0]], axis=1).astype(float)
    expected = [[0.346574, 0.346574], [0.693147, 0]]
    np.testing.assert_allclose(mutual_information(codes, factors), expected, atol=1e-6)
    assert mig_per_factor(codes, factors) == pytest.approx([0.5, 0.5])
    expected = [[0.707107, 0.707107], [1, 0]]
    np.testing.assert_allclose(correlation(codes, factors), expected, atol=1e-6)
    assert [score(codes, factors) for score in SCORES] == pytest.approx(
        [0.5, (1 + 1 / math.sqrt(2)) / 2, 0.5])


def test_worked_matrices():
    corr = np.array([[.9, .8], [.8, .1]])
    assert corr[match(corr)].mean() == pytest.approx(0.8)                # greedy pairs give 0.5
    scores = dci_of_importance(np.array([[.75, 0], [.25, 1]]))
    assert scores["disentanglement"] == pytest.approx(0.548795, abs=1e-6)
    assert scores["completeness"] == pytest.approx(0.594361, abs=1e-6)
    assert dci_of_importance(np.zeros((3, 3))) == {"disentanglement": 0, "completeness": 0}
    assert modularity_of_information(np.array([[2., 1, 1], [0, 3, 0]])) == pytest.approx(0.875)
    assert modularity_of_information(np.array([[1., 0], [0, 1], [0, 0]])) == pytest.approx(2 / 3)


# ---- agreement with other implementations ----

def test_information_agrees_with_sklearn():
    from sklearn.metrics import mutual_info_score
    codes, factors = noisy_code()
    codes = np.hstack([codes, factors])                  # whole numbers fall on the bins' edges
    edges = [np.histogram(column, 20)[1][:-1] for column in codes.T]
    expected = [[mutual_info_score(y, np.digitize(z, e)) for y in factors.T]
                for z, e in zip(codes.T, edges)]
    np.testing.assert_allclose(mutual_information(codes, factors), expected, atol=1e-12)


def test_correlation_agrees_with_scipy():
    from scipy.stats import spearmanr
    codes, factors = noisy_code()
    expected = [[abs(spearmanr(z, y).statistic) for y in factors.T] for z in codes.T]
    np.testing.assert_allclose(correlation(codes, factors), expected, atol=1e-12)


def test_dci_agrees_with_one_classifier_per_factor():
    from sklearn.ensemble import GradientBoostingClassifier
    codes, factors = noisy_code(150)
    order = np.random.default_rng(3).permutation(150)
    train, test = order[:100], order[100:]
    fits = [GradientBoostingClassifier(random_state=3).fit(codes[train], y[train])
            for y in factors.T]
    expected = dci_of_importance(np.stack([fit.feature_importances_ for fit in fits], axis=1))
    scores = dci(codes, factors, seed=3)
    assert scores["disentanglement"] == pytest.approx(expected["disentanglement"])
    assert scores["completeness"] == pytest.approx(expected["completeness"])
    assert scores["informativeness"] == pytest.approx(
        np.mean([fit.score(codes[test], y[test]) for fit, y in zip(fits, factors.T)]))


# ---- invariances and known limits ----

@pytest.mark.parametrize("score", SCORES)
def test_order_sign_scale_and_container_do_not_matter(score):
    codes, factors = noisy_code()
    value = score(codes, factors)
    changed = codes[:, [3, 1, 0, 4, 2]] * [2, -3, 0.5, -1, 1e6] + [5, 0, -7, 1, 100]
    assert score(changed, factors) == pytest.approx(value, abs=1e-6)
    assert score(codes, factors[:, [2, 0, 1]]) == pytest.approx(value)
    rows = np.random.default_rng(0).permutation(len(codes))
    assert score(codes[rows], factors[rows]) == pytest.approx(value)
    tensor = torch.tensor(codes, requires_grad=True)
    assert score(tensor, torch.tensor(factors)) == pytest.approx(value)


def test_mcc_ignores_monotone_transforms():
    codes, factors = noisy_code()
    changed = np.stack([np.exp(z) if i % 2 else -z ** 3 for i, z in enumerate(codes.T)], axis=1)
    assert mcc(changed, factors) == pytest.approx(mcc(codes, factors))


def test_noise_scores_its_floor():
    rng = np.random.default_rng(0)
    factors = np.stack([rng.integers(0, s, 10000) for s in (10, 10, 10, 8, 4, 15)], axis=1)
    noise = rng.normal(size=(10000, 10))
    assert mig(noise, factors) < 0.001
    assert mcc(noise, factors) < 0.03
    assert modularity(noise, factors) == pytest.approx(0.65, abs=0.06)      # not 0: a ratio
    bias = 19 * (np.array([10, 10, 10, 8, 4, 15]) - 1) / 20000              # if every bin is full
    assert (mutual_information(noise, factors).mean(axis=0) < 1.05 * bias).all()


def test_perfect_code_is_perfect_for_every_metric():
    factors = grid((3, 4, 5), 10)
    order = np.random.default_rng(0).permutation(len(factors))
    codes, factors = factors[order].astype(float), factors[order]
    assert [score(codes, factors) for score in SCORES] == pytest.approx([1, 1, 1])
    assert dci(codes, factors) == pytest.approx(
        {"disentanglement": 1, "completeness": 1, "informativeness": 1}, abs=1e-6)


def test_cyclic_factor_keeps_mig_but_not_mcc():
    factors = grid((10, 10), 5)
    codes = np.stack([np.abs(factors[:, 0] - 4.4), factors[:, 1]], axis=1)
    assert mig(codes, factors) > 0.9
    assert mcc(codes, factors) < 0.8


# ---- ill cases ----

@pytest.mark.parametrize("dead", [0.0, 0.5, 7e7])
def test_dead_latent_adds_nothing(perfect, dead):
    codes, factors = perfect
    codes[:, 2] = dead
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [score(codes[:, [2, 0, 1]], factors) for score in SCORES] == pytest.approx(
            [1, 1, 2 / 3])
        assert correlation(codes, factors)[2].tolist() == [0, 0]


def test_all_latents_dead(perfect):
    factors = perfect[1]
    assert [score(np.ones((100, 3)), factors) for score in SCORES] == [0, 0, 0]
    assert dci(np.ones((100, 3)), factors)["disentanglement"] == 0


def test_near_constant_float32_column(perfect):
    codes, factors = perfect
    codes[:, 2] = 0.5 + 1e-7 * np.random.default_rng(0).normal(size=100)
    assert np.isfinite([score(codes, factors) for score in SCORES]).all()
    assert np.isfinite(mutual_information(codes.astype(np.float64) * 1e-300, factors)).all()


def test_constant_factor_is_left_out_and_named(perfect):
    codes, factors = perfect
    factors = np.insert(factors, 1, 9, axis=1)
    with pytest.warns(UserWarning, match="factor 1 is constant"):
        assert mig_per_factor(codes, factors) == pytest.approx([1, np.nan, 1], nan_ok=True)
    for score, value in zip(SCORES, (1, 1, 2 / 3)):
        with pytest.warns(UserWarning, match="factor 1 is constant"):
            assert score(codes, factors) == pytest.approx(value)
    with pytest.warns(UserWarning, match="factor 1 is constant"):
        assert dci(codes, factors)["disentanglement"] > 0.9


@pytest.mark.filterwarnings("ignore:factor")
@pytest.mark.parametrize("score, name", [(mig, "MIG"), (mcc, "MCC"), (modularity, "modularity")])
def test_no_factor_varies(score, name):
    with pytest.warns(UserWarning, match=f"{name} is undefined"):
        assert np.isnan(score(np.arange(10.)[:, None], np.ones((10, 2), int)))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dci_when_no_factor_varies():
    with pytest.warns(UserWarning, match="informativeness is undefined"):
        assert np.isnan(list(dci(np.ones((9, 2)), np.ones((9, 2), int)).values())).all()


def test_one_factor(perfect):
    codes, factors = perfect
    assert (mig(codes, factors[:, :1]), mcc(codes, factors[:, :1])) == pytest.approx((1, 1))
    with pytest.warns(UserWarning, match="modularity is undefined"):
        assert np.isnan(modularity(codes, factors[:, :1]))
    with pytest.warns(UserWarning, match="disentanglement is undefined"):
        scores = dci(codes, factors[:, :1])
    assert np.isnan(scores["disentanglement"]) and scores["completeness"] > 0.99


def test_one_latent_has_no_completeness(perfect):
    codes, factors = perfect
    with pytest.warns(UserWarning, match="completeness is undefined"):
        scores = dci(codes[:, :1], factors)
    assert np.isnan(scores["completeness"]) and np.isfinite(scores["disentanglement"])


@pytest.mark.parametrize("codes, factors, message", [
    (np.full((9, 2), np.nan), np.ones((9, 2)), "codes hold NaN, inf"),
    (np.array([[0, 1], [0, 1e200]]), np.ones((2, 2)), "beyond 1e150"),         # squares overflow
    (np.array([[0, 1], [0, np.inf]]), np.ones((2, 2)), "codes hold NaN, inf"),
    (np.ones((9, 2)), np.full((9, 2), np.nan), "factors hold NaN, inf"),
    (np.ones((0, 2)), np.ones((0, 2)), "codes must be numbers"),
    (np.ones((9, 0)), np.ones((9, 2)), "codes must be numbers"),
    (np.ones((9, 2)), np.ones(9), "factors must be numbers"),
    (np.ones((9, 2)), np.full((9, 2), "red"), "factors must be numbers"),
    (np.ones((9, 2)), np.ones((8, 2)), "9 rows of codes, but 8 of factors"),
    (np.ones((1, 2)), np.ones((1, 2)), "2 rows or more"),
])
def test_bad_input_is_one_clear_line(codes, factors, message):
    for score in (mutual_information, mig_per_factor, *SCORES, dci):
        with pytest.raises(ValueError, match=message) as error:
            score(codes, factors)
        assert "\n" not in str(error.value)


# ---- factors that are numbers ----

NUMBERS = np.random.default_rng(0).uniform(-1, 1, (2000, 3))


def test_metrics_of_numbers_are_those_of_a_perfect_code():
    for score, least in ((mig, 0.95), (modularity, 0.99), (mcc, 1 - 1e-9)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert score(NUMBERS, NUMBERS) > least
        assert bool(told) == (score is not mcc)
        assert all("is a number" in str(warning.message) for warning in told)


@pytest.mark.filterwarnings("ignore:factor")
def test_numbers_are_binned_as_asked():
    """Into n_bins equal bins: then the metrics are those of the bins themselves."""
    bins = np.floor((NUMBERS - NUMBERS.min(axis=0)) / np.ptp(NUMBERS, axis=0) * 8).clip(max=7)
    codes = NUMBERS + np.random.default_rng(1).normal(0, 0.2, NUMBERS.shape)
    assert mig(codes, NUMBERS, n_bins=8) == pytest.approx(mig(codes, bins, n_bins=8))
    assert modularity(codes, NUMBERS, n_bins=8) == pytest.approx(modularity(codes, bins, n_bins=8))


@pytest.mark.filterwarnings("ignore:factor")
def test_dci_of_numbers_ends():
    scores = dci(NUMBERS[:300], NUMBERS[:300], n_bins=4)
    assert scores["disentanglement"] > 0.9 and scores["informativeness"] > 0.9


def test_classes_are_never_binned():
    """Forty values in 200 rows, or few values in few rows."""
    for factors in (np.arange(200)[:, None] % 40, np.arange(15)[:, None]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mig(factors, factors)


def test_a_factor_of_more_than_256_values_is_a_number_however_many_rows_there_are():
    factors = np.arange(3000)[:, None] % np.array([256, 300])
    with pytest.warns(UserWarning, match="factor 1 is a number") as told:
        mig(factors, factors)
    assert not any("factor 0" in str(warning.message) for warning in told)
