"""Names that a block's own streams, tensors and states may not have, and why.

taken("seen")                    has a meaning of its own
taken("half", tensor=True)       is an attribute of every nn.Module
"""

from __future__ import annotations

import keyword

# What expressions, pipelines and sizes mean by themselves.
MEANINGS = frozenset((
    "x", "context", "o", "s", "p", "i", "j", "h", "n", "m", "seen", "sum", "tau", "doc", "row",
    "col", "true", "false", "layer", "depth", "previous", "none",
))  # fmt: skip

# Settings that are streams or numbers: `q = …` says what `let q = …` would.
SETTINGS = frozenset((
    "q", "k", "v", "source", "out", "width", "context_width", "heads", "kv_heads", "value_heads",
    "head_dim", "value_dim",
))  # fmt: skip

# The public attributes of every torch.nn.Module (torch 2.13), and the methods of our own.
MODULE = frozenset((
    "T_destination", "add_module", "apply", "bfloat16", "buffers", "call_super_init", "children",
    "compile", "cpu", "cuda", "double", "dump_patches", "eval", "extra_repr", "float", "forward",
    "get_buffer", "get_extra_state", "get_parameter", "get_submodule", "half", "ipu",
    "load_state_dict", "modules", "mtia", "named_buffers", "named_children", "named_modules",
    "named_parameters", "parameters", "register_backward_hook", "register_buffer",
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook", "register_load_state_dict_post_hook",
    "register_load_state_dict_pre_hook", "register_module", "register_parameter",
    "register_state_dict_post_hook", "register_state_dict_pre_hook", "requires_grad_",
    "set_extra_state", "set_submodule", "share_memory", "state_dict", "to", "to_empty", "train",
    "training", "type", "xpu", "zero_grad",
))  # fmt: skip
METHODS = frozenset((
    "add_moved", "attend", "auxiliary", "auxiliary_loss", "constants", "held", "hold", "init_cache",
    "initial", "move", "set_constants",
))  # fmt: skip


def module_name(name: str) -> str:
    """Return what the submodule of a part is called: its name, unless a module cannot have it."""
    return f"{name}_" if keyword.iskeyword(name) or name in MODULE or name in METHODS else name


def taken(name: str, tensor: bool = False) -> str:
    """Return why a name cannot be given to a stream or tensor; "" where it can."""
    if name in MEANINGS:
        return "this name has a meaning of its own"
    if name in SETTINGS:
        return f"this is a setting: write `{name} = …`"
    if not tensor:
        return ""
    if name in MODULE or name in METHODS:
        return "every module has an attribute of this name"
    if keyword.iskeyword(name) or name.startswith("_"):
        return "this cannot be the name of a module's tensor"
    return ""
