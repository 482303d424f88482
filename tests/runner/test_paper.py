import pytest

from pl_personalize.runner import paper_results
from pl_personalize.runner.paper import PaperResult


def test_numbers_has_its_four_rows():
    assert paper_results("Numbers", "MLP") == {
        "MAS-RACL": PaperResult(84.01, -0.22),
        "FIM-RACL": PaperResult(87.83, 0.30),
        "MAS-IMM": PaperResult(84.36, -0.40),
        "FIM-IMM": PaperResult(87.68, 0.07),
    }


@pytest.mark.parametrize(("adaptation", "expected"), [("BN", 75.75), ("AdaBN", 72.13), ("AdaBN-S", 76.39)])
def test_joint_has_no_forgetting(adaptation, expected):
    assert paper_results("CatPrior", "VGG11-BN", adaptation)["Joint"] == PaperResult(expected, None)


def test_what_the_paper_left_out_is_not_there():
    assert "Task Experts" in paper_results("CatPrior", "VGG11-BN", "BN")
    assert "Task Experts" not in paper_results("CatPrior", "VGG11-BN", "AdaBN")
    assert paper_results("Numbers", "AlexNet") == {}
