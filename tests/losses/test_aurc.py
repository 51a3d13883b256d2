import pytest
import reference_auxiliary as slow
import torch
from scipy.special import digamma

from hf_adafocal.losses import aurc as ranking
from hf_adafocal.losses.aurc import SCORES, aurc, regularised_aurc, selective_au
from hf_adafocal.losses.functional import cross_entropy


def name(value):
    return value.__name__ if callable(value) else str(value)


def batch(size=14, classes=5, dtype=torch.float64):
    """Logits of a model that is right about half of the time."""
    logits = 2 * torch.randn(size, classes, dtype=dtype)
    labels = logits.argmax(1).where(torch.rand(size) < 0.4, torch.randint(classes, (size,)))
    return logits.requires_grad_(), labels


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def lists(logits, labels):
    return logits.tolist(), labels.tolist()


class TestAURC:
    @pytest.mark.parametrize("score", SCORES)
    def test_it_is_the_mean_risk_over_coverages(self, score):
        logits, labels = batch()
        expected = slow.aurc(*lists(logits, labels), score)
        assert aurc(logits, labels, score=score).item() == pytest.approx(expected)

    @pytest.mark.parametrize("size", [1, 2, 5, 256])
    def test_weights_are_those_of_the_authors_formula(self, size):
        logits, labels = batch(size=size)
        order = logits.softmax(1).amax(1).argsort()
        alphas = [digamma(size + 1) - digamma(size - rank + 1) for rank in range(1, size + 1)]
        ce = cross_entropy(logits, labels, reduction="none")[order]
        assert aurc(logits, labels).item() == pytest.approx((ce * torch.tensor(alphas)).mean().item())
        assert alphas[-1] == pytest.approx(slow.harmonic(size))

    def test_the_gradient_is_that_of_weighted_cross_entropy(self):
        logits, labels = batch()
        rank = logits.softmax(1).amax(1).argsort().argsort() + 1
        alpha = torch.tensor([slow.harmonic(14) - slow.harmonic(14 - r) for r in rank.tolist()], dtype=torch.float64)
        expected = gradient((alpha * cross_entropy(logits, labels, reduction="none")).mean(), logits)
        torch.testing.assert_close(gradient(aurc(logits, labels), logits), expected)

    @pytest.mark.parametrize("term", [aurc, regularised_aurc, selective_au])
    def test_an_unknown_score_is_an_error(self, term):
        with pytest.raises(ValueError, match="score must be one of confidence, neg_entropy.*found 'MSP'"):
            term(*batch(), score="MSP")


