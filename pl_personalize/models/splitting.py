"""Splitting any network into a body and a head."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pl_personalize.models.task_network import ConvHead, TaskNetwork
from pl_personalize.per_sample.module_state import evaluating, random_state_kept


def split(module: nn.Module, head: str, example: Tensor) -> TaskNetwork:
    """Split a network into its body and its head, the last linear layer.

    The body is a copy of the module with :class:`torch.nn.Identity` in place of the head, so that ``head(body(x))`` are
    the logits. Its parameters keep their names, frozen ones stay frozen, and everything before the head (dropout,
    pooling, hooks, adapters) is kept. Nothing may follow the head, such as a softmax, except mean pooling and
    flattening after a 1×1 convolution. One forward pass in eval mode checks this.

    Args:
        module: A network that returns logits (n, classes). It is not changed.
        head: Name of the last linear layer or 1×1 convolution in ``module.named_modules()``. A convolution becomes a
            :class:`~pl_personalize.models.ConvHead`.
        example: Any input of the module, (n, …), for the check.

    Returns:
        The network. It shares no tensors with the module.

    Raises:
        ValueError: If there is no such layer, its parameters are used elsewhere in the module, it is not called exactly
            once, or the body and the head do not reproduce the module's logits.

    Example:
        >>> module = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 10))
        >>> network = split(module, "3", example=torch.zeros(1, 3, 2, 2))
        >>> _ = network.new_head(num_classes=2)
        >>> [name for name, _ in network.named_parameters()]
        ['body.1.weight', 'body.1.bias', 'head.weight', 'head.bias']
    """
    find_head(module, head)
    return split_checked(copy.deepcopy(module), head, example)


def split_checked(module: nn.Module, head: str, example: Tensor) -> TaskNetwork:
    """Split a module as :func:`split` does, but in place. After an error, the module may have lost its head."""
    layer = find_head(module, head)
    calls: list[nn.Module] = []
    with torch.no_grad(), evaluating(module):
        handle = layer.register_forward_hook(lambda layer, inputs, output: calls.append(layer))
        try:
            logits = module(example)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise ValueError(
                f"The head {head!r} must be called once in a forward pass of the {type(module).__name__}; it was "
                f"called {len(calls)} times."
            )
        classes = layer.weight.shape[0]
        if not isinstance(logits, Tensor) or logits.shape != (len(example), classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"The {type(module).__name__} must return the logits ({len(example)}, {classes}) of its head {head!r}; "
                f"it returned {found}."
            )
        network = split_in_place(module, head)
        follows = (
            f"The {type(module).__name__} processes the output of {head!r} further (another layer, a softmax, a "
            "scale?), so that layer cannot be its head: body and head do not reproduce its logits. Remove what follows "
            "the head, or build TaskNetwork(body, head) yourself."
        )
        with evaluating(network):
            try:
                again = network(example)
            except Exception as error:  # what the module does with the logits fails on the features
                raise ValueError(f"{follows} ({error})") from error
    if again.shape != logits.shape or not torch.allclose(again, logits, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ValueError(follows)
    return network


def split_in_place(module: nn.Module, head: str) -> TaskNetwork:
    """Take the head out of a module, which becomes the body, without checking the logits.

    Raises:
        ValueError: If there is no such layer, or its parameters are used elsewhere in the module.
    """
    layer = find_head(module, head)
    module.set_submodule(head, nn.Identity())
    return TaskNetwork(module, layer if isinstance(layer, nn.Linear) else as_conv_head(layer))


def as_conv_head(layer: nn.Conv2d) -> ConvHead:
    """A head with the parameters of a 1×1 convolution."""
    # On the meta device, initialization draws no random numbers.
    head = ConvHead(layer.in_channels, layer.out_channels, layer.bias is not None, device="meta")
    head.weight, head.bias = layer.weight, layer.bias
    return head


def possible_heads(module: nn.Module) -> list[str]:
    """Names of the linear layers and 1×1 convolutions, in order of registration."""
    return [name for name, layer in module.named_modules() if name and why_no_head(layer) is None]


def why_no_head(layer: object) -> str | None:
    """Why a layer cannot be the head; ``None`` if it can.

    Linear layers and 1×1 convolutions can, and subclasses whose forward computes the same, such as timm's ``Linear``.
    """
    kind = f"a {type(layer).__name__}"
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return kind
    if type(layer) is ConvHead:
        return None
    if isinstance(layer, nn.Conv2d) and (
        (layer.kernel_size, layer.stride, layer.groups) != ((1, 1), (1, 1), 1) or layer.padding not in (0, (0, 0))
    ):
        return kind
    plain = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    own = "forward" in vars(layer) or type(layer).forward is not plain.forward
    if own and not _computes(layer, plain):
        return (
            f"{kind} ({type(layer).__module__}.{type(layer).__qualname__}), whose forward differs from that of "
            f"torch.nn.{plain.__name__} in training or eval mode"
        )
    return None


def _computes(layer: nn.Linear | nn.Conv2d, plain: type[nn.Linear] | type[nn.Conv2d]) -> bool:
    """Whether a layer's forward equals that of ``plain`` on random numbers in float64."""
    if layer.weight.is_meta or isinstance(layer.weight, nn.UninitializedParameter):
        return False
    generator = torch.Generator().manual_seed(0)
    shape = (3, layer.in_features) if isinstance(layer, nn.Linear) else (3, layer.in_channels, 2, 2)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    try:
        with random_state_kept(layer.weight.device), torch.no_grad(), torch.autocast("cpu", enabled=False):
            layer = copy.deepcopy(layer).to("cpu", torch.float64)
            wanted = plain.forward(layer, x)  # type: ignore[arg-type]
            return all(_close(layer.train(mode)(x), wanted) for mode in (True, False))
    except Exception:  # a forward that fails on plain input computes something else
        return False


def _close(found: object, wanted: Tensor) -> bool:
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return False
    return torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


def find_head(module: nn.Module, head: str) -> nn.Linear | nn.Conv2d:
    """Find the head, and check that it shares no parameters.

    Raises:
        ValueError: If there is no such linear layer or 1×1 convolution, or it shares parameters.
    """
    layer = dict(module.named_modules(remove_duplicate=False)).get(head)
    what = "not in the module" if layer is None or layer is module else why_no_head(layer)
    if what is not None:
        found = possible_heads(module)[-10:]
        raise ValueError(
            f"The head must be a linear layer or a 1×1 convolution inside the module; {head!r} is {what}. "
            + (f"Its last ones are {', '.join(map(repr, found))}." if found else "It has none.")
        )
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    if other := {name for name, _ in layer.named_parameters()} - {"weight", "bias"}:
        raise ValueError(
            f"The head {head!r} has the parameters {', '.join(sorted(other))} (weight norm, spectral norm?), which the "
            "heads of other tasks would lack. Convert it to a plain layer first, with "
            "torch.nn.utils.parametrize.remove_parametrizations."
        )
    own = {id(p): f"{head}.{name}" for name, p in layer.named_parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in own and name != own[id(parameter)]:
            raise ValueError(
                f"{own[id(parameter)]!r} of the head is also {name!r} of the body (one tensor, two names), so body and "
                "head cannot be separated. Give the head its own parameters."
            )
    return layer
