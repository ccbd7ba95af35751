"""The errors of reading known models: one entry a code, each with a configuration that raises it.

The table is the test, and the page that `headloom explain L602` prints.
"""

from __future__ import annotations

from ..grammar.codes import Code

CODES: dict[str, Code] = {
    code.code: code
    for code in (
        Code(
            "L601",
            "the kind of model is not known",
            "`model_type` names the kind, and there is a row for each that can be read; "
            "`docs/known.md` lists them, and what others would need.",
            '{"model_type": "t5"}',
            "config",
        ),
        Code(
            "L602",
            "a field says what is not supported",
            "The field is read, but there is nothing in the description for this value of it. "
            "The help says what there is.",
            '{"model_type": "llama", "hidden_act": "mish"}',
            "config",
        ),
        Code(
            "L603",
            "a field says something that nothing reads",
            "It differs from its class's default, and is not among the fields that say nothing "
            "of what a model computes (`known/inert.py`), so the description may miss something. "
            "Leave it out if it means nothing.",
            '{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "new_idea": 3}',
            "config",
        ),
        Code(
            "L604",
            "a field is needed that is not there",
            "Defaults are known to the classes of transformers: install it, or say the field.",
            '{"model_type": "llama", "hidden_size": 32}',
            "bare",
        ),
        Code(
            "L605",
            "transformers does not take the configuration",
            "Its class for this kind refuses a field. What it says of it follows.",
            '{"model_type": "llama", "hidden_size": "wide"}',
            "config",
        ),
        Code(
            "L606",
            "a tensor does not fit",
            "Every tensor of theirs has a place in ours or a reason to have none, every tensor of "
            "ours comes from theirs, and both have as many numbers. A file of weights may be of "
            "another model than its configuration.",
            '{"model_type": "llama"}',
            "weights",
        ),
    )
}
