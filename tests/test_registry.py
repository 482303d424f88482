import pytest

from pl_personalize.registry import Registry


class Entry:
    def __init__(self, name):
        self.name = name


@pytest.fixture
def registry():
    return Registry("fruit", [Entry("Apple"), Entry("pear")])


def test_entries_are_in_order_of_registration(registry):
    plum = Entry("plum")
    assert registry.register(plum) is plum
    assert (list(registry), len(registry)) == (["Apple", "pear", "plum"], 3)
    assert registry["plum"] is registry.find("plum") is plum
    assert "cherry" not in registry


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match="There is already a fruit called 'pear'"):
        registry.register(Entry("pear"))
    with pytest.raises(ValueError, match="already a fruit"):
        Registry("fruit", [Entry("a"), Entry("a")])
    assert len(registry) == 2


@pytest.mark.parametrize("name", ["", "apple+pear", "apple/pear", "apple\\pear"])
def test_a_name_must_fit_into_sequences_and_files(registry, name):
    with pytest.raises(ValueError, match="cannot be called"):
        registry.register(Entry(name))
    assert len(registry) == 2


def test_registering_is_a_decorator():
    kinds = Registry("class")

    @kinds.register
    class Named:
        name = "Named"

    assert kinds["Named"] is Named


def test_an_entry_can_be_removed(registry):
    assert registry.unregister("pear").name == "pear"
    assert list(registry) == ["Apple"]
    with pytest.raises(KeyError):
        registry.unregister("pear")


@pytest.mark.parametrize(("name", "hint"), [("apple", "; did you mean 'Apple'[?]"), ("melon", r"\."), (3, r"\.")])
def test_an_unknown_name_comes_with_the_closest_one(registry, name, hint):
    with pytest.raises(ValueError, match=f"Unknown fruit {name!r}{hint} Known: Apple, pear"):
        registry.find(name)
