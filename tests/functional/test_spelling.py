import unicodedata

import pytest

from pl_personalize.functional.spelling import hint, trimmed, written_otherwise


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", "\u3000", "\u2003", "\u200b", "\ufeff", "\r\n", " \u00a0 "])
def test_blanks_around_a_name_do_not_count(blank):
    assert trimmed(f"{blank}living room{blank}") == "living room"
    assert trimmed(blank) == ""


@pytest.mark.parametrize(
    "written", ["Living room", "livingroom", "living\u00a0room", "LIVING  ROOM", " living room ", "living\u200broom"]
)
def test_a_name_that_is_written_otherwise_is_found(written):
    assert written_otherwise(written, ["attic", "living room"]) == "living room"
    assert hint(written, ["attic", "living room"]) == ", where it is 'living room'"


def test_slashes_and_unicode_forms_are_ways_of_writing():
    assert written_otherwise("gym\\a.png", ["gym/a.png"]) == "gym/a.png"
    assert written_otherwise("K\u00fcche", [unicodedata.normalize("NFD", "K\u00fcche")]) is not None


@pytest.mark.parametrize("name", ["living room", "living", "living room 2", ""])
def test_other_names_and_the_name_itself_are_not(name):
    assert written_otherwise(name, ["attic", "living room"]) is None
    assert hint(name, ["attic", "living room"]) == ""
