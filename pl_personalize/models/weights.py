"""Reading published weights from files."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pl_personalize.artifacts import ArtifactError
from pl_personalize.functional.names import prefix_hint, some

# Names in files of torchvision's DenseNets from before a module's name could have no dots: norm.1 is norm1 today.
_DOTTED = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_COUNTER = ".num_batches_tracked"


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` file, or from a file of ``torch.save``, as data alone.

    Raises:
        ArtifactError: If the file is missing, cannot be read, would run code, or holds something else.
    """
    if not Path(path).is_file():
        raise ArtifactError(f"{path} does not exist; expected a file with a state dict.")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise ArtifactError(f"{path} cannot be read as a state dict: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        what = f"a dict with the entries {some(map(str, state))}" if isinstance(state, dict) else type(state).__name__
        raise ArtifactError(f"{path} is no state dict, which has names and tensors alone; it is {what}.")
    return state


def load_weights(
    module: nn.Module, state: Mapping[str, Tensor], head: str, *, source: str, unused: Sequence[str] = ()
) -> bool:
    """Load a state dict whose head may be for other classes.

    Args:
        module: Where to.
        state: The state dict.
        head: Name of the module's head; its entries are ignored unless all have the module's shapes.
        source: Where the state dict is from, for messages.
        unused: Beginnings of names that are ignored.

    Returns:
        Whether the head was loaded too.

    Raises:
        ArtifactError: If anything but the head is missing, unexpected, or of another shape. The module may be changed.
    """
    own = module.state_dict()
    of_head = {name for name in own if name.startswith(f"{head}.")}
    with_head = all(name in state and state[name].shape == own[name].shape for name in of_head)
    entries = OrderedDict(
        (_DOTTED.sub(r"\1\2", name), value)
        for name, value in state.items()
        if not name.startswith(tuple(unused)) and (with_head or not name.startswith(f"{head}."))
    )
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in entries.items()
        if name in own and own[name].shape != value.shape
    ]
    wrong = {"of another shape": shapes}
    if not shapes:
        # Modules may rename entries of earlier versions of theirs, which they know from this.
        entries._metadata = getattr(state, "_metadata", own._metadata)  # type: ignore[attr-defined]
        missing, unexpected = module.load_state_dict(entries, strict=False)
        # Files from before batch norm counted its batches have no counters.
        wrong["missing"] = [name for name in missing if name not in of_head and not name.endswith(_COUNTER)]
        wrong["unexpected"] = unexpected
    if any(wrong.values()):
        said = "; ".join(f"{what}: {some(names)}" for what, names in wrong.items() if names)
        raise ArtifactError(
            f"{source} does not fit the network {type(module).__name__}. Entries {said}."
            + prefix_hint(wrong.get("unexpected", ()), own)
        )
    return with_head


_EFFICIENTNET_LITE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_BLOCK_WITHOUT_EXPANSION = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def is_efficientnet_lite(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of the package efficientnet-lite-pytorch."""
    return "_conv_stem.weight" in state and "_conv_head.weight" in state


def efficientnet_lite_to_timm(
    state: Mapping[str, Tensor], blocks_per_stage: Sequence[int] = (1, 2, 2, 3, 3, 4, 1)
) -> dict[str, Tensor]:
    """Rename the entries of an EfficientNet-Lite of the package efficientnet-lite-pytorch as timm names them.

    There the blocks have one running number, and batch norms are counted from the first that a block has; in timm,
    blocks are counted within stages. timm's ``tf_efficientnet_lite…`` compute the same function, its
    ``efficientnet_lite…``, which pad otherwise, do not. Images are to be scaled to (255 x − 127) / 128.

    Args:
        state: The state dict; its tensors are not copied. Names that are not known stay.
        blocks_per_stage: How many blocks each stage has; by default those of Lite0.

    Returns:
        The entries by their names in timm.

    Example:
        >>> state = {"_blocks.2._expand_conv.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}
        >>> list(efficientnet_lite_to_timm(state))
        ['blocks.1.1.conv_pw.weight', 'classifier.bias']
    """
    places = [f"blocks.{stage}.{k}" for stage, count in enumerate(blocks_per_stage) for k in range(count)]
    converted = {}
    for name, value in state.items():
        module, _, rest = name.partition(".")
        if module != "_blocks":
            renamed = f"{_EFFICIENTNET_LITE.get(module, module)}.{rest}"
        else:
            number, layer, entry = rest.split(".")
            expands = f"_blocks.{number}._expand_conv.weight" in state
            layers = _BLOCK if expands else _BLOCK_WITHOUT_EXPANSION
            known = int(number) < len(places) and layer in layers
            renamed = f"{places[int(number)]}.{layers[layer]}.{entry}" if known else name
        converted[renamed] = value
    return converted
