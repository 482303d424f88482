"""CatPrior: scenes, and users with class preferences (label shift).

The second benchmark of De Lange et al., CVPR 2020: MIT Indoor Scenes, four tasks, five users, AlexNet and VGG-11. A
folder of other scenes in this layout needs a table of supercategories (``--supercategories``).

    python experiments/run_catprior.py --data_dir data/mit-indoor --download true
    python experiments/run_catprior.py --config experiments/configs/catprior-squeezenet.yaml
"""

from benchmark import run

from pl_personalize.datamodules import CatPriorDataModule

DEFAULTS = {"training.epochs": 50, "network.name": "vgg11", "network.weights": "DEFAULT"}
PAPER_NOTE = "In the paper, the scenes are MIT Indoor's, and forgetting stands in parentheses."

if __name__ == "__main__":
    run("CatPrior", CatPriorDataModule, __doc__, DEFAULTS, lambda data: PAPER_NOTE)
