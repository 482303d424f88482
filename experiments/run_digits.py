"""Personalized digits: merge five experts for a user with a scanner and a user with a camera.

Compares MAS-RACL, FIM-RACL, MAS-IMM, FIM-IMM and mean-IMM on scikit-learn's handwritten digits. Nothing is downloaded.

    python experiments/run_digits.py
    python experiments/run_digits.py --seeds '[7]' --training.lr 0.02 --output_dir runs/mine
    python experiments/run_digits.py --config experiments/configs/digits.yaml --wandb.mode online
"""

from benchmark import run

from pl_personalize.datamodules import DigitsDataModule

DEFAULTS = {
    "seeds": [1, 2, 3, 4],
    "training.epochs": 20,
    "training.lr": 0.01,
    "trainer.accelerator": "cpu",
    "num_threads": 1,
}

if __name__ == "__main__":
    run("Digits", DigitsDataModule, __doc__, DEFAULTS)
