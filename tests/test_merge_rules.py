"""Merge rules beside the default: what a rule gets, which options it takes, and what is refused."""

from dataclasses import dataclass

import pytest
import torch
from networks import TiedWeights

from pl_personalize import merge, merge_prefixes
from pl_personalize.artifacts import TensorFile, save_tensors
from pl_personalize.merging import MERGE_RULES, MergeRule
from pl_personalize.registry import Registry


@dataclass(frozen=True)
class ArithmeticOptions:
    scale: float = 1.0

    def __post_init__(self):
        if self.scale <= 0:
            raise ValueError(f"scale must be positive; got {self.scale}.")


def task_arithmetic(inputs, options):
    vectors = [weight * (theta - inputs.base) for theta, weight in zip(inputs.parameters, inputs.weights, strict=True)]
    return inputs.base + options.scale * sum(vectors)


def most_important(inputs, options):
    best = torch.stack(inputs.importances).argmax(0, keepdim=True)
    return torch.stack(inputs.parameters).gather(0, best)[0]


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    added = [
        MergeRule("arithmetic", "Ilharco et al., ICLR 2023", task_arithmetic, ArithmeticOptions, True, False),
        MergeRule("most_important", "none", most_important),
        MergeRule("smaller", "none", lambda inputs, options: inputs.parameters[0][:1]),
    ]
    monkeypatch.setattr("pl_personalize.merging.MERGE_RULES", Registry("merge rule", [*MERGE_RULES.values(), *added]))


BASE = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(0)}
EXPERTS = [{"w": torch.tensor([float(k), 4.0]), "n": torch.tensor(k)} for k in (2, 3, 5)]
OMEGAS = [{"w": torch.tensor(row)} for row in ([3.0, 4.0], [4.0, 0.0], [0.0, 2.0])]


def test_a_rule_reads_the_base_the_weights_and_its_options():
    merged = merge(EXPERTS, rule="arithmetic", base=BASE, weights=[1, 2, 0.5], scale=0.5)

    assert merged["w"].tolist() == [1 + 0.5 * (1 + 2 * 2 + 0.5 * 4), 2 + 0.5 * (2 + 4 + 1)]
    assert merged["n"].item() == 5


@pytest.mark.parametrize("normalize", [None, "sum", "max", "layer"])
def test_a_rule_gets_normalized_importances(normalize):
    omegas = [{"w": omega["w"] * scale} for omega, scale in zip(OMEGAS, (1e3, 1, 1), strict=True)]

    merged = merge(EXPERTS, omegas if normalize else OMEGAS, rule="most_important", normalize=normalize)

    assert merged["w"].tolist() == [3.0, 4.0]
    if normalize is None:
        assert merge(EXPERTS, omegas, rule="most_important")["w"].tolist() == [2.0, 4.0]


def test_prefixes_are_merges_of_the_first_experts_and_begin_with_the_first():
    prefixes = merge_prefixes(EXPERTS, rule="arithmetic", base=BASE, scale=2.0)

    assert torch.equal(prefixes[0]["w"], EXPERTS[0]["w"])
    for t in (2, 3):
        assert torch.equal(prefixes[t - 1]["w"], merge(EXPERTS[:t], rule="arithmetic", base=BASE, scale=2.0)["w"])
    assert [prefix["n"].item() for prefix in prefixes] == [2, 3, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_rule_computes_in_float32_at_least_and_keeps_the_type(dtype):
    """In half precision, rounding adds up over many experts."""
    thetas = torch.rand(300, generator=torch.Generator().manual_seed(0)).to(dtype)
    experts = [{"w": theta.view(1)} for theta in thetas]

    merged = merge(experts, rule="arithmetic", base={"w": torch.zeros(1, dtype=dtype)}, scale=1 / 300)["w"]

    assert merged.dtype == dtype
    torch.testing.assert_close(merged, thetas.double().mean().view(1).to(dtype), rtol=2e-6, atol=0)


def test_out_may_be_an_expert_and_ties_stay(tmp_path):
    experts = [{"w": expert["w"].clone()} for expert in EXPERTS]
    merged = merge(experts, rule="arithmetic", base=BASE, out=experts[1])
    assert merged["w"] is experts[1]["w"]
    assert merged["w"].tolist() == [8.0, 8.0]

    tied = [TiedWeights().state_dict() for _ in range(3)]
    base = TensorFile(save_tensors(tmp_path / "base", tied[0], kind="expert"), kind="expert")
    merged = merge(tied[1:], rule="arithmetic", base=base)
    assert merged["a.weight"] is merged["b.weight"]
    torch.testing.assert_close(merged["b.weight"], tied[1]["a.weight"] + tied[2]["a.weight"] - tied[0]["a.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "arithmetics", "base": BASE}, "Unknown merge rule 'arithmetics'; did you mean 'arithmetic'"),
        ({"rule": "arithmetic"}, "'arithmetic' needs base="),
        ({"rule": "smaller"}, r"'smaller' returned a tensor of shape \(1,\); expected \(2,\)"),
        ({"base": BASE}, "'weighted' does not use base"),
        ({"rule": "arithmetic", "base": BASE, "importances": OMEGAS}, "'arithmetic' does not use importances"),
        ({"rule": "arithmetic", "base": BASE, "zero": "mean"}, "has no option zero; its options: scale"),
        ({"rule": "most_important", "importances": OMEGAS, "zero": "mean"}, "has no option zero; its options: none"),
        ({"rule": "arithmetic", "base": BASE, "scale": 0}, "scale must be positive; got 0"),
        ({"rule": "arithmetic", "base": {"v": BASE["w"]}}, "base has no entries w; it has v"),
        ({"rule": "arithmetic", "base": {"m.w": BASE["w"]}}, "base has no entries w.*With the prefix 'm.'"),
        (
            {"rule": "arithmetic", "base": {"w": torch.ones(3)}},
            r"'w' is torch.float32 \(3,\) in base and torch.float32 \(2,\) in expert 3",
        ),
        ({"rule": "arithmetic", "base": {"w": [1.0]}}, "'w' is a list in base"),
        ({"rule": "arithmetic", "base": {"w": torch.tensor([torch.nan, 1])}}, "parameter 'w' .* NaN or infinite"),
    ],
)
@pytest.mark.parametrize("merger", [merge, merge_prefixes])
def test_what_a_rule_does_not_take_is_refused(merger, options, message):
    with pytest.raises(ValueError, match=message):
        merger(EXPERTS, **options)
