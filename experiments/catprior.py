"""CatPrior: scenes, and users who see some classes more than others.

The second benchmark of De Lange et al., CVPR 2020: MIT Indoor Scenes, four tasks, five users, AlexNet and VGG-11. A
folder of other scenes in the same layout will do, with a table of its own (``--supercategories``).

    python experiments/catprior.py --data_dir data/mit-indoor --download true
    python experiments/catprior.py --config experiments/configs/catprior-squeezenet.yaml
"""

from scenes_benchmark import run

from pl_personalize.datamodules import CatPriorDataModule

if __name__ == "__main__":
    run("CatPrior", CatPriorDataModule, __doc__)
