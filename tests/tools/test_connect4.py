"""Connect4: the solver against a brute force that shares nothing with it, the boards, the parser. About 3 s."""

import json
import random
import re

import pytest

from spot_megatron.errors import PairError
from tools.eval import connect4

LINES = [
    [(r + k * dr, c + k * dc) for k in range(4)]
    for r in range(6)
    for c in range(7)
    for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1))
    if 0 <= r + 3 * dr < 6 and 0 <= c + 3 * dc < 7
]
THROUGH = {(r, c): [set(line) - {(r, c)} for line in LINES if (r, c) in line] for r in range(6) for c in range(7)}


def brute_force(rows, stone):
    """Columns in which `stone` wins: the lines through the cell where it comes to lie, cell by cell."""
    wins = []
    for column in range(7):
        empty = [row for row in range(6) if rows[row][column] == "."]
        if empty and any(all(rows[r][c] == stone for r, c in line) for line in THROUGH[max(empty), column]):
            wins.append(column + 1)
    return tuple(wins)


def test_every_line_of_the_board_is_there():
    assert len(LINES) == 69


def test_the_solver_finds_what_brute_force_finds_on_ten_thousand_boards():
    rng = random.Random(5)
    found = 0
    for _ in range(10_000):
        rows, to_move = connect4.random_position(rng)
        other = "o" if to_move == "x" else "x"
        expected = brute_force(rows, to_move), brute_force(rows, other)
        assert connect4.solve(rows, to_move) == expected, rows
        found += bool(expected[0] or expected[1])
    assert found > 3_000


def test_boards_are_distinct_positions_of_a_game_and_mostly_have_a_winning_move(tmp_path, monkeypatch, capsys):
    path = tmp_path / "boards.jsonl"
    monkeypatch.setattr("sys.argv", ["connect4", "--boards", "500", "--seed", "1", "--output", str(path)])
    connect4.main()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 500 and len({tuple(row["board"]) for row in rows}) == 500
    assert sum(not (row["winning"] or row["opponent_winning"]) for row in rows) <= 100
    assert all(set(row) == {"id", "board", "to_move", "winning", "opponent_winning"} for row in rows)
    for row in rows:
        text = "".join(row["board"])
        num_x, num_o = text.count("x"), text.count("o")
        assert num_x - num_o == (row["to_move"] == "o")
        assert not any(connect4.has_four(side) for side in connect4.stones(row["board"]))
    assert [board.rows for board in connect4.generate(500, 1)] == [tuple(row["board"]) for row in rows]
    assert [board.rows for board in connect4.generate(20, 2)] != [tuple(row["board"]) for row in rows[:20]]


BOARD = connect4.Board("b", ("." * 7,) * 6, "x", (2, 5), ())


@pytest.mark.parametrize(
    ("box", "verdict"),
    [
        ("[2, 5]; []", "correct"),
        ("[5,2];[]", "correct"),
        (r"\{2, 5\}, \{\}", "correct"),
        ("[2]; []", "wrong"),
        ("[2, 5, 5]; []", "wrong"),  # multisets
        ("[2, 5]; [3]", "wrong"),
        ("[]; [2, 5]", "wrong"),
        ("[2, 5]", "no_answer"),
        ("2, 5", "no_answer"),
        ("[two]; []", "no_answer"),
    ],
)
def test_answers_are_two_multisets_of_columns(box, verdict):
    assert connect4.grade(BOARD, [box]).verdict == verdict


def test_two_boxes_are_two_lists():
    assert connect4.grade(BOARD, ["[2,5]", "[]"]).verdict == "correct"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"board": ["......."] * 5}, "6 texts"),
        ({"board": [*["......."] * 5, "......z"]}, "characters"),
        ({"board": ["x......", *["......."] * 5]}, "lies on no other"),
        ({"to_move": "y"}, "to_move"),
        ({"winning": [1]}, r"`winning` is \[1\], and the solver finds \[\]"),
    ],
)
def test_a_wrong_board_is_refused_with_its_line(change, words):
    row = {"id": "a", "board": ["......."] * 6, "to_move": "x", "winning": [], "opponent_winning": []}
    connect4.read_board(row, "f:1")
    with pytest.raises(PairError, match=re.compile("f:1: .*" + words)):
        connect4.read_board(row | change, "f:1")
