"""TransPrior: scenes, and ten users each of whom sees them through a distortion of his own.

The third benchmark of De Lange et al., CVPR 2020: MIT Indoor Scenes, four tasks, AlexNet and VGG-11. A folder of other
scenes in the same layout will do, with a table of its own (``--supercategories``).

    python experiments/run_transprior.py --data_dir data/mit-indoor --download true
    python experiments/run_transprior.py --config experiments/configs/transprior-squeezenet.yaml
"""

from benchmark import run

from pl_personalize.datamodules import TransPriorDataModule

DEFAULTS = {"training.epochs": 50, "network.name": "vgg11", "network.weights": "DEFAULT"}

if __name__ == "__main__":
    run(
        "TransPrior",
        TransPriorDataModule,
        __doc__,
        DEFAULTS,
        lambda data: "In the paper, the scenes are MIT Indoor's, and forgetting stands in parentheses.",
    )
