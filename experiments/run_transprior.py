"""TransPrior: scenes, and ten users, each with a different image distortion (covariate shift).

The third benchmark of De Lange et al., CVPR 2020: MIT Indoor Scenes, four tasks, AlexNet and VGG-11. A folder of other
scenes in this layout needs a table of supercategories (``--supercategories``).

    python experiments/run_transprior.py --data_dir data/mit-indoor --download true
    python experiments/run_transprior.py --config experiments/configs/transprior-squeezenet.yaml
"""

from benchmark import run
from run_catprior import DEFAULTS, PAPER_NOTE

from pl_personalize.datamodules import TransPriorDataModule

if __name__ == "__main__":
    run("TransPrior", TransPriorDataModule, __doc__, DEFAULTS, lambda data: PAPER_NOTE)
