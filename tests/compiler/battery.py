"""The blocks that every test of the compiler runs over: one line a feature."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from headloom.compiler.checking.check import block as block_of
from headloom.compiler.checking.check import check
from headloom.compiler.meaning.reference import reference
from headloom.compiler.model import Block
from headloom.compiler.plan.plan import Target
from headloom.grammar.parse import parse

WIDTH = 16
EXAMPLES = sorted(
    path
    for path in (Path(__file__).parents[2] / "examples").glob("*.loom")
    if "search" not in path.name
)

CAUSAL = "heads = 4; head_dim = 4; mask = causal"
SETTINGS = {
    # masks
    "all": "heads = 4",
    "causal": "heads = 4; mask = causal",
    "window": "heads = 4; mask = causal and window(3)",
    "both_ways_window": "heads = 4; mask = window(3)",
    "sink": "heads = 4; mask = causal and (window(3) or sink(2))",
    "prefix": "heads = 4; mask = prefix(3)",
    "strided": "heads = 4; mask = causal and strided(3)",
    "blocks": "heads = 4; mask = causal and blocks(3)",
    "power": "heads = 4; mask = causal and power",
    "document": "heads = 4; mask = causal and document",
    "by_head": "heads = 4; mask = causal and (i - j) % (h + 1) == 0",
    "strictly_before": "heads = 4; mask = j < i",
    "negated": "heads = 4; mask = causal and not (i - j == 2 or j > 7)",
    "by_stream": "heads = 4; let keep = x | linear(1); mask = causal and (keep[j] > 0 or i == j)",
    "by_truth": "heads = 4; let keep = (x | linear(1)) > 0 and (x | slice(0, 1)) < 1; "
    "mask = causal and (keep[j] or i == j); score = where(keep[i], s, -s)",
    "relative": f"{CAUSAL}; position = relative(8, 16, sides = 1)",
    "relative_both_ways": "heads = 4; position = relative(12, 20)",
    "by_fraction": "heads = 4; mask = causal and sqrt(i - j) <= 1.5 + i / 9",
    # scores
    "softcap": f"{CAUSAL}; score = softcap(5)",
    "alibi": f"{CAUSAL}; position = alibi",
    "alibi_of_six": "heads = 6; head_dim = 4; mask = causal; score = alibi",
    "temperature": f"{CAUSAL}; score = temperature",
    "composed": f"{CAUSAL}; position = alibi; score = temperature | softcap(3)",
    "logarithm": f"{CAUSAL}; score = s - log(1 + abs(i - j)) / 3 + 2 ** (j - i)",
    "weightless": f"{CAUSAL}; score = where(i % 3 > 0, s, log(0))",
    "bias_table": f"{CAUSAL}; param t[9, heads] = 0.1 * h; score = s + t[clip(i - j, 0, 8), h]",
    "bias_past_the_end": f"{CAUSAL}; param t[3] = normal(1); score = s + t[i - j] + t[i / 2]",
    "bias_of_key": f"{CAUSAL}; let g = x | linear(heads); score = s + g[j, h] - g[i, 1]",
    "bias_of_key_head": f"{CAUSAL}; kv_heads = 2; score = s + k[h // 2, j, 1] * q[h, i, 0]",
    "another_key": "heads = 4; head_dim = 4; kv_heads = 2; let g = x | linear(heads); "
    "mask = causal and window(3); score = s + g[j // 4 * 4 - 1, h] * k[h // 2, j / 2, 1]",
    "another_key_as_a_vector": f"{CAUSAL}; let f = x | linear(3); score = s + dot(f[i], f[j - 2])",
    "another_key_in_a_mask": "heads = 4; let keep = (x | linear(1)) > 0; "
    "mask = causal and (keep[j // 3 * 3] or i == j)",
    "bias_of_input": f"{CAUSAL}; score = s + x[j, 3] * x[i, 0]",
    "grid": "heads = 4; grid = [3, 4]; score = s - abs(row(i) - row(j)) - abs(col(i) - col(j))",
    # similarities and vectors
    "cosine": f"{CAUSAL}; similarity = cosine; scale = 4",
    "distance": f"{CAUSAL}; similarity = distance; kv_heads = 2; normalize = sink",
    "l1": f"{CAUSAL}; similarity = l1; kv_heads = 2",
    "additive": f"{CAUSAL}; similarity = additive; score = softcap(2)",
    "pair_mlp": "heads = 4; mask = causal and window(4); similarity = pair_mlp(hidden = 5)",
    "pair_mlp_across": "heads = 4; source = context; similarity = pair_mlp(hidden = 5)",
    "trilinear": f"{CAUSAL}; param w[heads, head_dim] = 1 + h; similarity = sum(q * w * k)",
    "two_products": f"{CAUSAL}; let f = x | linear(6); let g = x | linear(6); "
    "similarity = tanh(dot(q, k)) * sigmoid(-sum(abs(q - k))); "
    "score = s * sigmoid(dot(f[i], g[j]))",
    "relative_keys": f"{CAUSAL}; param t[7, head_dim] = normal(1); "
    "score = s + dot(q[h, i], t[clip(i - j, -3, 3) + 3])",
    "relative_keys_of_heads": f"{CAUSAL}; param t[heads, 7, 3] = normal(1); "
    "let f = x | linear(3); let g = x | linear(heads); param u[9, 3] = normal(1); "
    "score = s + dot(t[h, i - j + h - 1], f[i]) * dot(f[i] + g[i, h], u[j - i + 8])",
    "matrix_of_places": f"{CAUSAL}; param w[3, 3] = normal(0.3); param a[3] = normal(0.3); "
    "score = s + sum(w @ tanh((i - j) * a)) + dot(a, tanh(j * a))",
    "rows_of_a_table": f"{CAUSAL}; param t[3, 6] = normal(1); param u[heads, 2, 6] = normal(1); "
    "score = s + dot(t[0] + u[h, 1], tanh((i - j) * t[2] + t[1])) / norm(u[0])",
    "matrix_form": f"{CAUSAL}; param w[heads, head_dim, head_dim] = normal(1); "
    "similarity = q @ (w @ k) - 0.1 * norm(k) + mean(q)",
    "mask_of_vectors": "heads = 4; let f = x | linear(3); "
    "mask = causal and (dot(f[i], f[j]) > 0 or i == j)",
    # weights and maps
    "redistributed": f"{CAUSAL}; let g = x | linear(1) | sigmoid; "
    "weights = p * g[j] / sum_keys(p * g[j]) + mean_keys(p) - 0.1 * max_keys(p)",
    "local_and_global": "heads = 4; let g = x | linear(heads) | sigmoid; weights = g[i, h] * p + "
    "(1 - g[i, h]) * where(abs(j - max_keys(where(p == max_keys(p), j, 0))) <= 2, p, 0)",
    "top_of_row": f"{CAUSAL}; weights = where(rank_keys(p) < 3, p, 0) / "
    "sum_keys(where(rank_keys(p) < 3, p, 0))",
    "column_statistics": f"{CAUSAL}; weights = p * (1 + max_queries(p)) / (1 + sum_queries(p)) "
    "+ mean_queries(p)",
    "column_statistics_of_all": "heads = 4; weights = p - mean_queries(p) + max_queries(p) "
    "+ mean_keys(p) * max_keys(p)",
    "maps_of_places": f"{CAUSAL}; weights = p * max_keys(where(mean_queries(p) > 0.1, -j, -9)) + "
    "sum_keys(max_keys(p)) - p * max_keys(where(p == max_keys(p), j, 0)) / 9",
    "mixed_heads": f"{CAUSAL}; param a[heads, heads] = normal(1); "
    "param c[heads, heads] = normal(1); score = mix_heads(s, a); weights = mix_heads(p, c)",
    "convolved": f"{CAUSAL}; param a[heads, 3, 5] = normal(1); param c[1, 3] = normal(1); "
    "score = convolve(s, a); weights = convolve(p, c)",
    "convolved_window": "heads = 4; mask = causal and (window(3) or sink(2)); "
    "param a[heads, 1, 4] = normal(1); score = convolve(s, a)",
    "convolved_over_keys": f"{CAUSAL}; param a[heads, 1, 4] = normal(1); score = convolve(s, a)",
    "running_over_keys": f"{CAUSAL}; let g = x | linear(heads); "
    "score = s + 0.1 * (sum_keys(sigmoid(s)) - running_keys(sigmoid(s))) * g[j, h]; "
    "weights = p + 0.1 * running_keys(p * g[j, h])",
    "running_window": "heads = 4; mask = j < i and (window(4) or sink(2)); "
    "score = -softplus(-s) - running_keys(softplus(s)) / 3; normalize = exp(s)",
    "running_over_queries": f"{CAUSAL}; let g = x | linear(heads); "
    "score = s - running_queries(relu(s) * g[i, h]); weights = p - 0.1 * running_queries(p)",
    "running_twice_over_queries": "heads = 4; mask = causal and (window(4) or sink(1)); "
    "score = s - running_queries(relu(s - 0.3 * running_queries(s))); "
    "weights = p * max_keys(p) / (1 + max_keys(p))",
    "running_over_queries_of_a_window": "heads = 4; mask = window(3); "
    "score = s + running_queries(s) - 0.2 * running_keys(1)",
    "ranked_groups": f"{CAUSAL}; "
    "weights = where(max_group(-rank_keys(p), j // 4) + rank_keys(p) < 2, p, 0)",
    "ranked_window": "heads = 4; mask = causal and window(4); "
    "weights = where(rank_keys(floor(8 * p)) < 2, p, 0)",
    "read_by_its_values": "heads = 4; kv_heads = 2; value_heads = 4; mask = causal; "
    "let w = x | linear | split; let b = x | linear(heads) | sigmoid; v = w - b * u; "
    "branch u { mask = j < i; score = softcap(3) }; "
    "out = (o + 0.1 * rows(u, p * b[j, h]) * u) | merge | linear",
    "read_by_its_values_in_a_window": "heads = 4; mask = i - 4 < j < i; normalize = sigmoid; "
    "let w = x | linear | split; param c[heads] = 0.5; const d = 2; v = w - c * o / d + o",
    "read_by_its_values_of_documents": "heads = 4; mask = j < i and document; "
    "let g = x | linear(1); let w = x | linear | split; let e = x | linear(heads) | split; "
    "branch u { v = (w - (g + 1) * u * (e | tanh)) }; out = (u + w) | merge | linear",
    "carried": "heads = 4; kv_heads = 2; mask = causal; position = rope; "
    "let w = x | linear(kv_heads * head_dim) | split(kv_heads) | l2_norm; "
    "let b = x | linear(kv_heads) | sigmoid; "
    "carry = k - 2 * b * w * dot(w, k)",
    "carried_and_summed": "heads = 4; mask = causal and document; "
    "let w = x | linear | split | l2_norm; let b = x | linear(heads) | sigmoid; "
    "carry = k + outer(-b * w, w) @ k; score = s - 0.1 * (sum_keys(sigmoid(s)) - "
    "running_keys(sigmoid(s))); normalize = exp(s) / max(sum, 1)",
    "fading_channels": "heads = 4; kv_heads = 2; mask = causal; "
    "let c = x | linear(heads * head_dim, bias = true) | split(heads) | log_sigmoid | "
    "running(sum); similarity = sum(q * exp(c[h, i] - c[h, j]) * k); scale = 1; "
    "score = s - softplus(s) - running_keys(softplus(s)) / 9; normalize = exp(s)",
    "carried_in_a_window": "heads = 4; mask = causal and (window(4) or sink(2)); "
    "let g = x | linear(heads); let e = x | linear(heads * head_dim); score = softcap(3); "
    "param a[heads, head_dim] = 0.3; param c[head_dim] = 0.2; "
    "carry = exp(-softplus(g)) * (k - outer(a, c) @ k) + tanh(e) * k / 4",
    "carried_documents": "heads = 4; mask = j < i and document; let w = x | linear | split; "
    "let g = x | linear(heads) | sigmoid; let r = x | linear | split | l2_norm; "
    "v = w - g * o; carry = g * k - r * dot(r, k); out = (o + rows(o, p) * w) | merge | linear",
    # branches
    "branches": f"{CAUSAL}; branch one {{ }}; "
    "branch two { q = x | linear | split; k = x | linear | split }; "
    "out = (one - 0.3 * two) | rms_norm | merge | linear",
    "branch_beside": f"{CAUSAL}; let g = x | linear(heads) | sigmoid; "
    "branch near { mask = causal and window(3); scale = 1 }; "
    "out = (g * o + (1 - g) * near) | merge | linear",
    "branch_of_other_heads": f"{CAUSAL}; position = rope; kv_heads = 2; "
    "branch wide { heads = 2; head_dim = 8; mask = causal and (window(2) or sink(1)); "
    "position = alibi; param t = 1; score = t * s }; "
    "out = o | merge | concat(wide | merge) | linear",
    "branch_out": f"{CAUSAL}; let g = x | linear | silu; branch side {{ let g = x | linear | tanh; "
    "v = g | linear | split; out = o | merge | gate(g) | linear }; "
    "out = (side * g) | linear",
    "branch_recurrent": f"{CAUSAL}; branch memory {{ mix = gated_delta }}; "
    "branch far { mask = causal; normalize = sink; score = temperature }; "
    "out = (o + memory + far) | merge | linear",
    "branch_chain": f"{CAUSAL}; branch one {{ mask = causal and window(4); "
    "k = x | linear | split; v = x | linear | split }; "
    "k = one | merge | linear | split; v = one; out = (o + v) | merge | linear",
    "branch_cross": f"{CAUSAL}; branch far {{ source = context; mask = all }}; "
    "branch again { source = context; mask = j <= i; v = context | linear | split }; "
    "out = (o + far + again) | merge | linear",
    # numbers of rows and columns, joint attention, what training adds
    "joint": f"{CAUSAL}; kv_heads = 2; branch memory {{ source = latents(3, 8); mask = all }}; "
    "branch near { mask = causal and window(2); normalize = sink }; "
    "out = joint(o, memory, near) | merge | linear",
    "joint_of_nothing": "heads = 4; branch one { mask = j < i }; branch two { mask = j < i - 2 }; "
    "out = joint(one, two) | merge | linear",
    "statistics": f"{CAUSAL}; let g = x | linear(1) | sigmoid; param c[heads] = 1; "
    "out = (o * entropy(o) + c * lse(o) + rows(o, p * g[j])) | merge | linear",
    "statistics_of_tables": f"{CAUSAL}; param c[heads, 9] = 0.2 + h; param d[9] = 0.3; "
    "out = (o * rows(o, p * c[h, clip(i - j, 0, 8)]) + rows(o, p * d[j])) | merge | linear",
    "statistics_of_sinks": "heads = 4; mask = j < i; normalize = sink; "
    "out = (o * entropy(o) + tanh(lse(o))) | merge | linear",
    "columns": "heads = 4; let g = x | linear(1) | sigmoid; "
    "out = (o + columns(o, p ** 2 * g[i]) + (o | mean_tokens)) | merge | linear",
    "regularized": f"{CAUSAL}; let r = x | linear(heads) | softmax; param t[heads] = 0.5; "
    "regularize = 0.1 * mean((entropy(o) - t * log(16)) ** 2) + "
    "heads * mean((r | mean_tokens) * (step(r - 0.3) | mean_tokens)) - "
    "mean(log(1.1 - rows(o, p * r[j, 0]))); out = o | gate(r) | merge | linear",
    "regularized_by_kernel": f"{CAUSAL}; regularize = -0.1 * mean(entropy(o))",
    "regularized_branch": "heads = 4; branch share { heads = 1; q = x | linear | split; "
    "k = x | split; v = x | split; scale = 0.1 }; "
    "let part = columns(share, p) / columns(share, 1); regularize = mean(part * log(part))",
    "regularized_columns": "heads = 4; regularize = mean((1 - columns(o, p)) ** 2)",
    "moved": f"{CAUSAL}; param t[heads] = 0.5 + h; param c[width] = 0.1; "
    "let r = x | linear(heads); t <- 0.9 * t + 0.1 * mean_each((r - mean_each(r)) ** 2); "
    "c <- c + 0.01 * sign(mean_each(x)); "
    "score = s * t[h]; regularize = mean(r * t); out = (o | merge | linear) * c",
    # other tokens
    "latent_keys": "heads = 4; source = latents(5)",
    "latent_memory": f"{CAUSAL}; branch memory {{ source = latents(3, 8); mask = all }}; "
    "out = (o + memory) | merge | linear",
    "latents_from_tokens": "heads = 4; branch seeds { q = latents(3) | linear | split; "
    "k = x | linear | split; v = x | linear | split; mask = j % 2 == i % 2 }; "
    "k = seeds | merge | linear | split; v = seeds; score = s + 0.1 * j",
    "conv": f"{CAUSAL}; q = x | linear | conv(4) | silu | split; k = x | linear | split | "
    "conv(3)",
    "conv_of_state": "heads = 4; mask = causal; mix = gated_delta; "
    "k = x | linear | conv(4) | split",
    "conv_both_ways": "heads = 4; v = x | linear | conv(3, causal = false) | split",
    "running": f"{CAUSAL}; let c = x | linear(heads) | log_sigmoid | running(sum); "
    "score = s + c[i, h] - c[j, h]; k = x | running(mean) | linear | split; "
    "v = x | linear | split | running(max)",
    "shifted": f"{CAUSAL}; let w = x | linear(3 * heads) | split; "
    "q = x | shift(2) | linear | split | conv(3, taps = w); "
    "k = x | linear | conv(2, dilation = 3, groups = 4) | split | rms_norm(scale = false); "
    "v = x | grouped_linear(4) | split | gate(index / 9 - 1)",
    "head_embeddings": f"{CAUSAL}; param e[heads, head_dim] = normal(1); param g[width] = 1; "
    "let c = x * g | linear(head_dim); q = ((c | repeat(heads)) * (1 + e)); out = (o + e) "
    "| merge | linear",
    "one_number_meets_heads": f"{CAUSAL}; param c = 2; let g = x | linear(1) | sigmoid; "
    "out = (c * o + g * o - c * g) | merge | linear",
    "routed": f"{CAUSAL}; let r = x | linear(heads) | softmax | top(2) | l1_norm | scale(2); "
    "out = o | gate(r) | merge | linear",
    # normalisers and weights
    "softmax_plus_one": f"{CAUSAL}; normalize = softmax_plus_one",
    "learned_sink": f"{CAUSAL}; normalize = sink",
    "held": f"{CAUSAL}; normalize = exp(s) / detach(sum)",
    "held_at_least": f"{CAUSAL}; param z[heads] = 1; normalize = exp(s) / max(exp(z[h]) + sum, 2)",
    "held_of_nothing": "heads = 4; mask = j < i; normalize = exp(s) / max(detach(sum), 1); "
    "out = o | gate(tanh(lse(o)) + entropy(o)) | merge | linear",
    "clamped": f"{CAUSAL}; normalize = relu(s) / max(sum, 1)",
    "value_heads": f"{CAUSAL}; kv_heads = 2; value_heads = 4; value_dim = 3",
    "fewer_value_heads": f"{CAUSAL}; value_heads = 2; score = softcap(5)",
    "fewer_value_heads_plain": f"{CAUSAL}; kv_heads = 4; value_heads = 1",
    "sigmoid": f"{CAUSAL}; normalize = sigmoid",
    "relu": f"{CAUSAL}; normalize = relu",
    "squared_relu": f"{CAUSAL}; normalize = squared_relu",
    "entmax": f"{CAUSAL}; normalize = entmax(1.5)",
    "sparsemax": "heads = 4; normalize = sparsemax; mask = j < i",
    "base_two": f"{CAUSAL}; normalize = 2 ** s / (3 + sum)",
    "weights": f"{CAUSAL}; weights = 0.5 * p + 0.1 / seen",
    "reads_n": "heads = 4; score = s + log(n) * j / m",
    # streams
    "grouped": "heads = 4; kv_heads = 2; mask = causal",
    "one_key_head": "heads = 4; kv_heads = 1; head_dim = 6; value_dim = 3; mask = causal",
    "rope": f"{CAUSAL}; position = rope",
    "rope_interleaved": f"{CAUSAL}; position = rope(100, style = interleaved, scaling = 4)",
    "rope_last": f"{CAUSAL}; position = rope(dims = -2)",
    "rope_first": f"{CAUSAL}; position = rope(dims = 2)",
    "rope_yarn": f"{CAUSAL}; position = rope(dims = 2, scaling = yarn(4, 64))",
    "rope_longrope": f"{CAUSAL}; position = rope(scaling = longrope([1, 2], [2, 8], 64))",
    "normed": f"{CAUSAL}; q = x | linear | split | rms_norm; k = x | layer_norm | linear | split",
    "l2": f"{CAUSAL}; q = x | linear | split | l2_norm; k = x | linear | split | l2_norm;"
          " scale = 5",
    "gate": f"{CAUSAL}; let g = x | linear(heads * value_dim) | sigmoid;"
            " out = o | merge | gate(g) | linear",
    "gate_of_heads": f"{CAUSAL}; let g = x | linear(heads) | sigmoid;"
                     " out = o | gate(g) | merge | linear",
    "latent": f"{CAUSAL}; let c = x | linear(6) | rms_norm; k = c | linear | split;"
              " v = c | linear | split",
    "shared": f"{CAUSAL}; let c = x | linear(16); k = c | split; v = c | split | silu",
    "shared_wholly": f"{CAUSAL}; let c = x | linear(16); k = c | split; v = c | split",
    "concat": f"{CAUSAL}; let r = x | linear(2) | rope | repeat(heads);"
              " k = x | linear(8) | split | concat(r)",
    "arithmetic": f"{CAUSAL}; let a = x | linear; v = (a - 0.3 * x) | tanh | split;"
                  " out = (o * 2) | merge | linear",
    "two_linears": f"{CAUSAL}; q = x | linear(6, bias = true) | gelu | linear | split",
    "no_weights": "heads = 4; q = x | split; k = x | split; v = x | split; out = o | merge;"
                  " mask = causal",
    "norm_of_heads": f"{CAUSAL}; out = o | rms_norm | merge | linear",
    "odd_names": f"{CAUSAL}; let lambda = x | linear(heads) | sigmoid; let g_i = x | linear(heads);"
                 " score = s * lambda[i, h] + g_i[j, h]",
    "names_of_ours": f"{CAUSAL}; let range = x | linear(heads); let positions = x | linear(heads);"
                     " let wide_ = x | linear(1);"
                     " score = s * wide_[i] + range[j, h] + positions[j, h]",
    # context
    "cross": "heads = 4; source = context; context_width = 12",
    "cross_masked": "heads = 4; source = context; context_width = 12; mask = j <= 2 * i;"
                    " k = context | linear | split | rope; score = s - abs(2 * i - j)",
    "cross_bias": "heads = 4; source = context; let g = context | linear(heads);"
                  " score = s + g[j, h]",
    # recurrences
    "linear": "heads = 4; mix = linear; mask = causal",
    "linear_both_ways": "heads = 4; mix = linear",
    "linear_documents": "heads = 4; mix = linear; mask = document",
    "delta": "heads = 4; mix = gated_delta; mask = causal; k = x | linear | split | l2_norm",
    "delta_documents": "heads = 4; mix = gated_delta; mask = causal and document",
    "levels": "heads = 4; kv_heads = 2; value_dim = 3; mix = in_levels(7); mask = causal; "
    "k = x | linear | split | l2_norm",
    "levels_documents": "heads = 4; mix = in_levels(3); mask = causal and document; "
    "k = x | linear | split | l2_norm",
    "levels_alike": f"{CAUSAL}; mix = alike; branch near {{ mix = attend }}; "
    "branch side { heads = 2; mix = in_levels(4); mask = causal and document; "
    "k = x | linear | split | l2_norm; out = o | merge | linear }; "
    "out = (o + near) | merge | concat(side) | linear",
    "levels_of_vectors": "heads = 4; mix = in_two_levels; mask = causal; "
    "branch side { mix = linear }; out = (o + side) | merge | linear",
    "delta_grouped": "heads = 4; kv_heads = 2; value_dim = 3; mix = gated_delta; mask = causal;"
                     " let g = x | linear(heads) | sigmoid; out = o | gate(g) | merge | linear",
    "lambda": f"{CAUSAL}; param a[head_dim] = normal(1); param b[head_dim] = normal(1);"
              " param c[heads, head_dim] = normal(1); branch two { q = x | linear | split };"
              " let g = exp(dot(a, b)) - norm(c) * dot(c, q) + mean(x | linear(3)) + 0.1;"
              " out = (o - g * two) | merge | linear",
    "leaky": "heads = 4; mix = leaky(0.5); mask = causal",
    "odd_states": "heads = 4; mix = odd; mask = causal",
    "solved": "heads = 4; kv_heads = 2; value_dim = 3; mix = solved; mask = causal",
    "solved_documents": "heads = 4; mix = solved; mask = causal and document",
    "solved_both_ways": "heads = 4; mix = solved_of_all",
    "delta_after_attention": f"{CAUSAL}; branch side {{ k = o; v = o; mix = gated_delta }}; "
    "out = (o - 0.5 * side) | merge | linear",
    "solved_after_attention": f"{CAUSAL}; branch side {{ k = o; v = o; mix = solved }}; "
    "out = (o - 0.5 * side) | merge | linear",
}  # fmt: skip
MIXERS = """
mix leaky(c) {
  param a[heads] = 0.9 - 0.1 * h
  param b[head_dim] = 0.1
  const w = 0.25
  state S[head_dim, value_dim] = 0.5
  state level = 1
  u <- q * b
  S <- a * S * 1e-1 + max(outer(k, v), -2) + where(level > 0.2, c * w, 0)
  level <- min(level, 3) * c + norm(S) / 9 + mean(k)
  o <- u @ S / (1 + abs(level)) + sum(v) * v
}
mix odd {
  let last = x | linear(heads) | sigmoid
  state n[value_dim] = 0
  state fresh[value_dim] = 0
  n <- last * n + v
  fresh <- 2 * n - fresh / 2
  o <- fresh + clip(n, -1, 1)
}
mix solved {
  let a = x | linear(heads) | sigmoid
  param ridge[heads, head_dim] = 1
  state K[head_dim, head_dim] = 0
  state S[head_dim, value_dim] = 0
  K <- a * K + outer(k, k)
  S <- a * S + outer(k, v)
  o <- solve(K + diag(exp(ridge)), q) @ S
}
mix solved_of_all {
  param ridge[head_dim] = 1
  state K[head_dim, head_dim] = 0
  state z[head_dim] = 0
  K <- K + outer(k, k)
  z <- z + k
  o <- solve(diag(2 + ridge * ridge), q) + solve(K + diag(1 + ridge * ridge), z)
}
mix in_levels(levels) {
  let lam = x | linear(heads * levels) | softplus | split
  let a = x | linear(heads) | sigmoid
  param share[heads, levels] = 1
  state S[head_dim, value_dim] = 0 by share * lam
  S <- a * (S - outer(k, k @ S)) + outer(k, v)
  o <- q @ S
}
mix alike {
  let one = q | softplus
  let two = q | softplus
  state S[head_dim, value_dim] = 0 by two
  S <- S + outer(one, v)
  o <- two @ S
}
mix in_two_levels {
  param share[heads, 2] = 1
  state z[value_dim] = 0 by share
  z <- z / 2 + v
  o <- z
}
"""


def source(name: str) -> str:
    return f"{MIXERS}\nblock b {{ {SETTINGS[name]} }}\n"


def block(text: str, name: str = "b", width: int | None = WIDTH) -> Block:
    """Return a checked block: a name of the battery, or the text of settings."""
    return _checked(source(text) if text in SETTINGS else text, name, width)


@cache
def _checked(text: str, name: str, width: int | None) -> Block:
    return block_of(check(parse(text)), name, width)


def compiled(what: Block, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Return the compiled module with random weights, constants in the wanted precision."""
    from headloom.compiler.api import build_module

    module = build_module(what, Target("torch"), dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.3 * noise).to(dtype)
    return module.eval()


def oracle(what: Block, module: nn.Module) -> nn.Module:
    """Return the reference with the module's weights."""
    dtype = next((each.dtype for each in module.parameters()), torch.float64)
    meaning = reference(what, dtype=dtype)
    meaning.load_state_dict(module.state_dict())
    return meaning.eval()


def inputs(what: Block, n: int = 11, m: int = 7, batch: int = 2) -> dict[str, Tensor]:
    """Return random arguments for a block: x, context where it reads one, segments."""
    generator = torch.Generator().manual_seed(n)
    given = {"x": torch.randn(batch, n, what.width, generator=generator, dtype=torch.float64)}
    if what.context_width is not None:
        shape = (batch, m, what.context_width)
        given["context"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return given
