"""Readers of configurations: what several fields together are in Loom, one function a question.

A reader is given a configuration, and the names of the fields where a kind has its own. It
returns a piece of text, empty where the default of the language is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from math import frexp, log

from .config import Config
from .rotations import head_size, rope
from .words import value

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "xielu": "xielu",
}


def head_dim(config: Config) -> str:
    """Return how many features a head has."""
    return str(head_size(config))


def kv_heads(config: Config, of: str = "num_key_value_heads") -> str:
    """Return `kv_heads` where there are fewer than heads."""
    heads = config.get("num_attention_heads")
    count = config.get(of) if config.has(of) else heads
    return "" if count == heads else str(count)


def activation(config: Config, of: str = "hidden_act") -> str:
    """Return an activation's name."""
    name = config.get(of)
    if name not in ACTIVATIONS:
        raise config.unsupported(of, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _biased(config: Config, bias: str) -> bool:
    return bool(config.get(bias)) if bias else False


def gated(
    config: Config,
    act: str = "hidden_act",
    hidden: str = "intermediate_size",
    bias: str = "",
    times: str = "",
) -> str:
    """Return a feed-forward with a gate; `times` is a field that multiplies the hidden width."""
    name, biased = activation(config, act), _biased(config, bias)
    size = config.get(hidden) * (config.get(times) if times else 1)
    if name == "silu" and not biased:
        return f"swiglu(hidden = {size})"
    return f"gated({name}, hidden = {size}{', bias = true' if biased else ''})"


def mlp(
    config: Config,
    act: str = "hidden_act",
    hidden: str = "intermediate_size",
    bias: str = "",
    times: str = "4",
) -> str:
    """Return a feed-forward of two maps; without a hidden width it has `times` the width."""
    said = hidden and config.has(hidden)
    size = config.get(hidden) if said else int(times) * config.get("hidden_size")
    biased = ", bias = true" if _biased(config, bias) else ""
    return f"mlp({activation(config, act)}, hidden = {size}{biased})"


def moe(
    config: Config,
    experts: str = "num_experts",
    top: str = "num_experts_per_tok",
    hidden: str = "moe_intermediate_size",
    norm: str = "",
    shared: str = "",
    times: str = "",
    router: str = "",
) -> str:
    """Return experts, each a feed-forward with a gate, and one that is shared where it is said.

    Without `norm`, or where it says so, what experts weigh is brought to one.
    """
    said = [f"experts = {config.get(experts)}", f"top = {config.get(top)}"]
    said.append(f"expert = {gated(config, hidden=hidden)}")
    if shared and config.has(shared) and config.get(shared) and (not times or config.get(times)):
        said.append(f"shared = {gated(config, hidden=shared, times=times)}")
    if router:
        said.append(f"router = {router}")
    if norm == "never" or (norm and not config.get(norm)):
        return f"plain_moe({', '.join(said)})"
    return f"moe({', '.join(said)}, balance = none)"


def choosing(
    config: Config,
    experts: str = "n_routed_experts",
    top: str = "num_experts_per_tok",
    hidden: str = "moe_intermediate_size",
    times: str = "n_shared_experts",
    groups: str = "n_group",
    router: str = "",
    shared: str = "",
    act: str = "hidden_act",
    alone: str = "",
) -> str:
    """Return experts that a bias helps to choose, among the best groups where there are several.

    With `alone` they have no gates. `shared` is a field that says the width of a shared one.
    """
    feed = mlp if alone else gated
    said = [f"experts = {config.get(experts)}", f"top = {config.get(top)}"]
    name = "biased"
    if groups and (config.get(groups) or 1) > 1:
        name = "grouped"
        said += [f"groups = {config.get(groups)}", f"open = {config.get('topk_group')}"]
    elif groups:
        config.note("topk_group")
    said.append(f"expert = {feed(config, act, hidden)}")
    if shared:
        said.append(f"shared = {feed(config, act, shared)}")
    elif times and config.get(times):
        said.append(f"shared = {gated(config, hidden=hidden, times=times)}")
    if router:
        said.append(f"router = {router}")
    return f"{name}({', '.join(said)})"


def ratio(config: Config, of: str, by: str) -> str:
    """Return how often one field is in another. Raises `LoomError` where it does not divide it."""
    if config.get(of) % config.get(by):
        raise config.unsupported(by, f"a divisor of {config.get(of)}")
    return str(config.get(of) // config.get(by))


def alike(config: Config, of: str, to: str) -> str:
    """Return a field whose value a list has for every layer."""
    wanted = config.get(to)
    if any(each != wanted for each in config.get(of)):
        raise config.unsupported(of, f"{wanted} everywhere, as `{to}`")
    return value(wanted)


def overridden(config: Config, of: str) -> str:
    """Return a field of the layers that see all, where each of them has the same one of its own."""
    own = {int(at): said for at, said in (config.get("per_layer_config") or {}).items()}
    types = config.get("layer_types")
    found = {said.get(of, config.get(of)) for said in own.values()} or {config.get(of)}
    apart = {at for at, said in own.items() if set(said) - {"head_dim", "num_key_value_heads"}}
    if len(found) > 1 or apart or any(types[at] != "full_attention" for at in own):
        raise config.unsupported("per_layer_config", "head_dim and num_key_value_heads, the same "
                                 "for all layers that see all")  # fmt: skip
    if len(own) not in (0, types.count("full_attention")):
        raise config.unsupported("per_layer_config", "all layers that see all, or none")
    return value(found.pop())


def in_bfloat16(config: Config, of: str) -> str:
    """Return the root of a field, rounded as bfloat16 rounds it."""
    root = config.get(of) ** 0.5
    step = 2.0 ** (frexp(root)[1] - 8)
    return value(round(root / step) * step)


def several(config: Config, of: str) -> str:
    """Return 1 where there are several, else nothing."""
    return "1" if config.get(of) > 1 else ""


def group_norm(config: Config, of: str) -> str:
    """Return a gated output normed, each of some groups of its features by itself."""
    groups = config.get(of)
    if groups == 1:
        return f"o | merge | gate(gate_) | {rms(config)}"
    inner = f"split({groups}) | rms_norm({eps(config)}scale = false) | merge"
    return f"(o | merge | gate(gate_) | {inner}) * gain"


def state_size(config: Config, whole: str = "") -> str:
    """Return the features of a head, which all heads together must have as many of."""
    size, heads = config.get("mamba_d_head"), config.get("mamba_n_heads")
    if whole:
        total = config.get(whole)
    else:
        whole, total = "mamba_expand", config.get("mamba_expand") * config.get("hidden_size")
    if size * heads != total:
        raise config.unsupported(whole, f"what makes {size} * {heads} features of all heads")
    return str(size)


def where(config: Config, of: str, **given: str) -> str:
    """Return a rotation where a field says so."""
    return rope(config) if config.get(of) == given["is"] else ""


def lfm_gated(config: Config) -> str:
    """Return LFM2's feed-forward, whose width the configuration may ask to be adjusted."""
    size = config.get("intermediate_size")
    if config.get("block_auto_adjust_ff_dim"):
        size = int(2 * size / 3)
        times, of = config.get("block_ffn_dim_multiplier"), config.get("block_multiple_of")
        size = size if times is None else of * ((int(times * size) + of - 1) // of)
    else:
        config.note("block_ffn_dim_multiplier")
        config.note("block_multiple_of")
    return f"swiglu(hidden = {size})"


def latent_scale(config: Config) -> str:
    """Return the scale of latent attention, where YaRN changes it."""
    said = config.get("rope_parameters")
    every = said.get("mscale_all_dim")
    if said.get("rope_type", "default") == "default" or not every or said["factor"] <= 1:
        return ""
    more = 0.1 * every * log(said["factor"]) + 1
    return f"head_dim ** -0.5 * {value(more)} ** 2"


def rms(config: Config, of: str = "rms_norm_eps") -> str:
    """Return an RMS norm."""
    eps = config.get(of)
    return "rms_norm" if eps == 1e-6 else f"rms_norm(eps = {value(eps)})"


def layer_norm(config: Config, of: str = "layer_norm_eps") -> str:
    """Return a layer norm."""
    eps = config.get(of)
    return "layer_norm" if eps == 1e-5 else f"layer_norm(eps = {value(eps)})"


def centred(config: Config, of: str = "layer_norm_eps") -> str:
    """Return a layer norm without a bias."""
    return f"centred(eps = {value(config.get(of))})"


def eps(config: Config, of: str = "rms_norm_eps", usual: str = "1e-6") -> str:
    """Return `eps = …, ` where it is not the usual one."""
    found = config.get(of)
    return "" if found == float(usual) else f"eps = {value(found)}, "


def factor(config: Config, of: str) -> str:
    """Return `1e-3 * `, or nothing where it is one."""
    found = config.get(of)
    return "" if found == 1 else f"{value(found)} * "


def scaled(config: Config, of: str, over: str = "") -> str:
    """Return a stage that multiplies, or divides where `over` is said; nothing for one."""
    found = config.get(of)
    if found is None or found == 1:
        return ""
    return f" | scale({f'1 / {value(found)}' if over else value(found)})"


def capped(config: Config, of: str = "final_logit_softcapping") -> str:
    """Return a stage that caps softly, or nothing."""
    found = config.get(of)
    return "" if found is None else f" | softcap({value(found)})"


def score(config: Config, of: str = "attn_logit_softcapping") -> str:
    """Return the cap on the logits of attention, or nothing."""
    found = config.get(of)
    return "" if found is None else f"softcap({value(found)})"


def scale(config: Config, of: str = "query_pre_attn_scalar") -> str:
    """Return a scale that is the root of a field's inverse, where it is not the head's size."""
    found = config.get(of)
    return "" if found == head_size(config) else f"{value(found)} ** -0.5"


def direct(config: Config, of: str) -> str:
    """Return a field as it stands where it is not one over the root of the head's size."""
    found = config.get(of)
    return "" if found == head_size(config) ** -0.5 else value(found)


def clip(config: Config, of: str = "clip_qkv") -> str:
    """Return a stage that clips, or nothing."""
    found = config.get(of)
    return f" | clip(-{value(found)}, {value(found)})" if found else ""


def power_of_two(config: Config, of: str) -> str:
    """Return nothing; refuse another number than a power of two."""
    count = config.get(of)
    if count & (count - 1):
        raise config.unsupported(of, "a power of two: the slopes of others are laid otherwise")
    return ""


def same(config: Config, of: str, to: str) -> str:
    """Return a field that another one must equal."""
    if config.get(of) != config.get(to):
        raise config.unsupported(to, f"the same as `{of}`, {config.get(of)}")
    return value(config.get(of))


def mask(config: Config, window: str = "sliding_window", use: str = "") -> str:
    """Return a causal mask, with a window where one is said (and `use` allows)."""
    if use and not config.get(use):
        return "causal"
    size = config.get(window) if config.has(window) else None
    return f"causal and window({size})" if size else "causal"


READERS: dict[str, Callable[..., str]] = {
    each.__name__: each
    for each in (
        head_dim, kv_heads, activation, gated, mlp, moe, choosing,
        latent_scale, several, overridden, in_bfloat16, ratio, alike, group_norm, where, lfm_gated,
        state_size, rms, layer_norm, centred, eps, factor, scaled,
        capped, score, scale, direct, clip, power_of_two, same, mask, rope,
    )
}  # fmt: skip
