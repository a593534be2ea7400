"""Activations computed by the packed layer before them: in the kernel's epilogue where it has one.

An activation of its own reads and writes the whole output again, which may take as long as a sparse layer: on a GPU by
the traffic alone, on a CPU where it comes as half a dozen operations. Only for inference and only where it is asked
for: a fused layer answers with activated outputs to whoever looks at it (hooks, adapters), and what takes its place
later must bring the activation along.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from padst_cli.runtime.packed_linear import PackedLinear


class Absorbed(nn.Module):
    """Stands where an activation was that the packed layer before it computes."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x, which is activated already."""
        return x


def fuse(model: nn.Module) -> dict[str, str]:
    """Move activations into the packed layers before them, in place; returns them by the layer's name.

    A pair is fused where the forward pass of the module that holds both can be traced and calls the activation on the
    layer's output and on nothing else, and nothing else sees that output. The activations are those that the kernels
    have on a CPU and on a GPU: GELU, its approximation by tanh, SiLU. What is fused already stays so.
    """
    found = {}
    for name, parent in list(model.named_modules()):
        children = dict(parent.named_children())
        packed = {key for key, child in children.items() if isinstance(child, PackedLinear)}
        known = {key: kind for key, child in children.items() if (kind := activation_kind(child))}
        for key, act in _pairs(parent, packed, set(known)) if packed and known else ():
            layer: Any = children[key]
            layer.epilogue = (known[act], children[act])
            parent.set_submodule(act, Absorbed(children[act]))
            found[f"{name}.{key}" if name else key] = known[act]
    return found


def unfuse(model: nn.Module) -> None:
    """Put every activation back where it was, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            module.epilogue = None
        elif isinstance(module, Absorbed):
            model.set_submodule(name, module.activation)


def activation_kind(module: nn.Module) -> str:
    """What a module computes, as kernels call it, "" where they have no such activation."""
    from transformers.activations import ACT2FN

    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return next((kind for name, kind in _KINDS.items() if type(module) is type(ACT2FN[name])), "")


_KINDS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""What activations of transformers compute, by the names that configs call them."""


class _ChildrenOnly(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m, module_qualified_name
        return True


def _pairs(parent: nn.Module, packed: set[str], activations: set[str]) -> list[tuple[str, str]]:
    """(layer, activation) that the forward pass of `parent` calls one after the other and nowhere else."""
    try:
        graph = _ChildrenOnly().trace(parent)
    except Exception:  # whatever a module does that no tracer follows: it stays as it is
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = [str(node.target) for node in calls]
    pairs = []
    for node in calls:
        users = list(node.users)
        if str(node.target) not in packed or len(users) != 1 or users[0].op != "call_module":
            continue
        key, act = str(node.target), str(users[0].target)
        if act in activations and times.count(key) == times.count(act) == 1 and users[0].args == (node,):
            pairs.append((key, act))
    return pairs
