"""What `import headloom as hl` gives to look at: texts, pictures, certificates, the zoo."""

from __future__ import annotations

import subprocess
import sys

import pytest

import headloom as hl
from headloom.compiler.verify import certificate
from headloom.compiler.verify.verify import Finding

TEXT = """block local {
  heads = 2
  mask  = causal and window(3)
  score = alibi
}

model tiny {
  vocab  = 11
  width  = 16
  layers = [local] * 2
}"""
ARCH = hl.load(TEXT, format="loom")


def found(*oks: bool | None) -> certificate.Certificate:
    findings = [
        Finding("b", f"check {at}", ok, 3, 1e-9, "at x[0, <1>]") for at, ok in enumerate(oks)
    ]
    return certificate.Certificate("b", "0123", tuple(findings))


def test_an_architecture_is_its_text() -> None:
    assert repr(ARCH) == str(ARCH) == TEXT
    assert hl.load(repr(ARCH), format="loom") == ARCH


def test_a_notebook_draws_parts_mask_and_cost() -> None:
    for html in (ARCH._repr_html_(), hl.show(ARCH, "tiny")._repr_html_()):
        assert html.startswith("<pre")
        assert "slope[h] * abs(i - j)" in html  # and not a mark-up of ours
        assert "j &lt;= i and abs(i - j) &lt; 3" in html
        assert "▀██▄" in html
        assert "16,384 tokens" in html
    assert "9 tokens" in repr(hl.show(ARCH, "local", width=8, tokens=9))


def test_what_people_write_is_escaped() -> None:
    text = 'search { out = "<script>" } # <b>[red]\nblock a { heads = 2 }'
    html = hl.load(text, format="loom")._repr_html_()
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;[red]" in html
    assert "<script>" not in html
    assert "x[0, &lt;1&gt;]" in found(None)._repr_html_()


def test_a_report_says_paths_and_costs() -> None:
    report = hl.explain(ARCH, "tiny", backend="torch")
    for text in (repr(report), report._repr_html_()):
        assert "tiles" in text
        assert "not sdpa: it has no score function" in text
        assert "cache bytes" in text


def test_a_certificate_raises_when_asked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def make(*args: object) -> certificate.Certificate:
        asked.append(args)
        return found(True, False)

    monkeypatch.setattr(certificate, "make", make)
    result = hl.verify(ARCH, "local", width=32, targets=["sm_90"])
    assert (result.ok, len(result.checks)) == (False, 2)
    assert "b: check 1 does not hold: at x[0, <1>]" in str(result)
    assert "1 of 2 checks hold" in result._repr_html_()
    with pytest.raises(hl.NotVerifiedError, match="1 of 2 checks hold") as problem:
        hl.verify(ARCH, "local", strict=True)
    assert problem.value.certificate is not None
    (whats, targets, module, optimize), _ = asked
    assert (whats[0].width, targets, module, optimize) == (32, ("sm_90",), None, "default")


def test_a_certificate_that_holds() -> None:
    result = found(True, None)
    assert result.ok
    assert result.demanded() is result


def test_the_zoo_gives_texts_and_architectures() -> None:
    entry = hl.zoo("alibi")
    assert "block alibi" in entry.text
    assert str(entry) == entry.text
    assert hl.load(entry.text, format="loom") == entry.arch
    assert repr(entry).startswith("<alibi (positions): ")
    assert entry in hl.zoo()
    with pytest.raises(LookupError, match="did you mean `alibi`"):
        hl.zoo("alibu")


def test_the_door_itself_is_light() -> None:
    code = "import sys, headloom; sys.exit(bool({'torch', 'rich', 'lark'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {"show", "verify", "zoo"} <= set(dir(hl))
