"""The validation loss as a matrix: read from a row of metrics, drawn and tabled."""

from pathlib import Path

from longtake.data.decode import probe
from longtake.train.report_matrix import level_name, matrix_of, write_heatmap

ROW = {
    f"val/loss/t{level}/5x16x16/{task}{ema}": float(level)
    for level in ("0.30", "0.80")
    for task in ("t2v", "extend_forward")
    for ema in ("", "_ema")
}


def test_a_matrix_is_found_among_other_metrics(tmp_path: Path) -> None:
    matrix = matrix_of({**ROW, "val/loss": 1.0, "val/loss/t0.30": 2.0, "val/loss/t2v_ema": 3.0})
    assert matrix is not None
    assert matrix.rows == ("5x16x16/extend_forward", "5x16x16/t2v")
    columns, rows = matrix.table
    assert columns == ["weights", "bucket/task", "t=0.30", "t=0.80"]
    assert rows[-1] == ["EMA", "5x16x16/t2v", 0.3, 0.8]
    write_heatmap(matrix, tmp_path / "a" / "heat.png")
    assert probe((tmp_path / "a" / "heat.png").read_bytes()).width > 300
    single = matrix_of({n: v for n, v in ROW.items() if "t2v" in n})
    assert single is not None and single.rows == ("5x16x16/t2v",)
    write_heatmap(single, tmp_path / "line.png")
    assert probe((tmp_path / "line.png").read_bytes()).width > 300
    assert matrix_of({"val/loss": 1.0, "val/loss/t0.30": 2.0}) is None


def test_names_keep_levels_apart() -> None:
    names = {0.5: "0.50", 1.0: "1.00", 0.996: "0.996", 0.00001: "0.00001", 1 / 3: f"{1 / 3!r}"}
    assert {level: level_name(level) for level in names} == names
    matrix = matrix_of({f"val/loss/t{name}/5x16x16/t2v": 1.0 for name in names.values()})
    assert matrix is not None and matrix.levels == tuple(level_name(x) for x in sorted(names))
