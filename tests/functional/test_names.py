import pytest

from pl_personalize.functional.names import prefix_hint, some


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "none"),
        (["a"], "a"),
        (["a", "b", "c", "d", "e"], "a, b, c, d, e"),
        (iter("abcdefg"), "a, b, c, d, e and 2 more"),
    ],
)
def test_the_first_names_are_shown(names, text):
    assert some(names) == text


@pytest.mark.parametrize(
    ("names", "known", "hint"),
    [
        (["module.a.w", "module.b.w"], ["b.w", "a.w", "c.w"], " Without the prefix 'module.' the names would match."),
        (["x.y.a.w"], ["a.w", "w"], " Without the prefix 'x.y.' the names would match."),
        (["a.w", "b.w"], ["head.w", "body.b.w", "body.a.w"], " With the prefix 'body.' the names would match."),
        (["module.a.w", "module.d.w"], ["a.w", "b.w"], ""),  # one would still be unknown
        (["module.a.w", "model.b.w"], ["a.w", "b.w"], ""),
        (["w"], ["a.w", "b.w"], ""),  # which?
        (["xa.w"], ["a.w"], ""),  # a part of a name is no prefix
        (["a.w"], ["xa.w"], ""),
        (["a.w"], ["a.w"], ""),
        ([], ["a.w"], ""),
        (["a.w"], [], ""),
    ],
)
def test_a_prefix_is_hinted_at_if_it_is_all_that_differs(names, known, hint):
    assert prefix_hint(names, known) == hint


@pytest.mark.parametrize(
    ("longer", "shorter", "part"),
    [
        (["q.lora_A.default.weight", "q.lora_B.default.weight"], ["q.lora_B.weight", "q.lora_A.weight"], ".default"),
        (["net._orig_mod.0.weight"], ["net.0.weight", "net.1.weight"], "._orig_mod"),
        (["a._orig_mod.b._orig_mod.w"], ["a.b.w"], "._orig_mod"),
        (["a.x.y.w"], ["a.w"], ".x.y"),
        (["a.x.w", "b.y.w"], ["a.w", "b.w"], ""),
        (["a.x.w", "b.x.w"], ["a.w", "c.w"], ""),
        (["a.x.w", "a.y.w"], ["a.w"], ""),
        (["a.xx.w"], ["a.x.w"], ""),
        (["a.w.x"], ["a.w"], ""),  # at the end
    ],
)
def test_a_part_in_the_middle_is_hinted_at(longer, shorter, part):
    assert prefix_hint(longer, shorter) == (f" Without '{part}' the names would match." if part else "")
    if part and len(longer) == len(shorter):
        assert prefix_hint(shorter, longer) == f" With '{part}' the names would match."


def test_of_several_parts_that_could_be_lacking_none_is_named():
    assert prefix_hint(["a.w"], ["a.0.w", "a.1.w"]) == ""
    assert prefix_hint(["a.w"], ["a.0.w", "b.1.w"]) == " With '.0' the names would match."
