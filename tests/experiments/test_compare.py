from scripts import EXPERIMENTS, refusal, run_script

from pl_personalize.runner.results import ResultRow, write_csv

REFERENCE = EXPERIMENTS / "reference" / "numbers_meter_digits_published_code.csv"


def table(path, accuracies):
    rows = [
        ResultRow("Numbers", "MLP", method, "none", "all", seed, accuracy, 0.5)
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values, 1)
    ]
    return write_csv(path, rows)


def test_each_method_gets_its_verdict(tmp_path):
    ours = {"MAS-IMM": [92.0, 93.0, 93.5], "FIM-IMM": [80.0, 80.1, 80.2], "FIM-RACL": [99.0, 99.1, 99.2]}
    ours["EWC"], ours["MAS"], ours["Finetune"] = [95.0, 96.0, 97.0], [80.0, 80.1, 80.2], [99.0, 99.0]
    ours["Joint"] = [99.0]
    output = run_script("compare.py", table(tmp_path / "results.csv", ours), REFERENCE)
    lines = {line.split("|")[1].strip(): line for line in output.splitlines() if line.startswith("|")}
    assert "no significant difference" in lines["MAS-IMM"]
    assert "ours below" in lines["FIM-IMM"]
    assert "ours above" in lines["FIM-RACL"]
    assert "| 94.3 ± 0.9 (-1.0) |" in lines["FIM-IMM"]  # the mean of the five
    assert "| 95.9 (1.6) " in lines["EWC"]  # one seed
    assert "no significant difference" in lines["EWC"]
    assert "ours below" in lines["MAS"]
    assert not {"Joint", "Finetune"} & set(lines)


def test_tables_without_a_method_in_common_are_refused(tmp_path):
    ours = table(tmp_path / "results.csv", {"Experts": [99.0, 98.0]})
    said = refusal("compare.py", ours, REFERENCE)
    assert "has no method with two seeds or more that is also in" in said
    other = write_csv(tmp_path / "other.csv", [ResultRow("Digits", "MLP", "MAS-IMM", "none", "all", 1, 90.0, 0.5)])
    assert f"{other} is of Digits, and {REFERENCE} of Numbers" in refusal("compare.py", other, REFERENCE)
    assert "none.csv cannot be read" in refusal("compare.py", tmp_path / "none.csv", REFERENCE)
