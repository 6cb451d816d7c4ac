"""One definition of each word, which the report uses."""
import pytest

from nioodd.core.errors import NiooddError
from nioodd.core.glossary import GLOSSARY, define, glossary_table


def test_words_in_the_order_asked_for():
    assert [*define("OOD", "ID")] == ["OOD", "ID"] and define() == GLOSSARY


def test_an_unknown_word_gets_the_nearest():
    with pytest.raises(NiooddError, match="unknown word 'siblin'; did you mean 'sibling'"): define("siblin")


def test_definitions_are_plain_text_of_whole_sentences():
    for word, text in GLOSSARY.items():
        assert text[0].isupper() and text.rstrip("\"").endswith("."), word
        assert not set("|<>\n") & set(text), word  # they go into tables of Markdown and HTML


def test_a_table_has_a_row_for_each_word():
    assert glossary_table("U", "ID").splitlines()[2].startswith("| U | ")
    assert len(glossary_table().splitlines()) == 2 + len(GLOSSARY)
