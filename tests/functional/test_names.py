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
