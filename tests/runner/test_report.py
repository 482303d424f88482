"""The report: who is harmed by an adaptation, and which shifts were found."""

from tiny_benchmark import Tiny, call, matrix

from pl_personalize.runner.results import markdown_table


def test_harm_and_shifts_are_counted(tmp_path):
    users, options = ("ann", "bob", "cat"), {"methods": ["mean-IMM", "Experts"], "seeds": [1, 2]}
    call(tmp_path, data=Tiny(users, images=40), adaptations=["none", "refit", "refit+auto"], **options)

    def final(seed, method, adaptation, user):
        label = f"{method}+{adaptation}" if adaptation else method
        found = matrix(tmp_path, f"experts/seed{seed}/test/{label}/{user}")
        return [found[t][t] for t in (0, 1)] if method == "Experts" else found[-1]

    lines = [["harmed", "refit", "refit+auto"]]
    for method in ("mean-IMM", "Experts"):
        lines.append([method])
        for adaptation in ("refit", "refit+auto"):
            lost = [
                before - after
                for seed in (1, 2)
                for user in users
                for before, after in zip(
                    final(seed, method, "", user), final(seed, method, adaptation, user), strict=True
                )
            ]
            lines[-1].append(f"{sum(value > 0.011 for value in lost)}/{len(lost)}")
    assert len(lost) == 12
    text = (tmp_path / "results.md").read_text()
    assert f"more than a point against 'none':\n\n{markdown_table(lines)}" in text
    found = text.split("Shifts found, in number of users of all seeds:\n\n")[1].split("\n\n")[0].splitlines()
    assert found[0].split() == ["|", "shift", "found", "|", "none", "|", "label", "|", "covariate", "|", "both", "|"]
    assert [sum(map(int, line.split("|")[2:-1])) for line in found[2:]] == [6, 6]


def test_without_adaptations_there_are_no_such_tables(tmp_path):
    call(tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "more than a point" not in text
    assert "Shifts found" not in text