class TestRegularisedAURC:
    @pytest.mark.parametrize("strength", [1e-4, 0.02, 0.05, 1.0])
    def test_it_is_the_slow_formula(self, strength):
        logits, labels = batch(size=40)
        found = regularised_aurc(logits, labels, regularization_strength=strength)
        assert found.item() == pytest.approx(slow.regularised_aurc(*lists(logits, labels), strength))

    def test_almost_hard_ranks_give_the_papers_weights(self):
        logits, labels = batch()
        rank = logits.softmax(1).amax(1).argsort().argsort() + 1
        alpha = -(1 - rank / 15.0).log()
        expected = (alpha * cross_entropy(logits, labels, reduction="none")).mean()
        found = regularised_aurc(logits, labels, regularization_strength=1e-7)
        torch.testing.assert_close(found, expected)

    def test_without_the_gradient_through_ranks_the_weights_are_constants(self):
        logits, labels = batch(size=40)
        ranks = torch.tensor(slow.soft_ranks([c / 0.02 for c in logits.softmax(1).amax(1).tolist()]))
        loss = (-(1 - ranks / 41).log() * cross_entropy(logits, labels, reduction="none")).mean()
        with_gradient, without = (
            gradient(regularised_aurc(logits, labels, rank_gradient=flag), logits) for flag in (True, False)
        )
        torch.testing.assert_close(without, gradient(loss, logits))
        assert (with_gradient - without).abs().max() > 0.01

    @pytest.mark.parametrize(
        ("values", "ranks"),  # what google-research/fast-soft-sort gives, L2, ascending
        [
            ([30.0, 10.0, 20.0], [3.0, 1.0, 2.0]),
            ([3.0, 1.0, 2.0], [3.0, 1.0, 2.0]),
            ([0.3, 0.1, 0.2], [2.1, 1.9, 2.0]),
        ],
    )
    def test_soft_ranks_are_those_of_their_authors_code(self, values, ranks):
        found = ranking._soft_rank(torch.tensor(values), torch.ones(3))
        torch.testing.assert_close(found, torch.tensor(ranks))

    @pytest.mark.parametrize("size", [1, 2, 17, 200])
    @pytest.mark.parametrize("spread", [0.0, 1.0, 100.0, 1e4])
    def test_soft_ranks_are_the_projection_that_pooling_finds(self, size, spread):
        values = spread * torch.rand(size, dtype=torch.float64)
        values[: size // 3] = values[0]  # ties
        found = ranking._soft_rank(values, torch.ones(size, dtype=torch.float64))
        torch.testing.assert_close(found.tolist(), slow.soft_ranks(values.tolist()), rtol=1e-9, atol=1e-7)

    @pytest.mark.parametrize(("size", "softness", "error"), [(2000, 0.02, 5e-3), (200, 1e-4, 2e-3)])
    def test_soft_ranks_of_a_large_float32_batch_are_accurate(self, size, softness, error):
        values = torch.rand(size) / softness
        found = ranking._soft_rank(values, torch.ones(size))
        torch.testing.assert_close(found, torch.tensor(slow.soft_ranks(values.tolist())), rtol=0, atol=error)

    def test_where_float32_cannot_tell_the_ranks_they_still_lie_between_1_and_the_number_of_samples(self):
        logits, labels = batch(size=300, dtype=torch.float32)
        loss = regularised_aurc(logits, labels, regularization_strength=1e-9, rank_gradient=False)
        n = torch.arange(300)
        slopes = gradient(loss, logits)[n, labels] / (logits.softmax(1)[n, labels] - 1)  # of cross-entropy, weighted
        ranks = 301 * (1 - torch.exp(-300 * slopes))
        assert ranks.min() > 0.99 and ranks.max() < 300.01

    def test_no_softness_is_an_error(self):
        with pytest.raises(ValueError, match="regularization_strength must be above 0, found 0"):
            regularised_aurc(*batch(), regularization_strength=0)


class TestSelectiveAU:
    @pytest.mark.parametrize("score", SCORES)
    @pytest.mark.parametrize("quantile", [0.0, 0.4, 0.5, 1.0])
    def test_it_is_the_slow_formula(self, score, quantile):
        logits, labels = batch()
        rows, classes = lists(logits, labels)
        expected = slow.selective_au(rows, classes, slow.histogram(rows, 64, score), quantile, name=score)
        assert selective_au(logits, labels, quantile=quantile, score=score).item() == pytest.approx(expected)

    @pytest.mark.parametrize(("unsure", "sure"), [(29, 1), (1, 29)])
    def test_no_weight_is_beyond_those_of_the_least_and_of_the_most_certain_of_the_batch(self, unsure, sure):
        rows, classes = [[0.5, 0.0]] * unsure + [[7.0, 0.0]] * sure, [0, 1] * 15
        found = selective_au(torch.tensor(rows, dtype=torch.float64), torch.tensor(classes), quantile=1.0)
        expected = slow.selective_au(rows, classes, slow.histogram(rows), quantile=1.0)
        assert found.item() == pytest.approx(expected)

    def test_it_weighs_a_batch_by_its_own_scores_alone_however_often_it_is_called(self):
        (before, other), (logits, labels) = batch(size=30), batch()
        expected = selective_au(logits, labels)
        selective_au(before, other)
        assert selective_au(logits, labels) == expected

    @pytest.mark.parametrize("score", SCORES)
    def test_weights_grow_with_the_score_up_to_its_quantile(self, score):
        # The authors' code with its shipped configuration gives every sample one weight.
        logits, labels = batch(size=20)
        losses, weights = cross_entropy(logits, labels, reduction="none"), []
        for n in range(20):  # another label changes the sample's cross-entropy and no weight
            other = labels.clone()
            other[n] = (labels[n] + 1) % 5
            change = selective_au(logits, other, score=score) - selective_au(logits, labels, score=score)
            weights.append(20 * change / (cross_entropy(logits, other, reduction="none")[n] - losses[n]))
        order = sorted(range(20), key=lambda n: slow.score(logits[n].tolist(), score))
        ranked = torch.stack(weights)[order].detach()
        assert (ranked[:10].diff() > 0).all()
        torch.testing.assert_close(ranked[10:], ranked[10].expand(10))

    def test_the_authors_constant_comes_from_a_score_of_one_for_all(self):
        ones = torch.tensor([[200.0, 0.0]] * 8)  # every confidence 1
        wrong = torch.ones(8, dtype=torch.long)
        assert selective_au(ones, wrong).item() / 200 == pytest.approx(0.774321, abs=1e-6)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"quantile": 1.5}, r"quantile must lie in \[0, 1\], found 1.5"),
            ({"sigma": 0}, "sigma must be a finite number above 0"),
            ({"num_bins": 0}, "num_bins must be at least 1"),
        ],
        ids=str,
    )
    def test_settings_that_make_no_sense_are_an_error(self, settings, message):
        with pytest.raises(ValueError, match=message):
            selective_au(*batch(), **settings)
