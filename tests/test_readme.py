"""The code in README.md and docs/ runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from reference import naive_importance, relative_error
from torch import nn

from pl_personalize import estimate_importance
from pl_personalize.adaptations import ADAPTATIONS
from pl_personalize.functional.importance_kinds import IMPORTANCE_KINDS
from pl_personalize.merging import MERGE_RULES
from pl_personalize.methods import METHODS
from pl_personalize.per_sample import layer_rules
from pl_personalize.registry import Registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(page: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


@pytest.mark.skipif(not PAGES[0].exists(), reason="README.md is not beside the tests (they run against a wheel)")
@pytest.mark.parametrize("page", [page for page in PAGES if page.exists() and code_blocks(page)], ids=lambda p: p.name)
def test_the_code_runs(page, tmp_path, monkeypatch, global_state):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONSOLE", "off")  # its service writes the console's log relative to its own folder
    monkeypatch.setattr(layer_rules, "_RULES", dict(layer_rules._RULES))
    names: dict[str, object] = {"__name__": "__main__"}
    registries: list[Registry] = [ADAPTATIONS, IMPORTANCE_KINDS, MERGE_RULES, METHODS]
    before = [set(registry) for registry in registries]
    try:
        exec(compile(code_blocks(page), page.name, "exec"), names)
    finally:
        for registry, known in zip(registries, before, strict=True):
            for name in set(registry) - known:
                registry.unregister(name)
    if page.name == "README.md":
        assert names["callback"].importance.num_samples == 40
        assert (tmp_path / "importances" / "user-7-task-1.safetensors").is_file()
    if page.name == "importances.md":  # the rule that it registers
        for shape in ((5, 4), (5, 3, 4), (5, 2, 3, 4)):
            network, x = nn.Sequential(nn.Linear(4, 6), names["Gain"](6), nn.Tanh()), torch.randn(shape)  # type: ignore[operator]
            assert layer_rules.find_layer_rule(network[1]) is not None
            importance = estimate_importance(network, [x], "mas")
            assert importance.routes["1.gain"] == "closed form"
            assert relative_error(importance, naive_importance(network, x, "mas")) < 1e-5


def test_links_lead_somewhere():
    for page in PAGES:
        if page.exists():
            for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
