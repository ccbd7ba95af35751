"""The errors of the grammar: one entry a code, each with a text that triggers it.

The table is the test (every example must raise its own code) and the page that
`headloom explain L101` prints. The compiler keeps a table of the same kind for its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Code:
    """`example` raises the code when it is read as `form`: `loom`, `yaml`, or a `file`'s path."""

    code: str
    title: str
    explanation: str
    example: str
    form: str = "loom"


CODES: dict[str, Code] = {
    code.code: code
    for code in (
        Code(
            "L001",
            "a file cannot be read",
            "The file is missing, may not be read, is not UTF-8 text, or is larger than any "
            "description is (256 KiB). Check the path and the encoding.",
            "no/such/file.loom",
            form="file",
        ),
        Code(
            "L101",
            "a word is not expected here, or the text ends too early",
            "The text stops following the grammar at the marked place: a bracket or brace may "
            "be open, an operator may lack its second half, or two statements may share a line. "
            "The help says what could stand there.",
            "block a {\n  heads = 8\n",
        ),
        Code(
            "L102",
            "a character does not belong in a description",
            "Names are made of a-z, A-Z, 0-9 and _, strings stand in double quotes and end on "
            "their line, and a comment begins with #. Remove the character or close the string.",
            "mask near = i & j",
        ),
        Code(
            "L103",
            "an expression is nested too deeply",
            "An expression may have 64 levels, and branches 16. Name a part of it with `let`; a "
            "chain of one of `or`, `and`, `+` and `*` may be long, as it is no nesting.",
            "let deep = " + "[" * 65 + "]" * 65,
        ),
        Code(
            "L104",
            "a number is too large",
            "A number has at most 30 digits and must be finite as a 64-bit float. Write it with "
            "an exponent, or check its size.",
            "let big = 1e999",
        ),
        Code(
            "L111",
            "the yaml cannot be read",
            "The text is not YAML at the marked place. An expression that holds `: ` or ` #`, or "
            "begins with a mark such as `[`, `*` or `|`, belongs in quotes; indent with spaces.",
            "let:\n  a: x: y\n",
            form="yaml",
        ),
        Code(
            "L112",
            "a feature of yaml that descriptions do not have",
            "Anchors, aliases, tags, several documents and keys that are no text are refused, so "
            "that a file says what it seems to say. Write the value again, or use `base`.",
            "let:\n  a: &one 1\n  b: *one\n",
            form="yaml",
        ),
        Code(
            "L113",
            "a key comes twice",
            "A mapping holds each key once. Remove one; where both are meant, in this order, "
            "write a list of mappings.",
            "blocks:\n  a:\n    heads: 8\n    heads: 4\n",
            form="yaml",
        ),
        Code(
            "L114",
            "a value has the wrong shape",
            "A group such as `blocks` or `let` is a mapping of names, a body is a mapping or a "
            "list of statements, and a setting is an expression or a list.",
            "blocks:\n  a: 8\n",
            form="yaml",
        ),
        Code(
            "L115",
            "a key has no meaning here",
            "The file's keys are the groups of the language (`masks`, `blocks`, `models` …), and "
            "a setting's key is one name. Check the spelling and the indentation.",
            "bloks:\n  a: {heads: 8}\n",
            form="yaml",
        ),
    )
}
