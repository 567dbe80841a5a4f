"""The clock of transformers' chat templates."""

import datetime

import pytest
from transformers.utils import chat_template_utils

from parscale.compat.chat_templates import dated
from parscale.errors import IncompatibleVersionError


def written(template="{{ strftime_now('%Y-%m-%d %H') }}"):
    texts, _ = chat_template_utils.render_jinja_template([[]], chat_template=template)
    return texts[0]


def test_templates_write_the_day_in_the_block_alone():
    before = chat_template_utils.datetime
    with dated(datetime.date(2001, 2, 3)):
        assert written() == "2001-02-03 00"
    assert chat_template_utils.datetime is before
    assert written("{{ strftime_now('%Y') }}") >= "2025"


def test_another_clock_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.delattr(chat_template_utils, "datetime")
    with pytest.raises(IncompatibleVersionError, match="datetime"), dated(datetime.date(2001, 2, 3)):
        pass
