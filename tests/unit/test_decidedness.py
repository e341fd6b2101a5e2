"""How decided a search is, by hand."""

import numpy as np
import pytest

from detectron2_nats.method.decidedness import Decidedness, all_votes

# softmax of log p is p
SURE = np.log([[0.98, 0.01, 0.01], [0.01, 0.01, 0.98]])
TORN = np.log([[0.30, 0.34, 0.36], [0.34, 0.33, 0.33]])


def test_by_hand():
    found = Decidedness.of({"a": np.zeros((4, 5)), "b": np.zeros((2, 9))})
    assert found.entropy == pytest.approx(1) and found.leading == 0 and found.changed is None
    found = Decidedness.of({"a": np.log([[0.5, 0.25, 0.25]])})
    assert found.entropy == pytest.approx(1.5 * np.log(2) / np.log(3))
    assert found.leading == 1
    # two groups of four lead by more than 0.1
    assert Decidedness.of({"a": SURE, "b": TORN}).leading == 0.5
    # one genotype: nothing to choose
    found = Decidedness.of({"a": np.zeros((4, 1))})
    assert found.entropy == 0 and found.leading == 1


def test_votes_that_changed_in_the_last_tenth():
    before = all_votes({"a": SURE, "b": TORN})
    assert before == {"a": [0, 2], "b": [2, 0]}
    now = {"a": SURE[::-1].copy(), "b": TORN}
    assert Decidedness.of(now, before).changed == 0.5
    assert Decidedness.of(now, {}).changed is None


@pytest.mark.parametrize(
    "leading, changed, words, decided",
    [
        (0.9, 0.0, "decided: most groups", True),
        (0.9, None, "decided: most groups", True),
        (0.9, 0.2, "not settled", False),
        (0.5, 0.0, "undecided, 50% of the groups have a clear favourite", False),
    ],
)
def test_verdict(leading, changed, words, decided):
    found = Decidedness(0.7, leading, changed)
    assert found.decided is decided and found.verdict().startswith(words)
    assert decided or "SEARCH.ALPHA_LR" in found.verdict()
    assert found.summary()["verdict"] == found.verdict()
    assert ("changed" in found.summary()) == (changed is not None)
