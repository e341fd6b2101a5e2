import pytest
from omegaconf import OmegaConf

from detectron2_nats import NATSError, SearchSpace
from detectron2_nats.method.search_space import PAPER_SETS, check_dilation

S3 = ((1, 1), (2, 2), (3, 3))
S5 = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5))


@pytest.mark.parametrize(
    "name, early, res5",
    [
        ("A", ((1, 1), (3, 3)), ((1, 1), (3, 3), (5, 5))),
        ("B", S3, S5),
        ("C", S3 + ((1, 3), (3, 1)), S5 + ((1, 3), (3, 1), (1, 5), (5, 1))),
    ],
)
def test_paper_sets(name, early, res5):
    space = SearchSpace(name)
    assert space.genotypes == {"res3.*": early, "res4.*": early, "res5.*": res5}
    others = SearchSpace(name, ["res2.0.*", "fpn*", "*"])
    assert others.genotypes == {"res2.0.*": early, "fpn*": res5, "*": res5}


def test_defaults_are_the_papers():
    space = SearchSpace()
    assert space.convs == ("res3.*", "res4.*", "res5.*")
    assert (space.num_groups, space.channels_per_group) == (16, None)
    assert space.share_weights is False


def test_every_set_begins_with_the_plain_conv():
    assert all(pairs[0] == (1, 1) for s in PAPER_SETS.values() for pairs in s.values())


def test_custom_lists_follow_the_patterns():
    space = SearchSpace([[[1, 1], [5, 5]], ((1, 1), (1, 2), (2, 1))], ["res5.*", "fpn*"])
    assert space.genotypes == {"res5.*": ((1, 1), (5, 5)), "fpn*": ((1, 1), (1, 2), (2, 1))}


def test_lazy_config_lists():
    content = OmegaConf.create({"space": [[[1, 1], [3, 1]]], "convs": ["res4.*"]})
    space = SearchSpace(content.space, content.convs)
    assert space.convs == ("res4.*",) and space.genotypes == {"res4.*": ((1, 1), (3, 1))}


@pytest.mark.parametrize("space", ["D", "c", "", "A,B"])
def test_unknown_set(space):
    with pytest.raises(NATSError, match="unknown SPACE '.*': expected one of A, B, C, or a list"):
        SearchSpace(space)


MALFORMED = [[True, 1], [1, False], [1.0, 1], [1, 2.5], [0, 1], [1, -3], [1, 65], [1, 10**30]]
MALFORMED += [[1, 10**5000], [1, 1, 1], [1], [], [[1, 1], 1], ["1", 1]]
MALFORMED += [3, "11", None, {1: 1, 2: 2}]


@pytest.mark.parametrize("value", MALFORMED)
def test_malformed_dilation(value):
    with pytest.raises(NATSError, match="malformed dilation .*from 1 to 64") as caught:
        check_dilation(value)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    with pytest.raises(NATSError, match="malformed dilation"):
        SearchSpace([[[1, 1], value]], ["res3.*"])


def test_dilation_limits():
    assert check_dilation([1, 64]) == (1, 64)
    assert check_dilation((64, 1)) == (64, 1)


@pytest.mark.parametrize(
    "space, message",
    [
        ([[[1, 1]]], r"expected one list of dilation pairs for each of \['res3.\*', 'res4.\*', "),
        (5, "SPACE 5: expected one list"),
        (None, "SPACE None: expected one list"),
        ([[], [], []], r"SPACE of res3.*: \[\]: expected a list of dilation pairs"),
        ([[[1, 1]], 7, [[1, 1]]], "SPACE of res4.\\*: 7: expected a list of dilation pairs"),
        ([[[1, 1]], [[3, 3], [1, 1]], [[1, 1]]], r"SPACE of res4.\*: .* begins with \(1, 1\)"),
        (
            [[[1, 1]], [[1, 1]], [[1, 1], [2, 2], [2, 2]]],
            "SPACE of res5.\\*: .* each once",
        ),
    ],
)
def test_malformed_custom_space(space, message):
    with pytest.raises(NATSError, match=message):
        SearchSpace(space)


@pytest.mark.parametrize("convs", [[], ["res3", "res3"], "res3.*", [["res3"]], [3], 3, [""]])
def test_bad_patterns(convs):
    with pytest.raises(NATSError, match="CONVS .*: expected a list of patterns of names"):
        SearchSpace(convs=convs)


def test_both_group_keys():
    with pytest.raises(NATSError, match=r"both NUM_GROUPS \(8\) and CHANNELS_PER_GROUP \(32\)"):
        SearchSpace(num_groups=8, channels_per_group=32)


@pytest.mark.parametrize("key", ["num_groups", "channels_per_group"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4"])
def test_bad_number_of_groups(key, value):
    with pytest.raises(NATSError, match=f"{key.upper()} .*: expected a whole number of at least 1"):
        SearchSpace(**{key: value})


def test_groups_of():
    assert SearchSpace().groups_of("res3.0.conv2", 128) == 16
    assert SearchSpace(num_groups=1).groups_of("res3.0.conv2", 128, conv_groups=32) == 1
    per_group = SearchSpace(channels_per_group=32)
    assert [per_group.groups_of("res4.0.conv2", c) for c in (32, 128, 512)] == [1, 4, 16]
    # X101-32x4d: conv groups of 4, 8 and 16 channels are held whole by groups of 32
    assert [per_group.groups_of("res4.0.conv2", c, 32) for c in (128, 256, 512)] == [4, 8, 16]


@pytest.mark.parametrize("value", [3, 128])
@pytest.mark.parametrize("key", ["num_groups", "channels_per_group"])
def test_groups_must_divide_the_channels(key, value):
    message = f"{key.upper()} {value} does not fit res4.1.conv2: choose a divisor of its 64 chan"
    with pytest.raises(NATSError, match=message):
        SearchSpace(**{key: value}).groups_of("res4.1.conv2", 64)


@pytest.mark.parametrize("kwargs", [{"num_groups": 16}, {"channels_per_group": 4}])
def test_groups_must_hold_whole_conv_groups(kwargs):
    with pytest.raises(NATSError, match="of its 64 channels that keeps its 8 conv groups whole"):
        SearchSpace(**kwargs).groups_of("res3.0.conv2", 64, conv_groups=8)
