"""Phrases that have to be decoded are not in docstrings, comments, messages and pages: say plainly what is meant."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [path for folder in ("numba_moe", "reference", "docs") for path in (ROOT / folder).rglob("*")]
PAGES = [path for path in PAGES if path.suffix in (".py", ".md")] + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

# A pattern, and what to write instead.
PHRASES = {
    r"\bso many\b": "the number, or the name of the parameter that holds it",
    r"\bas many\b": "the same number of, one for each",
    r"\bto be had\b": "is available",
    r"\bin vain\b": "what happens to the result",
    r"\bstands? for\b": "means, replaces, is",
    r"\bwhoever\b": "the caller, a module",
    r"\bsuch a\b": "repeat the noun",
    r", (?:\w+ ){0,2}of which\b": "a new sentence",
    r"\bbehind (?:it|them|each|the (?:last|others))\b": "after",
    r"\bone behind\b": "one after",
    r"\bcaptures into\b": "CUDA graphs can capture it",
    r"\btakes the result\b": "memory for the result",
    r"\bwhat is there\b": "name what is there",
    r"\bhow(?:ever)? many of which\b": "a new sentence",
    r"\bas good as none\b": "say what happens",
    r"\bis no queue\b": "threads do not wait for it",
}
# Where a phrase says what it says in plain English.
ALLOWED = {r"\bstands? for\b": ("CONTRIBUTING.md",)}


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_is_not_used(phrase):
    found = []
    for path in PAGES:
        name = str(path.relative_to(ROOT))
        text = re.sub(r"\s+(?:# )?", " ", path.read_text())
        places = [text[max(match.start() - 40, 0) : match.end() + 40] for match in re.finditer(phrase, text, re.I)]
        found += [f"{name}: {place}" for place in places if name not in ALLOWED.get(phrase, ())]
    assert found == [], f"write {PHRASES[phrase]!r} instead"
