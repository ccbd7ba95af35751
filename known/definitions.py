"""Definitions that the texts of several kinds share; one is written where its name is used."""

from __future__ import annotations

DEFINITIONS = {
    "unit_rms": """
stage unit_rms {  # the weight is what is added to one
  param w[features] = 0
  (x | rms_norm({{eps()}}scale = false)) * (1 + w)
}
""",
    "unit_norm": """
stage unit_norm(eps = 1e-5) {  # the weight is what is added to one
  param w[features] = 0
  param b[features] = 0
  (x - mean(x) | rms_norm(eps, scale = false)) * (1 + w) + b
}
""",
    "centred": """
stage centred(eps) = x - mean(x) | rms_norm(eps)
""",
    "plain": """
stage plain = | rms_norm({{eps()}}scale = false)
""",
    "plain_layer_norm": """
stage plain_layer_norm(eps = 1e-5) = x - mean(x) | rms_norm(eps, scale = false)
""",
    "xielu": """
stage xielu {  # Huang & Schlag 2024
  param above = 0.2
  param below = -1
  let a = softplus(above)
  let b = 0.5 + softplus(below)
  where(x > 0, a * x ** 2, (exp(min(x, -1e-6)) - 1 - x) * b) + 0.5 * x
}
""",
    "near_gelu": """
stage near_gelu = 0.5 * x * (1 + tanh(0.79788456 * x * (1 + 0.044715 * x ** 2)))  # eight digits
""",
    "gated": """
ffn gated(act, hidden, bias = false) {
  let gate = x | linear(hidden, bias = bias)
  let up   = x | linear(hidden, bias = bias)
  let down = (gate | act) * up | linear(bias = bias)
  out = down
}
""",
    "damped": """
layer damped(attn, ffn) {
  let y = x + {{factor(of = residual_multiplier)}}(x | norm | attn)
  out = y + {{factor(of = residual_multiplier)}}(y | norm | ffn)
}
""",
    "plain_moe": """
ffn plain_moe(experts, top, expert, shared = none, router = softmax) : moe(experts, top,
    expert = expert, shared = shared, router = router, balance = none) {
  let w = score * chosen  # not brought to one
}
""",
    "gated_moe": """
ffn gated_moe(experts, top, expert, shared) : moe(experts, top, expert = expert, shared = shared,
    balance = none) {
  let open = x | linear(1) | sigmoid
  let w    = score * chosen{{norm_topk_prob?  / max(sum(score * chosen), 1e-20)}}
  out = (x | mixture(expert, w)) + open * (x | shared)
}
""",
    "biased": """
ffn biased(experts, top, expert, shared = none, router = sigmoid) : moe(experts, top,
    expert = expert, shared = shared, router = router, balance = none) {
  param bias[experts] = 0  # it only chooses
  let chosen = score + bias | largest(top)
  let w      = {{factor(of = routed_scaling_factor)}}score * chosen{{norm_topk_prob?  /
      (sum(score * chosen) + {{choice_eps}})}}
}
""",
    "grouped": """
ffn grouped(experts, top, groups, open, expert, shared = none) : moe(experts, top,
    expert = expert, shared = shared, router = sigmoid, balance = none) {
  param bias[experts] = 0  # it only chooses
  let choice = score + bias | split(groups)
  let open_  = sum(choice | top(2)) | largest(open, over = heads)
  let chosen = where(open_ > 0, choice, -1e9) | merge | largest(top)
  let w      = {{factor(of = routed_scaling_factor)}}score * chosen{{norm_topk_prob?  /
      (sum(score * chosen) + {{choice_eps}})}}
}
""",
}
