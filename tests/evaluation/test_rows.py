import dataclasses

import pytest
import yaml

from illada.evaluation.rows import PAPER, paper_rows
from illada.generation.settings import GenerationSettings


@pytest.mark.parametrize("table", ["base", "instruct"])
@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_no_row_of_the_paper_uses_guidance(table, decode):
    """Ours differs from the authors' there (docs/design.md): it must not come into a number of the paper unseen."""
    fields = {field.name for field in dataclasses.fields(GenerationSettings)}
    assert "guidance_scale" in fields
    assert GenerationSettings().guidance_scale == 0
    for row in paper_rows(table, decode, "3-4"):
        assert row.generation.keys() <= fields | {"max_gen_toks"}, row.name
        assert "guidance_scale" not in row.generation, row.name
    text = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    assert not any(word in str(text) for word in ("guidance", "cfg"))
