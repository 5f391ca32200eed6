"""Expressions over catalogue columns: their meaning, their counts, and what they may not do."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from longtake.data.catalogue.filters import apply_filter, split_clauses
from longtake.data.catalogue.indexing import SCHEMA


def rows(count: int = 10) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "key": f"k{i}",
                "frames": i,
                "width": 32 * (i + 1),
                "height": 32,
                "split": ["train", "val", None][i % 3],
                "codec": "h264" if i % 2 else "av1",
                "scores": [("aesthetic", float(i))] if i < 8 else [],
                "caption_chars": [("dense", 10 * i)],
            }
            for i in range(count)
        ],
        schema=SCHEMA,
    )


def kept(where: str, table: pa.Table | None = None) -> list[int]:
    found, dropped = apply_filter(rows() if table is None else table, where, "d", allow_empty=True)
    assert sum(dropped.values()) + found.num_rows == (10 if table is None else table.num_rows)
    return found["frames"].to_pylist()


@pytest.mark.parametrize(
    ("where", "frames"),
    [
        ("frames > 7", [8, 9]),
        ("frames BETWEEN 2 AND 4 AND codec = 'h264'", [3]),
        ("frames NOT BETWEEN 2 AND 8", [0, 1, 9]),
        ("split = 'val'", [1, 4, 7]),
        ("split <> 'val'", [0, 3, 6, 9]),  # NULL is neither equal nor unequal
        ("NOT split = 'val'", [0, 3, 6, 9]),
        ("split IS NULL", [2, 5, 8]),
        ("split IS DISTINCT FROM 'val'", [0, 2, 3, 5, 6, 8, 9]),
        ("split = 'val' OR frames = 0", [0, 1, 4, 7]),
        ("frames > 1 AND split = 'val' OR frames = 0", [0, 4, 7]),  # AND binds tighter
        ("frames > 1 AND (split = 'val' OR frames = 9)", [4, 7, 9]),
        ("CASE WHEN codec = 'av1' AND frames > 2 THEN frames > 6 ELSE frames = 1 END", [1, 8]),
        ("frames < 9 AND CASE WHEN frames > 3 THEN true ELSE frames = 0 END", [0, *range(4, 9)]),
        ("scores['aesthetic'] > 5", [6, 7]),  # absent for 8 and 9
        ("coalesce(scores['aesthetic'], 9) > 5", [6, 7, 8, 9]),
        ("caption_chars['dense'] BETWEEN 20 AND 40", [2, 3, 4]),
        ("width / height >= 2 AND width / height <= 3", [1, 2]),
        ("key IN ('k1', 'k2') AND key LIKE 'k%'", [1, 2]),
        ("codec = 'AND' OR key = 'k3 AND k4' OR frames = 5", [5]),
        ("frames = 5 -- AND frames = 6", [5]),
        ("frames = 5 /* AND frames = 6 */", [5]),
        ("hash(key) % 1 = 0 AND frames = 3", [3]),
        ("frames", list(range(1, 10))),  # a number is true unless 0
    ],
)
def test_meaning(where: str, frames: list[int]) -> None:
    assert kept(where) == frames


def test_every_clause_counts_what_it_drops_in_order() -> None:
    _, dropped = apply_filter(rows(), "frames > 1 and split = 'val' AND frames < 5", "d")
    assert dropped == {"frames > 1": 2, "split = 'val'": 6, "frames < 5": 1}
    assert list(dropped) == ["frames > 1", "split = 'val'", "frames < 5"]


def test_parts_of_a_table_add_up_to_the_whole() -> None:
    where = "frames > 4 AND split = 'val'"
    whole, dropped = apply_filter(rows(), where, "d")
    found, total = [], dict.fromkeys(dropped, 0)
    for first in range(0, 10, 3):
        part, drops = apply_filter(rows().slice(first, 3), where, "d", allow_empty=True)
        assert list(drops) == list(dropped), "every part names every clause"
        found += part["frames"].to_pylist()
        total = {clause: total[clause] + drops[clause] for clause in drops}
    assert found == whole["frames"].to_pylist() and total == dropped
    assert apply_filter(SCHEMA.empty_table(), where, "d", allow_empty=True)[1] == {
        "frames > 4": 0,
        "split = 'val'": 0,
    }


def test_a_repeated_clause_is_counted_once() -> None:
    _, dropped = apply_filter(rows(), "frames > 4 AND frames > 4", "d")
    assert dropped == {"frames > 4": 5}


@pytest.mark.parametrize(
    "where",
    [
        "1); COPY (SELECT 1) TO '{proof}' --",
        "frames > 1; COPY (SELECT 1) TO '{proof}'",
        "(SELECT count(*) FROM read_csv('/etc/passwd')) > 0",
        "EXISTS (SELECT * FROM read_text('/etc/passwd'))",
        "EXISTS (SELECT * FROM '/etc/passwd')",
        "EXISTS (SELECT * FROM glob('/*'))",
        "true) AS keep FROM catalogue; INSTALL httpfs; SELECT (true",
        "true) AS keep FROM catalogue; SET enable_external_access = true; SELECT (true",
        "true) AS keep FROM catalogue; ATTACH '{proof}' AS x; SELECT (true",
        "getenv('HOME') = 'x'",
        "frames > 1 AND",
        "AND frames > 1",
        "frames > > 1",
        "('a",
        "frames) > (1",
        "frames IN (SELECT frames FROM catalogue",
        "frames > 'many'",
        "1) AS BOOLEAN), false) AS keep FROM catalogue; COPY (SELECT 1) TO '{proof}'; "
        "SELECT coalesce(CAST((true",
        "1) AS BOOLEAN), false) AS keep, CAST((true",
        "frames > (SELECT avg(frames) FROM catalogue)",  # of one part, or of all?
        "EXISTS (FROM catalogue)",
        "1 IN (TABLE catalogue)",
        "frames > avg(frames) OVER ()",
        "frames > avg(frames)",
        "count(*) > 0",
        "unnest([true, false])",
        "random() < 0.5",
        "today() > DATE '2026-01-01'",
        "current_timestamp > TIMESTAMP '2026-01-01'",
        "frames > [1)",
        "proof",
        "",
        "   ",
    ],
)
def test_what_is_no_expression_or_reaches_out_is_refused(tmp_path: Path, where: str) -> None:
    proof = tmp_path / "written"
    with pytest.raises(ValueError, match="d: where="):
        apply_filter(rows(), where.format(proof=proof), "d")
    assert not os.listdir(tmp_path)


def test_a_filter_that_leaves_nothing_says_what_dropped_it() -> None:
    with pytest.raises(ValueError, match=r"'frames > 4' drops 5, 'frames < 5' drops 5"):
        apply_filter(rows(), "frames > 4 AND frames < 5", "d")
    assert apply_filter(rows(), "frames > 99", "d", allow_empty=True)[0].num_rows == 0


def test_clauses() -> None:
    assert split_clauses("a = 'it''s AND so' AND b") == ["a = 'it''s AND so'", "b"]
    assert split_clauses('"odd AND name" > 1 AND b') == ['"odd AND name" > 1', "b"]
    assert split_clauses("m['AND'] > 1 AND [1, 2][1] = 1") == ["m['AND'] > 1", "[1, 2][1] = 1"]
    assert split_clauses("a\nAND\nb") == ["a", "b"]
    assert split_clauses("a BETWEEN (1 AND 2) AND 3 AND b") == ["a BETWEEN (1 AND 2) AND 3", "b"]
