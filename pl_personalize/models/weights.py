"""Loading published weights into a network."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pl_personalize.artifacts import ArtifactError
from pl_personalize.functional.names import prefix_hint, some
from pl_personalize.functional.state_dicts import module_versions

# Old files of torchvision's DenseNets have dots in module names: their norm.1 is norm1 today.
_DOTTED = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_COUNTER = ".num_batches_tracked"


def load_weights(
    module: nn.Module, state: Mapping[str, Any], head: str, *, source: str, unused: Sequence[str] = ()
) -> bool:
    """Load a state dict into a network, and return whether its head was loaded too.

    Entries of the head are ignored unless all have the network's shapes, and so are names that start with one of
    ``unused``. If anything else is missing, unexpected, or has another shape, an :class:`ArtifactError` names the
    ``source``; the network may then be changed.
    """
    own = module.state_dict()
    of_head = {name for name in own if name.startswith(f"{head}.")}
    with_head = all(name in state and _shape(state[name]) == _shape(own[name]) for name in of_head)
    entries = OrderedDict(
        (_DOTTED.sub(r"\1\2", name), value)
        for name, value in state.items()
        if not name.startswith(tuple(unused)) and (with_head or not name.startswith(f"{head}."))
    )
    shapes = [
        f"{name} {_shape(value)} instead of {_shape(own[name])}"
        for name, value in entries.items()
        if name in own and _shape(own[name]) != _shape(value)
    ]
    wrong = {"of another shape": shapes}
    if not shapes:
        # Modules can convert entries of their earlier versions, which they recognize by this.
        versions = module_versions(state)
        entries._metadata = own._metadata if versions is None else versions  # type: ignore[attr-defined]
        missing, unexpected = module.load_state_dict(entries, strict=False)
        # Files older than batch norm's counters do not have them.
        wrong["missing"] = [name for name in missing if name not in of_head and not name.endswith(_COUNTER)]
        wrong["unexpected"] = unexpected
    if any(wrong.values()):
        said = "; ".join(f"{what}: {some(names)}" for what, names in wrong.items() if names)
        raise ArtifactError(
            f"{source} does not fit the network {type(module).__name__}. Entries {said}."
            + prefix_hint(wrong.get("unexpected", ()), own)
        )
    return with_head


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


_EFFICIENTNET_LITE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_EFFICIENTNET_LITE["_fc"] = "classifier"
_BLOCK = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
_BLOCK |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
_BLOCK_WITHOUT_EXPANSION = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def is_efficientnet_lite(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of the efficientnet-lite-pytorch package."""
    return "_conv_stem.weight" in state and "_conv_head.weight" in state


def efficientnet_lite_to_timm(
    state: Mapping[str, Tensor], blocks_per_stage: Sequence[int] = (1, 2, 2, 3, 3, 4, 1)
) -> dict[str, Tensor]:
    """Rename the entries of an EfficientNet-Lite from the efficientnet-lite-pytorch package to timm's names.

    The package numbers blocks consecutively, and batch norms within a block; timm numbers blocks within stages. timm's
    ``tf_efficientnet_lite…`` models compute the same function; its ``efficientnet_lite…`` models, whose padding
    differs, do not. Input images must be scaled to (255 x − 127) / 128.

    Args:
        state: The state dict; its tensors are not copied. Unknown names are kept.
        blocks_per_stage: The number of blocks in each stage, by default that of Lite0.

    Returns:
        The entries by timm's names.

    Example:
        >>> import torch
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
