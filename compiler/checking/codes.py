"""The errors and warnings of the checker: one entry a code, each with a text that triggers it.

The table is the test (every example must raise its own code and no other) and the page that
`headloom explain L204` prints. `CODES` holds the grammar's codes as well.
"""

from __future__ import annotations

from ...grammar.codes import CODES as GRAMMAR
from ...grammar.codes import Code

OWN: dict[str, Code] = {
    code.code: code
    for code in (
        Code(
            "L201",
            "a name is not known here",
            "No stream, tensor, function or definition of this name can be read at this place. "
            "Check the spelling, or declare it with `let`, `param` or a definition of its kind.",
            "block a { mask = casual }",
        ),
        Code(
            "L202",
            "a setting does not exist, or is missing",
            "A block or model has a fixed set of settings, and a model needs `width` and "
            "`layers`. Check the spelling; a value of your own is a `let`.",
            "block a { head = 8 }",
        ),
        Code(
            "L203",
            "a size is out of range",
            "A dimension is a whole number from 1 to 2^24, a model has 1 to 1024 layers, and a "
            "tensor at most 2^32 numbers. Write a size within these limits.",
            "block a { heads = 1e12 }",
        ),
        Code(
            "L204",
            "`kv_heads` must divide `heads`",
            "Query head h reads key/value head h // (heads / kv_heads) (and value head "
            "h // (heads / value_heads), where that is set), so every key/value head "
            "must serve as many query heads. Use a divisor of `heads`.",
            "block a { heads = 8; kv_heads = 3 }",
        ),
        Code(
            "L205",
            "`heads` must divide the width",
            "Without `head_dim`, the width is shared out evenly among the heads. Choose another "
            "number of heads, or set `head_dim`.",
            "block a { width = 100; heads = 8 }",
        ),
        Code(
            "L206",
            "a stage does not fit its stream",
            "The stage cannot take a stream of this shape: `split` needs a width that the heads "
            "divide, `merge` needs heads, streams that meet must run along the same tokens. The "
            "label shows the shapes.",
            "block a { q = x | linear | split | split }",
        ),
        Code(
            "L207",
            "a pipeline ends in another shape than is needed",
            "q, k and v end as [heads, tokens, dim], and `out` as [tokens, width]. End the "
            "pipeline with `split`, `merge` or a `linear` of the right width.",
            "block a { q = x | linear }",
        ),
        Code(
            "L208",
            "this is not a stream or a stage",
            "A pipeline starts from a stream and goes on with stages: operations such as "
            "`linear(64)`, activations, or a `stage` of your own. Check the spelling.",
            "block a { q = x | liner | split }",
        ),
        Code(
            "L209",
            "the arguments do not fit",
            "A definition, stage or block is called with the arguments it declares, each once; "
            "those without a default must be given. The help lists them.",
            "block a { mask = window }",
        ),
        Code(
            "L210",
            "an expression is of the wrong kind",
            "A mask is true or false, and so are the operands of `and`, `or` and `not`; scores, "
            "normalisers, weights and what is compared are numbers. Add a comparison, or use "
            "`where(condition, a, b)`.",
            "block a { mask = i - j }",
        ),
        Code(
            "L211",
            "a name is defined twice",
            "Within one block, one model or one file, each name is given once; inheritance, not "
            "repetition, overrides. Remove one, or choose another name.",
            "block a { heads = 4 }\nblock a { heads = 8 }",
        ),
        Code(
            "L212",
            "something is defined in terms of itself",
            "A stream, definition, block or model leads back to itself, as the label shows. Break "
            "the ring.",
            "block a : b { heads = 4 }\nblock b : a { heads = 8 }",
        ),
        Code(
            "L213",
            "a text expands into too much",
            "Definitions that use others several times, or each other's results as arguments, "
            "multiply; a block may use 20,000 parts of expressions. Say it with fewer repetitions.",
            "\n".join(
                ["mask m0 = j <= i", *(f"mask m{n} = m{n - 1} and m{n - 1}" for n in range(1, 16))]
            )
            + "\nblock a { mask = m15 }",
        ),
        Code(
            "L214",
            "an index does not fit",
            "A stream is indexed by its head, its token and its feature, as far as it has them; "
            "tokens are read at `i` or `j`, tensors at numbers and places within their sizes.",
            "block a { let t = x | linear(heads); score = s * t[h, i] }",
        ),
        Code(
            "L215",
            "a name is taken",
            "The name has a meaning of its own in expressions (`i`, `x`, `seen`), is a setting, "
            "or cannot be held by a module (`forward`, `half`, `lambda`). Choose another.",
            "block a { param forward[heads] = 0 }",
        ),
        Code(
            "L216",
            "a mixer's statements do not fit together",
            "A mixer has states and updates `name <- expression`, the last of them of `o`. Within "
            "a head, values are numbers, vectors or matrices; the label shows the shapes that do "
            "not meet.",
            "mix m { state S[head_dim] = 0; S <- S + k @ v; o <- S }\n"
            "block a { mix = m; mask = causal; head_dim = 4; value_dim = 8 }",
        ),
        Code(
            "L217",
            "a recurrent mixer cannot have this mask",
            "A recurrence runs along the tokens, so its mask is `causal`, or `all` where the "
            "state only adds, each with or without `document`. Set `mask = causal`.",
            "block a { mix = linear; mask = window(4) }",
        ),
        Code(
            "L218",
            "there is no such block or model",
            "The file defines no block or model of this name, or it is not clear which is meant. "
            "Check the spelling, or name one.",
            "block a { heads = 4 }\nmodel m { width = 64; layers = [b] }",
        ),
        Code(
            "L219",
            "this must be a number",
            "Sizes, rates and first values are worked out before anything runs, so they read "
            "settings and `let`s that are numbers, and their result is finite. Constants within "
            "expressions have a value too; only log(0), minus infinity, may stand in a score.",
            "block a { heads = x }",
        ),
        Code(
            "L220",
            "this is not a normaliser or a definition with a value",
            "A normaliser is numerator / denominator with `sum` in the denominator alone, or a "
            "numerator in `tau` `where sum == 1`, which has one threshold for any logits; every "
            "definition ends with an expression.",
            "block a { normalize = exp(s) * sum }",
        ),
        Code(
            "L222",
            "this setting takes certain words",
            "The setting or argument is one of a few words or forms, which the message lists.",
            "block a { dropout = 0; q = x | rope(style = halves) | split }",
        ),
        Code(
            "L228",
            "this needs the rows of an attention",
            "`lse`, `entropy`, `rows`, `columns` and `joint` are numbers of an attention's map: "
            "they take `o` or a branch that attends. `lse` and `entropy` need a normaliser like "
            "softmax: exp(…) over `sum`, to which only positive terms are added.",
            "block a { normalize = relu; out = o | gate(lse(o)) | merge | linear }",
        ),
        Code(
            "L229",
            "this must be one number",
            "What training adds to the loss is one number: take the `mean` of every term, which "
            "is over the batch, the heads and the tokens.",
            "block a { regularize = 0.1 * entropy(o) }",
        ),
        Code(
            "L223",
            "this is a space, not an architecture",
            "The text has holes, so it stands for many architectures. `headloom check` and "
            "`headloom verify` take spaces, `headloom search` draws from them; to build one "
            "architecture, write a value in place of every hole.",
            "block a { heads = choose(4, 8) }",
        ),
        Code(
            "L224",
            "there is no layer below",
            "`previous.k` is the stream `k` of the layer below, so the block must stand above "
            "another one in a model. Begin `layers` with another block; by itself, such a block "
            "cannot be built.",
            "block a { k = previous.k }\nmodel m { width = 64; layers = [a] }",
        ),
        Code(
            "L225",
            "the layer below has a map of other pairs",
            "`previous.s` and `previous.p` are the logits and weights of the layer below, pair by "
            "pair. Both layers must be attention with as many heads, over the same tokens, under "
            "the same mask, and the mask may read no streams.",
            "block a { heads = 4; mask = causal }\n"
            "block b { heads = 4; score = s + previous.s }\n"
            "model m { width = 64; layers = [a, b] }",
        ),
        Code(
            "L226",
            "a block cannot be a layer",
            "A layer adds its output to its input, so it must give one output a token. A block "
            "whose `out` runs along other tokens, such as latents, can only stand alone.",
            "block a { q = latents(3) | linear | split }\nmodel m { width = 64; layers = [a] }",
        ),
        Code(
            "L227",
            "a model cannot be an encoder",
            "An encoder makes features of the context, one list for each of its tokens: it has "
            "`head = none`, and reads no context itself.",
            "block a { heads = 4 }\n"
            "block b { heads = 4; source = context }\n"
            "model e { vocab = 8; width = 64; layers = [a] }\n"
            "model m { width = 64; layers = [b]; encoder = e }",
        ),
        Code(
            "L231",
            "nothing is left of a layer",
            "`none` in a part's place takes the term away in which the part stands, and this was "
            "all there is. Give the part, or leave the layer out.",
            "block a { heads = 4 }\nlayer only(part) { out = x | part }\n"
            "model m { width = 64; layers = [a, only(none)] }",
        ),
        Code(
            "L232",
            "a block cannot be a part of this",
            "Blocks and layers are stages of a layer's pipelines. In a block's own pipelines there "
            "may be feed-forwards and stages; tokens mix a second time in a `branch`.",
            "block a { heads = 4 }\nblock b { heads = 4; q = x | a | split }",
        ),
        Code(
            "L240",
            "a part that several places share is not the same in all of them",
            "`once(e)` is one part with one set of weights, and each mention of it uses these. So "
            "it takes streams of the same width everywhere, and its text may not read `layer`, nor "
            "may layers above read other streams of it in one place than in another.",
            "block a { heads = 4; scale = layer + 1 }\nmodel m {\n  width = 64\n"
            "  let core = once(a)\n  layers = [pre(core, none), pre(core, gelu)]\n}",
        ),
        Code(
            "L230",
            "a state cannot be kept in levels",
            "`state S[…] = 0 by weights` keeps one S for each level of a tree over the tokens. It "
            "begins at 0, has a vector of weights, one a level, and is written by statements that "
            "are affine in it and read of it what they say themselves.",
            "mix m {\n"
            "  let lam = x | linear(heads * 4) | split\n"
            "  state S[head_dim] = 0 by lam\n"
            "  S <- tanh(S) + k\n"
            "  o <- q * S\n"
            "}\n"
            "block a { mix = m; mask = causal }",
        ),
        Code(
            "L234",
            "an attention is read by its own values in a way that is not solved",
            "Where a mask shows earlier tokens alone, `j < i`, the values may read what is mixed "
            "of them, as each token's turn comes after those it sees. They are then linear in it, "
            "with a number for each head and token before it, and all else in them has a name.",
            "block a {\n  heads = 4; mask = causal\n  let w = x | linear | split\n"
            "  branch u { mask = j < i; v = w - tanh(u) }\n  v = w - u\n}",
        ),
        Code(
            "L235",
            "keys cannot be carried like this",
            "`carry` says what each further token does to every key before it, linear in the key "
            "`k`, with streams of the further token. The mask is causal, and queries meet keys by "
            "their product.",
            "block a {\n  heads = 4; mask = causal\n  let w = x | linear | split\n"
            "  carry = k - w * tanh(dot(w, k))\n}",
        ),
        Code(
            "L236",
            "it cannot be several experts",
            "`mixture(part, weights)` runs as many feed-forwards as there are weights, each on the "
            "tokens it weighs: [n, experts], a number each. An expert is a feed-forward of one "
            "token, made of `linear`, of `param`s that are a number or features, of functions and "
            "features; it holds no other part, reads no other tokens and draws nothing.",
            "ffn mixed { let w = x | linear(4) | softmax; out = x | mixture(near, w) }\n"
            "ffn near  { out = x | conv(4) | linear }\n"
            "block a { heads = 4 }\nmodel m { width = 32; layers = [a]; ffn = mixed }",
        ),
        Code(
            "L238",
            "a model's images do not fit its patches",
            "`patches(size, channels = 3, image)` cuts images into patches, one token each; a side "
            "of an `image` is a multiple of a patch's, learned positions are as many as patches, "
            "and there is no `vocab` beside it.",
            "block a { heads = 2 }\n"
            "model m { width = 8; layers = [a]; patches = patches(16, image = 40); "
            "head = classify(10) }",
        ),
        Code(
            "L241",
            "this selection does not say which groups",
            "`select` is `top(count, e)`, `above(threshold, e)`, `mass(share, e)` or "
            "`random(count)`. With `size` or `rows` over 1, the score e is the same at all tokens "
            "of a group: it reads what is pooled of them, or `within` says how a group's score is "
            "made of theirs.",
            "block a { mask = causal; select = top(4, i - j, size = 8) }",
        ),
        Code(
            "L242",
            "a selection would look ahead",
            "Under a causal mask a query chooses by what it has seen. A pooled group is complete "
            "only after its last token: until then it may be forced in by `always`, which leaves "
            "it out of the choice, or left out by `among`.",
            "block a {\n  heads = 4; mask = causal\n  let kb = k | pool(mean, size = 8)\n"
            "  select = top(2, dot(q[h, i], kb[h, j // 8]), size = 8)\n}",
        ),
        Code(
            "L243",
            "these tokens cannot be taken",
            "`take(chosen)` hands the tokens of which `chosen` [n, 1] is not 0 to the stages after "
            "it, and `put` returns them to their places, in the same pipeline of a layer or a "
            "feed-forward. What stands between maps features of tokens [n, d], and reads no other "
            "layer.",
            "layer half(part) { let r = x | linear(1); out = x + (x | take(r > 0) | part) }\n"
            "block a { heads = 4 }\nmodel m { width = 32; layers = [half(a)] }",
        ),
        Code(
            "L244",
            "training cannot move this",
            "`NAME <- expression` says what each forward pass in training sets a `param` of the "
            "block to, without a gradient. The expression has its shape, and reads tensors and "
            "means over the batch: `mean(stream)`, `mean_each(stream)`. What runs several times, "
            "by `loop` or `once`, is not moved.",
            "block a { heads = 4; let t = x | linear(heads); param b[heads] = 0; b <- b + t; "
            "score = s + b[h] }",
        ),
        Code(
            "L245",
            "this cannot be kept",
            "`keep = top(count, e, per = kv_head, always = …)` says which keys stay held from one "
            "query to the next, under a causal mask; the others are gone for good. So expressions "
            "read a pair's own query and key, and sums over the queries so far in `e` alone; heads "
            "that hold other keys have streams of their own along them.",
            "block a { heads = 4; mask = causal; keep = above(0.1, p) }",
        ),
        Code(
            "W001",
            "a block depends on the number of tokens",
            "An expression reads `n` or `m`, or the scaling of `rope` depends on how long a "
            "sequence is, so that values change as it grows and decoding does not repeat what "
            "training saw. Read `seen`, the number of visible keys; scale by `yarn` or `llama3`.",
            "block a { score = s * log(n); mask = causal }",
        ),
        Code(
            "W002",
            "something is never used",
            "A `let`, `param` or `const` reaches neither the mixing nor the output, and is left "
            "out of the module. Use it, or remove it.",
            "block a { let g = x | linear | sigmoid }",
        ),
        Code(
            "W003",
            "a setting has no effect beside a recurrent mixer",
            "`similarity`, `score`, `carry`, `normalize`, `weights`, `scale`, `dropout` belong to "
            "pairwise attention; a recurrence does what its statements say. Remove the setting.",
            "block a { mix = linear; mask = causal; score = softcap(5) }",
        ),
        Code(
            "W004",
            "a block has not been checked",
            "A block that reads the layer below is checked where a model uses it, and no model of "
            "the file does. Use it in a model, or remove it.",
            "block a { k = previous.k }",
        ),
        Code(
            "W005",
            "a mask shows nothing to anyone",
            "No query sees a key, so that the rows of all weights are empty and nothing is mixed. "
            "The query stands at `i`, the key at `j`; `window(w)` needs a w of at least 1.",
            "block a { mask = causal and j > i }",
        ),
        Code(
            "W006",
            "a read may lie after the query",
            "The mask lets no query see later keys, but an expression reads a stream at another "
            "token, `t[j // 4 * 4 + 3]`, which may come after the query. So the block cannot be "
            "decoded. Read a token up to `j`, or let the mask say that such tokens have passed.",
            "block a {\n  heads = 4; mask = causal\n  let t = x | linear(heads)\n"
            "  score = s + t[j // 4 * 4 + 3, h]\n}",
        ),
    )
}

CODES: dict[str, Code] = {**GRAMMAR, **OWN}
