"""Adaptations by name: sequences, options, and what a sequence says of its steps."""

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import plain, with_norm

from pl_personalize.adaptations import ADAPTATIONS, Adaptation, find_adaptation
from pl_personalize.adaptations.fine_tune import FineTune
from pl_personalize.adaptations.reestimated_statistics import AdaBNSupervised, Recalibrate


def test_the_adaptations_of_the_package():
    names = ["none", "last", "average", "expert", "reference", "recalibrate", "AdaBN", "early-AdaBN", "AdaBN-S", "FT"]
    names += [
        "learned",
        "refit",
        "priors",
        "bbse",
        "standardize",
        "tested-AdaBN",
        "auto",
        "true-priors",
        "true-moments",
        "true-both",
    ]
    assert list(ADAPTATIONS) == names
    for name, kind in ADAPTATIONS.items():
        sequence = find_adaptation(name)
        assert sequence.steps == (kind(),)
        assert (sequence.name, sequence.text) == (name, kind.text)


def test_a_sequence_is_made_of_its_steps():
    sequence = find_adaptation("recalibrate+FT")
    assert sequence.steps == (Recalibrate(), FineTune())
    assert sequence.name == "recalibrate+FT"
    assert sequence.text == f"{Recalibrate.text}, then {FineTune.text}"


@pytest.mark.parametrize("place", ["{}", "AdaBN+{}", "{}+AdaBN"])
@pytest.mark.parametrize(
    ("name", "hint"), [("adabn", "; did you mean 'AdaBN'[?]"), ("something", r"\."), ("", r"\."), ("adapt", "")]
)
def test_unknown_names_are_refused(place, name, hint):
    with pytest.raises(MisconfigurationException, match=f"Unknown adaptation {name!r}{hint}"):
        find_adaptation(place.format(name))


def test_options_go_to_every_step_that_has_them():
    options = {"exact": True, "epochs": 3, "lr": 0.5}
    assert find_adaptation("AdaBN-S+recalibrate+FT", options).steps == (
        AdaBNSupervised(exact=True, epochs=3, lr=0.5),
        Recalibrate(exact=True),
        FineTune(epochs=3, lr=0.5),
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("AdaBN", {"exakt": True}, "'AdaBN' has no option exakt; it has exact, max_scratch_mb, prior_samples"),
        ("last", {"exact": True}, "'last' has no option exact; it has none"),
        ("AdaBN", {"prior_samples": -1}, "AdaBN: prior_samples must be 0 or more"),
        ("recalibrate", {"max_scratch_mb": 0}, "recalibrate: max_scratch_mb must be positive"),
        ("AdaBN-S", {"epochs": 0}, "AdaBN-S: epochs must be 1 or more; got 0"),
        ("AdaBN-S", {"lr": 0.0}, r"AdaBN-S: lr must be positive; got 0\.0"),
        ("FT", {"epochs": 0}, "FT: epochs must be 1 or more; got 0"),
        ("FT", {"lr": float("inf")}, "FT: lr must be positive; got inf"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        find_adaptation(name, options)


@pytest.mark.parametrize(
    ("name", "true_of_it"),
    [
        ("none", set()),
        ("last+recalibrate", set()),
        ("average", {"merges_only"}),
        ("recalibrate+reference", {"merges_only", "needs_earlier_models"}),
        ("recalibrate+AdaBN", {"personal"}),
        ("expert+FT", {"merges_only", "personal", "trains"}),
    ],
)
def test_what_is_true_of_a_step_is_true_of_the_sequence(name, true_of_it):
    sequence = find_adaptation(name)
    flags = {"merges_only", "needs_earlier_models", "personal", "trains"}
    assert {flag for flag in flags if getattr(sequence, flag)} == true_of_it


def test_a_sequence_says_which_step_does_not_apply():
    for name in ("last", "average", "expert", "reference", "recalibrate", "AdaBN", "early-AdaBN", "AdaBN-S"):
        assert find_adaptation(f"FT+{name}").why_not(plain(2)) == f"'{name}' needs a network with batch norm"
        assert find_adaptation(f"FT+{name}").why_not(with_norm(2)) is None
    assert find_adaptation("FT").why_not(plain(2)) is None


def test_an_adaptation_must_say_what_it_replaces():
    class Incomplete(Adaptation):
        name, text = "incomplete", "nothing"

    with pytest.raises(TypeError, match="abstract method"):
        Incomplete()
