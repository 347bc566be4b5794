"""What sources of single lines do alike."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.dataset_schema import ColumnsConfig, TableLayout
from slipstream.datasets.avazu import AvazuSource
from slipstream.datasets.criteo import CriteoSource
from slipstream.datasets.dlrm_npz import DlrmNpzSource
from slipstream.datasets.source import Source
from slipstream.datasets.table import TableSource
from slipstream.datasets.taobao import TaobaoSource

COLUMNS = ColumnsConfig(label="clicked", sparse=("city, or none",), dense=("price",))
TABLE = TableLayout(columns=COLUMNS, names=("clicked", "city, or none", "price"), has_header=False)
SOURCES = [CriteoSource(), AvazuSource(), TableSource(TABLE)]
# a tab or comma within a value can stand in a quoted field, which only tables have
PLAIN = st.text(st.characters(blacklist_characters="\r\n\t,\0", blacklist_categories=["Cs"]), max_size=5)
ANY = st.text(
    st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]) | st.sampled_from('",'), max_size=5
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
@given(data=st.data())
def test_lines_made_of_fields_have_these_fields(source: Source, data: st.DataObject):
    texts = ANY if isinstance(source, TableSource) else PLAIN
    width = len(source.fields)
    lines = data.draw(st.lists(st.lists(texts, min_size=width, max_size=width), min_size=1, max_size=4))
    found = source.split(source.join(lines)).rows()
    assert [[value or "" for value in line] for line in found] == lines


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
@pytest.mark.parametrize("broken", ["a\nb", "a\r\nb", "a\rb"])
def test_a_line_break_in_a_value_costs_its_line_and_no_other(source: Source, broken: str):
    sound = {"label": "1", "click": "1", "clicked": "1", "id": "7", "hour": "14102100"}
    line = [sound.get(name, "") for name in source.fields]
    torn = [
        broken if name in ("cat_3", "site_id", "city, or none") else text
        for name, text in zip(source.fields, line, strict=True)
    ]
    parsed = source.parse(source.join([line, torn, line]))
    assert (parsed.num_lines, parsed.rejected_lines.tolist()) == (3, [1])


OTHERS = [TaobaoSource(seed=3, history_length=4, points_per_user=2), DlrmNpzSource(num_dense=2, num_tables=3)]


@pytest.mark.parametrize("source", [*SOURCES, *OTHERS], ids=lambda source: type(source).__name__)
def test_a_source_is_the_same_in_another_process(source: Source):
    """Workers on other machines are sent it."""
    sent = pickle.loads(pickle.dumps(source))
    assert (sent.fields, sent.num_tables, sent.table_of_column) == (
        source.fields,
        source.num_tables,
        source.table_of_column,
    )
    line = b"no sample\n"
    assert sent.explain(line) == source.explain(line)
