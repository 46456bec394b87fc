"""AMBER: files, scores of descriptions and of answers."""

import json
from pathlib import Path

import pytest

from vlm_tools.hallucination import amber


def test_amber_joins_queries_with_annotations(tmp_path: Path) -> None:
    queries = [{"id": 1, "image": "1.jpg", "query": "Describe"}, {"id": 2, "image": "1.jpg", "query": "Is there?"}]
    truth = [{"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["sun"]}, {"id": 2, "type": "d", "truth": "no"}]
    (tmp_path / "q.json").write_text(json.dumps(queries))
    (tmp_path / "a.json").write_text(json.dumps(truth))
    rows = amber.read_amber(tmp_path / "q.json", tmp_path / "a.json")
    assert rows[0].objects == ("sky",)
    assert rows[0].tempting == ("sun",)
    assert rows[1].objects == ()
    assert amber.accuracy(rows, [None, False]) == {"d": 1.0, "all": 1.0}
    with pytest.raises(ValueError, match="as many answers"):
        amber.accuracy(rows, [])
    with pytest.raises(ValueError, match="no yes/no query"):
        amber.accuracy(rows[:1], [None])
    (tmp_path / "a.json").write_text(json.dumps(truth[:1]))
    with pytest.raises(ValueError, match=r"query 2 of .* has no annotation"):
        amber.read_amber(tmp_path / "q.json", tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="line 1 has no"):
        amber.read_amber(tmp_path / "q.json", tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        amber.read_amber(tmp_path / "q.json", tmp_path / "a.json")


def test_amber_scores_descriptions(tmp_path: Path) -> None:
    related = {"person": ["man", "people"], "forest": ["tree"], "sky": [], "dog": ["puppy"], "sun": []}
    queries = [
        amber.AmberQuery(1, "1.jpg", "Describe", "generative", ("person", "forest", "sky"), ("dog", "sun")),
        amber.AmberQuery(2, "2.jpg", "Describe", "generative", ("dog",), ("sky",)),
    ]
    texts = ["Two men? A man under trees, puppies and the sun.", "A dog in a street"]
    found = amber.generative(queries, texts, related)
    assert (found.chair, found.cover, found.hal, found.cog) == (2 / 5, 3 / 4, 0.5, 2 / 3)
    assert found.hallucinated == (True, False)
    assert amber.generative(queries, texts, related, safe=["sun", "dog", "puppy"]).hal == 0
    near = amber.generative(queries, texts, related, similar=lambda a, b: {a, b} == {"sun", "sky"})
    assert (near.chair, near.cover) == (1 / 5, 1)
    with pytest.raises(ValueError, match="need as many texts"):
        amber.generative(queries, [], related)
    with pytest.raises(ValueError, match="query 3 is a yes/no question"):
        amber.generative([amber.AmberQuery(3, "", "", "discriminative", "yes")], ["x"], related)
    (tmp_path / "relation.json").write_text(json.dumps(related))
    assert amber.read_relations(tmp_path / "relation.json") == related
    (tmp_path / "relation.json").write_text("[]")
    with pytest.raises(ValueError, match="must map each object"):
        amber.read_relations(tmp_path / "relation.json")
    (tmp_path / "relation.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        amber.read_relations(tmp_path / "relation.json")
