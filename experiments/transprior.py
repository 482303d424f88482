"""TransPrior: scenes, and ten users each of whom sees them through a distortion of his own.

The third benchmark of De Lange et al., CVPR 2020: MIT Indoor Scenes, four tasks, AlexNet and VGG-11. A folder of other
scenes in the same layout will do, with a table of its own (``--supercategories``).

    python experiments/transprior.py --data_dir data/mit-indoor --download true
    python experiments/transprior.py --config experiments/configs/transprior-squeezenet.yaml
"""

from scenes_benchmark import run

from pl_personalize.datamodules import TransPriorDataModule

if __name__ == "__main__":
    run("TransPrior", TransPriorDataModule, __doc__)
