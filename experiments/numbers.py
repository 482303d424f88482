"""Numbers: five tasks of two digits from several collections, each of which is also one user.

The first benchmark of De Lange et al., CVPR 2020: SVHN and MNIST, an MLP 100-100. A source is ``svhn``, ``mnist`` or
``usps``, or the path of a folder with ``{train,test}/<digit>/*``.

    python experiments/numbers.py --data_dir data --download true --seeds '[1, 2, 3]'
    python experiments/numbers.py --sources '[../shared/data/meter-digits, mnist]' --data_dir ../shared/data
    python experiments/numbers.py --config experiments/configs/numbers-fim-racl.yaml --wandb.mode online
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

if __name__ == "__main__":
    from numbers_benchmark import run

    run()
else:
    # Python looks into a script's own folder first: when a library wants the standard library's module of this name, it
    # finds this file. So hand that module on.
    here = Path(__file__).parent
    found = PathFinder.find_spec("numbers", [path for path in sys.path if Path(path).resolve() != here.resolve()])
    assert found is not None
    assert found.loader is not None
    sys.modules[__name__] = module_from_spec(found)
    found.loader.exec_module(sys.modules[__name__])
