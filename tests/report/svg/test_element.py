"""Elements escape what is put into them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from cat_plugin.report.svg.element import element


def test_elements_escape() -> None:
    made = element("p", "<b>", Markup("<i></i>"), title='"x"', hidden=False, open=True, x1=1.005, class_="a")
    assert made == '<p title="&#34;x&#34;" open x1="1" class="a">&lt;b&gt;<i></i></p>'
    with pytest.raises(ValueError, match="no name of an attribute"):
        element("p", **{"x onload": "1"})


@given(st.text())
def test_text_cannot_leave_its_element(text: str) -> None:
    inside = str(element("p", text, title=text)).removeprefix("<p").removesuffix("</p>")
    assert "<" not in inside
    assert inside.count('"') == 2
