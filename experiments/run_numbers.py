"""Numbers: five tasks of two digits from several collections, each of which is also one user.

The first benchmark of De Lange et al., CVPR 2020: SVHN and MNIST, an MLP 100-100. A source is ``svhn``, ``mnist`` or
``usps``, or the path of a folder with ``{train,test}/<digit>/*``.

    python experiments/run_numbers.py --data_dir data --download true --seeds '[1, 2, 3]'
    python experiments/run_numbers.py --sources '[../shared/data/meter-digits, mnist]' --data_dir ../shared/data
    python experiments/run_numbers.py --config experiments/configs/numbers-fim-racl.yaml --wandb.mode online
"""

from benchmark import run

from pl_personalize.datamodules import NumbersDataModule

DEFAULTS = {"eval_batch_size": 1000, "seeds": [1, 2, 3, 4, 5], "trainer.accelerator": "cpu", "num_threads": 1}


def paper_note(data: NumbersDataModule) -> str:
    """Difference from the paper's setting."""
    same = set(data.sources) == {"svhn", "mnist"}
    different = "" if same else f", here {', '.join(data.users)}: compare methods, not levels"
    return f"In the paper, the users are svhn and mnist{different}."


if __name__ == "__main__":
    run("Numbers", NumbersDataModule, __doc__, DEFAULTS, paper_note)
